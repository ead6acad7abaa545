//! How tunnels come and go.

use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tombolo_core::liveness::{LivenessConfig, Reach};
use tombolo_core::refusal::Refusal;
use tombolo_gateway::tunnel::endpoint::EndpointKeys;

use crate::support::*;

#[tokio::test]
async fn one_dialling_side_is_enough_for_both_to_open_legs() {
    // West is behind a NAT: east has no address of it.
    let mut pair = Pair::linked().await;
    pair.west_node.delivers("shop/cart", 81, Sidecar::new().await.echo(), &[&pair.east]);
    echoes(&mut pair.west_node.accepted(WEB).await, "west to east").await;
    echoes(&mut pair.east_node.accepted("81.cart.shop.svc.west").await, "east to west").await;
    assert_eq!(pair.east_node.gateway().registry.all().len(), 1);
}

/// Loopback carries more than 9,000 octets.
#[tokio::test]
async fn a_path_that_carries_jumbo_frames_is_found_out() {
    let pair = Pair::linked().await;
    let jumbo = |node: &Node| node.gateway().registry.all().iter().all(|tunnel| tunnel.mtu() == 9_000 - 40 - 8);
    eventually("both send what the path carries", || jumbo(&pair.west_node) && jumbo(&pair.east_node)).await;
}

#[tokio::test]
async fn at_a_declared_address_any_gateway_of_the_peer_is_right() {
    let (east, west, north) = (Cluster::new("east"), Cluster::new("west"), Cluster::new("north"));
    let mut east_node = Node::start(&east, "gw-e", &[&west]).await;
    let north_node = Node::start(&north, "gw-n", &[&west]).await;
    let mut west_node = Node::start(&west, "gw-w", &[&east, &north]).await;
    east_node.delivers("shop/web", 80, Sidecar::new().await.echo(), &[&west]);
    west_node.dials_at(&east, "declared-1", east_node.tunnel);
    west_node.linked(&east).await;
    echoes(&mut west_node.accepted(WEB).await, "west to east").await;
    // A gateway of another cluster is never right.
    west_node.dials_at(&north, "declared-1", east_node.tunnel);
    let failed = |node: &Node| {
        node.gateway().dials.lock().unwrap().iter().any(|((to, _), dial)| *to == north.id && dial.error.is_some())
    };
    eventually("the wrong cluster is refused", || failed(&west_node)).await;
    assert!(north_node.gateway().registry.all().is_empty());
    assert_eq!(east_node.gateway().registry.all().len(), 1);
}

#[tokio::test]
async fn both_sides_dial_and_settle_on_one_tunnel() {
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let mut east_node = Node::start(&east, "gw-e", &[&west]).await;
    let mut west_node = Node::start(&west, "gw-w", &[&east]).await;
    east_node.delivers("shop/web", 80, Sidecar::new().await.echo(), &[&west]);
    west_node.dials(&east, &[&east_node]);
    east_node.dials(&west, &[&west_node]);
    west_node.linked(&east).await;
    east_node.linked(&west).await;
    for _ in 0..20 {
        echoes(&mut west_node.accepted(WEB).await, "either way").await;
    }
    let taking = |node: &Node| node.gateway().registry.all().iter().filter(|tunnel| !tunnel.is_surplus()).count();
    eventually("one takes the legs", || taking(&east_node) == 1 && taking(&west_node) == 1).await;
    eventually("the other is closed", || east_node.gateway().registry.all().len() == 1).await;
    echoes(&mut west_node.accepted(WEB).await, "after settling").await;
}

#[tokio::test]
async fn three_clusters_reach_each_other() {
    let clusters = ["east", "north", "west"].map(Cluster::new);
    let mut nodes = Vec::new();
    for (at, cluster) in clusters.iter().enumerate() {
        let peers: Vec<_> = clusters.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, c)| c).collect();
        let mut node = Node::start(cluster, &format!("gw-{at}"), &peers).await;
        node.delivers("shop/web", 80, Sidecar::new().await.echo(), &peers);
        nodes.push(node);
    }
    // Each dials those before it.
    for at in 1..3 {
        let (before, rest) = nodes.split_at_mut(at);
        for (other, node) in before.iter().enumerate() {
            rest[0].dials(&clusters[other], &[node]);
        }
    }
    for (from, node) in nodes.iter().enumerate() {
        for (to, cluster) in clusters.iter().enumerate() {
            if from != to {
                node.linked(cluster).await;
                echoes(&mut node.accepted(&format!("80.web.shop.svc.{}", cluster.id)).await, "across").await;
            }
        }
    }
}

