//! What a leg carries, and how it ends.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tombolo_core::refusal::Refusal;
use tombolo_core::trace::TraceParent;
use tombolo_gateway::config::LimitsConfig;
use tombolo_leg::proxy_header::ProxyHeader;
use tombolo_runtime::telemetry::{TelemetryConfig, Tracer};

use crate::support::*;

#[tokio::test]
async fn a_leg_crosses_and_names_its_way() {
    let pair = Pair::linked().await;
    let (mut tcp, status) = pair.west_node.leg(WEB).await;
    let crossing = status.unwrap();
    let gateways: Vec<_> = crossing.hops.iter().map(|hop| hop.gateway_id.as_str()).collect();
    assert_eq!(gateways, ["gw-w", "gw-e"]);
    assert_eq!(crossing.path, [pair.west.id.clone(), pair.east.id.clone()]);
    echoes(&mut tcp, "hello").await;
    let long = "x".repeat(3_000_000);
    let (mut read, mut write) = tcp.split();
    let sent = async {
        write.write_all(long.as_bytes()).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let (_, read) = tokio::join!(sent, read.read_to_end(&mut back));
    assert_eq!(read.unwrap(), long.len());
    assert!(back == long.as_bytes());
    eventually("the legs end", || pair.west_node.gateway().legs() == 0 && pair.east_node.gateway().legs() == 0).await;
}

#[tokio::test]
async fn the_spans_of_both_gateways_are_named_and_belong_to_the_callers_trace() {
    // Nobody collects them here: what counts is which they are.
    let config = TelemetryConfig { otlp: Some("http://127.0.0.1:1".into()), ..Default::default() };
    let options = |service| NodeOptions { tracer: Tracer::new(&config, service, &[]).unwrap(), ..Default::default() };
    let served_by = Sidecar::new().await.echo();
    let pair = Pair::linked_with(options("gw-e"), options("gw-w"), served_by).await;
    let trace: TraceParent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap();
    let header = ProxyHeader { status_wanted: true, trace: Some(trace), ..Default::default() };
    let (_tcp, status) = open_with(pair.west_node.ingress, WEB, header).await;
    let spans: Vec<_> = status.unwrap().hops.iter().map(|hop| hop.span.unwrap()).collect();
    assert_eq!(spans.len(), 2);
    assert!(spans.iter().all(|span| span.trace_id == trace.trace_id && span.span_id != trace.span_id));
    assert_ne!(spans[0].span_id, spans[1].span_id);
}

#[tokio::test]
async fn a_half_close_is_carried_as_a_half_close() {
    let sidecar = Sidecar::new().await;
    let pair = Pair::linked_with(NodeOptions::default(), NodeOptions::default(), sidecar.address).await;
    // The answer comes after the request's end.
    let (mut client, mut server) = tokio::join!(pair.west_node.accepted(WEB), sidecar.accept());
    server.write_all(b"hi").await.unwrap();
    client.read_exact(&mut [0; 2]).await.unwrap();
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).await.unwrap();
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));

    // The other way round: the server ends first, the client goes on.
    let (mut client, mut server) = tokio::join!(pair.west_node.accepted(WEB), sidecar.accept());
    server.write_all(b"answer").await.unwrap();
    server.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    client.write_all(b"afterthought").await.unwrap();
    drop(client);
    let mut afterthought = String::new();
    server.read_to_string(&mut afterthought).await.unwrap();
    assert_eq!((answer.as_str(), afterthought.as_str()), ("answer", "afterthought"));
}

fn reset(tcp: TcpStream) {
    tombolo_gateway::copy::reset_tcp(&tcp);
}

