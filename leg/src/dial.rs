//! Makes the client's end of a leg: straight to a local sidecar, or through a gateway of the own cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tombolo_core::id::{Role, SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_core::trace::TraceParent;
use tombolo_trust::store::{TrustStore, Usage};
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ServerExpectation};

use crate::Alpn;
use crate::credentials::Credentials;
use crate::proxy_header::ProxyHeader;
use crate::status::{self, Crossing};

/// Where a leg is to go, and who may be at its end.
#[derive(Debug, Clone)]
pub struct LegRequest {
    pub target: LegTarget,
    /// The trust domain of the target's cluster; only its bundle verifies the server.
    pub trust_domain: TrustDomain,
    /// The identities that the export names for its servers. The implicit export of a federation names none:
    /// its server is any instance of that role of `trust_domain`.
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

/// The client's end of a leg whose server is verified. Its client learns only at its first read whether the
/// server accepted it in turn.
#[derive(Debug)]
pub struct Leg {
    pub stream: TlsStream<TcpStream>,
    pub server_id: SpiffeId,
    /// The gateways and clusters that it crosses; empty for a direct leg.
    pub crossing: Crossing,
    pub alpn: Alpn,
    /// How long the handshake with the far end took, a first estimate of the round trip.
    pub rtt: Duration,
    pub credentials: Credentials,
}

/// Configurations that are kept; a service has one for each way it is spoken to.
const CONFIGS_MAX: usize = 1024;

/// Dials legs in the name of the current SVID. Clones share it.
#[derive(Debug, Clone)]
pub struct Dialer {
    svid: SvidSource,
    trust: TrustStore,
    configs: Arc<Mutex<BTreeMap<ConfigKey, CachedConfig>>>,
}

/// The address of the set of identities stands for the set, which the entry keeps alive.
type ConfigKey = (usize, TrustDomain, Alpn, IsFederation);
type IsFederation = bool;

#[derive(Debug)]
struct CachedConfig {
    _ids: Arc<BTreeSet<SpiffeId>>,
    config: Arc<ClientConfig>,
}

impl Dialer {
    pub fn new(svid: SvidSource, trust: TrustStore) -> Self {
        Self { svid, trust, configs: Arc::default() }
    }

    /// Dials and waits until the server is verified, at most for the request's deadline.
    pub async fn dial(&self, request: LegRequest) -> Result<Leg, LegError> {
        if self.svid.current().is_none() {
            let detail = "this process has no identity yet".into();
            return Err(LegError { refusal: Refusal::NoCertificate, detail, retry_after: None, stage: Stage::Connect });
        }
        let mut stage = Stage::Connect;
        // Boxed, so that the task of a leg does not keep room for its handshake for ever.
        match timeout(request.deadline, Box::pin(self.stages(&request, &mut stage))).await {
            Ok(result) => result.map_err(|failed| LegError {
                refusal: failed.refusal,
                detail: failed.detail,
                retry_after: failed.retry_after,
                stage,
            }),
            Err(_) => Err(LegError {
                refusal: Refusal::Timeout,
                detail: format!("no leg to {} within {:?}", request.target, request.deadline),
                retry_after: None,
                stage,
            }),
        }
    }

