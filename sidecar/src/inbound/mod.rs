//! The inbound side: legs from other sidecars, delivered to the application behind this one.
//!
//! - [`run`] accepts legs; each client is authorized at each request and each opaque connection
//!   (`tombolo_core::authz`), against what federation grants at that moment.
//! - `access` asks the policies that select the service (`tombolo_core::policy::access`), for each as well;
//!   `standing` asks them again about what lasts.
//! - [`http`] carries requests to the application, [`opaque`] bytes; [`app`] holds the connections to it.
//!
//! Limits: a request's header section is at most 64 KiB (`tombolo_leg::http::HEADERS_MAX`), a response's as much and
//! at most [`app::RESPONSE_HEADERS_MAX`] fields; [`LEGS_MAX`] legs at once; requests and connections per application
//! [`app::IN_USE_MAX`].

mod access;
pub mod app;
pub mod http;
mod observe;
pub mod opaque;
mod standing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tombolo_core::authz::{self, Client, Delivered};
use tombolo_core::id::{ClusterId, ServiceName};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_leg::Alpn;
use tombolo_leg::accept::{AcceptError, AcceptedLeg, Acceptor, LegIdentity};
use tombolo_leg::discovery::{InboundGrants, InboundPolicies, SidecarDiscovery, Welcome};
use tombolo_leg::http::{HttpLimits, Serve, serve};
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::process::Process;
use tombolo_runtime::telemetry::Tracer;
use tombolo_trust::handshakes::{Displaced, Handshakes, Place};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;

use crate::config::ServiceConfig;
use access::Buckets;
use app::App;
use observe::{Counted, Observed};

/// Legs at once whose clients are verified; above it, accepting waits.
pub const LEGS_MAX: usize = 16_384;
/// Handshakes at once; above it, the oldest makes room.
pub const HANDSHAKES_MAX: usize = 1_024;
/// How long a stream of responses goes on at least, counted from its beginning, when a later policy denies it.
pub const STREAM_GRACE: Duration = Duration::from_secs(30);
/// Pause after `accept` failed, which it does when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What federation says about who may call.
pub trait Authority: Send + Sync + 'static {
    /// `None` before federation was met for the first time: nobody may call then.
    fn cluster(&self) -> Option<ClusterId>;
    fn grants(&self) -> Arc<InboundGrants>;
    /// `None` before federation has told what decides about the service's callers: nobody may call then.
    fn policies(&self, service: &ServiceName) -> Option<Arc<InboundPolicies>>;
    /// Changes whenever the policies of any service may have.
    fn policies_told(&self) -> watch::Receiver<()>;
}

/// What discovery says.
#[derive(Debug)]
pub struct Discovered {
    discovery: SidecarDiscovery,
    welcome: watch::Receiver<Option<Welcome>>,
}

impl Discovered {
    pub fn new(discovery: SidecarDiscovery) -> Self {
        Self { welcome: discovery.welcome(), discovery }
    }
}

impl Authority for Discovered {
    fn cluster(&self) -> Option<ClusterId> {
        self.welcome.borrow().as_ref().map(|welcome| welcome.cluster.clone())
    }

    fn grants(&self) -> Arc<InboundGrants> {
        self.discovery.grants().clone()
    }

    fn policies(&self, service: &ServiceName) -> Option<Arc<InboundPolicies>> {
        self.discovery.inbound_policies(service)
    }

    fn policies_told(&self) -> watch::Receiver<()> {
        self.discovery.inbound_policies_told()
    }
}

/// Everything that the inbound side's tasks share.
pub struct Inbound {
    acceptor: Acceptor,
    trust: TrustStore,
    svid: SvidSource,
    authority: Box<dyn Authority>,
    ports: BTreeSet<(ServiceName, u16)>,
    apps: BTreeMap<(ServiceName, u16), Arc<App>>,
    /// By the port of the application.
    app_ports: Vec<(u16, ServiceName)>,
    buckets: Buckets,
    stream_grace: Duration,
    legs: Arc<Semaphore>,
    observed: Observed,
    tracer: Tracer,
    pub(crate) drain: DrainWatch,
}

impl Inbound {
    pub fn new(
        services: &[ServiceConfig],
        process: &Process,
        svid: &SvidSource,
        trust: &TrustStore,
        authority: Box<dyn Authority>,
    ) -> Arc<Self> {
        Self::with_stream_grace(services, process, svid, trust, authority, STREAM_GRACE)
    }

