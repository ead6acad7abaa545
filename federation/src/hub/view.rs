//! The immutable readings that the hub publishes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tombolo_core::catalog::ServiceView;
use tombolo_core::id::{ClusterId, GatewayId, InstanceName, Position, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::model::{Authority, Freshness, GatewayAddress};
use tombolo_core::policy::access::Defaults;
use tombolo_core::policy::set::PolicySet;
use tombolo_core::source::SourceProblem;
use tombolo_trust::bundle::Bundle;

use super::remembered::Remembered;
use crate::addresses::Addresses;
use crate::registry::{Attached, Connected, SessionId, Verdict};

/// How far a tunnel of one of our gateways is from answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    Unknown,
    Up,
    Suspect,
    Down,
}

impl Reach {
    pub fn as_str(self) -> &'static str {
        match self {
            Reach::Unknown => "unknown",
            Reach::Up => "up",
            Reach::Suspect => "suspect",
            Reach::Down => "down",
        }
    }
}

/// One tunnel as one of our gateways reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelView {
    pub cluster: ClusterId,
    pub remote_gateway: Option<GatewayId>,
    pub reach: Reach,
    pub rtt_us: u32,
    pub remote_address: String,
    pub dialled_here: bool,
    pub legs: u32,
    pub last_error: String,
    /// What the far gateway's names resolved to, where ours dials.
    pub resolved: Vec<SocketAddr>,
    /// Octets of a datagram that the path carries, as far as was found out; 0 where it was not.
    pub mtu: u32,
}

/// A gateway of this cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewayView {
    pub gateway: GatewayId,
    pub spiffe_id: SpiffeId,
    /// `host:port` of its tunnel port as peers can reach it; empty when it can't be dialled.
    pub advertise: Vec<String>,
    pub ingress_address: String,
    pub watch_address: String,
    /// Where workloads without a sidecar reach its listeners, if it has any.
    pub unmeshed_address: Option<IpAddr>,
    /// Whether its stream stands, or ended only a moment ago.
    pub connected: bool,
    pub attached: Attached,
    pub tunnels: Vec<TunnelView>,
    /// The highest bundle sequence that it has in force, by trust domain.
    pub bundles_in_force: BTreeMap<TrustDomain, u64>,
}

/// A sidecar of this cluster that is connected, or was a moment ago.
#[derive(Debug, Clone, PartialEq)]
pub struct SidecarView {
    pub instance: InstanceName,
    pub spiffe_id: SpiffeId,
    pub connected: bool,
    pub registrations: Vec<Verdict>,
    /// The clusters that each service registered here is offered to.
    pub inbound_grants: BTreeMap<ServiceName, BTreeSet<ClusterId>>,
    /// The highest bundle sequence that it has in force, by trust domain.
    pub bundles_in_force: BTreeMap<TrustDomain, u64>,
}

/// What is known of one peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerView {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// The grants in force, from the source or else from the peering.
    pub authority: Authority,
    /// Where its gateways are reached.
    pub gateways: Arc<Vec<GatewayAddress>>,
    pub bundle_sequence: u64,
    /// `None` before the first sync of all time.
    pub freshness: Option<Freshness>,
    /// What we hold of it: the last position applied.
    pub position: Position,
    /// When the peer was last heard over sync by this process. Read it fresh: it moves without a new
    /// generation.
    pub last_heard: Option<Instant>,
    /// How far the peer's clock is ahead, less the time that its message took.
    pub clock_ahead_ms: Option<i64>,
    /// The last update of the peer that was refused here, and why.
    pub last_refusal: Option<String>,
    /// Exports that break a rule, and which.
    pub refused_exports: BTreeMap<ServiceName, String>,
    /// What it has acknowledged of our publications, where we are, and what it last refused.
    pub acked: Position,
    pub published: Position,
    pub refused_there: Option<String>,
}

/// An immutable reading of the whole state.
#[derive(Debug, Clone)]
pub struct View {
    /// Grows with every change that somebody may have to be told of.
    pub generation: u64,
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    pub epoch: u64,
    /// A service without shares is one that is exported to here but left out by the import grants.
    pub services: Arc<BTreeMap<ServiceName, Arc<ServiceView>>>,
    /// Routes and policies of the source. Keeps its allocation while nothing of them changes.
    pub policies: Arc<PolicySet>,
    /// What becomes of callers that no policy speaks of.
    pub access: Arc<Defaults>,
    /// Virtual addresses, all of them durable. `None` until the first were allocated.
    pub addresses: Option<Arc<Addresses>>,
    /// What is imported into this cluster's API server, with the ClusterIPs that it has. `None` where there is none, and until
    /// they are known.
    pub imported: Option<Arc<BTreeMap<ServiceName, Vec<IpAddr>>>>,
    pub peers: Arc<BTreeMap<ClusterId, Arc<PeerView>>>,
    pub gateways: Arc<BTreeMap<GatewayId, Arc<GatewayView>>>,
    pub sidecars: Arc<BTreeMap<SessionId, Arc<SidecarView>>>,
    /// Addresses at which sidecars have registered. Those of loopback are everybody's, and not among them.
    pub meshed: Arc<BTreeSet<IpAddr>>,
    /// The same, as other replicas are told of them.
    pub sessions: Arc<BTreeMap<SessionId, Arc<Connected>>>,
    /// Own and peers' bundles by cluster, as they are in force.
    pub bundles: Arc<BTreeMap<ClusterId, Bundle>>,
    /// Own and peers' identities that are revoked.
    pub revoked: Arc<BTreeSet<SpiffeId>>,
    /// Sequence of the own revocations.
    pub revocation_sequence: u64,
    pub problems: Arc<Vec<SourceProblem>>,
    /// What the next start of this federation begins with.
    pub remembered: Arc<Remembered>,
}
