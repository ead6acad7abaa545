//! What is added to a Pod: containers, volumes, how it resolves names.

use serde_json::{Value, json};
use tombolo_core::service_account::audience;

use super::config::{ADMIN_PORT, CONFIG_FILE, GIVEN, INBOUND_PORT, KEPT, PROBE_PORT, TOKEN_FILE};
use super::{
    CA_CONFIG_MAP, CA_KEY, CAPTURE_CONTAINER, Capture, INJECTED_ANNOTATION, Refused, SIDECAR_CONTAINER, SIDECAR_UID,
    Settings, Surroundings, annotation, list, object,
};

const GIVEN_VOLUME: &str = "tombolo";
const KEPT_VOLUME: &str = "tombolo-state";
/// How long the kubelet lets a token be valid; it replaces it after four fifths of that.
const TOKEN_LIFE_S: u32 = 3600;
/// What lets a process without privileges be a DNS server; the restricted level allows it.
const PORTS_SYSCTL: &str = "net.ipv4.ip_unprivileged_port_start";
const IS_POD: &str = "metadata and spec are objects";

/// Adds everything to `pod`, whose sidecar's configuration is `config`.
pub fn add(
    pod: &mut Value,
    settings: &Settings,
    around: Surroundings<'_>,
    capture: Capture,
    config: Value,
) -> Result<(), Refused> {
    let has_probes = config.get("probes").is_some();
    let scraped = scraped_port(pod);
    if !pod.is_object() {
        return Err(Refused::Shape(IS_POD));
    }
    let metadata = pod.as_object_mut().expect("it is one").entry("metadata").or_insert_with(|| json!({}));
    object(metadata, "annotations", IS_POD)?.insert(INJECTED_ANNOTATION.into(), json!(config.to_string()));
    let spec = &mut pod["spec"];
    let volumes = list(spec, "volumes", IS_POD)?;
    let ours = [GIVEN_VOLUME, KEPT_VOLUME];
    if let Some(taken) = volumes.iter().filter_map(|volume| volume["name"].as_str()).find(|name| ours.contains(name)) {
        return Err(Refused::Taken(format!("a volume {taken}")));
    }
    volumes.extend([given(settings), json!({ "name": KEPT_VOLUME, "emptyDir": { "medium": "Memory" } })]);
    let mut first = Vec::new();
    if capture == Capture::Init {
        first.push(capture_container(settings, has_probes, scraped));
    }
    first.push(sidecar(settings, has_probes));
    let init = list(spec, "initContainers", IS_POD)?;
    if init.iter().any(|container| container["name"] == CAPTURE_CONTAINER) {
        return Err(Refused::Taken(format!("a container {CAPTURE_CONTAINER}")));
    }
    // Before all others, so that these are served as well.
    init.splice(0..0, first);
    if capture == Capture::Dns {
        resolve_here(spec, settings, around)?;
    }
    Ok(())
}

/// What the kubelet puts into the Pod: the token, the cluster's trust bundle, and the configuration.
fn given(settings: &Settings) -> Value {
    let token = json!({
        "audience": audience(&settings.trust_domain),
        "expirationSeconds": TOKEN_LIFE_S,
        "path": TOKEN_FILE,
    });
    let config = json!({
        "path": CONFIG_FILE,
        "fieldRef": { "fieldPath": format!("metadata.annotations['{INJECTED_ANNOTATION}']") },
    });
    json!({
        "name": GIVEN_VOLUME,
        "projected": {
            "sources": [
                { "serviceAccountToken": token },
                { "configMap": { "name": CA_CONFIG_MAP, "items": [{ "key": CA_KEY, "path": CA_KEY }] } },
                { "downwardAPI": { "items": [config] } },
            ],
        },
    })
}

