//! What one cluster publishes to one peer: the state as it is, and a bounded log of the changes that led
//! there, so that a peer which was away for a moment gets only what it missed.
//!
//! Revisions count changes within an epoch. A peer resumes by position: with the changes after it while
//! the log still holds them, with a snapshot otherwise.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::id::{EndpointId, Position, ServiceName, SpiffeId, TrustDomain};
use crate::model::{Endpoint, Export, GatewayAddress};

/// The X.509 roots of the publisher's trust domain, as DER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    pub trust_domain: TrustDomain,
    pub sequence: u64,
    /// Empty revokes the domain.
    pub der: BTreeSet<Vec<u8>>,
}

/// Revoked identities of the publisher's trust domain, under a sequence that only grows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Revocations {
    pub sequence: u64,
    pub ids: BTreeSet<SpiffeId>,
}

/// One change of what is published. Every change names the whole new value of one thing, so that
/// applying it twice is applying it once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Export(Arc<Export>),
    ExportRemoved(ServiceName),
    Endpoint(ServiceName, Endpoint),
    EndpointRemoved(ServiceName, EndpointId),
    Roots(Arc<Roots>),
    Gateways(Arc<Vec<GatewayAddress>>),
    Revocations(Arc<Revocations>),
    /// From here to `Complete` everything that exists is named.
    SnapshotBegin,
    Complete,
    Heartbeat,
}

/// A change with the position at which it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    pub position: Position,
    pub change: Change,
}

/// All that a peer is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Published {
    pub exports: BTreeMap<ServiceName, Arc<Export>>,
    pub roots: Option<Arc<Roots>>,
    /// Never told while empty: a cluster whose gateways are all restarting keeps its addresses.
    pub gateways: Arc<Vec<GatewayAddress>>,
    pub revocations: Arc<Revocations>,
}

impl Published {
    /// The whole state as a run of updates from `SnapshotBegin` to `Complete`.
    pub fn snapshot(&self, position: Position) -> Vec<Update> {
        let mut changes = vec![Change::SnapshotBegin];
        changes.extend(self.roots.clone().map(Change::Roots));
        if !self.gateways.is_empty() {
            changes.push(Change::Gateways(self.gateways.clone()));
        }
        if self.revocations.sequence > 0 {
            changes.push(Change::Revocations(self.revocations.clone()));
        }
        changes.extend(self.exports.values().cloned().map(Change::Export));
        changes.push(Change::Complete);
        changes.into_iter().map(|change| Update { position, change }).collect()
    }
}

/// Changes that the log holds, counted so that an export weighs as much as its endpoints do.
pub const LOG_COST_MAX: usize = 16_384;

/// What is published to one peer, with its recent history.
#[derive(Debug)]
pub struct Publication {
    epoch: u64,
    revision: u64,
    /// Changes up to this revision have left the log.
    floor: u64,
    current: Published,
    log: VecDeque<(u64, Change)>,
    log_cost: usize,
    log_cost_max: usize,
}

