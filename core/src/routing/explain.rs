//! Why a request goes where it goes: what a plan says of each of its clusters and endpoints, read from what
//! [`Plan::pick`] reads. For `explain`, not for each request.

use std::fmt;

use super::{Balance, EndpointKey, Pick, PickReason, Plan, PlannedCluster, PlannedEndpoint, Standing};
use crate::outlier::EjectReason;

/// What a plan says of one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Picked(PickReason),
    /// It gets requests as well; this one goes to another.
    Beside(Balance),
    /// Endpoints in the caller's zone come first, and they carry everything.
    OtherZone,
    /// Fit, in a cluster that gets nothing now.
    NoShare(ShareReason),
    /// The request was there already.
    Tried,
    Unfit(Standing, Option<EjectReason>),
}

/// What a plan says of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareReason {
    /// It gets requests.
    Serves,
    /// As well, but less than it could carry: its share comes back step by step.
    Returning,
    /// The service's traffic may not go there.
    Excluded,
    NoneFit,
    ZeroWeight,
    /// The clusters before it carry everything.
    CarriedBefore,
}

impl PlannedCluster {
    pub fn reason(&self) -> ShareReason {
        if self.excluded {
            ShareReason::Excluded
        } else if self.candidates.is_empty() {
            ShareReason::NoneFit
        } else if self.share > 0.0 && self.granted < self.possible {
            ShareReason::Returning
        } else if self.share > 0.0 {
            ShareReason::Serves
        } else if self.weight == Some(0) {
            ShareReason::ZeroWeight
        } else {
            ShareReason::CarriedBefore
        }
    }
}

impl Plan {
    /// One verdict for each of [`Plan::endpoints`], given what was picked after the endpoints of `tried`.
    pub fn explain(&self, pick: Option<Pick>, tried: &[EndpointKey]) -> Vec<Verdict> {
        let verdict = |(index, endpoint): (usize, &PlannedEndpoint)| match pick {
            Some(pick) if pick.endpoint == index => Verdict::Picked(pick.reason),
            _ if tried.contains(&endpoint.key) => Verdict::Tried,
            _ => self.passed_over(index, endpoint),
        };
        self.endpoints.iter().enumerate().map(verdict).collect()
    }

    fn passed_over(&self, index: usize, endpoint: &PlannedEndpoint) -> Verdict {
        let cluster = self.clusters.iter().find(|cluster| cluster.cluster == endpoint.key.cluster);
        let Some(cluster) = cluster.filter(|cluster| cluster.candidates.contains(index)) else {
            return Verdict::Unfit(endpoint.standing, endpoint.ejected);
        };
        if cluster.share <= 0.0 {
            return Verdict::NoShare(cluster.reason());
        }
        let zone_carries = !cluster.near.is_empty() && cluster.near_share >= 1.0;
        if zone_carries && !cluster.near.contains(index) { Verdict::OtherZone } else { Verdict::Beside(self.balance) }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Picked(reason) => reason.fmt(f),
            Verdict::Beside(Balance::LeastRequest) => {
                f.write_str("fit as well: of two that are drawn, the less busy and faster one is taken")
            }
            Verdict::Beside(Balance::RoundRobin) => f.write_str("fit as well: another one's turn"),
            Verdict::Beside(Balance::ConsistentHash) => f.write_str("fit as well: the session's endpoint is another"),
            Verdict::OtherZone => f.write_str("endpoints in the caller's zone come first, and carry everything"),
            Verdict::NoShare(reason) => write!(f, "its cluster gets nothing: {reason}"),
            Verdict::Tried => f.write_str("tried already"),
            Verdict::Unfit(standing @ (Standing::Ejected | Standing::Unresponsive), Some(reason)) => {
                write!(f, "{standing} ({})", reason.name())
            }
            Verdict::Unfit(standing, _) => standing.fmt(f),
        }
    }
}

impl fmt::Display for ShareReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ShareReason::Serves => "its endpoints get requests",
            ShareReason::Returning => "its endpoints are fit again, and its share comes back step by step",
            ShareReason::Excluded => Standing::Excluded.text(),
            ShareReason::NoneFit => "none of its endpoints is fit",
            ShareReason::ZeroWeight => "its weight is 0",
            ShareReason::CarriedBefore => "the clusters before it carry everything",
        })
    }
}

impl fmt::Display for PickReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PickReason::Share => "its cluster by its share, and there the less busy of two, or the one in turn",
            PickReason::Session => "the endpoint of the request's session",
            PickReason::Panic => {
                "ejected, and asked all the same: too few endpoints are fit, and no other cluster has any"
            }
            PickReason::Failover => "the next cluster: all fit endpoints of the one before were tried",
            PickReason::Again => "tried before, as every fit endpoint was",
            PickReason::LastResort => "no endpoint is fit anywhere, and this is the least bad",
        })
    }
}

impl Standing {
    fn text(self) -> &'static str {
        match self {
            Standing::Usable => "fit",
            Standing::Ejected => "ejected: requests to it failed",
            Standing::Unresponsive => "ejected: nobody answers there",
            Standing::ClusterSuspect => "the tunnel to its cluster is silent",
            Standing::ClusterDown => "there is no tunnel to its cluster",
            Standing::ClusterDraining => "nothing is heard from its cluster",
            Standing::NotReady => "not ready: its own side says so, or no sidecar delivers it",
            Standing::Excluded => "the service's TrafficPolicy keeps its requests out of this cluster",
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}
