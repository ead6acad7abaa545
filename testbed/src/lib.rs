//! Clusters as real processes on loopback, each made of the `tombolo` binary's roles with free ports and
//! state in a directory of its own. The demo, the end-to-end tests and the benches are built on it.

mod cluster;
pub mod helm;
pub mod http;
mod jaeger;
pub mod kubernetes;
mod namespace;
mod process;
pub mod terraform;

pub use cluster::{Announced, Cluster, Sidecar};
pub use jaeger::Jaeger;
pub use namespace::Namespace;
pub use process::{Binary, Process};
