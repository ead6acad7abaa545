//! The sidecar: everything an application says to other services, and everything said to it, passes here.
//!
//! `outbound` takes the application's calls, picks an endpoint and carries them over an inner leg. `inbound` takes
//! the legs of others, authorizes each request and hands it to the application. `health` checks the application, and
//! `registration` tells federation what is served here.

pub mod capture;
pub mod config;
pub mod dns;
pub mod explain;
pub mod health;
pub mod inbound;
pub mod outbound;
mod peek;
mod probe;
pub mod probes;
pub mod registration;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tombolo_core::addresses::mesh::MeshAddresses;
use tombolo_core::service_account::Asked;
use tombolo_leg::discovery::{Federation, LinkStatus, SidecarDiscovery};
use tombolo_runtime::admin::{Admin, Questions};
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::process::{self, Process};
use tombolo_runtime::readiness::Readiness;
use tombolo_trust::atomic;
use tombolo_trust::identity::{self, FirstProof, IdentityConfig};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;

pub use config::Config;
use config::{ListenerConfig, ServicePortName};
use health::Verdicts;
use inbound::{Discovered, Inbound};
use outbound::Outbound;
use registration::TellFederation;

/// The name under which a sidecar announces its addresses.
pub const ROLE: &str = "sidecar";
/// What the federation last told, in the state directory.
const MEMORY_FILE: &str = "last-told";

/// Runs a sidecar until it has drained.
pub async fn run(config: Config, process: Process) -> anyhow::Result<()> {
    atomic::create_private_dir(&config.state)
        .with_context(|| format!("can't make the state directory {}", config.state.display()))?;
    let (svid, trust) = identity::start(IdentityConfig {
        federation: config.federation.address.clone(),
        ca: config.federation.ca.clone(),
        first_proof: FirstProof::of(config.join.as_ref(), config.token.as_ref()),
        asked: Asked::Workload,
        state: config.state.clone(),
    })?;
    let federation = Federation {
        address: config.federation.address.clone(),
        svid: svid.clone(),
        trust: trust.clone(),
        memory: Some(config.state.join(MEMORY_FILE)),
    };
    let discovery = SidecarDiscovery::start(federation, config.instance.clone(), config.zone.clone());
    tokio::spawn(follow_readiness(process.readiness.clone(), svid.clone(), discovery.clone()));
    tokio::spawn(follow_federation(process.metrics.clone(), discovery.status()));

    let outbound = Outbound::new(&config, &process, &svid, &trust, Box::new(discovery.clone()));
    let mut addresses = BTreeMap::new();
    addresses.insert("outbound".to_owned(), listen(&outbound, config.outbound, None).await.context("outbound")?);
    for (n, ListenerConfig { listen: address, to }) in config.listeners.iter().enumerate() {
        let bound = listen(&outbound, *address, Some(to.clone())).await;
        addresses.insert(format!("listener-{n}"), bound.with_context(|| format!("listeners[{n}].listen"))?);
    }
    let served = serve_inbound(&config, &process, &svid, &trust, &discovery).await?;
    addresses.insert("inbound".to_owned(), served.address);
    if let Some(config) = &config.capture {
        let known = discovery.addresses();
        addresses.extend(capture::start(config, &outbound, &served.inbound, known.clone(), &process.metrics)?);
        tokio::spawn(follow_addresses(process.readiness.clone(), known));
    }
    if let Some(probes) = &config.probes {
        addresses.insert("probes".to_owned(), probes::start(probes, process.drain.clone()).await?);
    }
    let dns = match &config.dns {
        Some(dns) => Some(dns::start(dns, &config.limits, &discovery, &outbound, &process).await?),
        None => None,
    };
    addresses.extend(dns.iter().flat_map(dns::Running::addresses));
    let upkeep = tokio::spawn(outbound::upkeep::run(outbound.clone()));
    let gateways =
        tokio::spawn(outbound::upkeep::follow_gateways(outbound.clone(), discovery.gateways(), svid.clone()));

    let explainer = explain::Explainer {
        outbound: outbound.clone(),
        inbound: served.inbound.clone(),
        svid: svid.clone(),
        trust: trust.clone(),
    };
    let questions = Questions::from([(explain::PATH, explainer.question())]);
    let state = state_view(&outbound, served, &discovery, &svid, dns);
    let shown = serde_json::to_value(&config)?;
    let (metrics, readiness) = (process.metrics.clone(), process.readiness.clone());
    let admin = Admin::start_with(config.admin, metrics, readiness, shown, state, questions);
    let admin = admin.await.with_context(|| format!("admin {}", config.admin))?;
    addresses.insert("admin".to_owned(), admin.address());
    let named = addresses.iter().map(|(name, address)| (name.as_str(), *address)).collect();
    process::announce(&config.state, ROLE, &named).context("announcing the addresses in the state directory")?;
    tracing::info!(?addresses, "sidecar listens");

    process.drain.draining().await;
    process.drain.stopped().await;
    upkeep.abort();
    gateways.abort();
    process::withdraw(&config.state, ROLE)?;
    Ok(())
}

