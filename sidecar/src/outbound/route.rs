//! One port of one service: its endpoints in every cluster, which of them gets a request, and what became
//! of the requests they got.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tombolo_core::id::{ServiceName, SpiffeId};
use tombolo_core::model::{AppProtocol, Origin};
use tombolo_core::outlier::{Elsewhere, Outcome, Outlier, OutlierConfig, OutlierEvent};
use tombolo_core::retry::RetryBudget;
use tombolo_core::routing::{ClusterReach, ClusterView, EndpointKey, EndpointView, Pick, Plan, Router};
use tombolo_leg::discovery::{ServiceView, ShareView};

use super::gateways::{Gateways, PeerReach};
use super::observe::{Observed, TargetCounters};
use super::pool::{Pool, PoolLimits};
use super::warm::WarmLegs;

/// What a route needs from its surroundings.
#[derive(Clone)]
pub struct Surroundings {
    pub gateways: Gateways,
    pub observed: Observed,
    pub pool: PoolLimits,
    pub warm_legs: usize,
    pub outlier: OutlierConfig,
    pub retry_share: f64,
    /// From which times are counted in this process.
    pub base: Instant,
}

/// One port of one service.
pub struct Route {
    pub service: ServiceName,
    pub port: u16,
    around: Surroundings,
    live: ArcSwap<Live>,
    /// What plans are made from. Never locked by a request, only by what changes the plan.
    planning: Mutex<Planning>,
    budget: Mutex<RetryBudget>,
    used_ms: AtomicU64,
}

/// What requests read: replaced as a whole.
pub struct Live {
    pub plan: Plan,
    /// In the order of `plan.endpoints`.
    pub targets: Vec<Arc<Target>>,
    pub app: AppProtocol,
    /// Some cluster exports this port.
    pub exported: bool,
}

struct Planning {
    router: Router,
    view: Option<Arc<ServiceView>>,
    targets: Vec<Arc<Target>>,
}

/// One endpoint of one port of one service.
pub struct Target {
    pub key: EndpointKey,
    pub service: ServiceName,
    pub port: u16,
    pub origin: Origin,
    pub server_ids: Arc<BTreeSet<SpiffeId>>,
    /// Where a local endpoint's sidecar accepts inner legs.
    pub address: Option<String>,
    pub pool: Pool,
    pub warm: WarmLegs,
    pub counters: TargetCounters,
    ready: AtomicBool,
    /// Requests and connections under way.
    in_flight: AtomicU32,
    /// Requests whose response has not begun, and since when there is one.
    waiting: AtomicU32,
    waiting_since_ms: AtomicU64,
    base: Instant,
    outlier: Mutex<Outlier>,
}

impl Route {
    pub fn new(service: ServiceName, port: u16, around: Surroundings) -> Self {
        let router = Router::default();
        let live = Live {
            plan: Router::default().plan(Vec::new(), around.base),
            targets: Vec::new(),
            app: AppProtocol::Opaque,
            exported: false,
        };
        Self {
            service,
            port,
            live: ArcSwap::from_pointee(live),
            planning: Mutex::new(Planning { router, view: None, targets: Vec::new() }),
            budget: Mutex::new(RetryBudget::new(around.retry_share, around.base)),
            used_ms: AtomicU64::new(0),
            around,
        }
    }

    pub fn live(&self) -> Arc<Live> {
        self.live.load_full()
    }

    pub fn app(&self) -> AppProtocol {
        self.live.load().app
    }

    pub fn is_exported(&self) -> bool {
        self.live.load().exported
    }

    /// Marks the route as used and lets the request earn its share of second tries.
    pub fn begin(&self, now: Instant) {
        self.used_ms.store(ms_since(self.around.base, now), Ordering::Relaxed);
        lock(&self.budget).deposit();
    }

    pub fn may_retry(&self, now: Instant) -> bool {
        lock(&self.budget).withdraw(now)
    }

    /// How long nothing has used it; nothing while a request is under way.
    pub fn idle_for(&self, now: Instant) -> Duration {
        let live = self.live.load();
        if live.targets.iter().any(|target| target.load() > 0) {
            return Duration::ZERO;
        }
        Duration::from_millis(ms_since(self.around.base, now).saturating_sub(self.used_ms.load(Ordering::Relaxed)))
    }

    /// The endpoint for one try.
    pub fn pick(&self, tried: &[EndpointKey]) -> Option<(Arc<Target>, Pick)> {
        let live = self.live.load();
        let pick = live.plan.pick(rand::random(), tried, |index| live.targets[index].load())?;
        Some((live.targets[pick.endpoint].clone(), pick))
    }

