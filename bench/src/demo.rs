//! From the demo's start to the first request that crossed, as somebody who types `make demo` sees it.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::Options;
use crate::report::{Bar, Figures, Report, Want};

/// The line that the demo prints when the first request has crossed.
const CROSSED: &str = "first success";
const TIME_MAX: Duration = Duration::from_secs(60);

pub async fn run(options: &Options) -> anyhow::Result<()> {
    let binary = options.tombolo.as_ref().context("--tombolo is needed: this bench measures no peer")?;
    let mut figures = Figures::new();
    for run in 0..options.runs {
        let seconds = tokio::time::timeout(TIME_MAX, once(binary)).await.context("the demo does not get there")??;
        eprintln!("demo run {}/{}: {seconds:.2} s", run + 1, options.runs);
        figures
            .entry("tombolo".into())
            .or_default()
            .entry("first crossing request, s".into())
            .or_default()
            .push(seconds);
    }
    let got = figures["tombolo"]["first crossing request, s"].median;
    let bars = vec![Bar::new("first crossing request after the demo's start, s", Want::AtMost(3.0), Some(got))];
    let method = json!({
        "runs": options.runs,
        "note": "from starting `tombolo demo --once` to its line about the first crossing request",
    });
    Report::new("demo", method, options.versions()?, figures, bars)?.publish(&options.results)
}

async fn once(binary: &std::path::Path) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut demo = Command::new(binary)
        .args(["demo", "--once"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(demo.stdout.take().context("its standard output")?).lines();
    let mut crossed = None;
    // Read to the end: the demo cleans up after itself when it is done.
    while let Some(line) = lines.next_line().await? {
        if crossed.is_none() && line.contains(CROSSED) {
            crossed = Some(began.elapsed().as_secs_f64());
        }
    }
    match (demo.wait().await?, crossed) {
        (status, Some(seconds)) if status.success() => Ok(seconds),
        (status, _) => bail!("`tombolo demo --once` ended with {status}"),
    }
}
