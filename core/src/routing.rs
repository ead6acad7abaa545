//! Which endpoint a request goes to: local first, in proportion to healthy capacity, then the other
//! clusters by distance; within a cluster the less loaded of two.
//!
//! [`Router::plan`] runs when something changed and yields an immutable [`Plan`]; [`Plan::pick`] runs for
//! each try, takes randomness and the load of endpoints as arguments and keeps nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::id::{ClusterId, EndpointId};
use crate::model::{Freshness, Origin};

mod capacity;

use capacity::{Capacity, Grant, Weights};
pub use capacity::{OVER_PROVISIONING, RISE_HOLD};

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
    pub ejected: bool,
}

/// Why an endpoint gets traffic, or does not. Ordered from the best to the worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    Usable,
    /// Ready by its own account, but requests to it failed.
    Ejected,
    /// The tunnel to its cluster is silent.
    ClusterSuspect,
    /// No tunnel to its cluster.
    ClusterDown,
    /// Nothing is heard from its cluster, neither by peer sync nor through a tunnel.
    ClusterDraining,
    NotReady,
}

/// One endpoint of a plan. Its place in [`Plan::endpoints`] is its index in picks and loads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedEndpoint {
    pub key: EndpointKey,
    pub weight: u32,
    pub standing: Standing,
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
    /// Indices of the usable endpoints and the sums of weights up to each.
    #[serde(skip)]
    usable: Candidates,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Candidates {
    indices: Vec<usize>,
    weight_sums: Vec<u64>,
}

/// Where the requests for one port of one service go until something changes. With its endpoints'
/// standings and its clusters' shares it is also the trail of reasons that `explain` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub clusters: Vec<PlannedCluster>,
    pub endpoints: Vec<PlannedEndpoint>,
}

/// The endpoint for one try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Pick {
    /// Index into [`Plan::endpoints`].
    pub endpoint: usize,
    pub reason: PickReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PickReason {
    /// The cluster was chosen by its share, the endpoint as the less loaded of two.
    Share,
    /// Every usable endpoint of the chosen cluster was tried already: the next cluster.
    Failover,
    /// Every usable endpoint anywhere was tried already: one of them again.
    Again,
    /// No endpoint is usable anywhere: the least bad.
    LastResort,
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
    pub fn plan(&mut self, mut views: Vec<ClusterView>, now: Instant) -> Plan {
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
            (view.origin, view.rtt.is_none(), view.rtt.unwrap_or_default(), view.cluster.clone())
        });
        assemble(&views, &grants)
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
        EndpointView { ejected: true, .. } => Standing::Ejected,
        _ => Standing::Usable,
    };
    cluster.max(own)
}

fn assemble(views: &[ClusterView], grants: &BTreeMap<ClusterId, Grant>) -> Plan {
    let mut endpoints = Vec::new();
    let mut clusters = Vec::new();
    for view in views {
        let Grant { possible, granted } = grants[&view.cluster];
        let mut usable = Candidates::default();
        for endpoint in &view.endpoints {
            let (standing, weight) = (standing(view, endpoint), endpoint.weight.max(1));
            if standing == Standing::Usable {
                usable.push(endpoints.len(), weight);
            }
            let key = EndpointKey { cluster: view.cluster.clone(), endpoint: endpoint.id.clone() };
            endpoints.push(PlannedEndpoint { key, weight, standing });
        }
        let (cluster, origin) = (view.cluster.clone(), view.origin);
        clusters.push(PlannedCluster { cluster, origin, share: 0.0, possible, granted, usable });
    }
    share_out(&mut clusters);
    Plan { clusters, endpoints }
}

/// Each cluster in turn takes what it is trusted with; when all together can't carry everything, all are
/// overloaded in proportion. A return that is held back is not waited for where nothing else could answer.
fn share_out(clusters: &mut [PlannedCluster]) {
    let trusted = clusters.iter().any(|cluster| cluster.granted > 0.0);
    let mut left = 1.0;
    for cluster in &mut *clusters {
        let level = if trusted { cluster.granted } else { cluster.possible };
        cluster.share = level.min(left);
        left -= cluster.share;
    }
    let taken = 1.0 - left;
    if left > 0.0 && taken > 0.0 {
        clusters.iter_mut().for_each(|cluster| cluster.share /= taken);
    }
}

