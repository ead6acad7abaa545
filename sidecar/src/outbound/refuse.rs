//! What the application is told when its call can't be carried: a status, a header with the refusal's code,
//! and a sentence with the cause and the next step.
//!
//! | status | when |
//! |---|---|
//! | 400 | the request itself is malformed, or uses a feature that can't cross |
//! | 403 | the name is not one of the clusterset, or the identity is not allowed to call it |
//! | 404 | nobody exports the service to here, or not with this port; or none of its routes is for the request |
//! | 429 | the service's rate limit is reached; with `Retry-After` |
//! | 500 | the route for the request names no backend |
//! | 502 | the other end broke off, or could not prove its identity |
//! | 503 | nobody is there to answer now: no ready endpoint, no tunnel, a limit; with `Retry-After` |
//! | 504 | no answer within the deadline |
//!
//! A gRPC caller gets the same as a status in a trailers-only response.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use http_body_util::Full;
use tombolo_core::refusal::Refusal;

/// Names the refusal in a response that was made by tombolo and not by an application.
pub const REFUSAL: HeaderName = HeaderName::from_static("tombolo-refusal");

/// A refusal with what is particular to this case.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{refusal} ({detail})")]
pub struct Refused {
    pub refusal: Refusal,
    pub detail: String,
    pub retry_after: Option<Duration>,
}

impl Refused {
    pub fn new(refusal: Refusal, detail: impl Into<String>) -> Self {
        Self { refusal, detail: detail.into(), retry_after: None }
    }

    pub fn status(&self) -> StatusCode {
        use Refusal::*;
        match self.refusal {
            BadRequest | BadTarget | BadClientHello | BadHeader | TargetMismatch | BadAlpn => StatusCode::BAD_REQUEST,
            ForeignName | IdentityDenied | WrongRole | Revoked => StatusCode::FORBIDDEN,
            UnknownService | UnknownPort | NotExported | NoRoute => StatusCode::NOT_FOUND,
            NoBackend => StatusCode::INTERNAL_SERVER_ERROR,
            RateLimited => StatusCode::TOO_MANY_REQUESTS,
            ConnectionLost | BadCertificate | Expired | UnknownTrustDomain | RelayLoop => StatusCode::BAD_GATEWAY,
            Timeout | HandshakeTimeout => StatusCode::GATEWAY_TIMEOUT,
            // Whatever else may be refused one day: nobody is there to answer.
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The answer to a request with these headers.
    pub fn respond(&self, request: &HeaderMap) -> Response<Full<Bytes>> {
        let mut response =
            if is_grpc(request) { self.as_grpc() } else { Response::new(Full::from(format!("tombolo: {self}\n"))) };
        let headers = response.headers_mut();
        if !is_grpc(request) {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        }
        headers.insert(REFUSAL, HeaderValue::from_static(self.refusal.code()));
        let status = self.status();
        if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            let seconds = self.retry_after.map_or(1, |wait| wait.as_secs().max(1));
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if !is_grpc(request) {
            *response.status_mut() = status;
        }
        response
    }

    fn as_grpc(&self) -> Response<Full<Bytes>> {
        let code = match self.status() {
            StatusCode::BAD_REQUEST => "3",
            StatusCode::FORBIDDEN => "7",
            StatusCode::NOT_FOUND => "12",
            StatusCode::TOO_MANY_REQUESTS => "8",
            StatusCode::GATEWAY_TIMEOUT => "4",
            _ => "14",
        };
        let mut response = Response::new(Full::default());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(HeaderName::from_static("grpc-status"), HeaderValue::from_static(code));
        headers.insert(HeaderName::from_static("grpc-message"), percent_encoded(&format!("tombolo: {self}")));
        response
    }
}

pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// `grpc-message` is percent-encoded (gRPC over HTTP/2, Percent-Encoded).
fn percent_encoded(text: &str) -> HeaderValue {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    HeaderValue::from_str(&encoded).expect("only visible ASCII is left")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn a_refusal_names_itself_its_cause_and_the_next_step() {
        let refused = Refused::new(Refusal::NoTunnel, "to west");
        let response = refused.respond(&HeaderMap::new());
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[&REFUSAL], "no-tunnel");
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = std::str::from_utf8(&body).unwrap();
        assert!(text.contains("no tunnel") && text.contains("to west") && text.contains("tombolo status"), "{text}");
    }

    #[test]
    fn grpc_callers_get_a_grpc_status() {
        let mut request = HeaderMap::new();
        request.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        let response = Refused::new(Refusal::NoEndpoint, "für 100 %").respond(&request);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert!(response.headers()["grpc-message"].to_str().unwrap().contains("f%C3%BCr 100 %25"));
        assert_eq!(response.headers()[&REFUSAL], "no-endpoint");
    }

    #[test]
    fn every_refusal_has_an_error_status() {
        for refusal in Refusal::ALL {
            let status = Refused::new(*refusal, "").status();
            assert!(status.is_client_error() || status.is_server_error(), "{refusal:?}");
        }
    }
}
