//! Documents as Secrets of the cluster's API server, laid out and fenced as [`tombolo_core::document`] says.
//!
//! The methods block until the API server has answered: call them on threads that may.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client, ResourceExt};
use tokio::runtime::Handle;
use tombolo_core::document::{Head, Overtaken, layout};
use tombolo_core::id::Namespace;
use tombolo_trust::ca::Vault;
use zeroize::Zeroizing;

use super::documents::StoreError;
use crate::kubernetes::{Leadership, reason};

/// The document of the CA: the one with private keys.
pub const CA: &str = "ca.json";

/// What the names of all objects begin with.
const PREFIX: &str = "tombolo-federation-";
/// Which document an object belongs to.
const DOCUMENT_LABEL: &str = "tombolo.dev/document";
const MANAGED_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "tombolo");
/// Fields of an object: what its head says, and the content in it.
const HEAD: &str = "head";
const CONTENT: &str = "content";
/// How long one request may take.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(5);
/// How often a document is read again that changes while it is read, and claimed that is written meanwhile.
const TRIES: usize = 8;

/// The documents of one federation. Clones share them.
#[derive(Clone)]
pub struct Objects {
    shared: Arc<Shared>,
}

struct Shared {
    secrets: Api<Secret>,
    namespace: Namespace,
    leadership: Leadership,
    runtime: Handle,
    term: Mutex<Term>,
}

/// What is known since this process leads.
#[derive(Default)]
struct Term {
    epoch: u64,
    writes: u64,
    heads: BTreeMap<String, Known>,
}

/// A head as it was last seen or written.
#[derive(Clone)]
struct Known {
    head: Head,
    inline: Option<ByteString>,
    /// `metadata.resourceVersion`
    version: String,
}

impl Objects {
    /// Needs a runtime, on which requests are made. Only as long as `leadership` holds is anything written.
    pub fn new(client: Client, namespace: &Namespace, leadership: Leadership) -> Self {
        let secrets = Api::namespaced(client, namespace.as_str());
        let (namespace, runtime) = (namespace.clone(), Handle::current());
        Self { shared: Arc::new(Shared { secrets, namespace, leadership, runtime, term: Mutex::default() }) }
    }

    /// What a document is called in messages.
    pub fn place(&self, name: &str) -> String {
        format!("Secret {}/{}", self.shared.namespace, object_name(name))
    }

    /// What all of them are called together.
    pub fn whole(&self) -> String {
        format!("namespace {}", self.shared.namespace)
    }

    /// The epoch in which this process writes.
    pub(super) fn epoch(&self) -> u64 {
        self.term().epoch
    }

    /// Begins to write in an epoch that is later than that of any earlier writer of `name`, and not before `epoch`.
    pub(super) fn begin(&self, name: &str, epoch: u64) -> Result<(), StoreError> {
        let found = self.wait(self.look(name))?;
        let epoch = found.map_or(epoch, |known| epoch.max(known.head.fence.saturating_add(1)));
        *self.term() = Term { epoch, ..Term::default() };
        self.claim(name)
    }

    /// Becomes the only one who may write a document.
    pub(super) fn claim(&self, name: &str) -> Result<(), StoreError> {
        self.leads()?;
        self.wait(async {
            let epoch = self.epoch();
            for _ in 0..TRIES {
                let found = self.look(name).await?;
                let head = match &found {
                    None => Ok(Head::unwritten(epoch)),
                    Some(known) => known.head.claimed(epoch),
                };
                let head = head.map_err(|Overtaken| self.overtaken(name))?;
                let (version, inline) = found.map_or((None, None), |known| (Some(known.version), known.inline));
                if let Some(known) = self.put(name, head, inline, version).await? {
                    self.clear(name, &known.head.parts(&object_name(name)).into_iter().collect()).await;
                    self.term().heads.insert(name.to_owned(), known);
                    return Ok(());
                }
            }
            Err(self.overtaken(name))
        })
    }

