//! What the admin port shows of the hub's state, and the gauges that follow it. No secrets.

use serde_json::{Value, json};
use tombolo_core::catalog::ServiceView;
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::metrics::prometheus_client::metrics::family::Family;
use tombolo_runtime::metrics::prometheus_client::metrics::gauge::Gauge;

use crate::hub::{GatewayView, HubHandle, PeerView, SidecarView, View};

/// The state as JSON.
pub fn state(view: &View) -> Value {
    json!({
        "cluster": view.cluster,
        "trustDomain": view.trust_domain,
        "epoch": view.epoch,
        "generation": view.generation,
        "services": view.services.values().map(|one| service(one)).collect::<Vec<_>>(),
        "peers": view.peers.values().map(|one| peer(one)).collect::<Vec<_>>(),
        "gateways": view.gateways.values().map(|one| gateway(one)).collect::<Vec<_>>(),
        "sidecars": view.sidecars.values().map(|one| sidecar(one)).collect::<Vec<_>>(),
        "bundles": view.bundles.iter().map(|(cluster, bundle)| json!({
            "cluster": cluster,
            "trustDomain": bundle.trust_domain(),
            "sequence": bundle.sequence(),
            "roots": bundle.roots().len(),
        })).collect::<Vec<_>>(),
        "revoked": &*view.revoked,
        "problems": &*view.problems,
    })
}

fn service(view: &ServiceView) -> Value {
    json!({
        "service": view.service,
        "exported": view.exported,
        "offeredTo": view.offered_to,
        "excluded": view.excluded,
        "conflicts": view.conflicts,
        "shares": view.shares.iter().map(|share| json!({
            "cluster": share.cluster,
            "origin": share.origin,
            "freshness": share.freshness,
            "endpoints": share.export.endpoints.len(),
            "ready": share.export.ready_endpoints(),
        })).collect::<Vec<_>>(),
    })
}

fn peer(view: &PeerView) -> Value {
    json!({
        "cluster": view.cluster,
        "trustDomain": view.trust_domain,
        "exports": view.authority.exports,
        "imports": view.authority.imports,
        "gateways": &*view.gateways,
        "bundleSequence": view.bundle_sequence,
        "freshness": view.freshness,
        "position": view.position,
        "silentMs": view.last_heard.map(|heard| heard.elapsed().as_millis().min(u128::from(u64::MAX)) as u64),
        "lastRefusal": view.last_refusal,
        "refusedExports": view.refused_exports,
        "published": view.published,
        "acked": view.acked,
        "refusedThere": view.refused_there,
    })
}

fn gateway(view: &GatewayView) -> Value {
    json!({
        "gateway": view.gateway,
        "connected": view.connected,
        "advertise": view.advertise,
        "ingress": view.ingress_address,
        "bundlesInForce": view.bundles_in_force,
        "tunnels": view.tunnels.iter().map(|tunnel| json!({
            "cluster": tunnel.cluster,
            "reach": tunnel.reach.as_str(),
            "rttUs": tunnel.rtt_us,
            "remoteAddress": tunnel.remote_address,
            "dialledHere": tunnel.dialled_here,
            "legs": tunnel.legs,
            "lastError": tunnel.last_error,
            "resolved": tunnel.resolved,
        })).collect::<Vec<_>>(),
    })
}

fn sidecar(view: &SidecarView) -> Value {
    json!({
        "instance": view.instance,
        "spiffeId": view.spiffe_id,
        "connected": view.connected,
        "bundlesInForce": view.bundles_in_force,
        "registrations": view.registrations.iter().map(|verdict| json!({
            "service": verdict.service,
            "port": verdict.port,
            "ready": verdict.ready,
            "refused": verdict.refused,
            "endpoint": verdict.endpoint,
        })).collect::<Vec<_>>(),
    })
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    peer: String,
}

/// Keeps the gauges at what the hub's view says, until the hub ends.
pub async fn follow(hub: HubHandle, metrics: Metrics) {
    let services = metrics.gauge("tombolo_services", "Services known, own and imported");
    let problems = metrics.gauge("tombolo_source_problems", "Problems of the source");
    let gateways = metrics.gauge("tombolo_gateways_connected", "Gateways of this cluster that are connected");
    let sidecars = metrics.gauge("tombolo_sidecars_connected", "Sidecars of this cluster that are connected");
    let per_peer = |name, help| metrics.gauges::<PeerLabels>(name, help);
    let held = per_peer("tombolo_sync_revision_held", "Revision held of the peer");
    let published = per_peer("tombolo_sync_revision_published", "Revision published to the peer");
    let acked = per_peer("tombolo_sync_revision_acked", "Revision that the peer has acknowledged");
    let fresh = per_peer("tombolo_peer_fresh", "1 while what is known of the peer is fresh");
    let mut changes = hub.changes();
    loop {
        changes.borrow_and_update();
        let view = hub.view();
        set(&services, view.services.len());
        set(&problems, view.problems.len());
        set(&gateways, view.gateways.values().filter(|gateway| gateway.connected).count());
        set(&sidecars, view.sidecars.values().filter(|sidecar| sidecar.connected).count());
        for family in [&held, &published, &acked, &fresh] {
            family.clear();
        }
        for peer in view.peers.values() {
            let is_fresh = peer.freshness == Some(tombolo_core::model::Freshness::Fresh);
            set_peer(&held, peer, peer.position.revision);
            set_peer(&published, peer, peer.published.revision);
            set_peer(&acked, peer, peer.acked.revision);
            set_peer(&fresh, peer, u64::from(is_fresh));
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

fn set(gauge: &Gauge, count: usize) {
    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
}

fn set_peer(family: &Family<PeerLabels, Gauge>, peer: &PeerView, value: u64) {
    let labels = PeerLabels { peer: peer.cluster.to_string() };
    family.get_or_create_owned(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
}
