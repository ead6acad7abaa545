//! When each export of the own cluster was first seen, which decides conflicts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tombolo_core::id::ServiceName;

/// An export that comes back within this time is the same export, and keeps its first-seen time.
const GONE_AFTER: Duration = Duration::from_secs(60);
/// First-seen times kept, those of exports that have just gone included.
const FIRST_SEEN_MAX: usize = 20_000;

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct FirstSeen(BTreeMap<ServiceName, Seen>);

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Seen {
    first: Timestamp,
    /// When it was found to be exported no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gone: Option<Timestamp>,
}

impl FirstSeen {
    /// When each of `exported`, which is all that is exported now, was first seen.
    pub(super) fn observe(
        &mut self,
        exported: &BTreeSet<ServiceName>,
        now: Timestamp,
    ) -> BTreeMap<ServiceName, Timestamp> {
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
