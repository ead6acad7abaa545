//! The gateways of this cluster: which of them a leg to another cluster enters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tombolo_core::id::{ClusterId, GatewayId};
use tombolo_core::routing::ClusterReach;
use tombolo_leg::discovery::LocalGateway;

use super::crossing::Standing;

/// A gateway that refused or did not connect is passed over for this long at first; twice as long each time
/// that it happens again, up to [`AVOID_MAX`]. One success forgives everything.
const AVOID: Duration = Duration::from_millis(500);
const AVOID_MAX: Duration = Duration::from_secs(10);

/// What a gateway says of one peer cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerReach {
    pub reach: ClusterReach,
    pub rtt: Option<Duration>,
}

/// One gateway, as this sidecar sees it.
#[derive(Debug)]
pub struct Gateway {
    pub id: GatewayId,
    pub ingress: String,
    draining: AtomicBool,
    /// `None` before GatewayWatch has said anything.
    peers: ArcSwap<Option<BTreeMap<ClusterId, PeerReach>>>,
    base: Instant,
    avoid_until_ms: AtomicU64,
    failures: AtomicU32,
    pub standing: Standing,
}

/// All gateways of this cluster.
#[derive(Debug, Clone, Default)]
pub struct Gateways {
    all: Arc<ArcSwap<Vec<Arc<Gateway>>>>,
    /// How often each cluster was lost.
    losses: watch::Sender<BTreeMap<ClusterId, u64>>,
}

impl Gateways {
    /// Takes in the list; what is known of a gateway that stays is kept.
    pub fn replace(&self, gateways: &[LocalGateway]) {
        let before = self.all.load();
        let known = |gateway: &LocalGateway| {
            let same = |old: &&Arc<Gateway>| old.id == gateway.gateway_id && old.ingress == gateway.ingress_address;
            before.iter().find(same).cloned()
        };
        let now = gateways.iter().map(|gateway| known(gateway).unwrap_or_else(|| Arc::new(Gateway::new(gateway))));
        let now: Vec<_> = now.collect();
        // Those that are gone are heard of no more; connections may still stand across them.
        let gone = before.iter().filter(|old| !now.iter().any(|new| Arc::ptr_eq(new, old)));
        gone.for_each(|gateway| gateway.peers.store(Arc::default()));
        self.all.store(Arc::new(now));
    }

    /// Takes in what GatewayWatch says; `None` when the watch is lost, so that nothing is known any more. Returns the
    /// clusters that the gateway reached so far and says that it does not reach now.
    pub fn observe(
        &self,
        id: &GatewayId,
        draining: bool,
        peers: Option<BTreeMap<ClusterId, PeerReach>>,
    ) -> Vec<ClusterId> {
        let mut lost = Vec::new();
        for gateway in self.all.load().iter().filter(|gateway| gateway.id == *id) {
            gateway.draining.store(draining, Ordering::Relaxed);
            let before = gateway.peers.swap(Arc::new(peers.clone()));
            let reached = before.iter().flatten().filter(|(_, peer)| peer.reach == ClusterReach::Up);
            let broken = |cluster: &&ClusterId| peers.is_some() && gateway.reach(cluster).reach != ClusterReach::Up;
            lost.extend(reached.map(|(cluster, _)| cluster).filter(broken).cloned());
        }
        lost
    }

    /// Tells those who wait for legs to these clusters, which one gateway has lost, where no other reaches them.
    pub fn announce(&self, lost: &[ClusterId]) {
        let gone: Vec<_> = lost.iter().filter(|cluster| self.reach(cluster).reach != ClusterReach::Up).collect();
        if !gone.is_empty() {
            self.losses.send_modify(|losses| {
                gone.into_iter().for_each(|cluster| *losses.entry(cluster.clone()).or_default() += 1);
            });
        }
    }

    /// Done when the cluster is lost from now on, not when it was before.
    pub async fn lost(&self, cluster: &ClusterId) {
        let mut losses = self.losses.subscribe();
        let before = losses.borrow_and_update().get(cluster).copied();
        let lost = losses.wait_for(|losses| losses.get(cluster).copied() != before).await.is_ok();
        debug_assert!(lost, "the sender is held here");
    }

