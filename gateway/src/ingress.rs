//! Where this cluster's sidecars bring legs. Nobody is authenticated here and nothing is terminated: the
//! ClientHello names the target, and the two ends of the leg authenticate each other.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tombolo_api::proto::tunnel as wire;
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_core::trace::Hop;
use tombolo_leg::client_hello::{self, Opening, ProxyPolicy};
use tombolo_leg::proxy_header::ProxyHeader;
use tombolo_leg::status::{self, Crossing, LegRefused};
use tombolo_runtime::telemetry::{Kind, Span};

use crate::copy::{self, LegEnd};
use crate::delivery;
use crate::gateway::{Gateway, LegPermit};
use crate::meters::INGRESS;
use crate::snapshot::LegOrigin;
use crate::sources::{SourceLimits, Unfinished};
use crate::tunnel::registry::Pick;
use crate::tunnel::streams::{self, HOPS_MAX, OpenFailure, OpenedLeg};

/// A TLS server answers a ClientHello at once.
const FIRST_BYTE_WITHIN: Duration = Duration::from_secs(5);
/// How long a leg waits for a tunnel that is suspect. Long enough for a redial on a short path, short enough that the
/// sidecar, which may have another gateway or cluster, is told before it overtakes this gateway.
const SUSPECT_WAIT: Duration = Duration::from_millis(150);
const TUNNELS_TRIED_MAX: usize = 3;
/// After which a sidecar may try again when nothing else is said.
const RETRY_AFTER: Duration = Duration::from_millis(500);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who brings legs to a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Callers {
    Sidecars,
    /// This gateway itself, for workloads without a sidecar.
    Itself,
}

/// Accepts legs for as long as the process runs; one that drains refuses them with that reason.
pub async fn accept_all(gateway: Arc<Gateway>, listener: TcpListener) {
    accept(gateway, listener, Callers::Sidecars).await;
}

/// Accepts the legs that this gateway begins itself, on a listener that nobody else is told of. Whoever finds it can do
/// what the ingress lets everybody do.
pub async fn accept_own(gateway: Arc<Gateway>, listener: TcpListener) {
    accept(gateway, listener, Callers::Itself).await;
}

