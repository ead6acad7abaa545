//! The peers in the hub's state: what is held of each, and what each is told.

use std::sync::Arc;
use std::time::Instant;

use tombolo_core::freshness;
use tombolo_core::id::{ClusterId, Position};
use tombolo_core::import::Import;
use tombolo_core::model::{Authority, Freshness};
use tombolo_core::publish::{Change, Publication, Published, Roots, Update};
use tombolo_trust::bundle::Bundle;

use super::state::State;
use super::view::PeerView;
use super::{Imports, PeerMessage, PeerRecord, SyncApplied, SyncEnds};
use crate::sync::wire::{bundle_of, roots_of};

/// Characters kept of a refusal that a peer reports.
const REFUSED_LEN_MAX: usize = 500;

pub(super) struct Peer {
    record: PeerRecord,
    publication: Publication,
    /// When the peer last said anything, or when we began to listen.
    heard: Instant,
    /// When the peer last said anything to this process.
    last_heard: Option<Instant>,
    clock_ahead_ms: Option<i64>,
    freshness: Freshness,
    /// The bundle in force: the one of the peering, or a later one.
    pub(super) bundle: Option<Bundle>,
    pub(super) last_refusal: Option<String>,
    acked: Position,
    refused_there: Option<String>,
}

impl Peer {
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self.freshness {
            Freshness::Fresh => Some(self.heard + freshness::SILENCE_MAX),
            Freshness::Stale | Freshness::Draining => None,
        }
    }
}

impl State {
    pub(super) fn handle_peer_added(&mut self, record: PeerRecord, mut import: Import, now: Instant) {
        let cluster = record.cluster.clone();
        let known = self.peers.get(&cluster).is_some_and(|known| known.record.trust_domain == record.trust_domain);
        if known {
            // What is in memory is at least as new as what was kept.
            if let Some(roots) = exchanged_roots(&record) {
                self.catalog.handle_roots(&cluster, roots);
            }
        } else {
            self.handle_peer_removed(&cluster);
            if let Some(roots) = exchanged_roots(&record) {
                import.seed_roots(roots);
            }
            let changed = self.catalog.handle_peer_added(cluster.clone(), record.authority.clone(), import);
            self.dirty.services |= !changed.is_empty();
        }
        let bundle = self.imported_bundle(&cluster);
        let publication = Publication::new(self.epoch, self.revision_floor, self.log_cost_max);
        let peer = self.peers.entry(cluster).or_insert_with(|| Peer {
            record: record.clone(),
            publication,
            heard: now,
            last_heard: None,
            clock_ahead_ms: None,
            freshness: Freshness::Fresh,
            bundle: None,
            last_refusal: None,
            acked: Position::default(),
            refused_there: None,
        });
        (peer.record, peer.bundle) = (record, bundle);
        (self.dirty.trust, self.dirty.publish, self.dirty.view) = (true, true, true);
        self.commit_authorities();
    }

    pub(super) fn handle_peer_removed(&mut self, cluster: &ClusterId) {
        let Some(peer) = self.peers.remove(cluster) else { return };
        self.revision_floor = self.revision_floor.max(peer.publication.position().revision);
        let changed = self.catalog.handle_peer_removed(cluster);
        self.dirty.services |= !changed.is_empty();
        (self.dirty.trust, self.dirty.view) = (true, true);
    }

    pub(super) fn handle_sync_began(&mut self, cluster: &ClusterId) -> Option<Position> {
        self.catalog.handle_reconnect(cluster);
        Some(self.catalog.import(cluster)?.position())
    }

