//! Where the cluster's own services come from: a directory of Kubernetes-shaped YAML, or the cluster's own API
//! server ([`kubernetes`]).
//!
//! One task owns the reading of the directory. An edit takes effect within about 100 ms; what is wrong is reported
//! with file and line, and the last good content of that file stays in force.

mod directory;
mod export;
pub mod kubernetes;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch as latest};
use tombolo_core::id::{ClusterId, EndpointId, ServiceName, TrustDomain};
use tombolo_core::sni::SYSTEM_NAMESPACE;
use tombolo_core::source::declared::{Declared, Object, Place};
use tombolo_core::source::{LocalState, Purpose, Surroundings, reduce};
use tombolo_trust::peering::sha256;

use crate::hub::HubHandle;
use crate::store::Store;
use directory::{Directory, Reading};
pub use export::ExportFileError;

/// Commands that wait for the task; an operator waits when it is full.
const COMMANDS_MAX: usize = 16;

/// The id by which peers know an endpoint: opaque, the same after every restart.
pub fn endpoint_id(cluster: &ClusterId, service: &ServiceName, instance: &str) -> EndpointId {
    let digest = sha256(format!("{cluster}\n{service}\n{instance}").as_bytes());
    HEXLOWER.encode(&digest[..8]).parse().expect("hexadecimal digits are a label")
}

/// Which directory is read, and for whom.
#[derive(Debug, Clone)]
pub struct SourceSettings {
    pub directory: PathBuf,
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
}

/// Why an export was not written or withdrawn.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("no Service {service} is declared in {directory}; write it there first", directory = .directory.display())]
    NoService { service: ServiceName, directory: PathBuf },
    #[error("Service {0} is of type ExternalName, which can't be exported (InvalidServiceType)")]
    ExternalName(ServiceName),
    #[error("namespace {SYSTEM_NAMESPACE} is tombolo's own and can't be exported from")]
    SystemNamespace,
    #[error("{0} is not exported")]
    NotExported(ServiceName),
    #[error("{service} is exported by {place}, which was written by hand; remove its ServiceExport there")]
    ByHand { service: ServiceName, place: Place },
    #[error(transparent)]
    File(#[from] ExportFileError),
    #[error(
        "this cluster's exports are ServiceExport objects of its API server, written under your own rights: \
         use `kubectl`"
    )]
    Kubernetes,
    #[error("the federation is stopping")]
    Stopping,
}

/// What became of an `export`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Relative to the source directory.
    pub file: String,
    pub already: bool,
}

enum Command {
    Export(ServiceName, oneshot::Sender<Result<Exported, ExportError>>),
    Unexport(ServiceName, oneshot::Sender<Result<String, ExportError>>),
}

/// A running source. It ends when every handle is gone.
#[derive(Clone)]
pub struct SourceHandle {
    commands: mpsc::Sender<Command>,
    state: latest::Receiver<Arc<LocalState>>,
}

impl SourceHandle {
    /// The state as last read; changes whenever the reading does.
    pub fn state(&self) -> latest::Receiver<Arc<LocalState>> {
        self.state.clone()
    }

    /// Exports a service by a file of its own; the file is durable and in force when this returns.
    pub async fn export(&self, service: ServiceName) -> Result<Exported, ExportError> {
        self.ask(|answer| Command::Export(service, answer)).await
    }

    /// Removes the file that [`SourceHandle::export`] wrote, and yields its name.
    pub async fn unexport(&self, service: ServiceName) -> Result<String, ExportError> {
        self.ask(|answer| Command::Unexport(service, answer)).await
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, ExportError>>) -> Command,
    ) -> Result<T, ExportError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| ExportError::Stopping)?;
        answered.await.map_err(|_| ExportError::Stopping)?
    }
}

/// Reads the directory once and goes on watching it.
pub async fn start(settings: SourceSettings, store: Store) -> SourceHandle {
    let (commands, received) = mpsc::channel(COMMANDS_MAX);
    let (changed, state) = latest::channel(Arc::default());
    let directory = Some(Directory::new(settings.directory.clone(), settings.cluster.clone()));
    let mut source = Source { settings, store, directory, objects: Vec::new(), again: None, changed };
    source.scan().await;
    tokio::spawn(source.run(received));
    SourceHandle { commands, state }
}

/// Hands every change of the source to the hub, until either ends.
pub async fn feed(source: &SourceHandle, hub: HubHandle) {
    let mut state = source.state();
    loop {
        let current = LocalState::clone(&state.borrow_and_update());
        if hub.local_changed(current).await.is_err() || state.changed().await.is_err() {
            return;
        }
    }
}

/// Publishes a state if it is another one than before, and logs the problems that are new in it.
fn replace(changed: &latest::Sender<Arc<LocalState>>, state: LocalState) {
    changed.send_if_modified(|current| {
        if **current == state {
            return false;
        }
        for problem in state.problems.iter().filter(|problem| !current.problems.contains(problem)) {
            tracing::warn!(file = %problem.file, line = problem.line, reason = %problem.reason, "source");
        }
        tracing::info!(services = state.services.len(), problems = state.problems.len(), "the source was read");
        *current = Arc::new(state);
        true
    });
}

