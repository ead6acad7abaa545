//! What a federation consists of, whether it leads or not.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tombolo_core::id::{Role, SpiffeId};
use tombolo_core::service_account::Accounts;
use tombolo_leg::dial::Dialer;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::process::{self, Process};
use tombolo_trust::atomic;
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::grpc::{ALPN_H2, Incoming};
use tombolo_trust::issuer::Issuer;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ClientAuth, RootInChain};

use super::{ROLE, Shown};
use crate::addresses::{self, Allocator, Space};
use crate::config::{Config, DnsConfig, SourceConfig};
use crate::discovery::DiscoveryService;
use crate::dns;
use crate::hub::{self, HubHandle, HubStart, PeeringEvent, remembered};
use crate::identity::{IdentityService, Reviewer, ToLeader};
use crate::kubernetes::{self, Lead};
use crate::mcs::Writer;
use crate::operator::{OperatorService, OperatorSocket, Surroundings};
use crate::peering::{self, Peering};
use crate::replica::{Follower, ReplicaService};
use crate::report;
use crate::source::kubernetes::{KubernetesSettings, start as start_kubernetes};
use crate::source::{self, SourceHandle, SourceSettings};
use crate::store::{Store, StoreError};
use crate::sync::publisher::Publisher;
use crate::sync::subscriber::{self, Subscriber};
use crate::webhook;

/// How long after its expiry an SVID can still be renewed with the same key.
const RENEWAL_GRACE: Duration = Duration::from_secs(24 * 3600);
/// How often a client of discovery is asked whether it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// How often a new leader tries to take over while the API server does not answer.
const TAKE_OVER_AGAIN: Duration = Duration::from_millis(500);

/// What is durable, and who this process is.
pub struct Base {
    ca: CertificateAuthority,
    store: Store,
    trust: TrustStore,
    svid: SvidSource,
}

impl Base {
    pub fn new(config: &Config, ca: CertificateAuthority, store: Store) -> anyhow::Result<Self> {
        let trust = TrustStore::new();
        trust.set_own(ca.bundle())?;
        let instance = ROLE.parse().expect("a constant valid label");
        let id = SpiffeId::role(&config.trust_domain(), Role::Federation, &instance);
        let svid = ca.own_svid(&id, config.svid_life)?;
        Ok(Self { ca, store, trust, svid })
    }
}

/// Opens the state directory; an error when another process has it.
pub fn open_directory(config: &Config) -> anyhow::Result<Base> {
    let trust_domain = config.trust_domain();
    let in_state = || format!("the state directory {}", config.state.display());
    atomic::create_private_dir(&config.state).with_context(in_state)?;
    let store = Store::open(&config.state, &config.cluster, &trust_domain, Timestamp::now())?;
    let ca = CertificateAuthority::create_or_load(&config.state, &trust_domain)?;
    Base::new(config, ca, store)
}

/// Where the source is read.
pub enum OpenedSource {
    Directory(PathBuf),
    Kubernetes { client: kube::Client, server: String },
}

impl OpenedSource {
    pub async fn open(config: &SourceConfig) -> anyhow::Result<Self> {
        Ok(match config {
            SourceConfig::Directory(directory) => OpenedSource::Directory(directory.clone()),
            SourceConfig::Kubernetes(kubernetes) => {
                let (client, server) = kubernetes::connect(kubernetes).await?;
                OpenedSource::Kubernetes { client, server }
            }
        })
    }
}

/// What a federation listens on.
pub struct Sockets {
    pub operator: OperatorSocket,
    pub discovery: TcpListener,
    pub legs: TcpListener,
}

impl Sockets {
    pub async fn bind(config: &Config) -> anyhow::Result<Self> {
        let in_state = || format!("the state directory {}", config.state.display());
        atomic::create_private_dir(&config.state).with_context(in_state)?;
        Ok(Self {
            operator: OperatorSocket::bind(&config.state)?,
            discovery: bind("discovery", config.discovery).await?,
            legs: bind("legs", config.legs).await?,
        })
    }
}

async fn bind(field: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("can't listen on {address} ({field})"))
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KnockLabels {
    reason: &'static str,
}