    pub(super) fn handle_sync(
        &mut self,
        cluster: &ClusterId,
        messages: Vec<PeerMessage>,
        now: Instant,
    ) -> Result<SyncApplied, SyncEnds> {
        let before = self.catalog.import(cluster).ok_or(SyncEnds::NoPeer)?.position();
        let mut refused = None;
        let (mut touched_any, mut broken) = (false, None);
        for message in messages {
            let (update, unread) = match message {
                PeerMessage::Update(update) => (update, None),
                PeerMessage::Reduced { update, reason } => (update, Some(reason)),
                PeerMessage::Unreadable { position, reason } => {
                    self.catalog.handle_unreadable(cluster, position);
                    refused = reason.or(refused);
                    continue;
                }
            };
            match self.handle_update(cluster, update) {
                Ok((touched, refusal)) => {
                    touched_any |= touched;
                    refused = refusal.or(unread).or(refused);
                }
                Err(ends) => {
                    broken = Some(ends);
                    break;
                }
            }
        }
        let peer = self.peers.get_mut(cluster).ok_or(SyncEnds::NoPeer)?;
        (peer.heard, peer.last_heard) = (now, Some(now));
        if let Some(reason) = &refused {
            tracing::warn!(%cluster, reason, "an update of the peer is refused");
            self.updates_refused.inc();
            peer.last_refusal = Some(reason.clone());
        }
        self.dirty.quiet = true;
        if let Some(broken) = broken {
            return Err(broken);
        }
        let import = self.catalog.import(cluster).ok_or(SyncEnds::NoPeer)?;
        let moved = import.position() != before || touched_any;
        let keep = (moved && !import.in_snapshot()).then(|| Box::new(import.clone()));
        let position = (!import.in_snapshot()).then(|| import.position());
        Ok(SyncApplied { position, keep, refused })
    }

    /// Applies one update. Returns whether it touched anything, and why it was refused if it was.
    fn handle_update(&mut self, cluster: &ClusterId, update: Update) -> Result<(bool, Option<String>), SyncEnds> {
        let is_news = update.change != Change::Heartbeat;
        let relayed = (self.relay.receiver_count() > 0).then(|| (cluster.clone(), update.clone()));
        let (changed, touched) = self.catalog.handle_update(cluster, update).ok_or(SyncEnds::NoPeer)??;
        // Fails only when nobody listens any more.
        relayed.into_iter().for_each(|update| _ = self.relay.send(update));
        self.updates.inc_by(u64::from(is_news));
        self.dirty.services |= !changed.is_empty();
        self.dirty.trust |= touched.roots || touched.revocations;
        self.dirty.view |= touched.gateways;
        if touched.roots {
            let bundle = self.imported_bundle(cluster);
            if let Some(peer) = self.peers.get_mut(cluster) {
                peer.bundle = bundle;
            }
        }
        let any = touched.roots || touched.revocations || touched.gateways || !touched.services.is_empty();
        Ok((any || touched.refused.is_some(), touched.refused.map(|refused| refused.to_string())))
    }

    /// What is held of every peer, and what will come.
    pub(super) fn imports(&self) -> Imports {
        let held = self.peers.keys().filter_map(|id| Some((id.clone(), self.catalog.import(id)?.snapshot())));
        Imports { held: held.collect(), updates: self.relay.subscribe() }
    }

    /// This process leads from now on: whatever it publishes is of `epoch`.
    pub(super) fn handle_lead(&mut self, epoch: u64) {
        (self.epoch, self.revision_floor) = (epoch, 0);
        for peer in self.peers.values_mut() {
            peer.publication = Publication::new(epoch, 0, self.log_cost_max);
        }
        (self.dirty.publish, self.dirty.view) = (true, true);
    }

