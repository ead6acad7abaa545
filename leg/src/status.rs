//! The one status frame that a gateway sends before the first TLS byte of a leg, to a sidecar that
//! asked for it: accepted, with the gateways and clusters crossed, or refused, with the true reason.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tombolo_api::frame;
use tombolo_api::proto::tunnel;
use tombolo_core::id::{ClusterId, GatewayId};
use tombolo_core::refusal::Refusal;
use tombolo_core::trace::{Hop, SpanLink};

use crate::frame_io;

/// Largest status frame that is read or written, without its length.
pub const LENGTH_MAX: usize = 4096;
/// Hops and path entries of one frame; more are refused.
const HOPS_MAX: usize = 16;
/// Longest free text of a refusal; more is cut off.
const DETAIL_MAX: usize = 512;

/// The way that a leg took.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Crossing {
    /// Gateways crossed, nearest first.
    pub hops: Vec<Hop>,
    /// Clusters crossed, the last is where the leg ends. Empty for a leg that crossed no gateway.
    pub path: Vec<ClusterId>,
}

/// A gateway's reason for not carrying a leg.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegRefused {
    pub refusal: Refusal,
    pub detail: String,
    pub retry_after: Option<Duration>,
    pub gateway_id: Option<GatewayId>,
}

/// What a gateway says about a leg.
pub type Status = Result<Crossing, LegRefused>;

/// A status frame that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error("no status frame came from the gateway: {0}")]
    Io(#[from] std::io::Error),
    #[error("the gateway sent no valid status frame: {0}")]
    Malformed(String),
}

/// Writes the frame; the leg's own bytes follow.
pub async fn write(io: &mut (impl AsyncWrite + Unpin), status: &Status) -> std::io::Result<()> {
    io.write_all(&encode(status)).await?;
    io.flush().await
}

/// The frame with its length in front.
pub fn encode(status: &Status) -> Vec<u8> {
    use tunnel::status_frame::Kind;
    let kind = match status {
        Ok(crossing) => Kind::Accepted(tunnel::LegAccepted {
            hops: crossing.hops.iter().take(HOPS_MAX).map(hop_to_wire).collect(),
            path: crossing.path.iter().take(HOPS_MAX).map(ToString::to_string).collect(),
        }),
        Err(refused) => Kind::Refused(refused_to_wire(refused)),
    };
    frame::encode(&tunnel::StatusFrame { kind: Some(kind) })
}

/// Reads the frame and not one octet behind it.
pub async fn read(io: &mut (impl AsyncRead + Unpin)) -> Result<Status, StatusError> {
    use tunnel::status_frame::Kind;
    let frame: tunnel::StatusFrame = match frame_io::read(io, LENGTH_MAX).await {
        Ok(frame) => frame,
        Err(frame_io::FrameReadError::Io(error)) => return Err(StatusError::Io(error)),
        Err(frame_io::FrameReadError::Frame(error)) => return Err(StatusError::Malformed(error.to_string())),
    };
    match frame.kind {
        Some(Kind::Accepted(accepted)) => crossing_from_wire(&accepted).map(Ok),
        Some(Kind::Refused(refused)) => Ok(Err(refused_from_wire(refused))),
        None => Err(StatusError::Malformed("it says neither accepted nor refused".into())),
    }
}

