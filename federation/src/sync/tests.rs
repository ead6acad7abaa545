//! Peer sync over real loopback sockets between federations in one process.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use futures::FutureExt;
use tombolo_api::proto::catalog;
use tombolo_api::proto::peer as wire;
use tombolo_api::proto::peer::peer_sync_client::PeerSyncClient;
use tombolo_core::id::{Position, SpiffeId};
use tombolo_core::import::Import;
use tombolo_core::model::Freshness;
use tombolo_core::publish::{Change, Roots, Update};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_leg::Alpn;
use tombolo_leg::dial::{Dialer, LegRequest, Via};

use super::keeping::{Durable, Keeping};
use super::subscriber::channel_over;
use super::wire::{from_wire, roots_of};
use crate::hub::{PeerMessage, SyncApplied};
use crate::testing::{Addresses, Federation, service, until};

/// East and west, peered both ways, each letting in what the other exports.
async fn pair() -> (Federation, Federation) {
    let addresses = Addresses::default();
    let (east, west) = (Federation::start("east", &addresses).await, Federation::start("west", &addresses).await);
    east.peer(&west, "*").await;
    west.peer(&east, "*").await;
    (east, west)
}

/// Updates other than heartbeats that `federation` has taken so far.
fn updates(federation: &Federation) -> u64 {
    let text = federation.metrics.encode();
    let line = text.lines().find(|line| line.starts_with("tombolo_sync_updates_total")).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn an_export_crosses_with_its_readiness_and_goes_when_it_is_withdrawn() {
    let (east, west) = pair().await;
    west.declare(&["shop/web"]).await;
    let session = west.register("web-1", "shop/web", false).await;
    until("the export is there", || east.shares("shop/web").contains_key("west")).await;
    west.hub.readiness(session, service("shop/web"), 80, true).await.unwrap();
    until("it is ready", || east.shares("shop/web")["west"] == 1).await;
    let held = || east.hub.view().peers[&west.cluster].position;
    let acked = || west.hub.view().peers[&east.cluster].acked;
    until("what is held is acknowledged", || acked() == held() && held().epoch == west.store.epoch()).await;
    west.declare(&[]).await;
    until("the export is gone", || east.shares("shop/web").is_empty()).await;
}

#[tokio::test]
async fn a_reconnect_sends_only_what_changed() {
    let (east, mut west) = pair().await;
    west.declare(&["shop/web", "shop/db", "shop/api"]).await;
    let session = west.register("web-1", "shop/web", true).await;
    until("everything is there", || {
        east.shares("shop/web").get("west") == Some(&1) && !east.shares("shop/api").is_empty()
    })
    .await;
    let settled = || {
        let (seen, told) = (east.hub.view(), west.hub.view());
        seen.peers[&west.cluster].position == told.peers[&east.cluster].published
    };
    until("nothing is under way", settled).await;

    west.stop_publishing().await;
    let before = updates(&east);
    west.hub.readiness(session, service("shop/web"), 80, false).await.unwrap();
    until("the change is made", || west.shares("shop/web")["west"] == 0).await;
    assert_eq!(east.shares("shop/web")["west"], 1, "what is known stays while the peer is away");
    west.publish().await;
    until("the change has crossed", || east.shares("shop/web")["west"] == 0).await;
    assert_eq!(updates(&east) - before, 1, "one endpoint changed, so one update came");
}

#[tokio::test]
async fn three_clusters_see_each_other_and_only_what_is_granted() {
    let addresses = Addresses::default();
    let east = Federation::start("east", &addresses).await;
    let west = Federation::start("west", &addresses).await;
    let north = Federation::start("north", &addresses).await;
    let all = [&east, &west, &north];
    for one in all {
        for other in all.into_iter().filter(|other| other.cluster != one.cluster) {
            // North takes in nothing but data.
            one.peer(other, if one.cluster == north.cluster { "data/*" } else { "*" }).await;
        }
        one.declare(&["shop/web"]).await;
    }
    for one in [&east, &west] {
        until("all three shares", || one.shares("shop/web").len() == 3).await;
    }
    until("north knows what it leaves out", || {
        let view = north.hub.view();
        view.services.get(&service("shop/web")).is_some_and(|view| view.excluded.len() == 2)
    })
    .await;
    assert_eq!(north.shares("shop/web").into_keys().collect::<Vec<_>>(), ["north"]);
    east.hub.peer_removed(west.cluster.clone()).await.unwrap();
    assert_eq!(east.shares("shop/web").into_keys().collect::<Vec<_>>(), ["east", "north"], "withdrawn at once");
    assert!(east.trust.snapshot().cluster_of(&west.trust_domain).is_none());
    assert_eq!(west.shares("shop/web").len(), 3, "what west knows of east is west's to decide");
}

#[tokio::test]
async fn a_new_root_reaches_the_peer_over_the_running_stream() {
    let (east, west) = pair().await;
    west.declare(&["shop/web"]).await;
    until("sync runs", || !east.shares("shop/web").is_empty()).await;
    let before = updates(&east);
    west.ca.add_root().unwrap();
    let bundle = west.ca.bundle();
    west.hub.own_bundle_changed(bundle.clone()).await.unwrap();
    until("east trusts the new root", || east.trust.snapshot().bundle(&west.trust_domain) == Some(&bundle)).await;
    assert_eq!(updates(&east) - before, 1, "nothing but the bundle came");
    assert_eq!(east.hub.view().peers[&west.cluster].bundle_sequence, bundle.sequence());
}

#[tokio::test]
async fn a_lower_bundle_sequence_is_refused_and_reported() {
    let (east, west) = pair().await;
    west.ca.add_root().unwrap();
    west.hub.own_bundle_changed(west.ca.bundle()).await.unwrap();
    let held = || east.trust.snapshot().bundle(&west.trust_domain).cloned();
    until("the later bundle is held", || held() == Some(west.ca.bundle())).await;
    let position = east.hub.view().peers[&west.cluster].position;
    let position = Position { revision: position.revision + 1, ..position };
    let old = Roots { sequence: west.ca.bundle().sequence() - 1, ..roots_of(&west.ca.bundle()) };
    let update = Update { position, change: Change::Roots(Arc::new(old)) };
    let applied = east.hub.sync_received(west.cluster.clone(), vec![PeerMessage::Update(update)]).await.unwrap();
    assert!(applied.refused.unwrap().contains("old bundle"));
    assert_eq!(applied.position, Some(position), "it is acknowledged, with the refusal");
    until("it is reported", || east.hub.view().peers[&west.cluster].last_refusal.is_some()).await;
    assert_eq!(held(), Some(west.ca.bundle()));
}

#[tokio::test]
async fn a_route_that_can_not_be_read_is_reported_on_both_sides() {
    let (east, west) = pair().await;
    west.declare(&["shop/web"]).await;
    until("sync runs", || !east.shares("shop/web").is_empty()).await;
    let position = east.hub.view().peers[&west.cluster].position;
    let position = Position { revision: position.revision + 1, ..position };
    let export = west.hub.view().services[&service("shop/web")].shares[0].export.clone();
    let mut export = catalog::Export::from(&export);
    let json = br#"{"resource": {"kind": "HTTPRoute", "namespace": "shop", "name": "of-a-newer-release"}}"#;
    export.routes.push(catalog::ExportedRoute { kind: "HTTPRoute".into(), json: json.to_vec() });
    let kind = Some(wire::sync_update::Kind::Export(export));
    let update = wire::SyncUpdate { epoch: position.epoch, revision: position.revision, kind };
    let applied = east.hub.sync_received(west.cluster.clone(), vec![from_wire(update)]).await.unwrap();
    assert_eq!(applied.position, Some(position));
    let refused = applied.refused.unwrap();
    assert!(refused.starts_with("shop/web is taken without its route HTTPRoute of-a-newer-release"), "{refused}");
    assert_eq!(east.shares("shop/web").into_keys().collect::<Vec<_>>(), ["west"], "the service is there all the same");
    until("east says so", || east.hub.view().peers[&west.cluster].last_refusal.as_ref() == Some(&refused)).await;
    west.hub.acked(east.cluster.clone(), position, Some(refused.clone())).await.unwrap();
    until("west says so", || west.hub.view().peers[&east.cluster].refused_there.as_ref() == Some(&refused)).await;
}

#[tokio::test]
async fn what_is_held_survives_a_restart_without_the_peer() {
    let (east, mut west) = pair().await;
    west.declare(&["shop/web"]).await;
    let acked = || west.hub.view().peers[&east.cluster].acked;
    until("the export is durable", || {
        let told = west.hub.view().peers[&east.cluster].published;
        !east.shares("shop/web").is_empty() && acked() == told
    })
    .await;
    west.stop_publishing().await;
    let addresses = east.addresses.clone();
    let east = Federation::start_in(east.stop().await, "east", &addresses).await;
    east.peer(&west, "*").await;
    assert_eq!(east.shares("shop/web").into_keys().collect::<Vec<_>>(), ["west"]);
    let peer = east.hub.view().peers[&west.cluster].clone();
    assert_eq!((peer.freshness, peer.last_heard), (Some(Freshness::Fresh), None));
}

#[tokio::test]
async fn nobody_but_a_peers_federation_may_subscribe() {
    let (east, west) = pair().await;
    let north = Federation::start("north", &east.addresses).await;
    // A stranger, a workload of a peer, and a gateway of a peer.
    let workload: SpiffeId = "spiffe://east.tombolo/ns/shop/sa/web".parse().unwrap();
    let gateway: SpiffeId = "spiffe://east.tombolo/tombolo/gateway/gw".parse().unwrap();
    north.peer(&west, "*").await;
    for (svid, trust) in [
        (north.svid.clone(), &north.trust),
        (east.svid_of(&workload), &east.trust),
        (east.svid_of(&gateway), &east.trust),
    ] {
        let refused = subscribe(&Dialer::new(svid, trust.clone()), &west, "east").await;
        assert!(refused.is_err());
    }
    // A peer's federation that claims to be another cluster.
    let dialer = Dialer::new(east.svid.clone(), east.trust.clone());
    assert!(subscribe(&dialer, &west, "north").await.unwrap_err().contains("bound to cluster east"));
    subscribe(&dialer, &west, "east").await.unwrap();
    let refusals = west.metrics.refusals("federation");
    assert!(refusals.count(Refusal::UnknownTrustDomain) + refusals.count(Refusal::WrongRole) >= 3);
}

#[tokio::test]
async fn what_changes_while_it_is_written_is_written_together() {
    let (east, west) = pair().await;
    let at = |revision| Position { epoch: 9, revision };
    let applied = |revision: Option<u64>, keep: bool, refused: Option<&str>| SyncApplied {
        position: revision.map(at),
        keep: keep.then(|| Box::new(Import::new(west.trust_domain.clone()))),
        refused: refused.map(Into::into),
    };
    let mut keeping = Keeping::new(east.hub.clone(), west.cluster.clone());
    assert!(keeping.next().now_or_never().is_none(), "there is nothing");
    keeping.take(applied(Some(1), true, None));
    keeping.take(applied(Some(1), false, None));
    assert!(keeping.next().now_or_never().is_none(), "the write has begun");
    keeping.take(applied(Some(2), true, Some("no")));
    keeping.take(applied(Some(3), true, None));
    assert_eq!(keeping.next().await.unwrap(), Durable { position: at(1), refused: None });
    assert_eq!(keeping.next().await.unwrap(), Durable { position: at(3), refused: Some("no".into()) });
    assert!(keeping.next().now_or_never().is_none());
    // In the middle of a snapshot nothing is acknowledged.
    keeping.take(applied(None, false, None));
    assert!(keeping.next().now_or_never().is_none());
    // What changed nothing but was refused needs no write.
    keeping.take(applied(Some(4), false, Some("why")));
    assert_eq!(keeping.next().await.unwrap(), Durable { position: at(4), refused: Some("why".into()) });
}

#[tokio::test]
async fn a_peer_that_takes_all_its_legs_takes_none_of_another() {
    let addresses = Addresses::default();
    let west = Federation::start("west", &addresses).await;
    let (east, north) = (Federation::start("east", &addresses).await, Federation::start("north", &addresses).await);
    for peer in [&east, &north] {
        west.peer(peer, "").await;
    }
    // Trust alone, so that no subscription of their own is among the legs.
    let dialer = |peer: &Federation| {
        peer.trust.replace_all(vec![tombolo_trust::store::ClusterBundle {
            cluster: west.cluster.clone(),
            bundle: west.ca.bundle(),
        }]);
        Dialer::new(peer.svid.clone(), peer.trust.clone())
    };
    let (of_east, of_north) = (dialer(&east), dialer(&north));
    let refusals = west.metrics.refusals("federation");
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(of_east.dial(sync_leg(&west)).await.unwrap());
    }
    until("the fifth and the sixth are refused", || refusals.count(Refusal::Overloaded) == 2).await;
    subscribe(&of_north, &west, "north").await.unwrap();
    assert!(subscribe(&of_east, &west, "east").await.is_err());
    held.clear();
    // Its own room is there again.
    let deadline = tokio::time::Instant::now() + crate::testing::DEADLINE;
    while let Err(error) = subscribe(&of_east, &west, "east").await {
        assert!(tokio::time::Instant::now() < deadline, "{error}");
    }
}

