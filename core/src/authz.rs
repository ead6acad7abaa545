//! Who may call what is delivered here. Decided for each request and each opaque connection, from what the
//! handshake verified and from what federation granted; nothing that the caller wrote takes part.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::{ClusterId, Role, ServiceName, SpiffeId};
use crate::refusal::Refusal;
use crate::sni::LegTarget;

/// Which clusters each service is exported to, as granted by the own federation.
pub type Grants = BTreeMap<ServiceName, BTreeSet<ClusterId>>;

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    pub id: &'a SpiffeId,
    /// The cluster that the client's trust domain is bound to.
    pub cluster: &'a ClusterId,
}

/// What is delivered here.
#[derive(Debug, Clone, Copy)]
pub struct Delivered<'a> {
    /// The cluster of this process.
    pub cluster: &'a ClusterId,
    /// The (service, port) pairs that the application behind this sidecar serves.
    pub ports: &'a BTreeSet<(ServiceName, u16)>,
    pub grants: &'a Grants,
}

/// Whether `client` may call `target` here.
///
/// # Errors
/// - `TargetMismatch`: the target is of another cluster; the leg was delivered wrongly.
/// - `WrongRole`: one of tombolo's own roles calls a workload. Roles carry legs; they never begin one to a workload,
///   but in the name of a workload without a sidecar, which [`authorize_unmeshed`] decides about.
/// - `UnknownService`, `UnknownPort`: this sidecar does not deliver it (HTTP 421).
/// - `NotExported`: the service is not exported to the client's cluster.
pub fn authorize(client: Client<'_>, target: &LegTarget, delivered: Delivered<'_>) -> Result<(), Refusal> {
    if target.cluster != *delivered.cluster {
        return Err(Refusal::TargetMismatch);
    }
    if client.id.is_reserved() && client.id.as_role() != Some(Role::Unmeshed) {
        return Err(Refusal::WrongRole);
    }
    // A cluster that may not know of a service learns nothing from asking for its ports.
    let own = client.cluster == delivered.cluster;
    let granted = own || delivered.grants.get(&target.service).is_some_and(|grant| grant.contains(client.cluster));
    if !granted {
        return Err(Refusal::NotExported);
    }
    if delivered.ports.contains(&(target.service.clone(), target.port)) {
        return Ok(());
    }
    let known = delivered.ports.iter().any(|(service, _)| *service == target.service);
    Err(if known { Refusal::UnknownPort } else { Refusal::UnknownService })
}

/// Whether a gateway may speak here for workloads without a sidecar; everybody else may speak for itself.
///
/// # Errors
/// `IdentityDenied` unless `allowed` names the cluster of the gateway.
pub fn authorize_unmeshed(client: Client<'_>, allowed: &BTreeSet<ClusterId>) -> Result<(), Refusal> {
    let is_unmeshed = client.id.as_role() == Some(Role::Unmeshed);
    if is_unmeshed && !allowed.contains(client.cluster) { Err(Refusal::IdentityDenied) } else { Ok(()) }
}