/// A federation that knows everything and answers nobody yet.
pub struct Federation {
    config: Config,
    process: Process,
    opened: OpenedSource,
    base: Base,
    lead: Lead,
    hub: HubHandle,
    source: SourceHandle,
    peering: Peering,
    tasks: JoinSet<()>,
    servers: JoinSet<anyhow::Result<()>>,
}

/// Where numbers of services are taken from.
fn space(config: &Config) -> Space {
    Space { ranges: config.virtual_addresses, listeners: config.unmeshed.as_ref().map(|unmeshed| unmeshed.ports) }
}

impl Federation {
    /// Reads the source and tells the hub of all peers. With it come the events of gateways that are peering. `None` when
    /// the process drains before the source was read.
    pub async fn start(
        config: &Config,
        process: Process,
        opened: OpenedSource,
        base: Base,
        lead: Lead,
        shown: &Shown,
    ) -> anyhow::Result<Option<(Self, mpsc::Receiver<PeeringEvent>)>> {
        let (hub, events) = start_hub(config, &base, &process).await?;
        _ = shown.set(hub.clone());
        let mut tasks = JoinSet::new();
        let started = start_source(config, &opened, &base, &hub, &process, &mut tasks);
        let source = tokio::select! {
            started = started => started?,
            // An API server may be away for long.
            () = process.drain.draining() => return Ok(None),
        };
        let peering = start_peering(config, &base, &hub, &process).await?;
        tasks.spawn(peering::follow_declared(peering.clone(), source.clone()));
        tasks.spawn(remembered::follow(hub.clone(), config.state.clone()));
        tasks.spawn(report::follow(hub.clone(), process.metrics.clone()));
        let (config, servers) = (config.clone(), JoinSet::new());
        let federation = Self { config, process, opened, base, lead, hub, source, peering, tasks, servers };
        Ok(Some((federation, events)))
    }

    /// What follows another replica, until this one leads.
    pub fn follower(&self, name: String, synced: watch::Sender<bool>) -> Follower {
        let Base { ca, store, trust, svid } = &self.base;
        let peers = store.peering().peers().map(|record| (record.cluster.clone(), record)).collect();
        Follower {
            name,
            hub: self.hub.clone(),
            store: store.clone(),
            ca: ca.clone(),
            svid: svid.clone(),
            trust: trust.clone(),
            leader: self.lead.leader.clone(),
            synced,
            peers,
        }
    }

    /// Follows what the leader has allocated.
    pub fn follow_addresses(&self) -> impl Future<Output = ()> + use<> {
        addresses::follow(self.hub.clone(), self.base.store.clone(), space(&self.config))
    }

