//! Gateways over real loopback sockets, with real SVIDs, fed with snapshots made by hand.
#![allow(clippy::unwrap_used)]

mod door;
mod legs;
mod links;
mod names;
mod peering;
mod process;
mod support;
mod watch;
