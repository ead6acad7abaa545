//! The federation role: one cluster's control plane.
//!
//! One task owns the mutable state ([`hub`]); servers and clients around it send it inputs over a
//! bounded channel and read immutable snapshots.

pub mod addresses;
pub mod backup;
pub mod config;
pub mod discovery;
mod dns;
pub mod hub;
pub mod identity;
pub mod kubernetes;
pub mod mcs;
pub mod operator;
pub mod peering;
pub mod registry;
pub mod replica;
pub mod report;
mod run;
pub mod source;
pub mod store;
pub mod sync;
#[cfg(test)]
mod testing;
pub mod webhook;

pub use config::Config;
pub use run::{ROLE, run};
