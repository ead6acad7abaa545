//! Which endpoint a connection goes to: what the sidecars' router decides, from what this gateway knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tombolo_core::id::{ClusterId, ServiceName, SpiffeId};
use tombolo_core::liveness::Reach;
use tombolo_core::model::{Origin, SessionAffinity};
use tombolo_core::outlier::EjectReason;
use tombolo_core::routing::{
    self, Balance, ClusterReach, ClusterView, Draw, EndpointKey, EndpointView, Load, Preferences, Router,
};
use tombolo_leg::discovery::{ServiceView, ShareView};

use crate::tunnel::registry::Registry;

/// How long an endpoint is left alone that did not take a connection.
const LEFT_ALONE: Duration = Duration::from_secs(5);

/// One port of a service.
pub struct Route {
    pub service: ServiceName,
    pub port: u16,
    planning: Mutex<Planning>,
    turn: AtomicU64,
}

#[derive(Default)]
struct Planning {
    router: Router,
    /// Endpoints that did not take a connection, and until when they are asked last.
    left_alone: BTreeMap<EndpointKey, Instant>,
    under_way: BTreeMap<EndpointKey, u32>,
    /// Dialling keeps a configuration for each set of identities, told apart by its address.
    server_ids: BTreeMap<ClusterId, Arc<BTreeSet<SpiffeId>>>,
}

/// Where one connection is to go.
pub struct Choice {
    pub key: EndpointKey,
    pub server_ids: Arc<BTreeSet<SpiffeId>>,
    /// `host:port` of the sidecar of an endpoint of this cluster; `None` for another cluster's.
    pub address: Option<String>,
    pub under_way: UnderWay,
}

/// Counts a connection at its endpoint until it ends.
pub struct UnderWay {
    route: Arc<Route>,
    key: EndpointKey,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut planning = self.route.planning();
        if let Some(count) = planning.under_way.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                planning.under_way.remove(&self.key);
            }
        }
    }
}

impl Route {
    pub fn new(service: ServiceName, port: u16) -> Self {
        Self { service, port, planning: Mutex::default(), turn: AtomicU64::new(0) }
    }

    /// The endpoint for one try of a connection from `source`; `None` where the service has none.
    pub fn choose(
        self: &Arc<Self>,
        view: &ServiceView,
        registry: &Registry,
        tried: &[EndpointKey],
        source: IpAddr,
    ) -> Option<Choice> {
        let now = Instant::now();
        let mut planning = self.planning();
        planning.left_alone.retain(|_, until| now < *until);
        let shares: Vec<&ShareView> =
            view.shares.iter().filter(|share| share.share.export.port(self.port).is_some()).collect();
        let affinity = shares.iter().min_by_key(|share| (share.share.origin, share.share.export.created));
        let sticky = affinity.is_some_and(|share| share.share.export.session_affinity == SessionAffinity::ClientIp);
        let balance = if sticky { Balance::ConsistentHash } else { Balance::default() };
        let preferences = Preferences { balance, ..Preferences::default() };
        let views = shares.iter().map(|share| self.cluster_view(share, &planning, registry)).collect();
        let plan = planning.router.plan(views, &preferences, now);
        let session = sticky.then(|| routing::session(source.to_canonical().to_string().as_bytes()));
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let load = |index: usize| {
            let in_flight = planning.under_way.get(&plan.endpoints[index].key).copied().unwrap_or(0);
            Load { in_flight, latency_us: None }
        };
        let pick = plan.pick(Draw { random: rand::random(), turn, session, tried, now }, load)?;
        let key = plan.endpoints[pick.endpoint].key.clone();
        let share = shares.iter().find(|share| share.share.cluster == key.cluster)?;
        *planning.under_way.entry(key.clone()).or_default() += 1;
        let server_ids = planning.server_ids(&key.cluster, &share.share.export.server_ids);
        let address = self.address(share, &key).cloned();
        let under_way = UnderWay { route: self.clone(), key: key.clone() };
        Some(Choice { key, server_ids, address, under_way })
    }

    /// It did not take a connection.
    pub fn failed(&self, key: &EndpointKey) {
        self.planning().left_alone.insert(key.clone(), Instant::now() + LEFT_ALONE);
    }

    fn address<'a>(&self, share: &'a ShareView, key: &EndpointKey) -> Option<&'a String> {
        share.deliveries.get(&key.endpoint)?.get(&self.port)
    }

    fn cluster_view(&self, share: &ShareView, planning: &Planning, registry: &Registry) -> ClusterView {
        let (cluster, origin) = (&share.share.cluster, share.share.origin);
        let (reach, rtt) = match origin {
            Origin::Local => (ClusterReach::Up, None),
            Origin::Remote => (reach(registry.reach(cluster)), registry.rtt(cluster)),
        };
        let endpoints = share.share.export.endpoints.values().map(|endpoint| {
            let key = EndpointKey { cluster: cluster.clone(), endpoint: endpoint.id.clone() };
            let delivered = origin == Origin::Remote || self.address(share, &key).is_some();
            EndpointView {
                id: endpoint.id.clone(),
                weight: endpoint.weight,
                ready: endpoint.ready && delivered,
                ejected: planning.left_alone.contains_key(&key).then_some(EjectReason::Refused),
                near: false,
                since: None,
            }
        });
        let endpoints = endpoints.collect();
        ClusterView { cluster: cluster.clone(), origin, freshness: share.share.freshness, reach, rtt, endpoints }
    }

    fn planning(&self) -> MutexGuard<'_, Planning> {
        self.planning.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Planning {
    fn server_ids(&mut self, cluster: &ClusterId, ids: &BTreeSet<SpiffeId>) -> Arc<BTreeSet<SpiffeId>> {
        let held = self.server_ids.entry(cluster.clone()).or_default();
        if **held != *ids {
            *held = Arc::new(ids.clone());
        }
        held.clone()
    }
}

fn reach(reach: Option<Reach>) -> ClusterReach {
    match reach {
        Some(Reach::Up) => ClusterReach::Up,
        Some(Reach::Suspect) => ClusterReach::Suspect,
        Some(Reach::Dead) | None => ClusterReach::Down,
    }
}
