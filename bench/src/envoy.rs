//! Envoy in the same places as tombolo: a sidecar at each end and a gateway for each cluster, with
//! SPIFFE-like P-256 certificates and without TLS session resumption, which would skip verification.

mod certificates;
mod config;

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

pub use config::Chain;

/// A running chain of four Envoys. Dropping it kills them.
pub struct Envoys {
    pub entrance: SocketAddr,
    folder: PathBuf,
    processes: Vec<(&'static str, Child)>,
}

/// Where the four listen.
#[derive(Debug, Clone, Copy)]
struct Ports {
    client_sidecar: u16,
    near_gateway: u16,
    far_gateway: u16,
    server_sidecar: u16,
    app: u16,
}

impl Envoys {
    /// Starts `chain` in front of the application at `app`; it may need a moment until it answers.
    pub fn start(binary: &Path, folder: &Path, chain: Chain, workers: usize, app: SocketAddr) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        certificates::write(folder)?;
        let ports = Ports {
            client_sidecar: free_port()?,
            near_gateway: free_port()?,
            far_gateway: free_port()?,
            server_sidecar: free_port()?,
            app: app.port(),
        };
        let mut envoys = Self { entrance: at(ports.client_sidecar), folder: folder.to_owned(), processes: Vec::new() };
        for (name, config) in config::all(chain, folder, ports, free_port)? {
            let file = folder.join(format!("{name}.json"));
            fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
            envoys.processes.push((name, spawn(binary, &file, workers)?));
        }
        Ok(envoys)
    }

    pub fn pids(&self) -> Vec<u32> {
        self.processes.iter().map(|(_, process)| process.id()).collect()
    }

    pub fn pid(&self, name: &str) -> anyhow::Result<u32> {
        let process = self.processes.iter().find(|(of, _)| *of == name);
        Ok(process.with_context(|| format!("no Envoy {name}"))?.1.id())
    }
}

impl Envoys {
    /// The last lines that the four wrote.
    pub fn words(&self) -> String {
        let logs = self.processes.iter().map(|(name, _)| {
            let text = fs::read_to_string(self.folder.join(format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(5)..]
                .iter()
                .map(|line| format!("\n    {name}: {line}"))
                .collect::<String>()
        });
        logs.collect()
    }
}

impl Drop for Envoys {
    fn drop(&mut self) {
        for (_, process) in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn spawn(binary: &Path, config: &Path, workers: usize) -> anyhow::Result<Child> {
    let log = File::create(config.with_extension("log"))?;
    Command::new(binary)
        .args(["--disable-hot-restart", "--log-level", "error", "--concurrency", &workers.to_string(), "-c"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", binary.display()))
}

/// The version as Envoy prints it: `1.40.0`.
pub fn version(binary: &Path) -> anyhow::Result<String> {
    let output = Command::new(binary).arg("--version").output().with_context(|| binary.display().to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split('/').nth(1).unwrap_or("unknown").to_owned())
}

/// A port that nobody listens on now. Another may take it before it is used; then the start fails loudly.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn at(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Where `bench/run` put Envoy.
pub fn binary(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let path = given.context("where is Envoy? bench/run installs it and says so with --envoy")?;
    anyhow::ensure!(path.is_file(), "{} is not there; bench/run installs it", path.display());
    Ok(path)
}
