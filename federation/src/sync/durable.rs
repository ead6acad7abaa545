//! What is held of each peer, kept over restarts in the store.
//!
//! It is kept as the run of updates that leads to the state, each with its length in front, as they would
//! come over the wire.

use std::io;

use prost::Message;
use tombolo_api::proto::peer as wire;
use tombolo_core::id::{ClusterId, TrustDomain};
use tombolo_core::import::Import;

use super::wire::{from_wire, to_wire};
use crate::hub::PeerMessage;
use crate::store::{Store, StoreError};

/// What was kept of a peer whose identities lie in `trust_domain`; nothing when there is none or it can't
/// be read, so that everything is asked for again.
pub(crate) async fn load(store: &Store, cluster: &ClusterId, trust_domain: &TrustDomain) -> Import {
    let (store, id) = (store.clone(), cluster.clone());
    let kept = tokio::task::spawn_blocking(move || store.import(&id)).await.expect("reading does not panic");
    let read = match kept {
        Ok(Some(octets)) => decode(&octets, trust_domain).map_err(|error| error.to_string()),
        Ok(None) => Ok(Import::new(trust_domain.clone())),
        Err(error) => Err(error.to_string()),
    };
    read.unwrap_or_else(|error| {
        tracing::warn!(%cluster, error, "what was kept of the peer can't be read; asking for all of it");
        Import::new(trust_domain.clone())
    })
}

/// Makes what is held of a peer durable; nothing is kept of one that is no longer a peer.
pub(crate) async fn save(store: &Store, cluster: &ClusterId, import: Import) -> Result<(), StoreError> {
    let (store, cluster) = (store.clone(), cluster.clone());
    let save = move || store.save_import(&cluster, &encode(&import));
    tokio::task::spawn_blocking(save).await.expect("saving does not panic")
}

/// Forgets a peer.
pub(crate) async fn remove(store: &Store, cluster: &ClusterId) {
    let (store, id) = (store.clone(), cluster.clone());
    let removed = tokio::task::spawn_blocking(move || store.remove_import(&id)).await;
    if let Ok(Err(error)) = removed {
        tracing::error!(%cluster, %error, "what was held of a removed peer could not be deleted");
    }
}

fn encode(import: &Import) -> Vec<u8> {
    let mut bytes = Vec::new();
    for update in import.snapshot() {
        to_wire(&update).encode_length_delimited(&mut bytes).expect("a Vec grows");
    }
    bytes
}

/// A file without its end, or with one update that can't be read, counts for nothing.
fn decode(mut bytes: &[u8], trust_domain: &TrustDomain) -> io::Result<Import> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut import = Import::new(trust_domain.clone());
    while !bytes.is_empty() {
        let update = wire::SyncUpdate::decode_length_delimited(&mut bytes).map_err(|e| invalid(e.to_string()))?;
        match from_wire(update) {
            // What an older release can't read is told again by the peer.
            PeerMessage::Update(update) | PeerMessage::Reduced { update, .. } => {
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

    #[test]
    fn a_damaged_file_counts_for_nothing() {
        let bytes = encode(&import());
        assert_eq!(decode(&bytes, &domain()).unwrap(), import());
        for cut in 1..bytes.len() {
            assert!(decode(&bytes[..cut], &domain()).is_err(), "{cut}");
        }
    }
}
