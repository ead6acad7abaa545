//! For workloads without a sidecar: TCP listeners, each of which leads to one port of a service that allows it. The gateway
//! begins the leg in their place, under an identity that says so, and chooses the endpoint as a sidecar would. What it
//! reads there is not encrypted; see "Workloads without a sidecar" in the documentation.

mod carry;
mod route;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tombolo_core::id::ServiceName;
use tombolo_core::refusal::Refusal;
use tombolo_leg::dial::{Dialer, keep_alive};
use tombolo_trust::svid::SvidSource;

use crate::config::SourceRange;
use crate::copy;
use crate::gateway::Gateway;
use crate::ingress;
use crate::sources::{SourceLimits, Unfinished};
use route::Route;

const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How soon a port is tried again that could not be bound.
const BIND_AGAIN: Duration = Duration::from_secs(1);

/// What an operator decides about these listeners.
#[derive(Debug, Clone)]
pub struct Settings {
    pub bound: IpAddr,
    /// Everybody if empty.
    pub sources: Vec<SourceRange>,
}

/// What all listeners share.
struct Shared {
    gateway: Arc<Gateway>,
    dialer: Dialer,
    /// Where this gateway takes its own legs to other clusters.
    ingress: SocketAddr,
    settings: Settings,
    limits: SourceLimits,
    connections: Arc<Semaphore>,
}

/// The listeners that the federation wants.
pub struct Listeners {
    shared: Arc<Shared>,
    open: BTreeMap<u16, Listening>,
    /// Accept loops; they end with the listeners.
    tasks: JoinSet<()>,
}

struct Listening {
    to: (ServiceName, u16),
    task: AbortHandle,
}

impl Listeners {
    pub async fn new(gateway: Arc<Gateway>, svid: SvidSource, settings: Settings) -> io::Result<Self> {
        let own = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let shared = Arc::new(Shared {
            dialer: Dialer::new(svid, gateway.trust.clone()),
            ingress: own.local_addr()?,
            settings,
            limits: SourceLimits::new(&gateway.settings.limits),
            connections: Arc::new(Semaphore::new(gateway.settings.limits.unmeshed_connections as usize)),
            gateway: gateway.clone(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(ingress::accept_own(gateway, own));
        Ok(Self { shared, open: BTreeMap::new(), tasks })
    }

    /// Opens and closes listeners as the federation says, until the process drains.
    pub async fn run(mut self) {
        let gateway = self.shared.gateway.clone();
        let mut changed = gateway.subscribe();
        loop {
            changed.borrow_and_update();
            let complete = self.settle().await;
            tokio::select! {
                changed = changed.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(BIND_AGAIN), if !complete => {}
                () = gateway.drain.draining() => break,
            }
        }
        // Nothing new; what is being carried is, and the way of those that are about to be is kept.
        self.open.values().for_each(|listening| listening.task.abort());
        gateway.drain.stopped().await;
    }

    /// Returns whether all that is wanted is open.
    async fn settle(&mut self) -> bool {
        let snapshot = self.shared.gateway.snapshot();
        let wanted = &snapshot.unmeshed.listeners;
        self.open.retain(|port, listening| {
            let stays = wanted.get(port) == Some(&listening.to) && !listening.task.is_finished();
            if !stays {
                listening.task.abort();
            }
            stays
        });
        let mut complete = true;
        for (port, to) in wanted {
            if self.open.contains_key(port) {
                continue;
            }
            let address = SocketAddr::new(self.shared.settings.bound, *port);
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    tracing::info!(%address, service = %to.0, port = to.1, "listens for workloads without a sidecar");
                    let route = Arc::new(Route::new(to.0.clone(), to.1));
                    let task = self.tasks.spawn(accept_all(self.shared.clone(), route, listener));
                    self.open.insert(*port, Listening { to: to.clone(), task });
                }
                Err(error) => {
                    tracing::warn!(%address, service = %to.0, %error, "can't listen for workloads without a sidecar; trying again");
                    complete = false;
                }
            }
        }
        complete
    }
}

async fn accept_all(shared: Arc<Shared>, route: Arc<Route>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((tcp, address)) => match admit(&shared, address.ip()) {
                Ok(unfinished) => drop(tokio::spawn(serve(shared.clone(), route.clone(), tcp, address, unfinished))),
                Err(refusal) => {
                    shared.gateway.meters.refused(refusal);
                    tracing::debug!(%address, service = %route.service, reason = refusal.code(), "connection refused");
                    copy::reset_tcp(&tcp);
                }
            },
            Err(error) => {
                tracing::warn!(%error, "a connection can't be accepted; maybe the limit of open files is reached");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether a source may call at all. One that has a sidecar is not to go round it.
fn admit(shared: &Shared, source: IpAddr) -> Result<Unfinished, Refusal> {
    let source = source.to_canonical();
    let sources = &shared.settings.sources;
    let served = sources.is_empty() || sources.iter().any(|range| range.contains(source));
    if !served || shared.gateway.snapshot().unmeshed.meshed.contains(&source) {
        return Err(Refusal::IdentityDenied);
    }
    shared.limits.admit(source)
}

async fn serve(shared: Arc<Shared>, route: Arc<Route>, tcp: TcpStream, address: SocketAddr, unfinished: Unfinished) {
    copy::prepare(&tcp);
    keep_alive(&tcp);
    let Ok(_connection) = shared.connections.clone().try_acquire_owned() else {
        shared.gateway.meters.refused(Refusal::Overloaded);
        return copy::reset_tcp(&tcp);
    };
    let _work = shared.gateway.drain.track();
    carry::connection(&shared, &route, tcp, address, unfinished).await;
}