    pub fn is_draining(&self, id: &GatewayId) -> bool {
        self.all.load().iter().any(|gateway| gateway.id == *id && gateway.draining.load(Ordering::Relaxed))
    }

    /// The best that any gateway says of a cluster.
    pub fn reach(&self, cluster: &ClusterId) -> PeerReach {
        let all = self.all.load();
        let usable = all.iter().filter(|gateway| !gateway.draining.load(Ordering::Relaxed));
        let best = usable.map(|gateway| gateway.reach(cluster)).min_by_key(rank);
        best.unwrap_or(PeerReach { reach: ClusterReach::Down, rtt: None })
    }

    /// The gateway for the next try. `tried` are those that this leg has met already; `random` spreads
    /// over equals.
    pub fn choose(&self, cluster: &ClusterId, tried: &[GatewayId], random: u64) -> Option<Arc<Gateway>> {
        let all = self.all.load();
        let cost = |gateway: &Arc<Gateway>| {
            let draining = gateway.draining.load(Ordering::Relaxed);
            (draining, gateway.reach(cluster).reach, gateway.is_avoided())
        };
        let untried = || all.iter().filter(|gateway| !tried.contains(&gateway.id));
        let best = untried().map(cost).min()?;
        let mut equals = untried().filter(|gateway| cost(gateway) == best);
        let count = equals.clone().count() as u64;
        equals.nth(usize::try_from(random % count).unwrap_or(0)).cloned()
    }

    pub fn snapshot(&self) -> Arc<Vec<Arc<Gateway>>> {
        self.all.load_full()
    }
}

fn rank(peer: &PeerReach) -> (ClusterReach, bool, Duration) {
    (peer.reach, peer.rtt.is_none(), peer.rtt.unwrap_or_default())
}

impl Gateway {
    fn new(gateway: &LocalGateway) -> Self {
        Self {
            id: gateway.gateway_id.clone(),
            ingress: gateway.ingress_address.clone(),
            draining: AtomicBool::new(false),
            peers: ArcSwap::default(),
            base: Instant::now(),
            avoid_until_ms: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            standing: Standing::default(),
        }
    }

    /// Whether it says of itself now which clusters it reaches.
    pub fn says_of_itself(&self) -> bool {
        self.peers.load().is_some()
    }

    /// What this gateway says of a cluster; a peer that it does not list has no tunnel.
    pub fn reach(&self, cluster: &ClusterId) -> PeerReach {
        match &**self.peers.load() {
            None => PeerReach { reach: ClusterReach::Unknown, rtt: None },
            Some(peers) => peers.get(cluster).copied().unwrap_or(PeerReach { reach: ClusterReach::Down, rtt: None }),
        }
    }

