//! Legs on a tunnel: how one is opened, and what becomes of one that the far gateway opens.
//!
//! A stream begins with a header and, at once behind it, the ClientHello. The far gateway answers before
//! any byte of the leg comes back.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use tokio::time::timeout;
use tombolo_api::frame;
use tombolo_api::proto::tunnel as wire;
use tombolo_api::proto::tunnel::stream_answer::Kind as AnswerKind;
use tombolo_core::id::ClusterId;
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_core::trace::{Hop, SpanLink};
use tombolo_leg::client_hello::{self, ClientHello, ProxyPolicy};
use tombolo_leg::status::{self, LegRefused};
use tombolo_runtime::telemetry::Kind;

use super::connection::Tunnel;
use crate::copy::{self, LegEnd, stream_code};
use crate::delivery;
use crate::gateway::{Gateway, LegPermit};
use crate::meters::TUNNEL;
use crate::snapshot::LegOrigin;

/// Largest header or answer.
const LENGTH_MAX: usize = 4096;
/// Most clusters that a leg may cross.
pub const HOPS_MAX: u32 = 4;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// For the far gateway to read the header, dial its sidecar and answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// For the far gateway to grant one more stream.
const STREAM_TIMEOUT: Duration = Duration::from_secs(1);

/// Counts a leg on its tunnel, from before it is opened: a tunnel in use is probed often.
struct InUse(Arc<Tunnel>);

impl InUse {
    fn new(tunnel: &Arc<Tunnel>) -> Self {
        tunnel.leg_opened();
        Self(tunnel.clone())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.leg_closed();
    }
}

/// A leg that the far gateway has accepted.
pub struct OpenedLeg {
    pub send: SendStream,
    pub recv: RecvStream,
    /// The far gateway, with its span.
    pub hop: Hop,
    pub path: Vec<ClusterId>,
    _in_use: InUse,
}

/// Why no leg was opened. Either way nothing but a ClientHello was sent.
#[derive(Debug)]
pub enum OpenFailure {
    /// The far gateway said no.
    Refused(LegRefused),
    /// The tunnel did not carry it; another one may.
    Lost(Refusal, String),
}

/// Opens a leg on `tunnel`.
pub async fn open(tunnel: &Arc<Tunnel>, header: &wire::StreamHeader, hello: &Bytes) -> Result<OpenedLeg, OpenFailure> {
    let in_use = InUse::new(tunnel);
    let lost = |error: &dyn std::fmt::Display| OpenFailure::Lost(Refusal::ConnectionLost, error.to_string());
    let (mut send, mut recv) = match timeout(STREAM_TIMEOUT, tunnel.connection.open_bi()).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(lost(&error)),
        Err(_) => {
            let detail = "the far gateway grants no more streams on this tunnel";
            return Err(OpenFailure::Lost(Refusal::Overloaded, detail.into()));
        }
    };
    let mut first = [Bytes::from(frame::encode(header)), hello.clone()];
    let exchange = async {
        send.write_all_chunks(&mut first).await.map_err(|error| lost(&error))?;
        read_frame::<wire::StreamAnswer>(&mut recv).await.map_err(|error| lost(&error))
    };
    // A tunnel that is found silent meanwhile need not be waited for: another one may do.
    let answered = tokio::select! {
        answered = timeout(ANSWER_TIMEOUT, exchange) => answered.map_err(|_| (Refusal::Timeout, "the far gateway did not answer in time")),
        () = tunnel.suspected() => Err((Refusal::NoTunnel, "the far gateway does not answer")),
    };
    let answer = match answered {
        Ok(answer) => answer?,
        Err((refusal, why)) => {
            let _ = send.reset(stream_code::RESET);
            return Err(OpenFailure::Lost(refusal, why.into()));
        }
    };
    match answer.kind {
        Some(AnswerKind::Accepted(accepted)) => {
            let span = SpanLink::from_octets(&accepted.trace_id, &accepted.span_id);
            let (gateway_id, cluster) = (tunnel.remote.gateway.clone(), tunnel.remote.cluster.clone());
            let path = accepted.path.iter().take(HOPS_MAX as usize + 1).filter_map(|name| name.parse().ok()).collect();
            Ok(OpenedLeg { send, recv, hop: Hop { gateway_id, cluster, span }, path, _in_use: in_use })
        }
        Some(AnswerKind::Refused(refused)) => Err(OpenFailure::Refused(status::refused_from_wire(refused))),
        None => Err(OpenFailure::Lost(Refusal::BadHeader, "the far gateway's answer says nothing".into())),
    }
}

