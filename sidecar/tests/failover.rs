//! Where requests go, and what happens when an endpoint fails.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Far, Mood, WEB, World, bounded, eventually, share};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tombolo_core::model::Origin;
use tombolo_core::outlier::Outcome;
use tombolo_core::refusal::Refusal;
use tombolo_core::routing::ClusterReach;
use tombolo_core::silence::SilenceConfig;
use tombolo_runtime::process::Process;
use tombolo_sidecar::outbound::gateways::PeerReach;

fn cluster_of(answer: &str) -> &str {
    let line = answer.lines().find_map(|line| line.strip_prefix("tombolo-cluster: "));
    line.unwrap_or_else(|| panic!("no cluster in {answer}"))
}

#[tokio::test]
async fn local_first_and_the_way_is_told() {
    let world = World::new().await;
    let answer = bounded(world.get("/")).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("\r\neast\r\n"), "{answer}");
    for line in [
        "tombolo-cluster: east",
        "tombolo-endpoint: e1",
        "tombolo-path: east",
        "tombolo-server-id: spiffe://east.tombolo/ns/shop/sa/web",
        "tombolo-tries: 1",
    ] {
        assert!(answer.contains(&format!("\r\n{line}\r\n")), "{line} is not in {answer}");
    }
    world.tell(false, true);
    eventually("the update is in force", || {
        let route = world.outbound.services.known(WEB).unwrap();
        route.live().plan.clusters[0].share == 0.0
    })
    .await;
    let answer = bounded(world.get("/")).await;
    assert_eq!(cluster_of(&answer), "west");
    assert!(answer.contains("\r\ntombolo-path: east/gw-east > west/gw-west\r\n"), "{answer}");
    assert!(answer.contains("spiffe://west.tombolo/ns/shop/sa/web"), "{answer}");
    let clients = world.remote.clients.lock().unwrap().clone();
    assert_eq!(clients, [world.east.id("shopper")].into());
}

#[tokio::test]
async fn no_get_fails_when_the_local_application_dies() {
    let world = World::new().await;
    bounded(world.get("/")).await;
    world.local.feel(Mood::AppDead);
    for _ in 0..20 {
        let answer = bounded(world.get("/")).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && cluster_of(&answer) == "west", "{answer}");
    }
    let route = world.outbound.services.known(WEB).unwrap();
    assert!(route.live().targets.iter().any(|target| target.is_ejected()), "the first refusal ejects");
    // It lives again: a probe notices, and traffic returns.
    world.local.feel(Mood::Well);
    let mut answer = String::new();
    for _ in 0..100 {
        answer = bounded(world.get("/")).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        if cluster_of(&answer) == "east" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the local endpoint never comes back: {answer}");
}

#[tokio::test]
async fn no_get_fails_when_the_local_machine_dies_under_load() {
    let world = World::new().await;
    bounded(world.get("/")).await;
    let mut clients = tokio::task::JoinSet::new();
    let world = std::sync::Arc::new(world);
    for _ in 0..20 {
        let world = world.clone();
        clients.spawn(async move {
            let mut bad = Vec::new();
            for _ in 0..50 {
                let answer = world.get("/").await;
                if !answer.starts_with("HTTP/1.1 200 ") {
                    bad.push(answer);
                }
            }
            bad
        });
    }
    eventually("load", || world.local.requests() > 200).await;
    world.local.kill();
    let bad: Vec<_> = bounded(clients.join_all()).await.into_iter().flatten().collect();
    assert!(bad.is_empty(), "{} failed, the first: {}", bad.len(), bad[0]);
    assert!(world.remote.requests() > 0);
}

