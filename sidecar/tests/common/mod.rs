//! Two clusters on loopback: `east`, where the sidecar under test lives, and `west` behind a stand-in for the
//! gateways. Legs, certificates and sockets are real; what federation would tell is fed by hand.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use jiff::Timestamp;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tombolo_core::id::{ClusterId, ServiceName, SpiffeId};
use tombolo_core::model::{
    AppProtocol, ClusterShare, Endpoint, Export, Freshness, Origin, ServiceKind, ServicePort, SessionAffinity,
    Transport,
};
use tombolo_core::refusal::Refusal;
use tombolo_core::silence::SilenceConfig;
use tombolo_core::trace::Hop;
use tombolo_leg::Alpn;
use tombolo_leg::accept::{AcceptedLeg, Acceptor};
use tombolo_leg::client_hello::{ProxyPolicy, read_opening};
use tombolo_leg::discovery::{LocalGateway, ServiceState, ServiceView, ShareView};
use tombolo_leg::http::upgrade::{IoBody, write_body};
use tombolo_leg::http::{Abandon, BoxError, ContinueSignal, RecvBody, Serve, serve};
use tombolo_leg::opaque;
use tombolo_leg::status::{self, Crossing};
use tombolo_runtime::process::Process;
use tombolo_sidecar::Config;
use tombolo_sidecar::outbound::refuse::Refused;
use tombolo_sidecar::outbound::services::{Feed, ServiceSource};
use tombolo_sidecar::outbound::{Outbound, listener, upkeep};
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::{ClusterBundle, TrustStore};
use tombolo_trust::svid::SvidSource;

pub const WEB: &str = "web.shop.svc.clusterset.local";
pub const LIFE: Duration = Duration::from_secs(3600);

/// Bounds a test, so that a hang is a failure.
pub async fn bounded<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("the test hangs")
}

/// Waits for a condition.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

pub struct Cluster {
    pub name: &'static str,
    ca: CertificateAuthority,
    _folder: TempDir,
}

impl Cluster {
    fn new(name: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let domain = format!("{name}.tombolo").parse().unwrap();
        let ca = CertificateAuthority::create_or_load(folder.path(), &domain).unwrap();
        Self { name, ca, _folder: folder }
    }

    pub fn id(&self, account: &str) -> SpiffeId {
        format!("spiffe://{}.tombolo/ns/shop/sa/{account}", self.name).parse().unwrap()
    }

    pub fn renew(&self, source: &SvidSource, account: &str) {
        let key = IdentityKey::generate().unwrap();
        source.set(self.ca.issue_svid(&key, &self.id(account), LIFE, Timestamp::now()).unwrap());
    }

    pub fn source(&self, account: &str) -> SvidSource {
        let source = SvidSource::new();
        self.renew(&source, account);
        source
    }

    pub fn bundle(&self) -> ClusterBundle {
        ClusterBundle { cluster: self.name.parse().unwrap(), bundle: self.ca.bundle() }
    }
}

/// How a far application behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Well,
    /// Its sidecar lives, the application does not.
    AppDead,
    /// Takes requests and never answers.
    Hung,
    /// Takes requests and breaks off.
    Breaks,
    /// Takes so many milliseconds for each request.
    Takes(u64),
}

/// A far sidecar with its application.
pub struct Far {
    pub address: SocketAddr,
    pub mood: Arc<Mutex<Mood>>,
    pub requests: Arc<AtomicU32>,
    pub legs: Arc<AtomicU32>,
    pub clients: Arc<Mutex<BTreeSet<SpiffeId>>>,
    running: Option<tokio::task::JoinHandle<()>>,
}

