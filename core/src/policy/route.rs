//! `HTTPRoute` and `GRPCRoute` (gateway.networking.k8s.io/v1) bound to a service (GAMMA, GEP-1426), in the
//! form in which they are decided. Field names and meanings are the Gateway API's.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::matching::{GrpcMatch, Head, HttpMatch, Mismatch, is_token, strip_prefix};
use super::span::Span;
use super::{InvalidField, Resource};
use crate::id::{ClusterId, Namespace, ServiceName};

/// Limits of the Gateway API itself.
pub const RULES_MAX: usize = 16;
pub const MATCHES_MAX: usize = 64;
pub const BACKENDS_MAX: usize = 16;
pub const WEIGHT_MAX: u32 = 1_000_000;
/// Tries beyond the first.
pub const ATTEMPTS_MAX: u32 = 10;

/// One route of one resource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    pub resource: Resource,
    /// Older routes come first where matches are equal.
    pub created: Timestamp,
    pub parents: Vec<Parent>,
    pub rules: Vec<Rule>,
}

/// The service that a route is bound to. A Service and a ServiceImport of one name are the same service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Parent {
    pub service: ServiceName,
    /// All ports unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl Route {
    /// Whether the route speaks of requests to this port from a workload of this namespace. A route in
    /// another namespace than its service's is a consumer's: it speaks of its own namespace's requests.
    pub fn applies(&self, service: &ServiceName, port: u16, caller: &Namespace) -> bool {
        let own = |parent: &Parent| parent.service.namespace() == &self.resource.namespace;
        self.parents.iter().any(|parent| {
            parent.service == *service
                && parent.port.is_none_or(|only| only == port)
                && (own(parent) || *caller == self.resource.namespace)
        })
    }

    /// Every service that the route's rules send or copy requests to.
    pub fn services(&self) -> BTreeSet<&ServiceName> {
        let mut services = BTreeSet::new();
        for rule in &self.rules {
            services.extend(rule.backends.iter().map(|backend| &backend.service));
            services.extend(rule.filters.mirrors.iter().map(|mirror| &mirror.backend.service));
        }
        services
    }

    /// The route as consumers in other clusters get it with an export: its backends are those of `cluster`
    /// alone. `None` when it sends requests to other clusters by name.
    pub fn published(&self, cluster: &ClusterId) -> Option<Route> {
        let mut route = self.clone();
        route.resource.cluster = Some(cluster.clone());
        for backend in route.rules.iter_mut().flat_map(Rule::backends_mut) {
            match &backend.cluster {
                Some(other) if other != cluster => return None,
                _ => backend.cluster = Some(cluster.clone()),
            }
        }
        Some(route)
    }
}

/// What to do with a request that one of `matches` is satisfied by. No match at all: every request.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<RequestMatch>,
    #[serde(default)]
    pub filters: Filters,
    /// None, or weights that add up to nothing: the request is answered with 500.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<Backend>,
    #[serde(default)]
    pub timeouts: Timeouts,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
}

impl Rule {
    fn backends_mut(&mut self) -> impl Iterator<Item = &mut Backend> {
        self.backends.iter_mut().chain(self.filters.mirrors.iter_mut().map(|mirror| &mut mirror.backend))
    }

    /// Sum of the backends' weights.
    pub fn weight(&self) -> u64 {
        self.backends.iter().map(|backend| u64::from(backend.weight)).sum()
    }

