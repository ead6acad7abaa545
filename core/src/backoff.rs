//! Jittered exponential back-off. The randomness is an argument, so that a schedule can be replayed.

use std::time::Duration;

/// Doubles from `first` up to `longest`; each wait is drawn from the upper half of its step, so that
/// many clients that lost the same server don't come back in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    attempts: u32,
}

impl Backoff {
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, attempts: 0 }
    }

    /// How long to wait before the next attempt. `random` is uniform in `0.0..1.0`.
    pub fn next_wait(&mut self, random: f64) -> Duration {
        let doubled = self.first.saturating_mul(1u32.checked_shl(self.attempts).unwrap_or(u32::MAX));
        let step = doubled.min(self.longest);
        self.attempts = self.attempts.saturating_add(1).min(31);
        step.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// After a success the next failure starts from the shortest wait again.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<u128> = (0..6).map(|_| backoff.next_wait(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next_wait(1.0), Duration::from_millis(100));
    }

    #[test]
    fn jitter_stays_in_the_upper_half_of_the_step() {
        for random in [0.0, 0.3, 0.999, 7.0, -1.0] {
            let wait = Backoff::new(Duration::from_millis(100), Duration::from_secs(1)).next_wait(random);
            assert!((50..=100).contains(&wait.as_millis()), "{random}: {wait:?}");
        }
    }

    #[test]
    fn it_never_overflows() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        for _ in 0..1000 {
            assert!(backoff.next_wait(1.0) <= Duration::from_secs(30));
        }
    }
}
