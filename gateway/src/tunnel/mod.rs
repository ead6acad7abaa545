//! QUIC tunnels between gateways: one UDP socket, both roles.

pub mod connection;
pub mod control;
pub mod dialler;
pub mod doorway;
pub mod endpoint;
pub mod registry;
pub mod socket;
pub mod streams;
pub mod udp;
pub mod unreachable;

use quinn::VarInt;
use tombolo_core::refusal::Refusal;
use tombolo_trust::tls::refusal_of_alert;

/// The caller closed in order: drained, superseded, or the process ends.
pub const CLOSE_DONE: VarInt = VarInt::from_u32(0);
/// The connection was refused; the reason is the code of a [`Refusal`].
pub const CLOSE_REFUSED: VarInt = VarInt::from_u32(1);

/// Closes a connection and names the reason to the far end.
pub fn close_refused(connection: &quinn::Connection, refusal: Refusal) {
    connection.close(CLOSE_REFUSED, refusal.code().as_bytes());
}

/// TLS alerts as QUIC carries them: 0x100 plus the alert (RFC 9001 section 4.8).
const ALERT_BASE: u64 = 0x100;

/// The reason behind a connection that ended, as far as it can be told.
pub fn refusal_of(error: &quinn::ConnectionError) -> Refusal {
    use quinn::ConnectionError;
    let of_code = |code: quinn::TransportErrorCode| {
        let alert = u64::from(code).checked_sub(ALERT_BASE).and_then(|alert| u8::try_from(alert).ok());
        alert.and_then(refusal_of_alert).unwrap_or(Refusal::ConnectionLost)
    };
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code == CLOSE_REFUSED => {
            std::str::from_utf8(&close.reason).ok().and_then(Refusal::from_code).unwrap_or(Refusal::ConnectionLost)
        }
        ConnectionError::TransportError(error) => of_code(error.code),
        ConnectionError::ConnectionClosed(close) => of_code(close.error_code),
        ConnectionError::TimedOut => Refusal::Timeout,
        ConnectionError::VersionMismatch
        | ConnectionError::ApplicationClosed(_)
        | ConnectionError::Reset
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => Refusal::ConnectionLost,
    }
}
