//! Whether a request is one that a rule speaks of. Nothing here allocates, unless a parameter of the query is
//! compared in decoded form with a regular expression.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::pattern::{Pattern, ValueMatch};

/// Headers, or parameters of the query, that one match names (Gateway API's own limit).
pub const VALUES_MAX: usize = 16;
/// Octets of a path or of a value in a match.
const TEXT_MAX: usize = 4_096;

/// The head of a request, as the shell's HTTP library holds it.
pub trait Head {
    fn method(&self) -> &str;
    /// As it stands in the request, without the query.
    fn path(&self) -> &str;
    /// Without its question mark.
    fn query(&self) -> Option<&str>;
    /// Whether any value of the header satisfies `test`. `name` is in lower case.
    fn any_header(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool;
}

/// `HTTPPathMatch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    Exact(String),
    /// By whole elements: `/abc` matches `/abc`, `/abc/` and `/abc/d`, and not `/abcd`.
    Prefix(String),
    /// Matches the whole path.
    Regex(Pattern),
}

impl Default for PathMatch {
    fn default() -> Self {
        PathMatch::Prefix("/".into())
    }
}

impl PathMatch {
    pub fn is_match(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(want) => want == path,
            PathMatch::Prefix(prefix) => strip_prefix(path, prefix).is_some(),
            PathMatch::Regex(pattern) => pattern.is_match(path.as_bytes()),
        }
    }

    /// The prefix that `ReplacePrefixMatch` replaces.
    pub fn prefix(&self) -> Option<&str> {
        match self {
            PathMatch::Prefix(prefix) => Some(prefix),
            PathMatch::Exact(_) | PathMatch::Regex(_) => None,
        }
    }

    fn checked(kind: &str, value: String) -> Result<Self, String> {
        if value.len() > TEXT_MAX {
            return Err(format!("path.value: longer than {TEXT_MAX} octets"));
        }
        if kind == "RegularExpression" {
            return Ok(PathMatch::Regex(Pattern::new(&value).map_err(|reason| format!("path.value: {reason}"))?));
        }
        if !value.starts_with('/') || value.contains(['?', '#']) || !value.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(format!("path.value: {value:?} is not an absolute path of printable ASCII without a query"));
        }
        let ambiguous = ["//", "/./", "/../", "%2f", "%2F"].iter().any(|odd| value.contains(odd))
            || ["/.", "/.."].iter().any(|odd| value.ends_with(odd));
        if ambiguous {
            return Err(format!("path.value: {value:?} has empty, dot or encoded-slash elements"));
        }
        match kind {
            "Exact" => Ok(PathMatch::Exact(value)),
            "PathPrefix" => Ok(PathMatch::Prefix(value)),
            other => Err(format!("path.type: {other:?} is not Exact, PathPrefix or RegularExpression")),
        }
    }
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathMatch::Exact(path) => f.write_str(path),
            PathMatch::Prefix(prefix) => write!(f, "{}/*", prefix.trim_end_matches('/')),
            PathMatch::Regex(pattern) => write!(f, "{pattern:?}"),
        }
    }
}

/// What of `path` is left behind `prefix`, element by element: empty, or beginning with a slash.
pub fn strip_prefix<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(prefix.trim_end_matches('/'))?;
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

/// A header or a parameter of the query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedMatch {
    pub name: String,
    pub value: ValueMatch,
}

/// `HTTPRouteMatch`: every part that is given must match. Read and written in the Gateway API's shape.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "shape::Http", into = "shape::Http")]
pub struct HttpMatch {
    pub path: PathMatch,
    /// Names in lower case, none twice.
    pub headers: Vec<NamedMatch>,
    pub query: Vec<NamedMatch>,
    pub method: Option<String>,
}

/// `GRPCRouteMatch`: every part that is given must match.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "shape::Grpc", into = "shape::Grpc")]
pub struct GrpcMatch {
    pub service: Option<ValueMatch>,
    pub method: Option<ValueMatch>,
    pub headers: Vec<NamedMatch>,
}

