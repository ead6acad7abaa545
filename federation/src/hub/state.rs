//! The state itself and what each input does to it. Nothing here waits or performs I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, mpsc, oneshot};
use tombolo_core::catalog::Catalog;
use tombolo_core::id::{ClusterId, GatewayId, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::model::GatewayAddress;
use tombolo_core::policy::access::{DefaultAccess, Defaults};
use tombolo_core::publish::{Published, Revocations, Update};
use tombolo_core::registration;
use tombolo_core::source::{LocalState, SourceProblem};
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;
use tombolo_trust::bundle::Bundle;
use tombolo_trust::store::{ClusterBundle, TrustStore};

use super::peers::Peer;
use super::remembered::{Remembered, RememberedGateway};
use super::view::{GatewayView, Reach, SidecarView, TunnelView, View};
use super::{CommandRefused, GatewayJoin, HubStart, Input, PeeringCommand, SidecarJoin};
use crate::addresses::Addresses;
use crate::registry::{Attached, Connected, Registry, SessionId};
use crate::sync::wire::roots_of;

/// How long the tunnel addresses of a gateway that has gone are still published.
const GATEWAY_MEMORY: Duration = Duration::from_secs(600);
/// How long what was connected before a restart of the federation counts as connected.
const RESTART_GRACE: Duration = Duration::from_secs(15);
/// Updates of peers that wait for another replica; one that lags further behind begins anew.
const RELAYED_MAX: usize = 4_096;
/// Gateways that may be known at once.
const GATEWAYS_MAX: usize = 64;

/// What the next view must be made anew from.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// The source or the registrations.
    pub local: bool,
    /// Something that peers are told.
    pub publish: bool,
    /// Bundles or revocations.
    pub trust: bool,
    /// Views of services.
    pub services: bool,
    /// Anything else that somebody may have to be told of.
    pub view: bool,
    /// Only what `status` shows.
    pub quiet: bool,
}

#[derive(Debug)]
struct Gateway {
    session: SessionId,
    spiffe_id: SpiffeId,
    advertise: Vec<String>,
    ingress_address: String,
    watch_address: String,
    unmeshed_address: Option<IpAddr>,
    commands: mpsc::Sender<PeeringCommand>,
    attached: Attached,
    tunnels: Vec<TunnelView>,
    /// Until when it still counts as connected; `None` while its stream stands.
    ends: Option<Instant>,
}

impl Gateway {
    fn is_connected(&self, now: Instant) -> bool {
        self.ends.is_none_or(|ends| now < ends)
    }

    fn is_remembered(&self, now: Instant) -> bool {
        self.ends.is_none_or(|ends| now < ends + GATEWAY_MEMORY)
    }
}

pub(super) struct State {
    pub(super) cluster: ClusterId,
    pub(super) epoch: u64,
    pub(super) bundle: Bundle,
    pub(super) revocations: Arc<Revocations>,
    pub(super) local: LocalState,
    /// Declared peers that are not made.
    declared_refused: Vec<SourceProblem>,
    /// Objects that can't be written to the API server.
    not_written: Vec<SourceProblem>,
    pub(super) catalog: Catalog,
    pub(super) peers: BTreeMap<ClusterId, Peer>,
    pub(super) dirty: Dirty,
    /// No publication of this epoch has used a revision above this one towards a peer that is gone.
    pub(super) revision_floor: u64,
    pub(super) log_cost_max: usize,
    pub(super) updates: Counter,
    pub(super) updates_refused: Counter,
    pub(super) answers: Vec<oneshot::Sender<()>>,
    /// What comes from peers, for the other replicas.
    pub(super) relay: broadcast::Sender<(ClusterId, Update)>,
    trust: TrustStore,
    registry: Registry,
    gateways: BTreeMap<GatewayId, Gateway>,
    bundles_in_force: BTreeMap<SessionId, BTreeMap<TrustDomain, u64>>,
    addresses: Option<Arc<Addresses>>,
    imported: Option<Arc<BTreeMap<ServiceName, Vec<IpAddr>>>>,
    default_access: DefaultAccess,
    view: Arc<View>,
}

