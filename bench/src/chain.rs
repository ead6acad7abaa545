//! A request across two sidecars and two gateways: throughput, CPU, tail, bulk and new connections, beside
//! Envoy in the same places.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::json;
use tempfile::TempDir;

use crate::apps::App;
use crate::client::{Connection, Target};
use crate::envoy::{Chain, Envoys};
use crate::host::{ForeignLoad, cpu_seconds};
use crate::load::{Mode, bulk, closed, paced};
use crate::mesh::{self, Mesh, Setup};
use crate::report::{Bar, Figures, Report, Want};
use crate::{Options, load};

const CONNECTIONS: usize = 64;
const WORKERS: [usize; 2] = [1, 2];
const PACE: u32 = 300;
const BULK_BYTES: u64 = 1_000_000_000;

const CPU: &str = "CPU s / 100,000 requests";
const RATE: &str = "requests/s";
const TAIL: &str = "p99 ms";
const MIDDLE: &str = "p50 ms";
const BULK: &str = "bulk Gbit/s";
const FRESH: &str = "new connections/s";
const FRESH_CPU: &str = "CPU s / 100,000 connections";
const FOREIGN: &str = "foreign load, processors";
const FAILED: &str = "failed";

/// One chain under test, by the name of its column.
struct System {
    name: String,
    target: Target,
    pids: Vec<u32>,
    /// Which processes end with it.
    envoys: Option<Envoys>,
}

pub async fn run(options: &Options) -> anyhow::Result<()> {
    let mut figures = Figures::new();
    let folder = tempfile::tempdir()?;
    let app = App::start("west", folder.path()).await?;
    let mut meshes = Vec::new();
    if let Some(binary) = &options.tombolo {
        for workers in WORKERS {
            let setup = Setup { workers, caller: json!({}), local_app: None, remote_app: app.address, binary };
            meshes.push((workers, Mesh::start(&setup).await.with_context(|| format!("tombolo, {workers} workers"))?));
        }
    }
    for part in [Part::Opaque, Part::Http, Part::Latency] {
        if options.only.as_ref().is_some_and(|only| only != part.letter()) {
            continue;
        }
        measure_part(options, part, &app, &meshes, &folder, &mut figures).await?;
    }
    for (_, mesh) in meshes {
        mesh.stop().await;
    }
    let method = json!({
        "runs": options.runs, "seconds": options.seconds, "connections": CONNECTIONS, "bulkBytes": BULK_BYTES,
        "latencyRequestsPerSecond": PACE,
        "note": "runs of the systems are interleaved; ratios are of medians, tombolo with one number of workers \
                 for all bars against the better of Envoy's two; all processes share this machine",
    });
    let bars = bars(&figures);
    Report::new("chain", method, options.versions()?, figures, bars)?.publish(&options.results)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Opaque,
    Http,
    Latency,
}

impl Part {
    fn letter(self) -> &'static str {
        match self {
            Part::Opaque => "a",
            Part::Http => "b",
            Part::Latency => "c",
        }
    }

    fn envoy_chain(self) -> Chain {
        match self {
            Part::Opaque => Chain::Opaque,
            Part::Http => Chain::Http,
            Part::Latency => Chain::SniPassthrough,
        }
    }
}

