//! The server's end of a leg.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tombolo_core::id::{ClusterId, SpiffeId};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_trust::store::{TrustStore, Usage};
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ClientAuth, RootInChain};

use crate::Alpn;
use crate::credentials::Credentials;
use crate::dial::keep_alive;

/// How long a client has for its whole handshake.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

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
    pub stream: TlsStream<TcpStream>,
    pub identity: Arc<LegIdentity>,
    pub credentials: Credentials,
}

/// Why a leg was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{refusal} ({detail})")]
pub struct AcceptError {
    pub refusal: Refusal,
    pub detail: String,
}

/// Accepts legs in the name of the current SVID, from clients of any trusted domain. Clones share it.
#[derive(Debug, Clone)]
pub struct Acceptor {
    trust: TrustStore,
    config: Arc<ServerConfig>,
}

impl Acceptor {
    /// Accepts both kinds of legs.
    pub fn new(svid: &SvidSource, trust: &TrustStore) -> Self {
        Self::with_alpn(svid, trust, &Alpn::ALL)
    }

    pub fn with_alpn(svid: &SvidSource, trust: &TrustStore, alpn: &[Alpn]) -> Self {
        let alpn: Vec<&[u8]> = alpn.iter().map(|alpn| alpn.as_bytes()).collect();
        let config = tls::server_config(svid, trust, ClientAuth::Trusted, &alpn, RootInChain::No);
        Self { trust: trust.clone(), config }
    }

    /// Waits for the handshake, at most [`HANDSHAKE_MAX`]. Whether the client may call the target is for the
    /// caller to decide, at each request (`tombolo_core::authz`).
    pub async fn accept(&self, tcp: TcpStream) -> Result<AcceptedLeg, AcceptError> {
        // Boxed, so that the task of a leg does not keep room for its handshake for ever.
        match timeout(HANDSHAKE_MAX, Box::pin(self.handshake(tcp))).await {
            Ok(result) => result,
            Err(_) => Err(refused(Refusal::HandshakeTimeout, format!("no handshake within {HANDSHAKE_MAX:?}"))),
        }
    }

    async fn handshake(&self, tcp: TcpStream) -> Result<AcceptedLeg, AcceptError> {
        let peer_address = tcp.peer_addr().map_err(|error| refused(Refusal::ConnectionLost, error))?;
        tcp.set_nodelay(true).map_err(|error| refused(Refusal::ConnectionLost, error))?;
        keep_alive(&tcp);
        let start =
            LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp).await.map_err(handshake_refused)?;
        let name = start.client_hello().server_name().map(str::to_owned);
        let name = name.ok_or_else(|| refused(Refusal::BadTarget, "the ClientHello has no SNI"))?;
        let target: LegTarget = name.parse().map_err(|error| refused(Refusal::BadTarget, error))?;
        let stream = start.into_stream(self.config.clone()).await.map_err(handshake_refused)?;
        let session = stream.get_ref().1;
        let alpn = session.alpn_protocol().and_then(Alpn::from_bytes);
        let alpn = alpn.ok_or_else(|| refused(Refusal::BadAlpn, "the client offers no ALPN"))?;
        let chain = session.peer_certificates().unwrap_or_default();
        let client_id = tls::identity_of(chain).map_err(|refusal| refused(refusal, "no identity in the chain"))?;
        let client_cluster = self.trust.snapshot().cluster_of(client_id.trust_domain()).cloned().ok_or_else(|| {
            refused(Refusal::UnknownTrustDomain, format!("no cluster is bound to {}", client_id.trust_domain()))
        })?;
        let credentials = Credentials::new(chain, Usage::Client);
        let identity = Arc::new(LegIdentity { client_id, client_cluster, target, alpn, peer_address });
        Ok(AcceptedLeg { stream, identity, credentials })
    }
}

fn refused(refusal: Refusal, detail: impl std::fmt::Display) -> AcceptError {
    AcceptError { refusal, detail: detail.to_string() }
}

fn handshake_refused(error: io::Error) -> AcceptError {
    let not_tls = || match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. }) => Refusal::BadClientHello,
        _ => Refusal::ConnectionLost,
    };
    let refusal = tls::refusal_of(&error).unwrap_or_else(not_tls);
    refused(refusal, error)
}
