//! Charges legs whose receiver has stopped reading or trickles, and tells the longest-stalled ones to end when the
//! budget is used up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use tokio::sync::oneshot;
use tombolo_core::stall::{Receiver, StallBudget};

/// The stalled legs of this process.
#[derive(Debug, Clone)]
pub struct Stalls {
    window: u64,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    budget: StallBudget<u64>,
    resets: BTreeMap<u64, oneshot::Sender<()>>,
    next: u64,
}

impl Stalls {
    pub fn new(window: u64, budget: u64) -> Self {
        let budget = StallBudget::new(window, budget);
        Self { window, inner: Arc::new(Mutex::new(Inner { budget, resets: BTreeMap::new(), next: 0 })) }
    }

    /// Watches one receiver, which keeps up so far.
    pub fn receiver(&self) -> Receiver {
        Receiver::new(self.window)
    }

    /// Charges one leg that has been stalled since `since`, until the charge is dropped.
    pub fn charge(&self, since: Instant) -> Charge {
        let (sender, reset) = oneshot::channel();
        let mut inner = self.lock();
        let leg = inner.next;
        inner.next += 1;
        inner.resets.insert(leg, sender);
        for victim in inner.budget.handle_stalled(leg, since) {
            if let Some(sender) = inner.resets.remove(&victim) {
                // A leg that has just moved on is gone already.
                let _ = sender.send(());
            }
        }
        Charge { leg, reset, stalls: self.clone() }
    }

    /// Legs that are stalled now.
    pub fn stalled(&self) -> usize {
        self.lock().budget.stalled()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the stall budget")
    }
}

/// One window of the budget, held by one stalled leg.
#[derive(Debug)]
pub struct Charge {
    leg: u64,
    reset: oneshot::Receiver<()>,
    stalls: Stalls,
}

impl Charge {
    /// Completes when this leg has to be reset to give memory back.
    pub async fn reset(&mut self) {
        if (&mut self.reset).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut inner = self.stalls.lock();
        inner.budget.handle_progress(self.leg);
        inner.resets.remove(&self.leg);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures::FutureExt;
    use std::time::Duration;

    #[test]
    fn the_longest_stalled_leg_is_told_and_charges_are_given_back() {
        let now = Instant::now();
        let stalls = Stalls::new(10, 20);
        let mut first = stalls.charge(now);
        let second = stalls.charge(now + Duration::from_millis(1));
        assert!(first.reset().now_or_never().is_none());
        let mut third = stalls.charge(now + Duration::from_millis(2));
        assert!(first.reset().now_or_never().is_some());
        assert!(third.reset().now_or_never().is_none());
        drop((first, second, third));
        assert_eq!(stalls.stalled(), 0);
    }
}
