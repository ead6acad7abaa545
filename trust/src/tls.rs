//! rustls with SPIFFE identities: TLS 1.3 only, each peer verified against the bundle of its own trust domain
//! at that moment, the own SVID read at each handshake.
//!
//! Resumption and early data are off on both sides: a resumed session skips the verifier, so it would outlive
//! a revocation.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, LazyLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName,
    OtherError, PeerMisbehaved, ServerConfig, SignatureScheme,
};
use tombolo_core::id::{Role, SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;

use crate::bundle::root_sha256;
pub use crate::certificate::Refused;
use crate::certificate::{bad, is_self_signed, read_leaf, read_root};
use crate::store::{Anchors, TrustStore, Usage};
use crate::svid::{SvidSource, unix_time};

/// AES-128-GCM with SHA-256 is preferred: processors have instructions for both. rustls' own first choice hashes
/// with SHA-384, which few have, and that alone costs a sixth of a handshake.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
});

/// The one cryptographic provider of all configurations.
pub fn provider() -> &'static Arc<CryptoProvider> {
    &PROVIDER
}

/// Who may answer when this process dials.
#[derive(Debug, Clone)]
pub enum ServerExpectation {
    /// One of these identities, all of one trust domain.
    Ids { trust_domain: TrustDomain, ids: Arc<BTreeSet<SpiffeId>> },
    /// Any instance of one of tombolo's roles.
    Role { trust_domain: TrustDomain, role: Role },
    /// A role whose chain ends in the self-signed root with this SHA-256. Nothing is looked up in the store:
    /// this is how a cluster is met before its bundle is known.
    PinnedRoot { sha256: [u8; 32], role: Role },
}

/// What is asked of a client's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// It must verify against the bundle of its trust domain, whichever of those in the store.
    Trusted,
    /// It must be present and look like an SVID, and the handshake must be signed by its key. Whether its chain
    /// verifies is for the caller to ask of the store afterwards.
    WellFormed,
    /// It may be absent; if present, as `Trusted`.
    Optional,
}

/// Whether the root follows the chain that a server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootInChain {
    No,
    /// For clients that offer this ALPN: they hold only the root's SHA-256.
    ForAlpn(&'static [u8]),
}

/// A configuration for dialling. Where `svid` has none, no certificate is sent.
pub fn client_config(
    svid: &SvidSource,
    trust: &TrustStore,
    expectation: ServerExpectation,
    alpn: &[&[u8]],
) -> Arc<ClientConfig> {
    let verifier = ServerVerifier { trust: trust.clone(), expectation };
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider supports TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(OwnSvid { svid: svid.clone() }));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Arc::new(config)
}

/// A configuration for accepting. Where `svid` has none, every handshake is refused.
pub fn server_config(
    svid: &SvidSource,
    trust: &TrustStore,
    client_auth: ClientAuth,
    alpn: &[&[u8]],
    root_in_chain: RootInChain,
) -> Arc<ServerConfig> {
    let verifier = ClientVerifier { trust: trust.clone(), client_auth };
    let resolver = OwnChain { svid: svid.clone(), trust: trust.clone(), root_in_chain };
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider supports TLS 1.3")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Arc::new(config)
}

