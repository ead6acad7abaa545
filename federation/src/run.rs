//! Runs a federation: opens the state, starts the hub and everything around it, and drains.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tombolo_api::proto::identity::identity_server::IdentityServer;
use tombolo_core::id::{Role, SpiffeId};
use tombolo_core::service_account::Accounts;
use tombolo_leg::dial::Dialer;
use tombolo_runtime::admin::Admin;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::process::{self, Process};
use tombolo_runtime::readiness::Readiness;
use tombolo_trust::atomic;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::grpc::{ALPN_H2, Incoming};
use tombolo_trust::issuer::Issuer;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ClientAuth, RootInChain};

use crate::addresses::Allocator;
use crate::config::{Config, SourceConfig};
use crate::discovery::DiscoveryService;
use crate::hub::{self, HubHandle, HubStart, PeeringEvent, remembered};
use crate::identity::{IdentityService, Reviewer};
use crate::kubernetes::{self, Candidate, Leadership};
use crate::mcs::Writer;
use crate::operator::{OperatorService, OperatorSocket};
use crate::peering::{self, Peering};
use crate::report;
use crate::source::kubernetes::{KubernetesSettings, start as start_kubernetes};
use crate::source::{self, SourceHandle, SourceSettings};
use crate::store::{Store, StoreError};
use crate::sync::publisher::Publisher;
use crate::sync::subscriber::{self, Subscriber};
use crate::webhook;

/// The name under which a federation announces its addresses, and of its metrics.
pub const ROLE: &str = "federation";
/// How long after its expiry an SVID can still be renewed with the same key.
const RENEWAL_GRACE: std::time::Duration = std::time::Duration::from_secs(24 * 3600);
/// How often a client of discovery is asked whether it lives.
const KEEP_ALIVE: std::time::Duration = std::time::Duration::from_secs(5);

/// How often the state directory is asked for that another replica still has.
const STATE_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// What is durable, and who this process is.
struct Base {
    ca: CertificateAuthority,
    store: Store,
    trust: TrustStore,
    svid: SvidSource,
}

/// The hub, as soon as there is one: what the admin port shows.
type Shown = Arc<OnceLock<HubHandle>>;

/// Runs a federation until it has drained. With an API server it stands by until it leads, and ends with an error when
/// another replica does.
pub async fn run(config: Config, process: Process) -> anyhow::Result<()> {
    let opened = open_source(&config.source).await?;
    let shown = Shown::default();
    let admin = start_admin(&config, &process, shown.clone()).await?;
    let (OpenedSource::Kubernetes { client, .. }, SourceConfig::Kubernetes(kubernetes)) = (&opened, &config.source)
    else {
        return lead(config, process, opened, Leadership::default(), admin, shown).await;
    };
    let leads = process.readiness.condition("leader", "it is not known yet who leads");
    let identity = kubernetes.identity.clone().map_or_else(host_name, Ok)?;
    let mut candidate = Candidate::new(client.clone(), &kubernetes.namespace, identity, kubernetes.lease_duration);
    tokio::select! {
        () = candidate.until_leading(|holder| leads.fails(format!("{holder} leads; this replica stands by"))) => {}
        () = process.drain.draining() => return Ok(()),
    }
    leads.holds();
    let leadership = candidate.leadership();
    let drain = process.drain.clone();
    let mut keeping = tokio::spawn(candidate.keep(drain.clone()));
    let mut leading = pin!(lead(config, process, opened, leadership, admin, shown));
    tokio::select! {
        ended = &mut leading => {
            if drain.is_draining() {
                // The lease is given up first, or has run out of patience.
                keeping.await.context("the task that keeps the lease panicked")?;
            } else {
                keeping.abort();
            }
            ended
        }
        kept = &mut keeping => match kept.context("the task that keeps the lease panicked")? {
            Some(lost) => Err(lost.into()),
            None => leading.await,
        },
    }
}

