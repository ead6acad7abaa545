//! Resident memory of each role: idle, and with a thousand connections open across both clusters.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tombolo_kind_tests::client::{Connection, Target};

use crate::Options;
use crate::apps::App;
use crate::compare::first_answer;
use crate::envoy::{Chain, Envoys};
use crate::growth;
use crate::host::resident_mb;
use crate::mesh::{self, CALLER, FEDERATION, GATEWAY, Mesh, SERVER, Setup, pid};
use crate::report::{Bar, Figures, Report, Want};

const CONNECTIONS: usize = 1000;
const SERVICES: usize = 100;
/// Four hundred processes each, so fewer.
const GROWTH_RUNS: usize = 2;
/// Until what starting took is given back, and what an open connection holds is there.
const SETTLE: Duration = Duration::from_secs(3);

pub async fn run(options: &Options) -> anyhow::Result<()> {
    let mut figures = Figures::new();
    for run in 0..options.runs {
        eprintln!("memory run {}/{}: tombolo, then envoy", run + 1, options.runs);
        if let Some(binary) = &options.tombolo {
            tombolo(binary, &mut figures).await.context("tombolo")?;
        }
        envoy(options, &mut figures).await.context("envoy")?;
    }
    if let Some(binary) = &options.tombolo {
        growth::run(binary, options.runs.min(GROWTH_RUNS), &mut figures).await.context("growth")?;
    }
    let worst = |places: &[&str], state: &str| {
        let medians =
            places.iter().map(|place| figures.get(&format!("tombolo {place}"))?.get(state).map(|of| of.median));
        medians.collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::max)
    };
    let (sidecars, gateways) = (["client sidecar", "server sidecar"], ["near gateway", "far gateway"]);
    let federations = ["exporting federation", "importing federation"];
    let mut bars = vec![
        Bar::new("sidecar idle, MB", Want::AtMost(15.0), worst(&sidecars, IDLE)),
        Bar::new("gateway idle, MB", Want::AtMost(20.0), worst(&gateways, IDLE)),
        Bar::new("sidecar with 1,000 connections, MB", Want::AtMost(40.0), worst(&sidecars, OPEN)),
        Bar::new("gateway with 1,000 connections, MB", Want::AtMost(45.0), worst(&gateways, OPEN)),
        Bar::new("federation, 2 clusters and 100 services, MB", Want::AtMost(30.0), worst(&federations, OPEN)),
    ];
    bars.extend(growth::bars(&figures));
    let method = json!({
        "runs": options.runs, "connections": CONNECTIONS, "services": SERVICES, "workers": 1,
        "note": "VmRSS in 10^6 bytes, every run with new processes; open connections are opaque TCP across both \
                 clusters, each after one request; a bar takes the larger of the two processes of a kind",
    });
    Report::new("memory", method, options.versions()?, figures, bars)?.publish(&options.results)
}

const IDLE: &str = "idle, MB";
const OPEN: &str = "1,000 connections, MB";

async fn tombolo(binary: &std::path::Path, figures: &mut Figures) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let app = App::start("west", folder.path()).await?;
    let setup = Setup { workers: 1, caller: json!({}), local_app: None, remote_app: app.address, binary };
    let mesh = Mesh::start(&setup).await?;
    for n in 1..SERVICES {
        let name = format!("service-{n}");
        mesh.west.declare_service("bench", &name, &[("http", 80)])?;
        mesh::export(&mesh.west, "bench", &name)?;
    }
    let places = [
        ("client sidecar", pid(&mesh.east, CALLER)?),
        ("near gateway", pid(&mesh.east, GATEWAY)?),
        ("far gateway", pid(&mesh.west, GATEWAY)?),
        ("server sidecar", pid(&mesh.west, SERVER)?),
        ("importing federation", pid(&mesh.east, FEDERATION)?),
        ("exporting federation", pid(&mesh.west, FEDERATION)?),
    ];
    measure(&Target::direct(mesh.tcp, mesh::HOST), "tombolo", &places, figures).await?;
    mesh.stop().await;
    Ok(())
}

async fn envoy(options: &Options, figures: &mut Figures) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let app = App::start("west", folder.path()).await?;
    let envoys = Envoys::start(&options.envoy, folder.path(), Chain::Opaque, 1, app.address)?;
    let places = [
        ("client sidecar", envoys.pid("client-sidecar")?),
        ("near gateway", envoys.pid("near-gateway")?),
        ("far gateway", envoys.pid("far-gateway")?),
        ("server sidecar", envoys.pid("server-sidecar")?),
    ];
    measure(&Target::direct(envoys.entrance, mesh::HOST), "envoy", &places, figures).await
}

async fn measure(target: &Target, system: &str, places: &[(&str, u32)], figures: &mut Figures) -> anyhow::Result<()> {
    first_answer(target).await?;
    tokio::time::sleep(SETTLE).await;
    let mut note = |state: &str| -> anyhow::Result<()> {
        for (place, pid) in places {
            let figures = figures.entry(format!("{system} {place}")).or_default();
            figures.entry(state.to_owned()).or_default().push(resident_mb(*pid)?);
        }
        Ok(())
    };
    note(IDLE)?;
    let mut open = Vec::with_capacity(CONNECTIONS);
    for n in 0..CONNECTIONS {
        let mut connection = Connection::open(target.address).await?;
        let answer = connection.exchange(&target.request("/")).await.with_context(|| format!("connection {n}"))?;
        anyhow::ensure!(answer.status == 200, "connection {n}: status {}", answer.status);
        open.push(connection);
    }
    tokio::time::sleep(SETTLE).await;
    note(OPEN)
}