/// For a server that no client shows a certificate to, and that shows one of its own which is no SVID. TLS 1.3 alone, as
/// everywhere.
pub fn plain_server_config(certificate: Arc<dyn ResolvesServerCert>) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider supports TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// The identity that a chain names, without verifying anything: for a connection whose handshake has verified.
pub fn identity_of(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, Refusal> {
    read_leaf(chain).map(|leaf| leaf.id).map_err(|refused| refused.refusal)
}

/// Why this side refused the other, dug out of what a handshake returned. `None`: the cause is another.
pub fn refusal_of(error: &io::Error) -> Option<Refusal> {
    rustls_error(error).and_then(refusal_of_tls)
}

/// Why the other side refused this one, as far as its TLS alert tells. With TLS 1.3 a client whose certificate
/// is refused learns of it at its first read.
pub fn refused_by_peer(error: &io::Error) -> Option<Refusal> {
    match rustls_error(error)? {
        rustls::Error::AlertReceived(alert) => refusal_of_alert((*alert).into()),
        _ => None,
    }
}

/// As [`refusal_of`], for a caller that has the error of rustls itself.
pub fn refusal_of_tls(error: &rustls::Error) -> Option<Refusal> {
    use CertificateError as C;
    match error {
        rustls::Error::InvalidCertificate(certificate) => Some(match certificate {
            C::Expired | C::ExpiredContext { .. } | C::NotValidYet | C::NotValidYetContext { .. } => Refusal::Expired,
            C::Revoked => Refusal::Revoked,
            C::UnknownIssuer => Refusal::UnknownTrustDomain,
            C::ApplicationVerificationFailure => Refusal::IdentityDenied,
            C::InvalidPurpose => Refusal::WrongRole,
            C::Other(OtherError(other)) => {
                other.downcast_ref::<Refused>().map_or(Refusal::BadCertificate, |refused| refused.refusal)
            }
            _ => Refusal::BadCertificate,
        }),
        rustls::Error::NoCertificatesPresented => Some(Refusal::NoCertificate),
        rustls::Error::NoApplicationProtocol => Some(Refusal::BadAlpn),
        _ => None,
    }
}

/// What a TLS alert (RFC 8446 section 6) says about a certificate or ALPN. The configurations of this module
/// send distinct alerts, so that the other side, and a QUIC stack that only shows the alert's number, can tell.
pub fn refusal_of_alert(alert: u8) -> Option<Refusal> {
    match AlertDescription::from(alert) {
        AlertDescription::CertificateExpired => Some(Refusal::Expired),
        AlertDescription::CertificateRevoked => Some(Refusal::Revoked),
        AlertDescription::UnknownCA => Some(Refusal::UnknownTrustDomain),
        AlertDescription::AccessDenied => Some(Refusal::IdentityDenied),
        AlertDescription::UnsupportedCertificate => Some(Refusal::WrongRole),
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown | AlertDescription::DecryptError => {
            Some(Refusal::BadCertificate)
        }
        AlertDescription::CertificateRequired => Some(Refusal::NoCertificate),
        AlertDescription::NoApplicationProtocol => Some(Refusal::BadAlpn),
        _ => None,
    }
}

fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    let mut source = error.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static));
    while let Some(current) = source {
        if let Some(found) = current.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // An io::Error inside an io::Error hides what it wraps from `source`.
        source = match current.downcast_ref::<io::Error>() {
            Some(inner) => inner.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static)),
            None => current.source(),
        };
    }
    None
}

/// The error that makes rustls send the alert which `refusal_of_alert` reads back.
fn tls_error(refused: Refused) -> rustls::Error {
    let certificate = match refused.refusal {
        Refusal::Expired => CertificateError::Expired,
        Refusal::Revoked => CertificateError::Revoked,
        Refusal::UnknownTrustDomain => CertificateError::UnknownIssuer,
        Refusal::IdentityDenied => CertificateError::ApplicationVerificationFailure,
        Refusal::WrongRole => CertificateError::InvalidPurpose,
        _ => CertificateError::Other(OtherError(Arc::new(refused))),
    };
    rustls::Error::InvalidCertificate(certificate)
}

