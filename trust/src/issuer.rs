//! What the identity server decides: the SPIFFE ID comes from the proof, never from the CSR. The caller keeps
//! the join entries, and makes their change durable between [`Issuer::read_join`] and [`Issuer::issue`].

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use tombolo_core::id::SpiffeId;
use tombolo_core::join::{JoinEntries, JoinEntryId, JoinRefusal};
use tombolo_core::refusal::Refusal;
use tombolo_core::service_account::TokenRefused;

use crate::bundle::Bundle;
use crate::ca::{CaError, CertificateAuthority, CheckedCsr, InvalidCsr};
use crate::certificate::{Leaf, Refused, read_leaf};
use crate::peering::sha256;
use crate::store::{Anchors, Usage};
use crate::svid::{timestamp, unix_time};

/// Longest join secret that is hashed, in octets.
const SECRET_LEN_MAX: usize = 1024;

/// Most characters of an unproven name that are repeated.
const ASKED_LEN_MAX: usize = 200;

/// Issues SVIDs of one life for one CA.
#[derive(Debug, Clone)]
pub struct Issuer {
    pub ca: CertificateAuthority,
    /// How long an SVID is valid.
    pub life: Duration,
    /// How long after its expiry an SVID can still be renewed with the same key.
    pub grace: Duration,
}

/// A join proof that is well formed. Whether it is right is for the join entries to say.
#[derive(Debug, Clone)]
pub struct JoinRequest {
    pub entry_id: JoinEntryId,
    pub secret_sha256: [u8; 32],
    pub public_key_sha256: [u8; 32],
    pub csr: CheckedCsr,
}

/// A new SVID's public part.
#[derive(Debug, Clone)]
pub struct Issued {
    pub id: SpiffeId,
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    pub bundle: Bundle,
}