#[tokio::test]
async fn a_restarted_gateway_is_dialled_again() {
    let mut pair = Pair::linked().await;
    let address = pair.east_node.tunnel;
    let served_by = pair.east_node.snapshot.deliveries.clone();
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "before").await;
    drop(pair.east_node);
    let lost = tokio::time::timeout(Duration::from_secs(20), leg.read(&mut [0; 8])).await.unwrap();
    assert!(lost.is_err(), "a lost tunnel resets its legs");
    assert_eq!(pair.west_node.refused(WEB).await, Refusal::NoTunnel);
    let options = NodeOptions { tunnel: address, ..Default::default() };
    pair.east_node = Node::start_with(&pair.east, "gw-e", &[&pair.west], options).await;
    pair.east_node.snapshot.deliveries = served_by;
    pair.east_node.gateway().set_snapshot(pair.east_node.snapshot.clone());
    pair.west_node.linked(&pair.east).await;
    echoes(&mut pair.west_node.accepted(WEB).await, "after").await;
}

#[tokio::test]
async fn a_removed_peer_loses_its_tunnels_at_once() {
    let mut pair = Pair::linked().await;
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "before").await;
    // Either the link or the bundle is enough.
    pair.east_node.snapshot.peers.clear();
    let start = Instant::now();
    pair.east_node.gateway().set_snapshot(pair.east_node.snapshot.clone());
    assert!(leg.read(&mut [0; 8]).await.is_err());
    assert!(start.elapsed() < Duration::from_secs(1));
    eventually("refused at the door", || pair.east_node.refusals(Refusal::UnknownCluster) > 1).await;
    assert_eq!(pair.east_node.gateway().registry.reach(&pair.west.id), None);
}

#[tokio::test]
async fn a_revoked_or_untrusted_gateway_loses_its_tunnels_at_once() {
    let pair = Pair::linked().await;
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "before").await;
    pair.east_node.trust.set_revoked([pair.west.spiffe_id("tombolo/gateway/gw-w")].into());
    assert!(leg.read(&mut [0; 8]).await.is_err());
    eventually("refused at the door", || pair.east_node.refusals(Refusal::Revoked) > 1).await;
    pair.east_node.trust.set_revoked([].into());
    pair.west_node.linked(&pair.east).await;
    pair.west_node.trust.replace_all(vec![pair.west.bundle()]);
    eventually("closed", || pair.west_node.gateway().registry.all().is_empty()).await;
}

#[tokio::test]
async fn a_renewed_svid_renews_the_tunnel_and_keeps_its_legs() {
    let pair = Pair::linked().await;
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "first").await;
    let first = pair.west_node.gateway().registry.all()[0].number;
    let path = "tombolo/gateway/gw-w";
    pair.west_node.svid.set(pair.west.svid_at(path, LIFE, jiff::Timestamp::now()));
    let registry = &pair.west_node.gateway().registry;
    eventually("a newer tunnel takes over", || {
        registry.usable(&pair.east.id, &"gw-e".parse().unwrap()).is_some_and(|tunnel| tunnel.number > first)
    })
    .await;
    echoes(&mut leg, "over the old one").await;
    echoes(&mut pair.west_node.accepted(WEB).await, "over the new one").await;
    assert_eq!(registry.all().len(), 2);
    drop(leg);
    eventually("the old one is closed", || registry.all().len() == 1).await;
}

#[tokio::test]
async fn short_lived_svids_of_both_sides_never_interrupt_a_leg() {
    let life = Duration::from_secs(4);
    let pair = Pair::linked().await;
    let mut leg = pair.west_node.accepted(WEB).await;
    for round in 0..12 {
        for (cluster, node, gateway) in [(&pair.east, &pair.east_node, "gw-e"), (&pair.west, &pair.west_node, "gw-w")] {
            let path = format!("tombolo/gateway/{gateway}");
            if round % 4 == 0 {
                node.svid.set(cluster.svid_at(&path, life, jiff::Timestamp::now()));
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        echoes(&mut leg, "old leg").await;
        echoes(&mut pair.west_node.accepted(WEB).await, "new leg").await;
        echoes(&mut pair.east_node.accepted(WEB).await, "own leg").await;
    }
}

#[tokio::test]
async fn a_drain_is_told_first_and_waits_for_its_legs() {
    let mut pair = Pair::linked().await;
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "before").await;
    let trigger = pair.east_node.drain.take().unwrap();
    let drained = tokio::spawn(trigger.drain(Duration::from_secs(15)));
    eventually("the peer knows", || pair.west_node.gateway().registry.all().iter().all(|t| t.is_remote_draining()))
        .await;
    assert_eq!(pair.west_node.gateway().registry.reach(&pair.east.id), Some(Reach::Suspect));
    let refused = pair.west_node.refused(WEB).await;
    assert!(matches!(refused, Refusal::NoTunnel | Refusal::Draining), "{refused:?}");
    assert_eq!(pair.east_node.refused(WEB).await, Refusal::Draining);
    echoes(&mut leg, "still carried").await;
    assert!(!drained.is_finished());
    drop(leg);
    assert_eq!(drained.await.unwrap(), tombolo_runtime::drain::DrainOutcome::Clean);
}

/// West dials east over a path that can be cut. East keeps its keys in the folder.
async fn linked_by_path(keys: &std::path::Path, liveness: LivenessConfig) -> (Pair, Path) {
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let options = NodeOptions { keys: EndpointKeys::load_or_create(keys).unwrap(), ..Default::default() };
    let mut east_node = Node::start_with(&east, "gw-e", &[&west], options).await;
    let options = NodeOptions { liveness, ..Default::default() };
    let mut west_node = Node::start_with(&west, "gw-w", &[&east], options).await;
    east_node.delivers("shop/web", 80, Sidecar::new().await.echo(), &[&west]);
    let path = Path::to(east_node.tunnel).await;
    west_node.dials_at(&east, "gw-e", path.address);
    west_node.linked(&east).await;
    east_node.linked(&west).await;
    (Pair { east, west, east_node, west_node }, path)
}

#[tokio::test]
async fn a_silent_path_is_suspect_within_a_second_and_keeps_its_legs() {
    let folder = tempfile::tempdir().unwrap();
    let (pair, path) = linked_by_path(folder.path(), LivenessConfig::default()).await;
    let registry = &pair.west_node.gateway().registry;
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "before").await;
    path.cut();
    let start = Instant::now();
    eventually("suspect", || registry.reach(&pair.east.id) == Some(Reach::Suspect)).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    let start = Instant::now();
    assert_eq!(pair.west_node.refused(WEB).await, Refusal::NoTunnel);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    path.restore();
    eventually("up again", || registry.reach(&pair.east.id) == Some(Reach::Up)).await;
    echoes(&mut leg, "the same leg").await;
    echoes(&mut pair.west_node.accepted(WEB).await, "a new leg").await;
}

