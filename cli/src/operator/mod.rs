//! The operator's commands: all but `crds` ask the federation of this cluster over its Unix socket.

pub mod client;
pub mod crds;
pub mod explain;
pub mod export;
pub mod join;
pub mod peer;
pub mod status;
pub mod table;
pub mod trust;
