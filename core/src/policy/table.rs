//! All routes of one service port in the order in which they are tried, and the pick for one request.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::Resource;
use super::matching::{Head, HttpMatch, Mismatch, PathMatch};
use super::route::{Backend, Redirect, RequestMatch, Route, Rule};
use crate::id::{Namespace, ServiceName};

/// Routes of one service port, sorted once.
///
/// The order is the Gateway API's. Between matches of HTTP routes: an exact path, then a regular expression (its
/// place is the implementation's to choose), then the longest prefix; then one that names the method; then
/// the most headers; then the most query parameters. Between those of gRPC routes: the longest service, the
/// longest method, the most headers. What is equal in all that: the oldest route, then the first by
/// `namespace/name`, then the first rule of the route. A consumer's own routes come before the producer's
/// (GEP-1426): where there is one, the producer's take no part.
#[derive(Debug, Clone, Default)]
pub struct RouteTable {
    routes: Vec<Arc<Route>>,
    entries: Vec<Entry>,
    passed_over: Vec<(Arc<Route>, PassedOver)>,
}

#[derive(Debug, Clone)]
struct Entry {
    route: usize,
    rule: usize,
    /// Index into the rule's matches; `None` for a rule without one, which every request satisfies.
    matched: Option<usize>,
}

/// Why a route that names the service takes no part at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassedOver {
    /// It speaks of another port, or of other namespaces' requests.
    NotMeant,
    /// The caller's side has a route of its own.
    ConsumersOwn,
    /// An older route of the other kind is bound to the same port.
    OtherKind,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PassedOver::NotMeant => "it is for another port, or for callers of its own namespace",
            PassedOver::ConsumersOwn => "the caller's side has a route of its own, which comes first",
            PassedOver::OtherKind => "an older route of the other kind (HTTPRoute or GRPCRoute) is bound to this port",
        })
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision<'a> {
    /// No route speaks of this port: the request goes to the service itself.
    Unrouted,
    Taken(Taken<'a>),
    /// There are routes, and none of their rules is for this request: 404.
    NoMatch,
}

/// The rule that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken<'a> {
    pub route: &'a Route,
    pub rule: &'a Rule,
    /// 0-based, for people.
    pub rule_index: usize,
    /// What a `PathPrefix` match of the rule has matched.
    pub prefix: Option<&'a str>,
    pub action: Action<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    Redirect(&'a Redirect),
    Forward(&'a Backend),
    /// The rule names no backend with a weight: 500.
    NoBackend,
}

impl RouteTable {
    /// `routes` are all that discovery sent for the service; `caller` is the namespace of this sidecar.
    pub fn new(routes: &[Arc<Route>], service: &ServiceName, port: u16, caller: &Namespace) -> Self {
        let (mut meant, rest): (Vec<_>, Vec<_>) =
            routes.iter().cloned().partition(|route| route.applies(service, port, caller));
        let mut passed_over: Vec<_> = rest.into_iter().map(|route| (route, PassedOver::NotMeant)).collect();
        let mut pass_over = |meant: &mut Vec<Arc<Route>>, why, of: &dyn Fn(&Route) -> bool| {
            meant.retain(|route| {
                if of(route) {
                    passed_over.push((route.clone(), why));
                }
                !of(route)
            });
        };
        // How near a route is to the caller: in its own namespace, in its own cluster, elsewhere.
        let distance = |route: &Route| {
            let consumers = route.resource.namespace != *service.namespace();
            if route.resource.cluster.is_some() { 2 } else { u8::from(!consumers) }
        };
        let nearest = meant.iter().map(|route| distance(route)).min();
        pass_over(&mut meant, PassedOver::ConsumersOwn, &|route| Some(distance(route)) != nearest);
        meant.sort_by(|a, b| age(a).cmp(&age(b)));
        let kind = meant.first().map(|route| route.resource.kind);
        pass_over(&mut meant, PassedOver::OtherKind, &|route| Some(route.resource.kind) != kind);
        let entries = entries(&meant);
        Self { routes: meant, entries, passed_over }
    }

    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// Whether there is nothing to explain either: no route names the service.
    pub fn is_void(&self) -> bool {
        self.routes.is_empty() && self.passed_over.is_empty()
    }

    pub fn routes(&self) -> &[Arc<Route>] {
        &self.routes
    }

    /// Every service that a request of this port may be sent or copied to because of a route.
    pub fn services(&self) -> BTreeSet<&ServiceName> {
        self.routes.iter().flat_map(|route| route.services()).collect()
    }

    /// The rule for a request, and its backend. `draw` is any number, evenly distributed.
    pub fn pick<'a>(&'a self, head: &dyn Head, draw: u64) -> Decision<'a> {
        if self.routes.is_empty() {
            return Decision::Unrouted;
        }
        let found = self.entries.iter().find(|entry| self.test(entry, head).is_ok());
        found.map_or(Decision::NoMatch, |entry| Decision::Taken(self.taken(entry, draw)))
    }

    /// The rules in the order in which they are tried, each with why it is not taken, or that it is; then the
    /// routes that take no part. Allocates: for `explain`, not for requests.
    pub fn explain<'a>(&'a self, head: &dyn Head) -> Vec<Considered<'a>> {
        let mut taken = false;
        let mut considered: Vec<Considered<'a>> = Vec::new();
        for entry in &self.entries {
            let (route, rule) = self.rule(entry);
            let verdict = match self.test(entry, head) {
                Err(mismatch) => Verdict::Mismatch(mismatch),
                Ok(()) if taken => Verdict::LessSpecific,
                Ok(()) => Verdict::Taken,
            };
            taken |= verdict == Verdict::Taken;
            considered.push(Considered { resource: &route.resource, rule: Some((entry.rule, rule)), verdict });
        }
        let rest = self.passed_over.iter();
        considered.extend(rest.map(|(route, why)| Considered {
            resource: &route.resource,
            rule: None,
            verdict: Verdict::PassedOver(*why),
        }));
        considered
    }

    fn rule(&self, entry: &Entry) -> (&Route, &Rule) {
        let route = &self.routes[entry.route];
        (route, &route.rules[entry.rule])
    }

    fn test<'a>(&'a self, entry: &Entry, head: &dyn Head) -> Result<(), Mismatch<'a>> {
        let (_, rule) = self.rule(entry);
        entry.matched.map_or(Ok(()), |matched| rule.matches[matched].test(head))
    }

    fn taken(&self, entry: &Entry, draw: u64) -> Taken<'_> {
        let (route, rule) = self.rule(entry);
        let action = match &rule.filters.redirect {
            Some(redirect) => Action::Redirect(redirect),
            None => rule.backend(draw).map_or(Action::NoBackend, Action::Forward),
        };
        // A rule without a match has the default one, which is the prefix "/".
        let prefix = entry.matched.map_or(Some("/"), |matched| rule.matches[matched].prefix());
        Taken { route, rule, rule_index: entry.rule, prefix, action }
    }
}