/// Whether `client` may open a leg of peer sync: a federation of a peered cluster, never of the own one.
///
/// # Errors
/// `TargetMismatch` when the target is not this cluster's federation, `WrongRole` for any other identity,
/// `UnknownCluster` for one that is not peered.
pub fn authorize_sync(
    client: Client<'_>,
    target: &LegTarget,
    own: &ClusterId,
    peered: impl FnOnce(&ClusterId) -> bool,
) -> Result<(), Refusal> {
    if target.cluster != *own || !target.is_federation() {
        return Err(Refusal::TargetMismatch);
    }
    if client.id.as_role() != Some(Role::Federation) {
        return Err(Refusal::WrongRole);
    }
    if client.cluster == own || !peered(client.cluster) {
        return Err(Refusal::UnknownCluster);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn verdict(id: &str, cluster: &str, target: &str) -> Result<(), Refusal> {
        let grants: Grants =
            [("shop/web".parse().unwrap(), ["west".parse().unwrap()].into()), ("shop/old".parse().unwrap(), [].into())]
                .into();
        let ports = [("shop/web", 80), ("shop/web", 81), ("shop/old", 80), ("data/db", 5432)]
            .map(|(service, port)| (service.parse().unwrap(), port))
            .into();
        let own = "east".parse().unwrap();
        let delivered = Delivered { cluster: &own, ports: &ports, grants: &grants };
        let (id, cluster): (SpiffeId, ClusterId) = (id.parse().unwrap(), cluster.parse().unwrap());
        authorize(Client { id: &id, cluster: &cluster }, &target.parse().unwrap(), delivered)
    }

    #[test]
    fn a_gateway_speaks_for_others_only_where_that_is_allowed() {
        for (path, allowed, want) in [
            ("tombolo/unmeshed/g1", "west", Ok(())),
            ("tombolo/unmeshed/g1", "north", Err(Refusal::IdentityDenied)),
            ("ns/shop/sa/web", "north", Ok(())),
        ] {
            let id = format!("spiffe://west.tombolo/{path}").parse().unwrap();
            let client = Client { id: &id, cluster: &"west".parse().unwrap() };
            assert_eq!(authorize_unmeshed(client, &[allowed.parse().unwrap()].into()), want, "{path} {allowed}");
        }
    }

    #[test]
    fn who_may_call_what() {
        let web = "80.web.shop.svc.east.clusterset.local";
        let own = "spiffe://east.tombolo/ns/shop/sa/cart";
        let west = "spiffe://west.tombolo/ns/shop/sa/cart";
        let north = "spiffe://north.tombolo/ns/shop/sa/cart";
        for (id, cluster, target, want) in [
            (own, "east", web, Ok(())),
            (own, "east", "e-a1.81.web.shop.svc.east.clusterset.local", Ok(())),
            (own, "east", "5432.db.data.svc.east.clusterset.local", Ok(())),
            (own, "east", "82.web.shop.svc.east.clusterset.local", Err(Refusal::UnknownPort)),
            (own, "east", "80.api.shop.svc.east.clusterset.local", Err(Refusal::UnknownService)),
            (own, "east", "80.web.shop.svc.west.clusterset.local", Err(Refusal::TargetMismatch)),
            (west, "west", web, Ok(())),
            (west, "west", "82.web.shop.svc.east.clusterset.local", Err(Refusal::UnknownPort)),
            // Not granted, granted to nobody, not delivered at all: all look alike from outside.
            (west, "west", "5432.db.data.svc.east.clusterset.local", Err(Refusal::NotExported)),
            (west, "west", "80.old.shop.svc.east.clusterset.local", Err(Refusal::NotExported)),
            (west, "west", "80.api.shop.svc.east.clusterset.local", Err(Refusal::NotExported)),
            (north, "north", web, Err(Refusal::NotExported)),
            ("spiffe://east.tombolo/tombolo/gateway/g1", "east", web, Err(Refusal::WrongRole)),
            ("spiffe://west.tombolo/tombolo/unmeshed/g1", "west", web, Ok(())),
            ("spiffe://west.tombolo/tombolo/federation/f1", "west", web, Err(Refusal::WrongRole)),
            ("spiffe://west.tombolo/tombolo/sidecar/x", "west", web, Err(Refusal::WrongRole)),
        ] {
            assert_eq!(verdict(id, cluster, target), want, "{id} of {cluster} to {target}");
        }
    }

    #[test]
    fn only_a_peers_federation_syncs() {
        let own: ClusterId = "east".parse().unwrap();
        let sync = LegTarget::federation(own.clone());
        let check = |id: &str, cluster: &str, target: &LegTarget| {
            let (id, cluster): (SpiffeId, ClusterId) = (id.parse().unwrap(), cluster.parse().unwrap());
            authorize_sync(Client { id: &id, cluster: &cluster }, target, &own, |peer| peer.as_str() == "west")
        };
        let west = "spiffe://west.tombolo/tombolo/federation/f1";
        assert_eq!(check(west, "west", &sync), Ok(()));
        assert_eq!(check("spiffe://west.tombolo/tombolo/gateway/g1", "west", &sync), Err(Refusal::WrongRole));
        assert_eq!(check("spiffe://west.tombolo/ns/shop/sa/web", "west", &sync), Err(Refusal::WrongRole));
        let north = "spiffe://north.tombolo/tombolo/federation/f1";
        assert_eq!(check(north, "north", &sync), Err(Refusal::UnknownCluster));
        let itself = "spiffe://east.tombolo/tombolo/federation/f1";
        assert_eq!(check(itself, "east", &sync), Err(Refusal::UnknownCluster));
        let other = LegTarget::federation("west".parse().unwrap());
        assert_eq!(check(west, "west", &other), Err(Refusal::TargetMismatch));
        let web = "443.web.shop.svc.east.clusterset.local".parse().unwrap();
        assert_eq!(check(west, "west", &web), Err(Refusal::TargetMismatch));
    }
}
