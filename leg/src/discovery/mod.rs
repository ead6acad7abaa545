//! The clients of federation's discovery service. Each keeps one stream, reconnects with jittered
//! back-off, subscribes again, and keeps what was known while the federation is away.

mod model;

pub use model::*;
