//! What a request and a response lose and gain where they cross from a connection of the application into a
//! leg and back (RFC 9110 section 7.6.1, RFC 9113 section 8.2.2).

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Uri, Version, request};

/// Who the caller is, as the far sidecar verified it: `URI=spiffe://...`. Whatever a caller sends under this
/// name is dropped.
pub const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Beside a request that its caller made over HTTP/2, to a port of which nobody has said what is spoken there: the
/// far sidecar takes its application for one that speaks the same, unless it knows better. Its value is `2`.
pub const SPOKEN: HeaderName = HeaderName::from_static("tombolo-http");
const HTTP2: HeaderValue = HeaderValue::from_static("2");

/// Says that the caller speaks HTTP/2.
pub fn say_http2(headers: &mut HeaderMap) {
    headers.insert(SPOKEN, HTTP2);
}

/// Whether the near sidecar says that its caller speaks HTTP/2.
pub fn says_http2(headers: &HeaderMap) -> bool {
    headers.get(&SPOKEN).is_some_and(|value| value == HTTP2)
}

/// Begins the names that only tombolo itself writes into a request or a response.
const OWN_PREFIX: &str = "tombolo-";

/// Removes what only tombolo may say: fields named `tombolo-*`, and who the caller is. The latter also as
/// `X_Forwarded_Client_Cert`, since many applications (CGI, WSGI) can't tell the two apart.
pub fn strip_own(headers: &mut HeaderMap) {
    strip_own_but(headers, None);
}

/// As [`strip_own`], but for one field.
pub fn strip_own_but(headers: &mut HeaderMap, kept: Option<&HeaderName>) {
    let own = |name: &HeaderName| {
        let text = name.as_str();
        kept != Some(name) && (text.starts_with(OWN_PREFIX) || is_client_cert(text))
    };
    // Most have none, and then nothing is allocated.
    let found: Vec<HeaderName> = headers.keys().filter(|name| own(name)).cloned().collect();
    for name in &found {
        headers.remove(name);
    }
}

fn is_client_cert(name: &str) -> bool {
    let same = |(one, other): (u8, u8)| one == other || (one == b'_' && other == b'-');
    name.len() == CLIENT_CERT.as_str().len() && name.bytes().zip(CLIENT_CERT.as_str().bytes()).all(same)
}

/// A request that can't be carried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    #[error("the request has no host")]
    NoHost,
    #[error("the host is not a valid authority")]
    BadHost,
    #[error("the request's target is not valid")]
    BadTarget,
}

/// Removes what concerns one connection only: `Connection` and what it names, `Keep-Alive`, `Proxy-Connection`,
/// `Transfer-Encoding`, `Upgrade`, `Proxy-Authenticate` and `Proxy-Authorization` stay out of a leg; of `TE` only
/// `trailers` is kept, which gRPC needs.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let trailers = headers.get_all(header::TE).iter().any(names_trailers);
    for name in &named {
        headers.remove(name);
    }
    for name in [
        &header::CONNECTION,
        &KEEP_ALIVE,
        &PROXY_CONNECTION,
        &HTTP2_SETTINGS,
        &header::TRANSFER_ENCODING,
        &header::UPGRADE,
        &header::PROXY_AUTHENTICATE,
        &header::PROXY_AUTHORIZATION,
        &header::TE,
    ] {
        headers.remove(name);
    }
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

fn names_trailers(value: &HeaderValue) -> bool {
    let Ok(text) = value.to_str() else { return false };
    text.split(',')
        .any(|coding| coding.split(';').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("trailers")))
}

/// Makes a request fit for a leg: hop-by-hop fields gone, the host as `:authority` and unaltered, scheme `http`.
/// Upgrades are turned into extended CONNECT before this, see [`super::upgrade::to_extended_connect`].
pub fn to_leg(parts: &mut request::Parts) -> Result<(), BadRequest> {
    strip_hop_by_hop(&mut parts.headers);
    // A forward proxy's client writes the authority twice; the URI's counts (RFC 9112 section 3.2.2).
    let host = parts.headers.remove(header::HOST);
    let authority = match parts.uri.authority() {
        Some(authority) => authority.clone(),
        None => host
            .ok_or(BadRequest::NoHost)
            .and_then(|host| Authority::try_from(host.as_bytes()).map_err(|_| BadRequest::BadHost))?,
    };
    let plain_connect = parts.method == Method::CONNECT && parts.extensions.get::<h2::ext::Protocol>().is_none();
    let mut uri = http::uri::Parts::default();
    uri.authority = Some(authority);
    if !plain_connect {
        uri.scheme = Some(Scheme::HTTP);
        let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        // `OPTIONS *` has no path of its own; in a URI with an authority it is written without one.
        uri.path_and_query = Some(path);
    }
    parts.uri = Uri::from_parts(uri).map_err(|_| BadRequest::BadTarget)?;
    parts.version = Version::HTTP_2;
    Ok(())
}