fn collect<'a>(leaf: &CertificateDer<'a>, intermediates: &[CertificateDer<'a>]) -> Vec<CertificateDer<'a>> {
    std::iter::once(leaf).chain(intermediates).cloned().collect()
}

#[derive(Debug)]
struct ServerVerifier {
    trust: TrustStore,
    expectation: ServerExpectation,
}

impl ServerVerifier {
    fn verify(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Refused> {
        let in_store = || self.trust.snapshot().verify_in_detail(chain, Usage::Server, now);
        match &self.expectation {
            ServerExpectation::Ids { trust_domain, ids } => {
                let id = in_store()?;
                if id.trust_domain() != trust_domain || !ids.contains(&id) {
                    return Err(denied("the server's identity is not one of those expected"));
                }
                Ok(())
            }
            ServerExpectation::Role { trust_domain, role } => {
                let id = in_store()?;
                if id.trust_domain() != trust_domain {
                    return Err(denied("the server is of another trust domain than expected"));
                }
                has_role(&id, *role)
            }
            ServerExpectation::PinnedRoot { sha256, role } => verify_pinned(chain, sha256, *role, now),
        }
    }
}

fn denied(detail: &'static str) -> Refused {
    Refused { refusal: Refusal::IdentityDenied, detail }
}

fn has_role(id: &SpiffeId, role: Role) -> Result<(), Refused> {
    if id.as_role() == Some(role) {
        return Ok(());
    }
    Err(Refused { refusal: Refusal::WrongRole, detail: "the identity is not that of the role expected" })
}

/// The chain must end in the pinned root, and the root must be what issued the leaf.
fn verify_pinned(chain: &[CertificateDer<'_>], pin: &[u8; 32], role: Role, now: UnixTime) -> Result<(), Refused> {
    let id = read_leaf(chain)?.id;
    let [rest @ .., root] = chain else { return Err(bad("the chain is empty")) };
    if rest.is_empty() {
        return Err(bad("the root does not follow the chain, so the pin can't be checked"));
    }
    if root_sha256(root) != *pin {
        return Err(bad("the root is not the pinned one"));
    }
    if !is_self_signed(root) {
        return Err(bad("the pinned certificate is not a self-signed root"));
    }
    if read_root(root)?.trust_domain != *id.trust_domain() {
        return Err(bad("the root is of another trust domain than the leaf"));
    }
    Anchors::new(std::slice::from_ref(root)).verify(rest, Usage::Server, now)?;
    has_role(&id, role)
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = collect(end_entity, intermediates);
        self.verify(&chain, now).map_err(tls_error)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct ClientVerifier {
    trust: TrustStore,
    client_auth: ClientAuth,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.client_auth != ClientAuth::Optional
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain = collect(end_entity, intermediates);
        let verified = match self.client_auth {
            ClientAuth::Trusted | ClientAuth::Optional => {
                self.trust.snapshot().verify_in_detail(&chain, Usage::Client, now).map(drop)
            }
            ClientAuth::WellFormed => read_leaf(&chain).map(drop),
        };
        verified.map_err(tls_error)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// That the peer holds the key of the certificate it sent.
fn verify_signature(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
}

/// The client's side of the own SVID.
#[derive(Debug)]
struct OwnSvid {
    svid: SvidSource,
}

impl ResolvesClientCert for OwnSvid {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.svid.current().map(|svid| svid.certified.clone())
    }

    fn has_certs(&self) -> bool {
        self.svid.current().is_some()
    }
}

/// The server's side of the own SVID.
struct OwnChain {
    svid: SvidSource,
    trust: TrustStore,
    root_in_chain: RootInChain,
}

impl fmt::Debug for OwnChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnChain").field("root_in_chain", &self.root_in_chain).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for OwnChain {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let svid = self.svid.current()?;
        let wants_root = match self.root_in_chain {
            RootInChain::No => false,
            RootInChain::ForAlpn(protocol) => hello.alpn().is_some_and(|mut offered| offered.any(|o| o == protocol)),
        };
        if !wants_root {
            return Some(svid.certified.clone());
        }
        let snapshot = self.trust.snapshot();
        let roots = snapshot.bundle(svid.id.trust_domain())?.roots();
        let now = unix_time(jiff::Timestamp::now());
        let issuer = roots
            .iter()
            .find(|root| Anchors::new(std::slice::from_ref(root)).verify(&svid.chain, Usage::Server, now).is_ok())?;
        let chain = svid.chain.iter().chain([issuer]).cloned().collect();
        Some(Arc::new(CertifiedKey::new(chain, svid.certified.key.clone())))
    }
}
