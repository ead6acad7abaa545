use super::*;
use proptest::prelude::*;
use tombolo_core::policy::set::Policy;
use tombolo_core::source::declared::{Object, ServiceType};

const SHOP: &str = "\
# The shop.
---
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  annotations: {tombolo.dev/service-accounts: 'web, web-canary'}
spec:
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: admin, port: 9000, appProtocol: kubernetes.io/h2c}
  aFieldOfALaterRelease: {}
--- # the endpoints
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: shop
  labels: {kubernetes.io/service-name: web}
  annotations: {tombolo.dev/weight: '3'}
addressType: IPv4
endpoints:
- addresses: [192.0.2.7]
  targetRef: {kind: Pod, name: web-a}
  zone: z1
- addresses: [192.0.2.8]
  conditions: {ready: false}
  hostname: web-b
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: not-ours}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: web, namespace: shop}
spec: {exportedLabels: {a: b}}
---
apiVersion: tombolo.dev/v1alpha1
kind: ClusterPeer
metadata: {name: west}
spec:
  cluster: west
  imports: [shop, 'data/db']
";

fn east() -> ClusterId {
    "east".parse().unwrap()
}

fn objects(text: &str) -> Vec<(u32, Object)> {
    let read = documents(text).unwrap();
    read.into_iter().map(|document| (document.line, declared(document.resource, &east()).unwrap().unwrap())).collect()
}

#[test]
fn a_file_of_several_documents_is_read_with_lines() {
    let objects = objects(SHOP);
    assert_eq!(objects.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [3, 15, 35, 40]);
    let [(_, Object::Service(web)), (_, Object::Slice(slice)), (_, Object::Export(export)), (_, Object::Peer(peer))] =
        objects.as_slice()
    else {
        panic!("{objects:?}")
    };
    assert_eq!(web.service.to_string(), "shop/web");
    assert_eq!(web.service_type, ServiceType::ClusterIp);
    assert_eq!(web.service_accounts, ["web", "web-canary"]);
    let ports: Vec<_> = web.ports.iter().map(|port| (port.port, port.app)).collect();
    use tombolo_core::model::AppProtocol::{Http, Http2};
    assert_eq!(ports, [(80, Http), (9000, Http2)]);
    assert_eq!(slice.service.to_string(), "shop/web");
    let [first, second] = slice.endpoints.as_slice() else { panic!() };
    assert_eq!((first.instance.as_ref().unwrap().as_str(), first.ready, first.weight), ("web-a", true, 3));
    assert_eq!((second.instance.as_ref(), second.ready, second.key.as_str()), (None, false, "web-b"));
    assert_eq!(export.service.to_string(), "shop/web");
    assert_eq!(peer.authority.exports, [ServiceSelector::All]);
    assert_eq!(peer.authority.imports.len(), 2);
}

/// The line and the beginning of the reason that `text` is refused with.
fn refused(text: &str) -> (u32, String) {
    match documents(text) {
        Err(wrong) => (wrong[0].line, wrong[0].reason.clone()),
        Ok(read) => {
            let document = read.into_iter().next().expect("a document was read");
            (document.line, declared(document.resource, &east()).expect_err("it should be refused"))
        }
    }
}