/// What of a match the request does not satisfy. Printed by `explain` and in the `tombolo-explain` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch<'a> {
    Path(&'a PathMatch),
    Method(&'a str),
    Header(&'a NamedMatch),
    Query(&'a NamedMatch),
    GrpcService(&'a ValueMatch),
    GrpcMethod(&'a ValueMatch),
    /// The request is not `POST /service/method`.
    NotGrpc,
}

impl fmt::Display for Mismatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Path(path) => write!(f, "the path is not {path}"),
            Mismatch::Method(method) => write!(f, "the method is not {method}"),
            Mismatch::Header(header) => write!(f, "header {} is not {}", header.name, header.value),
            Mismatch::Query(parameter) => write!(f, "query parameter {} is not {}", parameter.name, parameter.value),
            Mismatch::GrpcService(service) => write!(f, "the gRPC service is not {service}"),
            Mismatch::GrpcMethod(method) => write!(f, "the gRPC method is not {method}"),
            Mismatch::NotGrpc => f.write_str("the request is not a gRPC call"),
        }
    }
}

impl HttpMatch {
    /// # Errors
    /// The first part that the request does not satisfy.
    pub fn test(&self, head: &dyn Head) -> Result<(), Mismatch<'_>> {
        if !self.path.is_match(head.path()) {
            return Err(Mismatch::Path(&self.path));
        }
        if let Some(method) = self.method.as_deref().filter(|method| *method != head.method()) {
            return Err(Mismatch::Method(method));
        }
        headers(&self.headers, head)?;
        let parameter = |wanted: &&NamedMatch| !query_matches(head.query(), wanted);
        self.query.iter().find(parameter).map_or(Ok(()), |wanted| Err(Mismatch::Query(wanted)))
    }
}

impl GrpcMatch {
    /// # Errors
    /// The first part that the request does not satisfy.
    pub fn test(&self, head: &dyn Head) -> Result<(), Mismatch<'_>> {
        let call = head.path().strip_prefix('/').and_then(|path| path.split_once('/'));
        let (service, method) = call.filter(|_| head.method() == "POST").ok_or(Mismatch::NotGrpc)?;
        if let Some(want) = self.service.as_ref().filter(|want| !want.is_match(service.as_bytes())) {
            return Err(Mismatch::GrpcService(want));
        }
        if let Some(want) = self.method.as_ref().filter(|want| !want.is_match(method.as_bytes())) {
            return Err(Mismatch::GrpcMethod(want));
        }
        headers(&self.headers, head)
    }
}

fn headers<'a>(wanted: &'a [NamedMatch], head: &dyn Head) -> Result<(), Mismatch<'a>> {
    let missing = |wanted: &&NamedMatch| !head.any_header(&wanted.name, &mut |value| wanted.value.is_match(value));
    wanted.iter().find(missing).map_or(Ok(()), |wanted| Err(Mismatch::Header(wanted)))
}

/// Whether the first parameter of that name has the wanted value, both decoded.
fn query_matches(query: Option<&str>, wanted: &NamedMatch) -> bool {
    let pairs = query.into_iter().flat_map(|query| query.split('&'));
    let mut pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let first = pairs.find(|(name, _)| Decoded(name.as_bytes()).eq(wanted.name.bytes()));
    first.is_some_and(|(_, value)| match &wanted.value {
        ValueMatch::Exact(want) => Decoded(value.as_bytes()).eq(want.bytes()),
        ValueMatch::Regex(pattern) => pattern.is_match(&decoded(value)),
    })
}

/// A part of a query, octet by octet, decoded as `application/x-www-form-urlencoded`.
struct Decoded<'a>(&'a [u8]);

impl Iterator for Decoded<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let first = *self.0.first()?;
        let digit = |at: usize| self.0.get(at).and_then(|digit| char::from(*digit).to_digit(16));
        let (octet, length) = match (first, digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => ((high * 16 + low) as u8, 3),
            (b'+', ..) => (b' ', 1),
            _ => (first, 1),
        };
        self.0 = &self.0[length..];
        Some(octet)
    }
}

fn decoded(text: &str) -> Cow<'_, [u8]> {
    if text.contains(['%', '+']) {
        Cow::Owned(Decoded(text.as_bytes()).collect())
    } else {
        Cow::Borrowed(text.as_bytes())
    }
}

/// The Gateway API's own shapes of matches, with its defaults.
mod shape {
    use super::*;

