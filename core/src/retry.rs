//! What may be tried a second time, how often, and until when.
//!
//! A try that the application can't have seen is always safe to repeat. After that only a request that is
//! idempotent (RFC 9110 section 9.2.2) and whose body is still at hand is, and only out of a budget, so
//! that second tries never become the load that keeps a service down.

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
/// with little traffic has some too.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    /// Thousandths of a second try, so that sums are exact.
    share: u64,
    /// What is earned without a request, a second.
    free: u64,
    tokens: u64,
    filled: Instant,
}

/// Second tries a second that need no requests to be earned.
const FREE_PER_SECOND: u64 = 10;
/// What can be saved up: ten seconds of the free ones and as many again earned by requests.
const TOKENS_MAX: u64 = 200 * ONE;
const ONE: u64 = 1_000;

impl RetryBudget {
    /// `share` is the number of second tries that each request earns, 0.2 for one in five.
    pub fn new(share: f64, now: Instant) -> Self {
        Self { share: thousandths(share), free: FREE_PER_SECOND, tokens: 10 * FREE_PER_SECOND * ONE, filled: now }
    }

    /// Takes in another share; what was saved up stays. Of 0 percent there are no second tries at all.
    pub fn set_percent(&mut self, percent: u32) {
        self.set_share(f64::from(percent) / 100.0);
        if percent == 0 {
            (self.free, self.tokens) = (0, 0);
        }
    }

    /// Takes in another share; what was saved up stays.
    pub fn set_share(&mut self, share: f64) {
        (self.share, self.free) = (thousandths(share), FREE_PER_SECOND);
    }

    /// A request has come.
    pub fn deposit(&mut self) {
        self.tokens = (self.tokens + self.share).min(TOKENS_MAX);
    }

    /// Takes one second try out, if there is one.
    pub fn withdraw(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled);
        // A millisecond earns `free` thousandths of a try; what is below one stays for later.
        let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        self.filled += Duration::from_millis(millis);
        self.tokens = self.tokens.saturating_add(millis.saturating_mul(self.free)).min(TOKENS_MAX);
        let enough = self.tokens >= ONE;
        if enough {
            self.tokens -= ONE;
        }
        enough
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
        let mut budget = RetryBudget::new(0.2, start);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(start)).count(), 100);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!((0..1_000).filter(|_| budget.withdraw(start)).count(), 10);
        let later = start + Duration::from_secs(1);
        assert_eq!((0..1_000).filter(|_| budget.withdraw(later)).count(), 10);
    }

    #[test]
    fn a_share_may_change_and_none_is_none() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(0.2, start);
        let taken = |budget: &mut RetryBudget, now| (0..1_000).filter(|_| budget.withdraw(now)).count();
        assert_eq!(taken(&mut budget, start), 100);
        budget.set_percent(50);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!(taken(&mut budget, start), 25);
        budget.set_percent(0);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!(taken(&mut budget, start + Duration::from_secs(10)), 0);
        budget.set_share(0.1);
        (0..50).for_each(|_| budget.deposit());
        assert_eq!(taken(&mut budget, start + Duration::from_secs(11)), 15);
    }

    proptest! {
        #[test]
        fn second_tries_stay_within_the_budget(requests in 0_u32..5_000, seconds in 0_u64..100) {
            let start = Instant::now();
            let mut budget = RetryBudget::new(0.2, start);
            (0..requests).for_each(|_| budget.deposit());
            let now = start + Duration::from_secs(seconds);
            let taken = (0..10_000).filter(|_| budget.withdraw(now)).count() as f64;
            prop_assert!(taken <= (100.0 + f64::from(requests) * 0.2 + seconds as f64 * 10.0).min(200.0));
        }
    }
}
