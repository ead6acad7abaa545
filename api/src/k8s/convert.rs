//! Kubernetes' shapes to core's declared objects; what core can't hold is refused with the field's name.

use k8s_openapi::api::core::v1::{Namespace, Service, ServicePort as KubernetesPort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tombolo_core::id::{ClusterId, InstanceName, InvalidName, ServiceName};
use tombolo_core::invitation::is_address;
use tombolo_core::model::{AppProtocol, Authority, ServicePort, SessionAffinity, Transport};
use tombolo_core::policy::access::DefaultAccess;
use tombolo_core::source::declared::{
    DeclaredBundle, DeclaredEndpoint, DeclaredExport, DeclaredNamespace, DeclaredPeer, DeclaredService, DeclaredSlice,
    Object, ServiceType,
};

use super::{
    ClusterPeer, DEFAULT_NAMESPACE, Resource, SERVICE_ACCOUNTS_ANNOTATION, SERVICE_NAME_LABEL, ServiceExport,
    UNMESHED_ANNOTATION, WEIGHT_ANNOTATION, route,
};

/// Largest weight of an endpoint.
const WEIGHT_MAX: u32 = 1_000;
/// Ports read from one Service (Kubernetes' own limit for a slice).
const PORTS_MAX: usize = 100;

/// What a resource of the cluster `own` declares, or the reason why it can't, in words for its author. `None` for
/// one that is nobody's affair here, such as a route of a gateway.
pub fn declared(resource: Resource, own: &ClusterId) -> Result<Option<Object>, String> {
    let object = match resource {
        Resource::HttpRoute(written) => return Ok(route::route(*written, own)?.map(Object::Policy)),
        Resource::GrpcRoute(written) => return Ok(route::route(*written, own)?.map(Object::Policy)),
        Resource::Namespace(namespace) => return Ok(namespace_of(&namespace)?.map(Object::Namespace)),
        Resource::Service(service) => service_of(*service).map(Object::Service),
        Resource::EndpointSlice(slice) => slice_of(*slice).map(Object::Slice),
        Resource::ServiceExport(export) => export_of(&export).map(Object::Export),
        Resource::ClusterPeer(peer) => peer_of(*peer).map(Object::Peer),
        Resource::Policy(policy) => Ok(Object::Policy(*policy)),
    };
    object.map(Some)
}

fn service_of(service: Service) -> Result<DeclaredService, String> {
    let name = name_of("Service", &service.metadata, None)?;
    let spec = service.spec.ok_or_else(|| format!("Service {name} has no spec"))?;
    let service_type = match (spec.type_.as_deref(), spec.cluster_ip.as_deref()) {
        (Some("ExternalName"), _) => ServiceType::ExternalName,
        (None | Some("ClusterIP"), Some("None")) => ServiceType::Headless,
        (None | Some("ClusterIP" | "NodePort" | "LoadBalancer"), _) => ServiceType::ClusterIp,
        (Some(other), _) => return Err(format!("Service {name}: spec.type {other:?} is not a type of Service")),
    };
    let session_affinity = match spec.session_affinity.as_deref() {
        None | Some("None") => SessionAffinity::None,
        Some("ClientIP") => SessionAffinity::ClientIp,
        Some(other) => return Err(format!("Service {name}: spec.sessionAffinity {other:?} is not None or ClientIP")),
    };
    let ports = spec.ports.unwrap_or_default();
    if ports.len() > PORTS_MAX {
        return Err(format!("Service {name} has more than {PORTS_MAX} ports"));
    }
    let ports = ports.iter().map(|port| port_of(&name, port)).collect::<Result<_, _>>()?;
    let accounts = service.metadata.annotations.unwrap_or_default().remove(SERVICE_ACCOUNTS_ANNOTATION);
    let accounts = accounts.unwrap_or_default();
    let service_accounts = accounts.split(',').map(str::trim).filter(|one| !one.is_empty()).map(Into::into).collect();
    Ok(DeclaredService { service: name, service_type, session_affinity, ports, service_accounts })
}

fn port_of(service: &ServiceName, port: &KubernetesPort) -> Result<ServicePort, String> {
    let number = u16::try_from(port.port).ok().filter(|number| *number != 0);
    let number = number.ok_or_else(|| format!("Service {service}: port {} is not from 1 to 65535", port.port))?;
    let transport = match port.protocol.as_deref() {
        None | Some("TCP") => Transport::Tcp,
        Some("UDP") => Transport::Udp,
        Some("SCTP") => Transport::Sctp,
        Some(other) => return Err(format!("Service {service}: protocol {other:?} is not TCP, UDP or SCTP")),
    };
    let name = port.name.clone().unwrap_or_default();
    if !name.is_empty() && !is_label(&name) {
        return Err(format!("Service {service}: {name:?} is not a port's name (a DNS label)"));
    }
    let app = AppProtocol::detect(port.app_protocol.as_deref(), port.name.as_deref());
    Ok(ServicePort { name, port: number, transport, app })
}

/// RFC 1123 label, by way of a type that is one.
fn is_label(text: &str) -> bool {
    text.parse::<InstanceName>().is_ok()
}

fn slice_of(slice: EndpointSlice) -> Result<DeclaredSlice, String> {
    let name = slice.metadata.name.clone().unwrap_or_default();
    let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
    let label = label.ok_or_else(|| {
        format!("EndpointSlice {name:?} needs the label {SERVICE_NAME_LABEL}, which names its Service")
    })?;
    let service = name_of("EndpointSlice", &slice.metadata, Some(label))?;
    let weight = slice.metadata.annotations.as_ref().and_then(|annotations| annotations.get(WEIGHT_ANNOTATION));
    let weight = match weight {
        None => 1,
        Some(text) => text.parse().ok().filter(|weight| (1..=WEIGHT_MAX).contains(weight)).ok_or_else(|| {
            format!("EndpointSlice {name}: {WEIGHT_ANNOTATION} {text:?} is not a number from 1 to {WEIGHT_MAX}")
        })?,
    };
    let endpoints = slice.endpoints.into_iter();
    let endpoints = endpoints.map(|endpoint| endpoint_of(&name, endpoint, weight)).collect::<Result<_, _>>()?;
    Ok(DeclaredSlice { name, service, endpoints })
}

fn endpoint_of(slice: &str, endpoint: Endpoint, weight: u32) -> Result<DeclaredEndpoint, String> {
    let instance = endpoint.target_ref.and_then(|target| target.name);
    let instance = instance.map(|name| name.parse()).transpose();
    let instance = instance.map_err(|error: InvalidName| format!("EndpointSlice {slice}: targetRef.name: {error}"))?;
    let key = endpoint.hostname.clone().or_else(|| endpoint.addresses.first().cloned());
    if instance.is_none() && key.is_none() {
        return Err(format!("EndpointSlice {slice}: an endpoint has no targetRef.name, which names its sidecar"));
    }
    Ok(DeclaredEndpoint {
        instance,
        key: key.unwrap_or_default(),
        hostname: endpoint.hostname,
        zone: endpoint.zone,
        weight,
        // "A nil value should be interpreted as true" (discovery.k8s.io/v1).
        ready: endpoint.conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
    })
}

fn export_of(export: &ServiceExport) -> Result<DeclaredExport, String> {
    let service = name_of("ServiceExport", &export.metadata, None)?;
    let unmeshed = unmeshed(&export.metadata).map_err(|reason| format!("ServiceExport {service}: {reason}"))?;
    Ok(DeclaredExport { service, unmeshed })
}

fn namespace_of(namespace: &Namespace) -> Result<Option<DeclaredNamespace>, String> {
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    let wrong = |reason: String| format!("Namespace {name:?}: {reason}");
    if !unmeshed(&namespace.metadata).map_err(wrong)? {
        return Ok(None);
    }
    let name = name.parse().map_err(|error: InvalidName| wrong(error.to_string()))?;
    Ok(Some(DeclaredNamespace { name }))
}

fn unmeshed(metadata: &ObjectMeta) -> Result<bool, String> {
    match metadata.annotations.as_ref().and_then(|annotations| annotations.get(UNMESHED_ANNOTATION)).map(String::as_str)
    {
        Some("allow") => Ok(true),
        None | Some("deny") => Ok(false),
        Some(other) => Err(format!("{UNMESHED_ANNOTATION} {other:?} is not allow or deny")),
    }
}

fn peer_of(peer: ClusterPeer) -> Result<DeclaredPeer, String> {
    let spec = peer.spec;
    let cluster = &spec.cluster;
    if let Some(address) = spec.gateways.iter().find(|address| !is_address(address)) {
        return Err(format!("ClusterPeer {cluster}: spec.gateways: {address:?} is not host:port"));
    }
    if spec.bundle.is_some() && spec.trust_domain.is_none() {
        return Err(format!("ClusterPeer {cluster}: spec.bundle needs spec.trustDomain beside it"));
    }
    if spec.bundle.is_none() && !spec.gateways.is_empty() {
        return Err(format!("ClusterPeer {cluster}: spec.gateways needs spec.bundle beside it, to tell them by"));
    }
    let bundle = spec.bundle.map(|bundle| DeclaredBundle { sequence: bundle.sequence, roots_pem: bundle.roots });
    Ok(DeclaredPeer {
        cluster: spec.cluster,
        trust_domain: spec.trust_domain,
        authority: Authority {
            exports: spec.exports,
            imports: spec.imports,
            unmeshed: spec.unmeshed == Some(DefaultAccess::Allow),
        },
        default_access: spec.default_access,
        bundle,
        gateways: spec.gateways,
    })
}

/// `metadata.namespace` and `metadata.name`, or `name` in its place.
fn name_of(kind: &str, metadata: &ObjectMeta, name: Option<&String>) -> Result<ServiceName, String> {
    let own = metadata.name.as_ref().ok_or_else(|| format!("{kind}: metadata.name is missing"))?;
    let namespace = metadata.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    let namespace = namespace.parse().map_err(|error| format!("{kind} {own:?}: {error}"))?;
    ServiceName::new(namespace, name.unwrap_or(own)).map_err(|error| format!("{kind} {own:?}: {error}"))
}