impl Candidates {
    fn push(&mut self, index: usize, weight: u32) {
        self.indices.push(index);
        self.weight_sums.push(self.weight_sums.last().copied().unwrap_or(0) + u64::from(weight));
    }

    fn draw(&self, random: u64) -> Option<usize> {
        let sum = *self.weight_sums.last()?;
        let at = random % sum;
        Some(self.weight_sums.partition_point(|upto| *upto <= at))
    }
}

impl Plan {
    /// Picks the endpoint for one try. `random` decides between equals, `load` gives the requests that an
    /// endpoint has under way. `tried` are the endpoints that this request need not meet again.
    pub fn pick(&self, random: u64, tried: &[EndpointKey], load: impl Fn(usize) -> u32) -> Option<Pick> {
        let mut random = SplitMix(random);
        let first = self.draw_cluster(random.next());
        if let Some(first) = first {
            if let Some(endpoint) = self.pick_within(first, &mut random, tried, &load) {
                return Some(Pick { endpoint, reason: PickReason::Share });
            }
            for cluster in &self.clusters {
                if let Some(endpoint) = self.pick_within(cluster, &mut random, tried, &load) {
                    return Some(Pick { endpoint, reason: PickReason::Failover });
                }
            }
            let endpoint = self.pick_within(first, &mut random, &[], &load)?;
            return Some(Pick { endpoint, reason: PickReason::Again });
        }
        let endpoint = self.last_resort(random.next(), tried)?;
        Some(Pick { endpoint, reason: PickReason::LastResort })
    }

    /// Whether somebody else could answer if this endpoint took no more requests.
    pub fn has_capacity_beside(&self, key: &EndpointKey) -> bool {
        self.endpoints.iter().any(|other| other.standing == Standing::Usable && other.key != *key)
    }

    fn draw_cluster(&self, random: u64) -> Option<&PlannedCluster> {
        // 53 bits, the precision of a double, as a number from 0 up to but not including 1.
        let mut at = (random >> 11) as f64 / (1_u64 << 53) as f64;
        let mut last = None;
        for cluster in self.clusters.iter().filter(|cluster| cluster.share > 0.0) {
            if at < cluster.share {
                return Some(cluster);
            }
            at -= cluster.share;
            last = Some(cluster);
        }
        last
    }

    fn pick_within(
        &self,
        cluster: &PlannedCluster,
        random: &mut SplitMix,
        tried: &[EndpointKey],
        load: &impl Fn(usize) -> u32,
    ) -> Option<usize> {
        if tried.is_empty() {
            return self.better_of_two(&cluster.usable, random, load);
        }
        let mut untried = Candidates::default();
        for index in &cluster.usable.indices {
            let endpoint = &self.endpoints[*index];
            if !tried.contains(&endpoint.key) {
                untried.push(*index, endpoint.weight);
            }
        }
        self.better_of_two(&untried, random, load)
    }

    fn better_of_two(
        &self,
        candidates: &Candidates,
        random: &mut SplitMix,
        load: &impl Fn(usize) -> u32,
    ) -> Option<usize> {
        let count = candidates.indices.len();
        let first = candidates.draw(random.next())?;
        if count == 1 {
            return Some(candidates.indices[first]);
        }
        let mut second = candidates.draw(random.next())?;
        if second == first {
            // One step further is as good as drawing again, and ends.
            second = (first + 1) % count;
        }
        let (first, second) = (candidates.indices[first], candidates.indices[second]);
        // Requests under way for each unit of weight, this one included.
        let cost = |index: usize| u64::from(load(index)) + 1;
        let weight = |index: usize| u64::from(self.endpoints[index].weight);
        Some(if cost(second) * weight(first) < cost(first) * weight(second) { second } else { first })
    }

    /// The best standing that is left; untried before tried, near before far.
    fn last_resort(&self, random: u64, tried: &[EndpointKey]) -> Option<usize> {
        let rank = |endpoint: &PlannedEndpoint| (endpoint.standing, tried.contains(&endpoint.key));
        let best = self.endpoints.iter().map(rank).min()?;
        let cluster = &self.endpoints.iter().find(|endpoint| rank(endpoint) == best)?.key.cluster;
        let mut candidates = Candidates::default();
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            if endpoint.key.cluster == *cluster && rank(endpoint) == best {
                candidates.push(index, endpoint.weight);
            }
        }
        candidates.draw(random).map(|at| candidates.indices[at])
    }
}

/// SplitMix64: turns one random number into as many as a pick needs.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests;
