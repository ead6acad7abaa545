//! What the Multi-Cluster Services API says of a service (KEP-1645, mcs-api v0.5): the import that all exports of it
//! amount to, and the conditions of the own cluster's export.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::catalog::ServiceView;
use crate::conflict::Conflict;
use crate::id::{ClusterId, ServiceName};
use crate::model::{ClusterShare, Endpoint, Freshness, Origin, ServiceKind, ServicePort, SessionAffinity};
use crate::source::{ExportRefused, LocalState};

/// A service as its `ServiceImport` and the slices beside it describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    pub kind: ServiceKind,
    pub session_affinity: SessionAffinity,
    /// The union of the ports of all exports, with the properties that they have after conflicts are resolved.
    pub ports: BTreeSet<ServicePort>,
    /// What each cluster that exports it contributes.
    pub clusters: BTreeMap<ClusterId, Part>,
}

/// One cluster's contribution to an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// A port goes only to the clusters that expose it.
    pub ports: BTreeSet<ServicePort>,
    /// In the order of their ids. None is ready where the cluster has not been heard of for too long.
    pub endpoints: Vec<Endpoint>,
    /// Workloads without a sidecar may call it, through gateways of this cluster.
    pub unmeshed: bool,
}

/// The import of a service; `None` where no cluster exports it to here.
pub fn import(view: &ServiceView) -> Option<Import> {
    let first = &exports(view).next()?.export;
    let (kind, session_affinity) = (first.kind, first.session_affinity);
    let clusters = exports(view).map(|share| (share.cluster.clone(), part(share))).collect();
    // Every share has the ports as they were resolved, so that nothing in the union disagrees.
    let ports = exports(view).flat_map(|share| share.export.ports.iter().cloned()).collect();
    Some(Import { kind, session_affinity, ports, clusters })
}

/// The exports among the shares: what the own cluster keeps to itself is none.
fn exports(view: &ServiceView) -> impl Iterator<Item = &ClusterShare> {
    view.shares.iter().filter(|share| share.origin == Origin::Remote || view.exported)
}

fn part(share: &ClusterShare) -> Part {
    let heard = share.freshness != Freshness::Draining;
    let endpoint = |endpoint: &Endpoint| Endpoint { ready: endpoint.ready && heard, ..endpoint.clone() };
    Part {
        ports: share.export.ports.clone(),
        endpoints: share.export.endpoints.values().map(endpoint).collect(),
        unmeshed: share.export.unmeshed,
    }
}

/// A condition of a `ServiceExport`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// `Valid`, `Ready` or `Conflict`.
    pub kind: &'static str,
    pub holds: bool,
    /// As KEP-1645 names it. Several conflicts are told together, with commas.
    pub reason: String,
    pub message: String,
}

/// The conditions of the own cluster's export of `service`. None while its source has not come that far.
pub fn export_conditions(service: &ServiceName, local: &LocalState, view: Option<&ServiceView>) -> Vec<Condition> {
    if let Some(refused) = local.refused_exports.get(service) {
        return refused_conditions(service, *refused);
    }
    if local.services.get(service).is_none_or(|local| local.exported.is_none()) {
        return Vec::new();
    }
    let condition = |kind, holds, reason: &str, message: &str| Condition {
        kind,
        holds,
        reason: reason.into(),
        message: message.into(),
    };
    let valid = condition("Valid", true, "Valid", "the Service can be exported");
    let Some(view) = view.filter(|view| view.exported) else {
        return vec![valid, condition("Ready", false, "Pending", "the export is on its way")];
    };
    let offered: Vec<&str> = view.offered_to.iter().map(ClusterId::as_str).collect();
    let told = match offered.as_slice() {
        [] => "exported; no peer is offered it yet".into(),
        offered => format!("offered to {}", offered.join(", ")),
    };
    vec![valid, condition("Ready", true, "Exported", &told), conflict(view)]
}

fn refused_conditions(service: &ServiceName, refused: ExportRefused) -> Vec<Condition> {
    let (reason, message) = match refused {
        ExportRefused::NoService => ("NoService", format!("there is no Service {service}")),
        ExportRefused::InvalidServiceType => {
            ("InvalidServiceType", format!("Service {service} is of type ExternalName, which can't be exported"))
        }
        ExportRefused::ReservedNamespace => {
            ("ReservedNamespace", format!("namespace {} is tombolo's own and exports nothing", service.namespace()))
        }
        ExportRefused::TooMany => ("TooManyServices", "the cluster has more Services than can be taken".into()),
    };
    let valid = Condition { kind: "Valid", holds: false, reason: reason.into(), message };
    let failed = "nothing is exported, since the export is not valid";
    vec![valid, Condition { kind: "Ready", holds: false, reason: "Failed".into(), message: failed.into() }]
}

