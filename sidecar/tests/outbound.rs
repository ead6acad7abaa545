//! How the application may ask, over which protocols, and what it is told when it can't be served.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use common::{Mood, WEB, World, bounded, eventually};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_leg::discovery::ServiceState;
use tombolo_runtime::process::Process;

#[tokio::test]
async fn names_are_taken_from_the_target_then_from_host() {
    let world = World::new().await;
    for request in [
        format!("GET http://{WEB}/seen HTTP/1.1\r\nHost: {WEB}\r\nConnection: close\r\n\r\n"),
        format!("GET http://{WEB}/seen HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n\r\n"),
        format!("GET /seen HTTP/1.1\r\nHost: {WEB}\r\nConnection: close\r\n\r\n"),
    ] {
        let answer = bounded(world.raw(&request)).await;
        assert!(answer.contains(&format!("GET http://{WEB}/seen\n")), "{answer}");
    }
    let answer =
        bounded(world.raw(&format!("GET /seen HTTP/1.1\r\nHost: {WEB}:80\r\nConnection: close\r\n\r\n"))).await;
    assert!(
        answer.contains(&format!("GET http://{WEB}:80/seen\n")),
        "the host reaches the application unaltered: {answer}"
    );
}

#[tokio::test]
async fn connection_headers_stay_here_and_trace_context_crosses() {
    let world = World::new().await;
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let request = format!(
        "GET http://{WEB}/seen HTTP/1.1\r\nHost: {WEB}\r\nConnection: close, x-mine\r\nX-Mine: 1\r\nProxy-Connection: keep-alive\r\n\
         Proxy-Authorization: secret\r\nTE: trailers\r\nX-Kept: 1\r\ntraceparent: {parent}\r\ntombolo-explain: 1\r\n\r\n"
    );
    let answer = bounded(world.raw(&request)).await;
    let seen = answer.split_once("\r\n\r\n").unwrap().1;
    for kept in ["x-kept: 1", "te: trailers", &format!("traceparent: {parent}")] {
        assert!(seen.contains(kept), "{kept} is not in {seen}");
    }
    for gone in ["x-mine", "proxy-", "connection", "tombolo-explain"] {
        assert!(!seen.contains(gone), "{gone} is in {seen}");
    }
}

#[tokio::test]
async fn refusals_name_cause_and_next_step() {
    let world = World::with("limits: {discoveryWait: 200ms}\n").await;
    world.told.say("shop/none", ServiceState::Unknown);
    let get = |host: &str| format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    for (request, status, code, word) in [
        (get("example.com"), 403, "foreign-name", "no_proxy"),
        (get("127.0.0.1:22"), 403, "foreign-name", "svc.clusterset.local"),
        (get("none.shop.svc.clusterset.local"), 404, "unknown-service", "tombolo status"),
        (get(&format!("{WEB}:81")), 404, "unknown-port", "no TCP port 81"),
        (get("never.told.svc.clusterset.local"), 504, "timeout", "/readyz"),
        (
            format!("GET https://{WEB}/ HTTP/1.1\r\nHost: {WEB}\r\nConnection: close\r\n\r\n"),
            400,
            "bad-request",
            "CONNECT",
        ),
        (format!("GET / HTTP/1.1\r\nHost: {WEB}\r\nHost: x\r\nConnection: close\r\n\r\n"), 400, "bad-request", "Host"),
        ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n".into(), 400, "bad-request", "host"),
        (
            "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\nConnection: close\r\n\r\n".into(),
            403,
            "foreign-name",
            "example.com",
        ),
    ] {
        let answer = bounded(world.raw(&request)).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}{answer}");
        assert!(answer.contains(&format!("tombolo-refusal: {code}\r\n")) && answer.contains(word), "{request}{answer}");
    }
}

#[tokio::test]
async fn requests_that_could_be_smuggled_are_refused() {
    let world = World::new().await;
    for headers in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 4\r\nContent-Length: 5\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Content-Length: +4\r\n",
        "Content-Length: 4 \x0b\r\n",
        "Bad Header: x\r\n",
        " Folded: x\r\n",
    ] {
        let request = format!(
            "POST http://{WEB}/echo HTTP/1.1\r\nHost: {WEB}\r\n{headers}\r\n0\r\n\r\nGET http://{WEB}/smuggled HTTP/1.1\r\nHost: {WEB}\r\n\r\n"
        );
        let answer = bounded(world.raw(&request)).await;
        // RFC 9112 section 6.1 lets a server read a request with both lengths as chunked if it closes behind it.
        assert!(!answer.contains("HTTP/1.1 200") || answer.contains("connection: close"), "{headers}{answer}");
    }
    assert!(world.local.requests() <= 1, "what stands behind such a request is never read");
}

