//! One versioned file of the store: read with a clear refusal, written whole.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tombolo_core::id::{ClusterId, TrustDomain};
use tombolo_trust::atomic;
use tombolo_trust::peering::sha256;

const VERSION: u32 = 1;
const JSON_OCTETS_MAX: u64 = 64 * 1024 * 1024;
pub const IMPORT_OCTETS_MAX: usize = 64 * 1024 * 1024;
/// In front of octets: what they are, and their SHA-256.
const OCTETS_MAGIC: &[u8; 16] = b"tombolo-import-1";

/// Why the store can't be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: {error}; check the state directory's permissions and the space left", path = path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error(
        "{path} is damaged ({reason}); put it back from a backup, or move it away and lose {lost}",
        path = path.display()
    )]
    Damaged { path: PathBuf, reason: String, lost: &'static str },
    #[error("{path} was written by a later release (format {version}); run that release, or put back a backup", path = path.display())]
    Later { path: PathBuf, version: u32 },
    #[error("{path} would become larger than 64 MiB and was not written", path = path.display())]
    TooLarge { path: PathBuf },
    #[error("{path} is locked: another federation runs with this state directory; stop it, or use another directory", path = path.display())]
    InUse { path: PathBuf },
    #[error(
        "{path} is the state of cluster {cluster} (trust domain {trust_domain}); use the state directory of this cluster, or an empty one",
        path = path.display()
    )]
    OtherCluster { path: PathBuf, cluster: ClusterId, trust_domain: TrustDomain },
}

/// Which file, and what goes with it when it is moved away.
pub struct Contents {
    pub name: &'static str,
    pub lost: &'static str,
}

#[derive(Serialize)]
struct Written<'a, T> {
    version: u32,
    content: &'a T,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Content<T> {
    content: T,
}

pub fn load<T: DeserializeOwned>(folder: &Path, contents: &Contents) -> Result<Option<T>, StoreError> {
    let path = folder.join(contents.name);
    let damaged = |reason: String| StoreError::Damaged { path: path.clone(), reason, lost: contents.lost };
    let Some(octets) = read(&path, JSON_OCTETS_MAX)? else { return Ok(None) };
    // An error of serde_json may quote content; what is quoted of a secret's file would be a hash at most.
    let version: Version = serde_json::from_slice(&octets).map_err(|error| damaged(error.to_string()))?;
    if version.version > VERSION {
        return Err(StoreError::Later { path, version: version.version });
    }
    let content: Content<T> = serde_json::from_slice(&octets).map_err(|error| damaged(error.to_string()))?;
    Ok(Some(content.content))
}

pub fn save<T: Serialize>(folder: &Path, contents: &Contents, content: &T) -> Result<(), StoreError> {
    let path = folder.join(contents.name);
    let octets = serde_json::to_vec_pretty(&Written { version: VERSION, content })
        .map_err(|error| StoreError::Io { path: path.clone(), error: error.into() })?;
    if octets.len() as u64 > JSON_OCTETS_MAX {
        return Err(StoreError::TooLarge { path });
    }
    atomic::write_private(&path, &octets).map_err(|error| StoreError::Io { path, error })
}

const IMPORT_LOST: &str = "what the peer had published, until it has been synced again";

pub fn load_octets(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    let damaged = |reason: &str| StoreError::Damaged { path: path.into(), reason: reason.into(), lost: IMPORT_LOST };
    let Some(mut octets) = read(path, IMPORT_OCTETS_MAX as u64 + 48)? else { return Ok(None) };
    let head = octets.split_first_chunk::<16>().filter(|(magic, _)| *magic == OCTETS_MAGIC);
    let (_, rest) = head.ok_or_else(|| damaged("not written by tombolo"))?;
    let (digest, content) = rest.split_first_chunk::<32>().ok_or_else(|| damaged("too short"))?;
    if sha256(content) != *digest {
        return Err(damaged("its checksum is wrong"));
    }
    octets.drain(..48);
    Ok(Some(octets))
}

pub fn save_octets(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let octets = [OCTETS_MAGIC.as_slice(), &sha256(content), content].concat();
    atomic::write_private(path, &octets).map_err(|error| StoreError::Io { path: path.into(), error })
}

pub fn remove(path: &Path) -> Result<(), StoreError> {
    let failed = |error| StoreError::Io { path: path.into(), error };
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(()) => {
            let folder = path.parent().expect("files of the store are in its folder");
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
        }
    }
}

/// Removes what a kill in the middle of a write has left.
pub fn remove_temporaries(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(".tmp") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn read(path: &Path, octets_max: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let failed = |error| StoreError::Io { path: path.into(), error };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let mut octets = Vec::new();
    file.take(octets_max + 1).read_to_end(&mut octets).map_err(failed)?;
    if octets.len() as u64 > octets_max {
        return Err(StoreError::TooLarge { path: path.into() });
    }
    Ok(Some(octets))
}
