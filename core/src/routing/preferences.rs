//! What a service's owner may decide about where its requests go.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::ClusterId;

/// How an endpoint of the chosen cluster is picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Balance {
    /// The better of two drawn at random, by requests under way and peak-sensitive latency.
    #[default]
    LeastRequest,
    /// Each in turn, as often as its weight says.
    RoundRobin,
    /// A session keeps its endpoint while that is fit; requests without a session go by least request.
    ConsistentHash,
}

/// Whether a cluster's traffic may go to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Failover {
    #[default]
    Auto,
    /// It stays: with the first cluster, or with those that have a weight.
    None,
}

/// The decisions for one service.
#[derive(Debug, Clone, PartialEq)]
pub struct Preferences {
    pub balance: Balance,
    /// Clusters to prefer, the first one most. Others come behind them: local, then by distance.
    pub order: Vec<ClusterId>,
    /// Splits the traffic between clusters. Those that are not named get what the named ones can't carry. Empty:
    /// as much as possible to the first cluster in the order.
    pub weights: BTreeMap<ClusterId, u32>,
    pub failover: Failover,
    /// When no other cluster has a fit endpoint and less than this share of the ready endpoints is fit, ejected
    /// ones that answered are asked as well. 0 to 1; with 0 only when none is fit.
    pub panic_threshold: f64,
    /// Within a cluster, endpoints of the caller's zone first, in proportion to how healthy those are.
    pub zone_first: bool,
    /// An endpoint that becomes fit gets a tenth of its part at first, and all of it after this time.
    pub slow_start: Duration,
}

impl Default for Preferences {
    fn default() -> Self {
        Self {
            balance: Balance::default(),
            order: Vec::new(),
            weights: BTreeMap::new(),
            failover: Failover::default(),
            panic_threshold: 0.5,
            zone_first: false,
            slow_start: Duration::from_secs(10),
        }
    }
}

impl Preferences {
    /// The place of a cluster in the order of preference, equal for all that are not named.
    pub(super) fn place(&self, cluster: &ClusterId) -> usize {
        self.order.iter().position(|named| named == cluster).unwrap_or(self.order.len())
    }

    /// Whether no request may go to a cluster that is at this place among those that export the service.
    pub(super) fn excludes(&self, cluster: &ClusterId, place: usize) -> bool {
        match self.failover {
            Failover::Auto => false,
            Failover::None if self.weights.is_empty() => place != 0,
            Failover::None => self.weight(cluster) == 0,
        }
    }

    pub(super) fn weight(&self, cluster: &ClusterId) -> u32 {
        self.weights.get(cluster).copied().unwrap_or(0)
    }
}