impl State {
    pub(super) fn new(start: HubStart, log_cost_max: usize, now: Instant) -> Self {
        let HubStart { cluster, trust_domain, bundle, trust, store, metrics, default_access, remembered } = start;
        let epoch = store.epoch();
        let view = View {
            generation: 0,
            cluster: cluster.clone(),
            trust_domain,
            epoch,
            services: Arc::default(),
            policies: Arc::default(),
            access: Arc::default(),
            addresses: None,
            imported: None,
            peers: Arc::default(),
            gateways: Arc::default(),
            sidecars: Arc::default(),
            sessions: Arc::default(),
            meshed: Arc::default(),
            bundles: Arc::default(),
            revoked: Arc::default(),
            revocation_sequence: 0,
            problems: Arc::default(),
            remembered: Arc::default(),
        };
        let mut state = Self {
            catalog: Catalog::new(cluster.clone()),
            registry: Registry::new(cluster.clone()),
            cluster,
            epoch,
            bundle,
            revocations: Arc::default(),
            local: LocalState::default(),
            declared_refused: Vec::new(),
            not_written: Vec::new(),
            peers: BTreeMap::new(),
            dirty: Dirty { trust: true, view: true, ..Dirty::default() },
            revision_floor: 0,
            log_cost_max,
            updates: metrics.counter("tombolo_sync_updates", "Updates taken from peers"),
            updates_refused: metrics.counter("tombolo_sync_updates_refused", "Updates of peers that were refused"),
            answers: Vec::new(),
            relay: broadcast::Sender::new(RELAYED_MAX),
            trust,
            gateways: BTreeMap::new(),
            bundles_in_force: BTreeMap::new(),
            addresses: None,
            imported: None,
            default_access,
            view: Arc::new(view),
        };
        state.restore(remembered, now + RESTART_GRACE);
        state.commit(now);
        state
    }

    /// What was connected before this process started counts until it is back, or the grace has passed:
    /// a restart of the federation must not take away what works.
    fn restore(&mut self, remembered: Remembered, ends: Instant) {
        self.registry.restore(remembered.sidecars, ends);
        for gateway in remembered.gateways.into_iter().take(GATEWAYS_MAX) {
            let RememberedGateway { gateway, spiffe_id, advertise, ingress_address, watch_address, unmeshed_address } =
                gateway;
            // Nobody takes commands until the gateway is back.
            let (commands, _) = mpsc::channel(1);
            let held = Gateway {
                session: SessionId(0),
                spiffe_id,
                advertise,
                ingress_address,
                watch_address,
                unmeshed_address,
                commands,
                attached: Attached::Elsewhere(0),
                tunnels: Vec::new(),
                ends: Some(ends),
            };
            self.gateways.insert(gateway, held);
        }
        self.dirty.local = true;
    }

    /// What [`State::restore`] takes after the next start.
    fn remembered(&self) -> Remembered {
        let gateway = |(id, gateway): (&GatewayId, &Gateway)| RememberedGateway {
            gateway: id.clone(),
            spiffe_id: gateway.spiffe_id.clone(),
            advertise: gateway.advertise.clone(),
            ingress_address: gateway.ingress_address.clone(),
            watch_address: gateway.watch_address.clone(),
            unmeshed_address: gateway.unmeshed_address,
        };
        Remembered { sidecars: self.registry.remembered(), gateways: self.gateways.iter().map(gateway).collect() }
    }

    pub(super) fn view(&self) -> Arc<View> {
        self.view.clone()
    }

