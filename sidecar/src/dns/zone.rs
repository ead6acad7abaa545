//! What DNS knows of the clusterset's services: each is asked for at the first question about it, followed while there
//! are questions, and let go of. Nothing is denied that the federation has not denied, and nothing while it is away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;
use tombolo_core::addresses::Ranges;
use tombolo_core::addresses::mesh::MeshAddresses;
use tombolo_core::dns::{Known, ServiceRecords};
use tombolo_core::id::ServiceName;
use tombolo_core::model::Transport;
use tombolo_leg::discovery::{LinkStatus, ServiceState, ServiceView};
use tombolo_runtime::metrics::prometheus_client::metrics::gauge::Gauge;

use crate::outbound::services::{Feed, ServiceSource};

/// Services followed for DNS at once. The one that nobody asked about for longest makes room: names are whatever
/// somebody makes up, and must not keep out those that are in use.
pub const SERVICES_MAX: usize = 256;
/// A name that nobody exports is let go of after this long without a question.
const UNKNOWN_IDLE: Duration = Duration::from_secs(10);
/// How often it is looked for what to let go of.
const UPKEEP: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy)]
pub struct ZoneLimits {
    /// How long a question waits until its service is known.
    pub wait: Duration,
    /// Without a question for this long a service is let go of.
    pub idle: Duration,
}

pub struct MeshZone {
    source: Box<dyn ServiceSource>,
    addresses: watch::Receiver<MeshAddresses>,
    status: watch::Receiver<LinkStatus>,
    limits: ZoneLimits,
    held: Mutex<BTreeMap<ServiceName, Held>>,
}

struct Held {
    feed: Feed,
    asked: Instant,
}

impl MeshZone {
    pub fn new(
        source: Box<dyn ServiceSource>,
        addresses: watch::Receiver<MeshAddresses>,
        status: watch::Receiver<LinkStatus>,
        limits: ZoneLimits,
    ) -> Self {
        Self { source, addresses, status, limits, held: Mutex::default() }
    }

    /// What is known of a service; waits for the first word on it.
    pub async fn look_up(&self, service: &ServiceName) -> Known {
        let Some(feed) = self.feed(service, Instant::now()) else {
            return self.by_address(service).unwrap_or(Known::CutOff);
        };
        match tokio::time::timeout(self.limits.wait, self.told(service, feed)).await {
            Ok(Some(known)) => known,
            Ok(None) | Err(_) => self.by_address(service).unwrap_or(Known::CutOff),
        }
    }

    /// Waits until something can be said; `None` when nobody will tell any more.
    async fn told(&self, service: &ServiceName, mut feed: Feed) -> Option<Known> {
        let (mut addresses, mut status) = (self.addresses.clone(), self.status.clone());
        loop {
            let state = feed.updates.borrow_and_update().clone();
            let ranges = addresses.borrow_and_update().ranges();
            let link = {
                let status = status.borrow_and_update();
                Link { up: status.connected, lost: !status.connected && status.connects > 0 }
            };
            if let Some(known) = judge(&state, ranges, link) {
                return Some(known);
            }
            // Its address is enough for most, and better than to wait for a federation that has gone.
            if link.lost
                && let Some(known) = self.by_address(service)
            {
                return Some(known);
            }
            tokio::select! {
                changed = feed.updates.changed() => changed.ok()?,
                changed = addresses.changed() => changed.ok()?,
                changed = status.changed() => changed.ok()?,
            }
        }
    }

    /// What the set of all addresses says, which is told of every service.
    fn by_address(&self, service: &ServiceName) -> Option<Known> {
        self.addresses.borrow().of_service(service).flatten().map(Known::Address)
    }

    /// A service's feed, taken up if need be; `None` when more can't be.
    fn feed(&self, service: &ServiceName, now: Instant) -> Option<Feed> {
        let mut held = self.held();
        if let Some(known) = held.get_mut(service) {
            known.asked = now;
            return Some(known.feed.clone());
        }
        if held.len() >= SERVICES_MAX {
            let longest = held.iter().min_by_key(|(_, held)| held.asked).map(|(service, _)| service.clone());
            longest.and_then(|service| held.remove(&service));
        }
        let feed = self.source.subscribe(service).ok()?;
        held.insert(service.clone(), Held { feed: feed.clone(), asked: now });
        Some(feed)
    }

    /// Lets go of what was not asked about for long.
    pub fn let_go(&self, now: Instant) {
        self.held().retain(|_, held| {
            let unknown = matches!(*held.feed.updates.borrow(), ServiceState::Unknown);
            let idle = if unknown { UNKNOWN_IDLE.min(self.limits.idle) } else { self.limits.idle };
            now.saturating_duration_since(held.asked) < idle
        });
    }

    /// The ports that a service has for TCP, as far as it is followed and known.
    pub fn tcp_ports(&self, service: &ServiceName) -> BTreeSet<u16> {
        let held = self.held();
        let Some(feed) = held.get(service).map(|held| &held.feed) else { return BTreeSet::new() };
        match &*feed.updates.borrow() {
            ServiceState::Known(view) => {
                let ports = view.shares.iter().flat_map(|share| &share.share.export.ports);
                ports.filter(|port| port.transport == Transport::Tcp).map(|port| port.port).collect()
            }
            ServiceState::Waiting | ServiceState::Unknown => BTreeSet::new(),
        }
    }

    /// Services that are followed.
    pub fn len(&self) -> usize {
        self.held().len()
    }

    pub fn is_empty(&self) -> bool {
        self.held().is_empty()
    }

    /// Services that are followed and what is known of each, for the admin page.
    pub fn state(&self) -> Value {
        let now = Instant::now();
        let one = |(service, held): (&ServiceName, &Held)| {
            let known = match &*held.feed.updates.borrow() {
                ServiceState::Waiting => "waiting",
                ServiceState::Unknown => "unknown",
                ServiceState::Known(_) => "known",
            };
            let idle_s = now.saturating_duration_since(held.asked).as_secs();
            json!({ "service": service, "state": known, "idleSeconds": idle_s })
        };
        self.held().iter().map(one).collect()
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<ServiceName, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How it stands with the federation.
#[derive(Clone, Copy)]
struct Link {
    up: bool,
    /// It was up before.
    lost: bool,
}

/// What can be said of a service by what was told of it; `None` when nothing can.
fn judge(state: &ServiceState, ranges: Option<Ranges>, link: Link) -> Option<Known> {
    match state {
        ServiceState::Waiting => None,
        // It may have been exported since the federation was heard from.
        ServiceState::Unknown => link.up.then_some(Known::Absent),
        ServiceState::Known(view) => records(view, ranges?).map(Known::Records),
    }
}

/// `None` while the service has no address.
fn records(view: &ServiceView, ranges: Ranges) -> Option<ServiceRecords> {
    let whole = view.numbers.service.and_then(|number| ranges.address(number));
    ServiceRecords::of(view.shares.iter().map(|share| &share.share), whole.map(Into::into), |cluster, endpoint| {
        let number = view.numbers.endpoints.get(&(cluster.clone(), endpoint.clone()))?;
        ranges.address(*number)
    })
}

/// Lets go of services for as long as it runs.
pub async fn upkeep(zone: Arc<MeshZone>, followed: Gauge) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        zone.let_go(Instant::now());
        followed.set(i64::try_from(zone.len()).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests;
