//! Federations in one process, for tests: real CAs, real sockets on loopback, no gateways.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tombolo_core::addresses::Ranges;
use tombolo_core::id::{ClusterId, Role, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::model::{AppProtocol, Authority, ServicePort, Transport};
use tombolo_core::policy::access::{AccessPolicy, DefaultAccess};
use tombolo_core::policy::set::{Policy, PolicySet};
use tombolo_core::policy::traffic::TrafficPolicy;
use tombolo_core::policy::{Kind, Resource};
use tombolo_core::source::{LocalService, LocalState};
use tombolo_leg::dial::{Dialer, Via};
use tombolo_runtime::drain::{DrainTrigger, DrainWatch, drain};
use tombolo_runtime::metrics::Metrics;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::grpc::Incoming;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ClientAuth, RootInChain};

use crate::addresses::{Allocator, Space};
use crate::discovery::DiscoveryService;
use crate::hub::{self, HubHandle, HubStart, PeerRecord, PeeringEvent, SidecarJoin, View, remembered};
use crate::kubernetes::Leadership;
use crate::registry::{Attached, Claim, SessionId};
use crate::store::Store;
use crate::sync::publisher::Publisher;
use crate::sync::subscriber::Subscriber;

pub const DEADLINE: Duration = Duration::from_secs(15);

/// Where each federation accepts legs, in place of gateways.
pub type Addresses = Arc<Mutex<BTreeMap<ClusterId, SocketAddr>>>;

pub struct Federation {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    pub ca: CertificateAuthority,
    pub store: Store,
    pub trust: TrustStore,
    pub svid: SvidSource,
    pub hub: HubHandle,
    pub metrics: Metrics,
    pub addresses: Addresses,
    publisher: Option<(DrainTrigger, JoinHandle<()>)>,
    tasks: [JoinHandle<()>; 2],
    pub peering: mpsc::Receiver<PeeringEvent>,
    pub folder: TempDir,
}

pub fn service(name: &str) -> ServiceName {
    name.parse().unwrap()
}

