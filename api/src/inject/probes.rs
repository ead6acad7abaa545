//! The kubelet's probes, where plaintext may not come in: the sidecar is asked in the application's place, and asks it.

use serde_json::{Value, json};

use super::config::PROBE_PORT;
use super::{Refused, list};

/// Turns the probes of every container to the sidecar, and yields what it has to know of them. Those that run a command
/// come by no network.
pub fn rewrite(pod: &mut Value) -> Result<Vec<Value>, Refused> {
    let mut targets = Vec::new();
    for container in list(&mut pod["spec"], "containers", "spec is an object with a list of containers")? {
        let name = container["name"].as_str().unwrap_or_default().to_owned();
        let ports = container["ports"].clone();
        for kind in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let Some(probe) = container.get_mut(kind).filter(|probe| probe.is_object()) else { continue };
            let path = format!("/{name}/{kind}");
            let Some(mut target) = target(probe, &ports) else { continue };
            target["path"] = json!(path);
            target["timeout"] = json!(format!("{}s", probe["timeoutSeconds"].as_u64().unwrap_or(1).max(1)));
            targets.push(target);
            let probe = probe.as_object_mut().expect("it is one");
            for way in ["httpGet", "tcpSocket", "grpc"] {
                probe.remove(way);
            }
            probe.insert("httpGet".into(), json!({ "path": path, "port": PROBE_PORT }));
        }
    }
    Ok(targets)
}

/// What the sidecar asks; `None` where it can't ask for the kubelet: TLS, another host, a port that nobody declares.
fn target(probe: &Value, ports: &Value) -> Option<Value> {
    let port = |way: &Value| match &way["port"] {
        Value::Number(number) => number.as_u64().and_then(|number| u16::try_from(number).ok()),
        Value::String(name) => {
            let named = ports.as_array()?.iter().find(|port| port["name"] == name.as_str())?;
            named["containerPort"].as_u64().and_then(|number| u16::try_from(number).ok())
        }
        _ => None,
    };
    let here = |way: &Value| way["host"].is_null();
    if let Some(http) = probe.get("httpGet").filter(|http| here(http) && http["scheme"] != "HTTPS") {
        let path = http["path"].as_str().filter(|path| path.starts_with('/')).unwrap_or("/");
        let mut check = json!({ "path": path });
        let headers = http["httpHeaders"].as_array().into_iter().flatten();
        for header in headers {
            if let (Some(name), Some(value)) = (header["name"].as_str(), header["value"].as_str()) {
                check["headers"][name] = json!(value);
            }
        }
        return Some(json!({ "app": format!("127.0.0.1:{}", port(http)?), "http": check }));
    }
    if let Some(tcp) = probe.get("tcpSocket").filter(|tcp| here(tcp)) {
        return Some(json!({ "app": format!("127.0.0.1:{}", port(tcp)?), "tcp": {} }));
    }
    let grpc = probe.get("grpc")?;
    let service = grpc["service"].as_str().unwrap_or_default();
    Some(json!({ "app": format!("127.0.0.1:{}", port(grpc)?), "grpc": { "service": service } }))
}
