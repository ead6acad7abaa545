//! The sidecar's DNS server: names of the clusterset are answered from what the federation tells, all others are
//! relayed (`tombolo_dns`). It starts before there is an identity and answers while the federation is away, for
//! ordinary names must not depend on either.
//!
//! [`zone`] is what is known of the clusterset's services, [`loopback`] where applications find them without capture.

pub mod config;
pub mod loopback;
pub mod zone;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tombolo_core::dns::Known;
use tombolo_core::id::ServiceName;
use tombolo_dns::{DnsServer, Event, Sockets, Upstreams, Zone};
use tombolo_leg::discovery::SidecarDiscovery;
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;
use tombolo_runtime::process::Process;

use crate::config::LimitsConfig;
use crate::outbound::Outbound;
use config::DnsConfig;
use loopback::Loopback;
use zone::{MeshZone, ZoneLimits};

/// The server as it runs, until the process has drained.
pub struct Running {
    addresses: Vec<SocketAddr>,
    upstreams: Arc<Upstreams>,
    zone: Arc<MeshZone>,
    loopback: Option<Arc<Loopback>>,
}

/// Binds the sockets and serves.
pub async fn start(
    config: &DnsConfig,
    limits: &LimitsConfig,
    discovery: &SidecarDiscovery,
    outbound: &Arc<Outbound>,
    process: &Process,
) -> anyhow::Result<Running> {
    let sockets = bind(&config.listen).await?;
    let addresses: Vec<SocketAddr> = sockets.iter().map(Sockets::address).collect();
    let upstreams = Arc::new(match &config.upstreams {
        Some(upstreams) => Upstreams::fixed(upstreams),
        None => Upstreams::from_file(&config.resolv_conf).except(&addresses),
    });
    let limits = ZoneLimits { wait: limits.discovery_wait, idle: limits.service_idle };
    let zone = MeshZone::new(Box::new(discovery.clone()), discovery.addresses(), discovery.status(), limits);
    let zone = Arc::new(zone);
    let counted = counters(&process.metrics);
    let loopback = config
        .loopback
        .as_ref()
        .map(|config| Arc::new(Loopback::new(config, zone.clone(), discovery.addresses(), outbound, &process.metrics)));
    let answered: Box<dyn Zone> = match &loopback {
        Some(loopback) => Box::new(Shared(loopback.clone())),
        None => Box::new(Shared(zone.clone())),
    };
    let server = DnsServer::new(answered, upstreams.clone(), counted);
    let stop = CancellationToken::new();
    for sockets in sockets {
        tokio::spawn(tombolo_dns::run(sockets, server.clone(), stop.clone()));
    }
    tokio::spawn(tombolo_dns::loops::watch(server, stop.clone()));
    let upkeep = tokio::spawn(zone::upkeep(
        zone.clone(),
        process.metrics.gauge("tombolo_dns_services", "Services that are followed because their names were asked for"),
    ));
    let drain = process.drain.clone();
    tokio::spawn(async move {
        // What finishes its work within the deadline may need names for it.
        drain.stopped().await;
        stop.cancel();
        upkeep.abort();
    });
    Ok(Running { addresses, upstreams, zone, loopback })
}

impl Running {
    /// Names and addresses of the sockets.
    pub fn addresses(&self) -> Vec<(String, SocketAddr)> {
        self.addresses.iter().enumerate().map(|(n, address)| (format!("dns-{n}"), *address)).collect()
    }

    /// For the admin page.
    pub fn state(&self) -> Value {
        json!({
            "listen": self.addresses,
            "upstreams": *self.upstreams.resolvers(std::time::Instant::now()),
            "services": self.zone.state(),
            "loopbackListeners": self.loopback.as_ref().map(|loopback| loopback.sockets()),
        })
    }
}

async fn bind(listen: &[SocketAddr]) -> anyhow::Result<Vec<Sockets>> {
    let mut bound = Vec::with_capacity(listen.len());
    for address in listen {
        match Sockets::bind(*address).await {
            Ok(sockets) => bound.push(sockets),
            // A host without IPv6 has no queries over it.
            Err(error) if address.is_ipv6() && listen.len() > 1 && lacks_family(&error) => {
                tracing::warn!(%address, %error, "dns.listen: this host has no such address; it is left out");
            }
            Err(error) => {
                return Err(error).with_context(|| format!("dns.listen: can't listen on {address} (UDP and TCP)"));
            }
        }
    }
    anyhow::ensure!(!bound.is_empty(), "dns.listen: this host has none of these addresses");
    Ok(bound)
}

fn lacks_family(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// Every outcome at zero from the start.
fn counters(metrics: &Metrics) -> impl Fn(Event) + Send + Sync + 'static {
    let help = "DNS messages, by what became of them";
    let family = metrics.counters::<OutcomeLabels>("tombolo_dns_messages", help);
    let counter = |event: &Event| (*event, family.get_or_create_owned(&OutcomeLabels { outcome: event.code() }));
    let counters: Vec<(Event, Counter)> = Event::ALL.iter().map(counter).collect();
    move |event| {
        if let Some((_, counter)) = counters.iter().find(|(counted, _)| *counted == event) {
            counter.inc();
        }
    }
}

/// What the server and the admin page share.
struct Shared<Z>(Arc<Z>);

impl<Z: Zone> Zone for Shared<Z> {
    fn look_up<'a>(&'a self, service: &'a ServiceName) -> BoxFuture<'a, Known> {
        self.0.look_up(service)
    }
}

impl Zone for MeshZone {
    fn look_up<'a>(&'a self, service: &'a ServiceName) -> BoxFuture<'a, Known> {
        Box::pin(MeshZone::look_up(self, service))
    }
}
