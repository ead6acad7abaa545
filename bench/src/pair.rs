//! Two sidecars of one cluster: opaque, then HTTP with a route, a policy, metrics and a hundredth of the traces, beside
//! Envoy with the same.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use tempfile::TempDir;
use tombolo_kind_tests::client::Target;
use tombolo_kind_tests::open_loop::Load;
use tombolo_testbed::{Binary, Cluster, Jaeger};

use crate::Options;
use crate::apps::App;
use crate::compare::{
    BULK, BULK_BYTES, Better, CONNECTIONS, CPU, FRESH, Measured, RATE, Ratio, System, TAIL, WORKERS, bars,
    better_envoy, interleaved, throughput,
};
use crate::envoy::{Chain, Envoys};
use crate::load::percentile;
use crate::mesh::{self, CALLER, HTTP_PORT, SERVER, TCP_PORT, pid, start_caller, start_server};
use crate::report::{Figures, Report};

/// Of Envoy's most requests a second, as many as a service that is busy but healthy has.
const BUSY: f64 = 0.6;
/// Whose traces are looked for, and how many there are at least: a hundredth of thousands of requests.
const TRACED: [&str; 3] = ["tombolo-sidecar", "client-sidecar", "server-sidecar"];
const TRACES_MIN: usize = 10;
const TRACES_WITHIN: Duration = Duration::from_secs(30);
/// Late is failed.
const DEADLINE: Duration = Duration::from_secs(2);

pub async fn run(options: &Options) -> anyhow::Result<()> {
    let jaeger = options.jaeger.as_deref().context("where is Jaeger? bench/run builds it and says so with --jaeger")?;
    let folder = tempfile::tempdir()?;
    let app = App::start("east", folder.path()).await?;
    let jaeger = Jaeger::start(jaeger, folder.path()).await?;
    let mut figures = Figures::new();
    for part in [Part::Opaque, Part::Http { otlp: jaeger.otlp }] {
        if options.only.as_ref().is_none_or(|only| only == part.letter()) {
            measure_part(options, part, &app, &folder, &mut figures).await?;
            if part != Part::Opaque {
                traced(&jaeger, options.tombolo.is_some()).await?;
            }
        }
    }
    let method = json!({
        "runs": options.runs, "seconds": options.seconds, "connections": CONNECTIONS, "bulkBytes": BULK_BYTES,
        "note": "runs of the systems are interleaved; ratios are of medians, tombolo with one number of workers for all bars \
                 against the better of Envoy's two; all processes share this machine; (b) with two routes, a policy that \
                 allows the caller only, metrics, and 1 % of the traces sent to a Jaeger; (busy) is an open loop at 60 % of \
                 the requests/s of the better Envoy in (b)",
    });
    let bars = bars(&figures, RATIOS);
    Report::new("pair", method, options.versions()?, figures, bars)?.publish(&options.results)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Opaque,
    Http { otlp: SocketAddr },
}

impl Part {
    fn letter(self) -> &'static str {
        match self {
            Part::Opaque => "a",
            Part::Http { .. } => "b",
        }
    }

    fn envoy_chain(self) -> Chain {
        match self {
            Part::Opaque => Chain::Pair,
            Part::Http { otlp } => Chain::PairHttp { otlp: otlp.port() },
        }
    }
}

async fn measure_part(
    options: &Options,
    part: Part,
    app: &App,
    folder: &TempDir,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let mut systems = Vec::new();
    let mut clusters = Vec::new();
    for workers in WORKERS {
        let folder = folder.path().join(format!("{}-{workers}", part.letter()));
        let envoys = Envoys::start(&options.envoy, &folder.join("envoy"), part.envoy_chain(), workers, app.address)?;
        systems.push(System::envoy(workers, envoys));
        if let Some(binary) = &options.tombolo {
            let (cluster, target) = start(binary, &folder, workers, part, app.address).await.context("tombolo")?;
            let pids = vec![pid(&cluster, CALLER)?, pid(&cluster, SERVER)?];
            systems.push(System { name: format!("tombolo/{workers}"), target, pids, envoys: None });
            clusters.push(cluster);
        }
    }
    for system in &systems {
        system.first_answer(part.letter()).await?;
    }
    let duration = Duration::from_secs(options.seconds);
    interleaved(part.letter(), options.runs, &systems, figures, async |system| {
        throughput(duration, part == Part::Opaque, system).await
    })
    .await?;
    if part != Part::Opaque {
        let most = better_envoy(figures, &format!("({}) {RATE}", part.letter()), Better::More)
            .context("Envoy's requests/s")?;
        let rate = (most * BUSY) as u32;
        interleaved("busy", options.runs, &systems, figures, async |system| busy(rate, duration * 2, system).await)
            .await?;
    }
    for mut cluster in clusters {
        cluster.stop().await;
    }
    Ok(())
}

