//! Files of manifests: which of their objects have Pods, and where.

use k8s_openapi::api::core::v1::Service;
use serde_json::Value;

use super::{INJECTED_ANNOTATION, Outcome, PodSecurity, Refused, Settings, Surroundings, Untouched, annotation, pod};
use crate::k8s::{DEFAULT_NAMESPACE, Unreadable, raw_documents};

/// Where in an object of this kind its Pod is; `None` where it has none.
fn template(api_version: &str, kind: &str) -> Option<&'static str> {
    match (api_version, kind) {
        ("v1", "Pod") => Some(""),
        ("apps/v1", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet") | ("batch/v1", "Job") => {
            Some("/spec/template")
        }
        ("v1", "ReplicationController") => Some("/spec/template"),
        ("batch/v1", "CronJob") => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// What became of one object with Pods: the configuration of its sidecars, or why it stays as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injected {
    /// `Kind/namespace/name`
    pub object: String,
    pub outcome: Result<Value, Untouched>,
}

/// Injects every Pod of a file of YAML documents. The text of what is not changed stays as it was. Services are found in the same file;
/// `namespace` is where objects are that name none, and `security` what their namespaces enforce unless the file has them.
///
/// Anything that can't be injected is an error with its line: half a file would look like a whole one.
pub fn manifests(
    text: &str,
    settings: &Settings,
    namespace: Option<&str>,
    security: PodSecurity,
) -> Result<(String, Vec<Injected>), Vec<Unreadable>> {
    let documents = raw_documents(text)?;
    let values: Vec<&Value> = documents.iter().map(|document| &document.value).collect();
    let file = File { services: services(&values, namespace), values, namespace, security };
    let (mut out, mut injected, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    for document in &documents {
        match file.object(&document.value, settings) {
            Ok(None) => out.push(document.text.clone()),
            Ok(Some((object, None))) => {
                out.push(document.text.clone());
                injected.push(object);
            }
            Ok(Some((object, Some(changed)))) => {
                out.push(serde_saphyr::to_string(&changed).expect("JSON can be written as YAML"));
                injected.push(object);
            }
            Err(refused) => wrong.push(Unreadable { line: document.line, reason: refused.to_string() }),
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let texts: Vec<&str> = out.iter().map(|text| text.trim_matches('\n')).collect();
    Ok((texts.join("\n---\n") + "\n", injected))
}

struct File<'a> {
    values: Vec<&'a Value>,
    services: Vec<(String, Service)>,
    namespace: Option<&'a str>,
    security: PodSecurity,
}

impl File<'_> {
    fn object(&self, object: &Value, settings: &Settings) -> Result<Option<(Injected, Option<Value>)>, Refused> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let (version, kind) = (text("/apiVersion").unwrap_or_default(), text("/kind").unwrap_or_default());
        let Some(at) = template(version, kind) else { return Ok(None) };
        let namespace = text("/metadata/namespace").or(self.namespace).unwrap_or(DEFAULT_NAMESPACE);
        let name = text("/metadata/name").or_else(|| text("/metadata/generateName")).unwrap_or_default();
        let of_namespace = self.services.iter().filter(|(other, _)| other == namespace);
        let services: Vec<Service> = of_namespace.map(|(_, service)| service.clone()).collect();
        let security = self.security_of(namespace);
        let around = Surroundings { namespace, security, services: &services };
        let template = object.pointer(at).ok_or(Refused::Shape("there is no template of a Pod where one must be"))?;
        let object_name = format!("{kind}/{namespace}/{name}");
        let (outcome, changed) = match pod(template, settings, around)? {
            Outcome::Untouched(untouched) => (Err(untouched), None),
            Outcome::Changed(injected) => {
                let config =
                    annotation(&injected, INJECTED_ANNOTATION).and_then(|text| serde_json::from_str(text).ok());
                let mut changed = object.clone();
                *changed.pointer_mut(at).expect("it was there above") = injected;
                (Ok(config.unwrap_or_default()), Some(changed))
            }
        };
        Ok(Some((Injected { object: object_name, outcome }, changed)))
    }

    fn security_of(&self, namespace: &str) -> PodSecurity {
        let found =
            self.values.iter().find(|value| value["kind"] == "Namespace" && value["metadata"]["name"] == namespace);
        match found.and_then(|value| value["metadata"]["labels"][PodSecurity::LABEL].as_str()) {
            Some(label) => PodSecurity::of_label(Some(label)),
            None => self.security,
        }
    }
}

/// What is no Service that Kubernetes would take selects nothing.
fn services(values: &[&Value], namespace: Option<&str>) -> Vec<(String, Service)> {
    let services = values.iter().filter(|value| value["kind"] == "Service" && value["apiVersion"] == "v1");
    let read = services.filter_map(|value| serde_json::from_value::<Service>((*value).clone()).ok());
    let place = |service: &Service| service.metadata.namespace.clone();
    let or_else = || namespace.unwrap_or(DEFAULT_NAMESPACE).to_owned();
    read.map(|service| (place(&service).unwrap_or_else(or_else), service)).collect()
}
