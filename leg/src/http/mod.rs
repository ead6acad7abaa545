//! Requests over a leg (ALPN `h2`), both ends of it.
//!
//! Built on the `h2` crate itself: a client needs PINGs of its own to notice a dead path while a request
//! waits, and windows chosen so that a stalled body holds up nobody. Bodies stream both ways under HTTP/2
//! flow control; nothing is collected.

mod body;
mod client;
mod driver;
mod expect;
pub mod headers;
mod records;
mod server;
pub mod upgrade;

pub use body::{RecvBody, StreamError};
pub use client::{HttpLeg, SendError, SendErrorKind};
pub use driver::{LegHealth, PING_AFTER, SUSPECT_AFTER};
pub use expect::ContinueSignal;
pub use server::{Abandon, Serve, ServeError, serve};

/// Any error of a body that is passed through.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Requests that share one leg at most; also what each end announces (`SETTINGS_MAX_CONCURRENT_STREAMS`).
pub const STREAMS_MAX: u32 = 64;
/// Octets that one stream may have under way unread. A leg of one stream over 100 ms carries 40 Mbit/s.
pub const STREAM_WINDOW: u32 = 512 * 1024;
/// Largest header section, names and values and 32 octets each (RFC 9113 section 10.5.1).
pub const HEADERS_MAX: u32 = 64 * 1024;
/// A leg that has carried more than this in one stream takes no new requests until that stream is done.
pub const BULK_FROM: u64 = 1024 * 1024;
/// Largest DATA frame that is accepted.
const FRAME_MAX: u32 = 64 * 1024;
/// Octets that h2 keeps for one stream beyond what the peer's window lets out.
const SEND_BUFFER: usize = 64 * 1024;

/// Bounds of one leg. The connection window always is streams x stream window, so that the octets of
/// stalled streams never use up what the others need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    pub streams: u32,
    pub stream_window: u32,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self { streams: STREAMS_MAX, stream_window: STREAM_WINDOW }
    }
}

impl HttpLimits {
    /// At most 2^31 - 1 (RFC 9113 section 6.9.1).
    fn connection_window(self) -> u32 {
        self.streams.saturating_mul(self.stream_window).min((1 << 31) - 1)
    }
}
