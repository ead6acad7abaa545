//! One file of the store: read with a clear refusal, written whole.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use tombolo_trust::atomic;
use tombolo_trust::peering::sha256;

use super::documents::StoreError;

const JSON_OCTETS_MAX: u64 = 64 * 1024 * 1024;
pub const IMPORT_OCTETS_MAX: usize = 64 * 1024 * 1024;
/// In front of octets: what they are, and their SHA-256.
const OCTETS_MAGIC: &[u8; 16] = b"tombolo-import-1";

pub fn load(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    read(path, JSON_OCTETS_MAX)
}

pub fn save(path: &Path, octets: &[u8]) -> Result<(), StoreError> {
    if octets.len() as u64 > JSON_OCTETS_MAX {
        return Err(StoreError::TooLarge { path: path.into() });
    }
    atomic::write_private(path, octets).map_err(|error| StoreError::Io { path: path.into(), error })
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