    /// The backend for one request; `draw` is any number, evenly distributed.
    pub fn backend(&self, draw: u64) -> Option<&Backend> {
        let mut left = draw.checked_rem(self.weight())?;
        self.backends.iter().find(|backend| {
            let weight = u64::from(backend.weight);
            let found = left < weight;
            left = left.saturating_sub(weight);
            found
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RequestMatch {
    Http(HttpMatch),
    Grpc(GrpcMatch),
}

impl From<HttpMatch> for RequestMatch {
    fn from(of: HttpMatch) -> Self {
        RequestMatch::Http(of)
    }
}

impl From<GrpcMatch> for RequestMatch {
    fn from(of: GrpcMatch) -> Self {
        RequestMatch::Grpc(of)
    }
}

impl RequestMatch {
    /// # Errors
    /// The first part that the request does not satisfy.
    pub fn test(&self, head: &dyn Head) -> Result<(), Mismatch<'_>> {
        match self {
            RequestMatch::Http(http) => http.test(head),
            RequestMatch::Grpc(grpc) => grpc.test(head),
        }
    }

    /// The prefix that `ReplacePrefixMatch` replaces.
    pub fn prefix(&self) -> Option<&str> {
        match self {
            RequestMatch::Http(http) => http.path.prefix(),
            RequestMatch::Grpc(_) => None,
        }
    }
}

/// Where a share of a rule's requests goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    pub service: ServiceName,
    /// The port that the request had unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The one cluster whose endpoints are meant; all that export the service unless set. A backend of kind
    /// Service means the route's own cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterId>,
    pub weight: u32,
    #[serde(default)]
    pub request_headers: HeaderChange,
    #[serde(default)]
    pub response_headers: HeaderChange,
}

/// A rule's filters, each at most once but for mirrors.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Filters {
    #[serde(default)]
    pub request_headers: HeaderChange,
    #[serde(default)]
    pub response_headers: HeaderChange,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewrite: Option<Rewrite>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect: Option<Redirect>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<Mirror>,
}

/// `HTTPHeaderFilter`: applied in the order set, add, remove. Names in lower case, none twice in a list.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeaderChange {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<(String, String)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<(String, String)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

/// Headers that frame the message or belong to one connection (RFC 9110 section 7.6.1): a route that
/// changed them could make two readers see different messages.
const FRAMING: &[&str] = &[
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

impl HeaderChange {
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    /// Lower-cases names and refuses what must not be changed.
    pub fn checked(mut self) -> Result<Self, InvalidField> {
        if [self.set.len(), self.add.len(), self.remove.len()].iter().any(|length| *length > 16) {
            return Err(InvalidField::new("set", "more than 16 headers in one list"));
        }
        for (list, pairs) in [("set", &mut self.set), ("add", &mut self.add)] {
            for (index, (name, value)) in pairs.iter_mut().enumerate() {
                *name = header_name(&format!("{list}[{index}].name"), name)?;
                let printable = value.bytes().all(|b| b == b'\t' || (b >= b' ' && b != 0x7f));
                if !printable || value.len() > 4_096 || value.trim() != value {
                    let reason = "not a header's value: at most 4,096 octets, no control characters, not padded";
                    return Err(InvalidField::new(format!("{list}[{index}].value"), reason));
                }
            }
        }
        for (index, name) in self.remove.iter_mut().enumerate() {
            *name = header_name(&format!("remove[{index}]"), name)?;
        }
        // Of entries that are equal but for their case the first counts (Gateway API).
        let mut seen = BTreeSet::new();
        self.set.retain(|(name, _)| seen.insert(name.clone()));
        seen.clear();
        self.add.retain(|(name, _)| seen.insert(name.clone()));
        Ok(self)
    }
}

fn header_name(path: &str, name: &str) -> Result<String, InvalidField> {
    let lower = name.to_ascii_lowercase();
    if !is_token(name) {
        return Err(InvalidField::new(path, format!("{name:?} is not a header's name (RFC 9110 token)")));
    }
    if FRAMING.contains(&lower.as_str()) {
        return Err(InvalidField::new(path, format!("{lower} frames the message and can't be changed by a route")));
    }
    Ok(lower)
}

/// `HTTPURLRewriteFilter`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rewrite {
    /// The Host that the backend sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathChange>,
}

/// `HTTPPathModifier`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathChange {
    ReplaceFullPath(String),
    /// Replaces what a `PathPrefix` match has matched.
    ReplacePrefixMatch(String),
}

impl PathChange {
    /// The new path, without a query. `prefix` is what the taken match names, if it is a prefix.
    pub fn apply(&self, path: &str, prefix: Option<&str>) -> String {
        match self {
            PathChange::ReplaceFullPath(full) => full.clone(),
            PathChange::ReplacePrefixMatch(new) => {
                let rest = prefix.and_then(|prefix| strip_prefix(path, prefix)).unwrap_or(path);
                let joined = format!("{}{rest}", new.trim_end_matches('/'));
                if joined.is_empty() { "/".into() } else { joined }
            }
        }
    }
}

/// `HTTPRequestRedirectFilter`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathChange>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

impl Redirect {
    /// The `Location` for a request to `scheme://host[:port]path[?query]`.
    pub fn location(&self, from: &Requested<'_>, prefix: Option<&str>) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(from.scheme);
        let host = self.hostname.as_deref().unwrap_or(from.host);
        let well_known = match scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        // "If no port is specified, the redirect port MUST be derived": from the scheme if that is given and
        // has one, otherwise the request's own.
        let port = match (self.port, &self.scheme) {
            (Some(port), _) => Some(port),
            (None, Some(_)) if well_known.is_some() => well_known,
            _ => from.port,
        };
        let path = self.path.as_ref().map_or_else(|| from.path.to_owned(), |path| path.apply(from.path, prefix));
        let port = port.filter(|port| Some(*port) != well_known).map(|port| format!(":{port}")).unwrap_or_default();
        let query = from.query.map(|query| format!("?{query}")).unwrap_or_default();
        format!("{scheme}://{host}{port}{path}{query}")
    }
}

