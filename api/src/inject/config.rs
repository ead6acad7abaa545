//! The configuration of the sidecar of one Pod.

use serde_json::{Value, json};

use super::{CONFIG_ANNOTATION, Capture, Refused, Settings, Surroundings, annotation, is_strict, services};

/// Where the sidecar finds what it is given, and where it keeps what it makes.
pub const GIVEN: &str = "/var/run/tombolo";
pub const KEPT: &str = "/var/lib/tombolo";
pub const CONFIG_FILE: &str = "sidecar.yaml";
pub const TOKEN_FILE: &str = "token";

pub const INBOUND_PORT: u16 = 15008;
pub const ADMIN_PORT: u16 = 15020;
/// Where the sidecar answers the kubelet's probes in the application's place.
pub const PROBE_PORT: u16 = 15022;

/// What the sidecar of `pod` is told, but for its name and address, which its arguments say. What the user wrote wins.
pub fn sidecar(
    pod: &Value,
    settings: &Settings,
    around: Surroundings<'_>,
    capture: Capture,
    probes: Vec<Value>,
) -> Result<Value, Refused> {
    let mut config = json!({
        "federation": { "address": settings.federation, "ca": format!("{GIVEN}/{}", super::CA_KEY) },
        "token": format!("{GIVEN}/{TOKEN_FILE}"),
        "state": format!("{KEPT}/state"),
        "inbound": format!("0.0.0.0:{INBOUND_PORT}"),
        "admin": format!("0.0.0.0:{ADMIN_PORT}"),
    });
    match capture {
        Capture::Init => {
            let plaintext = if is_strict(pod)? { "strict" } else { "permissive" };
            config["capture"] = json!({ "plaintext": plaintext });
            config["dns"] = json!({});
        }
        Capture::Dns => {
            let servers = settings.resolver.servers.iter().map(|server| format!("{server}:53"));
            config["dns"] = json!({
                "listen": ["127.0.0.1:53"],
                "upstreams": servers.collect::<Vec<_>>(),
                "loopback": { "exceptPorts": services::container_ports(pod) },
            });
        }
        Capture::Off => {}
    }
    let served = services::served(pod, around);
    if !served.is_empty() {
        config["services"] = Value::Array(served);
    }
    if !probes.is_empty() {
        config["probes"] = json!({ "listen": format!("0.0.0.0:{PROBE_PORT}"), "targets": probes });
    }
    if let Some(written) = annotation(pod, CONFIG_ANNOTATION) {
        let options = serde_saphyr::options! { with_snippet: false };
        let over: Value = serde_saphyr::from_str_with_options(written, options)
            .map_err(|error| Refused::Config(error.without_snippet().to_string()))?;
        if !over.is_object() {
            return Err(Refused::Config("it is no object".into()));
        }
        merge(&mut config, over);
    }
    Ok(config)
}

/// `over` on `base`, objects field by field; what is null is taken away.
fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                match value {
                    Value::Null => _ = base.remove(&key),
                    value => merge(base.entry(key).or_insert(Value::Null), value),
                }
            }
        }
        (base, over) => *base = over,
    }
}
