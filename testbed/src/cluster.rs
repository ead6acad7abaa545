//! One cluster: its directory of resources, its configurations, its processes, and what they say of themselves.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::process::{Binary, Process};

/// How long any one process may take to be ready.
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a process may take to drain when the testbed stops it.
const STOP_TIME_MAX: Duration = Duration::from_secs(3);

/// What a role announces once everything it does is listening.
#[derive(Debug, Clone, Deserialize)]
pub struct Announced {
    pub addresses: BTreeMap<String, SocketAddr>,
}

impl Announced {
    pub fn address(&self, name: &str) -> anyhow::Result<SocketAddr> {
        self.addresses.get(name).copied().with_context(|| format!("no address named {name} was announced"))
    }
}

/// A sidecar to start.
pub struct Sidecar<'a> {
    /// Instance name, and name of the process.
    pub name: &'a str,
    /// `namespace/service-account`
    pub workload: &'a str,
    /// Fields of its configuration beyond identity and ports: `services`, `listeners`, ...
    pub config: Value,
}

/// One cluster on loopback.
pub struct Cluster {
    pub name: String,
    binary: Binary,
    dir: PathBuf,
    /// Fields that every role's configuration gets: `telemetry`, `log`, ...
    common: Value,
    discovery: Option<SocketAddr>,
    /// What was started, with the configuration that starts it again on the same ports.
    roles: BTreeMap<String, Role>,
    processes: BTreeMap<String, Process>,
}

struct Role {
    kind: &'static str,
    config: Value,
}

impl Cluster {
    /// Makes the directories of a cluster below `root`. Nothing runs yet.
    pub fn new(binary: &Binary, name: &str, root: &Path, common: Value) -> anyhow::Result<Self> {
        let dir = root.join(name);
        fs::create_dir_all(dir.join("cluster"))?;
        Ok(Self {
            name: name.to_owned(),
            binary: binary.clone(),
            dir,
            common,
            discovery: None,
            roles: BTreeMap::new(),
            processes: BTreeMap::new(),
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// State directory of the federation: what `--state` of an operator's command names.
    pub fn state(&self) -> String {
        self.dir.join("federation").display().to_string()
    }

    /// Writes a file into the cluster's directory of resources.
    pub fn write_resource(&self, file: &str, yaml: &str) -> anyhow::Result<()> {
        let path = self.dir.join("cluster").join(file);
        fs::write(&path, yaml).with_context(|| format!("writing {}", path.display()))
    }

    /// Declares a service served by the service account of the same name.
    pub fn declare_service(&self, namespace: &str, name: &str, ports: &[(&str, u16)]) -> anyhow::Result<()> {
        let ports: Vec<Value> = ports.iter().map(|(name, port)| json!({ "name": name, "port": port })).collect();
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "annotations": { "tombolo.dev/service-accounts": name },
            },
            "spec": { "ports": ports },
        });
        self.write_resource(&format!("{namespace}-{name}.yaml"), &serde_saphyr::to_string(&service)?)
    }

    /// Runs an operator's command against this cluster's federation.
    pub async fn operator(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let state = self.state();
        let mut all = arguments.to_vec();
        all.extend(["--state", &state]);
        self.binary.run(&all).await
    }

    /// What `tombolo status -o json` says.
    pub async fn status(&self) -> anyhow::Result<Value> {
        let text = self.operator(&["status", "-o", "json"]).await?;
        serde_json::from_str(&text).context("reading the output of `tombolo status -o json`")
    }

    pub async fn start_federation(&mut self, extra: Value) -> anyhow::Result<Announced> {
        let mut config = json!({
            "cluster": self.name,
            "state": self.state(),
            "discovery": "127.0.0.1:0",
            "legs": "127.0.0.1:0",
        });
        if extra.get("source").is_none() {
            config["source"] = json!({ "directory": self.dir.join("cluster") });
        }
        let announced = self.start_role("federation", "federation", merged(config, extra)).await?;
        self.discovery = Some(announced.address("discovery")?);
        Ok(announced)
    }

    pub async fn start_gateway(&mut self, id: &str, extra: Value) -> anyhow::Result<Announced> {
        let joined = self.joined(id, &["--gateway", id], &extra).await?;
        let config = json!({
            "id": id,
            "tunnel": "127.0.0.1:0",
            "advertise": ["127.0.0.1:0"],
            "ingress": "127.0.0.1:0",
            "watch": "127.0.0.1:0",
        });
        self.start_role(id, "gateway", merged(merged(config, joined), extra)).await
    }

    pub async fn start_sidecar(&mut self, sidecar: Sidecar<'_>) -> anyhow::Result<Announced> {
        let joined = self.joined(sidecar.name, &["--workload", sidecar.workload], &sidecar.config).await?;
        let config = json!({
            "instance": sidecar.name,
            "outbound": "127.0.0.1:0",
            "inbound": "127.0.0.1:0",
        });
        self.start_role(sidecar.name, "sidecar", merged(merged(config, joined), sidecar.config)).await
    }

