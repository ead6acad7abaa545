//! Ports of which nobody has said what is spoken there: told from the first bytes of each connection. Real sidecars on
//! both sides, real applications behind them, and `curl` before them.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{World, bounded, share};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::PrivateKeyDer;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tombolo_core::addresses::mesh::{Holder, MeshAddresses, blocks};
use tombolo_core::addresses::{Number, Ranges};
use tombolo_core::id::{ClusterId, ServiceName};
use tombolo_core::model::{AppProtocol, Origin, ServicePort, Transport};
use tombolo_leg::discovery::{InboundGrants, InboundPolicies, ServiceState, ServiceView};
use tombolo_runtime::process::Process;
use tombolo_sidecar::capture::Captured;
use tombolo_sidecar::capture::loops::Loops;
use tombolo_sidecar::capture::observe::Meters;
use tombolo_sidecar::capture::outbound::CapturedOutbound;
use tombolo_sidecar::config::ServiceConfig;
use tombolo_sidecar::inbound::{Authority, Inbound};

/// What runs at the ports of both services, of which only the last one says so.
const HTTP: u16 = 7000;
const GREETS: u16 = 7001;
const TLS: u16 = 7002;
const DECLARED_TLS: u16 = 7003;
const PORTS: [u16; 4] = [HTTP, GREETS, TLS, DECLARED_TLS];
const NAMES: [&str; 2] = ["web", "vault"];

/// Everybody may call.
struct Open;

impl Authority for Open {
    fn cluster(&self) -> Option<ClusterId> {
        Some("east".parse().unwrap())
    }

    fn grants(&self) -> Arc<InboundGrants> {
        let granted = |name| (service(name), BTreeSet::from(["east".parse().unwrap()]));
        Arc::new(NAMES.map(granted).into())
    }

    fn policies(&self, _service: &ServiceName) -> Option<Arc<InboundPolicies>> {
        Some(Arc::default())
    }

    fn policies_told(&self) -> watch::Receiver<()> {
        watch::Sender::new(()).subscribe()
    }
}

fn service(name: &str) -> ServiceName {
    format!("shop/{name}").parse().unwrap()
}

fn host(name: &str) -> String {
    format!("{name}.shop.svc.clusterset.local")
}

/// Serves HTTP/1.1 and HTTP/2, and says which, who it is, and who calls.
async fn http(name: &'static str, connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let answer = service_fn(move |request: Request<Incoming>| async move {
        let caller = request.headers().get("x-forwarded-client-cert");
        let caller = caller.map_or("nobody known", |value| value.to_str().unwrap());
        let hidden = request.headers().keys().filter(|name| name.as_str().starts_with("tombolo-")).count();
        assert_eq!(hidden, 0, "what sidecars say to each other is not for the application");
        Ok::<_, Infallible>(Response::new(format!("{name} {:?} {caller}", request.version())))
    });
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection(TokioIo::new(connection), answer).await;
}

/// Speaks first, then says everything again.
async fn greets(name: &'static str, mut connection: TcpStream) {
    connection.write_all(format!("220 {name}\r\n").as_bytes()).await.unwrap();
    let (mut read, mut write) = connection.split();
    let _ = tokio::io::copy(&mut read, &mut write).await;
}

fn acceptor(certificate: &rcgen::CertifiedKey<rcgen::KeyPair>) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivateKeyDer::Pkcs8(certificate.signing_key.serialize_der().into());
    let chain = vec![certificate.cert.der().clone()];
    TlsAcceptor::from(Arc::new(builder.with_no_client_auth().with_single_cert(chain, key).unwrap()))
}

async fn app(name: &'static str, port: u16, tls: TlsAcceptor) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                match port {
                    HTTP => http(name, connection).await,
                    GREETS => greets(name, connection).await,
                    _ => {
                        if let Ok(connection) = tls.accept(connection).await {
                            http(name, connection).await;
                        }
                    }
                }
            });
        }
    });
    address
}

struct Site {
    world: World,
    process: Process,
    files: TempDir,
}

