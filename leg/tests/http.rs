//! Requests over legs on loopback with real SVIDs: streaming, flow control, resets, upgrades, liveness.
#![allow(clippy::unwrap_used)]

mod common;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{Pair, SERVER, bounded, eventually};
use futures::StreamExt;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_core::refusal::Refusal;
use tombolo_leg::Alpn;
use tombolo_leg::accept::LegIdentity;
use tombolo_leg::http::upgrade::{IoBody, write_body};
use tombolo_leg::http::{
    Abandon, BULK_FROM, BoxError, ContinueSignal, HttpLeg, HttpLimits, LegHealth, RecvBody, STREAM_WINDOW,
    SendErrorKind, Serve, StreamError, serve,
};
use tombolo_leg::status::Crossing;

type Answer = Result<Response<UnsyncBoxBody<Bytes, BoxError>>, Abandon>;
type Frames = mpsc::Sender<Result<Frame<Bytes>, BoxError>>;

fn channel() -> (Frames, UnsyncBoxBody<Bytes, BoxError>) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, StreamBody::new(ReceiverStream::new(receiver)).boxed_unsync())
}

fn data(bytes: impl Into<Bytes>) -> Result<Frame<Bytes>, BoxError> {
    Ok(Frame::data(bytes.into()))
}

fn full(text: &str) -> UnsyncBoxBody<Bytes, BoxError> {
    Full::from(Bytes::from(text.to_owned())).map_err(|never: Infallible| match never {}).boxed_unsync()
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://web.shop{path}")).body(Empty::new()).unwrap()
}

fn post<B>(path: &str, body: B) -> Request<B> {
    Request::post(format!("http://web.shop{path}")).body(body).unwrap()
}

struct Running {
    pair: Pair,
    leg: HttpLeg,
    serve: Serve,
    serving: tokio::task::JoinHandle<Result<(), tombolo_leg::http::ServeError>>,
}

/// A leg to an application that answers by path.
async fn running() -> Running {
    let pair = Pair::new();
    let (leg, accepted) = pair.leg(Alpn::H2).await;
    let options = Serve::default();
    let serving = tokio::spawn(serve(accepted, options.clone(), app));
    Running { pair, leg: HttpLeg::start(leg, HttpLimits::default()).await.unwrap(), serve: options, serving }
}

fn app(request: Request<RecvBody>) -> Pin<Box<dyn Future<Output = Answer> + Send>> {
    Box::pin(async move {
        let identity = request.extensions().get::<Arc<LegIdentity>>().unwrap().clone();
        match request.uri().path() {
            "/who" => Ok(Response::new(full(&identity.client_id.to_string()))),
            "/echo" => {
                let trailers = request.headers().contains_key("te");
                let mut response = Response::new(request.into_body().map_err(Into::into).boxed_unsync());
                if trailers {
                    response.headers_mut().insert("trailer", "sum".parse().unwrap());
                }
                Ok(response)
            }
            "/flood" => {
                let chunks = futures::stream::repeat_with(|| data(vec![7; 16 * 1024]));
                Ok(Response::new(StreamBody::new(chunks.take(1024)).boxed_unsync()))
            }
            "/refuse" => Err(Abandon::NeverReachedApp(Refusal::AppUnreachable)),
            "/break" => Err(Abandon::Broken("the application broke".into())),
            "/break-with" => Err(Abandon::Broken(StreamError::Reset(h2::Reason::ENHANCE_YOUR_CALM).into())),
            "/break-later" => {
                let (frames, body) = channel();
                tokio::spawn(async move {
                    frames.send(data("some")).await.unwrap();
                    frames.send(Err("no more".into())).await.unwrap();
                });
                Ok(Response::new(body))
            }
            "/never" => std::future::pending().await,
            "/continue" => {
                if request.headers().contains_key("x-decline") {
                    let mut response = Response::new(full("no"));
                    *response.status_mut() = StatusCode::EXPECTATION_FAILED;
                    return Ok(response);
                }
                request.extensions().get::<ContinueSignal>().unwrap().send();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                Ok(Response::new(full(std::str::from_utf8(&body).unwrap())))
            }
            "/tunnel" => {
                assert_eq!(request.method(), Method::CONNECT);
                let (near, far) = duplex(1024);
                let (mut read, mut write) = tokio::io::split(far);
                tokio::spawn(async move { tokio::io::copy(&mut read, &mut write).await });
                let (read, mut write) = tokio::io::split(near);
                tokio::spawn(async move { write_body(request.into_body(), &mut write).await });
                Ok(Response::new(IoBody::new(read).map_err(Into::into).boxed_unsync()))
            }
            path => panic!("no {path} here"),
        }
    })
}

