//! The trust bundle where Pods can mount it: a ConfigMap in every namespace with injection. In tombolo's own the leader
//! keeps it, injection or not ([`crate::kubernetes::publish_ca`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Namespace as NamespaceObject};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tombolo_api::inject::{CA_CONFIG_MAP, CA_KEY, INJECT_LABEL};
use tombolo_core::id::Namespace;
use tombolo_trust::ca::CertificateAuthority;

use crate::kubernetes::reason;
use crate::mcs::FIELD_MANAGER;

/// How often it is looked for namespaces that were labelled, and for a new bundle.
const TICK: Duration = Duration::from_secs(5);
/// What somebody has changed or removed is written again after this long.
const WRITE_AGAIN: Duration = Duration::from_secs(300);
/// Namespaces in one page of a list.
const PAGE: u32 = 500;

/// Writes the bundle. Clones share what they know.
#[derive(Clone)]
pub struct Bundles {
    client: Client,
    own: Namespace,
    ca: CertificateAuthority,
    /// For each namespace the sequence that was written last, and when.
    written: Arc<Mutex<BTreeMap<String, (u64, Instant)>>>,
}

impl Bundles {
    pub fn new(client: Client, own: Namespace, ca: CertificateAuthority) -> Self {
        Self { client, own, ca, written: Arc::default() }
    }

    pub async fn run(self) {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            ticks.tick().await;
            let namespaces = match self.labelled().await {
                Ok(namespaces) => namespaces,
                Err(error) => {
                    tracing::warn!(reason = reason(&error), "the namespaces with injection can't be listed; trying on");
                    continue;
                }
            };
            self.known().retain(|namespace, _| namespaces.contains(namespace));
            for namespace in namespaces {
                self.ensure(&namespace).await;
            }
        }
    }

    async fn labelled(&self) -> Result<Vec<String>, kube::Error> {
        let api: Api<NamespaceObject> = Api::all(self.client.clone());
        let mut parameters = ListParams::default().labels(&format!("{INJECT_LABEL}=enabled")).limit(PAGE);
        let mut names = Vec::new();
        loop {
            let page = api.list_metadata(&parameters).await?;
            names.extend(page.items.iter().map(ResourceExt::name_any));
            match page.metadata.continue_ {
                Some(next) if !next.is_empty() => parameters.continue_token = Some(next),
                _ => return Ok(names),
            }
        }
    }

    /// Writes the bundle into a namespace, unless it is there as far as is known.
    pub async fn ensure(&self, namespace: &str) {
        if namespace == self.own.as_str() {
            return;
        }
        let bundle = self.ca.bundle();
        let fresh = |(sequence, at): &(u64, Instant)| *sequence == bundle.sequence() && at.elapsed() < WRITE_AGAIN;
        if self.known().get(namespace).is_some_and(fresh) {
            return;
        }
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": CA_CONFIG_MAP, "labels": { "app.kubernetes.io/managed-by": "tombolo" } },
            "data": { CA_KEY: bundle.to_pem() },
        });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        match api.patch(CA_CONFIG_MAP, &parameters, &Patch::Apply(object)).await {
            Ok(_) => _ = self.known().insert(namespace.to_owned(), (bundle.sequence(), Instant::now())),
            Err(error) => {
                tracing::warn!(
                    namespace,
                    reason = reason(&error),
                    "the trust bundle can't be written; Pods wait for it"
                );
            }
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, (u64, Instant)>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