    /// Takes in what discovery says; `None` when nobody exports the service to here any more.
    pub fn apply(&self, view: Option<Arc<ServiceView>>, now: Instant) {
        let mut planning = lock(&self.planning);
        let mut targets = Vec::new();
        for share in view.iter().flat_map(|view| &view.shares) {
            if share.share.export.port(self.port).is_some() {
                // Dialling keeps a configuration for each set of identities, told apart by its address.
                let own = &share.share.export.server_ids;
                let known = planning.targets.iter().find(|target| *target.server_ids == *own);
                let ids = known.map_or_else(|| Arc::new(own.clone()), |target| target.server_ids.clone());
                let endpoints = share.share.export.endpoints.keys();
                targets.extend(endpoints.map(|id| self.target(share, id, &ids, &planning.targets, now)));
            }
        }
        planning.targets = targets;
        planning.view = view;
        self.replan(&mut planning, now);
    }

    /// Plans again after something that is not discovery changed: reach, an ejection, or time.
    pub fn refresh(&self, now: Instant) {
        self.replan(&mut lock(&self.planning), now);
    }

    /// When the plan or an endpoint's ejection changes by itself.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let planning = lock(&self.planning);
        let outliers = planning.targets.iter().filter_map(|target| lock(&target.outlier).poll_timeout());
        outliers.chain(planning.router.poll_timeout()).min()
    }

    /// Advances ejections and looks for hangs; returns the endpoints to probe.
    pub fn handle_timeout(&self, now: Instant) -> Vec<Arc<Target>> {
        let live = self.live.load_full();
        let mut probes = Vec::new();
        for target in &live.targets {
            let elsewhere = elsewhere(&live.plan, &target.key);
            let mut outlier = lock(&target.outlier);
            let timed = outlier.handle_timeout(elsewhere, now);
            let waiting = target.waiting.load(Ordering::Relaxed);
            let hung =
                if waiting == 0 { None } else { outlier.handle_outstanding(waiting, target.waiting_since(), now) };
            drop(outlier);
            for event in timed.into_iter().chain(hung) {
                if event == OutlierEvent::Probe {
                    probes.push(target.clone());
                }
                self.announce(target, event);
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
        let event = lock(&target.outlier).handle_probe(answered, elsewhere, now);
        self.changed(target, event, now);
    }

    /// Counts how a try ended.
    pub fn handle_outcome(&self, target: &Arc<Target>, outcome: Outcome, now: Instant) {
        match outcome {
            Outcome::Answered { .. } => target.counters.answered.inc(),
            Outcome::GatewayError { .. } => target.counters.gateway_errors.inc(),
            Outcome::Failed => target.counters.failed.inc(),
            Outcome::Refused => target.counters.refused.inc(),
        };
        let elsewhere = match outcome {
            // An answer never ejects.
            Outcome::Answered { .. } => Elsewhere::Nothing,
            _ => elsewhere(&self.live.load().plan, &target.key),
        };
        let event = lock(&target.outlier).handle_outcome(outcome, elsewhere, now);
        self.changed(target, event, now);
    }

    fn changed(&self, target: &Arc<Target>, event: Option<OutlierEvent>, now: Instant) {
        let Some(event) = event else { return };
        self.announce(target, event);
        self.refresh(now);
    }

    fn announce(&self, target: &Target, event: OutlierEvent) {
        let (service, cluster, endpoint) = (&self.service, &target.key.cluster, &target.key.endpoint);
        match event {
            OutlierEvent::Ejected(reason) => {
                self.around.observed.ejected(reason);
                tracing::info!(%service, %cluster, %endpoint, ?reason, "endpoint ejected: requests to it fail");
            }
            OutlierEvent::Restored => tracing::info!(%service, %cluster, %endpoint, "endpoint answers again"),
            OutlierEvent::Probe => tracing::debug!(%service, %cluster, %endpoint, "probing endpoint"),
        }
    }

    fn replan(&self, planning: &mut Planning, now: Instant) {
        let view = planning.view.clone();
        let shares = view.iter().flat_map(|view| &view.shares);
        let shares: Vec<&ShareView> = shares.filter(|share| share.share.export.port(self.port).is_some()).collect();
        let views = shares.iter().map(|share| self.cluster_view(share, &planning.targets)).collect();
        let plan = planning.router.plan(views, now);
        let target = |key: &EndpointKey| planning.targets.iter().find(|target| target.key == *key).cloned();
        let targets: Vec<_> = plan.endpoints.iter().filter_map(|endpoint| target(&endpoint.key)).collect();
        debug_assert_eq!(targets.len(), plan.endpoints.len(), "views are made from the targets");
        let app = protocol(&shares, self.port);
        self.live.store(Arc::new(Live { plan, targets, app, exported: !shares.is_empty() }));
    }

    fn cluster_view(&self, share: &ShareView, targets: &[Arc<Target>]) -> ClusterView {
        let cluster = &share.share.cluster;
        let PeerReach { reach, rtt } = match share.share.origin {
            Origin::Local => PeerReach { reach: ClusterReach::Up, rtt: None },
            Origin::Remote => self.around.gateways.reach(cluster),
        };
        let own = targets.iter().filter(|target| target.key.cluster == *cluster);
        let endpoints = own.map(|target| EndpointView {
            id: target.key.endpoint.clone(),
            weight: share.share.export.endpoints.get(&target.key.endpoint).map_or(1, |endpoint| endpoint.weight),
            ready: target.ready.load(Ordering::Relaxed),
            ejected: lock(&target.outlier).is_ejected(),
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
        id: &tombolo_core::id::EndpointId,
        ids: &Arc<BTreeSet<SpiffeId>>,
        before: &[Arc<Target>],
        now: Instant,
    ) -> Arc<Target> {
        let key = EndpointKey { cluster: share.share.cluster.clone(), endpoint: id.clone() };
        let address = share.deliveries.get(id).and_then(|ports| ports.get(&self.port)).cloned();
        let declared = share.share.export.endpoints.get(id).is_some_and(|endpoint| endpoint.ready);
        // A local endpoint that no sidecar delivers can't be reached by anybody.
        let ready = declared && (share.share.origin == Origin::Remote || address.is_some());
        let same = before.iter().find(|old| {
            old.key == key && old.address == address && *old.server_ids == **ids && old.origin == share.share.origin
        });
        if let Some(same) = same {
            if !same.ready.swap(ready, Ordering::Relaxed) && ready {
                lock(&same.outlier).handle_ready_again(now);
            }
            return same.clone();
        }
        Arc::new(Target {
            counters: self.around.observed.target(&self.service.to_string(), &key),
            key,
            service: self.service.clone(),
            port: self.port,
            origin: share.share.origin,
            server_ids: ids.clone(),
            address,
            pool: Pool::new(self.around.pool),
            warm: WarmLegs::new(self.around.warm_legs),
            ready: AtomicBool::new(ready),
            in_flight: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            waiting_since_ms: AtomicU64::new(0),
            base: self.around.base,
            outlier: Mutex::new(Outlier::new(self.around.outlier)),
        })
    }
}

/// How the port's bytes are treated: the local cluster's word counts, else that of the oldest export.
fn protocol(shares: &[&ShareView], port: u16) -> AppProtocol {
    let first = shares.iter().min_by_key(|share| (share.share.origin, share.share.export.created));
    first.and_then(|share| share.share.export.port(port)).map_or(AppProtocol::Opaque, |port| port.app)
}

fn elsewhere(plan: &Plan, key: &EndpointKey) -> Elsewhere {
    if plan.has_capacity_beside(key) { Elsewhere::Capacity } else { Elsewhere::Nothing }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ms_since(base: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(base).as_millis()).unwrap_or(u64::MAX)
}

impl Target {
    /// Requests and connections under way.
    pub fn load(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub fn is_ejected(&self) -> bool {
        lock(&self.outlier).is_ejected()
    }

    fn waiting_since(&self) -> Instant {
        self.base + Duration::from_millis(self.waiting_since_ms.load(Ordering::Relaxed))
    }
}

/// A try under way at a target: counted as load until it is dropped.
pub struct Flight {
    pub target: Arc<Target>,
}

impl Flight {
    pub fn begin(target: Arc<Target>) -> Self {
        target.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { target }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.target.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request that waits for its response's head, which is what a hang shows in.
pub struct Waiting<'a> {
    target: &'a Target,
}

impl<'a> Waiting<'a> {
    pub fn begin(target: &'a Target, now: Instant) -> Self {
        if target.waiting.fetch_add(1, Ordering::Relaxed) == 0 {
            target.waiting_since_ms.store(ms_since(target.base, now), Ordering::Relaxed);
        }
        Self { target }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.target.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
