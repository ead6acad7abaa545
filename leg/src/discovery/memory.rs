//! What federation last told, kept in a file, so that a process that restarts while federation is away goes on
//! with it.
//!
//! The file holds the updates as they came, the latest of each kind, and is written at most once a second. It
//! counts for nothing when it is damaged, of another trust domain, or older than [`AGE_MAX`]. How long a process
//! can live on it is bounded by its SVID anyway, which only federation renews.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use prost::Message;
use tokio::sync::Notify;
use tombolo_trust::atomic;
use tombolo_trust::peering::sha256;
use tombolo_trust::store::TrustStore;

use super::link::Side;

/// Above this age nothing of the file is believed.
pub const AGE_MAX: SignedDuration = SignedDuration::from_hours(24);
/// Largest file; services above it are not kept.
const OCTETS_MAX: usize = 32 * 1024 * 1024;
/// Least time between two writes.
const WRITE_PAUSE: Duration = Duration::from_secs(1);
/// The file is written anew this often while federation answers, since its age counts.
const REFRESH: Duration = Duration::from_secs(300);

const MAGIC: &[u8; 16] = b"tombolo-told-1\n\0";
const HEAD_LEN: usize = MAGIC.len() + 32;

/// What an update is about: the latest one counts. In the order in which they are taken again, trust first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Welcome,
    Revoked,
    Bundles,
    Snapshot,
    Gateways,
    InboundPolicies(String),
    Grants,
    AddressRanges,
    AddressBlock(u32),
    AddressesComplete,
    ImportedAddresses,
    Service(String),
}

/// What an update means for the memory.
pub(super) enum Keep {
    Latest(Subject),
    Forget(Subject),
    Nothing,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Told {
    #[prost(int64, tag = "1")]
    saved_unix_ms: i64,
    #[prost(string, tag = "2")]
    trust_domain: String,
    #[prost(bytes = "vec", repeated, tag = "3")]
    updates: Vec<Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct Memory {
    path: PathBuf,
    kept: Mutex<BTreeMap<Subject, Vec<u8>>>,
    changed: Notify,
}

impl Memory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, kept: Mutex::default(), changed: Notify::new() }
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<Subject, Vec<u8>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an update that was taken.
    pub(super) fn note(&self, keep: Keep, octets: impl FnOnce() -> Vec<u8>) {
        match keep {
            Keep::Latest(subject) => _ = self.kept().insert(subject, octets()),
            Keep::Forget(subject) => _ = self.kept().remove(&subject),
            Keep::Nothing => return,
        }
        self.changed.notify_one();
    }

    /// What the file holds, and when it was written; nothing when it can't be believed.
    fn load(&self, trust: &TrustStore, now: Timestamp) -> Option<(Timestamp, Vec<Vec<u8>>)> {
        let octets = match std::fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            read => read.map_err(|error| error.to_string()),
        };
        let path = self.path.display();
        let told = octets.and_then(|octets| decode(&octets).map_err(ToString::to_string));
        let told = told.inspect_err(|reason| tracing::warn!(%path, reason, "what federation last told can't be read"));
        let told = told.ok()?;
        let saved = Timestamp::from_millisecond(told.saved_unix_ms).ok()?;
        let own = trust.snapshot().own().map(ToString::to_string).unwrap_or_default();
        if told.trust_domain != own {
            tracing::warn!(%path, found = told.trust_domain, want = own, "what was last told is of another trust domain");
            return None;
        }
        if now.duration_since(saved) > AGE_MAX {
            tracing::info!(%path, %saved, "what federation last told is too old to go on with");
            return None;
        }
        Some((saved, told.updates))
    }

    fn encode(&self, trust: &TrustStore, now: Timestamp) -> Vec<u8> {
        let trust_domain = trust.snapshot().own().map(ToString::to_string).unwrap_or_default();
        let mut told = Told { saved_unix_ms: now.as_millisecond(), trust_domain, updates: Vec::new() };
        let mut room = OCTETS_MAX;
        for octets in self.kept().values() {
            // Services come last, so that they are what finds no room.
            let Some(left) = room.checked_sub(octets.len() + 8) else { continue };
            room = left;
            told.updates.push(octets.clone());
        }
        encode(&told)
    }
}