/// Does everything that a federation does.
async fn lead(
    config: Config,
    process: Process,
    opened: OpenedSource,
    leadership: Leadership,
    admin: Admin,
    shown: Shown,
) -> anyhow::Result<()> {
    let base = open_when_free(&config, &opened, &process.drain).await?;
    let operator = OperatorSocket::bind(&config.state)?;
    let discovery = bind("discovery", config.discovery).await?;
    let legs = bind("legs", config.legs).await?;
    let (discovery_address, legs_address) = (discovery.local_addr()?, legs.local_addr()?);

    let (hub, events) = start_hub(&config, &base, &process.metrics).await?;
    _ = shown.set(hub.clone());
    let mut tasks = JoinSet::new();
    let started = start_source(&config, &opened, &base, &hub, &process.readiness, &mut tasks);
    let source = tokio::select! {
        started = started => started?,
        // An API server may be away for long.
        () = process.drain.draining() => return Ok(()),
    };
    let peering = start_peering(&config, &base, &hub, events, &process.metrics).await?;
    let ranges = config.virtual_addresses;
    let allocator = Allocator::start(hub.clone(), base.store.clone(), ranges, &process.metrics).await?;
    tasks.spawn(allocator.run());
    let identity = identity_server(&config, &opened, &base, &process.metrics);
    let webhook = start_webhook(&config, &opened, &base, &process.metrics, &mut tasks).await?;
    if let OpenedSource::Kubernetes { client, .. } = opened {
        tasks.spawn(Writer::new(client, leadership, hub.clone(), source.state(), &process.metrics).run());
    }
    tasks.spawn(peering::follow_declared(peering.clone(), source.clone()));
    tasks.spawn(remembered::follow(hub.clone(), config.state.clone()));
    tasks.spawn(report::follow(hub.clone(), process.metrics.clone()));

    let mut servers = JoinSet::new();
    serve_discovery(&base, &hub, &process, identity, discovery, legs_address, &mut servers);
    serve_sync(&base, &hub, &process, legs, &mut servers, &mut tasks);
    let operator_service = OperatorService {
        trust_domain: config.trust_domain(),
        hub: hub.clone(),
        store: base.store.clone(),
        source,
        peering,
        ca: base.ca.clone(),
        version: env!("CARGO_PKG_VERSION"),
    };
    let stop = process.drain.clone();
    let serve_operator = operator.serve(operator_service.server(), async move { stop.draining().await });
    servers.spawn(async move { serve_operator.await.context("the operator's socket") });

    let addresses = [("discovery", discovery_address), ("legs", legs_address), ("admin", admin.address())];
    let addresses = addresses.into_iter().chain(webhook.map(|address| ("webhook", address)));
    process::announce(&config.state, ROLE, &addresses.collect())
        .context("announcing the addresses in the state directory")?;
    tracing::info!(cluster = %config.cluster, %discovery_address, %legs_address, "federation listens");

    let ended = serve(servers, &process.drain).await;
    tasks.shutdown().await;
    process::withdraw(&config.state, ROLE)?;
    ended
}

async fn start_admin(config: &Config, process: &Process, shown: Shown) -> anyhow::Result<Admin> {
    let state = Arc::new(move || match shown.get() {
        Some(hub) => report::state(&hub.view()),
        None => serde_json::json!({ "leads": false }),
    });
    let redacted = serde_json::to_value(config)?;
    let admin = Admin::start(config.admin, process.metrics.clone(), process.readiness.clone(), redacted, state).await;
    admin.with_context(|| format!("can't listen on {} (admin)", config.admin))
}

async fn start_hub(
    config: &Config,
    base: &Base,
    metrics: &Metrics,
) -> anyhow::Result<(HubHandle, mpsc::Receiver<PeeringEvent>)> {
    let start = HubStart {
        cluster: config.cluster.clone(),
        trust_domain: config.trust_domain(),
        bundle: base.ca.bundle(),
        trust: base.trust.clone(),
        store: base.store.clone(),
        metrics: metrics.clone(),
        default_access: config.default_access,
        remembered: remembered::load(&config.state),
    };
    let (hub, events) = hub::start(start);
    let revoked = base.store.revoked();
    hub.own_revoked(revoked.sequence, revoked.ids).await?;
    Ok((hub, events))
}

/// What a replica is called that is not given a name: in a pod, the pod's name.
fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("reading the host's name")?;
    anyhow::ensure!(!name.trim().is_empty(), "this host has no name; set source.kubernetes.identity");
    Ok(name.trim().to_owned())
}

