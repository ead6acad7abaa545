//! The documents of the store: where they are, and how their content is read and written.

use std::io;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tombolo_core::id::{ClusterId, TrustDomain};

use super::file;
use super::objects::Objects;

const VERSION: u32 = 1;

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
    #[error("{object} can't be read or written: {reason}")]
    Api { object: String, reason: String },
    #[error(
        "this replica does not lead; ask the one that does, or try again in a moment where none does (`tombolo status` names it)"
    )]
    NotLeading,
    #[error("{object}: another replica has written it since, or somebody has deleted it; this one leads no more")]
    Overtaken { object: String },
}

/// Where the documents are.
pub(super) enum Documents {
    /// Files of a folder.
    Folder(PathBuf),
    /// Objects of an API server.
    Objects(Objects),
}

/// Which document, and what goes with it when it is moved away.
pub(super) struct Contents {
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

impl Documents {
    /// What a document is called in messages.
    pub fn place(&self, name: &str) -> PathBuf {
        match self {
            Documents::Folder(folder) => folder.join(name),
            Documents::Objects(objects) => objects.place(name).into(),
        }
    }

    /// What all of them are called together.
    pub fn whole(&self) -> PathBuf {
        match self {
            Documents::Folder(folder) => folder.parent().unwrap_or(folder).to_owned(),
            Documents::Objects(objects) => objects.whole().into(),
        }
    }

    pub fn load<T: DeserializeOwned>(&self, contents: &Contents) -> Result<Option<T>, StoreError> {
        let path = self.place(contents.name);
        let damaged = |reason: String| StoreError::Damaged { path: path.clone(), reason, lost: contents.lost };
        let octets = match self {
            Documents::Folder(_) => file::load(&path)?,
            Documents::Objects(objects) => objects.read(contents.name)?,
        };
        let Some(octets) = octets else { return Ok(None) };
        // An error of serde_json may quote content; what is quoted of a secret's file would be a hash at most.
        let version: Version = serde_json::from_slice(&octets).map_err(|error| damaged(error.to_string()))?;
        if version.version > VERSION {
            return Err(StoreError::Later { path, version: version.version });
        }
        let content: Content<T> = serde_json::from_slice(&octets).map_err(|error| damaged(error.to_string()))?;
        Ok(Some(content.content))
    }

    pub fn save<T: Serialize>(&self, contents: &Contents, content: &T) -> Result<(), StoreError> {
        let path = self.place(contents.name);
        let octets = serde_json::to_vec_pretty(&Written { version: VERSION, content })
            .map_err(|error| StoreError::Io { path: path.clone(), error: error.into() })?;
        match self {
            Documents::Folder(_) => file::save(&path, &octets),
            Documents::Objects(objects) => objects.write(contents.name, &octets),
        }
    }
}