#[derive(Debug, thiserror::Error)]
enum FrameReadError {
    #[error("the stream ended: {0}")]
    Ended(#[from] quinn::ReadExactError),
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
}

/// Reads one frame and not one octet behind it.
async fn read_frame<M: prost::Message + Default>(recv: &mut RecvStream) -> Result<M, FrameReadError> {
    let mut head = [0; 2];
    recv.read_exact(&mut head).await?;
    // Refuses an absurd length before its octets are waited for.
    frame::decode::<M>(&head, LENGTH_MAX)?;
    let mut bytes = vec![0; 2 + usize::from(u16::from_be_bytes(head))];
    bytes[..2].copy_from_slice(&head);
    recv.read_exact(&mut bytes[2..]).await?;
    match frame::decode(&bytes, LENGTH_MAX)? {
        Some((message, _)) => Ok(message),
        None => Err(frame::FrameError::Malformed.into()),
    }
}

/// Serves what the far gateway opens, until the connection ends.
pub async fn accept_all(gateway: Arc<Gateway>, tunnel: Arc<Tunnel>) {
    while let Ok((send, recv)) = tunnel.connection.accept_bi().await {
        tokio::spawn(serve(gateway.clone(), tunnel.clone(), send, recv));
    }
}

async fn serve(gateway: Arc<Gateway>, tunnel: Arc<Tunnel>, mut send: SendStream, mut recv: RecvStream) {
    let _in_use = InUse::new(&tunnel);
    let mut leg = match receive(&gateway, &tunnel, &mut recv).await {
        Ok(leg) => leg,
        Err(refused) => return refuse(&gateway, &tunnel, send, recv, &refused).await,
    };
    if send.write_all(&frame::encode(&leg.answer)).await.is_err() {
        copy::reset_tcp(&leg.tcp);
        return leg.permit.ended(LegEnd::TunnelLost);
    }
    leg.permit.accepted();
    let pumps = copy::Pumps { meters: &gateway.meters, stalls: &gateway.stalls, first_byte_within: None };
    let end = copy::carry(pumps, &mut leg.tcp, &mut send, &mut recv).await;
    leg.permit.ended(end);
}

async fn refuse(gateway: &Gateway, tunnel: &Tunnel, mut send: SendStream, mut recv: RecvStream, refused: &LegRefused) {
    gateway.meters.refused(refused.refusal);
    tracing::debug!(peer = %tunnel.remote.cluster, reason = refused.refusal.code(), detail = refused.detail, "leg refused");
    let _ = recv.stop(stream_code::REFUSED);
    let answer = wire::StreamAnswer { kind: Some(AnswerKind::Refused(status::refused_to_wire(refused))) };
    if send.write_all(&frame::encode(&answer)).await.is_ok() {
        let _ = send.finish();
    }
}

/// A leg whose way to its sidecar is open.
struct ReceivedLeg {
    tcp: tokio::net::TcpStream,
    answer: wire::StreamAnswer,
    permit: LegPermit,
}

async fn receive(gateway: &Arc<Gateway>, tunnel: &Tunnel, recv: &mut RecvStream) -> Result<ReceivedLeg, LegRefused> {
    let permit = gateway.admit_leg(TUNNEL).map_err(|refusal| gateway.refuse(refusal, ""))?;
    let header = match timeout(HEADER_TIMEOUT, read_frame::<wire::StreamHeader>(recv)).await {
        Ok(Ok(header)) => header,
        Ok(Err(error)) => return Err(gateway.refuse(Refusal::BadHeader, error.to_string())),
        Err(_) => return Err(gateway.refuse(Refusal::HandshakeTimeout, "no stream header came")),
    };
    let target: LegTarget =
        header.target.parse().map_err(|error| gateway.refuse(Refusal::BadHeader, format!("{error}")))?;
    check_path(gateway, tunnel, &header)?;
    let hello = client_hello::read_opening(recv, ProxyPolicy::Refuse)
        .await
        .map_err(|error| gateway.refuse(error.refusal, error.detail))?
        .hello;
    check_name(gateway, &target, &hello)?;

    let origin = LegOrigin::Peer(&tunnel.remote.cluster);
    let tcp = delivery::deliver(gateway, &target, origin, &hello.raw).await?;
    let own = gateway.snapshot().cluster.clone();
    let mut path = header.path;
    path.push(own.to_string());
    let mut span = gateway.tracer.span(Kind::Server, "leg accepted", header.traceparent.parse().ok());
    span.attr("tombolo.gateway", &gateway.settings.id);
    span.attr("tombolo.cluster", &own);
    span.attr("tombolo.target", &target);
    span.attr("tombolo.path", path.join(" "));
    let link = span.link_to_self();
    let answer = AnswerKind::Accepted(wire::Accepted {
        gateway_id: gateway.settings.id.to_string(),
        path,
        trace_id: link.map(|link| link.trace_id.to_vec()).unwrap_or_default(),
        span_id: link.map(|link| link.span_id.to_vec()).unwrap_or_default(),
    });
    Ok(ReceivedLeg { tcp, answer: wire::StreamAnswer { kind: Some(answer) }, permit })
}

/// A leg that has been here, or has crossed too many clusters, goes round in circles.
fn check_path(gateway: &Gateway, tunnel: &Tunnel, header: &wire::StreamHeader) -> Result<(), LegRefused> {
    let own = &gateway.snapshot().cluster;
    let crossed_own = header.path.iter().any(|cluster| cluster == own.as_str());
    if crossed_own || header.hops_left == 0 || header.path.len() > HOPS_MAX as usize {
        return Err(gateway.refuse(Refusal::RelayLoop, ""));
    }
    if header.path.last().is_none_or(|last| last != tunnel.remote.cluster.as_str()) {
        return Err(gateway.refuse(Refusal::BadHeader, "the path does not end in the cluster that sent the leg"));
    }
    Ok(())
}

/// The header says what the leg is for, and the ClientHello must say the same.
fn check_name(gateway: &Gateway, target: &LegTarget, hello: &ClientHello) -> Result<(), LegRefused> {
    let named = hello.server_name.as_deref().and_then(|name| name.parse::<LegTarget>().ok());
    if named.as_ref() == Some(target) { Ok(()) } else { Err(gateway.refuse(Refusal::TargetMismatch, "")) }
}