#[derive(Debug, thiserror::Error)]
pub enum IssueRefusal {
    #[error(transparent)]
    Csr(#[from] InvalidCsr),
    #[error(transparent)]
    Join(#[from] JoinRefusal),
    #[error(transparent)]
    Token(#[from] TokenRefused),
    #[error("the CSR asks for {asked:?}, and what was proven is {proven}")]
    OtherId { asked: String, proven: SpiffeId },
    #[error("the SVID to renew is refused: {0}")]
    Proof(Refused),
    #[error("the CSR is not made with the key of the SVID to renew")]
    OtherKey,
    #[error("the SVID has expired longer ago than the grace of {grace:?}; join again with a new join token")]
    GraceIsOver { grace: Duration },
    #[error("the identity {0} was revoked")]
    Revoked(SpiffeId),
    #[error(transparent)]
    Ca(CaError),
}

impl IssueRefusal {
    /// The reason that is counted.
    pub fn refusal(&self) -> Refusal {
        match self {
            IssueRefusal::Csr(_) => Refusal::BadRequest,
            IssueRefusal::Token(TokenRefused::NotNamed { .. } | TokenRefused::Reserved { .. }) => Refusal::WrongRole,
            IssueRefusal::Join(_) | IssueRefusal::Token(_) | IssueRefusal::OtherId { .. } | IssueRefusal::OtherKey => {
                Refusal::IdentityDenied
            }
            IssueRefusal::Proof(refused) => refused.refusal,
            IssueRefusal::GraceIsOver { .. } => Refusal::Expired,
            IssueRefusal::Revoked(_) => Refusal::Revoked,
            IssueRefusal::Ca(_) => Refusal::Overloaded,
        }
    }
}

impl From<IssueRefusal> for tonic::Status {
    /// What the identity client acts on: `PermissionDenied` means that this proof will never do, anything else
    /// is worth another try with it.
    fn from(refusal: IssueRefusal) -> Self {
        let code = match &refusal {
            IssueRefusal::Csr(_) => tonic::Code::InvalidArgument,
            IssueRefusal::Join(_)
            | IssueRefusal::Token(_)
            | IssueRefusal::OtherId { .. }
            | IssueRefusal::Proof(_)
            | IssueRefusal::OtherKey
            | IssueRefusal::GraceIsOver { .. }
            | IssueRefusal::Revoked(_) => tonic::Code::PermissionDenied,
            // What went wrong inside the CA is for its own log.
            IssueRefusal::Ca(_) => return tonic::Status::internal("the CA can't issue now; see the federation's log"),
        };
        tonic::Status::new(code, refusal.to_string())
    }
}

impl Issuer {
    /// Checks the form of a join proof and of its CSR.
    pub fn read_join(entry_id: &str, secret: &[u8], csr_der: &[u8]) -> Result<JoinRequest, IssueRefusal> {
        let csr = CheckedCsr::new(csr_der)?;
        let entry_id = entry_id.parse().map_err(|_| JoinRefusal::NotKnown)?;
        if secret.len() > SECRET_LEN_MAX {
            return Err(JoinRefusal::NotKnown.into());
        }
        Ok(JoinRequest { entry_id, secret_sha256: sha256(secret), public_key_sha256: csr.public_key_sha256(), csr })
    }

    /// Redeems and issues in one go. With `true`, the entries have changed and must be durable before the
    /// answer is sent.
    pub fn issue_join(
        &self,
        entries: &mut JoinEntries,
        request: &JoinRequest,
        now: Timestamp,
        revoked: &BTreeSet<SpiffeId>,
    ) -> Result<(Issued, bool), IssueRefusal> {
        let redeemed = entries.redeem(&request.entry_id, &request.secret_sha256, request.public_key_sha256, now)?;
        let issued = self.issue(&request.csr, &redeemed.spiffe_id, now, revoked)?;
        Ok((issued, redeemed.changed))
    }

    /// Issues for an identity that was proven.
    pub fn issue(
        &self,
        csr: &CheckedCsr,
        id: &SpiffeId,
        now: Timestamp,
        revoked: &BTreeSet<SpiffeId>,
    ) -> Result<Issued, IssueRefusal> {
        if let Some(asked) = csr.asked_uris().iter().find(|asked| **asked != id.to_string()) {
            let asked = asked.chars().take(ASKED_LEN_MAX).collect();
            return Err(IssueRefusal::OtherId { asked, proven: id.clone() });
        }
        if revoked.contains(id) {
            return Err(IssueRefusal::Revoked(id.clone()));
        }
        let chain = self.ca.issue_checked(csr, id, self.life, now).map_err(IssueRefusal::Ca)?;
        Ok(Issued { id: id.clone(), chain, bundle: self.ca.bundle() })
    }

    /// Renews by an SVID of this CA that is valid, or expired within the grace, and a CSR of the same key. The
    /// chain comes in the message and not in the handshake, since TLS refuses an expired certificate.
    pub fn renew(
        &self,
        chain_der: &[Vec<u8>],
        csr_der: &[u8],
        now: Timestamp,
        revoked: &BTreeSet<SpiffeId>,
    ) -> Result<Issued, IssueRefusal> {
        let (csr, leaf) = self.prove(chain_der, csr_der, now)?;
        self.issue(&csr, &leaf.id, now, revoked)
    }

    /// Issues the identity under which a gateway begins legs for workloads without a sidecar. The gateway proves itself
    /// as for a renewal, and has one key for both.
    pub fn issue_unmeshed(
        &self,
        chain_der: &[Vec<u8>],
        csr_der: &[u8],
        now: Timestamp,
        revoked: &BTreeSet<SpiffeId>,
    ) -> Result<Issued, IssueRefusal> {
        let (csr, leaf) = self.prove(chain_der, csr_der, now)?;
        let detail = "only a gateway speaks for workloads without a sidecar";
        let refused = Refused { refusal: Refusal::WrongRole, detail };
        let unmeshed = leaf.id.unmeshed_of().ok_or(IssueRefusal::Proof(refused))?;
        if revoked.contains(&leaf.id) {
            return Err(IssueRefusal::Revoked(leaf.id));
        }
        self.issue(&csr, &unmeshed, now, revoked)
    }

    fn prove(&self, chain_der: &[Vec<u8>], csr_der: &[u8], now: Timestamp) -> Result<(CheckedCsr, Leaf), IssueRefusal> {
        let csr = CheckedCsr::new(csr_der)?;
        let chain: Vec<CertificateDer<'_>> = chain_der.iter().map(|der| der.as_slice().into()).collect();
        let leaf = read_leaf(&chain).map_err(IssueRefusal::Proof)?;
        self.verify_own(&chain, &leaf, now)?;
        if leaf.public_key != csr.public_key_der() {
            return Err(IssueRefusal::OtherKey);
        }
        Ok((csr, leaf))
    }

    fn verify_own(&self, chain: &[CertificateDer<'_>], leaf: &Leaf, now: Timestamp) -> Result<(), IssueRefusal> {
        let bundle = self.ca.bundle();
        if leaf.id.trust_domain() != bundle.trust_domain() {
            let detail = "the SVID is of another trust domain";
            return Err(IssueRefusal::Proof(Refused { refusal: Refusal::UnknownTrustDomain, detail }));
        }
        // An expired one must have been right to the end.
        let moment = unix_time(now).min(leaf.not_after);
        Anchors::new(bundle.roots()).verify(chain, Usage::Client, moment).map_err(IssueRefusal::Proof)?;
        let renewable_until = timestamp(leaf.not_after).saturating_add(self.grace).unwrap_or(Timestamp::MAX);
        if now > renewable_until {
            return Err(IssueRefusal::GraceIsOver { grace: self.grace });
        }
        Ok(())
    }
}
