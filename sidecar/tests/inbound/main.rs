//! The inbound side over real legs with real SVIDs, in front of small real applications.
#![allow(clippy::unwrap_used)]

#[path = "../../../leg/tests/common/mod.rs"]
mod common;
mod standing;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::{PATIENCE, Pair, SERVER, bounded, eventually};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_core::id::{ClusterId, ServiceName};
use tombolo_core::model::AppProtocol;
use tombolo_core::policy::access::{AccessPolicy, DefaultAccess};
use tombolo_core::policy::rate::RateLimit;
use tombolo_core::policy::{Kind, Resource};
use tombolo_core::refusal::Refusal;
use tombolo_leg::Alpn;
use tombolo_leg::discovery::{InboundGrants, InboundPolicies};
use tombolo_leg::http::upgrade::{IoBody, accept_of, write_body};
use tombolo_leg::http::{BoxError, HttpLeg, HttpLimits, LegHealth, SendErrorKind, StreamError};
use tombolo_leg::opaque::{self, Open};
use tombolo_runtime::drain::{DrainTrigger, drain};
use tombolo_runtime::process::Process;
use tombolo_sidecar::config::{HealthConfig, ServiceConfig};
use tombolo_sidecar::inbound::{Authority, Inbound, run};

struct Fixed {
    grants: InboundGrants,
    policies: Policies,
    told: watch::Sender<()>,
}

/// What federation has told about callers of shop/web.
type Policies = Arc<Mutex<Option<Arc<InboundPolicies>>>>;

impl Authority for Fixed {
    fn cluster(&self) -> Option<ClusterId> {
        Some("west".parse().unwrap())
    }

    fn grants(&self) -> Arc<InboundGrants> {
        Arc::new(self.grants.clone())
    }

    fn policies(&self, _service: &ServiceName) -> Option<Arc<InboundPolicies>> {
        self.policies.lock().unwrap().clone()
    }

    fn policies_told(&self) -> watch::Receiver<()> {
        self.told.subscribe()
    }
}

/// Long enough for a request, and short enough to be waited for.
const STREAM_GRACE: Duration = Duration::from_secs(3);

/// A sidecar in west in front of one application, called from east.
struct Sidecar {
    pair: Pair,
    address: SocketAddr,
    process: Process,
    policies: Policies,
    told: watch::Sender<()>,
    drain: Option<DrainTrigger>,
}

impl Sidecar {
    async fn before(app: SocketAddr, protocol: AppProtocol) -> Self {
        let pair = Pair::new();
        let grants = [("shop/web".parse().unwrap(), BTreeSet::from(["east".parse().unwrap()]))].into();
        let services = [ServiceConfig {
            service: "shop/web".parse().unwrap(),
            port: 80,
            app: app.to_string(),
            protocol,
            health: HealthConfig::default(),
        }];
        let (trigger, watch) = drain();
        let process = Process { drain: watch, ..Process::bare("sidecar") };
        let svid = pair.west.svid(SERVER);
        let policies: Policies = Arc::new(Mutex::new(Some(Arc::default())));
        let told = watch::Sender::new(());
        let inbound = Inbound::with_stream_grace(
            &services,
            &process,
            &svid,
            &pair.server_trust,
            Box::new(Fixed { grants, policies: policies.clone(), told: told.clone() }),
            STREAM_GRACE,
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(run(listener, inbound));
        Self { pair, address, process, policies, told, drain: Some(trigger) }
    }

    async fn http(&self) -> HttpLeg {
        self.http_to("80.web.shop.svc.west.clusterset.local").await
    }

    async fn http_to(&self, target: &str) -> HttpLeg {
        let mut request = self.pair.request(self.address, Alpn::H2);
        request.target = target.parse().unwrap();
        let leg = bounded(self.pair.dialer.dial(request)).await.unwrap();
        HttpLeg::start(leg, HttpLimits::default()).await.unwrap()
    }

    fn tell(&self, specs: &[&str]) {
        *self.policies.lock().unwrap() = policies(specs, DefaultAccess::Allow);
        self.told.send_replace(());
    }

    fn refusals(&self, refusal: Refusal) -> bool {
        let line = format!("reason=\"{}\"}} ", refusal.code());
        let metrics = self.process.metrics.encode();
        let mut lines = metrics.lines().filter(|text| text.contains("sidecar-inbound") && text.contains(&line));
        lines.any(|text| !text.ends_with(" 0"))
    }
}

type AppResponse = Response<BoxBody<Bytes, hyper::Error>>;

fn said(text: String) -> AppResponse {
    Response::new(Full::from(text).map_err(|never: Infallible| match never {}).boxed())
}

async fn app(mut request: Request<Incoming>) -> Result<AppResponse, Infallible> {
    Ok(match request.uri().path() {
        "/seen" => {
            let header = |name: &str| {
                let values: Vec<_> = request.headers().get_all(name).iter().map(|v| v.to_str().unwrap()).collect();
                values.join("|")
            };
            said(format!(
                "{:?} {} host={} xfcc={} connection={} te={}",
                request.version(),
                request.uri(),
                header("host"),
                header("x-forwarded-client-cert"),
                header("connection"),
                header("te"),
            ))
        }
        "/echo" => {
            let mut response = Response::new(request.into_body().boxed());
            response.headers_mut().insert("trailer", "sum".parse().unwrap());
            response
        }
        "/ws" => {
            let key = request.headers()["sec-websocket-key"].clone();
            assert_eq!(request.headers()["upgrade"], "websocket");
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut response = said(String::new());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("connection", "upgrade".parse().unwrap());
            response.headers_mut().insert("upgrade", "websocket".parse().unwrap());
            response.headers_mut().insert("sec-websocket-accept", accept_of(&key));
            response
        }
        "/decline" => {
            let mut response = said("no".into());
            *response.status_mut() = StatusCode::EXPECTATION_FAILED;
            response
        }
        "/never" => std::future::pending().await,
        _ => {
            let mut response = said(String::new());
            *response.status_mut() = StatusCode::NOT_FOUND;
            response
        }
    })
}

async fn http1_app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service_fn(app));
            tokio::spawn(connection.with_upgrades());
        }
    });
    address
}

