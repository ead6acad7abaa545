//! Connections of the sidecar's own that the packet filter sends back to it, because the rules do not exclude it.
//! Each would make the next, without an end.
//!
//! A connection is known by its two ends, as its maker sees them. The kernel never has two at once with the same ends,
//! so one that was taken here and has the ends of one that was made here is that one.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whoever made the connection, and where it was going.
type Ends = (SocketAddr, SocketAddr);

/// The connections of one sidecar that are passed on. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Loops(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    taken: HashMap<Ends, u32>,
    made: HashMap<Ends, u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Taken,
    Made,
}

/// It was made here, and taken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a connection of this sidecar came back to it")]
pub struct IsLoop;

/// Remembers one end until it is dropped.
#[derive(Debug)]
pub struct Remembered {
    loops: Loops,
    side: Side,
    ends: Ends,
}

impl Loops {
    /// A connection was taken from `peer`, which was going to `origin`. Whichever of the two sides is told second
    /// finds the loop, so it does not matter which it is.
    pub fn taken(&self, peer: SocketAddr, origin: SocketAddr) -> Result<Remembered, IsLoop> {
        self.remember(Side::Taken, (peer, origin))
    }

    /// A connection was made from `local` to `destination`.
    pub fn made(&self, local: SocketAddr, destination: SocketAddr) -> Result<Remembered, IsLoop> {
        self.remember(Side::Made, (local, destination))
    }

    fn remember(&self, side: Side, ends: Ends) -> Result<Remembered, IsLoop> {
        let mut known = self.lock();
        let Known { taken, made } = &mut *known;
        let (own, other) = if side == Side::Taken { (taken, made) } else { (made, taken) };
        if other.contains_key(&ends) {
            return Err(IsLoop);
        }
        *own.entry(ends).or_default() += 1;
        Ok(Remembered { loops: self.clone(), side, ends })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        let mut known = self.loops.lock();
        let own = if self.side == Side::Taken { &mut known.taken } else { &mut known.made };
        if let Some(count) = own.get_mut(&self.ends) {
            *count -= 1;
            if *count == 0 {
                own.remove(&self.ends);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn whoever_comes_second_finds_the_loop() {
        let (near, far) = ("10.0.0.1:4000".parse().unwrap(), "192.0.2.1:80".parse().unwrap());
        let loops = Loops::default();
        let taken = loops.taken(near, far).unwrap();
        assert_eq!(loops.made(near, far).unwrap_err(), IsLoop);
        drop(taken);
        let made = loops.made(near, far).unwrap();
        assert_eq!(loops.taken(near, far).unwrap_err(), IsLoop);
        drop(made);
        assert!(loops.lock().made.is_empty() && loops.lock().taken.is_empty());
    }

    #[test]
    fn connections_that_share_one_end_are_no_loop() {
        let (near, far) = ("10.0.0.1:4000".parse().unwrap(), "192.0.2.1:80".parse().unwrap());
        let (other, elsewhere) = ("10.0.0.1:4001".parse().unwrap(), "192.0.2.2:80".parse().unwrap());
        let loops = Loops::default();
        let _taken = loops.taken(near, far).unwrap();
        // The kernel gives a port again as long as the destinations differ.
        let _same_port = loops.made(near, elsewhere).unwrap();
        let _same_destination = loops.made(other, far).unwrap();
        let _same_again = loops.taken(near, far).unwrap();
    }
}
