//! When an endpoint that claims to be ready is left alone for a while, because requests to it fail.
//!
//! One state machine for each endpoint. It ejects, waits with a growing pause, asks for a probe and takes
//! the endpoint back when the probe succeeds: no request of an application is spent on finding out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

/// When to eject, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutlierConfig {
    /// Whether anything ejects at all.
    pub enabled: bool,
    /// Resets, lost connections and missed deadlines in a row.
    pub failures: u32,
    /// Answers 502, 503 and 504 in a row; 0 for never.
    pub gateway_errors: u32,
    /// Answers 5xx of any kind in a row; 0 for never.
    pub server_errors: u32,
    /// Answers in a row that took longer than `slow_after`; 0 for never.
    pub slow: u32,
    pub slow_after: Duration,
    /// The first pause; each ejection soon after another doubles it. An endpoint that stayed in for twice as long as it
    /// had been kept out starts anew.
    pub pause: Duration,
    pub pause_max: Duration,
    /// Longest pause between probes that fail: they cost no request, and what is ready again is to get its traffic back.
    pub probe_pause_max: Duration,
    /// A probe without a result for this long has failed.
    pub probe_timeout: Duration,
    /// The same while a hang is suspected and requests wait, or as many times the p99 as for the suspicion.
    pub hang_probe_min: Duration,
    /// A hang is suspected when nothing completed for this many times the endpoint's own p99 ...
    pub hang_factor: u32,
    /// ... but never sooner than this ...
    pub hang_after_min: Duration,
    /// ... while at least this many requests are under way.
    pub hang_outstanding: u32,
}

impl Default for OutlierConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            failures: 3,
            gateway_errors: 5,
            server_errors: 0,
            slow: 0,
            slow_after: Duration::from_secs(1),
            pause: Duration::from_millis(500),
            pause_max: Duration::from_secs(30),
            probe_pause_max: Duration::from_secs(1),
            probe_timeout: Duration::from_secs(2),
            hang_probe_min: Duration::from_millis(300),
            hang_factor: 4,
            hang_after_min: Duration::from_millis(250),
            hang_outstanding: 3,
        }
    }
}

/// How a try ended, as far as it says something about the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// An answer came, whatever the application said in it.
    Answered { after: Duration },
    /// An answer 502, 503 or 504.
    GatewayError { after: Duration },
    /// Another answer 5xx.
    ServerError { after: Duration },
    /// The connection was reset or lost, or the deadline passed.
    Failed,
    /// The endpoint, its sidecar or its application did not accept the connection.
    Refused,
}

/// Whether another endpoint could take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elsewhere {
    Capacity,
    /// Ejecting would only turn a chance into none.
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EjectReason {
    Failures,
    GatewayErrors,
    ServerErrors,
    Slow,
    Refused,
    Hung,
}

impl EjectReason {
    pub const ALL: [EjectReason; 6] =
        [Self::Failures, Self::GatewayErrors, Self::ServerErrors, Self::Slow, Self::Refused, Self::Hung];

    /// As it is written in metrics and for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Failures => "failures",
            Self::GatewayErrors => "gateway-errors",
            Self::ServerErrors => "server-errors",
            Self::Slow => "slow",
            Self::Refused => "refused",
            Self::Hung => "hung",
        }
    }

    /// Whether nobody is there to answer, and not only answers badly.
    pub fn is_unresponsive(self) -> bool {
        matches!(self, Self::Refused | Self::Hung)
    }

    /// Whether requests that wait at the endpoint can't expect an answer any more, and should go elsewhere.
    pub fn leaves_waiting(self) -> bool {
        matches!(self, Self::Failures | Self::Hung)
    }
}

/// What the shell has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutlierEvent {
    Ejected(EjectReason),
    /// Ask the endpoint, beside the applications' requests, whether it answers; report with
    /// [`Outlier::handle_probe`].
    Probe,
    Restored,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Admitted,
    /// Admitted, but a hang is suspected and a probe under way.
    Questioned {
        since: Instant,
    },
    Ejected {
        until: Instant,
    },
    /// Ejected, and a probe under way.
    Probing {
        since: Instant,
    },
}

