//! The clients of federation's discovery service. Each keeps one stream, reconnects with jittered
//! back-off, subscribes again, and keeps what was known while the federation is away.

mod gateway;
mod link;
mod memory;
mod model;
mod sidecar;

pub use gateway::{GatewayDiscovery, GatewayHello, ReportsFull};
pub use link::{Federation, LinkStatus};
pub use memory::AGE_MAX as MEMORY_AGE_MAX;
pub use model::*;
pub use sidecar::{SUBSCRIPTIONS_MAX, SidecarDiscovery, Subscription, TooManySubscriptions, Verdicts};
