//! `status` and `peer list`, out of one reading of the hub's state.

use std::net::SocketAddr;

use data_encoding::HEXLOWER;
use tombolo_api::proto::operator::{
    GatewayRow, PeerRow, RootRow, ServiceRow, ServiceShareRow, SidecarRow, SourceProblem, StatusResponse, TunnelRow,
    UnmatchedPolicy,
};
use tombolo_core::addresses::ports::PortOwner;
use tombolo_core::catalog::ServiceView;
use tombolo_core::id::{ClusterId, GatewayId, ServiceName};
use tombolo_core::model::{AppProtocol, ClusterShare, Freshness, Origin, ServicePort, Transport};
use tombolo_core::policy::Resource;
use tombolo_trust::bundle::Bundle;
use tombolo_trust::ca::CertificateAuthority;

use crate::hub::{GatewayView, PeerView, SidecarView, TunnelView, View};
use crate::kubernetes::{Lead, NotLeading};
use crate::registry::Verdict;

pub fn status(view: &View, ca: &CertificateAuthority, lead: &Lead, surroundings: Surroundings) -> StatusResponse {
    let leads = lead.check();
    let nobody = SourceProblem {
        file: "Lease tombolo-federation".into(),
        line: 0,
        reason:
            "it can't be renewed or taken: no replica is known to lead, so that nothing is written or published; what \
                 was known last stays in force. Check that the API server answers"
                .into(),
    };
    let nobody = (leads == Err(NotLeading::Nobody)).then_some(nobody);
    StatusResponse {
        cluster: view.cluster.to_string(),
        trust_domain: view.trust_domain.to_string(),
        version: surroundings.version.into(),
        epoch: view.epoch,
        root_sha256: HEXLOWER.encode(&ca.active_root_sha256()),
        bundle_sequence: ca.bundle().sequence(),
        peers: peers(view),
        services: view.services.values().map(|service| self::service(view, service)).collect(),
        gateways: view.gateways.values().map(|gateway| self::gateway(gateway)).collect(),
        sidecars: view.sidecars.values().map(|sidecar| self::sidecar(sidecar)).collect(),
        problems: view
            .problems
            .iter()
            .map(|problem| SourceProblem {
                file: problem.file.clone(),
                line: problem.line,
                reason: problem.reason.clone(),
            })
            .chain(nobody)
            .collect(),
        revoked: view.revoked.iter().map(ToString::to_string).collect(),
        revocation_sequence: view.revocation_sequence,
        leader: match leads {
            Ok(()) => "this replica".into(),
            Err(NotLeading::Other(holder)) => holder,
            Err(NotLeading::Nobody) => "nobody".into(),
        },
        roots: view.bundles.iter().flat_map(|(cluster, bundle)| roots(view, cluster, bundle)).collect(),
        unmatched_policies: unmatched_policies(view),
        dns_address: surroundings.dns.map(|address| address.to_string()).unwrap_or_default(),
        kubernetes: surroundings.kubernetes,
    }
}

/// What does not change while the process runs.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings {
    /// What is shown as this program's version.
    pub version: &'static str,
    /// Where names of the clusterset are answered.
    pub dns: Option<SocketAddr>,
    /// The source is an API server.
    pub kubernetes: bool,
}

fn roots<'a>(view: &'a View, cluster: &'a ClusterId, bundle: &Bundle) -> impl Iterator<Item = RootRow> + use<'a> {
    let expires = bundle.roots_expire().into_iter();
    expires.map(move |expires| RootRow {
        cluster: cluster.to_string(),
        own: *cluster == view.cluster,
        expires_unix_ms: expires.as_millisecond(),
    })
}

fn unmatched_policies(view: &View) -> Vec<UnmatchedPolicy> {
    let unmatched = view.policies.unmatched(|service| view.services.contains_key(service));
    let row = |(policy, service): (&Resource, &ServiceName)| UnmatchedPolicy {
        policy: policy.to_string(),
        service: service.to_string(),
    };
    unmatched.into_iter().map(row).collect()
}

pub fn peers(view: &View) -> Vec<PeerRow> {
    view.peers.values().map(|peer| self::peer(view, peer)).collect()
}

fn peer(view: &View, peer: &PeerView) -> PeerRow {
    let tunnels = view.gateways.values().flat_map(|gateway| {
        let tunnels = gateway.tunnels.iter().filter(|tunnel| tunnel.cluster == peer.cluster);
        tunnels.map(|tunnel| self::tunnel(&gateway.gateway, tunnel))
    });
    let silent = peer.last_heard.map(|heard| heard.elapsed().as_millis());
    PeerRow {
        cluster: peer.cluster.to_string(),
        trust_domain: peer.trust_domain.to_string(),
        exports: peer.authority.exports.iter().map(ToString::to_string).collect(),
        imports: peer.authority.imports.iter().map(ToString::to_string).collect(),
        sync: peer.freshness.map_or("waiting", freshness).into(),
        epoch: peer.position.epoch,
        revision: peer.position.revision,
        silent_ms: silent.map_or(-1, |silent| i64::try_from(silent).unwrap_or(i64::MAX)),
        bundle_sequence: peer.bundle_sequence,
        tunnels: tunnels.collect(),
        gateways: peer.gateways.iter().map(|gateway| format!("{} {}", gateway.gateway, gateway.address)).collect(),
        last_refusal: peer.last_refusal.clone().unwrap_or_default(),
        refused_there: peer.refused_there.clone().unwrap_or_default(),
        clock_ahead_ms: peer.clock_ahead_ms,
    }
}

