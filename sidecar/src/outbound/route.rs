//! One port of one service: its endpoints in every cluster, which of them gets a request, and what became
//! of the requests they got.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tombolo_core::id::{ClusterId, EndpointId, InstanceName, Namespace, ServiceName, SpiffeId};
use tombolo_core::model::{AppProtocol, Origin, SessionAffinity};
use tombolo_core::outlier::{self, Elsewhere, Outcome, OutlierConfig, OutlierEvent};
use tombolo_core::policy::exported;
use tombolo_core::policy::set::Policy;
use tombolo_core::policy::traffic::TrafficSpec;
use tombolo_core::retry::RetryBudget;
use tombolo_core::routing::{
    self, Balance, ClusterReach, ClusterView, Draw, EndpointKey, EndpointView, Pick, PickReason, Plan, Preferences,
    Router, Verdict,
};
use tombolo_leg::discovery::{ServiceView, ShareView};
use tombolo_runtime::metrics::Metrics;
use tombolo_trust::svid::SvidSource;

use super::breaker::Breaker;
use super::gateways::{Gateways, PeerReach};
use super::observe::Observed;
use super::policy::{self, Policies};
use super::pool::PoolLimits;
use super::target::{Common, Place, Target, lock, ms_since};

/// A route without a request for this long is no longer looked at often.
const IDLE_MS: u64 = 1_000;
/// Endpoints that one header speaks of.
const PASSED_OVER_MAX: usize = 8;

/// What a route needs from its surroundings.
#[derive(Clone)]
pub struct Surroundings {
    /// This sidecar's own name, by which its application's sessions are known.
    pub instance: InstanceName,
    pub zone: Option<String>,
    /// Who calls, which routes may ask.
    pub svid: SvidSource,
    pub gateways: Gateways,
    pub observed: Observed,
    pub pool: Arc<PoolLimits>,
    pub warm_legs: usize,
    pub outlier: Arc<OutlierConfig>,
    pub retry_share: f64,
    /// Rung when what goes on beside the requests has something to look at before its next round.
    pub upkeep: Arc<Notify>,
    /// From which times are counted in this process.
    pub base: Instant,
}

impl Surroundings {
    /// The same for a route that only shows what would be: what it counts, nobody sees.
    pub fn unseen(&self) -> Self {
        let (observed, upkeep) = (Observed::new(&Metrics::new("unseen")), Arc::default());
        Self { observed, upkeep, ..self.clone() }
    }
}

/// One port of one service.
pub struct Route {
    pub service: ServiceName,
    pub port: u16,
    /// The one cluster whose endpoints are meant, if a route says so.
    pub only: Option<ClusterId>,
    around: Surroundings,
    common: Arc<Common>,
    live: ArcSwap<Live>,
    /// What plans are made from. Never locked by a request, only by what changes the plan.
    planning: Mutex<Planning>,
    budget: RetryBudget,
    used_ms: AtomicU64,
    turn: AtomicU64,
    pub breaker: Breaker,
}

/// What requests read: replaced as a whole.
pub struct Live {
    pub plan: Plan,
    /// In the order of `plan.endpoints`.
    pub targets: Vec<Arc<Target>>,
    pub app: AppProtocol,
    /// Some cluster exports this port.
    pub exported: bool,
    /// A caller's requests stay with one endpoint.
    affinity: SessionAffinity,
    policies: Option<Arc<Policies>>,
}

impl Live {
    /// How much slower than its siblings an endpoint may be, if a policy says so.
    fn slow_factor(&self) -> Option<u32> {
        let outlier = &self.policies.as_ref()?.traffic()?.outlier_detection;
        outlier.slow_factor.filter(|_| outlier.enabled)
    }
}

struct Planning {
    router: Router,
    preferences: Preferences,
    view: Option<Arc<ServiceView>>,
    targets: Vec<Arc<Target>>,
    /// How each remote cluster was reached when it was last planned.
    reach: BTreeMap<ClusterId, ClusterReach>,
    policies: Option<Arc<Policies>>,
}

