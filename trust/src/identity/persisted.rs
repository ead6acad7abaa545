//! What the identity client keeps: the key, the newest SVID and the newest bundle, each written atomically.

use std::io;
use std::path::{Path, PathBuf};

use crate::atomic;
use crate::bundle::{Bundle, certificate_pem, read_certificates};
use crate::key::{IdentityKey, KeyError};
use crate::svid::Svid;

/// Within the role's state folder.
pub(super) const FOLDER: &str = "identity";
const SVID_FILE: &str = "svid.pem";

pub(super) fn svid_path(state: &Path) -> PathBuf {
    state.join(FOLDER).join(SVID_FILE)
}

#[derive(Clone)]
pub(super) struct Persisted {
    folder: PathBuf,
}

impl Persisted {
    pub(super) fn open(state: &Path) -> io::Result<Self> {
        let folder = state.join(FOLDER);
        atomic::create_private_dir(&folder)?;
        Ok(Self { folder })
    }

    /// The key, durable when this returns.
    pub(super) fn key(&self) -> Result<IdentityKey, KeyError> {
        IdentityKey::load_or_create(&self.folder.join("key.pem"))
    }

    /// The newest SVID, if there is one that fits the key.
    pub(super) fn svid(&self, key: &IdentityKey) -> Option<Svid> {
        let path = self.folder.join(SVID_FILE);
        let bytes = read(&path)?;
        let svid = read_certificates(&bytes)
            .map_err(|error| error.to_string())
            .and_then(|chain| Svid::new(chain, key.private_key_der()).map_err(|error| error.to_string()));
        svid.inspect_err(|error| tracing::warn!(%error, path = %path.display(), "the kept SVID is not usable")).ok()
    }

    pub(super) fn bundle(&self) -> Option<Bundle> {
        let path = self.folder.join("bundle.pem");
        let bytes = read(&path)?;
        let bundle = Bundle::from_pem(&bytes);
        bundle.inspect_err(|error| tracing::warn!(%error, path = %path.display(), "the kept bundle is not usable")).ok()
    }

    pub(super) fn save(&self, svid: &Svid, bundle: Option<&Bundle>) -> io::Result<()> {
        if let Some(bundle) = bundle {
            bundle.save(&self.folder.join("bundle.pem"))?;
        }
        let pem: String = svid.chain.iter().map(certificate_pem).collect();
        atomic::write_private(&self.folder.join(SVID_FILE), pem.as_bytes())
    }
}

fn read(path: &Path) -> Option<Vec<u8>> {
    match std::fs::read(path) {
        Ok(bytes) => Some(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "a kept file can't be read");
            None
        }
    }
}
