//! Whole clusters as separate processes, asked by programs that are not ours.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use support::{World, app, curl, curl_until, get, in_sync, link, python, serve, start_caller, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tombolo_testbed::{Cluster, Sidecar};

const WEB: &str = "http://web.shop.svc.clusterset.local/";

/// A caller in east, the application `web` in west, linked; west exports.
async fn crossing(world: &World) -> (Cluster, Cluster, SocketAddr, app::App) {
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let web = app::http("web-in-west").await;
    serve(&mut west, "web", "http", "http", web.address).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut east).await;
    (east, west, proxy, web)
}

#[tokio::test]
async fn a_request_crosses_and_both_ends_know_who_the_other_is() {
    let world = World::new().await;
    let (mut east, mut west, proxy, _web) = crossing(&world).await;
    let answer = curl_until(proxy, WEB, "web-in-west").await;
    assert!(answer.body.contains(";URI=spiffe://east.tombolo/ns/shop/sa/frontend "), "{answer:?}");
    assert!(answer.body.contains("host=web.shop.svc.clusterset.local"), "{answer:?}");
    assert_eq!(answer.header("tombolo-server-id"), Some("spiffe://west.tombolo/ns/shop/sa/web"));
    assert_eq!(answer.header("tombolo-cluster"), Some("west"));
    assert_eq!(answer.header("tombolo-path"), Some("east/gw > west/gw"));

    // A body of several windows, both ways.
    let big = "x".repeat(3_000_000);
    let file = world.directory.path().join("big");
    std::fs::write(&file, &big).unwrap();
    let data = format!("@{}", file.display());
    let echo = curl(proxy, &["--data-binary", &data, &format!("{WEB}echo")]).await;
    assert_eq!((echo.status, echo.body.len()), (200, big.len()));

    // What nobody exports can't be told apart from what does not exist.
    let refused = curl(proxy, &["http://secret.shop.svc.clusterset.local/"]).await;
    assert!(refused.status >= 400, "{refused:?}");
    assert_eq!(refused.header("tombolo-refusal"), Some("unknown-service"), "{refused:?}");

    west.operator(&["unexport", "web.shop"]).await.unwrap();
    until("the withdrawn service to be refused", async || {
        (curl(proxy, &[WEB]).await.header("tombolo-refusal") == Some("unknown-service")).then_some(())
    })
    .await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn three_clusters_stand_in_for_each_other() {
    let world = World::new().await;
    let (mut a, mut b, mut c) = tokio::join!(world.cluster("a"), world.cluster("b"), world.cluster("c"));
    let (in_b, in_c) = (app::http("web-in-b").await, app::http("web-in-c").await);
    serve(&mut b, "web", "http", "http", in_b.address).await;
    serve(&mut c, "web", "http", "http", in_c.address).await;
    link(&b, &a).await;
    link(&a, &c).await;
    b.operator(&["export", "web.shop"]).await.unwrap();
    c.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut a).await;
    curl_until(proxy, WEB, "web-in-").await;
    drop(in_b);
    curl_until(proxy, WEB, "web-in-c").await;
    for _ in 0..20 {
        let answer = curl(proxy, &[WEB]).await;
        assert!(answer.status == 200 && answer.body.starts_with("web-in-c"), "{answer:?}");
    }
    tokio::join!(a.stop(), b.stop(), c.stop());
}

