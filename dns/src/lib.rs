//! The DNS server beside applications: answers names of the clusterset, relays all others.
//!
//! What is answered under `clusterset.local` is decided in `tombolo_core::dns`, from what a [`Zone`] knows. Messages for
//! other names go to the upstream resolvers as they came and come back as they were answered, record types and EDNS
//! options that nobody here has heard of included; only their id is replaced, so that ordinary names work as before,
//! whether or not the mesh does.
//!
//! - [`message`] reads what has to be known of any message, and no more.
//! - [`cache`] keeps answers of upstream resolvers for as long as these allow.
//! - [`upstream`] says who they are, and asks them.
//! - [`loops`] finds out which of them ask back here.
//! - [`zone`] makes messages of decisions, [`server`] owns the sockets.

pub mod cache;
pub mod loops;
pub mod message;
pub mod server;
pub mod upstream;
pub mod zone;

pub use server::{DnsServer, Event, Sockets, run};
pub use upstream::Upstreams;
pub use zone::Zone;