    #[derive(Clone, Serialize, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Http {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<Typed>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        headers: Vec<Named>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        query_params: Vec<Named>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        method: Option<String>,
    }

    #[derive(Clone, Serialize, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Grpc {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        method: Option<GrpcMethod>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        headers: Vec<Named>,
    }

    #[derive(Clone, Serialize, Deserialize)]
    struct GrpcMethod {
        #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
        kind: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        service: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        method: Option<String>,
    }

    #[derive(Clone, Serialize, Deserialize)]
    struct Typed {
        #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
        kind: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value: Option<String>,
    }

    #[derive(Clone, Serialize, Deserialize)]
    struct Named {
        #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
        kind: Option<String>,
        name: String,
        value: String,
    }

    impl TryFrom<Http> for HttpMatch {
        type Error = String;

        fn try_from(shape: Http) -> Result<Self, String> {
            let path = shape.path.unwrap_or(Typed { kind: None, value: None });
            let kind = path.kind.as_deref().unwrap_or("PathPrefix");
            let path = PathMatch::checked(kind, path.value.unwrap_or_else(|| "/".into()))?;
            if let Some(method) = shape.method.as_deref().filter(|method| !is_method(method)) {
                return Err(format!("method: {method:?} is not a method (write GET, POST and so on)"));
            }
            let headers = named("headers", shape.headers, str::to_ascii_lowercase)?;
            let query = named("queryParams", shape.query_params, str::to_owned)?;
            Ok(Self { path, headers, query, method: shape.method })
        }
    }

    impl TryFrom<Grpc> for GrpcMatch {
        type Error = String;

        fn try_from(shape: Grpc) -> Result<Self, String> {
            let headers = named("headers", shape.headers, str::to_ascii_lowercase)?;
            let Some(call) = shape.method else { return Ok(Self { headers, ..Self::default() }) };
            if call.service.is_none() && call.method.is_none() {
                return Err("method: give at least one of service and method".into());
            }
            let part = |field: &str, text: Option<String>| {
                text.map(|text| value(&format!("method.{field}"), call.kind.as_deref(), text)).transpose()
            };
            Ok(Self { service: part("service", call.service)?, method: part("method", call.method)?, headers })
        }
    }

    /// Of names that are equal but for their case, where it does not matter, only the first counts.
    fn named(field: &str, list: Vec<Named>, key: fn(&str) -> String) -> Result<Vec<NamedMatch>, String> {
        if list.len() > VALUES_MAX {
            return Err(format!("{field}: more than {VALUES_MAX}"));
        }
        let mut matches: Vec<NamedMatch> = Vec::new();
        for (index, one) in list.into_iter().enumerate() {
            if !is_token(&one.name) {
                return Err(format!("{field}[{index}].name: {:?} is not a name (RFC 9110 token)", one.name));
            }
            let name = key(&one.name);
            let value = value(&format!("{field}[{index}]"), one.kind.as_deref(), one.value)?;
            if !matches.iter().any(|other| other.name == name) {
                matches.push(NamedMatch { name, value });
            }
        }
        Ok(matches)
    }

    fn value(field: &str, kind: Option<&str>, text: String) -> Result<ValueMatch, String> {
        if text.len() > TEXT_MAX {
            return Err(format!("{field}: longer than {TEXT_MAX} octets"));
        }
        match kind {
            None | Some("Exact") => Ok(ValueMatch::Exact(text)),
            Some("RegularExpression") => {
                Ok(ValueMatch::Regex(Pattern::new(&text).map_err(|reason| format!("{field}.value: {reason}"))?))
            }
            Some(other) => Err(format!("{field}.type: {other:?} is not Exact or RegularExpression")),
        }
    }

    impl From<HttpMatch> for Http {
        fn from(of: HttpMatch) -> Self {
            let (kind, value) = match of.path {
                PathMatch::Exact(path) => ("Exact", path),
                PathMatch::Prefix(prefix) => ("PathPrefix", prefix),
                PathMatch::Regex(pattern) => ("RegularExpression", pattern.as_str().to_owned()),
            };
            Self {
                path: Some(Typed { kind: Some(kind.into()), value: Some(value) }),
                headers: of.headers.into_iter().map(Into::into).collect(),
                query_params: of.query.into_iter().map(Into::into).collect(),
                method: of.method,
            }
        }
    }

    impl From<GrpcMatch> for Grpc {
        fn from(of: GrpcMatch) -> Self {
            let one = of.service.as_ref().or(of.method.as_ref());
            let method = one.map(kind_of).map(|kind| GrpcMethod {
                kind: Some(kind.into()),
                service: of.service.as_ref().map(|value| value.as_str().to_owned()),
                method: of.method.as_ref().map(|value| value.as_str().to_owned()),
            });
            Self { method, headers: of.headers.into_iter().map(Into::into).collect() }
        }
    }

    impl From<NamedMatch> for Named {
        fn from(of: NamedMatch) -> Self {
            Self { kind: Some(kind_of(&of.value).into()), name: of.name, value: of.value.as_str().to_owned() }
        }
    }

    fn kind_of(value: &ValueMatch) -> &'static str {
        match value {
            ValueMatch::Exact(_) => "Exact",
            ValueMatch::Regex(_) => "RegularExpression",
        }
    }
}