fn sync_leg(to: &Federation) -> LegRequest {
    LegRequest {
        target: LegTarget::federation(to.cluster.clone()),
        trust_domain: to.trust_domain.clone(),
        server_ids: Arc::default(),
        via: Via::Direct(to.addresses.lock().unwrap()[&to.cluster].to_string()),
        alpn: Alpn::H2,
        trace: None,
        tracestate: None,
        deadline: crate::testing::DEADLINE,
    }
}

/// Subscribes to `to` as `claimed`; the reason when that is refused.
async fn subscribe(dialer: &Dialer, to: &Federation, claimed: &str) -> Result<(), String> {
    let leg = dialer.dial(sync_leg(to)).await.map_err(|error| error.to_string())?;
    let channel = channel_over(leg).await.map_err(|error| error.to_string())?;
    let hello = wire::Hello { cluster: claimed.into(), ..Default::default() };
    let hello = wire::SubscribeRequest { kind: Some(wire::subscribe_request::Kind::Hello(hello)) };
    // The request stream stays open behind the Hello.
    let requests = futures::StreamExt::chain(futures::stream::iter([hello]), futures::stream::pending());
    let mut client = PeerSyncClient::new(channel);
    let mut updates = client.subscribe(requests).await.map_err(|status| status.to_string())?.into_inner();
    let first = updates.message().await.map_err(|status| status.to_string())?;
    first.map(drop).ok_or_else(|| "the stream ended".into())
}