    async fn stages(&self, request: &LegRequest, stage: &mut Stage) -> Result<Leg, Failed> {
        let (address, gateway) = match &request.via {
            Via::Direct(address) => (address, false),
            Via::Gateway { address } => (address, true),
        };
        let unreachable = |error: io::Error| Failed {
            refusal: Refusal::EndpointUnreachable,
            detail: format!("{address}: {error}"),
            retry_after: None,
        };
        let tcp = TcpStream::connect(address.as_str()).await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        keep_alive(&tcp);
        *stage = if gateway { Stage::Gateway } else { Stage::Handshake };
        let name = ServerName::try_from(request.target.to_string()).expect("a leg target is a host name");
        let mut opening = if gateway { proxy_header(request, &tcp).encode() } else { Vec::new() };
        let mut connecting = TlsConnector::from(self.config(request)).connect_with(name, tcp, |session| {
            // The ClientHello leaves together with the header in front of it.
            session.write_tls(&mut opening).expect("a Vec grows");
        });
        let began = Instant::now();
        let crossing = {
            let tcp = connecting.get_mut().ok_or_else(|| lost("the TLS client could not start"))?;
            tcp.write_all(&opening).await.map_err(lost)?;
            if gateway { gateway_answer(tcp).await? } else { Crossing::default() }
        };
        *stage = Stage::Handshake;
        let stream = connecting.await.map_err(|error| Failed {
            refusal: tls::refusal_of(&error)
                .or_else(|| tls::refused_by_peer(&error))
                .unwrap_or(Refusal::ConnectionLost),
            detail: format!("handshake with {}: {error}", request.target),
            retry_after: None,
        })?;
        self.stand(stream, request, crossing, began.elapsed())
    }

    fn stand(
        &self,
        stream: TlsStream<TcpStream>,
        request: &LegRequest,
        crossing: Crossing,
        rtt: Duration,
    ) -> Result<Leg, Failed> {
        let session = stream.get_ref().1;
        let refused = |refusal: Refusal| Failed { refusal, detail: refusal.to_string(), retry_after: None };
        if session.alpn_protocol() != Some(request.alpn.as_bytes()) {
            return Err(refused(Refusal::BadAlpn));
        }
        let chain = session.peer_certificates().unwrap_or_default();
        let server_id = tls::identity_of(chain).map_err(refused)?;
        let credentials = Credentials::new(chain, Usage::Server);
        Ok(Leg { server_id, crossing, alpn: request.alpn, rtt, credentials, stream })
    }

    fn config(&self, request: &LegRequest) -> Arc<ClientConfig> {
        let is_federation = request.target.is_federation();
        let trust_domain = request.trust_domain.clone();
        let key = (Arc::as_ptr(&request.server_ids).addr(), trust_domain.clone(), request.alpn, is_federation);
        let mut configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = configs.get(&key) {
            return cached.config.clone();
        }
        let ids = request.server_ids.clone();
        let expectation = if is_federation {
            ServerExpectation::Role { trust_domain, role: Role::Federation }
        } else {
            ServerExpectation::Ids { trust_domain, ids: ids.clone() }
        };
        let config = tls::client_config(&self.svid, &self.trust, expectation, &[request.alpn.as_bytes()]);
        if configs.len() >= CONFIGS_MAX {
            configs.clear();
        }
        configs.insert(key, CachedConfig { _ids: ids, config: config.clone() });
        config
    }
}

struct Failed {
    refusal: Refusal,
    detail: String,
    retry_after: Option<Duration>,
}

fn lost(error: impl std::fmt::Display) -> Failed {
    Failed { refusal: Refusal::ConnectionLost, detail: error.to_string(), retry_after: None }
}

fn proxy_header(request: &LegRequest, tcp: &TcpStream) -> ProxyHeader {
    ProxyHeader {
        addresses: tcp.local_addr().ok().zip(tcp.peer_addr().ok()),
        status_wanted: true,
        trace: request.trace,
        tracestate: request.tracestate.clone(),
    }
}

async fn gateway_answer(tcp: &mut TcpStream) -> Result<Crossing, Failed> {
    let status = status::read(tcp).await.map_err(lost)?;
    status.map_err(|refused| {
        let who = refused.gateway_id.map(|id| format!("gateway {id}: ")).unwrap_or_default();
        Failed {
            refusal: refused.refusal,
            detail: format!("{who}{}", refused.detail),
            retry_after: refused.retry_after,
        }
    })
}

/// A leg whose far end has vanished without a word must not stay for ever.
pub fn keep_alive(tcp: &TcpStream) {
    let probes = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    // Without it the leg only lives longer.
    let _ = socket2::SockRef::from(tcp).set_tcp_keepalive(&probes);
}