async fn http2_app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(tcp), service_fn(app)));
        }
    });
    address
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://Web.Shop:8080{path}")).body(Empty::new()).unwrap()
}

async fn text<B: Body<Data = Bytes>>(body: B) -> String
where
    B::Error: std::fmt::Debug,
{
    String::from_utf8(bounded(body.collect()).await.unwrap().to_bytes().to_vec()).unwrap()
}

const XFCC: &str = "By=spiffe://west.tombolo/ns/shop/sa/web;URI=spiffe://east.tombolo/ns/shop/sa/cart";

#[tokio::test]
async fn the_application_sees_http1_its_own_host_and_who_calls() {
    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    for _ in 0..3 {
        let mut request = get("/seen?a=b");
        request.headers_mut().append("x-forwarded-client-cert", "URI=spiffe://forged/x".parse().unwrap());
        request.headers_mut().append("x-forwarded-client-cert", "URI=spiffe://forged/y".parse().unwrap());
        request.headers_mut().insert("te", "trailers".parse().unwrap());
        let response = bounded(leg.send(request)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let seen = text(response.into_body()).await;
        let want = format!("HTTP/1.1 /seen?a=b host=Web.Shop:8080 xfcc={XFCC} connection= te=trailers");
        assert_eq!(seen, want);
    }
}

#[tokio::test]
async fn an_http2_application_sees_http2() {
    let sidecar = Sidecar::before(http2_app().await, AppProtocol::Grpc).await;
    let leg = sidecar.http().await;
    let response = bounded(leg.send(get("/seen"))).await.unwrap();
    let seen = text(response.into_body()).await;
    assert_eq!(seen, format!("HTTP/2.0 http://Web.Shop:8080/seen host= xfcc={XFCC} connection= te="));
}

#[tokio::test]
async fn bodies_and_trailers_stream_both_ways() {
    for http2 in [false, true] {
        let (app, protocol) = match http2 {
            true => (http2_app().await, AppProtocol::Http2),
            false => (http1_app().await, AppProtocol::Http),
        };
        let sidecar = Sidecar::before(app, protocol).await;
        let leg = sidecar.http().await;
        let (frames, receiver) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
        let request = Request::post("http://web.shop/echo")
            .header("te", "trailers")
            .header("trailer", "sum")
            .body(StreamBody::new(ReceiverStream::new(receiver)))
            .unwrap();
        let mut response = bounded(leg.send(request)).await.unwrap();
        for word in ["one", "two"] {
            frames.send(Ok(Frame::data(Bytes::from(word)))).await.unwrap();
            let frame = bounded(response.body_mut().frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), word);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("sum", "6".parse().unwrap());
        frames.send(Ok(Frame::trailers(trailers.clone()))).await.unwrap();
        drop(frames);
        let frame = bounded(response.body_mut().frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_trailers().unwrap(), trailers, "http2: {http2}");
    }
}

#[tokio::test]
async fn a_body_is_asked_for_end_to_end() {
    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let (frames, receiver) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
    let body = || Request::post("http://web.shop/echo").header("expect", "100-continue");
    let request = body().body(StreamBody::new(ReceiverStream::new(receiver))).unwrap();
    let feeding = async {
        frames.send(Ok(Frame::data(Bytes::from_static(b"asked for")))).await.unwrap();
        drop(frames);
    };
    let (response, ()) = bounded(async { tokio::join!(leg.send(request), feeding) }).await;
    assert_eq!(text(response.unwrap().into_body()).await, "asked for");

    let (frames, receiver) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
    let request = Request::post("http://web.shop/decline").header("expect", "100-continue");
    let request = request.body(StreamBody::new(ReceiverStream::new(receiver))).unwrap();
    let response = bounded(leg.send(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::EXPECTATION_FAILED);
    assert_eq!(text(response.into_body()).await, "no");
    bounded(frames.closed()).await;
}

#[tokio::test]
async fn a_websocket_is_opened_and_carries_both_ways() {
    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let mut request = Request::connect("http://web.shop/ws").header("sec-websocket-version", "13").body(()).unwrap();
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (body, attach) = IoBody::pending();
    let response = bounded(leg.send(request.map(|()| body))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(!response.headers().contains_key("upgrade") && !response.headers().contains_key("sec-websocket-accept"));
    let (near, far) = duplex(1024);
    let (read, mut write) = tokio::io::split(far);
    assert!(attach.send(read).is_ok());
    tokio::spawn(async move { write_body(response.into_body(), &mut write).await });
    let (mut read, mut write) = tokio::io::split(near);
    write.write_all(b"over the bar").await.unwrap();
    let mut echoed = [0; 12];
    bounded(read.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"over the bar");
    write.shutdown().await.unwrap();
    assert_eq!(bounded(read.read(&mut echoed)).await.unwrap(), 0);
}

#[tokio::test]
async fn only_what_is_granted_is_reached() {
    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    for (target, status, refusal) in [
        ("81.web.shop.svc.west.clusterset.local", StatusCode::MISDIRECTED_REQUEST, Refusal::UnknownPort),
        ("80.web.shop.svc.north.clusterset.local", StatusCode::MISDIRECTED_REQUEST, Refusal::TargetMismatch),
        ("80.db.data.svc.west.clusterset.local", StatusCode::FORBIDDEN, Refusal::NotExported),
    ] {
        let leg = sidecar.http_to(target).await;
        let response = bounded(leg.send(get("/seen"))).await.unwrap();
        assert_eq!(response.status(), status, "{target}");
        assert_eq!(response.headers()["tombolo-refusal"], refusal.code());
        assert!(sidecar.refusals(refusal), "{target}");
    }
}

#[tokio::test]
async fn an_application_that_is_not_there_never_got_the_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    for protocol in [AppProtocol::Http, AppProtocol::Http2] {
        let sidecar = Sidecar::before(address, protocol).await;
        let leg = sidecar.http().await;
        let error = bounded(leg.send(get("/seen"))).await.unwrap_err();
        assert!(matches!(error.kind, SendErrorKind::Stream(StreamError::Refused)), "{error}");
        assert!(error.is_safe_to_retry());
        assert!(sidecar.refusals(Refusal::AppUnreachable));
    }
}

#[tokio::test]
async fn an_application_that_breaks_off_is_not_called_unreached() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sidecar = Sidecar::before(listener.local_addr().unwrap(), AppProtocol::Http).await;
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.read_u8().await.unwrap();
        opaque::reset(tcp);
    });
    let error = bounded(sidecar.http().await.send(get("/seen"))).await.unwrap_err();
    assert!(matches!(error.kind, SendErrorKind::Stream(StreamError::Reset(_))), "{error}");
    assert!(!error.is_safe_to_retry());
}

