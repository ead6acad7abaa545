//! Whole gateways, from their configuration on, each with a federation that says what the test wants.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_api::proto::catalog::GatewayAddress;
use tombolo_api::proto::discovery as wire;
use tombolo_api::proto::discovery::discovery_server::{Discovery, DiscoveryServer};
use tombolo_api::proto::identity::identity_server::{Identity, IdentityServer};
use tombolo_api::proto::identity::{IssueRequest, IssueResponse};
use tombolo_core::join::JoinToken;
use tombolo_gateway::Config;
use tombolo_runtime::drain::{DrainOutcome, DrainTrigger, drain};
use tombolo_runtime::process::{Process, announced};
use tombolo_runtime::readiness::Readiness;
use tombolo_trust::grpc::{ALPN_H2, Incoming};
use tombolo_trust::tls::{self, ClientAuth, RootInChain};
use tonic::{Request, Response, Status, Streaming};

use crate::support::*;

type Updates = Pin<Box<dyn Stream<Item = Result<wire::GatewayUpdate, Status>> + Send>>;

/// A federation of one gateway.
#[derive(Clone)]
struct Federation {
    cluster: Arc<Cluster>,
    gateway: &'static str,
    snapshot: watch::Sender<wire::GatewaySnapshot>,
    hello: watch::Sender<Option<wire::GatewayHello>>,
    tunnels: watch::Sender<Vec<wire::TunnelState>>,
}

#[tonic::async_trait]
impl Identity for Federation {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let id = self.cluster.spiffe_id(&format!("tombolo/gateway/{}", self.gateway));
        let chain = self.cluster.ca.issue(&request.into_inner().csr_der, &id, LIFE, Timestamp::now()).unwrap();
        Ok(Response::new(IssueResponse {
            spiffe_id: id.to_string(),
            chain_der: chain.iter().map(|certificate| certificate.to_vec()).collect(),
            bundle: Some(self.cluster.ca.bundle().to_wire()),
        }))
    }
}

#[tonic::async_trait]
impl Discovery for Federation {
    type SidecarStream = Pin<Box<dyn Stream<Item = Result<wire::SidecarUpdate, Status>> + Send>>;
    type GatewayStream = Updates;

    async fn sidecar(
        &self,
        _: Request<Streaming<wire::SidecarRequest>>,
    ) -> Result<Response<Self::SidecarStream>, Status> {
        Err(Status::unimplemented("gateways only"))
    }