/// The failures of one endpoint.
#[derive(Debug, Clone)]
pub struct Outlier {
    /// Mostly that of all endpoints of a service.
    config: Arc<OutlierConfig>,
    /// Instead of the configuration's, if the endpoint is compared with its siblings.
    slow_after: Duration,
    state: State,
    reason: Option<EjectReason>,
    failures: u32,
    gateway_errors: u32,
    server_errors: u32,
    slow: u32,
    /// Probes that answered since something last completed: each doubles the silence before the next one.
    patience: u32,
    /// Ejections in a row, each soon after the one before.
    ejections: u32,
    /// Probes that failed since the last ejection.
    probes_failed: u32,
    restored: Option<Instant>,
    latency: Latency,
    completed: Option<Instant>,
}

/// An endpoint that stayed in for this long starts again with the first pause, however long it had been out.
const FORGIVE_AFTER: Duration = Duration::from_secs(60);
/// An application that is alive and completes nothing is asked at least this often.
const PATIENCE_MAX: Duration = Duration::from_secs(30);

/// Answers in a row that take too long next to those of its siblings, before an endpoint is ejected for it.
pub const SLOW_ANSWERS: u32 = 5;
/// Nobody is slow below this, however fast the others are.
const SLOW_AFTER_MIN: Duration = Duration::from_millis(50);

/// From when on an answer counts as slow: `factor` times the median of what answers of the siblings take. Without a
/// sibling that has answered nothing does.
pub fn slow_after(factor: u32, siblings: impl IntoIterator<Item = Duration>) -> Duration {
    let mut siblings: Vec<Duration> = siblings.into_iter().collect();
    siblings.sort();
    // Of an even number the lower one: a slow sibling must not excuse another.
    let median = siblings.get(siblings.len().saturating_sub(1) / 2);
    median.map_or(Duration::MAX, |median| median.saturating_mul(factor).max(SLOW_AFTER_MIN))
}

impl Outlier {
    pub fn new(config: Arc<OutlierConfig>) -> Self {
        Self {
            slow_after: config.slow_after,
            config,
            state: State::Admitted,
            reason: None,
            failures: 0,
            gateway_errors: 0,
            server_errors: 0,
            slow: 0,
            patience: 0,
            ejections: 0,
            probes_failed: 0,
            restored: None,
            latency: Latency::default(),
            completed: None,
        }
    }

    /// Takes in another configuration. Whoever may not be ejected any more is taken back.
    pub fn set_config(&mut self, config: Arc<OutlierConfig>, now: Instant) -> Option<OutlierEvent> {
        (self.slow_after, self.config) = (config.slow_after, config);
        (!self.config.enabled && self.is_ejected()).then(|| self.restore(now))
    }

    /// Takes in how long the answers of its siblings take, see [`slow_after`].
    pub fn set_slow_after(&mut self, slow_after: Duration) {
        self.slow_after = slow_after;
    }

    pub fn is_ejected(&self) -> bool {
        matches!(self.state, State::Ejected { .. } | State::Probing { .. })
    }

    /// Why it is ejected, if it is.
    pub fn ejected_for(&self) -> Option<EjectReason> {
        self.reason.filter(|_| self.is_ejected())
    }