#[tokio::test]
async fn a_killed_role_comes_back_with_its_state_and_traffic_resumes() {
    let world = World::new().await;
    let (mut east, mut west, proxy, _web) = crossing(&world).await;
    curl_until(proxy, WEB, "web-in-west").await;
    for (cluster, role) in [
        ("east", "gw"),
        ("west", "gw"),
        ("west", "federation"),
        ("east", "federation"),
        ("west", "web"),
        ("east", "frontend"),
    ] {
        let side = if cluster == "east" { &mut east } else { &mut west };
        side.kill(role).await.unwrap();
        side.restart(role).await.unwrap();
        let answer = curl_until(proxy, WEB, "web-in-west").await;
        assert_eq!(answer.header("tombolo-cluster"), Some("west"), "after {role} of {cluster}");
    }
    in_sync(&east, "west").await;
    in_sync(&west, "east").await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn restarts_while_the_federations_are_away_go_on_with_what_was_last_told() {
    let world = World::new().await;
    let (mut east, mut west, proxy, _web) = crossing(&world).await;
    curl_until(proxy, WEB, "web-in-west").await;
    // What is told is written within a second.
    let crossed = SystemTime::now() + Duration::from_millis(1200);
    for (cluster, role) in [(&east, "frontend"), (&east, "gw"), (&west, "gw"), (&west, "web")] {
        let kept = cluster.dir().join(role).join("last-told");
        until("what was told to be kept", async || (kept.exists() && SystemTime::now() > crossed).then_some(())).await;
    }
    east.kill("federation").await.unwrap();
    west.kill("federation").await.unwrap();
    let mut admins = Vec::new();
    for role in ["gw", "frontend"] {
        east.kill(role).await.unwrap();
        admins.push(east.restart(role).await.unwrap().address("admin").unwrap());
    }
    for role in ["gw", "web"] {
        west.kill(role).await.unwrap();
        west.restart(role).await.unwrap();
    }
    let answer = curl_until(proxy, WEB, "web-in-west").await;
    assert_eq!(answer.header("tombolo-path"), Some("east/gw > west/gw"));
    let state: Value = serde_json::from_str(&get(admins[0], "/state").await).unwrap();
    assert!(state["federation"]["stale"] == true && state["federation"]["remembered"].is_string(), "{state}");
    assert!(get(admins[0], "/metrics").await.contains("tombolo_gateway_federation_remembered 1"));
    assert!(get(admins[1], "/metrics").await.contains("tombolo_sidecar_federation_remembered 1"));

    east.restart("federation").await.unwrap();
    west.restart("federation").await.unwrap();
    in_sync(&east, "west").await;
    in_sync(&west, "east").await;
    until("the gateway to hear from its federation", async || {
        let metrics = get(admins[0], "/metrics").await;
        let heard = metrics.contains("tombolo_gateway_federation_remembered 0");
        (heard && metrics.contains("tombolo_gateway_federation_connected 1")).then_some(())
    })
    .await;
    curl_until(proxy, WEB, "web-in-west").await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn a_hidden_side_dials_and_requests_cross_both_ways() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.hidden_cluster("west"));
    let (in_west, in_east) = (app::http("web-in-west").await, app::http("api-in-east").await);
    serve(&mut west, "web", "http", "http", in_west.address).await;
    serve(&mut east, "api", "http", "http", in_east.address).await;
    let refused = west.operator(&["peer", "invite", "--imports", "*"]).await.unwrap_err().to_string();
    assert!(refused.contains("no gateway of this cluster can be dialled: set `advertise` at one"), "{refused}");
    assert!(refused.contains("invite from the other cluster"), "{refused}");
    link(&east, &west).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    east.operator(&["export", "api.shop"]).await.unwrap();
    let (from_east, from_west) = (start_caller(&mut east).await, start_caller(&mut west).await);
    let answer = curl_until(from_east, WEB, "web-in-west").await;
    assert_eq!(answer.header("tombolo-path"), Some("east/gw > west/gw"));
    let answer = curl_until(from_west, "http://api.shop.svc.clusterset.local/", "api-in-east").await;
    assert_eq!(answer.header("tombolo-path"), Some("west/gw > east/gw"));
    for (cluster, dialled_here) in [(&east, false), (&west, true)] {
        let status = cluster.status().await.unwrap();
        let tunnels = status["peers"][0]["tunnels"].as_array().unwrap().clone();
        let up: Vec<_> = tunnels.iter().filter(|tunnel| tunnel["reach"] == "up").collect();
        assert!(!up.is_empty() && up.iter().all(|tunnel| tunnel["dialledHere"] == dialled_here), "{status}");
    }

    // The hidden side's gateway restarts: it dials again, and both directions are back.
    west.kill("gw").await.unwrap();
    west.restart("gw").await.unwrap();
    curl_until(from_east, WEB, "web-in-west").await;
    curl_until(from_west, "http://api.shop.svc.clusterset.local/", "api-in-east").await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn removing_a_peer_withdraws_its_services_at_once() {
    let world = World::new().await;
    let (mut east, mut west, proxy, _web) = crossing(&world).await;
    curl_until(proxy, WEB, "web-in-west").await;
    east.operator(&["peer", "remove", "west"]).await.unwrap();
    let began = Instant::now();
    until("the removed peer's service to be refused", async || (curl(proxy, &[WEB]).await.status != 200).then_some(()))
        .await;
    assert!(began.elapsed() < Duration::from_secs(5));
    let peers: Value = serde_json::from_str(&east.operator(&["peer", "list", "-o", "json"]).await.unwrap()).unwrap();
    assert_eq!(peers["peers"].as_array().map(Vec::len), Some(0), "{peers}");
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn a_server_that_speaks_first_crosses_with_its_half_close() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let mail = app::banner("220 ready\r\n").await;
    serve(&mut west, "mail", "smtp", "opaque", mail.address).await;
    link(&west, &east).await;
    west.operator(&["export", "mail.shop"]).await.unwrap();
    let config = json!({ "listeners": [{ "listen": "127.0.0.1:0", "to": "mail.shop:80" }] });
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config };
    let announced = east.start_sidecar(sidecar).await.unwrap();
    let listener = announced.address("listener-0").unwrap();
    let got = until("the conversation to cross", async || {
        let mut stream = TcpStream::connect(listener).await.ok()?;
        let mut banner = [0; 11];
        stream.read_exact(&mut banner).await.ok()?;
        stream.write_all(b"EHLO east\r\n").await.ok()?;
        stream.shutdown().await.ok()?;
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.ok()?;
        Some((String::from_utf8_lossy(&banner).into_owned(), rest))
    })
    .await;
    assert_eq!(got, ("220 ready\r\n".to_owned(), "EHLO east\r\n".to_owned()));
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn grpc_of_another_stack_crosses_with_streams_and_trailers() {
    let Some(python) = python().await else { return };
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/grpc_peer.py");
    let port_file = world.directory.path().join("grpc-port");
    let mut server = Command::new(&python).args([script, "serve"]).arg(&port_file).kill_on_drop(true).spawn().unwrap();
    let port: u16 =
        until("the gRPC server to listen", async || std::fs::read_to_string(&port_file).ok()?.parse().ok()).await;
    serve(&mut west, "api", "grpc", "grpc", SocketAddr::from(([127, 0, 0, 1], port))).await;
    link(&west, &east).await;
    west.operator(&["export", "api.shop"]).await.unwrap();
    let config = json!({ "listeners": [{ "listen": "127.0.0.1:0", "to": "api.shop:80" }] });
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config };
    let listener = east.start_sidecar(sidecar).await.unwrap().address("listener-0").unwrap();
    let call = Command::new(&python).args([script, "call", &listener.to_string()]).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(60), call).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "unary ok\nserver stream ok\nbidirectional stream ok\nstatus and trailers ok\ndeadline ok\n"
    );
    server.kill().await.unwrap();
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn a_stream_and_a_websocket_live_through_three_renewals() {
    let Some(python) = python().await else { return };
    let world = World::new().await;
    let short = json!({ "svidLife": "10s" });
    let (mut east, mut west) = tokio::join!(
        world.cluster_with("east", json!({}), short.clone()),
        world.cluster_with("west", json!({}), short.clone())
    );
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/websocket_peer.py");
    let port_file = world.directory.path().join("ws-port");
    let mut server = Command::new(&python).args([script, "serve"]).arg(&port_file).kill_on_drop(true).spawn().unwrap();
    let port: u16 =
        until("the WebSocket server to listen", async || std::fs::read_to_string(&port_file).ok()?.parse().ok()).await;
    let web = app::http("web-in-west").await;
    serve(&mut west, "web", "http", "http", web.address).await;
    serve(&mut west, "chat", "http", "http", SocketAddr::from(([127, 0, 0, 1], port))).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    west.operator(&["export", "chat.shop"]).await.unwrap();
    let config = json!({ "listeners": [{ "listen": "127.0.0.1:0", "to": "chat.shop:80" }] });
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config };
    let announced = east.start_sidecar(sidecar).await.unwrap();
    let (proxy, listener) = (announced.address("outbound").unwrap(), announced.address("listener-0").unwrap());
    curl_until(proxy, WEB, "web-in-west").await;

    // Half-life is 5 s: 18 s see three renewals of every certificate on the way.
    let chat = Command::new(&python).args([script, "chat", &listener.to_string(), "18"]).kill_on_drop(true).output();
    let url = format!("{WEB}drip?18");
    let arguments = ["-m", "40", &url];
    let drip = curl(proxy, &arguments);
    let (chat, drip) = tokio::join!(chat, drip);
    let chat = chat.unwrap();
    assert!(chat.status.success(), "{}", String::from_utf8_lossy(&chat.stderr));
    assert_eq!(drip.body.lines().count(), 180, "{drip:?}");
    assert_eq!(curl(proxy, &[WEB]).await.status, 200);
    server.kill().await.unwrap();
    tokio::join!(east.stop(), west.stop());
}