    pub(super) fn handle_input(&mut self, input: Input, now: Instant) {
        match input {
            Input::LocalChanged(local) => self.handle_local(local),
            Input::PeerAdded(record, import, done) => {
                self.handle_peer_added(*record, *import, now);
                self.answers.push(done);
            }
            Input::PeerRemoved(cluster, done) => {
                self.handle_peer_removed(&cluster);
                self.answers.push(done);
            }
            Input::Clock(cluster, ahead_ms) => self.handle_clock(&cluster, ahead_ms),
            Input::Imported(addresses) => {
                self.imported = Some(addresses);
                self.dirty.view = true;
            }
            Input::Addressed(addresses, done) => {
                self.addresses = Some(addresses);
                self.dirty.view = true;
                self.answers.push(done);
            }
            Input::Settle(done) => self.answers.push(done),
            Input::DeclaredRefused(problems) => {
                tell(&problems, &self.declared_refused);
                self.declared_refused = problems;
                self.dirty.view = true;
            }
            Input::NotWritten(problems) => {
                tell(&problems, &self.not_written);
                self.not_written = problems;
                self.dirty.view = true;
            }
            Input::OwnBundleChanged(bundle) => self.handle_own_bundle(bundle),
            Input::OwnRevoked { sequence, ids, done } => {
                self.handle_own_revoked(Revocations { sequence, ids });
                self.answers.push(done);
            }
            Input::Command(gateway, command, answer) => drop(answer.send(self.command(gateway, command))),
            Input::SyncBegan(cluster, answer) => drop(answer.send(self.handle_sync_began(&cluster))),
            Input::SyncReceived(cluster, messages, answer) => {
                drop(answer.send(self.handle_sync(&cluster, messages, now)));
            }
            Input::PublishedSince(cluster, from, answer) => drop(answer.send(self.published_since(&cluster, from))),
            Input::Acked { cluster, position, refused } => self.handle_acked(&cluster, position, refused),
            Input::SidecarJoined(session, join, answer) => {
                let SidecarJoin { instance, spiffe_id, zone, attached } = join;
                let joined = self.registry.handle_joined(session, spiffe_id, instance, zone, attached);
                self.dirty.view |= joined;
                let _ = answer.send(joined);
            }
            Input::Registered(session, claims) => self.dirty.local |= self.registry.handle_register(session, claims),
            Input::Readiness { session, service, port, ready } => {
                self.dirty.local |= self.registry.handle_readiness(session, service, port, ready);
            }
            Input::SidecarLeft(session) => {
                self.registry.handle_left(session, now);
                self.bundles_in_force.remove(&session);
                self.dirty.view = true;
            }
            Input::SidecarGone(session) => {
                self.bundles_in_force.remove(&session);
                self.dirty.local |= self.registry.handle_gone(session);
                self.dirty.view = true;
            }
            Input::Imports(answer) => drop(answer.send(self.imports())),
            Input::Lead(epoch, done) => {
                self.handle_lead(epoch);
                self.answers.push(done);
            }
            Input::GatewayJoined(session, join) => self.handle_gateway_joined(session, join),
            Input::Tunnels(session, tunnels) => self.handle_tunnels(session, tunnels),
            Input::GatewayLeft(session) => self.handle_gateway_left(session, now),
            Input::BundlesInForce(session, sequences) => {
                self.bundles_in_force.insert(session, sequences);
                self.dirty.quiet = true;
            }
        }
    }

