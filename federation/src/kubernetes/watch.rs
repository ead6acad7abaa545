//! Watches one kind of object for ever. Each is reduced to what is needed of it as it arrives, so that neither the
//! queue nor what is held ever has more.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::api::DynamicObject;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt};
use tokio::sync::mpsc;
use tombolo_core::backoff::Backoff;

use super::{Definition, reason};

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(10);
/// Objects in one page of a list.
const PAGE: u32 = 500;
/// How long one watch request lasts; a connection that died without a word is noticed after it.
const WATCH_S: u32 = 120;

/// What became of the objects of the kind `K`, each reduced to a `T`.
#[derive(Debug)]
pub enum Change<K, T> {
    /// All objects follow, in this version, then [`Change::Listed`]; what is not among them is gone.
    ListBegan(K, &'static str),
    Listed(K),
    Seen(K, Arc<str>, T),
    Gone(K, Arc<str>),
    /// It can't be read for now; what was read stays in force.
    Failed(K, String),
    /// The API server does not know it.
    Absent(K),
}

/// Takes from an object what is kept of it.
pub type Reduce<T> = Box<dyn Fn(&str, DynamicObject) -> T + Send + Sync>;

/// What is watched, in all namespaces, and what is kept of each object.
pub struct Watch<K, T> {
    pub client: Client,
    pub kind: K,
    pub definition: &'static Definition,
    /// Which objects, by their labels; `None` for all of them.
    pub labels: Option<&'static str>,
    /// From an object of this `apiVersion`.
    pub reduce: Reduce<T>,
    pub changes: mpsc::Sender<Change<K, T>>,
}

impl<K: Copy, T> Watch<K, T> {
    /// Ends when nobody takes the changes any more.
    pub async fn run(self) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
        let mut version = 0;
        let versions = self.definition.versions;
        loop {
            let Some(error) = self.until_failure(versions[version], &mut backoff).await else { return };
            let failed = match &error {
                watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404 => {
                    version = (version + 1) % versions.len();
                    if version != 0 {
                        continue;
                    }
                    Change::Absent(self.kind)
                }
                error => Change::Failed(self.kind, words(error)),
            };
            if self.changes.send(failed).await.is_err() {
                return;
            }
            tokio::time::sleep(backoff.next_wait(rand::random())).await;
        }
    }

    /// Passes changes on until neither a list nor a watch can be had. `None` when nobody takes them.
    async fn until_failure(&self, version: &'static str, backoff: &mut Backoff) -> Option<watcher::Error> {
        let (kind, name) = (self.kind, self.definition.kind);
        let resource = self.definition.resource(version);
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let mut events = Box::pin(watcher::watcher(api, self.selection()));
        loop {
            let change = match events.next().await? {
                Ok(Event::Init) => Change::ListBegan(kind, version),
                Ok(Event::InitDone) => {
                    backoff.reset();
                    Change::Listed(kind)
                }
                Ok(Event::InitApply(object) | Event::Apply(object)) => {
                    Change::Seen(kind, name_of_object(name, &object), (self.reduce)(&resource.api_version, object))
                }
                Ok(Event::Delete(object)) => Change::Gone(kind, name_of_object(name, &object)),
                // A watch that broke is resumed where it ended, or after a 410 with a new list, by the next poll.
                Err(error @ (watcher::Error::WatchFailed(_) | watcher::Error::WatchError(_))) => {
                    tracing::debug!(kind = name, reason = words(&error), "a watch broke");
                    tokio::time::sleep(backoff.next_wait(rand::random())).await;
                    continue;
                }
                Err(error) => return Some(error),
            };
            self.changes.send(change).await.ok()?;
        }
    }

    fn selection(&self) -> watcher::Config {
        let all = watcher::Config::default().page_size(PAGE).timeout(WATCH_S);
        match self.labels {
            Some(labels) => all.labels(labels),
            None => all,
        }
    }
}

fn words(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => reason(error),
        watcher::Error::WatchError(status) => format!("{} {}", status.code, status.message),
        watcher::Error::NoResourceVersion => "the API server sends objects without a resource version".into(),
    }
}

/// `Kind/namespace/name`: how an operator is told of an object.
pub fn name_of(kind: &str, namespace: Option<&str>, name: &str) -> Arc<str> {
    match namespace {
        Some(namespace) => format!("{kind}/{namespace}/{name}").into(),
        None => format!("{kind}/{name}").into(),
    }
}

fn name_of_object(kind: &str, object: &DynamicObject) -> Arc<str> {
    name_of(kind, object.metadata.namespace.as_deref(), &object.name_any())
}
