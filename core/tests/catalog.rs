//! Views of services: what each cluster's part adds, and that the order of arrival adds nothing.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use proptest::prelude::*;
use tombolo_core::catalog::{Catalog, Delivery, LocalShare};
use tombolo_core::conflict::Conflict;
use tombolo_core::id::{ClusterId, Position, ServiceName};
use tombolo_core::import::{Import, UpdateRefused};
use tombolo_core::model::{
    AppProtocol, Authority, Endpoint, Export, Freshness, Origin, ServiceKind, ServicePort, ServiceSelector, Transport,
};
use tombolo_core::policy::exported;
use tombolo_core::policy::route::Route;
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
        unmeshed: false,
        routes: Vec::new(),
    }
}

fn local(export: Export, exported: bool) -> (ServiceName, LocalShare) {
    (export.service.clone(), LocalShare { export: Arc::new(export), exported, deliveries: BTreeMap::new() })
}

fn selectors(texts: &[&str]) -> Vec<ServiceSelector> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn authority(exports: &[&str], imports: &[&str]) -> Authority {
    Authority { exports: selectors(exports), imports: selectors(imports), unmeshed: false }
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
    let declared = LocalService {
        service: service.clone(),
        exported,
        kind,
        session_affinity,
        ports,
        server_ids,
        endpoints,
        unmeshed: false,
    };
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

/// A route of shop/`name` in `cluster`, to a backend in `leads.0` of `leads.1`; `None` is the own cluster's way to write it.
fn route(name: &str, cluster: Option<&str>, leads: (&str, Option<&str>)) -> Route {
    let (backend, there) = leads;
    let json = serde_json::json!({
        "resource": { "kind": "HTTPRoute", "namespace": "shop", "name": name, "cluster": cluster },
        "created": "2026-01-01T00:00:00Z",
        "parents": [{ "service": "shop/web" }],
        "rules": [{ "backends": [{ "service": backend, "cluster": there, "weight": 1 }] }],
    });
    serde_json::from_value(json).unwrap()
}

fn routed(exporter: &str, routes: Vec<Route>) -> Export {
    Export { routes: routes.into_iter().map(Arc::new).collect(), ..export(exporter, "shop/web", 1, 80) }
}

/// Names of the routes that callers are told with a cluster's share of shop/web.
fn told(catalog: &Catalog, of: &str) -> Vec<String> {
    let view = &catalog.views()[&service("shop/web")];
    let share = view.shares.iter().find(|share| share.cluster == cluster(of)).unwrap();
    share.export.routes.iter().map(|route| route.resource.name.clone()).collect()
}

#[test]
fn a_route_is_published_with_what_it_leads_to() {
    let mut catalog = east();
    let mut elsewhere = route("elsewhere", None, ("shop/web", None));
    elsewhere.parents.push(serde_json::from_str(r#"{"service": "shop/other"}"#).unwrap());
    let routes = vec![
        route("own", None, ("shop/web", None)),
        route("canary", None, ("shop/canary", Some("east"))),
        route("hidden", None, ("shop/db", None)),
        route("abroad", None, ("shop/web", Some("west"))),
        elsewhere,
    ];
    let share = |exported| local(export("east", "shop/canary", 1, 80), exported);
    catalog.handle_local([local(routed("east", routes.clone()), true), share(true)].into());
    let published = |catalog: &Catalog| catalog.published_to(&cluster("west"))[&service("shop/web")].clone();
    let names = |export: &Export| export.routes.iter().map(|it| it.resource.name.clone()).collect::<Vec<_>>();
    let export = published(&catalog);
    assert_eq!(names(&export), ["own", "canary", "elsewhere"]);
    for route in &export.routes {
        assert_eq!(route.resource.cluster, Some(cluster("east")));
        assert!(route.rules[0].backends.iter().all(|backend| backend.cluster == Some(cluster("east"))));
        assert_eq!(route.parents.len(), 1, "what it says of other services is not told");
    }
    // The peer takes all of it.
    assert_eq!(exported::admit(export, &cluster("east")).1, None);
    catalog.handle_local([local(routed("east", routes), true), share(false)].into());
    assert_eq!(names(&published(&catalog)), ["own", "elsewhere"]);
    assert!(told(&catalog, "east").is_empty(), "the own callers are told beside the export");
}

#[test]
fn a_peers_route_acts_while_what_it_leads_to_is_exported_too() {
    let canary = || routed("west", vec![route("canary", Some("west"), ("shop/canary", Some("west")))]);
    let mut catalog = east();
    put(&mut catalog, "west", canary());
    assert!(told(&catalog, "west").is_empty());
    let changed = |catalog: &mut Catalog, change| {
        catalog.handle_update(&cluster("west"), update(change)).unwrap().unwrap().0.contains(&service("shop/web"))
    };
    assert!(changed(&mut catalog, Change::Export(export("west", "shop/canary", 1, 80).into())));
    assert_eq!(told(&catalog, "west"), ["canary"]);
    // In the other order it is the same.
    let mut other = east();
    put(&mut other, "west", export("west", "shop/canary", 1, 80));
    put(&mut other, "west", canary());
    assert_eq!(other.views(), catalog.views());
    assert!(changed(&mut catalog, Change::ExportRemoved(service("shop/canary"))));
    assert!(told(&catalog, "west").is_empty());
    // What the grant leaves out is as good as not exported.
    let mut granted = Catalog::new(cluster("east"));
    granted.handle_peer_added(cluster("west"), authority(&[], &["shop/web"]), import("west"));
    put(&mut granted, "west", export("west", "shop/canary", 1, 80));
    put(&mut granted, "west", canary());
    assert!(told(&granted, "west").is_empty());
}

#[test]
fn a_peers_routes_are_believed_no_more_than_the_rest() {
    let good = || route("good", Some("west"), ("shop/web", Some("west")));
    let with = |change: &dyn Fn(&mut Route)| {
        let mut route = good();
        route.resource.name = "bad".into();
        change(&mut route);
        route
    };
    let header = |name: &str| vec![(name.to_owned(), "x".to_owned())];
    for (what, bad, want) in [
        (
            "another cluster's name",
            with(&|it| it.resource.cluster = Some(cluster("east"))),
            "cluster: not that of west",
        ),
        ("nobody's name", with(&|it| it.resource.cluster = None), "cluster: not that of west"),
        ("another kind", with(&|it| it.resource.kind = tombolo_core::policy::Kind::AccessPolicy), "kind: not a route"),
        ("a consumer's route", with(&|it| it.resource.namespace = "pay".parse().unwrap()), "metadata.namespace: "),
        (
            "another service",
            with(&|it| it.parents[0].service = service("pay/api")),
            "parentRefs: names another service",
        ),
        ("no service", with(&|it| it.parents.clear()), "parentRefs: names another service"),
        (
            "the own cluster's endpoints",
            with(&|it| it.rules[0].backends[0].cluster = Some(cluster("east"))),
            "backendRefs: leads",
        ),
        ("everybody's endpoints", with(&|it| it.rules[0].backends[0].cluster = None), "backendRefs: leads"),
        (
            "two messages in one",
            with(&|it| it.rules[0].filters.request_headers.set = header("transfer-encoding")),
            "transfer-encoding frames",
        ),
        (
            "the same by case",
            with(&|it| it.rules[0].backends[0].request_headers.add = header("Content-Length")),
            "content-length frames",
        ),
        (
            "a header that is none",
            with(&|it| it.rules[0].filters.response_headers.set = header("a\r\nb")),
            "is not a header's name",
        ),
        ("too many rules", with(&|it| it.rules = vec![it.rules[0].clone(); 17]), "rules: more than 16"),
    ] {
        let mut catalog = east();
        let sent = update(Change::Export(routed("west", vec![bad, good()]).into()));
        let (_, touched) = catalog.handle_update(&cluster("west"), sent).unwrap().unwrap();
        let Some(UpdateRefused::Route { reason, .. }) = &touched.refused else { panic!("{what}: {touched:?}") };
        assert!(reason.to_string().contains(want), "{what}: {reason}");
        // The service and its other routes are there all the same.
        assert_eq!(told(&catalog, "west"), ["good"], "{what}");
    }
    let mut catalog = east();
    let full = |n: u32| Export { service: service(&format!("shop/s{n}")), ..routed("west", vec![good(); 32]) };
    for n in 0..40 {
        let mut export = full(n);
        for route in &mut export.routes {
            Arc::make_mut(route).parents[0].service = export.service.clone();
        }
        let (_, touched) =
            catalog.handle_update(&cluster("west"), update(Change::Export(export.into()))).unwrap().unwrap();
        // Thirty-one times 32 find room among a peer's 1,000.
        assert_eq!(touched.refused.is_some(), n >= 31, "{n}: {:?}", touched.refused);
    }
    let exports = catalog.import(&cluster("west")).unwrap().exports();
    assert_eq!((exports.len(), exports.values().map(|export| export.routes.len()).sum::<usize>()), (40, 31 * 32));
    let many = |count| routed("west", (0..count).map(|_| good()).collect());
    let (kept, refused) = exported::admit(many(40).into(), &cluster("west"));
    assert!(kept.routes.len() == exported::OF_EXPORT_MAX && refused.is_some());
}

#[test]
fn of_several_clusters_routes_those_of_the_oldest_export_count_and_none_beside_the_own_service() {
    let mut catalog = east();
    catalog.handle_peer_added(cluster("north"), authority(&[], &["shop/*"]), import("north"));
    let of = |name: &str, created_ms| Export {
        routes: vec![Arc::new(route(name, Some(name), ("shop/web", Some(name))))],
        ..export(name, "shop/web", created_ms, 80)
    };
    put(&mut catalog, "west", of("west", 1));
    put(&mut catalog, "north", of("north", 2));
    let leading = |catalog: &Catalog| {
        let shares = &catalog.views()[&service("shop/web")].shares;
        exported::leading(shares).iter().map(|route| route.resource.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(leading(&catalog), ["west"]);
    put(&mut catalog, "north", of("north", 0));
    assert_eq!(leading(&catalog), ["north"]);
    // The own service decides for its own callers, exported or not.
    catalog.handle_local([local(export("east", "shop/web", 9, 80), false)].into());
    assert!(leading(&catalog).is_empty());
}