/// A replica that has just taken the lease waits for the state until the last leader has ended.
async fn open_when_free(config: &Config, source: &OpenedSource, drain: &DrainWatch) -> anyhow::Result<Base> {
    loop {
        let opened = open(config);
        let in_use = opened
            .as_ref()
            .is_err_and(|error| matches!(error.downcast_ref::<StoreError>(), Some(StoreError::InUse { .. })));
        match source {
            OpenedSource::Kubernetes { .. } if in_use && !drain.is_draining() => tokio::time::sleep(STATE_PAUSE).await,
            OpenedSource::Kubernetes { .. } | OpenedSource::Directory(_) => return opened,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KnockLabels {
    reason: &'static str,
}

/// Tells the hub of every stored peer, and handles what gateways report of peerings from now on.
async fn start_peering(
    config: &Config,
    base: &Base,
    hub: &HubHandle,
    events: mpsc::Receiver<PeeringEvent>,
    metrics: &Metrics,
) -> anyhow::Result<Peering> {
    let knocks = metrics.counters::<KnockLabels>("tombolo_peering_refused", "Redemptions refused, by reason");
    let on_refused = move |reason| {
        knocks.get_or_create_owned(&KnockLabels { reason }).inc();
    };
    let (ca, store, relay) = (base.ca.clone(), base.store.clone(), Box::new(hub.clone()));
    Ok(Peering::start(ca, config.cluster.clone(), store, relay, events, Box::new(on_refused)).await?)
}

fn open(config: &Config) -> anyhow::Result<Base> {
    let trust_domain = config.trust_domain();
    let in_state = || format!("the state directory {}", config.state.display());
    atomic::create_private_dir(&config.state).with_context(in_state)?;
    let store = Store::open(&config.state, &config.cluster, &trust_domain, Timestamp::now())?;
    let ca = CertificateAuthority::create_or_load(&config.state, &trust_domain)?;
    let trust = TrustStore::new();
    trust.set_own(ca.bundle())?;
    let instance = ROLE.parse().expect("a constant valid label");
    let svid = ca.own_svid(&SpiffeId::role(&trust_domain, Role::Federation, &instance), config.svid_life)?;
    Ok(Base { ca, store, trust, svid })
}

async fn bind(field: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("can't listen on {address} ({field})"))
}

/// Where the source is read.
enum OpenedSource {
    Directory(PathBuf),
    Kubernetes { client: kube::Client, server: String },
}

async fn open_source(config: &SourceConfig) -> anyhow::Result<OpenedSource> {
    Ok(match config {
        SourceConfig::Directory(directory) => OpenedSource::Directory(directory.clone()),
        SourceConfig::Kubernetes(kubernetes) => {
            let (client, server) = kubernetes::connect(kubernetes).await?;
            OpenedSource::Kubernetes { client, server }
        }
    })
}

/// Reads the source once before anybody is answered, so that a restart does not look like a withdrawal.
async fn start_source(
    config: &Config,
    opened: &OpenedSource,
    base: &Base,
    hub: &HubHandle,
    readiness: &Readiness,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<SourceHandle> {
    let read = readiness.condition("source", "the source has not been read yet");
    let (cluster, trust_domain) = (config.cluster.clone(), config.trust_domain());
    let source = match opened {
        OpenedSource::Directory(directory) => {
            let settings = SourceSettings { directory: directory.clone(), cluster, trust_domain };
            source::start(settings, base.store.clone()).await
        }
        OpenedSource::Kubernetes { client, server } => {
            let (client, server) = (client.clone(), server.clone());
            start_kubernetes(KubernetesSettings { client, server, cluster, trust_domain }).await
        }
    };
    let first = source.state().borrow().as_ref().clone();
    hub.local_changed(first).await?;
    read.holds();
    let (fed, hub) = (source.clone(), hub.clone());
    tasks.spawn(async move { source::feed(&fed, hub).await });
    Ok(source)
}

async fn start_webhook(
    config: &Config,
    opened: &OpenedSource,
    base: &Base,
    metrics: &Metrics,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<Option<SocketAddr>> {
    let (Some(injection), OpenedSource::Kubernetes { client, .. }, SourceConfig::Kubernetes(kubernetes)) =
        (&config.injection, opened, &config.source)
    else {
        return Ok(None);
    };
    let start = webhook::Start {
        client: client.clone(),
        config: injection,
        cluster: &config.cluster,
        namespace: &kubernetes.namespace,
        trust_domain: &config.trust_domain(),
        ca: &base.ca,
        metrics,
    };
    webhook::start(start, tasks).await.map(Some)
}

fn identity_server(
    config: &Config,
    opened: &OpenedSource,
    base: &Base,
    metrics: &Metrics,
) -> IdentityServer<IdentityService> {
    let reviewer = match (opened, &config.source) {
        (OpenedSource::Kubernetes { client, .. }, SourceConfig::Kubernetes(kubernetes)) => {
            let accounts = Accounts {
                trust_domain: config.trust_domain(),
                namespace: kubernetes.namespace.clone(),
                gateways: kubernetes.roles.gateway.clone(),
            };
            Some(Reviewer::new(client.clone(), accounts))
        }
        _ => None,
    };
    let issuer = Issuer { ca: base.ca.clone(), life: config.svid_life, grace: RENEWAL_GRACE };
    IdentityService::server(issuer, base.store.clone(), reviewer, metrics.refusals(ROLE))
}

fn serve_discovery(
    base: &Base,
    hub: &HubHandle,
    process: &Process,
    identity: IdentityServer<IdentityService>,
    listener: TcpListener,
    legs: SocketAddr,
    servers: &mut JoinSet<anyhow::Result<()>>,
) {
    let refusals = process.metrics.refusals(ROLE);
    let counted = refusals.clone();
    let on_refused = move |refusal: tombolo_core::refusal::Refusal, address| {
        counted.inc(refusal);
        tracing::warn!(%address, reason = refusal.code(), "a connection to discovery is refused");
    };
    let drain = process.drain.clone();
    let discovery = DiscoveryService::server(hub.clone(), legs.to_string(), refusals, drain.clone());
    // Whoever has no identity yet comes here to get one; discovery itself demands a certificate.
    let tls = tls::server_config(&base.svid, &base.trust, ClientAuth::Optional, &[ALPN_H2], RootInChain::No);
    let incoming = Incoming::new(listener, tls, Arc::new(on_refused));
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(identity)
        .add_service(discovery)
        .serve_with_incoming_shutdown(incoming, async move { drain.draining().await });
    servers.spawn(async move { server.await.context("discovery") });
}

fn serve_sync(
    base: &Base,
    hub: &HubHandle,
    process: &Process,
    listener: TcpListener,
    servers: &mut JoinSet<anyhow::Result<()>>,
    tasks: &mut JoinSet<()>,
) {
    let publisher = Publisher {
        hub: hub.clone(),
        svid: base.svid.clone(),
        trust: base.trust.clone(),
        refusals: process.metrics.refusals(ROLE),
        drain: process.drain.clone(),
    };
    servers.spawn(async move { publisher.serve(listener).await.context("peer sync") });
    let dialer = Dialer::new(base.svid.clone(), base.trust.clone());
    let route = Arc::new(subscriber::over_gateways);
    tasks.spawn(Subscriber::new(hub.clone(), dialer, base.trust.clone(), route).run());
}

/// Until every server has drained, or one has failed, or the drain's deadline.
async fn serve(mut servers: JoinSet<anyhow::Result<()>>, drain: &DrainWatch) -> anyhow::Result<()> {
    let guard = drain.track();
    loop {
        tokio::select! {
            ended = servers.join_next() => match ended {
                None => break,
                Some(ended) => ended.context("a server panicked")??,
            },
            () = drain.stopped() => break,
        }
    }
    drop(guard);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::path::Path;
    use tombolo_runtime::config::parse;
    use tombolo_runtime::drain::{DrainOutcome, drain};
    use tombolo_runtime::telemetry::Tracer;

    use crate::testing::{DEADLINE, until};

    const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {tombolo.dev/service-accounts: web}}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: web, namespace: shop}
";

    async fn get(address: SocketAddr, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_federation_starts_shows_its_state_and_drains() {
        let folder = tempfile::tempdir().unwrap();
        let (state, source) = (folder.path().join("state"), folder.path().join("source"));
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("web.yaml"), SERVICE).unwrap();
        let text = format!(
            "cluster: east\nstate: {}\nsource: {{directory: {}}}\n\
             discovery: 127.0.0.1:0\nlegs: 127.0.0.1:0\nadmin: 127.0.0.1:0\n",
            state.display(),
            source.display()
        );
        let config: Config = parse(&text, Path::new("federation.yaml")).unwrap();
        let (trigger, watch) = drain();
        let process = Process {
            name: ROLE.into(),
            readiness: Readiness::new(watch.clone()),
            drain: watch,
            metrics: Metrics::new(ROLE),
            tracer: Tracer::Off,
        };
        let running = tokio::spawn(run(config, process));
        let announced = || process::announced(&state, ROLE).unwrap();
        until("it listens", || announced().is_some()).await;
        let admin = announced().unwrap().addresses["admin"];
        assert!(get(admin, "/readyz").await.contains("200 OK"));
        let shown = get(admin, "/state").await;
        assert!(shown.contains("shop/web") && !shown.contains("PRIVATE"), "{shown}");
        assert!(get(admin, "/metrics").await.contains("tombolo_services 1"));
        assert!(state.join("ca.pem").exists() && state.join("operator.sock").exists());

        assert_eq!(trigger.drain(DEADLINE).await, DrainOutcome::Clean);
        tokio::time::timeout(DEADLINE, running).await.unwrap().unwrap().unwrap();
        assert!(announced().is_none() && !state.join("operator.sock").exists());
    }
}