    /// A document's content; `None` while it has none.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.wait(async {
            let mut last = None;
            for _ in 0..TRIES {
                let Some(known) = self.look(name).await? else { return Ok(None) };
                let mut parts = Vec::new();
                for part in known.head.parts(&object_name(name)) {
                    parts.extend(self.get(&part).await?.and_then(|secret| field(&secret, CONTENT)));
                }
                let inline = known.inline.map(|octets| octets.0).unwrap_or_default();
                match known.head.assemble(inline, parts.into_iter().map(|part| part.0).collect()) {
                    Ok(content) => return Ok(content),
                    // Replaced between the two readings, or lost.
                    Err(damaged) => last = Some(damaged),
                }
            }
            let reason = last.map(|damaged| damaged.to_string()).unwrap_or_default();
            Err(StoreError::Damaged { path: self.place(name).into(), reason, lost: "what it holds" })
        })
    }

    /// Replaces a document's content. When this returns without an error it is durable; if another one leads meanwhile,
    /// nothing has happened.
    pub(super) fn write(&self, name: &str, octets: &[u8]) -> Result<(), StoreError> {
        self.leads()?;
        self.wait(async {
            let (epoch, write, before) = {
                let mut term = self.term();
                term.writes += 1;
                (term.epoch, term.writes, term.heads.get(name).cloned().ok_or(StoreError::NotLeading)?)
            };
            let known = self.lay(name, epoch, write, octets, Some(before.clone())).await?;
            self.term().heads.insert(name.to_owned(), known);
            for part in before.head.parts(&object_name(name)) {
                self.delete(&part).await;
            }
            Ok(())
        })
    }

    /// Puts a document there that nobody writes to, in the place of what was there. `write` was never used before.
    pub(crate) fn restore(&self, name: &str, octets: &[u8], write: u64) -> Result<(), StoreError> {
        self.wait(async {
            let before = self.look(name).await?;
            self.lay(name, 0, write, octets, before).await.map(drop)
        })
    }

    /// Writes the parts, and then the head in the place of `before`.
    async fn lay(
        &self,
        name: &str,
        epoch: u64,
        write: u64,
        octets: &[u8],
        before: Option<Known>,
    ) -> Result<Known, StoreError> {
        let laid = layout(&object_name(name), epoch, write, octets)
            .map_err(|error| StoreError::Api { object: self.place(name), reason: error.to_string() })?;
        for (part, content) in &laid.parts {
            let secret = secret(part.clone(), name, None, None, Some(ByteString(content.to_vec())));
            self.within(part, self.shared.secrets.create(&PostParams::default(), &secret)).await?;
        }
        let inline = laid.inline.map(|content| ByteString(content.to_vec()));
        let mut version = before.map(|known| known.version);
        for _ in 0..TRIES {
            let put = self.put(name, laid.head.clone(), inline.clone(), version).await;
            match put {
                Ok(Some(known)) => return Ok(known),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "looking what became of a write"),
            }
            let found = self.look(name).await?;
            Head::after_failure(found.as_ref().map(|known| &known.head), epoch)
                .map_err(|Overtaken| self.overtaken(name))?;
            match found {
                Some(known) if known.head == laid.head => return Ok(known),
                found => version = found.map(|known| known.version),
            }
        }
        Err(StoreError::Api { object: self.place(name), reason: "somebody changes it all the time".into() })
    }

    /// Creates the head, or replaces it in that version; `None` when there is another one.
    async fn put(
        &self,
        name: &str,
        head: Head,
        inline: Option<ByteString>,
        version: Option<String>,
    ) -> Result<Option<Known>, StoreError> {
        let object = object_name(name);
        let new = secret(object.clone(), name, version.clone(), Some(&head), inline.clone());
        let params = PostParams::default();
        let put = async {
            match version {
                Some(_) => self.shared.secrets.replace(&object, &params, &new).await,
                None => self.shared.secrets.create(&params, &new).await,
            }
        };
        match tokio::time::timeout(REQUEST_TIME_MAX, put).await {
            Ok(Ok(secret)) => {
                let version = secret.metadata.resource_version.unwrap_or_default();
                Ok(Some(Known { head, inline, version }))
            }
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(None),
            Ok(Err(error)) => Err(self.failed(&object, &error)),
            Err(_) => Err(self.silent(&object)),
        }
    }

    /// The head as it is now.
    async fn look(&self, name: &str) -> Result<Option<Known>, StoreError> {
        let Some(secret) = self.get(&object_name(name)).await? else { return Ok(None) };
        let damaged = |reason: &str| StoreError::Damaged {
            path: self.place(name).into(),
            reason: reason.into(),
            lost: "what it holds",
        };
        let head = field(&secret, HEAD).ok_or_else(|| damaged("it has no head"))?;
        let head = serde_json::from_slice(&head.0).map_err(|_| damaged("its head can't be read"))?;
        let inline = field(&secret, CONTENT);
        Ok(Some(Known { head, inline, version: secret.resource_version().unwrap_or_default() }))
    }

    /// Removes what a write that was cut off has left.
    async fn clear(&self, name: &str, kept: &BTreeSet<String>) {
        let of_document = ListParams::default().labels(&format!("{DOCUMENT_LABEL}={}", document(name)));
        match self.within(&object_name(name), self.shared.secrets.list_metadata(&of_document)).await {
            Ok(there) => {
                let names = there.items.iter().map(ResourceExt::name_any);
                for stray in names.filter(|one| *one != object_name(name) && !kept.contains(one)) {
                    self.delete(&stray).await;
                }
            }
            Err(error) => tracing::warn!(%error, "what an earlier leader may have left is not removed"),
        }
    }

    async fn get(&self, object: &str) -> Result<Option<Secret>, StoreError> {
        self.within(object, self.shared.secrets.get_opt(object)).await
    }

    /// What is left of it costs room and nothing else.
    async fn delete(&self, object: &str) {
        match self.within(object, self.shared.secrets.delete(object, &DeleteParams::default())).await {
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "an old part of the state is not removed"),
        }
    }

    async fn within<T>(
        &self,
        object: &str,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(REQUEST_TIME_MAX, request).await {
            Ok(answer) => answer.map_err(|error| self.failed(object, &error)),
            Err(_) => Err(self.silent(object)),
        }
    }

    fn failed(&self, object: &str, error: &kube::Error) -> StoreError {
        StoreError::Api { object: format!("Secret {}/{object}", self.shared.namespace), reason: reason(error) }
    }

    fn silent(&self, object: &str) -> StoreError {
        let reason = format!("the API server did not answer within {REQUEST_TIME_MAX:?}");
        StoreError::Api { object: format!("Secret {}/{object}", self.shared.namespace), reason }
    }

    /// This process has no business to write any more, whatever its lease says.
    fn overtaken(&self, name: &str) -> StoreError {
        self.shared.leadership.end();
        StoreError::Overtaken { object: self.place(name) }
    }

    fn leads(&self) -> Result<(), StoreError> {
        if self.shared.leadership.holds() { Ok(()) } else { Err(StoreError::NotLeading) }
    }

    fn wait<T>(&self, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        self.shared.runtime.block_on(work)
    }

    fn term(&self) -> MutexGuard<'_, Term> {
        self.shared.term.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The CA's state as one of the documents.