/// What a redirected request asked for.
#[derive(Debug, Clone, Copy)]
pub struct Requested<'a> {
    pub scheme: &'a str,
    /// Without its port.
    pub host: &'a str,
    pub port: Option<u16>,
    pub path: &'a str,
    pub query: Option<&'a str>,
}

/// `HTTPRequestMirrorFilter`: a copy whose answer is thrown away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mirror {
    pub backend: Backend,
    pub fraction: Fraction,
}

/// So many of so many requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fraction {
    pub numerator: u32,
    pub denominator: u32,
}

impl Fraction {
    pub const ALL: Fraction = Fraction { numerator: 1, denominator: 1 };

    /// `draw` is any number, evenly distributed.
    pub fn takes(self, draw: u64) -> bool {
        draw.checked_rem(self.denominator.into()).is_some_and(|draw| draw < self.numerator.into())
    }
}

/// `HTTPRouteTimeouts`; zero switches one off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Timeouts {
    /// From the request's arrival to the end of the answer, all tries together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Span>,
    /// One try, connection set-up included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_request: Option<Span>,
}

/// `HTTPRouteRetry` (GEP-1731). Which requests may be repeated at all is not its matter: see
/// [`crate::retry::judge`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Retry {
    /// Answers that are tried again, 400 to 599.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub codes: BTreeSet<u16>,
    /// Tries beyond the first, at most 10; the default policy's unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// The least pause before a further try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Span>,
}

