#![allow(dead_code, clippy::unwrap_used)]

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tombolo_trust::bundle::Bundle;

use super::domain;

/// A CA that signs whatever it is told to.
pub struct Forger {
    pub name: &'static str,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

pub struct Forged {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Forger {
    pub fn new(name: &'static str) -> Self {
        Self::with(name, |_| {})
    }

    /// A root with its parameters changed.
    pub fn with(name: &'static str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri(&format!("spiffe://{}", domain(name)))];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        change(&mut params);
        Self { name, issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub fn root(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub fn bundle(&self, sequence: u64) -> Bundle {
        Bundle::new(domain(self.name), sequence, vec![self.root()]).unwrap()
    }

    /// A leaf as it should be, with its parameters changed.
    pub fn leaf(&self, path: &str, change: impl FnOnce(&mut CertificateParams)) -> Forged {
        let key = KeyPair::generate().unwrap();
        let mut params = leaf_params(self.name, path);
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Forged { chain: vec![leaf.der().clone()], key: private(&key) }
    }

    /// A leaf below an intermediate CA.
    pub fn leaf_below(&self, path: &str, change: impl FnOnce(&mut CertificateParams)) -> Forged {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "intermediate");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        change(&mut params);
        let intermediate = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &self.issuer).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(self.name, path).signed_by(&key, &intermediate).unwrap();
        Forged { chain: vec![leaf.der().clone(), intermediate.der().clone()], key: private(&key) }
    }
}

fn leaf_params(name: &str, path: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(&format!("spiffe://{}/{path}", domain(name)))];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}

/// Makes a certificate valid from one offset from now to another, in seconds.
pub fn valid(params: &mut CertificateParams, from_s: i64, to_s: i64) {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let at = |offset: i64| {
        let seconds = now.as_secs().checked_add_signed(offset).unwrap();
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds)
    };
    (params.not_before, params.not_after) = (at(from_s), at(to_s));
}