/// RFC 9110 section 5.6.2.
pub fn is_token(text: &str) -> bool {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !text.is_empty() && text.len() <= 256 && text.bytes().all(token)
}

/// A method as it is registered: in upper case. Methods are case-sensitive (RFC 9110 section 9.1).
pub fn is_method(text: &str) -> bool {
    is_token(text) && !text.bytes().any(|b| b.is_ascii_lowercase())
}

/// A head that is held in one place: what `explain` makes of its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnedHead {
    pub method: String,
    pub path: String,
    pub query: Option<String>,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Head for OwnedHead {
    fn method(&self) -> &str {
        &self.method
    }

    fn path(&self) -> &str {
        &self.path
    }

    fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }

    fn any_header(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.headers.iter().any(|(held, value)| held == name && test(value.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn head(method: &str, target: &str, headers: &[(&str, &str)]) -> OwnedHead {
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        OwnedHead {
            method: method.into(),
            path: path.into(),
            query: query.map(Into::into),
            headers: headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        }
    }

    /// The reason why a request does not match, or nothing.
    fn http(shape: &str, method: &str, target: &str, headers: &[(&str, &str)]) -> String {
        let of: HttpMatch = serde_json::from_str(shape).unwrap();
        let again: HttpMatch = serde_json::from_str(&serde_json::to_string(&of).unwrap()).unwrap();
        assert_eq!(of, again);
        of.test(&head(method, target, headers)).err().map(|mismatch| mismatch.to_string()).unwrap_or_default()
    }

    #[test]
    fn http_matches() {
        let path = |kind: &str, value: &str| format!(r#"{{"path": {{"type": "{kind}", "value": "{value}"}}}}"#);
        for (shape, target, want) in [
            ("{}".into(), "/any?x", ""),
            (path("Exact", "/a"), "/a?x=1", ""),
            (path("Exact", "/a"), "/a/", "the path is not /a"),
            (path("PathPrefix", "/abc"), "/abc", ""),
            (path("PathPrefix", "/abc"), "/abc/", ""),
            (path("PathPrefix", "/abc"), "/abc/def", ""),
            (path("PathPrefix", "/abc"), "/abcd", "the path is not /abc/*"),
            (path("PathPrefix", "/abc/"), "/abc", ""),
            (path("PathPrefix", "/abc/"), "/abc/def", ""),
            (path("PathPrefix", "/"), "*", "the path is not /*"),
            (path("RegularExpression", "/v[12]/.*"), "/v1/x", ""),
            (path("RegularExpression", "/v[12]/.*"), "/x/v1/x", "the path is not //v[12]/.*/"),
            (r#"{"method": "POST"}"#.into(), "/", "the method is not POST"),
            (r#"{"headers": [{"name": "X-Env", "value": "b"}]}"#.into(), "/", ""),
            (r#"{"headers": [{"name": "x-env", "value": "c"}]}"#.into(), "/", "header x-env is not \"c\""),
            // Only the first of equal names counts.
            (r#"{"headers": [{"name": "x-env", "value": "a"}, {"name": "X-ENV", "value": "z"}]}"#.into(), "/", ""),
            (r#"{"headers": [{"type": "RegularExpression", "name": "x-env", "value": "[bc]"}]}"#.into(), "/", ""),
            (r#"{"queryParams": [{"name": "q", "value": "a b"}]}"#.into(), "/?p=1&q=a+b", ""),
            (r#"{"queryParams": [{"name": "q", "value": "a b"}]}"#.into(), "/?q=a%20b&q=c", ""),
            (r#"{"queryParams": [{"name": "q", "value": "c"}]}"#.into(), "/?q=a&q=c", "query parameter q is not \"c\""),
            (r#"{"queryParams": [{"name": "q", "value": ""}]}"#.into(), "/?q", ""),
            (
                r#"{"queryParams": [{"type": "RegularExpression", "name": "q", "value": "[0-9]+"}]}"#.into(),
                "/?q=%31",
                "",
            ),
            (r#"{"queryParams": [{"name": "q", "value": "1"}]}"#.into(), "/", "query parameter q is not \"1\""),
        ] {
            assert_eq!(http(&shape, "GET", target, &[("x-env", "a"), ("x-env", "b")]), want, "{shape} {target}");
        }
    }

    #[test]
    fn grpc_matches() {
        for (shape, method, path, want) in [
            ("{}", "POST", "/shop.Cart/Add", ""),
            ("{}", "GET", "/shop.Cart/Add", "the request is not a gRPC call"),
            ("{}", "POST", "/cart", "the request is not a gRPC call"),
            (r#"{"method": {"service": "shop.Cart"}}"#, "POST", "/shop.Cart/Add", ""),
            (
                r#"{"method": {"service": "shop.Cart", "method": "Get"}}"#,
                "POST",
                "/shop.Cart/Add",
                "the gRPC method is not \"Get\"",
            ),
            (r#"{"method": {"type": "RegularExpression", "service": "shop\\..*"}}"#, "POST", "/shop.Cart/Add", ""),
            (r#"{"method": {"service": "x"}}"#, "POST", "/shop.Cart/Add", "the gRPC service is not \"x\""),
            (r#"{"headers": [{"name": "a", "value": "b"}]}"#, "POST", "/shop.Cart/Add", "header a is not \"b\""),
        ] {
            let of: GrpcMatch = serde_json::from_str(shape).unwrap();
            assert_eq!(serde_json::from_str::<GrpcMatch>(&serde_json::to_string(&of).unwrap()).unwrap(), of);
            let got = of.test(&head(method, path, &[])).err().map(|mismatch| mismatch.to_string()).unwrap_or_default();
            assert_eq!(got, want, "{shape} {path}");
        }
    }

    #[test]
    fn what_is_no_match_is_refused_with_its_field() {
        for (shape, want) in [
            (r#"{"path": {"value": "cart"}}"#, "path.value: \"cart\" is not an absolute path"),
            (r#"{"path": {"value": "/a/../b"}}"#, "path.value: \"/a/../b\" has empty, dot"),
            (r#"{"path": {"type": "Glob", "value": "/"}}"#, "path.type: \"Glob\" is not"),
            (r#"{"path": {"type": "RegularExpression", "value": "("}}"#, "path.value: not a regular expression"),
            (r#"{"method": "get"}"#, "method: \"get\" is not a method"),
            (r#"{"headers": [{"name": "a b", "value": ""}]}"#, "headers[0].name: \"a b\" is not"),
            (r#"{"headers": [{"name": "a", "type": "Prefix", "value": ""}]}"#, "headers[0].type: \"Prefix\""),
        ] {
            let error = serde_json::from_str::<HttpMatch>(shape).unwrap_err().to_string();
            assert!(error.starts_with(want), "{shape}: {error}");
        }
        let error = serde_json::from_str::<GrpcMatch>(r#"{"method": {}}"#).unwrap_err().to_string();
        assert!(error.starts_with("method: give at least one"), "{error}");
    }

    proptest! {
        #[test]
        fn no_query_makes_it_panic(query in "\\PC{0,20}", value in "[a-z%+&=é]{0,8}") {
            let wanted = NamedMatch { name: "a".into(), value: ValueMatch::Exact(value) };
            query_matches(Some(&query), &wanted);
            prop_assert!(Decoded(query.as_bytes()).count() <= query.len());
        }
    }
}
