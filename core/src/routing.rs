//! Which endpoint a request goes to: local first, in proportion to healthy capacity, then the other
//! clusters by distance; within a cluster the less loaded and faster of two.
//!
//! [`Router::plan`] runs when something changed and yields an immutable [`Plan`]; [`Plan::pick`] runs for
//! each try, takes randomness and the load of endpoints as arguments and keeps nothing.
//!
//! What a service's owner may decide differently is in [`Preferences`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::id::{ClusterId, EndpointId};
use crate::model::{Freshness, Origin};
use crate::outlier::EjectReason;

mod affinity;
mod capacity;
mod explain;
mod load;
mod pick;
mod preferences;
mod share;

pub use affinity::session;
use capacity::{Capacity, Grant, Weights};
pub use capacity::{OVER_PROVISIONING, RISE_HOLD, RISE_STEP};
pub use explain::{ShareReason, Verdict};
pub use load::{Load, PeakEwma};
use pick::Candidates;
pub use pick::{Draw, FIRST, Pick, PickReason};
pub use preferences::{Balance, Failover, Preferences};

/// One endpoint among those of all clusters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct EndpointKey {
    pub cluster: ClusterId,
    pub endpoint: EndpointId,
}

/// Whether a cluster can be reached, as far as the gateways here say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClusterReach {
    Up,
    /// No gateway has said anything yet: worth a try.
    Unknown,
    /// The far end is silent: no new picks.
    Suspect,
    Down,
}

/// One cluster's part of a service, as planning needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterView {
    pub cluster: ClusterId,
    pub origin: Origin,
    pub freshness: Freshness,
    /// Of no meaning for the local cluster.
    pub reach: ClusterReach,
    pub rtt: Option<Duration>,
    pub endpoints: Vec<EndpointView>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointView {
    pub id: EndpointId,
    pub weight: u32,
    pub ready: bool,
    pub ejected: Option<EjectReason>,
    /// In the zone of the caller.
    pub near: bool,
    /// When it became fit for requests, if it was not so from the beginning.
    pub since: Option<Instant>,
}

/// Why an endpoint gets traffic, or does not. Ordered from the best to the worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    Usable,
    /// Ready by its own account, but requests to it failed.
    Ejected,
    /// As well, and nobody is there to answer: it refuses connections, or hangs.
    Unresponsive,
    /// The tunnel to its cluster is silent.
    ClusterSuspect,
    /// No tunnel to its cluster.
    ClusterDown,
    /// Nothing is heard from its cluster, neither by peer sync nor through a tunnel.
    ClusterDraining,
    NotReady,
    /// Its cluster is not one that the service's traffic may go to.
    Excluded,
}

/// One endpoint of a plan. Its place in [`Plan::endpoints`] is its index in picks and loads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedEndpoint {
    pub key: EndpointKey,
    pub weight: u32,
    pub standing: Standing,
    pub ejected: Option<EjectReason>,
    /// Until its slow start is over: when that began.
    #[serde(skip)]
    warming: Option<Instant>,
    /// Its number for [`affinity`].
    #[serde(skip)]
    number: u64,
}

/// One cluster of a plan, in the order of preference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedCluster {
    pub cluster: ClusterId,
    pub origin: Origin,
    /// The share of the traffic, 0 to 1. The shares add up to 1 if any endpoint is usable.
    pub share: f64,
    /// The share that the healthy endpoints could carry; above `granted` while a return is held back.
    pub possible: f64,
    pub granted: f64,
    /// So few endpoints are fit, and no other cluster has any, that ejected ones are asked as well.
    pub panic: bool,
    /// What the service's owner gave it, where clusters have weights.
    pub weight: Option<u32>,
    /// No request may go there.
    pub excluded: bool,
    /// Which endpoints get requests.
    #[serde(skip)]
    candidates: Candidates,
    /// Those of them in the caller's zone, where that comes first, and the part of the requests that is theirs alone.
    #[serde(skip)]
    near: Candidates,
    near_share: f64,
}

