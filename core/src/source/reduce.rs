//! From declared objects to what the cluster offers: a pure function of the objects, whatever order
//! they were read in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;

use super::declared::{
    Declared, DeclaredExport, DeclaredPeer, DeclaredService, DeclaredSlice, Object, Place, ServiceType,
};
use super::{ExportRefused, LocalEndpoint, LocalService, LocalState, SourceProblem};
use crate::id::{ClusterId, EndpointId, Namespace, ServiceName, SpiffeId, TrustDomain};
use crate::invitation::PEERS_MAX;
use crate::model::{ServiceKind, ServicePort};
use crate::policy::Resource;
use crate::policy::set::{OF_SERVICE_MAX, POLICIES_MAX, Policy, PolicySet};
use crate::sni::SYSTEM_NAMESPACE;

/// Endpoints that one service may declare.
pub const ENDPOINTS_MAX: usize = 10_000;
/// Services that one cluster may declare.
pub const SERVICES_MAX: usize = 10_000;
/// Problems reported at a time; the last one then says how many more there are.
pub const PROBLEMS_MAX: usize = 200;

/// What the objects of a source are there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// All of them were written for the mesh: each that can't be used is a problem.
    Mesh,
    /// A whole cluster's. Only what is exported is the mesh's affair, and objects of different kinds arrive at
    /// different times.
    Everything,
}

/// What the reduction needs to know beside the objects.
pub struct Surroundings<'a> {
    pub purpose: Purpose,
    pub cluster: &'a ClusterId,
    pub trust_domain: &'a TrustDomain,
    /// When each export was first seen; `now` is taken for one that is missing.
    pub first_seen: &'a BTreeMap<ServiceName, Timestamp>,
    pub now: Timestamp,
    /// Makes the opaque id of an endpoint from its service and what tells it apart there.
    pub endpoint_id: &'a dyn Fn(&ServiceName, &str) -> EndpointId,
}

/// Reduces all objects of a source. Two objects of one name: the first by file and line counts, the
/// other is reported. `problems` are those that reading has found already.
pub fn reduce(mut objects: Vec<Declared>, problems: Vec<SourceProblem>, around: &Surroundings<'_>) -> LocalState {
    objects.sort_by(|a, b| a.place.cmp(&b.place));
    let mut reduction = Reduction { around, problems, refused_exports: BTreeMap::new(), exported: BTreeSet::new() };
    let sorted = reduction.sort(&objects);
    reduction.exported = sorted.exports.keys().map(|name| (*name).clone()).collect();
    let mut services = BTreeMap::new();
    for (name, (place, service)) in &sorted.services {
        if services.len() == SERVICES_MAX {
            reduction.report(place, format!("more than {SERVICES_MAX} services; this one and later ones are left out"));
            break;
        }
        if service.service_type != ServiceType::ExternalName {
            services.insert((*name).clone(), reduction.service(place, service));
        }
    }
    for (place, slice) in &sorted.slices {
        reduction.slice(place, slice, &mut services);
    }
    for (place, export) in sorted.exports.values() {
        reduction.export(place, export, &sorted, &mut services);
    }
    let policies = reduction.policies(&sorted);
    let peers = reduction.peers(&sorted);
    let access = |(_, peer): &(Place, DeclaredPeer)| Some((peer.cluster.clone(), peer.default_access?));
    LocalState {
        services,
        policies: Arc::new(policies),
        peer_access: peers.iter().filter_map(access).collect(),
        peers: peers.iter().map(|(_, peer)| (peer.cluster.clone(), peer.authority.clone())).collect(),
        declared_peers: peers
            .into_iter()
            .filter(|(_, peer)| peer.bundle.is_some())
            .map(|(place, peer)| (peer.cluster.clone(), (place, peer)))
            .collect(),
        refused_exports: reduction.refused_exports,
        problems: bounded(reduction.problems),
    }
}

