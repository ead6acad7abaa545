//! What the federation told this gateway: its peers, what is delivered where, and to whom it is offered.

use std::collections::BTreeMap;

use tombolo_core::id::{ClusterId, ServiceName, TrustDomain};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_leg::discovery::{Delivery, GatewaySnapshot, GatewayWelcome, PeerLink, Unmeshed};

/// All that a gateway decides by. Replaced as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// host:port of the federation's inner legs, the implicit export to every peer.
    pub federation_leg_address: Option<String>,
    /// The clusters to hold tunnels with.
    pub peers: BTreeMap<ClusterId, PeerLink>,
    /// Where each port of a service is delivered, and to which peers it is offered.
    pub deliveries: BTreeMap<(ServiceName, u16), Delivery>,
    /// What is done for workloads without a sidecar.
    pub unmeshed: Unmeshed,
}

/// Which cluster a leg comes from, as the connection that brought it proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegOrigin<'a> {
    /// From this cluster's own sidecars, at the ingress.
    Own,
    Peer(&'a ClusterId),
}

impl Snapshot {
    pub fn new(welcome: GatewayWelcome, state: GatewaySnapshot) -> Self {
        Self {
            cluster: welcome.cluster,
            trust_domain: welcome.trust_domain,
            federation_leg_address: Some(welcome.federation_leg_address).filter(|address| !address.is_empty()),
            peers: state.peers,
            deliveries: state.deliveries,
            unmeshed: state.unmeshed,
        }
    }

    /// The address that a leg for a target in this cluster is delivered to. `choice` picks among the ready
    /// endpoints where the target names none.
    pub fn deliver(&self, target: &LegTarget, origin: LegOrigin<'_>, choice: usize) -> Result<&str, Refusal> {
        if target.cluster != self.cluster {
            return Err(Refusal::UnknownCluster);
        }
        if target.is_federation() && target.endpoint.is_none() {
            return self.federation_leg_address.as_deref().ok_or(Refusal::NoEndpoint);
        }
        let delivery = self.offered(target, origin)?;
        let endpoint = match &target.endpoint {
            Some(id) => delivery.endpoints.get(id).filter(|endpoint| endpoint.ready).ok_or(Refusal::EndpointGone)?,
            None => {
                let ready: Vec<_> = delivery.endpoints.values().filter(|endpoint| endpoint.ready).collect();
                let count = ready.len().max(1);
                ready.get(choice % count).copied().ok_or(Refusal::NoEndpoint)?
            }
        };
        Ok(&endpoint.inbound_address)
    }

    fn offered(&self, target: &LegTarget, origin: LegOrigin<'_>) -> Result<&Delivery, Refusal> {
        let offered = |delivery: &Delivery| match origin {
            LegOrigin::Own => true,
            LegOrigin::Peer(cluster) => delivery.clusters.contains(cluster),
        };
        // A service that is offered to others only looks to this peer as if it did not exist.
        let unknown = match origin {
            LegOrigin::Own => Refusal::UnknownService,
            LegOrigin::Peer(_) => Refusal::NotExported,
        };
        match self.deliveries.get(&(target.service.clone(), target.port)) {
            Some(delivery) if offered(delivery) => Ok(delivery),
            Some(_) => Err(unknown),
            None => {
                let ports = (target.service.clone(), 0)..=(target.service.clone(), u16::MAX);
                let another = self.deliveries.range(ports).any(|(_, delivery)| offered(delivery));
                Err(if another { Refusal::UnknownPort } else { unknown })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeSet;
    use tombolo_leg::discovery::DeliveryEndpoint;

    fn snapshot() -> Snapshot {
        let endpoint = |address: &str, ready| DeliveryEndpoint { inbound_address: address.into(), ready };
        let web = Delivery {
            clusters: ["west".parse().unwrap()].into(),
            endpoints: [
                ("a1".parse().unwrap(), endpoint("a:1", true)),
                ("a2".parse().unwrap(), endpoint("a:2", false)),
                ("a3".parse().unwrap(), endpoint("a:3", true)),
            ]
            .into(),
        };
        let db =
            Delivery { clusters: BTreeSet::new(), endpoints: [("d1".parse().unwrap(), endpoint("d:1", false))].into() };
        let welcome = GatewayWelcome {
            cluster: "east".parse().unwrap(),
            trust_domain: "east.tombolo".parse().unwrap(),
            federation_leg_address: "f:1".into(),
        };
        let deliveries = [(("shop/web".parse().unwrap(), 80), web), (("data/db".parse().unwrap(), 5432), db)].into();
        Snapshot::new(welcome, GatewaySnapshot { deliveries, ..Default::default() })
    }

    #[test]
    fn what_is_delivered_depends_on_the_target_and_on_who_asks() {
        let snapshot = snapshot();
        let (west, north) = ("west".parse().unwrap(), "north".parse().unwrap());
        let (own, west, north) = (LegOrigin::Own, LegOrigin::Peer(&west), LegOrigin::Peer(&north));
        for (target, origin, choice, want) in [
            ("80.web.shop.svc.east", west, 0, Ok("a:1")),
            ("80.web.shop.svc.east", west, 1, Ok("a:3")),
            ("80.web.shop.svc.east", west, 2, Ok("a:1")),
            ("e-a3.80.web.shop.svc.east", west, 0, Ok("a:3")),
            ("e-a2.80.web.shop.svc.east", west, 0, Err(Refusal::EndpointGone)),
            ("e-zz.80.web.shop.svc.east", west, 0, Err(Refusal::EndpointGone)),
            ("81.web.shop.svc.east", west, 0, Err(Refusal::UnknownPort)),
            ("81.web.shop.svc.east", north, 0, Err(Refusal::NotExported)),
            ("80.web.shop.svc.east", north, 0, Err(Refusal::NotExported)),
            ("e-a1.80.web.shop.svc.east", north, 0, Err(Refusal::NotExported)),
            ("80.no.shop.svc.east", west, 0, Err(Refusal::NotExported)),
            ("5432.db.data.svc.east", west, 0, Err(Refusal::NotExported)),
            ("5432.db.data.svc.east", own, 0, Err(Refusal::NoEndpoint)),
            ("80.web.shop.svc.east", own, 0, Ok("a:1")),
            ("80.no.shop.svc.east", own, 0, Err(Refusal::UnknownService)),
            ("80.web.shop.svc.west", own, 0, Err(Refusal::UnknownCluster)),
            ("80.web.shop.svc.west", west, 0, Err(Refusal::UnknownCluster)),
            ("443.federation.tombolo-system.svc.east", north, 0, Ok("f:1")),
            ("443.federation.tombolo-system.svc.east", own, 0, Ok("f:1")),
            ("444.federation.tombolo-system.svc.east", north, 0, Err(Refusal::NotExported)),
            ("e-a1.443.federation.tombolo-system.svc.east", north, 0, Err(Refusal::NotExported)),
        ] {
            let target: LegTarget = format!("{target}.clusterset.local").parse().unwrap();
            assert_eq!(snapshot.deliver(&target, origin, choice), want, "{target} {origin:?}");
        }
    }
}
