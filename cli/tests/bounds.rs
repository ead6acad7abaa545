//! What must stay small whatever the rest does: the bytes of a change between clusters, and what stalled readers
//! cost everybody else.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::process::Seen;
use support::{World, app, in_sync, link, serve, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tombolo_testbed::{Cluster, Sidecar};

const SLICES: usize = 10;
const ENDPOINTS: usize = 100;

/// One slice of `shop/web`, with an endpoint of its own zone if `moved` names one.
fn declare_slice(cluster: &Cluster, slice: usize, moved: &[(usize, &str)]) {
    let endpoint = |index: usize| {
        let zone = moved.iter().find(|(moved, _)| *moved == index).map_or("zone-a", |(_, zone)| zone);
        json!({
            "addresses": [format!("web-{slice}-{index}.example")],
            "targetRef": { "kind": "Pod", "name": format!("web-{slice}-{index}") },
            "zone": zone,
            "conditions": { "ready": true },
        })
    };
    let document = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("web-{slice}"),
            "namespace": "shop",
            "labels": { "kubernetes.io/service-name": "web" },
        },
        "addressType": "FQDN",
        "ports": [{ "name": "http", "port": 80 }],
        "endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
    });
    cluster.write_resource(&format!("slice-{slice}.yaml"), &document.to_string()).unwrap();
}

/// The peer's row in `status`, and how many endpoints of `shop/web` the peer has.
async fn held(cluster: &Cluster, peer: &str) -> Option<(u64, usize)> {
    let status = cluster.status().await.ok()?;
    let number =
        |value: &Value| value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok())).unwrap_or(0);
    let row = status["peers"].as_array()?.iter().find(|row| row["cluster"] == peer)?.clone();
    let services = status["services"].as_array()?.clone();
    let shares = services.iter().find(|row| row["service"] == "shop/web")?["shares"].as_array()?.clone();
    let share = shares.iter().find(|share| share["cluster"] == peer)?.clone();
    Some((number(&row["revision"]), usize::try_from(number(&share["endpoints"])).ok()?))
}

async fn sent(gateway: &Seen) -> f64 {
    gateway.metric("tombolo_gateway_into_tunnel_bytes_total").await
}

#[tokio::test]
async fn one_changed_endpoint_of_a_thousand_is_one_small_delta() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    west.declare_service("shop", "web", &[("http", 80)]).unwrap();
    for slice in 0..SLICES {
        declare_slice(&west, slice, &[]);
    }
    link(&west, &east).await;
    let gateway = Seen::new(&west, "gw", "gateway");
    let before = sent(&gateway).await;
    until("the service in west", async || west.operator(&["export", "web.shop"]).await.ok()).await;
    let all = SLICES * ENDPOINTS;
    until("all endpoints in east", async || held(&east, "west").await.filter(|(_, count)| *count == all)).await;
    let whole = sent(&gateway).await - before;

    // Heartbeats and acknowledgements run beside it; they count as well.
    let (revision, _) = held(&east, "west").await.unwrap();
    let before = sent(&gateway).await;
    declare_slice(&west, 3, &[(33, "zone-b")]);
    until("the change in east", async || held(&east, "west").await.filter(|(now, _)| *now > revision)).await;
    let changed = sent(&gateway).await - before;

    // The gateway is away for a second, and meanwhile another one changes.
    let (revision, _) = held(&east, "west").await.unwrap();
    let before = sent(&gateway).await;
    west.process("gw").unwrap().signal(Signal::SIGSTOP);
    declare_slice(&west, 3, &[(33, "zone-b"), (44, "zone-c")]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    west.process("gw").unwrap().signal(Signal::SIGCONT);
    until("the change in east", async || held(&east, "west").await.filter(|(now, _)| *now > revision)).await;
    let after_pause = sent(&gateway).await - before;

    // It is killed, so that the stream has to begin again where it was.
    let (revision, _) = held(&east, "west").await.unwrap();
    west.kill("gw").await.unwrap();
    declare_slice(&west, 3, &[(33, "zone-b"), (44, "zone-d")]);
    west.restart("gw").await.unwrap();
    in_sync(&east, "west").await;
    until("the change in east", async || held(&east, "west").await.filter(|(now, _)| *now > revision)).await;
    let gateway = Seen::new(&west, "gw", "gateway");
    let after_cut = sent(&gateway).await;

    println!(
        "{all} endpoints {whole} bytes; one changed {changed}; after a pause {after_pause}; after a cut {after_cut}"
    );
    assert!(whole > 20_000.0, "{whole}");
    assert!(changed > 0.0 && changed < 1024.0, "{changed}");
    assert!(after_pause < 2048.0, "{after_pause}");
    // With the handshakes of both directions' new legs.
    assert!(after_cut < 12_000.0 && after_cut < whole / 4.0, "{after_cut} of {whole}");
    assert_eq!(held(&east, "west").await.unwrap().1, all);
    tokio::join!(east.stop(), west.stop());
}

