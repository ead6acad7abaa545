//! What federation announces, in core's types. A message that does not convert is refused as a whole,
//! and what was known before stays in force.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use tombolo_api::convert::{InvalidMessage, name, port};
use tombolo_api::policy::{defaults_from_wire, policies_from_wire};
use tombolo_api::proto::discovery as wire;
use tombolo_core::addresses::mesh::Block;
use tombolo_core::addresses::{Number, Ranges};
use tombolo_core::id::{ClusterId, EndpointId, GatewayId, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::liveness::Reach;
use tombolo_core::model::{ClusterShare, Export, Freshness, GatewayAddress, Origin};
use tombolo_core::policy::access::{AccessPolicy, Defaults};
use tombolo_core::policy::rate::RateLimit;
use tombolo_core::policy::set::{Policy, leading};

/// Largest number of entries that any one list of a message may have.
const LIST_MAX: usize = 100_000;

/// Who this sidecar belongs to, as its federation says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    pub zone: Option<String>,
}

/// What is known of a service that was subscribed to.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum ServiceState {
    /// No answer yet.
    #[default]
    Waiting,
    /// No cluster exports it to here, and the own cluster has none of that name.
    Unknown,
    Known(Arc<ServiceView>),
}

/// One service as every cluster that exports it to here describes it, this one included.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceView {
    pub service: ServiceName,
    /// In the order of cluster ids.
    pub shares: Vec<ShareView>,
    pub numbers: ServiceNumbers,
    /// Routes and traffic policies that speak of this sidecar's requests to it.
    pub policies: Vec<Policy>,
}

/// What the virtual addresses of a service are made of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceNumbers {
    /// `None` for a headless service, and while there is none yet.
    pub service: Option<Number>,
    /// Of the endpoints of a headless service.
    pub endpoints: BTreeMap<(ClusterId, EndpointId), Number>,
}

/// One cluster's part of a service.
#[derive(Debug, Clone, PartialEq)]
pub struct ShareView {
    pub share: ClusterShare,
    /// Where the sidecars of local endpoints accept inner legs, `host:port`, by endpoint and port.
    pub deliveries: BTreeMap<EndpointId, BTreeMap<u16, String>>,
}

/// A gateway of this cluster, as its sidecars reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalGateway {
    pub gateway_id: GatewayId,
    /// `host:port` where inner legs enter.
    pub ingress_address: String,
    /// `host:port` of GatewayWatch.
    pub watch_address: String,
    pub spiffe_id: SpiffeId,
}

/// What a sidecar delivers to a local application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    pub service: ServiceName,
    pub port: u16,
    /// `host:port` where this sidecar accepts inner legs.
    pub inbound_address: String,
    pub ready: bool,
}

/// What federation decided about a registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrationVerdict {
    Accepted {
        endpoint_id: EndpointId,
    },
    /// Why not, for an operator.
    Refused {
        reason: String,
    },
}

/// Which clusters may call what is registered here; the own cluster always may.
pub type InboundGrants = BTreeMap<ServiceName, BTreeSet<ClusterId>>;

/// What decides about callers of one service that is registered here.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InboundPolicies {
    pub access: Vec<Arc<AccessPolicy>>,
    pub defaults: Defaults,
    pub rate_limit: Option<RateLimit>,
    /// The clusters whose workloads without a sidecar may call it.
    pub unmeshed: BTreeSet<ClusterId>,
}

/// What was told of each registered service's callers.
#[derive(Debug, Clone, Default)]
pub(super) struct ToldPolicies {
    /// The federation is of a release that knows no policies, so that there are none.
    pub unknown_there: bool,
    pub services: BTreeMap<ServiceName, Arc<InboundPolicies>>,
}

impl ToldPolicies {
    pub fn of(&self, service: &ServiceName) -> Option<Arc<InboundPolicies>> {
        let told = self.services.get(service).cloned();
        told.or_else(|| self.unknown_there.then(Arc::default))
    }
}

