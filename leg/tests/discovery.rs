//! The clients of discovery and GatewayWatch against small servers of the real contract, over real mutual TLS.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use common::{Cluster, bounded, eventually};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tombolo_api::proto::discovery as wire;
use tombolo_api::proto::discovery::discovery_server::{Discovery, DiscoveryServer};
use tombolo_api::proto::gateway_watch as watch_wire;
use tombolo_api::proto::gateway_watch::gateway_watch_server::{GatewayWatch as WatchService, GatewayWatchServer};
use tombolo_core::addresses::mesh::Lookup;
use tombolo_core::liveness::Reach;
use tombolo_leg::discovery::{
    Federation, GatewayDiscovery, GatewayHello, LocalGateway, PeeringCommand, PeeringReport, Registration,
    RegistrationVerdict, ServiceState, SidecarDiscovery, TunnelReport,
};
use tombolo_leg::watch::GatewayWatch;
use tombolo_trust::grpc::{self, Incoming};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{ClientAuth, RootInChain, server_config};
use tonic::{Request, Response, Status, Streaming};
use wire::gateway_request::Kind as GatewayAsk;
use wire::gateway_update::Kind as GatewayTell;
use wire::sidecar_request::Kind as Ask;
use wire::sidecar_update::Kind as Tell;

type Updates<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One stream as the server holds it.
struct Session<I, O> {
    requests: Streaming<I>,
    updates: mpsc::Sender<Result<O, Status>>,
}

#[derive(Clone)]
struct Server {
    sidecars: mpsc::Sender<Session<wire::SidecarRequest, wire::SidecarUpdate>>,
    gateways: mpsc::Sender<Session<wire::GatewayRequest, wire::GatewayUpdate>>,
}

#[tonic::async_trait]
impl Discovery for Server {
    type SidecarStream = Updates<wire::SidecarUpdate>;
    type GatewayStream = Updates<wire::GatewayUpdate>;

