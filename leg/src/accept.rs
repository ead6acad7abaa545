//! The server's end of a leg.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tombolo_core::id::{ClusterId, SpiffeId};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;

use crate::Alpn;

/// Who is at the other end of an accepted leg, and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegIdentity {
    pub client_id: SpiffeId,
    /// The cluster that the client's trust domain belongs to.
    pub client_cluster: ClusterId,
    pub target: LegTarget,
    pub alpn: Alpn,
    /// The far end of the TCP connection: a gateway's address for a leg that crossed one.
    pub peer_address: SocketAddr,
}

/// The server's end of a leg whose client is verified, not yet authorized.
#[derive(Debug)]
pub struct AcceptedLeg {
    pub stream: tokio_rustls::server::TlsStream<TcpStream>,
    pub identity: std::sync::Arc<LegIdentity>,
}

/// Why a leg was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{refusal} ({detail})")]
pub struct AcceptError {
    pub refusal: Refusal,
    pub detail: String,
}