    /// Counts the end of a try.
    pub fn handle_outcome(&mut self, outcome: Outcome, elsewhere: Elsewhere, now: Instant) -> Option<OutlierEvent> {
        let slow = match outcome {
            Outcome::Answered { after } | Outcome::GatewayError { after } | Outcome::ServerError { after } => {
                self.complete(after, now);
                after > self.slow_after
            }
            Outcome::Failed | Outcome::Refused => false,
        };
        let failed = matches!(outcome, Outcome::Failed);
        let gateway_error = matches!(outcome, Outcome::GatewayError { .. });
        let server_error = gateway_error || matches!(outcome, Outcome::ServerError { .. });
        // What was refused was no answer: it says nothing of the rows of answers.
        let OutlierConfig { failures, gateway_errors, server_errors, slow: slow_answers, .. } = *self.config;
        let rows = [
            (&mut self.failures, failed, failures, EjectReason::Failures),
            (&mut self.gateway_errors, gateway_error, gateway_errors, EjectReason::GatewayErrors),
            (&mut self.server_errors, server_error, server_errors, EjectReason::ServerErrors),
            (&mut self.slow, slow, slow_answers, EjectReason::Slow),
        ];
        let mut reason = (outcome == Outcome::Refused).then_some(EjectReason::Refused);
        for (row, counts, limit, named) in rows {
            *row = if counts { row.saturating_add(1) } else { 0 };
            if limit > 0 && *row >= limit {
                reason = reason.or(Some(named));
            }
        }
        self.eject(reason?, elsewhere, now)
    }

    /// Looks whether the endpoint hangs: several requests are under way and none completed for long.
    /// `oldest` is when the oldest of them began. A suspicion only asks for a probe.
    pub fn handle_outstanding(&mut self, count: u32, oldest: Instant, now: Instant) -> Option<OutlierEvent> {
        let silent_since = self.completed.map_or(oldest, |completed| completed.max(oldest));
        let silent = now.saturating_duration_since(silent_since);
        if self.state != State::Admitted || !self.config.enabled || count < self.config.hang_outstanding {
            return None;
        }
        // An application that is alive and silent, as with requests that wait for news, is asked ever less often.
        let first = self.hang_after()?;
        let wanted = first.saturating_mul(1 << self.patience.min(16)).min(PATIENCE_MAX.max(first));
        if silent < wanted {
            return None;
        }
        self.state = State::Questioned { since: now };
        Some(OutlierEvent::Probe)
    }

    /// Takes in the result of the probe that was asked for.
    pub fn handle_probe(&mut self, answered: bool, elsewhere: Elsewhere, now: Instant) -> Option<OutlierEvent> {
        match (self.state, answered) {
            (State::Questioned { .. }, true) => {
                // Slow but alive: its silence begins anew.
                self.completed = Some(now);
                self.patience = self.patience.saturating_add(1);
                self.state = State::Admitted;
                None
            }
            (State::Questioned { .. }, false) => {
                self.state = State::Admitted;
                self.eject(EjectReason::Hung, elsewhere, now)
            }
            (State::Probing { .. } | State::Ejected { .. }, true) => Some(self.restore(now)),
            (State::Probing { .. }, false) => {
                self.probes_failed = self.probes_failed.saturating_add(1);
                let pause = self.doubled(self.probes_failed).min(self.config.probe_pause_max);
                self.state = State::Ejected { until: now + pause };
                None
            }
            (State::Ejected { .. } | State::Admitted, _) => None,
        }
    }

    /// The endpoint's own side has declared it ready anew: what was held against it is out of date.
    pub fn handle_ready_again(&mut self, now: Instant) -> Option<OutlierEvent> {
        self.forget_rows();
        self.is_ejected().then(|| self.restore(now))
    }

