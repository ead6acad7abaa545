//! Virtual addresses of all services that are known here: allocated as services come, durable before anybody is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tombolo_core::addresses::allocation::{Allocations, Owner, owners};
use tombolo_core::addresses::mesh::{Block, blocks};
use tombolo_core::addresses::ports::{PortOwner, PortRange, port_owners};
use tombolo_core::addresses::{Number, Ranges};
use tombolo_core::catalog::ServiceView;
use tombolo_core::id::ServiceName;
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::metrics::gauge::Gauge;

use crate::hub::{HubGone, HubHandle};
use crate::store::{Store, StoreError};

/// Changes within this time are allocated together.
const PAUSE: Duration = Duration::from_millis(50);
/// Numbers that have rested are given to whoever waits for one this soon, and a failed write is tried again.
const AGAIN: Duration = Duration::from_secs(60);

/// Who has which virtual address, in an immutable reading.
#[derive(Debug)]
pub struct Addresses {
    pub ranges: Ranges,
    numbers: BTreeMap<Owner, Number>,
    /// The same, as sidecars are told. A block that did not change keeps its allocation.
    pub blocks: BTreeMap<u32, Arc<Block>>,
    /// What has none, since there is none left.
    pub without: BTreeSet<Owner>,
    /// Where gateways listen for workloads without a sidecar.
    pub listeners: BTreeMap<PortOwner, u16>,
    /// What has no listener, since there is no port left.
    pub without_listener: BTreeSet<PortOwner>,
}

/// Where numbers are taken from.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    pub ranges: Ranges,
    /// Ports of listeners for workloads without a sidecar; `None` where there are no such listeners.
    pub listeners: Option<PortRange>,
}

/// Owners for whom nothing was left.
#[derive(Debug, Default)]
pub(crate) struct Without {
    addresses: BTreeSet<Owner>,
    listeners: BTreeSet<PortOwner>,
}

impl Addresses {
    pub(crate) fn new(held: &Allocations, space: Space, without: Without, before: Option<&Addresses>) -> Self {
        let numbers: BTreeMap<Owner, Number> =
            held.addresses.in_use().map(|(owner, number)| (owner.clone(), number)).collect();
        let holders = numbers.iter().map(|(owner, number)| (*number, owner.holder(), owner.service.clone()));
        let kept = |(number, block): (u32, Block)| {
            let known = before.and_then(|before| before.blocks.get(&number)).filter(|known| ***known == block);
            (number, known.cloned().unwrap_or_else(|| Arc::new(block)))
        };
        let blocks = blocks(holders).into_iter().map(kept).collect();
        let listener = |(owner, number): (&PortOwner, Number)| Some((owner.clone(), space.listeners?.port(number)?));
        let listeners = held.listeners.in_use().filter_map(listener).collect();
        let (ranges, Without { addresses: without, listeners: without_listener }) = (space.ranges, without);
        Self { ranges, numbers, blocks, without, listeners, without_listener }
    }

    pub fn number(&self, owner: &Owner) -> Option<Number> {
        self.numbers.get(owner).copied()
    }

    /// Services and endpoints that have one.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }
}

