//! What routes and traffic policies say about a request. Decided in `tombolo_core::policy`; here it is carried out.
//!
//! A request is matched with the routes of the service that it names; the traffic policy is that of the service that the
//! route sends it to. A port that nothing speaks of has no [`Policies`], and its requests meet none of this.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION};
use http::uri::{Authority, PathAndQuery};
use http::{Method, Request, Response, StatusCode, Uri, request};
use http_body_util::Full;
use tombolo_core::id::{ClusterId, Namespace, ServiceName};
use tombolo_core::policy::Resource;
use tombolo_core::policy::matching::Head;
use tombolo_core::policy::route::{Backend, HeaderChange, Redirect, Requested, Rewrite, Rule};
use tombolo_core::policy::set::{Policy, leading};
use tombolo_core::policy::span::Span;
pub use tombolo_core::policy::table::Considered;
use tombolo_core::policy::table::{Action, Decision, RouteTable, Taken};
use tombolo_core::policy::traffic::{self, HashOn, TrafficPolicy, TrafficSpec};
use tombolo_core::refusal::Refusal;
use tombolo_core::retry::Schedule;
use tombolo_core::routing::{self, Balance, Failover, Preferences};

use super::refuse::Refused;

/// What speaks of requests to one port of a service.
#[derive(Debug)]
pub struct Policies {
    table: RouteTable,
    traffic: Option<Arc<TrafficPolicy>>,
    /// Policies for the service that do not count.
    outranked: Vec<Resource>,
}

impl Policies {
    /// `caller` is the namespace of this sidecar. `None` when nothing speaks of the port.
    pub fn new(policies: &[Policy], service: &ServiceName, port: u16, caller: &Namespace) -> Option<Arc<Self>> {
        let routes = policies.iter().filter_map(|policy| match policy {
            Policy::Route(route) => Some(route.clone()),
            Policy::Traffic(_) | Policy::Access(_) => None,
        });
        let routes: Vec<_> = routes.collect();
        let table = RouteTable::new(&routes, service, port, caller);
        let traffic = leading(policies).cloned();
        let others = policies.iter().filter_map(|policy| match policy {
            Policy::Traffic(policy) => Some(policy.resource.clone()),
            Policy::Route(_) | Policy::Access(_) => None,
        });
        let others = others.filter(|other| traffic.as_ref().is_some_and(|leading| leading.resource != *other));
        let outranked = others.collect();
        (!table.is_void() || traffic.is_some()).then(|| Arc::new(Self { table, traffic, outranked }))
    }

    pub fn traffic_resource(&self) -> Option<&Resource> {
        self.traffic.as_ref().map(|policy| &policy.resource)
    }

    /// The traffic policies for the service: whether each counts, and why.
    pub fn traffic_considered<B>(&self, request: &Request<B>) -> Vec<(&Resource, bool, String)> {
        let counts = self.traffic.iter().map(|policy| {
            let fault = policy.spec.fault_for(&RequestHead(request));
            let fault = if fault.is_some() { "; one of its faults may delay or answer the request" } else { "" };
            (&policy.resource, true, format!("it decides for the service{fault}"))
        });
        let older = "another one decides: of several the oldest, then the first by name";
        counts.chain(self.outranked.iter().map(|resource| (resource, false, older.to_owned()))).collect()
    }

    /// Every rule with why it is taken, or not.
    pub fn considered<B>(&self, request: &Request<B>) -> Vec<Considered<'_>> {
        self.table.explain(&RequestHead(request))
    }

    pub fn traffic(&self) -> Option<&TrafficSpec> {
        self.traffic.as_ref().map(|policy| &policy.spec)
    }

    /// The rule for a request; `None` when it goes to the service itself. `draw` is any number, evenly distributed.
    ///
    /// # Errors
    /// `NoRoute` when there are routes, and none of their rules is for this request.
    pub fn rule<B>(&self, request: &Request<B>, draw: u64) -> Result<Option<Taken<'_>>, Refused> {
        match self.table.pick(&RequestHead(request), draw) {
            Decision::Unrouted => Ok(None),
            Decision::Taken(taken) => Ok(Some(taken)),
            Decision::NoMatch => Err(Refused::new(Refusal::NoRoute, request.uri().path())),
        }
    }

    /// What goes wrong on purpose: waits, and then may answer in the application's place.
    pub async fn disturb<B>(&self, request: &Request<B>) -> Option<Response<Full<Bytes>>> {
        let policy = self.traffic.as_ref().filter(|policy| !policy.spec.faults.is_empty())?;
        let injected = policy.spec.fault(&RequestHead(request), rand::random(), rand::random());
        if let Some(delay) = injected.delay {
            tokio::time::sleep(delay).await;
        }
        let status = StatusCode::from_u16(injected.abort?).ok()?;
        Some(said(status, format!("tombolo: answered by a fault of {}\n", policy.resource)))
    }

    /// The session that a request belongs to, where the policy names what tells sessions apart.
    pub fn session(&self, headers: &HeaderMap) -> Option<u64> {
        match self.traffic()?.load_balancing.hash.as_ref()? {
            HashOn::Header(name) => headers.get(name).map(|value| routing::session(value.as_bytes())),
            HashOn::Cookie(name) => cookie(headers, name).map(|value| routing::session(value.as_bytes())),
            HashOn::Source => None,
        }
    }
}

