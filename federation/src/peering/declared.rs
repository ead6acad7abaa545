//! Peerings that a `ClusterPeer` resource makes, without an invitation.

use std::collections::BTreeMap;

use tombolo_core::id::{ClusterId, GatewayId, TrustDomain};
use tombolo_core::model::GatewayAddress;
use tombolo_core::source::declared::{DeclaredPeer, Place};
use tombolo_core::source::{LocalState, SourceProblem};
use tombolo_trust::bundle::{Bundle, InvalidBundle};

use super::{Peering, PeeringError};
use crate::hub::PeerRecord;
use crate::source::SourceHandle;
use crate::store::StoreError;

/// Makes and ends peerings as the source declares them, until the source ends.
pub async fn follow_declared(peering: Peering, source: SourceHandle) {
    let mut state = source.state();
    drop(source);
    loop {
        let current = state.borrow_and_update().clone();
        if let Err(error) = peering.apply_declared(&current).await {
            tracing::error!(%error, "a declared peering can't be applied");
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = peering.shared.bindings_changed.notified() => {}
        }
    }
}

/// What is declared and not made, for the operator who wrote it.
fn refused(place: &Place, reason: String) -> SourceProblem {
    SourceProblem { file: place.file.to_string(), line: place.line, reason }
}

impl Peering {
    /// Replaces the declared peers by those of `state`.
    pub async fn apply_declared(&self, state: &LocalState) -> Result<(), PeeringError> {
        let bound = self.shared.store.peering().bindings();
        let (mut wanted, mut problems) = (BTreeMap::new(), Vec::new());
        for (cluster, (place, peer)) in &state.declared_peers {
            match judge(peer, &bound) {
                Ok(Some(record)) => _ = wanted.insert(cluster.clone(), record),
                // The resource's grants are in force; the bundle is that of the peering.
                Ok(None) => tracing::debug!(%cluster, "declared, and peered by an invitation already"),
                Err(reason) => problems.push(refused(place, format!("ClusterPeer {cluster} {reason}"))),
            }
        }
        self.shared.relay.declared_refused(problems).await?;
        let clusters = wanted.keys().cloned().collect();
        let stored =
            self.shared.store.off_thread(move |store| store.change_peering(|state| state.set_declared(clusters)));
        match stored.await {
            // The leader keeps it; all replicas have the same source.
            Ok(()) | Err(StoreError::NotLeading) => {}
            Err(error) => return Err(error.into()),
        }
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

/// The peer that a resource makes beside those that are bound by invitations; none where it is one of them.
fn judge(peer: &DeclaredPeer, bound: &BTreeMap<ClusterId, TrustDomain>) -> Result<Option<PeerRecord>, String> {
    if let Some(domain) = bound.get(&peer.cluster) {
        return match &peer.trust_domain {
            Some(declared) if declared != domain => Err(format!(
                "claims trust domain {declared}, but the cluster was peered by an invitation and is bound to \
                 {domain}; run `tombolo peer remove {}` first",
                peer.cluster
            )),
            _ => Ok(None),
        };
    }
    let record = record_of(peer)?;
    match bound.iter().find(|(_, domain)| **domain == record.trust_domain) {
        Some((other, domain)) => Err(format!(
            "claims trust domain {domain}, which is bound to peer {other}; run `tombolo peer remove {other}` first"
        )),
        None => Ok(Some(record)),
    }
}

fn record_of(peer: &DeclaredPeer) -> Result<PeerRecord, String> {
    let declared = peer.bundle.as_ref().ok_or("has no bundle")?;
    let trust_domain = peer.trust_domain.clone().ok_or("names no trust domain, which one with a bundle must")?;
    let invalid = |error: InvalidBundle| format!("has a bundle that is refused: {error}");
    let read = Bundle::from_pem(declared.roots_pem.as_bytes()).map_err(invalid)?;
    let sequence = declared.sequence.max(read.sequence());
    let bundle = Bundle::new(trust_domain.clone(), sequence, read.roots().to_vec()).map_err(invalid)?;
    let gateways = peer
        .gateways
        .iter()
        .zip(1..)
        .map(|(address, number)| GatewayAddress { gateway: GatewayId::declared(number), address: address.clone() });
    Ok(PeerRecord {
        cluster: peer.cluster.clone(),
        trust_domain,
        authority: peer.authority.clone(),
        bundle: bundle.to_wire(),
        gateways: gateways.collect(),
    })
}
