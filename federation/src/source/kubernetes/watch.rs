//! Watches one kind of object for ever. Each is reduced to what the mesh needs of it as it arrives, so that neither
//! the queue nor what is held ever has a whole one.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use kube::api::DynamicObject;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use tokio::sync::mpsc;
use tombolo_api::k8s;
use tombolo_core::backoff::Backoff;
use tombolo_core::id::ClusterId;
use tombolo_core::source::declared::Object;

use super::client::reason;
use super::kind::Kind;

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(10);

/// What became of one kind's objects.
#[derive(Debug)]
pub enum Change {
    /// All objects follow, then [`Change::Listed`]; what is not among them is gone.
    ListBegan(Kind),
    Listed(Kind),
    Seen(Kind, Arc<str>, Seen),
    Gone(Kind, Arc<str>),
    /// It can't be read for now; what was read stays in force.
    Failed(Kind, String),
    /// The API server does not know it.
    Absent(Kind),
}

/// What is needed of an object.
#[derive(Debug)]
pub struct Seen {
    /// What it declares, or why that can't be used.
    pub object: Result<Object, String>,
    /// `metadata.creationTimestamp`
    pub created: Option<Timestamp>,
}

/// Ends when nobody takes the changes any more.
pub async fn watch(client: Client, cluster: ClusterId, kind: Kind, changes: mpsc::Sender<Change>) {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
    let mut version = 0;
    loop {
        let Some(error) = until_failure(&client, &cluster, kind, version, &changes, &mut backoff).await else { return };
        let failed = match &error {
            watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404 => {
                version = (version + 1) % kind.versions().len();
                if version != 0 {
                    continue;
                }
                Change::Absent(kind)
            }
            error => Change::Failed(kind, words(error)),
        };
        if changes.send(failed).await.is_err() {
            return;
        }
        tokio::time::sleep(backoff.next_wait(rand::random())).await;
    }
}

/// Passes changes on until neither a list nor a watch can be had. `None` when nobody takes them.
async fn until_failure(
    client: &Client,
    cluster: &ClusterId,
    kind: Kind,
    version: usize,
    changes: &mpsc::Sender<Change>,
    backoff: &mut Backoff,
) -> Option<watcher::Error> {
    let resource = kind.resource(kind.versions()[version]);
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let mut events = Box::pin(watcher::watcher(api, kind.selection()));
    loop {
        let change = match events.next().await? {
            Ok(Event::Init) => Change::ListBegan(kind),
            Ok(Event::InitDone) => {
                backoff.reset();
                Change::Listed(kind)
            }
            Ok(Event::InitApply(object) | Event::Apply(object)) => {
                Change::Seen(kind, name_of(kind, &object), seen(&resource.api_version, cluster, kind, object))
            }
            Ok(Event::Delete(object)) => Change::Gone(kind, name_of(kind, &object)),
            // A watch that broke is resumed where it ended, or after a 410 with a new list, by the next poll.
            Err(error @ (watcher::Error::WatchFailed(_) | watcher::Error::WatchError(_))) => {
                tracing::debug!(kind = kind.name(), reason = words(&error), "a watch broke");
                tokio::time::sleep(backoff.next_wait(rand::random())).await;
                continue;
            }
            Err(error) => return Some(error),
        };
        changes.send(change).await.ok()?;
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

/// `Kind/namespace/name`: how an operator is told of it.
fn name_of(kind: Kind, object: &DynamicObject) -> Arc<str> {
    let name = object.name_any();
    match object.namespace() {
        Some(namespace) => format!("{}/{namespace}/{name}", kind.name()).into(),
        None => format!("{}/{name}", kind.name()).into(),
    }
}

fn seen(api_version: &str, cluster: &ClusterId, kind: Kind, object: DynamicObject) -> Seen {
    let created = object.metadata.creation_timestamp.as_ref().map(|time| time.0);
    Seen { object: declared(api_version, cluster, kind, object), created }
}

fn declared(api_version: &str, cluster: &ClusterId, kind: Kind, mut object: DynamicObject) -> Result<Object, String> {
    object.metadata.managed_fields = None;
    let metadata = serde_json::to_value(&object.metadata).map_err(|error| error.to_string())?;
    if let Value::Object(fields) = &mut object.data {
        fields.insert("metadata".into(), metadata);
    }
    let resource = k8s::from_value(api_version, kind.name(), object.data)?;
    let unread = || format!("{api_version} {} is not read", kind.name());
    k8s::declared(resource.ok_or_else(unread)?, cluster)?.ok_or_else(unread)
}