    pub fn failed(&self) {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).min(8);
        let pause = AVOID.saturating_mul(1 << failures).min(AVOID_MAX);
        self.avoid_until_ms.store(self.now_ms() + pause.as_millis() as u64, Ordering::Relaxed);
    }

    pub fn worked(&self) {
        if self.failures.swap(0, Ordering::Relaxed) != 0 {
            self.avoid_until_ms.store(0, Ordering::Relaxed);
        }
    }

    /// Whether it has failed since it worked last.
    pub fn has_failed(&self) -> bool {
        self.failures.load(Ordering::Relaxed) > 0
    }

    pub fn is_avoided(&self) -> bool {
        self.avoid_until_ms.load(Ordering::Relaxed) > self.now_ms()
    }

    fn now_ms(&self) -> u64 {
        self.base.elapsed().as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn gateways(names: &[&str]) -> Gateways {
        let gateways = Gateways::default();
        let list: Vec<_> = names
            .iter()
            .map(|name| LocalGateway {
                gateway_id: name.parse().unwrap(),
                ingress_address: format!("127.0.0.1:{}", name.len()),
                watch_address: String::new(),
                spiffe_id: "spiffe://east.tombolo/tombolo/gateway/g".parse().unwrap(),
            })
            .collect();
        gateways.replace(&list);
        gateways
    }

    fn say(gateways: &Gateways, id: &str, reach: ClusterReach) {
        let peers = BTreeMap::from([("west".parse().unwrap(), PeerReach { reach, rtt: None })]);
        gateways.observe(&id.parse().unwrap(), false, Some(peers));
    }

    #[track_caller]
    fn check(gateways: &Gateways, tried: &[&str], want: Option<&str>) {
        let tried: Vec<GatewayId> = tried.iter().map(|id| id.parse().unwrap()).collect();
        for random in 0..20 {
            let chosen = gateways.choose(&"west".parse().unwrap(), &tried, random);
            assert_eq!(chosen.map(|gateway| gateway.id.to_string()).as_deref(), want);
        }
    }

    #[test]
    fn a_lost_way_is_told_once() {
        let gateways = gateways(&["a"]);
        let west: ClusterId = "west".parse().unwrap();
        let says = |reach: Option<ClusterReach>| {
            let peers = reach.map(|reach| BTreeMap::from([(west.clone(), PeerReach { reach, rtt: None })]));
            gateways.observe(&"a".parse().unwrap(), false, peers)
        };
        assert_eq!(says(Some(ClusterReach::Suspect)), []);
        assert_eq!(says(Some(ClusterReach::Up)), []);
        assert_eq!(says(Some(ClusterReach::Suspect)), std::slice::from_ref(&west));
        assert_eq!(says(Some(ClusterReach::Down)), []);
        assert_eq!(says(Some(ClusterReach::Up)), []);
        // A watch that is lost says nothing of the way.
        assert_eq!(says(None), []);
        assert_eq!(says(Some(ClusterReach::Up)), []);
        assert_eq!(gateways.observe(&"a".parse().unwrap(), false, Some(BTreeMap::new())), std::slice::from_ref(&west));
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_a_loss_that_no_other_gateway_makes_up_for() {
        let gateways = gateways(&["a", "b"]);
        let west: ClusterId = "west".parse().unwrap();
        let mut waiting = Box::pin(gateways.lost(&west));
        let mut is_told = async || tokio::time::timeout(Duration::from_millis(20), &mut waiting).await.is_ok();
        say(&gateways, "a", ClusterReach::Up);
        say(&gateways, "b", ClusterReach::Up);
        say(&gateways, "a", ClusterReach::Suspect);
        gateways.announce(std::slice::from_ref(&west));
        assert!(!is_told().await, "the other one reaches it");
        say(&gateways, "b", ClusterReach::Suspect);
        gateways.announce(&["south".parse().unwrap()]);
        assert!(!is_told().await, "it is another cluster");
        gateways.announce(std::slice::from_ref(&west));
        assert!(is_told().await);
        // What was lost before is no news.
        assert!(tokio::time::timeout(Duration::from_millis(20), gateways.lost(&west)).await.is_err());
    }

    #[test]
    fn the_gateway_that_reaches_is_chosen() {
        let gateways = gateways(&["a", "b"]);
        say(&gateways, "a", ClusterReach::Suspect);
        check(&gateways, &[], Some("b"));
        say(&gateways, "b", ClusterReach::Down);
        check(&gateways, &[], Some("a"));
        check(&gateways, &["a"], Some("b"));
        check(&gateways, &["a", "b"], None);
        say(&gateways, "b", ClusterReach::Up);
        gateways.observe(&"b".parse().unwrap(), true, None);
        check(&gateways, &[], Some("a"));
    }

    #[test]
    fn a_gateway_that_failed_is_passed_over_until_it_works() {
        let gateways = gateways(&["a", "b"]);
        let all = gateways.snapshot();
        all[0].failed();
        check(&gateways, &[], Some("b"));
        all[1].failed();
        assert!(gateways.choose(&"west".parse().unwrap(), &[], 0).is_some());
        all[0].worked();
        check(&gateways, &[], Some("a"));
    }

    #[test]
    fn equals_share_the_legs_and_what_is_known_stays() {
        let gateways = gateways(&["a", "b"]);
        let chosen: std::collections::BTreeSet<_> =
            (0..10).map(|random| gateways.choose(&"west".parse().unwrap(), &[], random).unwrap().id.clone()).collect();
        assert_eq!(chosen.len(), 2);
        assert_eq!(gateways.reach(&"west".parse().unwrap()).reach, ClusterReach::Unknown);
        say(&gateways, "a", ClusterReach::Up);
        assert_eq!(gateways.reach(&"west".parse().unwrap()).reach, ClusterReach::Up);
        assert_eq!(Gateways::default().reach(&"west".parse().unwrap()).reach, ClusterReach::Down);
    }
}
