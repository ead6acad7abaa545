//! A WAN in user space: two TUN devices, each in a network namespace, and between them delay, jitter, loss,
//! a rate with a bounded queue, and cuts. It works on IP packets, so TCP, UDP and QUIC are treated alike, and
//! needs no netem in the kernel.

mod conditions;
mod direction;
mod link;

pub use conditions::{Conditions, Side};
pub use direction::Counts;
pub use link::{End, Wan};
