//! What is held of each peer, kept over restarts: one file per peer, written whole and in one step.
//!
//! A file is the run of updates that leads to the state, each with its length in front, as they would
//! come over the wire.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use prost::Message;
use tombolo_api::proto::peer as wire;
use tombolo_core::id::{ClusterId, TrustDomain};
use tombolo_core::import::Import;
use tombolo_trust::atomic;

use super::wire::{from_wire, to_wire};
use crate::hub::PeerMessage;

/// The folder with one file per peer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImportStore {
    folder: Arc<Path>,
    /// Peers that may be written: a save that was under way when its peer was removed must not bring it back.
    peers: Arc<Mutex<BTreeSet<ClusterId>>>,
}

impl ImportStore {
    /// Files go into `folder`, which is made when it is first needed.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder: folder.into(), peers: Arc::default() }
    }

    /// What was kept of a peer whose identities lie in `trust_domain`; nothing when there is none or it
    /// can't be read, so that everything is asked for again.
    pub async fn load(&self, cluster: &ClusterId, trust_domain: &TrustDomain) -> Import {
        let (store, cluster, trust_domain) = (self.clone(), cluster.clone(), trust_domain.clone());
        let nothing = Import::new(trust_domain.clone());
        let load = tokio::task::spawn_blocking(move || {
            store.peers.lock().unwrap_or_else(PoisonError::into_inner).insert(cluster.clone());
            match read(&store.path(&cluster), &trust_domain) {
                Ok(import) => import,
                Err(error) => {
                    tracing::warn!(%cluster, %error, "what was kept of the peer can't be read; asking for all of it");
                    Import::new(trust_domain)
                }
            }
        });
        load.await.unwrap_or(nothing)
    }

    /// Makes what is held of a peer durable.
    pub async fn save(&self, cluster: &ClusterId, import: Import) -> io::Result<()> {
        let (store, cluster) = (self.clone(), cluster.clone());
        let save = move || {
            let bytes = encode(&import);
            let peers = store.peers.lock().unwrap_or_else(PoisonError::into_inner);
            if peers.contains(&cluster) {
                atomic::create_private_dir(&store.folder)?;
                atomic::write_private(&store.path(&cluster), &bytes)?;
            }
            Ok(())
        };
        tokio::task::spawn_blocking(save).await.map_err(io::Error::other)?
    }

    /// Forgets a peer.
    pub async fn remove(&self, cluster: &ClusterId) {
        let (store, cluster) = (self.clone(), cluster.clone());
        let remove = move || {
            let mut peers = store.peers.lock().unwrap_or_else(PoisonError::into_inner);
            peers.remove(&cluster);
            match std::fs::remove_file(store.path(&cluster)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!(%cluster, %error, "what was held of a removed peer could not be deleted");
                }
                _ => {}
            }
        };
        let _ = tokio::task::spawn_blocking(remove).await;
    }

    fn path(&self, cluster: &ClusterId) -> PathBuf {
        self.folder.join(format!("{cluster}.updates"))
    }
}

fn encode(import: &Import) -> Vec<u8> {
    let mut bytes = Vec::new();
    for update in import.snapshot() {
        to_wire(&update).encode_length_delimited(&mut bytes).expect("a Vec grows");
    }
    bytes
}

fn read(path: &Path, trust_domain: &TrustDomain) -> io::Result<Import> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Import::new(trust_domain.clone())),
        Err(error) => return Err(error),
    };
    decode(&bytes, trust_domain)
}

/// A file without its end, or with one update that can't be read, counts for nothing.
fn decode(mut bytes: &[u8], trust_domain: &TrustDomain) -> io::Result<Import> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut import = Import::new(trust_domain.clone());
    while !bytes.is_empty() {
        let update = wire::SyncUpdate::decode_length_delimited(&mut bytes).map_err(|e| invalid(e.to_string()))?;
        match from_wire(update) {
            PeerMessage::Update(update) => {
                import.handle_update(update).map_err(|broken| invalid(broken.to_string()))?;
            }
            PeerMessage::Unreadable { reason, .. } => return Err(invalid(reason.unwrap_or_default())),
        }
    }
    if import.in_snapshot() { Err(invalid("the file ends early".into())) } else { Ok(import) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tombolo_core::id::Position;
    use tombolo_core::model::GatewayAddress;
    use tombolo_core::publish::Published;

    fn domain() -> TrustDomain {
        "west.example".parse().unwrap()
    }

    fn import() -> Import {
        let gateways = vec![GatewayAddress { gateway: "gw".parse().unwrap(), address: "192.0.2.1:1".into() }];
        let state = Published { gateways: gateways.into(), ..Default::default() };
        let mut import = Import::new(domain());
        for update in state.snapshot(Position { epoch: 3, revision: 4 }) {
            import.handle_update(update).unwrap();
        }
        import
    }

    #[tokio::test]
    async fn what_is_saved_is_loaded_until_the_peer_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImportStore::new(folder.path().join("imports"));
        let west = "west".parse().unwrap();
        assert_eq!(store.load(&west, &domain()).await, Import::new(domain()));
        store.save(&west, import()).await.unwrap();
        assert_eq!(store.load(&west, &domain()).await, import());
        store.remove(&west).await;
        store.save(&west, import()).await.unwrap();
        assert_eq!(store.load(&west, &domain()).await, Import::new(domain()), "a late save brings nothing back");
    }

    #[test]
    fn a_damaged_file_counts_for_nothing() {
        let bytes = encode(&import());
        assert_eq!(decode(&bytes, &domain()).unwrap(), import());
        for cut in 1..bytes.len() {
            assert!(decode(&bytes[..cut], &domain()).is_err(), "{cut}");
        }
    }
}
