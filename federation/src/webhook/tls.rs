//! The webhooks' certificate: issued by the cluster's own CA, renewed in time, and made known to the API server.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use data_encoding::BASE64;
use jiff::Timestamp;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tombolo_trust::bundle::certificate_pem;
use tombolo_trust::ca::{CaError, CertificateAuthority};

use crate::kubernetes::reason;
use crate::mcs::FIELD_MANAGER;

/// How long a certificate is valid; it is renewed at half of that.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// How often it is looked whether anything has to be renewed ...
const TICK: Duration = Duration::from_secs(5);
/// ... and whether the API server still has the right roots, though nothing has changed here.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

pub struct Certificate {
    ca: CertificateAuthority,
    names: Vec<String>,
    shown: Arc<Shown>,
    issued: Timestamp,
    /// Of the bundle when it was issued: with new roots another one may be the active one.
    sequence: u64,
}

struct Shown(ArcSwap<CertifiedKey>);

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown")
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl Certificate {
    pub fn new(ca: CertificateAuthority, names: Vec<String>) -> Result<Self, CaError> {
        let (now, sequence) = (Timestamp::now(), ca.bundle().sequence());
        let key = ca.server_certificate(&names, LIFE, now)?;
        Ok(Self { ca, names, shown: Arc::new(Shown(ArcSwap::from_pointee(key))), issued: now, sequence })
    }

    /// For the API server, which shows no certificate of its own unless it is told to.
    pub fn tls(&self) -> Arc<ServerConfig> {
        tombolo_trust::tls::plain_server_config(self.shown.clone())
    }

    /// Renews, and keeps `caBundle` of every webhook of both configurations at the roots of the bundle.
    pub async fn keep(mut self, client: Client, mutating: String, validating: String) {
        let injection: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
        let validation: Api<ValidatingWebhookConfiguration> = Api::all(client);
        let (mut looked, mut known) = (None::<Timestamp>, 0);
        let mut ticks = tokio::time::interval(TICK);
        loop {
            ticks.tick().await;
            self.renew_if_due(Timestamp::now());
            let fresh =
                looked.is_some_and(|looked| Timestamp::now().duration_since(looked).unsigned_abs() < LOOK_AGAIN);
            if fresh && known == self.sequence {
                continue;
            }
            let told = tokio::join!(self.tell(&injection, &mutating), self.tell(&validation, &validating));
            match told.0.and(told.1) {
                Ok(()) => (looked, known) = (Some(Timestamp::now()), self.sequence),
                Err(error) => {
                    let reason = reason(&error);
                    tracing::warn!(reason, "the API server can't be told which roots the webhooks' certificate has");
                }
            }
        }
    }

    fn renew_if_due(&mut self, now: Timestamp) {
        let sequence = self.ca.bundle().sequence();
        if sequence == self.sequence && now.duration_since(self.issued).unsigned_abs() < LIFE / 2 {
            return;
        }
        match self.ca.server_certificate(&self.names, LIFE, now) {
            Ok(key) => {
                self.shown.0.store(Arc::new(key));
                (self.issued, self.sequence) = (now, sequence);
                tracing::info!("the webhook's certificate was renewed");
            }
            Err(error) => tracing::error!(%error, "the webhook's certificate can't be renewed"),
        }
    }

    /// The configuration itself is the installation's; of it only the roots are written. One that is not there is not used.
    async fn tell<K: Configuration>(&self, api: &Api<K>, name: &str) -> Result<(), kube::Error> {
        let roots: String = self.ca.bundle().roots().iter().map(certificate_pem).collect();
        let Some(current) = api.get_opt(name).await? else { return Ok(()) };
        let webhooks = current.webhooks();
        if webhooks.iter().all(|(_, bundle)| *bundle == Some(roots.as_bytes())) {
            return Ok(());
        }
        let bundle = BASE64.encode(roots.as_bytes());
        let webhook = |name: &str| json!({ "name": name, "clientConfig": { "caBundle": bundle } });
        let webhooks: Vec<Value> = webhooks.iter().map(|(name, _)| webhook(name)).collect();
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        api.patch(name, &parameters, &Patch::Strategic(json!({ "webhooks": webhooks }))).await?;
        tracing::info!(configuration = name, "the API server knows the roots of the webhooks' certificate");
        Ok(())
    }
}

/// Either kind of configuration: its webhooks by name, each with its `caBundle`.
trait Configuration: Clone + fmt::Debug + DeserializeOwned {
    fn webhooks(&self) -> Vec<(&str, Option<&[u8]>)>;
}

fn bundle_of(client: &WebhookClientConfig) -> Option<&[u8]> {
    client.ca_bundle.as_ref().map(|bundle| bundle.0.as_slice())
}

impl Configuration for MutatingWebhookConfiguration {
    fn webhooks(&self) -> Vec<(&str, Option<&[u8]>)> {
        let webhooks = self.webhooks.iter().flatten();
        webhooks.map(|webhook| (webhook.name.as_str(), bundle_of(&webhook.client_config))).collect()
    }
}

impl Configuration for ValidatingWebhookConfiguration {
    fn webhooks(&self) -> Vec<(&str, Option<&[u8]>)> {
        let webhooks = self.webhooks.iter().flatten();
        webhooks.map(|webhook| (webhook.name.as_str(), bundle_of(&webhook.client_config))).collect()
    }
}
