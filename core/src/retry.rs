//! What may be tried a second time, how often, and until when.
//!
//! A try that the application can't have seen is always safe to repeat. After that only a request that is
//! idempotent (RFC 9110 section 9.2.2) and whose body is still at hand is, and only out of a budget, so
//! that second tries never become the load that keeps a service down.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde::Serialize;

/// A request body is kept for a second try up to this many octets; beyond it, it is only passed on.
pub const REPLAY_MAX: usize = 64 * 1024;

/// How far a try had come when it ended without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// No inner leg, or it ended before its handshake did: nothing was sent.
    NotSent,
    /// The far side says that the application never got it (REFUSED_STREAM, GOAWAY below the stream).
    Refused,
    /// Sent, and nothing is known of what the application did with it.
    Sent,
    /// The response had begun.
    ResponseBegun,
}

/// What is left of the request's body on this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyState {
    /// There is none, none of it was read, or all that was read is kept.
    Replayable,
    /// More was passed on than is kept.
    Spent,
}

/// Whether one more try is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The application never got it: no budget is needed.
    Free,
    /// Idempotent: out of the budget.
    Budgeted,
    No(Reason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    BodySpent,
    NotIdempotent,
    ResponseBegun,
}

/// Methods that may be repeated (RFC 9110 section 9.2.2), among those that are registered as such.
pub fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
}

/// Whether a request whose try ended at `progress` may be tried again.
pub fn judge(progress: Progress, idempotent: bool, body: BodyState) -> Verdict {
    match (progress, body) {
        (Progress::ResponseBegun, _) => Verdict::No(Reason::ResponseBegun),
        (_, BodyState::Spent) => Verdict::No(Reason::BodySpent),
        (Progress::NotSent | Progress::Refused, BodyState::Replayable) => Verdict::Free,
        (Progress::Sent, BodyState::Replayable) if idempotent => Verdict::Budgeted,
        (Progress::Sent, BodyState::Replayable) => Verdict::No(Reason::NotIdempotent),
    }
}

/// How many tries there are, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// The first included; at least 1.
    pub tries: u32,
    /// For one try, connection set-up included.
    pub per_try: Option<Duration>,
    /// For all tries together.
    pub total: Option<Duration>,
}

