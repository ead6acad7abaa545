//! What a federation keeps over restarts: peers and invitations, join entries, what peers published, first-seen times,
//! revocations, virtual addresses and the epoch.
//!
//! It consists of documents, each of which is replaced whole: files of the state directory, or objects of the cluster's
//! API server ([`objects`]). What was changed is durable when the method that changed it returns; if it can't be made
//! durable, the change has not happened. Methods that change something block: see [`Store::off_thread`]. What peers
//! published is kept in the state directory in any case; whoever loses it asks them again.

mod documents;
mod file;
mod first_seen;
pub mod objects;
mod peers;
mod revoked;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tombolo_core::addresses::allocation::Allocations;
use tombolo_core::id::{ClusterId, ServiceName, TrustDomain};
use tombolo_core::join::JoinEntries;
use tombolo_trust::atomic;

pub use documents::StoreError;
use documents::{Contents, Documents};
use file::IMPORT_OCTETS_MAX;
use first_seen::FirstSeen;
use objects::Objects;
pub use peers::PeeringState;
pub use revoked::{Revoked, TooManyRevoked};

/// The durable state of one federation. Clones share it.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    documents: Documents,
    owner: (ClusterId, TrustDomain),
    /// Where imports are kept.
    folder: PathBuf,
    epoch: AtomicU64,
    /// Held for a moment only, so that whoever reads never waits for a disk or an API server.
    state: Mutex<State>,
    /// Held while a change is made durable.
    writing: Mutex<()>,
    changes: watch::Sender<()>,
    /// Held while the process lives, so that no second one writes the same files.
    _lock: Flock<fs::File>,
}

#[derive(Default)]
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

const OWNER: Contents = Contents { name: "cluster.json", lost: "the epoch, which starts anew" };
const PEERING: Contents = Contents { name: "peering.json", lost: "all peers and invitations" };
const JOINS: Contents = Contents { name: "joins.json", lost: "all join entries" };
const FIRST_SEEN: Contents = Contents { name: "first-seen.json", lost: "the age of exports, which decides conflicts" };
const ADDRESSES: Contents = Contents {
    name: "virtual-addresses.json",
    lost: "the virtual addresses of all services, which then get others while clients still have the old ones",
};
const REVOKED: Contents = Contents { name: "revoked.json", lost: "the list of revoked identities" };
/// All documents but the CA's.
pub(crate) const DOCUMENTS: [&str; 6] =
    [OWNER.name, PEERING.name, JOINS.name, FIRST_SEEN.name, ADDRESSES.name, REVOKED.name];

impl Store {
    /// Opens the store below `state`, makes it if it is new, and begins a new epoch.
    pub fn open(
        state: &Path,
        cluster: &ClusterId,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Self, StoreError> {
        let documents = Documents::Folder(state.join(FOLDER));
        let store = Self::new(documents, state, cluster, trust_domain)?;
        store.read()?;
        store.begin_epoch(now)?;
        Ok(store)
    }

    /// Reads the store in `objects`, as whoever does not lead: nothing can be changed before [`Store::lead`]. `state` is
    /// for what can be had again.
    pub fn follow(
        objects: Objects,
        state: &Path,
        cluster: &ClusterId,
        trust_domain: &TrustDomain,
    ) -> Result<Self, StoreError> {
        let store = Self::new(Documents::Objects(objects), state, cluster, trust_domain)?;
        store.read()?;
        Ok(store)
    }

    /// Takes the store over from whoever led before, who can't write to it any more when this returns, and begins a new
    /// epoch.
    pub fn lead(&self, now: Timestamp) -> Result<(), StoreError> {
        let Documents::Objects(objects) = &self.shared.documents else { return Ok(()) };
        let _writing = self.writing();
        objects.begin(OWNER.name, next_epoch(self.owner()?.as_ref(), now))?;
        self.begin_epoch(now)?;
        for name in DOCUMENTS.into_iter().skip(1).chain([objects::CA]) {
            objects.claim(name)?;
        }
        self.read()
    }

    fn new(
        documents: Documents,
        state: &Path,
        cluster: &ClusterId,
        trust_domain: &TrustDomain,
    ) -> Result<Self, StoreError> {
        let folder = state.join(FOLDER);
        let unwritable = |error| StoreError::Io { path: folder.clone(), error };
        atomic::create_private_dir(&folder).map_err(unwritable)?;
        let lock = lock(&folder)?;
        file::remove_temporaries(&folder).map_err(unwritable)?;
        let shared = Shared {
            documents,
            owner: (cluster.clone(), trust_domain.clone()),
            folder,
            epoch: AtomicU64::new(0),
            state: Mutex::default(),
            writing: Mutex::default(),
            changes: watch::Sender::new(()),
            _lock: lock,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Whose state it is; an error when it is another cluster's.
    fn owner(&self) -> Result<Option<Owner>, StoreError> {
        let owner: Option<Owner> = self.shared.documents.load(&OWNER)?;
        match owner {
            Some(owner) if (&owner.cluster, &owner.trust_domain) != (&self.shared.owner.0, &self.shared.owner.1) => {
                let Owner { cluster, trust_domain, .. } = owner;
                Err(StoreError::OtherCluster { path: self.shared.documents.whole(), cluster, trust_domain })
            }
            // What is known is not given up because somebody has deleted it.
            None if self.epoch() > 0 => {
                Err(StoreError::Overtaken { object: self.shared.documents.place(OWNER.name).display().to_string() })
            }
            owner => Ok(owner),
        }
    }

    fn begin_epoch(&self, now: Timestamp) -> Result<(), StoreError> {
        let (cluster, trust_domain) = self.shared.owner.clone();
        let epoch = match &self.shared.documents {
            Documents::Folder(_) => next_epoch(self.owner()?.as_ref(), now),
            Documents::Objects(objects) => objects.epoch(),
        };
        self.shared.documents.save(&OWNER, &Owner { cluster, trust_domain, epoch })?;
        self.shared.epoch.store(epoch, Ordering::Release);
        Ok(())
    }

    /// Reads all documents, in the place of what was read before.
    fn read(&self) -> Result<(), StoreError> {
        let documents = &self.shared.documents;
        let epoch = self.owner()?.map_or(0, |owner| owner.epoch);
        let damaged = |contents: &Contents, reason| StoreError::Damaged {
            path: documents.place(contents.name),
            reason,
            lost: contents.lost,
        };
        let peering: PeeringState = documents.load(&PEERING)?.unwrap_or_default();
        peering.check().map_err(|reason| damaged(&PEERING, reason))?;
        let addresses: Allocations = documents.load(&ADDRESSES)?.unwrap_or_default();
        addresses.check().map_err(|reason| damaged(&ADDRESSES, reason))?;
        let state = State {
            addresses,
            peering,
            joins: documents.load(&JOINS)?.unwrap_or_default(),
            first_seen: documents.load(&FIRST_SEEN)?.unwrap_or_default(),
            revoked: documents.load(&REVOKED)?.unwrap_or_default(),
        };
        *self.state() = state;
        self.shared.epoch.store(epoch, Ordering::Release);
        Ok(())
    }

    /// Reads what the leader has changed since. Blocks.
    pub fn refresh(&self) -> Result<(), StoreError> {
        let _writing = self.writing();
        self.read()?;
        self.shared.changes.send_replace(());
        Ok(())
    }

    /// Marked whenever anything has changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.shared.changes.subscribe()
    }

    /// The epoch of whoever leads: higher than that of any before.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::Acquire)
    }

    /// Runs what makes changes durable on a thread that may block.
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
        self.change(&PEERING, |state| &mut state.peering, change)
    }

