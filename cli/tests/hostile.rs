//! Bad input at the real processes: each kind gets a clear refusal, a count in `/metrics` of the process that
//! refused, a line in its log; nothing panics, memory stays bounded, and requests go on crossing meanwhile.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError, Endpoint};
use serde_json::json;
use support::process::Seen;
use support::{World, app, curl, curl_until, link, serve, start_caller};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tombolo_api::frame;
use tombolo_api::proto::discovery::discovery_client::DiscoveryClient;
use tombolo_api::proto::discovery::{GatewayHello, GatewayRequest, SidecarRequest, gateway_request, sidecar_request};
use tombolo_api::proto::tunnel as wire;
use tombolo_core::door::{ALPN_PEERING, ALPN_TUNNEL};
use tombolo_core::id::{ClusterId, Role, SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use tombolo_core::service_account::Asked;
use tombolo_gateway::config::{Congestion, LimitsConfig};
use tombolo_gateway::tunnel::{endpoint, refusal_of};
use tombolo_leg::Alpn;
use tombolo_leg::dial::{Dialer, LegRequest, Via};
use tombolo_leg::http::{HttpLeg, HttpLimits, RecvBody};
use tombolo_testbed::Cluster;
use tombolo_trust::bundle::Bundle;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::grpc;
use tombolo_trust::identity::{self, FirstProof, IdentityConfig};
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::{ClusterBundle, TrustStore};
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ServerExpectation};

const WEB: &str = "http://web.shop.svc.clusterset.local/";
const WEB_TARGET: &str = "80.web.shop.svc.west.clusterset.local";
/// Of a debug build under attack, in MB; release builds need a fifth of it.
const MEMORY_MAX: u64 = 150;
const PATIENCE: Duration = Duration::from_secs(20);

/// East calls `web.shop` in west; `secret.shop` in west is exported to nobody.
struct Attacked {
    east: Cluster,
    west: Cluster,
    proxy: SocketAddr,
    processes: BTreeMap<&'static str, Seen>,
    _apps: [app::App; 2],
}

impl Attacked {
    async fn start(world: &World) -> Self {
        // Refusals of single requests are logged at debug.
        let level = "info,tombolo_federation=debug,tombolo_gateway=debug,tombolo_sidecar=debug,tombolo_leg=debug";
        let common = json!({ "log": { "level": level } });
        let (mut east, mut west) = tokio::join!(
            world.cluster_with("east", common.clone(), json!({})),
            world.cluster_with("west", common.clone(), json!({}))
        );
        let apps = [app::http("web-in-west").await, app::http("secret-in-west").await];
        serve(&mut west, "web", "http", "http", apps[0].address).await;
        serve(&mut west, "secret", "http", "http", apps[1].address).await;
        link(&west, &east).await;
        west.operator(&["export", "web.shop"]).await.unwrap();
        let proxy = start_caller(&mut east).await;
        curl_until(proxy, WEB, "web-in-west").await;
        let processes = [
            ("east federation", Seen::new(&east, "federation", "federation")),
            ("east gateway", Seen::new(&east, "gw", "gateway")),
            ("frontend", Seen::new(&east, "frontend", "sidecar")),
            ("west federation", Seen::new(&west, "federation", "federation")),
            ("west gateway", Seen::new(&west, "gw", "gateway")),
            ("web", Seen::new(&west, "web", "sidecar")),
            ("secret", Seen::new(&west, "secret", "sidecar")),
        ]
        .into();
        Self { east, west, proxy, processes, _apps: apps }
    }

    fn seen(&self, name: &str) -> &Seen {
        &self.processes[name]
    }

    /// A normal request still crosses.
    async fn crosses(&self, during: &str) {
        let answer = curl(self.proxy, &[WEB]).await;
        assert!(answer.status == 200 && answer.body.starts_with("web-in-west"), "{during}: {answer:?}");
    }

    /// After everything: the same processes, sound, and traffic crosses.
    async fn ends_well(mut self) {
        self.crosses("at the end").await;
        for seen in self.processes.values() {
            println!("{}: {:?} MB", seen.name, seen.memory_mb());
            seen.is_sound(MEMORY_MAX);
        }
        tokio::join!(self.east.stop(), self.west.stop());
    }
}