#[test]
fn what_is_wrong_is_refused_with_line_and_reason() {
    let peer = "apiVersion: tombolo.dev/v1alpha1\nkind: ClusterPeer\nmetadata: {name: w}\nspec:\n  cluster: w\n";
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n";
    let policy = |kind: &str| {
        format!("apiVersion: tombolo.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: web, namespace: shop}}\nspec:\n")
    };
    let (access, traffic) = (policy("AccessPolicy"), policy("TrafficPolicy"));
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s\n";
    let labelled = format!("{slice}  labels: {{kubernetes.io/service-name: web}}\n");
    for (text, line, want) in [
        ("# c\n\nkind: Service\n".into(), 3, "every document needs apiVersion and kind"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: [a}\n".into(), 3, ""),
        ("a: b\n---\napiVersion: v1\n\tkind: Service\n".into(), 1, "every document needs"),
        ("- a\n- b\n".into(), 1, ""),
        ("apiVersion: v1\nkind: List\nitems: []\n".into(), 1, "List is not read"),
        ("apiVersion: multicluster.x-k8s.io/v1\nkind: ServiceExport\n".into(), 1, "ServiceExport is not read as"),
        ("apiVersion: tombolo.dev/v1alpha1\nkind: ClusterPear\n".into(), 1, "tombolo.dev/v1alpha1 has no kind"),
        (format!("{peer}  import: [shop]\n"), 6, "unknown field `import`"),
        (format!("{peer}  imports: [Shop]\n"), 6, "\"Shop\" is not a valid namespace"),
        (format!("{peer}  gateways: ['gw:1']\n"), 1, "ClusterPeer w: spec.gateways needs spec.bundle"),
        (format!("{peer}  bundle: {{roots: x}}\n"), 1, "ClusterPeer w: spec.bundle needs spec.trustDomain"),
        (format!("{peer}  gateways: [gw]\n"), 1, "ClusterPeer w: spec.gateways: \"gw\" is not host:port"),
        (format!("{peer}  defaultAccess: maybe\n"), 6, "unknown variant `maybe`"),
        (format!("{access}  action: permit\n"), 5, "unknown variant `permit`"),
        (format!("{access}  rule: [x]\n"), 1, "AccessPolicy shop/web: spec.rule: is not a field here"),
        (
            format!("{access}  rules:\n  - from: [{{namespaces: [a]}}]\n  - to: [{{ports: [1], path: [/]}}]\n"),
            1,
            "AccessPolicy shop/web: spec.rules[1].to[0].path: is not a field here",
        ),
        (format!("{access}  rule:\n"), 1, "AccessPolicy shop/web: spec.rule: is not a field here"),
        (
            format!("{access}  rules: [{{from: [{{namespace: []}}]}}]\n"),
            1,
            "AccessPolicy shop/web: spec.rules[0].from[0].namespace: is not a field here",
        ),
        (
            format!("{access}  rules: [{{from: [{{spiffeIds: [x]}}]}}]\n"),
            1,
            "AccessPolicy shop/web: spec.rules[0].from[0].spiffeIds[0]",
        ),
        (format!("{access}  rules: [{{from: [{{namespaces: [A]}}]}}]\n"), 5, "\"A\" is not a valid namespace"),
        (
            format!("{access}  targetRefs: [{{kind: Gateway, name: x}}]\n"),
            1,
            "AccessPolicy shop/web: spec.targetRefs[0].kind: \"Gateway\" of group \"\"",
        ),
        (
            format!("{access}  targetRefs: [{{kind: Service, name: X}}]\n"),
            1,
            "AccessPolicy shop/web: spec.targetRefs[0].name: ",
        ),
        (format!("{access}  targetRefs: [{{kind: Service}}]\n"), 5, "missing field `name`"),
        (format!("{traffic}  warmLegs: 1\n"), 1, "TrafficPolicy shop/web: spec.targetRefs: name at least one"),
        (
            format!("{traffic}  targetRefs: [{{kind: Service, name: web}}]\n  rateLimit: {{requestsPerSecond: 0}}\n"),
            1,
            "TrafficPolicy shop/web: spec.rateLimit.requestsPerSecond: 0 is not from 1",
        ),
        (format!("{service}  ports: [{{port: 0}}]\n"), 1, "Service default/web: port 0 is not from 1 to 65535"),
        (format!("{service}  ports: [{{port: eighty}}]\n"), 5, ""),
        (format!("{service}  type: Magic\n"), 1, "Service default/web: spec.type \"Magic\""),
        (format!("{service}  ports: [{{port: 1, protocol: QUIC}}]\n"), 1, "Service default/web: protocol \"QUIC\""),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: web}\n".into(), 1, "Service default/web has no spec"),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: Web}\nspec: {}\n".into(),
            1,
            "Service \"Web\": \"Web\" is not",
        ),
        ("apiVersion: v1\nkind: Service\nmetadata: {}\nspec: {}\n".into(), 1, "Service: metadata.name is missing"),
        (slice.into(), 1, "EndpointSlice \"s\" needs the label kubernetes.io/service-name"),
        (format!("{labelled}  annotations: {{tombolo.dev/weight: '0'}}\n"), 1, "EndpointSlice s: tombolo.dev/weight"),
        (
            format!("{labelled}endpoints: [{{addresses: []}}]\n"),
            1,
            "EndpointSlice s: an endpoint has no targetRef.name",
        ),
        (
            format!("{labelled}endpoints: [{{addresses: [], targetRef: {{name: A}}}}]\n"),
            1,
            "EndpointSlice s: targetRef.name: \"A\"",
        ),
    ] {
        let (got_line, reason) = refused(&text);
        assert!(got_line == line && reason.starts_with(want), "{text}\nline {got_line}: {reason}");
        assert!(!reason.contains(" at line "), "{reason}");
    }
}