pub struct ObjectVault(pub Objects);

impl Vault for ObjectVault {
    fn name(&self) -> PathBuf {
        self.0.place(CA).into()
    }

    fn load(&self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        Ok(self.0.read(CA).map_err(io::Error::other)?.map(Zeroizing::new))
    }

    fn save(&self, state: &[u8]) -> io::Result<()> {
        self.0.write(CA, state).map_err(io::Error::other)
    }
}

fn document(name: &str) -> &str {
    name.strip_suffix(".json").unwrap_or(name)
}

fn object_name(name: &str) -> String {
    format!("{PREFIX}{}", document(name))
}

fn field(secret: &Secret, name: &str) -> Option<ByteString> {
    secret.data.as_ref()?.get(name).cloned()
}

fn secret(
    object: String,
    name: &str,
    version: Option<String>,
    head: Option<&Head>,
    content: Option<ByteString>,
) -> Secret {
    let label = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    let labels = [MANAGED_LABEL, (DOCUMENT_LABEL, document(name))].map(label);
    let head = head.map(|head| ByteString(serde_json::to_vec(head).expect("numbers become JSON")));
    let data = [(HEAD, head), (CONTENT, content)];
    Secret {
        metadata: ObjectMeta {
            name: Some(object),
            labels: Some(labels.into()),
            resource_version: version,
            ..ObjectMeta::default()
        },
        data: Some(data.into_iter().filter_map(|(name, octets)| Some((name.to_owned(), octets?))).collect()),
        ..Secret::default()
    }
}
