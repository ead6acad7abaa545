//! Makes what is held of a peer durable while its updates go on: one write at a time, of the newest.
//!
//! The whole of it is written each time, so after a write there is a rest in proportion to what it took: a
//! large import that changes all the time costs a share of the disk, not all of it. What is not durable yet is
//! not acknowledged, and so comes again after a crash.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tombolo_core::id::{ClusterId, Position};
use tombolo_core::import::Import;

use crate::hub::{HubHandle, SyncApplied};
use crate::store::StoreError;

/// A write may take one part in this many of the time, ...
const REST_FACTOR: u32 = 4;
/// ... but acknowledgements never wait longer than this for it.
const REST_MAX: Duration = Duration::from_secs(5);

/// What can be acknowledged.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Durable {
    pub position: Position,
    /// Why an update up to there was refused; the last one.
    pub refused: Option<String>,
}

pub(super) struct Keeping {
    hub: HubHandle,
    cluster: ClusterId,
    /// What has been applied since the last write began.
    waiting: Option<(Option<Box<Import>>, Durable)>,
    writing: Option<Writing>,
    /// When the next write may begin.
    rests_until: Instant,
}

struct Writing {
    task: JoinHandle<Result<(), StoreError>>,
    began: Instant,
    durable: Durable,
}

impl Keeping {
    pub(super) fn new(hub: HubHandle, cluster: ClusterId) -> Self {
        Self { hub, cluster, waiting: None, writing: None, rests_until: Instant::now() }
    }

    /// Takes the outcome of a run of updates, which replaces what was not written yet.
    pub(super) fn take(&mut self, applied: SyncApplied) {
        let SyncApplied { position, keep, refused } = applied;
        let (earlier, told) = self.waiting.take().map_or((None, None), |(keep, told)| (keep, Some(told)));
        let keep = keep.or(earlier);
        let refused = refused.or(told.as_ref().and_then(|told| told.refused.clone()));
        // Nothing is acknowledged in the middle of a snapshot, nor what changed nothing.
        let position = match position {
            Some(position) if keep.is_some() || refused.is_some() => Some(position),
            _ => told.map(|told| told.position),
        };
        self.waiting = position.map(|position| (keep, Durable { position, refused }));
    }

    /// The next that is durable; never, while there is nothing. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Result<Durable, StoreError> {
        loop {
            if let Some(writing) = &mut self.writing {
                let written = (&mut writing.task).await;
                let Writing { began, durable, .. } = self.writing.take().expect("looked at just now");
                self.rests_until = Instant::now() + (began.elapsed() * REST_FACTOR).min(REST_MAX);
                written.expect("writing neither panics nor is cancelled")?;
                return Ok(durable);
            }
            match &self.waiting {
                None => std::future::pending().await,
                Some((Some(_), _)) if Instant::now() < self.rests_until => {
                    tokio::time::sleep_until(self.rests_until).await;
                }
                Some(_) => {}
            }
            let Some((keep, durable)) = self.waiting.take() else { continue };
            let Some(import) = keep else { return Ok(durable) };
            let (hub, cluster) = (self.hub.clone(), self.cluster.clone());
            let task = tokio::spawn(async move { hub.keep(&cluster, *import).await });
            self.writing = Some(Writing { task, began: Instant::now(), durable });
        }
    }
}
