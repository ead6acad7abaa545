//! What a gateway says of its tunnels: to its federation, and on the admin port.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tombolo_core::id::{ClusterId, GatewayId};
use tombolo_core::liveness::Reach;
use tombolo_leg::discovery::{GatewayDiscovery, LinkStatus, TunnelReport};

use crate::gateway::Gateway;
use crate::meters::Meters;

/// Legs and round trips change without an event.
const REFRESH: Duration = Duration::from_secs(1);
/// Changes that come close together are reported as one.
const SETTLE: Duration = Duration::from_millis(20);

/// Keeps the federation informed until it is dropped.
pub async fn report_tunnels(gateway: Arc<Gateway>, discovery: GatewayDiscovery) {
    let mut changed = gateway.registry.subscribe();
    loop {
        changed.borrow_and_update();
        discovery.report_tunnels(tunnels(&gateway));
        tokio::select! {
            _ = changed.changed() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(REFRESH) => {}
        }
    }
}

/// Counts whether the federation answers, until it is dropped.
pub async fn follow_federation(meters: Meters, mut status: watch::Receiver<LinkStatus>) {
    loop {
        {
            let status = status.borrow_and_update();
            meters.federation_connected.set(status.connected.into());
            meters.federation_remembered.set(status.remembered.is_some().into());
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

/// Every tunnel that is up, and every gateway of a peer that can't be dialled.
fn tunnels(gateway: &Gateway) -> Vec<TunnelReport> {
    let tunnels = gateway.registry.all();
    let linked: BTreeSet<_> =
        tunnels.iter().map(|tunnel| (tunnel.remote.cluster.clone(), tunnel.remote.gateway.clone())).collect();
    let dials = gateway.dials.lock().expect("nothing panics while it notes a dial").clone();
    let up = tunnels.iter().map(|tunnel| {
        let remote = &tunnel.remote;
        // A tunnel stands while another one is dialled at the gateway's new address.
        let dial = dials.get(&(remote.cluster.clone(), remote.gateway.clone())).filter(|_| tunnel.dialled_here);
        let dial = dial.cloned().unwrap_or_default();
        TunnelReport {
            cluster: remote.cluster.clone(),
            reach: Some(if tunnel.is_remote_draining() { Reach::Suspect } else { tunnel.reach() }),
            rtt: tunnel.rtt(),
            remote_address: tunnel.remote_address().to_string(),
            dialled_here: tunnel.dialled_here,
            legs: tunnel.legs(),
            last_error: dial.error.unwrap_or_default(),
            remote_gateway: Some(remote.gateway.clone()),
            addresses: dial.addresses,
            mtu: tunnel.mtu(),
        }
    });
    let snapshot = gateway.snapshot();
    let is_linked = |cluster: &ClusterId, remote: &GatewayId| match remote.is_declared() {
        true => linked.iter().any(|(linked, _)| linked == cluster),
        false => linked.contains(&(cluster.clone(), remote.clone())),
    };
    let failing = dials.iter().filter(|((cluster, remote), dial)| {
        dial.error.is_some() && snapshot.peers.contains_key(cluster) && !is_linked(cluster, remote)
    });
    let down = failing.map(|((cluster, remote), dial)| TunnelReport {
        cluster: cluster.clone(),
        reach: Some(Reach::Dead),
        rtt: Duration::ZERO,
        remote_address: String::new(),
        dialled_here: true,
        legs: 0,
        last_error: dial.error.clone().unwrap_or_default(),
        remote_gateway: Some(remote.clone()),
        addresses: dial.addresses.clone(),
        mtu: 0,
    });
    up.chain(down).collect()
}

/// The state that the admin port shows.
pub fn state(gateway: &Gateway, federation: &LinkStatus) -> Value {
    let snapshot = gateway.snapshot();
    let tunnels = tunnels(gateway).into_iter().map(|tunnel| {
        json!({
            "cluster": tunnel.cluster,
            "gateway": tunnel.remote_gateway,
            "reach": tunnel.reach.map(|reach| format!("{reach:?}").to_lowercase()),
            "rttMicroseconds": u64::try_from(tunnel.rtt.as_micros()).unwrap_or(u64::MAX),
            "address": tunnel.remote_address,
            "dialledHere": tunnel.dialled_here,
            "legs": tunnel.legs,
            "mtu": tunnel.mtu,
            "lastError": tunnel.last_error,
            "resolved": tunnel.addresses,
        })
    });
    let deliveries = snapshot.deliveries.iter().map(|((service, port), delivery)| {
        json!({
            "service": service,
            "port": port,
            "offeredTo": delivery.clusters,
            "endpoints": delivery.endpoints.iter().map(|(id, endpoint)| json!({
                "id": id, "inbound": endpoint.inbound_address, "ready": endpoint.ready,
            })).collect::<Vec<_>>(),
        })
    });
    json!({
        "gateway": gateway.settings.id,
        "cluster": snapshot.cluster,
        "trustDomain": snapshot.trust_domain,
        "federation": {
            "connected": federation.connected,
            "stale": !federation.connected,
            "remembered": federation.remembered.map(|at| at.to_string()),
            "lastError": federation.last_error,
        },
        "draining": gateway.drain.is_draining(),
        "legs": gateway.legs(),
        "stalledLegs": gateway.stalls.stalled(),
        "peers": snapshot.peers.keys().collect::<Vec<_>>(),
        "tunnels": tunnels.collect::<Vec<_>>(),
        "deliveries": deliveries.collect::<Vec<_>>(),
    })
}
