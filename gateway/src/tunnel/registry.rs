//! All tunnels of this gateway, and which of them takes the next leg.
//!
//! Both sides may dial each other at the same time. Then both connections stay up for the legs that they
//! carry, but new legs go over one of them: the one that was dialled by the lesser of the two gateways (by
//! cluster, then gateway id), and of those the newest, so that a renewed connection takes over from the
//! old one. Both sides come to the same result; while they don't, both connections are simply used.
//! Whoever dialled a superseded connection closes it when it has had no legs for a while.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::UnixTime;
use tokio::sync::watch;
use tombolo_core::id::{ClusterId, GatewayId};
use tombolo_core::liveness::Reach;

use super::CLOSE_DONE;
use super::connection::Tunnel;

type Table = BTreeMap<ClusterId, Vec<Arc<Tunnel>>>;

/// Clones share the same tunnels.
#[derive(Debug, Clone)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    own_gateway: GatewayId,
    own_cluster: ClusterId,
    per_peer_max: usize,
    table: ArcSwap<Table>,
    writing: Mutex<()>,
    numbers: AtomicU64,
    changed: watch::Sender<u64>,
}

/// What there is for a leg to a cluster.
#[derive(Debug)]
pub enum Pick {
    Tunnel(Arc<Tunnel>),
    /// There are connections, but none that answers and takes legs.
    Suspect,
    None,
}

impl Registry {
    pub fn new(own_cluster: ClusterId, own_gateway: GatewayId, per_peer_max: usize) -> Self {
        Self(Arc::new(Inner {
            own_gateway,
            own_cluster,
            per_peer_max,
            table: ArcSwap::default(),
            writing: Mutex::new(()),
            numbers: AtomicU64::new(0),
            changed: watch::Sender::new(0),
        }))
    }

    /// Yields whenever a tunnel came, went, or changed its reach or place.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    pub fn next_number(&self) -> u64 {
        self.0.numbers.fetch_add(1, Ordering::Relaxed)
    }

    pub fn add(&self, tunnel: Arc<Tunnel>) {
        self.write(|table| {
            let tunnels = table.entry(tunnel.remote.cluster.clone()).or_default();
            tunnels.push(tunnel);
            while tunnels.len() > self.0.per_peer_max {
                tunnels.remove(0).connection.close(CLOSE_DONE, b"too many connections with one peer");
            }
        });
        self.settle();
    }

    pub fn remove(&self, tunnel: &Tunnel) {
        self.write(|table| {
            if let Some(tunnels) = table.get_mut(&tunnel.remote.cluster) {
                tunnels.retain(|held| held.number != tunnel.number);
                if tunnels.is_empty() {
                    table.remove(&tunnel.remote.cluster);
                }
            }
        });
        self.settle();
    }

    /// Decides anew which tunnels take new legs, and tells the subscribers.
    pub fn settle(&self) {
        let now = UnixTime::now();
        for tunnels in self.0.table.load().values() {
            for tunnel in tunnels {
                let best = self.best(tunnels, &tunnel.remote.gateway, now);
                tunnel.set_surplus(best.is_some_and(|best| best.number != tunnel.number));
            }
        }
        self.0.changed.send_modify(|generation| *generation += 1);
    }

    fn best<'a>(&self, tunnels: &'a [Arc<Tunnel>], gateway: &GatewayId, now: UnixTime) -> Option<&'a Arc<Tunnel>> {
        let own = (&self.0.own_cluster, &self.0.own_gateway);
        tunnels.iter().filter(|tunnel| tunnel.remote.gateway == *gateway && tunnel.is_usable(now)).min_by_key(
            |tunnel| {
                let own_is_less = own < (&tunnel.remote.cluster, &tunnel.remote.gateway);
                (tunnel.dialled_here != own_is_less, Reverse(tunnel.number))
            },
        )
    }

    /// The best usable tunnel with one gateway of a peer.
    pub fn usable(&self, cluster: &ClusterId, gateway: &GatewayId) -> Option<Arc<Tunnel>> {
        self.best(self.0.table.load().get(cluster)?, gateway, UnixTime::now()).cloned()
    }

    /// A usable tunnel with whichever gateway of a peer.
    pub fn usable_with_any(&self, cluster: &ClusterId) -> Option<Arc<Tunnel>> {
        let now = UnixTime::now();
        self.0.table.load().get(cluster)?.iter().find(|tunnel| tunnel.is_usable(now)).cloned()
    }

    /// The tunnel for a new leg: the gateway of the peer that has the fewest, among those not `tried` yet.
    pub fn pick(&self, cluster: &ClusterId, tried: &[u64]) -> Pick {
        let now = UnixTime::now();
        let table = self.0.table.load();
        let Some(tunnels) = table.get(cluster) else { return Pick::None };
        let free = tunnels
            .iter()
            .filter(|tunnel| tunnel.is_usable(now) && !tunnel.is_surplus() && !tried.contains(&tunnel.number));
        match free.min_by_key(|tunnel| tunnel.legs()) {
            Some(tunnel) => Pick::Tunnel(tunnel.clone()),
            None => Pick::Suspect,
        }
    }

    /// The reach of a cluster is that of its best tunnel.
    pub fn reach(&self, cluster: &ClusterId) -> Option<Reach> {
        let now = UnixTime::now();
        let table = self.0.table.load();
        let tunnels = table.get(cluster)?;
        let up = tunnels.iter().any(|tunnel| tunnel.is_usable(now));
        Some(if up { Reach::Up } else { Reach::Suspect })
    }

    /// Round trip of the fastest usable tunnel.
    pub fn rtt(&self, cluster: &ClusterId) -> Option<Duration> {
        let now = UnixTime::now();
        let table = self.0.table.load();
        table.get(cluster)?.iter().filter(|tunnel| tunnel.is_usable(now)).map(|tunnel| tunnel.rtt()).min()
    }

    /// Every tunnel, in the order of clusters.
    pub fn all(&self) -> Vec<Arc<Tunnel>> {
        self.0.table.load().values().flatten().cloned().collect()
    }

    fn write(&self, change: impl FnOnce(&mut Table)) {
        let _writing = self.0.writing.lock().expect("nothing panics while it changes the table of tunnels");
        let mut table = Table::clone(&self.0.table.load());
        change(&mut table);
        self.0.table.store(Arc::new(table));
    }
}
