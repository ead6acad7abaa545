//! The X.509 roots of one trust domain, with the sequence that orders them.

use std::io;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use tombolo_api::proto::catalog;
use tombolo_core::bundle::Version;
use tombolo_core::id::{SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;

use crate::atomic;
use crate::certificate::{Refused, read_leaf, read_root};
use crate::peering::sha256;
use crate::store::{Anchors, Usage};
use crate::svid::timestamp;

/// Most roots that one trust domain may publish at a time.
pub const ROOTS_MAX: usize = 16;
/// Largest bundle file that is read, in octets.
const FILE_LEN_MAX: u64 = 1024 * 1024;
/// How long a bundle is current, in seconds, as told to those who only poll.
const REFRESH_HINT_S: u32 = 300;

const SEQUENCE_LABEL: &str = "Sequence: ";
const DOMAIN_LABEL: &str = "Trust-Domain: ";

/// The roots of one trust domain. No roots at all means that everything of the domain is revoked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    trust_domain: TrustDomain,
    sequence: u64,
    roots: Vec<CertificateDer<'static>>,
}

/// Why something is not a trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum InvalidBundle {
    #[error("the trust domain {0:?} is not valid")]
    TrustDomain(String),
    #[error("the bundle has more than {ROOTS_MAX} roots")]
    TooManyRoots,
    #[error("a root is refused: {0}")]
    Root(#[from] Refused),
    #[error("a root belongs to trust domain {found}, the bundle to {expected}")]
    ForeignRoot { expected: TrustDomain, found: TrustDomain },
    #[error("the file names no trust domain and holds no certificate")]
    Empty,
    #[error("the file is not PEM: {0}")]
    Pem(rustls::pki_types::pem::Error),
    #[error("the line {0:?} is not valid")]
    Line(String),
    #[error("can't read {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
}

impl Bundle {
    /// Checks that each root is a CA of this trust domain. The order and repetition of roots do not matter.
    pub fn new(
        trust_domain: TrustDomain,
        sequence: u64,
        mut roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, InvalidBundle> {
        if roots.len() > ROOTS_MAX {
            return Err(InvalidBundle::TooManyRoots);
        }
        for root in &roots {
            let found = read_root(root)?.trust_domain;
            if found != trust_domain {
                return Err(InvalidBundle::ForeignRoot { expected: trust_domain, found });
            }
        }
        roots.sort_by(|one, other| one.as_ref().cmp(other.as_ref()));
        roots.dedup();
        Ok(Self { trust_domain, sequence, roots })
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Sorted by their DER, each once.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// When each root expires, in their order.
    pub fn roots_expire(&self) -> Vec<Timestamp> {
        let roots = self.roots().iter().filter_map(|root| read_root(root).ok());
        roots.map(|root| timestamp(root.not_after)).collect()
    }

    /// What `tombolo_core::bundle::accept` compares.
    pub fn version(&self) -> Version {
        let digests: Vec<[u8; 32]> = self.roots.iter().map(|root| root_sha256(root)).collect();
        Version { sequence: self.sequence, digest: sha256(&digests.concat()) }
    }

    /// Verifies a chain, leaf first, against this bundle alone: for an offer whose bundle is not trusted yet.
    pub fn verify(&self, chain: &[CertificateDer<'_>], usage: Usage, now: UnixTime) -> Result<SpiffeId, Refused> {
        let id = read_leaf(chain)?.id;
        if *id.trust_domain() != self.trust_domain {
            let detail = "the certificate is of another trust domain than the bundle";
            return Err(Refused { refusal: Refusal::UnknownTrustDomain, detail });
        }
        Anchors::new(&self.roots).verify(chain, usage, now)?;
        Ok(id)
    }

    pub fn to_wire(&self) -> catalog::TrustBundle {
        catalog::TrustBundle {
            trust_domain: self.trust_domain.to_string(),
            sequence: self.sequence,
            roots_der: self.roots.iter().map(|root| root.to_vec()).collect(),
            refresh_hint_s: REFRESH_HINT_S,
        }
    }

    pub fn from_wire(wire: catalog::TrustBundle) -> Result<Self, InvalidBundle> {
        let trust_domain = wire.trust_domain.parse().map_err(|_| InvalidBundle::TrustDomain(wire.trust_domain))?;
        Self::new(trust_domain, wire.sequence, wire.roots_der.into_iter().map(CertificateDer::from).collect())
    }

    /// PEM with the trust domain and the sequence as explanatory text in front (RFC 7468 section 2).
    pub fn to_pem(&self) -> String {
        let mut text = format!("{DOMAIN_LABEL}{}\n{SEQUENCE_LABEL}{}\n", self.trust_domain, self.sequence);
        for root in &self.roots {
            text.push_str(&certificate_pem(root));
        }
        text
    }

    /// Reads PEM. Without the explanatory text the trust domain is that of the roots and the sequence is 0.
    pub fn from_pem(text: &[u8]) -> Result<Self, InvalidBundle> {
        let roots = read_certificates(text)?;
        let (mut trust_domain, mut sequence) = (None, 0);
        for line in text.split(|byte| *byte == b'\n').take_while(|line| !line.starts_with(b"-----")) {
            let line = String::from_utf8_lossy(line);
            let line = line.trim_end();
            if let Some(domain) = line.strip_prefix(DOMAIN_LABEL) {
                trust_domain = Some(domain.parse().map_err(|_| InvalidBundle::TrustDomain(domain.to_owned()))?);
            } else if let Some(number) = line.strip_prefix(SEQUENCE_LABEL) {
                sequence = number.parse().map_err(|_| InvalidBundle::Line(line.to_owned()))?;
            }
        }
        let trust_domain = match (trust_domain, roots.first()) {
            (Some(trust_domain), _) => trust_domain,
            (None, Some(root)) => read_root(root)?.trust_domain,
            (None, None) => return Err(InvalidBundle::Empty),
        };
        Self::new(trust_domain, sequence, roots)
    }

    /// Reads a file as [`Bundle::from_pem`] does.
    pub fn load(path: &Path) -> Result<Self, InvalidBundle> {
        let read_error = |source| InvalidBundle::Read { path: path.to_owned(), source };
        let length = std::fs::metadata(path).map_err(read_error)?.len();
        if length > FILE_LEN_MAX {
            return Err(read_error(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB")));
        }
        Self::from_pem(&std::fs::read(path).map_err(read_error)?)
    }

    /// Writes [`Bundle::to_pem`], readable by everybody: roots are public.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        atomic::write_public(path, self.to_pem().as_bytes())
    }
}

/// SHA-256 over the DER of a root: what an invitation pins.
pub fn root_sha256(root: &CertificateDer<'_>) -> [u8; 32] {
    sha256(root)
}

/// One certificate as PEM (RFC 7468).
pub fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    let body = BASE64.encode(certificate);
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// All certificates of a PEM text; other sections are skipped.
pub(crate) fn read_certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, InvalidBundle> {
    CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(InvalidBundle::Pem)
}
