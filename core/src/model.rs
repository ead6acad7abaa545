//! What clusters tell each other about: services, ports, endpoints and the authority to name them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{ClusterId, EndpointId, GatewayId, InvalidName, ServiceName, SpiffeId};
use crate::policy::route::Route;

/// Transport protocol of a service port (`Service.spec.ports[].protocol`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Transport {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

/// How a sidecar treats the bytes of a port (`appProtocol`, KEP-1422, else the prefix of the port's name).
/// One that neither says anything about is told from the first bytes of each connection, see [`crate::detect`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AppProtocol {
    /// HTTP/1.1 at the app; requests are multiplexed between sidecars and restored at the far side.
    Http,
    /// HTTP/2 with prior knowledge at the app (`kubernetes.io/h2c`).
    Http2,
    /// gRPC: HTTP/2 with prior knowledge whose status is in the trailers.
    Grpc,
    /// The application's own TLS: bytes, but the name in the ClientHello says to which service they go.
    Tls,
    /// Bytes that nobody looks into.
    #[default]
    Opaque,
    /// Nobody has said: each connection's first bytes do.
    Detect,
}

/// Names of ports, before the first `-`, that say of what runs there that it is no HTTP. In most of these protocols the
/// server speaks first.
const OPAQUE_NAMES: [&str; 14] = [
    "tcp",
    "amqp",
    "ftp",
    "imap",
    "ldap",
    "mongo",
    "mongodb",
    "mysql",
    "pop3",
    "postgres",
    "postgresql",
    "redis",
    "smtp",
    "ssh",
];

impl AppProtocol {
    /// From a port's `appProtocol`, else from its name's prefix, else to be detected. A protocol that has a name
    /// here or there, but is none of HTTP, is opaque.
    pub fn detect(app_protocol: Option<&str>, port_name: Option<&str>) -> Self {
        let declared = app_protocol.map(str::to_ascii_lowercase);
        if let Some(declared) = declared {
            return match declared.as_str() {
                "http" | "kubernetes.io/ws" => AppProtocol::Http,
                "http2" | "h2c" | "kubernetes.io/h2c" => AppProtocol::Http2,
                "grpc" | "kubernetes.io/grpc" => AppProtocol::Grpc,
                "https" | "tls" | "kubernetes.io/wss" => AppProtocol::Tls,
                _ => AppProtocol::Opaque,
            };
        }
        match port_name.map(|name| name.split('-').next().unwrap_or(name)) {
            Some("http") => AppProtocol::Http,
            Some("http2" | "h2c") => AppProtocol::Http2,
            Some("grpc") => AppProtocol::Grpc,
            Some("https" | "tls") => AppProtocol::Tls,
            Some(name) if OPAQUE_NAMES.contains(&name) => AppProtocol::Opaque,
            _ => AppProtocol::Detect,
        }
    }
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServicePort {
    /// Empty only where the service has a single, unnamed port.
    pub name: String,
    pub port: u16,
    pub transport: Transport,
    pub app: AppProtocol,
}

/// One endpoint as peers see it: no address, so that a network never leaks into another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub id: EndpointId,
    pub hostname: Option<String>,
    pub zone: Option<String>,
    /// Relative share of the requests; 1 unless said otherwise.
    pub weight: u32,
    pub ready: bool,
}

/// `ServiceImport.spec.type` (KEP-1645).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub enum ServiceKind {
    #[default]
    #[serde(rename = "ClusterSetIP")]
    ClusterSetIp,
    Headless,
}

/// `Service.spec.sessionAffinity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub enum SessionAffinity {
    #[default]
    None,
    #[serde(rename = "ClientIP")]
    ClientIp,
}

/// What one cluster exports under one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    pub service: ServiceName,
    /// When the export was first seen in its cluster; the oldest wins a conflict (KEP-1645).
    pub created: Timestamp,
    pub kind: ServiceKind,
    pub session_affinity: SessionAffinity,
    pub ports: BTreeSet<ServicePort>,
    /// The identities that servers of this service may have; all in the exporter's own trust domain.
    pub server_ids: BTreeSet<SpiffeId>,
    pub endpoints: BTreeMap<EndpointId, Endpoint>,
    /// Gateways may call it for workloads that have no sidecar.
    #[serde(default)]
    pub unmeshed: bool,
    /// The exporter's own routes for it (GAMMA's producer routes). In views of another cluster's share they mean that
    /// cluster's endpoints alone; the own share has none there, since the own cluster's routes are told beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Arc<Route>>,
}

impl Export {
    pub fn ready_endpoints(&self) -> usize {
        self.endpoints.values().filter(|endpoint| endpoint.ready).count()
    }

    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.port == number && port.transport == Transport::Tcp)
    }
}

