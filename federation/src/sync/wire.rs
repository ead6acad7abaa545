//! Updates of peer sync to and from the wire.

use std::sync::Arc;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use tombolo_api::convert::{InvalidMessage, name, unread_routes};
use tombolo_api::proto::{catalog, peer as wire};
use tombolo_core::id::{Position, TrustDomain};
use tombolo_core::model::{Export, GatewayAddress};
use tombolo_core::publish::{Change, Revocations, Roots, Update};
use tombolo_trust::bundle::{Bundle, InvalidBundle};

use crate::hub::PeerMessage;

/// Characters of a gateway's address.
const ADDRESS_LEN_MAX: usize = 262;

/// Why an update can't be read.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error(transparent)]
    Message(#[from] InvalidMessage),
    #[error("bundle: {0}")]
    Bundle(#[from] InvalidBundle),
}

/// The roots of a bundle as core holds them.
pub fn roots_of(bundle: &Bundle) -> Roots {
    Roots {
        trust_domain: bundle.trust_domain().clone(),
        sequence: bundle.sequence(),
        der: bundle.roots().iter().map(|root| root.to_vec()).collect(),
    }
}

/// The bundle of roots that core holds.
pub fn bundle_of(roots: &Roots) -> Result<Bundle, InvalidBundle> {
    let der = roots.der.iter().cloned().map(CertificateDer::from).collect();
    Bundle::new(roots.trust_domain.clone(), roots.sequence, der)
}

pub(crate) fn to_wire(update: &Update) -> wire::SyncUpdate {
    use wire::sync_update::Kind;
    let kind = match &update.change {
        Change::Export(export) => Kind::Export((&**export).into()),
        Change::ExportRemoved(service) => Kind::ExportRemoved(wire::ExportRemoved { service: service.to_string() }),
        Change::Endpoint(service, endpoint) => {
            Kind::Endpoint(wire::EndpointChanged { service: service.to_string(), endpoint: Some(endpoint.into()) })
        }
        Change::EndpointRemoved(service, id) => {
            Kind::EndpointRemoved(wire::EndpointRemoved { service: service.to_string(), endpoint_id: id.to_string() })
        }
        Change::Roots(roots) => Kind::Bundle(catalog::TrustBundle {
            trust_domain: roots.trust_domain.to_string(),
            sequence: roots.sequence,
            roots_der: roots.der.iter().cloned().collect(),
            refresh_hint_s: 0,
        }),
        Change::Gateways(gateways) => {
            Kind::Gateways(wire::Gateways { gateways: gateways.iter().map(gateway_to_wire).collect() })
        }
        Change::Revocations(revocations) => Kind::Revocations(wire::Revocations {
            sequence: revocations.sequence,
            spiffe_ids: revocations.ids.iter().map(ToString::to_string).collect(),
        }),
        Change::SnapshotBegin => Kind::SnapshotBegin(wire::SnapshotBegin {}),
        Change::Complete => Kind::Complete(wire::Complete {}),
        Change::Heartbeat => Kind::Heartbeat(wire::Heartbeat { sent_unix_ms: Timestamp::now().as_millisecond() }),
    };
    wire::SyncUpdate { epoch: update.position.epoch, revision: update.position.revision, kind: Some(kind) }
}

pub(crate) fn gateway_to_wire(gateway: &GatewayAddress) -> catalog::GatewayAddress {
    catalog::GatewayAddress { gateway_id: gateway.gateway.to_string(), address: gateway.address.clone() }
}

/// Reads an update. What can't be read is passed over with its reason; an unknown kind without one.
pub(crate) fn from_wire(update: wire::SyncUpdate) -> PeerMessage {
    let position = Position { epoch: update.epoch, revision: update.revision };
    let Some(kind) = update.kind else { return PeerMessage::Unreadable { position, reason: None } };
    let unread = match &kind {
        wire::sync_update::Kind::Export(export) => unread_routes(export),
        _ => None,
    };
    match change(kind) {
        Ok(change) => match unread {
            None => PeerMessage::Update(Update { position, change }),
            Some(reason) => PeerMessage::Reduced { update: Update { position, change }, reason },
        },
        Err(error) => PeerMessage::Unreadable { position, reason: Some(error.to_string()) },
    }
}

fn change(kind: wire::sync_update::Kind) -> Result<Change, Unreadable> {
    use wire::sync_update::Kind;
    Ok(match kind {
        Kind::Export(export) => Change::Export(Arc::new(Export::try_from(export)?)),
        Kind::ExportRemoved(removed) => Change::ExportRemoved(name("service", &removed.service)?),
        Kind::Endpoint(changed) => {
            let endpoint = changed.endpoint.ok_or(InvalidMessage::Missing("endpoint"))?;
            Change::Endpoint(name("service", &changed.service)?, endpoint.try_into()?)
        }
        Kind::EndpointRemoved(removed) => {
            Change::EndpointRemoved(name("service", &removed.service)?, name("endpoint id", &removed.endpoint_id)?)
        }
        Kind::Bundle(bundle) => Change::Roots(Arc::new(roots(bundle)?)),
        Kind::Gateways(gateways) => {
            let gateways: Result<Vec<_>, _> = gateways.gateways.into_iter().map(gateway_from_wire).collect();
            Change::Gateways(Arc::new(gateways?))
        }
        Kind::Revocations(revocations) => {
            let ids: Result<_, InvalidMessage> =
                revocations.spiffe_ids.iter().map(|id| name("spiffe id", id)).collect();
            Change::Revocations(Arc::new(Revocations { sequence: revocations.sequence, ids: ids? }))
        }
        Kind::SnapshotBegin(_) => Change::SnapshotBegin,
        Kind::Complete(_) => Change::Complete,
        Kind::Heartbeat(_) => Change::Heartbeat,
    })
}

/// Only a bundle whose roots are CAs of its own trust domain is handed on.
fn roots(wire: catalog::TrustBundle) -> Result<Roots, Unreadable> {
    let _: TrustDomain = name("trust domain", &wire.trust_domain)?;
    Ok(roots_of(&Bundle::from_wire(wire)?))
}

fn gateway_from_wire(wire: catalog::GatewayAddress) -> Result<GatewayAddress, InvalidMessage> {
    if wire.address.len() > ADDRESS_LEN_MAX || !wire.address.contains(':') {
        return Err(InvalidMessage::Value { field: "gateway address", reason: "write host:port" });
    }
    Ok(GatewayAddress { gateway: name("gateway id", &wire.gateway_id)?, address: wire.address })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use prost::Message;
    use tombolo_core::model::Endpoint;

    #[test]
    fn one_changed_endpoint_is_less_than_a_kilobyte() {
        // Every field as long as it can be.
        let (long, id) = ("x".repeat(63), "e".repeat(32));
        let endpoint = Endpoint {
            id: id.parse().unwrap(),
            hostname: Some(long.clone()),
            zone: Some(long.clone()),
            weight: u32::MAX,
            ready: true,
        };
        let change = Change::Endpoint(format!("{long}/{long}").parse().unwrap(), endpoint);
        let position = Position { epoch: u64::MAX, revision: u64::MAX };
        let encoded = to_wire(&Update { position, change }).encoded_len();
        assert!(encoded < 1024, "{encoded} octets");
    }

    #[test]
    fn what_cannot_be_read_is_passed_over_with_its_reason() {
        let read = |kind| match from_wire(wire::SyncUpdate { epoch: 1, revision: 2, kind }) {
            PeerMessage::Unreadable { reason, .. } => reason,
            PeerMessage::Update(update) | PeerMessage::Reduced { update, .. } => panic!("{update:?}"),
        };
        use wire::sync_update::Kind;
        assert_eq!(read(None), None);
        let removed = wire::ExportRemoved { service: "nonsense".into() };
        assert!(read(Some(Kind::ExportRemoved(removed))).unwrap().starts_with("service: "));
        let bundle = catalog::TrustBundle { trust_domain: "a".into(), roots_der: vec![vec![1]], ..Default::default() };
        assert!(read(Some(Kind::Bundle(bundle))).unwrap().starts_with("bundle: "));
    }
}