    /// When [`State::commit`] has something to do without any input.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let known = self.view.as_ref();
        let gateway = |(id, gateway): (&GatewayId, &Gateway)| {
            let listed = known.gateways.get(id).is_some_and(|known| known.connected);
            gateway.ends.map(|ends| if listed { ends } else { ends + GATEWAY_MEMORY })
        };
        let gateways = self.gateways.iter().filter_map(gateway);
        let peers = self.peers.values().filter_map(Peer::poll_timeout);
        self.registry.poll_timeout().into_iter().chain(gateways).chain(peers).min()
    }

    /// Brings everything that follows from the inputs up to date. Returns the new view, if there is one.
    pub(super) fn commit(&mut self, now: Instant) -> Option<Arc<View>> {
        self.handle_timeout(now);
        if std::mem::take(&mut self.dirty.local) {
            let shares = registration::local_shares(&self.local, &self.registry.registrations());
            let changed = self.catalog.handle_local(shares);
            self.dirty.services |= !changed.is_empty();
            // Verdicts and problems may have changed where no service has.
            (self.dirty.publish, self.dirty.view) = (true, true);
        }
        if std::mem::take(&mut self.dirty.trust) {
            self.commit_trust();
            self.dirty.view = true;
        }
        if std::mem::take(&mut self.dirty.publish) {
            self.commit_publications();
        }
        let dirty = std::mem::take(&mut self.dirty);
        if !(dirty.services || dirty.view || dirty.quiet) {
            return None;
        }
        self.view = Arc::new(self.make_view(&dirty, now));
        Some(self.view())
    }

    /// Answers those who wait for their input to be in the view.
    pub(super) fn answer(&mut self) {
        for done in self.answers.drain(..) {
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.dirty.local |= self.registry.handle_timeout(now);
        let before = self.gateways.len();
        self.gateways.retain(|_, gateway| gateway.is_remembered(now));
        self.dirty.publish |= self.gateways.len() != before;
        let known = &self.view.gateways;
        let unlisted = |(id, gateway): (&GatewayId, &Gateway)| {
            known.get(id).is_none_or(|known| known.connected != gateway.is_connected(now))
        };
        self.dirty.view |= self.gateways.len() != before || self.gateways.iter().any(unlisted);
        self.commit_freshness(now);
    }

    fn handle_local(&mut self, local: LocalState) {
        self.local = local;
        self.dirty.local = true;
        self.commit_authorities();
    }

    fn problems(&self) -> Vec<SourceProblem> {
        let mut problems = [self.local.problems.as_slice(), &self.declared_refused, &self.not_written].concat();
        problems.sort();
        problems
    }

    fn handle_own_bundle(&mut self, bundle: Bundle) {
        if bundle.sequence() < self.bundle.sequence() {
            tracing::error!(sequence = bundle.sequence(), "the own bundle can't go back; the later one is kept");
            return;
        }
        self.bundle = bundle;
        (self.dirty.trust, self.dirty.publish) = (true, true);
    }

    fn handle_own_revoked(&mut self, revocations: Revocations) {
        if revocations.sequence >= self.revocations.sequence {
            self.revocations = Arc::new(revocations);
            (self.dirty.trust, self.dirty.publish) = (true, true);
        }
    }

    fn command(&self, gateway: GatewayId, command: PeeringCommand) -> Result<(), CommandRefused> {
        let Some(held) = self.gateways.get(&gateway) else { return Err(CommandRefused::NotConnected(gateway)) };
        held.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => CommandRefused::Busy(gateway),
            mpsc::error::TrySendError::Closed(_) => CommandRefused::NotConnected(gateway),
        })
    }

    fn handle_gateway_joined(&mut self, session: SessionId, join: GatewayJoin) {
        let GatewayJoin { gateway, spiffe_id, advertise, ingress_address, watch_address, unmeshed_address, .. } = join;
        let GatewayJoin { commands, attached, .. } = join;
        // What another replica tells may be late.
        let stands = |held: &Gateway| held.attached == Attached::Here && held.ends.is_none();
        if attached != Attached::Here && self.gateways.get(&gateway).is_some_and(stands) {
            return;
        }
        if self.gateways.len() >= GATEWAYS_MAX && !self.gateways.contains_key(&gateway) {
            tracing::warn!(%gateway, "more than {GATEWAYS_MAX} gateways; this one is not listed");
            return;
        }
        let held = Gateway {
            session,
            spiffe_id,
            advertise,
            ingress_address,
            watch_address,
            unmeshed_address,
            commands,
            attached,
            tunnels: Vec::new(),
            ends: None,
        };
        self.gateways.insert(gateway, held);
        (self.dirty.publish, self.dirty.view) = (true, true);
    }

    fn gateway_of(&mut self, session: SessionId) -> Option<&mut Gateway> {
        self.gateways.values_mut().find(|gateway| gateway.session == session)
    }

    fn handle_tunnels(&mut self, session: SessionId, tunnels: Vec<TunnelView>) {
        let Some(gateway) = self.gateway_of(session) else { return };
        let answers = |tunnels: &[TunnelView]| -> BTreeSet<ClusterId> {
            let up = tunnels.iter().filter(|tunnel| tunnel.reach == Reach::Up);
            up.map(|tunnel| tunnel.cluster.clone()).collect()
        };
        // Measurements come all the time; only whether a tunnel answers is news to anybody.
        let news = answers(&gateway.tunnels) != answers(&tunnels);
        gateway.tunnels = tunnels;
        self.dirty.view |= news;
        self.dirty.quiet = true;
    }

    fn handle_gateway_left(&mut self, session: SessionId, now: Instant) {
        self.bundles_in_force.remove(&session);
        if let Some(gateway) = self.gateway_of(session) {
            gateway.ends = Some(now + gateway.attached.grace());
            gateway.tunnels.clear();
            self.dirty.quiet = true;
        }
    }

    /// Whether any of our gateways has a tunnel to `cluster` that answers.
    pub(super) fn tunnel_answers(&self, cluster: &ClusterId) -> bool {
        let tunnels = self.gateways.values().flat_map(|gateway| &gateway.tunnels);
        tunnels.into_iter().any(|tunnel| tunnel.cluster == *cluster && tunnel.reach == Reach::Up)
    }

    /// What every peer is told of this cluster, beside its services.
    pub(super) fn published_base(&self) -> Published {
        let addresses = |(id, gateway): (&GatewayId, &Gateway)| {
            let address = |address: &String| GatewayAddress { gateway: id.clone(), address: address.clone() };
            gateway.advertise.iter().map(address).collect::<Vec<_>>()
        };
        Published {
            exports: BTreeMap::new(),
            roots: Some(Arc::new(roots_of(&self.bundle))),
            gateways: Arc::new(self.gateways.iter().flat_map(addresses).collect()),
            revocations: self.revocations.clone(),
        }
    }

    fn commit_trust(&mut self) {
        let own = ClusterBundle { cluster: self.cluster.clone(), bundle: self.bundle.clone() };
        let peers = self.peers.iter().filter_map(|(cluster, peer)| {
            Some(ClusterBundle { cluster: cluster.clone(), bundle: peer.bundle.clone()? })
        });
        let refusals = self.trust.replace_all(std::iter::once(own).chain(peers).collect());
        for refusal in refusals {
            tracing::warn!(%refusal, "a bundle is refused");
            self.updates_refused.inc();
            if let Some(peer) = self.peers.get_mut(&refusal.cluster) {
                peer.last_refusal = Some(refusal.to_string());
            }
        }
        let imports = self.peers.keys().filter_map(|cluster| self.catalog.import(cluster));
        let theirs = imports.flat_map(|import| import.revocations().ids.iter().cloned());
        self.trust.set_revoked(theirs.chain(self.revocations.ids.iter().cloned()).collect());
    }

    fn make_view(&self, dirty: &Dirty, now: Instant) -> View {
        let before = &self.view;
        let seen = dirty.services || dirty.view;
        let services = if dirty.services { Arc::new(self.catalog.views().clone()) } else { before.services.clone() };
        let trust = self.trust.snapshot();
        let bundles = trust
            .domains()
            .filter_map(|domain| Some((trust.cluster_of(domain)?.clone(), trust.bundle(domain)?.clone())));
        let kept = |bundles: BTreeMap<ClusterId, Bundle>| {
            if *before.bundles == bundles { before.bundles.clone() } else { Arc::new(bundles) }
        };
        let revoked = if *before.revoked == *trust.revoked() {
            before.revoked.clone()
        } else {
            Arc::new(trust.revoked().clone())
        };
        let access = Defaults { cluster: self.default_access, peers: self.local.peer_access.clone() };
        let remembered = if seen { Arc::new(self.remembered()) } else { before.remembered.clone() };
        View {
            remembered,
            generation: before.generation + u64::from(seen),
            epoch: self.epoch,
            sessions: if seen { Arc::new(self.sessions()) } else { before.sessions.clone() },
            peers: Arc::new(self.peers.keys().filter_map(|id| self.peer_view(id)).collect()),
            gateways: Arc::new(self.gateway_views(now)),
            sidecars: if seen { Arc::new(self.sidecar_views(&services)) } else { before.sidecars.clone() },
            meshed: if seen { self.meshed() } else { before.meshed.clone() },
            services,
            policies: if *before.policies == *self.local.policies {
                before.policies.clone()
            } else {
                self.local.policies.clone()
            },
            access: if *before.access == access { before.access.clone() } else { Arc::new(access) },
            addresses: self.addresses.clone(),
            imported: self.imported.clone(),
            bundles: kept(bundles.collect()),
            revoked,
            revocation_sequence: self.revocations.sequence,
            problems: Arc::new(self.problems()),
            ..(**before).clone()
        }
    }

    fn gateway_views(&self, now: Instant) -> BTreeMap<GatewayId, Arc<GatewayView>> {
        let view = |(id, gateway): (&GatewayId, &Gateway)| {
            let view = GatewayView {
                gateway: id.clone(),
                spiffe_id: gateway.spiffe_id.clone(),
                advertise: gateway.advertise.clone(),
                ingress_address: gateway.ingress_address.clone(),
                watch_address: gateway.watch_address.clone(),
                unmeshed_address: gateway.unmeshed_address,
                connected: gateway.is_connected(now),
                attached: gateway.attached,
                tunnels: gateway.tunnels.clone(),
                bundles_in_force: self.bundles_in_force.get(&gateway.session).cloned().unwrap_or_default(),
            };
            (id.clone(), Arc::new(view))
        };
        self.gateways.iter().map(view).collect()
    }

    fn sessions(&self) -> BTreeMap<SessionId, Arc<Connected>> {
        // What did not change keeps its allocation, so that it is seen at once that it did not.
        let kept = |(session, connected): (SessionId, Connected)| {
            let known = self.view.sessions.get(&session).filter(|known| ***known == connected);
            (session, known.cloned().unwrap_or_else(|| Arc::new(connected)))
        };
        self.registry.connected().map(kept).collect()
    }

    /// Keeps its allocation while it stays the same.
    fn meshed(&self) -> Arc<BTreeSet<IpAddr>> {
        let meshed = self.registry.addresses();
        if *self.view.meshed == meshed { self.view.meshed.clone() } else { Arc::new(meshed) }
    }

    fn sidecar_views(
        &self,
        services: &BTreeMap<ServiceName, Arc<tombolo_core::catalog::ServiceView>>,
    ) -> BTreeMap<SessionId, Arc<SidecarView>> {
        let mut verdicts = self.registry.verdicts(&self.local);
        let mut views = BTreeMap::new();
        for (session, spiffe_id, instance, connected) in self.registry.sidecars() {
            let offered = |service| -> BTreeSet<ClusterId> {
                services.get(service).map(|view| view.offered_to.clone()).unwrap_or_default()
            };
            let registered = self.registry.services(session);
            let view = SidecarView {
                instance: instance.clone(),
                spiffe_id: spiffe_id.clone(),
                connected,
                registrations: verdicts.remove(&session).unwrap_or_default(),
                inbound_grants: registered.iter().map(|service| (service.clone(), offered(service))).collect(),
                bundles_in_force: self.bundles_in_force.get(&session).cloned().unwrap_or_default(),
            };
            // What did not change keeps its allocation, so that its stream sees at once that it did not.
            let known = self.view.sidecars.get(&session).filter(|known| ***known == view);
            views.insert(session, known.cloned().unwrap_or_else(|| Arc::new(view)));
        }
        views
    }
}

/// Logs the problems that were not there before.
fn tell(problems: &[SourceProblem], before: &[SourceProblem]) {
    for problem in problems.iter().filter(|problem| !before.contains(problem)) {
        tracing::warn!(file = %problem.file, line = problem.line, reason = %problem.reason, "source");
    }
}
