//! The stream of one gateway.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tombolo_api::convert::{InvalidMessage, name};
use tombolo_api::proto::discovery as proto;
use tombolo_api::proto::discovery::gateway_request::Kind as Asked;
use tombolo_api::proto::discovery::gateway_update::Kind;
use tombolo_core::id::{GatewayId, SpiffeId};
use tombolo_core::refusal::Refusal;
use tombolo_runtime::drain::DrainWatch;
use tonic::{Status, Streaming};

use super::{DiscoveryService, Ended, first, next_generation, wire};
use crate::hub::{GatewayJoin, HubHandle, PeeringCommand};
use crate::registry::{Attached, SessionId};

/// Peering commands that wait for the stream.
const COMMANDS_MAX: usize = 16;
/// Tunnels that one gateway may report.
const TUNNELS_MAX: usize = 1024;
/// Addresses that one gateway may advertise.
const ADVERTISED_MAX: usize = 8;

pub(super) struct GatewayStream {
    hub: HubHandle,
    id: SpiffeId,
    gateway: GatewayId,
    session: SessionId,
    requests: Streaming<proto::GatewayRequest>,
    updates: mpsc::Sender<Result<proto::GatewayUpdate, Status>>,
    commands: mpsc::Receiver<PeeringCommand>,
    drain: DrainWatch,
    changes: watch::Receiver<u64>,
    told: Option<proto::GatewaySnapshot>,
    told_revoked: Option<Arc<BTreeSet<SpiffeId>>>,
}

fn malformed(error: InvalidMessage) -> Status {
    Status::invalid_argument(error.to_string())
}

impl GatewayStream {
    pub(super) async fn begin(
        service: &DiscoveryService,
        id: SpiffeId,
        mut requests: Streaming<proto::GatewayRequest>,
        updates: mpsc::Sender<Result<proto::GatewayUpdate, Status>>,
    ) -> Result<Self, Status> {
        let Some(Asked::Hello(hello)) = first(&mut requests).await?.and_then(|first| first.kind) else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        let gateway: GatewayId = name("gateway_id", &hello.gateway_id).map_err(malformed)?;
        if id.path().rsplit('/').next() != Some(gateway.as_str()) {
            service.refusals.inc(Refusal::IdentityDenied);
            return Err(Status::permission_denied(format!("{id} is not the identity of gateway {gateway}")));
        }
        let advertise = hello.advertise.into_iter().take(ADVERTISED_MAX);
        let advertise: Result<_, _> = advertise.map(|address| wire::address("advertise", address)).collect();
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let join = GatewayJoin {
            gateway: gateway.clone(),
            spiffe_id: id.clone(),
            advertise: advertise.map_err(malformed)?,
            ingress_address: wire::address("ingress_address", hello.ingress_address).map_err(malformed)?,
            watch_address: wire::address("watch_address", hello.watch_address).map_err(malformed)?,
            unmeshed_address: hello.unmeshed_address.parse().ok(),
            commands,
            attached: Attached::Here,
        };
        let joined = service.hub.gateway_joined(join).await;
        let session = joined.map_err(|_| Status::unavailable(Refusal::Draining.explanation()))?;
        let view = service.hub.view();
        let welcome = proto::GatewayWelcome {
            cluster: view.cluster.to_string(),
            trust_domain: view.trust_domain.to_string(),
            federation_leg_address: service.leg_address.clone(),
        };
        // The channel is new and has room.
        let _ = updates.try_send(Ok(proto::GatewayUpdate { kind: Some(Kind::Welcome(welcome)) }));
        Ok(Self {
            hub: service.hub.clone(),
            id,
            gateway,
            session,
            requests,
            updates,
            commands: received,
            drain: service.drain.clone(),
            changes: service.hub.changes(),
            told: None,
            told_revoked: None,
        })
    }

    pub(super) async fn run(mut self) {
        tracing::info!(gateway = %self.gateway, "the gateway is connected");
        if let Err(Ended::Told(status)) = self.follow().await {
            let _ = self.updates.try_send(Err(*status));
        }
        tracing::info!(gateway = %self.gateway, "the gateway's stream has ended");
        // Fails only when the process is stopping.
        let _ = self.hub.gateway_left(self.session).await;
    }

    async fn follow(&mut self) -> Result<(), Ended> {
        loop {
            self.changes.borrow_and_update();
            self.tell().await?;
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.handle(request).await?,
                    None => return Err(Ended::Closed),
                },
                // Closed only when a later stream of this gateway has replaced this one.
                command = self.commands.recv() => self.send(wire::command_to_wire(command.ok_or(Ended::Closed)?)).await?,
                changed = next_generation(&self.hub, &mut self.changes, &self.id) => changed?,
                () = self.drain.draining() => {
                    return Err(Status::unavailable(Refusal::Draining.explanation()).into());
                }
                () = self.updates.closed() => return Err(Ended::Closed),
            }
        }
    }

    /// Sends what differs from what was sent; revocations first, so that no peer is dialled without them.
    async fn tell(&mut self) -> Result<(), Ended> {
        let view = self.hub.view();
        if !self.told_revoked.as_ref().is_some_and(|told| Arc::ptr_eq(told, &view.revoked)) {
            self.told_revoked = Some(view.revoked.clone());
            self.send(Kind::Revoked(wire::revoked(&view))).await?;
        }
        let snapshot = wire::snapshot(&view);
        if self.told.as_ref() != Some(&snapshot) {
            self.told = Some(snapshot.clone());
            self.send(Kind::Snapshot(snapshot)).await?;
        }
        Ok(())
    }

    async fn handle(&mut self, request: proto::GatewayRequest) -> Result<(), Ended> {
        let gateway = self.gateway.clone();
        let event = match request.kind {
            Some(Asked::Tunnels(states)) => {
                let tunnels: Result<Vec<_>, _> =
                    states.tunnels.into_iter().take(TUNNELS_MAX).map(wire::tunnel).collect();
                return Ok(self.hub.tunnels(self.session, tunnels.map_err(malformed)?).await?);
            }
            Some(Asked::Bundles(bundles)) => {
                let sequences = wire::bundles_in_force(bundles).map_err(malformed)?;
                return Ok(self.hub.bundles_in_force(self.session, sequences).await?);
            }
            Some(said) => wire::peering_event(gateway, said),
            None => None,
        };
        match event {
            Some(event) => Ok(self.hub.peering_event(event).await?),
            // A second Hello changes nothing; a kind of a newer release is passed over.
            None => Ok(()),
        }
    }

    async fn send(&self, kind: Kind) -> Result<(), Ended> {
        self.updates.send(Ok(proto::GatewayUpdate { kind: Some(kind) })).await.map_err(|_| Ended::Closed)
    }
}