/// A refusal as gateways write it, here and in the answer on a stream of the tunnel.
pub fn refused_to_wire(refused: &LegRefused) -> tunnel::Refused {
    tunnel::Refused {
        code: refused.refusal.code().into(),
        detail: refused.detail.chars().take(DETAIL_MAX / 4).collect(),
        retry_after_ms: refused.retry_after.map_or(0, |after| after.as_millis().try_into().unwrap_or(u32::MAX)),
        gateway_id: refused.gateway_id.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

/// A code of a newer release is kept in the detail, under the reason that fits best.
pub fn refused_from_wire(wire: tunnel::Refused) -> LegRefused {
    let cut = |text: String| text.chars().take(DETAIL_MAX).filter(|c| !c.is_control()).collect::<String>();
    let (refusal, detail) = match Refusal::from_code(&wire.code) {
        Some(refusal) => (refusal, cut(wire.detail)),
        None => (Refusal::EndpointUnreachable, cut(format!("{}: {}", wire.code, wire.detail))),
    };
    let retry_after = (wire.retry_after_ms != 0).then(|| Duration::from_millis(wire.retry_after_ms.into()));
    LegRefused { refusal, detail, retry_after, gateway_id: wire.gateway_id.parse().ok() }
}

fn hop_to_wire(hop: &Hop) -> tunnel::GatewayHop {
    let (trace_id, span_id) = hop.span.map(|span| (span.trace_id.to_vec(), span.span_id.to_vec())).unwrap_or_default();
    tunnel::GatewayHop { gateway_id: hop.gateway_id.to_string(), cluster: hop.cluster.to_string(), trace_id, span_id }
}

fn crossing_from_wire(wire: &tunnel::LegAccepted) -> Result<Crossing, StatusError> {
    let malformed = |error: &dyn std::fmt::Display| StatusError::Malformed(error.to_string());
    if wire.hops.len() > HOPS_MAX || wire.path.len() > HOPS_MAX {
        return Err(malformed(&"too many hops"));
    }
    let hop = |hop: &tunnel::GatewayHop| -> Result<Hop, StatusError> {
        Ok(Hop {
            gateway_id: hop.gateway_id.parse().map_err(|error| malformed(&error))?,
            cluster: hop.cluster.parse().map_err(|error| malformed(&error))?,
            span: SpanLink::from_octets(&hop.trace_id, &hop.span_id),
        })
    };
    Ok(Crossing {
        hops: wire.hops.iter().map(hop).collect::<Result<_, _>>()?,
        path: wire
            .path
            .iter()
            .map(|cluster| cluster.parse().map_err(|error| malformed(&error)))
            .collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn crossing() -> Crossing {
        let hop = |id: &str, cluster: &str, span| Hop {
            gateway_id: id.parse().unwrap(),
            cluster: cluster.parse().unwrap(),
            span,
        };
        let span = SpanLink { trace_id: [1; 16], span_id: [2; 8] };
        Crossing {
            hops: vec![hop("gw-1", "east", Some(span)), hop("gw-2", "west", None)],
            path: vec!["east".parse().unwrap(), "west".parse().unwrap()],
        }
    }

    fn refused() -> LegRefused {
        LegRefused {
            refusal: Refusal::NoTunnel,
            detail: "west".into(),
            retry_after: Some(Duration::from_millis(250)),
            gateway_id: Some("gw-1".parse().unwrap()),
        }
    }

    #[tokio::test]
    async fn a_status_reads_back_and_leaves_what_follows() {
        for status in [Ok(crossing()), Ok(Crossing::default()), Err(refused())] {
            let mut bytes = Vec::new();
            write(&mut bytes, &status).await.unwrap();
            bytes.extend_from_slice(b"tls");
            let mut rest = bytes.as_slice();
            assert_eq!(read(&mut rest).await.unwrap(), status);
            assert_eq!(rest, b"tls");
        }
    }

    #[tokio::test]
    async fn anything_else_is_an_error() {
        for bytes in [&b""[..], b"\0", b"\xff\xff", b"\0\0", b"\0\x03\xff\xff\xff", b"\0\x05\x0a"] {
            assert!(read(&mut &*bytes).await.is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_code_of_a_newer_release_is_kept_as_text() {
        let wire = tunnel::Refused { code: "sun-spots".into(), detail: "many\n".into(), ..Default::default() };
        let read = refused_from_wire(wire);
        assert_eq!(read.refusal, Refusal::EndpointUnreachable);
        assert_eq!(read.detail, "sun-spots: many");
    }
}
