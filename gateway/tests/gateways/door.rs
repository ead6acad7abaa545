//! Who is let in at the tunnel port, and what becomes of nonsense.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use quinn::{Connection, ConnectionError, Endpoint};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tombolo_api::frame;
use tombolo_api::proto::tunnel as wire;
use tombolo_core::id::Role;
use tombolo_core::refusal::Refusal;
use tombolo_gateway::config::{Congestion, LimitsConfig};
use tombolo_gateway::tunnel::{endpoint, refusal_of};
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ServerExpectation};

use crate::support::*;

const TUNNEL: &[u8] = b"tombolo-tunnel/1";
const PEERING: &[u8] = b"tombolo-peering/1";

/// Dials the tunnel port of `node` as whoever `svid` says.
async fn knock(
    node: &Node,
    server: &Cluster,
    svid: &SvidSource,
    alpn: &[&[u8]],
) -> Result<Connection, ConnectionError> {
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let expectation = ServerExpectation::Role { trust_domain: server.domain.clone(), role: Role::Gateway };
    let tls = tls::client_config(svid, &server.trusts(&[]), expectation, alpn);
    let limits = LimitsConfig::default();
    let config = endpoint::client_config(tls, endpoint::transport(Congestion::Cubic, &limits)).unwrap();
    let connection = endpoint.connect_with(config, node.tunnel, "gateway.tombolo").unwrap().await?;
    tokio::spawn(async move { endpoint.wait_idle().await });
    Ok(connection)
}

/// The reason with which the door closes.
async fn turned_away(node: &Node, server: &Cluster, svid: &SvidSource, alpn: &[&[u8]]) -> Refusal {
    let error = match knock(node, server, svid, alpn).await {
        Ok(connection) => tokio::time::timeout(Duration::from_secs(20), connection.closed()).await.unwrap(),
        Err(error) => error,
    };
    refusal_of(&error)
}

#[tokio::test]
async fn certificate_and_alpn_decide_at_the_door() {
    let pair = Pair::linked().await;
    let (east, west, node) = (&pair.east, &pair.west, &pair.east_node);
    let (foreign, impostor) = (Cluster::new("foreign"), Cluster::new("west"));
    let expired = SvidSource::new();
    let long_ago = Timestamp::now() - Duration::from_secs(7200);
    expired.set(west.svid_at("tombolo/gateway/gw-x", Duration::from_secs(60), long_ago));
    for (who, svid, alpn, want) in [
        ("no certificate", SvidSource::new(), TUNNEL, Refusal::NoCertificate),
        ("a workload of a peer", west.svid("ns/shop/sa/web"), TUNNEL, Refusal::WrongRole),
        ("a peer's federation", west.svid("tombolo/federation/f-1"), TUNNEL, Refusal::WrongRole),
        ("an unknown cluster's gateway", foreign.svid("tombolo/gateway/gw-x"), TUNNEL, Refusal::UnknownTrustDomain),
        ("a gateway with another root", impostor.svid("tombolo/gateway/gw-w"), TUNNEL, Refusal::BadCertificate),
        ("an expired gateway", expired, TUNNEL, Refusal::Expired),
        ("a gateway of this cluster", east.svid("tombolo/gateway/gw-y"), TUNNEL, Refusal::IdentityDenied),
        ("another protocol", west.svid("tombolo/gateway/gw-w"), b"h3", Refusal::BadAlpn),
        ("a workload that wants to peer", foreign.svid("ns/shop/sa/web"), PEERING, Refusal::WrongRole),
        ("an impostor that wants to peer", impostor.svid("tombolo/gateway/gw-w"), PEERING, Refusal::BadCertificate),
    ] {
        let before = node.refusals(want);
        assert_eq!(turned_away(node, east, &svid, &[alpn]).await, want, "{who}");
        eventually(who, || node.refusals(want) == before + 1).await;
    }
    echoes(&mut pair.west_node.accepted(WEB).await, "unimpressed").await;
}

