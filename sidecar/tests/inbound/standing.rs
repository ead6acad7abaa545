//! What stands when its caller is denied or revoked.

use super::*;

const NO_EAST: &str = r#"{"action": "deny", "rules": [{"from": [{"clusters": ["east"]}]}]}"#;
const NO_SOCKET: &str = r#"{"action": "deny", "rules": [{"to": [{"methods": ["GET"], "paths": ["/ws"]}]}]}"#;

#[tokio::test]
async fn an_opaque_connection_that_stands_ends_when_a_later_policy_denies_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sidecar = Sidecar::before(listener.local_addr().unwrap(), AppProtocol::Opaque).await;
    let mut leg = open(&sidecar, 80).await.unwrap();
    let (mut app, _) = bounded(listener.accept()).await.unwrap();
    let mut octet = [0];
    // One that still allows it, and one that only audits, leave it alone.
    for specs in [r#"{"rules": [{"from": [{"serviceAccounts": ["cart"]}]}]}"#, r#"{"mode": "audit", "rules": []}"#] {
        sidecar.tell(&[specs]);
        leg.stream.write_all(b"a").await.unwrap();
        leg.stream.flush().await.unwrap();
        assert_eq!(bounded(app.read(&mut octet)).await.unwrap(), 1, "{specs}");
    }
    assert!(!sidecar.refusals(Refusal::IdentityDenied));
    sidecar.tell(&[NO_EAST]);
    assert!(bounded(app.read(&mut octet)).await.is_err(), "the application is reset, not ended in order");
    assert!(bounded(leg.stream.read(&mut octet)).await.is_err(), "and so is the caller");
    assert!(sidecar.refusals(Refusal::IdentityDenied));
}

/// An application that takes any WebSocket, and then says nothing and hands its connections over.
async fn silent_app() -> (SocketAddr, mpsc::Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, (sender, connections)) = (listener.local_addr().unwrap(), mpsc::channel(8));
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                tcp.read_buf(&mut head).await.unwrap();
            }
            let head = String::from_utf8(head).unwrap();
            let key = head.lines().find_map(|line| line.strip_prefix("sec-websocket-key: ")).unwrap();
            let accept = accept_of(&key.parse().unwrap());
            let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n";
            let answer = format!("{answer}sec-websocket-accept: {}\r\n\r\n", accept.to_str().unwrap());
            tcp.write_all(answer.as_bytes()).await.unwrap();
            sender.send(tcp).await.unwrap();
        }
    });
    (address, connections)
}

type SocketResponse = Response<tombolo_leg::http::RecvBody>;

/// A WebSocket through `leg`, with what its caller says into it.
async fn websocket(leg: &HttpLeg) -> (SocketResponse, mpsc::Sender<Result<Frame<Bytes>, BoxError>>) {
    let (frames, receiver) = mpsc::channel(1);
    let mut request = Request::connect("http://web.shop/ws").header("sec-websocket-version", "13").body(()).unwrap();
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let body = StreamBody::new(ReceiverStream::new(receiver));
    let response = bounded(leg.send(request.map(|()| body))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    (response, frames)
}

async fn says(frames: &mpsc::Sender<Result<Frame<Bytes>, BoxError>>, app: &mut TcpStream) {
    frames.send(Ok(Frame::data(Bytes::from_static(b"a")))).await.unwrap();
    assert_eq!(bounded(app.read(&mut [0])).await.unwrap(), 1);
}

/// The application's connection has ended, in whatever way.
async fn has_ended(mut app: TcpStream) {
    let _ = bounded(app.read_to_end(&mut Vec::new())).await;
}

#[tokio::test]
async fn a_websocket_that_stands_ends_when_a_later_policy_denies_it() {
    let (address, mut connections) = silent_app().await;
    let sidecar = Sidecar::before(address, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let (mut response, frames) = websocket(&leg).await;
    let mut app = bounded(connections.recv()).await.unwrap();
    for specs in [r#"{"rules": [{"from": [{"serviceAccounts": ["cart"]}]}]}"#, r#"{"mode": "audit", "rules": []}"#] {
        sidecar.tell(&[specs]);
        says(&frames, &mut app).await;
    }
    sidecar.tell(&[NO_SOCKET]);
    assert!(bounded(response.body_mut().frame()).await.unwrap().is_err(), "a reset, and no orderly end");
    has_ended(app).await;
    eventually("it is counted", || sidecar.refusals(Refusal::IdentityDenied)).await;
    assert_eq!(leg.health(), LegHealth::Live, "what else is on the leg goes on");
}

#[tokio::test]
async fn a_stream_ends_when_a_later_policy_denies_it_and_its_grace_is_over() {
    let sidecar = Sidecar::before(http1_app().await, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let began = std::time::Instant::now();
    let (frames, receiver) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
    let request = Request::post("http://web.shop/echo").body(StreamBody::new(ReceiverStream::new(receiver))).unwrap();
    let mut response = bounded(leg.send(request)).await.unwrap();
    let mut echoed = async |what: &'static str| {
        frames.send(Ok(Frame::data(Bytes::from_static(what.as_bytes())))).await.unwrap();
        bounded(response.body_mut().frame()).await.unwrap().unwrap().into_data().unwrap()
    };
    assert_eq!(echoed("before").await, "before");
    sidecar.tell(&[NO_EAST]);
    assert_eq!(bounded(leg.send(get("/seen"))).await.unwrap().status(), StatusCode::FORBIDDEN);
    assert_eq!(echoed("in its grace").await, "in its grace");
    // Nothing is said any more, so that what ends it is its time.
    assert!(bounded(response.body_mut().frame()).await.unwrap().is_err());
    assert!(began.elapsed() >= STREAM_GRACE, "{:?}", began.elapsed());
    eventually("it is counted twice", || sidecar.process.metrics.encode().contains("identity-denied\"} 2")).await;
}

#[tokio::test]
async fn a_revoked_client_is_cut_off_whatever_it_has_under_way() {
    let (address, mut connections) = silent_app().await;
    let sidecar = Sidecar::before(address, AppProtocol::Http).await;
    let leg = sidecar.http().await;
    let (mut response, frames) = websocket(&leg).await;
    let mut app = bounded(connections.recv()).await.unwrap();
    says(&frames, &mut app).await;
    sidecar.pair.server_trust.set_revoked([sidecar.pair.east.id(common::CLIENT)].into());
    eventually("the leg is gone", || leg.health() == LegHealth::Gone).await;
    assert!(bounded(response.body_mut().frame()).await.unwrap().is_err());
    has_ended(app).await;
    assert!(sidecar.refusals(Refusal::Revoked));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sidecar = Sidecar::before(listener.local_addr().unwrap(), AppProtocol::Opaque).await;
    // One that stands, and a warm one.
    let mut warm = bounded(sidecar.pair.dialer.dial(sidecar.pair.request(sidecar.address, Alpn::Tcp))).await.unwrap();
    let mut leg = open(&sidecar, 80).await.unwrap();
    let (mut app, _) = bounded(listener.accept()).await.unwrap();
    sidecar.pair.server_trust.set_revoked([sidecar.pair.east.id(common::CLIENT)].into());
    assert!(bounded(app.read(&mut [0])).await.is_err(), "the application is reset, not ended in order");
    assert!(bounded(leg.stream.read(&mut [0])).await.is_err(), "and so is the caller");
    assert!(!matches!(bounded(warm.stream.read(&mut [0])).await, Ok(1..)));
}
