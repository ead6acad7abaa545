//! `trust revoke` and `trust unrevoke`: an identity is named by its SPIFFE ID, and whatever was issued to it
//! counts for nothing, here and at every peer, until that is taken back.

use tombolo_api::proto::operator::{TrustRevokeResponse, TrustUnrevokeResponse};
use tombolo_core::id::{Role, SpiffeId};
use tonic::Status;

use super::{OperatorService, argument, of_store};
use crate::hub::HubGone;
use crate::store::Revoked;

impl OperatorService {
    /// Durable first, then in force; returns when both are done.
    pub(super) async fn revoke(&self, text: &str) -> Result<TrustRevokeResponse, Status> {
        let id = self.own_identity(text)?;
        let refused = |why: &str| Status::failed_precondition(format!("{id} {why}"));
        if id.as_role() == Some(Role::Federation) {
            return Err(refused("is this federation itself; without it nobody could be told of the revocation"));
        }
        let named = id.clone();
        let changed = self.store.off_thread(move |store| {
            let newly = store.change_revoked(|revoked| {
                let newly = revoked.revoke(named.clone())?;
                // Whoever has a gateway's key speaks for workloads without a sidecar, too.
                named.unmeshed_of().map(|unmeshed| revoked.revoke(unmeshed)).transpose()?;
                Ok((newly, revoked.clone()))
            })?;
            // After the revocation, which nobody can join against; a kill in between is mended by asking again.
            let removed = store.change_joins(|entries| entries.remove_identity(&named))?;
            Ok((newly, removed))
        });
        let (newly, removed) = changed.await.map_err(of_store)?;
        let (newly, revoked) =
            newly.map_err(|full: crate::store::TooManyRevoked| refused(&format!("is not revoked: {full}")))?;
        let sequence = self.put_in_force(revoked).await?;
        tracing::info!(%id, sequence, newly, removed, "revoked an identity");
        let join_entries_removed = u32::try_from(removed).unwrap_or(u32::MAX);
        Ok(TrustRevokeResponse { sequence, already: !newly, join_entries_removed })
    }

    pub(super) async fn unrevoke(&self, text: &str) -> Result<TrustUnrevokeResponse, Status> {
        let id = self.own_identity(text)?;
        let named = id.clone();
        let changed = self.store.off_thread(move |store| {
            store.change_revoked(|revoked| {
                let was = revoked.unrevoke(&named);
                named.unmeshed_of().map(|unmeshed| revoked.unrevoke(&unmeshed));
                (was, revoked.clone())
            })
        });
        let (was, revoked) = changed.await.map_err(of_store)?;
        if !was {
            return Err(Status::not_found(format!("{id} is not revoked; see `tombolo status`")));
        }
        let sequence = self.put_in_force(revoked).await?;
        tracing::info!(%id, sequence, "took a revocation back");
        Ok(TrustUnrevokeResponse { sequence })
    }

    fn own_identity(&self, text: &str) -> Result<SpiffeId, Status> {
        let id: SpiffeId = argument("identity", text)?;
        if *id.trust_domain() != self.trust_domain {
            return Err(Status::failed_precondition(format!(
                "{id} is of another trust domain; only its own cluster can revoke it (here: {}). To cut a whole \
                 cluster off, use `tombolo peer remove`",
                self.trust_domain
            )));
        }
        Ok(id)
    }

    async fn put_in_force(&self, Revoked { sequence, ids }: Revoked) -> Result<u64, Status> {
        let told = self.hub.own_revoked(sequence, ids).await;
        told.map_err(|gone: HubGone| Status::unavailable(gone.to_string()))?;
        Ok(sequence)
    }
}
