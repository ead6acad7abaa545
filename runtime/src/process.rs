//! What each role's `run` is given, and the file by which a process tells others where it listens.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::drain::DrainWatch;
use crate::metrics::Metrics;
use crate::readiness::Readiness;
use crate::telemetry::{TelemetryConfig, TelemetryError, Tracer};

/// The surroundings of one role. An agent has one for each role that it runs.
#[derive(Debug, Clone)]
pub struct Process {
    /// The role and its instance, as logs and traces name it.
    pub name: String,
    pub drain: DrainWatch,
    pub metrics: Metrics,
    pub tracer: Tracer,
    pub readiness: Readiness,
}

impl Process {
    /// `attributes` go into every span (cluster, instance). Must be called inside a tokio runtime.
    pub fn new(
        role: &str,
        attributes: &[(&'static str, String)],
        telemetry: &TelemetryConfig,
        drain: DrainWatch,
    ) -> Result<Self, TelemetryError> {
        Ok(Self {
            name: role.to_owned(),
            metrics: Metrics::new(role),
            tracer: Tracer::new(telemetry, &format!("tombolo-{role}"), attributes)?,
            readiness: Readiness::new(drain.clone()),
            drain,
        })
    }

    /// A process without tracing that never drains, for tests of a role.
    pub fn bare(role: &str) -> Self {
        let drain = DrainWatch::never();
        Self {
            name: role.to_owned(),
            metrics: Metrics::new(role),
            tracer: Tracer::Off,
            readiness: Readiness::new(drain.clone()),
            drain,
        }
    }
}

/// Where a running process listens, as written to `<state>/<role>.json` once everything does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    pub pid: u32,
    pub version: String,
    pub addresses: BTreeMap<String, SocketAddr>,
}

pub fn announcement_path(state: &Path, role: &str) -> PathBuf {
    state.join(format!("{role}.json"))
}

/// Writes the announcement in one step: a reader sees the old one, none or all of the new one.
pub fn announce(state: &Path, role: &str, addresses: &BTreeMap<&str, SocketAddr>) -> std::io::Result<()> {
    let announcement = Announcement {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        addresses: addresses.iter().map(|(name, address)| ((*name).to_owned(), *address)).collect(),
    };
    // Named as the temporary files that a process clears away when it starts in this directory.
    let (prefix, suffix) = (format!(".{role}.json."), ".tmp");
    let mut file = tempfile::Builder::new().prefix(&prefix).suffix(suffix).rand_bytes(16).tempfile_in(state)?;
    serde_json::to_writer_pretty(&mut file, &announcement)?;
    file.write_all(b"\n")?;
    file.persist(announcement_path(state, role))?;
    Ok(())
}

/// Reads what [`announce`] wrote; `None` while there is nothing yet.
pub fn announced(state: &Path, role: &str) -> std::io::Result<Option<Announcement>> {
    match std::fs::read(announcement_path(state, role)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes the announcement when the process has stopped.
pub fn withdraw(state: &Path, role: &str) -> std::io::Result<()> {
    match std::fs::remove_file(announcement_path(state, role)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn announcements_read_back_and_vanish() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(announced(state.path(), "gateway").unwrap(), None);
        let addresses = BTreeMap::from([("tunnel", "127.0.0.1:15443".parse().unwrap())]);
        announce(state.path(), "gateway", &addresses).unwrap();
        announce(state.path(), "gateway", &addresses).unwrap();
        let read = announced(state.path(), "gateway").unwrap().unwrap();
        assert_eq!(read.pid, std::process::id());
        assert_eq!(read.addresses["tunnel"].port(), 15443);
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 1, "no temporary file stays behind");
        withdraw(state.path(), "gateway").unwrap();
        withdraw(state.path(), "gateway").unwrap();
        assert_eq!(announced(state.path(), "gateway").unwrap(), None);
    }
}