#[tokio::test]
async fn a_dead_tunnel_resets_the_legs_that_waited_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let liveness = LivenessConfig { dead_after: Duration::from_secs(2), ..LivenessConfig::default() };
    let (pair, path) = linked_by_path(folder.path(), liveness).await;
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "before").await;
    path.cut();
    let start = Instant::now();
    let end = tokio::time::timeout(Duration::from_secs(20), leg.read(&mut [0; 8])).await.unwrap();
    assert!(end.is_err(), "a reset, and no orderly end");
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
}

#[tokio::test]
async fn where_nobody_listens_any_more_the_tunnel_is_suspect_at_once() {
    let folder = tempfile::tempdir().unwrap();
    // Silence alone would take far too long.
    let patient = LivenessConfig { suspect_after: Duration::from_secs(300), ..LivenessConfig::default() };
    let (pair, path) = linked_by_path(folder.path(), patient).await;
    let registry = &pair.west_node.gateway().registry;
    echoes(&mut pair.west_node.accepted(WEB).await, "before").await;
    path.cut();
    let (ingress, opening) = (pair.west_node.ingress, tokio::time::sleep(Duration::from_millis(300)));
    let mut leg = tokio::spawn(async move { open(ingress, WEB).await.1.unwrap_err().refusal });
    tokio::select! {
        refusal = &mut leg => panic!("refused before anything was said: {refusal:?}"),
        () = opening => {}
    }
    path.vanish();
    eventually("suspect", || registry.reach(&pair.east.id) == Some(Reach::Suspect)).await;
    // The leg that was being opened does not wait for its answer any longer.
    assert_eq!(leg.await.unwrap(), Refusal::NoTunnel);
    assert_eq!(registry.all().len(), 1, "such a message can be forged: nothing is closed for it");
}

#[tokio::test]
async fn a_killed_gateway_ends_its_old_tunnels_when_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let (pair, path) = linked_by_path(folder.path(), LivenessConfig::default()).await;
    let mut leg = pair.west_node.accepted(WEB).await;
    echoes(&mut leg, "before").await;
    // Nothing that a dying process would say gets out.
    path.cut();
    let address = pair.east_node.tunnel;
    let served_by = pair.east_node.snapshot.deliveries.clone();
    drop(pair.east_node);
    let keys = EndpointKeys::load_or_create(folder.path()).unwrap();
    let options = NodeOptions { tunnel: address, keys, ..Default::default() };
    let mut again = Node::start_with(&pair.east, "gw-e", &[&pair.west], options).await;
    again.snapshot.deliveries = served_by;
    again.gateway().set_snapshot(again.snapshot.clone());
    path.restore();
    let start = Instant::now();
    assert!(leg.read(&mut [0; 8]).await.is_err());
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    pair.west_node.linked(&pair.east).await;
    echoes(&mut pair.west_node.accepted(WEB).await, "after").await;
}

#[tokio::test]
async fn a_gateway_under_another_id_is_not_taken_for_the_one_dialled() {
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let east_node = Node::start(&east, "gw-e", &[&west]).await;
    let mut west_node = Node::start(&west, "gw-w", &[&east]).await;
    west_node.dials_at(&east, "gw-other", east_node.tunnel);
    eventually("said why", || dial_error(&west_node, "gw-e, not gw-other")).await;
    assert!(west_node.gateway().registry.all().is_empty());
}

fn dial_error(node: &Node, part: &str) -> bool {
    let dials = node.gateway().dials.lock().unwrap();
    dials.values().any(|dial| dial.error.as_ref().is_some_and(|error| error.contains(part)))
}
