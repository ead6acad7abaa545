//! Injection: a Pod as it was written in, the same Pod with a sidecar out. `tombolo inject` and the admission webhook do the
//! same, and what has a sidecar already comes out as it went in.
//!
//! Pods are changed as the JSON that they are, so that a field which only a newer Kubernetes knows of stays.

mod config;
mod containers;
pub mod patch;
mod probes;
mod services;
#[cfg(test)]
mod tests;
mod workload;

use k8s_openapi::api::core::v1::Service;
use serde_json::{Map, Value};
use tombolo_core::id::TrustDomain;

pub use workload::{Injected, manifests};

/// The label of namespaces whose Pods get a sidecar (`enabled`), and of Pods that get none (`disabled`).
pub const INJECT_LABEL: &str = "tombolo.dev/inject";
/// `init`, `dns` or `off`: how connections come to the sidecar; chosen by what the namespace allows if absent.
pub const CAPTURE_ANNOTATION: &str = "tombolo.dev/capture";
/// `permissive` or `strict`: what becomes of connections to the Pod that are no inner legs.
pub const PLAINTEXT_ANNOTATION: &str = "tombolo.dev/plaintext";
/// Fields of the sidecar's configuration, over those that are worked out here.
pub const CONFIG_ANNOTATION: &str = "tombolo.dev/sidecar";
/// The sidecar's whole configuration: written here, read by the sidecar, and the mark of what was injected.
pub const INJECTED_ANNOTATION: &str = "tombolo.dev/injected";

/// The ConfigMap with the trust bundle of the cluster, in every namespace with injection, and its key.
pub const CA_CONFIG_MAP: &str = "tombolo-ca";
pub const CA_KEY: &str = "ca.pem";

pub const SIDECAR_CONTAINER: &str = "tombolo-sidecar";
pub const CAPTURE_CONTAINER: &str = "tombolo-capture";
/// Whom the sidecar runs as: a user that nobody else in a Pod is, since its connections are not captured.
pub const SIDECAR_UID: i64 = 15_443;

/// What every injection of a cluster has in common.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The image with the `tombolo` binary, by digest at best.
    pub image: String,
    /// The image of the container that writes the packet filter's rules: `tombolo`, and `nft`.
    pub capture_image: String,
    /// host:port of the federation's discovery, as Pods reach it.
    pub federation: String,
    pub trust_domain: TrustDomain,
    /// How names are resolved in Pods that ask their sidecar alone.
    pub resolver: Resolver,
}

/// What `/etc/resolv.conf` of a Pod holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// The cluster's DNS server; without one no Pod can be made to ask its sidecar.
    pub servers: Vec<String>,
    /// `cluster.local`
    pub domain: String,
}

/// Where a Pod is to be.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    pub namespace: &'a str,
    pub security: PodSecurity,
    /// The Services of that namespace.
    pub services: &'a [Service],
}

/// The level of the Pod Security Standards that a namespace enforces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PodSecurity {
    #[default]
    Privileged,
    Baseline,
    Restricted,
}

impl PodSecurity {
    pub const LABEL: &'static str = "pod-security.kubernetes.io/enforce";

    /// From the value of that label; a level that is not known is taken for the strictest one.
    pub fn of_label(value: Option<&str>) -> Self {
        match value {
            None | Some("privileged") => Self::Privileged,
            Some("baseline") => Self::Baseline,
            Some(_) => Self::Restricted,
        }
    }
}

/// How the application's connections come to its sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Capture {
    /// By rules of the packet filter, which a privileged init container writes.
    Init,
    /// By names: the sidecar is the Pod's DNS server, and answers with addresses of loopback that it listens at.
    Dns,
    /// Only if the application goes there: the sidecar is its forward proxy.
    Off,
}

/// Why a Pod stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untouched {
    Already,
    OptedOut,
    HostNetwork,
}

impl Untouched {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Already => "it has a sidecar already",
            Self::OptedOut => "its label or annotation tombolo.dev/inject says so",
            Self::HostNetwork => "it uses its node's network, whose connections are not its own",
        }
    }
}

/// Why a Pod can't get a sidecar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("annotation {annotation}: {value:?} is none of {allowed}")]
    Annotation { annotation: &'static str, value: String, allowed: &'static str },
    #[error("annotation {CONFIG_ANNOTATION}: write fields of the sidecar's configuration as YAML: {0}")]
    Config(String),
    #[error(
        "a container runs as user {SIDECAR_UID}, which is the sidecar's own, and whose connections are not captured; use \
         another one"
    )]
    SidecarUser,
    #[error("{CAPTURE_ANNOTATION}: init needs a container with NET_ADMIN, which this namespace's pod security forbids")]
    InitForbidden,
    #[error("{CAPTURE_ANNOTATION}: dns needs to know the cluster's DNS server")]
    NoResolver,
    #[error("the Pod has {0} already, and it is not tombolo's")]
    Taken(String),
    #[error("the Pod is not written as Kubernetes has it: {0}")]
    Shape(&'static str),
}

