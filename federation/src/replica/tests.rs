//! Two replicas of one federation in one process, with real TLS between them.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tombolo_runtime::drain::{DrainTrigger, drain};
use tombolo_trust::grpc::Incoming;
use tombolo_trust::tls::{self, ClientAuth, RootInChain};

use super::{Follower, ReplicaService};
use crate::kubernetes::{Leader, Leadership};
use crate::testing::{Addresses, Federation, until};

/// Two replicas: one CA, and state directories that know the same peers.
async fn replicas(addresses: &Addresses) -> (Federation, Federation) {
    // Peers never hear of where the follower listens.
    let follower = Federation::start("east", &Addresses::default()).await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(follower.folder.path().join("ca.json"), folder.path().join("ca.json")).unwrap();
    (Federation::start_in(folder, "east", addresses).await, follower)
}

async fn serve(leader: &Federation, leadership: &Leadership) -> (Leader, DrainTrigger) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (trigger, watch) = drain();
    let (hub, store) = (leader.hub.clone(), leader.store.clone());
    let refusals = leader.metrics.refusals("federation");
    let server = ReplicaService::server(hub, store, leadership.clone(), refusals, watch);
    let tls = tls::server_config(&leader.svid, &leader.trust, ClientAuth::Optional, &[b"h2"], RootInChain::No);
    let incoming = Incoming::new(listener, tls, Arc::new(|_, _| {}));
    tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));
    (Leader { holder: "one".into(), discovery: address.clone(), legs: address }, trigger)
}

#[tokio::test]
async fn replicas_know_the_same_and_peers_see_one_of_them() {
    let addresses = Addresses::default();
    let (leader, mut second) = replicas(&addresses).await;
    let west = Federation::start("west", &addresses).await;
    west.declare(&["shop/remote"]).await;
    west.register("remote-1", "shop/remote", true).await;
    for replica in [&leader, &second] {
        replica.declare(&["shop/web"]).await;
        replica.peer(&west, "*").await;
    }
    west.peer(&leader, "*").await;
    until("the leader hears of its peer", || leader.shares("shop/remote") == [("west".into(), 1)].into()).await;
    assert!(second.shares("shop/remote").is_empty(), "it can't reach the peer itself");

    let leadership = Leadership::always();
    let (place, _drain) = serve(&leader, &leadership).await;
    let (known, leaders) = watch::channel(Some(place));
    let (synced, told) = watch::channel(false);
    let mut events = std::mem::replace(&mut second.peering, tokio::sync::mpsc::channel(1).1);
    let mut follower = Follower {
        name: "two".into(),
        hub: second.hub.clone(),
        store: second.store.clone(),
        ca: second.ca.clone(),
        svid: second.svid.clone(),
        trust: second.trust.clone(),
        leader: leaders,
        synced,
        peers: second.store.peering().peers().map(|record| (record.cluster.clone(), record)).collect(),
    };
    let following = tokio::spawn(async move { follower.run(&mut events).await });
    until("the follower is told everything", || *told.borrow()).await;
    assert_eq!(second.shares("shop/remote"), [("west".into(), 1)].into());
    let position = |replica: &Federation| replica.hub.view().peers[&west.cluster].position;
    assert_eq!(position(&second), position(&leader), "where it would go on");

    // What is connected to one is known to all, and to peers.
    let here = second.register("web-1", "shop/web", true).await;
    until("the leader knows the follower's", || leader.shares("shop/web") == [("east".into(), 1)].into()).await;
    until("the peer does", || west.shares("shop/web") == [("east".into(), 1)].into()).await;
    leader.register("web-2", "shop/web", true).await;
    until("the follower knows the leader's", || second.shares("shop/web") == [("east".into(), 2)].into()).await;
    second.hub.readiness(here, "shop/web".parse().unwrap(), 80, false).await.unwrap();
    until("readiness comes along", || leader.shares("shop/web") == [("east".into(), 1)].into()).await;
    west.register("remote-2", "shop/remote", true).await;
    until("an update is passed on", || second.shares("shop/remote") == [("west".into(), 2)].into()).await;
    until("with its position", || position(&second) == position(&leader)).await;

    // The leader is gone: what it told stays for the time that its sidecars need to come here.
    leadership.end();
    until("the stream ends", || leader.hub.view().sidecars.values().any(|sidecar| !sidecar.connected)).await;
    assert_eq!(second.shares("shop/web"), [("east".into(), 1)].into());
    assert_eq!(second.shares("shop/remote"), [("west".into(), 2)].into());
    drop(known);
    following.abort();
}
