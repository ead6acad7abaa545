//! What the end-to-end tests share: clusters on loopback, `curl`, applications, and waiting for conditions.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod app;
pub mod netns;
pub mod process;
pub mod resolver;
pub mod unmeshed;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::sync::{Mutex, MutexGuard};
use tombolo_testbed::{Binary, Cluster, Sidecar};

/// How long any single condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(20);

/// Each of these tests runs a dozen processes: one test at a time, so that none starves another.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

pub fn binary() -> Binary {
    Binary::at(env!("CARGO_BIN_EXE_tombolo"))
}

/// A directory for a test's clusters, and the right to run them.
pub struct World {
    pub directory: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    pub async fn new() -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        Self { directory: tempfile::Builder::new().prefix("tombolo-test-").tempdir().unwrap(), _turn: turn }
    }

    /// A cluster with a federation and one gateway, running.
    pub async fn cluster(&self, name: &str) -> Cluster {
        self.cluster_with(name, json!({}), json!({})).await
    }

    pub async fn cluster_with(&self, name: &str, common: Value, federation: Value) -> Cluster {
        let mut cluster = Cluster::new(&binary(), name, self.directory.path(), common).unwrap();
        cluster.start_federation(federation).await.unwrap();
        cluster.start_gateway("gw", Value::Null).await.unwrap();
        cluster
    }

    /// A cluster whose gateway can't be dialled from anywhere.
    pub async fn hidden_cluster(&self, name: &str) -> Cluster {
        let mut cluster = Cluster::new(&binary(), name, self.directory.path(), json!({})).unwrap();
        cluster.start_federation(json!({})).await.unwrap();
        cluster.start_gateway("gw", json!({ "advertise": [] })).await.unwrap();
        cluster
    }
}

/// A sidecar without services: one that calls.
pub async fn start_caller(cluster: &mut Cluster) -> SocketAddr {
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config: Value::Null };
    cluster.start_sidecar(sidecar).await.unwrap().address("outbound").unwrap()
}

/// Declares `shop/<name>`, and starts the sidecar that delivers its one port to `app`.
pub async fn serve(cluster: &mut Cluster, name: &str, port_name: &str, protocol: &str, app: SocketAddr) {
    cluster.declare_service("shop", name, &[(port_name, 80)]).unwrap();
    let service = json!({
        "service": format!("shop/{name}"),
        "port": 80,
        "app": app,
        "protocol": protocol,
        "health": { "tcp": {}, "interval": "200ms", "timeout": "1s" },
    });
    let workload = format!("shop/{name}");
    let sidecar = Sidecar { name, workload: &workload, config: json!({ "services": [service] }) };
    cluster.start_sidecar(sidecar).await.unwrap();
}

/// Links `b` to `a` by invitation, each letting the other bring in everything, and waits until both are in sync.
pub async fn link(a: &Cluster, b: &Cluster) {
    let token = a.operator(&["peer", "invite", "--imports", "*"]).await.unwrap();
    b.operator(&["peer", "accept", &token, "--imports", "*"]).await.unwrap();
    in_sync(a, &b.name).await;
    in_sync(b, &a.name).await;
}

/// Waits until `cluster` has a tunnel to `peer` and hears from it.
pub async fn in_sync(cluster: &Cluster, peer: &str) {
    until(&format!("{} to be in sync with {peer}", cluster.name), async || {
        let status = cluster.status().await.ok()?;
        let row = status["peers"].as_array()?.iter().find(|row| row["cluster"] == peer)?.clone();
        let up = row["tunnels"].as_array()?.iter().any(|tunnel| tunnel["reach"] == "up");
        (up && row["sync"] == "fresh").then_some(())
    })
    .await;
}

/// What `curl` got.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Runs the real `curl` with a sidecar as its proxy.
pub async fn curl(proxy: SocketAddr, arguments: &[&str]) -> Answer {
    let proxy = format!("http://{proxy}");
    let mut all = vec!["-sS", "-m", "10", "-D", "/dev/stderr", "-x", &proxy];
    all.extend_from_slice(arguments);
    let output = Command::new("curl").args(&all).stdin(Stdio::null()).output().await.expect("curl is installed");
    let headers = String::from_utf8_lossy(&output.stderr).into_owned();
    // The last status line counts: interim responses come before it.
    let status =
        headers.lines().filter_map(|line| line.strip_prefix("HTTP/")?.split(' ').nth(1)?.parse().ok()).next_back();
    Answer { status: status.unwrap_or(0), headers, body: String::from_utf8_lossy(&output.stdout).into_owned() }
}

/// What an admin port answers.
pub async fn get(admin: SocketAddr, path: &str) -> String {
    let url = format!("http://{admin}{path}");
    let output = Command::new("curl").args(["-sS", "-m", "5", &url]).stdin(Stdio::null()).output().await.unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Curls until the answer is a success of the application `name`.
pub async fn curl_until(proxy: SocketAddr, url: &str, name: &str) -> Answer {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = curl(proxy, &["-H", "tombolo-explain: 1", url]).await;
        if answer.status == 200 && answer.body.contains(name) {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {name} to answer {url}: {answer:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks until there is an answer; fails the test, naming what was waited for, when none comes.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A Python with `grpcio` and `websockets`, for peers that are not ours; `None` skips the test by name,
/// unless the environment says that everything must run.
pub async fn python() -> Option<PathBuf> {
    let python = tools().join("venv/bin/python3");
    let importable = Command::new(&python).args(["-c", "import grpc, websockets"]).output().await;
    if importable.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    skip("a Python with grpcio and websockets (testbed/tools/install makes one)");
    None
}

/// Where `testbed/tools/install` puts programs that are not ours.
pub fn tools() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::env::var_os("TOMBOLO_TEST_TOOLS").map_or_else(|| here.join("../target/test-tools"), PathBuf::from)
}

/// Programs that a test runs; `None` skips it by name when one is missing, unless everything must run.
pub fn installed(tools: &[&str]) -> Option<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_here = |tool: &str| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file());
    let Some(missing) = tools.iter().find(|tool| !is_here(tool)) else { return Some(()) };
    skip(&format!("{missing} (Debian: iproute2, util-linux, nftables, iptables, curl, bind9-dnsutils, buildah)"));
    None
}

/// Says by name what a test was skipped for; a failure where everything must run.
pub fn skip(needs: &str) {
    assert!(std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(), "this test needs {needs}");
    println!("skipped: needs {needs}");
}

/// Whether any process has `needle` in its command line.
pub fn running_with(needle: &Path) -> Vec<String> {
    let needle = needle.to_string_lossy().into_owned();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let command_lines = entries.flatten().filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    command_lines
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(&needle))
        .collect()
}
