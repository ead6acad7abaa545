//! Active checks of real applications: what makes them ready, and what does not.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tombolo_core::id::ServiceName;
use tombolo_core::model::AppProtocol;
use tombolo_runtime::drain::{DrainWatch, drain};
use tombolo_sidecar::config::{GrpcCheck, HealthConfig, HttpCheck, ServiceConfig};
use tombolo_sidecar::health::{ReadySink, Verdicts, run};

struct Told(mpsc::UnboundedSender<bool>);

impl ReadySink for Told {
    fn set_ready(&self, service: &ServiceName, port: u16, ready: bool) {
        assert_eq!((service.to_string().as_str(), port), ("shop/web", 80));
        self.0.send(ready).unwrap();
    }
}

fn checked(app: SocketAddr, health: HealthConfig, drain: DrainWatch) -> (mpsc::UnboundedReceiver<bool>, Verdicts) {
    let config = ServiceConfig {
        service: "shop/web".parse().unwrap(),
        port: 80,
        app: app.to_string(),
        protocol: AppProtocol::Http,
        health: HealthConfig { interval: Duration::from_millis(20), timeout: Duration::from_millis(300), ..health },
    };
    let (sender, receiver) = mpsc::unbounded_channel();
    let verdicts = Verdicts::default();
    tokio::spawn(run(vec![config], Arc::new(Told(sender)), verdicts.clone(), drain));
    (receiver, verdicts)
}

async fn next(told: &mut mpsc::UnboundedReceiver<bool>) -> bool {
    tokio::time::timeout(Duration::from_secs(10), told.recv()).await.expect("a verdict comes in time").unwrap()
}

async fn http_app(status: Arc<AtomicU16>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let status = status.clone();
            let answer = move |request: Request<Incoming>| {
                let status = status.clone();
                async move {
                    assert_eq!(request.uri(), "/healthz?deep=1");
                    assert_eq!(request.headers()["x-probe"], "deep");
                    let mut response = Response::new(Full::new(Bytes::from_static(b"fine")));
                    *response.status_mut() = StatusCode::from_u16(status.load(Ordering::SeqCst)).unwrap();
                    Ok::<_, Infallible>(response)
                }
            };
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service_fn(answer)),
            );
        }
    });
    address
}

#[tokio::test]
async fn tcp_a_connection_is_enough() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (mut told, verdicts) = checked(address, HealthConfig::default(), DrainWatch::never());
    assert!(next(&mut told).await);
    drop(listener);
    assert!(!next(&mut told).await);
    let now = verdicts.now();
    assert!(now.values().next().unwrap().last_failure.as_ref().unwrap().contains("refused"), "{now:?}");
    let _again = TcpListener::bind(address).await.unwrap();
    assert!(next(&mut told).await);
}

#[tokio::test]
async fn http_the_status_decides() {
    let status = Arc::new(AtomicU16::new(503));
    let http = Some(HttpCheck { path: "/healthz?deep=1".into(), headers: [("x-probe".into(), "deep".into())].into() });
    let app = http_app(status.clone()).await;
    let (mut told, _) = checked(app, HealthConfig { http, ..Default::default() }, DrainWatch::never());
    for (answered, ready) in [(503, false), (204, true), (500, false), (302, true)] {
        status.store(answered, Ordering::SeqCst);
        assert_eq!(next(&mut told).await, ready, "{answered}");
    }
}

#[tokio::test]
async fn http_no_answer_is_a_failure() {
    // Accepts, and never answers: the kernel does that for a stopped process too.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = Some(HttpCheck { path: "/".into(), headers: BTreeMap::new() });
    let health = HealthConfig { http, ..Default::default() };
    let (mut told, _) = checked(listener.local_addr().unwrap(), health, DrainWatch::never());
    assert!(!next(&mut told).await);
}

#[tokio::test]
async fn grpc_the_health_service_decides() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    let serving = Arc::new(AtomicU16::new(2));
    let status = serving.clone();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let status = status.clone();
            let answer = move |request: Request<Incoming>| {
                let status = status.load(Ordering::SeqCst) as u8;
                async move {
                    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                    // HealthCheckResponse{status} in a gRPC frame, and trailers that say OK.
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", HeaderValue::from_static("0"));
                    let message = Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 0x08, status]);
                    let frames = futures::stream::iter([
                        Ok::<_, Infallible>(Frame::data(message)),
                        Ok(Frame::trailers(trailers)),
                    ]);
                    let mut response = Response::new(StreamBody::new(frames));
                    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
                    Ok::<_, Infallible>(response)
                }
            };
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(tcp), service_fn(answer)));
        }
    });
    let grpc = Some(GrpcCheck { service: "shop.Web".into() });
    let (mut told, _) = checked(app, HealthConfig { grpc, ..Default::default() }, DrainWatch::never());
    assert!(!next(&mut told).await);
    serving.store(1, Ordering::SeqCst);
    assert!(next(&mut told).await);
}

#[tokio::test]
async fn a_process_that_drains_is_not_ready() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (trigger, watch) = drain();
    let (mut told, _) = checked(listener.local_addr().unwrap(), HealthConfig::default(), watch);
    assert!(next(&mut told).await);
    tokio::spawn(trigger.drain(Duration::from_secs(1)));
    assert!(!next(&mut told).await);
}