#[tokio::test]
async fn the_application_learns_that_its_caller_went_away() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sidecar = Sidecar::before(listener.local_addr().unwrap(), AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let waiting = tokio::spawn(async move { leg.send(get("/never")).await.map(drop) });
    let (mut tcp, _) = bounded(listener.accept()).await.unwrap();
    let mut head = [0; 16];
    bounded(tcp.read_exact(&mut head)).await.unwrap();
    waiting.abort();
    let mut rest = Vec::new();
    // The end of the stream, or a reset: the application sees that nobody waits.
    let _ = bounded(tcp.read_to_end(&mut rest)).await;
}

async fn open(sidecar: &Sidecar, port: u16) -> Result<tombolo_leg::dial::Leg, opaque::OpenError> {
    let request = sidecar.pair.request(sidecar.address, Alpn::Tcp);
    let mut leg = bounded(sidecar.pair.dialer.dial(request)).await.unwrap();
    let open = Open { port, client_address: None, trace: None, tracestate: None };
    bounded(opaque::open(&mut leg.stream, &open)).await.map(|()| leg)
}

#[tokio::test]
async fn opaque_connections_reach_the_application() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let sidecar = Sidecar::before(address, AppProtocol::Opaque).await;
    // A warm leg burns no connection of the application.
    let idle = bounded(sidecar.pair.dialer.dial(sidecar.pair.request(sidecar.address, Alpn::Tcp))).await.unwrap();
    let mut leg = open(&sidecar, 80).await.unwrap();
    let (mut app, _) = bounded(listener.accept()).await.unwrap();
    app.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    bounded(leg.stream.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
    leg.stream.shutdown().await.unwrap();
    assert_eq!(bounded(app.read(&mut greeting)).await.unwrap(), 0);
    opaque::reset(app);
    assert!(bounded(leg.stream.read(&mut greeting)).await.is_err(), "a reset arrives as one");
    drop(idle);

    let refused = open(&sidecar, 81).await.unwrap_err();
    assert_eq!((refused.refusal, refused.refused), (Refusal::TargetMismatch, true));
    drop(listener);
    let refused = open(&sidecar, 80).await.unwrap_err();
    assert_eq!((refused.refusal, refused.refused), (Refusal::AppUnreachable, true));
}

