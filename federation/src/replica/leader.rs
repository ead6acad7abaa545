//! The leader's side of the stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_api::proto::replica as proto;
use tombolo_api::proto::replica::follower_message::Kind as Told;
use tombolo_api::proto::replica::leader_message::Kind;
use tombolo_api::proto::replica::replicas_server::{Replicas, ReplicasServer};
use tombolo_core::id::{ClusterId, GatewayId, Role};
use tombolo_core::publish::Update;
use tombolo_core::refusal::Refusal;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::metrics::Refusals;
use tombolo_trust::grpc::peer_id;
use tonic::{Request, Response, Status, Streaming};

use super::sessions::{self, Difference, Mirror, NotTaken};
use super::wire::{order_to_wire, report_from_wire};
use super::{MESSAGE_OCTETS_MAX, MESSAGES_MAX, ORDERS_MAX};
use crate::hub::{HubHandle, PeeringCommand};
use crate::kubernetes::Leadership;
use crate::registry::Attached;
use crate::store::Store;
use crate::sync::wire::to_wire;

/// Serves the other replicas, while this one leads.
#[derive(Clone)]
pub struct ReplicaService {
    pub hub: HubHandle,
    pub store: Store,
    pub leadership: Leadership,
    pub refusals: Refusals,
    pub drain: DrainWatch,
    streams: Arc<AtomicU64>,
}

type Sender = mpsc::Sender<Result<proto::LeaderMessage, Status>>;

impl ReplicaService {
    pub fn server(
        hub: HubHandle,
        store: Store,
        leadership: Leadership,
        refusals: Refusals,
        drain: DrainWatch,
    ) -> ReplicasServer<Self> {
        // 0 and 1 stand for the process before, and for a leader.
        let streams = Arc::new(AtomicU64::new(2));
        let service = Self { hub, store, leadership, refusals, drain, streams };
        ReplicasServer::new(service).max_decoding_message_size(MESSAGE_OCTETS_MAX)
    }

    /// Only a replica of this very federation may ask.
    fn authorize<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let refusal = match peer_id(request) {
            None => Refusal::NoCertificate,
            Some(peer) if *peer.id.trust_domain() != self.hub.view().trust_domain => Refusal::IdentityDenied,
            Some(peer) if peer.id.as_role() != Some(Role::Federation) => Refusal::WrongRole,
            Some(_) => return Ok(()),
        };
        self.refusals.inc(refusal);
        tracing::warn!(reason = refusal.code(), "a stream of another replica is refused");
        Err(Status::permission_denied(refusal.explanation()))
    }
}

#[tonic::async_trait]
impl Replicas for ReplicaService {
    type FollowStream = ReceiverStream<Result<proto::LeaderMessage, Status>>;

    async fn follow(
        &self,
        request: Request<Streaming<proto::FollowerMessage>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        self.authorize(&request)?;
        if !self.leadership.holds() {
            return Err(Status::failed_precondition("this replica does not lead"));
        }
        let (messages, sent) = mpsc::channel(MESSAGES_MAX);
        tokio::spawn(self.clone().run(request.into_inner(), messages));
        Ok(Response::new(ReceiverStream::new(sent)))
    }
}

impl ReplicaService {
    async fn run(self, requests: Streaming<proto::FollowerMessage>, messages: Sender) {
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        let (orders, ordered) = mpsc::channel(ORDERS_MAX);
        let mut mirror = Mirror::new(self.hub.clone(), stream, orders);
        let ended = tokio::select! {
            ended = take(&self.hub, &mut mirror, requests) => ended,
            ended = self.tell(stream, &messages, ordered) => ended,
            () = self.leadership.ended() => Err(Status::unavailable("another replica leads now")),
            () = self.drain.draining() => Err(Status::unavailable(Refusal::Draining.explanation())),
        };
        if let Err(status) = ended {
            tracing::info!(reason = status.message(), "the stream of another replica has ended");
            let _ = messages.try_send(Err(status));
        }
        mirror.leave().await;
    }

    /// Tells all that there is, and then what changes.
    async fn tell(
        &self,
        stream: u64,
        messages: &Sender,
        mut ordered: mpsc::Receiver<(GatewayId, PeeringCommand)>,
    ) -> Result<(), Status> {
        let stopping = |_| Status::unavailable(Refusal::Draining.explanation());
        let (mut changes, mut durable) = (self.hub.changes(), self.store.changes());
        let mut imports = self.hub.imports().await.map_err(stopping)?;
        for (cluster, updates) in std::mem::take(&mut imports.held) {
            for update in updates {
                send(messages, peer_update(&cluster, &update)).await?;
            }
        }
        // What changed between its reading and now.
        send(messages, Kind::StateChanged(proto::StateChanged {})).await?;
        let mut told = sessions::Told::default();
        let mut complete = false;
        loop {
            changes.borrow_and_update();
            let elsewhere = |attached| attached != Attached::Elsewhere(stream);
            for difference in told.differences(&self.hub.view(), elsewhere) {
                send(messages, difference.into()).await?;
            }
            if !std::mem::replace(&mut complete, true) {
                send(messages, Kind::Complete(proto::Complete {})).await?;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Ok(()) },
                changed = durable.changed() => match changed {
                    Ok(()) => send(messages, Kind::StateChanged(proto::StateChanged {})).await?,
                    Err(_) => return Ok(()),
                },
                Some((gateway, command)) = ordered.recv() => {
                    send(messages, Kind::Order(order_to_wire(&gateway, command))).await?;
                }
                update = imports.updates.recv() => match update {
                    Ok((cluster, update)) => send(messages, peer_update(&cluster, &update)).await?,
                    Err(RecvError::Closed) => return Ok(()),
                    Err(RecvError::Lagged(_)) => return Err(Status::aborted("the follower lags behind; begin anew")),
                },
            }
        }
    }
}

async fn take(
    hub: &HubHandle,
    mirror: &mut Mirror,
    mut requests: Streaming<proto::FollowerMessage>,
) -> Result<(), Status> {
    let not_taken = |error: NotTaken| Status::invalid_argument(error.to_string());
    while let Some(message) = requests.message().await? {
        let difference = match message.kind {
            Some(Told::Sidecar(sidecar)) => Difference::Sidecar(sidecar),
            Some(Told::SidecarGone(session)) => Difference::SidecarGone(session),
            Some(Told::Gateway(gateway)) => Difference::Gateway(gateway),
            Some(Told::GatewayGone(gateway)) => Difference::GatewayGone(gateway),
            Some(Told::Report(report)) => {
                if let Some(event) = report_from_wire(report).map_err(|error| not_taken(error.into()))? {
                    hub.peering_event(event).await.map_err(|error| not_taken(error.into()))?;
                }
                continue;
            }
            Some(Told::Hello(hello)) => {
                let replica: String = hello.replica.chars().filter(|c| !c.is_control()).take(253).collect();
                tracing::info!(replica, "another replica follows");
                continue;
            }
            // A kind of a newer release.
            None => continue,
        };
        mirror.take(difference).await.map_err(not_taken)?;
    }
    Ok(())
}

async fn send(messages: &Sender, kind: Kind) -> Result<(), Status> {
    let sent = messages.send(Ok(proto::LeaderMessage { kind: Some(kind) })).await;
    sent.map_err(|_| Status::cancelled("the follower has gone"))
}

fn peer_update(cluster: &ClusterId, update: &Update) -> Kind {
    Kind::Update(proto::PeerUpdate { cluster: cluster.to_string(), update: Some(to_wire(update)) })
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