    /// The way to the endpoint's cluster stands again. Probes that the broken way failed say nothing of the endpoint:
    /// the pause that they made is forgiven, and the next probe is due at once.
    pub fn handle_way_up(&mut self, now: Instant) {
        match self.state {
            State::Ejected { .. } => {
                self.state = State::Ejected { until: now };
                (self.ejections, self.probes_failed) = (1, 0);
            }
            // The one under way was asked over the broken way.
            State::Probing { .. } => (self.ejections, self.probes_failed) = (1, 0),
            State::Admitted | State::Questioned { .. } => {}
        }
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Admitted => None,
            State::Ejected { until } => Some(until),
            State::Questioned { since } => Some(since + self.hang_probe_timeout()),
            State::Probing { since } => Some(since + self.config.probe_timeout),
        }
    }

    pub fn handle_timeout(&mut self, elsewhere: Elsewhere, now: Instant) -> Option<OutlierEvent> {
        if self.poll_timeout().is_none_or(|due| now < due) {
            return None;
        }
        match self.state {
            State::Admitted => None,
            State::Ejected { .. } => {
                self.state = State::Probing { since: now };
                Some(OutlierEvent::Probe)
            }
            State::Questioned { .. } | State::Probing { .. } => self.handle_probe(false, elsewhere, now),
        }
    }

    fn eject(&mut self, reason: EjectReason, elsewhere: Elsewhere, now: Instant) -> Option<OutlierEvent> {
        if self.is_ejected() || !self.config.enabled || elsewhere == Elsewhere::Nothing {
            return None;
        }
        let enough = (self.pause() * 2).min(FORGIVE_AFTER);
        let forgiven = self.restored.is_none_or(|restored| now.saturating_duration_since(restored) > enough);
        self.ejections = if forgiven { 1 } else { self.ejections.saturating_add(1) };
        self.probes_failed = 0;
        self.forget_rows();
        (self.state, self.reason) = (State::Ejected { until: now + self.pause() }, Some(reason));
        Some(OutlierEvent::Ejected(reason))
    }

    fn restore(&mut self, now: Instant) -> OutlierEvent {
        self.forget_rows();
        (self.state, self.restored, self.completed) = (State::Admitted, Some(now), Some(now));
        OutlierEvent::Restored
    }

    fn pause(&self) -> Duration {
        self.doubled(self.ejections.saturating_sub(1)).min(self.config.pause_max)
    }

    fn doubled(&self, times: u32) -> Duration {
        self.config.pause.saturating_mul(1 << times.min(16))
    }

    fn forget_rows(&mut self) {
        (self.failures, self.gateway_errors, self.server_errors, self.slow) = (0, 0, 0, 0);
    }

    fn complete(&mut self, after: Duration, now: Instant) {
        (self.completed, self.patience) = (Some(now), 0);
        self.latency.record(after);
    }

    fn hang_after(&self) -> Option<Duration> {
        let p99 = self.latency.p99()?;
        Some(p99.saturating_mul(self.config.hang_factor).max(self.config.hang_after_min))
    }

    fn hang_probe_timeout(&self) -> Duration {
        let usual = self.latency.p99().unwrap_or_default().saturating_mul(self.config.hang_factor);
        usual.clamp(self.config.hang_probe_min, self.config.probe_timeout.max(self.config.hang_probe_min))
    }
}

/// Response times in buckets of powers of two (microseconds); older ones fade by halving.
#[derive(Debug, Clone, Default)]
struct Latency {
    buckets: [u16; 32],
    count: u32,
}

impl Latency {
    /// Too few to speak of a p99.
    const COUNT_MIN: u32 = 20;
    const COUNT_MAX: u32 = 2_000;

    fn record(&mut self, after: Duration) {
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        let bucket = (64 - micros.leading_zeros() as usize).min(self.buckets.len() - 1);
        self.buckets[bucket] += 1;
        self.count += 1;
        if self.count > Self::COUNT_MAX {
            self.buckets.iter_mut().for_each(|bucket| *bucket /= 2);
            self.count = self.buckets.iter().map(|bucket| u32::from(*bucket)).sum();
        }
    }

    /// The upper bound of the bucket that holds the 99th percentile.
    fn p99(&self) -> Option<Duration> {
        if self.count < Self::COUNT_MIN {
            return None;
        }
        let mut above = self.count / 100;
        for (bucket, count) in self.buckets.iter().enumerate().rev() {
            if u32::from(*count) > above {
                return Some(Duration::from_micros(1 << bucket));
            }
            above -= u32::from(*count);
        }
        None
    }
}

#[cfg(test)]
mod tests;