#[tokio::test]
async fn a_hung_application_is_left_at_the_try_timeout() {
    let world = World::with("retry: {perTryTimeout: 200ms}\n").await;
    bounded(world.get("/")).await;
    world.local.feel(Mood::Hung);
    let began = Instant::now();
    let answer = bounded(world.get("/")).await;
    assert_eq!(cluster_of(&answer), "west");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_post_is_repeated_only_if_the_application_never_got_it() {
    let world = World::new().await;
    let post = |body: &str| {
        format!(
            "POST http://{WEB}/echo HTTP/1.1\r\nHost: {WEB}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    world.local.feel(Mood::AppDead);
    let answer = bounded(world.raw(&post("order"))).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("order"), "{answer}");
    assert_eq!(world.remote.requests(), 1);

    let world = World::new().await;
    world.local.feel(Mood::Breaks);
    let answer = bounded(world.raw(&post("order"))).await;
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("tombolo-refusal: connection-lost"), "{answer}");
    assert_eq!((world.local.requests(), world.remote.requests()), (1, 0));
    let answer = bounded(world.get("/")).await;
    assert_eq!(cluster_of(&answer), "west", "a GET is idempotent");
}

#[tokio::test]
async fn a_large_upload_is_not_repeated_once_it_is_under_way() {
    let world = World::new().await;
    world.local.feel(Mood::AppDead);
    let body = "x".repeat(300_000);
    let request = format!(
        "PUT http://{WEB}/count HTTP/1.1\r\nHost: {WEB}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let answer = bounded(world.raw(&request)).await;
    // Refused before or after the first 64 KiB were on their way: either way never half a body.
    assert!(answer.contains("\r\n300000\r\n") || answer.contains("tombolo-refusal: app-unreachable"), "{answer}");
}

#[tokio::test]
async fn the_next_gateway_is_tried() {
    let world = World::new().await;
    let second = common::Gate::start("gw-two", world.remote.address).await;
    world.outbound.gateways.replace(&[world.gate.as_local("gw-east"), second.as_local("gw-two")]);
    world.tell(false, true);
    world.gate.kill();
    for _ in 0..5 {
        let answer = bounded(world.get("/")).await;
        assert!(answer.contains("tombolo-path: east/gw-two > "), "{answer}");
    }
    *second.refuses.lock().unwrap() = Some(Refusal::NoTunnel);
    let world = World::new().await;
    world.tell(false, true);
    *world.gate.refuses.lock().unwrap() = Some(Refusal::NoTunnel);
    let answer = bounded(world.get("/")).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("tombolo-refusal: no-tunnel"), "{answer}");
    assert!(answer.contains("retry-after: 1") && answer.contains("as the test says"), "{answer}");
}

#[tokio::test]
async fn a_silent_gateway_is_overtaken_and_remembered() {
    let world = World::with("limits: {connectTimeout: 9s}\n").await;
    // As a stopped process: the kernel accepts, and nobody says anything.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut first = world.gate.as_local("gw-silent");
    first.ingress_address = silent.local_addr().unwrap().to_string();
    let gateways = &world.outbound.gateways;
    gateways.replace(&[first, world.gate.as_local("gw-east")]);
    reach(&world, "gw-silent", ClusterReach::Up);
    reach(&world, "gw-east", ClusterReach::Suspect);
    world.tell(false, true);
    let began = Instant::now();
    let answer = bounded(world.get("/")).await;
    assert!(answer.contains("tombolo-path: east/gw-east > "), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    let failed: Vec<bool> = gateways.snapshot().iter().map(|gateway| gateway.has_failed()).collect();
    assert_eq!(failed, [true, false]);
}

/// What a gateway says of the other cluster.
fn reach(world: &World, gateway: &str, reach: ClusterReach) {
    let peers = BTreeMap::from([("west".parse().unwrap(), PeerReach { reach, rtt: None })]);
    world.outbound.gateways.observe(&gateway.parse().unwrap(), false, Some(peers));
}

#[tokio::test]
async fn endpoints_return_with_the_way_to_them() {
    let world = World::new().await;
    bounded(world.get("/")).await;
    let route = world.outbound.services.known(WEB).unwrap();
    let west = route.live().targets.iter().find(|target| target.origin == Origin::Remote).unwrap().clone();
    reach(&world, "gw-east", ClusterReach::Suspect);
    // Nothing else runs before the next `await`: the probes fail here, not on the way.
    let mut now = Instant::now();
    route.refresh(now);
    route.handle_outcome(&west, Outcome::Refused, now);
    for _ in 0..10 {
        now += Duration::from_secs(60);
        assert_eq!(route.handle_timeout(now).len(), 1);
        route.handle_probe(&west, false, now);
    }
    assert!(west.outlier().poll_timeout().unwrap() > Instant::now() + Duration::from_secs(600));
    reach(&world, "gw-east", ClusterReach::Up);
    route.refresh(Instant::now());
    eventually("the endpoint is back", || !west.is_ejected()).await;
}

#[tokio::test]
async fn nothing_ready_anywhere_is_still_tried() {
    let world = World::new().await;
    world.tell(false, false);
    let answer = bounded(world.get("/")).await;
    assert_eq!(cluster_of(&answer), "east");
    assert!(answer.contains("tombolo-pick: last-resort"), "{answer}");
}

#[tokio::test]
async fn a_server_with_another_identity_is_never_spoken_to() {
    let world = World::new().await;
    let impostor = Far::start("impostor", &world.east.source("thief"), &world.trust).await;
    world.tell_shares(vec![share(&world.east, Origin::Local, &[("e1", true, Some(impostor.address))])]);
    let answer = bounded(world.get("/")).await;
    assert!(answer.contains("tombolo-refusal: identity-denied"), "{answer}");
    assert_eq!(impostor.requests(), 0);
}

#[tokio::test]
async fn legs_are_shared_and_retire_when_the_identity_is_renewed() {
    let world = World::new().await;
    for _ in 0..5 {
        bounded(world.get("/")).await;
    }
    assert_eq!(world.local.legs.load(Ordering::SeqCst), 1);
    let slow = {
        let proxy = world.proxy;
        tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut connection = TcpStream::connect(proxy).await.unwrap();
            let request = format!("GET http://{WEB}/slow HTTP/1.1\r\nHost: {WEB}\r\nConnection: close\r\n\r\n");
            connection.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            connection.read_to_string(&mut answer).await.unwrap();
            answer
        })
    };
    eventually("the slow request is under way", || world.local.requests() == 6).await;
    world.east.renew(&world.svid, "shopper");
    bounded(world.get("/")).await;
    assert_eq!(world.local.legs.load(Ordering::SeqCst), 2);
    assert!(bounded(slow).await.unwrap().contains("\r\neast\r\n"), "what is under way finishes on the old leg");
}

