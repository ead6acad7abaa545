//! Tells when something below a directory may have changed. Only a hint: the scan decides.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

/// A change is acted on when nothing has followed it for this long, ...
const QUIET: Duration = Duration::from_millis(40);
/// ... or when changes have gone on for this long.
const PATIENCE: Duration = Duration::from_millis(400);
/// The safety net for file systems and moments in which no event comes.
const RESCAN: Duration = Duration::from_secs(5);

/// Watches a directory that may not exist yet, or be replaced.
pub struct Hints {
    root: PathBuf,
    touched: watch::Receiver<()>,
    touch: watch::Sender<()>,
    watched: Option<(RecommendedWatcher, (u64, u64))>,
}

impl Hints {
    pub fn new(root: PathBuf) -> Self {
        let (touch, touched) = watch::channel(());
        let mut hints = Self { root, touched, touch, watched: None };
        hints.renew();
        hints
    }

    /// Waits for a change that has settled, or for the next time to look anyway: `again`, or the rescan.
    pub async fn next(&mut self, again: Option<Duration>) {
        let until = Instant::now() + again.map_or(RESCAN, |again| again.min(RESCAN));
        tokio::select! {
            changed = self.touched.changed() => changed.expect("the sender is held beside it"),
            () = sleep_until(until) => {}
        }
        let patience = Instant::now() + PATIENCE;
        while Instant::now() < patience && timeout(QUIET, self.touched.changed()).await.is_ok() {}
        self.renew();
    }

    /// Watches the directory of that name anew when it is another one than before.
    fn renew(&mut self) {
        let Some(identity) = identity(&self.root) else {
            self.watched = None;
            return;
        };
        if self.watched.as_ref().is_some_and(|(_, watched)| *watched == identity) {
            return;
        }
        match watcher(&self.root, self.touch.clone()) {
            Ok(watcher) => self.watched = Some((watcher, identity)),
            Err(error) => {
                self.watched = None;
                tracing::warn!(directory = %self.root.display(), %error, rescan = ?RESCAN,
                    "the source directory can't be watched; changes are found by looking at intervals");
            }
        }
    }
}

fn identity(root: &Path) -> Option<(u64, u64)> {
    fs::metadata(root).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn watcher(root: &Path, touch: watch::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Our own reading makes access events, and must not wake us up again.
        let is_change = event.map_or(true, |event| !matches!(event.kind, EventKind::Access(_)));
        if is_change {
            touch.send_replace(());
        }
    })?;
    watcher.watch(root, RecursiveMode::Recursive)?;
    Ok(watcher)
}