#[tokio::test]
async fn oversized_heads_are_refused() {
    let world = World::new().await;
    let long = "x".repeat(80 * 1024);
    let answer = bounded(world.raw(&format!("GET http://{WEB}/ HTTP/1.1\r\nHost: {WEB}\r\nX: {long}\r\n\r\n"))).await;
    assert!(answer.starts_with("HTTP/1.1 431 ") || answer.is_empty(), "{answer}");
    let many = "X: 1\r\n".repeat(200);
    let answer = bounded(world.raw(&format!("GET http://{WEB}/ HTTP/1.1\r\nHost: {WEB}\r\n{many}\r\n"))).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert_eq!(world.local.requests(), 0);
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    let world = World::new().await;
    let mut connection = BufReader::new(TcpStream::connect(world.proxy).await.unwrap());
    let head = format!("POST http://{WEB}/echo HTTP/1.1\r\nHost: {WEB}\r\nTransfer-Encoding: chunked\r\n\r\n");
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut line = String::new();
    bounded(connection.read_line(&mut line)).await.unwrap();
    assert!(line.starts_with("HTTP/1.1 200"), "the answer begins before the body does: {line}");
    while line != "\r\n" {
        line.clear();
        bounded(connection.read_line(&mut line)).await.unwrap();
    }
    for word in ["one", "two"] {
        connection.write_all(format!("3\r\n{word}\r\n").as_bytes()).await.unwrap();
        for want in ["3\r\n".to_owned(), format!("{word}\r\n")] {
            line.clear();
            bounded(connection.read_line(&mut line)).await.unwrap();
            assert_eq!(line, want);
        }
    }
}

#[tokio::test]
async fn a_reader_that_stops_holds_back_the_writer_and_nobody_else() {
    let world = World::new().await;
    let mut stalled = TcpStream::connect(world.proxy).await.unwrap();
    let request = format!("GET http://{WEB}/flood HTTP/1.1\r\nHost: {WEB}\r\nConnection: close\r\n\r\n");
    stalled.write_all(request.as_bytes()).await.unwrap();
    eventually("the flood has begun", || world.local.requests() == 1).await;
    for _ in 0..10 {
        assert!(bounded(world.get("/")).await.starts_with("HTTP/1.1 200"));
    }
    let mut octets = Vec::new();
    bounded(stalled.read_to_end(&mut octets)).await.unwrap();
    assert!(octets.len() > 10 * 1024 * 1024, "{}", octets.len());
}

#[tokio::test]
async fn the_far_application_decides_whether_to_continue() {
    let world = World::new().await;
    let head = |more: &str| {
        format!(
            "POST http://{WEB}/continue HTTP/1.1\r\nHost: {WEB}\r\nExpect: 100-continue\r\nContent-Length: 4\r\n{more}Connection: close\r\n\r\n"
        )
    };
    let mut connection = BufReader::new(TcpStream::connect(world.proxy).await.unwrap());
    connection.write_all(head("").as_bytes()).await.unwrap();
    let mut line = String::new();
    bounded(connection.read_line(&mut line)).await.unwrap();
    assert_eq!(line, "HTTP/1.1 100 Continue\r\n");
    connection.write_all(b"body").await.unwrap();
    let mut answer = String::new();
    bounded(connection.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains("HTTP/1.1 200") && answer.contains("body"), "{answer}");

    let mut connection = TcpStream::connect(world.proxy).await.unwrap();
    connection.write_all(head("X-Decline: 1\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    bounded(connection.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 417 "), "{answer}");
}

#[tokio::test]
async fn websockets_cross() {
    let world = World::new().await;
    let mut connection = BufReader::new(TcpStream::connect(world.proxy).await.unwrap());
    let head = format!(
        "GET http://{WEB}/ws HTTP/1.1\r\nHost: {WEB}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    while !answer.ends_with("\r\n\r\n") {
        assert_ne!(bounded(connection.read_line(&mut answer)).await.unwrap(), 0, "{answer}");
    }
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
    assert!(answer.contains("upgrade: websocket"), "{answer}");
    let mut echoed = [0; 5];
    for word in [b"hello", b"world"] {
        connection.write_all(word).await.unwrap();
        bounded(connection.read_exact(&mut echoed)).await.unwrap();
        assert_eq!(&echoed, word);
    }
    connection.shutdown().await.unwrap();
    assert_eq!(bounded(connection.read(&mut echoed)).await.unwrap(), 0);
}