    /// Runs any other process beside the cluster: an application, say. It must write what it announces to
    /// `announce`, which `read` understands.
    pub async fn start_other<T>(
        &mut self,
        name: &str,
        arguments: &[&str],
        announce: &Path,
        read: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let _ = fs::remove_file(announce);
        let mut process = Process::start(&self.binary, name, &self.dir, arguments)?;
        let value = process.wait_for(announce, Instant::now() + START_TIME_MAX, read).await?;
        self.processes.insert(name.to_owned(), process);
        Ok(value)
    }

    pub fn process(&self, name: &str) -> anyhow::Result<&Process> {
        self.processes.get(name).with_context(|| format!("{name} of {} is not running", self.name))
    }

    pub fn process_count(&self) -> usize {
        self.processes.len()
    }

    /// Ends a process the way a crash does.
    pub async fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let process = self.processes.remove(name);
        process.with_context(|| format!("{name} of {} is not running", self.name))?.kill().await
    }

    /// Ends a process politely.
    pub async fn stop_one(&mut self, name: &str, patience: Duration) -> anyhow::Result<()> {
        let process = self.processes.remove(name);
        process.with_context(|| format!("{name} of {} is not running", self.name))?.stop(patience).await;
        Ok(())
    }

    /// Starts a role again that was killed or stopped, on the ports it had.
    pub async fn restart(&mut self, name: &str) -> anyhow::Result<Announced> {
        let role = self.roles.get(name).with_context(|| format!("{name} was never started in {}", self.name))?;
        let (kind, config) = (role.kind, role.config.clone());
        self.start_role(name, kind, config).await
    }

    /// Ends every process: applications and sidecars first, the federation last.
    pub async fn stop(&mut self) {
        let order = |name: &str| match self.roles.get(name).map(|role| role.kind) {
            Some("federation") => 2,
            Some("gateway") => 1,
            _ => 0,
        };
        let mut waves: [Vec<Process>; 3] = Default::default();
        for (name, process) in std::mem::take(&mut self.processes) {
            waves[order(&name)].push(process);
        }
        for wave in waves {
            let mut stops = tokio::task::JoinSet::new();
            for process in wave {
                stops.spawn(process.stop(STOP_TIME_MAX));
            }
            stops.join_all().await;
        }
    }

    /// Fields of a configuration with which a role gets its identity: by a join entry that is made here, unless `extra`
    /// names the file of a service account's token.
    async fn joined(&self, name: &str, identity: &[&str], extra: &Value) -> anyhow::Result<Value> {
        let discovery = self.discovery.context("the federation is not running")?;
        let mut fields = json!({
            "state": self.dir.join(name),
            "federation": { "address": discovery, "ca": Path::new(&self.state()).join("ca.pem") },
        });
        if extra.get("token").is_some() {
            return Ok(fields);
        }
        let file = self.dir.join(format!("{name}.join"));
        let out = file.display().to_string();
        let mut arguments = vec!["join", "add", "--out", &out];
        arguments.extend_from_slice(identity);
        self.operator(&arguments).await?;
        fields["join"] = json!(file);
        Ok(fields)
    }

    async fn start_role(&mut self, name: &str, kind: &'static str, config: Value) -> anyhow::Result<Announced> {
        let base = json!({ "admin": "127.0.0.1:0", "drainDeadline": "1s" });
        let mut config = merged(merged(base, self.common.clone()), config);
        let path = self.dir.join(format!("{name}.yaml"));
        fs::write(&path, serde_saphyr::to_string(&config)?)?;
        let announce = self.dir.join(name).join(format!("{kind}.json"));
        let _ = fs::remove_file(&announce);
        let file = path.display().to_string();
        let mut process = Process::start(&self.binary, name, &self.dir, &[kind, "--config", &file])?;
        let read = |text: &str| serde_json::from_str::<Announced>(text).ok();
        let announced = process.wait_for(&announce, Instant::now() + START_TIME_MAX, read).await;
        self.processes.insert(name.to_owned(), process);
        let announced = announced.with_context(|| format!("{name} of {}", self.name))?;
        // The same ports at the next start: others have learned them.
        for (key, address) in &announced.addresses {
            if config.get(key).is_some() {
                config[key] = json!(address);
            }
        }
        self.roles.insert(name.to_owned(), Role { kind, config });
        Ok(announced)
    }
}

/// `base` with the fields of `extra` over it, objects merged.
fn merged(mut base: Value, extra: Value) -> Value {
    match (&mut base, extra) {
        (Value::Object(fields), Value::Object(extra)) => {
            for (key, value) in extra {
                let old = fields.remove(&key).unwrap_or(Value::Null);
                fields.insert(key, merged(old, value));
            }
            base
        }
        (_, Value::Null) => base,
        (_, extra) => extra,
    }
}
