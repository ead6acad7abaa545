//! Views of the hub as discovery tells them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tombolo_api::convert::{InvalidMessage, name, port};
use tombolo_api::policy::{defaults_to_wire, policies_to_wire};
use tombolo_api::proto::discovery as proto;
use tombolo_core::addresses::Ranges;
use tombolo_core::addresses::allocation::owners;
use tombolo_core::addresses::mesh::Block;
use tombolo_core::addresses::ports::PortOwner;
use tombolo_core::catalog::ServiceView;
use tombolo_core::id::{GatewayId, ServiceName, TrustDomain};
use tombolo_core::model::{Freshness, Origin, Transport};

use crate::addresses::Addresses;
use crate::hub::{GatewayView, PeeringCommand, PeeringEvent, Reach, TunnelView, View};
use crate::registry::Claim;
use crate::sync::wire::gateway_to_wire;

/// Characters of an address.
const ADDRESS_LEN_MAX: usize = 262;
/// Characters of a tunnel's last error.
const ERROR_LEN_MAX: usize = 500;
/// Addresses of one gateway that are kept.
const RESOLVED_MAX: usize = 64;
/// Trust domains whose bundles may be reported at once.
const BUNDLES_MAX: usize = 1024;

pub(super) fn bundles(view: &View) -> proto::Bundles {
    let bundle = |(cluster, bundle): (&tombolo_core::id::ClusterId, &tombolo_trust::bundle::Bundle)| {
        proto::ClusterBundle { cluster: cluster.to_string(), bundle: Some(bundle.to_wire()) }
    };
    proto::Bundles { bundles: view.bundles.iter().map(bundle).collect() }
}

pub(super) fn gateways(view: &View) -> proto::LocalGateways {
    let gateway = |gateway: &GatewayView| proto::LocalGateway {
        gateway_id: gateway.gateway.to_string(),
        ingress_address: gateway.ingress_address.clone(),
        watch_address: gateway.watch_address.clone(),
        spiffe_id: gateway.spiffe_id.to_string(),
    };
    let connected = view.gateways.values().filter(|gateway| gateway.connected);
    proto::LocalGateways { gateways: connected.map(|connected| gateway(connected)).collect() }
}

pub(super) fn revoked(view: &View) -> proto::Revoked {
    proto::Revoked { spiffe_ids: view.revoked.iter().map(ToString::to_string).collect() }
}

/// One service with every share; where its local endpoints are delivered is told with the local one.
pub(super) fn service(view: &ServiceView, numbers: proto::ServiceNumbers) -> proto::Service {
    let deliveries = || {
        let endpoints = view.deliveries.iter();
        endpoints.flat_map(|(endpoint, ports)| {
            ports.iter().map(|(port, delivery)| proto::LocalDelivery {
                endpoint_id: endpoint.to_string(),
                port: (*port).into(),
                inbound_address: delivery.address.clone(),
            })
        })
    };
    let share = |share: &tombolo_core::model::ClusterShare| proto::Share {
        cluster: share.cluster.to_string(),
        local: share.origin == Origin::Local,
        freshness: freshness(share.freshness).into(),
        export: Some((&share.export).into()),
        deliveries: if share.origin == Origin::Local { deliveries().collect() } else { Vec::new() },
    };
    let shares = view.shares.iter().map(share).collect();
    proto::Service { service: view.service.to_string(), shares, numbers: Some(numbers), policies: Vec::new() }
}

/// What decides about callers of a service that is registered.
pub(super) fn inbound_policies(view: &View, service: &ServiceName) -> proto::InboundPolicies {
    let (deny_by_default, deny_by_default_of) = defaults_to_wire(&view.access);
    let policies = policies_to_wire(&view.policies.delivered(service));
    let unmeshed = unmeshed_callers(view, service);
    proto::InboundPolicies { service: service.to_string(), policies, deny_by_default, deny_by_default_of, unmeshed }
}

/// The clusters whose workloads without a sidecar may call a service that is delivered here.
pub(super) fn unmeshed_callers(view: &View, service: &ServiceName) -> Vec<String> {
    let known = view.services.get(service).into_iter();
    known.flat_map(|known| &known.unmeshed).map(ToString::to_string).collect()
}