    async fn gateway(&self, request: Request<Streaming<wire::GatewayRequest>>) -> Result<Response<Updates>, Status> {
        use wire::gateway_request::Kind;
        use wire::gateway_update::Kind as Update;
        let (updates, receiver) = mpsc::channel(4);
        let federation = self.clone();
        let welcome = wire::GatewayWelcome {
            cluster: self.cluster.id.to_string(),
            trust_domain: self.cluster.domain.to_string(),
            federation_leg_address: String::new(),
        };
        tokio::spawn(async move {
            let mut requests = request.into_inner();
            let mut snapshot = federation.snapshot.subscribe();
            let say = |kind| updates.send(Ok(wire::GatewayUpdate { kind: Some(kind) }));
            say(Update::Welcome(welcome)).await.unwrap();
            snapshot.mark_changed();
            loop {
                tokio::select! {
                    request = requests.message() => match request {
                        Ok(Some(request)) => match request.kind {
                            Some(Kind::Hello(hello)) => drop(federation.hello.send_replace(Some(hello))),
                            Some(Kind::Tunnels(states)) => drop(federation.tunnels.send_replace(states.tunnels)),
                            _ => {}
                        },
                        _ => return,
                    },
                    _ = snapshot.changed() => {
                        let state = snapshot.borrow_and_update().clone();
                        if say(Update::Snapshot(state)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl Federation {
    /// Returns the federation and where it listens.
    async fn start(name: &str, gateway: &'static str) -> (Self, SocketAddr) {
        let cluster = Arc::new(Cluster::new(name));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (svid, trust) = (cluster.svid("tombolo/federation/f-1"), cluster.trusts(&[]));
        let config = tls::server_config(&svid, &trust, ClientAuth::Optional, &[ALPN_H2], RootInChain::No);
        let incoming = Incoming::new(listener, config, Arc::new(|_, _| {}));
        let federation = Self {
            cluster,
            gateway,
            snapshot: watch::Sender::default(),
            hello: watch::Sender::default(),
            tunnels: watch::Sender::default(),
        };
        let server = tonic::transport::Server::builder()
            .add_service(IdentityServer::new(federation.clone()))
            .add_service(DiscoveryServer::new(federation.clone()))
            .serve_with_incoming(incoming);
        tokio::spawn(server);
        (federation, address)
    }

    /// Peers with another cluster, whose gateway is dialled at these addresses.
    fn peer(&self, other: &Federation, addresses: &[String]) {
        let bundle = |cluster: &Cluster| wire::ClusterBundle {
            cluster: cluster.id.to_string(),
            bundle: Some(cluster.ca.bundle().to_wire()),
        };
        let address = |address: &String| GatewayAddress { gateway_id: other.gateway.into(), address: address.clone() };
        self.snapshot.send_modify(|snapshot| {
            snapshot.bundles = Some(wire::Bundles { bundles: vec![bundle(&self.cluster), bundle(&other.cluster)] });
            snapshot.peers = vec![wire::PeerLink {
                cluster: other.cluster.id.to_string(),
                trust_domain: other.cluster.domain.to_string(),
                gateways: addresses.iter().map(address).collect(),
            }];
        });
    }

    fn deliver(&self, to: SocketAddr, peer: &Federation) {
        self.snapshot.send_modify(|snapshot| {
            snapshot.deliveries = vec![wire::Delivery {
                service: "shop/web".into(),
                port: 80,
                clusters: vec![peer.cluster.id.to_string()],
                endpoints: vec![wire::DeliveryEndpoint {
                    endpoint_id: "a1".into(),
                    inbound_address: to.to_string(),
                    ready: true,
                }],
            }];
        });
    }
}

/// A running gateway process.
struct Running {
    folder: tempfile::TempDir,
    task: JoinHandle<anyhow::Result<()>>,
    trigger: DrainTrigger,
    readiness: Readiness,
}

impl Running {
    fn start(federation: &Federation, address: SocketAddr) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca.pem");
        federation.cluster.ca.bundle().save(&ca).unwrap();
        let token = JoinToken::new("0123456789abcdef".parse().unwrap(), [7; 32]);
        std::fs::write(folder.path().join("token"), token.expose()).unwrap();
        let state = folder.path().join("state");
        let text = format!(
            "id: {}\nfederation: {{address: '{address}', ca: {ca}}}\njoin: {token}\nstate: {state}\n\
             tunnel: 127.0.0.1:0\ningress: 127.0.0.1:0\nwatch: 127.0.0.1:0\nadmin: 127.0.0.1:0\n\
             advertise: ['127.0.0.1:0']\n",
            federation.gateway,
            ca = ca.display(),
            token = folder.path().join("token").display(),
            state = state.display(),
        );
        let config: Config = tombolo_runtime::config::parse(&text, std::path::Path::new("gateway.yaml")).unwrap();
        let (trigger, watch) = drain();
        let process = Process { readiness: Readiness::new(watch.clone()), drain: watch, ..Process::bare("gateway") };
        let readiness = process.readiness.clone();
        let task = tokio::spawn(tombolo_gateway::run(config, process));
        Self { folder, task, trigger, readiness }
    }

    async fn ready(&self) -> BTreeMap<String, SocketAddr> {
        let state = self.folder.path().join("state");
        eventually("ready", || {
            assert!(!self.task.is_finished(), "the gateway has stopped");
            self.readiness.is_ready() && announced(&state, "gateway").unwrap().is_some()
        })
        .await;
        announced(&state, "gateway").unwrap().unwrap().addresses
    }
}

#[tokio::test]
async fn gateways_run_from_their_configuration_until_they_are_drained() {
    let (east, east_address) = Federation::start("east", "gw-e").await;
    let (west, west_address) = Federation::start("west", "gw-w").await;
    let (east_gateway, west_gateway) = (Running::start(&east, east_address), Running::start(&west, west_address));
    let addresses = west_gateway.ready().await;
    assert_eq!(addresses.keys().collect::<Vec<_>>(), ["admin", "ingress", "tunnel", "watch"]);
    east_gateway.ready().await;

    east.peer(&west, &[]);
    east.deliver(Sidecar::new().await.echo(), &west);
    let advertised = east.hello.borrow().clone().unwrap().advertise;
    assert!(!advertised[0].ends_with(":0"), "{advertised:?}");
    west.peer(&east, &advertised);
    let up = |federation: &Federation| {
        federation.tunnels.borrow().iter().any(|tunnel| tunnel.reach == i32::from(wire::Reach::Up))
    };
    eventually("both federations hear of the tunnel", || up(&east) && up(&west)).await;

    let mut leg = open(addresses["ingress"], WEB).await.0;
    echoes(&mut leg, "from file to far cluster").await;
    let admin = addresses["admin"];
    let state = get(admin, "/state").await;
    assert!(state.contains("\"gw-e\"") && state.contains("\"reach\""), "{state}");
    let metrics = get(admin, "/metrics").await;
    assert!(metrics.contains("tombolo_gateway_legs_open{entrance=\"ingress\"} 1"), "{metrics}");

    drop(leg);
    for gateway in [west_gateway, east_gateway] {
        let state = gateway.folder.path().join("state");
        assert_eq!(gateway.trigger.drain(Duration::from_secs(10)).await, DrainOutcome::Clean);
        tokio::time::timeout(Duration::from_secs(5), gateway.task).await.unwrap().unwrap().unwrap();
        assert!(announced(&state, "gateway").unwrap().is_none());
    }
}

#[tokio::test]
async fn a_gateway_without_its_federation_stops_when_told() {
    let (east, _) = Federation::start("east", "gw-e").await;
    let gateway = Running::start(&east, "127.0.0.1:1".parse().unwrap());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!gateway.readiness.is_ready());
    gateway.trigger.drain(Duration::from_secs(10)).await;
    tokio::time::timeout(Duration::from_secs(5), gateway.task).await.unwrap().unwrap().unwrap();
}

async fn get(address: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.unwrap();
    answer
}
