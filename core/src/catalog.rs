//! The service catalogue of one cluster: its own services and what its peers export to it, joined
//! into one view per service that does not depend on the order in which the parts arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::conflict::{self, Conflict};
use crate::id::{ClusterId, EndpointId, Position, ServiceName};
use crate::import::{Import, StreamBroken, Touched, UpdateRefused};
use crate::model::{Authority, ClusterShare, Export, Freshness, Origin};
use crate::policy::exported;
use crate::policy::route::Route;
use crate::publish::{Change, Roots, Update};
use crate::sni::SYSTEM_NAMESPACE;

/// Where a sidecar of this cluster accepts inner legs for one port of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// `host:port`.
    pub address: String,
    pub ready: bool,
}

/// Deliveries of a service of this cluster, by endpoint and port.
pub type Deliveries = BTreeMap<EndpointId, BTreeMap<u16, Delivery>>;

/// A service of this cluster with the endpoints that it really has.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalShare {
    pub export: Arc<Export>,
    /// Whether it may leave this cluster at all.
    pub exported: bool,
    pub deliveries: Deliveries,
}

/// One service as this cluster sees it: every cluster's share, inside the import grants.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceView {
    pub service: ServiceName,
    /// In the order of cluster ids. The own cluster's share is here whether it is exported or not: what is
    /// not exported is still served to the cluster's own workloads, but takes no part in conflicts.
    pub shares: Vec<ClusterShare>,
    /// Where the endpoints of the own share are delivered.
    pub deliveries: Deliveries,
    pub conflicts: BTreeSet<Conflict>,
    /// Clusters that export it to here but whose import grant leaves it out.
    pub excluded: BTreeSet<ClusterId>,
    /// Whether this cluster exports it.
    pub exported: bool,
    /// The peers that this cluster offers it to.
    pub offered_to: BTreeSet<ClusterId>,
    /// The clusters whose workloads without a sidecar may call the own share; the own cluster may be one of them.
    pub unmeshed: BTreeSet<ClusterId>,
}

/// A peered cluster in the catalogue.
#[derive(Debug, Clone)]
struct Peer {
    authority: Authority,
    freshness: Freshness,
    import: Import,
}

/// Services whose views changed.
pub type Changed = BTreeSet<ServiceName>;

/// The catalogue's state machine. Inputs return the services whose views changed.
#[derive(Debug, Clone)]
pub struct Catalog {
    cluster: ClusterId,
    local: BTreeMap<ServiceName, LocalShare>,
    peers: BTreeMap<ClusterId, Peer>,
    views: BTreeMap<ServiceName, Arc<ServiceView>>,
}

impl Catalog {
    pub fn new(cluster: ClusterId) -> Self {
        Self { cluster, local: BTreeMap::new(), peers: BTreeMap::new(), views: BTreeMap::new() }
    }

    pub fn views(&self) -> &BTreeMap<ServiceName, Arc<ServiceView>> {
        &self.views
    }

    pub fn import(&self, cluster: &ClusterId) -> Option<&Import> {
        self.peers.get(cluster).map(|peer| &peer.import)
    }

    /// What this cluster publishes to one peer: exported, and offered to it.
    pub fn published_to(&self, cluster: &ClusterId) -> BTreeMap<ServiceName, Arc<Export>> {
        let Some(peer) = self.peers.get(cluster) else { return BTreeMap::new() };
        let offered = |share: &&LocalShare| share.exported && peer.authority.offers(&share.export.service);
        let published = self.local.values().filter(offered);
        let is_offered = |service: &ServiceName| self.local.get(service).as_ref().is_some_and(offered);
        let told = |share: &LocalShare| {
            let export = exported::offered(&share.export, &self.cluster, is_offered);
            if export.unmeshed || !peer.authority.unmeshed {
                return export;
            }
            Arc::new(Export { unmeshed: true, ..Arc::unwrap_or_clone(export) })
        };
        published.map(|share| (share.export.service.clone(), told(share))).collect()
    }

