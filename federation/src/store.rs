//! What a federation keeps over restarts, in its state directory: peers and invitations, join entries,
//! what peers published, first-seen times, revocations and the epoch.
//!
//! Each file is replaced whole, so that a kill at any moment leaves the old or the new content.
//! What was changed is durable when the method that changed it returns; if it can't be made durable,
//! the change has not happened. Methods write files and so block: see [`Store::off_thread`].

mod file;
mod peers;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tombolo_core::addresses::allocation::Allocations;
use tombolo_core::id::{ClusterId, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::join::JoinEntries;
use tombolo_trust::atomic;

pub use file::StoreError;
use file::{Contents, IMPORT_OCTETS_MAX};
pub use peers::PeeringState;

/// An export that comes back within this time is the same export, and keeps its first-seen time.
const GONE_AFTER: Duration = Duration::from_secs(60);
/// First-seen times kept, those of exports that have just gone included.
const FIRST_SEEN_MAX: usize = 20_000;
/// Own identities that can be revoked at a time.
const REVOKED_MAX: usize = 10_000;

/// The durable state of one federation. Clones share it.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    folder: PathBuf,
    epoch: u64,
    state: Mutex<State>,
    /// Held while the process lives, so that no second one writes the same files.
    _lock: Flock<fs::File>,
}

struct State {
    peering: PeeringState,
    joins: JoinEntries,
    first_seen: FirstSeen,
    revoked: Revoked,
    addresses: Allocations,
}

/// Whose state it is, and how often it was opened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Owner {
    cluster: ClusterId,
    trust_domain: TrustDomain,
    epoch: u64,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
struct FirstSeen(BTreeMap<ServiceName, Seen>);

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Seen {
    first: Timestamp,
    /// When it was found to be exported no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gone: Option<Timestamp>,
}

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

const OWNER: Contents = Contents { name: "cluster.json", lost: "the epoch, which starts anew" };
const PEERING: Contents = Contents { name: "peering.json", lost: "all peers and invitations" };
const JOINS: Contents = Contents { name: "joins.json", lost: "all join entries" };
const FIRST_SEEN: Contents = Contents { name: "first-seen.json", lost: "the age of exports, which decides conflicts" };
const ADDRESSES: Contents = Contents {
    name: "virtual-addresses.json",
    lost: "the virtual addresses of all services, which then get others while clients still have the old ones",
};
const REVOKED: Contents = Contents { name: "revoked.json", lost: "the list of revoked identities" };

impl Store {
    /// Opens the store below `state`, makes it if it is new, and begins a new epoch.
    pub fn open(
        state: &Path,
        cluster: &ClusterId,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Self, StoreError> {
        let folder = state.join("federation");
        let unwritable = |error| StoreError::Io { path: folder.clone(), error };
        atomic::create_private_dir(&folder).map_err(unwritable)?;
        let lock = lock(&folder)?;
        file::remove_temporaries(&folder).map_err(unwritable)?;
        let owner: Option<Owner> = file::load(&folder, &OWNER)?;
        if let Some(owner) = &owner
            && (owner.cluster != *cluster || owner.trust_domain != *trust_domain)
        {
            let (cluster, trust_domain) = (owner.cluster.clone(), owner.trust_domain.clone());
            return Err(StoreError::OtherCluster { path: state.into(), cluster, trust_domain });
        }
        // The clock, so that a state directory which was lost or restored never repeats an epoch.
        let clock = u64::try_from(now.as_second()).unwrap_or(0);
        let epoch = owner.map_or(0, |owner| owner.epoch).saturating_add(1).max(clock);
        let peering: PeeringState = file::load(&folder, &PEERING)?.unwrap_or_default();
        peering.check().map_err(|reason| StoreError::Damaged {
            path: folder.join(PEERING.name),
            reason,
            lost: PEERING.lost,
        })?;
        let addresses: Allocations = file::load(&folder, &ADDRESSES)?.unwrap_or_default();
        addresses.check().map_err(|reason| StoreError::Damaged {
            path: folder.join(ADDRESSES.name),
            reason,
            lost: ADDRESSES.lost,
        })?;
        let state = State {
            addresses,
            peering,
            joins: file::load(&folder, &JOINS)?.unwrap_or_default(),
            first_seen: file::load(&folder, &FIRST_SEEN)?.unwrap_or_default(),
            revoked: file::load(&folder, &REVOKED)?.unwrap_or_default(),
        };
        let owner = Owner { cluster: cluster.clone(), trust_domain: trust_domain.clone(), epoch };
        file::save(&folder, &OWNER, &owner)?;
        Ok(Self { shared: Arc::new(Shared { folder, epoch, state: Mutex::new(state), _lock: lock }) })
    }

    /// The epoch of this process: higher than that of any before it.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// Runs what writes files on a thread that may block.
    pub async fn off_thread<T: Send + 'static>(&self, work: impl FnOnce(&Store) -> T + Send + 'static) -> T {
        let store = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.expect("the work neither panics nor is cancelled")
    }

