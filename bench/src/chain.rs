//! A request across two sidecars and two gateways: throughput, CPU, tail, bulk and new connections, beside
//! Envoy in the same places.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tempfile::TempDir;
use tombolo_kind_tests::client::Target;

use crate::Options;
use crate::apps::App;
use crate::compare::{
    BULK, BULK_BYTES, Better, CONNECTIONS, CPU, FRESH, MIDDLE, Measured, RATE, Ratio, System, TAIL, WORKERS, bars,
    interleaved, throughput,
};
use crate::envoy::{Chain, Envoys};
use crate::load::paced;
use crate::mesh::{self, Mesh, Setup};
use crate::report::{Figures, Report};

const PACE: u32 = 300;

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
    let bars = bars(&figures, RATIOS);
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
        systems.push(System::envoy(workers, envoys));
    }
    for (workers, mesh) in meshes {
        let entrance = if part == Part::Http { mesh.http } else { mesh.tcp };
        let (target, pids) = (Target::direct(entrance, mesh::HOST), mesh.data_path()?);
        systems.push(System { name: format!("tombolo/{workers}"), target, pids, envoys: None });
    }
    for system in &systems {
        system.first_answer(part.letter()).await?;
    }
    let duration = Duration::from_secs(options.seconds);
    interleaved(part.letter(), options.runs, &systems, figures, async |system| match part {
        Part::Latency => latency(duration, system).await,
        Part::Opaque | Part::Http => throughput(duration, part == Part::Opaque, system).await,
    })
    .await
}

async fn latency(duration: Duration, system: &System) -> anyhow::Result<Measured> {
    let (p50, p99) = paced(system.target.clone(), PACE, duration * 2).await?;
    Ok(vec![(MIDDLE, p50), (TAIL, p99)])
}

const RATIOS: &[Ratio<'_>] = &[
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
