//! Everything of a federation that can't be had again elsewhere, in one file: the CA with its keys, peers, join entries,
//! revocations, virtual addresses, the age of exports. What peers published is not in it; they are asked for it again.
//!
//! A backup is made of a federation that runs or not: each document of the state is replaced whole, so that it is read
//! whole. A backup of a state directory can be restored into an API server, and the other way round.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tombolo_trust::atomic;
use tombolo_trust::peering::sha256;

use crate::config::{Config, SourceConfig, StoreConfig};
use crate::kubernetes::{self, ClientError, Leadership};
use crate::store::objects::{CA, Objects};
use crate::store::{DOCUMENTS, StoreError};

/// The store's folder there.
const FOLDER: &str = "federation";
/// Whose state it is.
const OWNER: &str = "federation/cluster.json";
const VERSION: u32 = 1;
const OCTETS_MAX: u64 = 256 * 1024 * 1024;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Backup {
    /// What this file is, for whoever finds it.
    kind: String,
    version: u32,
    created: Timestamp,
    /// Of all files, one after the other.
    sha256: String,
    /// By their paths in the state directory. All are JSON.
    files: BTreeMap<String, String>,
}

const KIND: &str = "tombolo backup: holds private keys";

/// Why there is no backup, or nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("{path}: {error}; check that it is there and its permissions", path = path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{0} is the state of no federation: {CA} or {OWNER} is missing")]
    NoState(String),
    #[error("{0} holds the state of a federation already; restore into an empty directory or namespace")]
    StateThere(String),
    #[error("this federation's state is in {dir}; name that with --state", dir = .0.display())]
    InDirectory(PathBuf),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("this is no backup of a federation, or it is damaged: {0}; take another one")]
    Damaged(String),
    #[error("the backup was written by a later release (format {0}); restore it with that release")]
    Later(u32),
}

/// All that is in a state directory, as the content of one file. It holds private keys.
pub fn backup(state: &Path, now: Timestamp) -> Result<Vec<u8>, BackupError> {
    let mut files = BTreeMap::new();
    let mut add = |name: String| {
        let path = state.join(&name);
        let text = fs::read_to_string(&path).map_err(|error| BackupError::Io { path, error })?;
        files.insert(name, text);
        Ok::<_, BackupError>(())
    };
    if !state.join(CA).is_file() || !state.join(OWNER).is_file() {
        return Err(BackupError::NoState(state.display().to_string()));
    }
    add(CA.to_owned())?;
    let folder = state.join(FOLDER);
    let unreadable = |error| BackupError::Io { path: folder.clone(), error };
    for entry in fs::read_dir(&folder).map_err(unreadable)? {
        let name = format!("{FOLDER}/{}", entry.map_err(unreadable)?.file_name().to_string_lossy());
        if is_kept(&name) {
            add(name)?;
        }
    }
    seal(files, now)
}

/// All that is in an API server, as the content of one file. It holds private keys. Blocks.
pub fn backup_objects(objects: &Objects, now: Timestamp) -> Result<Vec<u8>, BackupError> {
    let mut files = BTreeMap::new();
    for (name, document) in documents() {
        if let Some(octets) = objects.read(document)? {
            let text = String::from_utf8(octets).map_err(|_| BackupError::Damaged(format!("{document} is no text")))?;
            files.insert(name, text);
        }
    }
    if !files.contains_key(CA) || !files.contains_key(OWNER) {
        return Err(BackupError::NoState(objects.whole()));
    }
    seal(files, now)
}

/// The objects that hold the state of the federation with this configuration. Needs a runtime.
pub async fn objects_of(config: &Config) -> Result<Objects, BackupError> {
    match (&config.source, config.store) {
        (SourceConfig::Kubernetes(kubernetes), StoreConfig::Kubernetes) => {
            let (client, _) = kubernetes::connect(kubernetes).await?;
            // Nothing is written to what a federation writes to.
            Ok(Objects::new(client, &kubernetes.namespace, Leadership::none()))
        }
        _ => Err(BackupError::InDirectory(config.state.clone())),
    }
}

/// The names of all documents in a backup, with their names in the store, the CA's last.
fn documents() -> impl Iterator<Item = (String, &'static str)> {
    DOCUMENTS.into_iter().map(|name| (format!("{FOLDER}/{name}"), name)).chain([(CA.to_owned(), CA)])
}

fn seal(files: BTreeMap<String, String>, now: Timestamp) -> Result<Vec<u8>, BackupError> {
    let backup = Backup { kind: KIND.into(), version: VERSION, created: now, sha256: digest(&files), files };
    serde_json::to_vec(&backup).map_err(|error| BackupError::Damaged(error.to_string()))
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    pub created: Timestamp,
    pub files: usize,
}

/// Reads a backup, and judges all of it.
fn open(file: &Path) -> Result<Backup, BackupError> {
    let unreadable = |error| BackupError::Io { path: file.to_owned(), error };
    if fs::metadata(file).map_err(unreadable)?.len() > OCTETS_MAX {
        return Err(BackupError::Damaged("it is larger than 256 MiB".into()));
    }
    let octets = fs::read(file).map_err(unreadable)?;
    let backup: Backup = serde_json::from_slice(&octets).map_err(|error| BackupError::Damaged(error.to_string()))?;
    if backup.version > VERSION {
        return Err(BackupError::Later(backup.version));
    }
    if backup.kind != KIND || backup.sha256 != digest(&backup.files) {
        return Err(BackupError::Damaged("its contents are not those that were written".into()));
    }
    if let Some(foreign) = backup.files.keys().find(|name| *name != CA && !is_kept(name)) {
        return Err(BackupError::Damaged(format!("{foreign:?} is no file of a federation's state")));
    }
    if !backup.files.contains_key(CA) || !backup.files.contains_key(OWNER) {
        return Err(BackupError::Damaged(format!("{CA} or {OWNER} is missing in it")));
    }
    Ok(backup)
}

