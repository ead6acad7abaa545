//! What replicas tell each other, to and from the wire.

use std::net::IpAddr;

use tombolo_api::convert::{InvalidMessage, name};
use tombolo_api::proto::discovery as proto;
use tombolo_api::proto::replica as wire;
use tombolo_core::id::{GatewayId, SpiffeId};

use crate::discovery::wire as discovery;
use crate::hub::{GatewayView, PeeringCommand, PeeringEvent, Reach, TunnelView};
use crate::registry::{Claim, RememberedSidecar, SessionId};

/// A gateway of another replica.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ToldGateway {
    pub gateway: GatewayId,
    pub spiffe_id: SpiffeId,
    pub advertise: Vec<String>,
    pub ingress_address: String,
    pub watch_address: String,
    pub unmeshed_address: Option<IpAddr>,
    pub tunnels: Vec<TunnelView>,
}

pub(super) fn sidecar_to_wire(session: SessionId, sidecar: &RememberedSidecar) -> wire::Sidecar {
    let registration = |claim: &Claim| proto::Registration {
        service: claim.service.to_string(),
        port: claim.port.into(),
        inbound_address: claim.inbound_address.clone(),
        ready: claim.ready,
    };
    wire::Sidecar {
        session: session.0,
        instance: sidecar.instance.to_string(),
        spiffe_id: sidecar.spiffe_id.to_string(),
        zone: sidecar.zone.clone().unwrap_or_default(),
        registrations: sidecar.claims.iter().map(registration).collect(),
    }
}

pub(super) fn sidecar_from_wire(wire: wire::Sidecar) -> Result<RememberedSidecar, InvalidMessage> {
    Ok(RememberedSidecar {
        instance: name("instance", &wire.instance)?,
        spiffe_id: name("spiffe_id", &wire.spiffe_id)?,
        zone: (!wire.zone.is_empty()).then_some(wire.zone),
        claims: wire.registrations.into_iter().map(discovery::claim).collect::<Result<_, _>>()?,
    })
}

pub(super) fn gateway_to_wire(view: &GatewayView) -> wire::Gateway {
    let hello = proto::GatewayHello {
        gateway_id: view.gateway.to_string(),
        advertise: view.advertise.clone(),
        ingress_address: view.ingress_address.clone(),
        watch_address: view.watch_address.clone(),
        unmeshed_address: view.unmeshed_address.map(|address| address.to_string()).unwrap_or_default(),
    };
    let tunnels = view.tunnels.iter().map(tunnel_to_wire).collect();
    wire::Gateway { hello: Some(hello), spiffe_id: view.spiffe_id.to_string(), tunnels }
}

pub(super) fn gateway_from_wire(wire: wire::Gateway) -> Result<ToldGateway, InvalidMessage> {
    let hello = wire.hello.unwrap_or_default();
    let advertise = hello.advertise.into_iter().map(|address| discovery::address("advertise", address));
    Ok(ToldGateway {
        gateway: name("gateway_id", &hello.gateway_id)?,
        spiffe_id: name("spiffe_id", &wire.spiffe_id)?,
        advertise: advertise.collect::<Result<_, _>>()?,
        ingress_address: discovery::address("ingress_address", hello.ingress_address)?,
        watch_address: discovery::address("watch_address", hello.watch_address)?,
        unmeshed_address: hello.unmeshed_address.parse().ok(),
        tunnels: wire.tunnels.into_iter().map(discovery::tunnel).collect::<Result<_, _>>()?,
    })
}

fn tunnel_to_wire(tunnel: &TunnelView) -> proto::TunnelState {
    let reach = match tunnel.reach {
        Reach::Unknown => proto::Reach::Unknown,
        Reach::Up => proto::Reach::Up,
        Reach::Suspect => proto::Reach::Suspect,
        Reach::Down => proto::Reach::Down,
    };
    proto::TunnelState {
        cluster: tunnel.cluster.to_string(),
        reach: reach.into(),
        rtt_us: tunnel.rtt_us,
        remote_address: tunnel.remote_address.clone(),
        dialled_here: tunnel.dialled_here,
        legs: tunnel.legs,
        last_error: tunnel.last_error.clone(),
        mtu: tunnel.mtu,
        remote_gateway_id: tunnel.remote_gateway.as_ref().map(ToString::to_string).unwrap_or_default(),
        resolved: tunnel.resolved.iter().map(ToString::to_string).collect(),
    }
}