#[tokio::test]
async fn before_the_verdict_a_caller_has_one_stream() {
    let pair = Pair::linked().await;
    // Bound to peer, so the connection stays for a while.
    let foreign = Cluster::new("foreign");
    let connection =
        knock(&pair.east_node, &pair.east, &foreign.svid("tombolo/gateway/gw-x"), &[PEERING]).await.unwrap();
    let _first = connection.open_bi().await.unwrap();
    let second = tokio::time::timeout(Duration::from_millis(300), connection.open_bi()).await;
    assert!(second.is_err(), "a second stream was granted");
    let uni = tokio::time::timeout(Duration::from_millis(300), connection.open_uni()).await;
    assert!(uni.is_err(), "a one-way stream was granted");
    let closed = tokio::time::timeout(Duration::from_secs(10), connection.closed()).await.unwrap();
    assert_eq!(refusal_of(&closed), Refusal::Timeout);
}

/// A tunnel held by the test itself, past its hello.
async fn tunnel(pair: &Pair, gateway: &str) -> (Connection, (quinn::SendStream, quinn::RecvStream)) {
    let svid = pair.west.svid(&format!("tombolo/gateway/{gateway}"));
    let connection = knock(&pair.east_node, &pair.east, &svid, &[TUNNEL]).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let hello = wire::ControlHello { cluster: "west".into(), gateway_id: gateway.into(), features: vec![] };
    let hello = wire::Control { kind: Some(wire::control::Kind::Hello(hello)) };
    send.write_all(&frame::encode(&hello)).await.unwrap();
    let mut head = [0; 2];
    recv.read_exact(&mut head).await.unwrap();
    let mut body = vec![0; usize::from(u16::from_be_bytes(head))];
    recv.read_exact(&mut body).await.unwrap();
    (connection, (send, recv))
}

/// Opens a stream with these bytes and reads the gateway's answer.
async fn answer(connection: &Connection, bytes: &[u8]) -> Refusal {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    let _ = send.finish();
    let answer = tokio::time::timeout(Duration::from_secs(20), recv.read_to_end(8192)).await.unwrap().unwrap();
    let (answer, _): (wire::StreamAnswer, _) = frame::decode(&answer, 8192).unwrap().unwrap();
    match answer.kind.unwrap() {
        wire::stream_answer::Kind::Refused(refused) => Refusal::from_code(&refused.code).unwrap(),
        wire::stream_answer::Kind::Accepted(_) => panic!("accepted"),
    }
}

#[tokio::test]
async fn stream_headers_are_bounded_and_must_say_what_the_client_hello_says() {
    let pair = Pair::linked().await;
    let (connection, _control) = tunnel(&pair, "gw-t").await;
    let full = |target: &str| format!("{target}.clusterset.local");
    let header = |target: &str, path: &[&str], hops_left| {
        let path = path.iter().map(ToString::to_string).collect();
        let header = wire::StreamHeader { target: full(target), path, hops_left, ..Default::default() };
        [frame::encode(&header), client_hello("80.web.shop.svc.east")].concat()
    };
    for (what, bytes, want) in [
        ("an absurd length", vec![0xff, 0xff], Refusal::BadHeader),
        ("garbage", vec![0, 3, 0xff, 0xff, 0xff], Refusal::BadHeader),
        ("half a header", vec![0, 9, 1], Refusal::BadHeader),
        ("nothing", vec![], Refusal::BadHeader),
        ("another target", header("81.web.shop.svc.east", &["west"], 4), Refusal::TargetMismatch),
        ("no target", header("web", &["west"], 4), Refusal::BadHeader),
        ("another sender's path", header("80.web.shop.svc.east", &["north"], 4), Refusal::BadHeader),
        ("a circle", header("80.web.shop.svc.east", &["east", "west"], 4), Refusal::RelayLoop),
        ("no hops left", header("80.web.shop.svc.east", &["west"], 0), Refusal::RelayLoop),
        (
            "no ClientHello",
            [&header("80.web.shop.svc.east", &["west"], 4)[..50], &[0x42; 200]].concat(),
            Refusal::BadHeader,
        ),
    ] {
        let got = answer(&connection, &bytes).await;
        let clear = got == want || (what == "no ClientHello" && got == Refusal::BadClientHello);
        assert!(clear, "{what}: {got:?}");
    }
    // The tunnel itself is none the worse.
    assert!(connection.close_reason().is_none());
    echoes(&mut pair.west_node.accepted(WEB).await, "beside it").await;
}

