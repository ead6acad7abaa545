//! tombolo in the same places as its peers: two clusters of real processes, peered, with one service.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tombolo_testbed::{Announced, Binary, Cluster, Sidecar};

/// `http` (port 80) and `tcp` (port 9000) of the service `echo.bench`.
pub const HTTP_PORT: u16 = 80;
pub const TCP_PORT: u16 = 9000;
pub const HOST: &str = "echo.bench.svc.clusterset.local";

pub struct Mesh {
    pub east: Cluster,
    pub west: Cluster,
    /// The caller's sidecar: a listener for each port, and the forward proxy.
    pub http: SocketAddr,
    pub tcp: SocketAddr,
    pub outbound: SocketAddr,
    _folder: TempDir,
}

/// What differs between benches.
pub struct Setup<'a> {
    /// Threads of each process.
    pub workers: usize,
    /// Fields of the caller's sidecar beyond its listeners.
    pub caller: Value,
    /// The application in the caller's own cluster, if the service is there too.
    pub local_app: Option<SocketAddr>,
    pub remote_app: SocketAddr,
    pub binary: &'a Path,
}

/// Names of the processes whose CPU and memory are the data path's.
pub const CALLER: &str = "caller";
pub const SERVER: &str = "echo";
pub const GATEWAY: &str = "gateway-1";
pub const FEDERATION: &str = "federation";

impl Mesh {
    pub async fn start(setup: &Setup<'_>) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("tombolo-bench-").tempdir()?;
        let binary = Binary::at(setup.binary).with_variable("TOMBOLO_WORKERS", &setup.workers.to_string());
        // No line in the log for each request, as with Envoy.
        let common = json!({ "log": { "level": "warn" } });
        let mut east = Cluster::new(&binary, "east", folder.path(), common.clone())?;
        let mut west = Cluster::new(&binary, "west", folder.path(), common)?;
        for cluster in [&mut east, &mut west] {
            cluster.declare_service("bench", "echo", &[("http", HTTP_PORT), ("tcp", TCP_PORT)])?;
            cluster.start_federation(json!({})).await?;
            cluster.start_gateway(GATEWAY, json!({})).await?;
        }
        peer(&east, &west).await?;
        west.operator(&["export", "bench/echo"]).await?;
        start_server(&mut west, setup.remote_app).await?;
        if let Some(app) = setup.local_app {
            start_server(&mut east, app).await?;
        }
        let caller = start_caller(&mut east, &setup.caller).await.context("the caller's sidecar")?;
        Ok(Self {
            http: caller.address("listener-0")?,
            tcp: caller.address("listener-1")?,
            outbound: caller.address("outbound")?,
            east,
            west,
            _folder: folder,
        })
    }

    /// The two sidecars and the two gateways that a request crosses.
    pub fn data_path(&self) -> anyhow::Result<Vec<u32>> {
        let places = [(&self.east, CALLER), (&self.east, GATEWAY), (&self.west, GATEWAY), (&self.west, SERVER)];
        places.into_iter().map(|(cluster, name)| pid(cluster, name)).collect()
    }

    pub async fn stop(mut self) {
        self.east.stop().await;
        self.west.stop().await;
    }
}

pub fn pid(cluster: &Cluster, name: &str) -> anyhow::Result<u32> {
    cluster.process(name)?.pid().with_context(|| format!("{name} of {} has ended", cluster.name))
}

/// West invites, east accepts; each may bring the namespace into the other.
async fn peer(east: &Cluster, west: &Cluster) -> anyhow::Result<()> {
    let invited = west.operator(&["peer", "invite", "--imports", "bench/*"]).await?;
    let token = invited.split_whitespace().last().context("`peer invite` printed no token")?;
    east.operator(&["peer", "accept", token, "--imports", "bench/*"]).await?;
    Ok(())
}

pub async fn start_server(cluster: &mut Cluster, app: SocketAddr) -> anyhow::Result<Announced> {
    let serves = |port: u16| {
        json!({
            "service": "bench/echo",
            "port": port,
            "app": app,
            "health": { "interval": "200ms", "timeout": "200ms", "healthyAfter": 1, "unhealthyAfter": 2 },
        })
    };
    let mut http = serves(HTTP_PORT);
    http["protocol"] = json!("http");
    http["health"]["http"] = json!({ "path": "/" });
    let config = json!({ "services": [http, serves(TCP_PORT)] });
    cluster.start_sidecar(Sidecar { name: SERVER, workload: "bench/echo", config }).await
}

pub async fn start_caller(cluster: &mut Cluster, extra: &Value) -> anyhow::Result<Announced> {
    let listener = |port: u16| json!({ "listen": "127.0.0.1:0", "to": format!("echo.bench:{port}") });
    let mut config = json!({ "listeners": [listener(HTTP_PORT), listener(TCP_PORT)] });
    if let (Value::Object(config), Value::Object(extra)) = (&mut config, extra) {
        config.extend(extra.clone());
    }
    cluster.start_sidecar(Sidecar { name: CALLER, workload: "bench/client", config }).await
}

/// How long a chain may take until its first answer.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Exports a service by a file, which is quicker than a hundred commands.
pub fn export(cluster: &Cluster, namespace: &str, name: &str) -> anyhow::Result<()> {
    let yaml = format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata:\n  name: {name}\n  namespace: {namespace}\n"
    );
    cluster.write_resource(&format!("export-{namespace}-{name}.yaml"), &yaml)
}
