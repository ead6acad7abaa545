//! The public root of this cluster in a ConfigMap, for sidecars and gateways that are to pin it.

use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use tombolo_api::inject::{CA_CONFIG_MAP, CA_KEY};
use tombolo_core::backoff::Backoff;
use tombolo_core::id::Namespace;

use super::{Leadership, reason};
use crate::hub::HubHandle;
use crate::mcs::FIELD_MANAGER;

/// How often it is written again, in case somebody has changed it.
const REPEAT: Duration = Duration::from_secs(300);
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LONGEST: Duration = Duration::from_secs(30);

/// Keeps `tombolo-ca` at what the own CA publishes, until the hub ends.
pub async fn publish_ca(client: Client, namespace: Namespace, leadership: Leadership, hub: HubHandle) {
    let maps: Api<ConfigMap> = Api::namespaced(client, namespace.as_str());
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
    let mut changes = hub.changes();
    let mut written = None;
    loop {
        changes.borrow_and_update();
        let view = hub.view();
        let pem = view.bundles.get(&view.cluster).map(tombolo_trust::bundle::Bundle::to_pem);
        let mut wait = REPEAT;
        if let Some(pem) = pem.filter(|pem| written.as_ref() != Some(pem)) {
            let result = if leadership.holds() { Some(apply(&maps, pem.clone()).await) } else { None };
            wait = match result {
                Some(Ok(())) => {
                    backoff.reset();
                    written = Some(pem);
                    REPEAT
                }
                Some(Err(error)) => {
                    tracing::warn!(reason = reason(&error), "ConfigMap {namespace}/{CA_CONFIG_MAP} is not written");
                    backoff.next_wait(rand::random())
                }
                None => backoff.next_wait(rand::random()),
            };
        }
        tokio::select! {
            changed = changes.changed(), if written.is_some() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => if wait == REPEAT { written = None },
        }
    }
}

async fn apply(maps: &Api<ConfigMap>, pem: String) -> Result<(), kube::Error> {
    let label = ("app.kubernetes.io/managed-by".to_owned(), "tombolo".to_owned());
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(CA_CONFIG_MAP.into()),
            labels: Some([label].into()),
            ..ObjectMeta::default()
        },
        data: Some([(CA_KEY.to_owned(), pem)].into()),
        ..ConfigMap::default()
    };
    maps.patch(CA_CONFIG_MAP, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&map)).await.map(drop)
}
