//! Opaque bytes over a leg (ALPN `tombolo/tcp`): one application connection a leg.
//!
//! A leg can be dialled ahead of need: nothing happens at the far side until OPEN arrives, when an
//! application connection takes it. The far sidecar then dials its application and answers OPENED or
//! REFUSED. So a warm leg burns no application connection, and protocols where the server speaks first work.

mod copy;

pub use copy::{Copied, CopyEnd, Ended, copy_both, reset};

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tombolo_api::frame;
use tombolo_api::proto::opaque as wire;
use tombolo_core::refusal::Refusal;
use tombolo_core::trace::TraceParent;

use crate::frame_io::{self, FrameReadError};
use crate::proxy_header::TRACESTATE_MAX;

/// Largest OPEN or answer, without its length.
pub const LENGTH_MAX: usize = 512;
/// How long the octets of one OPEN may take once the first has arrived.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);

/// What opens a leg for one application connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    pub port: u16,
    /// The application's own client, for logs; never for authorization.
    pub client_address: Option<SocketAddr>,
    pub trace: Option<TraceParent>,
    /// Left out when OPEN would become larger than [`LENGTH_MAX`].
    pub tracestate: Option<String>,
}

/// Why a leg could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{refusal}: {detail}")]
pub struct OpenError {
    pub refusal: Refusal,
    pub detail: String,
    /// The far side said so itself, so its application never saw the connection: always safe to retry.
    pub refused: bool,
}

/// Sends OPEN and waits for the answer. The caller bounds the time.
pub async fn open(io: &mut (impl AsyncRead + AsyncWrite + Unpin), open: &Open) -> Result<(), OpenError> {
    let lost = |error: &dyn std::fmt::Display| OpenError {
        refusal: Refusal::ConnectionLost,
        detail: error.to_string(),
        refused: false,
    };
    io.write_all(&encode(open)).await.map_err(|error| lost(&error))?;
    io.flush().await.map_err(|error| lost(&error))?;
    let answer: wire::OpenAnswer = frame_io::read(io, LENGTH_MAX).await.map_err(|error| lost(&error))?;
    if answer.refused.is_empty() {
        return Ok(());
    }
    // A reason of a newer release still is a refusal.
    let refusal = Refusal::from_code(&answer.refused).unwrap_or(Refusal::AppUnreachable);
    Err(OpenError { refusal, detail: format!("the far sidecar refused: {}", answer.refused), refused: true })
}

/// Waits for OPEN: as long as it takes for the first octet, because the leg may be a warm one, then at
/// most five seconds. `None` when the leg ended unused.
pub async fn accept_open(io: &mut (impl AsyncRead + Unpin)) -> Result<Option<Open>, OpenError> {
    let refuse = |refusal, detail: String| OpenError { refusal, detail, refused: false };
    let Some(first) = first_octet(io).await.map_err(|error| refuse(Refusal::ConnectionLost, error.to_string()))? else {
        return Ok(None);
    };
    let mut whole = tokio::io::AsyncReadExt::chain(&first[..], io);
    let message: wire::Open = match timeout(OPEN_DEADLINE, frame_io::read(&mut whole, LENGTH_MAX)).await {
        Ok(Ok(message)) => message,
        Ok(Err(FrameReadError::Frame(error))) => return Err(refuse(Refusal::BadHeader, error.to_string())),
        Ok(Err(FrameReadError::Io(error))) => return Err(refuse(Refusal::ConnectionLost, error.to_string())),
        Err(_) => return Err(refuse(Refusal::HandshakeTimeout, "OPEN was begun and not finished".into())),
    };
    let port = u16::try_from(message.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| refuse(Refusal::BadHeader, "OPEN names no port".into()))?;
    Ok(Some(Open {
        port,
        client_address: message.client_address.parse().ok(),
        trace: message.traceparent.parse().ok(),
        tracestate: Some(message.tracestate).filter(|state| !state.is_empty() && state.len() <= TRACESTATE_MAX),
    }))
}

/// Answers OPENED, or REFUSED with the reason.
pub async fn answer(io: &mut (impl AsyncWrite + Unpin), result: Result<(), Refusal>) -> std::io::Result<()> {
    let refused = result.err().map(|refusal| refusal.code().to_owned()).unwrap_or_default();
    io.write_all(&frame::encode(&wire::OpenAnswer { refused })).await?;
    io.flush().await
}

fn encode(open: &Open) -> Vec<u8> {
    let mut message = wire::Open {
        port: open.port.into(),
        client_address: open.client_address.map(|address| address.to_string()).unwrap_or_default(),
        traceparent: open.trace.map(|trace| trace.to_string()).unwrap_or_default(),
        tracestate: open.tracestate.clone().unwrap_or_default(),
    };
    if prost::Message::encoded_len(&message) > LENGTH_MAX {
        message.tracestate.clear();
    }
    frame::encode(&message)
}

async fn first_octet(io: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Option<[u8; 1]>> {
    let mut first = [0; 1];
    let count = tokio::io::AsyncReadExt::read(io, &mut first).await?;
    Ok((count != 0).then_some(first))
}
