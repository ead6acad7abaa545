//! One running gateway: what its parts share, and the tasks that it consists of. It needs no federation:
//! whoever starts it hands in identity, trust and snapshot.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn::Endpoint;
use rustls::pki_types::UnixTime;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tombolo_core::id::{ClusterId, GatewayId};
use tombolo_core::liveness::LivenessConfig;
use tombolo_core::refusal::Refusal;
use tombolo_leg::status::LegRefused;
use tombolo_runtime::drain::{DrainGuard, DrainWatch};
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::telemetry::Tracer;
use tombolo_trust::store::{TrustStore, Usage};
use tombolo_trust::svid::SvidSource;

use crate::config::{Congestion, LimitsConfig, SourceRange};
use crate::copy::LegEnd;
use crate::ingress;
use crate::meters::{Entrance, Meters, Peer};
use crate::peering::PeeringRelay;
use crate::resolver::Resolver;
use crate::snapshot::Snapshot;
use crate::stalls::Stalls;
use crate::tunnel::connection::{Order, Tunnel};
use crate::tunnel::endpoint::{TunnelSocket, UnusableTls};
use crate::tunnel::registry::Registry;
use crate::tunnel::{CLOSE_DONE, close_refused, dialler, doorway, unreachable};

/// What an operator decides about a gateway.
#[derive(Debug, Clone)]
pub struct Settings {
    pub id: GatewayId,
    pub limits: LimitsConfig,
    pub congestion: Congestion,
    pub proxy_sources: Vec<SourceRange>,
    /// DNS servers for the names of peers' gateways; empty for the system's.
    pub resolvers: Vec<SocketAddr>,
    pub liveness: LivenessConfig,
}

/// What a gateway is started with.
pub struct Parts {
    pub settings: Settings,
    pub snapshot: Snapshot,
    pub trust: TrustStore,
    pub svid: SvidSource,
    /// Bound by `tunnel::endpoint::bind`.
    pub tunnel: TunnelSocket,
    pub ingress: TcpListener,
    pub peering: PeeringRelay,
    pub tracer: Tracer,
    pub metrics: Metrics,
    pub drain: DrainWatch,
}

/// What came of dialling one gateway of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LastDial {
    /// What its names resolved to, and the addresses that it advertises.
    pub addresses: Vec<SocketAddr>,
    /// Why no address answered, if none did.
    pub error: Option<String>,
}

/// What all parts of a gateway share.
pub struct Gateway {
    pub settings: Settings,
    pub trust: TrustStore,
    pub svid: SvidSource,
    pub endpoint: Endpoint,
    pub registry: Registry,
    pub stalls: Stalls,
    pub meters: Meters,
    pub tracer: Tracer,
    pub drain: DrainWatch,
    pub peering: PeeringRelay,
    pub resolver: Resolver,
    /// Of each gateway of a peer.
    pub dials: Mutex<BTreeMap<(ClusterId, GatewayId), LastDial>>,
    snapshot: ArcSwap<Snapshot>,
    snapshot_changed: watch::Sender<u64>,
    legs: Arc<Semaphore>,
    choices: AtomicUsize,
}

/// A gateway with its tasks. They end when this is dropped.
pub struct Running {
    pub gateway: Arc<Gateway>,
    _tasks: JoinSet<()>,
}

/// How often the state that only time changes is looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

impl Gateway {
    pub fn start(parts: Parts) -> Result<Running, UnusableTls> {
        let limits = &parts.settings.limits;
        let gateway = Arc::new(Gateway {
            registry: Registry::new(
                parts.snapshot.cluster.clone(),
                parts.settings.id.clone(),
                limits.connections_per_peer as usize,
            ),
            stalls: Stalls::new(limits.stream_window.into(), limits.stalled),
            meters: Meters::new(&parts.metrics),
            legs: Arc::new(Semaphore::new(limits.legs as usize)),
            choices: AtomicUsize::new(0),
            snapshot: ArcSwap::from_pointee(parts.snapshot),
            snapshot_changed: watch::Sender::new(0),
            resolver: Resolver::new(parts.settings.resolvers.clone()),
            dials: Mutex::default(),
            settings: parts.settings,
            trust: parts.trust,
            svid: parts.svid,
            endpoint: parts.tunnel.endpoint,
            tracer: parts.tracer,
            drain: parts.drain,
            peering: parts.peering,
        });
        doorway::open(&gateway)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(doorway::accept_all(gateway.clone()));
        tasks.spawn(dialler::dial_all(gateway.clone()));
        tasks.spawn(unreachable::tell_all(gateway.registry.clone(), parts.tunnel.errors));
        tasks.spawn(ingress::accept_all(gateway.clone(), parts.ingress));
        tasks.spawn(guard_tunnels(gateway.clone()));
        tasks.spawn(announce_drain(gateway.clone()));
        Ok(Running { gateway, _tasks: tasks })
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Replaces all that the federation told. Tunnels with peers that are gone end at once.
    pub fn set_snapshot(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
        self.snapshot_changed.send_modify(|generation| *generation += 1);
    }

    /// Yields whenever the snapshot was replaced.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.snapshot_changed.subscribe()
    }

