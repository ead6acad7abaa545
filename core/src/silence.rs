//! When what stands across a gateway of this cluster that has fallen silent is given up.
//!
//! A gateway that is at work ends the legs of a dead tunnel itself. One that hangs, or whose host is gone, ends
//! nothing: its kernel may even go on acknowledging. So while it says nothing of itself it is asked, and when it has
//! answered nothing for long enough, what stands across it ends.

use std::time::{Duration, Instant};

/// How patient to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SilenceConfig {
    /// Between questions while nothing is heard.
    pub ask_every: Duration,
    /// Silence before everything that stands across it is given up.
    pub dead_after: Duration,
}

impl Default for SilenceConfig {
    /// As patient as a tunnel is with its far end ([`crate::liveness::LivenessConfig`]).
    fn default() -> Self {
        Self { ask_every: Duration::from_secs(5), dead_after: Duration::from_secs(60) }
    }
}

/// What is to be done about a silent gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    Wait,
    Ask,
    GiveUp,
}

/// The state machine of one gateway.
#[derive(Debug)]
pub struct Silence {
    config: SilenceConfig,
    heard: Instant,
    asked: Option<Instant>,
}

impl Silence {
    pub fn new(config: SilenceConfig, now: Instant) -> Self {
        Self { config, heard: now, asked: None }
    }

    /// It said something of itself, or answered a question; a refusal is an answer.
    pub fn handle_heard(&mut self, now: Instant) {
        self.heard = self.heard.max(now);
    }

    /// Nothing was heard up to now. A question is asked before anything is given up: who was held up himself has
    /// heard nothing either.
    pub fn handle_silence(&mut self, now: Instant) -> Look {
        let asked = self.asked.filter(|asked| *asked >= self.heard);
        let due = asked.is_none_or(|asked| now.saturating_duration_since(asked) >= self.config.ask_every);
        if asked.is_some() && now.saturating_duration_since(self.heard) >= self.config.dead_after {
            // Whatever stands from now on has its own time.
            (self.heard, self.asked) = (now, None);
            return Look::GiveUp;
        }
        if due {
            self.asked = Some(now);
            return Look::Ask;
        }
        Look::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks once a second for `seconds`, with what is heard at each; returns what there was to do, and when.
    fn run(seconds: u64, hears: impl Fn(u64) -> bool, answers: impl Fn(u64) -> bool) -> Vec<(u64, Look)> {
        let start = Instant::now();
        let mut silence = Silence::new(SilenceConfig::default(), start);
        let mut done = Vec::new();
        for second in 1..=seconds {
            let now = start + Duration::from_secs(second);
            if hears(second) {
                silence.handle_heard(now);
                continue;
            }
            match silence.handle_silence(now) {
                Look::Wait => {}
                look => {
                    done.push((second, look));
                    if look == Look::Ask && answers(second) {
                        silence.handle_heard(now);
                    }
                }
            }
        }
        done
    }

    #[test]
    fn what_is_heard_is_never_asked_and_never_given_up() {
        assert_eq!(run(600, |_| true, |_| false), []);
    }

    #[test]
    fn the_silent_are_asked_every_5_s_and_given_up_after_60() {
        let done = run(130, |second| second <= 10, |_| false);
        let asked: Vec<u64> = (11..70).step_by(5).collect();
        assert_eq!(done[..12], asked.iter().map(|second| (*second, Look::Ask)).collect::<Vec<_>>());
        assert_eq!(done[12], (70, Look::GiveUp));
        // From then on it is the same again.
        assert_eq!((done[13], done.last().copied()), ((71, Look::Ask), Some((130, Look::GiveUp))));
    }

    #[test]
    fn who_answers_when_asked_is_not_given_up() {
        let done = run(600, |_| false, |second| second % 2 == 0);
        assert!(done.iter().all(|(_, look)| *look == Look::Ask) && done.len() > 100, "{done:?}");
    }

    #[test]
    fn a_pause_of_this_process_is_not_the_fault_of_the_gateway() {
        let start = Instant::now();
        let mut silence = Silence::new(SilenceConfig::default(), start);
        let woken = start + Duration::from_secs(3600);
        assert_eq!(silence.handle_silence(woken), Look::Ask);
        silence.handle_heard(woken);
        assert_eq!(silence.handle_silence(woken + Duration::from_secs(59)), Look::Ask);
    }
}
