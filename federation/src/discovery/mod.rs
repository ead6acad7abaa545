//! Discovery: what this federation tells its own sidecars and gateways, and what they tell it.
//!
//! Each stream follows the hub's generations and sends what differs from what it has sent: nothing is
//! queued, and under load several changes become one.

mod gateway;
mod sidecar;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_api::proto::discovery as proto;
use tombolo_api::proto::discovery::discovery_server::{Discovery, DiscoveryServer};
use tombolo_core::id::{Role, SpiffeId};
use tombolo_core::refusal::Refusal;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::logging::Sparsely;
use tombolo_runtime::metrics::Refusals;
use tombolo_trust::grpc::peer_id;
use tonic::{Request, Response, Status, Streaming};

use crate::hub::{HubGone, HubHandle};

/// Updates between a stream and its connection.
const UPDATES_MAX: usize = 16;
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Peering offers and registrations are far below this.
const MESSAGE_OCTETS_MAX: usize = 1024 * 1024;

/// The discovery service.
#[derive(Clone)]
pub struct DiscoveryService {
    hub: HubHandle,
    /// `host:port` where the inner legs of peer sync are accepted.
    leg_address: String,
    refusals: Refusals,
    drain: DrainWatch,
}

impl DiscoveryService {
    pub fn server(hub: HubHandle, leg_address: String, refusals: Refusals, drain: DrainWatch) -> DiscoveryServer<Self> {
        let service = Self { hub, leg_address, refusals, drain };
        DiscoveryServer::new(service).max_decoding_message_size(MESSAGE_OCTETS_MAX)
    }

    /// The verified identity of the caller, which must be of this cluster and of the kind that `role` says.
    fn caller<T>(&self, request: &Request<T>, role: Option<Role>) -> Result<SpiffeId, Status> {
        let judged = match peer_id(request) {
            None => Err(Refusal::NoCertificate),
            Some(peer) if *peer.id.trust_domain() != self.hub.view().trust_domain => Err(Refusal::IdentityDenied),
            Some(peer) if peer.id.as_role() != role || (role.is_none() && peer.id.is_reserved()) => {
                Err(Refusal::WrongRole)
            }
            Some(peer) => Ok(peer.id),
        };
        judged.map_err(|refusal| {
            static LOG: Sparsely = Sparsely::new();
            self.refusals.inc(refusal);
            if let Some(left_out) = LOG.admit(Instant::now()) {
                tracing::warn!(reason = refusal.code(), left_out, "a discovery stream is refused");
            }
            Status::permission_denied(refusal.explanation())
        })
    }
}

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    type SidecarStream = ReceiverStream<Result<proto::SidecarUpdate, Status>>;
    type GatewayStream = ReceiverStream<Result<proto::GatewayUpdate, Status>>;

    async fn sidecar(
        &self,
        request: Request<Streaming<proto::SidecarRequest>>,
    ) -> Result<Response<Self::SidecarStream>, Status> {
        let id = self.caller(&request, None)?;
        let (updates, sent) = mpsc::channel(UPDATES_MAX);
        let stream = sidecar::SidecarStream::begin(self, id, request.into_inner(), updates).await?;
        tokio::spawn(stream.run());
        Ok(Response::new(ReceiverStream::new(sent)))
    }

    async fn gateway(
        &self,
        request: Request<Streaming<proto::GatewayRequest>>,
    ) -> Result<Response<Self::GatewayStream>, Status> {
        let id = self.caller(&request, Some(Role::Gateway))?;
        let (updates, sent) = mpsc::channel(UPDATES_MAX);
        let stream = gateway::GatewayStream::begin(self, id, request.into_inner(), updates).await?;
        tokio::spawn(stream.run());
        Ok(Response::new(ReceiverStream::new(sent)))
    }
}

/// Why a stream ends.
#[derive(Debug)]
enum Ended {
    /// The other side has gone.
    Closed,
    /// To be told to the other side.
    Told(Box<Status>),
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        Ended::Told(Box::new(status))
    }
}

impl From<HubGone> for Ended {
    fn from(_: HubGone) -> Self {
        Status::unavailable(Refusal::Draining.explanation()).into()
    }
}

/// The first message of a stream.
async fn first<T>(requests: &mut Streaming<T>) -> Result<Option<T>, Status> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, requests.message()).await;
    first.map_err(|_| Status::deadline_exceeded("no Hello came"))?
}

/// Waits for the next generation; ends when the hub or the caller's identity does.
async fn next_generation(hub: &HubHandle, changes: &mut watch::Receiver<u64>, id: &SpiffeId) -> Result<(), Ended> {
    changes.changed().await.map_err(|_| HubGone)?;
    if hub.view().revoked.contains(id) {
        return Err(Status::permission_denied(Refusal::Revoked.explanation()).into());
    }
    Ok(())
}