    /// Replaces this cluster's own services.
    pub fn handle_local(&mut self, local: BTreeMap<ServiceName, LocalShare>) -> Changed {
        let mut touched: Changed = self.local.keys().filter(|service| !local.contains_key(*service)).cloned().collect();
        self.local.retain(|service, _| local.contains_key(service));
        for (service, share) in local {
            // An unchanged share keeps its allocation, so that publishing sees at once that it is the same.
            if self.local.get(&service) != Some(&share) {
                self.local.insert(service.clone(), share);
                touched.insert(service.clone());
            }
        }
        self.refresh(touched)
    }

    /// A peer is there, with what was held of it before. Replaces the peer of the same cluster.
    pub fn handle_peer_added(&mut self, cluster: ClusterId, authority: Authority, import: Import) -> Changed {
        let mut touched = self.concerned(&cluster);
        self.peers.insert(cluster.clone(), Peer { authority, freshness: Freshness::Fresh, import });
        touched.extend(self.concerned(&cluster));
        self.refresh(touched)
    }

    /// The peering has ended: all that came from the peer goes at once.
    pub fn handle_peer_removed(&mut self, cluster: &ClusterId) -> Changed {
        let touched = self.concerned(cluster);
        self.peers.remove(cluster);
        self.refresh(touched)
    }

    /// Other grants for a peer.
    pub fn handle_authority(&mut self, cluster: &ClusterId, authority: &Authority) -> Changed {
        match self.peers.get_mut(cluster) {
            Some(peer) if peer.authority != *authority => peer.authority = authority.clone(),
            _ => return Changed::new(),
        }
        self.refresh(self.concerned(cluster))
    }

    pub fn handle_freshness(&mut self, cluster: &ClusterId, freshness: Freshness) -> Changed {
        match self.peers.get_mut(cluster) {
            Some(peer) if peer.freshness != freshness => peer.freshness = freshness,
            _ => return Changed::new(),
        }
        self.refresh(self.concerned(cluster))
    }