async fn text<B: Body<Data = Bytes>>(body: B) -> String
where
    B::Error: std::fmt::Debug,
{
    String::from_utf8(bounded(body.collect()).await.unwrap().to_bytes().to_vec()).unwrap()
}

#[tokio::test]
async fn a_request_and_who_made_it() {
    let running = running().await;
    assert!(running.leg.is_usable());
    assert_eq!(running.leg.server_id(), &running.pair.west.id(SERVER));
    let response = bounded(running.leg.send(get("/who"))).await.unwrap();
    assert_eq!(running.leg.in_flight(), 1);
    assert_eq!(text(response.into_body()).await, "spiffe://east.tombolo/ns/shop/sa/cart");
    assert_eq!(running.leg.in_flight(), 0);
    assert!(running.leg.idle_for().is_some());
}

#[tokio::test]
async fn bodies_stream_both_ways_with_trailers() {
    let running = running().await;
    let (frames, body) = channel();
    let mut request = post("/echo", body);
    request.headers_mut().insert("te", "trailers".parse().unwrap());
    let mut response = bounded(running.leg.send(request)).await.unwrap();
    for word in ["one", "two"] {
        frames.send(data(word)).await.unwrap();
        // Each chunk comes back before the next is sent: nothing is collected on the way.
        let frame = bounded(response.body_mut().frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), word);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("sum", "6".parse().unwrap());
    frames.send(Ok(Frame::trailers(trailers.clone()))).await.unwrap();
    drop(frames);
    let frame = bounded(response.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_trailers().unwrap(), trailers);
    assert!(bounded(response.body_mut().frame()).await.is_none());
    assert_eq!(running.leg.in_flight(), 0);
}

#[tokio::test]
async fn a_stalled_reader_holds_up_nobody_else() {
    let running = running().await;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        stalled.push(bounded(running.leg.send(get("/flood"))).await.unwrap());
    }
    // Every one of them has filled its window or will; the others' requests go on.
    for _ in 0..50 {
        assert!(text(bounded(running.leg.send(get("/who"))).await.unwrap().into_body()).await.contains("cart"));
    }
    // A stalled body is all there once it is read.
    let body = bounded(stalled.pop().unwrap().into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(body.len(), 16 * 1024 * 1024);
}

#[tokio::test]
async fn a_writer_waits_for_its_reader() {
    let running = running().await;
    let (frames, body) = channel();
    let response = bounded(running.leg.send(post("/echo", body))).await.unwrap();
    let mut sent = 0u64;
    // Nobody reads the echo: both windows and what lies between fill up, and then the writer is held.
    loop {
        let chunk = data(vec![1; 64 * 1024]);
        match tokio::time::timeout(Duration::from_millis(300), frames.send(chunk)).await {
            Ok(sending) => sending.unwrap(),
            Err(_) => break,
        }
        sent += 64 * 1024;
        assert!(sent < 16 * u64::from(STREAM_WINDOW), "the writer is never held");
    }
    tokio::spawn(async move {
        for _ in 0..16 {
            frames.send(data(vec![2; 64 * 1024])).await.unwrap();
        }
    });
    let (mut body, mut echoed) = (response.into_body(), 0);
    while let Some(frame) = bounded(body.frame()).await {
        echoed += frame.unwrap().into_data().unwrap().len() as u64;
        assert!(echoed <= BULK_FROM || !running.leg.is_usable(), "a leg with a bulk stream takes no new requests");
    }
    assert_eq!(echoed, sent + 1024 * 1024);
    eventually("the leg is usable again", || running.leg.is_usable()).await;
}

#[tokio::test]
async fn a_request_that_the_app_never_got_is_safe_to_retry() {
    let running = running().await;
    let error = bounded(running.leg.send(get("/refuse"))).await.unwrap_err();
    assert!(error.is_safe_to_retry(), "{error}");
    assert_eq!(error.refusal(), Refusal::AppUnreachable);

    for (path, reason) in [("/break", h2::Reason::INTERNAL_ERROR), ("/break-with", h2::Reason::ENHANCE_YOUR_CALM)] {
        let error = bounded(running.leg.send(get(path))).await.unwrap_err();
        assert!(!error.is_safe_to_retry());
        assert!(matches!(error.kind, SendErrorKind::Stream(StreamError::Reset(seen)) if seen == reason), "{error}");
    }
    let response = bounded(running.leg.send(get("/break-later"))).await.unwrap();
    let error = bounded(response.into_body().collect()).await.unwrap_err();
    assert_eq!(error, StreamError::Reset(h2::Reason::INTERNAL_ERROR));
    assert!(running.leg.is_usable());
}