/// Policies for shop/web out of their specs; `deny` is what becomes of those whom none speaks of.
fn policies(specs: &[&str], default: DefaultAccess) -> Option<Arc<InboundPolicies>> {
    let access = specs.iter().enumerate().map(|(n, spec)| {
        let resource = Resource::new(Kind::AccessPolicy, "shop".parse().unwrap(), &format!("p{n}")).unwrap();
        Arc::new(AccessPolicy { resource, targets: Default::default(), spec: serde_json::from_str(spec).unwrap() })
    });
    let mut policies = InboundPolicies { access: access.collect(), ..Default::default() };
    policies.defaults.cluster = default;
    Some(Arc::new(policies))
}

#[tokio::test]
async fn policies_decide_about_each_request_of_a_leg_that_stands() {
    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let status = async |path: &str| bounded(leg.send(get(path))).await.unwrap().status().as_u16();
    let by_path = r#"{"rules": [{"from": [{"serviceAccounts": ["cart"]}], "to": [{"paths": ["/seen"]}]}]}"#;
    use DefaultAccess::{Allow, Deny};
    for (specs, default, seen, other) in [
        (&[][..], Allow, 200, 404),
        (&[], Deny, 403, 403),
        (&[r#"{"rules": [{"from": [{"serviceAccounts": ["pay/cart"]}]}]}"#], Allow, 403, 403),
        (&[by_path], Deny, 200, 403),
        (&[by_path, r#"{"action": "deny", "rules": [{"from": [{"clusters": ["east"]}]}]}"#], Allow, 403, 403),
        (&[r#"{"mode": "audit", "rules": []}"#], Allow, 200, 404),
    ] {
        *sidecar.policies.lock().unwrap() = policies(specs, default);
        assert_eq!((status("/seen").await, status("/other").await), (seen, other), "{specs:?}");
    }
    assert!(sidecar.refusals(Refusal::IdentityDenied));
    let audited = "tombolo_inbound_audited_total{cluster=\"east\"} 2";
    assert!(sidecar.process.metrics.encode().contains(audited), "{}", sidecar.process.metrics.encode());

    *sidecar.policies.lock().unwrap() = policies(&[r#"{"rules": []}"#], Allow);
    let refused = bounded(leg.send(get("/seen"))).await.unwrap();
    assert_eq!(refused.headers()["tombolo-refusal"], "identity-denied");
    let said = text(refused.into_body()).await;
    assert!(said.contains("not allowed") && !said.contains("shop/p0"), "the caller is not told which policy: {said}");
    let mut call = get("/shop.Cart/Add");
    call.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let refused = bounded(leg.send(call)).await.unwrap();
    assert_eq!((refused.status(), refused.headers()["grpc-status"].to_str().unwrap()), (StatusCode::OK, "7"));

    // What decides was not told yet: safe to ask elsewhere.
    *sidecar.policies.lock().unwrap() = None;
    let error = bounded(leg.send(get("/seen"))).await.unwrap_err();
    assert!(matches!(error.kind, SendErrorKind::Stream(StreamError::Refused)), "{error}");
}

#[tokio::test]
async fn policies_decide_about_opaque_connections_and_rate_limits_answer_429() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sidecar = Sidecar::before(listener.local_addr().unwrap(), AppProtocol::Opaque).await;
    *sidecar.policies.lock().unwrap() = policies(&[r#"{"rules": [{"to": [{"paths": ["/"]}]}]}"#], DefaultAccess::Allow);
    let refused = open(&sidecar, 80).await.unwrap_err();
    assert_eq!((refused.refusal, refused.refused), (Refusal::IdentityDenied, true));
    *sidecar.policies.lock().unwrap() = policies(&[r#"{"rules": [{"to": [{"ports": [80]}]}]}"#], DefaultAccess::Allow);
    open(&sidecar, 80).await.unwrap();

    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let rate_limit = Some(RateLimit { requests_per_second: 1, burst: Some(3) });
    *sidecar.policies.lock().unwrap() = Some(Arc::new(InboundPolicies { rate_limit, ..Default::default() }));
    let leg = sidecar.http().await;
    let mut statuses = Vec::new();
    for _ in 0..5 {
        let response = bounded(leg.send(get("/seen"))).await.unwrap();
        assert!(response.status() == StatusCode::OK || response.headers().contains_key("retry-after"));
        statuses.push(response.status().as_u16());
    }
    // A slow machine earns a token meanwhile, hardly two.
    assert!(statuses.starts_with(&[200, 200, 200]) && statuses.contains(&429), "{statuses:?}");
    assert!(sidecar.refusals(Refusal::RateLimited));
}

#[tokio::test]
async fn draining_finishes_and_takes_nothing_new() {
    let mut sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let (frames, receiver) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
    let request = Request::post("http://web.shop/echo").body(StreamBody::new(ReceiverStream::new(receiver))).unwrap();
    let mut response = bounded(leg.send(request)).await.unwrap();
    let draining = tokio::spawn(sidecar.drain.take().unwrap().drain(PATIENCE));
    eventually("GOAWAY arrives", || !leg.is_usable()).await;
    frames.send(Ok(Frame::data(Bytes::from_static(b"still here")))).await.unwrap();
    assert_eq!(bounded(response.body_mut().frame()).await.unwrap().unwrap().into_data().unwrap(), "still here");
    eventually_refused(sidecar.address).await;
    drop(frames);
    while let Some(frame) = bounded(response.body_mut().frame()).await {
        frame.unwrap();
    }
    assert_eq!(bounded(draining).await.unwrap(), tombolo_runtime::drain::DrainOutcome::Clean);
}

async fn eventually_refused(address: SocketAddr) {
    let gone = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the listener closes");
}

#[tokio::test]
async fn head_and_empty_answers_keep_the_connection() {
    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    for method in [Method::HEAD, Method::GET, Method::HEAD] {
        let request =
            Request::builder().method(method).uri("http://web.shop/seen").body(Empty::<Bytes>::new()).unwrap();
        let response = bounded(leg.send(request)).await.unwrap();
        assert_eq!(response.version(), Version::HTTP_2);
        assert_eq!(response.status(), StatusCode::OK);
        text(response.into_body()).await;
    }
}