/// The inbound side as it runs.
struct Served {
    address: SocketAddr,
    inbound: Arc<Inbound>,
    checks: Verdicts,
}

/// Binds the inbound listener, registers what is served here and begins to check it; yields the address.
async fn serve_inbound(
    config: &Config,
    process: &Process,
    svid: &SvidSource,
    trust: &TrustStore,
    discovery: &SidecarDiscovery,
) -> anyhow::Result<Served> {
    let address = config.inbound;
    let listener = TcpListener::bind(address).await.with_context(|| format!("inbound: can't listen on {address}"))?;
    let address = listener.local_addr()?;
    let authority = Box::new(Discovered::new(discovery.clone()));
    let inbound = Inbound::new(&config.services, process, svid, trust, authority);
    tokio::spawn(inbound::run(listener, inbound.clone()));
    let checks = Verdicts::default();
    if !config.services.is_empty() {
        let advertised = config.advertise.clone().unwrap_or_else(|| address.to_string());
        registration::register(discovery, &config.services, &advertised);
        tokio::spawn(registration::watch(discovery.clone()));
        let sink = TellFederation::new(discovery.clone());
        tokio::spawn(health::run(config.services.clone(), sink, checks.clone(), process.drain.clone()));
    }
    Ok(Served { address, inbound, checks })
}

/// Binds and serves one outbound listener; yields the address that it got.
async fn listen(
    outbound: &Arc<Outbound>,
    address: SocketAddr,
    fixed: Option<ServicePortName>,
) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("can't listen on {address}"))?;
    let bound = listener.local_addr()?;
    tokio::spawn(outbound::listener::run(outbound.clone(), listener, fixed));
    Ok(bound)
}

/// Ready once there is an identity and federation has answered. A federation that goes away later leaves the
/// sidecar ready: what is known stays in force.
async fn follow_readiness(readiness: Readiness, svid: SvidSource, discovery: SidecarDiscovery) {
    let identity = readiness.condition("identity", "no identity was issued yet; the log says why");
    let known = readiness.condition("discovery", "the federation has not answered yet");
    svid.wait().await;
    identity.holds();
    let mut status = discovery.status();
    if discovery.welcome().wait_for(Option::is_some).await.is_ok() {
        known.holds();
    }
    // The identity must not expire unnoticed while its renewal fails.
    loop {
        let expired = svid.current().is_none_or(|svid| svid.has_expired(jiff::Timestamp::now()));
        if expired {
            identity.fails("the identity has expired and could not be renewed; does the federation answer?");
        } else {
            identity.holds();
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(std::time::Duration::from_secs(5)) => {}
        }
    }
}

/// While not every address of the mesh is known, captured connections to some would have to be refused.
async fn follow_addresses(readiness: Readiness, mut addresses: watch::Receiver<MeshAddresses>) {
    let known = readiness.condition("addresses", "the federation has not told every address of the mesh yet");
    loop {
        if addresses.borrow_and_update().is_complete() {
            known.holds();
        } else {
            known.fails("the federation has not told every address of the mesh yet");
        }
        if addresses.changed().await.is_err() {
            return;
        }
    }
}

/// Counts whether the federation answers, until discovery ends.
async fn follow_federation(metrics: Metrics, mut status: watch::Receiver<LinkStatus>) {
    let help = "1 while the federation answers; else what is in force is what it told last";
    let connected = metrics.gauge("tombolo_sidecar_federation_connected", help);
    let help = "1 while what is in force was told to the process before this one";
    let remembered = metrics.gauge("tombolo_sidecar_federation_remembered", help);
    loop {
        {
            let status = status.borrow_and_update();
            connected.set(status.connected.into());
            remembered.set(status.remembered.is_some().into());
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

fn state_view(
    outbound: &Arc<Outbound>,
    served: Served,
    discovery: &SidecarDiscovery,
    svid: &SvidSource,
    dns: Option<dns::Running>,
) -> Arc<dyn Fn() -> Value + Send + Sync> {
    let (outbound, discovery, svid) = (outbound.clone(), discovery.clone(), svid.clone());
    Arc::new(move || {
        let status = discovery.status().borrow().clone();
        let welcome = discovery.welcome().borrow().clone();
        json!({
            "identity": svid.current().map(|svid| json!({
                "id": svid.id,
                "notAfter": svid.not_after.to_string(),
            })),
            "cluster": welcome.map(|welcome| welcome.cluster),
            "discovery": {
                "connected": status.connected,
                "connects": status.connects,
                "lastError": status.last_error,
                "stale": !status.connected,
                "remembered": status.remembered.map(|at| at.to_string()),
            },
            "outbound": outbound.state(),
            "inbound": served.inbound.state(),
            "health": served.checks.state(),
            "dns": dns.as_ref().map(dns::Running::state),
        })
    })
}