impl Far {
    pub async fn start(name: &'static str, svid: &SvidSource, trust: &TrustStore) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut far = Self {
            address: listener.local_addr().unwrap(),
            mood: Arc::new(Mutex::new(Mood::Well)),
            requests: Arc::default(),
            legs: Arc::default(),
            clients: Arc::default(),
            running: None,
        };
        let acceptor = Acceptor::new(svid, trust);
        let (mood, requests, legs, clients) =
            (far.mood.clone(), far.requests.clone(), far.legs.clone(), far.clients.clone());
        far.running = Some(tokio::spawn(async move {
            let mut legs_open = JoinSet::new();
            loop {
                let Ok((tcp, _)) = listener.accept().await else { return };
                let (acceptor, mood, requests) = (acceptor.clone(), mood.clone(), requests.clone());
                let (legs, clients) = (legs.clone(), clients.clone());
                legs_open.spawn(async move {
                    let Ok(leg) = acceptor.accept(tcp).await else { return };
                    legs.fetch_add(1, Ordering::SeqCst);
                    clients.lock().unwrap().insert(leg.identity.client_id.clone());
                    match leg.identity.alpn {
                        Alpn::H2 => {
                            let service = move |request| {
                                let mood = *mood.lock().unwrap();
                                app(name, mood, requests.clone(), request)
                            };
                            let _ = serve(leg, Serve::default(), service).await;
                        }
                        Alpn::Tcp => opaque_app(name, &mood, leg).await,
                    }
                });
            }
        }));
        far
    }

    pub fn feel(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    pub fn requests(&self) -> u32 {
        self.requests.load(Ordering::SeqCst)
    }

    /// The whole machine goes: sidecar and application.
    pub fn kill(&self) {
        self.running.as_ref().unwrap().abort();
    }
}

pub type AnyBody = UnsyncBoxBody<Bytes, BoxError>;

