//! The memory that legs may hold whose receiver has stopped reading, or only trickles.
//!
//! What waits for a stalled receiver can't be seen per stream, so each stalled leg is charged a whole
//! stream window. Above the budget the longest-stalled legs are reset. [`Receiver`] says when a leg is stalled,
//! [`StallBudget`] which ones have to go.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A receiver that takes nothing for this long is stalled. Shorter waits are ordinary back-pressure.
pub const STALLED_AFTER: Duration = Duration::from_millis(500);

/// A receiver that lags all this time without taking one whole window is stalled too, however busily it trickles.
pub const TRICKLES_AFTER: Duration = Duration::from_secs(5);

/// Whether one receiver keeps up with what comes for it.
#[derive(Debug)]
pub struct Receiver {
    window: u64,
    lag: Option<Lag>,
}

/// A receiver that has left something waiting since `since`, or since it last took a whole window.
#[derive(Debug, Clone, Copy)]
struct Lag {
    since: Instant,
    /// Octets taken since then.
    taken: u64,
    progress: Instant,
}

impl Receiver {
    /// `window` octets can wait for it.
    pub fn new(window: u64) -> Self {
        Self { window: window.max(1), lag: None }
    }

    /// It takes no more for now.
    pub fn handle_blocked(&mut self, now: Instant) {
        self.lag.get_or_insert(Lag { since: now, taken: 0, progress: now });
    }

    pub fn handle_taken(&mut self, octets: u64, now: Instant) {
        let Some(lag) = &mut self.lag else { return };
        lag.progress = now;
        lag.taken = lag.taken.saturating_add(octets);
        if lag.taken >= self.window {
            *lag = Lag { since: now, taken: 0, progress: now };
        }
    }

    /// Nothing waits for it any more.
    pub fn handle_caught_up(&mut self) {
        self.lag = None;
    }

    pub fn lags(&self) -> bool {
        self.lag.is_some()
    }

    /// When it counts as stalled if it takes nothing until then; never while it keeps up.
    pub fn stalls_at(&self) -> Option<Instant> {
        self.lag.map(|lag| (lag.progress + STALLED_AFTER).min(lag.since + TRICKLES_AFTER))
    }

    /// Since when it is stalled, if it is.
    pub fn stalled_since(&self, now: Instant) -> Option<Instant> {
        self.lag.filter(|_| self.stalls_at().is_some_and(|at| at <= now)).map(|lag| lag.since)
    }
}

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

    /// Milliseconds at which a receiver is blocked, and what it takes when; whether it is stalled at the end.
    #[track_caller]
    fn check(steps: &[(u64, u64)], end: u64, want: Option<u64>) {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut receiver = Receiver::new(1000);
        receiver.handle_blocked(at(0));
        for (ms, octets) in steps {
            receiver.handle_taken(*octets, at(*ms));
            receiver.handle_blocked(at(*ms));
        }
        assert_eq!(receiver.stalled_since(at(end)), want.map(at));
    }

    #[test]
    fn who_takes_nothing_is_stalled_after_half_a_second() {
        check(&[], 499, None);
        check(&[], 500, Some(0));
        check(&[(400, 10)], 899, None);
        check(&[(400, 10)], 900, Some(0));
    }

    #[test]
    fn who_trickles_is_stalled_after_five_seconds() {
        let trickle: Vec<_> = (1..50).map(|n| (n * 100, 1)).collect();
        check(&trickle, 4_999, None);
        check(&trickle, 5_000, Some(0));
    }

    #[test]
    fn who_takes_whole_windows_is_slow_and_not_stalled() {
        let steady: Vec<_> = (1..100).map(|n| (n * 100, 25)).collect();
        check(&steady, 9_999, None);
    }

    #[test]
    fn who_catches_up_begins_anew() {
        let now = Instant::now();
        let mut receiver = Receiver::new(1000);
        receiver.handle_blocked(now);
        receiver.handle_caught_up();
        assert!(!receiver.lags());
        assert_eq!(receiver.stalls_at(), None);
        receiver.handle_taken(5, now);
        assert_eq!(receiver.stalled_since(now + TRICKLES_AFTER), None);
    }

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
        assert!(budget.handle_stalled(3, now).is_empty());
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