/// A Pod, or the template of one, with `metadata` and `spec`.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Untouched(Untouched),
    Changed(Value),
}

/// Gives a Pod its sidecar.
pub fn pod(pod: &Value, settings: &Settings, around: Surroundings<'_>) -> Result<Outcome, Refused> {
    if let Some(untouched) = untouched(pod) {
        return Ok(Outcome::Untouched(untouched));
    }
    let capture = capture(pod, settings, around.security)?;
    if runs_as_sidecar(pod) {
        return Err(Refused::SidecarUser);
    }
    let mut changed = pod.clone();
    let strict = capture == Capture::Init && is_strict(pod)?;
    let probes = if strict { probes::rewrite(&mut changed)? } else { Vec::new() };
    let config = config::sidecar(pod, settings, around, capture, probes)?;
    containers::add(&mut changed, settings, around, capture, config)?;
    Ok(Outcome::Changed(changed))
}

fn untouched(pod: &Value) -> Option<Untouched> {
    let said = |part: &str| pod.pointer(&format!("/metadata/{part}"))?.get(INJECT_LABEL)?.as_str();
    let has_sidecar = ["initContainers", "containers"].iter().any(|list| {
        let containers = pod["spec"][*list].as_array().into_iter().flatten();
        containers.filter_map(|container| container["name"].as_str()).any(|name| name == SIDECAR_CONTAINER)
    });
    if has_sidecar {
        Some(Untouched::Already)
    } else if ["labels", "annotations"].into_iter().filter_map(said).any(|said| said == "disabled") {
        Some(Untouched::OptedOut)
    } else if pod["spec"]["hostNetwork"] == true {
        Some(Untouched::HostNetwork)
    } else {
        None
    }
}

fn annotation<'a>(pod: &'a Value, name: &str) -> Option<&'a str> {
    pod.pointer("/metadata/annotations")?.get(name)?.as_str()
}

fn capture(pod: &Value, settings: &Settings, security: PodSecurity) -> Result<Capture, Refused> {
    let may_init = security == PodSecurity::Privileged;
    match annotation(pod, CAPTURE_ANNOTATION) {
        Some("init") if !may_init => Err(Refused::InitForbidden),
        Some("dns") if settings.resolver.servers.is_empty() => Err(Refused::NoResolver),
        Some("init") => Ok(Capture::Init),
        Some("dns") => Ok(Capture::Dns),
        Some("off") => Ok(Capture::Off),
        Some(other) => Err(Refused::Annotation {
            annotation: CAPTURE_ANNOTATION,
            value: other.chars().take(80).collect(),
            allowed: "init, dns, off",
        }),
        None if may_init => Ok(Capture::Init),
        None if settings.resolver.servers.is_empty() => Ok(Capture::Off),
        None => Ok(Capture::Dns),
    }
}

fn is_strict(pod: &Value) -> Result<bool, Refused> {
    match annotation(pod, PLAINTEXT_ANNOTATION) {
        None | Some("permissive") => Ok(false),
        Some("strict") => Ok(true),
        Some(other) => Err(Refused::Annotation {
            annotation: PLAINTEXT_ANNOTATION,
            value: other.chars().take(80).collect(),
            allowed: "permissive, strict",
        }),
    }
}

fn runs_as_sidecar(pod: &Value) -> bool {
    let lists = ["initContainers", "containers"].into_iter().filter_map(|list| pod["spec"][list].as_array());
    let of_containers = lists.flatten().map(|container| &container["securityContext"]["runAsUser"]);
    std::iter::once(&pod["spec"]["securityContext"]["runAsUser"])
        .chain(of_containers)
        .any(|user| user.as_i64() == Some(SIDECAR_UID))
}

/// The object `name` of `parent`, made if it is not there.
fn object<'a>(parent: &'a mut Value, name: &str, what: &'static str) -> Result<&'a mut Map<String, Value>, Refused> {
    let parent = parent.as_object_mut().ok_or(Refused::Shape(what))?;
    let value = parent.entry(name).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().ok_or(Refused::Shape(what))
}

/// The list `name` of `parent`, made if it is not there.
fn list<'a>(parent: &'a mut Value, name: &str, what: &'static str) -> Result<&'a mut Vec<Value>, Refused> {
    let parent = parent.as_object_mut().ok_or(Refused::Shape(what))?;
    let value = parent.entry(name).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().ok_or(Refused::Shape(what))
}
