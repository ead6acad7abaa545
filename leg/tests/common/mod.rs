#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tombolo_core::id::{SpiffeId, TrustDomain};
use tombolo_leg::Alpn;
use tombolo_leg::accept::{AcceptError, AcceptedLeg, Acceptor};
use tombolo_leg::dial::{Dialer, Leg, LegError, LegRequest, Via};
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::{ClusterBundle, TrustStore};
use tombolo_trust::svid::SvidSource;

pub const PATIENCE: Duration = Duration::from_secs(10);

/// Every test has an end, whatever hangs.
pub async fn bounded<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the test came to its end in time")
}

/// A cluster's CA in a folder of its own.
pub struct Cluster {
    pub ca: CertificateAuthority,
    pub folder: TempDir,
    pub name: &'static str,
}

impl Cluster {
    pub fn new(name: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let domain = format!("{name}.tombolo").parse().unwrap();
        Self { ca: CertificateAuthority::create_or_load(folder.path(), &domain).unwrap(), folder, name }
    }

    pub fn domain(&self) -> TrustDomain {
        format!("{}.tombolo", self.name).parse().unwrap()
    }

    pub fn id(&self, path: &str) -> SpiffeId {
        format!("spiffe://{}.tombolo/{path}", self.name).parse().unwrap()
    }

    pub fn svid(&self, path: &str) -> SvidSource {
        self.svid_at(path, Duration::from_secs(3600), Timestamp::now())
    }

    pub fn svid_at(&self, path: &str, life: Duration, now: Timestamp) -> SvidSource {
        let source = SvidSource::new();
        source.set(self.ca.issue_svid(&IdentityKey::generate().unwrap(), &self.id(path), life, now).unwrap());
        source
    }

    pub fn bundle(&self) -> ClusterBundle {
        ClusterBundle { cluster: self.name.parse().unwrap(), bundle: self.ca.bundle() }
    }
}

pub fn trusting(clusters: &[&Cluster]) -> TrustStore {
    let store = TrustStore::new();
    assert_eq!(store.replace_all(clusters.iter().map(|cluster| cluster.bundle()).collect()), []);
    store
}

pub const CLIENT: &str = "ns/shop/sa/cart";
pub const SERVER: &str = "ns/shop/sa/web";

/// Two peered clusters: the client in east, the server in west.
pub struct Pair {
    pub east: Cluster,
    pub west: Cluster,
    pub dialer: Dialer,
    pub acceptor: Acceptor,
    pub client_trust: TrustStore,
    pub server_trust: TrustStore,
}

impl Pair {
    pub fn new() -> Self {
        Self::with_client(CLIENT)
    }

    pub fn with_client(path: &str) -> Self {
        let (east, west) = (Cluster::new("east"), Cluster::new("west"));
        let (client_trust, server_trust) = (trusting(&[&east, &west]), trusting(&[&east, &west]));
        let dialer = Dialer::new(east.svid(path), client_trust.clone());
        let acceptor = Acceptor::new(&west.svid(SERVER), &server_trust);
        Self { east, west, dialer, acceptor, client_trust, server_trust }
    }

    pub fn request(&self, address: SocketAddr, alpn: Alpn) -> LegRequest {
        LegRequest {
            target: "80.web.shop.svc.west.clusterset.local".parse().unwrap(),
            trust_domain: self.west.domain(),
            server_ids: Arc::new(BTreeSet::from([self.west.id(SERVER)])),
            via: Via::Direct(address.to_string()),
            alpn,
            trace: None,
            tracestate: None,
            deadline: Duration::from_secs(5),
        }
    }

    /// A leg over loopback, both ends.
    pub async fn try_leg(&self, alpn: Alpn) -> (Result<Leg, LegError>, Result<AcceptedLeg, AcceptError>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let request = self.request(listener.local_addr().unwrap(), alpn);
        let accept = async { self.acceptor.accept(listener.accept().await.unwrap().0).await };
        bounded(async { tokio::join!(self.dialer.dial(request), accept) }).await
    }

    pub async fn leg(&self, alpn: Alpn) -> (Leg, AcceptedLeg) {
        let (dialled, accepted) = self.try_leg(alpn).await;
        (dialled.unwrap(), accepted.unwrap())
    }
}

/// Polls until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, met).await.unwrap_or_else(|_| panic!("{what} did not come true in time"));
}
