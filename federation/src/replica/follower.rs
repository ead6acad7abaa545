//! The follower's side of the stream.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_api::proto::replica as proto;
use tombolo_api::proto::replica::follower_message::Kind;
use tombolo_api::proto::replica::leader_message::Kind as Told;
use tombolo_api::proto::replica::replicas_client::ReplicasClient;
use tombolo_core::backoff::Backoff;
use tombolo_core::id::{ClusterId, Role};
use tombolo_trust::ca::{CaError, CertificateAuthority};
use tombolo_trust::grpc::{self, ALPN_H2};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ServerExpectation};
use tonic::{Status, Streaming};

use super::sessions::{self, Difference, Mirror, NotTaken};
use super::wire::{order_from_wire, report_to_wire};
use super::{MESSAGE_OCTETS_MAX, MESSAGES_MAX, ORDERS_MAX};
use crate::hub::{HubGone, HubHandle, PeerMessage, PeerRecord, PeeringCommand, PeeringEvent, SyncEnds};
use crate::kubernetes::Leader;
use crate::registry::Attached;
use crate::store::{Store, StoreError};
use crate::sync::wire::from_wire;

/// Updates of peers that are applied together.
const RUN_MAX: usize = 256;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LONGEST: Duration = Duration::from_secs(2);
/// How long the leader may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// How often what is durable is read again while it can't be.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// One replica that follows.
pub struct Follower {
    pub name: String,
    pub hub: HubHandle,
    pub store: Store,
    pub ca: CertificateAuthority,
    pub svid: SvidSource,
    pub trust: TrustStore,
    pub leader: watch::Receiver<Option<Leader>>,
    /// Set when everything that a leader knew was told once.
    pub synced: watch::Sender<bool>,
    /// The peers that the hub has been told of.
    pub peers: BTreeMap<ClusterId, PeerRecord>,
}

