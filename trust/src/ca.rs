//! The certificate authority of one cluster: it makes its own roots, keeps them in the state directory and
//! issues X.509-SVIDs. What a CSR asks for beyond its public key is never looked at.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use data_encoding::{BASE64, HEXLOWER};
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKey, PublicKeyData, SanType, SerialNumber,
    SigningKey,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use tombolo_core::id::{SpiffeId, TrustDomain};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use zeroize::{Zeroize, Zeroizing};

use crate::atomic;
use crate::bundle::{Bundle, InvalidBundle, ROOTS_MAX, root_sha256};
use crate::certificate::read_root;
use crate::key::{IdentityKey, KeyError};
use crate::peering::{EXPORTER_LEN, answer_message, sha256};
use crate::svid::{InvalidSvid, Svid, SvidSource, TICK, timestamp};
use crate::tls::provider;

/// Largest CSR that is looked into, in octets.
pub const CSR_LEN_MAX: usize = 16 * 1024;
/// How long a root is valid.
const ROOT_LIFE: SignedDuration = SignedDuration::from_hours(10 * 365 * 24);
/// A certificate is valid from a tenth of its life before its issue, so that a slow clock elsewhere accepts it,
/// but from at most this long before.
const BACKDATE_MAX: Duration = Duration::from_secs(60);

const STATE_FILE: &str = "ca.json";
/// The bundle for others, beside the state file.
pub const BUNDLE_FILE: &str = "ca.pem";

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("can't use the CA's state in {path}: {source}", path = path.display())]
    State { path: PathBuf, source: io::Error },
    #[error("the CA's state in {path} is damaged: {reason}; restore it from a backup", path = path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("the CA's state in {path} belongs to trust domain {found}, not {wanted}", path = path.display())]
    OtherDomain { path: PathBuf, found: TrustDomain, wanted: TrustDomain },
    #[error("the identity {0} is not of this CA's trust domain")]
    ForeignIdentity(SpiffeId),
    #[error("there are {ROOTS_MAX} roots already; retire one first")]
    TooManyRoots,
    #[error("no root with that SHA-256 is published")]
    UnknownRoot,
    #[error("the root has expired")]
    RootExpired,
    #[error(transparent)]
    Csr(#[from] InvalidCsr),
    #[error("a certificate can't be made: {0}")]
    Generate(#[from] rcgen::Error),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Svid(#[from] InvalidSvid),
}

/// Why a certificate signing request is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCsr {
    #[error("the CSR is larger than {CSR_LEN_MAX} octets")]
    TooLong,
    #[error("the CSR is malformed, or is not signed by its own key")]
    Malformed,
    #[error("the CSR's key is not ECDSA P-256, ECDSA P-384 or Ed25519")]
    Key,
}

/// A CSR whose signature is verified: somebody holds the key, nothing else is believed of it.
#[derive(Debug, Clone)]
pub struct CheckedCsr {
    public_key: PublicKey,
    spki_der: Vec<u8>,
    asked_uris: Vec<String>,
}

impl CheckedCsr {
    pub fn new(csr_der: &[u8]) -> Result<Self, InvalidCsr> {
        if csr_der.len() > CSR_LEN_MAX {
            return Err(InvalidCsr::TooLong);
        }
        let (rest, parsed) = X509CertificationRequest::from_der(csr_der).map_err(|_| InvalidCsr::Malformed)?;
        if !rest.is_empty() {
            return Err(InvalidCsr::Malformed);
        }
        let spki_der = parsed.certification_request_info.subject_pki.raw.to_vec();
        let asked_uris = asked_uris(&parsed);
        let csr = CertificateSigningRequestDer::from(csr_der);
        let public_key = CertificateSigningRequestParams::from_der(&csr).map_err(|_| InvalidCsr::Malformed)?.public_key;
        let allowed = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
        if !allowed.contains(&PublicKeyData::algorithm(&public_key)) {
            return Err(InvalidCsr::Key);
        }
        // The kind of key was concluded from the CSR's signature; it must be the kind that the CSR says.
        if public_key.subject_public_key_info() != spki_der {
            return Err(InvalidCsr::Key);
        }
        Ok(Self { public_key, spki_der, asked_uris })
    }

    /// DER of the SubjectPublicKeyInfo.
    pub fn public_key_der(&self) -> &[u8] {
        &self.spki_der
    }

