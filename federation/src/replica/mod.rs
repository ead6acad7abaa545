//! Several replicas of one federation, each of which answers its own sidecars and gateways.
//!
//! What is durable every replica reads from the objects that hold it ([`crate::store::objects`]). The rest is a stream
//! between each follower and the leader: the follower tells what is connected to it, the leader what is connected to all
//! the others, and every update that a peer sends, as it came. So all of them know the same, peers see one subscriber, and
//! whoever takes over goes on where the last leader was. Legs of peer sync that arrive at a follower are passed on to the
//! leader, unread.

mod follower;
mod leader;
mod legs;
mod sessions;
#[cfg(test)]
mod tests;
mod wire;

pub use follower::Follower;
pub use leader::ReplicaService;
pub use legs::pass_legs_on;

/// Messages between a stream and its connection.
const MESSAGES_MAX: usize = 64;
/// Largest message: an export with ten thousand endpoints.
const MESSAGE_OCTETS_MAX: usize = 16 * 1024 * 1024;
/// Peering commands for gateways of another replica that wait.
const ORDERS_MAX: usize = 64;
