//! One gateway process: identity, discovery, sockets, and their end.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tombolo_core::id::Role;
use tombolo_core::liveness::LivenessConfig;
use tombolo_core::service_account::Asked;
use tombolo_leg::discovery::{Federation, GatewayDiscovery, GatewayHello, PeeringCommand, PeeringReport};
use tombolo_runtime::admin::Admin;
use tombolo_runtime::process::{Process, announce, withdraw};
use tombolo_runtime::readiness::Condition;
use tombolo_trust::atomic;
use tombolo_trust::identity::{self, FirstProof, IdentityConfig};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;

use crate::config::Config;
use crate::gateway::{Gateway, Parts, Running, Settings};
use crate::peering::{self, PeeringRelay};
use crate::reports;
use crate::snapshot::Snapshot;
use crate::tunnel::endpoint::{self, EndpointKeys, TunnelSocket};
use crate::{unmeshed, watch};

const ROLE: &str = "gateway";
/// What the federation last told, in the state directory.
const MEMORY_FILE: &str = "last-told";

/// The sockets of a gateway, bound before anything is served on them.
struct Sockets {
    tunnel: TunnelSocket,
    ingress: TcpListener,
    watch: TcpListener,
}

impl Sockets {
    async fn bind(config: &Config) -> anyhow::Result<Self> {
        let keys = EndpointKeys::load_or_create(&config.state)
            .with_context(|| format!("can't keep the tunnel's keys in {}", config.state.display()))?;
        let tunnel = endpoint::bind(config.tunnel, &keys)
            .with_context(|| format!("can't listen on UDP {} (tunnel)", config.tunnel))?;
        let ingress = TcpListener::bind(config.ingress)
            .await
            .with_context(|| format!("can't listen on TCP {} (ingress)", config.ingress))?;
        let watch = TcpListener::bind(config.watch)
            .await
            .with_context(|| format!("can't listen on TCP {} (watch)", config.watch))?;
        Ok(Self { tunnel, ingress, watch })
    }

    fn hello(&self, config: &Config) -> std::io::Result<GatewayHello> {
        let tunnel = self.tunnel.endpoint.local_addr()?;
        let advertise = config.advertise.iter().map(|address| advertised(Some(address), tunnel));
        Ok(GatewayHello {
            gateway_id: config.id.clone(),
            advertise: advertise.collect(),
            ingress_address: advertised(config.advertise_ingress.as_deref(), self.ingress.local_addr()?),
            watch_address: advertised(config.advertise_watch.as_deref(), self.watch.local_addr()?),
            unmeshed_address: config.unmeshed_address(),
        })
    }
}

/// What is told of a socket: the address that others reach it at, else the one that it is bound to. Port 0
/// stands for the port that was found free.
fn advertised(address: Option<&str>, bound: SocketAddr) -> String {
    let Some(address) = address else { return bound.to_string() };
    match address.strip_suffix(":0") {
        Some(host) => format!("{host}:{}", bound.port()),
        None => address.to_owned(),
    }
}

/// What the admin port shows before and after the first snapshot.
type Shown = Arc<OnceLock<(Arc<Gateway>, GatewayDiscovery)>>;

/// Runs a gateway until it has drained.
pub async fn run(config: Config, process: Process) -> anyhow::Result<()> {
    atomic::create_private_dir(&config.state)
        .with_context(|| format!("can't make the state directory {}", config.state.display()))?;
    let identity_ready = process.readiness.condition("identity", "no SVID from the federation yet");
    let snapshot_ready = process.readiness.condition("discovery", "no snapshot from the federation yet");
    let sockets_ready = process.readiness.condition("sockets", "not listening yet");
    let sockets = Sockets::bind(&config).await?;
    let addresses = BTreeMap::from([
        ("tunnel", sockets.tunnel.endpoint.local_addr()?),
        ("ingress", sockets.ingress.local_addr()?),
        ("watch", sockets.watch.local_addr()?),
    ]);
    let shown = Shown::default();
    let admin = start_admin(&config, &process, &shown).await?;
    let (svid, trust) = identity::start(identity_config(&config))?;
    let started = start(&config, &process, sockets, svid, trust, identity_ready);
    let Some((mut started, watch_listener)) = unless_draining(&process, started).await.transpose()? else {
        return Ok(());
    };
    snapshot_ready.holds();
    let gateway = started.running.gateway.clone();
    // Set once, here.
    let _ = shown.set((gateway.clone(), started.discovery.clone()));
    started.tasks.spawn(async move {
        if let Err(error) = watch::serve(gateway, watch_listener).await {
            tracing::error!(%error, "GatewayWatch has stopped");
        }
    });
    announce_all(&config, addresses, &admin)?;
    sockets_ready.holds();
    process.drain.stopped().await;
    started.finish().await;
    withdraw(&config.state, ROLE)?;
    Ok(())
}

fn identity_config(config: &Config) -> IdentityConfig {
    IdentityConfig {
        federation: config.federation.address.clone(),
        ca: config.federation.ca.clone(),
        first_proof: FirstProof::of(config.join.as_ref(), config.token.as_ref()),
        asked: Asked::Role(Role::Gateway),
        state: config.state.clone(),
    }
}