fn tunnel(gateway: &GatewayId, tunnel: &TunnelView) -> TunnelRow {
    TunnelRow {
        gateway_id: gateway.to_string(),
        remote_gateway_id: tunnel.remote_gateway.as_ref().map(ToString::to_string).unwrap_or_default(),
        reach: tunnel.reach.as_str().into(),
        rtt_us: tunnel.rtt_us,
        remote_address: tunnel.remote_address.clone(),
        dialled_here: tunnel.dialled_here,
        legs: tunnel.legs,
        last_error: tunnel.last_error.clone(),
        resolved: tunnel.resolved.iter().map(ToString::to_string).collect(),
        mtu: tunnel.mtu,
    }
}

fn service(whole: &View, view: &ServiceView) -> ServiceRow {
    let [first, last] = [0, u16::MAX].map(|port| PortOwner { service: view.service.clone(), port });
    let listeners = whole.addresses.iter().flat_map(|addresses| addresses.listeners.range(&first..=&last));
    ServiceRow {
        listeners: listeners.map(|(owner, listen)| (owner.port.into(), (*listen).into())).collect(),
        service: view.service.to_string(),
        shares: view.shares.iter().map(|share| self::share(view, share)).collect(),
        conflicts: view.conflicts.iter().map(ToString::to_string).collect(),
        excluded: view.excluded.iter().map(ToString::to_string).collect(),
    }
}

fn share(view: &ServiceView, share: &ClusterShare) -> ServiceShareRow {
    let local = share.origin == Origin::Local;
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    ServiceShareRow {
        cluster: share.cluster.to_string(),
        local,
        freshness: freshness(share.freshness).into(),
        endpoints: count(share.export.endpoints.len()),
        ready: count(share.export.ready_endpoints()),
        ports: share.export.ports.iter().map(port).collect(),
        exported_to: if local { view.offered_to.iter().map(ToString::to_string).collect() } else { Vec::new() },
        server_ids: share.export.server_ids.iter().map(ToString::to_string).collect(),
        // What another cluster does not export is not known here.
        exported: !local || view.exported,
    }
}

/// `http:80/http`, or `53/udp` for a port without a name that carries opaque bytes.
fn port(port: &ServicePort) -> String {
    let protocol = match (port.transport, port.app) {
        (Transport::Udp, _) => "udp",
        (Transport::Sctp, _) => "sctp",
        (Transport::Tcp, AppProtocol::Opaque) => "tcp",
        (Transport::Tcp, AppProtocol::Http) => "http",
        (Transport::Tcp, AppProtocol::Http2) => "http2",
        (Transport::Tcp, AppProtocol::Grpc) => "grpc",
        (Transport::Tcp, AppProtocol::Tls) => "tls",
        (Transport::Tcp, AppProtocol::Detect) => "detect",
    };
    match port.name.as_str() {
        "" => format!("{}/{protocol}", port.port),
        name => format!("{name}:{}/{protocol}", port.port),
    }
}

fn gateway(view: &GatewayView) -> GatewayRow {
    GatewayRow {
        gateway_id: view.gateway.to_string(),
        ingress_address: view.ingress_address.clone(),
        advertise: view.advertise.clone(),
        connected: view.connected,
        unmeshed_address: view.unmeshed_address.map(|address| address.to_string()).unwrap_or_default(),
        tunnels: view.tunnels.iter().map(|tunnel| self::tunnel(&view.gateway, tunnel)).collect(),
    }
}

fn sidecar(view: &SidecarView) -> SidecarRow {
    let in_force = || view.registrations.iter().filter(|registration| registration.refused.is_none());
    let service = |registration: &Verdict| match &registration.refused {
        None => format!("{}:{}", registration.service, registration.port),
        Some(reason) => format!("{}:{} (refused: {reason})", registration.service, registration.port),
    };
    SidecarRow {
        instance: view.instance.to_string(),
        spiffe_id: view.spiffe_id.to_string(),
        services: view.registrations.iter().map(service).collect(),
        ready: u32::try_from(in_force().filter(|registration| registration.ready).count()).unwrap_or(u32::MAX),
        registered: u32::try_from(in_force().count()).unwrap_or(u32::MAX),
    }
}

fn freshness(freshness: Freshness) -> &'static str {
    match freshness {
        Freshness::Fresh => "fresh",
        Freshness::Stale => "stale",
        Freshness::Draining => "draining",
    }
}
