//! Writes what the catalogue says to the cluster's API server: a `ServiceImport` for every service that some cluster
//! exports to here, the slices and the Service that are derived from it, and the conditions of `ServiceExport`s.
//!
//! One task compares what is known with what is there whenever either changes, and applies the difference as one field
//! manager. It keeps no memory of what it wrote: after a restart, or when somebody changed or removed an object of
//! ours, the difference is the same.

mod mirror;
mod objects;
mod plan;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tombolo_core::backoff::Backoff;
use tombolo_core::id::ServiceName;
use tombolo_core::source::{LocalState, SourceProblem};
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;
use tombolo_runtime::metrics::prometheus_client::metrics::family::Family;

use crate::hub::{HubGone, HubHandle};
use crate::kubernetes::{Leadership, Watch, name_of, reason};
use mirror::{Change, Kind, Mirror, reduce};
use plan::{Known, Plan, Write, plan};

/// Who owns the fields that are written.
pub const FIELD_MANAGER: &str = "tombolo-federation";
/// Changes that wait for the task; the watches wait when it is full.
const CHANGES_MAX: usize = 1_024;
/// Changes within this time are written together.
const PAUSE: Duration = Duration::from_millis(50);
/// Objects that are written at the same time.
const WRITES_AT_ONCE: usize = 8;
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LONGEST: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabels {
    kind: &'static str,
    result: &'static str,
}

/// The task that writes.
pub struct Writer {
    client: Client,
    leadership: Leadership,
    hub: HubHandle,
    source: watch::Receiver<Arc<LocalState>>,
    mirror: Mirror,
    changes: mpsc::Receiver<Change>,
    written: Family<WriteLabels, Counter>,
    backoff: Backoff,
    /// When what failed is tried again.
    again: Option<Instant>,
    /// What the hub was told last.
    told: Vec<SourceProblem>,
    told_imported: Option<Arc<BTreeMap<ServiceName, Vec<IpAddr>>>>,
    /// They end with the writer.
    _watches: JoinSet<()>,
}

impl Writer {
    pub fn new(
        client: Client,
        leadership: Leadership,
        hub: HubHandle,
        source: watch::Receiver<Arc<LocalState>>,
        metrics: &Metrics,
    ) -> Self {
        let (sender, changes) = mpsc::channel(CHANGES_MAX);
        let mut watches = JoinSet::new();
        for kind in Kind::ALL {
            let watch = Watch {
                client: client.clone(),
                kind: *kind,
                definition: kind.definition(),
                labels: kind.labels(),
                reduce: Box::new(|_, object| reduce(object)),
                changes: sender.clone(),
            };
            watches.spawn(watch.run());
        }
        Self {
            client,
            leadership,
            hub,
            source,
            mirror: Mirror::default(),
            changes,
            written: metrics
                .counters("tombolo_kubernetes_writes", "Objects written to the API server, by kind and result"),
            backoff: Backoff::new(RETRY_FIRST, RETRY_LONGEST),
            again: None,
            told: Vec::new(),
            told_imported: None,
            _watches: watches,
        }
    }

