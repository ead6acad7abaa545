//! Own identities that are revoked.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tombolo_core::id::SpiffeId;

/// Own identities that can be revoked at a time.
pub(super) const REVOKED_MAX: usize = 10_000;

/// Own identities that are revoked; the sequence grows with each change.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Revoked {
    pub sequence: u64,
    pub ids: BTreeSet<SpiffeId>,
}

/// There is no room for one more revoked identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{REVOKED_MAX} identities are revoked already; take back those that are long gone with `tombolo trust unrevoke`"
)]
pub struct TooManyRevoked;

impl Revoked {
    /// Whether `id` was not revoked before.
    pub fn revoke(&mut self, id: SpiffeId) -> Result<bool, TooManyRevoked> {
        if self.ids.contains(&id) {
            return Ok(false);
        }
        if self.ids.len() >= REVOKED_MAX {
            return Err(TooManyRevoked);
        }
        self.ids.insert(id);
        self.sequence += 1;
        Ok(true)
    }

    /// Whether `id` was revoked before.
    pub fn unrevoke(&mut self, id: &SpiffeId) -> bool {
        let was = self.ids.remove(id);
        self.sequence += u64::from(was);
        was
    }
}