impl Route {
    pub fn new(service: ServiceName, port: u16, only: Option<ClusterId>, around: Surroundings) -> Self {
        let router = Router::default();
        let live = Live {
            plan: Router::default().plan(Vec::new(), &Preferences::default(), around.base),
            targets: Vec::new(),
            app: AppProtocol::Opaque,
            exported: false,
            affinity: SessionAffinity::None,
            policies: None,
        };
        let breaker = Breaker::default();
        let (base, pending) = (around.base, breaker.pending.clone());
        Self {
            common: Arc::new(Common { service: service.clone(), port, base, pending }),
            service,
            port,
            only,
            live: ArcSwap::from_pointee(live),
            planning: Mutex::new(Planning {
                router,
                preferences: Preferences::default(),
                view: None,
                targets: Vec::new(),
                reach: BTreeMap::new(),
                policies: None,
            }),
            budget: RetryBudget::new(around.retry_share, around.base),
            used_ms: AtomicU64::new(0),
            turn: AtomicU64::new(0),
            breaker,
            around,
        }
    }

    pub fn live(&self) -> Arc<Live> {
        self.live.load_full()
    }

    pub fn app(&self) -> AppProtocol {
        self.live.load().app
    }

    /// What routes and policies say about requests to here, if any does.
    pub fn policies(&self) -> Option<Arc<Policies>> {
        self.live.load().policies.clone()
    }

    /// Whether a share is one of this route's.
    fn serves(&self, share: &ShareView) -> bool {
        let meant = self.only.as_ref().is_none_or(|only| *only == share.share.cluster);
        meant && share.share.export.port(self.port).is_some()
    }

    pub fn is_exported(&self) -> bool {
        self.live.load().exported
    }

    /// Marks the route as used and lets the request earn its share of second tries.
    pub fn begin(&self, now: Instant) {
        let now_ms = ms_since(self.around.base, now);
        if self.used_ms.swap(now_ms, Ordering::Relaxed).saturating_add(IDLE_MS) < now_ms {
            self.around.upkeep.notify_one();
        }
        self.budget.deposit();
    }

    pub fn may_retry(&self, now: Instant) -> bool {
        self.budget.withdraw(now)
    }

    /// How long nothing has used it; nothing while a request is under way.
    pub fn idle_for(&self, now: Instant) -> Duration {
        let live = self.live.load();
        if live.targets.iter().any(|target| target.in_flight() > 0) {
            return Duration::ZERO;
        }
        Duration::from_millis(ms_since(self.around.base, now).saturating_sub(self.used_ms.load(Ordering::Relaxed)))
    }

    /// Whether a request waits for its response to begin.
    pub fn is_waiting(&self) -> bool {
        self.live.load().targets.iter().any(|target| target.waiting().is_some())
    }

    /// The session that a request of this caller belongs to, where the service asks for affinity.
    pub fn session(&self, caller: IpAddr) -> Option<u64> {
        match self.live.load().affinity {
            SessionAffinity::None => None,
            // The application beside this sidecar is one client, and loopback's address is everybody's.
            SessionAffinity::ClientIp if caller.is_loopback() => {
                Some(routing::session(self.around.instance.as_str().as_bytes()))
            }
            SessionAffinity::ClientIp => Some(routing::session(caller.to_canonical().to_string().as_bytes())),
        }
    }

    /// The endpoint for one try.
    pub fn pick(&self, tried: &[EndpointKey], session: Option<u64>, now: Instant) -> Option<(Arc<Target>, Pick)> {
        let live = self.live.load();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let now_ms = ms_since(self.around.base, now);
        let draw = Draw { random: rand::random(), turn, session, tried, now };
        let pick = live.plan.pick(draw, |index| live.targets[index].load_at(now_ms))?;
        self.around.observed.picked(pick);
        Some((live.targets[pick.endpoint].clone(), pick))
    }

    /// The pick that one more request would get, if chance said what it always says here, and what is said of each
    /// endpoint of the plan. Changes nothing.
    pub fn explain(&self, session: Option<u64>, now: Instant) -> (Arc<Live>, Option<Pick>, Vec<Verdict>) {
        let live = self.live();
        let (turn, now_ms) = (self.turn.load(Ordering::Relaxed), ms_since(self.around.base, now));
        let draw = Draw { random: routing::FIRST, turn, session, tried: &[], now };
        let pick = live.plan.pick(draw, |index| live.targets[index].load_at(now_ms));
        let verdicts = live.plan.explain(pick, &[]);
        (live, pick, verdicts)
    }

