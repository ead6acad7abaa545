//! A token bucket. Its own code, because `governor` reads a clock by itself unless it is given one through
//! a trait, and what is needed of it is these few lines.

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// So many requests a second, and so many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    /// 1 to 10,000,000.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub requests_per_second: u32,
    /// What may come at once after a pause; `requestsPerSecond` unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub burst: Option<u32>,
}

impl RateLimit {
    pub fn burst(&self) -> u32 {
        self.burst.unwrap_or(self.requests_per_second).max(1)
    }
}

/// Tokens in thousand-millionths, so that a nanosecond earns a whole number of them.
const ONE: u64 = 1_000_000_000;

/// Takes one token for each request; starts full.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    limit: RateLimit,
    tokens: u64,
    filled: Instant,
}

impl TokenBucket {
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        Self { limit, tokens: u64::from(limit.burst()) * ONE, filled: now }
    }

    pub fn limit(&self) -> RateLimit {
        self.limit
    }

    /// Another limit from now on; what was saved up stays, as far as the new burst allows.
    pub fn set_limit(&mut self, limit: RateLimit, now: Instant) {
        self.fill(now);
        self.limit = limit;
        self.tokens = self.tokens.min(self.full());
    }

    /// Takes a token, or says how long it takes until there is one.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        match self.tokens.checked_sub(ONE) {
            Some(left) => {
                self.tokens = left;
                Ok(())
            }
            None => {
                let rate = u64::from(self.limit.requests_per_second.max(1));
                Err(Duration::from_nanos((ONE - self.tokens).div_ceil(rate)))
            }
        }
    }

    fn full(&self) -> u64 {
        u64::from(self.limit.burst()) * ONE
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let earned = nanos.saturating_mul(self.limit.requests_per_second.into());
        self.tokens = self.tokens.saturating_add(earned).min(self.full());
        self.filled = self.filled.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limit(requests_per_second: u32, burst: u32) -> RateLimit {
        RateLimit { requests_per_second, burst: Some(burst) }
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(limit(10, 3), start);
        assert_eq!((0..9).filter(|_| bucket.take(start).is_ok()).count(), 3);
        assert_eq!(bucket.take(start), Err(Duration::from_millis(100)));
        assert_eq!(bucket.take(start + Duration::from_millis(99)), Err(Duration::from_millis(1)));
        assert_eq!(bucket.take(start + Duration::from_millis(100)), Ok(()));
        bucket.set_limit(limit(1, 1), start + Duration::from_secs(60));
        assert_eq!((0..9).filter(|_| bucket.take(start + Duration::from_secs(60)).is_ok()).count(), 1);
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate_and_never_less(
            rate in 1_u32..10_000, burst in 1_u32..1_000, steps in proptest::collection::vec(0_u64..5_000_000, 1..300)
        ) {
            let start = Instant::now();
            let mut bucket = TokenBucket::new(limit(rate, burst), start);
            let (mut now, mut taken, mut waited) = (start, 0_u64, None);
            for step in steps {
                now += Duration::from_nanos(step);
                match bucket.take(now) {
                    Ok(()) => taken += 1,
                    // Who waits as long as told gets one.
                    Err(wait) => waited = Some(now + wait),
                }
            }
            let seconds = (now - start).as_secs_f64();
            prop_assert!(taken as f64 <= f64::from(burst) + seconds * f64::from(rate) + 1e-6);
            if let Some(at) = waited {
                prop_assert!(bucket.take(at.max(now)).is_ok() || at < now);
            }
        }
    }
}
