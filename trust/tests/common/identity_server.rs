#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::net::TcpListener;
use tombolo_api::proto::identity::identity_server::{Identity, IdentityServer};
use tombolo_api::proto::identity::issue_request::Proof;
use tombolo_api::proto::identity::{IssueRequest, IssueResponse, TokenProof};
use tombolo_core::id::SpiffeId;
use tombolo_core::join::{JoinEntries, JoinEntryId, JoinKind, JoinToken};
use tombolo_core::refusal::Refusal;
use tombolo_core::service_account::{Asked, TokenRefused};
use tombolo_trust::ca::CheckedCsr;
use tombolo_trust::grpc::{ALPN_H2, Incoming};
use tombolo_trust::identity::{FirstProof, IdentityConfig};
use tombolo_trust::issuer::{Issued, Issuer};
use tombolo_trust::peering::sha256;
use tombolo_trust::store::TrustStore;
use tombolo_trust::tls::{ClientAuth, RootInChain, server_config};
use tonic::{Request, Response, Status};

use super::Cluster;

/// A federation's identity server, as small as it can be.
pub struct Federation {
    pub cluster: Cluster,
    pub address: SocketAddr,
    pub state: Arc<State>,
    /// What the handshakes refused.
    pub refused: Arc<Mutex<Vec<Refusal>>>,
}

pub struct State {
    pub issuer: Issuer,
    pub entries: Mutex<JoinEntries>,
    pub revoked: Mutex<BTreeSet<SpiffeId>>,
    /// The service-account token that proves somebody, and whom.
    pub token: Mutex<Option<(TokenProof, SpiffeId)>>,
    /// What was answered, in order.
    pub log: Mutex<Vec<&'static str>>,
    pub down: AtomicBool,
    /// So many answers are lost after everything was done for them.
    pub lose: AtomicUsize,
    /// A key file that must exist, private, whenever somebody asks for an SVID.
    pub key_file: Mutex<Option<PathBuf>>,
}

impl Federation {
    pub async fn start(life: Duration, grace: Duration) -> Self {
        let cluster = Cluster::new("east");
        let state = Arc::new(State {
            issuer: Issuer { ca: cluster.ca.clone(), life, grace },
            entries: Mutex::default(),
            revoked: Mutex::default(),
            token: Mutex::default(),
            log: Mutex::default(),
            down: AtomicBool::new(false),
            lose: AtomicUsize::new(0),
            key_file: Mutex::default(),
        });
        let trust = TrustStore::new();
        trust.set_own(cluster.ca.bundle()).unwrap();
        let svid = cluster.source("tombolo/federation/fed-1");
        let config = server_config(&svid, &trust, ClientAuth::Optional, &[ALPN_H2], RootInChain::No);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let refused: Arc<Mutex<Vec<Refusal>>> = Arc::default();
        let on_refused = {
            let refused = refused.clone();
            Arc::new(move |refusal, _| refused.lock().unwrap().push(refusal))
        };
        let incoming = Incoming::new(listener, config, on_refused);
        let service = IdentityServer::new(Service { state: state.clone() });
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { cluster, address, state, refused }
    }

    /// Adds an entry and writes its token to `<state>/token`.
    pub fn add_join(&self, state: &std::path::Path, path: &str, uses: u32) -> JoinEntryId {
        let token = JoinToken::new(JoinEntryId::from_random(rand::random()), rand::random());
        let id = self.cluster.id(path);
        let kind = if id.is_reserved() { JoinKind::Role } else { JoinKind::Workload };
        let (now, secret) = (Timestamp::now(), sha256(token.expose_secret()));
        let expires = now + SignedDuration::from_hours(1);
        self.state.entries.lock().unwrap().add(token.entry_id, kind, id, secret, uses, expires, now).unwrap();
        std::fs::write(state.join("token"), token.expose() + "\n").unwrap();
        token.entry_id
    }

    pub fn uses_left(&self, entry: &JoinEntryId) -> u32 {
        self.state.entries.lock().unwrap().get(entry).unwrap().uses_left()
    }

    pub fn config(&self, state: &std::path::Path) -> IdentityConfig {
        IdentityConfig {
            federation: self.address.to_string(),
            ca: self.cluster.folder.path().join("ca.pem"),
            first_proof: Some(FirstProof::Join(state.join("token"))),
            asked: Asked::Workload,
            state: state.to_owned(),
        }
    }

    pub fn log(&self) -> Vec<&'static str> {
        self.state.log.lock().unwrap().clone()
    }
}

struct Service {
    state: Arc<State>,
}

impl State {
    fn issue(&self, request: IssueRequest) -> Result<Issued, Status> {
        if self.down.load(Ordering::SeqCst) {
            return Err(Status::unavailable("down"));
        }
        if let Some(path) = &*self.key_file.lock().unwrap() {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let (now, revoked) = (Timestamp::now(), self.revoked.lock().unwrap().clone());
        let (what, issued) = match request.proof.unwrap() {
            Proof::Join(proof) => {
                let request = Issuer::read_join(&proof.entry_id, &proof.secret, &request.csr_der)?;
                let mut entries = self.entries.lock().unwrap();
                let issued = self.issuer.issue_join(&mut entries, &request, now, &revoked);
                ("join", issued.map(|(issued, _changed)| issued))
            }
            Proof::Token(proof) => {
                let proven = self.token.lock().unwrap().clone().filter(|(token, _)| *token == proof);
                let issued = proven.ok_or_else(|| unknown_token().into()).and_then(|(_, id)| {
                    let csr = CheckedCsr::new(&request.csr_der)?;
                    self.issuer.issue(&csr, &id, now, &revoked)
                });
                ("token", issued)
            }
            Proof::Renew(proof) => ("renew", self.issuer.renew(&proof.chain_der, &request.csr_der, now, &revoked)),
            Proof::Unmeshed(proof) => {
                ("unmeshed", self.issuer.issue_unmeshed(&proof.chain_der, &request.csr_der, now, &revoked))
            }
        };
        let mut log = self.log.lock().unwrap();
        log.push(if issued.is_ok() { what } else { "refused" });
        drop(log);
        let issued = issued?;
        let lost = self.lose.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if lost { Err(Status::unavailable("the answer was lost")) } else { Ok(issued) }
    }
}

fn unknown_token() -> TokenRefused {
    TokenRefused::NotAuthenticated { reason: "not the one of the test".into(), audience: "tombolo/east.tombolo".into() }
}

#[tonic::async_trait]
impl Identity for Service {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let issued = self.state.issue(request.into_inner())?;
        Ok(Response::new(IssueResponse {
            spiffe_id: issued.id.to_string(),
            chain_der: issued.chain.iter().map(|certificate| certificate.to_vec()).collect(),
            bundle: Some(issued.bundle.to_wire()),
        }))
    }
}

/// Waits until `condition` holds, for at most 20 seconds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