/// Which services a grant names: everything, a namespace, or one service.
/// Written `*`, `namespace/*` and `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceSelector {
    All,
    Namespace(crate::id::Namespace),
    Service(ServiceName),
}

impl ServiceSelector {
    pub fn matches(&self, service: &ServiceName) -> bool {
        match self {
            ServiceSelector::All => true,
            ServiceSelector::Namespace(namespace) => namespace == service.namespace(),
            ServiceSelector::Service(name) => name == service,
        }
    }
}

impl fmt::Display for ServiceSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServiceSelector::All => f.write_str("*"),
            ServiceSelector::Namespace(namespace) => write!(f, "{namespace}/*"),
            ServiceSelector::Service(service) => write!(f, "{service}"),
        }
    }
}

impl FromStr for ServiceSelector {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if text == "*" {
            return Ok(ServiceSelector::All);
        }
        // A bare namespace is how an operator says "all of shop".
        let namespace = text.strip_suffix("/*").or((!text.contains(['/', '.'])).then_some(text));
        match namespace {
            Some(namespace) => Ok(ServiceSelector::Namespace(namespace.parse()?)),
            None => Ok(ServiceSelector::Service(text.parse()?)),
        }
    }
}

impl Serialize for ServiceSelector {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ServiceSelector {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What this cluster and one peer grant each other. Both lists are this cluster's own decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// What is offered to the peer, among what is exported at all.
    pub exports: Vec<ServiceSelector>,
    /// What the peer may bring in; empty means nothing.
    pub imports: Vec<ServiceSelector>,
    /// The peer's workloads without a sidecar may call what it is offered, through its gateways.
    #[serde(default)]
    pub unmeshed: bool,
}

impl Authority {
    pub fn offers(&self, service: &ServiceName) -> bool {
        self.exports.iter().any(|selector| selector.matches(service))
    }

    pub fn accepts(&self, service: &ServiceName) -> bool {
        self.imports.iter().any(|selector| selector.matches(service))
    }
}

/// Where a gateway's tunnel port is reached from other clusters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GatewayAddress {
    pub gateway: GatewayId,
    /// `host:port`; the host may be a name, which is resolved at each dial.
    pub address: String,
}

/// How current what is known of a cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Freshness {
    /// Peer sync is connected, or was within the last 15 seconds.
    Fresh,
    /// Peer sync is silent, but a tunnel to the cluster answers: still used.
    Stale,
    /// Peer sync is silent and no tunnel answers: no new picks.
    Draining,
}

/// Where something known of a service comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    Local,
    Remote,
}

/// One cluster's part of an imported service, with how current it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterShare {
    pub cluster: ClusterId,
    pub origin: Origin,
    pub freshness: Freshness,
    pub export: Export,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_match_what_they_name() {
        let web: ServiceName = "shop/web".parse().unwrap();
        for (text, matches) in [
            ("*", true),
            ("shop/*", true),
            ("shop", true),
            ("shop/web", true),
            ("web.shop", true),
            ("shop/db", false),
            ("data/*", false),
        ] {
            assert_eq!(text.parse::<ServiceSelector>().unwrap().matches(&web), matches, "{text}");
        }
        assert!("".parse::<ServiceSelector>().is_err());
    }

    #[test]
    fn nothing_may_be_imported_until_it_is_granted() {
        let none = Authority { exports: vec![ServiceSelector::All], imports: vec![], unmeshed: false };
        let web: ServiceName = "shop/web".parse().unwrap();
        assert!(none.offers(&web));
        assert!(!none.accepts(&web));
    }

    #[test]
    fn protocols_come_from_app_protocol_then_from_the_port_name() {
        for (app, name, want) in [
            (Some("kubernetes.io/h2c"), Some("tcp-x"), AppProtocol::Http2),
            (Some("GRPC"), None, AppProtocol::Grpc),
            (Some("postgres"), Some("http"), AppProtocol::Opaque),
            (None, Some("http"), AppProtocol::Http),
            (None, Some("http-web"), AppProtocol::Http),
            (None, Some("grpc-api"), AppProtocol::Grpc),
            (None, Some("https"), AppProtocol::Tls),
            (Some("TLS"), Some("http"), AppProtocol::Tls),
            (None, Some("tcp"), AppProtocol::Opaque),
            (None, Some("mysql-primary"), AppProtocol::Opaque),
            (None, Some("httpx"), AppProtocol::Detect),
            (None, Some("admin"), AppProtocol::Detect),
            (None, None, AppProtocol::Detect),
        ] {
            assert_eq!(AppProtocol::detect(app, name), want, "{app:?} {name:?}");
        }
    }
}