async fn measure_part(
    options: &Options,
    part: Part,
    app: &App,
    meshes: &[(usize, Mesh)],
    folder: &TempDir,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let direct = Target::direct(app.address, mesh::HOST);
    let mut systems = vec![System { name: "direct".to_owned(), target: direct, pids: Vec::new(), envoys: None }];
    for workers in WORKERS {
        let folder = folder.path().join(format!("envoy-{}-{workers}", part.letter()));
        let envoys = Envoys::start(&options.envoy, &folder, part.envoy_chain(), workers, app.address)?;
        systems.push(System {
            name: format!("envoy/{workers}"),
            target: Target::direct(envoys.entrance, mesh::HOST),
            pids: envoys.pids(),
            envoys: Some(envoys),
        });
    }
    for (workers, mesh) in meshes {
        let entrance = if part == Part::Http { mesh.http } else { mesh.tcp };
        let (target, pids) = (Target::direct(entrance, mesh::HOST), mesh.data_path()?);
        systems.push(System { name: format!("tombolo/{workers}"), target, pids, envoys: None });
    }
    for system in &systems {
        first_answer(&system.target).await.with_context(|| {
            let words = system.envoys.as_ref().map(Envoys::words).unwrap_or_default();
            format!("{} ({}){words}", system.name, part.letter())
        })?;
    }
    for run in 0..options.runs {
        // Each system is first in turn, so that what one leaves behind does not always meet the same next one.
        for at in 0..systems.len() {
            let system = &systems[(at + run) % systems.len()];
            eprintln!("chain {} run {}/{}: {}", part.letter(), run + 1, options.runs, system.name);
            let foreign = ForeignLoad::begin()?;
            let mut measured = match part {
                Part::Latency => latency(options, system).await,
                Part::Opaque | Part::Http => throughput(options, part, system).await,
            }
            .with_context(|| format!("{} ({})", system.name, part.letter()))?;
            measured.push((FOREIGN, foreign.end()?));
            let figures = figures.entry(system.name.clone()).or_default();
            for (name, value) in measured {
                figures.entry(format!("({}) {name}", part.letter())).or_default().push(value);
            }
        }
    }
    Ok(())
}

async fn throughput(options: &Options, part: Part, system: &System) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let duration = Duration::from_secs(options.seconds);
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
    if part == Part::Opaque {
        measured.push((BULK, bulk(&system.target, BULK_BYTES).await?));
    }
    Ok(measured)
}

async fn latency(options: &Options, system: &System) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let (p50, p99) = paced(system.target.clone(), PACE, Duration::from_secs(options.seconds * 2)).await?;
    Ok(vec![(MIDDLE, p50), (TAIL, p99)])
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

/// (part, figure, what is better, bar): the ratio of tombolo to the better Envoy.
const RATIOS: &[(&str, &str, Better, f64)] = &[
    ("a", CPU, Better::Less, 0.9),
    ("a", RATE, Better::More, 1.05),
    ("a", TAIL, Better::Less, 1.0),
    ("a", BULK, Better::More, 0.6),
    ("a", FRESH, Better::More, 1.2),
    ("b", RATE, Better::More, 1.4),
    ("b", CPU, Better::Less, 0.65),
    ("b", TAIL, Better::Less, 0.8),
    ("b", FRESH, Better::More, 1.2),
    ("c", MIDDLE, Better::Less, 1.0),
    ("c", TAIL, Better::Less, 1.0),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Better {
    Less,
    More,
}

fn bars(figures: &Figures) -> Vec<Bar> {
    let of = |workers: usize| RATIOS.iter().map(|ratio| bar(figures, workers, *ratio)).collect::<Vec<_>>();
    // The number of workers that meets more bars, the smaller one if equal; the same one for all.
    let passed = |bars: &Vec<Bar>| bars.iter().filter(|bar| bar.pass).count();
    WORKERS.map(of).into_iter().rev().max_by_key(passed).unwrap_or_default()
}

fn bar(figures: &Figures, workers: usize, (part, figure, better, bar): (&str, &str, Better, f64)) -> Bar {
    let name = format!("({part}) {figure}");
    let median = |system: &String, figures: &BTreeMap<String, crate::report::Series>| {
        figures.get(&name).map(|series| (system.clone(), series.median))
    };
    let envoys = figures.iter().filter(|(system, _)| system.starts_with("envoy/"));
    let values = envoys.filter_map(|(system, figures)| median(system, figures)).map(|(_, value)| value);
    let envoy = match better {
        Better::Less => values.min_by(f64::total_cmp),
        Better::More => values.max_by(f64::total_cmp),
    };
    let ours = figures.get(&format!("tombolo/{workers}")).and_then(|figures| figures.get(&name));
    let ratio = ours.zip(envoy).map(|(ours, envoy)| ours.median / envoy);
    let want = match better {
        Better::Less => Want::AtMost(bar),
        Better::More => Want::AtLeast(bar),
    };
    Bar::new(format!("{name}: tombolo/{workers} to the better Envoy"), want, ratio)
}
