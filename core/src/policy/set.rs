//! All resources of a source that decide about requests, and which of them speak of a service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Resource;
use super::access::{AccessPolicy, AccessSpec, Mode};
use super::route::Route;
use super::traffic::TrafficPolicy;
use crate::id::{Namespace, ServiceName};

/// Resources that a source may declare.
pub const POLICIES_MAX: usize = 4_096;
/// Resources of one kind that may speak of one service.
pub const OF_SERVICE_MAX: usize = 32;

/// One resource, parsed and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    Route(Arc<Route>),
    Traffic(Arc<TrafficPolicy>),
    Access(Arc<AccessPolicy>),
}

impl Policy {
    pub fn resource(&self) -> &Resource {
        match self {
            Policy::Route(route) => &route.resource,
            Policy::Traffic(policy) => &policy.resource,
            Policy::Access(policy) => &policy.resource,
        }
    }

    /// The services that it names; none means all of its namespace.
    fn services(&self) -> Vec<&ServiceName> {
        match self {
            Policy::Route(route) => route.parents.iter().map(|parent| &parent.service).collect(),
            Policy::Traffic(policy) => policy.targets.iter().collect(),
            Policy::Access(policy) => policy.targets.iter().collect(),
        }
    }
}

/// The resources of a source, by what they speak of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PolicySet {
    of_service: BTreeMap<ServiceName, Vec<Policy>>,
    of_namespace: BTreeMap<Namespace, Vec<Policy>>,
    count: usize,
}

impl PolicySet {
    /// `policies` in the order in which they are to be told, each resource once. Yields those that there is no room
    /// for, too: they are not in the set. In the place of an enforced [`AccessPolicy`] among them stands one that
    /// refuses everybody: what it would have refused is not known any more.
    pub fn new(policies: Vec<Policy>) -> (Self, Vec<Policy>) {
        let (mut set, mut left_out) = (Self::default(), Vec::new());
        for policy in policies {
            if set.count < POLICIES_MAX && set.has_room(&policy) {
                set.count += 1;
                set.put(policy);
                continue;
            }
            if let Policy::Access(access) = &policy
                && access.spec.mode == Mode::Enforce
            {
                set.close(access);
            }
            left_out.push(policy);
        }
        (set, left_out)
    }

    fn put(&mut self, policy: Policy) {
        let services = policy.services();
        if services.is_empty() {
            self.of_namespace.entry(policy.resource().namespace.clone()).or_default().push(policy);
            return;
        }
        for service in services {
            let known = self.of_service.entry(service.clone()).or_default();
            // A route may name one service twice, with two ports.
            if known.last() != Some(&policy) {
                known.push(policy.clone());
            }
        }
    }

    /// Refuses every caller of what `policy` selects. Once for each service, however many are left out.
    fn close(&mut self, policy: &AccessPolicy) {
        let spec = AccessSpec::closed();
        let closed = |known: &Vec<Policy>| matches!(known.last(), Some(Policy::Access(last)) if last.spec == spec);
        let open = |target: &&ServiceName| !self.of_service.get(*target).is_some_and(closed);
        let targets: BTreeSet<ServiceName> = policy.targets.iter().filter(open).cloned().collect();
        let namespace = self.of_namespace.get(&policy.resource.namespace);
        let done = if policy.targets.is_empty() { namespace.is_some_and(closed) } else { targets.is_empty() };
        if !done {
            let resource = policy.resource.clone();
            self.put(Policy::Access(Arc::new(AccessPolicy { resource, targets, spec })));
        }
    }

