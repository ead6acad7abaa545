//! Clusters, gateways, and the two ends of a leg.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::{JoinHandle, JoinSet};
use tombolo_core::id::{ClusterId, SpiffeId, TrustDomain};
use tombolo_core::liveness::{LivenessConfig, Reach};
use tombolo_core::model::GatewayAddress;
use tombolo_core::refusal::Refusal;
use tombolo_gateway::config::{Congestion, LimitsConfig};
use tombolo_gateway::gateway::{Gateway, Parts, Running, Settings};
use tombolo_gateway::peering::PeeringRelay;
use tombolo_gateway::snapshot::Snapshot;
use tombolo_gateway::tunnel::endpoint::{self, EndpointKeys};
use tombolo_leg::discovery::{Delivery, DeliveryEndpoint, GatewaySnapshot, GatewayWelcome, PeerLink, PeeringReport};
use tombolo_leg::proxy_header::ProxyHeader;
use tombolo_leg::status::{self, Status};
use tombolo_runtime::drain::{DrainTrigger, drain};
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::telemetry::Tracer;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::{ClusterBundle, TrustStore};
use tombolo_trust::svid::{Svid, SvidSource};

pub const LIFE: Duration = Duration::from_secs(3600);

/// Polls `condition` for as long as anything here may take.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A cluster with its own CA.
pub struct Cluster {
    pub id: ClusterId,
    pub domain: TrustDomain,
    pub ca: CertificateAuthority,
    _folder: tempfile::TempDir,
}

impl Cluster {
    pub fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let domain: TrustDomain = format!("{name}.tombolo").parse().unwrap();
        let ca = CertificateAuthority::create_or_load(folder.path(), &domain).unwrap();
        Self { id: name.parse().unwrap(), domain, ca, _folder: folder }
    }

    pub fn spiffe_id(&self, path: &str) -> SpiffeId {
        format!("spiffe://{}/{path}", self.domain).parse().unwrap()
    }

    pub fn svid_at(&self, path: &str, life: Duration, now: Timestamp) -> Svid {
        self.ca.issue_svid(&IdentityKey::generate().unwrap(), &self.spiffe_id(path), life, now).unwrap()
    }

    pub fn svid(&self, path: &str) -> SvidSource {
        let source = SvidSource::new();
        source.set(self.svid_at(path, LIFE, Timestamp::now()));
        source
    }

    pub fn bundle(&self) -> ClusterBundle {
        ClusterBundle { cluster: self.id.clone(), bundle: self.ca.bundle() }
    }

    /// How gateways of other clusters reach `node`.
    pub fn link(&self, nodes: &[&Node]) -> PeerLink {
        let address = |node: &&Node| GatewayAddress {
            gateway: node.gateway().settings.id.clone(),
            address: node.tunnel.to_string(),
        };
        PeerLink {
            cluster: self.id.clone(),
            trust_domain: self.domain.clone(),
            gateways: nodes.iter().map(address).collect(),
        }
    }

    pub fn trusts(&self, others: &[&Cluster]) -> TrustStore {
        let trust = TrustStore::new();
        let bundles = others.iter().map(|cluster| cluster.bundle()).chain([self.bundle()]).collect();
        assert!(trust.replace_all(bundles).is_empty());
        trust
    }
}

/// One gateway.
pub struct Node {
    pub running: Running,
    pub tunnel: SocketAddr,
    pub ingress: SocketAddr,
    pub trust: TrustStore,
    pub svid: SvidSource,
    pub snapshot: Snapshot,
    pub metrics: Metrics,
    pub reports: tokio::sync::mpsc::Receiver<PeeringReport>,
    pub drain: Option<DrainTrigger>,
}

pub struct NodeOptions {
    pub svid: Option<SvidSource>,
    pub tunnel: SocketAddr,
    pub keys: EndpointKeys,
    pub limits: LimitsConfig,
    pub liveness: LivenessConfig,
    pub tracer: Tracer,
    pub congestion: Congestion,
    pub resolvers: Vec<SocketAddr>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            svid: None,
            tunnel: "127.0.0.1:0".parse().unwrap(),
            keys: EndpointKeys::random(),
            limits: LimitsConfig::default(),
            liveness: LivenessConfig::default(),
            tracer: Tracer::Off,
            congestion: Congestion::default(),
            resolvers: Vec::new(),
        }
    }
}

impl Node {
    pub async fn start(cluster: &Cluster, id: &str, peers: &[&Cluster]) -> Self {
        Self::start_with(cluster, id, peers, NodeOptions::default()).await
    }

