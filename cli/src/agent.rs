//! `tombolo agent`: federation, gateway and sidecars in one process. A VM or a laptop is a small cluster of
//! its own, which joins others by peering.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tombolo_api::proto::operator::JoinAddRequest;
use tombolo_core::id::{ClusterId, InstanceName, Namespace};
use tombolo_runtime::config::{self, Problem, Validate};
use tombolo_runtime::drain::{DrainWatch, drain};
use tombolo_runtime::logging::{self, LogConfig};
use tombolo_runtime::process::{Process, announced};
use tombolo_runtime::telemetry::{TelemetryConfig, Tracer};

use crate::args::StartRole;
use crate::operator::client;
use crate::operator::join::write_token;
use crate::role::{RoleConfig, configuration, raise_file_limit, until_drained};

/// Where only this process's own roles come: they tell each other which port it became.
const ANY_PORT: &str = "127.0.0.1:0";
/// How long the federation may take until the other roles can join it.
const FEDERATION_START_MAX: Duration = Duration::from_secs(30);

/// One file for the whole agent. What it leaves out has the same defaults as in the roles' own files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfig {
    pub cluster: ClusterId,
    /// Directory for keys and state of all roles.
    pub state: PathBuf,
    /// Directory of Kubernetes-shaped YAML that describes this cluster.
    pub directory: PathBuf,
    /// Further fields of the federation's configuration.
    #[serde(default)]
    pub federation: Value,
    /// Further fields of the gateway's configuration: `tunnel`, `advertise`, ...
    #[serde(default)]
    pub gateway: Value,
    /// One sidecar for each identity; none is ever guessed.
    #[serde(default)]
    pub workloads: Vec<Workload>,
    #[serde(default)]
    pub telemetry: TelemetryConfig,
    #[serde(default)]
    pub log: LogConfig,
    #[serde(with = "humantime_serde", default = "default_drain_deadline")]
    pub drain_deadline: Duration,
}

/// A workload of this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    pub namespace: Namespace,
    pub service_account: String,
    /// Name under which its sidecar registers; the service account's when absent.
    pub instance: Option<InstanceName>,
    /// Further fields of the sidecar's configuration: `outbound`, `listeners`, `services`, ...
    #[serde(default)]
    pub sidecar: Value,
}

fn default_drain_deadline() -> Duration {
    Duration::from_secs(30)
}

impl Validate for AgentConfig {
    fn validate(&self) -> Vec<Problem> {
        let mut problems = [self.telemetry.problems("telemetry"), self.log.problems("log")].concat();
        for (index, workload) in self.workloads.iter().enumerate() {
            if let Err(error) = workload.instance_name() {
                problems.push(Problem::new(format!("workloads[{index}].instance"), format!("{error:#}")));
            }
        }
        problems
    }
}

impl Workload {
    fn instance_name(&self) -> anyhow::Result<InstanceName> {
        match &self.instance {
            Some(instance) => Ok(instance.clone()),
            None => {
                self.service_account.parse().context("give an instance: the service account's name is not a DNS label")
            }
        }
    }
}

pub fn run(start: StartRole) -> anyhow::Result<()> {
    let config: AgentConfig = configuration(&start)?;
    let federation: tombolo_federation::Config = part("federation", config.federation_document(), &config.federation)?;
    if start.check_config {
        // The joined parts need the federation's address; any stands in for it here.
        let somewhere = SocketAddr::from(([127, 0, 0, 1], 1));
        config.gateway_config(somewhere)?;
        for workload in &config.workloads {
            config.sidecar_config(workload, somewhere)?;
        }
        anstream::println!("the configuration is valid");
        return Ok(());
    }
    logging::init(&config.log)?;
    raise_file_limit();
    tombolo_runtime::block_on(start.worker_count(), async move {
        let (trigger, watch) = drain();
        let signals = tokio::spawn(trigger.drain_on_signal(config.drain_deadline));
        let tracers = Tracers::default();
        let outcome = until_drained(run_all(config, federation, watch, &tracers), signals).await;
        let tracers = std::mem::take(&mut *tracers.lock().expect("nothing panics while it notes a tracer"));
        for tracer in tracers {
            tracer.shutdown().await;
        }
        outcome
    })?
}

/// Those of the roles, whose last spans are to be sent at the end.
type Tracers = Mutex<Vec<Tracer>>;