async fn start_admin(config: &Config, process: &Process, shown: &Shown) -> anyhow::Result<Admin> {
    let shown = shown.clone();
    let state = Arc::new(move || match shown.get() {
        Some((gateway, discovery)) => reports::state(gateway, &discovery.status().borrow()),
        None => json!({ "waiting": "for identity and snapshot from the federation" }),
    });
    Admin::start(config.admin, process.metrics.clone(), process.readiness.clone(), serde_json::to_value(config)?, state)
        .await
        .with_context(|| format!("can't listen on TCP {} (admin)", config.admin))
}

fn announce_all(
    config: &Config,
    mut addresses: BTreeMap<&'static str, SocketAddr>,
    admin: &Admin,
) -> anyhow::Result<()> {
    addresses.insert("admin", admin.address());
    announce(&config.state, ROLE, &addresses)
        .with_context(|| format!("can't announce the addresses in {}", config.state.display()))?;
    tracing::info!(?addresses, "gateway is up");
    Ok(())
}

/// `None` when the process was told to stop before `future` was done.
async fn unless_draining<T>(process: &Process, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        done = future => Some(done),
        () = process.drain.draining() => None,
    }
}

/// A gateway with what keeps it informed.
struct Started {
    running: Running,
    tasks: JoinSet<()>,
    discovery: GatewayDiscovery,
}

impl Started {
    /// Says goodbye to the far gateways, so that they need not find out.
    async fn finish(self) {
        let endpoint = self.running.gateway.endpoint.clone();
        drop(self);
        // The closing packets are sent by then; their repetition is not worth waiting for.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(200), endpoint.wait_idle()).await;
    }
}

/// Waits for identity and the first snapshot, then starts to carry legs.
async fn start(
    config: &Config,
    process: &Process,
    sockets: Sockets,
    svid: SvidSource,
    trust: TrustStore,
    identity_ready: Condition,
) -> anyhow::Result<(Started, TcpListener)> {
    let own = svid.wait().await;
    identity_ready.holds();
    tracing::info!(id = %own.id, "identity");
    let federation = Federation {
        address: config.federation.address.clone(),
        svid: svid.clone(),
        trust: trust.clone(),
        memory: Some(config.state.join(MEMORY_FILE)),
    };
    let (discovery, commands) = GatewayDiscovery::start(federation, sockets.hello(config)?);
    let snapshot = first_snapshot(&discovery).await?;
    let (peering, reports) = PeeringRelay::new(config.limits.peerings as usize);
    let running = Gateway::start(Parts {
        settings: Settings {
            id: config.id.clone(),
            limits: config.limits.clone(),
            congestion: config.congestion,
            proxy_sources: config.proxy_sources.clone(),
            resolvers: config.resolvers.clone(),
            liveness: LivenessConfig::default(),
        },
        snapshot,
        trust,
        svid,
        tunnel: sockets.tunnel,
        ingress: sockets.ingress,
        peering,
        tracer: process.tracer.clone(),
        metrics: process.metrics.clone(),
        drain: process.drain.clone(),
    })?;
    let mut tasks = JoinSet::new();
    let gateway = &running.gateway;
    tasks.spawn(follow(gateway.clone(), discovery.clone()));
    tasks.spawn(obey(gateway.clone(), commands));
    tasks.spawn(tell(discovery.clone(), reports));
    tasks.spawn(reports::report_tunnels(gateway.clone(), discovery.clone()));
    tasks.spawn(reports::follow_federation(gateway.meters.clone(), discovery.status()));
    if let Some(bound) = config.unmeshed {
        let svid = identity::unmeshed::start(&identity_config(config), gateway.svid.clone(), &gateway.trust)?;
        let settings = unmeshed::Settings { bound, sources: config.unmeshed_sources.clone() };
        let listeners = unmeshed::Listeners::new(gateway.clone(), svid, settings).await?;
        tasks.spawn(listeners.run());
    }
    Ok((Started { running, tasks, discovery }, sockets.watch))
}

async fn first_snapshot(discovery: &GatewayDiscovery) -> anyhow::Result<Snapshot> {
    let (mut welcome, mut state) = (discovery.welcome(), discovery.snapshot());
    welcome.wait_for(Option::is_some).await?;
    state.wait_for(Option::is_some).await?;
    snapshot(discovery).context("both are there and are never taken back")
}

fn snapshot(discovery: &GatewayDiscovery) -> Option<Snapshot> {
    let welcome = discovery.welcome().borrow().clone()?;
    let state = discovery.snapshot().borrow().clone()?;
    Some(Snapshot::new(welcome, (*state).clone()))
}

/// Hands every change on to the gateway.
async fn follow(gateway: Arc<Gateway>, discovery: GatewayDiscovery) {
    let (mut welcome, mut state) = (discovery.welcome(), discovery.snapshot());
    loop {
        tokio::select! {
            changed = welcome.changed() => if changed.is_err() { return },
            changed = state.changed() => if changed.is_err() { return },
        }
        if let Some(snapshot) = snapshot(&discovery) {
            gateway.set_snapshot(snapshot);
        }
    }
}

async fn obey(gateway: Arc<Gateway>, mut commands: mpsc::Receiver<PeeringCommand>) {
    while let Some(command) = commands.recv().await {
        peering::handle(&gateway, command);
    }
}

async fn tell(discovery: GatewayDiscovery, mut reports: mpsc::Receiver<PeeringReport>) {
    while let Some(report) = reports.recv().await {
        if let Err(error) = discovery.report_peering(report) {
            tracing::warn!(%error, "a peering attempt is given up");
        }
    }
}
