//! The private key of one identity: made once, kept in a file of its own, proven by CSRs.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::atomic;
use crate::peering::sha256;

/// An ECDSA P-256 key. It is never shown in debug output or logs.
pub struct IdentityKey {
    pair: KeyPair,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("can't use the key file {path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the key file {path} is damaged; remove it to start anew with a new join token", path = path.display())]
    Damaged { path: PathBuf },
    #[error("a key or a CSR can't be made: {0}")]
    Generate(#[from] rcgen::Error),
}

impl IdentityKey {
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self { pair: KeyPair::generate()? })
    }

    /// Loads the key, or makes it and writes it (0600). The folder must exist. When this returns, the key is
    /// durable: what is then asked for with it can be asked for again after a crash.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        match std::fs::read(path) {
            Ok(bytes) => {
                let text = Zeroizing::new(String::from_utf8(bytes).unwrap_or_default());
                let pair = KeyPair::from_pem(&text).map_err(|_| KeyError::Damaged { path: path.to_owned() })?;
                Ok(Self { pair })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = Self::generate()?;
                let pem = Zeroizing::new(key.pair.serialize_pem());
                atomic::write_private(path, pem.as_bytes())
                    .map_err(|source| KeyError::File { path: path.to_owned(), source })?;
                Ok(key)
            }
            Err(source) => Err(KeyError::File { path: path.to_owned(), source }),
        }
    }

    /// A CSR that proves possession of the key and asks for nothing.
    pub fn csr_der(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.pair)?.der().to_vec())
    }

    /// PKCS#8, as rustls wants it.
    pub fn private_key_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.pair.serialize_der()).into()
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub fn public_key_sha256(&self) -> [u8; 32] {
        sha256(&self.pair.subject_public_key_info())
    }
}

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdentityKey")
    }
}
