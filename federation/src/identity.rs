//! The identity server: SVIDs from join entries, from service accounts' tokens and by renewal.
//!
//! A use of a join entry is durable before its SVID leaves the process. Anybody who reaches the port
//! may ask, so each source address has a rate, and the work under way is bounded.

mod admission;
mod review;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::Semaphore;
use tombolo_api::proto::identity::identity_client::IdentityClient;
use tombolo_api::proto::identity::identity_server::{Identity, IdentityServer};
use tombolo_api::proto::identity::issue_request::Proof;
use tombolo_api::proto::identity::{IssueRequest, IssueResponse, JoinProof, RenewProof, TokenProof};
use tombolo_core::id::{Role, SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use tombolo_runtime::metrics::Refusals;
use tombolo_trust::ca::CheckedCsr;
use tombolo_trust::grpc::{self, ALPN_H2, Peer};
use tombolo_trust::issuer::{IssueRefusal, Issued, Issuer};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{ServerExpectation, client_config};
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};

use crate::kubernetes::Lead;
use crate::store::{Store, StoreError};
use admission::Admission;
use review::NotProven;
pub use review::Reviewer;

/// Requests under way at a time; each may wait for the disk.
const UNDER_WAY_MAX: usize = 64;
/// Largest request: a chain and a CSR.
const REQUEST_OCTETS_MAX: usize = 64 * 1024;
/// Certificates in a chain to renew by.
const CHAIN_MAX: usize = 8;

/// Set on a request that one replica passes on to another.
const PASSED_ON: &str = "tombolo-passed-on";
/// How long the leader may take to answer one.
const LEADER_TIME_MAX: Duration = Duration::from_secs(5);

/// What a replica that does not lead needs to ask for what only the leader can do.
#[derive(Clone)]
pub struct ToLeader {
    pub lead: Lead,
    pub trust: TrustStore,
    pub trust_domain: TrustDomain,
}

/// Issues SVIDs over gRPC.
pub struct IdentityService {
    issuer: Issuer,
    store: Store,
    /// `None` where there is no API server to ask.
    reviewer: Option<Reviewer>,
    to_leader: ToLeader,
    refusals: Refusals,
    admission: Mutex<Admission<IpAddr>>,
    under_way: Arc<Semaphore>,
}

impl IdentityService {
    /// The service for the discovery port. Where this replica does not lead, join tokens are redeemed by the leader.
    pub fn server(
        issuer: Issuer,
        store: Store,
        reviewer: Option<Reviewer>,
        to_leader: ToLeader,
        refusals: Refusals,
    ) -> IdentityServer<Self> {
        let (admission, under_way) = (Mutex::new(Admission::default()), Arc::new(Semaphore::new(UNDER_WAY_MAX)));
        let service = Self { issuer, store, reviewer, to_leader, refusals, admission, under_way };
        IdentityServer::new(service).max_decoding_message_size(REQUEST_OCTETS_MAX)
    }

    fn refused(&self, refusal: Refusal, status: Status) -> Status {
        self.refusals.inc(refusal);
        tracing::info!(reason = refusal.code(), detail = status.message(), "no SVID was issued");
        status
    }

    fn admit(&self, source: Option<IpAddr>) -> Result<(), Status> {
        let Some(source) = source else { return Ok(()) };
        let mut admission = self.admission.lock().expect("no holder of the lock panics");
        if admission.admits(source, Instant::now()) {
            return Ok(());
        }
        drop(admission);
        let text = "too many requests for SVIDs from this address; try again in a second";
        Err(self.refused(Refusal::Overloaded, Status::resource_exhausted(text)))
    }
}

impl IdentityService {
    /// Asks the leader, which alone counts uses of join tokens.
    async fn pass_on(&self, asked: IssueRequest) -> Result<Response<IssueResponse>, Status> {
        let ToLeader { lead, trust, trust_domain } = self.to_leader.clone();
        let Some(leader) = lead.leader.borrow().clone() else {
            return Err(Status::unavailable("no replica of the federation leads at the moment; try again"));
        };
        let expectation = ServerExpectation::Role { trust_domain, role: Role::Federation };
        let tls = client_config(&SvidSource::new(), &trust, expectation, &[ALPN_H2]);
        let channel = grpc::connect(&leader.discovery, tls).map_err(|error| Status::unavailable(error.to_string()))?;
        let mut request = Request::new(asked);
        request.metadata_mut().insert(PASSED_ON, MetadataValue::from_static("1"));
        request.set_timeout(LEADER_TIME_MAX);
        let mut client = IdentityClient::new(channel);
        match tokio::time::timeout(LEADER_TIME_MAX, client.issue(request)).await {
            // Its refusal is the answer; that it can't be reached is told in words of our own.
            Ok(Err(status)) if std::error::Error::source(&status).is_some() => {
                let holder = leader.holder;
                Err(Status::unavailable(format!("the leader ({holder}) can't be reached; try again")))
            }
            Ok(answer) => answer,
            Err(_) => Err(Status::unavailable(format!("the leader ({}) does not answer; try again", leader.holder))),
        }
    }
}