    /// What is said of the endpoints that were not picked, for a header: at most 8 of them.
    pub fn passed_over(&self, target: &Target, reason: PickReason, tried: &[EndpointKey]) -> String {
        let live = self.live();
        let endpoint = live.plan.endpoints.iter().position(|endpoint| endpoint.key == target.key);
        let pick = endpoint.map(|endpoint| Pick { endpoint, reason, spilled: false });
        let verdicts = live.plan.explain(pick, tried);
        let others = live.plan.endpoints.iter().zip(verdicts).filter(|(endpoint, _)| endpoint.key != target.key);
        let others: Vec<_> = others.map(|(it, why)| format!("{}/{}: {why}", it.key.cluster, it.key.endpoint)).collect();
        let mut said = others[..others.len().min(PASSED_OVER_MAX)].join("; ");
        if let Some(more) = others.len().checked_sub(PASSED_OVER_MAX).filter(|more| *more > 0) {
            said.push_str(&format!("; and {more} more"));
        }
        said
    }

    /// Takes in what discovery says; `None` when nobody exports the service to here any more.
    pub fn apply(&self, view: Option<Arc<ServiceView>>, now: Instant) {
        let mut planning = lock(&self.planning);
        let mut targets = Vec::new();
        for share in view.iter().flat_map(|view| &view.shares) {
            if self.serves(share) {
                // Dialling keeps a configuration for each set of identities, told apart by its address.
                let own = &share.share.export.server_ids;
                let known = planning.targets.iter().find(|target| *target.server_ids == *own);
                let ids = known.map_or_else(|| Arc::new(own.clone()), |target| target.server_ids.clone());
                let endpoints = share.share.export.endpoints.keys();
                targets.extend(endpoints.map(|id| self.target(share, id, &ids, &planning, now)));
            }
        }
        planning.targets = targets;
        let own = self.around.svid.current();
        let caller = own.as_ref().and_then(|svid| svid.id.as_workload()?.0.parse::<Namespace>().ok());
        let caller = caller.unwrap_or_else(|| self.service.namespace().clone());
        let told = view.as_ref().map_or(&[][..], |view| &view.policies).iter().cloned();
        let shares = view.iter().flat_map(|view| view.shares.iter().map(|share| &share.share));
        let exported = exported::leading(shares).iter().cloned().map(Policy::Route);
        let told: Vec<Policy> = told.chain(exported).collect();
        planning.policies = Policies::new(&told, &self.service, self.port, &caller);
        let policies = planning.policies.clone();
        let traffic = policies.as_ref().and_then(|policies| policies.traffic());
        planning.preferences = policy::preferences(preferences(view.as_deref(), self.port), traffic);
        let bounds = traffic.map(|traffic| traffic.circuit_breaker.clone()).unwrap_or_default();
        self.breaker.set(bounds.max_connections, bounds.max_requests, bounds.max_pending_requests);
        self.bound(traffic, &planning.targets, now);
        planning.view = view;
        self.replan(&mut planning, now);
    }

    /// Puts in force what a traffic policy says of tries, ejections and warm legs, or what is so without one.
    fn bound(&self, traffic: Option<&TrafficSpec>, targets: &[Arc<Target>], now: Instant) {
        match traffic.and_then(|traffic| traffic.retry.budget_percent) {
            Some(percent) => self.budget.set_percent(percent),
            None => self.budget.set_share(self.around.retry_share),
        }
        let own = &self.around.outlier;
        let outlier = traffic.map_or_else(|| own.clone(), |traffic| traffic.outlier_detection.over(**own).into());
        let warm_legs = traffic.and_then(|traffic| traffic.warm_legs).map(|legs| legs as usize);
        for target in targets {
            target.warm.set_max(warm_legs.unwrap_or(self.around.warm_legs));
            let event = target.outlier().set_config(outlier.clone(), now);
            if let Some(event) = event {
                self.announce(target, event, now);
            }
        }
    }

    /// Looks again from when on an answer is slow, where a policy ejects for that.
    fn compare(&self, live: &Live, now: Instant) {
        let Some(factor) = live.slow_factor() else { return };
        for target in &live.targets {
            let siblings = live.targets.iter().filter(|other| {
                other.key.cluster == target.key.cluster && !Arc::ptr_eq(other, target) && !other.is_ejected()
            });
            let slow_after = outlier::slow_after(factor, siblings.filter_map(|other| other.expected_latency(now)));
            target.outlier().set_slow_after(slow_after);
        }
    }

    /// Plans again after something that is not discovery changed: reach, an ejection, or time.
    pub fn refresh(&self, now: Instant) {
        self.replan(&mut lock(&self.planning), now);
    }

