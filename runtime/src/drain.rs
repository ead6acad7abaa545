//! One way to stop, with a hard deadline: new work is refused, the guards of existing work are waited
//! for, and at the deadline (or at a second signal) whatever is left is given up.

use std::future::{Future, pending};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Draining { deadline: Instant },
    Stopped,
}

/// Starts the drain of one process. Dropped unused, it never drains.
#[derive(Debug)]
pub struct DrainTrigger {
    phase: watch::Sender<Phase>,
    work: TaskTracker,
}

/// What every task of the process holds to learn that the process stops.
#[derive(Debug, Clone)]
pub struct DrainWatch {
    phase: watch::Receiver<Phase>,
    work: TaskTracker,
}

/// A piece of work that the drain waits for. Dropping it ends the wait.
#[derive(Debug)]
pub struct DrainGuard {
    _token: TaskTrackerToken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainOutcome {
    /// All work had ended in time.
    Clean,
    /// The deadline passed with so much work left.
    Deadline { left: usize },
    /// A second signal ended the wait with so much work left.
    Interrupted { left: usize },
}

pub fn drain() -> (DrainTrigger, DrainWatch) {
    let (sender, receiver) = watch::channel(Phase::Running);
    let work = TaskTracker::new();
    (DrainTrigger { phase: sender, work: work.clone() }, DrainWatch { phase: receiver, work })
}

impl DrainTrigger {
    /// Announces the drain and waits until all guards are dropped or `deadline` has passed.
    pub async fn drain(self, deadline: Duration) -> DrainOutcome {
        self.drain_unless(deadline, pending()).await
    }

    /// Waits for SIGTERM or SIGINT, then drains; a second signal ends the wait at once.
    pub async fn drain_on_signal(self, deadline: Duration) -> std::io::Result<DrainOutcome> {
        let mut signals = StopSignals::new()?;
        signals.next().await;
        tracing::info!(deadline_s = deadline.as_secs_f64(), work = self.work.len(), "draining");
        let outcome = self.drain_unless(deadline, signals.next()).await;
        tracing::info!(?outcome, "drained");
        Ok(outcome)
    }

    async fn drain_unless(self, deadline: Duration, interrupted: impl Future<Output = ()>) -> DrainOutcome {
        let deadline = Instant::now() + deadline;
        self.phase.send_replace(Phase::Draining { deadline });
        self.work.close();
        let outcome = tokio::select! {
            biased;
            () = self.work.wait() => DrainOutcome::Clean,
            () = interrupted => DrainOutcome::Interrupted { left: self.work.len() },
            () = tokio::time::sleep_until(deadline) => DrainOutcome::Deadline { left: self.work.len() },
        };
        self.phase.send_replace(Phase::Stopped);
        outcome
    }
}

impl DrainWatch {
    /// A process that is never drained.
    pub fn never() -> Self {
        drain().1
    }

    /// Resolves when the drain begins, at once if it has begun.
    pub async fn draining(&self) {
        self.reaches(|phase| *phase != Phase::Running).await;
    }

    /// Resolves when the wait is over: all work has ended, the deadline passed, or a second signal came.
    /// Work that is left must end now.
    pub async fn stopped(&self) {
        self.reaches(|phase| *phase == Phase::Stopped).await;
    }

    async fn reaches(&self, condition: impl Fn(&Phase) -> bool) {
        let mut phase = self.phase.clone();
        if phase.wait_for(|phase| condition(phase)).await.is_err() {
            // The trigger is gone without having been used.
            pending::<()>().await;
        }
    }

    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() != Phase::Running
    }

    /// When the drain under way gives up.
    pub fn deadline(&self) -> Option<Instant> {
        match *self.phase.borrow() {
            Phase::Draining { deadline } => Some(deadline),
            Phase::Running | Phase::Stopped => None,
        }
    }

    /// Marks a piece of work that the drain has to wait for.
    pub fn track(&self) -> DrainGuard {
        DrainGuard { _token: self.work.token() }
    }
}

/// SIGTERM and SIGINT, as one stream.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn drain_waits_for_guards() {
        let (trigger, watch) = drain();
        let guard = watch.track();
        let other = watch.clone();
        assert!(!watch.is_draining());
        let work = tokio::spawn(async move {
            other.draining().await;
            assert!(other.is_draining());
            tokio::time::sleep(SHORT).await;
            drop(guard);
        });
        let began = Instant::now();
        assert_eq!(trigger.drain(LONG).await, DrainOutcome::Clean);
        assert!(began.elapsed() >= SHORT);
        work.await.unwrap();
        watch.stopped().await;
    }

    #[tokio::test]
    async fn drain_gives_up_at_the_deadline() {
        let (trigger, watch) = drain();
        let _guards = (watch.track(), watch.track());
        let began = Instant::now();
        let stopped = tokio::spawn({
            let watch = watch.clone();
            async move {
                watch.draining().await;
                let deadline = watch.deadline();
                watch.stopped().await;
                deadline
            }
        });
        assert_eq!(trigger.drain(SHORT).await, DrainOutcome::Deadline { left: 2 });
        assert!(began.elapsed() >= SHORT);
        assert!(stopped.await.unwrap().unwrap() >= began + SHORT);
    }

    #[tokio::test]
    async fn a_second_signal_ends_the_wait() {
        let (trigger, watch) = drain();
        let _guard = watch.track();
        let outcome = trigger.drain_unless(LONG, tokio::time::sleep(SHORT)).await;
        assert_eq!(outcome, DrainOutcome::Interrupted { left: 1 });
        watch.stopped().await;
    }

    #[tokio::test]
    async fn an_unused_trigger_never_drains() {
        let watch = DrainWatch::never();
        assert!(tokio::time::timeout(SHORT, watch.draining()).await.is_err());
        assert!(!watch.is_draining());
    }
}