    async fn sidecar(
        &self,
        request: Request<Streaming<wire::SidecarRequest>>,
    ) -> Result<Response<Self::SidecarStream>, Status> {
        let (updates, stream) = mpsc::channel(16);
        let session = Session { requests: request.into_inner(), updates };
        self.sidecars.send(session).await.map_err(|_| Status::unavailable("no test"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn gateway(
        &self,
        request: Request<Streaming<wire::GatewayRequest>>,
    ) -> Result<Response<Self::GatewayStream>, Status> {
        let (updates, stream) = mpsc::channel(16);
        let session = Session { requests: request.into_inner(), updates };
        self.gateways.send(session).await.map_err(|_| Status::unavailable("no test"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

struct Running {
    east: Cluster,
    address: SocketAddr,
    trust: TrustStore,
    sidecars: mpsc::Receiver<Session<wire::SidecarRequest, wire::SidecarUpdate>>,
    gateways: mpsc::Receiver<Session<wire::GatewayRequest, wire::GatewayUpdate>>,
}

async fn serve_tls(east: &Cluster, server_path: &str) -> (SocketAddr, Incoming) {
    let trust = common::trusting(&[east]);
    let config = server_config(&east.svid(server_path), &trust, ClientAuth::Trusted, &[grpc::ALPN_H2], RootInChain::No);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap(), Incoming::new(listener, config, Arc::new(|_, _| ())))
}

async fn running(server_path: &str) -> Running {
    let east = Cluster::new("east");
    let (address, incoming) = serve_tls(&east, server_path).await;
    let (sidecars, sidecar_sessions) = mpsc::channel(4);
    let (gateways, gateway_sessions) = mpsc::channel(4);
    let service = DiscoveryServer::new(Server { sidecars, gateways });
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let trust = TrustStore::new();
    trust.set_own(east.ca.bundle()).unwrap();
    Running { east, address, trust, sidecars: sidecar_sessions, gateways: gateway_sessions }
}

impl Running {
    fn federation(&self, svid: SvidSource) -> Federation {
        Federation { address: self.address.to_string(), svid, trust: self.trust.clone(), memory: None }
    }

    fn sidecar(&self) -> SidecarDiscovery {
        let svid = self.east.svid("ns/shop/sa/cart");
        SidecarDiscovery::start(self.federation(svid), "cart-1".parse().unwrap(), Some("z1".into()))
    }
}

async fn ask(session: &mut Session<wire::SidecarRequest, wire::SidecarUpdate>) -> Ask {
    bounded(session.requests.next()).await.unwrap().unwrap().kind.unwrap()
}

async fn tell(session: &Session<wire::SidecarRequest, wire::SidecarUpdate>, kind: Tell) {
    session.updates.send(Ok(wire::SidecarUpdate { kind: Some(kind) })).await.unwrap();
}

fn service(name: &str, clusters: &[&str]) -> Tell {
    let share = |cluster: &&str| wire::Share {
        cluster: (*cluster).to_owned(),
        export: Some(tombolo_api::proto::catalog::Export { service: name.into(), ..Default::default() }),
        ..Default::default()
    };
    Tell::Service(wire::Service {
        service: name.into(),
        shares: clusters.iter().map(share).collect(),
        ..Default::default()
    })
}

#[tokio::test]
async fn a_sidecar_says_everything_again_and_keeps_what_it_knew() {
    let mut running = running("tombolo/federation/f1").await;
    let discovery = running.sidecar();
    let web = discovery.subscribe(&"shop/web".parse().unwrap()).unwrap();
    let registration = Registration {
        service: "shop/cart".parse().unwrap(),
        port: 80,
        inbound_address: "127.0.0.1:1".into(),
        ready: false,
    };
    discovery.register(vec![registration]);

    let mut session = bounded(running.sidecars.recv()).await.unwrap();
    let Ask::Hello(hello) = ask(&mut session).await else { panic!("hello comes first") };
    assert_eq!((hello.instance.as_str(), hello.zone.as_str()), ("cart-1", "z1"));
    assert!(matches!(ask(&mut session).await, Ask::Register(register) if register.registrations.len() == 1));
    assert_eq!(ask(&mut session).await, Ask::Subscribe("shop/web".into()));
    assert!(matches!(ask(&mut session).await, Ask::Bundles(_)));

    let welcome = wire::Welcome {
        cluster: "east".into(),
        trust_domain: "east.tombolo".into(),
        zone: "z1".into(),
        tells_policies: true,
    };
    tell(&session, Tell::Welcome(welcome)).await;
    bounded(discovery.welcome().wait_for(Option::is_some)).await.unwrap();
    tell(&session, service("shop/web", &["west", "east"])).await;
    let known = |state: &ServiceState| matches!(state, ServiceState::Known(view) if view.shares.len() == 2);
    bounded(web.updates().wait_for(known)).await.unwrap();

    // A message that does not convert changes nothing and is counted.
    tell(&session, Tell::Service(wire::Service { service: "nonsense".into(), ..Default::default() })).await;
    bounded(discovery.status().wait_for(|status| status.updates_refused == 1)).await.unwrap();
    assert!(known(&web.now()));

    // Before policies are told nobody may call; one that can't be read leaves those before it in force.
    let cart = "shop/cart".parse().unwrap();
    assert_eq!(discovery.inbound_policies(&cart), None);
    let policy = r#"{"resource": {"kind": "AccessPolicy", "namespace": "shop", "name": "cart"}, "spec": {}}"#;
    for (kind, json, refused) in [("AccessPolicy", policy, 1), ("AccessPolicy", "{}", 2), ("Newer", "{}", 2)] {
        let policies = vec![wire::Policy { kind: kind.into(), json: json.into() }];
        let policies = wire::InboundPolicies { service: "shop/cart".into(), policies, ..Default::default() };
        tell(&session, Tell::InboundPolicies(policies)).await;
        bounded(discovery.status().wait_for(|status| status.updates_refused == refused)).await.unwrap();
        let held = || discovery.inbound_policies(&cart).map_or(9, |policies| policies.access.len());
        eventually("policies are in force", || held() == usize::from(kind == "AccessPolicy")).await;
    }

    let grant = wire::InboundGrant { service: "shop/cart".into(), clusters: vec!["west".into()] };
    tell(&session, Tell::InboundGrants(wire::InboundGrants { grants: vec![grant] })).await;
    eventually("the grants are in force", || discovery.grants().len() == 1).await;
    let result = wire::RegistrationResult {
        service: "shop/cart".into(),
        port: 80,
        endpoint_id: "a1".into(),
        ..Default::default()
    };
    tell(&session, Tell::Registration(result)).await;
    bounded(
        discovery.verdicts().wait_for(|verdicts| {
            verdicts.values().any(|verdict| matches!(verdict, RegistrationVerdict::Accepted { .. }))
        }),
    )
    .await
    .unwrap();
    discovery.set_ready(&"shop/cart".parse().unwrap(), 80, true);
    assert!(matches!(ask(&mut session).await, Ask::Readiness(readiness) if readiness.ready));

    // The stream ends: what was known stays, and the next stream is told all of it, readiness included.
    drop(session);
    let mut session = bounded(running.sidecars.recv()).await.unwrap();
    assert!(known(&web.now()));
    assert!(matches!(ask(&mut session).await, Ask::Hello(_)));
    assert!(matches!(ask(&mut session).await, Ask::Register(register) if register.registrations[0].ready));
    assert_eq!(ask(&mut session).await, Ask::Subscribe("shop/web".into()));
    assert!(matches!(ask(&mut session).await, Ask::Bundles(_)));

    // The last handle lets go of it.
    let again = web.clone();
    drop(web);
    let db = discovery.subscribe(&"data/db".parse().unwrap()).unwrap();
    assert_eq!(ask(&mut session).await, Ask::Subscribe("data/db".into()));
    tell(&session, Tell::ServiceUnknown("data/db".into())).await;
    bounded(db.updates().wait_for(|state| *state == ServiceState::Unknown)).await.unwrap();
    drop(again);
    assert_eq!(ask(&mut session).await, Ask::Unsubscribe("shop/web".into()));
    assert_eq!(discovery.subscriptions().len(), 1);

    drop((discovery, db));
    assert!(bounded(session.requests.next()).await.is_none_or(|request| request.is_err()));
}

#[tokio::test]
async fn a_sidecar_that_restarts_while_federation_is_away_goes_on_with_what_was_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last-told");
    let mut running = running("tombolo/federation/f1").await;
    let svid = running.east.svid("ns/shop/sa/cart");
    let start = |federation: Federation| {
        let federation = Federation { memory: Some(path.clone()), ..federation };
        SidecarDiscovery::start(federation, "cart-1".parse().unwrap(), None)
    };
    let discovery = start(running.federation(svid.clone()));
    let (web, db) = ("shop/web".parse().unwrap(), "data/db".parse().unwrap());
    let held = (discovery.subscribe(&web).unwrap(), discovery.subscribe(&db).unwrap());
    let session = bounded(running.sidecars.recv()).await.unwrap();
    let welcome = wire::Welcome { cluster: "east".into(), trust_domain: "east.tombolo".into(), ..Default::default() };
    tell(&session, Tell::Welcome(welcome)).await;
    let revoked = running.east.id("ns/a/sa/b");
    tell(&session, Tell::Revoked(wire::Revoked { spiffe_ids: vec![revoked.to_string()] })).await;
    let grant = wire::InboundGrant { service: "shop/cart".into(), clusters: vec!["west".into()] };
    tell(&session, Tell::InboundGrants(wire::InboundGrants { grants: vec![grant] })).await;
    tell(&session, service("data/db", &["west"])).await;
    tell(&session, Tell::ServiceUnknown("data/db".into())).await;
    tell(&session, service("shop/web", &["west", "east"])).await;
    let holds = |part: &[u8]| {
        let file = std::fs::read(&path).unwrap_or_default();
        file.windows(part.len()).any(|window| window == part)
    };
    eventually("it is kept", || holds(b"shop/web") && !holds(b"data/db")).await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop((held, discovery, session));

    // Federation is away; its address leads nowhere.
    let trust = TrustStore::new();
    trust.set_own(running.east.ca.bundle()).unwrap();
    let away = Federation { address: "127.0.0.1:1".into(), svid, trust: trust.clone(), memory: None };
    let discovery = start(away.clone());
    assert_eq!(discovery.welcome().borrow().as_ref().map(|welcome| welcome.cluster.to_string()), Some("east".into()));
    assert_eq!((discovery.grants().len(), trust.snapshot().revoked().len()), (1, 1));
    let known = discovery.subscribe(&web).unwrap();
    assert!(matches!(known.now(), ServiceState::Known(view) if view.shares.len() == 2));
    assert_eq!(discovery.subscribe(&db).unwrap().now(), ServiceState::Waiting);
    let status = discovery.status().borrow().clone();
    assert!(!status.connected && status.remembered.is_some(), "{status:?}");
    drop((known, discovery));

    // It is back: whatever it says counts, and what it has not said is waited for.
    let discovery = start(Federation { address: running.address.to_string(), ..away });
    let session = bounded(running.sidecars.recv()).await.unwrap();
    let welcome = wire::Welcome { cluster: "east".into(), trust_domain: "east.tombolo".into(), ..Default::default() };
    tell(&session, Tell::Welcome(welcome)).await;
    bounded(discovery.status().wait_for(|status| status.remembered.is_none())).await.unwrap();
    assert_eq!(discovery.subscribe(&web).unwrap().now(), ServiceState::Waiting);
}

fn ranges(ipv4: &str) -> Tell {
    Tell::AddressRanges(wire::AddressRanges { ipv4: ipv4.into(), ipv6: "fd74:6f6d:626f::/112".into() })
}

fn block(block: u32, services: u64, names: &[&str]) -> Tell {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    Tell::AddressBlock(wire::AddressBlock { block, services, endpoints: 0, names })
}

fn complete(blocks: &[u32]) -> Tell {
    Tell::AddressesComplete(wire::AddressesComplete { blocks: blocks.to_vec() })
}

fn at(discovery: &SidecarDiscovery, address: &str) -> Lookup {
    discovery.addresses().borrow().lookup(address.parse().unwrap())
}

#[tokio::test]
async fn the_addresses_of_the_mesh_outlive_the_stream_and_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last-told");
    let mut running = running("tombolo/federation/f1").await;
    let svid = running.east.svid("ns/shop/sa/cart");
    let start = |federation: Federation| {
        let federation = Federation { memory: Some(path.clone()), ..federation };
        SidecarDiscovery::start(federation, "cart-1".parse().unwrap(), None)
    };
    let discovery = start(running.federation(svid.clone()));
    assert_eq!(at(&discovery, "240.1.0.1"), Lookup::NotReadyYet);
    let session = bounded(running.sidecars.recv()).await.unwrap();
    let welcome = wire::Welcome { cluster: "east".into(), trust_domain: "east.tombolo".into(), ..Default::default() };
    for kind in [Tell::Welcome(welcome), ranges("240.1.0.0/16"), block(0, 2, &["shop/web"]), block(1, 1, &["shop/old"])]
    {
        tell(&session, kind).await;
    }
    let mut addresses = discovery.addresses();
    bounded(addresses.wait_for(|addresses| addresses.len() == 2)).await.unwrap();
    assert_eq!(at(&discovery, "240.1.0.2"), Lookup::NotReadyYet, "until all are told");
    tell(&session, complete(&[0])).await;
    bounded(addresses.wait_for(|addresses| addresses.is_complete())).await.unwrap();
    let known = |discovery: &SidecarDiscovery| {
        assert_eq!(at(discovery, "240.1.0.1"), Lookup::Mesh("shop/web".parse().unwrap()));
        assert_eq!(at(discovery, "240.1.0.64"), Lookup::Unassigned, "absence deletes once all are told");
    };
    known(&discovery);
    // What makes no sense is refused, counted, and changes nothing.
    for kind in [ranges("10.0.0.0/8"), block(0, 2, &["shop"]), block(1 << 30, 2, &["shop/web"])] {
        tell(&session, kind).await;
    }
    bounded(discovery.status().wait_for(|status| status.updates_refused == 3)).await.unwrap();
    known(&discovery);
    let holds = |part: &[u8]| {
        let file = std::fs::read(&path).unwrap_or_default();
        file.windows(part.len()).any(|window| window == part)
    };
    eventually("it is kept", || holds(b"shop/web") && !holds(b"shop/old")).await;
    drop(session);
    bounded(discovery.status().wait_for(|status| !status.connected)).await.unwrap();
    known(&discovery);
    drop(discovery);

    let away = Federation { address: "127.0.0.1:1".into(), ..running.federation(svid) };
    known(&start(away));
}

#[tokio::test]
async fn bundles_and_revocations_go_into_the_store() {
    let mut running = running("tombolo/federation/f1").await;
    let discovery = running.sidecar();
    let session = bounded(running.sidecars.recv()).await.unwrap();
    let west = Cluster::new("west");
    let wire_of = |cluster: &Cluster| wire::ClusterBundle {
        cluster: cluster.name.into(),
        bundle: Some(cluster.ca.bundle().to_wire()),
    };
    tell(&session, Tell::Bundles(wire::Bundles { bundles: vec![wire_of(&running.east), wire_of(&west)] })).await;
    eventually("both are trusted", || running.trust.snapshot().domain_of(&"west".parse().unwrap()).is_some()).await;
    assert!(running.trust.snapshot().cluster_of(&running.east.domain()).is_some());

    // One that can't be read is refused alone, and the one held stays.
    let mut broken = wire_of(&west);
    broken.bundle.as_mut().unwrap().roots_der = vec![vec![1, 2, 3]];
    tell(&session, Tell::Bundles(wire::Bundles { bundles: vec![wire_of(&running.east), broken] })).await;
    bounded(discovery.status().wait_for(|status| status.bundles_refused > 0)).await.unwrap();
    assert!(running.trust.snapshot().domain_of(&"west".parse().unwrap()).is_some());

    tell(&session, Tell::Revoked(wire::Revoked { spiffe_ids: vec![west.id("ns/a/sa/b").to_string()] })).await;
    eventually("the identity is revoked", || running.trust.snapshot().revoked().len() == 1).await;
    tell(&session, Tell::Bundles(wire::Bundles { bundles: vec![wire_of(&running.east)] })).await;
    eventually("the peer is gone", || running.trust.snapshot().domain_of(&"west".parse().unwrap()).is_none()).await;
}

#[tokio::test]
async fn only_the_federation_is_believed() {
    let mut running = running("tombolo/gateway/g1").await;
    let discovery = running.sidecar();
    let mut status = discovery.status();
    let refused = bounded(status.wait_for(|status| status.last_error.is_some())).await.unwrap().clone();
    assert!(!refused.connected, "{refused:?}");
    assert!(running.sidecars.try_recv().is_err());
}

#[tokio::test]
async fn a_gateway_gets_its_snapshot_and_relays_peerings() {
    let mut running = running("tombolo/federation/f1").await;
    let hello = GatewayHello {
        gateway_id: "g1".parse().unwrap(),
        advertise: vec!["192.0.2.1:15443".into()],
        ingress_address: "127.0.0.1:1".into(),
        watch_address: "127.0.0.1:2".into(),
        unmeshed_address: None,
    };
    let federation = running.federation(running.east.svid("tombolo/gateway/g1"));
    let (discovery, mut commands) = GatewayDiscovery::start(federation, hello);
    let mut session = bounded(running.gateways.recv()).await.unwrap();
    let tell = |kind| session.updates.send(Ok(wire::GatewayUpdate { kind: Some(kind) }));
    let west = Cluster::new("west");
    let delivery = wire::Delivery {
        service: "shop/web".into(),
        port: 80,
        clusters: vec!["west".into()],
        endpoints: vec![wire::DeliveryEndpoint {
            endpoint_id: "a1".into(),
            inbound_address: "h:1".into(),
            ready: true,
        }],
    };
    let link = wire::PeerLink { cluster: "west".into(), trust_domain: "west.tombolo".into(), gateways: vec![] };
    let bundle = wire::ClusterBundle { cluster: "west".into(), bundle: Some(west.ca.bundle().to_wire()) };
    let snapshot = wire::GatewaySnapshot {
        peers: vec![link],
        deliveries: vec![delivery],
        bundles: Some(wire::Bundles { bundles: vec![bundle] }),
        unmeshed: None,
    };
    tell(GatewayTell::Snapshot(snapshot)).await.unwrap();
    let snapshot = bounded(discovery.snapshot().wait_for(Option::is_some)).await.unwrap().clone().unwrap();
    assert!(snapshot.peers.contains_key(&"west".parse::<tombolo_core::id::ClusterId>().unwrap()));
    let delivered = &snapshot.deliveries[&("shop/web".parse().unwrap(), 80)];
    assert!(delivered.endpoints.values().all(|endpoint| endpoint.ready));
    assert!(running.trust.snapshot().domain_of(&"west".parse().unwrap()).is_some(), "trust comes before the peer");

    let offer = wire::PeeringOffer { attempt: "a".into(), offer: vec![1] };
    tell(GatewayTell::PeeringOffer(offer)).await.unwrap();
    let command = bounded(commands.recv()).await.unwrap();
    assert_eq!(command, PeeringCommand::Offer { attempt: "a".into(), offer: vec![1] });
    discovery.report_peering(PeeringReport::Answer { attempt: "a".into(), answer: vec![2] }).unwrap();
    let report = TunnelReport {
        cluster: "west".parse().unwrap(),
        reach: Some(Reach::Up),
        rtt: Duration::from_millis(3),
        remote_address: String::new(),
        dialled_here: true,
        legs: 1,
        last_error: String::new(),
        remote_gateway: None,
        addresses: Vec::new(),
        mtu: 1_452,
    };
    discovery.report_tunnels(vec![report]);
    let (mut hello, mut answer, mut up) = (false, false, false);
    while !(hello && answer && up) {
        match bounded(session.requests.next()).await.unwrap().unwrap().kind.unwrap() {
            GatewayAsk::Hello(said) => hello = said.advertise == ["192.0.2.1:15443"],
            GatewayAsk::Answer(said) => answer = said.answer == [2],
            GatewayAsk::Tunnels(said) => up = said.tunnels.iter().any(|tunnel| tunnel.rtt_us == 3000),
            _ => {}
        }
    }
}

struct Watched(Mutex<Option<mpsc::Receiver<Result<watch_wire::GatewayState, Status>>>>);

#[tonic::async_trait]
impl WatchService for Watched {
    type WatchStream = Updates<watch_wire::GatewayState>;

    async fn watch(&self, _: Request<watch_wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let states = self.0.lock().await.take().ok_or_else(|| Status::unavailable("one stream only"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(states))))
    }
}

#[tokio::test]
async fn a_gateways_reach_and_drain_are_watched() {
    let east = Cluster::new("east");
    let (address, incoming) = serve_tls(&east, "tombolo/gateway/g1").await;
    let (states, receiver) = mpsc::channel(4);
    let service = GatewayWatchServer::new(Watched(Mutex::new(Some(receiver))));
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let gateway = LocalGateway {
        gateway_id: "g1".parse().unwrap(),
        ingress_address: String::new(),
        watch_address: address.to_string(),
        spiffe_id: east.id("tombolo/gateway/g1"),
    };
    let watched = GatewayWatch::start(gateway, east.svid("ns/shop/sa/cart"), common::trusting(&[&east]));
    let peer = watch_wire::PeerReach { cluster: "west".into(), reach: watch_wire::Reach::Suspect.into(), rtt_us: 5 };
    let said =
        |id: &str, draining| watch_wire::GatewayState { gateway_id: id.into(), draining, peers: vec![peer.clone()] };
    let mut state = watched.state();
    states.send(Ok(said("g2", true))).await.unwrap();
    states.send(Ok(said("g1", false))).await.unwrap();
    let now = bounded(state.wait_for(|state| state.known)).await.unwrap().clone();
    assert!(now.connected && !now.draining, "another gateway's word counts for nothing");
    assert_eq!(now.peers[&"west".parse::<tombolo_core::id::ClusterId>().unwrap()].reach, Some(Reach::Suspect));
    states.send(Ok(said("g1", true))).await.unwrap();
    bounded(state.wait_for(|state| state.draining)).await.unwrap();
    drop(states);
    bounded(state.wait_for(|state| !state.connected)).await.unwrap();
    assert!(state.borrow().draining, "what it said last is kept");
}
