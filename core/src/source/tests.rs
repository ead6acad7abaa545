use std::collections::BTreeMap;

use jiff::Timestamp;

use super::declared::*;
use super::*;
use crate::id::ServiceName;
use crate::model::{AppProtocol, ServiceSelector, Transport};

fn at(file: &str, line: u32, object: Object) -> Declared {
    Declared { place: Place { file: file.into(), line }, object }
}

fn port(name: &str, number: u16) -> ServicePort {
    ServicePort { name: name.into(), port: number, transport: Transport::Tcp, app: AppProtocol::Http }
}

fn service(name: &str) -> DeclaredService {
    DeclaredService {
        service: name.parse().unwrap(),
        service_type: ServiceType::ClusterIp,
        session_affinity: SessionAffinity::None,
        ports: vec![port("http", 80)],
        service_accounts: vec!["web".into()],
    }
}

fn slice(name: &str, service: &str, instances: &[&str]) -> DeclaredSlice {
    let endpoint = |instance: &&str| DeclaredEndpoint {
        instance: Some(instance.parse().unwrap()),
        key: "192.0.2.1".into(),
        hostname: None,
        zone: None,
        weight: 1,
        ready: true,
    };
    DeclaredSlice {
        name: name.into(),
        service: service.parse().unwrap(),
        endpoints: instances.iter().map(endpoint).collect(),
    }
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn export(name: &str) -> Object {
    Object::Export(DeclaredExport { service: name.parse().unwrap(), unmeshed: false })
}

fn peer(cluster: &str, domain: Option<&str>) -> DeclaredPeer {
    DeclaredPeer {
        cluster: cluster.parse().unwrap(),
        trust_domain: domain.map(|domain| domain.parse().unwrap()),
        authority: Authority { exports: vec![ServiceSelector::All], imports: vec![], unmeshed: false },
        default_access: None,
        bundle: None,
        gateways: vec![],
    }
}

const NOW: i64 = 1_800_000_000;

fn reduced(objects: Vec<Declared>) -> LocalState {
    reduced_for(Purpose::Mesh, objects)
}

fn reduced_for(purpose: Purpose, objects: Vec<Declared>) -> LocalState {
    let first_seen: BTreeMap<ServiceName, Timestamp> =
        [("shop/old".parse().unwrap(), Timestamp::from_second(1_000).unwrap())].into();
    let around = Surroundings {
        purpose,
        cluster: &"east".parse().unwrap(),
        trust_domain: &"east.tombolo".parse().unwrap(),
        first_seen: &first_seen,
        now: Timestamp::from_second(NOW).unwrap(),
        endpoint_id: &|_, key| format!("id-{}", key.replace('.', "-")).parse().unwrap(),
    };
    reduce(objects, vec![], &around)
}

/// Problems as `file:line reason`.
fn problems(state: &LocalState) -> Vec<String> {
    state.problems.iter().map(|problem| format!("{}:{} {}", problem.file, problem.line, problem.reason)).collect()
}

#[test]
fn a_service_its_slice_and_its_export_become_one() {
    let state = reduced(vec![
        at("c.yaml", 1, export("shop/web")),
        at("b.yaml", 1, Object::Slice(slice("web-1", "shop/web", &["web-a", "web-b"]))),
        at("a.yaml", 1, Object::Service(service("shop/web"))),
    ]);
    assert_eq!(problems(&state), Vec::<String>::new());
    let web = &state.services[&name("shop/web")];
    assert_eq!(web.exported, Some(Timestamp::from_second(NOW).unwrap()));
    assert_eq!(web.ports, [port("http", 80)].into());
    assert_eq!(web.server_ids, ["spiffe://east.tombolo/ns/shop/sa/web".parse().unwrap()].into());
    assert_eq!(web.endpoints.keys().map(|id| id.as_str()).collect::<Vec<_>>(), ["id-web-a", "id-web-b"]);
    assert!(web.endpoints.values().all(|endpoint| endpoint.declared_ready && endpoint.instance.is_some()));
}

#[test]
fn the_first_seen_time_of_an_export_stays() {
    let state = reduced(vec![at("a", 1, Object::Service(service("shop/old"))), at("a", 9, export("shop/old"))]);
    assert_eq!(state.services[&name("shop/old")].exported, Some(Timestamp::from_second(1_000).unwrap()));
}

#[test]
fn every_mistake_is_reported_where_it_was_made() {
    let external = DeclaredService { service_type: ServiceType::ExternalName, ports: vec![], ..service("shop/alias") };
    let nobody = DeclaredService { service_accounts: vec![], ..service("shop/web") };
    let odd = DeclaredService { service_accounts: vec!["a/b".into(), "web".into()], ..service("shop/web") };
    let portless = DeclaredService { ports: vec![], ..service("shop/web") };
    let twice = DeclaredService { ports: vec![port("a", 80), port("b", 80)], ..service("shop/web") };
    let unnamed = DeclaredService { ports: vec![port("", 80), port("b", 81)], ..service("shop/web") };
    let other_bundle = DeclaredPeer { authority: peer("west", None).authority, ..peer("west", Some("east.tombolo")) };
    for (objects, want) in [
        (
            vec![at("a", 3, export("shop/web"))],
            "a:3 NoService: ServiceExport shop/web exports a Service that is not here",
        ),
        (
            vec![at("a", 3, export("shop/alias")), at("b", 1, Object::Service(external))],
            "a:3 InvalidServiceType: Service shop/alias is of type ExternalName, which can't be exported",
        ),
        (
            vec![at("b", 7, Object::Service(service("shop/web"))), at("a", 1, Object::Service(service("shop/web")))],
            "b:7 Service shop/web is defined in a:1 already; remove one of the two",
        ),
        (
            vec![
                at("a", 1, Object::Service(service("shop/web"))),
                at("a", 5, export("shop/web")),
                at("exports/web", 2, export("shop/web")),
            ],
            "exports/web:2 ServiceExport shop/web is defined in a:5 already; remove one of the two",
        ),
        (
            vec![at("a", 2, Object::Service(service("tombolo-system/federation")))],
            "a:2 namespace tombolo-system is tombolo's own; use another one",
        ),
        (
            vec![at("a", 2, Object::Slice(slice("s", "shop/web", &[])))],
            "a:2 EndpointSlice s belongs to Service shop/web, which is not here",
        ),
        (
            vec![at("a", 2, Object::Service(nobody))],
            "a:2 Service shop/web names nobody who may serve it; add the annotation tombolo.dev/service-accounts: <account>[,<account>]",
        ),
        (vec![at("a", 2, Object::Service(odd))], "a:2 Service shop/web: \"a/b\" is not a service account's name"),
        (vec![at("a", 2, Object::Service(portless))], "a:2 Service shop/web has no ports; nobody can call it"),
        (
            vec![at("a", 2, Object::Service(twice))],
            "a:2 Service shop/web has port 80 \"b\" twice; the first one counts",
        ),
        (vec![at("a", 2, Object::Service(unnamed))], "a:2 Service shop/web has several ports: name port 80"),
        (
            vec![at("a", 2, Object::Peer(peer("east", None)))],
            "a:2 ClusterPeer east names this cluster itself, or its trust domain",
        ),
        (
            vec![at("a", 2, Object::Peer(other_bundle))],
            "a:2 ClusterPeer west names this cluster itself, or its trust domain",
        ),
        (
            vec![at("a", 2, Object::Peer(peer("north", Some("x")))), at("a", 9, Object::Peer(peer("west", Some("x"))))],
            "a:9 ClusterPeer west claims trust domain x, which is north's; each has one of its own",
        ),
    ] {
        assert_eq!(problems(&reduced(objects)), [want]);
    }
}

#[test]
fn what_is_refused_has_no_effect() {
    let external = DeclaredService { service_type: ServiceType::ExternalName, ports: vec![], ..service("shop/alias") };
    let state = reduced(vec![
        at("a", 1, Object::Service(external)),
        at("a", 2, export("shop/alias")),
        at("a", 3, Object::Service(service("tombolo-system/federation"))),
        at("a", 4, export("tombolo-system/federation")),
        at("a", 5, Object::Peer(peer("east", None))),
    ]);
    assert!(state.services.is_empty() && state.peers.is_empty());
}

#[test]
fn the_first_of_two_counts_whatever_the_order_they_were_read_in() {
    let first = at("a", 1, Object::Service(service("shop/web")));
    let second = at("b", 1, Object::Service(DeclaredService { ports: vec![port("x", 99)], ..service("shop/web") }));
    let state = reduced(vec![first.clone(), second.clone()]);
    assert_eq!(state, reduced(vec![second, first]));
    assert_eq!(state.services[&name("shop/web")].ports, [port("http", 80)].into());
}

#[test]
fn one_instance_in_two_slices_is_one_endpoint() {
    let state = reduced(vec![
        at("a", 1, Object::Service(service("shop/web"))),
        at("a", 9, Object::Slice(slice("ipv4", "shop/web", &["web-a"]))),
        at("a", 20, Object::Slice(slice("ipv6", "shop/web", &["web-a", "web-b"]))),
    ]);
    assert_eq!(state.services[&name("shop/web")].endpoints.len(), 2);
    assert_eq!(problems(&state), Vec::<String>::new());
}

#[test]
fn a_peer_with_a_bundle_is_declared_and_one_without_only_grants() {
    let bundle = DeclaredBundle { sequence: 1, roots_pem: "pem".into() };
    let state = reduced(vec![
        at("a", 1, Object::Peer(DeclaredPeer { bundle: Some(bundle), ..peer("north", Some("north.x")) })),
        at("a", 9, Object::Peer(peer("west", None))),
    ]);
    assert_eq!(state.peers.keys().map(|cluster| cluster.as_str()).collect::<Vec<_>>(), ["north", "west"]);
    assert_eq!(state.declared_peers.keys().map(|cluster| cluster.as_str()).collect::<Vec<_>>(), ["north"]);
}

#[test]
fn problems_and_endpoints_are_bounded() {
    let many = (0..PROBLEMS_MAX as u32 + 50).map(|n| at("a", n, export(&format!("shop/s{n}")))).collect();
    let state = reduced(many);
    assert_eq!(state.problems.len(), PROBLEMS_MAX);
    let instances: Vec<String> = (0..ENDPOINTS_MAX + 1).map(|n| format!("i{n}")).collect();
    let instances: Vec<&str> = instances.iter().map(String::as_str).collect();
    let state = reduced(vec![
        at("a", 1, Object::Service(service("shop/web"))),
        at("a", 9, Object::Slice(slice("s", "shop/web", &instances))),
    ]);
    assert_eq!(state.services[&name("shop/web")].endpoints.len(), ENDPOINTS_MAX);
    assert_eq!(problems(&state), ["a:9 Service shop/web has more than 10000 endpoints"]);
}

#[test]
fn of_a_whole_clusters_objects_only_what_is_exported_is_reported() {
    let nameless = |name| Object::Service(DeclaredService { service_accounts: vec![], ..service(name) });
    let place = |kind: &str, name: &str, object| at(&format!("{kind}/{name}"), 0, object);
    let objects = vec![
        place("Service", "shop/web", nameless("shop/web")),
        place("Service", "shop/db", nameless("shop/db")),
        place("Service", "tombolo-system/gateway", nameless("tombolo-system/gateway")),
        place("EndpointSlice", "shop/gone-1", Object::Slice(slice("gone-1", "shop/gone", &["a"]))),
        place("ServiceExport", "shop/web", export("shop/web")),
        place("ServiceExport", "shop/gone", export("shop/gone")),
        place("ServiceExport", "tombolo-system/gateway", export("tombolo-system/gateway")),
    ];
    assert_eq!(reduced(objects.clone()).problems.len(), 6);
    let state = reduced_for(Purpose::Everything, objects);
    let about: Vec<&str> = state.problems.iter().map(|problem| problem.file.as_str()).collect();
    assert_eq!(about, ["Service/shop/web", "ServiceExport/shop/gone", "ServiceExport/tombolo-system/gateway"]);
    let refused = [
        (name("shop/gone"), ExportRefused::NoService),
        (name("tombolo-system/gateway"), ExportRefused::ReservedNamespace),
    ];
    assert_eq!(state.refused_exports, refused.into());
    assert!(state.services[&name("shop/web")].exported.is_some());
}

#[test]
fn an_object_without_lines_is_named_alone() {
    assert_eq!(Place { file: "web.yaml".into(), line: 3 }.to_string(), "web.yaml:3");
    assert_eq!(Place { file: "Service/shop/web".into(), line: 0 }.to_string(), "Service/shop/web");
}

#[test]
fn a_policy_of_a_name_counts_once_and_a_peer_may_have_an_access_of_its_own() {
    use crate::policy::access::{AccessPolicy, AccessSpec, DefaultAccess};
    use crate::policy::{Kind, Resource, set::Policy};
    let policy = |target: &str| {
        let resource = Resource::new(Kind::AccessPolicy, "shop".parse().unwrap(), "web").unwrap();
        let (targets, spec) = ([name(target)].into(), AccessSpec::default());
        Object::Policy(Policy::Access(Arc::new(AccessPolicy { resource, targets, spec })))
    };
    let west = DeclaredPeer { default_access: Some(DefaultAccess::Deny), ..peer("west", None) };
    let objects = vec![
        at("b.yaml", 1, policy("shop/api")),
        at("a.yaml", 7, policy("shop/web")),
        at("p.yaml", 1, Object::Peer(west)),
        at("q.yaml", 1, Object::Peer(peer("north", None))),
    ];
    let state = reduced(objects);
    assert_eq!((state.policies.len(), state.policies.delivered(&name("shop/web")).len()), (1, 1));
    assert_eq!(state.peer_access, [("west".parse().unwrap(), DefaultAccess::Deny)].into());
    let problem = &state.problems[0];
    assert_eq!((problem.file.as_str(), problem.line), ("b.yaml", 1));
    assert!(problem.reason.starts_with("AccessPolicy shop/web is defined in a.yaml:7 already"), "{problem:?}");
}
