//! A role's process as its operator sees it from outside: addresses, metrics, log, memory.

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tombolo_runtime::process::{Announcement, announced};
use tombolo_testbed::Cluster;

use super::until;

/// One running role of a cluster.
#[derive(Debug, Clone)]
pub struct Seen {
    pub name: String,
    announcement: Announcement,
    log: PathBuf,
}

impl Seen {
    /// The process `name` of `cluster`, started as `role`.
    pub fn new(cluster: &Cluster, name: &str, role: &str) -> Self {
        let announcement = announced(&cluster.dir().join(name), role).unwrap().expect("it is running");
        let log = cluster.dir().join(format!("{name}.log"));
        Self { name: format!("{name} of {}", cluster.name), announcement, log }
    }

    pub fn pid(&self) -> u32 {
        self.announcement.pid
    }

    pub fn address(&self, key: &str) -> SocketAddr {
        self.announcement.addresses[key]
    }

    /// Every TCP port that it listens on.
    pub fn tcp_ports(&self) -> Vec<(String, SocketAddr)> {
        let tcp = self.announcement.addresses.iter().filter(|(key, _)| *key != "tunnel");
        tcp.map(|(key, address)| (key.clone(), *address)).collect()
    }

    pub async fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.address("admin")).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }

    pub async fn metrics(&self) -> String {
        until(&format!("the metrics of {}", self.name), async || self.get("/metrics").await).await
    }

    /// The value of one line of `/metrics`; 0 while it is not there.
    pub async fn metric(&self, line: &str) -> f64 {
        let text = self.metrics().await;
        let value = text.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or(0.0)
    }

    /// How often it has refused for this reason.
    pub async fn refused(&self, reason: &str) -> f64 {
        let text = self.metrics().await;
        let reason = format!("reason=\"{reason}\"}}");
        let counters =
            text.lines().filter(|line| line.starts_with("tombolo_refusals_total{") && line.contains(&reason));
        counters.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until it has counted `more` refusals since `before`, and has logged the reason.
    pub async fn has_refused(&self, what: &str, reason: &str, before: f64, more: f64) {
        until(&format!("{} to refuse {what} as {reason}", self.name), async || {
            (self.refused(reason).await >= before + more).then_some(())
        })
        .await;
        until(&format!("{} to log {reason} for {what}", self.name), async || self.log().contains(reason).then_some(()))
            .await;
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Resident memory in MB, or `None` when the process has gone.
    pub fn memory_mb(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?;
        Some(kibibytes.trim().parse::<u64>().ok()? / 1024)
    }

    /// The same process is there, has not panicked, and holds no more than `mb_max`.
    pub fn is_sound(&self, mb_max: u64) {
        let memory = self.memory_mb().unwrap_or_else(|| panic!("{} has gone:\n{}", self.name, self.log()));
        assert!(memory <= mb_max, "{} holds {memory} MB", self.name);
        let log = self.log();
        let panicked = log.lines().find(|line| line.contains("panicked"));
        assert_eq!(panicked, None, "{}", self.name);
    }
}
