//! The operator's commands: each asks the federation of this cluster over its Unix socket.

pub mod client;
pub mod export;
pub mod join;
pub mod peer;
pub mod status;
pub mod table;
pub mod trust;
