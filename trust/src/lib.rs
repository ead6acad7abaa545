//! SPIFFE at work: a certificate authority, SVIDs and their renewal, trust bundles, and TLS that verifies
//! each peer against the bundle of its own trust domain and against no other.
//!
//! What is refused is returned as [`tombolo_core::refusal::Refusal`]; the roles count it.

pub mod atomic;
pub mod bundle;
pub mod ca;
mod certificate;
pub mod grpc;
pub mod handshakes;
pub mod identity;
pub mod issuer;
pub mod key;
pub mod peering;
pub mod store;
pub mod svid;
pub mod tls;
