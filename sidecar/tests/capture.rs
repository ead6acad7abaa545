//! Captured connections over real sockets. What the kernel would tell of where a connection was going is told by the
//! test; the redirection itself is tested in network namespaces, with the whole binary.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{Gate, Mood, PORTS, World, bounded, eventually, share};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tombolo_core::addresses::mesh::{Holder, MeshAddresses, blocks};
use tombolo_core::addresses::{Number, Ranges};
use tombolo_core::id::{ClusterId, ServiceName};
use tombolo_core::model::Origin;
use tombolo_leg::discovery::{InboundGrants, InboundPolicies, ServiceState};
use tombolo_leg::opaque::reset;
use tombolo_runtime::process::Process;
use tombolo_sidecar::capture::config::Plaintext;
use tombolo_sidecar::capture::inbound::CapturedInbound;
use tombolo_sidecar::capture::loops::Loops;
use tombolo_sidecar::capture::observe::Meters;
use tombolo_sidecar::capture::outbound::CapturedOutbound;
use tombolo_sidecar::capture::{Captured, Origin as Destination, run};
use tombolo_sidecar::config::ServiceConfig;
use tombolo_sidecar::inbound::{Authority, Inbound};

/// The virtual address of `shop/web`.
const WEB: &str = "240.1.0.1";

fn told() -> MeshAddresses {
    let mut addresses = MeshAddresses::default();
    addresses.handle_ranges(Ranges::default());
    let holder = |number, name: &str| (Number(number), Holder::Service, name.parse().unwrap());
    for (number, block) in blocks([holder(1, "shop/web"), holder(2, "shop/gone")]) {
        addresses.handle_block(number, block).unwrap();
    }
    addresses.handle_complete(&[0].into());
    addresses
}

/// A connection to a listener of the test, as the application sees it and as the sidecar takes it.
async fn taken() -> (TcpStream, TcpStream, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, peer) = listener.accept().await.unwrap();
    (near, far, peer)
}

async fn served(captured: &Arc<impl Captured>, origin: SocketAddr) -> TcpStream {
    let (near, far, peer) = taken().await;
    tokio::spawn(captured.clone().serve(far, peer, origin));
    near
}

