//! The clients of federation's discovery service. Each keeps one stream, reconnects with jittered
//! back-off, subscribes again, and keeps what was known while the federation is away.

mod gateway;
mod link;
mod model;
mod sidecar;

pub use gateway::{GatewayDiscovery, GatewayHello, ReportsFull};
pub use link::{Federation, LinkStatus};
pub use model::*;
pub use sidecar::{SUBSCRIPTIONS_MAX, SidecarDiscovery, Subscription, TooManySubscriptions, Verdicts};
