//! The API server of this cluster as its source: the same objects as in a directory, and the same reduction.
//!
//! Each kind has a task that lists and watches it; one task holds what they see. A change is acted on at once, and
//! changes that come while another one is acted on are taken together.

mod held;
mod kind;

use std::sync::Arc;

use jiff::Timestamp;
use kube::Client;
use tokio::sync::{mpsc, watch as latest};
use tokio::task::JoinSet;
use tombolo_core::id::{ClusterId, TrustDomain};
use tombolo_core::source::{LocalState, Purpose, Surroundings, reduce};

use super::{COMMANDS_MAX, Command, ExportError, SourceHandle, endpoint_id, replace};
use crate::kubernetes::Watch;
use held::Held;
use kind::{Change, Kind, Seen};

/// Changes that wait for the task; the watches wait when it is full.
const CHANGES_MAX: usize = 1_024;

/// Which API server is read, and for whom.
#[derive(Clone)]
pub struct KubernetesSettings {
    pub client: Client,
    /// How the API server is called in messages.
    pub server: String,
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
}

/// Reads every kind once and goes on watching; waits for as long as the API server is away.
pub async fn start(settings: KubernetesSettings) -> SourceHandle {
    let (sender, changes) = mpsc::channel(CHANGES_MAX);
    let mut watches = JoinSet::new();
    for kind in Kind::ALL {
        let (cluster, kind) = (settings.cluster.clone(), *kind);
        let watch = Watch {
            client: settings.client.clone(),
            kind,
            definition: kind.definition(),
            labels: kind.labels(),
            reduce: Box::new(move |version, object| Seen::of(version, &cluster, kind, object)),
            changes: sender.clone(),
        };
        watches.spawn(watch.run());
    }
    let (commands, received) = mpsc::channel(COMMANDS_MAX);
    let (changed, state) = latest::channel(Arc::default());
    let server = settings.server.clone();
    let mut source = Source { settings, held: Held::new(server), changes, changed, _watches: watches };
    source.read().await;
    tokio::spawn(source.run(received));
    SourceHandle { commands, state }
}

struct Source {
    settings: KubernetesSettings,
    held: Held,
    changes: mpsc::Receiver<Change>,
    changed: latest::Sender<Arc<LocalState>>,
    /// They end with the source.
    _watches: JoinSet<()>,
}

impl Source {
    /// Until every kind was read once: what is answered before would look like a withdrawal.
    async fn read(&mut self) {
        let mut told = None;
        while !self.held.is_complete() {
            let change = self.changes.recv().await.expect("the watches live as long as the source");
            self.held.handle_change(change);
            let missing = self.held.missing().map(|(kind, reason)| (kind, reason.to_owned()));
            if missing.is_some() && missing != told {
                if let Some((kind, reason)) = &missing {
                    tracing::warn!(kind, reason, "the API server can't be read yet; waiting for it");
                }
                told = missing;
            }
        }
        self.publish();
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                change = self.changes.recv() => {
                    let Some(change) = change else { return };
                    self.held.handle_change(change);
                    while let Ok(change) = self.changes.try_recv() {
                        self.held.handle_change(change);
                    }
                    self.publish();
                }
                command = commands.recv() => match command {
                    Some(Command::Export(_, answer)) => _ = answer.send(Err(ExportError::Kubernetes)),
                    Some(Command::Unexport(_, answer)) => _ = answer.send(Err(ExportError::Kubernetes)),
                    None => return,
                },
            }
        }
    }

    fn publish(&self) {
        let cluster = &self.settings.cluster;
        let around = Surroundings {
            purpose: Purpose::Everything,
            cluster,
            trust_domain: &self.settings.trust_domain,
            first_seen: &self.held.created(),
            now: Timestamp::now(),
            endpoint_id: &|service, instance| endpoint_id(cluster, service, instance),
        };
        replace(&self.changed, reduce(self.held.objects(), self.held.problems(), &around));
    }
}