async fn is_reset(tcp: &mut TcpStream) {
    let end = tokio::time::timeout(Duration::from_secs(20), tcp.read(&mut [0; 64])).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_is_carried_as_a_reset() {
    let sidecar = Sidecar::new().await;
    let pair = Pair::linked_with(NodeOptions::default(), NodeOptions::default(), sidecar.address).await;
    let (mut client, mut server) = tokio::join!(pair.west_node.accepted(WEB), sidecar.accept());
    server.write_all(b"x").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    reset(client);
    is_reset(&mut server).await;

    let (mut client, server) = tokio::join!(pair.west_node.accepted(WEB), sidecar.accept());
    reset(server);
    is_reset(&mut client).await;

    // Also when the other direction has ended in order before.
    let (mut client, mut server) = tokio::join!(pair.west_node.accepted(WEB), sidecar.accept());
    server.write_all(b"x").await.unwrap();
    client.shutdown().await.unwrap();
    server.read_to_end(&mut Vec::new()).await.unwrap();
    reset(server);
    client.read_exact(&mut [0]).await.unwrap();
    is_reset(&mut client).await;
    eventually("the legs end", || pair.west_node.gateway().legs() == 0 && pair.east_node.gateway().legs() == 0).await;
}

#[tokio::test]
async fn a_leg_whose_server_says_nothing_is_closed() {
    let sidecar = Sidecar::new().await;
    let pair = Pair::linked_with(NodeOptions::default(), NodeOptions::default(), sidecar.address).await;
    let (mut client, _server) = tokio::join!(pair.west_node.accepted(WEB), sidecar.accept());
    let start = Instant::now();
    is_reset(&mut client).await;
    assert!(start.elapsed() >= Duration::from_secs(4), "{:?}", start.elapsed());
}

#[tokio::test]
async fn what_may_not_be_reached_is_refused_with_its_reason() {
    let mut pair = Pair::linked().await;
    let nowhere = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    pair.east_node.delivers("shop/dead", 80, nowhere, &[&pair.west]);
    pair.east_node.delivers("shop/private", 80, nowhere, &[]);
    for (target, want) in [
        ("80.nothing.shop.svc.east", Refusal::NotExported),
        ("80.private.shop.svc.east", Refusal::NotExported),
        ("81.web.shop.svc.east", Refusal::UnknownPort),
        ("e-zz.80.web.shop.svc.east", Refusal::EndpointGone),
        ("80.dead.shop.svc.east", Refusal::EndpointUnreachable),
        ("80.web.shop.svc.north", Refusal::UnknownCluster),
        ("80.web.shop.svc.west", Refusal::UnknownService),
        ("443.federation.tombolo-system.svc.east", Refusal::NoEndpoint),
        ("web.shop", Refusal::BadTarget),
    ] {
        let (before, refused) = (pair.west_node.refusals(want), pair.west_node.refused(target).await);
        assert_eq!(refused, want, "{target}");
        assert_eq!(pair.west_node.refusals(want), before + 1, "{target}");
    }
    assert!(pair.east_node.refusals(Refusal::NotExported) >= 2);
    echoes(&mut pair.west_node.accepted(&format!("e-a1.{WEB}")).await, "still there").await;
}

#[tokio::test]
async fn the_federation_and_own_services_are_reached_without_an_export() {
    let mut pair = Pair::linked().await;
    pair.east_node.snapshot.federation_leg_address = Some(Sidecar::new().await.echo().to_string());
    pair.east_node.gateway().set_snapshot(pair.east_node.snapshot.clone());
    echoes(&mut pair.west_node.accepted("443.federation.tombolo-system.svc.east").await, "sync").await;
    echoes(&mut pair.east_node.accepted(WEB).await, "at home").await;
}

#[tokio::test]
async fn without_a_status_frame_a_refusal_is_a_tls_alert() {
    let pair = Pair::linked().await;
    let mut tcp = TcpStream::connect(pair.west_node.ingress).await.unwrap();
    tcp.write_all(&client_hello("80.no.shop.svc.east")).await.unwrap();
    let mut alert = Vec::new();
    tcp.read_to_end(&mut alert).await.unwrap();
    assert_eq!(alert, [0x15, 3, 3, 0, 2, 2, 112]);
}

#[tokio::test]
async fn stalled_readers_hold_up_nobody_and_are_reset_above_the_budget() {
    const STALLED: usize = 24;
    let limits = LimitsConfig { stalled: 16 * 384 * 1024, ..Default::default() };
    let options = || NodeOptions { limits: limits.clone(), ..Default::default() };
    let sidecar = Sidecar::new().await;
    let pair = Pair::linked_with(options(), options(), sidecar.address).await;
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let (client, mut server) = tokio::join!(pair.west_node.accepted(WEB), sidecar.accept());
        socket2::SockRef::from(&client).set_recv_buffer_size(4096).unwrap();
        stalled.push(client);
        tokio::spawn(async move {
            let chunk = vec![7; 64 * 1024];
            while server.write_all(&chunk).await.is_ok() {}
        });
    }
    eventually("the budget is used up", || pair.west_node.refusals(Refusal::Stalled) >= (STALLED - 16) as u64).await;
    assert!(pair.west_node.gateway().stalls.stalled() <= 16);

    let echo = tokio::spawn(async move {
        loop {
            let mut tcp = sidecar.accept().await;
            tokio::spawn(async move {
                let (mut read, mut write) = tcp.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let mut live = pair.west_node.accepted(WEB).await;
    let mut worst = Duration::ZERO;
    for _ in 0..50 {
        let start = Instant::now();
        echoes(&mut live, "through").await;
        worst = worst.max(start.elapsed());
    }
    assert!(worst < Duration::from_secs(1), "{worst:?}");
    echo.abort();
}
