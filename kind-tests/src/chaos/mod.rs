//! Faults under load: two clusters of real processes with a link between them, requests that never stop, and one
//! fault after the other.
//!
//! Half of the traffic stays in the caller's cluster and half crosses, so that every fault meets some. Everything is
//! judged from outside, by what the clients get.

mod fault;
mod world;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use tombolo_testbed::Namespace;

pub use fault::{Blow, FAULTS, Fault, Home, Victim};
use world::{HOST, World};

use crate::client::Target;
use crate::open_loop::{Load, Sample};

/// Requests a second, whatever becomes of those before, and the connections that carry them.
pub const RATE: u32 = 200;
pub const CONNECTIONS: usize = 20;
/// A request that takes longer has failed.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// A request that takes longer has noticed the fault.
pub const PROMPT: Duration = Duration::from_millis(250);
/// How long a fault lasts.
const FAULT_TIME: Duration = Duration::from_millis(1500);
/// Both clusters must have answered everything for so long before the next fault.
const STEADY_TIME: Duration = Duration::from_millis(500);
const STEADY_TIME_MAX: Duration = Duration::from_secs(60);

/// What to do to which binary.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The `tombolo` binary.
    pub binary: PathBuf,
    pub faults: Vec<Fault>,
    /// How often each.
    pub times: usize,
    /// Where files go; the caller removes it.
    pub folder: PathBuf,
}

/// What one fault did. Times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub fault: &'static str,
    /// Requests that were under way at the fault, or begun while it lasted and until its end was mended.
    pub requests: usize,
    pub failed: usize,
    /// Answered, but later than [`PROMPT`].
    pub slow: usize,
    pub slowest_ms: u32,
    /// From the fault to the begin of the last request that failed or was slow.
    pub settled_ms: u32,
    /// Begun when the fault was over, and failed before both clusters answered everything again.
    pub failed_after: usize,
}

/// Carries out a plan, on a thread of its own inside of a network namespace. Takes root, see [`crate::lacks`].
/// `each` hears of every outcome at once.
pub fn run(plan: Plan, each: impl Fn(&Outcome) + Send + 'static) -> anyhow::Result<Vec<Outcome>> {
    let carried_out = std::thread::spawn(move || {
        let (east, west) = (Namespace::new()?, Namespace::new()?);
        // The clients and whatever they start are in the caller's cluster.
        east.enter()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(carry_out(&plan, &east, &west, each))
    });
    carried_out.join().map_err(|_| anyhow!("the thread that carries out the plan panicked"))?
}

async fn carry_out(
    plan: &Plan,
    east: &Namespace,
    west: &Namespace,
    each: impl Fn(&Outcome),
) -> anyhow::Result<Vec<Outcome>> {
    let mut world = World::start(plan, east, west).await?;
    let load = Load::start(Target::proxied(world.proxy, HOST), RATE, CONNECTIONS, DEADLINE);
    let mut outcomes = Vec::new();
    steady(&load).await.context("before the first fault")?;
    for fault in &plan.faults {
        for _ in 0..plan.times {
            let at = Instant::now();
            world.strike(&fault.blow).await.with_context(|| fault.name)?;
            tokio::time::sleep(FAULT_TIME).await;
            let until = Instant::now();
            world.mend(&fault.blow).await.with_context(|| format!("after {}", fault.name))?;
            steady(&load).await.with_context(|| format!("after {}\n{}", fault.name, world.last_words()))?;
            // Whoever was begun during the fault is answered or late before it is judged.
            tokio::time::sleep((until + DEADLINE).saturating_duration_since(Instant::now())).await;
            let outcome = judge(fault.name, &load.since(at), at, until);
            each(&outcome);
            outcomes.push(outcome);
        }
    }
    drop(load);
    world.stop().await;
    Ok(outcomes)
}

/// Waits until both clusters have answered everything for a while.
async fn steady(load: &Load) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEADY_TIME_MAX;
    let begin = Instant::now();
    loop {
        let since = Instant::now().checked_sub(STEADY_TIME).unwrap_or(begin).max(begin);
        let recent = load.since(since);
        let answers = |app: &str| recent.iter().any(|sample| sample.app.as_deref() == Some(app));
        let long_enough = begin.elapsed() >= STEADY_TIME;
        if long_enough && recent.iter().all(Sample::is_ok) && answers(Home::East.name()) && answers(Home::West.name()) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let failed = recent.iter().filter(|sample| !sample.is_ok()).count();
            bail!(
                "no return to normal within {STEADY_TIME_MAX:?}: of {} recent requests {failed} failed, east {}, west {}",
                recent.len(),
                if answers(Home::East.name()) { "answers" } else { "does not answer" },
                if answers(Home::West.name()) { "answers" } else { "does not answer" },
            );
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn judge(fault: &'static str, samples: &[Sample], at: Instant, until: Instant) -> Outcome {
    let millis = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    // In flight at the fault counts too: such a request meets it like a new one.
    let met: Vec<&Sample> = samples.iter().filter(|sample| sample.done >= at && sample.due < until).collect();
    let slow = |sample: &&&Sample| sample.is_ok() && sample.latency() > PROMPT;
    let noticed = met.iter().filter(|sample| !sample.is_ok() || slow(sample));
    Outcome {
        fault,
        requests: met.len(),
        failed: met.iter().filter(|sample| !sample.is_ok()).count(),
        slow: met.iter().filter(slow).count(),
        slowest_ms: met.iter().map(|sample| millis(sample.latency())).max().unwrap_or(0),
        settled_ms: noticed.map(|sample| millis(sample.due.saturating_duration_since(at))).max().unwrap_or(0),
        failed_after: samples.iter().filter(|sample| sample.due >= until && !sample.is_ok()).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_met_the_fault_is_judged_and_what_came_after_apart() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let sample = |due, done, ok: bool| Sample { due: at(due), done: at(done), app: ok.then(|| "east".into()) };
        let samples = [
            sample(0, 50, false),
            sample(80, 120, true),
            sample(150, 500, true),
            sample(200, 2200, false),
            sample(300, 310, true),
            sample(1100, 1110, false),
        ];
        let want = Outcome {
            fault: "any",
            requests: 4,
            failed: 1,
            slow: 1,
            slowest_ms: 2000,
            settled_ms: 100,
            failed_after: 1,
        };
        assert_eq!(judge("any", &samples, at(100), at(1000)), want);
    }
}
