//! Peerings that a `ClusterPeer` resource makes, without an invitation.

use std::collections::BTreeMap;

use tombolo_core::id::ClusterId;
use tombolo_core::model::GatewayAddress;
use tombolo_core::source::LocalState;
use tombolo_core::source::declared::DeclaredPeer;
use tombolo_trust::bundle::Bundle;

use super::{Peering, PeeringError};
use crate::hub::PeerRecord;
use crate::source::SourceHandle;

/// Makes and ends peerings as the source declares them, until the source ends.
pub async fn follow_declared(peering: Peering, source: SourceHandle) {
    let mut state = source.state();
    drop(source);
    loop {
        let current = state.borrow_and_update().clone();
        if let Err(error) = peering.apply_declared(&current).await {
            tracing::error!(%error, "a declared peering can't be applied");
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

impl Peering {
    /// Replaces the declared peers by those of `state`.
    pub async fn apply_declared(&self, state: &LocalState) -> Result<(), PeeringError> {
        let bound = self.shared.store.peering().bindings();
        let mut wanted = BTreeMap::new();
        for (cluster, peer) in &state.declared_peers {
            if bound.contains_key(cluster) {
                // The resource's grants are in force; the bundle is that of the peering.
                tracing::debug!(%cluster, "declared, and peered by an invitation already");
                continue;
            }
            match record_of(peer) {
                Some(record) if bound.values().any(|domain| *domain == record.trust_domain) => {
                    tracing::warn!(%cluster, trust_domain = %record.trust_domain,
                        "ClusterPeer claims a trust domain that is bound to another peer; remove that peer first");
                }
                Some(record) => _ = wanted.insert(cluster.clone(), record),
                None => tracing::warn!(%cluster, "ClusterPeer has no valid bundle"),
            }
        }
        let clusters = wanted.keys().cloned().collect();
        let stored =
            self.shared.store.off_thread(move |store| store.change_peering(|state| state.set_declared(clusters)));
        stored.await?;
        let before = std::mem::replace(&mut *self.shared.declared(), wanted.clone());
        for gone in before.keys().filter(|cluster| !wanted.contains_key(*cluster) && !bound.contains_key(*cluster)) {
            self.end_declared(gone.clone()).await?;
        }
        for (cluster, record) in wanted {
            if before.get(&cluster) != Some(&record) {
                tracing::info!(%cluster, trust_domain = %record.trust_domain, "peered by a resource");
                self.shared.relay.peer_added(record).await?;
            }
        }
        Ok(())
    }

    async fn end_declared(&self, cluster: ClusterId) -> Result<(), PeeringError> {
        tracing::info!(%cluster, "the resource of a peer is gone");
        let name = cluster.clone();
        self.shared.store.off_thread(move |store| store.remove_import(&name)).await?;
        Ok(self.shared.relay.peer_removed(cluster).await?)
    }
}

fn record_of(peer: &DeclaredPeer) -> Option<PeerRecord> {
    let (declared, trust_domain) = (peer.bundle.as_ref()?, peer.trust_domain.clone()?);
    let read = Bundle::from_pem(declared.roots_pem.as_bytes()).ok()?;
    let bundle =
        Bundle::new(trust_domain.clone(), declared.sequence.max(read.sequence()), read.roots().to_vec()).ok()?;
    // Their true ids come with the first sync.
    let gateways = peer.gateways.iter().zip(1..).map(|(address, n)| GatewayAddress {
        gateway: format!("declared-{n}").parse().expect("a constant valid label with a number"),
        address: address.clone(),
    });
    Some(PeerRecord {
        cluster: peer.cluster.clone(),
        trust_domain,
        authority: peer.authority.clone(),
        bundle: bundle.to_wire(),
        gateways: gateways.collect(),
    })
}