/// Where the requests for one port of one service go until something changes. With its endpoints'
/// standings and its clusters' shares it is also the trail of reasons that `explain` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub clusters: Vec<PlannedCluster>,
    pub endpoints: Vec<PlannedEndpoint>,
    #[serde(skip)]
    balance: Balance,
    #[serde(skip)]
    slow_start: Duration,
}

/// What is remembered between the plans for one port of one service.
#[derive(Debug, Clone, Default)]
pub struct Router {
    clusters: BTreeMap<ClusterId, Memory>,
}

#[derive(Debug, Clone)]
struct Memory {
    capacity: Capacity,
    /// The RTT by which the cluster is ranked; follows the measured one only when that moved clearly.
    rtt: Option<Duration>,
    seen: Instant,
}

/// A cluster that is gone is remembered this long, so that its peak counts when it returns.
const FORGET_AFTER: Duration = Duration::from_secs(600);

impl Router {
    /// Plans for what is known at `now`. The result does not depend on the order within `views`.
    pub fn plan(&mut self, mut views: Vec<ClusterView>, preferences: &Preferences, now: Instant) -> Plan {
        self.clusters.retain(|_, memory| now.saturating_duration_since(memory.seen) < FORGET_AFTER);
        for (cluster, memory) in &mut self.clusters {
            if !views.iter().any(|view| view.cluster == *cluster) {
                memory.capacity.observe(Weights { known: 0, healthy: 0 }, now);
            }
        }
        let mut grants = BTreeMap::new();
        for view in &mut views {
            view.endpoints.sort_by(|a, b| a.id.cmp(&b.id));
            let (grant, rtt) = self.observe(view, now);
            grants.insert(view.cluster.clone(), grant);
            view.rtt = rtt;
        }
        views.sort_by_cached_key(|view| {
            let place = preferences.place(&view.cluster);
            (place, view.origin, view.rtt.is_none(), view.rtt.unwrap_or_default(), view.cluster.clone())
        });
        assemble(&views, &grants, preferences, now)
    }

    /// When planning again, without news, would give another plan.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.clusters.values().filter_map(|memory| memory.capacity.poll_timeout()).min()
    }

    fn observe(&mut self, view: &ClusterView, now: Instant) -> (Grant, Option<Duration>) {
        let weights = weights(view);
        let memory = self.clusters.entry(view.cluster.clone()).or_insert_with(|| Memory {
            capacity: Capacity::new(weights, now),
            rtt: view.rtt,
            seen: now,
        });
        memory.seen = now;
        memory.rtt = match (memory.rtt, view.rtt) {
            (Some(held), Some(measured)) if !clearly_apart(held, measured) => Some(held),
            (held, None) => held,
            (_, measured) => measured,
        };
        (memory.capacity.observe(weights, now), memory.rtt)
    }
}

/// Two clusters of about the same distance must not change places with every measurement.
fn clearly_apart(held: Duration, measured: Duration) -> bool {
    held.abs_diff(measured) > (held / 4).max(Duration::from_millis(2))
}

fn weights(view: &ClusterView) -> Weights {
    let weight = |endpoint: &EndpointView| u64::from(endpoint.weight.max(1));
    let usable = |endpoint: &&EndpointView| standing(view, endpoint) == Standing::Usable;
    Weights {
        known: view.endpoints.iter().map(weight).sum(),
        healthy: view.endpoints.iter().filter(usable).map(weight).sum(),
    }
}

fn standing(view: &ClusterView, endpoint: &EndpointView) -> Standing {
    let cluster = match (view.origin, view.freshness, view.reach) {
        (Origin::Local, ..) => Standing::Usable,
        (_, Freshness::Draining, _) => Standing::ClusterDraining,
        (_, _, ClusterReach::Down) => Standing::ClusterDown,
        (_, _, ClusterReach::Suspect) => Standing::ClusterSuspect,
        (_, Freshness::Fresh | Freshness::Stale, ClusterReach::Up | ClusterReach::Unknown) => Standing::Usable,
    };
    let own = match endpoint {
        EndpointView { ready: false, .. } => Standing::NotReady,
        EndpointView { ejected: Some(reason), .. } if reason.is_unresponsive() => Standing::Unresponsive,
        EndpointView { ejected: Some(_), .. } => Standing::Ejected,
        _ => Standing::Usable,
    };
    cluster.max(own)
}

