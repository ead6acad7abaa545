//! The memory that legs may hold whose receiver has stopped reading.
//!
//! What waits for a stalled receiver can't be seen per stream, so each stalled leg is charged a whole
//! stream window. Above the budget the longest-stalled legs are reset.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// Which stalled legs are charged, and since when. `K` names a leg.
#[derive(Debug)]
pub struct StallBudget<K> {
    window: u64,
    budget: u64,
    since: BTreeMap<K, Instant>,
    by_age: BTreeSet<(Instant, K)>,
}

impl<K: Copy + Ord> StallBudget<K> {
    /// `window` octets are charged for each stalled leg; all together stay within `budget` octets.
    pub fn new(window: u64, budget: u64) -> Self {
        Self { window: window.max(1), budget, since: BTreeMap::new(), by_age: BTreeSet::new() }
    }

    /// A leg has made no downstream progress since `since`. Returns the legs to reset, longest-stalled first;
    /// they are no longer charged.
    pub fn handle_stalled(&mut self, leg: K, since: Instant) -> Vec<K> {
        if self.since.contains_key(&leg) {
            return Vec::new();
        }
        self.since.insert(leg, since);
        self.by_age.insert((since, leg));
        let mut victims = Vec::new();
        while self.charged() > self.budget {
            let Some((_, victim)) = self.by_age.pop_first() else { break };
            self.since.remove(&victim);
            victims.push(victim);
        }
        victims
    }

    /// The leg moved on, or is gone.
    pub fn handle_progress(&mut self, leg: K) {
        if let Some(since) = self.since.remove(&leg) {
            self.by_age.remove(&(since, leg));
        }
    }

    /// Octets charged now.
    pub fn charged(&self) -> u64 {
        self.window.saturating_mul(self.since.len() as u64)
    }

    pub fn stalled(&self) -> usize {
        self.since.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_longest_stalled_leg_goes_first() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut budget = StallBudget::new(10, 30);
        assert_eq!(budget.handle_stalled('b', at(1)), []);
        assert_eq!(budget.handle_stalled('a', at(2)), []);
        assert_eq!(budget.handle_stalled('c', at(3)), []);
        assert_eq!(budget.handle_stalled('d', at(4)), ['b']);
        assert_eq!(budget.charged(), 30);
        assert_eq!(budget.handle_stalled('e', at(5)), ['a']);
    }

    #[test]
    fn progress_gives_the_charge_back() {
        let now = Instant::now();
        let mut budget = StallBudget::new(10, 20);
        budget.handle_stalled(1, now);
        budget.handle_stalled(2, now);
        budget.handle_progress(1);
        budget.handle_progress(1);
        assert_eq!((budget.charged(), budget.stalled()), (10, 1));
        assert_eq!(budget.handle_stalled(3, now), []);
    }

    #[test]
    fn a_leg_is_charged_once() {
        let now = Instant::now();
        let mut budget = StallBudget::new(10, 20);
        budget.handle_stalled(1, now);
        budget.handle_stalled(1, now + Duration::from_secs(1));
        assert_eq!(budget.charged(), 10);
    }

    #[test]
    fn a_budget_below_one_window_lets_nothing_stall() {
        assert_eq!(StallBudget::new(10, 5).handle_stalled(1, Instant::now()), [1]);
    }
}
