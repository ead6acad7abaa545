//! What the sidecars of this cluster have registered, and what becomes of it in the catalogue.
//!
//! A registration lives as long as the sidecar's discovery stream, and [`GRACE`] longer, so that a
//! reconnect does not flap. Each is judged against the source as it is now: one that is refused comes
//! into force when the source allows it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tombolo_core::catalog::Delivery;
use tombolo_core::id::{ClusterId, EndpointId, InstanceName, ServiceName, SpiffeId};
use tombolo_core::registration::{self, Registered, Registrations};
use tombolo_core::source::LocalState;

use crate::source::endpoint_id;

/// How long a registration outlives its stream.
pub const GRACE: Duration = Duration::from_secs(3);
/// How long one outlives the replica that told of it: its sidecar is looking for another.
pub const REPLICA_GRACE: Duration = Duration::from_secs(15);
/// Services and ports that one sidecar may register.
pub const CLAIMS_MAX: usize = 64;
/// Sidecars that may be connected at once.
pub const SESSIONS_MAX: usize = 10_000;

/// One discovery stream. A later stream has a larger id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Which replica of this federation holds a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attached {
    /// Another one, that this stream between the two tells of; or the process before this one.
    Elsewhere(u64),
    Here,
}

impl Attached {
    /// How long what was known by the stream outlives it.
    pub fn grace(self) -> Duration {
        match self {
            Attached::Here => GRACE,
            Attached::Elsewhere(_) => REPLICA_GRACE,
        }
    }
}

/// A sidecar as other replicas are told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connected {
    pub attached: Attached,
    pub sidecar: RememberedSidecar,
}

/// What a sidecar asks for: it delivers this port of this service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Claim {
    pub service: ServiceName,
    pub port: u16,
    /// `host:port` where it accepts inner legs.
    pub inbound_address: String,
    pub ready: bool,
}

/// A sidecar and what it had registered, as it is kept over a restart of the federation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RememberedSidecar {
    pub instance: InstanceName,
    pub spiffe_id: SpiffeId,
    pub zone: Option<String>,
    pub claims: Vec<Claim>,
}

/// What was decided about a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub service: ServiceName,
    pub port: u16,
    pub ready: bool,
    /// Why it is refused, for an operator; `None` when it is in force.
    pub refused: Option<String>,
    pub endpoint: EndpointId,
}

#[derive(Debug)]
struct Session {
    instance: InstanceName,
    spiffe_id: SpiffeId,
    zone: Option<String>,
    attached: Attached,
    claims: BTreeMap<(ServiceName, u16), Delivery>,
    /// When it is dropped; `None` while its stream stands.
    ends: Option<Instant>,
}

/// All sidecars that are connected, or were a moment ago.
#[derive(Debug)]
pub struct Registry {
    cluster: ClusterId,
    sessions: BTreeMap<SessionId, Session>,
}

impl Registry {
    pub fn new(cluster: ClusterId) -> Self {
        Self { cluster, sessions: BTreeMap::new() }
    }

    /// Takes what sidecars had registered before this process started: in force until they come back, and
    /// dropped at `ends` if they don't. The sessions have the ids from 1 on.
    pub fn restore(&mut self, sidecars: Vec<RememberedSidecar>, ends: Instant) {
        for (n, sidecar) in (1..).zip(sidecars.into_iter().take(SESSIONS_MAX)) {
            let RememberedSidecar { instance, spiffe_id, zone, claims } = sidecar;
            let (claims, attached) = (deliveries(claims), Attached::Elsewhere(0));
            let held = Session { instance, spiffe_id, zone, attached, claims, ends: Some(ends) };
            self.sessions.insert(SessionId(n), held);
        }
    }

    /// What [`Registry::restore`] takes. Sidecars that have registered nothing are left out.
    pub fn remembered(&self) -> Vec<RememberedSidecar> {
        self.sessions.values().filter(|session| !session.claims.is_empty()).map(Session::remembered).collect()
    }

    /// Every sidecar, as other replicas are told of it.
    pub fn connected(&self) -> impl Iterator<Item = (SessionId, Connected)> {
        let connected = |session: &Session| Connected { attached: session.attached, sidecar: session.remembered() };
        self.sessions.iter().map(move |(id, session)| (*id, connected(session)))
    }