impl Site {
    async fn start(more: &str) -> Self {
        let process = Process::bare("sidecar");
        let world = World::of(more, &process).await;
        let files = tempfile::tempdir().unwrap();
        let mut services = Vec::new();
        for name in NAMES {
            let certificate = rcgen::generate_simple_self_signed([host(name)]).unwrap();
            std::fs::write(files.path().join(name), certificate.cert.pem()).unwrap();
            for port in PORTS {
                let app = app(name, port, acceptor(&certificate)).await;
                services.push(ServiceConfig {
                    service: service(name),
                    port,
                    app: app.to_string(),
                    protocol: AppProtocol::default(),
                    health: Default::default(),
                });
            }
        }
        let far = Process::bare("sidecar");
        let inbound = Inbound::new(&services, &far, &world.east.source("web"), &world.trust, Box::new(Open));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(tombolo_sidecar::inbound::run(listener, inbound));
        for name in NAMES {
            world.told.say(&service(name).to_string(), known(&world, name, address));
        }
        world.told.say("shop/none", ServiceState::Unknown);
        world.told.say("shop/late", ServiceState::Waiting);
        Self { world, process, files }
    }

    async fn listener(&self, port: u16) -> SocketAddr {
        self.world.listener(&format!("web.shop:{port}")).await
    }

    /// Where connections arrive as if the packet filter had taken them on their way to the address of `shop/web`.
    async fn captured(&self, port: u16) -> SocketAddr {
        let mut addresses = MeshAddresses::default();
        addresses.handle_ranges(Ranges::default());
        for (number, block) in blocks([(Number(1), Holder::Service, service("web"))]) {
            addresses.handle_block(number, block).unwrap();
        }
        addresses.handle_complete(&[0].into());
        let known = watch::channel(addresses).1;
        let (meters, wait) = (Meters::new(&Process::bare("sidecar").metrics), Duration::from_secs(2));
        let captured = CapturedOutbound::new(self.world.outbound.clone(), known, wait, Loops::default(), &meters);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((connection, peer)) = listener.accept().await {
                tokio::spawn(captured.clone().serve(connection, peer, SocketAddr::from(([240, 1, 0, 1], port))));
            }
        });
        address
    }

    fn detected(&self, protocol: &str) -> u64 {
        let line = format!("tombolo_outbound_detections_total{{protocol=\"{protocol}\"}}");
        let text = self.process.metrics.encode();
        text.lines().find_map(|text| text.strip_prefix(&line)?.trim().parse().ok()).unwrap_or(0)
    }

    fn certificate(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }
}

fn known(world: &World, name: &str, address: SocketAddr) -> ServiceState {
    let mut share = share(&world.east, Origin::Local, &[("e1", true, None)]);
    let port = |port| ServicePort {
        name: String::new(),
        port,
        transport: Transport::Tcp,
        app: if port == DECLARED_TLS { AppProtocol::Tls } else { AppProtocol::Detect },
    };
    share.share.export.service = service(name);
    share.share.export.ports = PORTS.map(port).into();
    let delivered: BTreeMap<u16, String> = PORTS.map(|port| (port, address.to_string())).into();
    share.deliveries.insert("e1".parse().unwrap(), delivered);
    let (numbers, policies) = Default::default();
    ServiceState::Known(Arc::new(ServiceView { service: service(name), shares: vec![share], numbers, policies }))
}

/// The real `curl`, whose every connection goes to `via`; `None` skips the test by name.
async fn curl(via: SocketAddr, arguments: &[&str]) -> Option<String> {
    let to = format!("::{}:{}", via.ip(), via.port());
    let mut all = vec!["-sS", "-m", "10", "--noproxy", "*", "--connect-to", &to];
    all.extend_from_slice(arguments);
    match Command::new("curl").args(&all).output().await {
        Ok(output) => Some(String::from_utf8([output.stdout, output.stderr].concat()).unwrap()),
        Err(error) => {
            assert!(std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(), "this test needs curl: {error}");
            println!("skipped: needs curl (Debian: curl)");
            None
        }
    }
}

#[tokio::test]
async fn requests_to_a_port_of_which_nobody_has_said_anything_are_told_apart() {
    let site = Site::start("").await;
    for (n, via) in [site.listener(HTTP).await, site.captured(HTTP).await].into_iter().enumerate() {
        let url = format!("http://{}/", host("web"));
        let by = "By=spiffe://east.tombolo/ns/shop/sa/web;URI=spiffe://east.tombolo/ns/shop/sa/shopper";
        let Some(answer) = curl(via, &[&url]).await else { return };
        assert_eq!(answer, format!("web HTTP/1.1 {by}"));
        let answer = curl(via, &["--http2-prior-knowledge", &url]).await.unwrap();
        assert_eq!(answer, format!("web HTTP/2.0 {by}"), "the application is spoken to as the caller speaks");
        // What only sidecars say is not for callers to say.
        let answer = curl(via, &["-H", "tombolo-http: 2", &url]).await.unwrap();
        assert_eq!(answer, format!("web HTTP/1.1 {by}"));
        let n = n as u64 + 1;
        assert_eq!((site.detected("http1"), site.detected("http2")), (2 * n, n));
    }
}