#[tokio::test]
async fn a_withdrawn_bundle_ends_what_is_under_way() {
    let world = World::new().await;
    world.tell(false, true);
    bounded(world.get("/")).await;
    let mut connection = TcpStream::connect(world.proxy).await.unwrap();
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let request =
        format!("POST http://{WEB}/never HTTP/1.1\r\nHost: {WEB}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    eventually("the request is under way", || world.remote.requests() == 2).await;
    world.trust.replace_all(vec![world.east.bundle()]);
    let mut answer = String::new();
    bounded(connection.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
}

/// Accepts, and says nothing, as a gateway that was stopped.
async fn silent_gateway(world: &World) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut silent = world.gate.as_local("gw-silent");
    silent.ingress_address = listener.local_addr().unwrap().to_string();
    world.outbound.gateways.replace(&[silent]);
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            held.push(connection);
        }
    });
}

/// What `gw-silent` says of the other cluster, taken in as `follow_gateway` does.
fn says(world: &World, reach: ClusterReach) {
    let peers = [("west".parse().unwrap(), PeerReach { reach, rtt: None })].into();
    let lost = world.outbound.gateways.observe(&"gw-silent".parse().unwrap(), false, Some(peers));
    world.outbound.services.routes().iter().for_each(|route| route.refresh(Instant::now()));
    world.outbound.gateways.announce(&lost);
}

