//! What sidecars are told of a gateway.

use tokio::net::TcpListener;
use tombolo_core::liveness::Reach;
use tombolo_core::refusal::Refusal;
use tombolo_gateway::watch;
use tombolo_leg::discovery::LocalGateway;
use tombolo_leg::watch::{GatewayState, GatewayWatch};
use tombolo_trust::svid::SvidSource;

use crate::support::*;

async fn watch(node: &Node, cluster: &Cluster, svid: SvidSource) -> GatewayWatch {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let watch_address = listener.local_addr().unwrap().to_string();
    tokio::spawn(watch::serve(node.gateway().clone(), listener));
    let gateway = LocalGateway {
        gateway_id: node.gateway().settings.id.clone(),
        ingress_address: node.ingress.to_string(),
        watch_address,
        spiffe_id: cluster.spiffe_id("tombolo/gateway/gw-w"),
    };
    GatewayWatch::start(gateway, svid, cluster.trusts(&[]))
}

async fn until(watch: &GatewayWatch, what: &str, condition: impl Fn(&GatewayState) -> bool) {
    let state = watch.state();
    eventually(what, || condition(&state.borrow())).await;
}

#[tokio::test]
async fn sidecars_learn_of_reach_and_drain() {
    let mut pair = Pair::linked().await;
    let watch = watch(&pair.west_node, &pair.west, pair.west.svid("ns/shop/sa/web")).await;
    let east = pair.east.id.clone();
    let reach = |state: &GatewayState| state.peers.get(&east).and_then(|peer| peer.reach);
    until(&watch, "up", |state| reach(state) == Some(Reach::Up) && !state.draining).await;
    drop(pair.east_node);
    until(&watch, "down", |state| reach(state) == Some(Reach::Dead)).await;
    let trigger = pair.west_node.drain.take().unwrap();
    let _leg = pair.west_node.gateway().drain.track();
    tokio::spawn(trigger.drain(LIFE));
    until(&watch, "draining", |state| state.draining).await;
}

#[tokio::test]
async fn only_the_own_cluster_watches() {
    let pair = Pair::linked().await;
    let stranger = pair.east.svid("ns/shop/sa/web");
    let watch = watch(&pair.west_node, &pair.west, stranger).await;
    eventually("refused", || pair.west_node.refusals(Refusal::IdentityDenied) > 0).await;
    assert!(!watch.state().borrow().known);
}
