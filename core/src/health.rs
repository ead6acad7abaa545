//! Active health checks: when a row of results changes what is said about an application.
//!
//! The shell runs the checks; this state machine only counts. A new application is not ready until it
//! has passed once, so that nothing is sent to a process that has yet to start listening.

use serde::{Deserialize, Serialize};

/// How many results in a row change the verdict. Both are at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Thresholds {
    pub healthy_after: u32,
    pub unhealthy_after: u32,
}

impl Default for Thresholds {
    /// One success is enough to begin with traffic, two failures in a row end it.
    fn default() -> Self {
        Self { healthy_after: 1, unhealthy_after: 2 }
    }
}

/// What one check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckResult {
    Passed,
    Failed,
}

/// The verdict on one application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// No check has come to a verdict yet: not ready.
    Unknown,
    Healthy,
    Unhealthy,
}

impl Verdict {
    pub fn is_ready(self) -> bool {
        self == Verdict::Healthy
    }
}

/// The state of the checks of one application.
#[derive(Debug, Clone)]
pub struct Health {
    thresholds: Thresholds,
    verdict: Verdict,
    /// Results in a row that contradict the verdict.
    contrary: u32,
}

impl Health {
    pub fn new(thresholds: Thresholds) -> Self {
        Self { thresholds, verdict: Verdict::Unknown, contrary: 0 }
    }

    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Counts one result; returns the new verdict when this result changed it.
    pub fn handle_result(&mut self, result: CheckResult) -> Option<Verdict> {
        let (verdict, threshold) = match result {
            CheckResult::Passed => (Verdict::Healthy, self.thresholds.healthy_after),
            CheckResult::Failed => (Verdict::Unhealthy, self.thresholds.unhealthy_after),
        };
        if verdict == self.verdict {
            self.contrary = 0;
            return None;
        }
        // An application of which nothing is known is not ready anyway: say so at the first failure.
        let threshold = if self.verdict == Verdict::Unknown && result == CheckResult::Failed { 1 } else { threshold };
        self.contrary += 1;
        if self.contrary < threshold {
            return None;
        }
        self.contrary = 0;
        self.verdict = verdict;
        Some(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(healthy_after: u32, unhealthy_after: u32, results: &str, want: &str) {
        let mut health = Health::new(Thresholds { healthy_after, unhealthy_after });
        let verdicts: String = results
            .chars()
            .map(|c| {
                health.handle_result(if c == '+' { CheckResult::Passed } else { CheckResult::Failed });
                match health.verdict() {
                    Verdict::Unknown => '?',
                    Verdict::Healthy => 'h',
                    Verdict::Unhealthy => 'u',
                }
            })
            .collect();
        assert_eq!(verdicts, want, "{results}");
    }

    #[test]
    fn rows_of_results_change_the_verdict() {
        check(1, 2, "+-+--+", "hhhhuh");
        check(2, 3, "++---++", "?hhhuuh");
        check(2, 3, "++--+---", "?hhhhhhu");
        check(3, 1, "-+-+++", "uuuuuh");
        check(2, 2, "+-+-++", "?uuuuh");
    }

    #[test]
    fn a_change_is_reported_once() {
        let mut health = Health::new(Thresholds::default());
        assert_eq!(health.handle_result(CheckResult::Passed), Some(Verdict::Healthy));
        assert_eq!(health.handle_result(CheckResult::Passed), None);
        assert_eq!(health.handle_result(CheckResult::Failed), None);
        assert_eq!(health.handle_result(CheckResult::Failed), Some(Verdict::Unhealthy));
    }
}