impl Federation {
    pub async fn start(cluster: &str, addresses: &Addresses) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), cluster, addresses).await
    }

    pub async fn start_in(folder: TempDir, cluster: &str, addresses: &Addresses) -> Self {
        let cluster: ClusterId = cluster.parse().unwrap();
        let trust_domain: TrustDomain = format!("{cluster}.tombolo").parse().unwrap();
        let ca = CertificateAuthority::create_or_load(folder.path(), &trust_domain).unwrap();
        let open = || Store::open(folder.path(), &cluster, &trust_domain, Timestamp::now());
        // The tasks of a federation that was stopped let go of its store one after the other.
        until("the state directory is free", || open().is_ok()).await;
        let store = open().unwrap();
        let (trust, svid, metrics) = (TrustStore::new(), SvidSource::new(), Metrics::new("federation"));
        let id = SpiffeId::role(&trust_domain, Role::Federation, &"federation".parse().unwrap());
        svid.set(issue(&ca, &id));
        let start = HubStart {
            cluster: cluster.clone(),
            trust_domain: trust_domain.clone(),
            bundle: ca.bundle(),
            trust: trust.clone(),
            store: store.clone(),
            metrics: metrics.clone(),
            default_access: DefaultAccess::Allow,
            remembered: remembered::load(folder.path()),
        };
        let (hub, peering) = hub::start(start);
        let known = addresses.clone();
        let route = move |_: &View, peer: &ClusterId| {
            let address = known.lock().unwrap().get(peer).copied();
            // A port where nobody listens, as long as the peer does not.
            Some(Via::Direct(address.map_or("127.0.0.1:9".into(), |address| address.to_string())))
        };
        let dialer = Dialer::new(svid.clone(), trust.clone());
        let subscriber = Subscriber::new(hub.clone(), dialer, trust.clone(), Arc::new(route));
        let subscriber = tokio::spawn(subscriber.run());
        let remembering = tokio::spawn(remembered::follow(hub.clone(), folder.path().into()));
        let addresses = addresses.clone();
        let publisher = None;
        let mut federation = Self {
            cluster,
            trust_domain,
            ca,
            store,
            trust,
            svid,
            hub,
            metrics,
            addresses,
            publisher,
            tasks: [subscriber, remembering],
            peering,
            folder,
        };
        federation.publish().await;
        federation
    }

    /// Starts the publisher, on a new port.
    pub async fn publish(&mut self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watch) = drain();
        let publisher = Publisher {
            hub: self.hub.clone(),
            svid: self.svid.clone(),
            trust: self.trust.clone(),
            refusals: self.metrics.refusals("federation"),
            drain: watch,
            leadership: Leadership::always(),
        };
        let served = tokio::spawn(async move { publisher.serve(listener).await.unwrap() });
        self.publisher = Some((trigger, served));
        self.addresses.lock().unwrap().insert(self.cluster.clone(), address);
    }

    /// Ends the publisher and every stream of it.
    pub async fn stop_publishing(&mut self) {
        self.addresses.lock().unwrap().remove(&self.cluster);
        let (trigger, served) = self.publisher.take().unwrap();
        trigger.drain(DEADLINE).await;
        tokio::time::timeout(DEADLINE, served).await.unwrap().unwrap();
    }

    /// Ends this federation; its state stays in the folder.
    pub async fn stop(mut self) -> TempDir {
        self.stop_publishing().await;
        let Self { folder, hub, store, tasks, .. } = self;
        for task in tasks {
            task.abort();
            let _ = task.await;
        }
        drop((hub, store));
        folder
    }

    /// Peers with `other` from this side: offers everything, takes what `imports` says.
    pub async fn peer(&self, other: &Federation, imports: &str) {
        let imports = if imports.is_empty() { vec![] } else { vec![imports.parse().unwrap()] };
        let record = PeerRecord {
            cluster: other.cluster.clone(),
            trust_domain: other.trust_domain.clone(),
            authority: Authority { exports: vec!["*".parse().unwrap()], imports, unmeshed: false },
            bundle: other.ca.bundle().to_wire(),
            gateways: vec![],
        };
        self.store.change_peering(|peering| peering.insert_peer(record.clone())).unwrap();
        self.hub.peer_added(record).await.unwrap();
    }

    /// Declares these services, all exported, with port 80 and service account `web`.
    pub async fn declare(&self, names: &[&str]) {
        self.declare_with(names, Vec::new()).await;
    }

    /// As [`Federation::declare`], with policies.
    pub async fn declare_with(&self, names: &[&str], policies: Vec<Policy>) {
        let services = names.iter().map(|name| (service(name), self.declared(name)));
        let policies = Arc::new(PolicySet::new(policies).0);
        let state = LocalState { services: services.collect(), policies, ..Default::default() };
        self.hub.local_changed(state).await.unwrap();
    }

    /// An AccessPolicy that allows nobody.
    pub fn access(&self, name: &str, target: &str) -> Policy {
        let service = service(target);
        let resource = Resource::new(Kind::AccessPolicy, service.namespace().clone(), name).unwrap();
        Policy::Access(Arc::new(AccessPolicy { resource, targets: [service].into(), spec: Default::default() }))
    }

    /// A TrafficPolicy that changes nothing.
    pub fn traffic(&self, name: &str, target: &str) -> Policy {
        let service = service(target);
        let resource = Resource::new(Kind::TrafficPolicy, service.namespace().clone(), name).unwrap();
        let (targets, spec) = ([service].into(), Default::default());
        Policy::Traffic(Arc::new(TrafficPolicy { resource, created: Timestamp::UNIX_EPOCH, targets, spec }))
    }

    pub fn declared(&self, name: &str) -> LocalService {
        let service = service(name);
        let port = ServicePort { name: "http".into(), port: 80, transport: Transport::Tcp, app: AppProtocol::Http };
        LocalService {
            exported: Some(Timestamp::UNIX_EPOCH),
            kind: Default::default(),
            session_affinity: Default::default(),
            ports: [port].into(),
            server_ids: [self.web(&service)].into(),
            endpoints: BTreeMap::new(),
            unmeshed: false,
            service,
        }
    }

    /// The identity that may serve `service`.
    pub fn web(&self, service: &ServiceName) -> SpiffeId {
        SpiffeId::workload(&self.trust_domain, service.namespace(), "web").unwrap()
    }

    /// A sidecar that delivers `name`, as if its stream stood.
    pub async fn register(&self, instance: &str, name: &str, ready: bool) -> SessionId {
        let service = service(name);
        let attached = Attached::Here;
        let join =
            SidecarJoin { instance: instance.parse().unwrap(), spiffe_id: self.web(&service), zone: None, attached };
        let session = self.hub.sidecar_joined(join).await.unwrap().unwrap();
        let claim = Claim { service, port: 80, inbound_address: "127.0.0.1:1".into(), ready };
        self.hub.registered(session, vec![claim]).await.unwrap();
        session
    }

    /// Gives every service virtual addresses, until the task is aborted.
    pub async fn allocate(&self) -> JoinHandle<()> {
        let (hub, store) = (self.hub.clone(), self.store.clone());
        let listeners = Some("20000-20999".parse().unwrap());
        let space = Space { ranges: Ranges::default(), listeners };
        let allocator = Allocator::start(hub, store, space, &self.metrics).await.unwrap();
        tokio::spawn(allocator.run())
    }

    /// Clusters whose share of `name` is seen here, with how many endpoints of each are ready.
    pub fn shares(&self, name: &str) -> BTreeMap<String, usize> {
        let view = self.hub.view();
        let shares = view.services.get(&service(name)).into_iter().flat_map(|view| &view.shares);
        shares.map(|share| (share.cluster.to_string(), share.export.ready_endpoints())).collect()
    }

    /// An SVID of this cluster.
    pub fn svid_of(&self, id: &SpiffeId) -> SvidSource {
        let source = SvidSource::new();
        source.set(issue(&self.ca, id));
        source
    }

    /// Serves discovery; yields its address and what stops it.
    pub async fn discover(&self) -> (SocketAddr, DrainTrigger, DrainWatch) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watch) = drain();
        let refusals = self.metrics.refusals("federation");
        let server = DiscoveryService::server(self.hub.clone(), "127.0.0.1:7".into(), refusals, watch.clone());
        let tls = tls::server_config(&self.svid, &self.trust, ClientAuth::Optional, &[b"h2"], RootInChain::No);
        let incoming = Incoming::new(listener, tls, Arc::new(|_, _| {}));
        tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));
        (address, trigger, watch)
    }
}

fn issue(ca: &CertificateAuthority, id: &SpiffeId) -> tombolo_trust::svid::Svid {
    let key = IdentityKey::generate().unwrap();
    ca.issue_svid(&key, id, Duration::from_secs(3600), Timestamp::now()).unwrap()
}

/// Polls until `condition` holds.
#[track_caller]
pub fn until(what: &str, condition: impl Fn() -> bool) -> impl Future<Output = ()> {
    let what = what.to_owned();
    let caller = std::panic::Location::caller();
    async move {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !condition() {
            assert!(tokio::time::Instant::now() < deadline, "{caller}: never happened: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
