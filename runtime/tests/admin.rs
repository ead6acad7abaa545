//! The admin port over a real socket.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tombolo_core::refusal::Refusal;
use tombolo_runtime::admin::{Admin, Question, Questions};
use tombolo_runtime::drain::drain;
use tombolo_runtime::process::Process;
use tombolo_runtime::telemetry::TelemetryConfig;

/// Sends `head` as it is and returns everything that comes back until the connection closes.
async fn exchange(address: SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
    answer
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = exchange(address, &format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn start(process: &Process) -> Admin {
    let state = Arc::new(|| json!({"tunnels": []}));
    let config = json!({"id": "gw-1", "join": "/run/join"});
    let address = "127.0.0.1:0".parse().unwrap();
    Admin::start(address, process.metrics.clone(), process.readiness.clone(), config, state).await.unwrap()
}

#[tokio::test]
async fn every_page_answers() {
    let process = Process::bare("gateway");
    process.metrics.refusals("gateway").inc(Refusal::NotExported);
    let admin = start(&process).await;
    let address = admin.address();
    assert_eq!(get(address, "/livez").await, (200, "ok\n".into()));
    assert_eq!(get(address, "/readyz").await, (200, "ready\n".into()));
    let (status, metrics) = get(address, "/metrics").await;
    assert_eq!(status, 200);
    assert!(metrics.contains("tombolo_refusals_total{role=\"gateway\",reason=\"not-exported\"} 1\n"), "{metrics}");
    let (_, config) = get(address, "/config").await;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&config).unwrap(), json!({"id": "gw-1", "join": "/run/join"}));
    let (_, state) = get(address, "/state?x=1").await;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&state).unwrap(), json!({"tunnels": []}));
    assert_eq!(get(address, "/secrets").await.0, 404);
}

#[tokio::test]
async fn nothing_can_be_changed() {
    let admin = start(&Process::bare("gateway")).await;
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let head = format!("{method} /state HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        let answer = exchange(admin.address(), &head).await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }
}

#[tokio::test]
async fn readyz_names_what_fails_and_why() {
    let (trigger, watch) = drain();
    let process = Process::new("gateway", &[], &TelemetryConfig::default(), watch).unwrap();
    let identity = process.readiness.condition("identity", "no SVID yet");
    let tunnel = process.readiness.condition("tunnel", "west does not answer on UDP");
    let admin = start(&process).await;
    identity.holds();
    let (status, body) = get(admin.address(), "/readyz").await;
    assert_eq!(status, 503);
    assert_eq!(body, "[+] identity\n[-] tunnel: west does not answer on UDP\nnot ready\n");
    tunnel.holds();
    assert_eq!(get(admin.address(), "/readyz").await, (200, "[+] identity\n[+] tunnel\nready\n".into()));

    trigger.drain(Duration::ZERO).await;
    let (status, body) = get(admin.address(), "/readyz").await;
    assert_eq!(status, 503);
    assert!(body.contains("[-] draining: "), "{body}");
    assert_eq!(get(admin.address(), "/livez").await.0, 200, "a draining process is alive");
}

#[tokio::test]
async fn garbage_and_oversized_headers_are_refused() {
    let admin = start(&Process::bare("gateway")).await;
    let garbage = exchange(admin.address(), "\x16\x03\x01 no http at all\r\n\r\n").await;
    assert!(garbage.starts_with("HTTP/1.1 400 "), "{garbage}");
    let oversized = format!("GET /livez HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 * 1024));
    let mut stream = TcpStream::connect(admin.address()).await.unwrap();
    // The server may close before all of it is written.
    let _ = stream.write_all(oversized.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert_eq!(get(admin.address(), "/livez").await.0, 200);
}

#[tokio::test]
async fn dropping_the_server_closes_its_port() {
    let admin = start(&Process::bare("gateway")).await;
    let address = admin.address();
    drop(admin);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "the port stays open");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_question_is_answered_from_its_query() {
    let process = Process::bare("sidecar");
    let question: Question = Arc::new(|query| {
        let query = query.to_owned();
        Box::pin(async move {
            if query.is_empty() {
                return (hyper::StatusCode::BAD_REQUEST, json!({"error": "ask something"}));
            }
            (hyper::StatusCode::OK, json!({ "asked": query }))
        })
    });
    let questions = Questions::from([("/explain", question)]);
    let (address, state) = ("127.0.0.1:0".parse().unwrap(), Arc::new(|| json!({})));
    let (metrics, readiness) = (process.metrics.clone(), process.readiness.clone());
    let admin = Admin::start_with(address, metrics, readiness, json!({}), state, questions).await.unwrap();
    let (status, body) = get(admin.address(), "/explain?url=a").await;
    assert_eq!((status, body.as_str()), (200, "{\n  \"asked\": \"url=a\"\n}\n"));
    assert_eq!(get(admin.address(), "/explain").await.0, 400);
    let other = get(admin.address(), "/other").await;
    assert_eq!(other, (404, "see /livez /readyz /metrics /config /state /explain\n".into()));
    let posted =
        exchange(admin.address(), "POST /explain?url=a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(posted.starts_with("HTTP/1.1 405 "), "{posted}");
}
