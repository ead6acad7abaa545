//! Starts a role: reads its configuration, sets up its process, runs it until it has drained.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::task::JoinHandle;
use tombolo_runtime::config::{self, Validate};
use tombolo_runtime::drain::drain;
use tombolo_runtime::logging::{self, LogConfig};
use tombolo_runtime::process::Process;
use tombolo_runtime::telemetry::TelemetryConfig;

use crate::args::StartRole;

/// How long a role may take to return once its drain has ended.
const AFTER_DRAIN_MAX: Duration = Duration::from_secs(1);

/// What starting needs to know of any role's configuration.
pub trait RoleConfig: DeserializeOwned + Serialize + Validate {
    fn log(&self) -> &LogConfig;
    fn telemetry(&self) -> &TelemetryConfig;
    fn drain_deadline(&self) -> Duration;
    fn state(&self) -> &Path;
    /// What every span of the process carries.
    fn attributes(&self) -> Vec<(&'static str, String)>;
}

macro_rules! role_config {
    ($config:ty, $name:literal, $instance:ident) => {
        impl RoleConfig for $config {
            fn log(&self) -> &LogConfig {
                &self.log
            }

            fn telemetry(&self) -> &TelemetryConfig {
                &self.telemetry
            }

            fn drain_deadline(&self) -> Duration {
                self.drain_deadline
            }

            fn state(&self) -> &Path {
                &self.state
            }

            fn attributes(&self) -> Vec<(&'static str, String)> {
                vec![($name, self.$instance.to_string())]
            }
        }
    };
}

role_config!(tombolo_federation::Config, "tombolo.cluster", cluster);
role_config!(tombolo_gateway::Config, "tombolo.gateway", id);
role_config!(tombolo_sidecar::Config, "tombolo.instance", instance);

pub fn federation(start: StartRole) -> anyhow::Result<()> {
    run("federation", start, tombolo_federation::run)
}

pub fn gateway(start: StartRole) -> anyhow::Result<()> {
    run("gateway", start, tombolo_gateway::run)
}

pub fn sidecar(start: StartRole) -> anyhow::Result<()> {
    run("sidecar", start, tombolo_sidecar::run)
}

fn run<C, F>(name: &'static str, start: StartRole, role: impl FnOnce(C, Process) -> F) -> anyhow::Result<()>
where
    C: RoleConfig,
    F: Future<Output = anyhow::Result<()>>,
{
    let config: C = configuration(&start)?;
    if start.check_config {
        anstream::println!("the configuration is valid");
        return Ok(());
    }
    logging::init(config.log())?;
    raise_file_limit();
    tombolo_runtime::block_on(start.worker_count(), async move {
        let deadline = config.drain_deadline();
        let (trigger, watch) = drain();
        let process = Process::new(name, &config.attributes(), config.telemetry(), watch)?;
        let tracer = process.tracer.clone();
        let state = config.state().to_owned();
        let signals = tokio::spawn(trigger.drain_on_signal(deadline));
        let outcome = until_drained(role(config, process), signals).await;
        tracer.shutdown().await;
        tombolo_runtime::process::withdraw(&state, name).context("removing the announcement of this process")?;
        outcome
    })?
}

/// Runs a role until it returns, which it does by itself after a drain. When the drain has come to its end
/// and the role has not, it gets a moment more and is then left.
pub async fn until_drained<T>(
    role: impl Future<Output = anyhow::Result<()>>,
    drained: JoinHandle<T>,
) -> anyhow::Result<()> {
    tokio::select! {
        outcome = role => outcome,
        _ = async {
            let _ = drained.await;
            tokio::time::sleep(AFTER_DRAIN_MAX).await;
        } => Ok(()),
    }
}

/// The configuration from its file, with what the flags set over it.
pub fn configuration<C: DeserializeOwned + Serialize + Validate>(start: &StartRole) -> anyhow::Result<C> {
    let mut overrides = start.set.clone();
    if let Some(state) = &start.state {
        overrides.push(("state".to_owned(), state.display().to_string()));
    }
    let mut document = match &start.config {
        Some(path) if overrides.is_empty() => return Ok(config::load(path)?),
        // State given by flag or environment may be what the file leaves out, so only its syntax is judged yet.
        Some(path) => read_document(path)?,
        None if overrides.is_empty() => {
            bail!("no configuration: give --config FILE, or its fields with --set FIELD=VALUE")
        }
        None => Value::Object(serde_json::Map::new()),
    };
    for (field, value) in &overrides {
        set(&mut document, field, value)?;
    }
    let source = start.config.as_deref().unwrap_or(Path::new("flags"));
    let text = serde_saphyr::to_string(&document)?;
    // Places in this merged text mean nothing to the operator; the field's path in the reason does.
    config::parse(&text, source).map_err(|error| anyhow!("{error} (after applying the flags)"))
}

fn read_document(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_saphyr::from_str(&text).map_err(|error| anyhow!("{}: {error}", path.display()))
}

/// Sets the field at `path` (dots between names), making the objects on the way.
fn set(document: &mut Value, path: &str, value: &str) -> anyhow::Result<()> {
    let mut at = document;
    for name in path.split('.') {
        if at.is_null() {
            *at = Value::Object(serde_json::Map::new());
        }
        let Value::Object(fields) = at else { bail!("--set {path}: {name} lies below a field that is not an object") };
        at = fields.entry(name.to_owned()).or_insert(Value::Null);
    }
    // `500` is a number, `[a, b]` a list; what is none of these is text.
    *at = serde_saphyr::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    Ok(())
}

/// Each connection takes a file descriptor, and the usual soft limit of 1,024 is below every limit of our own: it is
/// raised to what the system grants.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < hard {
        // Where it fails the soft limit stays; a listener that reaches it says so.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Ends this process when its parent ends, so that a test or demo that crashes leaves nothing behind.
pub fn die_with_parent() {
    let parent = nix::unistd::getppid();
    let armed = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM);
    // The parent may have ended before the signal was armed.
    if armed.is_err() || nix::unistd::getppid() != parent {
        std::process::exit(1);
    }
}