/// Puts a backup's content into a state directory that holds no state yet. When this returns it is durable.
pub fn restore(state: &Path, file: &Path) -> Result<Restored, BackupError> {
    let backup = open(file)?;
    if state.join(CA).exists() {
        return Err(BackupError::StateThere(state.display().to_string()));
    }
    let written = |path: PathBuf, text: &str| {
        atomic::write_private(&path, text.as_bytes()).map_err(|error| BackupError::Io { path, error })
    };
    let folder = state.join(FOLDER);
    atomic::create_private_dir(&folder).map_err(|error| BackupError::Io { path: folder, error })?;
    // The CA last: without it a federation begins anew.
    let (ca, others): (Vec<_>, Vec<_>) = backup.files.iter().partition(|(name, _)| *name == CA);
    for (name, text) in others.into_iter().chain(ca) {
        written(state.join(name), text)?;
    }
    Ok(Restored { created: backup.created, files: backup.files.len() })
}

/// Puts a backup's content into an API server that holds no state yet. When this returns it is durable. Blocks.
pub fn restore_objects(objects: &Objects, file: &Path, now: Timestamp) -> Result<Restored, BackupError> {
    let backup = open(file)?;
    if objects.read(CA)?.is_some() {
        return Err(BackupError::StateThere(objects.whole()));
    }
    let write = u64::try_from(now.as_microsecond()).unwrap_or(0);
    for (name, document) in documents() {
        if let Some(text) = backup.files.get(&name) {
            objects.restore(document, text.as_bytes(), write)?;
        }
    }
    Ok(Restored { created: backup.created, files: backup.files.len() })
}

/// A file of the store: `federation/<name>.json`.
fn is_kept(name: &str) -> bool {
    let name = name.strip_prefix(FOLDER).and_then(|rest| rest.strip_prefix('/')?.strip_suffix(".json"));
    name.is_some_and(|name| !name.is_empty() && name.bytes().all(|octet| octet.is_ascii_lowercase() || octet == b'-'))
}

fn digest(files: &BTreeMap<String, String>) -> String {
    let all: String = files.iter().map(|(name, text)| format!("{name} {}\n{text}\n", text.len())).collect();
    HEXLOWER.encode(&sha256(all.as_bytes()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn state() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(FOLDER)).unwrap();
        for (name, text) in
            [(CA, "keys"), (OWNER, "owner"), ("federation/peering.json", "peers"), ("operator.sock", "")]
        {
            fs::write(folder.path().join(name), text).unwrap();
        }
        fs::write(folder.path().join("federation/lock"), "").unwrap();
        folder
    }

    #[test]
    fn what_is_restored_is_what_was_there_and_nothing_is_overwritten() {
        let (from, to) = (state(), tempfile::tempdir().unwrap());
        let file = from.path().join("backup");
        fs::write(&file, backup(from.path(), Timestamp::UNIX_EPOCH).unwrap()).unwrap();
        let restored = restore(to.path(), &file).unwrap();
        assert_eq!(restored, Restored { created: Timestamp::UNIX_EPOCH, files: 3 });
        assert_eq!(fs::read_to_string(to.path().join(CA)).unwrap(), "keys");
        assert_eq!(fs::read_to_string(to.path().join("federation/peering.json")).unwrap(), "peers");
        assert!(!to.path().join("federation/lock").exists());
        assert!(matches!(restore(to.path(), &file), Err(BackupError::StateThere(_))));
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(backup(empty.path(), Timestamp::UNIX_EPOCH), Err(BackupError::NoState(_))));
    }

    #[test]
    fn a_file_that_is_not_what_was_written_is_refused_and_nothing_is_written() {
        let (from, to) = (state(), tempfile::tempdir().unwrap());
        let good = String::from_utf8(backup(from.path(), Timestamp::UNIX_EPOCH).unwrap()).unwrap();
        let file = from.path().join("backup");
        for bad in [
            good.replace("peers", "pears"),
            good.replace("federation/peering.json", "federation/../../x.json"),
            good.replace("\"version\":1", "\"version\":2"),
            good[..good.len() / 2].to_owned(),
            String::new(),
        ] {
            fs::write(&file, &bad).unwrap();
            let refused = restore(to.path(), &file).unwrap_err();
            assert!(matches!(refused, BackupError::Damaged(_) | BackupError::Later(2)), "{bad}: {refused}");
            assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0, "{bad}");
        }
        // One with the right sum and a name that leads elsewhere.
        let mut crafted: Backup = serde_json::from_str(&good).unwrap();
        crafted.files.insert("federation/../../x.json".into(), "x".into());
        crafted.sha256 = digest(&crafted.files);
        fs::write(&file, serde_json::to_vec(&crafted).unwrap()).unwrap();
        assert!(matches!(restore(to.path(), &file), Err(BackupError::Damaged(_))));
    }
}