    pub async fn start_with(cluster: &Cluster, id: &str, peers: &[&Cluster], options: NodeOptions) -> Self {
        let welcome = GatewayWelcome {
            cluster: cluster.id.clone(),
            trust_domain: cluster.domain.clone(),
            federation_leg_address: String::new(),
        };
        let peer_links = peers.iter().map(|peer| (peer.id.clone(), peer.link(&[]))).collect();
        let snapshot = Snapshot::new(welcome, GatewaySnapshot { peers: peer_links, ..Default::default() });
        let trust = cluster.trusts(peers);
        let svid = options.svid.unwrap_or_else(|| cluster.svid(&format!("tombolo/gateway/{id}")));
        let mut bound = endpoint::bind(options.tunnel, &options.keys);
        // The socket of a gateway that was just stopped lives until its connections are drained.
        eventually("the tunnel port is free", || {
            if bound.is_err() {
                bound = endpoint::bind(options.tunnel, &options.keys);
            }
            bound.is_ok()
        })
        .await;
        let socket = bound.unwrap();
        let tunnel = socket.endpoint.local_addr().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ingress = listener.local_addr().unwrap();
        let metrics = Metrics::new("gateway");
        let (peering, reports) = PeeringRelay::new(options.limits.peerings as usize);
        let (trigger, drain) = drain();
        let running = Gateway::start(Parts {
            settings: Settings {
                id: id.parse().unwrap(),
                limits: options.limits,
                congestion: options.congestion,
                proxy_sources: vec!["127.0.0.0/8".parse().unwrap()],
                resolvers: options.resolvers,
                liveness: options.liveness,
            },
            snapshot: snapshot.clone(),
            trust: trust.clone(),
            svid: svid.clone(),
            tunnel: socket,
            ingress: listener,
            peering,
            tracer: options.tracer,
            metrics: metrics.clone(),
            drain,
        })
        .unwrap();
        Self { running, tunnel, ingress, trust, svid, snapshot, metrics, reports, drain: Some(trigger) }
    }

    pub fn gateway(&self) -> &Arc<Gateway> {
        &self.running.gateway
    }

    /// Tells this gateway of one address, or `host:port`, for a gateway of a peer.
    pub fn dials_at(&mut self, peer: &Cluster, gateway: &str, address: impl ToString) {
        let gateways = vec![GatewayAddress { gateway: gateway.parse().unwrap(), address: address.to_string() }];
        self.snapshot.peers.insert(peer.id.clone(), PeerLink { gateways, ..peer.link(&[]) });
        self.gateway().set_snapshot(self.snapshot.clone());
    }

    /// Tells this gateway where those of a peer are.
    pub fn dials(&mut self, peer: &Cluster, nodes: &[&Node]) {
        self.snapshot.peers.insert(peer.id.clone(), peer.link(nodes));
        self.gateway().set_snapshot(self.snapshot.clone());
    }

    /// Delivers a service to `address` and offers it to `peers`.
    pub fn delivers(&mut self, service: &str, port: u16, address: SocketAddr, peers: &[&Cluster]) {
        let endpoint = DeliveryEndpoint { inbound_address: address.to_string(), ready: true };
        let delivery = Delivery {
            clusters: peers.iter().map(|peer| peer.id.clone()).collect::<BTreeSet<_>>(),
            endpoints: [("a1".parse().unwrap(), endpoint)].into(),
        };
        self.snapshot.deliveries.insert((service.parse().unwrap(), port), delivery);
        self.gateway().set_snapshot(self.snapshot.clone());
    }

    pub async fn linked(&self, peer: &Cluster) {
        eventually("a tunnel is up", || self.gateway().registry.reach(&peer.id) == Some(Reach::Up)).await;
    }

    pub fn refusals(&self, refusal: Refusal) -> u64 {
        self.metrics.refusals("gateway").count(refusal)
    }

    pub async fn leg(&self, target: &str) -> (TcpStream, Status) {
        open(self.ingress, target).await
    }

    /// A leg that must be accepted.
    pub async fn accepted(&self, target: &str) -> TcpStream {
        let (tcp, status) = self.leg(target).await;
        status.unwrap();
        tcp
    }

    /// The reason for which a leg is refused.
    pub async fn refused(&self, target: &str) -> Refusal {
        self.leg(target).await.1.unwrap_err().refusal
    }
}

/// Opens a leg and returns it with the gateway's status; behind an accepted status come the leg's bytes.
pub async fn open(ingress: SocketAddr, target: &str) -> (TcpStream, Status) {
    open_with(ingress, target, ProxyHeader { status_wanted: true, ..Default::default() }).await
}

pub async fn open_with(ingress: SocketAddr, target: &str, header: ProxyHeader) -> (TcpStream, Status) {
    let mut tcp = TcpStream::connect(ingress).await.unwrap();
    tcp.write_all(&header.encode()).await.unwrap();
    tcp.write_all(&client_hello(target)).await.unwrap();
    let status = tokio::time::timeout(Duration::from_secs(20), status::read(&mut tcp)).await.unwrap().unwrap();
    (tcp, status)
}

