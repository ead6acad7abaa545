//! Makes the client's end of a leg: straight to a local sidecar, or through a gateway of the own cluster.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tombolo_core::id::{SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_core::trace::TraceParent;

use crate::Alpn;
use crate::status::Crossing;

/// Where a leg is to go, and who may be at its end.
#[derive(Debug, Clone)]
pub struct LegRequest {
    pub target: LegTarget,
    /// The trust domain of the target's cluster; only its bundle verifies the server.
    pub trust_domain: TrustDomain,
    /// The identities that the export names for its servers.
    pub server_ids: Arc<BTreeSet<SpiffeId>>,
    pub via: Via,
    pub alpn: Alpn,
    pub trace: Option<TraceParent>,
    pub tracestate: Option<String>,
    /// From now until the leg stands, every stage included.
    pub deadline: Duration,
}

/// Which way a leg leaves this process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// `host:port` of the sidecar that delivers the endpoint.
    Direct(String),
    /// `host:port` of the ingress of a gateway of this cluster.
    Gateway { address: String },
}

/// How far a leg had come when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The TCP connection to the sidecar or gateway.
    Connect,
    /// The gateway's answer.
    Gateway,
    /// The TLS handshake with the far sidecar.
    Handshake,
}

/// Why a leg does not stand. No request has been sent then, so another try is always safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{refusal} ({detail})")]
pub struct LegError {
    pub refusal: Refusal,
    pub detail: String,
    pub retry_after: Option<Duration>,
    pub stage: Stage,
}

/// The client's end of a leg whose server is verified.
#[derive(Debug)]
pub struct Leg {
    pub stream: tokio_rustls::client::TlsStream<TcpStream>,
    pub server_id: SpiffeId,
    /// The gateways and clusters that it crosses; empty for a direct leg.
    pub crossing: Crossing,
    pub alpn: Alpn,
    /// How long connecting and handshaking took, a first estimate of the round trip.
    pub setup: Duration,
}
