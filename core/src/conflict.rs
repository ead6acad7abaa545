//! What becomes of one service that several clusters export differently (KEP-1645, "Conflict resolution").

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::id::ClusterId;
use crate::model::{Export, ServiceKind, ServicePort, SessionAffinity};

/// On what the exports of a service disagree; printed as the KEP's condition reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Conflict {
    Port,
    Type,
    SessionAffinity,
}

impl Conflict {
    /// The reason of the `Conflict` condition.
    pub fn reason(self) -> &'static str {
        match self {
            Conflict::Port => "PortConflict",
            Conflict::Type => "TypeConflict",
            Conflict::SessionAffinity => "SessionAffinityConflict",
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

/// What all clusters' exports of one service amount to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    pub kind: ServiceKind,
    pub session_affinity: SessionAffinity,
    /// The union of the ports; of two that disagree, the one of the older export.
    pub ports: BTreeSet<ServicePort>,
    pub conflicts: BTreeSet<Conflict>,
}

/// Resolves the exports of one service. The oldest wins, and the smaller cluster id among equally old
/// ones, so the order of `exports` does not matter. `None` when there are none.
pub fn resolve(exports: &[(&ClusterId, &Export)]) -> Option<Resolved> {
    let mut by_age = exports.to_vec();
    by_age.sort_by_key(|(cluster, export)| (export.created, *cluster));
    let ((_, oldest), younger) = by_age.split_first()?;
    let mut resolved = Resolved {
        kind: oldest.kind,
        session_affinity: oldest.session_affinity,
        ports: oldest.ports.clone(),
        conflicts: BTreeSet::new(),
    };
    for (_, export) in younger {
        if export.kind != resolved.kind {
            resolved.conflicts.insert(Conflict::Type);
        }
        if export.session_affinity != resolved.session_affinity {
            resolved.conflicts.insert(Conflict::SessionAffinity);
        }
        for port in &export.ports {
            match held(&resolved.ports, port) {
                None => drop(resolved.ports.insert(port.clone())),
                Some(held) if held == port => {}
                Some(_) => drop(resolved.conflicts.insert(Conflict::Port)),
            }
        }
    }
    Some(resolved)
}

/// The port that `port` is merged with: the one of its name, else the one of its protocol and number.
fn held<'a>(ports: &'a BTreeSet<ServicePort>, port: &ServicePort) -> Option<&'a ServicePort> {
    let same_number = |held: &&ServicePort| held.transport == port.transport && held.port == port.port;
    ports.iter().find(|held| held.name == port.name).or_else(|| ports.iter().find(same_number))
}

impl Resolved {
    /// One cluster's export as callers use it: the winner's type, affinity and port properties. A port that
    /// lost to another of its name is left out, so that each port goes only to the clusters that expose it.
    pub fn apply(&self, export: &Export) -> Export {
        let same_number = |a: &ServicePort, b: &ServicePort| a.transport == b.transport && a.port == b.port;
        let ports = self.ports.iter().filter(|port| export.ports.iter().any(|own| same_number(own, port)));
        Export {
            kind: self.kind,
            session_affinity: self.session_affinity,
            ports: ports.cloned().collect(),
            ..export.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AppProtocol, Transport};
    use jiff::Timestamp;

    fn port(text: &str) -> ServicePort {
        let (name, number) = text.split_once(':').unwrap();
        let (number, app) = number.split_once('/').unwrap_or((number, "http"));
        let app = AppProtocol::detect(Some(app), None);
        ServicePort { name: name.into(), port: number.parse().unwrap(), transport: Transport::Tcp, app }
    }

    fn export(created_ms: i64, ports: &[&str]) -> Export {
        Export {
            service: "shop/web".parse().unwrap(),
            created: Timestamp::from_millisecond(created_ms).unwrap(),
            kind: ServiceKind::ClusterSetIp,
            session_affinity: SessionAffinity::None,
            ports: ports.iter().map(|text| port(text)).collect(),
            server_ids: BTreeSet::new(),
            endpoints: Default::default(),
            unmeshed: false,
            routes: Vec::new(),
        }
    }

    fn check(east: &Export, west: &Export, want_ports: &[&str], want_conflicts: &[Conflict]) -> Resolved {
        let (east_id, west_id) = ("east".parse().unwrap(), "west".parse().unwrap());
        let resolved = resolve(&[(&east_id, east), (&west_id, west)]).unwrap();
        assert_eq!(resolve(&[(&west_id, west), (&east_id, east)]).unwrap(), resolved, "order must not matter");
        assert_eq!(resolved.ports, want_ports.iter().map(|text| port(text)).collect());
        assert_eq!(resolved.conflicts, want_conflicts.iter().copied().collect());
        resolved
    }

    #[test]
    fn ports_are_united() {
        check(&export(1, &["http:80"]), &export(2, &["http:80"]), &["http:80"], &[]);
        check(&export(1, &["http:80"]), &export(2, &["metrics:90"]), &["http:80", "metrics:90"], &[]);
    }

    #[test]
    fn the_older_port_wins_and_a_port_goes_only_where_it_is_exposed() {
        let (east, west) = (export(2, &["http:80"]), export(1, &["http:8080"]));
        let resolved = check(&east, &west, &["http:8080"], &[Conflict::Port]);
        assert!(resolved.apply(&east).ports.is_empty());
        assert_eq!(resolved.apply(&west).ports, west.ports);
    }

    #[test]
    fn the_same_number_under_two_names_is_one_port() {
        let (east, west) = (export(1, &["web:80/h2c"]), export(2, &["http:80/http"]));
        let resolved = check(&east, &west, &["web:80/h2c"], &[Conflict::Port]);
        assert_eq!(resolved.apply(&west).ports, east.ports);
    }

    #[test]
    fn type_and_affinity_follow_the_oldest() {
        let west = export(1, &["http:80"]);
        let east = Export {
            kind: ServiceKind::Headless,
            session_affinity: SessionAffinity::ClientIp,
            ..export(2, &["http:80"])
        };
        let resolved = check(&east, &west, &["http:80"], &[Conflict::Type, Conflict::SessionAffinity]);
        assert_eq!((resolved.kind, resolved.session_affinity), (ServiceKind::ClusterSetIp, SessionAffinity::None));
        assert_eq!(resolved.apply(&east).kind, ServiceKind::ClusterSetIp);
    }

    #[test]
    fn equally_old_exports_are_decided_by_the_cluster_id() {
        check(&export(1, &["http:80"]), &export(1, &["http:81"]), &["http:80"], &[Conflict::Port]);
    }
}