pub(super) fn imported_addresses(imported: &BTreeMap<ServiceName, Vec<IpAddr>>) -> proto::ImportedAddresses {
    let pairs =
        imported.iter().flat_map(|(service, addresses)| addresses.iter().map(move |address| (service, address)));
    let one = |(service, address): (&ServiceName, &IpAddr)| proto::ImportedAddress {
        address: address.to_string(),
        service: service.to_string(),
    };
    proto::ImportedAddresses { addresses: pairs.map(one).collect() }
}

/// The numbers of a service, or of its endpoints, as far as they have any.
pub(super) fn numbers(view: &ServiceView, addresses: Option<&Addresses>) -> proto::ServiceNumbers {
    let mut numbers = proto::ServiceNumbers::default();
    for owner in addresses.into_iter().flat_map(|_| owners(view)) {
        let Some(number) = addresses.and_then(|addresses| addresses.number(&owner)) else { continue };
        match owner.endpoint {
            None => numbers.service = number.0,
            Some((cluster, endpoint)) => numbers.endpoints.push(proto::EndpointNumber {
                cluster: cluster.to_string(),
                endpoint_id: endpoint.to_string(),
                number: number.0,
            }),
        }
    }
    numbers
}

pub(super) fn address_ranges(ranges: &Ranges) -> proto::AddressRanges {
    proto::AddressRanges { ipv4: ranges.ipv4.to_string(), ipv6: ranges.ipv6.to_string() }
}

pub(super) fn address_block(number: u32, block: &Block) -> proto::AddressBlock {
    let (services, endpoints, names) = block.parts();
    proto::AddressBlock { block: number, services, endpoints, names: names.into_iter().map(str::to_owned).collect() }
}

fn freshness(freshness: Freshness) -> proto::Freshness {
    freshness.into()
}

pub(super) fn snapshot(view: &View) -> proto::GatewaySnapshot {
    let peer = |peer: &crate::hub::PeerView| proto::PeerLink {
        cluster: peer.cluster.to_string(),
        trust_domain: peer.trust_domain.to_string(),
        gateways: peer.gateways.iter().map(gateway_to_wire).collect(),
    };
    let offered = view.services.values().filter(|service| !service.offered_to.is_empty());
    proto::GatewaySnapshot {
        peers: view.peers.values().map(|one| peer(one)).collect(),
        deliveries: offered.flat_map(|service| deliveries(service)).collect(),
        bundles: Some(bundles(view)),
        unmeshed: unmeshed(view),
    }
}

/// What gateways do for workloads without a sidecar; nothing where no port of any service may be called by them.
fn unmeshed(view: &View) -> Option<proto::Unmeshed> {
    let listeners = &view.addresses.as_ref()?.listeners;
    // A service that went a moment ago still has its ports.
    let known = |owner: &&PortOwner| view.services.contains_key(&owner.service);
    let services: BTreeSet<&ServiceName> = listeners.keys().filter(known).map(|owner| &owner.service).collect();
    let allowing = |name: &ServiceName| {
        let mut service = ServiceView::clone(&view.services[name]);
        service.shares.retain(|share| share.export.unmeshed);
        // Requests can't be told apart where bytes are carried.
        service.shares.iter_mut().for_each(|share| share.export.routes.clear());
        self::service(&service, proto::ServiceNumbers::default())
    };
    let listener = |owner: &PortOwner| proto::Listener {
        listen: listeners[owner].into(),
        service: owner.service.to_string(),
        port: owner.port.into(),
    };
    (!services.is_empty()).then(|| proto::Unmeshed {
        listeners: listeners.keys().filter(known).map(listener).collect(),
        services: services.into_iter().map(allowing).collect(),
        meshed: view.meshed.iter().map(ToString::to_string).collect(),
    })
}

/// Every TCP port of an offered service, with the endpoints that deliver it; perhaps none.
fn deliveries(view: &ServiceView) -> impl Iterator<Item = proto::Delivery> {
    let own = view.shares.iter().find(|share| share.origin == Origin::Local);
    let ports = own.into_iter().flat_map(|share| &share.export.ports);
    let tcp = ports.filter(|port| port.transport == Transport::Tcp).map(|port| port.port);
    tcp.map(|port| {
        let endpoints = view.deliveries.iter().filter_map(|(endpoint, ports)| {
            let delivery = ports.get(&port)?;
            Some(proto::DeliveryEndpoint {
                endpoint_id: endpoint.to_string(),
                inbound_address: delivery.address.clone(),
                ready: delivery.ready,
            })
        });
        proto::Delivery {
            service: view.service.to_string(),
            port: port.into(),
            clusters: view.offered_to.iter().map(ToString::to_string).collect(),
            endpoints: endpoints.collect(),
        }
    })
}