    /// The number by which an endpoint is chosen where the caller names none.
    pub fn next_choice(&self) -> usize {
        self.choices.fetch_add(1, Ordering::Relaxed)
    }

    /// A refusal in this gateway's name.
    pub fn refuse(&self, refusal: Refusal, detail: impl Into<String>) -> LegRefused {
        LegRefused { refusal, detail: detail.into(), retry_after: None, gateway_id: Some(self.settings.id.clone()) }
    }

    /// Room for one more leg. A gateway that drains, or that carries all that it may, has none.
    pub fn admit_leg(&self, entrance: Entrance) -> Result<LegPermit, Refusal> {
        if self.drain.is_draining() {
            return Err(Refusal::Draining);
        }
        let permit = self.legs.clone().try_acquire_owned().map_err(|_| Refusal::Overloaded)?;
        self.meters.legs_open.get_or_create(&entrance).inc();
        Ok(LegPermit { entrance, meters: self.meters.clone(), _permit: permit, _drain: self.drain.track() })
    }

    /// Legs being carried, or about to be.
    pub fn legs(&self) -> usize {
        (self.settings.limits.legs as usize).saturating_sub(self.legs.available_permits())
    }

    /// Ends every tunnel that is no longer allowed, whatever it carries.
    fn enforce_trust(&self) {
        for tunnel in self.registry.all() {
            if let Err(refusal) = self.still_allowed(&tunnel) {
                tracing::info!(peer = %tunnel.remote.cluster, gateway = %tunnel.remote.gateway, reason = refusal.code(),
                    "tunnel closed: its peer is no longer trusted");
                self.meters.refused(refusal);
                close_refused(&tunnel.connection, refusal);
            }
        }
    }

    /// Whether a tunnel that is up may stay. A certificate that has expired since keeps the legs that it
    /// brought; it only gets no new ones.
    fn still_allowed(&self, tunnel: &Tunnel) -> Result<(), Refusal> {
        let remote = &tunnel.remote;
        let snapshot = self.snapshot.load();
        let link = snapshot.peers.get(&remote.cluster).ok_or(Refusal::UnknownCluster)?;
        if link.trust_domain != *remote.spiffe_id.trust_domain() {
            return Err(Refusal::UnknownTrustDomain);
        }
        let trust = self.trust.snapshot();
        if trust.cluster_of(remote.spiffe_id.trust_domain()) != Some(&remote.cluster) {
            return Err(Refusal::UnknownTrustDomain);
        }
        let usage = if tunnel.dialled_here { Usage::Server } else { Usage::Client };
        trust.verify(&remote.chain, usage, tunnel.established).map(drop)
    }

    fn measure(&self) {
        let now = UnixTime::now();
        self.meters.stalled.set(self.stalls.stalled().try_into().unwrap_or(i64::MAX));
        let tunnels = self.registry.all();
        for cluster in self.snapshot.load().peers.keys() {
            let peer = Peer { peer: cluster.to_string() };
            let held = tunnels.iter().filter(|tunnel| tunnel.remote.cluster == *cluster);
            let up = held.clone().filter(|tunnel| tunnel.is_usable(now));
            let rtt = up.clone().map(|tunnel| tunnel.rtt()).min().unwrap_or_default();
            self.meters.tunnels.get_or_create(&peer).set(held.count().try_into().unwrap_or(i64::MAX));
            self.meters.tunnels_up.get_or_create(&peer).set(up.count().try_into().unwrap_or(i64::MAX));
            self.meters.tunnel_rtt_us.get_or_create(&peer).set(rtt.as_micros().try_into().unwrap_or(i64::MAX));
        }
    }
}

/// Room for one leg, given back when it ends.
pub struct LegPermit {
    entrance: Entrance,
    meters: Meters,
    _permit: OwnedSemaphorePermit,
    _drain: DrainGuard,
}

impl LegPermit {
    /// The way is open: the leg counts as accepted.
    pub fn accepted(&self) {
        self.meters.legs.get_or_create(&self.entrance).inc();
    }

    pub fn ended(self, end: LegEnd) {
        self.meters.ended(end);
    }
}

impl Drop for LegPermit {
    fn drop(&mut self) {
        self.meters.legs_open.get_or_create(&self.entrance).dec();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.gateway.endpoint.close(CLOSE_DONE, b"stopped");
    }
}

/// Applies every change of trust and peers to the tunnels that are up.
async fn guard_tunnels(gateway: Arc<Gateway>) {
    let mut trust = gateway.trust.subscribe();
    let mut snapshot = gateway.subscribe();
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Ok(()) = trust.changed() => gateway.enforce_trust(),
            Ok(()) = snapshot.changed() => gateway.enforce_trust(),
            _ = tick.tick() => {
                // Certificates expire without an event.
                gateway.registry.settle();
                gateway.measure();
            }
        }
    }
}

/// Tells every peer that no new legs are wanted, as soon as the process drains.
async fn announce_drain(gateway: Arc<Gateway>) {
    gateway.drain.draining().await;
    let left = gateway.drain.deadline().map(|at| at.saturating_duration_since(tokio::time::Instant::now()));
    for tunnel in gateway.registry.all() {
        tunnel.order(Order::Drain(left.unwrap_or_default()));
    }
}