/// Who a gateway belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayWelcome {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// `host:port` where the federation accepts the inner legs of peer sync.
    pub federation_leg_address: String,
}

/// All that a gateway needs to carry legs; replaces what was sent before.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GatewaySnapshot {
    pub peers: BTreeMap<ClusterId, PeerLink>,
    pub deliveries: BTreeMap<(ServiceName, u16), Delivery>,
    pub unmeshed: Unmeshed,
}

/// What a gateway does for workloads that have no sidecar.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Unmeshed {
    /// Which port of which service each TCP port of the gateway leads to.
    pub listeners: BTreeMap<u16, (ServiceName, u16)>,
    /// Services that the listeners lead to, with the shares alone that allow it.
    pub services: BTreeMap<ServiceName, Arc<ServiceView>>,
    /// Addresses of workloads that have a sidecar, and are refused.
    pub meshed: BTreeSet<IpAddr>,
}

/// A cluster to hold tunnels with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerLink {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    pub gateways: Vec<GatewayAddress>,
}

/// Where one port of a service of this cluster is delivered, and to which peers it is offered.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Delivery {
    pub clusters: BTreeSet<ClusterId>,
    pub endpoints: BTreeMap<EndpointId, DeliveryEndpoint>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryEndpoint {
    /// `host:port` of the sidecar's inbound listener.
    pub inbound_address: String,
    pub ready: bool,
}

/// One tunnel, as a gateway reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelReport {
    pub cluster: ClusterId,
    /// `None` before the tunnel has been up for the first time; `Dead` is told as down.
    pub reach: Option<Reach>,
    pub rtt: std::time::Duration,
    pub remote_address: String,
    pub dialled_here: bool,
    pub legs: u32,
    pub last_error: String,
    pub remote_gateway: Option<GatewayId>,
    /// What the far gateway's names resolved to, where this side dials.
    pub addresses: Vec<std::net::SocketAddr>,
    /// Octets of a datagram that the path carries, as far as was found out.
    pub mtu: u32,
}

/// What federation has a gateway do for a peering, whose secrets the gateway never holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeeringCommand {
    /// Dial another cluster's gateway with ALPN `tombolo-peering/1` and report the TLS exporter value.
    Dial { attempt: String, addresses: Vec<String>, root_sha256: [u8; 32], cluster: ClusterId },
    /// Send this over the dialled connection, and report the answer.
    Offer { attempt: String, offer: Vec<u8> },
    /// The answer to a knock: bytes for the caller.
    Verdict { attempt: String, answer: Vec<u8> },
}

/// What a gateway has done of what it was told, and what knocks at its door.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeeringReport {
    Exporter { attempt: String, exporter: Vec<u8> },
    Answer { attempt: String, answer: Vec<u8> },
    Failed { attempt: String, reason: String },
    Knock { attempt: String, exporter: Vec<u8>, offer: Vec<u8>, chain_der: Vec<Vec<u8>> },
}

impl TryFrom<wire::Welcome> for Welcome {
    type Error = InvalidMessage;

    fn try_from(wire: wire::Welcome) -> Result<Self, InvalidMessage> {
        Ok(Self {
            cluster: name("cluster", &wire.cluster)?,
            trust_domain: name("trust domain", &wire.trust_domain)?,
            zone: Some(wire.zone).filter(|zone| !zone.is_empty()),
        })
    }
}

impl TryFrom<wire::Service> for ServiceView {
    type Error = InvalidMessage;

    fn try_from(wire: wire::Service) -> Result<Self, InvalidMessage> {
        let service: ServiceName = name("service", &wire.service)?;
        let mut shares: Vec<ShareView> = bounded("shares", wire.shares)?
            .into_iter()
            .map(|share| share_from_wire(&service, share))
            .collect::<Result<_, _>>()?;
        shares.sort_by(|a, b| a.share.cluster.cmp(&b.share.cluster));
        let numbers = service_numbers(wire.numbers.unwrap_or_default())?;
        Ok(Self { service, shares, numbers, policies: policies_from_wire(wire.policies)? })
    }
}

