//! Which Services a Pod stands behind, and with which of its ports.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};
use tombolo_core::model::AppProtocol;

use super::Surroundings;

/// `services` of the sidecar's configuration: of every Service whose selector is for this Pod, every TCP port that leads to a
/// port of it.
pub fn served(pod: &Value, around: Surroundings<'_>) -> Vec<Value> {
    let mut served = Vec::new();
    for service in around.services {
        let Some(name) = &service.metadata.name else { continue };
        if !selects(service, pod) {
            continue;
        }
        for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
            if port.protocol.as_deref().is_some_and(|protocol| protocol != "TCP") {
                continue;
            }
            let Some(target) = target(port, pod) else { continue };
            let mut entry = json!({
                "service": format!("{}/{name}", around.namespace),
                "port": port.port,
                "app": format!("127.0.0.1:{target}"),
            });
            match AppProtocol::detect(port.app_protocol.as_deref(), port.name.as_deref()) {
                AppProtocol::Detect => {}
                known => entry["protocol"] = serde_json::to_value(known).expect("a unit variant becomes text"),
            }
            served.push(entry);
        }
    }
    served
}

/// A Service without a selector stands for what somebody else lists.
fn selects(service: &Service, pod: &Value) -> bool {
    let Some(spec) = &service.spec else { return false };
    let selector = spec.selector.iter().flatten();
    let external = spec.type_.as_deref() == Some("ExternalName");
    let mut selector = selector.peekable();
    let labels = &pod["metadata"]["labels"];
    !external && selector.peek().is_some() && selector.all(|(key, value)| labels[key.as_str()] == value.as_str())
}

fn target(port: &ServicePort, pod: &Value) -> Option<u16> {
    match &port.target_port {
        None => u16::try_from(port.port).ok(),
        Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
        Some(IntOrString::String(name)) => ports(pod).find(|(written, _)| *written == Some(name)).map(|(_, port)| port),
    }
}

/// The TCP ports that a Pod's containers declare.
pub fn container_ports(pod: &Value) -> BTreeSet<u16> {
    ports(pod).map(|(_, port)| port).collect()
}

fn ports(pod: &Value) -> impl Iterator<Item = (Option<&str>, u16)> {
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
    let ports = containers.flat_map(|container| container["ports"].as_array().into_iter().flatten());
    ports.filter_map(|port| {
        let tcp = port["protocol"].as_str().is_none_or(|protocol| protocol == "TCP");
        let number = port["containerPort"].as_u64().and_then(|number| u16::try_from(number).ok())?;
        tcp.then(|| (port["name"].as_str(), number))
    })
}
