//! Peering: invitations, their redemption over the gateways, removal.
//!
//! A gateway only carries bytes: it reports the TLS exporter value of the connection and hands on offer
//! and answer. The proof covers the exporter value, so that whoever sits between the two gateways has
//! another one and gets nowhere. Whatever is agreed is durable before the other side hears of it.

mod accept;
mod declared;
mod knock;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore, mpsc};
use tombolo_api::proto::catalog;
use tombolo_core::id::{ClusterId, GatewayId, TrustDomain};
use tombolo_core::invitation::{
    ADDRESSES_MAX, Bindings, CreateError, InvitationId, Refused, Seed, Token, TokenError, is_address,
};
use tombolo_core::model::{Authority, GatewayAddress};
use tombolo_core::source::SourceProblem;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::peering as proof;

use crate::hub::{CommandRefused, HubGone, HubHandle, PeerRecord, PeeringCommand, PeeringEvent};
use crate::store::{Store, StoreError};
pub use declared::follow_declared;

/// Largest offer and answer.
const MESSAGE_OCTETS_MAX: usize = 64 * 1024;
/// Knocks that are judged at a time.
const KNOCKS_MAX: usize = 16;
/// Events of one attempt of our own that wait.
const EVENTS_MAX: usize = 4;

/// A gateway of this cluster, as far as peering needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayGateway {
    pub gateway: GatewayId,
    pub advertise: Vec<String>,
    pub connected: bool,
}

/// What peering needs of the hub: gateways that carry its messages, and who is told of the outcome.
#[tonic::async_trait]
pub trait Relay: Send + Sync + 'static {
    fn gateways(&self) -> Vec<RelayGateway>;
    async fn command(&self, gateway: GatewayId, command: PeeringCommand) -> Result<(), CommandRefused>;
    async fn peer_added(&self, record: PeerRecord) -> Result<(), HubGone>;
    async fn peer_removed(&self, cluster: ClusterId) -> Result<(), HubGone>;
    /// The declared peers that are not made, and why; replaces what was said before.
    async fn declared_refused(&self, problems: Vec<SourceProblem>) -> Result<(), HubGone>;
}

#[tonic::async_trait]
impl Relay for HubHandle {
    fn gateways(&self) -> Vec<RelayGateway> {
        let view = self.view();
        let gateways = view.gateways.values().map(|gateway| RelayGateway {
            gateway: gateway.gateway.clone(),
            advertise: gateway.advertise.clone(),
            connected: gateway.connected,
        });
        gateways.collect()
    }

    async fn command(&self, gateway: GatewayId, command: PeeringCommand) -> Result<(), CommandRefused> {
        HubHandle::command(self, gateway, command).await
    }

    async fn peer_added(&self, record: PeerRecord) -> Result<(), HubGone> {
        HubHandle::peer_added(self, record).await
    }

    async fn peer_removed(&self, cluster: ClusterId) -> Result<(), HubGone> {
        HubHandle::peer_removed(self, cluster).await
    }

    async fn declared_refused(&self, problems: Vec<SourceProblem>) -> Result<(), HubGone> {
        HubHandle::declared_refused(self, problems).await
    }
}

