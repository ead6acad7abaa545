use std::time::Duration;

use tempfile::TempDir;
use tombolo_core::id::{SpiffeId, TrustDomain};
use tombolo_core::join::{JoinEntryId, JoinKind};
use tombolo_runtime::metrics::Metrics;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::peering::sha256;
use tonic::Code;

use super::*;
use crate::kubernetes::Leadership;

const SECRET: &[u8] = b"a secret of the test";

struct Running {
    state: TempDir,
    service: IdentityService,
    refusals: Refusals,
}

fn open(state: &TempDir) -> Store {
    Store::open(state.path(), &"east".parse().unwrap(), &"east.tombolo".parse().unwrap(), Timestamp::now()).unwrap()
}

/// There is no other replica.
fn service_lead() -> ToLeader {
    let lead = Lead::alone(Leadership::always());
    ToLeader { lead, trust: TrustStore::new(), trust_domain: "east.tombolo".parse().unwrap() }
}

fn running() -> Running {
    let state = tempfile::tempdir().unwrap();
    let domain: TrustDomain = "east.tombolo".parse().unwrap();
    let ca = CertificateAuthority::create_or_load(state.path(), &domain).unwrap();
    let hour = Duration::from_secs(3600);
    let issuer = Issuer { ca, life: hour, grace: hour };

    let refusals = Metrics::new("federation").refusals("identity");
    let service = IdentityService {
        issuer,
        store: open(&state),
        reviewer: None,
        to_leader: service_lead(),
        refusals: refusals.clone(),
        admission: Mutex::new(Admission::default()),
        under_way: Arc::new(Semaphore::new(UNDER_WAY_MAX)),
    };
    Running { state, service, refusals }
}

impl Running {
    /// A join entry for `ns/shop/sa/web` with one use.
    fn entry(&self) -> String {
        let id: SpiffeId = "spiffe://east.tombolo/ns/shop/sa/web".parse().unwrap();
        let entry_id = JoinEntryId::from_random([7; 8]);
        let now = Timestamp::now();
        let expires = now + Duration::from_secs(60);
        let add = |entries: &mut tombolo_core::join::JoinEntries| {
            entries.add(entry_id, JoinKind::Workload, id, sha256(SECRET), 1, expires, now)
        };
        self.service.store.change_joins(add).unwrap().unwrap();
        entry_id.to_string()
    }

    async fn issue(&self, key: &IdentityKey, proof: Option<Proof>) -> Result<IssueResponse, Status> {
        let request = IssueRequest { csr_der: key.csr_der().unwrap(), proof };
        self.service.issue(Request::new(request)).await.map(Response::into_inner)
    }
}

fn join_proof(entry_id: &str, secret: &[u8]) -> Option<Proof> {
    Some(Proof::Join(JoinProof { entry_id: entry_id.into(), secret: secret.into() }))
}

#[tokio::test]
async fn a_join_entry_yields_its_identity_once_a_key_and_the_use_is_durable() {
    let running = running();
    let entry = running.entry();
    let (key, other) = (IdentityKey::generate().unwrap(), IdentityKey::generate().unwrap());
    let first = running.issue(&key, join_proof(&entry, SECRET)).await.unwrap();
    assert_eq!(first.spiffe_id, "spiffe://east.tombolo/ns/shop/sa/web");
    assert_eq!(first.bundle.unwrap().trust_domain, "east.tombolo");

    let Running { state, service, .. } = running;
    drop(service);
    assert_eq!(open(&state).joins().list().next().unwrap().1.uses_left(), 0, "durable before the answer");
    let ca = CertificateAuthority::create_or_load(state.path(), &"east.tombolo".parse().unwrap()).unwrap();
    let hour = Duration::from_secs(3600);
    let refusals = Metrics::new("federation").refusals("identity");
    let service = IdentityService {
        issuer: Issuer { ca, life: hour, grace: hour },
        store: open(&state),
        reviewer: None,
        to_leader: service_lead(),
        refusals: refusals.clone(),
        admission: Mutex::new(Admission::default()),
        under_way: Arc::new(Semaphore::new(UNDER_WAY_MAX)),
    };
    let running = Running { state, service, refusals };
    assert!(running.issue(&key, join_proof(&entry, SECRET)).await.is_ok(), "the same key again, after a crash");
    let refused = running.issue(&other, join_proof(&entry, SECRET)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(running.refusals.count(Refusal::IdentityDenied), 1);
}

#[tokio::test]
async fn an_svid_renews_itself_with_its_own_key_only() {
    let running = running();
    let entry = running.entry();
    let (key, other) = (IdentityKey::generate().unwrap(), IdentityKey::generate().unwrap());
    let first = running.issue(&key, join_proof(&entry, SECRET)).await.unwrap();
    let proof = Some(Proof::Renew(RenewProof { chain_der: first.chain_der.clone() }));
    let renewed = running.issue(&key, proof.clone()).await.unwrap();
    assert_eq!(renewed.spiffe_id, first.spiffe_id);
    assert_eq!(running.issue(&other, proof.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    let revoke = running.service.store.change_revoked(|revoked| revoked.revoke(first.spiffe_id.parse().unwrap()));
    assert_eq!(revoke.unwrap(), Ok(true));
    assert_eq!(running.issue(&key, proof).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(running.refusals.count(Refusal::Revoked), 1);
}

#[tokio::test]
async fn what_proves_nothing_is_refused_and_counted() {
    let running = running();
    let entry = running.entry();
    let key = IdentityKey::generate().unwrap();
    for proof in [
        None,
        join_proof(&entry, b"wrong"),
        join_proof("0000000000000000", SECRET),
        join_proof("nonsense", SECRET),
        Some(Proof::Renew(RenewProof { chain_der: vec![] })),
        Some(Proof::Renew(RenewProof { chain_der: vec![vec![0; 10]; 1000] })),
        // Nobody is there who could vouch for it.
        Some(Proof::Token(TokenProof { token: "a.b.c".into(), role: String::new() })),
    ] {
        let refused = running.issue(&key, proof.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{proof:?}: {refused:?}");
    }
    let request = IssueRequest { csr_der: vec![1, 2, 3], proof: join_proof(&entry, SECRET) };
    let refused = running.service.issue(Request::new(request)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let counted: u64 = Refusal::ALL.iter().map(|refusal| running.refusals.count(*refusal)).sum();
    assert_eq!(counted, 8);
    assert_eq!(running.service.store.joins().list().next().unwrap().1.uses_left(), 1, "no use was taken");
}

#[tokio::test]
async fn the_work_under_way_is_bounded() {
    let running = running();
    let entry = running.entry();
    let held = running.service.under_way.clone().acquire_many_owned(UNDER_WAY_MAX as u32).await.unwrap();
    let key = IdentityKey::generate().unwrap();
    let refused = running.issue(&key, join_proof(&entry, SECRET)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(held);
    assert!(running.issue(&key, join_proof(&entry, SECRET)).await.is_ok());
}