fn bundle(cluster: &Cluster) -> ClusterBundle {
    let bundle = Bundle::load(&Path::new(&cluster.state()).join("ca.pem")).unwrap();
    ClusterBundle { cluster: cluster.name.parse().unwrap(), bundle }
}

fn trusting(clusters: &[&Cluster]) -> TrustStore {
    let store = TrustStore::new();
    assert_eq!(store.replace_all(clusters.iter().map(|cluster| bundle(cluster)).collect()), []);
    store
}

/// An SVID that the cluster really issues, by a join token.
async fn joined(cluster: &Cluster, name: &str, identity: &[&str]) -> SvidSource {
    let token = cluster.dir().join(format!("{name}.token"));
    let out = token.display().to_string();
    cluster.operator(&[&["join", "add", "--out", &out], identity].concat()).await.unwrap();
    let config = IdentityConfig {
        federation: Seen::new(cluster, "federation", "federation").address("discovery").to_string(),
        ca: Path::new(&cluster.state()).join("ca.pem"),
        first_proof: Some(FirstProof::Join(token)),
        asked: Asked::Workload,
        state: cluster.dir().join(format!("{name}-of-the-test")),
    };
    let (svid, _trust) = identity::start(config).unwrap();
    tokio::time::timeout(PATIENCE, svid.wait()).await.unwrap();
    svid
}

/// An SVID of a root of the test's own.
fn forged(directory: &Path, name: &str, domain: &str, path: &str) -> SvidSource {
    let domain: TrustDomain = domain.parse().unwrap();
    let ca = CertificateAuthority::create_or_load(&directory.join(name), &domain).unwrap();
    issued(&ca, &domain, path, Duration::ZERO)
}

/// An SVID by the root of `cluster` that ended an hour ago.
fn expired(directory: &Path, cluster: &Cluster, path: &str) -> SvidSource {
    let domain: TrustDomain = format!("{}.tombolo", cluster.name).parse().unwrap();
    let copy = directory.join(format!("ca-of-{}", cluster.name));
    std::fs::create_dir_all(&copy).unwrap();
    for entry in std::fs::read_dir(cluster.state()).unwrap().flatten() {
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
    }
    let ca = CertificateAuthority::create_or_load(&copy, &domain).unwrap();
    issued(&ca, &domain, path, Duration::from_secs(7200))
}

fn issued(ca: &CertificateAuthority, domain: &TrustDomain, path: &str, ago: Duration) -> SvidSource {
    let (source, key) = (SvidSource::new(), IdentityKey::generate().unwrap());
    let id: SpiffeId = format!("spiffe://{domain}/{path}").parse().unwrap();
    let at = jiff::Timestamp::now() - ago;
    source.set(ca.issue_svid(&key, &id, Duration::from_secs(3600), at).unwrap());
    source
}

fn role(domain: &str, role: Role) -> ServerExpectation {
    ServerExpectation::Role { trust_domain: domain.parse().unwrap(), role }
}

fn web_ids() -> ServerExpectation {
    let ids = ["spiffe://west.tombolo/ns/shop/sa/web".parse().unwrap()];
    ServerExpectation::Ids { trust_domain: "west.tombolo".parse().unwrap(), ids: Arc::new(ids.into()) }
}

/// A TLS connection, and what the server says to one octet: in TLS 1.3 a client learns at its first read that its
/// certificate is refused.
async fn tls_dial(address: SocketAddr, name: &str, config: Arc<rustls::ClientConfig>) -> std::io::Result<()> {
    let tcp = TcpStream::connect(address).await?;
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let dialled = async {
        let mut stream = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await?;
        stream.write_all(b"P").await?;
        stream.read_exact(&mut [0]).await.map(drop)
    };
    tokio::time::timeout(PATIENCE, dialled).await.unwrap()
}

fn noise(length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length).map(|_| rand::random()).collect();
    // Neither a TLS record nor a PROXY header nor HTTP/2.
    bytes[0] = 0x80 | (bytes[0] & 0x0f);
    bytes
}

