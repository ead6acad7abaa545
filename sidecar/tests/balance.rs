//! How requests are spread over endpoints, and how traffic comes back to one.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Far, Mood, WEB, World, bounded, eventually, share};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tombolo_core::model::{Origin, SessionAffinity};
use tombolo_leg::discovery::ShareView;
use tombolo_runtime::process::Process;

/// Four endpoints of the local cluster, of which some are ready.
async fn four(world: &World) -> Vec<Far> {
    let mut fars = Vec::new();
    for _ in 0..4 {
        fars.push(Far::start("east", &world.east.source("web"), &world.trust).await);
    }
    fars
}

const NAMES: [&str; 4] = ["e1", "e2", "e3", "e4"];

fn told(world: &World, fars: &[Far], ready: [bool; 4]) -> ShareView {
    let endpoints: Vec<_> = (0..4).map(|n| (NAMES[n], ready[n], Some(fars[n].address))).collect();
    share(&world.east, Origin::Local, &endpoints)
}

/// `each` requests by eight clients at once.
async fn ask(world: &Arc<World>, each: usize) {
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let world = world.clone();
        clients.spawn(async move {
            for _ in 0..each {
                let answer = world.get("/").await;
                assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            }
        });
    }
    clients.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_ten_times_slower_than_its_siblings_gets_less_than_a_tenth() {
    let world = Arc::new(World::new().await);
    let fars = four(&world).await;
    fars.iter().for_each(|far| far.feel(Mood::Takes(5)));
    fars[2].feel(Mood::Takes(50));
    world.tell_shares(vec![told(&world, &fars, [true; 4])]);
    bounded(ask(&world, 100)).await;
    let counts: Vec<u32> = fars.iter().map(Far::requests).collect();
    assert_eq!(counts.iter().sum::<u32>(), 800);
    assert!(counts[2] > 0 && counts[2] < 80, "{counts:?}");
    assert!([0, 1, 3].iter().all(|sibling| counts[*sibling] > 150), "{counts:?}");
    let state = world.outbound.state();
    let slow = &state["routes"][0]["endpoints"][2];
    assert!(slow["latencyMs"].as_f64().unwrap() > 10.0, "{state}");
    assert_eq!((slow["standing"].as_str(), slow["ejected"].as_str()), (Some("usable"), None), "{state}");
}

#[tokio::test]
async fn a_service_with_client_ip_affinity_keeps_a_client_at_one_endpoint() {
    let world = Arc::new(World::new().await);
    let fars = four(&world).await;
    let tell = |ready| {
        let mut view = told(&world, &fars, ready);
        view.share.export.session_affinity = SessionAffinity::ClientIp;
        world.tell_shares(vec![view]);
    };
    let counts = || fars.iter().map(Far::requests).collect::<Vec<_>>();
    tell([true; 4]);
    bounded(ask(&world, 5)).await;
    let own = counts().iter().position(|count| *count == 40).expect("one endpoint has all");
    let mut ready = [true; 4];
    ready[own] = false;
    tell(ready);
    eventually("the update is in force", || {
        let route = world.outbound.services.known(WEB).unwrap();
        !route.live().targets[own].is_ready()
    })
    .await;
    bounded(ask(&world, 5)).await;
    let other = counts().iter().enumerate().position(|(n, count)| n != own && *count == 40);
    assert!(other.is_some(), "another one has all: {:?}", counts());
    tell([true; 4]);
    eventually("the update is in force", || {
        let route = world.outbound.services.known(WEB).unwrap();
        route.live().targets[own].is_ready()
    })
    .await;
    bounded(ask(&world, 5)).await;
    assert_eq!(counts()[own], 80, "the session is where it was: {:?}", counts());
}

#[tokio::test]
async fn traffic_begins_to_return_within_a_second_of_being_ready_again() {
    let process = Process::bare("sidecar");
    let world = World::of("", &process).await;
    world.tell(false, true);
    bounded(world.get("/")).await;
    let before = world.remote.requests();
    world.tell(true, true);
    let ready = Instant::now();
    while world.local.requests() == 0 {
        let answer = bounded(world.get("/")).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    let took = ready.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(world.remote.requests() > before, "not at once, and not as a herd");
    // What spilled over meanwhile is counted.
    let metrics = process.metrics.encode();
    let spilled =
        metrics.lines().find_map(|line| line.strip_prefix("tombolo_outbound_fallback_picks_total{reason=\"spill\"} "));
    assert_eq!(spilled.and_then(|count| count.parse().ok()), Some(world.remote.requests()), "{metrics}");
    let route = world.outbound.services.known(WEB).unwrap();
    eventually("all of it returns", || route.live().plan.clusters[0].share == 1.0).await;
}

#[tokio::test]
async fn setting_up_a_connection_is_part_of_a_try() {
    let world = World::with("retry: {perTryTimeout: 200ms}\n").await;
    // The kernel accepts and nobody says a word.
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.tell_shares(vec![
        share(&world.east, Origin::Local, &[("e1", true, Some(mute.local_addr().unwrap()))]),
        share(&world.west, Origin::Remote, &[("w1", true, None)]),
    ]);
    let began = Instant::now();
    let answer = bounded(world.get("/")).await;
    assert!(answer.contains("tombolo-cluster: west") && answer.contains("tombolo-tries: 2"), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}