    /// A new stream from the peer begins.
    pub fn handle_reconnect(&mut self, cluster: &ClusterId) {
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.import.handle_reconnect();
        }
    }

    /// An update of the peer that could not be read is passed over.
    pub fn handle_unreadable(&mut self, cluster: &ClusterId, position: Position) {
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.import.handle_unreadable(position);
        }
    }

    /// Takes the bundle that a peering brought, unless a later one is held.
    pub fn handle_roots(&mut self, cluster: &ClusterId, roots: Arc<Roots>) {
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.import.seed_roots(roots);
        }
    }

    /// One update of a peer. `None` when there is no such peer (any more).
    pub fn handle_update(
        &mut self,
        cluster: &ClusterId,
        update: Update,
    ) -> Option<Result<(Changed, Touched), StreamBroken>> {
        let peer = self.peers.get_mut(cluster)?;
        let (update, without) = admit(update, cluster);
        let touched = match peer.import.handle_update(update) {
            Ok(touched) => Touched { refused: touched.refused.or(without), ..touched },
            Err(broken) => return Some(Err(broken)),
        };
        let changed = self.refresh(touched.services.clone());
        Some(Ok((changed, touched)))
    }

    /// Every service whose view can depend on this peer.
    fn concerned(&self, cluster: &ClusterId) -> Changed {
        let imported = self.peers.get(cluster).into_iter().flat_map(|peer| peer.import.exports().keys());
        self.local.keys().chain(imported).cloned().collect()
    }

    fn refresh(&mut self, mut touched: Changed) -> Changed {
        let mut changed = Changed::new();
        touched.extend(self.leading_to(&touched));
        for service in touched {
            let view = self.compute(&service);
            if self.views.get(&service).map(AsRef::as_ref) == view.as_ref() {
                continue;
            }
            match view {
                Some(view) => drop(self.views.insert(service.clone(), Arc::new(view))),
                None => drop(self.views.remove(&service)),
            }
            changed.insert(service);
        }
        changed
    }

    /// Services whose imported routes lead to one of these: whether a route is acceptable depends on them.
    fn leading_to(&self, services: &Changed) -> Vec<ServiceName> {
        let routed = self.peers.values().flat_map(|peer| peer.import.routed().iter().map(move |name| (peer, name)));
        let leads = routed.filter(|(peer, name)| {
            let routes = &peer.import.exports()[*name].routes;
            routes.iter().any(|route| route.services().into_iter().any(|to| services.contains(to)))
        });
        leads.map(|(_, name)| name.clone()).collect()
    }

    /// The view of one service, from nothing but the present state; `None` when nobody has it.
    fn compute(&self, service: &ServiceName) -> Option<ServiceView> {
        let local = self.local.get(service);
        let exported = local.is_some_and(|local| local.exported);
        let (mut accepted, mut excluded) = (Vec::new(), BTreeSet::new());
        for (cluster, peer) in self.exporters(service) {
            if peer.authority.accepts(service) {
                accepted.push((cluster, peer.freshness, &peer.import.exports()[service]));
            } else {
                excluded.insert(cluster.clone());
            }
        }
        if local.is_none() && accepted.is_empty() && excluded.is_empty() {
            return None;
        }
        let mut parties: Vec<(&ClusterId, &Export)> = accepted.iter().map(|(c, _, export)| (*c, &***export)).collect();
        parties.extend(local.filter(|_| exported).map(|local| (&self.cluster, &*local.export)));
        let resolved = conflict::resolve(&parties);
        let as_used = |export: &Export, takes_part: bool| match &resolved {
            Some(resolved) if takes_part => resolved.apply(export),
            _ => export.clone(),
        };
        let mut shares: Vec<ClusterShare> = accepted
            .iter()
            .map(|(cluster, freshness, export)| ClusterShare {
                cluster: (*cluster).clone(),
                origin: Origin::Remote,
                freshness: *freshness,
                export: Export { routes: self.routes_from(cluster, export), ..as_used(export, true) },
            })
            .collect();
        shares.extend(local.map(|local| ClusterShare {
            cluster: self.cluster.clone(),
            origin: Origin::Local,
            freshness: Freshness::Fresh,
            export: Export { routes: Vec::new(), ..as_used(&local.export, exported) },
        }));
        shares.sort_by(|a, b| a.cluster.cmp(&b.cluster));
        let offered = self.peers.iter().filter(|(_, peer)| exported && peer.authority.offers(service));
        let for_all = exported && local.is_some_and(|local| local.export.unmeshed);
        let unmeshed = offered.clone().filter(|(_, peer)| for_all || peer.authority.unmeshed);
        let unmeshed = unmeshed.map(|(cluster, _)| cluster).chain(for_all.then_some(&self.cluster));
        Some(ServiceView {
            service: service.clone(),
            shares,
            deliveries: local.map(|local| local.deliveries.clone()).unwrap_or_default(),
            conflicts: resolved.map(|resolved| resolved.conflicts).unwrap_or_default(),
            excluded,
            exported,
            unmeshed: unmeshed.cloned().collect(),
            offered_to: offered.map(|(cluster, _)| cluster.clone()).collect(),
        })
    }

    /// The routes that came with a peer's export, as far as what they lead to came from the same peer.
    fn routes_from(&self, cluster: &ClusterId, export: &Export) -> Vec<Arc<Route>> {
        let Some(peer) = self.peers.get(cluster) else { return Vec::new() };
        let is_exported = |to: &ServiceName| peer.authority.accepts(to) && peer.import.exports().contains_key(to);
        exported::acceptable(export, is_exported)
    }

    fn exporters(&self, service: &ServiceName) -> impl Iterator<Item = (&ClusterId, &Peer)> {
        let importable = service.namespace().as_str() != SYSTEM_NAMESPACE;
        self.peers.iter().filter(move |(_, peer)| importable && peer.import.exports().contains_key(service))
    }
}

/// Takes the routes out of an update that its sender may not have.
fn admit(update: Update, cluster: &ClusterId) -> (Update, Option<UpdateRefused>) {
    let Change::Export(export) = update.change else { return (update, None) };
    let service = export.service.clone();
    let (export, refused) = exported::admit(export, cluster);
    let refused = refused.map(|reason| UpdateRefused::Route { service, reason });
    (Update { change: Change::Export(export), ..update }, refused)
}