    /// The same with another grace than [`STREAM_GRACE`].
    pub fn with_stream_grace(
        services: &[ServiceConfig],
        process: &Process,
        svid: &SvidSource,
        trust: &TrustStore,
        authority: Box<dyn Authority>,
        stream_grace: Duration,
    ) -> Arc<Self> {
        let apps: BTreeMap<_, _> = services
            .iter()
            .map(|config| {
                ((config.service.clone(), config.port), Arc::new(App::new(config.app.clone(), config.protocol)))
            })
            .collect();
        Arc::new(Self {
            acceptor: Acceptor::new(svid, trust),
            trust: trust.clone(),
            svid: svid.clone(),
            authority,
            ports: apps.keys().cloned().collect(),
            apps,
            app_ports: services.iter().filter_map(app_port).collect(),
            buckets: Buckets::new(services),
            stream_grace,
            legs: Arc::new(Semaphore::new(LEGS_MAX)),
            observed: Observed::new(&process.metrics),
            tracer: process.tracer.clone(),
            drain: process.drain.clone(),
        })
    }

    /// The application for this leg, if its client may call it now.
    fn authorize(&self, leg: &LegIdentity) -> Result<&Arc<App>, Refusal> {
        self.authorize_client(Client { id: &leg.client_id, cluster: &leg.client_cluster }, &leg.target)
    }

    fn authorize_client(&self, client: Client<'_>, target: &LegTarget) -> Result<&Arc<App>, Refusal> {
        let cluster = self.authority.cluster().ok_or(Refusal::NotExported)?;
        let grants = self.authority.grants();
        let delivered = Delivered { cluster: &cluster, ports: &self.ports, grants: &grants };
        authz::authorize(client, target, delivered)?;
        // `ports` are the keys of `apps`.
        self.apps.get(&(target.service.clone(), target.port)).ok_or(Refusal::UnknownPort)
    }

    /// What the operator is shown.
    pub fn state(&self) -> Value {
        let grants: BTreeMap<String, BTreeSet<ClusterId>> =
            self.authority.grants().iter().map(|(service, clusters)| (service.to_string(), clusters.clone())).collect();
        let delivered: Vec<String> = self.ports.iter().map(|(service, port)| format!("{service}:{port}")).collect();
        json!({
            "legs": LEGS_MAX - self.legs.available_permits(),
            "delivers": delivered,
            "exportedTo": grants,
        })
    }

    /// Serves one leg to its end.
    pub(crate) async fn leg(self: Arc<Self>, tcp: TcpStream, place: Place, drain: CancellationToken) {
        let accepted = place.run(self.acceptor.accept(tcp)).await;
        let displaced =
            |displaced: Displaced| AcceptError { refusal: Refusal::Overloaded, detail: displaced.to_string() };
        let leg = match accepted.map_err(displaced).flatten() {
            Ok(leg) => leg,
            Err(error) => {
                self.observed.refused(error.refusal);
                tracing::debug!(refusal = error.refusal.code(), detail = %error.detail, "leg refused");
                return;
            }
        };
        let _counted = Counted::new(&self.observed.legs);
        let _track = self.drain.track();
        let (credentials, identity) = (leg.credentials.clone(), leg.identity.clone());
        // In a task of its own, so that what may end a leg early is not asked again with each octet of it.
        let mut serving = JoinSet::new();
        match identity.alpn {
            Alpn::H2 => serving.spawn(self.clone().serve_http(leg, drain)),
            Alpn::Tcp => serving.spawn(opaque::serve(self.clone(), leg, drain)),
        };
        tokio::select! {
            _ = serving.join_next() => {}
            // Those of opaque bytes have to be told to both ends, see there.
            refusal = credentials.refused(&self.trust), if identity.alpn == Alpn::H2 => {
                self.observed.refused(refusal);
                tracing::info!(client = %identity.client_id, refusal = refusal.code(), "leg closed: its client is no longer trusted");
            }
            () = self.drain.stopped() => {}
        }
    }

    async fn serve_http(self: Arc<Self>, leg: AcceptedLeg, drain: CancellationToken) {
        let client = leg.identity.client_id.clone();
        let options = Serve { limits: HttpLimits::default(), drain, abort: CancellationToken::new() };
        let service = |request| http::handle(self.clone(), request);
        if let Err(error) = serve(leg, options, service).await {
            tracing::debug!(%client, %error, "leg ended");
        }
    }
}

/// The port of a service's application, where it has one.
fn app_port(config: &ServiceConfig) -> Option<(u16, ServiceName)> {
    let port = config.app.rsplit_once(':')?.1.parse().ok()?;
    Some((port, config.service.clone()))
}

/// Accepts legs until the process has drained. From the beginning of the drain no new ones; those that stand
/// finish their requests.
pub async fn run(listener: TcpListener, inbound: Arc<Inbound>) {
    let drain = CancellationToken::new();
    let handshakes = Handshakes::new(HANDSHAKES_MAX);
    let accepting = async {
        loop {
            let permit = inbound.legs.clone().acquire_owned().await.expect("the semaphore is never closed");
            let tcp = match listener.accept().await {
                Ok((tcp, _)) => tcp,
                Err(error) => {
                    tracing::warn!(%error, "no leg could be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let leg = inbound.clone().leg(tcp, handshakes.begin(), drain.clone());
            tokio::spawn(async move {
                leg.await;
                drop(permit);
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        () = inbound.drain.draining() => {}
    }
    drop(listener);
    drain.cancel();
}