fn service_numbers(wire: wire::ServiceNumbers) -> Result<ServiceNumbers, InvalidMessage> {
    let number = |number: u32| (number != 0).then_some(Number(number));
    let endpoints = bounded("endpoint numbers", wire.endpoints)?.into_iter().filter_map(|endpoint| {
        let number = number(endpoint.number)?;
        let key = name("cluster", &endpoint.cluster)
            .and_then(|cluster| Ok((cluster, name("endpoint id", &endpoint.endpoint_id)?)));
        Some(key.map(|key| (key, number)))
    });
    Ok(ServiceNumbers { service: number(wire.service), endpoints: endpoints.collect::<Result<_, _>>()? })
}

pub(super) fn address_ranges(wire: &wire::AddressRanges) -> Result<Ranges, String> {
    let ipv4 = wire.ipv4.parse().map_err(|error| format!("address ranges: {error}"))?;
    let ipv6 = wire.ipv6.parse().map_err(|error| format!("address ranges: {error}"))?;
    Ok(Ranges { ipv4, ipv6 })
}

pub(super) fn imported_addresses(
    wire: wire::ImportedAddresses,
) -> Result<BTreeMap<IpAddr, ServiceName>, InvalidMessage> {
    let addresses = bounded("imported addresses", wire.addresses)?.into_iter();
    let one = |one: wire::ImportedAddress| Some((one.address.parse().ok()?, one.service));
    addresses.filter_map(one).map(|(address, service)| Ok((address, name("service", &service)?))).collect()
}

pub(super) fn address_block(wire: &wire::AddressBlock) -> Result<Block, String> {
    let block = Block::new(wire.services, wire.endpoints, &wire.names);
    block.map_err(|error| format!("address block {}: {error}", wire.block))
}

fn share_from_wire(service: &ServiceName, wire: wire::Share) -> Result<ShareView, InvalidMessage> {
    let freshness = wire::Freshness::try_from(wire.freshness).map_or(Freshness::Stale, Freshness::from);
    let export: Export = wire.export.ok_or(InvalidMessage::Missing("export"))?.try_into()?;
    if export.service != *service {
        return Err(InvalidMessage::Value { field: "export", reason: "it names another service than its message" });
    }
    let mut deliveries: BTreeMap<EndpointId, BTreeMap<u16, String>> = BTreeMap::new();
    for delivery in bounded("deliveries", wire.deliveries)? {
        let endpoint = name("endpoint id", &delivery.endpoint_id)?;
        let port = port("delivery port", delivery.port)?;
        deliveries.entry(endpoint).or_default().insert(port, delivery.inbound_address);
    }
    let origin = if wire.local { Origin::Local } else { Origin::Remote };
    Ok(ShareView {
        share: ClusterShare { cluster: name("cluster", &wire.cluster)?, origin, freshness, export },
        deliveries,
    })
}

pub(super) fn local_gateways(wire: wire::LocalGateways) -> Result<Vec<LocalGateway>, InvalidMessage> {
    bounded("gateways", wire.gateways)?
        .into_iter()
        .map(|gateway| {
            Ok(LocalGateway {
                gateway_id: name("gateway id", &gateway.gateway_id)?,
                ingress_address: gateway.ingress_address,
                watch_address: gateway.watch_address,
                spiffe_id: name("gateway identity", &gateway.spiffe_id)?,
            })
        })
        .collect()
}

pub(super) fn inbound_grants(wire: wire::InboundGrants) -> Result<InboundGrants, InvalidMessage> {
    bounded("grants", wire.grants)?
        .into_iter()
        .map(|grant| Ok((name("service", &grant.service)?, clusters(&grant.clusters)?)))
        .collect()
}