fn bounded(mut problems: Vec<SourceProblem>) -> Vec<SourceProblem> {
    problems.sort();
    problems.dedup();
    if problems.len() > PROBLEMS_MAX {
        let more = problems.len() - (PROBLEMS_MAX - 1);
        problems.truncate(PROBLEMS_MAX - 1);
        problems.push(SourceProblem { file: String::new(), line: 0, reason: format!("and {more} more problems") });
    }
    problems
}

/// Objects by kind and name, without the duplicates.
#[derive(Default)]
struct Sorted<'a> {
    services: BTreeMap<&'a ServiceName, (&'a Place, &'a DeclaredService)>,
    slices: Vec<(&'a Place, &'a DeclaredSlice)>,
    exports: BTreeMap<&'a ServiceName, (&'a Place, &'a DeclaredExport)>,
    /// Those whose exports gateways may call for workloads without a sidecar.
    unmeshed: BTreeMap<&'a Namespace, &'a Place>,
    peers: BTreeMap<&'a ClusterId, (&'a Place, &'a DeclaredPeer)>,
    policies: BTreeMap<&'a Resource, (&'a Place, &'a Policy)>,
}

struct Reduction<'a> {
    around: &'a Surroundings<'a>,
    problems: Vec<SourceProblem>,
    refused_exports: BTreeMap<ServiceName, ExportRefused>,
    /// Services that somebody wants exported.
    exported: BTreeSet<ServiceName>,
}

