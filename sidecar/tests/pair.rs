//! Real sidecars on both sides and real applications behind them: HTTP/1.1, gRPC and bytes.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Cluster, Gate, PORTS, WEB, World, bounded, eventually, full, share};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tombolo_core::id::{ClusterId, ServiceName};
use tombolo_core::model::{AppProtocol, Origin};
use tombolo_core::outlier::EjectReason;
use tombolo_leg::discovery::{InboundGrants, InboundPolicies};
use tombolo_leg::http::BoxError;
use tombolo_runtime::process::Process;
use tombolo_sidecar::config::ServiceConfig;
use tombolo_sidecar::inbound::{Authority, Inbound};

/// An application that can be killed (its connections are reset and its port closes) and stopped (it goes
/// on accepting and never answers).
struct App {
    address: SocketAddr,
    running: tokio::task::JoinHandle<()>,
    stopped: Arc<AtomicBool>,
    answered: Arc<AtomicU32>,
    /// Requests `OPTIONS *`.
    probes: Arc<AtomicU32>,
}

impl App {
    async fn start(name: &'static str, protocol: AppProtocol) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stopped, answered, probes): State = Default::default();
        let state = (stopped.clone(), answered.clone(), probes.clone());
        let running = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((connection, _)) = listener.accept().await else { return };
                let state = state.clone();
                connections.spawn(async move {
                    let _ = serve(name, protocol, connection, state).await;
                });
            }
        });
        Self { address, running, stopped, answered, probes }
    }

    fn kill(&self) {
        self.running.abort();
    }
}

type State = (Arc<AtomicBool>, Arc<AtomicU32>, Arc<AtomicU32>);

async fn serve(name: &'static str, protocol: AppProtocol, connection: TcpStream, state: State) -> Result<(), BoxError> {
    let service = service_fn(move |request: Request<Incoming>| {
        let (stopped, answered, probes) = state.clone();
        async move {
            if stopped.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            if request.uri() == "*" {
                probes.fetch_add(1, Ordering::SeqCst);
                return Ok(Response::new(full("")));
            }
            if request.uri().path() == "/wait" {
                tokio::time::sleep(Duration::from_millis(1_500)).await;
            }
            answered.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Infallible>(answer(name, request))
        }
    });
    let io = TokioIo::new(connection);
    match protocol {
        AppProtocol::Http => {
            hyper::server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await?;
        }
        AppProtocol::Http2 | AppProtocol::Grpc => {
            hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await?;
        }
        AppProtocol::Tls | AppProtocol::Opaque | AppProtocol::Detect => {
            let mut connection = io.into_inner();
            connection.write_all(format!("hello from {name}\n").as_bytes()).await?;
            let (mut read, mut write) = connection.split();
            tokio::io::copy(&mut read, &mut write).await?;
            write.write_all(b"bye\n").await?;
        }
    }
    Ok(())
}

fn answer(name: &'static str, mut request: Request<Incoming>) -> Response<common::AnyBody> {
    if request.headers().contains_key("upgrade") {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut io = TokioIo::new(upgrade.await.unwrap());
            let mut octets = [0; 64];
            while let Ok(count @ 1..) = io.read(&mut octets).await {
                io.write_all(&octets[..count]).await.unwrap();
            }
        });
        let key = request.headers()["sec-websocket-key"].clone();
        let response = Response::builder()
            .status(101)
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-accept", tombolo_leg::http::upgrade::accept_of(&key));
        return response.body(full("")).unwrap();
    }
    match request.uri().path() {
        "/echo" => Response::new(request.into_body().map_err(Into::into).boxed_unsync()),
        "/who" => Response::new(full(request.headers()["x-forwarded-client-cert"].as_bytes().to_vec())),
        "/host" => {
            Response::new(full(format!("{:?} {}", request.version(), request.headers()["host"].to_str().unwrap())))
        }
        "/trailers" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            let frames = [Ok(Frame::data(Bytes::from("message"))), Ok(Frame::trailers(trailers))];
            let mut response = Response::new(StreamBody::new(tokio_stream::iter(frames)).boxed_unsync());
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            response
        }
        _ => Response::new(full(name)),
    }
}

/// Everybody may call.
struct Open {
    own: ClusterId,
}

impl Authority for Open {
    fn cluster(&self) -> Option<ClusterId> {
        Some(self.own.clone())
    }

    fn grants(&self) -> Arc<InboundGrants> {
        let clusters = BTreeSet::from(["east".parse().unwrap(), "west".parse().unwrap()]);
        Arc::new([("shop/web".parse().unwrap(), clusters)].into())
    }

    fn policies(&self, _service: &ServiceName) -> Option<Arc<InboundPolicies>> {
        Some(Arc::default())
    }

    fn policies_told(&self) -> tokio::sync::watch::Receiver<()> {
        tokio::sync::watch::Sender::new(()).subscribe()
    }
}