#[tokio::test]
async fn random_bytes_at_every_port() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let reason_at = |key: &str| match key {
        "discovery" | "legs" | "ingress" | "watch" | "inbound" => Some("bad-client-hello"),
        "outbound" => Some("bad-request"),
        "admin" => None,
        other => panic!("a port without an expectation: {other}"),
    };
    for seen in attacked.processes.values() {
        for (key, address) in seen.tcp_ports() {
            let reason = reason_at(&key);
            let before = match reason {
                Some(reason) => seen.refused(reason).await,
                None => 0.0,
            };
            let lengths = [9, 200, 5_000, 70_000];
            for length in lengths {
                let mut tcp = TcpStream::connect(address).await.unwrap();
                // A refusal in the middle of it resets the connection.
                let _ = tcp.write_all(&noise(length)).await;
                let _ = tcp.shutdown().await;
                let read = tokio::time::timeout(PATIENCE, tcp.read_to_end(&mut Vec::new())).await;
                assert!(read.is_ok(), "{key} of {} keeps {length} random octets", seen.name);
            }
            if let Some(reason) = reason {
                seen.has_refused(&format!("noise at {key}"), reason, before, lengths.len() as f64).await;
            }
        }
    }
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for gateway in ["east gateway", "west gateway"] {
        for length in [1, 7, 21, 40, 1200, 1400, 9000] {
            for _ in 0..50 {
                udp.send_to(&noise(length), attacked.seen(gateway).address("tunnel")).await.unwrap();
            }
        }
        attacked.crosses("under random datagrams").await;
    }
    attacked.ends_well().await;
}

/// Opens `count` connections that say the beginning of something, and then next to nothing.
async fn dribblers(address: SocketAddr, count: usize, beginning: &[u8]) -> Vec<TcpStream> {
    let mut held = Vec::new();
    for _ in 0..count {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        let _ = tcp.write_all(beginning).await;
        held.push(tcp);
    }
    for tcp in &mut held {
        let _ = tcp.write_all(&[1]).await;
    }
    held
}

/// The head of a TLS record of 512 octets, with a ClientHello that never becomes whole.
const HALF_HELLO: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];

#[tokio::test]
async fn connections_that_dribble_hold_up_nobody() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let mut last = Vec::new();
    for (who, key, beginning, reason) in [
        ("east gateway", "ingress", HALF_HELLO, "handshake-timeout"),
        ("west gateway", "ingress", HALF_HELLO, "handshake-timeout"),
        ("web", "inbound", HALF_HELLO, "handshake-timeout"),
        ("west federation", "discovery", HALF_HELLO, "handshake-timeout"),
        ("west federation", "legs", HALF_HELLO, "handshake-timeout"),
        ("east gateway", "watch", HALF_HELLO, "handshake-timeout"),
        ("frontend", "outbound", b"GET http://web.shop.svc.clusterset.local/ HTTP/1.1\r\nx-".as_slice(), ""),
    ] {
        let seen = attacked.seen(who);
        let before = seen.refused(reason).await;
        let mut held = dribblers(seen.address(key), 1_000, beginning).await;
        // Somebody who comes now is served, not queued behind those.
        let began = std::time::Instant::now();
        match key {
            "discovery" => drop(
                joined(&attacked.west, &format!("late-{who}").replace(' ', "-"), &["--workload", "shop/late"]).await,
            ),
            "watch" | "legs" => {
                let svid = joined(&attacked.east, &format!("late-{key}"), &["--workload", "shop/late"]).await;
                let trust = trusting(&[&attacked.east, &attacked.west]);
                let (expected, name) = match key {
                    "watch" => (role("east.tombolo", Role::Gateway), "gateway"),
                    _ => (
                        role("west.tombolo", Role::Federation),
                        "0.federation.tombolo-system.svc.west.clusterset.local",
                    ),
                };
                // Whatever becomes of it, it is an answer.
                let _ = tls_dial(seen.address(key), name, tls::client_config(&svid, &trust, expected, &[b"h2"])).await;
            }
            _ => attacked.crosses(&format!("while {key} of {who} is dribbled at")).await,
        }
        let took = began.elapsed();
        assert!(took < Duration::from_secs(3), "{key} of {who}: {took:?} beside those that dribble");
        attacked.crosses(&format!("while {key} of {who} is dribbled at")).await;
        seen.is_sound(MEMORY_MAX);
        // The last ones are waited for until their time is up, all ports together.
        last.push((seen, key, reason, before, held.split_off(held.len() - 5)));
    }
    for (seen, key, reason, before, _held) in &last {
        if !reason.is_empty() {
            seen.has_refused(&format!("dribbling at {key}"), reason, *before, 1.0).await;
        }
    }
    attacked.ends_well().await;
}