pub(super) fn report_to_wire(event: PeeringEvent) -> wire::PeeringReport {
    use proto::gateway_request::Kind;
    let (gateway, kind) = match event {
        PeeringEvent::Exporter { gateway, attempt, exporter } => {
            (gateway, Kind::Exporter(proto::PeeringExporter { attempt, exporter }))
        }
        PeeringEvent::Answer { gateway, attempt, answer } => {
            (gateway, Kind::Answer(proto::PeeringAnswer { attempt, answer }))
        }
        PeeringEvent::Failed { gateway, attempt, reason } => {
            (gateway, Kind::Failed(proto::PeeringFailed { attempt, reason }))
        }
        PeeringEvent::Knock { gateway, attempt, exporter, offer, chain: chain_der } => {
            (gateway, Kind::Knock(proto::PeeringKnock { attempt, exporter, offer, chain_der }))
        }
    };
    let report = proto::GatewayRequest { kind: Some(kind) };
    wire::PeeringReport { gateway_id: gateway.to_string(), report: Some(report) }
}

/// `None` for what a newer release reports.
pub(super) fn report_from_wire(wire: wire::PeeringReport) -> Result<Option<PeeringEvent>, InvalidMessage> {
    let gateway = name("gateway_id", &wire.gateway_id)?;
    let said = wire.report.and_then(|report| report.kind);
    Ok(said.and_then(|said| discovery::peering_event(gateway, said)))
}

pub(super) fn order_to_wire(gateway: &GatewayId, command: PeeringCommand) -> wire::PeeringOrder {
    let order = proto::GatewayUpdate { kind: Some(discovery::command_to_wire(command)) };
    wire::PeeringOrder { gateway_id: gateway.to_string(), order: Some(order) }
}

/// `None` for what a newer release orders.
pub(super) fn order_from_wire(wire: wire::PeeringOrder) -> Result<Option<(GatewayId, PeeringCommand)>, InvalidMessage> {
    use proto::gateway_update::Kind;
    let gateway = name("gateway_id", &wire.gateway_id)?;
    let Some(kind) = wire.order.and_then(|order| order.kind) else { return Ok(None) };
    let command = match kind {
        Kind::PeeringDial(proto::PeeringDial { attempt, addresses, root_sha256, cluster }) => PeeringCommand::Dial {
            attempt,
            addresses,
            root_sha256: root_sha256
                .try_into()
                .map_err(|_| InvalidMessage::Value { field: "root_sha256", reason: "32 octets are needed" })?,
            cluster: name("cluster", &cluster)?,
        },
        Kind::PeeringOffer(proto::PeeringOffer { attempt, offer }) => PeeringCommand::Offer { attempt, offer },
        Kind::PeeringVerdict(proto::PeeringVerdict { attempt, answer }) => PeeringCommand::Verdict { attempt, answer },
        Kind::Welcome(_) | Kind::Snapshot(_) | Kind::Revoked(_) => return Ok(None),
    };
    Ok(Some((gateway, command)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn everything_comes_back_from_the_wire_as_it_was() {
        let gateway: GatewayId = "gw".parse().unwrap();
        let attempt = || "a".to_owned();
        for event in [
            PeeringEvent::Exporter { gateway: gateway.clone(), attempt: attempt(), exporter: vec![1] },
            PeeringEvent::Answer { gateway: gateway.clone(), attempt: attempt(), answer: vec![2] },
            PeeringEvent::Failed { gateway: gateway.clone(), attempt: attempt(), reason: "no".into() },
            PeeringEvent::Knock {
                gateway: gateway.clone(),
                attempt: attempt(),
                exporter: vec![1],
                offer: vec![2],
                chain: vec![vec![3]],
            },
        ] {
            assert_eq!(report_from_wire(report_to_wire(event.clone())).unwrap(), Some(event));
        }
        let addresses = vec!["h:1".to_owned()];
        let cluster = "west".parse().unwrap();
        for command in [
            PeeringCommand::Dial { attempt: attempt(), addresses, root_sha256: [7; 32], cluster },
            PeeringCommand::Offer { attempt: attempt(), offer: vec![1] },
            PeeringCommand::Verdict { attempt: attempt(), answer: vec![2] },
        ] {
            let back = order_from_wire(order_to_wire(&gateway, command.clone())).unwrap();
            assert_eq!(back, Some((gateway.clone(), command)));
        }
        let claim =
            Claim { service: "shop/web".parse().unwrap(), port: 80, inbound_address: "h:2".into(), ready: true };
        let sidecar = RememberedSidecar {
            instance: "web-1".parse().unwrap(),
            spiffe_id: "spiffe://west/ns/shop/sa/web".parse().unwrap(),
            zone: Some("a".into()),
            claims: vec![claim],
        };
        assert_eq!(sidecar_from_wire(sidecar_to_wire(SessionId(3), &sidecar)).unwrap(), sidecar);
    }
}