/// A request's backend, or what becomes of it instead.
pub enum Destination<'a> {
    Backend(&'a Backend),
    Answer(Response<Full<Bytes>>),
}

/// Where the rule that was taken sends a request.
///
/// # Errors
/// `NoBackend` when it names none that has a weight.
pub fn destination<'a, B>(taken: &Taken<'a>, request: &Request<B>, port: u16) -> Result<Destination<'a>, Refused> {
    match taken.action {
        Action::Forward(backend) => Ok(Destination::Backend(backend)),
        Action::Redirect(redirect) => Ok(Destination::Answer(redirected(redirect, taken, request, port))),
        Action::NoBackend => Err(Refused::new(Refusal::NoBackend, decided_by(taken))),
    }
}

/// Whose endpoints a backend means.
pub enum Way<'a> {
    /// Those of the service and port that the request names.
    Own,
    Other {
        service: &'a ServiceName,
        port: u16,
        cluster: Option<&'a ClusterId>,
    },
}

/// The way to a backend of a route of `service`.
pub fn way<'a>(backend: &'a Backend, service: &ServiceName, port: u16) -> Way<'a> {
    let (to, cluster) = (backend.port.unwrap_or(port), backend.cluster.as_ref());
    if backend.service == *service && to == port && cluster.is_none() {
        Way::Own
    } else {
        Way::Other { service: &backend.service, port: to, cluster }
    }
}

/// What exists for nobody here is no backend (Gateway API: 500).
pub fn no_backend(refused: Refused) -> Refused {
    match refused.refusal {
        Refusal::UnknownService | Refusal::UnknownPort => Refused::new(Refusal::NoBackend, refused.detail),
        _ => refused,
    }
}

/// Which rule of which resource decided, for people.
pub fn decided_by(taken: &Taken<'_>) -> String {
    format!("{}, rule {}", taken.route.resource, taken.rule_index)
}

fn redirected<B>(redirect: &Redirect, taken: &Taken<'_>, request: &Request<B>, port: u16) -> Response<Full<Bytes>> {
    let authority = authority_of(request);
    let (host, own) = match authority.as_ref() {
        Some(authority) => (authority.host(), authority.port_u16()),
        None => ("", None),
    };
    let requested = Requested {
        scheme: "http",
        host,
        port: own.or(Some(port)),
        path: request.uri().path(),
        query: request.uri().query(),
    };
    let mut response = said(StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::FOUND), String::new());
    if let Ok(location) = HeaderValue::from_str(&redirect.location(&requested, taken.prefix)) {
        response.headers_mut().insert(LOCATION, location);
    }
    change(response.headers_mut(), &taken.rule.filters.response_headers);
    response
}

fn authority_of<B>(request: &Request<B>) -> Option<Authority> {
    let host = || Authority::try_from(request.headers().get(header::HOST)?.as_bytes()).ok();
    request.uri().authority().cloned().or_else(host)
}

fn said(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Changes a request that is fit for a leg as the rule says.
///
/// # Errors
/// `BadRequest` when what comes out is no request target any more.
pub fn change_request(head: &mut request::Parts, taken: &Taken<'_>) -> Result<(), Refused> {
    if let Some(rewrite) = &taken.rule.filters.rewrite {
        head.uri = rewritten(&head.uri, rewrite, taken.prefix).ok_or_else(|| {
            Refused::new(Refusal::BadRequest, format!("its path can't be rewritten by {}", decided_by(taken)))
        })?;
    }
    change(&mut head.headers, &taken.rule.filters.request_headers);
    Ok(())
}

/// Changes it as the backend says that it is sent to.
pub fn change_for(head: &mut request::Parts, backend: &Backend) {
    change(&mut head.headers, &backend.request_headers);
}

/// Changes an answer as the rule and its backend say.
pub fn change_response(headers: &mut HeaderMap, rule: &Rule, backend: &Backend) {
    change(headers, &rule.filters.response_headers);
    change(headers, &backend.response_headers);
}

fn rewritten(uri: &Uri, rewrite: &Rewrite, prefix: Option<&str>) -> Option<Uri> {
    let mut parts = uri.clone().into_parts();
    if let Some(change) = &rewrite.path {
        let path = change.apply(uri.path(), prefix);
        let target = match uri.query() {
            Some(query) => PathAndQuery::try_from(format!("{path}?{query}")),
            None => PathAndQuery::try_from(path),
        };
        parts.path_and_query = Some(target.ok()?);
    }
    if let Some(hostname) = &rewrite.hostname {
        parts.authority = Some(Authority::try_from(hostname.as_str()).ok()?);
    }
    Uri::from_parts(parts).ok()
}

fn change(headers: &mut HeaderMap, change: &HeaderChange) {
    // Names and values were checked where they were written.
    let pair = |(name, value): &(String, String)| {
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_bytes(value.as_bytes()).ok()?))
    };
    for (name, value) in change.set.iter().filter_map(pair) {
        headers.insert(name, value);
    }
    for (name, value) in change.add.iter().filter_map(pair) {
        headers.append(name, value);
    }
    for name in &change.remove {
        headers.remove(name);
    }
}