#[tokio::test]
async fn oversized_requests_at_the_proxy() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let seen = attacked.seen("frontend");
    let many: Vec<String> = (0..200).map(|number| format!("x-{number}: 1")).collect();
    let many: Vec<&str> = many.iter().flat_map(|header| ["-H", header]).chain([WEB]).collect();
    let long = format!("x-long: {}", "a".repeat(100_000));
    for (what, arguments) in [("a header of 100 kB", vec!["-H", &long, WEB]), ("200 fields", many)] {
        let before = seen.refused("bad-request").await;
        let answer = curl(attacked.proxy, &arguments).await;
        assert_eq!(answer.status, 431, "{what}: {answer:?}");
        seen.has_refused(what, "bad-request", before, 1.0).await;
        attacked.crosses(what).await;
    }
    for (what, request) in [
        ("two hosts", "GET / HTTP/1.1\r\nhost: web.shop\r\nhost: other\r\n\r\n"),
        ("two lengths", "POST / HTTP/1.1\r\nhost: web.shop\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"),
        (
            "a length and chunks",
            "POST / HTTP/1.1\r\nhost: web.shop\r\ncontent-length: 3\r\ntransfer-encoding: identity\r\n\r\nabc",
        ),
        ("a bare name", "GET\r\n\r\n"),
    ] {
        let before = seen.refused("bad-request").await;
        let mut tcp = TcpStream::connect(attacked.proxy).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut said = Vec::new();
        let read = tokio::time::timeout(PATIENCE / 4, tcp.read_to_end(&mut said)).await;
        assert!(read.is_ok(), "{what} leaves the connection open: {}", String::from_utf8_lossy(&said));
        let said = String::from_utf8_lossy(&said);
        assert!(said.starts_with("HTTP/1.1 400"), "{what}: {said}");
        seen.has_refused(what, "bad-request", before, 1.0).await;
    }
    attacked.ends_well().await;
}

#[tokio::test]
async fn certificates_that_prove_nothing() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let (east, west, here) = (&attacked.east, &attacked.west, world.directory.path());
    let trust = trusting(&[east, west]);
    let workload = "ns/shop/sa/frontend";
    for (what, svid, want) in [
        ("no certificate", SvidSource::new(), Refusal::NoCertificate),
        ("an expired one", expired(here, east, workload), Refusal::Expired),
        ("a stranger's", forged(here, "stranger", "nowhere.tombolo", workload), Refusal::UnknownTrustDomain),
        ("another root's for our domain", forged(here, "forger", "east.tombolo", workload), Refusal::BadCertificate),
    ] {
        let federation = role("west.tombolo", Role::Federation);
        let config = |expected| tls::client_config(&svid, &trust, expected, &[b"h2"]);
        for (process, key, name, config) in [
            ("web", "inbound", WEB_TARGET, config(web_ids())),
            ("west federation", "discovery", "federation", config(federation)),
            ("east gateway", "watch", "gateway", config(role("east.tombolo", Role::Gateway))),
        ] {
            if want == Refusal::NoCertificate && key == "discovery" {
                // Whoever has none yet asks for one here; what it may not do is below.
                continue;
            }
            let seen = attacked.seen(process);
            let before = seen.refused(want.code()).await;
            let error = tls_dial(seen.address(key), name, config).await.unwrap_err();
            let told = tls::refused_by_peer(&error);
            assert_eq!(told, Some(want), "{what} at {key}: {error}");
            seen.has_refused(&format!("{what} at {key}"), want.code(), before, 1.0).await;
        }
        attacked.crosses(what).await;
    }

    // Another protocol, and no target at all, by somebody who is trusted.
    let svid = joined(east, "known", &["--workload", "shop/frontend"]).await;
    let seen = attacked.seen("web");
    for (what, name, alpn, want) in [
        ("another ALPN", WEB_TARGET, b"http/1.1".as_slice(), Refusal::BadAlpn),
        ("a name that is no target", "www.example.com", b"h2", Refusal::BadTarget),
    ] {
        let before = seen.refused(want.code()).await;
        let config = tls::client_config(&svid, &trust, web_ids(), &[alpn]);
        tls_dial(seen.address("inbound"), name, config).await.unwrap_err();
        seen.has_refused(what, want.code(), before, 1.0).await;
    }
    attacked.ends_well().await;
}

