//! Circuit breakers: how much of one service may be under way from here at once. What is above a bound is refused at
//! once, and counted as `circuit-open`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tombolo_core::refusal::Refusal;

use super::refuse::Refused;

/// The bounds of one port of one service.
#[derive(Debug, Default)]
pub struct Breaker {
    pub connections: Arc<Bounded>,
    pub requests: Arc<Bounded>,
    /// Requests that wait for a leg.
    pub pending: Arc<Bounded>,
}

impl Breaker {
    /// `None` is no bound.
    pub fn set(&self, connections: Option<u32>, requests: Option<u32>, pending: Option<u32>) {
        for (bounded, max) in [(&self.connections, connections), (&self.requests, requests), (&self.pending, pending)] {
            bounded.max.store(max.unwrap_or(UNBOUNDED), Ordering::Relaxed);
        }
    }
}

const UNBOUNDED: u32 = u32::MAX;

/// Counts what is under way, up to a bound that may change meanwhile.
#[derive(Debug)]
pub struct Bounded {
    under_way: AtomicU32,
    max: AtomicU32,
}

impl Default for Bounded {
    fn default() -> Self {
        Self { under_way: AtomicU32::new(0), max: AtomicU32::new(UNBOUNDED) }
    }
}

/// Under way until it is dropped.
#[derive(Debug)]
pub struct Entered(Option<Arc<Bounded>>);

impl Bounded {
    /// One more, if there is room. `what` is named in the refusal.
    pub fn enter(self: &Arc<Self>, what: &str) -> Result<Entered, Refused> {
        let max = self.max.load(Ordering::Relaxed);
        if max == UNBOUNDED {
            // Nobody looks at the count, and services without a bound are not to pay for it.
            return Ok(Entered(None));
        }
        let entered = Entered(Some(self.clone()));
        if let Some(refused) = above(self.under_way.fetch_add(1, Ordering::Relaxed), max, what) {
            drop(entered);
            return Err(refused);
        }
        Ok(entered)
    }

    /// What [`enter`](Self::enter) would refuse one more with.
    pub fn refuses(&self, what: &str) -> Option<Refused> {
        above(self.under_way.load(Ordering::Relaxed), self.max()?, what)
    }

    /// The bound, if there is one.
    pub fn max(&self) -> Option<u32> {
        Some(self.max.load(Ordering::Relaxed)).filter(|max| *max != UNBOUNDED)
    }
}

fn above(under_way: u32, max: u32, what: &str) -> Option<Refused> {
    (under_way >= max).then(|| Refused::new(Refusal::CircuitOpen, format!("{max} {what} at once")))
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(bounded) = &self.0 {
            bounded.under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_above_the_bound_is_refused_until_something_ends() {
        let breaker = Breaker::default();
        let before = breaker.requests.enter("requests").unwrap();
        breaker.set(None, Some(2), None);
        let held = [breaker.requests.enter("requests").unwrap(), breaker.requests.enter("requests").unwrap()];
        let refused = breaker.requests.enter("requests").unwrap_err();
        assert_eq!((refused.refusal, refused.status().as_u16()), (Refusal::CircuitOpen, 503));
        assert!(breaker.connections.enter("connections").is_ok());
        drop(before);
        assert!(breaker.requests.enter("requests").is_err(), "what came before the bound is not counted");
        assert_eq!(breaker.requests.refuses("requests"), Some(refused), "what is asked before is what is said then");
        drop(held);
        assert_eq!((breaker.requests.refuses("requests"), breaker.requests.max()), (None, Some(2)));
        assert!(breaker.requests.enter("requests").is_ok());
        breaker.set(None, None, None);
        assert!(breaker.requests.enter("requests").is_ok());
    }
}