#[tokio::test]
async fn dropping_a_body_resets_its_stream_only() {
    let running = running().await;
    let (frames, body) = channel();
    let response = bounded(running.leg.send(post("/echo", body))).await.unwrap();
    drop(response);
    // The pump ends, and with it the request's body.
    bounded(frames.closed()).await;
    let waiting = running.leg.send(get("/never"));
    assert!(tokio::time::timeout(Duration::from_millis(50), waiting).await.is_err());
    assert_eq!(running.leg.in_flight(), 0);
    assert!(text(bounded(running.leg.send(get("/who"))).await.unwrap().into_body()).await.contains("cart"));
}

#[tokio::test]
async fn a_request_whose_body_fails_is_reset() {
    let running = running().await;
    let (frames, body) = channel();
    let mut response = bounded(running.leg.send(post("/echo", body))).await.unwrap();
    frames.send(data("some")).await.unwrap();
    assert!(bounded(response.body_mut().frame()).await.unwrap().is_ok());
    frames.send(Err("the caller went away".into())).await.unwrap();
    let ended = bounded(response.body_mut().frame()).await;
    assert!(matches!(ended, Some(Err(_))), "{ended:?}");
}

#[tokio::test]
async fn a_body_waits_until_the_application_asks() {
    let running = running().await;
    let (frames, body) = channel();
    let mut request = post("/continue", body);
    request.headers_mut().insert("expect", "100-continue".parse().unwrap());
    let sending = running.leg.send(request);
    let feeding = async {
        frames.send(data("asked for")).await.unwrap();
        drop(frames);
    };
    let (response, ()) = bounded(async { tokio::join!(sending, feeding) }).await;
    assert_eq!(text(response.unwrap().into_body()).await, "asked for");

    let (frames, body) = channel();
    let mut request = post("/continue", body);
    request.headers_mut().insert("expect", "100-continue".parse().unwrap());
    request.headers_mut().insert("x-decline", "1".parse().unwrap());
    let response = bounded(running.leg.send(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::EXPECTATION_FAILED);
    // It was declined, so nothing of it was read.
    assert_eq!(text(response.into_body()).await, "no");
    bounded(frames.closed()).await;
}

#[tokio::test]
async fn an_upgraded_connection_is_a_tunnel_with_half_closes() {
    let running = running().await;
    let mut request = Request::connect("http://web.shop/tunnel").body(()).unwrap();
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (body, attach) = IoBody::pending();
    let response = bounded(running.leg.send(request.map(|()| body))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let (near, far) = duplex(1024);
    let (read, mut write) = tokio::io::split(far);
    assert!(attach.send(read).is_ok());
    let writing = tokio::spawn(async move { write_body(response.into_body(), &mut write).await.unwrap() });
    let (mut read, mut write) = tokio::io::split(near);
    write.write_all(b"over the bar").await.unwrap();
    let mut echoed = [0; 12];
    bounded(read.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"over the bar");
    write.shutdown().await.unwrap();
    assert_eq!(bounded(read.read(&mut echoed)).await.unwrap(), 0);
    assert_eq!(bounded(writing).await.unwrap(), 12);
}

#[tokio::test]
async fn draining_finishes_what_is_under_way() {
    let running = running().await;
    let (frames, body) = channel();
    let mut response = bounded(running.leg.send(post("/echo", body))).await.unwrap();
    running.serve.drain.cancel();
    eventually("the client has seen GOAWAY", || !running.leg.is_usable()).await;
    let error = bounded(running.leg.send(get("/who"))).await.unwrap_err();
    assert!(error.is_safe_to_retry() && error.unsent.is_some(), "{error}");
    frames.send(data("still here")).await.unwrap();
    assert_eq!(bounded(response.body_mut().frame()).await.unwrap().unwrap().into_data().unwrap(), "still here");
    drop(frames);
    assert!(bounded(response.body_mut().frame()).await.is_none());
    bounded(running.serving).await.unwrap().unwrap();
    eventually("the leg is gone", || running.leg.health() == LegHealth::Gone).await;
}

#[tokio::test]
async fn aborting_ends_what_is_under_way() {
    let running = running().await;
    let waiting = running.leg.clone();
    let waiting = tokio::spawn(async move { waiting.send(get("/never")).await.map(drop) });
    eventually("the request is under way", || running.leg.in_flight() == 1).await;
    running.serve.abort.cancel();
    let error = bounded(waiting).await.unwrap().unwrap_err();
    assert!(!error.is_safe_to_retry(), "the application may have seen it: {error}");
    bounded(running.serving).await.unwrap().unwrap();

    let running = self::running().await;
    running.leg.abort();
    assert!(bounded(running.leg.send(get("/who"))).await.is_err());
    eventually("the leg is gone", || running.leg.health() == LegHealth::Gone).await;
}

#[tokio::test]
async fn the_connection_closes_when_nobody_holds_it() {
    let running = running().await;
    let response = bounded(running.leg.send(get("/who"))).await.unwrap();
    drop(running.leg);
    assert!(text(response.into_body()).await.contains("cart"));
    bounded(running.serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refused_client_learns_why() {
    let pair = Pair::new();
    pair.server_trust.set_revoked([pair.east.id(common::CLIENT)].into());
    let (leg, accepted) = pair.try_leg(Alpn::H2).await;
    assert_eq!(accepted.unwrap_err().refusal, Refusal::Revoked);
    let leg = HttpLeg::start(leg.unwrap(), HttpLimits::default()).await.unwrap();
    let error = bounded(leg.send(get("/who"))).await.unwrap_err();
    // The alert may be lost behind the reset of the connection.
    let told = [Refusal::Revoked, Refusal::ConnectionLost].contains(&error.refusal());
    assert!(error.is_safe_to_retry() || told, "{error}");
}

#[tokio::test]
async fn a_silent_path_makes_the_leg_suspect_while_a_request_waits() {
    // The far end answers HTTP/2 until the path between them is cut.
    let (near, mut near_far) = duplex(64 * 1024);
    let (mut far_near, far) = duplex(64 * 1024);
    let (cut, mut is_cut) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        loop {
            let carried = async {
                let mut path = (&mut near_far, &mut far_near);
                let _ = tokio::io::copy_bidirectional(&mut path.0, &mut path.1).await;
            };
            tokio::select! {
                () = carried => return,
                changed = is_cut.changed() => if changed.is_err() { return },
            }
            while *is_cut.borrow_and_update() {
                if is_cut.changed().await.is_err() {
                    return;
                }
            }
        }
    });
    tokio::spawn(async move {
        let mut connection = h2::server::handshake(far).await.unwrap();
        while let Some(Ok((_, respond))) = connection.accept().await {
            // Holds every request for ever.
            std::mem::forget(respond);
        }
    });
    let id = "spiffe://west.tombolo/ns/shop/sa/web".parse().unwrap();
    let leg = HttpLeg::over(near, id, Crossing::default(), Duration::ZERO, HttpLimits::default()).await.unwrap();
    let waiting = leg.clone();
    let waiting = tokio::spawn(async move { waiting.send(get("/never")).await.map(drop) });
    // A slow application alone is not suspect: its leg answers PINGs.
    assert!(tokio::time::timeout(Duration::from_millis(900), leg.suspect()).await.is_err());
    cut.send(true).unwrap();
    let began = std::time::Instant::now();
    bounded(leg.suspect()).await;
    assert!(began.elapsed() >= Duration::from_millis(250), "{:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    assert!(!leg.is_usable());
    assert!(!waiting.is_finished());
    tokio::time::sleep(Duration::from_secs(4)).await;
    cut.send(false).unwrap();
    eventually("the leg is live again", || leg.health() == LegHealth::Live).await;
    // How long the silence lasted is not how long the path is.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(leg.rtt() < Duration::from_millis(300), "{:?}", leg.rtt());

    // What others say of the way is taken for true until the far end answers, which here it does at once.
    let mut changes = leg.health_changes();
    leg.doubt();
    bounded(changes.changed()).await.unwrap();
    eventually("the far end has answered", || leg.health() == LegHealth::Live).await;
    cut.send(true).unwrap();
    leg.doubt();
    bounded(leg.suspect()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(leg.health(), LegHealth::Suspect);
}