impl Schedule {
    /// Until when the try numbered `number` (from 1) may last, if there is one. `began` is when the
    /// request came.
    pub fn deadline(&self, number: u32, began: Instant, now: Instant) -> Result<Option<Instant>, Exhausted> {
        if number > self.tries.max(1) {
            return Err(Exhausted::Tries);
        }
        let end = self.total.map(|total| began + total);
        if end.is_some_and(|end| now >= end) {
            return Err(Exhausted::Time);
        }
        let own = self.per_try.map(|per_try| now + per_try);
        Ok(match (own, end) {
            (Some(own), Some(end)) => Some(own.min(end)),
            (own, end) => own.or(end),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exhausted {
    #[error("all tries are used up")]
    Tries,
    #[error("the time for this request is used up")]
    Time,
}

/// Second tries of one service: a share of its requests, and a few a second beside, so that a service
/// with little traffic has some too. Every request touches it, so that it has no lock.
#[derive(Debug)]
pub struct RetryBudget {
    /// Thousandths of a second try, so that sums are exact.
    share: AtomicU64,
    /// What is earned without a request, a second.
    free: AtomicU64,
    tokens: AtomicU64,
    base: Instant,
    /// Milliseconds since `base` until which the free ones were earned.
    filled_ms: AtomicU64,
}

/// Second tries a second that need no requests to be earned.
const FREE_PER_SECOND: u64 = 10;
/// What can be saved up: ten seconds of the free ones and as many again earned by requests.
const TOKENS_MAX: u64 = 200 * ONE;
const ONE: u64 = 1_000;

impl RetryBudget {
    /// `share` is the number of second tries that each request earns, 0.2 for one in five.
    pub fn new(share: f64, now: Instant) -> Self {
        Self {
            share: AtomicU64::new(thousandths(share)),
            free: AtomicU64::new(FREE_PER_SECOND),
            tokens: AtomicU64::new(10 * FREE_PER_SECOND * ONE),
            base: now,
            filled_ms: AtomicU64::new(0),
        }
    }

    /// Takes in another share; what was saved up stays. Of 0 percent there are no second tries at all.
    pub fn set_percent(&self, percent: u32) {
        self.set_share(f64::from(percent) / 100.0);
        if percent == 0 {
            self.free.store(0, Relaxed);
            self.tokens.store(0, Relaxed);
        }
    }

    /// Takes in another share; what was saved up stays.
    pub fn set_share(&self, share: f64) {
        self.share.store(thousandths(share), Relaxed);
        self.free.store(FREE_PER_SECOND, Relaxed);
    }

    /// A request has come.
    pub fn deposit(&self) {
        self.earn(self.share.load(Relaxed));
    }

    /// Takes one second try out, if there is one.
    pub fn withdraw(&self, now: Instant) -> bool {
        let free = self.free.load(Relaxed);
        let elapsed = now.saturating_duration_since(self.base);
        let now_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        // Whoever moves the time on earns what it is worth: of several at once, each its own part.
        let before = self.filled_ms.fetch_max(now_ms, Relaxed);
        // A request that earned its share while the budget was closed does not open it.
        if free == 0 && self.share.load(Relaxed) == 0 {
            return false;
        }
        // A millisecond earns `free` thousandths of a try; what is below one stays for later.
        self.earn(now_ms.saturating_sub(before).saturating_mul(free));
        self.tokens.fetch_update(Relaxed, Relaxed, |tokens| tokens.checked_sub(ONE)).is_ok()
    }

    fn earn(&self, thousandths: u64) {
        // Full is what it is most of the time, and then nothing is written.
        let _ = self.tokens.fetch_update(Relaxed, Relaxed, |tokens| {
            let more = tokens.saturating_add(thousandths).min(TOKENS_MAX);
            (more != tokens).then_some(more)
        });
    }
}

fn thousandths(share: f64) -> u64 {
    (share.clamp(0.0, 10.0) * ONE as f64) as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_may_be_tried_again() {
        use BodyState::*;
        use Progress::*;
        for (progress, idempotent, body, want) in [
            (NotSent, false, Replayable, Verdict::Free),
            (Refused, false, Replayable, Verdict::Free),
            (Refused, true, Spent, Verdict::No(Reason::BodySpent)),
            (Sent, true, Replayable, Verdict::Budgeted),
            (Sent, false, Replayable, Verdict::No(Reason::NotIdempotent)),
            (Sent, true, Spent, Verdict::No(Reason::BodySpent)),
            (ResponseBegun, true, Replayable, Verdict::No(Reason::ResponseBegun)),
        ] {
            assert_eq!(judge(progress, idempotent, body), want, "{progress:?} {idempotent} {body:?}");
        }
    }

    #[test]
    fn methods() {
        for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"] {
            assert!(is_idempotent(method));
        }
        for method in ["POST", "PATCH", "CONNECT", "get", "LINK"] {
            assert!(!is_idempotent(method));
        }
    }

    #[test]
    fn deadlines_of_tries() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let ms = |ms| Some(Duration::from_millis(ms));
        let check = |per_try, total, number, now, want| {
            let schedule = Schedule { tries: 3, per_try, total };
            assert_eq!(schedule.deadline(number, began, at(now)), want);
        };
        check(None, None, 1, 0, Ok(None));
        check(None, None, 3, 9_999, Ok(None));
        check(None, None, 4, 0, Err(Exhausted::Tries));
        check(ms(100), None, 2, 50, Ok(Some(at(150))));
        check(ms(100), ms(120), 2, 50, Ok(Some(at(120))));
        check(None, ms(120), 2, 50, Ok(Some(at(120))));
        check(ms(100), ms(120), 2, 120, Err(Exhausted::Time));
    }

    #[test]
    fn the_budget_is_a_share_and_ten_a_second() {
        let start = Instant::now();
        let budget = RetryBudget::new(0.2, start);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(start)).count(), 100);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!((0..1_000).filter(|_| budget.withdraw(start)).count(), 10);
        let later = start + Duration::from_secs(1);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(later)).count(), 10);
    }

    #[test]
    fn a_share_may_change_and_none_is_none() {
        let start = Instant::now();
        let budget = RetryBudget::new(0.2, start);
        let taken = |budget: &RetryBudget, now| (0..1_000).filter(|_| budget.withdraw(now)).count();
        assert_eq!(taken(&budget, start), 100);
        budget.set_percent(50);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!(taken(&budget, start), 25);
        budget.set_percent(0);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!(taken(&budget, start + Duration::from_secs(10)), 0);
        budget.set_share(0.1);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!(taken(&budget, start + Duration::from_secs(11)), 15);
    }

    #[test]
    fn threads_neither_lose_nor_make_second_tries() {
        const THREADS: u64 = 8;
        const REQUESTS: u64 = 2_000;
        let start = Instant::now();
        for share in [0.001, 0.005] {
            let budget = &RetryBudget::new(share, start);
            let taken = |n: u64| {
                (0..REQUESTS).filter(move |request| {
                    budget.deposit();
                    // Half a second in all, and every thread says it again.
                    let now = start + Duration::from_millis(request / 4);
                    request % THREADS == n && budget.withdraw(now)
                })
            };
            let taken: u64 = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS).map(|n| scope.spawn(move || taken(n).count() as u64)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            let earned = 100 * ONE + THREADS * REQUESTS * thousandths(share) + (REQUESTS - 1) / 4 * FREE_PER_SECOND;
            let left = budget.tokens.load(Relaxed);
            // Nobody was near the cap, so every thousandth is accounted for.
            assert_eq!(taken * ONE + left, earned, "{share}");
            assert!(taken >= 100, "{taken}");
        }
    }

    proptest! {
        #[test]
        fn second_tries_stay_within_the_budget(requests in 0_u32..5_000, seconds in 0_u64..100) {
            let start = Instant::now();
            let budget = RetryBudget::new(0.2, start);
            (0..requests).for_each(|_| budget.deposit());
            let now = start + Duration::from_secs(seconds);
            let taken = (0..10_000).filter(|_| budget.withdraw(now)).count() as f64;
            prop_assert!(taken <= (100.0 + f64::from(requests) * 0.2 + seconds as f64 * 10.0).min(200.0));
        }
    }
}
