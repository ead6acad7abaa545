//! X.509-SVIDs and where the current one is found: every handshake asks a [`SvidSource`], so that a renewal
//! takes effect on new connections and leaves the others alone.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tombolo_core::id::SpiffeId;

use crate::certificate::{Refused, read_leaf};
use crate::tls::provider;

/// The monotonic clock stands still while a machine sleeps, so whoever waits to renew looks at the wall clock
/// this often.
pub(crate) const TICK: Duration = Duration::from_secs(2);

/// An identity with its chain and key.
#[derive(Clone)]
pub struct Svid {
    pub id: SpiffeId,
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    pub certified: Arc<CertifiedKey>,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

/// Why a chain and a key are no SVID.
#[derive(Debug, thiserror::Error)]
pub enum InvalidSvid {
    #[error("the certificate is refused: {0}")]
    Certificate(#[from] Refused),
    #[error("the key does not fit the certificate: {0}")]
    Key(rustls::Error),
}

impl Svid {
    /// Reads identity and validity from the leaf, and checks that the key is the leaf's.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, InvalidSvid> {
        let leaf = read_leaf(&chain)?;
        let certified = CertifiedKey::from_der(chain.clone(), key, provider()).map_err(InvalidSvid::Key)?;
        Ok(Self {
            id: leaf.id,
            chain,
            certified: Arc::new(certified),
            not_before: timestamp(leaf.not_before),
            not_after: timestamp(leaf.not_after),
        })
    }

    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.not_after < now
    }

    /// Half of the life, give or take a twentieth, so that processes started together don't renew together.
    /// `random` is uniform in `0.0..1.0`.
    pub fn renewal_time(&self, random: f64) -> Timestamp {
        let life = self.not_after.duration_since(self.not_before).unsigned_abs();
        let share = 0.45 + 0.1 * random.clamp(0.0, 1.0);
        self.not_before.saturating_add(life.mul_f64(share)).unwrap_or(Timestamp::MAX)
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The latest time that both types can hold bounds the result.
pub(crate) fn timestamp(time: UnixTime) -> Timestamp {
    i64::try_from(time.as_secs()).ok().and_then(|s| Timestamp::from_second(s).ok()).unwrap_or(Timestamp::MAX)
}

/// A wall-clock time as rustls has it; before 1970 is 1970.
pub fn unix_time(now: Timestamp) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(now.as_second().max(0).unsigned_abs()))
}

/// The current SVID of this process. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct SvidSource {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    current: ArcSwapOption<Svid>,
    generation: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self { current: ArcSwapOption::empty(), generation: watch::Sender::new(0) }
    }
}

impl SvidSource {
    /// A source without an SVID: it sends no certificate as a client, and as a server it refuses.
    pub fn new() -> Self {
        Self::default()
    }

    pub fn current(&self) -> Option<Arc<Svid>> {
        self.shared.current.load_full()
    }

    /// The current SVID, as soon as there is one.
    pub async fn wait(&self) -> Arc<Svid> {
        let mut changes = self.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(svid) = self.current() {
                return svid;
            }
            changes.changed().await.expect("the sender lives as long as this source");
        }
    }

    pub fn set(&self, svid: Svid) {
        self.shared.current.store(Some(Arc::new(svid)));
        self.shared.generation.send_modify(|generation| *generation += 1);
    }

    /// Yields whenever the SVID was renewed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// Whether somebody besides the caller still uses this source.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.shared) > 1
    }
}
