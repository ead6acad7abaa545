//! The inner leg: a mutually authenticated TLS 1.3 connection from one sidecar to another, straight or
//! through gateways that can't read it, and what runs inside it.
//!
//! - [`dial`] and [`accept`] make the two ends of a leg; [`proxy_header`], [`status`] and
//!   [`client_hello`] are what a gateway and a sidecar say to each other before its first TLS byte.
//! - [`http`] carries requests over a leg (ALPN `h2`), [`opaque`] carries bytes (ALPN `tombolo/tcp`).
//! - [`discovery`] and [`watch`] keep up with what federation and the gateways announce.
//!
//! Nothing here counts or logs refusals: they are returned, typed, and the roles count them.

pub mod accept;
pub mod client_hello;
pub mod credentials;
pub mod dial;
pub mod discovery;
mod frame_io;
pub mod http;
pub mod opaque;
pub mod proxy_header;
pub mod status;
pub mod watch;

/// What is spoken inside a leg, agreed by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Alpn {
    /// HTTP/2: requests of one client identity for one port of one service, multiplexed.
    H2,
    /// Opaque bytes of one application connection.
    Tcp,
}

impl Alpn {
    pub const ALL: [Alpn; 2] = [Alpn::H2, Alpn::Tcp];

    /// The protocol's name as it stands in the ClientHello.
    pub fn as_bytes(self) -> &'static [u8] {
        match self {
            Alpn::H2 => b"h2",
            Alpn::Tcp => b"tombolo/tcp",
        }
    }

    pub fn from_bytes(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.as_bytes() == name)
    }
}