    /// The URIs that it asks to be certified as. None of them is believed.
    pub fn asked_uris(&self) -> &[String] {
        &self.asked_uris
    }

    /// SHA-256 of [`CheckedCsr::public_key_der`]: what uses of a join entry are counted by.
    pub fn public_key_sha256(&self) -> [u8; 32] {
        sha256(&self.spki_der)
    }
}

fn asked_uris(csr: &X509CertificationRequest<'_>) -> Vec<String> {
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    let extensions = csr.requested_extensions().into_iter().flatten();
    let names = extensions.filter_map(|extension| match extension {
        ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
        _ => None,
    });
    names.flatten().filter_map(uri).collect()
}

/// Where the CA's state is kept, its private keys with it. Its methods may block.
pub trait Vault: Send + Sync {
    /// What it is called in messages.
    fn name(&self) -> PathBuf;
    /// `None` when no CA was made yet.
    fn load(&self) -> io::Result<Option<Zeroizing<Vec<u8>>>>;
    /// Replaces the state; when this returns it is durable.
    fn save(&self, state: &[u8]) -> io::Result<()>;
}

/// A file of mode 0600.
struct FileVault(PathBuf);

impl Vault for FileVault {
    fn name(&self) -> PathBuf {
        self.0.clone()
    }

    fn load(&self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        match std::fs::read(&self.0) {
            Ok(octets) => Ok(Some(Zeroizing::new(octets))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn save(&self, state: &[u8]) -> io::Result<()> {
        atomic::write_private(&self.0, state)
    }
}

/// The CA of one trust domain. Clones share it.
#[derive(Clone)]
pub struct CertificateAuthority {
    shared: Arc<Shared>,
}

struct Shared {
    vault: Box<dyn Vault>,
    /// Where the bundle for others is written.
    folder: PathBuf,
    state: ArcSwap<State>,
    /// Held while a new state is made durable; issuing never takes it.
    writing: Mutex<()>,
}

#[derive(Clone)]
struct State {
    bundle: Bundle,
    roots: Vec<Arc<RootKey>>,
    /// SHA-256 of the root that issues.
    active: [u8; 32],
}

struct RootKey {
    certificate: CertificateDer<'static>,
    sha256: [u8; 32],
    not_after: Timestamp,
    issuer: Issuer<'static, KeyPair>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredState {
    trust_domain: TrustDomain,
    sequence: u64,
    /// Lower-case hexadecimal SHA-256.
    active: String,
    roots: Vec<StoredRoot>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredRoot {
    /// Base64 of the DER.
    certificate: String,
    /// Base64 of the PKCS#8.
    key: String,
}

impl Drop for StoredRoot {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl State {
    /// Parameters of a certificate that the active root issues now, and that root.
    fn leaf(&self, life: Duration, now: Timestamp) -> Result<(CertificateParams, &RootKey), CaError> {
        let root = self.roots.iter().find(|root| root.sha256 == self.active).ok_or(CaError::UnknownRoot)?;
        if root.not_after <= now {
            return Err(CaError::RootExpired);
        }
        let not_before = now.saturating_sub(backdate(life)).unwrap_or(Timestamp::MIN);
        let not_after = now.saturating_add(life).unwrap_or(Timestamp::MAX).min(root.not_after);
        let mut params = params(not_before, not_after);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        Ok((params, root))
    }
}

impl CertificateAuthority {
    /// Loads the CA from `state_dir`, or makes it with its first root. `ca.pem` beside it is written anew.
    pub fn create_or_load(state_dir: &Path, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        Self::create_or_load_in(Box::new(FileVault(state_dir.join(STATE_FILE))), state_dir, trust_domain)
    }

    /// The same with its state in `vault`, and `ca.pem` in `folder`.
    pub fn create_or_load_in(
        vault: Box<dyn Vault>,
        folder: &Path,
        trust_domain: &TrustDomain,
    ) -> Result<Self, CaError> {
        atomic::create_private_dir(folder).map_err(|source| CaError::State { path: folder.to_owned(), source })?;
        let state = match load(&*vault, trust_domain)? {
            Some(state) => state,
            None => {
                let state = first_state(trust_domain, Timestamp::now())?;
                save(&*vault, &state)?;
                state
            }
        };
        Self::with(vault, folder, state)
    }

    /// Loads a CA that another process made; `None` as long as it has not.
    pub fn load_in(vault: Box<dyn Vault>, folder: &Path, trust_domain: &TrustDomain) -> Result<Option<Self>, CaError> {
        let state = load(&*vault, trust_domain)?;
        state.map(|state| Self::with(vault, folder, state)).transpose()
    }

    fn with(vault: Box<dyn Vault>, folder: &Path, state: State) -> Result<Self, CaError> {
        save_bundle(folder, &state)?;
        let (folder, state) = (folder.to_owned(), ArcSwap::from_pointee(state));
        Ok(Self { shared: Arc::new(Shared { vault, folder, state, writing: Mutex::new(()) }) })
    }

    /// Takes what another process has changed since. A lower sequence is not taken.
    pub fn reload(&self) -> Result<(), CaError> {
        let _writing = self.shared.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.shared.state.load_full();
        let next = load(&*self.shared.vault, current.bundle.trust_domain())?;
        if let Some(next) = next.filter(|next| next.bundle.sequence() >= current.bundle.sequence()) {
            save_bundle(&self.shared.folder, &next)?;
            self.shared.state.store(Arc::new(next));
        }
        Ok(())
    }

    /// All published roots, with the sequence.
    pub fn bundle(&self) -> Bundle {
        self.shared.state.load().bundle.clone()
    }

    /// SHA-256 of the root that issues: what an invitation pins.
    pub fn active_root_sha256(&self) -> [u8; 32] {
        self.shared.state.load().active
    }

    /// The chain for a CSR, leaf first, without the root.
    pub fn issue(
        &self,
        csr_der: &[u8],
        id: &SpiffeId,
        life: Duration,
        now: Timestamp,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.issue_checked(&CheckedCsr::new(csr_der)?, id, life, now)
    }

    /// As [`CertificateAuthority::issue`], for a CSR that was checked already.
    pub fn issue_checked(
        &self,
        csr: &CheckedCsr,
        id: &SpiffeId,
        life: Duration,
        now: Timestamp,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let state = self.shared.state.load();
        if id.trust_domain() != state.bundle.trust_domain() {
            return Err(CaError::ForeignIdentity(id.clone()));
        }
        let (mut params, root) = state.leaf(life, now)?;
        params.subject_alt_names = vec![uri(&id.to_string())?];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&csr.public_key, &root.issuer)?;
        Ok(vec![certificate.der().clone()])
    }

    /// A certificate with a new key for a server that is verified by its DNS names, by callers outside of the mesh. It names
    /// no SPIFFE ID, so it proves nothing inside.
    pub fn server_certificate(
        &self,
        names: &[String],
        life: Duration,
        now: Timestamp,
    ) -> Result<CertifiedKey, CaError> {
        let state = self.shared.state.load();
        let (mut params, root) = state.leaf(life, now)?;
        let dns = |name: &String| Ok(SanType::DnsName(name.as_str().try_into()?));
        params.subject_alt_names = names.iter().map(dns).collect::<Result<_, CaError>>()?;
        // Told apart from its issuer, which has the same organization: some verifiers look for that first.
        params.distinguished_name.push(DnType::CommonName, "tombolo webhook");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let chain = vec![params.signed_by(&key, &root.issuer)?.der().clone()];
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Ok(CertifiedKey::from_der(chain, key, provider()).map_err(InvalidSvid::Key)?)
    }

    /// An SVID for this process itself, or for a test.
    pub fn issue_svid(
        &self,
        key: &IdentityKey,
        id: &SpiffeId,
        life: Duration,
        now: Timestamp,
    ) -> Result<Svid, CaError> {
        let chain = self.issue(&key.csr_der()?, id, life, now)?;
        Ok(Svid::new(chain, key.private_key_der())?)
    }

    /// Signs the answer to a peering offer with the published root of this SHA-256, which is the one that the
    /// accepting side pins.
    pub fn sign_answer(
        &self,
        root_sha256: [u8; 32],
        exporter: &[u8; EXPORTER_LEN],
        offer: &[u8],
        body: &[u8],
    ) -> Result<Vec<u8>, CaError> {
        let state = self.shared.state.load();
        let root = state.roots.iter().find(|root| root.sha256 == root_sha256).ok_or(CaError::UnknownRoot)?;
        Ok(root.issuer.key().sign(&answer_message(exporter, offer, body))?)
    }

    /// An SVID of this process's own, with a key that is never written, renewed on the current runtime for as
    /// long as the source is used elsewhere.
    pub fn own_svid(&self, id: &SpiffeId, life: Duration) -> Result<SvidSource, CaError> {
        let (ca, id, key, source) = (self.clone(), id.clone(), IdentityKey::generate()?, SvidSource::new());
        source.set(ca.issue_svid(&key, &id, life, Timestamp::now())?);
        let own = source.clone();
        tokio::spawn(async move {
            let mut due = renewal_time(&own);
            while own.is_shared() {
                let now = Timestamp::now();
                if now < due {
                    tokio::time::sleep(due.duration_since(now).unsigned_abs().min(TICK)).await;
                    continue;
                }
                match ca.issue_svid(&key, &id, life, now) {
                    Ok(svid) => {
                        own.set(svid);
                        due = renewal_time(&own);
                    }
                    Err(error) => {
                        tracing::error!(%error, %id, "the own SVID can't be renewed");
                        tokio::time::sleep(TICK).await;
                    }
                }
            }
        });
        Ok(source)
    }

    /// Publishes one more root, with a higher sequence; the active one goes on issuing until
    /// [`CertificateAuthority::activate`]. Durable before it returns. Yields the new root's SHA-256.
    pub fn add_root(&self) -> Result<[u8; 32], CaError> {
        self.change(|state| {
            if state.roots.len() >= ROOTS_MAX {
                return Err(CaError::TooManyRoots);
            }
            let root = new_root(state.bundle.trust_domain(), Timestamp::now())?;
            let sha256 = root.sha256;
            state.roots.push(Arc::new(root));
            Ok(sha256)
        })
    }

    /// Issues from the published root with this SHA-256 from now on. The bundle stays the same.
    pub fn activate(&self, sha256: [u8; 32]) -> Result<(), CaError> {
        self.change(|state| {
            if !state.roots.iter().any(|root| root.sha256 == sha256) {
                return Err(CaError::UnknownRoot);
            }
            state.active = sha256;
            Ok(())
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> Result<T, CaError>) -> Result<T, CaError> {
        let _writing = self.shared.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.shared.state.load_full();
        let mut next = State::clone(&current);
        let result = change(&mut next)?;
        if next.roots.len() != current.roots.len() {
            next.bundle = bundle(current.bundle.trust_domain(), current.bundle.sequence() + 1, &next.roots)?;
        }
        save(&*self.shared.vault, &next)?;
        save_bundle(&self.shared.folder, &next)?;
        self.shared.state.store(Arc::new(next));
        Ok(result)
    }
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.shared.state.load();
        f.debug_struct("CertificateAuthority")
            .field("trust_domain", state.bundle.trust_domain())
            .field("sequence", &state.bundle.sequence())
            .finish_non_exhaustive()
    }
}

fn renewal_time(source: &SvidSource) -> Timestamp {
    source.current().map_or(Timestamp::MIN, |svid| svid.renewal_time(rand::random()))
}

fn backdate(life: Duration) -> Duration {
    (life / 10).min(BACKDATE_MAX)
}

fn first_state(trust_domain: &TrustDomain, now: Timestamp) -> Result<State, CaError> {
    let root = new_root(trust_domain, now)?;
    let active = root.sha256;
    let roots = vec![Arc::new(root)];
    Ok(State { bundle: bundle(trust_domain, 1, &roots)?, roots, active })
}

fn bundle(trust_domain: &TrustDomain, sequence: u64, roots: &[Arc<RootKey>]) -> Result<Bundle, CaError> {
    let roots = roots.iter().map(|root| root.certificate.clone()).collect();
    let invalid = |error: InvalidBundle| CaError::Damaged { path: STATE_FILE.into(), reason: error.to_string() };
    Bundle::new(trust_domain.clone(), sequence, roots).map_err(invalid)
}

fn new_root(trust_domain: &TrustDomain, now: Timestamp) -> Result<RootKey, CaError> {
    let key = KeyPair::generate()?;
    let mut params = params(now.saturating_sub(BACKDATE_MAX).unwrap_or(now), now + ROOT_LIFE);
    params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Two roots of one domain are told apart by their names, so that a path is found at once.
    let mut name = [0_u8; 8];
    fill(&mut name);
    params.distinguished_name.push(DnType::CommonName, format!("root {}", HEXLOWER.encode(&name)));
    let certificate = params.self_signed(&key)?.der().clone();
    root_key(certificate, key)
}

fn root_key(certificate: CertificateDer<'static>, key: KeyPair) -> Result<RootKey, CaError> {
    let damaged = |reason: String| CaError::Damaged { path: STATE_FILE.into(), reason };
    let read = read_root(&certificate).map_err(|refused| damaged(refused.to_string()))?;
    // rcgen takes any key for an issuer, also one that is not the certificate's.
    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).map_err(|error| damaged(error.to_string()))?;
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err(damaged("the key of a root is not that of its certificate".into()));
    }
    let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
    let sha256 = root_sha256(&certificate);
    Ok(RootKey { not_after: timestamp(read.not_after), certificate, sha256, issuer })
}

/// Parameters with a random serial number; that of rcgen would repeat when a key is certified again.
fn params(not_before: Timestamp, not_after: Timestamp) -> CertificateParams {
    let mut params = CertificateParams::default();
    let since_epoch = |time: Timestamp| Duration::from_secs(time.as_second().max(0).unsigned_abs());
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_epoch(not_before);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since_epoch(not_after);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "tombolo");
    let mut serial = [0_u8; 16];
    fill(&mut serial);
    // Positive and not zero (RFC 5280 section 4.1.2.2).
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

fn fill(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).expect("the system's random source works");
}

fn uri(text: &str) -> Result<SanType, CaError> {
    Ok(SanType::URI(text.try_into()?))
}

fn save(vault: &dyn Vault, state: &State) -> Result<(), CaError> {
    let stored = StoredState {
        trust_domain: state.bundle.trust_domain().clone(),
        sequence: state.bundle.sequence(),
        active: HEXLOWER.encode(&state.active),
        roots: state
            .roots
            .iter()
            .map(|root| StoredRoot {
                certificate: BASE64.encode(&root.certificate),
                key: BASE64.encode(root.issuer.key().serialized_der()),
            })
            .collect(),
    };
    let bytes = Zeroizing::new(serde_json::to_vec_pretty(&stored).expect("strings and numbers become JSON"));
    vault.save(&bytes).map_err(|source| CaError::State { path: vault.name(), source })
}

fn save_bundle(folder: &Path, state: &State) -> Result<(), CaError> {
    let path = folder.join(BUNDLE_FILE);
    state.bundle.save(&path).map_err(|source| CaError::State { path, source })
}

fn load(vault: &dyn Vault, trust_domain: &TrustDomain) -> Result<Option<State>, CaError> {
    let bytes = vault.load().map_err(|source| CaError::State { path: vault.name(), source })?;
    bytes.map(|bytes| read(&vault.name(), &bytes, trust_domain)).transpose()
}

fn read(path: &Path, bytes: &[u8], trust_domain: &TrustDomain) -> Result<State, CaError> {
    let damaged = |reason: String| CaError::Damaged { path: path.to_owned(), reason };
    let stored: StoredState = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    if stored.trust_domain != *trust_domain {
        let (found, wanted) = (stored.trust_domain, trust_domain.clone());
        return Err(CaError::OtherDomain { path: path.to_owned(), found, wanted });
    }
    let mut roots = Vec::with_capacity(stored.roots.len());
    for root in &stored.roots {
        let certificate = BASE64.decode(root.certificate.as_bytes()).map_err(|error| damaged(error.to_string()))?;
        let key = BASE64.decode(root.key.as_bytes()).map_err(|error| damaged(error.to_string()))?;
        let key = Zeroizing::new(key);
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key.as_slice()))?;
        roots.push(Arc::new(root_key(certificate.into(), key)?));
    }
    let active = HEXLOWER.decode(stored.active.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok());
    let active = active.ok_or_else(|| damaged("the active root is not named".into()))?;
    if !roots.iter().any(|root| root.sha256 == active) {
        return Err(damaged("the active root is missing".into()));
    }
    Ok(State { bundle: bundle(trust_domain, stored.sequence, &roots)?, roots, active })
}