#[tokio::test]
async fn a_workload_is_not_a_gateway() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let (east, west) = (&attacked.east, &attacked.west);
    let (federation, trust) = (attacked.seen("west federation"), trusting(&[east, west]));
    let inside = joined(west, "inside", &["--workload", "shop/inside"]).await;
    let outside = joined(east, "outside", &["--workload", "shop/outside"]).await;
    let address = federation.address("discovery").to_string();
    let discovery = |svid: &SvidSource| {
        let tls = tls::client_config(svid, &trust, role("west.tombolo", Role::Federation), &[b"h2"]);
        DiscoveryClient::new(grpc::connect(&address, tls).unwrap())
    };
    let hello = || {
        let hello = GatewayHello { gateway_id: "gw".into(), ..Default::default() };
        futures::stream::iter([GatewayRequest { kind: Some(gateway_request::Kind::Hello(hello)) }])
    };
    let asks = || {
        futures::stream::iter([SidecarRequest { kind: Some(sidecar_request::Kind::Subscribe("shop/secret".into())) }])
    };
    for (what, svid, want) in [
        ("nobody as a gateway", SvidSource::new(), Refusal::NoCertificate),
        ("a workload as a gateway", inside.clone(), Refusal::WrongRole),
        ("another cluster's workload as a gateway", outside.clone(), Refusal::UnknownTrustDomain),
    ] {
        let before = federation.refused(want.code()).await + federation.refused("identity-denied").await;
        let status = discovery(&svid).gateway(hello()).await.unwrap_err();
        println!("{what}: {status:?}");
        support::until(what, async || {
            let now = federation.refused(want.code()).await + federation.refused("identity-denied").await;
            (now > before).then_some(())
        })
        .await;
    }
    let before = federation.refused("no-certificate").await;
    discovery(&SvidSource::new()).sidecar(asks()).await.unwrap_err();
    federation.has_refused("nobody as a sidecar", "no-certificate", before, 1.0).await;
    // A gateway of the other cluster is none of this one.
    let before = federation.refused("identity-denied").await;
    let gateway = joined(east, "gw-of-east", &["--gateway", "gw-test"]).await;
    discovery(&gateway).gateway(hello()).await.unwrap_err();
    federation.has_refused("another cluster's gateway", "identity-denied", before, 1.0).await;

    let door = attacked.seen("west gateway");
    for (what, svid, alpn, want) in [
        ("a workload at the tunnel port", &outside, ALPN_TUNNEL, Refusal::WrongRole),
        ("a workload that wants to peer", &outside, ALPN_PEERING, Refusal::WrongRole),
        ("this cluster's own workload", &inside, ALPN_TUNNEL, Refusal::WrongRole),
        ("another protocol", &gateway, b"h3".as_slice(), Refusal::BadAlpn),
        ("no certificate", &SvidSource::new(), ALPN_TUNNEL, Refusal::NoCertificate),
    ] {
        let before = door.refused(want.code()).await;
        let error = match knock(door.address("tunnel"), svid, &trust, alpn).await {
            Ok(connection) => tokio::time::timeout(PATIENCE, connection.closed()).await.unwrap(),
            Err(error) => error,
        };
        assert_eq!(refusal_of(&error), want, "{what}");
        door.has_refused(what, want.code(), before, 1.0).await;
    }
    attacked.ends_well().await;
}

/// Dials a tunnel port as whoever `svid` says.
async fn knock(
    address: SocketAddr,
    svid: &SvidSource,
    trust: &TrustStore,
    alpn: &[u8],
) -> Result<Connection, ConnectionError> {
    let dialler = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let tls = tls::client_config(svid, trust, role("west.tombolo", Role::Gateway), &[alpn]);
    let transport = endpoint::transport(Congestion::Cubic, &LimitsConfig::default());
    let config = endpoint::client_config(tls, transport).unwrap();
    dialler.connect_with(config, address, "gateway.tombolo").unwrap().await
}