fn conflict(view: &ServiceView) -> Condition {
    let oldest = exports(view).min_by_key(|share| (share.export.created, &share.cluster));
    let Some(oldest) = oldest.filter(|_| !view.conflicts.is_empty()) else {
        let message = "all exports agree".into();
        return Condition { kind: "Conflict", holds: false, reason: "NoConflicts".into(), message };
    };
    let mut message = String::new();
    for conflict in &view.conflicts {
        let field = match conflict {
            Conflict::Port => "ports",
            Conflict::Type => "type",
            Conflict::SessionAffinity => "session affinity",
        };
        let separator = if message.is_empty() { "the exports disagree on" } else { " and" };
        _ = write!(message, "{separator} {field}");
    }
    _ = write!(message, "; that of {} counts: it is the oldest ({})", oldest.cluster, oldest.export.created);
    let reasons: Vec<&str> = view.conflicts.iter().map(|conflict| conflict.reason()).collect();
    Condition { kind: "Conflict", holds: true, reason: reasons.join(","), message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Catalog, LocalShare};
    use crate::id::{Position, SpiffeId};
    use crate::model::{AppProtocol, Authority, Export, ServiceSelector, Transport};
    use crate::publish::{Change, Update};
    use crate::source::LocalService;
    use jiff::Timestamp;
    use std::sync::Arc;

    fn web() -> ServiceName {
        "shop/web".parse().unwrap()
    }

    fn port(name: &str, port: u16) -> ServicePort {
        ServicePort { name: name.into(), port, transport: Transport::Tcp, app: AppProtocol::Http }
    }

    fn endpoint(id: &str, ready: bool) -> Endpoint {
        Endpoint { id: id.parse().unwrap(), hostname: None, zone: None, weight: 1, ready }
    }

    fn export(cluster: &str, created_s: i64, ports: &[ServicePort]) -> Export {
        let server = SpiffeId::workload(&format!("{cluster}.tombolo").parse().unwrap(), web().namespace(), "web");
        Export {
            service: web(),
            created: Timestamp::from_second(created_s).unwrap(),
            kind: ServiceKind::ClusterSetIp,
            session_affinity: SessionAffinity::None,
            ports: ports.iter().cloned().collect(),
            server_ids: [server.unwrap()].into(),
            endpoints: [endpoint("a", true), endpoint("b", false)].map(|one| (one.id.clone(), one)).into(),
            unmeshed: false,
            routes: Vec::new(),
        }
    }

    /// The view of a cluster `east`, with its own export and that of `west`.
    fn view(own: Option<(Export, bool)>, west: Option<Export>, freshness: Freshness) -> Option<ServiceView> {
        let mut catalog = Catalog::new("east".parse().unwrap());
        if let Some((export, exported)) = own {
            let share = LocalShare { export: export.into(), exported, deliveries: BTreeMap::new() };
            catalog.handle_local([(web(), share)].into());
        }
        let cluster: ClusterId = "west".parse().unwrap();
        let everything =
            Authority { exports: vec![ServiceSelector::All], imports: vec![ServiceSelector::All], unmeshed: false };
        let import = crate::import::Import::new("west.tombolo".parse().unwrap());
        catalog.handle_peer_added(cluster.clone(), everything, import);
        let told = west.map(|export| Change::Export(Arc::new(export)));
        for change in [Change::SnapshotBegin].into_iter().chain(told).chain([Change::Complete]) {
            let position = Position { epoch: 1, revision: 1 };
            catalog.handle_update(&cluster, Update { position, change }).unwrap().unwrap();
        }
        catalog.handle_freshness(&cluster, freshness);
        catalog.views().get(&web()).map(|view| ServiceView::clone(view))
    }

    fn local(exported: bool, refused: Option<ExportRefused>) -> LocalState {
        let service = LocalService {
            service: web(),
            exported: exported.then_some(Timestamp::UNIX_EPOCH),
            kind: ServiceKind::ClusterSetIp,
            session_affinity: SessionAffinity::None,
            ports: BTreeSet::new(),
            server_ids: BTreeSet::new(),
            endpoints: BTreeMap::new(),
            unmeshed: false,
        };
        let refused_exports = refused.map(|refused| (web(), refused)).into_iter().collect();
        LocalState { services: [(web(), service)].into(), refused_exports, ..LocalState::default() }
    }

    #[test]
    fn an_import_unites_the_ports_and_each_goes_only_to_the_clusters_that_expose_it() {
        let east = export("east", 1, &[port("http", 80)]);
        let west = export("west", 2, &[port("http", 8080), port("metrics", 90)]);
        let import = import(&view(Some((east, true)), Some(west), Freshness::Fresh).unwrap()).unwrap();
        assert_eq!(import.ports, [port("http", 80), port("metrics", 90)].into());
        let parts: Vec<_> =
            import.clusters.iter().map(|(cluster, part)| (cluster.as_str(), part.ports.clone())).collect();
        assert_eq!(parts, [("east", [port("http", 80)].into()), ("west", [port("metrics", 90)].into())]);
    }

    #[test]
    fn what_a_cluster_keeps_to_itself_is_no_import_and_takes_no_part_in_one() {
        let own = || export("east", 1, &[port("http", 80)]);
        assert_eq!(import(&view(Some((own(), false)), None, Freshness::Fresh).unwrap()), None);
        assert_eq!(view(None, None, Freshness::Fresh), None);
        let west = Export { kind: ServiceKind::Headless, ..export("west", 2, &[port("db", 5432)]) };
        let import = import(&view(Some((own(), false)), Some(west), Freshness::Fresh).unwrap()).unwrap();
        assert_eq!((import.kind, import.clusters.len()), (ServiceKind::Headless, 1));
        assert_eq!(import.ports, [port("db", 5432)].into());
    }

    #[test]
    fn no_endpoint_of_a_cluster_is_ready_that_has_not_been_heard_of_for_too_long() {
        for (freshness, want) in
            [(Freshness::Fresh, [true, false]), (Freshness::Stale, [true, false]), (Freshness::Draining, [false; 2])]
        {
            let west = export("west", 2, &[port("http", 80)]);
            let import = import(&view(None, Some(west), freshness).unwrap()).unwrap();
            let ready: Vec<bool> =
                import.clusters.values().flat_map(|part| part.endpoints.iter().map(|one| one.ready)).collect();
            assert_eq!(ready, want, "{freshness:?}");
        }
    }

    fn told(local: &LocalState, view: Option<&ServiceView>) -> Vec<String> {
        let conditions = export_conditions(&web(), local, view);
        conditions.iter().map(|one| format!("{}={} {}", one.kind, one.holds, one.reason)).collect()
    }

    #[test]
    fn an_export_that_can_not_be_says_why() {
        for (refused, reason) in [
            (ExportRefused::NoService, "NoService"),
            (ExportRefused::InvalidServiceType, "InvalidServiceType"),
            (ExportRefused::ReservedNamespace, "ReservedNamespace"),
            (ExportRefused::TooMany, "TooManyServices"),
        ] {
            let want = [format!("Valid=false {reason}"), "Ready=false Failed".into()];
            assert_eq!(told(&local(false, Some(refused)), None), want);
        }
        assert_eq!(told(&local(false, None), None), <[String; 0]>::default(), "nothing is known of it yet");
        assert_eq!(told(&local(true, None), None), ["Valid=true Valid", "Ready=false Pending"]);
    }

    #[test]
    fn every_export_of_a_conflict_says_so_and_who_won() {
        let own = || Some((export("east", 2, &[port("http", 80)]), true));
        let agreed = view(own(), Some(export("west", 1, &[port("http", 80)])), Freshness::Fresh);
        let want = ["Valid=true Valid", "Ready=true Exported", "Conflict=false NoConflicts"];
        assert_eq!(told(&local(true, None), agreed.as_ref()), want);
        let west = Export {
            kind: ServiceKind::Headless,
            session_affinity: SessionAffinity::ClientIp,
            ..export("west", 1, &[port("http", 81)])
        };
        // Whether the own export won or lost: the condition is the same.
        for created_s in [1, 3] {
            let own = Some((export("east", created_s, &[port("http", 80)]), true));
            let view = view(own, Some(west.clone()), Freshness::Fresh);
            let conditions = export_conditions(&web(), &local(true, None), view.as_ref());
            let conflict = &conditions[2];
            assert_eq!((conflict.kind, conflict.holds), ("Conflict", true));
            assert_eq!(conflict.reason, "PortConflict,TypeConflict,SessionAffinityConflict");
            let winner = if created_s == 1 { "east" } else { "west" };
            let want = format!(
                "the exports disagree on ports and type and session affinity; that of {winner} counts: it is the \
                 oldest (1970-01-01T00:00:01Z)"
            );
            assert_eq!(conflict.message, want);
        }
    }
}
