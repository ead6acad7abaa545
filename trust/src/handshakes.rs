//! Bounds what is unfinished at a listener that anybody can reach. Who is new is never made to wait: when all
//! places are taken, the oldest loses its own. A handshake takes milliseconds, so whoever is honest is done long
//! before it could be the oldest of hundreds, while connections that dribble displace one another.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::oneshot;

/// The places of one listener. Clones share them.
#[derive(Debug, Clone)]
pub struct Handshakes {
    max: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    /// Dropping a sender displaces its place. Oldest first.
    places: BTreeMap<u64, oneshot::Sender<()>>,
}

/// One place, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    number: u64,
    handshakes: Handshakes,
    displaced: oneshot::Receiver<()>,
}

/// The place was needed for somebody newer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many handshakes are under way, and this was the oldest")]
pub struct Displaced;

impl Handshakes {
    pub fn new(max: usize) -> Self {
        Self { max: max.max(1), taken: Arc::default() }
    }

    /// Takes a place, if need be that of the oldest.
    pub fn begin(&self) -> Place {
        let (keep, displaced) = oneshot::channel();
        let mut taken = self.lock();
        if taken.places.len() >= self.max {
            taken.places.pop_first();
        }
        let number = taken.next;
        taken.next += 1;
        taken.places.insert(number, keep);
        drop(taken);
        Place { number, handshakes: self.clone(), displaced }
    }

    /// How many places are taken.
    pub fn under_way(&self) -> usize {
        self.lock().places.len()
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Runs a handshake for as long as it has this place.
    pub async fn run<T>(mut self, handshake: impl Future<Output = T>) -> Result<T, Displaced> {
        tokio::select! {
            biased;
            done = handshake => Ok(done),
            _ = &mut self.displaced => Err(Displaced),
        }
    }

    /// Ready once the place is lost.
    pub fn poll_displaced(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.displaced).poll(cx).map(drop)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.handshakes.lock().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn the_oldest_makes_room() {
        let handshakes = Handshakes::new(2);
        let (oldest, second) = (handshakes.begin(), handshakes.begin());
        let third = handshakes.begin();
        assert_eq!(oldest.run(std::future::pending::<()>()).await, Err(Displaced));
        assert_eq!(second.run(async { 2 }).await, Ok(2));
        // The place of who has finished is free: nobody is displaced for the next.
        let fourth = handshakes.begin();
        assert_eq!(third.run(async { 3 }).await, Ok(3));
        assert_eq!(fourth.run(async { 4 }).await, Ok(4));
        assert!(handshakes.lock().places.is_empty());
    }
}