    /// A sidecar has connected. What the same instance and identity had registered before stays in force
    /// until it registers again or the grace ends. `false` when there are too many.
    pub fn handle_joined(
        &mut self,
        session: SessionId,
        spiffe_id: SpiffeId,
        instance: InstanceName,
        zone: Option<String>,
        attached: Attached,
    ) -> bool {
        if self.sessions.len() >= SESSIONS_MAX {
            return false;
        }
        let (claims, ends) = (BTreeMap::new(), None);
        self.sessions.insert(session, Session { instance, spiffe_id, zone, attached, claims, ends });
        true
    }

    /// Replaces what this sidecar had registered. Returns whether anything changed; claims above the limit
    /// are left out.
    pub fn handle_register(&mut self, session: SessionId, claims: Vec<Claim>) -> bool {
        let predecessors: Vec<SessionId> = self.predecessors(session).collect();
        let mut changed = !predecessors.is_empty();
        predecessors.iter().for_each(|id| drop(self.sessions.remove(id)));
        let Some(held) = self.sessions.get_mut(&session) else { return changed };
        let claims = deliveries(claims);
        changed |= held.claims != claims;
        held.claims = claims;
        changed
    }

    /// Returns whether anything changed.
    pub fn handle_readiness(&mut self, session: SessionId, service: ServiceName, port: u16, ready: bool) -> bool {
        let held = self.sessions.get_mut(&session).and_then(|session| session.claims.get_mut(&(service, port)));
        held.is_some_and(|delivery| std::mem::replace(&mut delivery.ready, ready) != ready)
    }

    /// The stream has ended; the grace begins. One that had registered nothing goes at once.
    pub fn handle_left(&mut self, session: SessionId, now: Instant) {
        if let Some(held) = self.sessions.get_mut(&session) {
            held.ends = Some(now + held.attached.grace());
            if held.claims.is_empty() {
                self.sessions.remove(&session);
            }
        }
    }

    /// Another replica has said that the sidecar has gone. Returns whether anything changed.
    pub fn handle_gone(&mut self, session: SessionId) -> bool {
        self.sessions.remove(&session).is_some()
    }

    /// Drops what has outlived its grace. Returns whether anything changed.
    pub fn handle_timeout(&mut self, now: Instant) -> bool {
        let before = self.sessions.len();
        self.sessions.retain(|_, session| session.ends.is_none_or(|ends| now < ends));
        self.sessions.len() != before
    }

    /// When [`Registry::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.sessions.values().filter_map(|session| session.ends).min()
    }

    /// Sessions of the same instance and identity that `session` takes over from. What another replica tells may be late,
    /// and takes nothing from a stream that stands here.
    fn predecessors(&self, session: SessionId) -> impl Iterator<Item = SessionId> {
        let held = self.sessions.get(&session);
        let same = move |earlier: &Session| {
            held.is_some_and(|held| {
                let may = held.attached == Attached::Here || earlier.attached != Attached::Here;
                may && earlier.instance == held.instance && earlier.spiffe_id == held.spiffe_id
            })
        };
        self.sessions.range(..session).filter(move |(_, earlier)| same(earlier)).map(|(id, _)| *id)
    }

    /// Who speaks for an instance that several sidecars claim: the identity whose stream stood first.
    fn owners(&self) -> BTreeMap<&InstanceName, &SpiffeId> {
        let mut owners = BTreeMap::new();
        for session in self.sessions.values() {
            owners.entry(&session.instance).or_insert(&session.spiffe_id);
        }
        owners
    }

    /// Everything registered, as the catalogue takes it; what the source does not allow is judged there.
    pub fn registrations(&self) -> Registrations {
        let owners = self.owners();
        let mut registrations = Registrations::new();
        let mut sessions: Vec<&Session> =
            self.sessions.values().filter(|session| owners[&session.instance] == &session.spiffe_id).collect();
        // What is known at first hand comes last and so counts.
        sessions.sort_by_key(|session| session.attached == Attached::Here);
        for session in sessions {
            for ((service, port), delivery) in &session.claims {
                let instances = registrations.entry(service.clone()).or_default();
                let registered = instances.entry(session.instance.clone()).or_insert_with(|| Registered {
                    endpoint: endpoint_id(&self.cluster, service, session.instance.as_str()),
                    spiffe_id: session.spiffe_id.clone(),
                    zone: session.zone.clone(),
                    ports: BTreeMap::new(),
                });
                registered.ports.insert(*port, delivery.clone());
            }
        }
        registrations
    }

    /// What is decided about each claim of each sidecar.
    pub fn verdicts(&self, state: &LocalState) -> BTreeMap<SessionId, Vec<Verdict>> {
        let owners = self.owners();
        let verdicts_of = |session: &Session| {
            let claims = session.claims.iter().map(|((service, port), delivery)| {
                let judged = registration::check(state, service, *port, &session.spiffe_id);
                let taken = owners[&session.instance] != &session.spiffe_id;
                let refused = judged.err().map(|refused| refused.to_string());
                let in_use = || taken.then(|| format!("instance {} is in use by another identity", session.instance));
                Verdict {
                    service: service.clone(),
                    port: *port,
                    ready: delivery.ready,
                    refused: refused.or_else(in_use),
                    endpoint: endpoint_for(state, &self.cluster, service, &session.instance),
                }
            });
            claims.collect()
        };
        self.sessions.iter().map(|(id, session)| (*id, verdicts_of(session))).collect()
    }

    /// Identity, instance and whether the stream stands, of every sidecar.
    pub fn sidecars(&self) -> impl Iterator<Item = (SessionId, &SpiffeId, &InstanceName, bool)> {
        self.sessions.iter().map(|(id, s)| (*id, &s.spiffe_id, &s.instance, s.ends.is_none()))
    }

    /// Addresses at which sidecars have registered, without loopback's, which are everybody's.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        let claims = self.sessions.values().flat_map(|session| session.claims.values());
        let addresses = claims.filter_map(|delivery| Some(delivery.address.parse::<SocketAddr>().ok()?.ip()));
        addresses.map(|address| address.to_canonical()).filter(|address| !address.is_loopback()).collect()
    }

    /// Services that a sidecar has registered.
    pub fn services(&self, session: SessionId) -> BTreeSet<ServiceName> {
        let claims = self.sessions.get(&session).into_iter().flat_map(|session| session.claims.keys());
        claims.map(|(service, _)| service.clone()).collect()
    }
}

