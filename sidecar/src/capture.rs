//! Connections that the kernel's packet filter redirected to this sidecar (`tombolo sidecar capture`): applications
//! that know nothing of it call, and are called, through it.

pub mod origin;

/// Where captured outbound connections arrive.
pub const OUTBOUND_PORT: u16 = 15002;
/// Where captured inbound connections arrive.
pub const INBOUND_PORT: u16 = 15006;
/// Where captured DNS queries arrive.
pub const DNS_PORT: u16 = 15053;
/// Inbound legs and the admin port: what connects there means the sidecar itself.
pub const OWN_PORTS: [u16; 2] = [15008, 15020];