/// Why a peering was not made or ended. Each names the cause and the next step.
#[derive(Debug, thiserror::Error)]
pub enum PeeringError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(
        "the invitation expired at {0}; check this machine's clock, or ask for a new one with `tombolo peer invite`"
    )]
    Expired(Timestamp),
    #[error(
        "the token was made by this cluster itself, or by one of the same cluster id or trust domain; accept it in the other cluster, and give each cluster names of its own"
    )]
    OwnToken,
    #[error("{0:?} is not host:port of a gateway")]
    Address(String),
    #[error(
        "no gateway of this cluster can be dialled: set `advertise` at one, name addresses with --address, or invite from the other cluster"
    )]
    NoAddress,
    #[error("the token names no gateway address; ask for a new one with `tombolo peer invite --address HOST:PORT`")]
    NoAddressInToken,
    #[error("no gateway of this cluster is connected to its federation; start one, and see `tombolo status`")]
    NoGateway,
    #[error(transparent)]
    Create(#[from] CreateError),
    /// Refused here, before anybody was asked.
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("cluster {cluster} refused: {message}")]
    RefusedThere { cluster: ClusterId, code: String, message: String },
    #[error(
        "gateway {gateway} could not reach cluster {cluster}: {reason}; check that UDP to one of {addresses} gets through"
    )]
    Unreachable { gateway: GatewayId, cluster: ClusterId, reason: String, addresses: String },
    #[error("gateway {gateway} gave no answer within {}s; see its log", .after.as_secs())]
    Silent { gateway: GatewayId, after: Duration },
    #[error(
        "the answer does not come from the cluster that the token names ({0}): something sits between the two; ask for a new token over another way"
    )]
    WrongAnswer(&'static str),
    #[error("the answer can't be read; use the same release on both sides")]
    UnreadableAnswer,
    #[error("no peer {0}; see `tombolo peer list`")]
    UnknownPeer(ClusterId),
    #[error("peer {0} is declared by a ClusterPeer in the source; remove it there")]
    DeclaredPeer(ClusterId),
    #[error(transparent)]
    Command(#[from] CommandRefused),
    #[error(transparent)]
    Gone(#[from] HubGone),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A new invitation, for the operator.
#[derive(Debug)]
pub struct Invited {
    pub token: Token,
}

/// Invites, accepts and removes peers. Clones share one state.
#[derive(Clone)]
pub struct Peering {
    shared: Arc<Shared>,
}

struct Shared {
    cluster: ClusterId,
    trust_domain: TrustDomain,
    store: Store,
    ca: CertificateAuthority,
    relay: Box<dyn Relay>,
    /// Own attempts that wait for what their gateway reports.
    attempts: Mutex<BTreeMap<String, mpsc::Sender<PeeringEvent>>>,
    /// Peers that a resource of the source makes.
    declared: Mutex<BTreeMap<ClusterId, PeerRecord>>,
    /// Peers were stored or removed: what is declared is to be judged again.
    bindings_changed: Notify,
    knocks: Arc<Semaphore>,
    /// Refused knocks by the code of their reason, for metrics.
    on_refused: Box<dyn Fn(&'static str) + Send + Sync>,
}

impl Peering {
    /// Tells the hub of every stored peer. `on_refused` is called with the code of each knock that is refused.
    pub async fn start(
        ca: CertificateAuthority,
        cluster: ClusterId,
        store: Store,
        relay: Box<dyn Relay>,
        on_refused: Box<dyn Fn(&'static str) + Send + Sync>,
    ) -> Result<Self, HubGone> {
        for record in store.peering().peers() {
            relay.peer_added(record).await?;
        }
        let shared = Shared {
            cluster,
            trust_domain: ca.bundle().trust_domain().clone(),
            store,
            ca,
            relay,
            attempts: Mutex::default(),
            declared: Mutex::default(),
            bindings_changed: Notify::new(),
            knocks: Arc::new(Semaphore::new(KNOCKS_MAX)),
            on_refused,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Handles what gateways report, until `events` end.
    pub fn handle_events(&self, mut events: mpsc::Receiver<PeeringEvent>) {
        let handler = self.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                handler.handle(event);
            }
        });
    }

    /// Makes an invitation. `addresses` take the place of the gateways' own when there are any.
    pub async fn invite(
        &self,
        life: Duration,
        authority: Authority,
        addresses: Vec<String>,
    ) -> Result<Invited, PeeringError> {
        let addresses = if addresses.is_empty() { self.advertised() } else { addresses };
        if let Some(address) = addresses.iter().find(|address| !is_address(address)) {
            return Err(PeeringError::Address(address.chars().take(80).collect()));
        }
        if addresses.is_empty() {
            return Err(PeeringError::NoAddress);
        }
        let id = InvitationId::from_random(rand::random());
        let seed = Seed::new(proof::new_seed());
        let public_key = proof::public_key(seed.expose());
        let created = self.shared.store.off_thread(move |store| {
            store.change_peering(|state| state.invitations.create(id, public_key, authority, life, Timestamp::now()))
        });
        let expires = created.await??;
        tracing::info!(%id, %expires, "made an invitation");
        let token = Token {
            id,
            expires,
            cluster: self.shared.cluster.clone(),
            trust_domain: self.shared.trust_domain.clone(),
            root_sha256: self.shared.ca.active_root_sha256(),
            seed,
            addresses: addresses.into_iter().take(ADDRESSES_MAX).collect(),
        };
        Ok(Invited { token })
    }

    /// Ends a peering: durable at once, and nothing of the peer is trusted or served when it returns.
    pub async fn remove(&self, cluster: ClusterId) -> Result<(), PeeringError> {
        let name = cluster.clone();
        let removed = self.shared.store.off_thread(move |store| {
            let removed = store.change_peering(|state| state.remove_peer(&name))?;
            if removed {
                store.remove_import(&name)?;
            }
            Ok::<_, StoreError>(removed)
        });
        if !removed.await? {
            let declared = self.shared.declared().contains_key(&cluster);
            return Err(if declared {
                PeeringError::DeclaredPeer(cluster)
            } else {
                PeeringError::UnknownPeer(cluster)
            });
        }
        tracing::info!(%cluster, "removed a peer");
        self.shared.relay.peer_removed(cluster).await?;
        self.shared.bindings_changed.notify_one();
        Ok(())
    }

    fn handle(&self, event: PeeringEvent) {
        if let PeeringEvent::Knock { gateway, attempt, exporter, offer, chain } = event {
            return self.knock(gateway, attempt, exporter, offer, chain);
        }
        let attempt = match &event {
            PeeringEvent::Exporter { attempt, .. }
            | PeeringEvent::Answer { attempt, .. }
            | PeeringEvent::Failed { attempt, .. }
            | PeeringEvent::Knock { attempt, .. } => attempt.clone(),
        };
        let waiting = self.shared.attempts().get(&attempt).cloned();
        // Nobody waits for one that was given up, and a gateway that says too much is not listened to.
        if waiting.is_none_or(|waiting| waiting.try_send(event).is_err()) {
            tracing::debug!(%attempt, "a report on a peering that nobody waits for");
        }
    }

    fn advertised(&self) -> Vec<String> {
        let mut addresses: Vec<String> = self.shared.addresses().into_iter().map(|gateway| gateway.address).collect();
        addresses.dedup();
        addresses
    }
}

impl Shared {
    fn attempts(&self) -> MutexGuard<'_, BTreeMap<String, mpsc::Sender<PeeringEvent>>> {
        self.attempts.lock().expect("no holder of the lock panics")
    }

    fn declared(&self) -> MutexGuard<'_, BTreeMap<ClusterId, PeerRecord>> {
        self.declared.lock().expect("no holder of the lock panics")
    }

    /// Which trust domain each peer is bound to, by an invitation or by a resource.
    fn bindings(&self, stored: BTreeMap<ClusterId, TrustDomain>) -> BTreeMap<ClusterId, TrustDomain> {
        let declared = self.declared();
        let declared = declared.values().map(|record| (record.cluster.clone(), record.trust_domain.clone()));
        declared.chain(stored).collect()
    }

    /// Whether the two may be bound to each other here, beside what is stored and declared.
    fn check_binding(
        &self,
        stored: BTreeMap<ClusterId, TrustDomain>,
        cluster: &ClusterId,
        trust_domain: &TrustDomain,
    ) -> Result<(), Refused> {
        let peers = self.bindings(stored);
        let bindings = Bindings { own_cluster: &self.cluster, own_trust_domain: &self.trust_domain, peers: &peers };
        bindings.check(cluster, trust_domain)
    }

    /// Where our gateways can be dialled.
    fn addresses(&self) -> Vec<GatewayAddress> {
        let mut addresses = Vec::new();
        for RelayGateway { gateway, advertise, .. } in self.relay.gateways() {
            let good = advertise.into_iter().filter(|address| is_address(address));
            addresses.extend(good.map(|address| GatewayAddress { gateway: gateway.clone(), address }));
        }
        addresses.truncate(ADDRESSES_MAX);
        addresses
    }

    fn addresses_to_wire(&self) -> Vec<catalog::GatewayAddress> {
        let to_wire =
            |one: GatewayAddress| catalog::GatewayAddress { gateway_id: one.gateway.to_string(), address: one.address };
        self.addresses().into_iter().map(to_wire).collect()
    }
}

/// The gateways that the other side named, if all of them make sense.
fn addresses_from_wire(wire: Vec<catalog::GatewayAddress>) -> Option<Vec<GatewayAddress>> {
    if wire.len() > ADDRESSES_MAX {
        return None;
    }
    let one = |wire: catalog::GatewayAddress| {
        let gateway = wire.gateway_id.parse().ok()?;
        is_address(&wire.address).then_some(GatewayAddress { gateway, address: wire.address })
    };
    wire.into_iter().map(one).collect()
}

/// Words of the other side, fit for a terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}