struct Site {
    apps: Vec<App>,
    address: SocketAddr,
}

impl Site {
    /// A sidecar with an application for each port.
    async fn start(cluster: &Cluster, world: &World) -> Self {
        let mut apps = Vec::new();
        let mut services = Vec::new();
        for (port, protocol) in PORTS {
            let app = App::start(cluster.name, protocol).await;
            services.push(ServiceConfig {
                service: "shop/web".parse().unwrap(),
                port,
                app: app.address.to_string(),
                protocol,
                health: Default::default(),
            });
            apps.push(app);
        }
        let authority = Box::new(Open { own: cluster.name.parse().unwrap() });
        let process = Process::bare("sidecar");
        let inbound = Inbound::new(&services, &process, &cluster.source("web"), &world.trust, authority);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(tombolo_sidecar::inbound::run(listener, inbound));
        Self { apps, address }
    }
}

struct Pair {
    world: Arc<World>,
    local: Site,
    remote: Site,
    _gate: Gate,
}

async fn pair(more: &str) -> Pair {
    let world = World::with(more).await;
    let (local, remote) = (Site::start(&world.east, &world).await, Site::start(&world.west, &world).await);
    let gate = Gate::start("gw-east", remote.address).await;
    world.outbound.gateways.replace(&[gate.as_local("gw-east")]);
    world.tell_shares(vec![
        share(&world.east, Origin::Local, &[("e1", true, Some(local.address))]),
        share(&world.west, Origin::Remote, &[("w1", true, None)]),
    ]);
    Pair { world: Arc::new(world), local, remote, _gate: gate }
}

#[tokio::test]
async fn the_application_sees_the_caller_and_the_host() {
    let pair = pair("").await;
    let answer = bounded(pair.world.get("/who")).await;
    assert!(answer.contains("URI=spiffe://east.tombolo/ns/shop/sa/shopper"), "{answer}");
    let answer = bounded(pair.world.get("/host")).await;
    assert!(answer.contains(&format!("HTTP/1.1 {WEB}")), "{answer}");
}

struct Loaded {
    failed: Vec<String>,
    /// How long each request took.
    took: Vec<Duration>,
    /// Answers from east and west.
    from: [usize; 2],
}

impl Loaded {
    fn slowest(&self) -> Duration {
        self.took.iter().copied().max().unwrap()
    }

    fn slow(&self) -> usize {
        self.took.iter().filter(|took| **took > Duration::from_millis(250)).count()
    }

    #[track_caller]
    fn nothing_failed_and_both_answered(&self) {
        assert!(self.failed.is_empty(), "{} failed, the first: {}", self.failed.len(), self.failed[0]);
        assert!(self.from.iter().all(|count| *count > 100), "{:?}", self.from);
    }
}

