//! Views of services: what each cluster's part adds, and that the order of arrival adds nothing.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use proptest::prelude::*;
use tombolo_core::catalog::{Catalog, Delivery, LocalShare};
use tombolo_core::conflict::Conflict;
use tombolo_core::id::{ClusterId, Position, ServiceName};
use tombolo_core::import::Import;
use tombolo_core::model::{
    AppProtocol, Authority, Endpoint, Export, Freshness, Origin, ServiceKind, ServicePort, ServiceSelector, Transport,
};
use tombolo_core::publish::{Change, Update};
use tombolo_core::registration::{self, Registered, RegistrationRefused, Registrations};
use tombolo_core::source::{LocalEndpoint, LocalService, LocalState};

fn cluster(id: &str) -> ClusterId {
    id.parse().unwrap()
}

fn service(name: &str) -> ServiceName {
    name.parse().unwrap()
}

fn export(exporter: &str, name: &str, created_ms: i64, port: u16) -> Export {
    let endpoint = Endpoint { id: "a".parse().unwrap(), hostname: None, zone: None, weight: 1, ready: true };
    Export {
        service: service(name),
        created: Timestamp::from_millisecond(created_ms).unwrap(),
        kind: ServiceKind::ClusterSetIp,
        session_affinity: Default::default(),
        ports: [ServicePort { name: "http".into(), port, transport: Transport::Tcp, app: AppProtocol::Http }].into(),
        server_ids: [format!("spiffe://{exporter}/ns/a/sa/b").parse().unwrap()].into(),
        endpoints: [(endpoint.id.clone(), endpoint)].into(),
    }
}

fn local(export: Export, exported: bool) -> (ServiceName, LocalShare) {
    (export.service.clone(), LocalShare { export: Arc::new(export), exported, deliveries: BTreeMap::new() })
}

fn selectors(texts: &[&str]) -> Vec<ServiceSelector> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn authority(exports: &[&str], imports: &[&str]) -> Authority {
    Authority { exports: selectors(exports), imports: selectors(imports) }
}

fn import(peer: &str) -> Import {
    Import::new(peer.parse().unwrap())
}

fn update(change: Change) -> Update {
    Update { position: Position { epoch: 0, revision: 1 }, change }
}

fn put(catalog: &mut Catalog, peer: &str, export: Export) {
    let outcome = catalog.handle_update(&cluster(peer), update(Change::Export(export.into()))).unwrap().unwrap();
    assert_eq!(outcome.1.refused, None);
}

/// `east` with peer `west`, which may bring in `shop`.
fn east() -> Catalog {
    let mut catalog = Catalog::new(cluster("east"));
    catalog.handle_peer_added(cluster("west"), authority(&["shop/*"], &["shop/*"]), import("west"));
    catalog
}

#[test]
fn a_view_joins_what_all_clusters_export() {
    let mut catalog = east();
    catalog.handle_local([local(export("east", "shop/web", 1, 80), true)].into());
    put(&mut catalog, "west", export("west", "shop/web", 2, 80));
    let view = &catalog.views()[&service("shop/web")];
    let shares: Vec<_> = view.shares.iter().map(|share| (share.cluster.as_str(), share.origin)).collect();
    assert_eq!(shares, [("east", Origin::Local), ("west", Origin::Remote)]);
    assert!(view.conflicts.is_empty());
    assert_eq!(view.offered_to, [cluster("west")].into());
}

#[test]
fn only_what_is_exported_and_offered_is_published() {
    let mut catalog = east();
    let services = [("shop/web", true), ("shop/db", false), ("ops/log", true)];
    catalog.handle_local(services.map(|(name, exported)| local(export("east", name, 1, 80), exported)).into());
    let names = |catalog: &Catalog| catalog.published_to(&cluster("west")).into_keys().collect::<Vec<_>>();
    assert_eq!(names(&catalog), [service("shop/web")]);
    catalog.handle_authority(&cluster("west"), &authority(&["*"], &[]));
    assert_eq!(names(&catalog), [service("ops/log"), service("shop/web")]);
    assert!(catalog.published_to(&cluster("north")).is_empty());
}