async fn run_all(
    config: AgentConfig,
    federation: tombolo_federation::Config,
    drain: DrainWatch,
    tracers: &Tracers,
) -> anyhow::Result<()> {
    let state = federation.state.clone();
    let process = process("federation", &federation, &drain, tracers)?;
    let federation = async { tombolo_federation::run(federation, process).await.context("federation") };
    let others = async {
        let discovery = federation_address(&state).await?;
        let mut roles = FuturesUnordered::new();
        let gateway = config.gateway_config(discovery)?;
        join(
            &state,
            &gateway.state,
            JoinAddRequest { role: "gateway".into(), instance: gateway.id.to_string(), ..once() },
        )
        .await?;
        let process = self::process("gateway", &gateway, &drain, tracers)?;
        let gateway = async { tombolo_gateway::run(gateway, process).await.context("gateway") };
        roles.push(futures::future::Either::Left(gateway));
        for workload in &config.workloads {
            let sidecar = config.sidecar_config(workload, discovery)?;
            let identity = format!("ns/{}/sa/{}", workload.namespace, workload.service_account);
            join(&state, &sidecar.state, JoinAddRequest { workload: identity, ..once() }).await?;
            let process = self::process("sidecar", &sidecar, &drain, tracers)?;
            let sidecar = async move {
                let instance = sidecar.instance.clone();
                tombolo_sidecar::run(sidecar, process).await.with_context(|| format!("sidecar {instance}"))
            };
            roles.push(futures::future::Either::Right(sidecar));
        }
        while let Some(outcome) = roles.next().await {
            outcome?;
            ensure!(drain.is_draining(), "a role of this agent ended by itself");
        }
        anyhow::Ok(())
    };
    // The first that fails ends them all: half an agent would only look alive.
    tokio::try_join!(Box::pin(federation), Box::pin(others)).map(drop)
}

fn process<C: RoleConfig>(role: &str, config: &C, drain: &DrainWatch, tracers: &Tracers) -> anyhow::Result<Process> {
    let process = Process::new(role, &config.attributes(), config.telemetry(), drain.clone())?;
    tracers.lock().expect("nothing panics while it notes a tracer").push(process.tracer.clone());
    Ok(process)
}

/// A join entry for one key, redeemed by this process at once.
fn once() -> JoinAddRequest {
    JoinAddRequest { uses: 1, life_s: 600, ..Default::default() }
}

/// Gives a role of this agent its join token, unless it has an identity already.
async fn join(federation: &Path, role: &Path, request: JoinAddRequest) -> anyhow::Result<()> {
    if tombolo_trust::identity::has_identity(role) {
        return Ok(());
    }
    tombolo_trust::atomic::create_private_dir(role).with_context(|| format!("making {}", role.display()))?;
    let mut operator = client::connect(federation).await?;
    let answer = operator.join_add(request).await.map_err(client::refused)?.into_inner();
    write_token(&role.join("join"), &answer.token)
}

/// Waits until this agent's federation listens, and says where.
async fn federation_address(state: &Path) -> anyhow::Result<SocketAddr> {
    let deadline = Instant::now() + FEDERATION_START_MAX;
    loop {
        let announcement =
            announced(state, "federation").ok().flatten().filter(|found| found.pid == std::process::id());
        if let Some(address) = announcement.and_then(|found| found.addresses.get("discovery").copied()) {
            return Ok(address);
        }
        if Instant::now() > deadline {
            bail!("the federation of this agent did not start within {FEDERATION_START_MAX:?}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl AgentConfig {
    fn federation_document(&self) -> Value {
        json!({
            "cluster": self.cluster,
            "state": self.state.join("federation"),
            "source": { "directory": self.directory },
            "discovery": ANY_PORT,
            "drainDeadline": humantime::format_duration(self.drain_deadline).to_string(),
            "telemetry": self.telemetry,
        })
    }

    fn gateway_config(&self, discovery: SocketAddr) -> anyhow::Result<tombolo_gateway::Config> {
        let mut document = self.joined("gateway", discovery);
        document["id"] = json!("gateway");
        document["ingress"] = json!(ANY_PORT);
        document["watch"] = json!(ANY_PORT);
        part("gateway", document, &self.gateway)
    }

    fn sidecar_config(&self, workload: &Workload, discovery: SocketAddr) -> anyhow::Result<tombolo_sidecar::Config> {
        let instance = workload.instance_name()?;
        let mut document = self.joined(&format!("sidecar-{instance}"), discovery);
        document["instance"] = json!(instance);
        document["inbound"] = json!(ANY_PORT);
        part("workloads[].sidecar", document, &workload.sidecar)
    }

    /// Fields that every role but the federation has.
    fn joined(&self, role: &str, discovery: SocketAddr) -> Value {
        let state = self.state.join(role);
        json!({
            "join": state.join("join"),
            "state": state,
            "federation": { "address": discovery, "ca": self.state.join("federation").join("ca.pem") },
            "admin": ANY_PORT,
            "drainDeadline": humantime::format_duration(self.drain_deadline).to_string(),
            "telemetry": self.telemetry,
        })
    }
}

/// One role's configuration: what the agent decides, with the operator's further fields over it.
fn part<C: RoleConfig>(name: &str, mut document: Value, further: &Value) -> anyhow::Result<C> {
    match further {
        Value::Null => {}
        Value::Object(fields) => {
            for (key, value) in fields {
                document[key] = value.clone();
            }
        }
        _ => bail!("{name}: must be an object with fields of the role's configuration"),
    }
    Ok(config::parse(&serde_saphyr::to_string(&document)?, Path::new(name))?)
}
