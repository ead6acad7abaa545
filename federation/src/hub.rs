//! The one task that owns the federation's mutable state.
//!
//! Inputs come as one enum over a bounded channel; readers load an immutable [`View`] and wait for
//! the next generation. Whoever must keep something durable does so before it tells the hub.

mod peers;
pub mod remembered;
mod state;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tombolo_api::proto::catalog::TrustBundle;
use tombolo_core::id::{ClusterId, GatewayId, InstanceName, Position, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::import::Import;
use tombolo_core::model::{Authority, GatewayAddress};
use tombolo_core::policy::access::DefaultAccess;
use tombolo_core::publish::{LOG_COST_MAX, Update};
use tombolo_core::source::{LocalState, SourceProblem};
use tombolo_runtime::metrics::Metrics;
use tombolo_trust::bundle::Bundle;
use tombolo_trust::store::TrustStore;

use crate::addresses::Addresses;
use crate::registry::{Attached, Claim, SESSIONS_MAX, SessionId};
use crate::store::{Store, StoreError};
use crate::sync::durable;
use remembered::Remembered;
use state::State;
pub use view::{GatewayView, PeerView, Reach, SidecarView, TunnelView, View};

/// Inputs that wait for the hub; senders wait when it is full.
const INPUTS_MAX: usize = 256;
/// Inputs that are applied before a new view is made of them.
const COALESCED_MAX: usize = 128;
/// Peering events that wait for the peering task; gateways wait when it is full.
const PEERING_EVENTS_MAX: usize = 64;

/// A peered cluster as the peering established it, and as the store keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerRecord {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// The grants given at the invitation; a `ClusterPeer` resource in the source replaces them.
    pub authority: Authority,
    /// The bundle exchanged at the peering; one with a higher sequence that came by sync wins. One whose
    /// roots are not CAs of `trust_domain` is not trusted.
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

/// A gateway's stream, as it introduces itself.
#[derive(Debug)]
pub struct GatewayJoin {
    pub gateway: GatewayId,
    pub spiffe_id: SpiffeId,
    pub advertise: Vec<String>,
    pub ingress_address: String,
    pub watch_address: String,
    /// Where workloads without a sidecar reach its listeners, if it has any.
    pub unmeshed_address: Option<IpAddr>,
    /// Where its stream takes peering commands.
    pub commands: mpsc::Sender<PeeringCommand>,
    pub attached: Attached,
}

/// A sidecar's stream, as it introduces itself.
#[derive(Debug)]
pub struct SidecarJoin {
    pub instance: InstanceName,
    pub spiffe_id: SpiffeId,
    pub zone: Option<String>,
    pub attached: Attached,
}

/// What is held of all peers, and every update that is taken from then on.
pub(crate) struct Imports {
    pub held: Vec<(ClusterId, Vec<Update>)>,
    pub updates: broadcast::Receiver<(ClusterId, Update)>,
}

/// An update as the sync stream brought it.
#[derive(Debug)]
pub enum PeerMessage {
    Update(Update),
    /// One that is taken without a part that can't be read.
    Reduced {
        update: Update,
        reason: String,
    },
    /// A kind of a newer release, or (with a reason) a value that can't be read; it is passed over.
    Unreadable {
        position: Position,
        reason: Option<String>,
    },
}

/// What a run of updates led to.
#[derive(Debug)]
pub struct SyncApplied {
    /// The position to acknowledge once `keep` is durable; `None` while a snapshot is being received.
    pub position: Option<Position>,
    /// What to make durable first; `None` when nothing changed.
    pub keep: Option<Box<Import>>,
    /// Why an update was refused; the last one of the run.
    pub refused: Option<String>,
}

/// Why a sync stream has to end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SyncEnds {
    #[error("the cluster is no longer a peer")]
    NoPeer,
    #[error(transparent)]
    Broken(#[from] tombolo_core::import::StreamBroken),
    #[error(transparent)]
    Gone(#[from] HubGone),
}

/// Everything that changes the state, and the queries that only its owner can answer.
enum Input {
    LocalChanged(LocalState),
    PeerAdded(Box<PeerRecord>, Box<Import>, oneshot::Sender<()>),
    PeerRemoved(ClusterId, oneshot::Sender<()>),
    Addressed(Arc<Addresses>, oneshot::Sender<()>),
    Clock(ClusterId, i64),
    Imported(Arc<BTreeMap<ServiceName, Vec<IpAddr>>>),
    Settle(oneshot::Sender<()>),
    DeclaredRefused(Vec<SourceProblem>),
    NotWritten(Vec<SourceProblem>),
    OwnBundleChanged(Bundle),
    OwnRevoked { sequence: u64, ids: BTreeSet<SpiffeId>, done: oneshot::Sender<()> },
    Command(GatewayId, PeeringCommand, oneshot::Sender<Result<(), CommandRefused>>),
    SyncBegan(ClusterId, oneshot::Sender<Option<Position>>),
    SyncReceived(ClusterId, Vec<PeerMessage>, oneshot::Sender<Result<SyncApplied, SyncEnds>>),
    PublishedSince(ClusterId, Position, oneshot::Sender<Option<(Vec<Update>, Position)>>),
    Acked { cluster: ClusterId, position: Position, refused: Option<String> },
    SidecarJoined(SessionId, SidecarJoin, oneshot::Sender<bool>),
    Registered(SessionId, Vec<Claim>),
    Readiness { session: SessionId, service: ServiceName, port: u16, ready: bool },
    SidecarLeft(SessionId),
    SidecarGone(SessionId),
    Imports(oneshot::Sender<Imports>),
    Lead(u64, oneshot::Sender<()>),
    GatewayJoined(SessionId, GatewayJoin),
    Tunnels(SessionId, Vec<TunnelView>),
    GatewayLeft(SessionId),
    BundlesInForce(SessionId, BTreeMap<TrustDomain, u64>),
}

/// How the rest of the process speaks to the hub.
#[derive(Clone)]
pub struct HubHandle {
    inputs: mpsc::Sender<Input>,
    events: mpsc::Sender<PeeringEvent>,
    view: Arc<ArcSwap<View>>,
    changes: watch::Receiver<u64>,
    store: Store,
    sessions: Arc<AtomicU64>,
}

impl HubHandle {
    /// The source was read again: replaces what it declared before.
    pub async fn local_changed(&self, state: LocalState) -> Result<(), HubGone> {
        self.send(Input::LocalChanged(state)).await
    }

    /// A peer exists: called for each stored peer at the start, and after a new one was stored. Replaces
    /// the record of the same cluster. Returns when the peer is trusted and its tunnel is asked for.
    pub async fn peer_added(&self, record: PeerRecord) -> Result<(), HubGone> {
        let import = durable::load(&self.store, &record.cluster, &record.trust_domain).await;
        self.ask(|done| Input::PeerAdded(Box::new(record), Box::new(import), done)).await
    }

    /// A peer was removed from the store. Returns when its bundle is no longer trusted and its services
    /// are withdrawn from every view; gateways and sidecars are told at once.
    pub async fn peer_removed(&self, cluster: ClusterId) -> Result<(), HubGone> {
        self.ask(|done| Input::PeerRemoved(cluster.clone(), done)).await?;
        durable::remove(&self.store, &cluster).await;
        Ok(())
    }

    /// How far a peer's clock is ahead, as a message that it just sent shows.
    pub(crate) async fn clock(&self, cluster: ClusterId, ahead_ms: i64) -> Result<(), HubGone> {
        self.send(Input::Clock(cluster, ahead_ms)).await
    }

    /// What is imported into this cluster's API server, with the addresses that it has there.
    pub(crate) async fn imported(&self, addresses: Arc<BTreeMap<ServiceName, Vec<IpAddr>>>) -> Result<(), HubGone> {
        self.send(Input::Imported(addresses)).await
    }

    /// Virtual addresses that have been made durable, all of them. Returns when they are in the view.
    pub(crate) async fn addressed(&self, addresses: Arc<Addresses>) -> Result<(), HubGone> {
        self.ask(|done| Input::Addressed(addresses, done)).await
    }

    /// Returns when everything that was sent before is in the view.
    pub(crate) async fn settled(&self) -> Result<(), HubGone> {
        self.ask(Input::Settle).await
    }

    /// Peers that the source declares and that are not made, with the reason of each; all of them.
    pub async fn declared_refused(&self, problems: Vec<SourceProblem>) -> Result<(), HubGone> {
        self.send(Input::DeclaredRefused(problems)).await
    }

    /// Objects that can't be written to the API server, with the reason of each; all of them.
    pub(crate) async fn not_written(&self, problems: Vec<SourceProblem>) -> Result<(), HubGone> {
        self.send(Input::NotWritten(problems)).await
    }

    /// The own CA publishes another bundle (`trust add-root`); pushed to gateways, sidecars and peers.
    pub async fn own_bundle_changed(&self, bundle: Bundle) -> Result<(), HubGone> {
        self.send(Input::OwnBundleChanged(bundle)).await
    }

    /// Identities of the own trust domain that are revoked, all of them, under a growing sequence. Returns
    /// when they are in force here; gateways, sidecars and peers are told at once.
    pub async fn own_revoked(&self, sequence: u64, ids: BTreeSet<SpiffeId>) -> Result<(), HubGone> {
        self.ask(|done| Input::OwnRevoked { sequence, ids, done }).await
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

    /// A gateway reports on a peering that it relays. Waits while the peering task is behind.
    pub async fn peering_event(&self, event: PeeringEvent) -> Result<(), HubGone> {
        self.events.send(event).await.map_err(|_| HubGone)
    }

    /// A stream of updates from a peer begins: where to resume. `None` when there is no such peer.
    pub(crate) async fn sync_began(&self, cluster: ClusterId) -> Result<Option<Position>, HubGone> {
        self.ask(|answer| Input::SyncBegan(cluster, answer)).await
    }

    /// A run of updates from a peer, in order.
    pub(crate) async fn sync_received(
        &self,
        cluster: ClusterId,
        messages: Vec<PeerMessage>,
    ) -> Result<SyncApplied, SyncEnds> {
        self.ask(|answer| Input::SyncReceived(cluster, messages, answer)).await?
    }

    /// Makes what is held of a peer durable.
    pub(crate) async fn keep(&self, cluster: &ClusterId, import: Import) -> Result<(), StoreError> {
        durable::save(&self.store, cluster, import).await
    }

    /// What a peer that holds everything up to `from` must be told, and the position it has then.
    /// `None` when there is no such peer.
    pub(crate) async fn published_since(
        &self,
        cluster: ClusterId,
        from: Position,
    ) -> Result<Option<(Vec<Update>, Position)>, HubGone> {
        self.ask(|answer| Input::PublishedSince(cluster, from, answer)).await
    }

    /// A peer has made everything up to `position` durable.
    pub(crate) async fn acked(
        &self,
        cluster: ClusterId,
        position: Position,
        refused: Option<String>,
    ) -> Result<(), HubGone> {
        self.send(Input::Acked { cluster, position, refused }).await
    }

    /// A sidecar's stream begins. `None` when there are too many.
    pub(crate) async fn sidecar_joined(&self, join: SidecarJoin) -> Result<Option<SessionId>, HubGone> {
        let session = self.new_session();
        let joined = self.ask(|answer| Input::SidecarJoined(session, join, answer)).await?;
        Ok(joined.then_some(session))
    }

    /// Replaces what the sidecar had registered.
    pub(crate) async fn registered(&self, session: SessionId, claims: Vec<Claim>) -> Result<(), HubGone> {
        self.send(Input::Registered(session, claims)).await
    }

    pub(crate) async fn readiness(
        &self,
        session: SessionId,
        service: ServiceName,
        port: u16,
        ready: bool,
    ) -> Result<(), HubGone> {
        self.send(Input::Readiness { session, service, port, ready }).await
    }

    pub(crate) async fn sidecar_left(&self, session: SessionId) -> Result<(), HubGone> {
        self.send(Input::SidecarLeft(session)).await
    }

    /// Another replica has said that its sidecar is gone for good.
    pub(crate) async fn sidecar_gone(&self, session: SessionId) -> Result<(), HubGone> {
        self.send(Input::SidecarGone(session)).await
    }

    /// What is held of all peers, for another replica.
    pub(crate) async fn imports(&self) -> Result<Imports, HubGone> {
        self.ask(Input::Imports).await
    }

    /// This process leads from now on. Returns when everything that it would publish is of `epoch`.
    pub(crate) async fn lead(&self, epoch: u64) -> Result<(), HubGone> {
        self.ask(|done| Input::Lead(epoch, done)).await
    }

    /// A gateway's stream begins; it replaces an earlier one of the same id.
    pub(crate) async fn gateway_joined(&self, join: GatewayJoin) -> Result<SessionId, HubGone> {
        let session = self.new_session();
        self.send(Input::GatewayJoined(session, join)).await?;
        Ok(session)
    }

    pub(crate) async fn tunnels(&self, session: SessionId, tunnels: Vec<TunnelView>) -> Result<(), HubGone> {
        self.send(Input::Tunnels(session, tunnels)).await
    }

    pub(crate) async fn gateway_left(&self, session: SessionId) -> Result<(), HubGone> {
        self.send(Input::GatewayLeft(session)).await
    }

    /// The highest bundle sequences that a sidecar or gateway has in force.
    pub(crate) async fn bundles_in_force(
        &self,
        session: SessionId,
        sequences: BTreeMap<TrustDomain, u64>,
    ) -> Result<(), HubGone> {
        self.send(Input::BundlesInForce(session, sequences)).await
    }

    fn new_session(&self) -> SessionId {
        SessionId(self.sessions.fetch_add(1, Ordering::Relaxed))
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
pub struct HubStart {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// The own CA's published bundle.
    pub bundle: Bundle,
    /// Follows what the hub knows: own and peers' bundles, and everything revoked.
    pub trust: TrustStore,
    /// Keeps what is held of each peer.
    pub store: Store,
    pub metrics: Metrics,
    /// What becomes of callers that no policy speaks of.
    pub default_access: DefaultAccess,
    /// What was connected when the last federation with this state ended.
    pub remembered: Remembered,
}

/// Starts the hub's task; it ends when every handle is gone. The receiver is for the peering task.
pub fn start(start: HubStart) -> (HubHandle, mpsc::Receiver<PeeringEvent>) {
    let (inputs, received) = mpsc::channel(INPUTS_MAX);
    let (events, peering) = mpsc::channel(PEERING_EVENTS_MAX);
    let (changed, changes) = watch::channel(0);
    let store = start.store.clone();
    let state = State::new(start, LOG_COST_MAX, Instant::now().into_std());
    let view = Arc::new(ArcSwap::new(state.view()));
    tokio::spawn(run(state, received, view.clone(), changed));
    // Below are the sessions that are restored.
    let sessions = Arc::new(AtomicU64::new(SESSIONS_MAX as u64 + 1));
    (HubHandle { inputs, events, view, changes, store, sessions }, peering)
}

async fn run(
    mut state: State,
    mut inputs: mpsc::Receiver<Input>,
    view: Arc<ArcSwap<View>>,
    changed: watch::Sender<u64>,
) {
    let mut run = Vec::with_capacity(COALESCED_MAX);
    loop {
        let timeout = state.poll_timeout().map(Instant::from_std);
        let timer = async move {
            match timeout {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            received = inputs.recv_many(&mut run, COALESCED_MAX) => if received == 0 { return },
            () = timer => {}
        }
        let now = Instant::now().into_std();
        run.drain(..).for_each(|input| state.handle_input(input, now));
        if let Some(next) = state.commit(now) {
            let generation = next.generation;
            view.store(next);
            changed.send_if_modified(|held| std::mem::replace(held, generation) != generation);
        }
        state.answer();
    }
}