    fn has_room(&self, policy: &Policy) -> bool {
        let kind = policy.resource().kind;
        let full =
            |known: &Vec<Policy>| known.iter().filter(|one| one.resource().kind == kind).count() >= OF_SERVICE_MAX;
        let services = policy.services();
        if services.is_empty() {
            return !self.of_namespace.get(&policy.resource().namespace).is_some_and(full);
        }
        !services.iter().any(|service| self.of_service.get(*service).is_some_and(full))
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What decides where `service` is delivered: who may call it, and how often.
    pub fn delivered(&self, service: &ServiceName) -> Vec<Policy> {
        let wanted = |policy: &&Policy| matches!(policy, Policy::Access(_) | Policy::Traffic(_));
        self.all(service).filter(wanted).cloned().collect()
    }

    /// What decides where `service` is called from, by a workload of the namespace `caller`.
    pub fn used(&self, service: &ServiceName, caller: &Namespace) -> Vec<Policy> {
        let wanted = |policy: &&Policy| match policy {
            Policy::Route(route) => {
                let own = route.resource.namespace == *service.namespace();
                own || route.resource.namespace == *caller
            }
            Policy::Traffic(_) => true,
            Policy::Access(_) => false,
        };
        self.all(service).filter(wanted).cloned().collect()
    }

    /// Routes of the service's own namespace, which callers of other clusters are told with its export.
    pub fn produced(&self, service: &ServiceName) -> Vec<Arc<Route>> {
        let own = self.of_service.get(service).into_iter().flatten().filter_map(|policy| match policy {
            Policy::Route(route) => Some(route),
            Policy::Traffic(_) | Policy::Access(_) => None,
        });
        own.filter(|route| route.resource.namespace == *service.namespace()).cloned().collect()
    }

    /// Each resource that names services of which `is_known` knows none, with the first of them. Those of a whole namespace
    /// name none.
    pub fn unmatched(&self, is_known: impl Fn(&ServiceName) -> bool) -> BTreeMap<&Resource, &ServiceName> {
        let mut unmatched = BTreeMap::new();
        for (service, policies) in &self.of_service {
            for policy in policies {
                if !policy.services().into_iter().any(&is_known) {
                    unmatched.entry(policy.resource()).or_insert(service);
                }
            }
        }
        unmatched
    }

    fn all(&self, service: &ServiceName) -> impl Iterator<Item = &Policy> {
        let of_service = self.of_service.get(service).into_iter().flatten();
        of_service.chain(self.of_namespace.get(service.namespace()).into_iter().flatten())
    }
}

/// Of the policies for one service the one that counts: the oldest, then the first by name.
pub fn leading<'a>(policies: impl IntoIterator<Item = &'a Policy>) -> Option<&'a Arc<TrafficPolicy>> {
    let traffic = policies.into_iter().filter_map(|policy| match policy {
        Policy::Traffic(policy) => Some(policy),
        Policy::Route(_) | Policy::Access(_) => None,
    });
    traffic.min_by(|a, b| (a.created, &a.resource).cmp(&(b.created, &b.resource)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Kind;
    use super::super::route::Parent;
    use super::super::traffic::TrafficSpec;
    use super::*;
    use jiff::Timestamp;

    fn resource(kind: Kind, name: &str) -> Resource {
        let (namespace, name) = name.split_once('/').unwrap();
        Resource::new(kind, namespace.parse().unwrap(), name).unwrap()
    }

    fn names(targets: &[&str]) -> BTreeSet<ServiceName> {
        targets.iter().map(|target| target.parse().unwrap()).collect()
    }

    fn access(name: &str, targets: &[&str]) -> Policy {
        let resource = resource(Kind::AccessPolicy, name);
        Policy::Access(Arc::new(AccessPolicy { resource, targets: names(targets), spec: AccessSpec::default() }))
    }

    fn traffic(name: &str, target: &str, created: i64) -> Policy {
        let resource = resource(Kind::TrafficPolicy, name);
        let created = Timestamp::from_second(created).unwrap();
        let (targets, spec) = (names(&[target]), TrafficSpec::default());
        Policy::Traffic(Arc::new(TrafficPolicy { resource, created, targets, spec }))
    }

    fn route(name: &str, parents: &[&str]) -> Policy {
        let parent = |service: &&str| Parent { service: service.parse().unwrap(), port: None };
        Policy::Route(Arc::new(Route {
            resource: resource(Kind::HttpRoute, name),
            created: Timestamp::UNIX_EPOCH,
            parents: parents.iter().map(parent).collect(),
            rules: Vec::new(),
        }))
    }

    fn told(policies: Vec<Policy>) -> Vec<String> {
        policies.iter().map(|policy| policy.resource().to_string()).collect()
    }

    #[test]
    fn each_side_is_told_what_acts_there() {
        let (set, left_out) = PolicySet::new(vec![
            access("shop/all", &[]),
            access("shop/web", &["shop/web", "shop/api"]),
            traffic("shop/web", "shop/web", 0),
            route("shop/web", &["shop/web", "shop/web"]),
            route("pay/to-web", &["shop/web"]),
        ]);
        assert_eq!((set.len(), left_out.len()), (5, 0));
        let (web, other) = ("shop/web".parse().unwrap(), "shop/x".parse().unwrap());
        let delivered = ["AccessPolicy shop/web", "TrafficPolicy shop/web", "AccessPolicy shop/all"];
        assert_eq!(told(set.delivered(&web)), delivered);
        assert_eq!(told(set.delivered(&other)), ["AccessPolicy shop/all"]);
        assert!(set.delivered(&"pay/web".parse().unwrap()).is_empty());
        let used = |caller: &str| told(set.used(&web, &caller.parse().unwrap()));
        assert_eq!(used("pay"), ["TrafficPolicy shop/web", "HTTPRoute shop/web", "HTTPRoute pay/to-web"]);
        assert_eq!(used("data"), ["TrafficPolicy shop/web", "HTTPRoute shop/web"]);
        assert!(set.used(&other, &"pay".parse().unwrap()).is_empty());
    }

    #[test]
    fn what_finds_no_room_is_left_out_and_named() {
        let many = |n: usize| (0..n).map(|n| access(&format!("shop/p{n:03}"), &["shop/web"])).collect::<Vec<_>>();
        let (set, left_out) = PolicySet::new(many(OF_SERVICE_MAX + 2));
        assert_eq!(told(left_out), ["AccessPolicy shop/p032", "AccessPolicy shop/p033"]);
        assert_eq!(set.len(), OF_SERVICE_MAX);
        // What they would have refused is not known, so everybody is refused, once for all that were left out.
        let delivered = set.delivered(&"shop/web".parse().unwrap());
        assert_eq!(delivered.len(), OF_SERVICE_MAX + 1);
        let Some(Policy::Access(last)) = delivered.last() else { panic!("{delivered:?}") };
        assert_eq!(last.spec, AccessSpec::closed());
        assert!(set.delivered(&"shop/other".parse().unwrap()).is_empty());
    }

    #[test]
    fn a_namespace_is_closed_too_and_routes_and_audits_close_nothing() {
        let everywhere = |n: usize| (0..n).map(|n| access(&format!("shop/p{n:03}"), &[])).collect::<Vec<_>>();
        let (set, _) = PolicySet::new(everywhere(OF_SERVICE_MAX + 2));
        assert_eq!(set.delivered(&"shop/any".parse().unwrap()).len(), OF_SERVICE_MAX + 1);
        assert!(set.delivered(&"pay/any".parse().unwrap()).is_empty());

        let web: ServiceName = "shop/web".parse().unwrap();
        let routes = (0..OF_SERVICE_MAX + 2).map(|n| route(&format!("shop/r{n:03}"), &["shop/web"])).collect();
        let (set, left_out) = PolicySet::new(routes);
        assert_eq!((left_out.len(), set.delivered(&web).len()), (2, 0));
        let mut audited = everywhere(OF_SERVICE_MAX + 2);
        for policy in &mut audited {
            let Policy::Access(access) = policy else { panic!("{policy:?}") };
            Arc::make_mut(access).spec.mode = Mode::Audit;
        }
        assert_eq!(PolicySet::new(audited).0.delivered(&web).len(), OF_SERVICE_MAX);
    }

    #[test]
    fn of_two_traffic_policies_the_older_one_counts() {
        let policies =
            [traffic("shop/b", "shop/web", 5), traffic("shop/c", "shop/web", 2), traffic("shop/a", "shop/web", 5)];
        assert_eq!(leading(&policies).unwrap().resource.name, "c");
        assert_eq!(leading(&policies[..1]).unwrap().resource.name, "b");
        assert_eq!(leading(&[access("shop/a", &[])]), None);
    }
}
