//! The operator's commands: all but `crds`, `backup` and `restore` ask a process of this cluster: its federation over the
//! Unix socket, `explain` a sidecar.

pub mod backup;
pub mod check;
pub mod client;
pub mod crds;
pub mod explain;
pub mod export;
pub mod join;
pub mod peer;
pub mod status;
pub mod table;
pub mod trust;
