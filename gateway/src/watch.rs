//! GatewayWatch: tells the sidecars of this cluster which peers are reachable, and when to leave.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_api::proto::gateway_watch::gateway_watch_server::{GatewayWatch, GatewayWatchServer};
use tombolo_api::proto::gateway_watch::{GatewayState, PeerReach, Reach, WatchRequest};
use tombolo_core::liveness;
use tombolo_core::refusal::Refusal;
use tombolo_runtime::drain::DrainWatch;
use tombolo_trust::grpc::{self, Incoming};
use tombolo_trust::tls::{self, ClientAuth, RootInChain};
use tonic::{Request, Response, Status};

use crate::gateway::Gateway;

/// Changes that come close together are told as one.
const SETTLE: Duration = Duration::from_millis(20);
/// Round trips drift without an event.
const REFRESH: Duration = Duration::from_secs(1);
/// States that wait for one watcher. One that does not read gets the latest state when it does.
const QUEUE: usize = 1;

/// Serves watchers until the process has drained.
pub async fn serve(gateway: Arc<Gateway>, listener: TcpListener) -> Result<(), tonic::transport::Error> {
    let config =
        tls::server_config(&gateway.svid, &gateway.trust, ClientAuth::Trusted, &[grpc::ALPN_H2], RootInChain::No);
    let meters = gateway.meters.clone();
    let incoming = Incoming::new(
        listener,
        config,
        Arc::new(move |refusal, address| {
            meters.refused(refusal);
            tracing::info!(%address, reason = refusal.code(), "a watcher was refused");
        }),
    );
    let drain = gateway.drain.clone();
    let room = Arc::new(Semaphore::new(gateway.settings.limits.watchers as usize));
    let service = GatewayWatchServer::new(Watch { gateway, room });
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, async move { drain.stopped().await })
        .await
}

struct Watch {
    gateway: Arc<Gateway>,
    room: Arc<Semaphore>,
}

#[tonic::async_trait]
impl GatewayWatch for Watch {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<GatewayState, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let caller = grpc::peer_id(&request).ok_or_else(|| Status::unauthenticated("no certificate"))?;
        if *caller.id.trust_domain() != self.gateway.snapshot().trust_domain {
            self.gateway.meters.refused(Refusal::IdentityDenied);
            return Err(Status::permission_denied("only this cluster's own identities may watch its gateways"));
        }
        let Ok(permit) = self.room.clone().try_acquire_owned() else {
            self.gateway.meters.refused(Refusal::Overloaded);
            return Err(Status::resource_exhausted("too many watchers"));
        };
        let (states, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(tell(self.gateway.clone(), states, permit));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn tell(
    gateway: Arc<Gateway>,
    states: mpsc::Sender<Result<GatewayState, Status>>,
    _permit: OwnedSemaphorePermit,
) {
    gateway.meters.watchers.inc();
    let mut tunnels = gateway.registry.subscribe();
    let mut snapshot = gateway.subscribe();
    let mut told: Option<GatewayState> = None;
    loop {
        tunnels.borrow_and_update();
        snapshot.borrow_and_update();
        let state = state(&gateway);
        if told.as_ref().is_none_or(|told| differs(told, &state)) {
            if states.send(Ok(state.clone())).await.is_err() {
                break;
            }
            told = Some(state);
        }
        tokio::select! {
            _ = tunnels.changed() => {}
            _ = snapshot.changed() => {}
            () = drain_begins(&gateway.drain) => {}
            () = tokio::time::sleep(REFRESH) => {}
            () = states.closed() => break,
        }
        tokio::time::sleep(SETTLE).await;
    }
    gateway.meters.watchers.dec();
}

async fn drain_begins(drain: &DrainWatch) {
    if drain.is_draining() {
        std::future::pending::<()>().await;
    }
    drain.draining().await;
}

/// What sidecars are told now.
pub fn state(gateway: &Gateway) -> GatewayState {
    let snapshot = gateway.snapshot();
    let peers = snapshot.peers.keys().map(|cluster| {
        let reach = match gateway.registry.reach(cluster) {
            Some(liveness::Reach::Up) => Reach::Up,
            Some(liveness::Reach::Suspect) => Reach::Suspect,
            Some(liveness::Reach::Dead) | None => Reach::Down,
        };
        let rtt_us = gateway.registry.rtt(cluster).map_or(0, |rtt| rtt.as_micros().try_into().unwrap_or(u32::MAX));
        PeerReach { cluster: cluster.to_string(), reach: reach.into(), rtt_us }
    });
    GatewayState {
        gateway_id: gateway.settings.id.to_string(),
        draining: gateway.drain.is_draining(),
        peers: peers.collect(),
    }
}

/// Whether a sidecar would pick differently: round trips count from a fifth and half a millisecond on.
fn differs(told: &GatewayState, now: &GatewayState) -> bool {
    let settled = |one: u32, other: u32| one.abs_diff(other) <= (one / 5).max(500);
    told.draining != now.draining
        || told.peers.len() != now.peers.len()
        || told.peers.iter().zip(&now.peers).any(|(told, now)| {
            told.cluster != now.cluster || told.reach != now.reach || !settled(told.rtt_us, now.rtt_us)
        })
}