#[test]
fn a_grant_decides_what_comes_in_and_what_it_leaves_out_is_listed() {
    let mut catalog = east();
    put(&mut catalog, "west", export("west", "ops/log", 1, 80));
    let excluded = &catalog.views()[&service("ops/log")];
    assert!(excluded.shares.is_empty());
    assert_eq!(excluded.excluded, [cluster("west")].into());
    let changed = catalog.handle_authority(&cluster("west"), &authority(&[], &["ops"]));
    assert_eq!(changed, [service("ops/log")].into());
    assert_eq!(catalog.views()[&service("ops/log")].shares.len(), 1);
}

#[test]
fn a_removed_peer_takes_everything_with_it() {
    let mut catalog = east();
    put(&mut catalog, "west", export("west", "shop/web", 1, 80));
    assert_eq!(catalog.handle_peer_removed(&cluster("west")), [service("shop/web")].into());
    assert!(catalog.views().is_empty());
    assert_eq!(catalog.handle_update(&cluster("west"), update(Change::Heartbeat)), None);
}

#[test]
fn freshness_shows_in_the_peers_shares_only() {
    let mut catalog = east();
    catalog.handle_local([local(export("east", "shop/web", 1, 80), true)].into());
    put(&mut catalog, "west", export("west", "shop/web", 2, 80));
    assert_eq!(catalog.handle_freshness(&cluster("west"), Freshness::Draining), [service("shop/web")].into());
    let view = &catalog.views()[&service("shop/web")];
    let freshness: Vec<_> = view.shares.iter().map(|share| share.freshness).collect();
    assert_eq!(freshness, [Freshness::Fresh, Freshness::Draining]);
}

#[test]
fn conflicts_come_and_go_and_an_unexported_service_takes_no_part() {
    let mut catalog = east();
    put(&mut catalog, "west", export("west", "shop/web", 2, 8080));
    let conflicts = |catalog: &Catalog| catalog.views()[&service("shop/web")].conflicts.clone();
    catalog.handle_local([local(export("east", "shop/web", 1, 80), false)].into());
    assert!(conflicts(&catalog).is_empty());
    assert_eq!(catalog.views()[&service("shop/web")].shares.len(), 2);
    catalog.handle_local([local(export("east", "shop/web", 1, 80), true)].into());
    assert_eq!(conflicts(&catalog), [Conflict::Port].into());
    catalog.handle_local([local(export("east", "shop/web", 1, 8080), true)].into());
    assert!(conflicts(&catalog).is_empty());
    catalog.handle_local(BTreeMap::new());
    assert_eq!(catalog.views()[&service("shop/web")].shares.len(), 1);
}

#[derive(Debug, Clone)]
enum Arrival {
    Local,
    Export(String, Export),
    Grant(String),
}

proptest! {
    #[test]
    fn views_do_not_depend_on_the_order_of_arrival(
        facts in prop::collection::vec((0..3usize, 0..3usize, 0..3i64, 80..82u16, any::<bool>()), 0..12),
        (order, noise) in (any::<u64>(), any::<bool>()),
    ) {
        // One fact per exporter and service, so that "the state" is well defined.
        let clusters = ["east", "north", "west"];
        let services = ["shop/web", "shop/db", "ops/log"];
        let facts: BTreeMap<_, _> = facts.into_iter().map(|(c, s, age, port, own)| ((c, s), (age, port, own))).collect();
        let mut own = BTreeMap::new();
        let mut arrivals = vec![Arrival::Local, Arrival::Grant("north".into()), Arrival::Grant("west".into())];
        for ((c, s), (age, port, exported)) in facts {
            let export = export(clusters[c], services[s], age, port);
            match clusters[c] {
                "east" => own.extend([local(export, exported)]),
                peer => arrivals.push(Arrival::Export(peer.into(), export)),
            }
        }
        let run = |arrivals: &[Arrival]| {
            let mut catalog = Catalog::new(cluster("east"));
            for peer in ["north", "west"] {
                catalog.handle_peer_added(cluster(peer), authority(&[], &[]), import(peer));
            }
            for arrival in arrivals {
                match arrival {
                    Arrival::Local => drop(catalog.handle_local(own.clone())),
                    Arrival::Export(peer, export) => {
                        if noise {
                            put(&mut catalog, peer, Export { created: Timestamp::MAX, ..export.clone() });
                        }
                        put(&mut catalog, peer, export.clone());
                    }
                    Arrival::Grant(peer) => drop(catalog.handle_authority(&cluster(peer), &authority(&["*"], &["shop/*"]))),
                }
            }
            catalog.views().clone()
        };
        let in_order = run(&arrivals);
        let mut shuffled = arrivals.clone();
        let mut seed = order;
        for n in (1..shuffled.len()).rev() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            shuffled.swap(n, usize::try_from(seed >> 33).unwrap() % (n + 1));
        }
        prop_assert_eq!(run(&shuffled), in_order);
    }
}