async fn accept(gateway: Arc<Gateway>, listener: TcpListener, callers: Callers) {
    let sources = SourceLimits::new(&gateway.settings.limits);
    loop {
        match listener.accept().await {
            Ok((tcp, address)) => match sources.admit(address.ip()) {
                Ok(unfinished) => {
                    tokio::spawn(handle(gateway.clone(), tcp, address, callers, unfinished));
                }
                Err(refusal) => {
                    gateway.meters.refused(refusal);
                    tracing::debug!(%address, reason = refusal.code(), "leg refused");
                    copy::reset_tcp(&tcp);
                }
            },
            Err(error) => {
                tracing::warn!(%error, "the ingress can't accept a connection; maybe the limit of open files is reached");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn handle(
    gateway: Arc<Gateway>,
    mut tcp: TcpStream,
    address: SocketAddr,
    callers: Callers,
    unfinished: Unfinished,
) {
    copy::prepare(&tcp);
    let policy = match callers {
        Callers::Sidecars => proxy_policy(&gateway, address.ip()),
        Callers::Itself => ProxyPolicy::Read,
    };
    let opening = client_hello::read_opening(&mut tcp, policy).await;
    let (outcome, proxy) = match opening {
        Ok(Opening { proxy, hello }) => {
            let request = Request { hello: hello.raw.into(), server_name: hello.server_name, proxy };
            // Boxed, so that what waits for its ClientHello stays small.
            (Box::pin(route(&gateway, &request)).await, request.proxy)
        }
        Err(error) => (Err(gateway.refuse(error.refusal, error.detail)), error.proxy),
    };
    drop(unfinished);
    let status_wanted = proxy.is_some_and(|proxy| proxy.status_wanted);
    match outcome {
        Ok((way, permit, crossing)) => {
            if status_wanted && status::write(&mut tcp, &Ok(crossing)).await.is_err() {
                return permit.ended(LegEnd::TcpReset);
            }
            permit.accepted();
            let end = Box::pin(way.carry(&gateway, tcp)).await;
            permit.ended(end);
        }
        Err(refused) => {
            gateway.meters.refused(refused.refusal);
            tracing::debug!(%address, reason = refused.refusal.code(), detail = refused.detail, "leg refused");
            refuse(tcp, refused, status_wanted).await;
        }
    }
}

fn proxy_policy(gateway: &Gateway, source: IpAddr) -> ProxyPolicy {
    let trusted = gateway.settings.proxy_sources.iter().any(|range| range.contains(source));
    if trusted { ProxyPolicy::Read } else { ProxyPolicy::Refuse }
}

/// Says why: as a status frame to whoever asked for one, else as a TLS alert.
async fn refuse(mut tcp: TcpStream, refused: LegRefused, status_wanted: bool) {
    let said = if status_wanted {
        status::write(&mut tcp, &Err(refused)).await
    } else {
        tcp.write_all(&alert(refused.refusal)).await
    };
    if said.is_ok() {
        let _ = tcp.shutdown().await;
    }
}

/// A fatal alert as the first record of a server (RFC 8446 section 6).
fn alert(refusal: Refusal) -> [u8; 7] {
    const UNRECOGNIZED_NAME: u8 = 112;
    const INTERNAL_ERROR: u8 = 80;
    const DECODE_ERROR: u8 = 50;
    let description = match refusal {
        Refusal::BadTarget | Refusal::UnknownCluster | Refusal::UnknownService | Refusal::NotExported => {
            UNRECOGNIZED_NAME
        }
        Refusal::BadClientHello | Refusal::BadHeader => DECODE_ERROR,
        _ => INTERNAL_ERROR,
    };
    [0x15, 3, 3, 0, 2, 2, description]
}

/// What a sidecar said before its leg.
struct Request {
    hello: Bytes,
    server_name: Option<String>,
    proxy: Option<ProxyHeader>,
}

/// The other end of a leg.
enum Way {
    /// A sidecar of this cluster.
    Local(TcpStream),
    Tunnel(OpenedLeg),
}

impl Way {
    async fn carry(self, gateway: &Gateway, mut tcp: TcpStream) -> LegEnd {
        match self {
            Way::Local(mut server) => {
                let end = carry_local(&mut tcp, &mut server).await;
                if end != LegEnd::Closed {
                    copy::reset_tcp(&tcp);
                    copy::reset_tcp(&server);
                }
                end
            }
            Way::Tunnel(mut leg) => {
                let pumps = copy::Pumps {
                    meters: &gateway.meters,
                    stalls: &gateway.stalls,
                    first_byte_within: Some(FIRST_BYTE_WITHIN),
                };
                copy::carry(pumps, &mut tcp, &mut leg.send, &mut leg.recv).await
            }
        }
    }
}

/// Between two connections of this cluster; half-closes are kept.
async fn carry_local(client: &mut TcpStream, server: &mut TcpStream) -> LegEnd {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let up = async {
        tokio::io::copy(&mut from_client, &mut to_server).await?;
        to_server.shutdown().await
    };
    let down = async {
        timeout(FIRST_BYTE_WITHIN, from_server.readable()).await.map_err(|_| ErrorKind::TimedOut)??;
        tokio::io::copy(&mut from_server, &mut to_client).await?;
        to_client.shutdown().await
    };
    match tokio::try_join!(up, down) {
        Ok(_) => LegEnd::Closed,
        Err(error) if error.kind() == ErrorKind::TimedOut => LegEnd::Silent,
        Err(_) => LegEnd::TcpReset,
    }
}

async fn route(gateway: &Arc<Gateway>, request: &Request) -> Result<(Way, LegPermit, Crossing), LegRefused> {
    let named = request.server_name.as_deref().unwrap_or_default();
    let target: LegTarget = named.parse().map_err(|error| gateway.refuse(Refusal::BadTarget, format!("{error}")))?;
    let permit = gateway
        .admit_leg(INGRESS)
        .map_err(|refusal| LegRefused { retry_after: Some(RETRY_AFTER), ..gateway.refuse(refusal, "") })?;
    let own = gateway.snapshot().cluster.clone();
    let parent = request.proxy.as_ref().and_then(|proxy| proxy.trace);
    let mut span = gateway.tracer.span(Kind::Server, "leg accepted", parent);
    span.attr("tombolo.gateway", &gateway.settings.id);
    span.attr("tombolo.cluster", &own);
    span.attr("tombolo.target", &target);
    let hop = Hop { gateway_id: gateway.settings.id.clone(), cluster: own.clone(), span: span.link_to_self() };
    if target.cluster == own {
        let server = delivery::deliver(gateway, &target, LegOrigin::Own, &request.hello).await?;
        return Ok((Way::Local(server), permit, Crossing { hops: vec![hop], path: vec![own] }));
    }
    match cross(gateway, &target, request, &span).await {
        Ok(leg) => {
            span.attr("tombolo.next_gateway", &leg.hop.gateway_id);
            let crossing = Crossing { hops: vec![hop, leg.hop.clone()], path: leg.path.clone() };
            Ok((Way::Tunnel(leg), permit, crossing))
        }
        Err(refused) => {
            span.error(refused.refusal.code());
            Err(refused)
        }
    }
}

/// Opens the leg on a tunnel to the target's cluster. Until a server's byte has come back, nothing is lost
/// by trying another tunnel.
async fn cross(gateway: &Gateway, target: &LegTarget, request: &Request, span: &Span) -> Result<OpenedLeg, LegRefused> {
    let snapshot = gateway.snapshot();
    if !snapshot.peers.contains_key(&target.cluster) {
        return Err(gateway.refuse(Refusal::UnknownCluster, target.cluster.as_str()));
    }
    let header = wire::StreamHeader {
        target: target.to_string(),
        path: vec![snapshot.cluster.to_string()],
        hops_left: HOPS_MAX,
        traceparent: span.context().map(|context| context.to_string()).unwrap_or_default(),
        tracestate: request.proxy.as_ref().and_then(|proxy| proxy.tracestate.clone()).unwrap_or_default(),
    };
    let mut tried = Vec::new();
    let mut last = (Refusal::NoTunnel, String::new());
    while tried.len() < TUNNELS_TRIED_MAX {
        let Some(tunnel) = pick(gateway, target, &tried).await else { break };
        match streams::open(&tunnel, &header, &request.hello).await {
            Ok(leg) => return Ok(leg),
            Err(OpenFailure::Refused(refused)) if refused.refusal == Refusal::Draining => {
                last = (refused.refusal, refused.detail);
            }
            Err(OpenFailure::Refused(refused)) => return Err(refused),
            Err(OpenFailure::Lost(refusal, detail)) => last = (refusal, detail),
        }
        tried.push(tunnel.number);
    }
    Err(LegRefused { retry_after: Some(RETRY_AFTER), ..gateway.refuse(last.0, last.1) })
}

/// The next tunnel to try. The first time, a suspect one gets a moment to recover or to be replaced.
async fn pick(gateway: &Gateway, target: &LegTarget, tried: &[u64]) -> Option<Arc<crate::tunnel::connection::Tunnel>> {
    let mut changed = gateway.registry.subscribe();
    let wait = async {
        loop {
            match gateway.registry.pick(&target.cluster, tried) {
                Pick::Tunnel(tunnel) => return Some(tunnel),
                Pick::Suspect if tried.is_empty() => {
                    if changed.changed().await.is_err() {
                        return None;
                    }
                }
                Pick::Suspect | Pick::None => return None,
            }
        }
    };
    timeout(SUSPECT_WAIT, wait).await.ok().flatten()
}