const STALLED: usize = 200;

/// How long single requests took, 100 of them a second.
async fn latencies(proxy: SocketAddr, count: usize) -> Vec<Duration> {
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..count {
        tick.tick().await;
        requests.spawn(async move {
            let began = Instant::now();
            let mut stream = TcpStream::connect(proxy).await.unwrap();
            let host = "web.shop.svc.clusterset.local";
            let request = format!("GET http://{host}/ HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            began.elapsed()
        });
    }
    let mut all = requests.join_all().await;
    all.sort();
    all
}

fn percentile(sorted: &[Duration], hundredth: usize) -> Duration {
    sorted[sorted.len() * hundredth / 100]
}

#[tokio::test]
async fn stalled_readers_cost_the_others_next_to_nothing() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let (web, flood) = (app::http("web-in-west").await, app::flood().await);
    serve(&mut west, "web", "http", "http", web.address).await;
    serve(&mut west, "flood", "flood", "opaque", flood.address).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    west.operator(&["export", "flood.shop"]).await.unwrap();
    let config = json!({ "listeners": [{ "listen": "127.0.0.1:0", "to": "flood.shop:80" }] });
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config };
    let frontend = east.start_sidecar(sidecar).await.unwrap();
    let (proxy, listener) = (frontend.address("outbound").unwrap(), frontend.address("listener-0").unwrap());
    support::curl_until(proxy, "http://web.shop.svc.clusterset.local/", "web-in-west").await;
    let gateways = [Seen::new(&east, "gw", "gateway"), Seen::new(&west, "gw", "gateway")];

    latencies(proxy, 100).await;
    let without = latencies(proxy, 500).await;
    let mut stalled = Vec::new();
    while stalled.len() < STALLED {
        let stream = until("the flood", async || {
            let mut stream = TcpStream::connect(listener).await.ok()?;
            stream.read_exact(&mut [0; 1000]).await.ok()?;
            Some(stream)
        })
        .await;
        stalled.push(stream);
    }
    until("all legs to be stalled", async || {
        let held = gateways[0].metric("tombolo_gateway_legs_stalled").await;
        (held >= STALLED as f64 * 0.9).then_some(())
    })
    .await;
    let with = latencies(proxy, 500).await;
    for hundredth in [50, 90, 99] {
        println!(
            "p{hundredth}: {:?} without, {:?} with",
            percentile(&without, hundredth),
            percentile(&with, hundredth)
        );
    }
    for gateway in &gateways {
        let (memory, reset) = (gateway.memory_mb(), gateway.refused("stalled").await);
        println!("{}: {memory:?} MB, {reset} reset", gateway.name);
        gateway.is_sound(150);
    }
    // The bar itself is measured by the bench, on a quiet machine.
    let (without, with) = (percentile(&without, 99), percentile(&with, 99));
    assert!(with < without * 3 + Duration::from_millis(50), "p99 {without:?} without, {with:?} with");
    drop(stalled);
    tokio::join!(east.stop(), west.stop());
}