/// A native sidecar: an init container that starts before all others and stays (Kubernetes 1.29 and later).
fn sidecar(settings: &Settings, has_probes: bool) -> Value {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let ready = json!({ "path": "/readyz", "port": ADMIN_PORT });
    let mut ports = vec![
        json!({ "name": "tombolo-mtls", "containerPort": INBOUND_PORT }),
        json!({ "name": "tombolo-admin", "containerPort": ADMIN_PORT }),
    ];
    if has_probes {
        ports.push(json!({ "name": "tombolo-probes", "containerPort": PROBE_PORT }));
    }
    json!({
        "name": SIDECAR_CONTAINER,
        "image": settings.image,
        "restartPolicy": "Always",
        "args": [
            "sidecar",
            "--config", format!("{GIVEN}/{CONFIG_FILE}"),
            "--set", "instance=\"$(POD_NAME)\"",
            "--set", format!("advertise=\"$(POD_IP):{INBOUND_PORT}\""),
        ],
        "env": [field("POD_NAME", "metadata.name"), field("POD_IP", "status.podIP")],
        "ports": ports,
        "startupProbe": { "httpGet": ready, "periodSeconds": 1, "failureThreshold": 300 },
        "readinessProbe": { "httpGet": ready, "periodSeconds": 5 },
        "resources": {
            "requests": { "cpu": "10m", "memory": "32Mi" },
            "limits": { "memory": "256Mi" },
        },
        "securityContext": unprivileged(),
        "volumeMounts": [
            { "name": GIVEN_VOLUME, "mountPath": GIVEN, "readOnly": true },
            { "name": KEPT_VOLUME, "mountPath": KEPT },
        ],
    })
}

fn unprivileged() -> Value {
    json!({
        "runAsUser": SIDECAR_UID,
        "runAsGroup": SIDECAR_UID,
        "runAsNonRoot": true,
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// Writes the packet filter's rules, once.
fn capture_container(settings: &Settings, has_probes: bool, scraped: Option<u16>) -> Value {
    let mut args =
        vec!["sidecar".to_owned(), "capture".into(), "--dns".into(), "--exclude-uid".into(), SIDECAR_UID.to_string()];
    if has_probes {
        args.extend(["--sidecar-port".into(), format!("{INBOUND_PORT},{ADMIN_PORT},{PROBE_PORT}")]);
    }
    // A scraper without a sidecar reads metrics in plaintext, strict or not.
    if let Some(port) = scraped {
        args.extend(["--exclude-inbound-port".into(), port.to_string()]);
    }
    json!({
        "name": CAPTURE_CONTAINER,
        "image": settings.capture_image,
        "args": args,
        "resources": {
            "requests": { "cpu": "10m", "memory": "16Mi" },
            "limits": { "memory": "64Mi" },
        },
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
    })
}

/// The port of `prometheus.io/port`, where `prometheus.io/scrape` says that the Pod is scraped.
fn scraped_port(pod: &Value) -> Option<u16> {
    (annotation(pod, "prometheus.io/scrape") == Some("true"))
        .then(|| annotation(pod, "prometheus.io/port")?.parse().ok())
        .flatten()
}

/// Makes the sidecar the Pod's only DNS server. What the kubelet would have written is written here.
fn resolve_here(spec: &mut Value, settings: &Settings, around: Surroundings<'_>) -> Result<(), Refused> {
    let domain = &settings.resolver.domain;
    let own = [format!("{}.svc.{domain}", around.namespace), format!("svc.{domain}"), domain.clone()];
    let written = spec["dnsConfig"].clone();
    let of_user = |field: &str| written[field].as_array().cloned().unwrap_or_default();
    let mut searches: Vec<Value> = match spec["dnsPolicy"].as_str() {
        None | Some("ClusterFirst") => own.iter().map(|search| json!(search)).collect(),
        // The user has said all of it, or wants the node's, which are not known.
        Some(_) => Vec::new(),
    };
    searches.extend(of_user("searches"));
    let mut options = of_user("options");
    if !options.iter().any(|option| option["name"] == "ndots") {
        options.push(json!({ "name": "ndots", "value": "5" }));
    }
    spec["dnsPolicy"] = json!("None");
    spec["dnsConfig"] = json!({ "nameservers": ["127.0.0.1"], "searches": searches, "options": options });
    let security = object(spec, "securityContext", IS_POD)?;
    let mut security_value = Value::Object(std::mem::take(security));
    let sysctls = list(&mut security_value, "sysctls", IS_POD)?;
    if !sysctls.iter().any(|sysctl| sysctl["name"] == PORTS_SYSCTL) {
        sysctls.push(json!({ "name": PORTS_SYSCTL, "value": "0" }));
    }
    spec["securityContext"] = security_value;
    Ok(())
}