#[tokio::test]
async fn whoever_waits_for_a_leg_leaves_when_the_way_is_lost() {
    // Nothing but the news ends the dial in the time of this test.
    let world = std::sync::Arc::new(World::with("limits: {connectTimeout: 60s}\n").await);
    silent_gateway(&world).await;
    let listener = world.listener("web.shop:5432").await;
    says(&world, ClusterReach::Up);
    world.tell(false, true);
    let waiting = world.clone();
    let request = tokio::spawn(async move { waiting.get("/").await });
    let mut connection = TcpStream::connect(listener).await.unwrap();
    eventually("both dials", || {
        let routes = world.outbound.services.routes();
        let in_flight = |port| {
            routes
                .iter()
                .filter(|route| route.port == port)
                .flat_map(|route| route.live().targets.clone())
                .any(|target| target.in_flight() > 0)
        };
        in_flight(80) && in_flight(5432)
    })
    .await;
    world.tell(true, true);
    eventually("the local endpoint", || {
        world.outbound.services.routes().iter().all(|route| {
            route.live().plan.clusters.iter().any(|cluster| cluster.share > 0.9 && cluster.cluster.as_str() == "east")
        })
    })
    .await;
    says(&world, ClusterReach::Suspect);
    let answer = bounded(request).await.unwrap();
    assert_eq!(cluster_of(&answer), "east", "{answer}");
    let mut greeting = [0; 16];
    bounded(connection.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"hello from east\n");
}

#[tokio::test]
async fn warm_legs_over_a_lost_way_are_closed() {
    let world = World::new().await;
    world.tell(false, true);
    let listener = world.listener("web.shop:5432").await;
    let mut connection = TcpStream::connect(listener).await.unwrap();
    let mut greeting = [0; 16];
    bounded(connection.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"hello from west\n");
    let route = world.outbound.services.route(&"shop/web".parse().unwrap(), 5432).await.unwrap();
    let targets = route.live().targets.clone();
    let standing = || targets.iter().map(|target| target.warm.standing()).sum::<usize>();
    eventually("a warm leg", || standing() > 0).await;
    targets.iter().for_each(|target| target.warm.leave(&"gw-other".parse().unwrap()));
    assert!(standing() > 0);
    targets.iter().for_each(|target| target.warm.leave(&"gw-east".parse().unwrap()));
    assert_eq!(standing(), 0);
}

#[tokio::test]
async fn opaque_connections_wait_for_a_silent_gateway_and_end_when_it_answers_nothing() {
    let patience = SilenceConfig { ask_every: Duration::from_millis(100), dead_after: Duration::from_secs(1) };
    let more = "limits: {connectTimeout: 300ms, warmLegs: 0}";
    let world = World::with_patience(more, &Process::bare("sidecar"), patience).await;
    world.tell(false, true);
    let listener = world.listener("web.shop:5432").await;
    let mut connection = TcpStream::connect(listener).await.unwrap();
    bounded(connection.read_exact(&mut [0; "hello from west\n".len()])).await.unwrap();

    // It says nothing of itself, but it answers when it is asked: twice its time is over, and the connection stands.
    let asked = || world.gate.legs.load(Ordering::SeqCst);
    let (before, began) = (asked(), Instant::now());
    eventually("it was asked", || began.elapsed() > 2 * patience.dead_after && asked() > before + 3).await;
    connection.write_all(b"echo").await.unwrap();
    bounded(connection.read_exact(&mut [0; 4])).await.unwrap();
    // While it says of itself what it reaches, nobody asks.
    let west = BTreeMap::from([("west".parse().unwrap(), PeerReach { reach: ClusterReach::Up, rtt: None })]);
    let gateway = "gw-east".parse().unwrap();
    world.outbound.gateways.observe(&gateway, false, Some(west));
    let before = asked();
    tokio::time::sleep(5 * patience.ask_every).await;
    assert!(asked() <= before + 1);

    world.gate.hangs.store(true, Ordering::SeqCst);
    world.outbound.gateways.observe(&gateway, false, None);
    let began = Instant::now();
    assert!(bounded(connection.read(&mut [0])).await.is_err(), "a reset, and no orderly end");
    assert!(began.elapsed() + Duration::from_millis(200) >= patience.dead_after, "{:?}", began.elapsed());
}