/// Why the leader is not followed any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("the leader can't be asked: {0}")]
    Status(#[from] Status),
    #[error("the leader ended the stream")]
    Closed,
    #[error("the leader does not answer")]
    Silent,
    #[error("there is a new peer, of which everything has to be told")]
    NewPeer,
    #[error("what the leader told can't be taken: {0}")]
    NotTaken(#[from] NotTaken),
    #[error("what the leader told of a peer can't be taken: {0}")]
    Sync(#[from] SyncEnds),
    #[error(transparent)]
    Address(#[from] grpc::InvalidAddress),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Gone(#[from] HubGone),
}

impl Follower {
    /// Follows whoever leads, for as long as it is not dropped. `events` are what gateways report of peerings.
    pub async fn run(&mut self, events: &mut mpsc::Receiver<PeeringEvent>) {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_LONGEST);
        let mut last = String::new();
        loop {
            let Some(leader) = self.leader.borrow_and_update().clone() else {
                if self.leader.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let mut leaders = self.leader.clone();
            let ended = tokio::select! {
                ended = self.stream(&leader, events) => ended,
                changed = leaders.wait_for(|now| now.as_ref().is_some_and(|now| *now != leader)) => {
                    if changed.is_err() { return }
                    backoff.reset();
                    continue;
                }
            };
            let ended = ended.err().unwrap_or(Ended::Closed);
            if matches!(ended, Ended::NewPeer) {
                continue;
            }
            let reason = ended.to_string();
            // The same failure over and over is told once.
            if reason != last {
                tracing::info!(leader = leader.holder, reason, "the leader is not followed for the moment");
                last = reason;
            }
            tokio::time::sleep(backoff.next_wait(rand::random())).await;
        }
    }

    async fn stream(&mut self, leader: &Leader, events: &mut mpsc::Receiver<PeeringEvent>) -> Result<(), Ended> {
        self.read().await?;
        let own = self.hub.view().trust_domain.clone();
        let expectation = ServerExpectation::Role { trust_domain: own, role: Role::Federation };
        let config = tls::client_config(&self.svid, &self.trust, expectation, &[ALPN_H2]);
        let channel = grpc::connect(&leader.discovery, config)?;
        let mut client = ReplicasClient::new(channel).max_decoding_message_size(MESSAGE_OCTETS_MAX);
        let (messages, outgoing) = mpsc::channel(MESSAGES_MAX);
        send(&messages, Kind::Hello(proto::Hello { replica: self.name.clone() })).await?;
        let asked = client.follow(ReceiverStream::new(outgoing));
        let told = tokio::time::timeout(ANSWER_TIME_MAX, asked).await.map_err(|_| Ended::Silent)??.into_inner();
        tracing::info!(leader = leader.holder, "following");
        let (orders, _nobody) = mpsc::channel(ORDERS_MAX);
        let mut mirror = Mirror::new(self.hub.clone(), 1, orders);
        let (changed, hub, synced) = (Notify::new(), self.hub.clone(), self.synced.clone());
        let failures = messages.clone();
        let ended = tokio::select! {
            ended = take(&hub, &mut mirror, told, &changed, &synced, &failures) => ended,
            ended = tell(&hub, &messages, events) => ended,
            ended = self.read_on(&changed) => ended,
        };
        mirror.leave().await;
        ended
    }

    /// Reads what is durable whenever `changed` says so.
    async fn read_on(&mut self, changed: &Notify) -> Result<(), Ended> {
        loop {
            changed.notified().await;
            while let Err(error) = self.read().await {
                if matches!(error, Ended::Gone(_)) {
                    return Err(error);
                }
                tracing::warn!(%error, "what the leader has changed can't be read; trying on");
                tokio::time::sleep(READ_AGAIN).await;
            }
        }
    }

    /// Reads everything durable, and tells the hub of it.
    pub(crate) async fn read(&mut self) -> Result<(), Ended> {
        let ca = self.ca.clone();
        self.store
            .off_thread(move |store| -> Result<(), Ended> {
                store.refresh()?;
                Ok(ca.reload()?)
            })
            .await?;
        self.hub.own_bundle_changed(self.ca.bundle()).await?;
        let revoked = self.store.revoked();
        self.hub.own_revoked(revoked.sequence, revoked.ids).await?;
        let peers: BTreeMap<ClusterId, PeerRecord> =
            self.store.peering().peers().map(|record| (record.cluster.clone(), record)).collect();
        let before = std::mem::replace(&mut self.peers, peers);
        for gone in before.keys().filter(|cluster| !self.peers.contains_key(*cluster)) {
            self.hub.peer_removed(gone.clone()).await?;
        }
        for (_, record) in self.peers.iter().filter(|(cluster, record)| before.get(*cluster) != Some(*record)) {
            self.hub.peer_added(record.clone()).await?;
        }
        Ok(())
    }
}

/// Tells the leader what is connected here, and what gateways report.
async fn tell(
    hub: &HubHandle,
    messages: &mpsc::Sender<proto::FollowerMessage>,
    events: &mut mpsc::Receiver<PeeringEvent>,
) -> Result<(), Ended> {
    let (mut changes, mut told) = (hub.changes(), sessions::Told::default());
    loop {
        changes.borrow_and_update();
        for difference in told.differences(&hub.view(), |attached| attached == Attached::Here) {
            send(messages, difference.into()).await?;
        }
        tokio::select! {
            changed = changes.changed() => changed.map_err(|_| HubGone)?,
            Some(event) = events.recv() => send(messages, Kind::Report(report_to_wire(event))).await?,
        }
    }
}

/// Takes what the leader tells.
async fn take(
    hub: &HubHandle,
    mirror: &mut Mirror,
    mut told: Streaming<proto::LeaderMessage>,
    changed: &Notify,
    synced: &watch::Sender<bool>,
    failures: &mpsc::Sender<proto::FollowerMessage>,
) -> Result<(), Ended> {
    let (mut next, mut missed) = (None, BTreeSet::new());
    loop {
        let kind = match next.take() {
            Some(kind) => kind,
            None => told.message().await?.ok_or(Ended::Closed)?.kind,
        };
        let difference = match kind {
            Some(Told::Update(update)) => {
                next = run_of_updates(hub, update, &mut told, &mut missed).await?;
                continue;
            }
            Some(Told::StateChanged(_)) => {
                changed.notify_one();
                continue;
            }
            Some(Told::Complete(_)) => {
                synced.send_replace(true);
                continue;
            }
            Some(Told::Order(order)) => {
                if let Some(event) = carry_out(hub, order).await? {
                    send(failures, Kind::Report(report_to_wire(event))).await?;
                }
                continue;
            }
            Some(Told::Sidecar(sidecar)) => Difference::Sidecar(sidecar),
            Some(Told::SidecarGone(session)) => Difference::SidecarGone(session),
            Some(Told::Gateway(gateway)) => Difference::Gateway(gateway),
            Some(Told::GatewayGone(gateway)) => Difference::GatewayGone(gateway),
            // A kind of a newer release.
            None => continue,
        };
        mirror.take(difference).await?;
    }
}

/// Applies an update, and those of the same peer that are there with it. Yields what came after them, if it is there.
async fn run_of_updates(
    hub: &HubHandle,
    first: proto::PeerUpdate,
    told: &mut Streaming<proto::LeaderMessage>,
    missed: &mut BTreeSet<ClusterId>,
) -> Result<Option<Option<Told>>, Ended> {
    let cluster = first.cluster;
    let mut run: Vec<PeerMessage> = first.update.into_iter().map(from_wire).collect();
    let mut next = None;
    while run.len() < RUN_MAX {
        // An end or an error is there again at the next call.
        let Some(Ok(Some(message))) = told.message().now_or_never() else { break };
        match message.kind {
            Some(Told::Update(update)) if update.cluster == cluster => run.extend(update.update.map(from_wire)),
            other => {
                next = Some(other);
                break;
            }
        }
    }
    if let Ok(cluster) = cluster.parse::<ClusterId>() {
        match hub.sync_received(cluster.clone(), run).await {
            Ok(_) if missed.contains(&cluster) => return Err(Ended::NewPeer),
            Ok(_) => {}
            // It is not known here yet.
            Err(SyncEnds::NoPeer) => _ = missed.insert(cluster),
            Err(ends) => return Err(ends.into()),
        }
    }
    Ok(next)
}

/// Hands an order to its gateway. Yields the report of the failure where it can't be.
async fn carry_out(hub: &HubHandle, order: proto::PeeringOrder) -> Result<Option<PeeringEvent>, Ended> {
    let Some((gateway, command)) = order_from_wire(order).map_err(NotTaken::from)? else { return Ok(None) };
    let attempt = match &command {
        PeeringCommand::Dial { attempt, .. }
        | PeeringCommand::Offer { attempt, .. }
        | PeeringCommand::Verdict { attempt, .. } => attempt.clone(),
    };
    let done = hub.command(gateway.clone(), command).await;
    Ok(done.err().map(|error| PeeringEvent::Failed { gateway, attempt, reason: error.to_string() }))
}

async fn send(messages: &mpsc::Sender<proto::FollowerMessage>, kind: Kind) -> Result<(), Ended> {
    messages.send(proto::FollowerMessage { kind: Some(kind) }).await.map_err(|_| Ended::Closed)
}

impl From<Difference> for Kind {
    fn from(difference: Difference) -> Self {
        match difference {
            Difference::Sidecar(sidecar) => Kind::Sidecar(sidecar),
            Difference::SidecarGone(session) => Kind::SidecarGone(session),
            Difference::Gateway(gateway) => Kind::Gateway(gateway),
            Difference::GatewayGone(gateway) => Kind::GatewayGone(gateway),
        }
    }
}