/// The value of one line of the metrics.
fn metric(process: &Process, line: &str) -> u64 {
    let text = process.metrics.encode();
    let value = text.lines().find_map(|text| text.strip_prefix(line)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {line} in\n{text}"))
}

fn connections(process: &Process, direction: &str, outcome: &str) -> u64 {
    let line = format!("tombolo_captured_connections_total{{direction=\"{direction}\",outcome=\"{outcome}\"}}");
    metric(process, &line)
}

async fn is_reset(connection: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    let end = bounded(connection.read_to_end(&mut rest)).await;
    assert!(rest.is_empty(), "{rest:?}");
    end.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

struct Site {
    world: World,
    process: Process,
    addresses: watch::Sender<MeshAddresses>,
    captured: Arc<CapturedOutbound>,
}

impl Site {
    async fn new(addresses: MeshAddresses, wait: Duration) -> Self {
        let process = Process::bare("sidecar");
        let world = World::of("limits: {discoveryWait: 200ms}\n", &process).await;
        let (addresses, known) = watch::channel(addresses);
        let meters = Meters::new(&process.metrics);
        let captured = CapturedOutbound::new(world.outbound.clone(), known, wait, Loops::default(), &meters);
        Self { world, process, addresses, captured }
    }

    async fn to(&self, origin: &str) -> TcpStream {
        served(&self.captured, origin.parse().unwrap()).await
    }

    fn refused(&self) -> u64 {
        connections(&self.process, "outbound", "refused")
    }
}

#[tokio::test]
async fn an_address_of_the_mesh_is_carried_as_its_service() {
    let site = Site::new(told(), Duration::from_secs(2)).await;
    for address in [format!("{WEB}:80"), "[fd74:6f6d:626f::1]:80".to_owned(), format!("[::ffff:{WEB}]:80")] {
        let mut connection = site.to(&address).await;
        // The application's own word on where it is going stays its own: the address decides.
        connection.write_all(b"GET /seen HTTP/1.1\r\nHost: old.example\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        bounded(connection.read_to_string(&mut answer)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("old.example"), "{answer}");
    }
    let mut connection = site.to(&format!("{WEB}:5432")).await;
    let mut greeting = [0; 16];
    bounded(connection.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"hello from east\n");
    assert_eq!(connections(&site.process, "outbound", "mesh"), 4);
    assert_eq!(connections(&site.process, "outbound", "passed"), 0);
    assert_eq!(site.world.local.requests() + site.world.remote.requests(), 3);
}

#[tokio::test]
async fn what_is_not_of_the_mesh_passes_on_as_it_is() {
    // Nothing is known of the mesh, and nothing needs to be for these.
    let site = Site::new(MeshAddresses::default(), Duration::from_secs(60)).await;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address).await else { continue };
        let address = listener.local_addr().unwrap();
        let mut near = site.to(&address.to_string()).await;
        // The server speaks first, and half-closes go through in both directions.
        let (mut far, _) = bounded(listener.accept()).await.unwrap();
        far.write_all(b"220 ready\r\n").await.unwrap();
        let mut greeting = [0; 11];
        bounded(near.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 ready\r\n");
        let octets: Vec<u8> = (0..1_000_000_u32).map(|n| n as u8).collect();
        let (sent, got) = tokio::join!(
            async {
                near.write_all(&octets).await.unwrap();
                near.shutdown().await.unwrap();
                let mut rest = Vec::new();
                near.read_to_end(&mut rest).await.unwrap();
                rest
            },
            async {
                let mut all = Vec::new();
                far.read_to_end(&mut all).await.unwrap();
                far.write_all(b"bye").await.unwrap();
                far.shutdown().await.unwrap();
                all
            }
        );
        assert!(sent == b"bye" && got == octets);
        // A reset is carried as one, either way.
        let mut near = site.to(&address.to_string()).await;
        let (mut far, _) = bounded(listener.accept()).await.unwrap();
        far.write_all(b"!").await.unwrap();
        assert_eq!(bounded(near.read_u8()).await.unwrap(), b'!');
        reset(far);
        assert!(is_reset(&mut near).await);
        let near = site.to(&address.to_string()).await;
        let (mut far, _) = bounded(listener.accept()).await.unwrap();
        reset(near);
        assert!(is_reset(&mut far).await);
    }
    let passed = connections(&site.process, "outbound", "passed");
    assert!(passed == 3 || passed == 6, "{passed}");
    assert_eq!(site.refused(), 0);
    eventually("nothing is left", || metric(&site.process, "tombolo_captured_passing{direction=\"outbound\"}") == 0)
        .await;
}

#[tokio::test]
async fn a_destination_that_refuses_is_a_reset() {
    let site = Site::new(told(), Duration::from_secs(2)).await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut near = site.to(&free.to_string()).await;
    assert!(is_reset(&mut near).await);
    assert_eq!(site.refused(), 1);
}

#[tokio::test]
async fn what_is_of_the_mesh_and_cant_be_carried_is_reset() {
    let site = Site::new(told(), Duration::from_millis(50)).await;
    // Nobody exports the service; the service lacks the port; the address is nobody's.
    site.world.told.say("shop/gone", ServiceState::Unknown);
    for origin in ["240.1.0.2:80", "240.1.0.1:81", "240.1.0.3:80", "[fd74:6f6d:626f::3]:443"] {
        let mut near = site.to(origin).await;
        assert!(is_reset(&mut near).await, "{origin}");
    }
    // No application behind any endpoint takes it.
    site.world.local.feel(Mood::AppDead);
    site.world.remote.feel(Mood::AppDead);
    let mut near = site.to("240.1.0.1:5432").await;
    assert!(is_reset(&mut near).await);
    // The addresses were told, and then were not (another range, say).
    site.addresses.send_replace(MeshAddresses::default());
    let mut near = site.to("240.1.0.1:80").await;
    assert!(is_reset(&mut near).await);
    assert_eq!(connections(&site.process, "outbound", "passed"), 0);
    let unknown = "tombolo_refusals_total{role=\"sidecar-capture\",reason=\"unknown-service\"}";
    assert_eq!(metric(&site.process, unknown), 2);
    assert_eq!(site.refused(), 3);
}

#[tokio::test]
async fn an_address_that_may_be_virtual_waits_until_all_are_known() {
    let site = Site::new(MeshAddresses::default(), Duration::from_secs(20)).await;
    let mut connection = site.to(&format!("{WEB}:80")).await;
    connection.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut ranges = MeshAddresses::default();
    ranges.handle_ranges(Ranges::default());
    site.addresses.send_replace(ranges);
    assert_eq!(connections(&site.process, "outbound", "mesh") + site.refused(), 0);
    site.addresses.send_replace(told());
    let mut answer = String::new();
    bounded(connection.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_connection_that_comes_back_is_refused_and_not_made_again() {
    let site = Site::new(told(), Duration::from_secs(2)).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = listener.local_addr().unwrap();
    let count = Arc::new(AtomicU32::new(0));
    let (captured, counted) = (site.captured.clone(), count.clone());
    // As if the rules left out nobody: whatever goes to `origin` comes to the sidecar, its own connections too.
    let back = tokio::spawn(async move {
        while let Ok((connection, peer)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(captured.clone().serve(connection, peer, origin));
        }
    });
    let mut near = TcpStream::connect(origin).await.unwrap();
    assert!(is_reset(&mut near).await);
    let line = "tombolo_refusals_total{role=\"sidecar-capture\",reason=\"capture-loop\"}";
    eventually("both ends have seen it", || metric(&site.process, line) >= 1).await;
    assert_eq!(count.load(Ordering::SeqCst), 2);
    back.abort();
}

#[tokio::test]
async fn who_comes_straight_to_the_port_is_refused() {
    let site = Site::new(told(), Duration::from_secs(2)).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(run(site.captured.clone(), listener, Destination::Redirected));
    let mut near = TcpStream::connect(address).await.unwrap();
    assert!(is_reset(&mut near).await);
    let line = "tombolo_refusals_total{role=\"sidecar-capture\",reason=\"not-redirected\"}";
    assert_eq!(metric(&site.process, line), 1);
}

/// Everybody may call.
struct Anybody;

impl Authority for Anybody {
    fn cluster(&self) -> Option<ClusterId> {
        Some("west".parse().unwrap())
    }

    fn grants(&self) -> Arc<InboundGrants> {
        Arc::new([("shop/web".parse().unwrap(), BTreeSet::from(["east".parse().unwrap()]))].into())
    }

    fn policies(&self, _service: &ServiceName) -> Option<Arc<InboundPolicies>> {
        Some(Arc::default())
    }

    fn policies_told(&self) -> watch::Receiver<()> {
        watch::Sender::new(()).subscribe()
    }
}

/// A sidecar in west whose inbound connections are captured, called from east over the gateways and by anybody else.
struct Entrance {
    world: World,
    process: Process,
    captured: Arc<CapturedInbound>,
    app: TcpListener,
    _gate: Gate,
}

impl Entrance {
    /// Octets that come over the gateways dribble: `pieces` at a time, each after a pause.
    async fn new(plaintext: Plaintext, pieces: usize, pause: Duration) -> Self {
        let process = Process::bare("sidecar");
        let world = World::new().await;
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = app.local_addr().unwrap();
        let service = |(port, protocol)| ServiceConfig {
            service: "shop/web".parse().unwrap(),
            port,
            app: address.to_string(),
            protocol,
            health: Default::default(),
        };
        let services: Vec<_> = PORTS.into_iter().map(service).collect();
        let inbound = Inbound::new(&services, &process, &world.west.source("web"), &world.trust, Box::new(Anybody));
        let meters = Meters::new(&process.metrics);
        let captured = CapturedInbound::new(inbound, plaintext, 100, Loops::default(), &meters);
        let entry = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gate = Gate::start("gw-east", entry.local_addr().unwrap()).await;
        world.outbound.gateways.replace(&[gate.as_local("gw-east")]);
        world.tell_shares(vec![share(&world.west, Origin::Remote, &[("w1", true, None)])]);
        let entering = captured.clone();
        tokio::spawn(async move {
            while let Ok((connection, _)) = entry.accept().await {
                let near = served(&entering, address).await;
                tokio::spawn(dribble(connection, near, pieces, pause));
            }
        });
        Self { world, process, captured, app, _gate: gate }
    }

    /// A connection to the application's port, of somebody without a sidecar.
    async fn plain(&self) -> TcpStream {
        served(&self.captured, self.app.local_addr().unwrap()).await
    }

    fn count(&self, outcome: &str) -> u64 {
        connections(&self.process, "inbound", outcome)
    }

    /// Sends an opaque word from east and back, and a request.
    async fn cross(&self) {
        let listener = self.world.listener("web.shop:5432").await;
        let mut near = TcpStream::connect(listener).await.unwrap();
        let (mut far, _) = bounded(self.app.accept()).await.unwrap();
        far.write_all(b"220 ready").await.unwrap();
        let mut greeting = [0; 9];
        bounded(near.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 ready");
        let answer = async {
            let (mut far, _) = self.app.accept().await.unwrap();
            let mut head = [0; 4096];
            let _ = far.read(&mut head).await.unwrap();
            far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi").await.unwrap();
        };
        let (answer, ()) = bounded(Box::pin(async { tokio::join!(self.world.get("/"), answer) })).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hi"), "{answer}");
    }
}

/// Carries bytes both ways; those towards `far` come in small pieces.
async fn dribble(near: TcpStream, far: TcpStream, pieces: usize, pause: Duration) {
    far.set_nodelay(true).unwrap();
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    tokio::spawn(async move { tokio::io::copy(&mut far_read, &mut near_write).await });
    let mut piece = vec![0; pieces];
    tokio::time::sleep(pause).await;
    while let Ok(count) = near_read.read(&mut piece).await {
        if count == 0 || far_write.write_all(&piece[..count]).await.is_err() {
            return;
        }
        // Only the first ones, which are looked at, need to come slowly.
        if piece.len() < 4096 {
            tokio::time::sleep(pause).await;
            piece.resize(piece.len() * 2, 0);
        }
    }
}

#[tokio::test]
async fn inner_legs_are_served_at_any_port() {
    for plaintext in [Plaintext::Permissive, Plaintext::Strict] {
        let entrance = Entrance::new(plaintext, 64 * 1024, Duration::ZERO).await;
        Box::pin(entrance.cross()).await;
        assert!(entrance.count("mesh") >= 2);
        assert_eq!((entrance.count("passed"), entrance.count("refused")), (0, 0), "{plaintext:?}");
    }
}

#[tokio::test]
async fn a_leg_that_is_slow_to_say_so_is_one_nevertheless() {
    for plaintext in [Plaintext::Permissive, Plaintext::Strict] {
        let entrance = Entrance::new(plaintext, 1, Duration::from_millis(30)).await;
        // The application may have been dialled for it in vain; that connection ends at once.
        let listener = entrance.world.listener("web.shop:5432").await;
        let _near = TcpStream::connect(listener).await.unwrap();
        eventually("the leg", || entrance.count("mesh") >= 1).await;
        assert_eq!((entrance.count("passed"), entrance.count("refused")), (0, 0), "{plaintext:?}");
    }
}

/// A ClientHello as an application's own TLS would send it.
fn client_hello(name: &str, alpn: &str) -> Vec<u8> {
    let mut config = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let mut client = rustls::ClientConnection::new(config.into(), name.to_owned().try_into().unwrap()).unwrap();
    let mut octets = Vec::new();
    client.write_tls(&mut octets).unwrap();
    octets
}

#[tokio::test]
async fn plaintext_is_passed_on_while_that_is_permitted() {
    let entrance = Entrance::new(Plaintext::Permissive, 64 * 1024, Duration::ZERO).await;
    let own_tls = client_hello("web.example.com", "h2");
    let not_a_target = client_hello("web.shop.svc.clusterset.local", "h2");
    let not_our_alpn = client_hello("80.web.shop.svc.west.clusterset.local", "http/1.1");
    let openings = [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16", b"\x00\x00", &own_tls, &not_a_target, &not_our_alpn];
    for opening in openings {
        let mut near = entrance.plain().await;
        near.write_all(opening).await.unwrap();
        let (mut far, _) = bounded(entrance.app.accept()).await.unwrap();
        near.shutdown().await.unwrap();
        let mut got = Vec::new();
        bounded(far.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got, opening);
        far.write_all(b"answer").await.unwrap();
        drop(far);
        let mut answer = Vec::new();
        bounded(near.read_to_end(&mut answer)).await.unwrap();
        assert_eq!(answer, b"answer");
    }
    // Nobody says anything until the application does.
    let mut near = entrance.plain().await;
    let (mut far, _) = bounded(entrance.app.accept()).await.unwrap();
    far.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    bounded(near.read_exact(&mut greeting)).await.unwrap();
    // What was looked at in vain arrives all the same.
    let mut near = entrance.plain().await;
    near.write_all(b"\x16\x03\x01").await.unwrap();
    let (mut far, _) = bounded(entrance.app.accept()).await.unwrap();
    far.write_all(b"220 ready").await.unwrap();
    bounded(near.read_exact(&mut greeting)).await.unwrap();
    let mut said = [0; 3];
    bounded(far.read_exact(&mut said)).await.unwrap();
    assert_eq!(&said, b"\x16\x03\x01");
    assert_eq!((entrance.count("passed"), entrance.count("mesh"), entrance.count("refused")), (8, 0, 0));
}

#[tokio::test]
async fn plaintext_is_reset_where_only_legs_may_enter() {
    let entrance = Entrance::new(Plaintext::Strict, 64 * 1024, Duration::ZERO).await;
    let own_tls = client_hello("web.example.com", "h2");
    for opening in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x00\x00", &own_tls] {
        let mut near = entrance.plain().await;
        near.write_all(opening).await.unwrap();
        assert!(is_reset(&mut near).await);
    }
    let line = "tombolo_refusals_total{role=\"sidecar-capture\",reason=\"plaintext\"}";
    assert_eq!((metric(&entrance.process, line), entrance.count("refused"), entrance.count("passed")), (3, 3, 0));
    // The application saw none of them.
    assert!(tokio::time::timeout(Duration::ZERO, entrance.app.accept()).await.is_err());
    Box::pin(entrance.cross()).await;
}