    pub(super) fn handle_clock(&mut self, cluster: &ClusterId, ahead_ms: i64) {
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.clock_ahead_ms = Some(ahead_ms);
            self.dirty.quiet = true;
        }
    }

    fn imported_bundle(&self, cluster: &ClusterId) -> Option<Bundle> {
        let roots = self.catalog.import(cluster)?.roots()?;
        bundle_of(roots).inspect_err(|error| tracing::error!(%cluster, %error, "the bundle that is held is bad")).ok()
    }

    pub(super) fn published_since(&self, cluster: &ClusterId, from: Position) -> Option<(Vec<Update>, Position)> {
        let publication = &self.peers.get(cluster)?.publication;
        Some((publication.since(from), publication.position()))
    }

    pub(super) fn handle_acked(&mut self, cluster: &ClusterId, position: Position, refused: Option<String>) {
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.acked = position;
            if let Some(reason) = refused {
                let reason: String = reason.chars().take(REFUSED_LEN_MAX).collect();
                tracing::warn!(%cluster, reason, "the peer refuses an update of ours");
                peer.refused_there = Some(reason);
            }
            self.dirty.quiet = true;
        }
    }

    /// Judges every peer's freshness anew.
    pub(super) fn commit_freshness(&mut self, now: Instant) {
        let judged: Vec<(ClusterId, Freshness)> = (self.peers.iter())
            .map(|(id, peer)| (id.clone(), freshness::judge(now, peer.heard, self.tunnel_answers(id))))
            .collect();
        for (cluster, freshness) in judged {
            let Some(peer) = self.peers.get_mut(&cluster) else { continue };
            if peer.freshness != freshness {
                tracing::info!(%cluster, was = ?peer.freshness, now = ?freshness, "the peer's freshness changed");
                peer.freshness = freshness;
                self.dirty.view = true;
            }
            self.dirty.services |= !self.catalog.handle_freshness(&cluster, freshness).is_empty();
        }
    }

    /// Grants written in the source replace those of the peering.
    pub(super) fn commit_authorities(&mut self) {
        for cluster in self.peers.keys().cloned().collect::<Vec<_>>() {
            let Some(authority) = self.authority(&cluster).cloned() else { continue };
            let changed = self.catalog.handle_authority(&cluster, &authority);
            self.dirty.services |= !changed.is_empty();
            (self.dirty.publish, self.dirty.view) = (true, true);
        }
    }

    fn authority(&self, cluster: &ClusterId) -> Option<&Authority> {
        let granted = &self.peers.get(cluster)?.record.authority;
        Some(self.local.peers.get(cluster).unwrap_or(granted))
    }

    pub(super) fn commit_publications(&mut self) {
        let base = self.published_base();
        for (cluster, peer) in &mut self.peers {
            let next = Published { exports: self.catalog.published_to(cluster), ..base.clone() };
            self.dirty.view |= peer.publication.publish(next);
        }
    }

    pub(super) fn peer_view(&self, cluster: &ClusterId) -> Option<(ClusterId, Arc<PeerView>)> {
        let (peer, import) = (self.peers.get(cluster)?, self.catalog.import(cluster)?);
        let refused = import.refused().iter().map(|(service, refused)| (service.clone(), refused.reason.to_string()));
        let own_gateways = import.gateways();
        let view = PeerView {
            cluster: cluster.clone(),
            trust_domain: peer.record.trust_domain.clone(),
            authority: self.authority(cluster)?.clone(),
            gateways: if own_gateways.is_empty() {
                Arc::new(peer.record.gateways.clone())
            } else {
                own_gateways.clone()
            },
            bundle_sequence: peer.bundle.as_ref().map_or(0, Bundle::sequence),
            freshness: (import.position().epoch > 0).then_some(peer.freshness),
            position: import.position(),
            last_heard: peer.last_heard,
            clock_ahead_ms: peer.clock_ahead_ms,
            last_refusal: peer.last_refusal.clone(),
            refused_exports: refused.collect(),
            acked: peer.acked,
            published: peer.publication.position(),
            refused_there: peer.refused_there.clone(),
        };
        Some((cluster.clone(), Arc::new(view)))
    }
}

/// The roots exchanged at the peering, if they are the peer's own.
fn exchanged_roots(record: &PeerRecord) -> Option<Arc<Roots>> {
    match Bundle::from_wire(record.bundle.clone()) {
        Ok(bundle) if *bundle.trust_domain() == record.trust_domain => Some(Arc::new(roots_of(&bundle))),
        Ok(bundle) => {
            let (cluster, domain) = (&record.cluster, bundle.trust_domain());
            tracing::error!(%cluster, %domain, "the stored bundle of the peer is of another trust domain");
            None
        }
        Err(error) => {
            tracing::error!(cluster = %record.cluster, %error, "the stored bundle of the peer is bad");
            None
        }
    }
}