/// Tells the hub which addresses another replica has allocated, whenever that has changed, until the hub ends.
pub async fn follow(hub: HubHandle, store: Store, space: Space) {
    let mut changes = store.changes();
    let mut told: Option<Arc<Addresses>> = None;
    loop {
        changes.borrow_and_update();
        let addresses = Arc::new(Addresses::new(&store.addresses(), space, Without::default(), told.as_deref()));
        if !told.as_ref().is_some_and(|told| told.is_same(&addresses)) {
            if hub.addressed(addresses.clone()).await.is_err() {
                return;
            }
            told = Some(addresses);
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Allocates what the hub's services need, and goes on to.
pub struct Allocator {
    hub: HubHandle,
    store: Store,
    space: Space,
    gauges: Gauges,
    /// The services for which everything was allocated that there is; `None` when it has to be tried again.
    seen: Option<Arc<BTreeMap<ServiceName, Arc<ServiceView>>>>,
    /// What the hub was told last.
    told: Option<Arc<Addresses>>,
}

struct Gauges {
    in_use: Gauge,
    resting: Gauge,
    without: Gauge,
    listeners: Gauge,
}

impl Allocator {
    /// Allocates for all that the hub knows now; when this returns, sidecars can be told.
    pub async fn start(
        hub: HubHandle,
        store: Store,
        space: Space,
        metrics: &Metrics,
    ) -> Result<Self, AllocationFailed> {
        let gauges = Gauges {
            in_use: metrics.gauge("tombolo_virtual_addresses", "Virtual addresses in use"),
            resting: metrics
                .gauge("tombolo_virtual_addresses_resting", "Virtual addresses that were given back within a day"),
            without: metrics.gauge(
                "tombolo_virtual_addresses_missing",
                "Services and endpoints for which there is no address left, and ports without a listener's",
            ),
            listeners: metrics
                .gauge("tombolo_unmeshed_listeners", "Listener ports for workloads without a sidecar, in use"),
        };
        let mut allocator = Self { hub, store, space, gauges, seen: None, told: None };
        // What has not been read yet would look as if it had gone.
        allocator.hub.settled().await?;
        allocator.step().await?;
        Ok(allocator)
    }

    /// Follows the hub until it ends.
    pub async fn run(mut self) {
        let mut changes = self.hub.changes();
        loop {
            let due = self.gauges.without.get() > 0 || self.gauges.resting.get() > 0;
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN), if due => self.seen = None,
            }
            let services = self.hub.view().services.clone();
            if self.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &services)) {
                continue;
            }
            match self.step().await {
                Ok(()) => {}
                Err(AllocationFailed::Hub(HubGone)) => return,
                Err(AllocationFailed::Store(error)) => {
                    tracing::error!(%error, "virtual addresses can't be made durable, so new services get none yet");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    changes.mark_changed();
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn step(&mut self) -> Result<(), AllocationFailed> {
        let services = self.hub.view().services.clone();
        let (space, before) = (self.space, self.told.clone());
        let wanted = services.clone();
        let allocate = move |store: &Store| -> Result<(Addresses, usize), StoreError> {
            let (held, without) = store.change_addresses(|held| observe(held, space, &wanted))?;
            let resting = held.addresses.resting() + held.listeners.resting();
            Ok((Addresses::new(&held, space, without, before.as_deref()), resting))
        };
        let (addresses, resting) = self.store.off_thread(allocate).await?;
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        if self.gauges.without.get() == 0 {
            warn_of_missing(&addresses);
        }
        self.gauges.in_use.set(gauge(addresses.len()));
        self.gauges.listeners.set(gauge(addresses.listeners.len()));
        self.gauges.resting.set(gauge(resting));
        self.gauges.without.set(gauge(addresses.without.len() + addresses.without_listener.len()));
        let addresses = Arc::new(addresses);
        if !self.told.as_ref().is_some_and(|told| told.is_same(&addresses)) {
            self.hub.addressed(addresses.clone()).await?;
            self.told = Some(addresses);
        }
        self.seen = Some(services);
        Ok(())
    }
}

/// Allocates for all of `services`.
fn observe(held: &mut Allocations, space: Space, services: &BTreeMap<ServiceName, Arc<ServiceView>>) -> Without {
    let now = Timestamp::now();
    let wanted: BTreeSet<Owner> = services.values().flat_map(|view| owners(view)).collect();
    let addresses = held.addresses.observe(&wanted, space.ranges.count(), now);
    // Without a range nobody is told of a port, and each keeps the one that it had.
    let Some(range) = space.listeners else { return Without { addresses, ..Without::default() } };
    let wanted: BTreeSet<PortOwner> = services.values().flat_map(|view| port_owners(view)).collect();
    Without { addresses, listeners: held.listeners.observe(&wanted, range.count(), now) }
}

fn warn_of_missing(addresses: &Addresses) {
    if let Some(first) = addresses.without.first() {
        let Ranges { ipv4, ipv6 } = addresses.ranges;
        tracing::warn!(
            %first, count = addresses.without.len(), %ipv4, %ipv6,
            "no virtual address is left; DNS answers SERVFAIL for what has none: widen virtualAddresses"
        );
    }
    if let Some(first) = addresses.without_listener.first() {
        tracing::warn!(
            %first, count = addresses.without_listener.len(),
            "no listener port is left for workloads without a sidecar: widen unmeshed.ports"
        );
    }
}

impl Addresses {
    fn is_same(&self, other: &Addresses) -> bool {
        self.ranges == other.ranges
            && self.numbers == other.numbers
            && self.without == other.without
            && self.listeners == other.listeners
            && self.without_listener == other.without_listener
    }
}

/// Why addresses could not be allocated.
#[derive(Debug, thiserror::Error)]
pub enum AllocationFailed {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Hub(#[from] HubGone),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tombolo_core::model::ServiceKind;
    use tombolo_core::source::LocalState;

    use crate::testing::{Addresses as Peers, Federation, service, until};

    fn number(federation: &Federation, owner: &str) -> Option<u32> {
        let addresses = federation.hub.view().addresses.clone()?;
        addresses.number(&owner.parse().unwrap()).map(|number| number.0)
    }

    #[tokio::test]
    async fn services_keep_their_addresses_over_a_restart_and_share_none() {
        let peers = Peers::default();
        let east = Federation::start("east", &peers).await;
        east.declare(&["shop/web", "shop/db"]).await;
        let allocating = east.allocate().await;
        let before = (number(&east, "shop/db").unwrap(), number(&east, "shop/web").unwrap());
        assert_ne!(before.0, before.1);
        east.declare(&["shop/web", "shop/new"]).await;
        until("the new one has an address", || number(&east, "shop/new").is_some()).await;
        assert_eq!((number(&east, "shop/db"), number(&east, "shop/web")), (None, Some(before.1)));
        let new = number(&east, "shop/new").unwrap();
        assert!(![before.0, before.1].contains(&new), "what was given back rests");

        allocating.abort();
        let folder = east.stop().await;
        let east = Federation::start_in(folder, "east", &peers).await;
        assert!(east.hub.view().addresses.is_none(), "nothing is told before it is known");
        east.declare(&["shop/web", "shop/db", "shop/new"]).await;
        east.allocate().await;
        let after = (number(&east, "shop/db").unwrap(), number(&east, "shop/web").unwrap());
        assert_eq!((before, Some(new)), (after, number(&east, "shop/new")));
    }

    #[tokio::test]
    async fn imports_and_endpoints_of_headless_services_have_addresses_of_this_cluster() {
        let peers = Peers::default();
        let (east, west) = (Federation::start("east", &peers).await, Federation::start("west", &peers).await);
        east.allocate().await;
        let headless = tombolo_core::source::LocalService { kind: ServiceKind::Headless, ..west.declared("shop/db") };
        let services = [(service("shop/web"), west.declared("shop/web")), (service("shop/db"), headless)];
        west.hub.local_changed(LocalState { services: services.into(), ..Default::default() }).await.unwrap();
        west.register("db-1", "shop/db", true).await;
        west.register("db-2", "shop/db", false).await;
        east.peer(&west, "*").await;
        west.peer(&east, "").await;
        let held = || east.hub.view().addresses.clone().map_or(0, |addresses| addresses.len());
        until("all have addresses", || held() == 3).await;
        assert!(number(&east, "shop/web").is_some());
        assert_eq!(number(&east, "shop/db"), None, "a headless service has none of its own");
        east.hub.peer_removed(west.cluster.clone()).await.unwrap();
        until("they are given back", || held() == 0).await;
        assert!(east.metrics.encode().contains("tombolo_virtual_addresses_resting 3"));
    }

    #[tokio::test]
    async fn nobody_is_told_of_an_address_that_is_not_durable() {
        let east = Federation::start("east", &Peers::default()).await;
        east.declare(&["shop/web"]).await;
        east.allocate().await;
        // A directory in the file's place can't be replaced by a file.
        let file = east.folder.path().join("federation/virtual-addresses.json");
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        east.declare(&["shop/web", "shop/db"]).await;
        until("the service is there", || east.hub.view().services.len() == 2).await;
        east.hub.settled().await.unwrap();
        tokio::time::sleep(3 * PAUSE).await;
        assert_eq!(number(&east, "shop/db"), None);
        std::fs::remove_dir(&file).unwrap();
        until("it is tried again", || number(&east, "shop/db").is_some()).await;
    }
}