/// One rule (or a whole route, where `rule` is `None`) as `explain` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Considered<'a> {
    pub resource: &'a Resource,
    /// The rule with its 0-based index.
    pub rule: Option<(usize, &'a Rule)>,
    pub verdict: Verdict<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<'a> {
    Taken,
    Mismatch(Mismatch<'a>),
    LessSpecific,
    PassedOver(PassedOver),
}

impl fmt::Display for Verdict<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Taken => f.write_str("taken"),
            Verdict::Mismatch(mismatch) => mismatch.fmt(f),
            Verdict::LessSpecific => {
                f.write_str("a rule before it matches too (more specific, older, or written first)")
            }
            Verdict::PassedOver(why) => why.fmt(f),
        }
    }
}

impl<'a> Taken<'a> {
    /// The backends of the rule, each with why it is taken or not. For `explain`, as above.
    pub fn backends(&self) -> Vec<(&'a Backend, BackendVerdict)> {
        let weight = self.rule.weight();
        let verdict = |backend: &'a Backend| {
            let share = Share { weight: backend.weight, of: weight };
            let verdict = match self.action {
                _ if backend.weight == 0 => BackendVerdict::ZeroWeight,
                Action::Forward(taken) if std::ptr::eq(taken, backend) => BackendVerdict::Taken(share),
                Action::Forward(_) | Action::Redirect(_) | Action::NoBackend => BackendVerdict::Beside(share),
            };
            (backend, verdict)
        };
        self.rule.backends.iter().map(verdict).collect()
    }
}

/// A backend's part of its rule's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub weight: u32,
    pub of: u64,
}

impl Share {
    /// 0 to 1.
    pub fn part(self) -> f64 {
        if self.of == 0 { 0.0 } else { f64::from(self.weight) / self.of as f64 }
    }
}

/// Why a backend of the rule that was taken gets a request, or does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendVerdict {
    Taken(Share),
    /// Another draw would have taken it.
    Beside(Share),
    ZeroWeight,
}

impl fmt::Display for BackendVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: &Share| 100.0 * share.part();
        match self {
            BackendVerdict::Taken(share) if u64::from(share.weight) == share.of => {
                f.write_str("all of the rule's requests")
            }
            BackendVerdict::Taken(share) => write!(f, "drawn: {:.1} % of the rule's requests", percent(share)),
            BackendVerdict::Beside(share) => {
                write!(f, "another is drawn: {:.1} % of the rule's requests", percent(share))
            }
            BackendVerdict::ZeroWeight => f.write_str("its weight is 0"),
        }
    }
}

/// Oldest first, then by `namespace/name`.
fn age(route: &Route) -> (jiff::Timestamp, &str, &str) {
    (route.created, route.resource.namespace.as_str(), &route.resource.name)
}

/// How specific a match is; a greater one comes first.
type Rank = (u8, usize, usize, usize, usize);

fn rank(of: &RequestMatch) -> Rank {
    let length = |text: &Option<super::pattern::ValueMatch>| text.as_ref().map_or(0, |text| text.as_str().len());
    match of {
        RequestMatch::Http(HttpMatch { path, headers, query, method }) => {
            let (class, path) = match path {
                PathMatch::Exact(path) => (2, path.len()),
                PathMatch::Regex(pattern) => (1, pattern.as_str().len()),
                PathMatch::Prefix(prefix) => (0, prefix.trim_end_matches('/').len()),
            };
            (class, path, usize::from(method.is_some()), headers.len(), query.len())
        }
        RequestMatch::Grpc(grpc) => (0, length(&grpc.service), length(&grpc.method), grpc.headers.len(), 0),
    }
}

/// `routes` are sorted by age, so that a stable sort by rank leaves what is equal in its right order.
fn entries(routes: &[Arc<Route>]) -> Vec<Entry> {
    let mut ranked: Vec<(Rank, Entry)> = Vec::new();
    for (route, it) in routes.iter().enumerate() {
        for (rule, it) in it.rules.iter().enumerate() {
            if it.matches.is_empty() {
                ranked.push((Rank::default(), Entry { route, rule, matched: None }));
            }
            let matches = it.matches.iter().enumerate();
            ranked.extend(matches.map(|(at, of)| (rank(of), Entry { route, rule, matched: Some(at) })));
        }
    }
    ranked.sort_by_key(|(rank, _)| Reverse(*rank));
    ranked.into_iter().map(|(_, entry)| entry).collect()
}

#[cfg(test)]
mod tests;