impl Publication {
    /// Begins to publish at `revision`, above every one that this epoch has used towards the same peer.
    pub fn new(epoch: u64, revision: u64, log_cost_max: usize) -> Self {
        let (current, log) = (Published::default(), VecDeque::new());
        Self { epoch, revision, floor: revision, current, log, log_cost: 0, log_cost_max }
    }

    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, revision: self.revision }
    }

    /// Replaces what is published, and logs the changes that lead from the old state to the new one.
    /// Bundles and revocations never go back, whatever `next` says. Returns whether anything changed.
    pub fn publish(&mut self, mut next: Published) -> bool {
        self.keep_monotonic(&mut next);
        let changes = changes_between(&self.current, &next);
        self.current = next;
        let changed = !changes.is_empty();
        for change in changes {
            self.revision += 1;
            self.log_cost += cost(&change);
            self.log.push_back((self.revision, change));
        }
        while self.log_cost > self.log_cost_max {
            let (revision, change) = self.log.pop_front().expect("an empty log costs nothing");
            self.log_cost -= cost(&change);
            self.floor = revision;
        }
        changed
    }

    /// What a peer that holds everything up to `from` must be told: the changes since, or a snapshot when
    /// they are no longer (or never were) known.
    pub fn since(&self, from: Position) -> Vec<Update> {
        let known = from.epoch == self.epoch && (self.floor..=self.revision).contains(&from.revision);
        if !known {
            return self.current.snapshot(self.position());
        }
        let first = self.log.partition_point(|(revision, _)| *revision <= from.revision);
        let update =
            |(revision, change): &(u64, Change)| Update { position: self.at(*revision), change: change.clone() };
        self.log.range(first..).map(update).collect()
    }

    fn at(&self, revision: u64) -> Position {
        Position { epoch: self.epoch, revision }
    }

    fn keep_monotonic(&self, next: &mut Published) {
        let sequence = |roots: &Option<Arc<Roots>>| roots.as_ref().map(|roots| roots.sequence);
        if sequence(&next.roots) < sequence(&self.current.roots) {
            next.roots = self.current.roots.clone();
        }
        if next.revocations.sequence < self.current.revocations.sequence {
            next.revocations = self.current.revocations.clone();
        }
        if next.gateways.is_empty() {
            next.gateways = self.current.gateways.clone();
        }
    }
}

fn cost(change: &Change) -> usize {
    match change {
        Change::Export(export) => 1 + export.endpoints.len() + export.routes.len(),
        Change::Revocations(revocations) => 1 + revocations.ids.len(),
        _ => 1,
    }
}

fn changes_between(old: &Published, new: &Published) -> Vec<Change> {
    let mut changes = Vec::new();
    if old.roots != new.roots {
        changes.extend(new.roots.clone().map(Change::Roots));
    }
    if old.gateways != new.gateways {
        changes.push(Change::Gateways(new.gateways.clone()));
    }
    if old.revocations != new.revocations {
        changes.push(Change::Revocations(new.revocations.clone()));
    }
    let gone = old.exports.keys().filter(|service| !new.exports.contains_key(*service));
    changes.extend(gone.cloned().map(Change::ExportRemoved));
    for (service, export) in &new.exports {
        match old.exports.get(service) {
            Some(held) if Arc::ptr_eq(held, export) => {}
            Some(held) => export_changes(held, export, &mut changes),
            None => changes.push(Change::Export(export.clone())),
        }
    }
    changes
}

/// Endpoint by endpoint where only endpoints changed and it is less to say than the whole export.
fn export_changes(old: &Export, new: &Arc<Export>, changes: &mut Vec<Change>) {
    if !same_but_for_endpoints(old, new) {
        changes.push(Change::Export(new.clone()));
        return;
    }
    let service = &new.service;
    let before = changes.len();
    let gone = old.endpoints.keys().filter(|id| !new.endpoints.contains_key(*id));
    changes.extend(gone.map(|id| Change::EndpointRemoved(service.clone(), id.clone())));
    let changed = new.endpoints.iter().filter(|(id, endpoint)| old.endpoints.get(*id) != Some(*endpoint));
    changes.extend(changed.map(|(_, endpoint)| Change::Endpoint(service.clone(), endpoint.clone())));
    if changes.len() - before > new.endpoints.len() {
        changes.truncate(before);
        changes.push(Change::Export(new.clone()));
    }
}

fn same_but_for_endpoints(a: &Export, b: &Export) -> bool {
    let Export { service, created, kind, session_affinity, ports, server_ids, endpoints: _, unmeshed, routes } = a;
    *service == b.service
        && *created == b.created
        && *kind == b.kind
        && *session_affinity == b.session_affinity
        && *ports == b.ports
        && *server_ids == b.server_ids
        && *unmeshed == b.unmeshed
        && *routes == b.routes
}