#[test]
fn lines_count_over_the_whole_file_and_every_bad_document_is_reported() {
    let bad = "apiVersion: v1\nkind: Service\nspec: 1\n";
    let text = format!("# head\n---\n{bad}---\n{SHOP}---\n{bad}");
    let wrong = documents(&text).unwrap_err();
    let last = text.lines().count() as u32;
    assert_eq!(wrong.iter().map(|one| one.line).collect::<Vec<_>>(), [5, last]);
}

#[test]
fn separators_are_found_where_yaml_allows_them_only() {
    let text = "--- {apiVersion: v1, kind: ConfigMap}\n...\n---\n# nothing\n---\n%not: a directive";
    assert_eq!(documents(text).map_err(|wrong| wrong.len()), Ok(vec![]));
    let block = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  annotations:\n    note: |\n      ---\n      x\nspec: {ports: [{port: 1}]}\n";
    assert_eq!(objects(block).len(), 1);
    let windows = block.replace('\n', "\r\n");
    assert_eq!(objects(&format!("\u{feff}---\r\n{windows}")).len(), 1);
}

#[test]
fn the_number_of_documents_and_the_size_of_a_reason_are_bounded() {
    let many = "---\nkind: X\napiVersion: v1\n".repeat(DOCUMENTS_MAX + 5);
    let wrong = documents(&many).unwrap_err();
    assert_eq!(wrong.len(), 1);
    let (_, reason) =
        refused(&format!("apiVersion: tombolo.dev/v1alpha1\nkind: ClusterPeer\n{}: 1\n", "x".repeat(900)));
    assert!(reason.chars().count() <= 300, "{reason}");
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,300}") {
        let _ = documents(&text);
    }

    #[test]
    fn no_yaml_like_text_makes_it_panic(text in "(apiVersion: v1\nkind: Service\n)?([-a-z{}\\[\\]&*|>!%:, '\"\t]{0,20}\n){0,12}") {
        for document in documents(&text).into_iter().flatten() {
            let _ = declared(document.resource, &east());
        }
    }

    #[test]
    fn no_octets_make_it_panic(octets in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = documents(&String::from_utf8_lossy(&octets));
    }

    #[test]
    fn a_file_cut_anywhere_makes_it_not_panic(cut in 0..SHOP.len()) {
        let _ = documents(&SHOP[..cut]);
    }
}

#[test]
fn policies_are_read_into_the_form_in_which_they_are_decided() {
    let text = "\
apiVersion: tombolo.dev/v1alpha1
kind: AccessPolicy
metadata: {name: web, namespace: shop, labels: {a: b}}
spec:
  targetRefs:
  - {kind: Service, name: web}
  - {group: multicluster.x-k8s.io, kind: ServiceImport, name: api}
  mode: audit
  rules:
  - from: [{serviceAccounts: [frontend], namespaces: []}]
    to: [{methods: [GET], paths: ['/cart*']}]
---
apiVersion: tombolo.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: web, creationTimestamp: '2026-01-02T03:04:05Z'}
spec:
  targetRefs: [{kind: Service, name: web}]
  rateLimit: {requestsPerSecond: 5}