/// Why nothing was issued.
enum NotIssued {
    Refused(IssueRefusal),
    Store(StoreError),
    NotProven(NotProven),
    NoReviewer,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let source = request.extensions().get::<Peer>().map(|peer| peer.address.ip());
        self.admit(source)?;
        let Ok(_permit) = self.under_way.clone().try_acquire_owned() else {
            let text = "too many SVIDs are being issued; try again in a second";
            return Err(self.refused(Refusal::Overloaded, Status::resource_exhausted(text)));
        };
        let passed_on = request.metadata().contains_key(PASSED_ON);
        let request = request.into_inner();
        let asked = request.clone();
        match self.issued(request).await {
            Ok(issued) => {
                tracing::info!(id = %issued.id, "issued an SVID");
                Ok(Response::new(response(issued)))
            }
            Err(NotIssued::Store(StoreError::NotLeading)) if !passed_on => self.pass_on(asked).await,
            Err(not_issued) => Err(self.not_issued(not_issued)),
        }
    }
}

impl IdentityService {
    async fn issued(&self, request: IssueRequest) -> Result<Issued, NotIssued> {
        let IssueRequest { csr_der, proof } = request;
        let proven = match &proof {
            Some(Proof::Token(proof)) => Some(self.review(proof, &csr_der).await?),
            _ => None,
        };
        let issuer = self.issuer.clone();
        // Off this thread: signing takes a while, and a use of a join entry is written to disk.
        let issued = self.store.off_thread(move |store| match (proof, proven) {
            (_, Some((csr, id))) => {
                issuer.issue(&csr, &id, Timestamp::now(), &store.revoked().ids).map_err(NotIssued::Refused)
            }
            (Some(Proof::Join(proof)), None) => join(&issuer, store, &proof, &csr_der),
            (Some(Proof::Renew(proof)), None) => renew(&issuer, store, &proof, &csr_der).map_err(NotIssued::Refused),
            (Some(Proof::Unmeshed(proof)), None) => {
                unmeshed(&issuer, store, &proof, &csr_der).map_err(NotIssued::Refused)
            }
            (Some(Proof::Token(_)) | None, None) => {
                Err(NotIssued::Refused(IssueRefusal::Join(tombolo_core::join::JoinRefusal::NotKnown)))
            }
        });
        issued.await
    }

    /// Whom a token proves. The CSR is looked at first, which costs the API server nothing.
    async fn review(&self, proof: &TokenProof, csr_der: &[u8]) -> Result<(CheckedCsr, SpiffeId), NotIssued> {
        let reviewer = self.reviewer.as_ref().ok_or(NotIssued::NoReviewer)?;
        let csr = CheckedCsr::new(csr_der).map_err(|error| NotIssued::Refused(error.into()))?;
        match reviewer.identity(proof.token.clone(), &proof.role).await {
            Ok(id) => Ok((csr, id)),
            Err(NotProven::Refused(refused)) => Err(NotIssued::Refused(refused.into())),
            Err(not_proven) => Err(NotIssued::NotProven(not_proven)),
        }
    }

    fn not_issued(&self, reason: NotIssued) -> Status {
        match reason {
            NotIssued::Refused(refusal) => self.refused(refusal.refusal(), refusal.into()),
            NotIssued::Store(error) => {
                tracing::error!(%error, "a use of a join entry can't be made durable");
                let text = "the federation can't write its state; see its log";
                self.refused(Refusal::Overloaded, Status::unavailable(text))
            }
            NotIssued::NoReviewer => {
                let text = "this federation reads a directory and knows of no API server that vouches for service \
                            accounts; set join, with a token of `tombolo join add`, in the place of token";
                self.refused(Refusal::IdentityDenied, Status::permission_denied(text))
            }
            NotIssued::NotProven(not_proven) => {
                let text = not_proven.to_string();
                let (refusal, status) = match not_proven {
                    NotProven::Timeout(_) => (Refusal::Timeout, Status::deadline_exceeded(text)),
                    NotProven::Failed(_) => (Refusal::Overloaded, Status::internal(text)),
                    NotProven::UnknownRole(_) | NotProven::Length | NotProven::Refused(_) => {
                        (Refusal::BadRequest, Status::invalid_argument(text))
                    }
                };
                self.refused(refusal, status)
            }
        }
    }
}

fn join(issuer: &Issuer, store: &Store, proof: &JoinProof, csr_der: &[u8]) -> Result<Issued, NotIssued> {
    let request = Issuer::read_join(&proof.entry_id, &proof.secret, csr_der).map_err(NotIssued::Refused)?;
    let revoked = store.revoked().ids;
    let redeemed = store.change_joins(|entries| {
        let mut trial = entries.clone();
        let (issued, _) = issuer.issue_join(&mut trial, &request, Timestamp::now(), &revoked)?;
        // A use counts only when something was issued for it.
        *entries = trial;
        Ok(issued)
    });
    redeemed.map_err(NotIssued::Store)?.map_err(NotIssued::Refused)
}

fn renew(issuer: &Issuer, store: &Store, proof: &RenewProof, csr_der: &[u8]) -> Result<Issued, IssueRefusal> {
    let chain = &proof.chain_der[..proof.chain_der.len().min(CHAIN_MAX)];
    issuer.renew(chain, csr_der, Timestamp::now(), &store.revoked().ids)
}

fn unmeshed(issuer: &Issuer, store: &Store, proof: &RenewProof, csr_der: &[u8]) -> Result<Issued, IssueRefusal> {
    let chain = &proof.chain_der[..proof.chain_der.len().min(CHAIN_MAX)];
    issuer.issue_unmeshed(chain, csr_der, Timestamp::now(), &store.revoked().ids)
}

fn response(issued: Issued) -> IssueResponse {
    IssueResponse {
        spiffe_id: issued.id.to_string(),
        chain_der: issued.chain.iter().map(|certificate| certificate.to_vec()).collect(),
        bundle: Some(issued.bundle.to_wire()),
    }
}
