//! How often one source may ask: a bucket for each, refilled with time.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Requests that a source may make at once ...
const BURST: u32 = 200;
/// ... and how long it then waits for each further one.
const REFILL: Duration = Duration::from_millis(25);
/// Sources that are remembered. Above it, new ones share what is left: nothing.
const SOURCES_MAX: usize = 4_096;

/// Admits requests by source.
pub struct Admission<S> {
    /// For each source, when its bucket will be full again.
    full_at: HashMap<S, Instant>,
}

impl<S> Default for Admission<S> {
    fn default() -> Self {
        Self { full_at: HashMap::new() }
    }
}

impl<S: Hash + Eq> Admission<S> {
    /// Whether a request of `source` may go on now; takes one from its bucket if so.
    pub fn admits(&mut self, source: S, now: Instant) -> bool {
        if self.full_at.len() >= SOURCES_MAX && !self.full_at.contains_key(&source) {
            self.full_at.retain(|_, full_at| *full_at > now);
            if self.full_at.len() >= SOURCES_MAX {
                return false;
            }
        }
        let full_at = self.full_at.entry(source).or_insert(now);
        let next = (*full_at).max(now) + REFILL;
        let admitted = next <= now + REFILL * BURST;
        if admitted {
            *full_at = next;
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_has_a_burst_and_then_a_rate_of_its_own() {
        let (mut admission, now) = (Admission::default(), Instant::now());
        for _ in 0..BURST {
            assert!(admission.admits("a", now));
        }
        assert!(!admission.admits("a", now));
        assert!(admission.admits("b", now), "another source is not affected");
        assert!(admission.admits("a", now + REFILL));
        assert!(!admission.admits("a", now + REFILL));
        let later = now + REFILL * BURST * 2;
        assert_eq!((0..BURST * 2).filter(|_| admission.admits("a", later)).count(), BURST as usize);
    }

    #[test]
    fn the_number_of_sources_is_bounded_and_idle_ones_make_room() {
        let (mut admission, now) = (Admission::default(), Instant::now());
        for source in 0..SOURCES_MAX {
            assert!(admission.admits(source, now));
        }
        assert!(!admission.admits(SOURCES_MAX, now));
        assert!(admission.admits(SOURCES_MAX, now + REFILL));
        assert_eq!(admission.full_at.len(), 1);
    }
}