    /// Takes the state over from the last leader.
    pub async fn take_over(&self, follower: &mut Follower) -> anyhow::Result<()> {
        loop {
            match self.base.store.off_thread(|store| store.lead(Timestamp::now())).await {
                Ok(()) => break,
                Err(error @ (StoreError::Api { .. } | StoreError::NotLeading)) => {
                    tracing::warn!(%error, "the state can't be taken over yet; trying on");
                    tokio::time::sleep(TAKE_OVER_AGAIN).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        follower.read().await?;
        let epoch = self.base.store.epoch();
        self.hub.lead(epoch).await?;
        tracing::info!(epoch, "this replica leads");
        Ok(())
    }

    /// Begins to write, and to publish to peers and take from them.
    pub async fn lead(&mut self, events: mpsc::Receiver<PeeringEvent>, legs: TcpListener) -> anyhow::Result<()> {
        let (hub, store, metrics) = (&self.hub, &self.base.store, &self.process.metrics);
        self.peering.handle_events(events);
        let allocator = Allocator::start(hub.clone(), store.clone(), space(&self.config), metrics).await?;
        self.tasks.spawn(allocator.run());
        let leadership = &self.lead.leadership;
        if let (OpenedSource::Kubernetes { client, .. }, SourceConfig::Kubernetes(kubernetes)) =
            (&self.opened, &self.config.source)
        {
            let namespace = kubernetes.namespace.clone();
            self.tasks.spawn(kubernetes::publish_ca(client.clone(), namespace, leadership.clone(), hub.clone()));
            let (client, source) = (client.clone(), self.source.state());
            self.tasks.spawn(Writer::new(client, leadership.clone(), hub.clone(), source, metrics).run());
        }
        let publisher = Publisher {
            hub: hub.clone(),
            svid: self.base.svid.clone(),
            trust: self.base.trust.clone(),
            refusals: metrics.refusals(ROLE),
            drain: self.process.drain.clone(),
            leadership: leadership.clone(),
        };
        self.servers.spawn(async move { publisher.serve(legs).await.context("peer sync") });
        let dialer = Dialer::new(self.base.svid.clone(), self.base.trust.clone());
        let route = Arc::new(subscriber::over_gateways);
        self.tasks.spawn(Subscriber::new(hub.clone(), dialer, self.base.trust.clone(), route).run());
        Ok(())
    }

    async fn start_dns(&mut self) -> anyhow::Result<Option<SocketAddr>> {
        let Some(DnsConfig { listen }) = self.config.dns else { return Ok(None) };
        let started = dns::start(listen, self.hub.clone(), &self.process.metrics).await;
        let (address, serve) = started.with_context(|| format!("can't listen on {listen} (dns)"))?;
        self.tasks.spawn(serve);
        Ok(Some(address))
    }

    /// Begins to answer sidecars, gateways, other replicas and the operator, and announces where. `legs` is where gateways
    /// bring those of peer sync.
    pub async fn serve(
        &mut self,
        discovery: TcpListener,
        operator: OperatorSocket,
        legs: &str,
        announced: &BTreeMap<&'static str, SocketAddr>,
    ) -> anyhow::Result<()> {
        let discovery_address = discovery.local_addr()?;
        self.serve_discovery(discovery, legs.to_owned());
        let dns = self.start_dns().await?;
        let service = OperatorService {
            trust_domain: self.config.trust_domain(),
            hub: self.hub.clone(),
            store: self.base.store.clone(),
            source: self.source.clone(),
            peering: self.peering.clone(),
            ca: self.base.ca.clone(),
            lead: self.lead.clone(),
            surroundings: Surroundings {
                version: env!("CARGO_PKG_VERSION"),
                dns,
                kubernetes: matches!(self.config.source, SourceConfig::Kubernetes(_)),
            },
        };
        let stop = self.process.drain.clone();
        let serve_operator = operator.serve(service.server(), async move { stop.draining().await });
        self.servers.spawn(async move { serve_operator.await.context("the operator's socket") });
        let mut addresses = announced.clone();
        addresses.insert("discovery", discovery_address);
        addresses.extend(dns.map(|address| ("dns", address)));
        addresses.extend(self.start_webhook().await?.map(|address| ("webhook", address)));
        process::announce(&self.config.state, ROLE, &addresses)
            .context("announcing the addresses in the state directory")?;
        tracing::info!(cluster = %self.config.cluster, %discovery_address, legs, "federation listens");
        Ok(())
    }

    fn serve_discovery(&mut self, listener: TcpListener, legs: String) {
        let Base { ca, store, trust, svid } = &self.base;
        let refusals = self.process.metrics.refusals(ROLE);
        let counted = refusals.clone();
        let on_refused = move |refusal: tombolo_core::refusal::Refusal, address| {
            counted.inc(refusal);
            tracing::warn!(%address, reason = refusal.code(), "a connection to discovery is refused");
        };
        let issuer = Issuer { ca: ca.clone(), life: self.config.svid_life, grace: RENEWAL_GRACE };
        let trust_domain = self.config.trust_domain();
        let to_leader = ToLeader { lead: self.lead.clone(), trust: trust.clone(), trust_domain };
        let identity = IdentityService::server(issuer, store.clone(), self.reviewer(), to_leader, refusals.clone());
        let (hub, drain) = (self.hub.clone(), self.process.drain.clone());
        let leadership = self.lead.leadership.clone();
        let replicas = ReplicaService::server(hub.clone(), store.clone(), leadership, refusals.clone(), drain.clone());
        let discovery = DiscoveryService::server(hub, legs, refusals, drain.clone());
        // Whoever has no identity yet comes here to get one; discovery itself demands a certificate.
        let tls = tls::server_config(svid, trust, ClientAuth::Optional, &[ALPN_H2], RootInChain::No);
        let incoming = Incoming::new(listener, tls, Arc::new(on_refused));
        let server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .add_service(identity)
            .add_service(discovery)
            .add_service(replicas)
            .serve_with_incoming_shutdown(incoming, async move { drain.draining().await });
        self.servers.spawn(async move { server.await.context("discovery") });
    }

    async fn start_webhook(&mut self) -> anyhow::Result<Option<SocketAddr>> {
        let (Some(injection), OpenedSource::Kubernetes { client, .. }, SourceConfig::Kubernetes(kubernetes)) =
            (&self.config.injection, &self.opened, &self.config.source)
        else {
            return Ok(None);
        };
        let start = webhook::Start {
            client: client.clone(),
            config: injection,
            cluster: &self.config.cluster,
            namespace: &kubernetes.namespace,
            trust_domain: &self.config.trust_domain(),
            ca: &self.base.ca,
            metrics: &self.process.metrics,
        };
        webhook::start(start, &mut self.tasks).await.map(Some)
    }

    /// Who vouches for service accounts.
    fn reviewer(&self) -> Option<Reviewer> {
        let (OpenedSource::Kubernetes { client, .. }, SourceConfig::Kubernetes(kubernetes)) =
            (&self.opened, &self.config.source)
        else {
            return None;
        };
        let accounts = Accounts {
            trust_domain: self.config.trust_domain(),
            namespace: kubernetes.namespace.clone(),
            gateways: kubernetes.roles.gateway.clone(),
        };
        Some(Reviewer::new(client.clone(), accounts))
    }

    /// Waits until a server has ended; for ever while there is none.
    pub async fn a_server_ended(&mut self) -> anyhow::Result<()> {
        match self.servers.join_next().await {
            None => std::future::pending().await,
            Some(ended) => ended.context("a server panicked")?,
        }
    }

    /// Until every server has drained, or one has failed, or the drain's deadline.
    pub async fn until_drained(mut self) -> anyhow::Result<()> {
        let ended = serve(self.servers, &self.process.drain).await;
        self.tasks.shutdown().await;
        process::withdraw(&self.config.state, ROLE)?;
        ended
    }
}

async fn start_hub(
    config: &Config,
    base: &Base,
    process: &Process,
) -> anyhow::Result<(HubHandle, mpsc::Receiver<PeeringEvent>)> {
    let start = HubStart {
        cluster: config.cluster.clone(),
        trust_domain: config.trust_domain(),
        bundle: base.ca.bundle(),
        trust: base.trust.clone(),
        store: base.store.clone(),
        metrics: process.metrics.clone(),
        default_access: config.default_access,
        remembered: remembered::load(&config.state),
    };
    let (hub, events) = hub::start(start);
    let revoked = base.store.revoked();
    hub.own_revoked(revoked.sequence, revoked.ids).await?;
    Ok((hub, events))
}

/// Tells the hub of every stored peer.
async fn start_peering(config: &Config, base: &Base, hub: &HubHandle, process: &Process) -> anyhow::Result<Peering> {
    let knocks = process.metrics.counters::<KnockLabels>("tombolo_peering_refused", "Redemptions refused, by reason");
    let on_refused = move |reason| {
        knocks.get_or_create_owned(&KnockLabels { reason }).inc();
    };
    let (ca, store, relay) = (base.ca.clone(), base.store.clone(), Box::new(hub.clone()));
    Ok(Peering::start(ca, config.cluster.clone(), store, relay, Box::new(on_refused)).await?)
}

/// Reads the source once before anybody is answered, so that a restart does not look like a withdrawal.
async fn start_source(
    config: &Config,
    opened: &OpenedSource,
    base: &Base,
    hub: &HubHandle,
    process: &Process,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<SourceHandle> {
    let read = process.readiness.condition("source", "the source has not been read yet");
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
