//! The one task that owns the federation's mutable state.
//!
//! Inputs come as one enum over a bounded channel; readers load an immutable [`View`] and wait for
//! the next generation. Whoever must keep something durable does so before it tells the hub.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};
use tombolo_api::proto::catalog::TrustBundle;
use tombolo_core::catalog::ServiceView;
use tombolo_core::id::{ClusterId, GatewayId, Position, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::model::{Authority, Freshness, GatewayAddress};
use tombolo_core::source::{LocalState, SourceProblem};

/// Inputs that wait for the hub; senders wait when it is full.
const INPUTS_MAX: usize = 256;
/// Peering events that wait for the peering task; gateways wait when it is full.
const PEERING_EVENTS_MAX: usize = 64;

/// A peered cluster as the peering established it, and as the store keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerRecord {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// The grants given at the invitation; a `ClusterPeer` resource in the source replaces them.
    pub authority: Authority,
    /// The bundle exchanged at the peering; one with a higher sequence that came by sync wins.
    pub bundle: TrustBundle,
    /// Gateways named at the peering, used until the peer publishes its own.
    pub gateways: Vec<GatewayAddress>,
}

/// What a gateway reports of the peerings that it relays; it holds no secret of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeeringEvent {
    /// The dial that was asked for stands; this is its TLS exporter value.
    Exporter { gateway: GatewayId, attempt: String, exporter: Vec<u8> },
    /// The far side answered the offer (`tombolo.peering.v1.Answer`, encoded).
    Answer { gateway: GatewayId, attempt: String, answer: Vec<u8> },
    /// The dial or the exchange failed.
    Failed { gateway: GatewayId, attempt: String, reason: String },
    /// Somebody dialled the gateway to redeem an invitation; answer with [`PeeringCommand::Verdict`].
    /// `chain` is what the caller presented, DER, leaf first.
    Knock { gateway: GatewayId, attempt: String, exporter: Vec<u8>, offer: Vec<u8>, chain: Vec<Vec<u8>> },
}

/// What the peering task has a gateway do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeeringCommand {
    /// Dial another cluster's gateway and report [`PeeringEvent::Exporter`] or `Failed`.
    Dial { attempt: String, addresses: Vec<String>, root_sha256: [u8; 32], cluster: ClusterId },
    /// Send the offer over the dialled connection and report [`PeeringEvent::Answer`] or `Failed`.
    Offer { attempt: String, offer: Vec<u8> },
    /// The answer to a knock (`tombolo.peering.v1.Answer`, encoded).
    Verdict { attempt: String, answer: Vec<u8> },
}

/// The hub has ended: the process is stopping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the federation is stopping")]
pub struct HubGone;

/// Why a peering command did not reach its gateway.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandRefused {
    #[error("gateway {0} is not connected; see `tombolo status`")]
    NotConnected(GatewayId),
    #[error("gateway {0} does not take its commands fast enough")]
    Busy(GatewayId),
    #[error(transparent)]
    Gone(#[from] HubGone),
}

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
    pub connected: bool,
    pub tunnels: Vec<TunnelView>,
}

/// A sidecar of this cluster that is connected, or was a moment ago.
#[derive(Debug, Clone, PartialEq)]
pub struct SidecarView {
    pub instance: String,
    pub spiffe_id: SpiffeId,
    pub connected: bool,
    pub registrations: Vec<RegistrationView>,
}

/// One registration and what was decided about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistrationView {
    pub service: ServiceName,
    pub port: u16,
    pub ready: bool,
    /// Why it is refused; `None` when it is in force.
    pub refused: Option<String>,
}

/// What is known of one peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerView {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// The grants in force, from the source or else from the peering.
    pub authority: Authority,
    pub gateways: Vec<GatewayAddress>,
    pub bundle_sequence: u64,
    /// `None` before the first sync of all time.
    pub freshness: Option<Freshness>,
    /// What we hold of it: the last position applied.
    pub position: Position,
    /// When the peer was last heard over sync by this process.
    pub last_heard: Option<Instant>,
    /// The last update of the peer that we refused, and why.
    pub last_refusal: Option<String>,
    /// What it has acknowledged of our publications, where we are, and what it last refused.
    pub acked: Position,
    pub published: Position,
    pub refused_there: Option<String>,
}

/// An immutable reading of the whole state.
#[derive(Debug, Clone)]
pub struct View {
    /// Grows with every change.
    pub generation: u64,
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    pub epoch: u64,
    pub services: Arc<BTreeMap<ServiceName, Arc<ServiceView>>>,
    pub peers: Arc<BTreeMap<ClusterId, Arc<PeerView>>>,
    pub gateways: Arc<BTreeMap<GatewayId, Arc<GatewayView>>>,
    pub sidecars: Arc<Vec<Arc<SidecarView>>>,
    /// Own and peers' bundles by cluster, as they are in force.
    pub bundles: Arc<BTreeMap<ClusterId, TrustBundle>>,
    pub revoked: Arc<BTreeSet<SpiffeId>>,
    pub problems: Arc<Vec<SourceProblem>>,
}