struct Source {
    settings: SourceSettings,
    store: Store,
    /// `None` only while a scan runs on another thread.
    directory: Option<Directory>,
    objects: Vec<Declared>,
    again: Option<Duration>,
    changed: latest::Sender<Arc<LocalState>>,
}

impl Source {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut hints = watch::Hints::new(self.settings.directory.clone());
        // Between the first scan and the watch something may have changed.
        self.scan().await;
        loop {
            tokio::select! {
                () = hints.next(self.again) => self.scan().await,
                command = commands.recv() => match command {
                    Some(Command::Export(service, answer)) => _ = answer.send(self.export(service).await),
                    Some(Command::Unexport(service, answer)) => _ = answer.send(self.unexport(service).await),
                    None => return,
                },
            }
        }
    }

    async fn scan(&mut self) {
        let mut directory = self.directory.take().expect("scans do not overlap");
        let scan = move |store: &Store| {
            let reading = directory.scan(Instant::now(), SystemTime::now());
            let seen = store.first_seen(&exported(&reading), Timestamp::now());
            (directory, reading, seen)
        };
        let (directory, reading, seen) = self.store.off_thread(scan).await;
        self.directory = Some(directory);
        self.again = reading.again;
        let first_seen = seen.unwrap_or_else(|error| {
            tracing::error!(%error, "the age of exports can't be kept; a conflict may be decided otherwise after a restart");
            self.known_first_seen()
        });
        self.objects.clone_from(&reading.objects);
        self.publish(reading, &first_seen);
    }

    /// The times of the last state, for when the store can't be written.
    fn known_first_seen(&self) -> BTreeMap<ServiceName, Timestamp> {
        let state = self.changed.borrow();
        state.services.iter().filter_map(|(name, service)| Some((name.clone(), service.exported?))).collect()
    }

    fn publish(&self, reading: Reading, first_seen: &BTreeMap<ServiceName, Timestamp>) {
        let cluster = &self.settings.cluster;
        let around = Surroundings {
            purpose: Purpose::Mesh,
            cluster,
            trust_domain: &self.settings.trust_domain,
            first_seen,
            now: Timestamp::now(),
            endpoint_id: &|service, instance| endpoint_id(cluster, service, instance),
        };
        replace(&self.changed, reduce(reading.objects, reading.problems, &around));
    }

    async fn export(&mut self, service: ServiceName) -> Result<Exported, ExportError> {
        if service.namespace().as_str() == SYSTEM_NAMESPACE {
            return Err(ExportError::SystemNamespace);
        }
        // The Service may have been written a moment ago.
        self.scan().await;
        if let Some(place) = self.place_of_export(&service) {
            return Ok(Exported { file: place.file.to_string(), already: true });
        }
        if !self.changed.borrow().services.contains_key(&service) {
            let declared = self
                .objects
                .iter()
                .any(|declared| matches!(&declared.object, Object::Service(one) if one.service == service));
            let directory = self.settings.directory.clone();
            return Err(if declared {
                ExportError::ExternalName(service)
            } else {
                ExportError::NoService { service, directory }
            });
        }
        let file = export::file_of(&service).to_string_lossy().into_owned();
        self.in_directory(move |directory| export::write(directory, &service)).await?;
        self.scan().await;
        Ok(Exported { file, already: false })
    }

    async fn unexport(&mut self, service: ServiceName) -> Result<String, ExportError> {
        self.scan().await;
        let file = export::file_of(&service).to_string_lossy().into_owned();
        let place = self.place_of_export(&service);
        if let Some(place) = place.filter(|place| *place.file != *file) {
            return Err(ExportError::ByHand { service, place });
        }
        let name = service.clone();
        if !self.in_directory(move |directory| export::remove(directory, &name)).await? {
            return Err(ExportError::NotExported(service));
        }
        self.scan().await;
        Ok(file)
    }

    fn place_of_export(&self, service: &ServiceName) -> Option<Place> {
        let places = self.objects.iter().filter_map(|declared| match &declared.object {
            Object::Export(export) if export.service == *service => Some(&declared.place),
            _ => None,
        });
        places.min().cloned()
    }

    async fn in_directory<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, ExportFileError> + Send + 'static,
    ) -> Result<T, ExportError> {
        let directory = self.settings.directory.clone();
        Ok(self.store.off_thread(move |_| work(&directory)).await?)
    }
}

fn exported(reading: &Reading) -> BTreeSet<ServiceName> {
    let exports = reading.objects.iter().filter_map(|declared| match &declared.object {
        Object::Export(export) => Some(export.service.clone()),
        _ => None,
    });
    exports.collect()
}