#[tokio::test]
async fn an_applications_own_tls_goes_where_its_name_says() {
    let site = Site::start("").await;
    for port in [TLS, DECLARED_TLS] {
        for via in [site.listener(port).await, site.captured(port).await] {
            for name in NAMES {
                let certificate = site.certificate(name);
                let arguments = ["--cacert", certificate.to_str().unwrap(), &format!("https://{}/", host(name))];
                let Some(answer) = curl(via, &arguments).await else { return };
                // From end to end: curl has verified the application's own certificate, and no sidecar has added anything.
                assert_eq!(answer, format!("{name} HTTP/1.1 nobody known"));
            }
            // A name that means nothing here is no reason to go elsewhere.
            for name in ["web.example", &host("none"), "web.shop.svc.cluster.local"] {
                let answer = curl(via, &["-k", &format!("https://{name}/")]).await.unwrap();
                assert_eq!(answer, "web HTTP/1.1 nobody known", "{name}");
            }
        }
    }
    assert_eq!(site.detected("tls"), 2 * 2 * 5);
}

#[tokio::test]
async fn a_name_of_which_nothing_can_be_learnt_is_refused() {
    let site = Site::start("limits: {discoveryWait: 50ms}\n").await;
    let via = site.listener(TLS).await;
    let Some(said) = curl(via, &["-k", &format!("https://{}/", host("late"))]).await else { return };
    assert!(said.starts_with("curl:"), "{said}");
    let counted = "tombolo_refusals_total{role=\"sidecar-outbound\",reason=\"timeout\"} 1";
    assert!(site.process.metrics.encode().contains(counted));
}

async fn read(connection: &mut TcpStream, want: &str) {
    let mut octets = vec![0; want.len()];
    bounded(connection.read_exact(&mut octets)).await.unwrap();
    assert_eq!(String::from_utf8(octets).unwrap(), want);
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_after_the_timeout() {
    let site = Site::start("").await;
    for via in [site.listener(GREETS).await, site.captured(GREETS).await] {
        let began = Instant::now();
        let mut connection = TcpStream::connect(via).await.unwrap();
        read(&mut connection, "220 web\r\n").await;
        assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
        connection.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        read(&mut connection, "GET / HTTP/1.1\r\n\r\n").await;
    }
    assert_eq!(site.detected("none"), 2);
    // Whoever wants no delay waits for nothing.
    let site = Site::start("limits: {detectionTimeout: 0s}\n").await;
    let mut connection = TcpStream::connect(site.listener(GREETS).await).await.unwrap();
    read(&mut connection, "220 web\r\n").await;
    assert_eq!(site.detected("none"), 1);
}

#[tokio::test]
async fn what_is_cut_off_or_nothing_known_is_carried_as_bytes() {
    let site = Site::start("").await;
    let via = site.listener(GREETS).await;
    let halves: [(&[u8], &str); 6] = [
        (b"PRI * HTTP", "none"),
        (b"GET / HT", "none"),
        (b"\x16\x03\x01\x02\x00\x01", "none"),
        (b"EHLO mail.example\r\n", "opaque"),
        (b"\x16\x09\x01\x02\x00\x02", "opaque"),
        (b"", "none"),
    ];
    for (said, protocol) in halves {
        let before = site.detected(protocol);
        for ended in [true, false] {
            let mut connection = TcpStream::connect(via).await.unwrap();
            connection.write_all(said).await.unwrap();
            if ended {
                connection.shutdown().await.unwrap();
            }
            read(&mut connection, "220 web\r\n").await;
            let mut again = vec![0; said.len()];
            bounded(connection.read_exact(&mut again)).await.unwrap();
            assert_eq!(again, said);
        }
        assert_eq!(site.detected(protocol), before + 2, "{said:?}");
    }
}