impl Session {
    fn remembered(&self) -> RememberedSidecar {
        let claim = |((service, port), delivery): (&(ServiceName, u16), &Delivery)| Claim {
            service: service.clone(),
            port: *port,
            inbound_address: delivery.address.clone(),
            ready: delivery.ready,
        };
        RememberedSidecar {
            instance: self.instance.clone(),
            spiffe_id: self.spiffe_id.clone(),
            zone: self.zone.clone(),
            claims: self.claims.iter().map(claim).collect(),
        }
    }
}

fn deliveries(claims: Vec<Claim>) -> BTreeMap<(ServiceName, u16), Delivery> {
    let delivery =
        |claim: Claim| ((claim.service, claim.port), Delivery { address: claim.inbound_address, ready: claim.ready });
    claims.into_iter().take(CLAIMS_MAX).map(delivery).collect()
}

/// A slice that names the instance gives the endpoint its id.
fn endpoint_for(state: &LocalState, cluster: &ClusterId, service: &ServiceName, instance: &InstanceName) -> EndpointId {
    let declared = state.services.get(service).into_iter().flat_map(|service| &service.endpoints);
    let mut named = declared.filter(|(_, endpoint)| endpoint.instance.as_ref() == Some(instance));
    named.next().map_or_else(|| endpoint_id(cluster, service, instance.as_str()), |(id, _)| id.clone())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const WEB: &str = "spiffe://east/ns/shop/sa/web";

    fn claim(ready: bool) -> Vec<Claim> {
        let service = "shop/web".parse().unwrap();
        vec![Claim { service, port: 80, inbound_address: "127.0.0.1:1".into(), ready }]
    }

    fn joined(registry: &mut Registry, session: u64, id: &str) -> SessionId {
        joined_at(registry, session, id, Attached::Here)
    }

    fn joined_at(registry: &mut Registry, session: u64, id: &str, attached: Attached) -> SessionId {
        let session = SessionId(session);
        assert!(registry.handle_joined(session, id.parse().unwrap(), "web-1".parse().unwrap(), None, attached));
        session
    }

    /// The instances registered for shop/web and whether port 80 is ready.
    fn ready(registry: &Registry) -> Vec<bool> {
        let registrations = registry.registrations();
        let web = registrations.values().flat_map(BTreeMap::values);
        web.map(|registered| registered.ports[&80].ready).collect()
    }

    #[test]
    fn a_registration_outlives_its_stream_by_the_grace() {
        let (now, mut registry) = (Instant::now(), Registry::new("east".parse().unwrap()));
        let session = joined(&mut registry, 1, WEB);
        assert!(registry.handle_register(session, claim(true)));
        assert!(!registry.handle_register(session, claim(true)));
        registry.handle_left(session, now);
        assert_eq!(registry.poll_timeout(), Some(now + GRACE));
        assert!(!registry.handle_timeout(now + GRACE - Duration::from_millis(1)));
        assert_eq!(ready(&registry), [true]);
        assert!(registry.handle_timeout(now + GRACE));
        assert!(ready(&registry).is_empty());
    }

    #[test]
    fn a_reconnect_takes_over_without_a_gap() {
        let (now, mut registry) = (Instant::now(), Registry::new("east".parse().unwrap()));
        let first = joined(&mut registry, 1, WEB);
        registry.handle_register(first, claim(true));
        let second = joined(&mut registry, 2, WEB);
        registry.handle_left(first, now);
        assert_eq!(ready(&registry), [true], "still there before the new stream has registered");
        assert!(registry.handle_register(second, claim(false)));
        assert_eq!(ready(&registry), [false]);
        assert!(!registry.handle_timeout(now + GRACE), "the old session ended when the new one took over");
    }

    #[test]
    fn what_another_replica_tells_counts_as_long_as_nothing_is_known_at_first_hand() {
        let (now, mut registry) = (Instant::now(), Registry::new("east".parse().unwrap()));
        let elsewhere = joined_at(&mut registry, 1, WEB, Attached::Elsewhere(1));
        registry.handle_register(elsewhere, claim(false));
        assert_eq!(ready(&registry), [false]);
        let here = joined(&mut registry, 2, WEB);
        registry.handle_register(here, claim(true));
        assert!(!registry.handle_gone(elsewhere), "the sidecar has come from there to here");
        let late = joined_at(&mut registry, 3, WEB, Attached::Elsewhere(1));
        registry.handle_register(late, claim(false));
        assert_eq!(ready(&registry), [true], "what it says of the past takes nothing away");
        registry.handle_left(here, now);
        registry.handle_left(late, now);
        assert!(registry.handle_timeout(now + GRACE));
        assert_eq!(ready(&registry), [false], "it may have gone there");
        assert!(registry.handle_timeout(now + REPLICA_GRACE));
        assert!(ready(&registry).is_empty());
    }

    #[test]
    fn what_was_registered_outlives_a_restart_until_the_sidecar_is_back() {
        let (now, mut before) = (Instant::now(), Registry::new("east".parse().unwrap()));
        let session = joined(&mut before, 7, WEB);
        before.handle_register(session, claim(true));
        let mut after = Registry::new("east".parse().unwrap());
        after.restore(before.remembered(), now + Duration::from_secs(15));
        assert_eq!(after.registrations(), before.registrations());
        let back = joined(&mut after, 20_000, WEB);
        assert!(after.handle_register(back, claim(false)));
        assert_eq!(ready(&after), [false]);
        assert!(!after.handle_timeout(now + Duration::from_secs(15)));
        assert_eq!(after.remembered().len(), 1);
    }

    #[test]
    fn readiness_changes_only_what_is_registered() {
        let mut registry = Registry::new("east".parse().unwrap());
        let session = joined(&mut registry, 1, WEB);
        registry.handle_register(session, claim(false));
        let web: ServiceName = "shop/web".parse().unwrap();
        assert!(registry.handle_readiness(session, web.clone(), 80, true));
        assert!(!registry.handle_readiness(session, web.clone(), 80, true));
        assert!(!registry.handle_readiness(session, web, 81, true));
        assert_eq!(ready(&registry), [true]);
    }

    #[test]
    fn another_identity_cannot_take_an_instance_that_is_in_use() {
        let mut registry = Registry::new("east".parse().unwrap());
        let first = joined(&mut registry, 1, WEB);
        registry.handle_register(first, claim(true));
        let other = joined(&mut registry, 2, "spiffe://east/ns/shop/sa/other");
        registry.handle_register(other, claim(false));
        assert_eq!(ready(&registry), [true]);
        let verdicts = registry.verdicts(&LocalState::default());
        assert!(verdicts[&other][0].refused.is_some());
    }
}