/// How a request may be tried again.
#[derive(Debug, Clone, Copy)]
pub struct Retrying<'a> {
    pub schedule: Schedule,
    /// Answers that are tried again, where that is safe.
    pub codes: Option<&'a BTreeSet<u16>>,
    /// The least pause before a further try.
    pub backoff: Duration,
    /// When a second try begins beside the first, if at all.
    hedge: Option<Duration>,
}

impl<'a> Retrying<'a> {
    /// The route's word comes before the policy's, and that before the sidecar's own configuration.
    pub fn new(own: Schedule, rule: Option<&'a Rule>, traffic: Option<&'a TrafficSpec>) -> Self {
        let limit = |route: Option<Span>, policy: Option<Span>, own| route.or(policy).map_or(own, Span::unless_zero);
        let (timeouts, retry) = (rule.map(|rule| rule.timeouts), rule.and_then(|rule| rule.retry.as_ref()));
        let of_policy = traffic.map(|traffic| (&traffic.timeouts, &traffic.retry));
        let attempts = retry.and_then(|retry| retry.attempts).or(of_policy.and_then(|(_, retry)| retry.attempts));
        let codes = retry.map(|retry| &retry.codes).or(of_policy.map(|(_, retry)| &retry.codes));
        let backoff = retry.and_then(|retry| retry.backoff).or(of_policy.and_then(|(_, retry)| retry.backoff));
        let schedule = Schedule {
            tries: attempts.map_or(own.tries, |attempts| attempts + 1),
            per_try: limit(
                timeouts.and_then(|timeouts| timeouts.backend_request),
                of_policy.and_then(|(timeouts, _)| timeouts.per_try),
                own.per_try,
            ),
            total: limit(
                timeouts.and_then(|timeouts| timeouts.request),
                of_policy.and_then(|(timeouts, _)| timeouts.request),
                own.total,
            ),
        };
        Self {
            schedule,
            codes: codes.filter(|codes| !codes.is_empty()),
            backoff: backoff.unwrap_or_default().duration(),
            hedge: traffic.and_then(|traffic| traffic.hedging.as_ref()).map(|hedging| hedging.after.duration()),
        }
    }

    /// When another try begins beside the one of this number, for a request that may be sent twice.
    pub fn hedge_after(&self, number: u32) -> Option<Duration> {
        self.hedge.filter(|_| number == 1)
    }
}

/// What a traffic policy says about clusters and endpoints, over what the service itself says.
pub fn preferences(of_service: Preferences, traffic: Option<&TrafficSpec>) -> Preferences {
    let Some(traffic) = traffic else { return of_service };
    let balancing = &traffic.load_balancing;
    let balance = match balancing.algorithm {
        traffic::Algorithm::LeastRequest => of_service.balance,
        traffic::Algorithm::RoundRobin => Balance::RoundRobin,
        traffic::Algorithm::ConsistentHash => Balance::ConsistentHash,
    };
    let weights = traffic.clusters.iter().filter_map(|cluster| Some((cluster.name.clone(), cluster.weight?)));
    Preferences {
        balance,
        order: traffic.clusters.iter().map(|cluster| cluster.name.clone()).collect(),
        weights: weights.collect(),
        failover: match traffic.failover {
            traffic::Failover::Auto => Failover::Auto,
            traffic::Failover::None => Failover::None,
        },
        panic_threshold: f64::from(balancing.panic_threshold) / 100.0,
        zone_first: balancing.locality == traffic::LocalityPreference::Zone,
        slow_start: balancing.slow_start.duration(),
    }
}

/// The head of a request as its caller wrote it.
struct RequestHead<'a, B>(&'a Request<B>);

impl<B> Head for RequestHead<'_, B> {
    fn method(&self) -> &str {
        // A WebSocket over HTTP/2 is a GET elsewhere (RFC 8441 section 5).
        match *self.0.method() {
            Method::CONNECT => "GET",
            ref method => method.as_str(),
        }
    }

    fn path(&self) -> &str {
        self.0.uri().path()
    }

    fn query(&self) -> Option<&str> {
        self.0.uri().query()
    }

    fn any_header(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        if let Some(authority) = self.0.uri().authority().filter(|_| name == "host") {
            return test(authority.as_str().as_bytes());
        }
        self.0.headers().get_all(name).iter().any(|value| test(value.as_bytes()))
    }
}

fn cookie<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    let values = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = values.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| *name == wanted).map(|(_, value)| value)
}
