//! One question of the API server (AdmissionReview, `admission.k8s.io/v1`), and its answer.

use std::time::Duration;

use data_encoding::BASE64;
use k8s_openapi::api::core::v1::{Namespace as NamespaceObject, Service};
use kube::api::ListParams;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::timeout;
use tombolo_api::inject::{Outcome, PodSecurity, Refused, Settings, Surroundings, Untouched, patch, pod};

use super::bundles::Bundles;
use crate::kubernetes::reason;

/// How long the API server's own answers may take; it waits ten seconds for ours.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Services of one namespace that are looked at.
const SERVICES_MAX: u32 = 1_000;

/// Why there is no answer: the webhook's `failurePolicy` says what becomes of the Pod.
#[derive(Debug, thiserror::Error)]
pub enum NotAnswered {
    #[error("not an AdmissionReview of a Pod: {0}")]
    Malformed(&'static str),
    #[error("the API server says nothing of the Pod's namespace: {0}")]
    Api(String),
    #[error("the API server said nothing of the Pod's namespace within {TIME_MAX:?}")]
    Timeout,
}

/// What became of a Pod, for the log and the counters.
pub enum Verdict {
    Injected,
    Untouched,
    Refused(Refused),
}

impl Verdict {
    pub fn code(&self) -> &'static str {
        match self {
            Self::Injected => "injected",
            Self::Untouched => "untouched",
            Self::Refused(_) => "refused",
        }
    }
}

pub struct Injector {
    client: Client,
    settings: Settings,
    bundles: Bundles,
}

impl Injector {
    pub fn new(client: Client, settings: Settings, bundles: Bundles) -> Self {
        Self { client, settings, bundles }
    }

    /// Answers a review with another one.
    pub async fn answer(&self, review: &Value) -> Result<(Value, Verdict), NotAnswered> {
        let request = &review["request"];
        let uid = request["uid"].as_str().ok_or(NotAnswered::Malformed("request.uid is missing"))?;
        let namespace = request["namespace"].as_str().ok_or(NotAnswered::Malformed("request.namespace is missing"))?;
        if request["kind"]["kind"] != "Pod" || !request["object"].is_object() {
            return Err(NotAnswered::Malformed("request.object is no Pod"));
        }
        if request["dryRun"] != true {
            // A Pod that is to be waits for it, and nothing waits for this.
            let (bundles, namespace) = (self.bundles.clone(), namespace.to_owned());
            tokio::spawn(async move { timeout(TIME_MAX, bundles.ensure(&namespace)).await });
        }
        let looked = timeout(TIME_MAX, self.look(namespace)).await.map_err(|_| NotAnswered::Timeout)?;
        let (security, services) = looked.map_err(|error| NotAnswered::Api(reason(&error)))?;
        let around = Surroundings { namespace, security, services: &services };
        let (response, verdict) = self.respond(uid, &request["object"], around);
        Ok((json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }), verdict))
    }

    async fn look(&self, namespace: &str) -> Result<(PodSecurity, Vec<Service>), kube::Error> {
        let namespaces: Api<NamespaceObject> = Api::all(self.client.clone());
        let services: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        let this = ListParams::default().fields(&format!("metadata.name={namespace}"));
        let all = ListParams::default().limit(SERVICES_MAX);
        let (found, services) = tokio::join!(namespaces.list(&this), services.list(&all));
        let found = found?.items.into_iter().next();
        let level = found.and_then(|namespace| namespace.metadata.labels?.remove(PodSecurity::LABEL));
        Ok((PodSecurity::of_label(level.as_deref()), services?.items))
    }

    fn respond(&self, uid: &str, object: &Value, around: Surroundings<'_>) -> (Value, Verdict) {
        match pod(object, &self.settings, around) {
            Ok(Outcome::Changed(changed)) => {
                let operations = Value::Array(patch::between(object, &changed)).to_string();
                let patch = BASE64.encode(operations.as_bytes());
                (json!({ "uid": uid, "allowed": true, "patchType": "JSONPatch", "patch": patch }), Verdict::Injected)
            }
            Ok(Outcome::Untouched(untouched)) => {
                let mut response = json!({ "uid": uid, "allowed": true });
                if untouched == Untouched::HostNetwork {
                    response["warnings"] = json!([format!("no tombolo sidecar: {}", untouched.reason())]);
                }
                (response, Verdict::Untouched)
            }
            Err(refused) => {
                let message = format!("tombolo can't give this Pod a sidecar: {refused}");
                let status = json!({ "code": 422, "reason": "Invalid", "message": message });
                (json!({ "uid": uid, "allowed": false, "status": status }), Verdict::Refused(refused))
            }
        }
    }
}
