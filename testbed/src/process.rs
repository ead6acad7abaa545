//! One process: a child of this one, with its output in a file of its own.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::namespace::Namespace;

/// The `tombolo` binary that everything is started from.
#[derive(Debug, Clone)]
pub struct Binary {
    path: PathBuf,
    /// Set in the environment of every process that is started from it.
    environment: Vec<(String, String)>,
    /// Where its processes run, if not where this one does.
    namespace: Option<Namespace>,
}

impl Binary {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), environment: Vec::new(), namespace: None }
    }

    /// The same with a variable in the environment of its processes: `TOMBOLO_WORKERS`, say.
    pub fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same with its processes inside a network namespace.
    pub fn inside(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    /// The binary that is running now.
    pub fn this() -> anyhow::Result<Self> {
        Ok(Self::at(std::env::current_exe()?))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs one command to its end and gives its standard output; what it wrote to standard error is the error.
    pub async fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(&self.path).args(arguments).stdin(Stdio::null()).output().await?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            bail!("tombolo {}: {}", arguments.get(..2).unwrap_or(arguments).join(" "), reason.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// A running child. Dropping it kills it; it also ends when the thread that started it does.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `binary` with `arguments`; its output is appended to `<dir>/<name>.log`.
    pub fn start(binary: &Binary, name: &str, dir: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(&binary.path);
        command.envs(binary.environment.iter().cloned()).arg("--die-with-parent").args(arguments);
        Self::spawn(command, binary.namespace.as_ref(), name, dir)
    }

    /// The same with a program that is not ours.
    pub fn start_other(program: &Path, name: &str, dir: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments);
        Self::spawn(command, None, name, dir)
    }

    fn spawn(mut command: Command, namespace: Option<&Namespace>, name: &str, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log)?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C in a terminal reaches the whole group: who starts a testbed also stops it, in order.
            .process_group(0)
            .kill_on_drop(true);
        let child = match namespace {
            Some(namespace) => namespace.within(|| command.spawn())?,
            None => command.spawn(),
        };
        let child = child.with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // The process may have ended by itself meanwhile; then there is nobody left to tell.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until `read` makes something of the file at `path`, the process ends, or the deadline passes.
    pub async fn wait_for<T>(
        &mut self,
        path: &Path,
        deadline: Instant,
        read: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        loop {
            if let Some(value) = std::fs::read_to_string(path).ok().and_then(|text| read(&text)) {
                return Ok(value);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status}; its last words:\n{}", self.name, self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("{} did not start in time; its last words:\n{}", self.name, self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for the process to end by itself.
    pub async fn wait(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        Ok(self.child.wait().await?)
    }

    /// Ends the process politely; after `patience`, at once.
    pub async fn stop(mut self, patience: Duration) {
        self.signal(Signal::SIGCONT);
        self.signal(Signal::SIGTERM);
        if tokio::time::timeout(patience, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }

    /// Ends the process the way a crash does.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().await.map_err(|error| anyhow!("killing {}: {error}", self.name))
    }

    /// The last lines that it wrote.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].iter().map(|line| format!("    {line}\n")).collect()
    }
}