pub fn full(bytes: impl Into<Bytes>) -> AnyBody {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

type Answer = Result<Response<AnyBody>, Abandon>;

/// An application that answers by path.
async fn app(name: &'static str, mood: Mood, requests: Arc<AtomicU32>, request: Request<RecvBody>) -> Answer {
    match mood {
        Mood::Well => {}
        Mood::AppDead => return Err(Abandon::NeverReachedApp(Refusal::AppUnreachable)),
        Mood::Hung => return std::future::pending().await,
        Mood::Takes(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        Mood::Breaks => {
            requests.fetch_add(1, Ordering::SeqCst);
            return Err(Abandon::Broken("the application died".into()));
        }
    }
    requests.fetch_add(1, Ordering::SeqCst);
    match request.uri().path() {
        "/seen" => {
            let mut seen = format!("{} {}\n", request.method(), request.uri());
            for (name, value) in request.headers() {
                seen.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
            }
            Ok(Response::new(full(seen)))
        }
        "/echo" => {
            let mut response = Response::new(request.into_body().map_err(Into::into).boxed_unsync());
            response.headers_mut().insert("trailer", "x-sum".parse().unwrap());
            Ok(response)
        }
        "/count" => {
            let octets = request.into_body().collect().await.map(|body| body.to_bytes().len()).unwrap_or(0);
            Ok(Response::new(full(octets.to_string())))
        }
        "/flood" => {
            let chunk = || Ok(http_body::Frame::data(Bytes::from(vec![7; 16 * 1024])));
            let chunks = tokio_stream::iter(std::iter::repeat_with(chunk).take(640));
            Ok(Response::new(StreamBody::new(chunks).boxed_unsync()))
        }
        "/bad" => Ok(Response::builder().status(503).body(full("busy")).unwrap()),
        "/slow" => {
            tokio::time::sleep(Duration::from_millis(300)).await;
            Ok(Response::new(full(name)))
        }
        "/never" => std::future::pending().await,
        "/continue" => {
            if request.headers().contains_key("x-decline") {
                return Ok(Response::builder().status(417).body(full("no")).unwrap());
            }
            if let Some(signal) = request.extensions().get::<ContinueSignal>() {
                signal.send();
            }
            let body = request.into_body().collect().await.unwrap().to_bytes();
            Ok(Response::new(full(body)))
        }
        "/ws" => {
            let protocol = request.extensions().get::<h2::ext::Protocol>().unwrap().as_str().to_owned();
            assert_eq!(protocol, "websocket");
            let (near, far) = tokio::io::duplex(4096);
            let (mut read, mut write) = tokio::io::split(far);
            tokio::spawn(async move { tokio::io::copy(&mut read, &mut write).await });
            let (read, mut write) = tokio::io::split(near);
            tokio::spawn(async move { write_body(request.into_body(), &mut write).await });
            Ok(Response::new(IoBody::new(read).map_err(Into::into).boxed_unsync()))
        }
        _ => Ok(Response::new(full(name))),
    }
}

/// Speaks first, then echoes until the end of what comes; `reset` is answered with a reset.
async fn opaque_app(name: &str, mood: &Mutex<Mood>, leg: AcceptedLeg) {
    let mut stream = leg.stream;
    let Ok(Some(_open)) = opaque::accept_open(&mut stream).await else { return };
    let mood = *mood.lock().unwrap();
    match mood {
        Mood::AppDead => {
            let _ = opaque::answer(&mut stream, Err(Refusal::AppUnreachable)).await;
            let _ = stream.shutdown().await;
            return;
        }
        Mood::Breaks => return,
        Mood::Well | Mood::Hung | Mood::Takes(_) => {}
    }
    opaque::answer(&mut stream, Ok(())).await.unwrap();
    stream.write_all(format!("hello from {name}\n").as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => {
                let _ = stream.write_all(b"bye\n").await;
                let _ = stream.shutdown().await;
                return;
            }
            Ok(_) if buffer.starts_with(b"reset") => return opaque::reset(stream.into_inner().0),
            Ok(count) => {
                if stream.write_all(&buffer[..count]).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// A stand-in for the gateways: reads the opening, says that it is accepted, and passes bytes on.
pub struct Gate {
    pub address: SocketAddr,
    /// What it says instead, if anything.
    pub refuses: Arc<Mutex<Option<Refusal>>>,
    pub legs: Arc<AtomicU32>,
    /// While it hangs, what stands across it stands, and new legs are accepted by its kernel only.
    pub hangs: Arc<AtomicBool>,
    running: tokio::task::JoinHandle<()>,
}

impl Gate {
    pub async fn start(id: &'static str, to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let refuses: Arc<Mutex<Option<Refusal>>> = Arc::default();
        let legs: Arc<AtomicU32> = Arc::default();
        let hangs: Arc<AtomicBool> = Arc::default();
        let (refusing, counted, hanging) = (refuses.clone(), legs.clone(), hangs.clone());
        let running = tokio::spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let Ok((mut near, _)) = listener.accept().await else { return };
                let refused = *refusing.lock().unwrap();
                counted.fetch_add(1, Ordering::SeqCst);
                let hangs = hanging.load(Ordering::SeqCst);
                open.spawn(async move {
                    if hangs {
                        return std::future::pending().await;
                    }
                    let Ok(opening) = read_opening(&mut near, ProxyPolicy::Read).await else { return };
                    assert!(opening.proxy.unwrap().status_wanted);
                    if let Some(refusal) = refused {
                        let detail = "as the test says".into();
                        let refused = status::LegRefused { refusal, detail, retry_after: None, gateway_id: None };
                        let _ = status::write(&mut near, &Err(refused)).await;
                        return;
                    }
                    let hop = |gateway: &str, cluster: &str| Hop {
                        gateway_id: gateway.parse().unwrap(),
                        cluster: cluster.parse().unwrap(),
                        span: None,
                    };
                    let crossing = Crossing {
                        hops: vec![hop(id, "east"), hop("gw-west", "west")],
                        path: vec!["east".parse().unwrap(), "west".parse().unwrap()],
                    };
                    status::write(&mut near, &Ok(crossing)).await.unwrap();
                    let Ok(mut far) = TcpStream::connect(to).await else { return };
                    far.write_all(&opening.hello.raw).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Self { address, refuses, legs, hangs, running }
    }

    pub fn kill(&self) {
        self.running.abort();
    }

    pub fn as_local(&self, id: &str) -> LocalGateway {
        LocalGateway {
            gateway_id: id.parse().unwrap(),
            ingress_address: self.address.to_string(),
            watch_address: "127.0.0.1:1".into(),
            spiffe_id: format!("spiffe://east.tombolo/tombolo/gateway/{id}").parse().unwrap(),
        }
    }
}

/// What discovery would say, said by the test.
#[derive(Clone, Default)]
pub struct Told {
    services: Arc<Mutex<HashMap<ServiceName, watch::Sender<ServiceState>>>>,
}

impl Told {
    pub fn say(&self, service: &str, state: ServiceState) {
        self.services.lock().unwrap().entry(service.parse().unwrap()).or_default().send_replace(state);
    }
}

impl ServiceSource for Told {
    fn subscribe(&self, service: &ServiceName) -> Result<Feed, Refused> {
        let mut services = self.services.lock().unwrap();
        Ok(Feed { updates: services.entry(service.clone()).or_default().subscribe(), hold: None })
    }
}

pub struct World {
    pub east: Cluster,
    pub west: Cluster,
    pub trust: TrustStore,
    pub svid: SvidSource,
    pub local: Far,
    pub remote: Far,
    pub gate: Gate,
    pub told: Told,
    pub outbound: Arc<Outbound>,
    pub proxy: SocketAddr,
}

pub const PORTS: [(u16, AppProtocol); 3] =
    [(80, AppProtocol::Http), (90, AppProtocol::Grpc), (5432, AppProtocol::Opaque)];

impl World {
    pub async fn new() -> Self {
        Self::with("").await
    }

    /// `more` is YAML for the sidecar's configuration.
    pub async fn with(more: &str) -> Self {
        Self::of(more, &Process::bare("sidecar")).await
    }

    pub async fn of(more: &str, process: &Process) -> Self {
        Self::with_patience(more, process, SilenceConfig::default()).await
    }

    pub async fn with_patience(more: &str, process: &Process, patience: SilenceConfig) -> Self {
        let (east, west) = (Cluster::new("east"), Cluster::new("west"));
        let trust = TrustStore::new();
        assert_eq!(trust.replace_all(vec![east.bundle(), west.bundle()]), []);
        let local = Far::start("east", &east.source("web"), &trust).await;
        let remote = Far::start("west", &west.source("web"), &trust).await;
        let gate = Gate::start("gw-east", remote.address).await;
        let svid = east.source("shopper");
        let told = Told::default();
        let text =
            format!("instance: shopper-1\nfederation: {{address: 'localhost:1', ca: ca.pem}}\nstate: state\n{more}");
        let config: Config = tombolo_runtime::config::parse(&text, std::path::Path::new("test.yaml")).unwrap();
        let outbound = Outbound::with_patience(&config, process, &svid, &trust, Box::new(told.clone()), patience);
        outbound.gateways.replace(&[gate.as_local("gw-east")]);
        tokio::spawn(upkeep::run(outbound.clone()));
        let proxy = listen(&outbound, None).await;
        let world = Self { east, west, trust, svid, local, remote, gate, told, outbound, proxy };
        world.tell(true, true);
        world
    }

    /// Says which of the two endpoints are ready.
    pub fn tell(&self, local: bool, remote: bool) {
        let shares = vec![
            share(&self.east, Origin::Local, &[("e1", local, Some(self.local.address))]),
            share(&self.west, Origin::Remote, &[("w1", remote, None)]),
        ];
        self.tell_shares(shares);
    }

    pub fn tell_shares(&self, shares: Vec<ShareView>) {
        let view = ServiceView {
            service: "shop/web".parse().unwrap(),
            shares,
            numbers: Default::default(),
            policies: Vec::new(),
        };
        self.told.say("shop/web", ServiceState::Known(Arc::new(view)));
    }

    pub async fn listener(&self, to: &str) -> SocketAddr {
        listen(&self.outbound, Some(to)).await
    }

    /// Sends bytes to the proxy and reads until it closes.
    pub async fn raw(&self, request: &str) -> String {
        let mut connection = TcpStream::connect(self.proxy).await.unwrap();
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// A GET on a connection of its own.
    pub async fn get(&self, path: &str) -> String {
        self.raw(&format!(
            "GET http://{WEB}{path} HTTP/1.1\r\nHost: {WEB}\r\ntombolo-explain: 1\r\nConnection: close\r\n\r\n"
        ))
        .await
    }
}

async fn listen(outbound: &Arc<Outbound>, to: Option<&str>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(listener::run(outbound.clone(), listener, to.map(|to| to.parse().unwrap())));
    address
}

pub fn share(cluster: &Cluster, origin: Origin, endpoints: &[(&str, bool, Option<SocketAddr>)]) -> ShareView {
    let port = |(port, app): (u16, AppProtocol)| ServicePort {
        name: format!("p{port}"),
        port,
        transport: Transport::Tcp,
        app,
    };
    let mut deliveries = BTreeMap::new();
    let mut known = BTreeMap::new();
    for (id, ready, address) in endpoints {
        let id: tombolo_core::id::EndpointId = id.parse().unwrap();
        if let Some(address) = address {
            let ports: BTreeMap<u16, String> = PORTS.iter().map(|(port, _)| (*port, address.to_string())).collect();
            deliveries.insert(id.clone(), ports);
        }
        known.insert(id.clone(), Endpoint { id, hostname: None, zone: None, weight: 1, ready: *ready });
    }
    let name: ClusterId = cluster.name.parse().unwrap();
    let export = Export {
        service: "shop/web".parse().unwrap(),
        created: Timestamp::UNIX_EPOCH,
        kind: ServiceKind::ClusterSetIp,
        session_affinity: SessionAffinity::None,
        ports: PORTS.into_iter().map(port).collect(),
        server_ids: BTreeSet::from([cluster.id("web")]),
        endpoints: known,
        unmeshed: false,
        routes: Vec::new(),
    };
    ShareView { share: ClusterShare { cluster: name, origin, freshness: Freshness::Fresh, export }, deliveries }
}