pub(crate) fn claim(wire: proto::Registration) -> Result<Claim, InvalidMessage> {
    Ok(Claim {
        service: name("service", &wire.service)?,
        port: port("port", wire.port)?,
        inbound_address: address("inbound_address", wire.inbound_address)?,
        ready: wire.ready,
    })
}

pub(crate) fn address(field: &'static str, text: String) -> Result<String, InvalidMessage> {
    if text.len() <= ADDRESS_LEN_MAX && text.contains(':') {
        return Ok(text);
    }
    Err(InvalidMessage::Value { field, reason: "write host:port" })
}

pub(crate) fn tunnel(wire: proto::TunnelState) -> Result<TunnelView, InvalidMessage> {
    let reach = match wire.reach() {
        proto::Reach::Unknown => Reach::Unknown,
        proto::Reach::Up => Reach::Up,
        proto::Reach::Suspect => Reach::Suspect,
        proto::Reach::Down => Reach::Down,
    };
    let remote = (!wire.remote_gateway_id.is_empty()).then(|| name("remote_gateway_id", &wire.remote_gateway_id));
    Ok(TunnelView {
        cluster: name("cluster", &wire.cluster)?,
        remote_gateway: remote.transpose()?,
        reach,
        rtt_us: wire.rtt_us,
        remote_address: wire.remote_address.chars().take(ADDRESS_LEN_MAX).collect(),
        dialled_here: wire.dialled_here,
        legs: wire.legs,
        mtu: wire.mtu,
        last_error: wire.last_error.chars().take(ERROR_LEN_MAX).collect(),
        resolved: wire.resolved.iter().take(RESOLVED_MAX).filter_map(|address| address.parse().ok()).collect(),
    })
}

pub(super) fn bundles_in_force(wire: proto::BundlesInForce) -> Result<BTreeMap<TrustDomain, u64>, InvalidMessage> {
    let sequences = wire.sequences.into_iter().take(BUNDLES_MAX);
    sequences.map(|(domain, sequence)| Ok((name("trust domain", &domain)?, sequence))).collect()
}

/// What a gateway reports of a peering; `None` for everything else that it says.
pub(crate) fn peering_event(gateway: GatewayId, said: proto::gateway_request::Kind) -> Option<PeeringEvent> {
    use proto::gateway_request::Kind;
    Some(match said {
        Kind::Exporter(proto::PeeringExporter { attempt, exporter }) => {
            PeeringEvent::Exporter { gateway, attempt, exporter }
        }
        Kind::Answer(proto::PeeringAnswer { attempt, answer }) => PeeringEvent::Answer { gateway, attempt, answer },
        Kind::Failed(proto::PeeringFailed { attempt, reason }) => PeeringEvent::Failed { gateway, attempt, reason },
        Kind::Knock(proto::PeeringKnock { attempt, exporter, offer, chain_der: chain }) => {
            PeeringEvent::Knock { gateway, attempt, exporter, offer, chain }
        }
        Kind::Hello(_) | Kind::Tunnels(_) | Kind::Bundles(_) => return None,
    })
}

pub(crate) fn command_to_wire(command: PeeringCommand) -> proto::gateway_update::Kind {
    use proto::gateway_update::Kind;
    match command {
        PeeringCommand::Dial { attempt, addresses, root_sha256, cluster } => Kind::PeeringDial(proto::PeeringDial {
            attempt,
            addresses,
            root_sha256: root_sha256.to_vec(),
            cluster: cluster.to_string(),
        }),
        PeeringCommand::Offer { attempt, offer } => Kind::PeeringOffer(proto::PeeringOffer { attempt, offer }),
        PeeringCommand::Verdict { attempt, answer } => Kind::PeeringVerdict(proto::PeeringVerdict { attempt, answer }),
    }
}