/// The first flight of a TLS client that asks for `target`.
pub fn client_hello(target: &str) -> Vec<u8> {
    let cluster = CLIENT.get_or_init(|| Cluster::new("client"));
    let config = tombolo_trust::tls::client_config(
        &SvidSource::new(),
        &TrustStore::new(),
        tombolo_trust::tls::ServerExpectation::Ids {
            trust_domain: cluster.domain.clone(),
            ids: Arc::new(BTreeSet::new()),
        },
        &[b"tombolo/tcp"],
    );
    let name = format!("{target}.clusterset.local").try_into().unwrap();
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

static CLIENT: std::sync::OnceLock<Cluster> = std::sync::OnceLock::new();

/// A sidecar that takes legs: it reads the ClientHello and hands the connection over. Every byte behind the
/// ClientHello is the test's.
pub struct Sidecar {
    pub address: SocketAddr,
    listener: TcpListener,
}

impl Sidecar {
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { address: listener.local_addr().unwrap(), listener }
    }

    pub async fn accept(&self) -> TcpStream {
        let (mut tcp, _) = self.listener.accept().await.unwrap();
        let mut head = [0; 5];
        tcp.read_exact(&mut head).await.unwrap();
        let mut record = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
        tcp.read_exact(&mut record).await.unwrap();
        tcp
    }

    /// Answers every leg with what it sends, until the end of its stream.
    pub fn echo(self) -> SocketAddr {
        let address = self.address;
        tokio::spawn(async move {
            loop {
                let mut tcp = self.accept().await;
                tokio::spawn(async move {
                    let (mut read, mut write) = tcp.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        address
    }
}

/// Passes datagrams on to a gateway, or loses them: the path between two clusters.
pub struct Path {
    pub address: SocketAddr,
    open: Arc<AtomicBool>,
    forwarding: JoinHandle<()>,
}

impl Path {
    pub async fn to(server: SocketAddr) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), server).await
    }

    pub async fn at(address: SocketAddr, server: SocketAddr) -> Self {
        let socket = Arc::new(UdpSocket::bind(address).await.unwrap());
        let (address, open) = (socket.local_addr().unwrap(), Arc::new(AtomicBool::new(true)));
        let forwarding = tokio::spawn(forward(socket, server, open.clone()));
        Self { address, open, forwarding }
    }

    pub fn cut(&self) {
        self.open.store(false, Ordering::Relaxed);
    }

    /// Nobody listens at its address any more, as when a gateway is killed.
    pub fn vanish(&self) {
        self.forwarding.abort();
    }

    pub fn restore(&self) {
        self.open.store(true, Ordering::Relaxed);
    }
}

async fn forward(socket: Arc<UdpSocket>, server: SocketAddr, open: Arc<AtomicBool>) {
    let mut flows: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
    let mut backs = JoinSet::new();
    let mut bytes = vec![0; 65_536];
    while let Ok((length, client)) = socket.recv_from(&mut bytes).await {
        if let Entry::Vacant(vacant) = flows.entry(client) {
            let flow = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
            vacant.insert(flow.clone());
            backs.spawn(forward_back(flow, socket.clone(), client, open.clone()));
        }
        if open.load(Ordering::Relaxed) {
            let _ = flows[&client].send_to(&bytes[..length], server).await;
        }
    }
}

async fn forward_back(flow: Arc<UdpSocket>, socket: Arc<UdpSocket>, client: SocketAddr, open: Arc<AtomicBool>) {
    let mut bytes = vec![0; 65_536];
    loop {
        // While nobody listens there, the kernel reports that here.
        let Ok((length, _)) = flow.recv_from(&mut bytes).await else { continue };
        if open.load(Ordering::Relaxed) {
            let _ = socket.send_to(&bytes[..length], client).await;
        }
    }
}

/// Sends a line over a leg and expects it back.
pub async fn echoes(tcp: &mut TcpStream, text: &str) {
    tcp.write_all(text.as_bytes()).await.unwrap();
    let mut back = vec![0; text.len()];
    tokio::time::timeout(Duration::from_secs(20), tcp.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(back, text.as_bytes());
}

/// Two clusters whose gateways are linked: `west` dials `east`, which serves `web.shop:80` to it by echo.
pub struct Pair {
    pub east: Cluster,
    pub west: Cluster,
    pub east_node: Node,
    pub west_node: Node,
}

pub const WEB: &str = "80.web.shop.svc.east";

impl Pair {
    pub async fn linked() -> Self {
        let pair = Self::linked_with(NodeOptions::default(), NodeOptions::default(), Sidecar::new().await.echo()).await;
        pair.west_node.linked(&pair.east).await;
        pair
    }

    pub async fn linked_with(east_options: NodeOptions, west_options: NodeOptions, served_by: SocketAddr) -> Self {
        let (east, west) = (Cluster::new("east"), Cluster::new("west"));
        let mut east_node = Node::start_with(&east, "gw-e", &[&west], east_options).await;
        let mut west_node = Node::start_with(&west, "gw-w", &[&east], west_options).await;
        east_node.delivers("shop/web", 80, served_by, &[&west]);
        west_node.dials(&east, &[&east_node]);
        west_node.linked(&east).await;
        east_node.linked(&west).await;
        Self { east, west, east_node, west_node }
    }
}