    /// Until the hub ends.
    pub async fn run(mut self) {
        // What has not been read yet would look as if it had gone.
        if self.hub.settled().await.is_err() {
            return;
        }
        let mut services = self.hub.changes();
        loop {
            let again = self.again.unwrap_or_else(Instant::now);
            tokio::select! {
                changed = services.changed() => if changed.is_err() { return },
                changed = self.source.changed() => if changed.is_err() { return },
                change = self.changes.recv() => match change {
                    Some(change) => self.mirror.handle_change(change),
                    None => return,
                },
                () = tokio::time::sleep_until(again), if self.again.is_some() => self.again = None,
            }
            while let Ok(change) = self.changes.try_recv() {
                self.mirror.handle_change(change);
            }
            if self.again.is_some() || !self.mirror.is_complete() {
                continue;
            }
            if !self.leadership.holds() {
                // As long as it is not known who leads, nothing is written.
                self.again = Some(Instant::now() + RETRY_FIRST);
                continue;
            }
            if self.step().await.is_err() {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn tell_imported(&mut self, imported: BTreeMap<ServiceName, Vec<IpAddr>>) -> Result<(), HubGone> {
        if self.told_imported.as_deref() == Some(&imported) {
            return Ok(());
        }
        let imported = Arc::new(imported);
        self.told_imported = Some(imported.clone());
        self.hub.imported(imported).await
    }

    async fn step(&mut self) -> Result<(), HubGone> {
        let (view, local) = (self.hub.view(), self.source.borrow_and_update().clone());
        let connected = view.gateways.values().filter(|gateway| gateway.connected);
        let known = Known {
            services: &view.services,
            local: &local,
            addresses: view.addresses.as_deref(),
            gateways: &connected.filter_map(|gateway| gateway.unmeshed_address).collect(),
            mirror: &self.mirror,
            now: Timestamp::now(),
        };
        let Plan { writes, mut problems, imported } = plan(&known);
        self.tell_imported(imported).await?;
        let (client, leadership) = (&self.client, &self.leadership);
        let versions = [Kind::ServiceImport, Kind::ServiceExport].map(|kind| self.mirror.api_version(kind));
        let write = |write: Write| async {
            let done = if leadership.holds() { carry_out(client, &versions, &write).await } else { Ok(None) };
            (write, done)
        };
        let mut done = futures::stream::iter(writes).map(write).buffer_unordered(WRITES_AT_ONCE);
        let (mut seen, mut failed) = (Vec::new(), false);
        while let Some((write, result)) = done.next().await {
            let kind = write.kind().definition().kind;
            let result_label = if result.is_ok() { "ok" } else { "failed" };
            self.written.get_or_create(&WriteLabels { kind, result: result_label }).inc();
            match result {
                Ok(change) => seen.extend(change),
                Err(reason) => {
                    failed = true;
                    let reason = format!("can't be written: {reason}");
                    problems.push(SourceProblem { file: write.name().to_string(), line: 0, reason });
                }
            }
        }
        drop(done);
        // The watch will say the same; until it does, nothing is written twice.
        seen.into_iter().for_each(|change| self.mirror.handle_change(change));
        if failed {
            self.again = Some(Instant::now() + self.backoff.next_wait(rand::random()));
        } else {
            self.backoff.reset();
        }
        problems.sort();
        problems.truncate(tombolo_core::source::PROBLEMS_MAX);
        if self.told != problems {
            self.told.clone_from(&problems);
            self.hub.not_written(problems).await?;
        }
        Ok(())
    }
}

impl Write {
    fn kind(&self) -> Kind {
        match self {
            Write::Apply { kind, .. } | Write::ApplyStatus { kind, .. } | Write::Delete { kind, .. } => *kind,
        }
    }

    fn name(&self) -> Arc<str> {
        let (namespace, name) = self.place();
        name_of(self.kind().definition().kind, Some(namespace), name)
    }

    fn place(&self) -> (&str, &str) {
        match self {
            Write::Apply { body, .. } | Write::ApplyStatus { body, .. } => {
                let field = |field: &str| body["metadata"][field].as_str().unwrap_or_default();
                (field("namespace"), field("name"))
            }
            Write::Delete { namespace, name, .. } => (namespace, name),
        }
    }
}

/// Writes one object; yields what is there then. What has gone meanwhile, or was replaced, is not an error: the next
/// comparison sees it.
async fn carry_out(client: &Client, versions: &[Option<String>; 2], write: &Write) -> Result<Option<Change>, String> {
    let kind = write.kind();
    let definition = kind.definition();
    let version = match kind {
        Kind::ServiceImport => versions[0].as_deref(),
        Kind::ServiceExport => versions[1].as_deref(),
        Kind::Namespace | Kind::Service | Kind::EndpointSlice => None,
    };
    let version = version.and_then(|version| version.rsplit('/').next()).unwrap_or(definition.versions[0]);
    let (namespace, name) = write.place();
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &definition.resource(version));
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let done = match write {
        Write::Apply { body, .. } => api.patch(name, &params, &Patch::Apply(body)).await.map(Some),
        Write::ApplyStatus { body, .. } => api.patch_status(name, &params, &Patch::Apply(body)).await.map(Some),
        Write::Delete { uid, .. } => {
            let preconditions = uid.clone().map(|uid| Preconditions { uid: Some(uid), resource_version: None });
            api.delete(name, &DeleteParams { preconditions, ..DeleteParams::default() }).await.map(|_| None)
        }
    };
    match done {
        Ok(Some(object)) => {
            let name = name_of(definition.kind, object.namespace().as_deref(), &object.name_any());
            Ok(Some(Change::Seen(kind, name, reduce(object))))
        }
        Ok(None) => Ok(Some(Change::Gone(kind, write.name()))),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 409 && matches!(write, Write::Delete { .. }) => Ok(None),
        Err(error) => Err(reason(&error)),
    }
}
