//! The east-west gateway: QUIC tunnels to the gateways of other clusters, and legs routed by the SNI of
//! their ClientHello. It holds no workload's key and decrypts nothing; what workloads without a sidecar bring to the listeners of
//! [`unmeshed`], where these are allowed, comes in plaintext.

pub mod config;
pub mod copy;
pub mod delivery;
pub mod gateway;
pub mod ingress;
pub mod meters;
pub mod peering;
mod reports;
mod resolver;
mod run;
pub mod snapshot;
pub mod sources;
pub mod stalls;
pub mod tunnel;
pub mod unmeshed;
pub mod watch;

pub use config::Config;
pub use run::run;