    /// When the plan or an endpoint's ejection changes by itself.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let planning = lock(&self.planning);
        let outliers = planning.targets.iter().filter_map(|target| target.outlier().poll_timeout());
        outliers.chain(planning.router.poll_timeout()).min()
    }

    /// Advances ejections and looks for hangs; returns the endpoints to probe.
    pub fn handle_timeout(&self, now: Instant) -> Vec<Arc<Target>> {
        let live = self.live.load_full();
        self.compare(&live, now);
        let mut probes = Vec::new();
        for target in &live.targets {
            let elsewhere = elsewhere(&live.plan, &target.key);
            let mut outlier = target.outlier();
            let timed = outlier.handle_timeout(elsewhere, now);
            let hung = target.waiting().and_then(|(count, since)| outlier.handle_outstanding(count, since, now));
            drop(outlier);
            for event in timed.into_iter().chain(hung) {
                if event == OutlierEvent::Probe {
                    probes.push(target.clone());
                }
                self.changed(target, Some(event), now);
            }
        }
        let mut planning = lock(&self.planning);
        if planning.router.poll_timeout().is_some_and(|due| due <= now) {
            self.replan(&mut planning, now);
        }
        probes
    }

    pub fn handle_probe(&self, target: &Arc<Target>, answered: bool, now: Instant) {
        let elsewhere = elsewhere(&self.live.load().plan, &target.key);
        let event = target.outlier().handle_probe(answered, elsewhere, now);
        self.changed(target, event, now);
    }

    /// Counts how a try ended.
    pub fn handle_outcome(&self, target: &Arc<Target>, outcome: Outcome, now: Instant) {
        match outcome {
            Outcome::Answered { .. } | Outcome::ServerError { .. } => target.counters.answered.inc(),
            Outcome::GatewayError { .. } => target.counters.gateway_errors.inc(),
            Outcome::Failed => target.counters.failed.inc(),
            Outcome::Refused => target.counters.refused.inc(),
        };
        if let Outcome::Answered { after } = outcome {
            // Errors often come fast; they must not make an endpoint attractive.
            target.sample(after, now);
        }
        let live = self.live.load();
        let elsewhere = match outcome {
            // Mostly an answer can't eject, and then nobody need be looked for.
            Outcome::Answered { .. } if live.slow_factor().is_none() => Elsewhere::Nothing,
            _ => elsewhere(&live.plan, &target.key),
        };
        let event = target.outlier().handle_outcome(outcome, elsewhere, now);
        self.changed(target, event, now);
    }

    fn changed(&self, target: &Arc<Target>, event: Option<OutlierEvent>, now: Instant) {
        let Some(event) = event else { return };
        self.announce(target, event, now);
        if event == OutlierEvent::Probe {
            return;
        }
        self.refresh(now);
        if matches!(event, OutlierEvent::Ejected(reason) if reason.leaves_waiting()) {
            // After the plan, so that those who leave do not come back.
            target.pool.abandon();
        }
    }

    fn announce(&self, target: &Target, event: OutlierEvent, now: Instant) {
        let (service, cluster, endpoint) = (&self.service, &target.key.cluster, &target.key.endpoint);
        match event {
            OutlierEvent::Ejected(reason) => {
                self.around.observed.ejected(reason);
                tracing::info!(%service, %cluster, %endpoint, ?reason, "endpoint ejected: requests to it fail");
            }
            OutlierEvent::Restored => {
                target.begins(now);
                tracing::info!(%service, %cluster, %endpoint, "endpoint answers again");
            }
            OutlierEvent::Probe => tracing::debug!(%service, %cluster, %endpoint, "probing endpoint"),
        }
    }

    fn replan(&self, planning: &mut Planning, now: Instant) {
        let view = planning.view.clone();
        let shares = view.iter().flat_map(|view| &view.shares);
        let shares: Vec<&ShareView> = shares.filter(|share| self.serves(share)).collect();
        let views: Vec<_> = shares.iter().map(|share| self.cluster_view(share, &planning.targets)).collect();
        planning.forgive_ways_up(&views, now);
        let plan = planning.router.plan(views, &planning.preferences, now);
        let target = |key: &EndpointKey| planning.targets.iter().find(|target| target.key == *key).cloned();
        let targets: Vec<_> = plan.endpoints.iter().filter_map(|endpoint| target(&endpoint.key)).collect();
        debug_assert_eq!(targets.len(), plan.endpoints.len(), "views are made from the targets");
        let leading = leading(&shares);
        let app = leading.and_then(|share| share.share.export.port(self.port)).map_or(AppProtocol::Opaque, |p| p.app);
        let affinity = leading.map_or(SessionAffinity::None, |share| share.share.export.session_affinity);
        if planning.router.poll_timeout().is_some() {
            self.around.upkeep.notify_one();
        }
        let policies = planning.policies.clone();
        self.live.store(Arc::new(Live { plan, targets, app, exported: !shares.is_empty(), affinity, policies }));
    }

    fn cluster_view(&self, share: &ShareView, targets: &[Arc<Target>]) -> ClusterView {
        let cluster = &share.share.cluster;
        let PeerReach { reach, rtt } = match share.share.origin {
            Origin::Local => PeerReach { reach: ClusterReach::Up, rtt: None },
            Origin::Remote => self.around.gateways.reach(cluster),
        };
        let own = targets.iter().filter(|target| target.key.cluster == *cluster);
        let endpoints = own.map(|target| {
            let known = share.share.export.endpoints.get(&target.key.endpoint);
            let zone = known.and_then(|endpoint| endpoint.zone.as_ref());
            EndpointView {
                id: target.key.endpoint.clone(),
                weight: known.map_or(1, |endpoint| endpoint.weight),
                ready: target.is_ready(),
                ejected: target.outlier().ejected_for(),
                near: zone.is_some() && zone == self.around.zone.as_ref(),
                since: target.since(),
            }
        });
        ClusterView {
            cluster: cluster.clone(),
            origin: share.share.origin,
            freshness: share.share.freshness,
            reach,
            rtt,
            endpoints: endpoints.collect(),
        }
    }

    /// The target for an endpoint; its legs and its record stay while it is the same one.
    fn target(
        &self,
        share: &ShareView,
        id: &EndpointId,
        ids: &Arc<BTreeSet<SpiffeId>>,
        planning: &Planning,
        now: Instant,
    ) -> Arc<Target> {
        let address =
            share.deliveries.get(id).and_then(|ports| ports.get(&self.port)).map(|address| address.as_str().into());
        let declared = share.share.export.endpoints.get(id).is_some_and(|endpoint| endpoint.ready);
        // A local endpoint that no sidecar delivers can't be reached by anybody.
        let ready = declared && (share.share.origin == Origin::Remote || address.is_some());
        let place = Place {
            key: EndpointKey { cluster: share.share.cluster.clone(), endpoint: id.clone() },
            origin: share.share.origin,
            server_ids: ids.clone(),
            address,
        };
        if let Some(same) = planning.targets.iter().find(|old| old.is_at(&place)) {
            same.becomes_ready(ready, now);
            return same.clone();
        }
        // What is there from the beginning has no slow start.
        let since = planning.view.is_some().then_some(now);
        Arc::new(Target::new(&self.around, &self.common, place, ready, since))
    }
}

