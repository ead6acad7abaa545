//! Peer sync: what this cluster publishes to its peers, and what it takes from them.

pub mod durable;
pub mod wire;