pub(super) fn inbound_policies(wire: wire::InboundPolicies) -> Result<(ServiceName, InboundPolicies), InvalidMessage> {
    let service = name("service", &wire.service)?;
    let policies = policies_from_wire(wire.policies)?;
    let access = policies.iter().filter_map(|policy| match policy {
        Policy::Access(policy) => Some(policy.clone()),
        Policy::Route(_) | Policy::Traffic(_) => None,
    });
    let told = InboundPolicies {
        access: access.collect(),
        defaults: defaults_from_wire(wire.deny_by_default, wire.deny_by_default_of)?,
        rate_limit: leading(&policies).and_then(|policy| policy.spec.rate_limit),
        unmeshed: clusters(&wire.unmeshed)?,
    };
    Ok((service, told))
}

pub(super) fn registration_result(
    wire: wire::RegistrationResult,
) -> Result<((ServiceName, u16), RegistrationVerdict), InvalidMessage> {
    let verdict = if wire.refused.is_empty() {
        RegistrationVerdict::Accepted { endpoint_id: name("endpoint id", &wire.endpoint_id)? }
    } else {
        RegistrationVerdict::Refused { reason: wire.refused }
    };
    Ok(((name("service", &wire.service)?, port("port", wire.port)?), verdict))
}

pub(super) fn registration_to_wire(registration: &Registration) -> wire::Registration {
    wire::Registration {
        service: registration.service.to_string(),
        port: registration.port.into(),
        inbound_address: registration.inbound_address.clone(),
        ready: registration.ready,
    }
}

pub(super) fn revoked(wire: wire::Revoked) -> Result<BTreeSet<SpiffeId>, InvalidMessage> {
    bounded("revoked", wire.spiffe_ids)?.iter().map(|id| name("revoked identity", id)).collect()
}

impl TryFrom<wire::GatewayWelcome> for GatewayWelcome {
    type Error = InvalidMessage;

    fn try_from(wire: wire::GatewayWelcome) -> Result<Self, InvalidMessage> {
        Ok(Self {
            cluster: name("cluster", &wire.cluster)?,
            trust_domain: name("trust domain", &wire.trust_domain)?,
            federation_leg_address: wire.federation_leg_address,
        })
    }
}

/// The snapshot without its bundles, which go into the trust store.
pub(super) fn gateway_snapshot(
    peers: Vec<wire::PeerLink>,
    deliveries: Vec<wire::Delivery>,
    unmeshed: wire::Unmeshed,
) -> Result<GatewaySnapshot, InvalidMessage> {
    let peers = bounded("peers", peers)?.into_iter().map(|peer| {
        let link = peer_link(peer)?;
        Ok((link.cluster.clone(), link))
    });
    let deliveries = bounded("deliveries", deliveries)?.into_iter().map(|delivery| {
        let key = (name("service", &delivery.service)?, port("port", delivery.port)?);
        let endpoints = bounded("endpoints", delivery.endpoints)?.into_iter().map(|endpoint| {
            let target = DeliveryEndpoint { inbound_address: endpoint.inbound_address, ready: endpoint.ready };
            Ok((name("endpoint id", &endpoint.endpoint_id)?, target))
        });
        let delivery =
            Delivery { clusters: clusters(&delivery.clusters)?, endpoints: endpoints.collect::<Result<_, _>>()? };
        Ok((key, delivery))
    });
    Ok(GatewaySnapshot {
        peers: peers.collect::<Result<_, _>>()?,
        deliveries: deliveries.collect::<Result<_, _>>()?,
        unmeshed: unmeshed_part(unmeshed)?,
    })
}

fn unmeshed_part(wire: wire::Unmeshed) -> Result<Unmeshed, InvalidMessage> {
    let listeners = bounded("listeners", wire.listeners)?.into_iter().map(|listener| {
        let to = (name("service", &listener.service)?, port("port", listener.port)?);
        Ok((port("listen", listener.listen)?, to))
    });
    let services = bounded("services", wire.services)?.into_iter().map(|service| {
        let view = ServiceView::try_from(service)?;
        Ok((view.service.clone(), Arc::new(view)))
    });
    Ok(Unmeshed {
        listeners: listeners.collect::<Result<_, _>>()?,
        services: services.collect::<Result<_, _>>()?,
        meshed: bounded("meshed", wire.meshed)?.iter().filter_map(|address| address.parse().ok()).collect(),
    })
}