    /// Peers and invitations as they are now.
    pub fn peering(&self) -> PeeringState {
        self.state().peering.clone()
    }

    /// Changes peers and invitations together: both are durable when this returns, or neither.
    pub fn change_peering<T>(&self, change: impl FnOnce(&mut PeeringState) -> T) -> Result<T, StoreError> {
        let mut state = self.state();
        self.change(&mut state.peering, &PEERING, change)
    }

    pub fn joins(&self) -> JoinEntries {
        self.state().joins.clone()
    }

    /// Changes the join entries; they are durable when this returns.
    pub fn change_joins<T>(&self, change: impl FnOnce(&mut JoinEntries) -> T) -> Result<T, StoreError> {
        let mut state = self.state();
        self.change(&mut state.joins, &JOINS, change)
    }

    pub fn revoked(&self) -> Revoked {
        self.state().revoked.clone()
    }

    /// Changes which of the own identities are revoked; it is durable when this returns.
    pub fn change_revoked<T>(&self, change: impl FnOnce(&mut Revoked) -> T) -> Result<T, StoreError> {
        let mut state = self.state();
        self.change(&mut state.revoked, &REVOKED, change)
    }

    /// Changes who has which virtual address; it is durable when this returns, together with what it became.
    pub fn change_addresses<T>(
        &self,
        change: impl FnOnce(&mut Allocations) -> T,
    ) -> Result<(Allocations, T), StoreError> {
        let mut state = self.state();
        let result = self.change(&mut state.addresses, &ADDRESSES, change)?;
        Ok((state.addresses.clone(), result))
    }

    /// When each of `exported`, which is all that is exported now, was first seen.
    pub fn first_seen(
        &self,
        exported: &BTreeSet<ServiceName>,
        now: Timestamp,
    ) -> Result<BTreeMap<ServiceName, Timestamp>, StoreError> {
        let mut state = self.state();
        self.change(&mut state.first_seen, &FIRST_SEEN, |seen| seen.observe(exported, now))
    }

    /// What a peer had published when [`Store::save_import`] was last called, in the caller's encoding.
    pub fn import(&self, cluster: &ClusterId) -> Result<Option<Vec<u8>>, StoreError> {
        file::load_octets(&self.import_path(cluster))
    }

    /// Keeps what a peer has published; at most 64 MiB.
    pub fn save_import(&self, cluster: &ClusterId, octets: &[u8]) -> Result<(), StoreError> {
        let path = self.import_path(cluster);
        if octets.len() > IMPORT_OCTETS_MAX {
            return Err(StoreError::TooLarge { path });
        }
        // Under the lock, so that a peer that is being removed leaves no file behind.
        let state = self.state();
        if !state.peering.knows(cluster) {
            return Ok(());
        }
        file::save_octets(&path, octets)
    }

    /// Forgets what a peer has published.
    pub fn remove_import(&self, cluster: &ClusterId) -> Result<(), StoreError> {
        let _state = self.state();
        file::remove(&self.import_path(cluster))
    }

    fn import_path(&self, cluster: &ClusterId) -> PathBuf {
        self.shared.folder.join(format!("import-{cluster}"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("no holder of the lock panics")
    }

    fn change<V, T>(
        &self,
        value: &mut V,
        contents: &Contents,
        change: impl FnOnce(&mut V) -> T,
    ) -> Result<T, StoreError>
    where
        V: Clone + PartialEq + Serialize,
    {
        let mut next = value.clone();
        let result = change(&mut next);
        if next != *value {
            file::save(&self.shared.folder, contents, &next)?;
            *value = next;
        }
        Ok(result)
    }
}

fn lock(folder: &Path) -> Result<Flock<fs::File>, StoreError> {
    let path = folder.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(|error| StoreError::Io { path: path.clone(), error })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        nix::errno::Errno::EWOULDBLOCK => StoreError::InUse { path },
        error => StoreError::Io { path, error: error.into() },
    })
}

impl FirstSeen {
    fn observe(&mut self, exported: &BTreeSet<ServiceName>, now: Timestamp) -> BTreeMap<ServiceName, Timestamp> {
        let gone_for_good =
            |seen: &Seen| seen.gone.is_some_and(|gone| now.duration_since(gone).unsigned_abs() > GONE_AFTER);
        self.0.retain(|_, seen| !gone_for_good(seen));
        for (service, seen) in &mut self.0 {
            match (exported.contains(service), seen.gone) {
                (true, _) => seen.gone = None,
                (false, None) => seen.gone = Some(now),
                (false, Some(_)) => {}
            }
        }
        for service in exported {
            if self.0.len() < FIRST_SEEN_MAX {
                self.0.entry(service.clone()).or_insert(Seen { first: now, gone: None });
            }
        }
        self.0.iter().filter(|(_, seen)| seen.gone.is_none()).map(|(name, seen)| (name.clone(), seen.first)).collect()
    }
}