/// Takes again what was kept, as if federation had told it just now.
pub(super) fn recall<S: Side>(side: &S, memory: &Memory, trust: &TrustStore) {
    let Some((saved, updates)) = memory.load(trust, Timestamp::now()) else { return };
    let count = updates.len();
    for octets in updates {
        let Ok(update) = S::Update::decode(octets.as_slice()) else { continue };
        let keep = S::keep(&update);
        match side.recall(update) {
            Ok(()) => memory.note(keep, || octets),
            Err(reason) => tracing::warn!(%reason, "an update that was kept is refused"),
        }
    }
    tracing::info!(updates = count, %saved, "going on with what federation last told, until it answers");
    side.status().send_modify(|status| status.remembered = Some(saved));
}

/// Writes the file whenever there is something new, until it is dropped.
pub(super) async fn save<S: Side>(side: Arc<S>, trust: TrustStore) {
    let Some(memory) = side.memory() else { return std::future::pending().await };
    loop {
        tokio::select! {
            () = memory.changed.notified() => {}
            () = tokio::time::sleep(REFRESH) => if !side.status().borrow().connected { continue },
        }
        if side.status().borrow().connected {
            memory.kept().retain(|subject, _| side.wants(subject));
        }
        let (path, octets) = (memory.path.clone(), memory.encode(&trust, Timestamp::now()));
        let written = tokio::task::spawn_blocking(move || atomic::write_private(&path, &octets)).await;
        if let Ok(Err(error)) = written {
            let path = memory.path.display();
            tracing::warn!(%path, %error, "what federation told can't be kept for a restart");
        }
        tokio::time::sleep(WRITE_PAUSE).await;
    }
}

fn encode(told: &Told) -> Vec<u8> {
    let content = told.encode_to_vec();
    [MAGIC.as_slice(), &sha256(&content), &content].concat()
}

fn decode(octets: &[u8]) -> Result<Told, &'static str> {
    if octets.len() > OCTETS_MAX + HEAD_LEN + 1024 {
        return Err("the file is too large");
    }
    let (magic, rest) = octets.split_first_chunk::<16>().ok_or("the file is too short")?;
    let (digest, content) = rest.split_first_chunk::<32>().ok_or("the file is too short")?;
    if magic != MAGIC {
        return Err("it was not written by tombolo, or by another release");
    }
    if sha256(content) != *digest {
        return Err("its checksum is wrong");
    }
    Told::decode(content).map_err(|_| "its content can't be read")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tombolo_trust::ca::CertificateAuthority;

    fn trust(domain: &str) -> TrustStore {
        let folder = tempfile::tempdir().unwrap();
        let trust = TrustStore::new();
        let ca = CertificateAuthority::create_or_load(folder.path(), &domain.parse().unwrap()).unwrap();
        trust.set_own(ca.bundle()).unwrap();
        trust
    }

    #[test]
    fn only_a_whole_and_recent_file_of_the_own_domain_counts() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Memory::new(folder.path().join("told"));
        let (east, now) = (trust("east.tombolo"), Timestamp::now());
        assert_eq!(memory.load(&east, now), None, "no file");
        memory.note(Keep::Latest(Subject::Service("shop/web".into())), || b"web".to_vec());
        memory.note(Keep::Latest(Subject::Service("shop/db".into())), || b"db".to_vec());
        memory.note(Keep::Latest(Subject::Welcome), || b"welcome".to_vec());
        memory.note(Keep::Forget(Subject::Service("shop/db".into())), Vec::new);
        let octets = memory.encode(&east, now);
        std::fs::write(&memory.path, &octets).unwrap();
        let (saved, updates) = memory.load(&east, now + Duration::from_secs(3600)).unwrap();
        assert_eq!(saved.as_millisecond(), now.as_millisecond());
        assert_eq!(updates, [b"welcome".to_vec(), b"web".to_vec()]);
        assert_eq!(memory.load(&east, now + AGE_MAX + Duration::from_secs(1)), None, "too old");
        assert_eq!(memory.load(&trust("west.tombolo"), now), None, "another trust domain");
        for cut in 0..octets.len() {
            std::fs::write(&memory.path, &octets[..cut]).unwrap();
            assert_eq!(memory.load(&east, now), None, "cut at {cut}");
        }
    }

    #[test]
    fn what_is_above_the_limit_is_left_out_services_first() {
        let memory = Memory::new("told".into());
        memory.note(Keep::Latest(Subject::Service("shop/web".into())), || vec![1; OCTETS_MAX]);
        memory.note(Keep::Latest(Subject::Snapshot), || vec![2; 1024]);
        let told = decode(&memory.encode(&trust("east.tombolo"), Timestamp::now())).unwrap();
        assert_eq!(told.updates, [vec![2; 1024]]);
    }
}