#[tokio::test]
async fn what_is_not_exported_stays_inside() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let (east, west) = (&attacked.east, &attacked.west);
    let trust = trusting(&[east, west]);
    let svid = joined(east, "prober", &["--workload", "shop/frontend"]).await;
    let (near, far) = (attacked.seen("east gateway"), attacked.seen("west gateway"));
    for (what, target) in [
        ("a service that is not exported", "80.secret.shop.svc.west.clusterset.local"),
        ("a service that does not exist", "80.nothing.shop.svc.west.clusterset.local"),
    ] {
        let before = (near.refused("not-exported").await, far.refused("not-exported").await);
        let config = tls::client_config(&svid, &trust, web_ids(), &[b"h2"]);
        let error = tls_dial(near.address("ingress"), target, config).await.unwrap_err();
        assert!(error.to_string().contains("UnrecognisedName"), "{what}: {error}");
        far.has_refused(what, "not-exported", before.1, 1.0).await;
        near.has_refused(what, "not-exported", before.0, 1.0).await;
        attacked.crosses(what).await;
    }

    // Past the gateways, at the sidecar itself: the same answer.
    let secret = attacked.seen("secret");
    let before = secret.refused("not-exported").await;
    let ids = ["spiffe://west.tombolo/ns/shop/sa/secret".parse::<SpiffeId>().unwrap()];
    let request = LegRequest {
        target: "80.secret.shop.svc.west.clusterset.local".parse().unwrap(),
        trust_domain: "west.tombolo".parse().unwrap(),
        server_ids: Arc::new(ids.into()),
        via: Via::Direct(secret.address("inbound").to_string()),
        alpn: Alpn::H2,
        trace: None,
        tracestate: None,
        deadline: PATIENCE,
    };
    let leg = Dialer::new(svid, trust).dial(request).await.unwrap();
    let leg = HttpLeg::start(leg, HttpLimits::default()).await.unwrap();
    let request = http::Request::get("http://web.shop.svc.clusterset.local/").body(RecvBody::empty()).unwrap();
    let response = leg.send(request).await.unwrap();
    assert_eq!(response.status(), 403);
    assert_eq!(response.headers()["tombolo-refusal"], "not-exported");
    secret.has_refused("a direct leg", "not-exported", before, 1.0).await;
    attacked.ends_well().await;
}

#[tokio::test]
async fn absurd_headers_on_a_tunnel() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let (east, west) = (&attacked.east, &attacked.west);
    let gateway = joined(east, "gw-of-the-test", &["--gateway", "gw-test"]).await;
    let door = attacked.seen("west gateway");
    let trust = trusting(&[east, west]);
    let connection = knock(door.address("tunnel"), &gateway, &trust, ALPN_TUNNEL).await.unwrap();
    let (mut control, _control_recv) = connection.open_bi().await.unwrap();
    let cluster: ClusterId = "east".parse().unwrap();
    let hello = wire::ControlHello { cluster: cluster.to_string(), gateway_id: "gw-test".into(), features: vec![] };
    control.write_all(&frame::encode(&wire::Control { kind: Some(wire::control::Kind::Hello(hello)) })).await.unwrap();

    let header = |path: Vec<String>, tracestate: usize| {
        frame::encode(&wire::StreamHeader {
            target: WEB_TARGET.into(),
            path,
            hops_left: 4,
            tracestate: "a".repeat(tracestate),
            ..Default::default()
        })
    };
    let far_away: Vec<String> = (0..500).map(|number| format!("c{number}")).collect();
    for (what, bytes, want) in [
        ("a length of 65,535", vec![0xff, 0xff], Refusal::BadHeader),
        ("a length of 65,535 and as much", [&[0xff, 0xff][..], &noise(65_535)].concat(), Refusal::BadHeader),
        ("one octet too many", header(vec!["east".into()], 4_200), Refusal::BadHeader),
        ("a field longer than its header", vec![0, 6, 0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], Refusal::BadHeader),
        ("a path of 500 clusters", header(far_away, 0), Refusal::RelayLoop),
        (
            "a ClientHello without an end",
            [&header(vec!["east".into()], 0)[..], &[0x16, 3, 1, 0xff, 0xff], &noise(30_000)].concat(),
            Refusal::BadClientHello,
        ),
    ] {
        let before = door.refused(want.code()).await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        // The gateway stops the stream as soon as it has seen enough.
        let _ = send.write_all(&bytes).await;
        let _ = send.finish();
        let answer = tokio::time::timeout(PATIENCE, recv.read_to_end(8192)).await.unwrap().unwrap();
        let (answer, _): (wire::StreamAnswer, _) = frame::decode(&answer, 8192).unwrap().unwrap();
        let Some(wire::stream_answer::Kind::Refused(refused)) = answer.kind else { panic!("{what} is accepted") };
        assert_eq!(refused.code, want.code(), "{what}");
        door.has_refused(what, want.code(), before, 1.0).await;
        assert!(connection.close_reason().is_none(), "{what} ended the tunnel");
        attacked.crosses(what).await;
    }
    // An absurd control message ends this tunnel and no other.
    control.write_all(&[0xff, 0xff]).await.unwrap();
    let closed = tokio::time::timeout(PATIENCE, connection.closed()).await.unwrap();
    assert_eq!(refusal_of(&closed), Refusal::BadHeader);
    attacked.crosses("after an absurd control message").await;
    attacked.ends_well().await;
}