";
    let objects = objects(text);
    let [(1, Object::Policy(Policy::Access(access))), (13, Object::Policy(Policy::Traffic(traffic)))] =
        objects.as_slice()
    else {
        panic!("{objects:?}")
    };
    let targets: Vec<_> = access.targets.iter().map(ToString::to_string).collect();
    assert_eq!(
        (access.resource.to_string().as_str(), targets.as_slice()),
        ("AccessPolicy shop/web", &["shop/api".to_owned(), "shop/web".into()][..])
    );
    assert_eq!(access.spec.rules[0].to[0].paths, ["/cart*"]);
    assert_eq!(traffic.resource.to_string(), "TrafficPolicy default/web");
    assert_eq!(traffic.created.to_string(), "2026-01-02T03:04:05Z");
    assert_eq!(traffic.spec.rate_limit.map(|limit| limit.burst()), Some(5));
}

const HTTP_ROUTE: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs:
  - {name: public}
  - {group: '', kind: Service, name: web, port: 80}
  - {group: multicluster.x-k8s.io, kind: ServiceImport, namespace: data, name: db}
  aFieldOfALaterRelease: true
  rules:
  - name: next
    matches: [{path: {type: Exact, value: /cart}, method: GET}]
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: b}]}}
    backendRefs:
    - {name: web, port: 80, weight: 3}
    - {group: multicluster.x-k8s.io, kind: ServiceImport, name: canary, port: 80}
    timeouts: {request: 1s}
    retry: {attempts: 2, codes: [503]}
";

#[test]
fn a_route_speaks_of_the_services_among_its_parents() {
    let [(_, Object::Policy(Policy::Route(route)))] = &objects(HTTP_ROUTE)[..] else { panic!("no route") };
    let parents: Vec<_> = route.parents.iter().map(|parent| (parent.service.to_string(), parent.port)).collect();
    assert_eq!(parents, [("shop/web".to_owned(), Some(80)), ("data/db".to_owned(), None)]);
    let rule = &route.rules[0];
    assert_eq!(rule.filters.request_headers.set, [("x-a".to_owned(), "b".to_owned())]);
    // A Service is this cluster's, a ServiceImport everybody's.
    let backends: Vec<_> = rule.backends.iter().map(|of| (of.service.name(), of.cluster.clone(), of.weight)).collect();
    assert_eq!(backends, [("web", Some(east()), 3), ("canary", None, 1)]);
    assert_eq!(rule.retry.as_ref().and_then(|retry| retry.attempts), Some(2));
}

#[test]
fn a_route_of_gateways_alone_is_nobodys_affair_here() {
    let text = HTTP_ROUTE
        .replace("kind: Service,", "kind: Gateway,")
        .replace("kind: ServiceImport, namespace", "kind: Mesh, namespace");
    for document in documents(&text).unwrap() {
        assert_eq!(declared(document.resource, &east()), Ok(None));
    }
}

#[test]
fn a_route_that_would_do_something_else_than_it_says_is_refused_with_its_field() {
    for (from, to, reason) in [
        ("type: RequestHeaderModifier,", "type: Polish,", "spec.rules[0].filters[0].type: \"Polish\" is not carried"),
        (
            "requestHeaderModifier: {set",
            "urlRewrite: {set",
            "spec.rules[0].filters[0].requestHeaderModifier: is missing",
        ),
        (
            "name: web, port: 80}\n  - {group: mul",
            "name: web, sectionName: http}\n  - {group: mul",
            "spec.parentRefs[1].sectionName: name the port",
        ),
        ("  rules:", "  hostnames: [a.example]\n  rules:", "spec.hostnames: a route of a service has none"),
        (
            "- {name: web, port: 80, weight: 3}",
            "- {group: x.example, kind: Bucket, name: b}",
            "spec.rules[0].backendRefs[0].kind: \"Bucket\"",
        ),
        (
            "value: b}",
            "value: \"b\\nc\"}",
            "spec.rules[0].filters[0].requestHeaderModifier.set[0].value: not a header's value",
        ),
        ("attempts: 2", "attempts: 99", "spec.rules[0].retry.attempts"),
    ] {
        let text = HTTP_ROUTE.replace(from, to);
        assert_ne!(text, HTTP_ROUTE, "{from}");
        let (_, got) = refused(&text);
        assert!(got.starts_with(&format!("HTTPRoute shop/web: {reason}")), "{got}");
    }
    let (_, got) = refused(&HTTP_ROUTE.replace("k8s.io/v1\n", "k8s.io/v9\n"));
    assert!(got.contains("use gateway.networking.k8s.io/v1"), "{got}");
}

