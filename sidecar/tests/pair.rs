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
use tombolo_core::id::ClusterId;
use tombolo_core::model::{AppProtocol, Origin};
use tombolo_leg::discovery::InboundGrants;
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
}

impl App {
    async fn start(name: &'static str, protocol: AppProtocol) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stopped, answered): (Arc<AtomicBool>, Arc<AtomicU32>) = Default::default();
        let state = (stopped.clone(), answered.clone());
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
        Self { address, running, stopped, answered }
    }

    fn kill(&self) {
        self.running.abort();
    }
}

type State = (Arc<AtomicBool>, Arc<AtomicU32>);

async fn serve(name: &'static str, protocol: AppProtocol, connection: TcpStream, state: State) -> Result<(), BoxError> {
    let service = service_fn(move |request: Request<Incoming>| {
        let (stopped, answered) = state.clone();
        async move {
            if stopped.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
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
        AppProtocol::Opaque => {
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

/// 200 requests a second over 20 connections; yields (failed, slowest, by cluster).
async fn load(world: &Arc<World>, time: Duration, fault: impl Fn()) -> (Vec<String>, Duration, [usize; 2]) {
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for n in 0..20_u64 {
        let world = world.clone();
        clients.spawn(async move {
            let mut results = Vec::new();
            tokio::time::sleep(Duration::from_millis(n * 5)).await;
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            let mut connection = TcpStream::connect(world.proxy).await.unwrap();
            while began.elapsed() < time {
                ticks.tick().await;
                let sent = Instant::now();
                let request = format!("GET http://{WEB}/ HTTP/1.1\r\nHost: {WEB}\r\n\r\n");
                connection.write_all(request.as_bytes()).await.unwrap();
                let mut answer = String::new();
                let mut octets = [0; 4096];
                while !answer.ends_with("east") && !answer.ends_with("west") && !answer.contains("tombolo-refusal") {
                    let count = connection.read(&mut octets).await.unwrap();
                    assert_ne!(count, 0, "{answer}");
                    answer.push_str(std::str::from_utf8(&octets[..count]).unwrap());
                }
                results.push((answer, sent.elapsed()));
            }
            results
        });
    }
    tokio::time::sleep(time / 3).await;
    fault();
    let results: Vec<_> = clients.join_all().await.into_iter().flatten().collect();
    let slowest = results.iter().map(|(_, took)| *took).max().unwrap();
    let from = |name: &str| results.iter().filter(|(answer, _)| answer.ends_with(name)).count();
    let counts = [from("east"), from("west")];
    let failed = results.into_iter().map(|(answer, _)| answer).filter(|answer| !answer.starts_with("HTTP/1.1 200"));
    (failed.collect(), slowest, counts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_when_the_local_application_is_killed() {
    let pair = pair("").await;
    let app = &pair.local.apps[0];
    let (failed, slowest, [east, west]) = bounded(load(&pair.world, Duration::from_secs(3), || app.kill())).await;
    assert!(failed.is_empty(), "{} failed, the first: {}", failed.len(), failed[0]);
    assert!(east > 100 && west > 100, "{east} {west}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_when_the_local_application_is_stopped() {
    let pair = pair("retry: {perTryTimeout: 500ms}\n").await;
    let app = &pair.local.apps[0];
    let stop = || app.stopped.store(true, Ordering::SeqCst);
    let (failed, slowest, [east, west]) = bounded(load(&pair.world, Duration::from_secs(4), stop)).await;
    assert!(failed.is_empty(), "{} failed, the first: {}", failed.len(), failed[0]);
    assert!(east > 100 && west > 100, "{east} {west}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
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
