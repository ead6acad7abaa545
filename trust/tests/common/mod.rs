#![allow(dead_code, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tombolo_core::id::{SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::{ClusterBundle, TrustStore};
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{refusal_of, refused_by_peer};

pub mod forged;
pub mod identity_server;

pub const LIFE: Duration = Duration::from_secs(3600);

/// A cluster's CA in a folder of its own.
pub struct Cluster {
    pub ca: CertificateAuthority,
    pub folder: TempDir,
    pub name: &'static str,
}

impl Cluster {
    pub fn new(name: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = CertificateAuthority::create_or_load(folder.path(), &domain(name)).unwrap();
        Self { ca, folder, name }
    }

    pub fn domain(&self) -> TrustDomain {
        domain(self.name)
    }

    pub fn id(&self, path: &str) -> SpiffeId {
        format!("spiffe://{}/{path}", self.domain()).parse().unwrap()
    }

    pub fn source(&self, path: &str) -> SvidSource {
        self.source_at(path, LIFE, Timestamp::now())
    }

    pub fn source_at(&self, path: &str, life: Duration, now: Timestamp) -> SvidSource {
        let source = SvidSource::new();
        source.set(self.ca.issue_svid(&IdentityKey::generate().unwrap(), &self.id(path), life, now).unwrap());
        source
    }

    pub fn bundle(&self) -> ClusterBundle {
        ClusterBundle { cluster: self.name.parse().unwrap(), bundle: self.ca.bundle() }
    }
}

pub fn domain(name: &str) -> TrustDomain {
    format!("{name}.tombolo").parse().unwrap()
}

pub fn trusting(clusters: &[&Cluster]) -> TrustStore {
    let store = TrustStore::new();
    assert_eq!(store.replace_all(clusters.iter().map(|cluster| cluster.bundle()).collect()), []);
    store
}

/// How one side of a handshake ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Open,
    /// This side refused the other.
    Refused(Refusal),
    /// The other side's alert said why it refused.
    Told(Refusal),
    Failed,
}

pub fn end<T>(result: &std::io::Result<T>) -> End {
    match result {
        Ok(_) => End::Open,
        Err(error) => match (refusal_of(error), refused_by_peer(error)) {
            (Some(refusal), _) => End::Refused(refusal),
            (None, Some(refusal)) => End::Told(refusal),
            (None, None) => End::Failed,
        },
    }
}

pub type ClientStream = client::TlsStream<TcpStream>;
pub type ServerStream = server::TlsStream<TcpStream>;

/// One handshake over loopback. Each side writes one byte and reads one, so that a client whose certificate is
/// refused has learnt of it.
pub async fn handshake(
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
) -> (std::io::Result<ClientStream>, std::io::Result<ServerStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (stream, _) = listener.accept().await?;
        let mut stream = TlsAcceptor::from(server).accept(stream).await?;
        stream.write_all(b"s").await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let dial = async {
        let stream = TcpStream::connect(address).await?;
        let name = "server.test".try_into().unwrap();
        let mut stream = TlsConnector::from(client).connect(name, stream).await?;
        stream.read_u8().await?;
        stream.write_all(b"c").await?;
        Ok(stream)
    };
    tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(dial, serve) }).await.unwrap()
}