impl Planning {
    /// Where a cluster is reached again, what its broken way did to its endpoints is forgiven.
    fn forgive_ways_up(&mut self, views: &[ClusterView], now: Instant) {
        for view in views {
            let before = self.reach.insert(view.cluster.clone(), view.reach);
            if view.reach == ClusterReach::Up && before.is_some_and(|before| before != ClusterReach::Up) {
                let own = self.targets.iter().filter(|target| target.key.cluster == view.cluster);
                own.for_each(|target| target.outlier().handle_way_up(now));
            }
        }
        self.reach.retain(|cluster, _| views.iter().any(|view| view.cluster == *cluster));
    }
}

/// The share whose word counts where clusters differ: the local one, else the oldest export.
fn leading<'a>(shares: &[&'a ShareView]) -> Option<&'a ShareView> {
    shares.iter().copied().min_by_key(|share| (share.share.origin, share.share.export.created))
}

/// What the service's owner decided about where its requests go.
fn preferences(view: Option<&ServiceView>, port: u16) -> Preferences {
    let shares = view.iter().flat_map(|view| &view.shares);
    let shares: Vec<&ShareView> = shares.filter(|share| share.share.export.port(port).is_some()).collect();
    let balance = match leading(&shares).map(|share| share.share.export.session_affinity) {
        Some(SessionAffinity::ClientIp) => Balance::ConsistentHash,
        Some(SessionAffinity::None) | None => Balance::default(),
    };
    Preferences { balance, ..Preferences::default() }
}

fn elsewhere(plan: &Plan, key: &EndpointKey) -> Elsewhere {
    if plan.has_capacity_beside(key) { Elsewhere::Capacity } else { Elsewhere::Nothing }
}