async fn http2(
    world: &World,
) -> hyper::client::conn::http2::SendRequest<http_body_util::combinators::BoxBody<Bytes, std::convert::Infallible>> {
    let tcp = TcpStream::connect(world.proxy).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tcp)).await.unwrap();
    tokio::spawn(connection);
    sender
}

#[tokio::test]
async fn grpc_streams_and_its_trailers_cross() {
    let world = World::new().await;
    let mut sender = http2(&world).await;
    let (frames, body) = tokio::sync::mpsc::channel(1);
    let request = Request::post(format!("http://{WEB}:90/echo"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(ReceiverStream::new(body)).boxed())
        .unwrap();
    let mut response = bounded(sender.send_request(request)).await.unwrap();
    for word in ["one", "two"] {
        frames.send(Ok(hyper::body::Frame::data(Bytes::from(word)))).await.unwrap();
        let frame = bounded(response.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), word);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    frames.send(Ok(hyper::body::Frame::trailers(trailers.clone()))).await.unwrap();
    drop(frames);
    let frame = bounded(response.frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_trailers().unwrap(), trailers);
}

#[tokio::test]
async fn grpc_callers_are_refused_in_their_own_way() {
    let world = World::new().await;
    let request = Request::post("http://example.com/echo")
        .header("content-type", "application/grpc")
        .body(Empty::new().boxed())
        .unwrap();
    let response = bounded(http2(&world).await.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "7");
    assert!(response.headers()["grpc-message"].to_str().unwrap().contains("clusterset"));
}

#[tokio::test]
async fn many_requests_share_one_connection_and_one_leg() {
    let world = World::new().await;
    let sender = http2(&world).await;
    let mut requests = tokio::task::JoinSet::new();
    for n in 0..50 {
        let mut sender = sender.clone();
        requests.spawn(async move {
            let request = Request::get(format!("http://{WEB}/slow?{n}")).body(Empty::new().boxed()).unwrap();
            sender.send_request(request).await.unwrap().status()
        });
    }
    assert!(bounded(requests.join_all()).await.iter().all(|status| *status == 200));
    assert_eq!(world.local.legs.load(Ordering::SeqCst), 1);
}

async fn read_line(connection: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    bounded(connection.read_line(&mut line)).await.unwrap();
    line
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_and_half_closes_are_kept() {
    let world = World::new().await;
    let listener = world.listener("web.shop:5432").await;
    let mut connection = BufReader::new(TcpStream::connect(listener).await.unwrap());
    assert_eq!(read_line(&mut connection).await, "hello from east\n");
    connection.write_all(b"ping\n").await.unwrap();
    assert_eq!(read_line(&mut connection).await, "ping\n");
    connection.shutdown().await.unwrap();
    assert_eq!(read_line(&mut connection).await, "bye\n");
    assert_eq!(read_line(&mut connection).await, "");
}

#[tokio::test]
async fn a_reset_stays_a_reset() {
    let world = World::new().await;
    let listener = world.listener("web.shop:5432").await;
    let mut connection = BufReader::new(TcpStream::connect(listener).await.unwrap());
    read_line(&mut connection).await;
    connection.write_all(b"reset").await.unwrap();
    let mut octet = [0; 1];
    let error = bounded(connection.read(&mut octet)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn opaque_connections_fail_over_before_their_first_byte() {
    let world = World::new().await;
    let listener = world.listener("web.shop:5432").await;
    world.local.feel(Mood::AppDead);
    let mut connection = BufReader::new(TcpStream::connect(listener).await.unwrap());
    assert_eq!(read_line(&mut connection).await, "hello from west\n");
    // Nobody at all: a reset, not an orderly end.
    world.remote.feel(Mood::AppDead);
    let mut connection = TcpStream::connect(listener).await.unwrap();
    let error = bounded(connection.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn legs_for_opaque_connections_stand_ahead_of_them() {
    let world = World::new().await;
    let listener = world.listener("web.shop:5432").await;
    let legs = || world.local.legs.load(Ordering::SeqCst);
    for connections in 1..4 {
        let mut connection = BufReader::new(TcpStream::connect(listener).await.unwrap());
        assert_eq!(read_line(&mut connection).await, "hello from east\n");
        // One for each connection, and at least one more.
        eventually("another leg stands", || legs() > connections).await;
        assert!(legs() <= connections + 4, "never more than the limit");
    }
    let before = legs();
    world.east.renew(&world.svid, "shopper");
    eventually("the legs of the old SVID are replaced", || legs() > before).await;
}

#[tokio::test]
async fn no_leg_stands_ahead_where_that_is_turned_off() {
    let world = World::with("limits: {warmLegs: 0}").await;
    let listener = world.listener("web.shop:5432").await;
    for connections in 1..4 {
        let mut connection = BufReader::new(TcpStream::connect(listener).await.unwrap());
        assert_eq!(read_line(&mut connection).await, "hello from east\n");
        assert_eq!(world.local.legs.load(Ordering::SeqCst), connections);
    }
}

#[tokio::test]
async fn legs_that_turn_out_to_be_gone_are_passed_over() {
    let world = World::new().await;
    let listener = world.listener("web.shop:5432").await;
    let mut connection = BufReader::new(TcpStream::connect(listener).await.unwrap());
    assert_eq!(read_line(&mut connection).await, "hello from east\n");
    eventually("another leg stands", || world.local.legs.load(Ordering::SeqCst) > 1).await;
    world.local.feel(Mood::Breaks);
    let mut connection = BufReader::new(TcpStream::connect(listener).await.unwrap());
    assert_eq!(read_line(&mut connection).await, "hello from west\n");
}

#[tokio::test]
async fn a_listener_of_an_http_port_speaks_http() {
    let world = World::new().await;
    let listener = world.listener("web.shop:80").await;
    let mut connection = TcpStream::connect(listener).await.unwrap();
    connection.write_all(b"GET /seen HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    bounded(connection.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains("GET http://anything/seen\n"), "{answer}");
}

#[tokio::test]
async fn connect_carries_bytes_and_tells_the_truth_first() {
    let world = World::new().await;
    let mut connection = BufReader::new(TcpStream::connect(world.proxy).await.unwrap());
    let head = format!("CONNECT {WEB}:5432 HTTP/1.1\r\nHost: {WEB}:5432\r\n\r\n");
    connection.write_all(format!("{head}early\n").as_bytes()).await.unwrap();
    assert!(read_line(&mut connection).await.starts_with("HTTP/1.1 200 "));
    while read_line(&mut connection).await != "\r\n" {}
    assert_eq!(read_line(&mut connection).await, "hello from east\n");
    assert_eq!(read_line(&mut connection).await, "early\n");
    connection.shutdown().await.unwrap();
    assert_eq!(read_line(&mut connection).await, "bye\n");

    for far in [&world.local, &world.remote] {
        far.feel(Mood::AppDead);
    }
    let answer = bounded(world.raw(&head.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"))).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("tombolo-refusal: app-unreachable"), "{answer}");
}

#[tokio::test]
async fn a_client_that_says_nothing_costs_nothing_but_its_connection() {
    let world = World::new().await;
    let _silent = TcpStream::connect(world.proxy).await.unwrap();
    let mut half = TcpStream::connect(world.proxy).await.unwrap();
    half.write_all(b"PR").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    half.write_all(b"OPFIND http://x/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    bounded(half.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(bounded(world.get("/")).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_drain_lets_requests_finish_and_takes_no_new_ones() {
    let (trigger, drain) = tombolo_runtime::drain::drain();
    let mut process = Process::bare("sidecar");
    process.drain = drain;
    let world = World::of("", &process).await;
    let _silent = TcpStream::connect(world.proxy).await.unwrap();
    let mut slow = TcpStream::connect(world.proxy).await.unwrap();
    slow.write_all(format!("GET http://{WEB}/slow HTTP/1.1\r\nHost: {WEB}\r\n\r\n").as_bytes()).await.unwrap();
    eventually("the request is under way", || world.local.requests() == 1).await;
    let draining = tokio::spawn(trigger.drain(Duration::from_secs(10)));
    let mut answer = String::new();
    bounded(slow.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\r\neast\r\n"), "{answer}");
    let outcome = bounded(draining).await.unwrap();
    assert!(matches!(outcome, tombolo_runtime::drain::DrainOutcome::Clean), "{outcome:?}");
    assert!(TcpStream::connect(world.proxy).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn services_that_idle_are_let_go_of() {
    let world = World::with("limits: {serviceIdle: 1s}\n").await;
    bounded(world.get("/")).await;
    assert_eq!(world.outbound.services.routes().len(), 1);
    eventually("the service is let go of", || world.outbound.services.routes().is_empty()).await;
    assert!(bounded(world.get("/")).await.starts_with("HTTP/1.1 200"), "it is asked for again");
}
