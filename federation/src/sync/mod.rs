//! Peer sync: what this cluster publishes to its peers ([`publisher`]), and what it takes from them
//! ([`subscriber`]). Both run over ordinary inner legs between the two federations.

pub mod durable;
mod keeping;
pub mod publisher;
pub mod subscriber;
#[cfg(test)]
mod tests;
pub mod wire;

use std::time::Duration;

/// How often a publisher says that it is there.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(2);
/// Silence after which a subscriber gives its stream up and begins a new one.
pub const STREAM_SILENCE_MAX: Duration = Duration::from_secs(7);
