//! The objects that stand for an import, as they are applied.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use data_encoding::HEXLOWER;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::{Value, json};
use tombolo_api::k8s::mcs::{ExportingCluster, ImportPort, ServiceImportSpec, ServiceImportStatus};
use tombolo_api::k8s::{SERVICE_NAME_LABEL, mcs};
use tombolo_core::addresses::allocation::Owner;
use tombolo_core::addresses::ports::PortOwner;
use tombolo_core::id::{ClusterId, InstanceName, ServiceName};
use tombolo_core::mcs::{Import, Part};
use tombolo_core::model::{AppProtocol, Endpoint, ServiceKind, ServicePort, SessionAffinity, Transport};
use tombolo_trust::peering::sha256;

use crate::addresses::Addresses;

/// Who wrote an object (Kubernetes' recommended labels).
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "tombolo");
const IMPORT_LABEL: &str = "multicluster.kubernetes.io/service-name";
const CLUSTER_LABEL: &str = "multicluster.kubernetes.io/source-cluster";
const SLICE_MANAGED_BY: (&str, &str) = ("endpointslice.kubernetes.io/managed-by", "tombolo.dev");
/// Endpoints in one slice, as many as Kubernetes' own controller puts there.
const SLICE_LEN: usize = 100;

/// The name of the Service and the slices that are derived from an import. It fits whatever the service is called.
pub fn derived_name(service: &ServiceName) -> String {
    format!("tombolo-{}", &HEXLOWER.encode(&sha256(service.to_string().as_bytes()))[..12])
}

/// The `ServiceImport` itself, without its status. `ips` are those of the derived Service, once it has any.
pub fn import(api_version: &str, service: &ServiceName, import: &Import, ips: &[IpAddr]) -> Value {
    let families = |kind| match kind {
        // Endpoints of headless services have virtual addresses of both families; slices have one.
        ServiceKind::Headless => vec!["IPv4".to_owned()],
        ServiceKind::ClusterSetIp => {
            ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned()).collect()
        }
    };
    let spec = ServiceImportSpec {
        ports: import.ports.iter().map(import_port).collect(),
        ips: ips.iter().map(IpAddr::to_string).collect(),
        kind: match import.kind {
            ServiceKind::ClusterSetIp => "ClusterSetIP".into(),
            ServiceKind::Headless => "Headless".into(),
        },
        session_affinity: Some(affinity(import.session_affinity).into()),
        ip_families: families(import.kind),
        ..ServiceImportSpec::default()
    };
    json!({
        "apiVersion": api_version,
        "kind": "ServiceImport",
        "metadata": {
            "name": service.name(),
            "namespace": service.namespace(),
            "labels": labels([MANAGED_BY]),
        },
        "spec": spec,
    })
}

/// The status of a `ServiceImport`; `ready` comes from [`readiness`], with the time of its last transition.
pub fn import_status(import: &Import, ready: mcs::Condition) -> Value {
    let clusters = import.clusters.keys().map(|cluster| ExportingCluster { cluster: cluster.to_string() }).collect();
    json!(ServiceImportStatus { clusters, conditions: vec![ready] })
}

/// Whether an import can be used: status, reason, message.
pub fn readiness(import: &Import, ips: &[IpAddr]) -> (bool, &'static str, &'static str) {
    match import.kind {
        ServiceKind::ClusterSetIp if ips.is_empty() => {
            (false, "Pending", "the address in the clusterset is on its way")
        }
        ServiceKind::ClusterSetIp | ServiceKind::Headless => (true, "Ready", "the import can be used"),
    }
}

/// The Service whose ClusterIP is the import's address.
pub fn service(service: &ServiceName, import: &Import, owner: &OwnerReference) -> Value {
    let port = |port: &ServicePort| {
        let ImportPort { protocol, app_protocol, .. } = import_port(port);
        json!({ "name": port_name(port), "protocol": protocol, "appProtocol": app_protocol, "port": port.port })
    };
    without_nulls(json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": derived_name(service),
            "namespace": service.namespace(),
            "labels": labels([MANAGED_BY, (IMPORT_LABEL, service.name())]),
            "ownerReferences": [owner],
        },
        "spec": {
            "type": "ClusterIP",
            "sessionAffinity": affinity(import.session_affinity),
            "ports": import.ports.iter().map(port).collect::<Vec<_>>(),
        },
    }))
}

/// What endpoints in slices are made of.
#[derive(Clone, Copy)]
pub struct Reachable<'a> {
    pub addresses: Option<&'a Addresses>,
    /// Where gateways of this cluster listen for workloads without a sidecar.
    pub gateways: &'a BTreeSet<IpAddr>,
    pub is_ipv4: bool,
}