#[test]
fn a_misspelt_field_that_says_nothing_is_noticed_at_any_depth() {
    let policy = "apiVersion: tombolo.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  targetRefs: [{kind: Service, name: web}]\n";
    for (fields, path) in [
        ("retries: {}", "retries"),
        ("retry: {code: []}", "retry.code"),
        ("timeouts: {perTries: null}", "timeouts.perTries"),
        ("loadBalancing: {hashes: {}}", "loadBalancing.hashes"),
        ("clusters: [{name: east}, {name: west, weights: null}]", "clusters[1].weights"),
        ("faults: [{abort: {status: 503, percent: null}}]", "faults[0].abort.percent"),
        ("faults: [{matches: [{header: []}], abort: {status: 503}}]", "faults[0].matches[0].header"),
    ] {
        let (_, reason) = refused(&format!("{policy}  {fields}\n"));
        let want = format!("TrafficPolicy shop/web: spec.{path}: is not a field here");
        assert!(reason.starts_with(&want), "{fields}: {reason}");
    }
}

#[test]
fn the_examples_of_the_documentation_are_read() {
    let text = include_str!("../../../docs/policies.md");
    let examples: Vec<&str> = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let read = |example: &&str| {
        let documents = documents(example).unwrap_or_else(|wrong| panic!("{wrong:?} in\n{example}"));
        let kinds = documents.into_iter().map(|document| {
            match declared(document.resource, &east()).unwrap_or_else(|reason| panic!("{reason} in\n{example}")) {
                Some(Object::Policy(policy)) => policy.resource().kind.as_str(),
                other => panic!("{other:?} in\n{example}"),
            }
        });
        kinds.collect::<Vec<_>>().join(" ")
    };
    let kinds: Vec<_> = examples.iter().map(read).collect();
    assert_eq!(kinds, ["AccessPolicy", "TrafficPolicy", "TrafficPolicy", "HTTPRoute", "HTTPRoute"]);
}

#[test]
fn mirrors_are_read_with_their_share() {
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n  - filters:\n";
    let mirror = |fields: &str| {
        format!("    - {{type: RequestMirror, requestMirror: {{backendRef: {{name: copy, port: 81}}{fields}}}}}\n")
    };
    let text = format!("{route}{}{}{}", mirror(""), mirror(", percent: 5"), mirror(", fraction: {numerator: 1}"));
    let read = documents(&text).unwrap().remove(0);
    let Some(Object::Policy(Policy::Route(read))) = declared(read.resource, &east()).unwrap() else { panic!("{text}") };
    let mirrors = &read.rules[0].filters.mirrors;
    let shares: Vec<_> =
        mirrors.iter().map(|mirror| (mirror.fraction.numerator, mirror.fraction.denominator)).collect();
    assert_eq!(shares, [(1, 1), (5, 100), (1, 100)]);
    let [first, ..] = mirrors.as_slice() else { panic!() };
    assert_eq!((first.backend.service.to_string().as_str(), first.backend.port), ("shop/copy", Some(81)));
    for (wrong, want) in [
        (mirror(", percent: 101"), "spec.rules[0].filters[0].requestMirror.percent: 101 is not from 0 to 100"),
        (
            mirror(", percent: 1, fraction: {numerator: 1}"),
            "spec.rules[0].filters[0].requestMirror.fraction: percent stands here too",
        ),
        (mirror(", fraction: {numerator: 3, denominator: 2}"), "spec.rules[0].filters: a RequestMirror's fraction"),
        ("    - {type: RequestMirror}\n".to_owned(), "spec.rules[0].filters[0].requestMirror: is missing"),
        (
            "    - {type: RequestMirror, requestMirror: {backendRef: {kind: Secret, name: x}}}\n".to_owned(),
            "spec.rules[0].filters[0].requestMirror.backendRef.kind: \"Secret\" of group",
        ),
    ] {
        let (_, reason) = refused(&format!("{route}{wrong}"));
        assert!(reason.contains(want), "{wrong}: {reason}");
    }
}