#[tokio::test]
async fn only_tombolo_speaks_in_its_name() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let forged = [
        "x-forwarded-client-cert: URI=spiffe://west.tombolo/ns/shop/sa/admin",
        "x_forwarded_client_cert: URI=spiffe://west.tombolo/ns/shop/sa/admin",
        "tombolo-refusal: no-tunnel",
        "tombolo-server-id: spiffe://west.tombolo/ns/shop/sa/admin",
        "x-forwarded-for: 192.0.2.1",
        "connection: x-forwarded-client-cert",
    ];
    let headers: Vec<&str> = forged.iter().flat_map(|header| ["-H", header]).collect();
    let url = format!("{WEB}forge");
    let answer = curl(attacked.proxy, &[&headers[..], &[&url]].concat()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut got: Vec<&str> = answer.body.split(' ').filter(|name| name.contains("x-") || name.contains('_')).collect();
    got.extend(answer.body.split(' ').filter(|name| name.starts_with("tombolo")));
    got.sort_unstable();
    assert_eq!(got, ["x-forwarded-client-cert", "x-forwarded-for"], "{answer:?}");
    assert_eq!((answer.header("tombolo-refusal"), answer.header("tombolo-cluster")), (None, None), "{answer:?}");
    let answer = curl(attacked.proxy, &[&headers[..], &[WEB]].concat()).await;
    assert!(answer.body.contains(";URI=spiffe://east.tombolo/ns/shop/sa/frontend "), "{answer:?}");
    attacked.ends_well().await;
}

#[tokio::test]
async fn nobody_is_told_a_secret() {
    let world = World::new().await;
    let attacked = Attacked::start(&world).await;
    let token = attacked.west.operator(&["peer", "invite", "--imports", "none"]).await.unwrap();
    let mut secrets = vec![token.clone()];
    for cluster in [&attacked.east, &attacked.west] {
        for entry in std::fs::read_dir(cluster.dir()).unwrap().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "join") {
                let text = std::fs::read_to_string(entry.path()).unwrap();
                secrets.push(text.trim().rsplit('.').next().unwrap().to_owned());
            }
        }
    }
    for seen in attacked.processes.values() {
        let mut said = seen.log();
        for page in ["/config", "/state", "/metrics", "/readyz"] {
            said.push_str(&seen.get(page).await.unwrap());
        }
        assert!(!said.contains("PRIVATE"), "{}", seen.name);
        for secret in &secrets {
            assert!(!said.contains(secret.as_str()), "{} tells a secret", seen.name);
        }
    }
    for cluster in [&attacked.east, &attacked.west] {
        check_modes(cluster);
    }
    attacked.ends_well().await;
}

/// Keys and tokens are for their owner alone, and so is every folder of state.
fn check_modes(cluster: &Cluster) {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    for entry in std::fs::read_dir(cluster.dir()).unwrap().flatten() {
        let path = entry.path();
        let is_state = path.is_dir() && path.file_name().is_some_and(|name| name != "cluster");
        if path.extension().is_some_and(|extension| extension == "join") {
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
        if is_state {
            check_folder(&path, &mode);
        }
    }
}

fn check_folder(folder: &Path, mode: &impl Fn(&Path) -> u32) {
    // What is public anyway, and what says where a process listens.
    let public = |name: &str| matches!(name, "ca.pem" | "bundle.pem") || name.ends_with(".json");
    assert_eq!(mode(folder), 0o700, "{}", folder.display());
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() {
            check_folder(&path, mode);
        } else if !public(&name.to_string_lossy()) {
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
        let text = std::fs::read(&path).unwrap_or_default();
        let has_key = String::from_utf8_lossy(&text).contains("PRIVATE KEY");
        assert!(!has_key || mode(&path) == 0o600, "{}", path.display());
    }
}