    pub fn joins(&self) -> JoinEntries {
        self.state().joins.clone()
    }

    /// Changes the join entries; they are durable when this returns.
    pub fn change_joins<T>(&self, change: impl FnOnce(&mut JoinEntries) -> T) -> Result<T, StoreError> {
        self.change(&JOINS, |state| &mut state.joins, change)
    }

    pub fn revoked(&self) -> Revoked {
        self.state().revoked.clone()
    }

    /// Changes which of the own identities are revoked; it is durable when this returns.
    pub fn change_revoked<T>(&self, change: impl FnOnce(&mut Revoked) -> T) -> Result<T, StoreError> {
        self.change(&REVOKED, |state| &mut state.revoked, change)
    }

    /// Who has which virtual address.
    pub fn addresses(&self) -> Allocations {
        self.state().addresses.clone()
    }

    /// Changes who has which virtual address; it is durable when this returns, together with what it became.
    pub fn change_addresses<T>(
        &self,
        change: impl FnOnce(&mut Allocations) -> T,
    ) -> Result<(Allocations, T), StoreError> {
        let changed = |held: &mut Allocations| {
            let result = change(held);
            (held.clone(), result)
        };
        self.change(&ADDRESSES, |state| &mut state.addresses, changed)
    }

    /// When each of `exported`, which is all that is exported now, was first seen.
    pub fn first_seen(
        &self,
        exported: &BTreeSet<ServiceName>,
        now: Timestamp,
    ) -> Result<BTreeMap<ServiceName, Timestamp>, StoreError> {
        self.change(&FIRST_SEEN, |state| &mut state.first_seen, |seen| seen.observe(exported, now))
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

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.shared.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<V, T>(
        &self,
        contents: &Contents,
        part: impl Fn(&mut State) -> &mut V,
        change: impl FnOnce(&mut V) -> T,
    ) -> Result<T, StoreError>
    where
        V: Clone + PartialEq + Serialize,
    {
        let _writing = self.writing();
        let before = part(&mut self.state()).clone();
        let mut next = before.clone();
        let result = change(&mut next);
        if next != before {
            self.shared.documents.save(contents, &next)?;
            *part(&mut self.state()) = next;
            self.shared.changes.send_replace(());
        }
        Ok(result)
    }
}

/// The folder in the state directory.
const FOLDER: &str = "federation";

/// The clock, so that a state which was lost or restored never repeats an epoch.
fn next_epoch(owner: Option<&Owner>, now: Timestamp) -> u64 {
    let clock = u64::try_from(now.as_second()).unwrap_or(0);
    owner.map_or(0, |owner| owner.epoch).saturating_add(1).max(clock)
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
