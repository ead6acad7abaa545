//! The local application dies, or hangs, under load that never stops: which requests fail, and how long
//! until the other cluster answers all of them. Then whatever else can fail, between two clusters with a link.

mod matrix;

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use serde_json::json;
use tombolo_kind_tests::client::Target;
use tombolo_kind_tests::open_loop::{Load, Sample};

use crate::Options;
use crate::apps::App;
use crate::compare::first_answer;
use crate::load::percentile;
use crate::mesh::{self, Mesh, Setup};
use crate::report::{Bar, Figures, Report, Series, Want};

const RATE: u32 = 200;
const CONNECTIONS: usize = 20;
const DEADLINE: Duration = Duration::from_secs(2);
const FAULTS: usize = 100;
/// What every try may take before the next endpoint is asked.
const PER_TRY_TIMEOUT: &str = "250ms";
/// How long a fault lasts; requests that were begun in it have met their deadline when it is judged.
const FAULT_TIME: Duration = Duration::from_millis(1500);
/// The local cluster must have answered everything for so long before the next fault.
const STEADY_TIME: Duration = Duration::from_millis(500);
const STEADY_TIME_MAX: Duration = Duration::from_secs(60);
/// A request that takes longer has noticed the fault.
const PROMPT: Duration = Duration::from_millis(50);

const LOCAL: &str = "east";
const REMOTE: &str = "west";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Killed,
    Stopped,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::Killed => "app killed",
            Fault::Stopped => "app stopped",
        }
    }

    fn begin(self, app: &mut App) -> anyhow::Result<()> {
        match self {
            Fault::Killed => app.crash(),
            Fault::Stopped => app.signal(Signal::SIGSTOP),
        }
    }

    async fn end(self, app: &mut App) -> anyhow::Result<()> {
        match self {
            Fault::Killed => app.restart().await,
            Fault::Stopped => app.signal(Signal::SIGCONT),
        }
    }
}

pub async fn run(options: &Options) -> anyhow::Result<()> {
    let binary = options.tombolo.as_ref().context("--tombolo is needed: this bench measures no peer")?;
    let folder = tempfile::tempdir()?;
    let mut local = App::start(LOCAL, folder.path()).await?;
    let remote = App::start(REMOTE, folder.path()).await?;
    let setup = Setup {
        workers: 1,
        caller: json!({ "retry": { "tries": 3, "perTryTimeout": PER_TRY_TIMEOUT } }),
        local_app: Some(local.address),
        remote_app: remote.address,
        binary,
    };
    let mesh = Mesh::start(&setup).await?;
    let target = Target::proxied(mesh.outbound, mesh::HOST);
    first_answer(&target).await?;

    let mut figures = Figures::new();
    let mut bars = Vec::new();
    for fault in [Fault::Killed, Fault::Stopped] {
        let load = Load::start(target.clone(), RATE, CONNECTIONS, DEADLINE);
        let outcomes = faults(fault, options.faults.unwrap_or(FAULTS), &mut local, &load).await;
        let outcomes = outcomes.with_context(|| fault.name().to_owned())?;
        let failed_between = load.stop().await.iter().filter(|sample| !sample.is_ok()).count();
        let failed: usize = outcomes.iter().map(|outcome| outcome.failed).sum();
        let failed_between = failed_between - failed;
        record(figures.entry(fault.name().to_owned()).or_default(), &outcomes, failed_between);
        bars.push(Bar::new(format!("{}: failed requests", fault.name()), Want::AtMost(0.0), Some(failed as f64)));
        let name = format!("{}: failed requests at recovery and between", fault.name());
        bars.push(Bar::new(name, Want::AtMost(0.0), Some(failed_between as f64)));
    }
    mesh.stop().await;
    let skipped = tombolo_kind_tests::lacks();
    match &skipped {
        None => matrix::run(binary, options.faults.unwrap_or(FAULTS), &mut figures, &mut bars).await?,
        Some(lack) => eprintln!("failover: no matrix of faults, for that needs {lack}"),
    }
    let method = json!({
        "faults": options.faults.unwrap_or(FAULTS), "requestsPerSecond": RATE, "connections": CONNECTIONS,
        "deadlineMs": DEADLINE.as_millis(), "perTryTimeout": PER_TRY_TIMEOUT, "promptMs": PROMPT.as_millis(),
        "matrixSkippedForLackOf": skipped, "matrixPromptMs": tombolo_kind_tests::chaos::PROMPT.as_millis(),
        "note": "open loop; a request that is late has failed; `settled` is the time from the fault to the begin of \
                 the last request that failed or was not answered promptly; all requests are GET; the matrix runs with \
                 the default configuration, half of the traffic crossing a link of 2 ms each way",
    });
    Report::new("failover", method, options.versions()?, figures, bars)?.publish(&options.results)
}