impl Rule {
    /// Checks what the fields' own types can't, with the field named from the rule on.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), InvalidField> {
        if self.matches.len() > MATCHES_MAX {
            return Err(InvalidField::new("matches", format!("more than {MATCHES_MAX} matches")));
        }
        if self.backends.len() > BACKENDS_MAX {
            return Err(InvalidField::new("backendRefs", format!("more than {BACKENDS_MAX} backends")));
        }
        if let Some(index) = self.backends.iter().position(|backend| backend.weight > WEIGHT_MAX) {
            let path = format!("backendRefs[{index}].weight");
            return Err(InvalidField::new(path, format!("not from 0 to {WEIGHT_MAX}")));
        }
        self.check_filters()?;
        if let (Some(request), Some(backend)) = (self.timeouts.request, self.timeouts.backend_request)
            && request.unless_zero().is_some_and(|request| backend.duration() > request)
        {
            return Err(InvalidField::new("timeouts.backendRequest", "longer than timeouts.request"));
        }
        let Some(retry) = &self.retry else { return Ok(()) };
        if retry.codes.iter().any(|code| !(400..600).contains(code)) {
            return Err(InvalidField::new("retry.codes", "a code is not from 400 to 599"));
        }
        if retry.attempts.is_some_and(|attempts| attempts > ATTEMPTS_MAX) {
            return Err(InvalidField::new("retry.attempts", format!("more than {ATTEMPTS_MAX}")));
        }
        Ok(())
    }

    fn check_filters(&self) -> Result<(), InvalidField> {
        let Filters { rewrite, redirect, mirrors, .. } = &self.filters;
        let redirected = redirect.as_ref().is_some_and(|_| rewrite.is_some() || !self.backends.is_empty());
        if redirected {
            let reason = "RequestRedirect can't stand beside URLRewrite or backendRefs: the request goes nowhere";
            return Err(InvalidField::new("filters", reason));
        }
        let changes =
            [rewrite.as_ref().and_then(|it| it.path.as_ref()), redirect.as_ref().and_then(|it| it.path.as_ref())];
        let by_prefix = changes.iter().flatten().any(|change| matches!(change, PathChange::ReplacePrefixMatch(_)));
        if by_prefix && self.matches.iter().any(|one| one.prefix().is_none()) {
            let reason = "ReplacePrefixMatch needs every match of the rule to be a PathPrefix";
            return Err(InvalidField::new("filters", reason));
        }
        if redirect.as_ref().is_some_and(|redirect| ![301, 302, 303, 307, 308].contains(&redirect.status)) {
            return Err(InvalidField::new("filters", "statusCode is not 301, 302, 303, 307 or 308"));
        }
        let wrong = |mirror: &Mirror| {
            mirror.fraction.denominator == 0 || mirror.fraction.numerator > mirror.fraction.denominator
        };
        if mirrors.len() > BACKENDS_MAX || mirrors.iter().any(wrong) {
            return Err(InvalidField::new("filters", "a RequestMirror's fraction is not between nothing and all"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn paths_are_changed_as_the_gateway_api_says() {
        let prefix = |new: &str| PathChange::ReplacePrefixMatch(new.into());
        // The table of HTTPPathModifier.replacePrefixMatch.
        for (path, matched, new, want) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
        ] {
            assert_eq!(prefix(new).apply(path, Some(matched)), want, "{path} {matched} {new}");
        }
        assert_eq!(PathChange::ReplaceFullPath("/x".into()).apply("/a/b", None), "/x");
    }

    #[test]
    fn redirects() {
        let from = Requested { scheme: "http", host: "web.shop", port: Some(8080), path: "/a/b", query: Some("q=1") };
        let none = Redirect { scheme: None, hostname: None, path: None, port: None, status: 302 };
        let check = |redirect: Redirect, want: &str| assert_eq!(redirect.location(&from, Some("/a")), want);
        check(none.clone(), "http://web.shop:8080/a/b?q=1");
        check(Redirect { scheme: Some("https".into()), ..none.clone() }, "https://web.shop/a/b?q=1");
        check(Redirect { port: Some(443), scheme: Some("https".into()), ..none.clone() }, "https://web.shop/a/b?q=1");
        check(Redirect { hostname: Some("x".into()), port: Some(80), ..none.clone() }, "http://x/a/b?q=1");
        let path = Some(PathChange::ReplacePrefixMatch("/new".into()));
        check(Redirect { path, ..none }, "http://web.shop:8080/new/b?q=1");
    }

    fn backend(service: &str, weight: u32) -> Backend {
        Backend {
            service: service.parse().unwrap(),
            port: None,
            cluster: None,
            weight,
            request_headers: HeaderChange::default(),
            response_headers: HeaderChange::default(),
        }
    }

    #[test]
    fn backends_get_their_weights() {
        let rule =
            Rule { backends: vec![backend("a/a", 90), backend("a/b", 0), backend("a/c", 10)], ..Rule::default() };
        let mut counts = std::collections::BTreeMap::new();
        (0..1_000).for_each(|draw| *counts.entry(rule.backend(draw).unwrap().service.name()).or_insert(0) += 1);
        assert_eq!(counts.into_iter().collect::<Vec<_>>(), [("a", 900), ("c", 100)]);
        assert_eq!(Rule { backends: vec![backend("a/a", 0)], ..Rule::default() }.backend(7), None);
        assert_eq!(Rule::default().backend(7), None);
    }

    #[test]
    fn header_changes_are_checked() {
        let set =
            |name: &str, value: &str| HeaderChange { set: vec![(name.into(), value.into())], ..Default::default() };
        assert_eq!(set("X-A", "b").checked().unwrap().set, [("x-a".to_owned(), "b".to_owned())]);
        for (change, want) in [
            (set("transfer-encoding", "x"), "set[0].name: transfer-encoding frames the message"),
            (set("Host", "x"), "set[0].name: host frames"),
            (set("a b", "x"), "set[0].name: \"a b\" is not a header's name"),
            (set("a", "x\r\ny"), "set[0].value: not a header's value"),
            (HeaderChange { remove: vec!["TE".into()], ..Default::default() }, "remove[0]: te frames"),
        ] {
            let error = change.checked().unwrap_err().to_string();
            assert!(error.starts_with(want), "{error}");
        }
    }

    #[test]
    fn rules_are_checked() {
        let redirect = |status| Some(Redirect { scheme: None, hostname: None, path: None, port: None, status });
        let exact = RequestMatch::Http(serde_json::from_str(r#"{"path": {"type": "Exact", "value": "/a"}}"#).unwrap());
        let rewrite = Some(Rewrite { hostname: None, path: Some(PathChange::ReplacePrefixMatch("/b".into())) });
        let filters = |redirect, rewrite| Filters { redirect, rewrite, ..Default::default() };
        for (rule, want) in [
            (Rule { filters: filters(redirect(302), None), ..Rule::default() }, ""),
            (Rule { filters: filters(redirect(200), None), ..Rule::default() }, "filters: statusCode"),
            (
                Rule { filters: filters(redirect(302), None), backends: vec![backend("a/a", 1)], ..Rule::default() },
                "filters: RequestRedirect",
            ),
            (
                Rule { matches: vec![exact], filters: filters(None, rewrite), ..Rule::default() },
                "filters: ReplacePrefix",
            ),
            (Rule { backends: vec![backend("a/a", WEIGHT_MAX + 1)], ..Rule::default() }, "backendRefs[0].weight: not"),
            (
                Rule { retry: Some(Retry { codes: [200].into(), ..Default::default() }), ..Rule::default() },
                "retry.codes: a code is not",
            ),
            (
                Rule {
                    timeouts: Timeouts { request: Some(Span::from_secs(1)), backend_request: Some(Span::from_secs(2)) },
                    ..Rule::default()
                },
                "timeouts.backendRequest: longer",
            ),
        ] {
            let got = rule.check().err().map(|error| error.to_string()).unwrap_or_default();
            assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got} instead of {want}");
        }
    }
}
