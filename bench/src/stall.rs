//! Many clients ask for a lot and stop reading: what that does to the others, and to the gateways' memory.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tombolo_kind_tests::client::Target;

use crate::Options;
use crate::apps::App;
use crate::compare::first_answer;
use crate::host::{ForeignLoad, resident_mb};
use crate::load::paced;
use crate::mesh::{self, CALLER, GATEWAY, Mesh, SERVER, Setup, pid};
use crate::report::{Bar, Figures, Report, Want};

const STALLED: usize = 200;
const STALL_TIME: Duration = Duration::from_secs(60);
const PACE: u32 = 300;
/// More than all buffers on the way take together.
const ASKED: &str = "/bulk/1000000000";

pub async fn run(options: &Options) -> anyhow::Result<()> {
    let binary = options.tombolo.as_ref().context("--tombolo is needed: this bench measures no peer")?;
    let folder = tempfile::tempdir()?;
    let app = App::start("west", folder.path()).await?;
    let setup = Setup { workers: 1, caller: json!({}), local_app: None, remote_app: app.address, binary };
    let mesh = Mesh::start(&setup).await?;
    let target = Target::direct(mesh.tcp, mesh::HOST);
    first_answer(&target).await?;
    let places = [
        ("client sidecar", pid(&mesh.east, CALLER)?),
        ("near gateway", pid(&mesh.east, GATEWAY)?),
        ("far gateway", pid(&mesh.west, GATEWAY)?),
        ("server sidecar", pid(&mesh.west, SERVER)?),
    ];
    let mut figures = Figures::new();
    for run in 0..options.runs {
        eprintln!("stall run {}/{}", run + 1, options.runs);
        one_run(&target, &places, &mut figures).await?;
    }
    mesh.stop().await;
    let median = |state: &str, name: &str| Some(figures.get(state)?.get(name)?.median);
    let ratio = median(DURING, TAIL).zip(median(BEFORE, TAIL)).map(|(during, before)| during / before);
    let memory = |place: &str| figures.get(DURING)?.get(&resident(place)).map(|series| series.max);
    let bars = vec![
        Bar::new("p99 of other legs, stalled to before", Want::AtMost(1.2), ratio),
        Bar::new("near gateway, most MB", Want::AtMost(150.0), memory("near gateway")),
        Bar::new("far gateway, most MB", Want::AtMost(150.0), memory("far gateway")),
    ];
    let method = json!({
        "runs": options.runs, "stalledLegs": STALLED, "seconds": STALL_TIME.as_secs(), "requestsPerSecond": PACE,
        "note": "each stalled client asks for 1 GB over an opaque leg and reads nothing; beside them one connection, \
                 open loop; before and during for equally long; memory is the largest value seen",
    });
    Report::new("stall", method, options.versions()?, figures, bars)?.publish(&options.results)
}

const BEFORE: &str = "before";
const DURING: &str = "200 stalled";
const MIDDLE: &str = "p50 ms";
const TAIL: &str = "p99 ms";

fn resident(place: &str) -> String {
    format!("{place}, most MB")
}

async fn one_run(target: &Target, places: &[(&str, u32)], figures: &mut Figures) -> anyhow::Result<()> {
    observe(target, places, figures.entry(BEFORE.to_owned()).or_default()).await?;
    let mut stalled = Vec::with_capacity(STALLED);
    for _ in 0..STALLED {
        let mut stream = TcpStream::connect(target.address).await?;
        stream.write_all(&target.request(ASKED)).await?;
        stalled.push(stream);
    }
    // Until the buffers on the way are full.
    tokio::time::sleep(Duration::from_secs(5)).await;
    observe(target, places, figures.entry(DURING.to_owned()).or_default()).await?;
    drop(stalled);
    first_answer(target).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    Ok(())
}

type OfOneState = std::collections::BTreeMap<String, crate::report::Series>;

/// Asks at a steady pace, and looks at the memory meanwhile.
async fn observe(target: &Target, places: &[(&str, u32)], figures: &mut OfOneState) -> anyhow::Result<()> {
    let foreign = ForeignLoad::begin()?;
    let mut most = vec![0.0_f64; places.len()];
    let asking = paced(target.clone(), PACE, STALL_TIME);
    tokio::pin!(asking);
    let (p50, p99) = loop {
        tokio::select! {
            outcome = &mut asking => break outcome?,
            () = tokio::time::sleep(Duration::from_millis(500)) => {
                for ((_, pid), most) in places.iter().zip(&mut most) {
                    *most = most.max(resident_mb(*pid)?);
                }
            }
        }
    };
    let mut note = |name: String, value: f64| figures.entry(name).or_default().push(value);
    note(MIDDLE.to_owned(), p50);
    note(TAIL.to_owned(), p99);
    note("foreign load, processors".to_owned(), foreign.end()?);
    for ((place, _), most) in places.iter().zip(most) {
        note(resident(place), most);
    }
    Ok(())
}
