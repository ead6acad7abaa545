//! Wire types to core types and back. Unknown fields of a newer release are skipped by prost;
//! a value that core can't hold is refused with the field's name.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use tombolo_core::id::InvalidName;
use tombolo_core::model::{
    AppProtocol, Endpoint, Export, Freshness, ServiceKind, ServicePort, SessionAffinity, Transport,
};
use tombolo_core::policy::exported::OF_EXPORT_MAX;
use tombolo_core::policy::route::Route;

use crate::proto::{catalog, discovery};

/// Largest number of endpoints read from one export; above it the message is refused.
pub const ENDPOINTS_MAX: usize = 10_000;

/// Octets of one route.
const ROUTE_OCTETS_MAX: usize = 32 * 1024;

/// Why a message was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    #[error("{field}: {source}")]
    Name { field: &'static str, source: InvalidName },
    #[error("{field}: {reason}")]
    Value { field: &'static str, reason: &'static str },
    #[error("{0} is missing")]
    Missing(&'static str),
}

/// Parses a name out of a message, naming the field when it does not parse.
pub fn name<T>(field: &'static str, text: &str) -> Result<T, InvalidMessage>
where
    T: std::str::FromStr<Err = InvalidName>,
{
    text.parse().map_err(|source| InvalidMessage::Name { field, source })
}

/// A port number, 1 to 65535.
pub fn port(field: &'static str, number: u32) -> Result<u16, InvalidMessage> {
    let reason = "a port is a number from 1 to 65535";
    u16::try_from(number).ok().filter(|port| *port != 0).ok_or(InvalidMessage::Value { field, reason })
}

impl From<&ServicePort> for catalog::ServicePort {
    fn from(port: &ServicePort) -> Self {
        let transport = match port.transport {
            Transport::Tcp => catalog::Transport::Tcp,
            Transport::Udp => catalog::Transport::Udp,
            Transport::Sctp => catalog::Transport::Sctp,
        };
        let app = match port.app {
            AppProtocol::Opaque => catalog::AppProtocol::Opaque,
            AppProtocol::Http => catalog::AppProtocol::Http,
            AppProtocol::Http2 => catalog::AppProtocol::Http2,
            AppProtocol::Grpc => catalog::AppProtocol::Grpc,
            AppProtocol::Tls => catalog::AppProtocol::Tls,
            AppProtocol::Detect => catalog::AppProtocol::Detect,
        };
        Self { name: port.name.clone(), port: port.port.into(), transport: transport.into(), app: app.into() }
    }
}

impl TryFrom<catalog::ServicePort> for ServicePort {
    type Error = InvalidMessage;

    fn try_from(wire: catalog::ServicePort) -> Result<Self, InvalidMessage> {
        let transport = match catalog::Transport::try_from(wire.transport) {
            Ok(catalog::Transport::Tcp) => Transport::Tcp,
            Ok(catalog::Transport::Udp) => Transport::Udp,
            Ok(catalog::Transport::Sctp) => Transport::Sctp,
            Err(_) => return Err(InvalidMessage::Value { field: "transport", reason: "not a transport known here" }),
        };
        // A protocol of a newer release is carried as bytes: always correct, only less clever.
        let app = match catalog::AppProtocol::try_from(wire.app) {
            Ok(catalog::AppProtocol::Http) => AppProtocol::Http,
            Ok(catalog::AppProtocol::Http2) => AppProtocol::Http2,
            Ok(catalog::AppProtocol::Grpc) => AppProtocol::Grpc,
            Ok(catalog::AppProtocol::Tls) => AppProtocol::Tls,
            Ok(catalog::AppProtocol::Detect) => AppProtocol::Detect,
            Ok(catalog::AppProtocol::Opaque) | Err(_) => AppProtocol::Opaque,
        };
        Ok(Self { name: wire.name, port: port("port", wire.port)?, transport, app })
    }
}

impl From<&Endpoint> for catalog::Endpoint {
    fn from(endpoint: &Endpoint) -> Self {
        Self {
            id: endpoint.id.to_string(),
            hostname: endpoint.hostname.clone().unwrap_or_default(),
            zone: endpoint.zone.clone().unwrap_or_default(),
            weight: endpoint.weight,
            ready: endpoint.ready,
        }
    }
}

impl TryFrom<catalog::Endpoint> for Endpoint {
    type Error = InvalidMessage;

    fn try_from(wire: catalog::Endpoint) -> Result<Self, InvalidMessage> {
        let non_empty = |text: String| (!text.is_empty()).then_some(text);
        Ok(Self {
            id: name("endpoint id", &wire.id)?,
            hostname: non_empty(wire.hostname),
            zone: non_empty(wire.zone),
            weight: wire.weight.max(1),
            ready: wire.ready,
        })
    }
}

impl From<&Export> for catalog::Export {
    fn from(export: &Export) -> Self {
        let kind = match export.kind {
            ServiceKind::ClusterSetIp => catalog::ServiceKind::ClusterSetIp,
            ServiceKind::Headless => catalog::ServiceKind::Headless,
        };
        let affinity = match export.session_affinity {
            SessionAffinity::None => catalog::SessionAffinity::None,
            SessionAffinity::ClientIp => catalog::SessionAffinity::ClientIp,
        };
        Self {
            service: export.service.to_string(),
            created_unix_ms: export.created.as_millisecond(),
            kind: kind.into(),
            session_affinity: affinity.into(),
            ports: export.ports.iter().map(Into::into).collect(),
            server_ids: export.server_ids.iter().map(ToString::to_string).collect(),
            endpoints: export.endpoints.values().map(Into::into).collect(),
            unmeshed: export.unmeshed,
            routes: export.routes.iter().map(|route| exported_route(route)).collect(),
        }
    }
}

impl TryFrom<catalog::Export> for Export {
    type Error = InvalidMessage;

    fn try_from(wire: catalog::Export) -> Result<Self, InvalidMessage> {
        if wire.endpoints.len() > ENDPOINTS_MAX {
            return Err(InvalidMessage::Value {
                field: "endpoints",
                reason: "more than 10,000 endpoints in one export",
            });
        }
        let kind = match catalog::ServiceKind::try_from(wire.kind) {
            Ok(catalog::ServiceKind::Headless) => ServiceKind::Headless,
            _ => ServiceKind::ClusterSetIp,
        };
        let session_affinity = match catalog::SessionAffinity::try_from(wire.session_affinity) {
            Ok(catalog::SessionAffinity::ClientIp) => SessionAffinity::ClientIp,
            _ => SessionAffinity::None,
        };
        // What is not exported is younger than anything that is: the end of time, which as milliseconds lies
        // just beyond the last timestamp that can be held.
        let created = match Timestamp::from_millisecond(wire.created_unix_ms) {
            Ok(created) => created,
            Err(_) if wire.created_unix_ms > 0 => Timestamp::MAX,
            Err(_) => return Err(InvalidMessage::Value { field: "created_unix_ms", reason: "out of range" }),
        };
        let endpoints: BTreeMap<_, _> = wire
            .endpoints
            .into_iter()
            .map(|endpoint| Endpoint::try_from(endpoint).map(|endpoint| (endpoint.id.clone(), endpoint)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            service: name("service", &wire.service)?,
            created,
            kind,
            session_affinity,
            ports: wire.ports.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            server_ids: wire.server_ids.iter().map(|id| name("server id", id)).collect::<Result<_, _>>()?,
            endpoints,
            unmeshed: wire.unmeshed,
            routes: exported_routes(&wire.routes)?,
        })
    }
}

fn exported_route(route: &Route) -> catalog::ExportedRoute {
    let json = serde_json::to_vec(route).expect("routes have no keys but strings");
    catalog::ExportedRoute { kind: route.resource.kind.as_str().into(), json }
}

/// Those that can be read. A route of a newer release is not worth its service.
fn exported_routes(wire: &[catalog::ExportedRoute]) -> Result<Vec<Arc<Route>>, InvalidMessage> {
    if wire.len() > OF_EXPORT_MAX {
        return Err(InvalidMessage::Value { field: "routes", reason: "more than 32 routes in one export" });
    }
    if wire.iter().any(|route| route.json.len() > ROUTE_OCTETS_MAX) {
        return Err(InvalidMessage::Value { field: "routes", reason: "one is larger than 32 KiB" });
    }
    Ok(wire.iter().filter_map(|route| read_route(route).ok().map(Arc::new)).collect())
}

fn read_route(wire: &catalog::ExportedRoute) -> Result<Route, String> {
    let route: Route = serde_json::from_slice(&wire.json).map_err(|error| error.to_string())?;
    let kind = route.resource.kind.as_str();
    if kind == wire.kind { Ok(route) } else { Err(format!("it is of kind {kind}")) }
}

/// Which routes [`Export::try_from`] leaves out of an export, and why the first of them; `None` if none.
pub fn unread_routes(wire: &catalog::Export) -> Option<String> {
    let mut unread = wire.routes.iter().filter_map(|route| Some((route, read_route(route).err()?)));
    let (first, error) = unread.next()?;
    let more = match unread.count() {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    // Even what can't be read as a route may say what it is called.
    let said: serde_json::Value = serde_json::from_slice(&first.json).unwrap_or_default();
    let name = said["resource"]["name"].as_str().unwrap_or("without a name");
    Some(format!(
        "{} is taken without its route {} {name}, which can't be read here: {error}{more}",
        wire.service, first.kind
    ))
}

impl From<Freshness> for discovery::Freshness {
    fn from(freshness: Freshness) -> Self {
        match freshness {
            Freshness::Fresh => Self::Fresh,
            Freshness::Stale => Self::Stale,
            Freshness::Draining => Self::Draining,
        }
    }
}

impl From<discovery::Freshness> for Freshness {
    fn from(wire: discovery::Freshness) -> Self {
        match wire {
            discovery::Freshness::Fresh => Self::Fresh,
            discovery::Freshness::Stale => Self::Stale,
            discovery::Freshness::Draining => Self::Draining,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_export_survives_the_wire() {
        let endpoint =
            Endpoint { id: "a1".parse().unwrap(), hostname: None, zone: Some("z1".into()), weight: 2, ready: true };
        let export = Export {
            service: "shop/web".parse().unwrap(),
            created: Timestamp::from_millisecond(1_700_000_000_123).unwrap(),
            kind: ServiceKind::Headless,
            session_affinity: SessionAffinity::ClientIp,
            ports: [ServicePort { name: "http".into(), port: 80, transport: Transport::Tcp, app: AppProtocol::Http }]
                .into(),
            server_ids: ["spiffe://east/ns/shop/sa/web".parse().unwrap()].into(),
            endpoints: [(endpoint.id.clone(), endpoint)].into(),
            unmeshed: true,
            routes: vec![Arc::new(route())],
        };
        let wire = catalog::Export::from(&export);
        assert_eq!(Export::try_from(wire.clone()).unwrap(), export);
        // What a newer release sends beside it is passed over; what is too much is refused.
        let mut newer = wire.clone();
        newer.routes.push(catalog::ExportedRoute { kind: "MoodRoute".into(), json: b"{}".to_vec() });
        newer.routes.push(catalog::ExportedRoute { kind: "HTTPRoute".into(), json: b"{\"mood\": 1}".to_vec() });
        newer.routes.push(catalog::ExportedRoute { kind: "GRPCRoute".into(), ..wire.routes[0].clone() });
        let unread = unread_routes(&newer).unwrap();
        assert!(unread.starts_with("shop/web is taken without its route MoodRoute without a name"), "{unread}");
        assert!(unread.ends_with("(and 2 more)"), "{unread}");
        assert_eq!(unread_routes(&wire), None);
        newer.routes.swap(1, 3);
        assert!(
            unread_routes(&newer)
                .unwrap()
                .contains("route GRPCRoute web, which can't be read here: it is of kind HTTPRoute")
        );
        assert_eq!(Export::try_from(newer).unwrap(), export);
        let mut many = wire.clone();
        many.routes = vec![wire.routes[0].clone(); OF_EXPORT_MAX + 1];
        assert!(Export::try_from(many).unwrap_err().to_string().starts_with("routes: more than 32"));
        let mut large = wire;
        large.routes[0].json.resize(ROUTE_OCTETS_MAX + 1, b' ');
        assert!(Export::try_from(large).unwrap_err().to_string().starts_with("routes: one is larger"));
    }

    fn route() -> Route {
        let json = r#"{"resource": {"kind": "HTTPRoute", "namespace": "shop", "name": "web", "cluster": "east"},
            "created": "2026-01-01T00:00:00Z", "parents": [{"service": "shop/web"}],
            "rules": [{"backends": [{"service": "shop/web", "cluster": "east", "weight": 1}]}]}"#;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_end_of_time_crosses() {
        let wire = catalog::Export {
            service: "shop/web".into(),
            created_unix_ms: Timestamp::MAX.as_millisecond(),
            ..Default::default()
        };
        assert_eq!(Export::try_from(wire).unwrap().created, Timestamp::MAX);
    }

    #[test]
    fn a_bad_field_is_named() {
        let wire = catalog::Export { service: "nonsense".into(), ..Default::default() };
        assert!(Export::try_from(wire).unwrap_err().to_string().starts_with("service: "));
        assert!(port("port", 65_536).unwrap_err().to_string().starts_with("port: "));
    }
}
