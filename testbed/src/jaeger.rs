//! A real Jaeger that keeps spans in memory, for what is told of requests over OTLP.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::http;

const START_TIME_MAX: Duration = Duration::from_secs(30);

/// Ends with the value.
pub struct Jaeger {
    /// Where it takes spans, OTLP over gRPC.
    pub otlp: SocketAddr,
    /// Its query API, HTTP.
    pub query: SocketAddr,
    _process: Child,
}

impl Jaeger {
    /// Starts the all-in-one `binary`; its log goes into `folder`.
    pub async fn start(binary: &Path, folder: &Path) -> anyhow::Result<Self> {
        let [otlp, otlp_http, query, query_grpc, admin, sampling_http, sampling_grpc, thrift] = free_ports()?;
        let log = File::create(folder.join("jaeger.log"))?;
        let process = Command::new(binary)
            .arg(format!("--collector.otlp.grpc.host-port={otlp}"))
            .arg(format!("--collector.otlp.http.host-port={otlp_http}"))
            .arg(format!("--query.http-server.host-port={query}"))
            .arg(format!("--query.grpc-server.host-port={query_grpc}"))
            .arg(format!("--admin.http.host-port={admin}"))
            .arg(format!("--collector.http-server.host-port={sampling_http}"))
            .arg(format!("--collector.grpc-server.host-port={sampling_grpc}"))
            .arg(format!("--http-server.host-port={thrift}"))
            .args([
                "--processor.jaeger-compact.server-host-port=127.0.0.1:0",
                "--processor.jaeger-binary.server-host-port=127.0.0.1:0",
                "--processor.zipkin-compact.server-host-port=127.0.0.1:0",
            ])
            .env("SPAN_STORAGE_TYPE", "memory")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        let began = Instant::now();
        while [otlp, query].iter().any(|address| TcpStream::connect(address).is_err()) {
            anyhow::ensure!(began.elapsed() < START_TIME_MAX, "Jaeger does not listen; see jaeger.log");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { otlp, query, _process: process })
    }
}

impl Jaeger {
    /// Traces that hold a span of `service`, of the last hour and at most 1,000.
    pub async fn traces(&self, service: &str) -> anyhow::Result<usize> {
        let answer = self.get(&format!("/api/traces?service={service}&limit=1000&lookback=1h")).await?;
        Ok(answer["data"].as_array().with_context(|| format!("Jaeger's answer: {answer}"))?.len())
    }

    /// What its query API says.
    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        serde_json::from_str(&http::get(self.query, path).await?).context("Jaeger's answer")
    }
}

/// Ports that were free a moment ago: Jaeger can't announce the ones that it would pick.
fn free_ports<const N: usize>() -> anyhow::Result<[SocketAddr; N]> {
    let held: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
    let addresses: Vec<SocketAddr> = held.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
    addresses.try_into().ok().context("as many addresses as ports")
}
