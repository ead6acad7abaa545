//! What an X.509-SVID must look like (X509-SVID, sections 2 to 4), checked in one place for every use.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};
use tombolo_core::id::{SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use webpki::EndEntityCert;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::tls::provider;

/// Largest certificate that is looked into, in octets. SPIFFE IDs are at most 2,048 octets.
pub(crate) const CERTIFICATE_LEN_MAX: usize = 16 * 1024;
/// Longest chain that is looked into: the leaf and its intermediates.
pub(crate) const CHAIN_MAX: usize = 8;

/// Why a certificate, or what was made from it, is not accepted: the reason that is counted, and what
/// exactly was wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{refusal}: {detail}")]
pub struct Refused {
    pub refusal: Refusal,
    pub detail: &'static str,
}

pub(crate) fn bad(detail: &'static str) -> Refused {
    Refused { refusal: Refusal::BadCertificate, detail }
}

/// What a well-formed leaf says about itself. Nothing of it is verified.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) id: SpiffeId,
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
    /// DER of the SubjectPublicKeyInfo.
    pub(crate) public_key: Vec<u8>,
}

/// Reads the leaf of `chain` by the rules for an X.509-SVID: exactly one URI SAN, which is a SPIFFE ID with a
/// path; not a CA; key usage with digitalSignature and without the signing of certificates.
pub(crate) fn read_leaf(chain: &[CertificateDer<'_>]) -> Result<Leaf, Refused> {
    let Some(leaf) = chain.first() else {
        return Err(Refused { refusal: Refusal::NoCertificate, detail: "the chain is empty" });
    };
    if chain.len() > CHAIN_MAX {
        return Err(bad("the chain is longer than allowed"));
    }
    let certificate = parse(leaf)?;
    let uri = single_uri(&certificate)?;
    let id: SpiffeId = uri.parse().map_err(|_| bad("the URI SAN is not a SPIFFE ID with a path"))?;

    let constraints = certificate.basic_constraints().map_err(|_| bad("the basic constraints are malformed"))?;
    if constraints.is_some_and(|extension| extension.value.ca) {
        return Err(bad("the leaf is a CA certificate"));
    }
    let usage = certificate.key_usage().map_err(|_| bad("the key usage is malformed"))?;
    let usage = usage.ok_or_else(|| bad("the leaf has no key usage"))?.value;
    if !usage.digital_signature() {
        return Err(bad("the key usage lacks digitalSignature"));
    }
    if usage.key_cert_sign() || usage.crl_sign() {
        return Err(bad("the key usage of the leaf allows to sign certificates"));
    }
    Ok(Leaf {
        id,
        not_before: unix_time(certificate.validity().not_before.timestamp()),
        not_after: unix_time(certificate.validity().not_after.timestamp()),
        public_key: certificate.public_key().raw.to_vec(),
    })
}

/// What a root says about itself.
#[derive(Debug, Clone)]
pub(crate) struct Root {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
}

/// Reads a root: a CA whose single URI SAN is its trust domain's SPIFFE ID, which has no path.
pub(crate) fn read_root(root: &CertificateDer<'_>) -> Result<Root, Refused> {
    let certificate = parse(root)?;
    let constraints = certificate.basic_constraints().map_err(|_| bad("the basic constraints are malformed"))?;
    if !constraints.is_some_and(|extension| extension.value.ca) {
        return Err(bad("the root is not a CA certificate"));
    }
    let usage = certificate.key_usage().map_err(|_| bad("the key usage is malformed"))?;
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(bad("the key usage of the root lacks keyCertSign"));
    }
    let uri = single_uri(&certificate)?;
    let domain = uri.strip_prefix("spiffe://").ok_or_else(|| bad("the root's URI SAN is not a SPIFFE ID"))?;
    let trust_domain = domain.parse().map_err(|_| bad("the root's URI SAN is not a trust domain without a path"))?;
    Ok(Root {
        trust_domain,
        not_before: unix_time(certificate.validity().not_before.timestamp()),
        not_after: unix_time(certificate.validity().not_after.timestamp()),
    })
}

/// Whether `certificate` is signed by its own key: what a pin to a root may name. webpki takes a root's own
/// signature for granted, so it is checked here.
pub(crate) fn is_self_signed(certificate: &CertificateDer<'_>) -> bool {
    let Ok(parsed) = parse(certificate) else { return false };
    let (message, signature) = (parsed.tbs_certificate.as_ref(), &parsed.signature_value.data);
    parsed.subject().as_raw() == parsed.issuer().as_raw() && signed(certificate, message, signature)
}

/// Whether `signature` over `message` was made with the key of `certificate`.
pub(crate) fn signed(certificate: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> bool {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return false };
    let algorithms = provider().signature_verification_algorithms.all;
    algorithms.iter().any(|algorithm| certificate.verify_signature(*algorithm, message, signature).is_ok())
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Refused> {
    if certificate.len() > CERTIFICATE_LEN_MAX {
        return Err(bad("a certificate is larger than allowed"));
    }
    match X509Certificate::from_der(certificate) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(bad("bytes follow the certificate")),
        Err(_) => Err(bad("the certificate is not valid DER")),
    }
}

fn single_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, Refused> {
    let names = certificate.subject_alternative_name().map_err(|_| bad("the subject alternative name is malformed"))?;
    let names = names.ok_or_else(|| bad("the certificate has no subject alternative name"))?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris.next().ok_or_else(|| bad("the certificate has no URI SAN"))?;
    if uris.next().is_some() {
        return Err(bad("the certificate has more than one URI SAN"));
    }
    Ok(uri)
}

fn unix_time(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds.max(0).unsigned_abs()))
}