fn declared(endpoints: &[(&str, Option<&str>, bool)]) -> LocalState {
    let Export { service, kind, session_affinity, ports, server_ids, .. } = export("east", "shop/web", 1, 80);
    let endpoints = endpoints.iter().map(|(id, instance, declared_ready)| {
        let instance = instance.map(|instance| instance.parse().unwrap());
        let declared_ready = *declared_ready;
        let endpoint = LocalEndpoint { instance, hostname: None, zone: None, weight: 3, declared_ready };
        (id.parse().unwrap(), endpoint)
    });
    let endpoints = endpoints.collect();
    let exported = Some(Timestamp::UNIX_EPOCH);
    let declared =
        LocalService { service: service.clone(), exported, kind, session_affinity, ports, server_ids, endpoints };
    LocalState { services: [(service, declared)].into(), ..Default::default() }
}

fn registered(instance: &str, id: &str, port: u16, ready: bool) -> Registrations {
    let delivery = Delivery { address: "127.0.0.1:1".into(), ready };
    let registered = Registered {
        endpoint: "made".parse().unwrap(),
        spiffe_id: id.parse().unwrap(),
        zone: None,
        ports: [(port, delivery)].into(),
    };
    [(service("shop/web"), [(instance.parse().unwrap(), registered)].into())].into()
}

#[test]
fn a_declared_endpoint_is_ready_only_when_its_registration_says_so_too() {
    let allowed = "spiffe://east/ns/a/sa/b";
    let slice = |ready| vec![("slice", Some("web-1"), ready)];
    // What is declared, what is registered, and the endpoints that come of it with their readiness.
    for (endpoints, registrations, want) in [
        (slice(true), Registrations::new(), vec![("slice", false)]),
        (slice(true), registered("web-1", allowed, 80, true), vec![("slice", true)]),
        (slice(true), registered("web-1", allowed, 80, false), vec![("slice", false)]),
        (slice(false), registered("web-1", allowed, 80, true), vec![("slice", false)]),
        (slice(true), registered("web-2", allowed, 80, true), vec![("made", true), ("slice", false)]),
        (vec![], registered("web-1", allowed, 80, true), vec![("made", true)]),
        (vec![], registered("web-1", "spiffe://east/ns/a/sa/c", 80, true), vec![]),
        (vec![], registered("web-1", allowed, 81, true), vec![]),
        (vec![("slice", None, true)], Registrations::new(), vec![("slice", false)]),
    ] {
        let shares = registration::local_shares(&declared(&endpoints), &registrations);
        let share = &shares[&service("shop/web")];
        let got: Vec<_> = share.export.endpoints.values().map(|e| (e.id.as_str(), e.ready)).collect();
        assert_eq!(got, want, "{endpoints:?} {registrations:?}");
        assert!(share.deliveries.keys().all(|id| share.export.endpoints.contains_key(id)));
    }
}

#[test]
fn registrations_are_judged_by_service_port_and_identity() {
    let state = declared(&[]);
    let check = |name: &str, port, id: &str| registration::check(&state, &service(name), port, &id.parse().unwrap());
    assert_eq!(check("shop/web", 80, "spiffe://east/ns/a/sa/b"), Ok(()));
    assert!(matches!(check("shop/db", 80, "spiffe://east/ns/a/sa/b"), Err(RegistrationRefused::UnknownService(_))));
    assert!(matches!(check("shop/web", 81, "spiffe://east/ns/a/sa/b"), Err(RegistrationRefused::UnknownPort { .. })));
    let refused = check("shop/web", 80, "spiffe://west/ns/a/sa/b");
    assert!(matches!(refused, Err(RegistrationRefused::IdentityNotAllowed { .. })));
}
