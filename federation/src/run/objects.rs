//! Opens the state that is kept in objects of the API server.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use tombolo_core::id::{ClusterId, TrustDomain};
use tombolo_runtime::drain::DrainWatch;
use tombolo_trust::ca::CertificateAuthority;

use super::STATE_PAUSE;
use super::parts::{Base, OpenedSource};
use crate::config::{Config, KubernetesConfig};
use crate::kubernetes::Leadership;
use crate::store::objects::{ObjectVault, Objects};
use crate::store::{Store, StoreError};

/// How often the API server is asked again that does not answer.
const AGAIN: Duration = Duration::from_secs(1);

/// Waits until there is a CA, which the first leader makes. `None` when the process drains before.
pub async fn open(
    config: &Config,
    kubernetes: &KubernetesConfig,
    source: &OpenedSource,
    leadership: &Leadership,
    drain: &DrainWatch,
) -> anyhow::Result<Option<Base>> {
    let OpenedSource::Kubernetes { client, .. } = source else { anyhow::bail!("there is no API server to ask") };
    let objects = Objects::new(client.clone(), &kubernetes.namespace, leadership.clone());
    let opening = Opening {
        objects,
        leadership: leadership.clone(),
        state: config.state.clone(),
        cluster: config.cluster.clone(),
        trust_domain: config.trust_domain(),
    };
    loop {
        let opening = opening.clone();
        let opened = tokio::task::spawn_blocking(move || opening.open());
        let pause = match opened.await.context("opening the state panicked")? {
            Ok(Some((store, ca))) => return Base::new(config, ca, store).map(Some),
            Ok(None) => STATE_PAUSE,
            Err(error) if may_heal(&error) => {
                tracing::warn!(%error, "the state can't be read; trying on");
                AGAIN
            }
            Err(error) => return Err(error),
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = drain.draining() => return Ok(None),
        }
    }
}

fn may_heal(error: &anyhow::Error) -> bool {
    let store = |error: &StoreError| matches!(error, StoreError::Api { .. } | StoreError::NotLeading);
    error.chain().any(|cause| cause.downcast_ref().is_some_and(store))
}

#[derive(Clone)]
struct Opening {
    objects: Objects,
    leadership: Leadership,
    state: PathBuf,
    cluster: ClusterId,
    trust_domain: TrustDomain,
}

impl Opening {
    fn open(self) -> anyhow::Result<Option<(Store, CertificateAuthority)>> {
        let Self { objects, leadership, state, cluster, trust_domain } = self;
        let vault = Box::new(ObjectVault(objects.clone()));
        let store = Store::follow(objects, &state, &cluster, &trust_domain)?;
        if leadership.holds() {
            store.lead(Timestamp::now())?;
            return Ok(Some((store, CertificateAuthority::create_or_load_in(vault, &state, &trust_domain)?)));
        }
        Ok(CertificateAuthority::load_in(vault, &state, &trust_domain)?.map(|ca| (store, ca)))
    }
}
