//! Systems side by side: what is measured of each in turn, and the ratios of tombolo to the better Envoy.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tombolo_kind_tests::client::{Connection, Target};

use crate::envoy::Envoys;
use crate::host::{ForeignLoad, cpu_seconds};
use crate::load::{self, Mode, bulk, closed};
use crate::mesh;
use crate::report::{Bar, Figures, Want};

pub const CONNECTIONS: usize = 64;
pub const WORKERS: [usize; 2] = [1, 2];
pub const BULK_BYTES: u64 = 1_000_000_000;

pub const CPU: &str = "CPU s / 100,000 requests";
pub const RATE: &str = "requests/s";
pub const TAIL: &str = "p99 ms";
pub const MIDDLE: &str = "p50 ms";
pub const BULK: &str = "bulk Gbit/s";
pub const FRESH: &str = "new connections/s";
const FRESH_CPU: &str = "CPU s / 100,000 connections";
const FOREIGN: &str = "foreign load, processors";
const FAILED: &str = "failed";

/// One system under test, by the name of its column.
pub struct System {
    pub name: String,
    pub target: Target,
    /// Whose CPU counts.
    pub pids: Vec<u32>,
    /// Which processes end with it.
    pub envoys: Option<Envoys>,
}

impl System {
    pub fn envoy(workers: usize, envoys: Envoys) -> Self {
        Self {
            name: format!("envoy/{workers}"),
            target: Target::direct(envoys.entrance, mesh::HOST),
            pids: envoys.pids(),
            envoys: Some(envoys),
        }
    }

    pub async fn first_answer(&self, part: &str) -> anyhow::Result<()> {
        first_answer(&self.target).await.with_context(|| {
            let words = self.envoys.as_ref().map(Envoys::words).unwrap_or_default();
            format!("{} ({part}){words}", self.name)
        })
    }
}

pub type Measured = Vec<(&'static str, f64)>;

/// Measures each system `runs` times, one after the other, as figures `(part) name`.
pub async fn interleaved(
    part: &str,
    runs: usize,
    systems: &[System],
    figures: &mut Figures,
    measure: impl AsyncFn(&System) -> anyhow::Result<Measured>,
) -> anyhow::Result<()> {
    for run in 0..runs {
        // Each system is first in turn, so that what one leaves behind does not always meet the same next one.
        for at in 0..systems.len() {
            let system = &systems[(at + run) % systems.len()];
            eprintln!("({part}) run {}/{runs}: {}", run + 1, system.name);
            let foreign = ForeignLoad::begin()?;
            let mut measured = measure(system).await.with_context(|| format!("{} ({part})", system.name))?;
            measured.push((FOREIGN, foreign.end()?));
            let figures = figures.entry(system.name.clone()).or_default();
            for (name, value) in measured {
                figures.entry(format!("({part}) {name}")).or_default().push(value);
            }
        }
    }
    Ok(())
}

/// Requests over connections that stay open, then each over a new one, and if `with_bulk` a download.
pub async fn throughput(duration: Duration, with_bulk: bool, system: &System) -> anyhow::Result<Measured> {
    let cpu = || cpu_seconds(&system.pids);
    let warm_up = Duration::from_secs(1);
    let (kept, before, after) = closed(&system.target, CONNECTIONS, Mode::KeepAlive, warm_up, duration, cpu).await?;
    let mut measured = vec![
        (RATE, kept.per_second),
        (MIDDLE, kept.p50_ms),
        (TAIL, kept.p99_ms),
        (CPU, per_100k(after? - before?, &kept)),
    ];
    let (fresh, before, after) =
        closed(&system.target, CONNECTIONS, Mode::NewConnections, warm_up, duration, cpu).await?;
    measured.push((FRESH, fresh.per_second));
    measured.push((FRESH_CPU, per_100k(after? - before?, &fresh)));
    measured.push((FAILED, (kept.failed + fresh.failed) as f64));
    if with_bulk {
        measured.push((BULK, bulk(&system.target, BULK_BYTES).await?));
    }
    Ok(measured)
}

fn per_100k(cpu_seconds: f64, figures: &load::Figures) -> f64 {
    cpu_seconds / figures.requests as f64 * 1e5
}

/// Waits until the chain answers at all.
pub async fn first_answer(target: &Target) -> anyhow::Result<()> {
    let deadline = Instant::now() + mesh::ANSWER_TIME_MAX;
    let request = target.request("/");
    loop {
        let outcome = async { Connection::open(target.address).await?.exchange(&request).await };
        let last = match tokio::time::timeout(Duration::from_secs(2), outcome).await {
            Ok(Ok(answer)) if answer.status == 200 => return Ok(()),
            Ok(Ok(answer)) => format!("status {}", answer.status),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "no answer in 2 s".to_owned(),
        };
        if Instant::now() > deadline {
            bail!("no answer from {}: {last}", target.address);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Part, figure, what is better, bar: the ratio of tombolo to the better Envoy.
pub type Ratio<'a> = (&'a str, &'a str, Better, f64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Less,
    More,
}

/// The ratios for that number of tombolo's workers, the same for all, which meets more bars; the smaller one if equal.
pub fn bars(figures: &Figures, ratios: &[Ratio]) -> Vec<Bar> {
    let of = |workers: usize| ratios.iter().map(|ratio| bar(figures, workers, *ratio)).collect::<Vec<_>>();
    let passed = |bars: &Vec<Bar>| bars.iter().filter(|bar| bar.pass).count();
    WORKERS.map(of).into_iter().rev().max_by_key(passed).unwrap_or_default()
}

fn bar(figures: &Figures, workers: usize, (part, figure, better, bar): Ratio) -> Bar {
    let name = format!("({part}) {figure}");
    let envoy = better_envoy(figures, &name, better);
    let ours = figures.get(&format!("tombolo/{workers}")).and_then(|figures| figures.get(&name));
    let ratio = ours.zip(envoy).map(|(ours, envoy)| ours.median / envoy);
    let want = match better {
        Better::Less => Want::AtMost(bar),
        Better::More => Want::AtLeast(bar),
    };
    Bar::new(format!("{name}: tombolo/{workers} to the better Envoy"), want, ratio)
}

/// The better median of Envoy's numbers of workers.
pub fn better_envoy(figures: &Figures, name: &str, better: Better) -> Option<f64> {
    let envoys = figures.iter().filter(|(system, _)| system.starts_with("envoy/"));
    let values = envoys.filter_map(|(_, figures)| Some(figures.get(name)?.median));
    match better {
        Better::Less => values.min_by(f64::total_cmp),
        Better::More => values.max_by(f64::total_cmp),
    }
}