impl Reduction<'_> {
    fn report(&mut self, place: &Place, reason: String) {
        self.problems.push(SourceProblem { file: place.file.to_string(), line: place.line, reason });
    }

    /// A problem of a Service, where it is the mesh's affair.
    fn report_service(&mut self, place: &Place, service: &ServiceName, reason: String) {
        if self.around.purpose == Purpose::Mesh || self.exported.contains(service) {
            self.report(place, reason);
        }
    }

    fn sort<'o>(&mut self, objects: &'o [Declared]) -> Sorted<'o> {
        let mut sorted = Sorted::default();
        let mut slice_names: BTreeMap<(&ServiceName, &str), &Place> = BTreeMap::new();
        for Declared { place, object } in objects {
            if self.is_reserved(place, object) {
                continue;
            }
            let first = match object {
                Object::Service(service) => first_of(&mut sorted.services, &service.service, (place, service)),
                Object::Export(export) => first_of(&mut sorted.exports, &export.service, (place, export)),
                Object::Peer(peer) => first_of(&mut sorted.peers, &peer.cluster, (place, peer)),
                Object::Policy(policy) => first_of(&mut sorted.policies, policy.resource(), (place, policy)),
                Object::Namespace(namespace) => first_of(&mut sorted.unmeshed, &namespace.name, place),
                Object::Slice(slice) => {
                    let first = first_of(&mut slice_names, (&slice.service, slice.name.as_str()), place);
                    if first.is_none() {
                        sorted.slices.push((place, slice));
                    }
                    first
                }
            };
            if let Some(first) = first {
                let (kind, name) = described(object);
                self.report(place, format!("{kind} {name} is defined in {first} already; remove one of the two"));
            }
        }
        sorted
    }

    fn is_reserved(&mut self, place: &Place, object: &Object) -> bool {
        let service = match object {
            Object::Service(service) => &service.service,
            Object::Slice(slice) => &slice.service,
            Object::Export(export) => &export.service,
            Object::Peer(_) | Object::Policy(_) | Object::Namespace(_) => return false,
        };
        let reserved = service.namespace().as_str() == SYSTEM_NAMESPACE;
        let is_export = matches!(object, Object::Export(_));
        // Where tombolo runs in the cluster that it reads, its own Services are there.
        if reserved && (is_export || self.around.purpose == Purpose::Mesh) {
            self.report(place, format!("namespace {SYSTEM_NAMESPACE} is tombolo's own; use another one"));
        }
        if reserved && is_export {
            self.refused_exports.insert(service.clone(), ExportRefused::ReservedNamespace);
        }
        reserved
    }

    fn service(&mut self, place: &Place, declared: &DeclaredService) -> LocalService {
        let kind = match declared.service_type {
            ServiceType::Headless => ServiceKind::Headless,
            ServiceType::ClusterIp | ServiceType::ExternalName => ServiceKind::ClusterSetIp,
        };
        LocalService {
            service: declared.service.clone(),
            exported: None,
            kind,
            session_affinity: declared.session_affinity,
            ports: self.ports(place, declared),
            server_ids: self.server_ids(place, declared),
            endpoints: BTreeMap::new(),
            unmeshed: false,
        }
    }

    fn ports(&mut self, place: &Place, declared: &DeclaredService) -> BTreeSet<ServicePort> {
        let name = &declared.service;
        let (mut numbers, mut names) = (BTreeSet::new(), BTreeSet::new());
        let mut ports = BTreeSet::new();
        for port in &declared.ports {
            if !numbers.insert((port.port, port.transport)) || !names.insert(&port.name) {
                let reason =
                    format!("Service {name} has port {} {:?} twice; the first one counts", port.port, port.name);
                self.report_service(place, name, reason);
                continue;
            }
            if port.name.is_empty() && declared.ports.len() > 1 {
                let reason = format!("Service {name} has several ports: name port {}", port.port);
                self.report_service(place, name, reason);
            }
            ports.insert(port.clone());
        }
        if ports.is_empty() && declared.service_type == ServiceType::ClusterIp {
            self.report_service(place, name, format!("Service {name} has no ports; nobody can call it"));
        }
        ports
    }

    fn server_ids(&mut self, place: &Place, declared: &DeclaredService) -> BTreeSet<SpiffeId> {
        let name = &declared.service;
        let mut ids = BTreeSet::new();
        for account in &declared.service_accounts {
            match SpiffeId::workload(self.around.trust_domain, name.namespace(), account) {
                // A '/' in an account would move the identity elsewhere.
                Ok(id) if !account.contains('/') => _ = ids.insert(id),
                _ => self.report(place, format!("Service {name}: {account:?} is not a service account's name")),
            }
        }
        if ids.is_empty() && declared.service_type != ServiceType::ExternalName {
            let reason = format!(
                "Service {name} names nobody who may serve it; add the annotation \
                 tombolo.dev/service-accounts: <account>[,<account>]"
            );
            self.report_service(place, name, reason);
        }
        ids
    }

    fn slice(&mut self, place: &Place, slice: &DeclaredSlice, services: &mut BTreeMap<ServiceName, LocalService>) {
        let Some(service) = services.get_mut(&slice.service) else {
            let reason =
                format!("EndpointSlice {} belongs to Service {}, which is not here", slice.name, slice.service);
            // An export of it is refused for the same reason; elsewhere the Service may just be on its way.
            if self.around.purpose == Purpose::Mesh {
                self.report(place, reason);
            }
            return;
        };
        for endpoint in &slice.endpoints {
            if service.endpoints.len() >= ENDPOINTS_MAX {
                let reason = format!("Service {} has more than {ENDPOINTS_MAX} endpoints", slice.service);
                return self.report(place, reason);
            }
            let key = endpoint.instance.as_ref().map_or(endpoint.key.as_str(), |instance| instance.as_str());
            let id = (self.around.endpoint_id)(&slice.service, key);
            // One instance in two slices (one an address family, say) is one endpoint.
            service.endpoints.entry(id).or_insert_with(|| LocalEndpoint {
                instance: endpoint.instance.clone(),
                hostname: endpoint.hostname.clone(),
                zone: endpoint.zone.clone(),
                weight: endpoint.weight.max(1),
                declared_ready: endpoint.ready,
            });
        }
    }

    fn export(
        &mut self,
        place: &Place,
        export: &DeclaredExport,
        sorted: &Sorted<'_>,
        services: &mut BTreeMap<ServiceName, LocalService>,
    ) {
        let name = &export.service;
        if let Some(service) = services.get_mut(name) {
            service.unmeshed = export.unmeshed || sorted.unmeshed.contains_key(name.namespace());
            service.exported = Some(self.around.first_seen.get(name).copied().unwrap_or(self.around.now));
            return;
        }
        let (refused, reason) = match sorted.services.get(name) {
            Some((_, service)) if service.service_type == ServiceType::ExternalName => (
                ExportRefused::InvalidServiceType,
                format!("InvalidServiceType: Service {name} is of type ExternalName, which can't be exported"),
            ),
            // Which service was left out for it is reported with that service.
            Some(_) => (ExportRefused::TooMany, format!("ServiceExport {name}: more than {SERVICES_MAX} services")),
            None => (
                ExportRefused::NoService,
                format!("NoService: ServiceExport {name} exports a Service that is not here"),
            ),
        };
        self.refused_exports.insert(name.clone(), refused);
        self.report(place, reason);
    }

    fn policies(&mut self, sorted: &Sorted<'_>) -> PolicySet {
        let (set, left_out) = PolicySet::new(sorted.policies.values().map(|(_, policy)| (*policy).clone()).collect());
        for policy in &left_out {
            let resource = policy.resource();
            if let Some((place, _)) = sorted.policies.get(resource) {
                let closed = match policy {
                    Policy::Access(_) => "; what it would refuse is not known, so everybody is refused there",
                    Policy::Route(_) | Policy::Traffic(_) => "",
                };
                let reason = format!(
                    "{resource} is left out: there are more than {POLICIES_MAX} routes and policies, or more than \
                     {OF_SERVICE_MAX} of its kind for one service{closed}"
                );
                self.report(place, reason);
            }
        }
        set
    }

    fn peers(&mut self, sorted: &Sorted<'_>) -> Vec<(Place, DeclaredPeer)> {
        let mut domains: BTreeMap<&TrustDomain, &ClusterId> = BTreeMap::new();
        let mut peers = Vec::new();
        for (cluster, (place, peer)) in &sorted.peers {
            if peers.len() == PEERS_MAX {
                self.report(place, format!("more than {PEERS_MAX} peers; this one and later ones are left out"));
                break;
            }
            let own = *cluster == self.around.cluster || peer.trust_domain.as_ref() == Some(self.around.trust_domain);
            if own {
                let reason = format!("ClusterPeer {cluster} names this cluster itself, or its trust domain");
                self.report(place, reason);
                continue;
            }
            if let Some(domain) = &peer.trust_domain
                && let Some(other) = domains.insert(domain, cluster)
            {
                let reason = format!(
                    "ClusterPeer {cluster} claims trust domain {domain}, which is {other}'s; each has one of its own"
                );
                domains.insert(domain, other);
                self.report(place, reason);
                continue;
            }
            peers.push(((*place).clone(), (*peer).clone()));
        }
        peers
    }
}