/// Everything that changes the state.
enum Input {
    LocalChanged(LocalState),
    PeerAdded(Box<PeerRecord>, oneshot::Sender<()>),
    PeerRemoved(ClusterId, oneshot::Sender<()>),
    OwnBundleChanged(TrustBundle),
    OwnRevoked { sequence: u64, ids: BTreeSet<SpiffeId> },
    Command(GatewayId, PeeringCommand, oneshot::Sender<Result<(), CommandRefused>>),
}

/// How the rest of the process speaks to the hub.
#[derive(Clone)]
pub struct HubHandle {
    inputs: mpsc::Sender<Input>,
    view: Arc<ArcSwap<View>>,
    changes: watch::Receiver<u64>,
}

impl HubHandle {
    /// The source was read again: replaces what it declared before.
    pub async fn local_changed(&self, state: LocalState) -> Result<(), HubGone> {
        self.send(Input::LocalChanged(state)).await
    }

    /// A peer exists: called for each stored peer at the start, and after a new one was stored. Replaces
    /// the record of the same cluster. Returns when the peer is trusted and its tunnel is asked for.
    pub async fn peer_added(&self, record: PeerRecord) -> Result<(), HubGone> {
        self.ask(|done| Input::PeerAdded(Box::new(record), done)).await
    }

    /// A peer was removed from the store. Returns when its bundle is no longer trusted and its services
    /// are withdrawn from every view; gateways and sidecars are told at once.
    pub async fn peer_removed(&self, cluster: ClusterId) -> Result<(), HubGone> {
        self.ask(|done| Input::PeerRemoved(cluster, done)).await
    }

    /// The own CA publishes another bundle (`trust add-root`); pushed to gateways, sidecars and peers.
    pub async fn own_bundle_changed(&self, bundle: TrustBundle) -> Result<(), HubGone> {
        self.send(Input::OwnBundleChanged(bundle)).await
    }

    /// Identities of the own trust domain that are revoked, all of them, under a growing sequence.
    pub async fn own_revoked(&self, sequence: u64, ids: BTreeSet<SpiffeId>) -> Result<(), HubGone> {
        self.send(Input::OwnRevoked { sequence, ids }).await
    }

    /// Sends a peering command to one connected gateway.
    pub async fn command(&self, gateway: GatewayId, command: PeeringCommand) -> Result<(), CommandRefused> {
        self.ask(|answer| Input::Command(gateway, command, answer)).await?
    }

    /// The state as of now. Cheap; never waits.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Changes to a new generation whenever [`HubHandle::view`] does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    async fn send(&self, input: Input) -> Result<(), HubGone> {
        self.inputs.send(input).await.map_err(|_| HubGone)
    }

    async fn ask<T>(&self, input: impl FnOnce(oneshot::Sender<T>) -> Input) -> Result<T, HubGone> {
        let (answer, answered) = oneshot::channel();
        self.send(input(answer)).await?;
        answered.await.map_err(|_| HubGone)
    }
}

/// What a hub starts with.
#[derive(Debug, Clone)]
pub struct HubStart {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// The store's epoch, opened anew at each start.
    pub epoch: u64,
    /// The own CA's published bundle.
    pub bundle: TrustBundle,
}

/// Starts the hub's task; it ends when every handle is gone. The receiver is for the peering task.
pub fn start(start: HubStart) -> (HubHandle, mpsc::Receiver<PeeringEvent>) {
    let (inputs, mut received) = mpsc::channel(INPUTS_MAX);
    let (_events, peering) = mpsc::channel(PEERING_EVENTS_MAX);
    let (changed, changes) = watch::channel(0);
    let view = View {
        generation: 0,
        cluster: start.cluster.clone(),
        trust_domain: start.trust_domain,
        epoch: start.epoch,
        services: Arc::default(),
        peers: Arc::default(),
        gateways: Arc::default(),
        sidecars: Arc::default(),
        bundles: Arc::new([(start.cluster, start.bundle)].into()),
        revoked: Arc::default(),
        problems: Arc::default(),
    };
    let view = Arc::new(ArcSwap::from_pointee(view));
    tokio::spawn(async move {
        while let Some(_input) = received.recv().await {
            changed.send_modify(|generation| *generation += 1);
        }
    });
    (HubHandle { inputs, view, changes }, peering)
}