fn assemble(
    views: &[ClusterView],
    grants: &BTreeMap<ClusterId, Grant>,
    preferences: &Preferences,
    now: Instant,
) -> Plan {
    let mut endpoints = Vec::new();
    let mut clusters = Vec::new();
    for (place, view) in views.iter().enumerate() {
        let excluded = preferences.excludes(&view.cluster, place);
        let Grant { possible, granted } =
            if excluded { Grant { possible: 0.0, granted: 0.0 } } else { grants[&view.cluster] };
        let others = views.iter().enumerate().filter(|(other, _)| *other != place);
        let alone = others
            .filter(|(other, view)| !preferences.excludes(&view.cluster, *other))
            .all(|(_, view)| weights(view).healthy == 0);
        let panic = !excluded && alone && is_panic(view, preferences);
        let near_share = if preferences.zone_first { near_share(view) } else { 0.0 };
        let (mut candidates, mut near) = (Candidates::default(), Candidates::default());
        for endpoint in &view.endpoints {
            let own = if excluded { Standing::Excluded } else { Standing::Usable };
            let (standing, weight) = (standing(view, endpoint).max(own), endpoint.weight.max(1));
            if standing == Standing::Usable || panic && standing == Standing::Ejected {
                candidates.push(endpoints.len(), weight);
                if preferences.zone_first && endpoint.near {
                    near.push(endpoints.len(), weight);
                }
            }
            let key = EndpointKey { cluster: view.cluster.clone(), endpoint: endpoint.id.clone() };
            let warming = endpoint.since.filter(|since| *since + preferences.slow_start > now);
            let number = affinity::endpoint(&key);
            endpoints.push(PlannedEndpoint { key, weight, standing, ejected: endpoint.ejected, warming, number });
        }
        let (cluster, origin) = (view.cluster.clone(), view.origin);
        let share = 0.0;
        let weight = (!preferences.weights.is_empty()).then(|| preferences.weight(&view.cluster));
        clusters.push(PlannedCluster {
            cluster,
            origin,
            share,
            possible,
            granted,
            panic,
            weight,
            excluded,
            candidates,
            near,
            near_share,
        });
    }
    share::share_out(&mut clusters, preferences);
    Plan { clusters, endpoints, balance: preferences.balance, slow_start: preferences.slow_start }
}

/// How much the endpoints in the caller's zone can carry, 0 to 1.
fn near_share(view: &ClusterView) -> f64 {
    let mut near = view.clone();
    near.endpoints.retain(|endpoint| endpoint.near);
    let Weights { known, healthy } = weights(&near);
    if known == 0 { 0.0 } else { (OVER_PROVISIONING * healthy as f64 / known as f64).min(1.0) }
}

/// Whether so little of what a cluster holds ready is fit that the fit ones would be crushed. What answered badly may
/// have been crushed as well, and is asked again; what does not answer at all is not.
fn is_panic(view: &ClusterView, preferences: &Preferences) -> bool {
    let (mut fit, mut doubtful, mut ready) = (0, 0, 0);
    for endpoint in &view.endpoints {
        let weight = u64::from(endpoint.weight.max(1));
        match standing(view, endpoint) {
            Standing::Usable => (fit, ready) = (fit + weight, ready + weight),
            Standing::Ejected => (doubtful, ready) = (doubtful + weight, ready + weight),
            Standing::Unresponsive => ready += weight,
            _ => {}
        }
    }
    fit > 0 && doubtful > 0 && (fit as f64) < preferences.panic_threshold * ready as f64
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