/// Turns a request out of a leg into one in origin form for an HTTP/1.1 application, `:authority` back in `Host`,
/// unaltered.
pub fn to_http1<B>(request: &mut Request<B>) -> Result<(), BadRequest> {
    strip_hop_by_hop(request.headers_mut());
    join_cookies(request.headers_mut());
    if let Some(authority) = request.uri().authority() {
        // An authority without a valid header value can't exist, but a parser decides that, not this line.
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| BadRequest::BadHost)?;
        request.headers_mut().insert(header::HOST, host);
    }
    if !request.headers().contains_key(header::HOST) {
        return Err(BadRequest::NoHost);
    }
    if request.method() != Method::CONNECT {
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
    }
    *request.version_mut() = Version::HTTP_11;
    Ok(())
}

/// HTTP/2 may split `Cookie` into several fields; HTTP/1.1 allows one (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn request(build: request::Builder) -> request::Parts {
        build.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_concerns_one_connection_stays_there() {
        let mut parts = request(
            Request::get("/a?b")
                .header("host", "web.shop:8080")
                .header("connection", "keep-alive, X-Mine")
                .header("x-mine", "1")
                .header("keep-alive", "5")
                .header("transfer-encoding", "chunked")
                .header("te", "gzip, trailers;q=0.5")
                .header("proxy-authorization", "secret")
                .header("accept", "*/*"),
        );
        to_leg(&mut parts).unwrap();
        assert_eq!(parts.uri, "http://web.shop:8080/a?b");
        let mut names: Vec<_> =
            parts.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        names.sort_unstable();
        assert_eq!(names, [("accept", "*/*"), ("te", "trailers")]);
    }

    #[test]
    fn the_host_comes_back_as_it_was() {
        for host in ["web.shop.svc.clusterset.local", "web.shop:80", "[2001:db8::1]:80", "Shop.Example"] {
            let mut parts = request(Request::get("/").header("host", host));
            to_leg(&mut parts).unwrap();
            let mut back = Request::from_parts(parts, ());
            to_http1(&mut back).unwrap();
            assert_eq!(back.headers()[header::HOST], host);
            assert_eq!(back.uri(), "/");
            assert_eq!(back.version(), Version::HTTP_11);
        }
        assert_eq!(to_leg(&mut request(Request::get("/"))), Err(BadRequest::NoHost));
        assert_eq!(to_leg(&mut request(Request::get("/").header("host", "a b"))), Err(BadRequest::BadHost));
    }

    #[test]
    fn other_forms_of_the_target() {
        let mut absolute = request(Request::get("http://web.shop/x").header("host", "other"));
        to_leg(&mut absolute).unwrap();
        assert_eq!(absolute.uri, "http://web.shop/x");
        let mut connect = request(Request::connect("web.shop:443").header("host", "web.shop:443"));
        to_leg(&mut connect).unwrap();
        assert_eq!(connect.uri, "web.shop:443");
    }

    #[test]
    fn what_only_tombolo_may_say_is_dropped() {
        let mut headers = HeaderMap::new();
        for name in [
            "x-forwarded-client-cert",
            "x_forwarded_client_cert",
            "x-forwarded_client-cert",
            "tombolo-refusal",
            "tombolo-explain",
            "tombolo-anything",
            "x-forwarded-for",
            "tombolo",
            "x-tombolo-a",
        ] {
            headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_static("1"));
            headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_static("2"));
        }
        let kept: HeaderName = "tombolo-refusal".parse().unwrap();
        strip_own_but(&mut headers, Some(&kept));
        let names = |headers: &HeaderMap| {
            let mut names: Vec<String> = headers.keys().map(|name| name.to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&headers), ["tombolo", "tombolo-refusal", "x-forwarded-for", "x-tombolo-a"]);
        strip_own(&mut headers);
        assert_eq!(names(&headers), ["tombolo", "x-forwarded-for", "x-tombolo-a"]);
    }

    #[test]
    fn cookies_are_one_field_in_http1() {
        let mut request = Request::get("http://a/").header("cookie", "a=1").header("cookie", "b=2").body(()).unwrap();
        to_http1(&mut request).unwrap();
        let cookies: Vec<_> = request.headers().get_all(header::COOKIE).iter().collect();
        assert_eq!(cookies, ["a=1; b=2"]);
    }
}