fn peer_link(wire: wire::PeerLink) -> Result<PeerLink, InvalidMessage> {
    let gateways = bounded("gateway addresses", wire.gateways)?.into_iter().map(|gateway| {
        Ok(GatewayAddress { gateway: name("gateway id", &gateway.gateway_id)?, address: gateway.address })
    });
    Ok(PeerLink {
        cluster: name("cluster", &wire.cluster)?,
        trust_domain: name("trust domain", &wire.trust_domain)?,
        gateways: gateways.collect::<Result<_, _>>()?,
    })
}

pub(super) fn tunnels_to_wire(tunnels: &[TunnelReport]) -> wire::TunnelStates {
    let tunnels = tunnels.iter().map(|tunnel| wire::TunnelState {
        cluster: tunnel.cluster.to_string(),
        reach: match tunnel.reach {
            None => wire::Reach::Unknown,
            Some(Reach::Up) => wire::Reach::Up,
            Some(Reach::Suspect) => wire::Reach::Suspect,
            Some(Reach::Dead) => wire::Reach::Down,
        }
        .into(),
        rtt_us: tunnel.rtt.as_micros().try_into().unwrap_or(u32::MAX),
        remote_address: tunnel.remote_address.clone(),
        dialled_here: tunnel.dialled_here,
        legs: tunnel.legs,
        last_error: tunnel.last_error.clone(),
        mtu: tunnel.mtu,
        remote_gateway_id: tunnel.remote_gateway.as_ref().map(ToString::to_string).unwrap_or_default(),
        resolved: tunnel.addresses.iter().map(ToString::to_string).collect(),
    });
    wire::TunnelStates { tunnels: tunnels.collect() }
}

pub(super) fn peering_command(kind: wire::gateway_update::Kind) -> Result<Option<PeeringCommand>, InvalidMessage> {
    use wire::gateway_update::Kind;
    Ok(match kind {
        Kind::PeeringDial(dial) => Some(PeeringCommand::Dial {
            attempt: dial.attempt,
            addresses: bounded("addresses", dial.addresses)?,
            root_sha256: dial
                .root_sha256
                .try_into()
                .map_err(|_| InvalidMessage::Value { field: "root_sha256", reason: "not 32 octets" })?,
            cluster: name("cluster", &dial.cluster)?,
        }),
        Kind::PeeringOffer(offer) => Some(PeeringCommand::Offer { attempt: offer.attempt, offer: offer.offer }),
        Kind::PeeringVerdict(verdict) => {
            Some(PeeringCommand::Verdict { attempt: verdict.attempt, answer: verdict.answer })
        }
        Kind::Welcome(_) | Kind::Snapshot(_) | Kind::Revoked(_) => None,
    })
}

pub(super) fn peering_report_to_wire(report: PeeringReport) -> wire::gateway_request::Kind {
    use wire::gateway_request::Kind;
    match report {
        PeeringReport::Exporter { attempt, exporter } => Kind::Exporter(wire::PeeringExporter { attempt, exporter }),
        PeeringReport::Answer { attempt, answer } => Kind::Answer(wire::PeeringAnswer { attempt, answer }),
        PeeringReport::Failed { attempt, reason } => Kind::Failed(wire::PeeringFailed { attempt, reason }),
        PeeringReport::Knock { attempt, exporter, offer, chain_der } => {
            Kind::Knock(wire::PeeringKnock { attempt, exporter, offer, chain_der })
        }
    }
}

fn clusters(names: &[String]) -> Result<BTreeSet<ClusterId>, InvalidMessage> {
    names.iter().map(|cluster| name("cluster", cluster)).collect()
}

fn bounded<T>(field: &'static str, list: Vec<T>) -> Result<Vec<T>, InvalidMessage> {
    if list.len() > LIST_MAX {
        return Err(InvalidMessage::Value { field, reason: "more than 100,000 entries" });
    }
    Ok(list)
}
