//! What a sidecar's memory grows by with what it knows: endpoints of a service that it uses, and services that it doesn't.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tombolo_kind_tests::client::Target;
use tombolo_testbed::{Cluster, Sidecar};

use crate::apps::App;
use crate::compare::first_answer;
use crate::host::resident_mb;
use crate::mesh::{self, CALLER, Mesh, Setup, pid};
use crate::report::{Bar, Figures, Want};

/// Each is a sidecar of the exporting cluster, a process of its own. With the first ones, what is needed once is there: code that
/// takes in a change, and room for it.
const FIRST_ENDPOINTS: usize = 100;
const ENDPOINTS: usize = 400;
/// In the clusterset, with those in use.
const SERVICES: usize = 10_000;
const USED: usize = 5;
/// Services that one file declares and exports.
const SERVICES_IN_FILE: usize = 100;
const KNOWN_TIME_MAX: Duration = Duration::from_secs(120);
/// Until what learning took is given back.
const SETTLE: Duration = Duration::from_secs(5);

const SYSTEM: &str = "tombolo client sidecar";
const ENDPOINT: &str = "each known endpoint in use, KB";
const SERVICE: &str = "10,000 services of which it uses five, MB added";

pub async fn run(binary: &Path, runs: usize, figures: &mut Figures) -> anyhow::Result<()> {
    for run in 0..runs {
        eprintln!("memory run {}/{runs}: {ENDPOINTS} endpoints, then {SERVICES} services", run + 1);
        let grown_mb = endpoints(binary).await.context("endpoints")?;
        let figures = figures.entry(SYSTEM.to_owned()).or_default();
        figures.entry(ENDPOINT.to_owned()).or_default().push(grown_mb * 1000.0 / (ENDPOINTS - FIRST_ENDPOINTS) as f64);
        let grown_mb = services(binary).await.context("services")?;
        figures.entry(SERVICE.to_owned()).or_default().push(grown_mb);
    }
    Ok(())
}

pub fn bars(figures: &Figures) -> [Bar; 2] {
    let median = |name: &str| figures.get(SYSTEM)?.get(name).map(|of| of.median);
    [(ENDPOINT, 2.0), (SERVICE, 1.0)]
        .map(|(name, most)| Bar::new(format!("sidecar: {name}"), Want::AtMost(most), median(name)))
}

/// Megabytes that the caller's sidecar has grown by, from the first endpoints to all of them.
async fn endpoints(binary: &Path) -> anyhow::Result<f64> {
    let folder = tempfile::tempdir()?;
    let app = App::start("west", folder.path()).await?;
    let mut mesh = start(binary, &app).await?;
    let target = Target::proxied(mesh.outbound, mesh::HOST);
    first_answer(&target).await?;
    start_endpoints(&mut mesh, &app, 0..FIRST_ENDPOINTS).await?;
    first_answer(&target).await?;
    let before = settled(&mesh).await?;
    start_endpoints(&mut mesh, &app, FIRST_ENDPOINTS..ENDPOINTS).await?;
    first_answer(&target).await?;
    let after = settled(&mesh).await?;
    mesh.stop().await;
    Ok(after - before)
}

/// Starts these sidecars, and waits until the caller's cluster knows of them all.
async fn start_endpoints(mesh: &mut Mesh, app: &App, numbers: Range<usize>) -> anyhow::Result<()> {
    // With the one that the mesh began with.
    let all = numbers.end as u64 + 1;
    for n in numbers {
        let ports = [mesh::HTTP_PORT, mesh::TCP_PORT];
        let serves = ports.map(|port| json!({ "service": "bench/echo", "port": port, "app": app.address }));
        let (name, config) = (format!("echo-{n}"), json!({ "services": serves }));
        mesh.west.start_sidecar(Sidecar { name: &name, workload: "bench/echo", config }).await?;
    }
    known(&mesh.east, "endpoints of bench/echo", all, |status| {
        let services = status["services"].as_array()?;
        let echo = services.iter().find(|row| row["service"] == "bench/echo")?;
        let shares = echo["shares"].as_array()?;
        shares.iter().find(|share| share["cluster"] == "west")?["ready"].as_u64()
    })
    .await
}

async fn services(binary: &Path) -> anyhow::Result<f64> {
    let folder = tempfile::tempdir()?;
    let app = App::start("west", folder.path()).await?;
    let mut mesh = start(binary, &app).await?;
    let used: Vec<String> = (1..USED).map(|n| format!("used-{n}")).collect();
    declare(&mesh.west, "used", &used)?;
    let serves: Vec<Value> =
        used.iter().map(|name| json!({ "service": format!("bench/{name}"), "port": 80, "app": app.address })).collect();
    let config = json!({ "services": serves });
    mesh.west.start_sidecar(Sidecar { name: "used", workload: "bench/used", config }).await?;
    first_answer(&Target::proxied(mesh.outbound, mesh::HOST)).await?;
    for name in &used {
        let host = format!("{name}.bench.svc.clusterset.local");
        first_answer(&Target::proxied(mesh.outbound, &host)).await?;
    }
    let before = settled(&mesh).await?;
    let others: Vec<String> = (USED..SERVICES).map(|n| format!("service-{n}")).collect();
    for (file, names) in others.chunks(SERVICES_IN_FILE).enumerate() {
        declare(&mesh.west, &format!("services-{file}"), names)?;
    }
    let all = SERVICES as u64;
    known(&mesh.east, "services", all, |status| Some(status["services"].as_array()?.len() as u64)).await?;
    let after = settled(&mesh).await?;
    mesh.stop().await;
    Ok(after - before)
}

async fn start(binary: &Path, app: &App) -> anyhow::Result<Mesh> {
    let setup = Setup { workers: 1, caller: json!({}), local_app: None, remote_app: app.address, binary };
    Mesh::start(&setup).await
}

/// Declares and exports services, all served by the service account `used`, in one file.
fn declare(cluster: &Cluster, file: &str, names: &[String]) -> anyhow::Result<()> {
    let documents = names.iter().flat_map(|name| {
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": name, "namespace": "bench", "annotations": { "tombolo.dev/service-accounts": "used" } },
            "spec": { "ports": [{ "name": "http", "port": 80 }] },
        });
        let export = json!({
            "apiVersion": "multicluster.x-k8s.io/v1beta1",
            "kind": "ServiceExport",
            "metadata": { "name": name, "namespace": "bench" },
        });
        [service.to_string(), export.to_string()]
    });
    cluster.write_resource(&format!("{file}.yaml"), &documents.collect::<Vec<_>>().join("\n---\n"))
}

/// Waits until the cluster's federation knows so many.
async fn known(cluster: &Cluster, what: &str, many: u64, count: impl Fn(&Value) -> Option<u64>) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let has = cluster.status().await.map(|status| count(&status));
        if matches!(has, Ok(Some(has)) if has >= many) {
            return Ok(());
        }
        ensure!(began.elapsed() < KNOWN_TIME_MAX, "{} knows {has:?} {what}, not {many}", cluster.name);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn settled(mesh: &Mesh) -> anyhow::Result<f64> {
    tokio::time::sleep(SETTLE).await;
    resident_mb(pid(&mesh.east, CALLER)?)
}