/// What is measured with traces on is worth nothing if none arrives.
async fn traced(jaeger: &Jaeger, with_tombolo: bool) -> anyhow::Result<()> {
    for service in TRACED.into_iter().filter(|service| with_tombolo || !service.starts_with("tombolo")) {
        let deadline = Instant::now() + TRACES_WITHIN;
        loop {
            let traces = jaeger.traces(service).await?;
            if traces >= TRACES_MIN {
                eprintln!("(b) {traces} traces or more of {service} arrived");
                break;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{traces} traces of {service} arrived, of many thousand requests"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

async fn start(
    binary: &Path,
    folder: &Path,
    workers: usize,
    part: Part,
    app: SocketAddr,
) -> anyhow::Result<(Cluster, Target)> {
    let binary = Binary::at(binary).with_variable("TOMBOLO_WORKERS", &workers.to_string());
    let mut common = json!({ "log": { "level": "warn" } });
    if let Part::Http { otlp } = part {
        common["telemetry"] = json!({ "otlp": format!("http://{otlp}"), "sampleRatio": 0.01 });
    }
    let mut cluster = Cluster::new(&binary, "east", folder, common)?;
    cluster.declare_service("bench", "echo", &[("http", HTTP_PORT), ("tcp", TCP_PORT)])?;
    if part != Part::Opaque {
        cluster.write_resource("access.yaml", ACCESS)?;
        cluster.write_resource("route.yaml", ROUTE)?;
    }
    cluster.start_federation(json!({})).await?;
    start_server(&mut cluster, app).await?;
    let caller = start_caller(&mut cluster, &json!({})).await?;
    let problems = &cluster.status().await?["problems"];
    anyhow::ensure!(problems.as_array().is_none_or(Vec::is_empty), "{problems}");
    let listener = if part == Part::Opaque { "listener-1" } else { "listener-0" };
    let target = Target::direct(caller.address(listener)?, mesh::HOST);
    Ok((cluster, target))
}

const ACCESS: &str = "\
apiVersion: tombolo.dev/v1alpha1
kind: AccessPolicy
metadata: {name: echo, namespace: bench}
spec:
  targetRefs: [{kind: Service, name: echo}]
  rules: [{from: [{serviceAccounts: [client]}]}]
";

const ROUTE: &str = "\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: echo, namespace: bench}
spec:
  parentRefs: [{group: \"\", kind: Service, name: echo}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /other}}]
    timeouts: {request: 10s}
    backendRefs: [{name: echo, port: 80}]
  - timeouts: {request: 10s}
    backendRefs: [{name: echo, port: 80}]
";

/// Milliseconds from when a request was due until it was answered.
async fn busy(rate: u32, duration: Duration, system: &System) -> anyhow::Result<Measured> {
    let load = Load::start(system.target.clone(), rate, CONNECTIONS, DEADLINE);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    tokio::time::sleep(duration).await;
    let samples: Vec<_> = load.stop().await.into_iter().filter(|sample| sample.due >= began).collect();
    let failed = samples.iter().filter(|sample| !sample.is_ok()).count();
    let mut micros: Vec<u32> =
        samples.iter().map(|sample| u32::try_from(sample.latency().as_micros()).unwrap_or(u32::MAX)).collect();
    micros.sort_unstable();
    Ok(vec![(TAIL, percentile(&micros, 0.99) / 1e3), ("failed", failed as f64)])
}

const RATIOS: &[Ratio<'_>] = &[
    ("a", CPU, Better::Less, 0.85),
    ("a", RATE, Better::More, 1.1),
    ("a", BULK, Better::More, 0.9),
    ("a", FRESH, Better::More, 1.3),
    ("b", RATE, Better::More, 1.6),
    ("b", CPU, Better::Less, 0.55),
    ("b", FRESH, Better::More, 1.4),
    ("busy", TAIL, Better::Less, 0.7),
];