/// The slices of one cluster's part. They never hold an address of another cluster's network: those of a service with
/// an address in the clusterset hold the gateways of this one, where the export lets workloads without a sidecar call,
/// and are empty elsewhere; those of a headless one hold the virtual addresses that its endpoints have here.
pub fn slices(
    service: &ServiceName,
    import: &Import,
    (cluster, part): (&ClusterId, &Part),
    reachable: Reachable<'_>,
    owner: &OwnerReference,
) -> Vec<Value> {
    let headless = import.kind == ServiceKind::Headless;
    let Reachable { addresses, is_ipv4, .. } = reachable;
    let listeners = if part.unmeshed && !headless { listeners(service, part, reachable) } else { BTreeMap::new() };
    let endpoints: Vec<Value> = match addresses {
        Some(addresses) if headless => {
            part.endpoints.iter().filter_map(|one| endpoint(service, cluster, one, addresses)).collect()
        }
        _ if listeners.is_empty() => Vec::new(),
        _ => reachable.of_family().map(gateway).collect(),
    };
    let (family, family_name) = if headless || is_ipv4 { ("IPv4", "ipv4") } else { ("IPv6", "ipv6") };
    let derived = derived_name(service);
    let mut all: BTreeSet<(&str, &str)> = [MANAGED_BY, SLICE_MANAGED_BY].into();
    all.extend([(IMPORT_LABEL, service.name()), (CLUSTER_LABEL, cluster.as_str())]);
    if !headless {
        all.insert((SERVICE_NAME_LABEL, &derived));
    }
    let port = |port: &ServicePort| {
        let ImportPort { protocol, app_protocol, .. } = import_port(port);
        let name = if headless { port.name.clone() } else { port_name(port) };
        let number = listeners.get(port).copied().unwrap_or(port.port);
        json!({ "name": name, "protocol": protocol, "appProtocol": app_protocol, "port": number })
    };
    // Every port of a slice is one of every endpoint in it.
    let listed = part.ports.iter().filter(|port| listeners.is_empty() || listeners.contains_key(port));
    let ports: Vec<Value> = listed.map(port).collect();
    let slice = |(n, endpoints): (usize, &[Value])| {
        without_nulls(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{derived}-{cluster}-{family_name}-{n}"),
                "namespace": service.namespace(),
                "labels": labels(all.iter().copied()),
                "ownerReferences": [owner],
            },
            "addressType": family,
            "endpoints": endpoints,
            "ports": ports,
        }))
    };
    let chunks: Vec<&[Value]> = if endpoints.is_empty() { vec![&[]] } else { endpoints.chunks(SLICE_LEN).collect() };
    chunks.into_iter().enumerate().map(slice).collect()
}

/// The ports at which gateways listen for ports of this part; none where no gateway does.
fn listeners<'a>(service: &ServiceName, part: &'a Part, reachable: Reachable<'_>) -> BTreeMap<&'a ServicePort, u16> {
    let Some(addresses) = reachable.addresses.filter(|_| reachable.of_family().next().is_some()) else {
        return BTreeMap::new();
    };
    let tcp = part.ports.iter().filter(|port| port.transport == Transport::Tcp);
    let listener = |port: &'a ServicePort| {
        let owner = PortOwner { service: service.clone(), port: port.port };
        Some((port, *addresses.listeners.get(&owner)?))
    };
    tcp.filter_map(listener).collect()
}

impl<'a> Reachable<'a> {
    fn of_family(self) -> impl Iterator<Item = &'a IpAddr> {
        self.gateways.iter().filter(move |address| address.is_ipv4() == self.is_ipv4)
    }
}

fn gateway(address: &IpAddr) -> Value {
    json!({ "addresses": [address], "conditions": { "ready": true, "serving": true, "terminating": false } })
}

fn endpoint(service: &ServiceName, cluster: &ClusterId, one: &Endpoint, addresses: &Addresses) -> Option<Value> {
    let owner = Owner { service: service.clone(), endpoint: Some((cluster.clone(), one.id.clone())) };
    let address = addresses.ranges.address(addresses.number(&owner)?)?;
    // A name that is none would have the whole slice refused.
    let hostname = one.hostname.as_deref().filter(|name| name.parse::<InstanceName>().is_ok());
    Some(json!({
        "addresses": [address.ipv4],
        "conditions": { "ready": one.ready, "serving": one.ready, "terminating": false },
        "hostname": hostname,
    }))
}

/// Ports of a Service with several of them need names.
fn port_name(port: &ServicePort) -> String {
    if port.name.is_empty() {
        return format!("{}-{}", protocol(port.transport).to_lowercase(), port.port);
    }
    port.name.clone()
}

fn import_port(port: &ServicePort) -> ImportPort {
    let app_protocol = match port.app {
        AppProtocol::Http => Some("http"),
        AppProtocol::Http2 => Some("kubernetes.io/h2c"),
        AppProtocol::Grpc => Some("grpc"),
        AppProtocol::Tls => Some("tls"),
        AppProtocol::Opaque | AppProtocol::Detect => None,
    };
    ImportPort {
        name: port.name.clone(),
        protocol: Some(protocol(port.transport).into()),
        app_protocol: app_protocol.map(Into::into),
        port: port.port.into(),
    }
}

fn protocol(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
        Transport::Sctp => "SCTP",
    }
}

fn affinity(affinity: SessionAffinity) -> &'static str {
    match affinity {
        SessionAffinity::None => "None",
        SessionAffinity::ClientIp => "ClientIP",
    }
}

fn labels<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> BTreeMap<&'a str, &'a str> {
    labels.into_iter().collect()
}

/// A field that is null would be claimed by whoever applies it.
fn without_nulls(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(|field| *field = without_nulls(field.take()));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = without_nulls(item.take())),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    value
}