#[tokio::test]
async fn an_absurd_control_message_ends_only_its_own_tunnel() {
    let pair = Pair::linked().await;
    let (connection, (mut send, _recv)) = tunnel(&pair, "gw-t").await;
    send.write_all(&[0xff, 0xff]).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await.unwrap();
    assert_eq!(refusal_of(&closed), Refusal::BadHeader);
    echoes(&mut pair.west_node.accepted(WEB).await, "another tunnel").await;
}

#[tokio::test]
async fn a_hello_must_name_who_the_certificate_proves() {
    let pair = Pair::linked().await;
    let svid = pair.west.svid("tombolo/gateway/gw-t");
    let connection = knock(&pair.east_node, &pair.east, &svid, &[TUNNEL]).await.unwrap();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    let hello = wire::ControlHello { cluster: "west".into(), gateway_id: "gw-w".into(), features: vec![] };
    send.write_all(&frame::encode(&wire::Control { kind: Some(wire::control::Kind::Hello(hello)) })).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await.unwrap();
    assert_eq!(refusal_of(&closed), Refusal::IdentityDenied);
}

#[tokio::test]
async fn random_bytes_are_refused_and_counted() {
    let pair = Pair::linked().await;
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for length in [0, 1, 7, 21, 40, 1200, 1400, 9000] {
        for _ in 0..20 {
            let bytes: Vec<u8> = (0..length).map(|_| rand::random()).collect();
            udp.send_to(&bytes, pair.east_node.tunnel).await.unwrap();
        }
    }
    let refused = |node: &Node| node.refusals(Refusal::BadClientHello) + node.refusals(Refusal::BadHeader);
    let before = refused(&pair.west_node);
    for length in [1usize, 5, 12, 16, 200, 20_000] {
        let mut tcp = TcpStream::connect(pair.west_node.ingress).await.unwrap();
        let bytes: Vec<u8> = (0..length).map(|_| rand::random()).collect();
        let _ = tcp.write_all(&bytes).await;
        let _ = tcp.shutdown().await;
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    }
    eventually("all are counted", || refused(&pair.west_node) == before + 6).await;
    echoes(&mut pair.west_node.accepted(WEB).await, "unimpressed").await;
}

#[tokio::test]
async fn too_many_unfinished_legs_of_one_source_are_refused() {
    let limits = LimitsConfig { unfinished_legs_per_source: 4, ..Default::default() };
    let options = NodeOptions { limits, ..Default::default() };
    let served_by = Sidecar::new().await.echo();
    let pair = Pair::linked_with(NodeOptions::default(), options, served_by).await;
    let mut idle = Vec::new();
    for _ in 0..4 {
        idle.push(TcpStream::connect(pair.west_node.ingress).await.unwrap());
    }
    let mut fifth = TcpStream::connect(pair.west_node.ingress).await.unwrap();
    assert!(fifth.read(&mut [0]).await.is_err());
    assert_eq!(pair.west_node.refusals(Refusal::Overloaded), 1);
    drop(idle);
    let node = Arc::new(pair.west_node);
    eventually("there is room again", || node.refusals(Refusal::BadClientHello) == 4).await;
    echoes(&mut node.accepted(WEB).await, "room again").await;
}

#[tokio::test]
async fn handshakes_without_an_end_keep_nobody_out() {
    let limits = LimitsConfig { handshakes: 4, ..Default::default() };
    let options = NodeOptions { limits, ..Default::default() };
    let pair = Pair::linked_with(options, NodeOptions::default(), Sidecar::new().await.echo()).await;
    let node = &pair.east_node;
    // Tunnels whose hello never comes: each holds its place for seconds.
    let svid = pair.west.svid("tombolo/gateway/gw-t");
    let mut held = Vec::new();
    for _ in 0..12 {
        held.push(knock(node, &pair.east, &svid, &[TUNNEL]).await.unwrap());
    }
    let (late, _control) = tunnel(&pair, "gw-late").await;
    assert!(late.close_reason().is_none());
    eventually("the oldest made room", || node.refusals(Refusal::Overloaded) == 9).await;
    drop(held);
}