/// Until a revocation acts in the other cluster, also on a busy machine: half as long as what it has to cut takes.
const CUT_TIME_MAX: Duration = Duration::from_secs(4);

#[tokio::test]
async fn a_revoked_caller_is_cut_off_in_the_other_cluster_too() {
    let world = World::new().await;
    let (mut east, mut west, proxy, _web) = crossing(&world).await;
    let sidecar = Sidecar { name: "batch", workload: "shop/batch", config: Value::Null };
    let other = east.start_sidecar(sidecar).await.unwrap().address("outbound").unwrap();
    curl_until(proxy, WEB, "web-in-west").await;
    curl_until(other, WEB, "web-in-west").await;
    let url = format!("{WEB}drip?8");
    let files = ["cut", "kept"].map(|name| world.directory.path().join(name).display().to_string());
    let [arguments, others] = [0, 1].map(|file| ["--no-buffer", "--output", files[file].as_str(), url.as_str()]);
    let lines = |file: usize| std::fs::read_to_string(&files[file]).unwrap_or_default().lines().count();
    let revoke = async {
        until("both streams to stand", async || (lines(0) > 0 && lines(1) > 0).then_some(())).await;
        let said = east.operator(&["trust", "revoke", "spiffe://east.tombolo/ns/shop/sa/frontend"]).await.unwrap();
        let began = Instant::now();
        assert!(said.contains("is revoked (sequence 1)"), "{said}");
        let refused = until("the revoked caller to be refused", async || {
            let answer = curl(proxy, &[WEB]).await;
            (answer.status != 200).then_some(answer)
        })
        .await;
        assert!(began.elapsed() < CUT_TIME_MAX, "{:?}", began.elapsed());
        assert_eq!((refused.status, refused.header("tombolo-refusal")), (403, Some("revoked")), "{refused:?}");
        began
    };
    let cut = async {
        curl(proxy, &arguments).await;
        Instant::now()
    };
    let (ended, _, began) = tokio::join!(cut, curl(other, &others), revoke);
    assert!(lines(0) < 80, "the live stream is closed, not finished");
    assert!(ended.duration_since(began) < CUT_TIME_MAX, "{:?}", ended.duration_since(began));
    assert_eq!(lines(1), 80, "another identity's stream goes on");
    let status = west.status().await.unwrap();
    assert_eq!(status["revoked"], json!(["spiffe://east.tombolo/ns/shop/sa/frontend"]), "{status}");

    // It outlives a restart, and nothing is issued to it; a mistake is taken back.
    east.kill("federation").await.unwrap();
    east.restart("federation").await.unwrap();
    east.kill("frontend").await.unwrap();
    east.restart("frontend").await.unwrap();
    assert_eq!(east.status().await.unwrap()["revoked"], json!(["spiffe://east.tombolo/ns/shop/sa/frontend"]));
    assert_ne!(curl(proxy, &[WEB]).await.status, 200);
    east.operator(&["trust", "unrevoke", "spiffe://east.tombolo/ns/shop/sa/frontend"]).await.unwrap();
    curl_until(proxy, WEB, "web-in-west").await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn a_new_root_reaches_the_peer_without_a_dropped_connection() {
    let world = World::new().await;
    let (mut east, mut west, proxy, _web) = crossing(&world).await;
    curl_until(proxy, WEB, "web-in-west").await;
    let url = format!("{WEB}drip?4");
    let arguments = [url.as_str()];
    let stream = curl(proxy, &arguments);
    let rotate = async {
        let said = west.operator(&["trust", "add-root"]).await.unwrap();
        assert!(said.contains("bundle sequence 2"), "{said}");
        until("east to hold west's bundle of sequence 2", async || {
            let status = east.status().await.ok()?;
            (status["peers"][0]["bundleSequence"] == 2).then_some(())
        })
        .await;
    };
    let (stream, ()) = tokio::join!(stream, rotate);
    assert_eq!(stream.body.lines().count(), 40, "{stream:?}");
    assert_eq!(curl(proxy, &[WEB]).await.status, 200);
    tokio::join!(east.stop(), west.stop());
}