/// 200 requests a second, each sent when its time has come and not when others are answered, with a fault after
/// a third of the time.
async fn load(world: &Arc<World>, time: Duration, fault: impl Fn()) -> Loaded {
    let mut requests = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    let count = time.as_millis() / 5;
    for n in 0..count {
        ticks.tick().await;
        if n == count / 3 {
            fault();
        }
        let world = world.clone();
        requests.spawn(async move {
            let sent = Instant::now();
            (world.get("/").await, sent.elapsed())
        });
    }
    let results = requests.join_all().await;
    let from = |name: &str| results.iter().filter(|(answer, _)| answer.ends_with(name)).count();
    let from = [from("east"), from("west")];
    let took = results.iter().map(|(_, took)| *took).collect();
    let failed = results.into_iter().map(|(answer, _)| answer).filter(|answer| !answer.starts_with("HTTP/1.1 200"));
    Loaded { failed: failed.collect(), took, from }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_when_the_local_application_is_killed() {
    let pair = pair("").await;
    let app = &pair.local.apps[0];
    let loaded = bounded(load(&pair.world, Duration::from_secs(3), || app.kill())).await;
    loaded.nothing_failed_and_both_answered();
    assert!(loaded.slowest() < Duration::from_secs(1), "{:?}", loaded.slowest());
}

/// Without any timeout the hang is noticed, confirmed by the far sidecar, and left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_when_the_local_application_is_stopped() {
    let pair = pair("").await;
    let app = &pair.local.apps[0];
    let stop = || app.stopped.store(true, Ordering::SeqCst);
    let loaded = bounded(load(&pair.world, Duration::from_secs(4), stop)).await;
    loaded.nothing_failed_and_both_answered();
    assert!(loaded.slow() <= 120, "{} slow", loaded.slow());
    assert!(loaded.slowest() < Duration::from_secs(1), "{:?}", loaded.slowest());
    let route = pair.world.outbound.services.known(WEB).unwrap();
    let reasons: Vec<_> = route.live().targets.iter().filter_map(|target| target.outlier().ejected_for()).collect();
    assert_eq!(reasons, [EjectReason::Hung]);
    assert_eq!(app.probes.load(Ordering::SeqCst), 0, "a stopped process answers nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_timeout_for_each_try_a_stopped_application_is_left_at_it() {
    let pair = pair("retry: {perTryTimeout: 500ms}\n").await;
    let app = &pair.local.apps[0];
    let stop = || app.stopped.store(true, Ordering::SeqCst);
    let loaded = bounded(load(&pair.world, Duration::from_secs(4), stop)).await;
    loaded.nothing_failed_and_both_answered();
    assert!(loaded.slow() <= 80, "{} slow", loaded.slow());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_is_slow_but_at_work_is_left_alone() {
    let pair = pair("").await;
    for _ in 0..150 {
        bounded(pair.world.get("/")).await;
    }
    let app = &pair.local.apps[0];
    let slow = |count: usize| {
        let mut requests = JoinSet::new();
        for _ in 0..count {
            let world = pair.world.clone();
            requests.spawn(async move { world.get("/wait").await });
        }
        requests.join_all()
    };
    // One alone is not even asked about.
    let answers = bounded(slow(1)).await;
    assert!(answers.iter().all(|answer| answer.contains("tombolo-cluster: east")), "{answers:?}");
    assert_eq!(app.probes.load(Ordering::SeqCst), 0);
    // Ten, and no other completes meanwhile: it is asked, and answers.
    let answers = bounded(slow(10)).await;
    assert!(answers.iter().all(|answer| answer.contains("tombolo-cluster: east")), "{answers:?}");
    let asked = app.probes.load(Ordering::SeqCst);
    assert!((1..=5).contains(&asked), "asked {asked} times, each after twice the silence of the time before");
    assert_eq!(pair.remote.apps[0].answered.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_application_can_not_ask_in_the_name_of_its_sidecar() {
    let pair = pair("").await;
    let request = format!("OPTIONS / HTTP/1.1\r\nHost: {WEB}\r\ntombolo-probe: app\r\nConnection: close\r\n\r\n");
    let answer = bounded(pair.world.raw(&request)).await;
    assert!(answer.ends_with("east") && !answer.contains("tombolo-probe"), "{answer}");
    let app = &pair.local.apps[0];
    assert_eq!((app.answered.load(Ordering::SeqCst), app.probes.load(Ordering::SeqCst)), (1, 0));
}

#[tokio::test]
async fn grpc_trailers_come_from_a_real_http2_application() {
    let pair = pair("").await;
    let tcp = TcpStream::connect(pair.world.proxy).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tcp)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post(format!("http://{WEB}:90/trailers"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Empty::<Bytes>::new())
        .unwrap();
    let response = bounded(sender.send_request(request)).await.unwrap();
    let collected = bounded(response.into_body().collect()).await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(collected.to_bytes(), "message");
}

#[tokio::test]
async fn a_websocket_and_a_talkative_server_cross_to_real_applications() {
    let pair = pair("").await;
    let mut connection = TcpStream::connect(pair.world.proxy).await.unwrap();
    let head = format!(
        "GET http://{WEB}/ HTTP/1.1\r\nHost: {WEB}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let octet = bounded(connection.read_u8()).await.unwrap();
        answer.push(octet);
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 101 ") && answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
    connection.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    bounded(connection.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"hello");

    let listener = pair.world.listener("web.shop:5432").await;
    pair.local.apps[2].kill();
    let mut connection = TcpStream::connect(listener).await.unwrap();
    connection.write_all(b"ping\n").await.unwrap();
    connection.shutdown().await.unwrap();
    let mut answer = String::new();
    bounded(connection.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "hello from west\nping\nbye\n");
}

#[tokio::test]
async fn an_ejected_endpoint_is_probed_through_its_sidecar_and_returns() {
    let pair = pair("").await;
    bounded(pair.world.get("/")).await;
    let app = &pair.local.apps[0];
    app.kill();
    for _ in 0..3 {
        let answer = bounded(pair.world.get("/")).await;
        assert!(answer.contains("tombolo-cluster: west"), "{answer}");
    }
    // The same port again, by a new process.
    let address = app.address;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    tokio::spawn(async move {
        loop {
            let (connection, _) = listener.accept().await.unwrap();
            tokio::spawn(serve("again", AppProtocol::Http, connection, State::default()));
        }
    });
    let route = pair.world.outbound.services.known(WEB).unwrap();
    eventually("the endpoint is restored", || !route.live().targets.iter().any(|target| target.is_ejected())).await;
    eventually("its traffic returns", || route.live().plan.clusters[0].share == 1.0).await;
    let answer = bounded(pair.world.get("/")).await;
    assert!(answer.contains("tombolo-cluster: east") && answer.ends_with("again"), "{answer}");
    assert!(pair.remote.apps[0].answered.load(Ordering::SeqCst) >= 3);
}