/// What one fault did, in milliseconds.
#[derive(Debug)]
struct Outcome {
    requests: usize,
    failed: usize,
    slow: usize,
    settled_ms: u32,
    slowest_ms: u32,
    first_remote_ms: Option<u32>,
}

async fn faults(fault: Fault, count: usize, local: &mut App, load: &Load) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for n in 0..count {
        steady(load).await?;
        let at = Instant::now();
        fault.begin(local)?;
        tokio::time::sleep(FAULT_TIME).await;
        let until = Instant::now();
        // Whoever was begun during the fault is answered or late before it is judged.
        tokio::time::sleep(DEADLINE).await;
        fault.end(local).await?;
        let outcome = judge(&load.since(at), at, until);
        eprintln!("failover, {} {}/{count}: {outcome:?}", fault.name(), n + 1);
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// Waits until the local cluster has answered everything for a while.
async fn steady(load: &Load) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEADY_TIME_MAX;
    loop {
        let recent = load.since(Instant::now().checked_sub(STEADY_TIME).context("a machine that has just started")?);
        let enough = recent.len() * 2 >= (f64::from(RATE) * STEADY_TIME.as_secs_f64()) as usize;
        if enough && recent.iter().all(|sample| sample.app.as_deref() == Some(LOCAL)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the local application did not get its traffic back; the last answers: {:?}", recent.last());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn judge(samples: &[Sample], fault: Instant, until: Instant) -> Outcome {
    let millis = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    // In flight at the fault counts too: such a request meets it like a new one.
    let met = samples.iter().filter(|sample| sample.done >= fault && sample.due < until);
    let met: Vec<&Sample> = met.collect();
    let noticed = |sample: &&&Sample| !sample.is_ok() || sample.latency() > PROMPT;
    let remote = met.iter().filter(|sample| sample.app.as_deref() == Some(REMOTE));
    Outcome {
        requests: met.len(),
        failed: met.iter().filter(|sample| !sample.is_ok()).count(),
        slow: met.iter().filter(|sample| sample.is_ok() && sample.latency() > PROMPT).count(),
        settled_ms: met
            .iter()
            .filter(noticed)
            .map(|sample| millis(sample.due.saturating_duration_since(fault)))
            .max()
            .unwrap_or(0),
        slowest_ms: met.iter().map(|sample| millis(sample.latency())).max().unwrap_or(0),
        first_remote_ms: remote.map(|sample| millis(sample.done.saturating_duration_since(fault))).min(),
    }
}

fn record(figures: &mut std::collections::BTreeMap<String, Series>, outcomes: &[Outcome], failed_between: usize) {
    let mut one = |name: String, value: f64| figures.entry(name).or_default().push(value);
    one("faults".into(), outcomes.len() as f64);
    one("requests during faults".into(), outcomes.iter().map(|outcome| outcome.requests as f64).sum());
    one("failed during faults".into(), outcomes.iter().map(|outcome| outcome.failed as f64).sum());
    one("slow during faults".into(), outcomes.iter().map(|outcome| outcome.slow as f64).sum());
    one("failed between faults".into(), failed_between as f64);
    let mut spread = |name: &str, values: Vec<u32>| {
        let mut values = values;
        values.sort_unstable();
        for (label, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
            one(format!("{name}, ms, {label}"), percentile(&values, share));
        }
    };
    spread("settled", outcomes.iter().map(|outcome| outcome.settled_ms).collect());
    spread("slowest request", outcomes.iter().map(|outcome| outcome.slowest_ms).collect());
    spread("first answer elsewhere", outcomes.iter().filter_map(|outcome| outcome.first_remote_ms).collect());
}