/// Inserts unless the name is taken; then says where the first one is.
fn first_of<'a, K: Ord, V: Located<'a>>(map: &mut BTreeMap<K, V>, key: K, value: V) -> Option<&'a Place> {
    match map.entry(key) {
        std::collections::btree_map::Entry::Occupied(first) => Some(first.get().place()),
        std::collections::btree_map::Entry::Vacant(free) => {
            free.insert(value);
            None
        }
    }
}

trait Located<'a> {
    fn place(&self) -> &'a Place;
}

impl<'a> Located<'a> for &'a Place {
    fn place(&self) -> &'a Place {
        self
    }
}

impl<'a, T> Located<'a> for (&'a Place, T) {
    fn place(&self) -> &'a Place {
        self.0
    }
}

fn described(object: &Object) -> (&'static str, String) {
    match object {
        Object::Service(service) => ("Service", service.service.to_string()),
        Object::Slice(slice) => ("EndpointSlice", slice.name.clone()),
        Object::Export(export) => ("ServiceExport", export.service.to_string()),
        Object::Peer(peer) => ("ClusterPeer", peer.cluster.to_string()),
        Object::Namespace(namespace) => ("Namespace", namespace.name.to_string()),
        Object::Policy(policy) => {
            let Resource { kind, namespace, name, .. } = policy.resource();
            (kind.as_str(), format!("{namespace}/{name}"))
        }
    }
}
