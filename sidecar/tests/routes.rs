//! What routes and traffic policies, as operators write them, do to requests.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Far, Mood, WEB, World, bounded, eventually, share};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tombolo_api::k8s;
use tombolo_core::model::Origin;
use tombolo_core::outlier::EjectReason;
use tombolo_core::policy::set::Policy;
use tombolo_core::source::declared::Object;
use tombolo_leg::discovery::{ServiceState, ServiceView};
use tombolo_runtime::process::Process;

const ROUTE: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n";
const TRAFFIC: &str = "apiVersion: tombolo.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  targetRefs: [{kind: Service, name: web}]\n";
/// All clusters' endpoints of a service.
const IMPORT: &str = "group: multicluster.x-k8s.io, kind: ServiceImport";

/// Behind the head of an answer from the application in that cluster.
const EAST: &str = "\r\n\r\n4\r\neast";
const WEST: &str = "\r\n\r\n4\r\nwest";

fn policies(world: &World, yaml: &str) -> Vec<Policy> {
    let own = world.east.id("web");
    let cluster = own.trust_domain().as_str().strip_suffix(".tombolo").unwrap().parse().unwrap();
    let policy = |document: k8s::Document| match k8s::declared(document.resource, &cluster).unwrap().unwrap() {
        Object::Policy(policy) => policy,
        other => panic!("no policy: {other:?}"),
    };
    k8s::documents(yaml).unwrap().into_iter().map(policy).collect()
}

/// Two endpoints of shop/web, one in each cluster, and shop/canary in the other cluster alone.
async fn world(yaml: &str) -> World {
    let world = World::new().await;
    tell(&world, yaml, true);
    world
}

fn tell(world: &World, yaml: &str, local: bool) {
    let far = || share(&world.west, Origin::Remote, &[("w1", true, None)]);
    let near = share(&world.east, Origin::Local, &[("e1", local, Some(world.local.address))]);
    let view = |service: &str, shares, policies| {
        let service = service.parse().unwrap();
        ServiceState::Known(Arc::new(ServiceView { service, shares, numbers: Default::default(), policies }))
    };
    world.told.say("shop/web", view("shop/web", vec![near, far()], policies(world, yaml)));
    world.told.say("shop/canary", view("shop/canary", vec![far()], Vec::new()));
    world.told.say("shop/nothing", ServiceState::Unknown);
}

/// One request with more header lines, on a connection of its own.
async fn ask(world: &World, path: &str, lines: &str) -> String {
    let request = format!("GET http://{WEB}{path} HTTP/1.1\r\nHost: {WEB}\r\n{lines}Connection: close\r\n\r\n");
    bounded(world.raw(&request)).await
}

/// Asks until the answer is as it should be: what is told takes effect a moment later.
async fn until(world: &World, path: &str, lines: &str, holds: impl Fn(&str) -> bool) -> String {
    let asking = async {
        loop {
            let answer = ask(world, path, lines).await;
            if holds(&answer) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    bounded(Box::pin(asking)).await
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).unwrap_or_else(|| panic!("{answer:?}")).parse().unwrap()
}

#[tokio::test]
async fn a_header_sends_a_request_to_another_service_in_another_cluster() {
    let rules = format!(
        "  rules:\n  - matches: [{{headers: [{{name: x-version, value: next}}]}}]\n    backendRefs: [{{{IMPORT}, name: canary, port: 80}}]\n  - backendRefs: [{{{IMPORT}, name: web, port: 80}}]\n"
    );
    let world = world(&format!("{ROUTE}{rules}")).await;
    for _ in 0..5 {
        assert!(ask(&world, "/", "").await.contains(EAST));
        assert!(ask(&world, "/", "x-version: next\r\n").await.contains(WEST));
    }
    let explained = ask(&world, "/", "x-version: next\r\ntombolo-explain: 1\r\n").await;
    assert!(explained.contains("HTTPRoute shop/web, rule 0"), "{explained}");
    // Without the route all is as before.
    tell(&world, "", true);
    until(&world, "/", "x-version: next\r\n", |answer| answer.contains(EAST)).await;
}

#[tokio::test]
async fn weights_split_requests_between_services() {
    let rules = format!(
        "  rules:\n  - backendRefs:\n    - {{{IMPORT}, name: web, port: 80, weight: 3}}\n    - {{{IMPORT}, name: canary, port: 80, weight: 1}}\n    - {{{IMPORT}, name: nothing, port: 80, weight: 0}}\n"
    );
    let world = world(&format!("{ROUTE}{rules}")).await;
    for _ in 0..200 {
        assert_eq!(status(&ask(&world, "/", "").await), 200);
    }
    let (web, canary) = (world.local.requests(), world.remote.requests());
    // A quarter of 200 is 50; nine standard deviations are 55.
    assert_eq!(web + canary, 200);
    assert!((5..105).contains(&canary), "{web} and {canary}");
}

#[tokio::test]
async fn a_backend_of_kind_service_is_this_clusters_alone() {
    let rules = "  rules:\n  - backendRefs: [{name: web, port: 80}]\n";
    let world = world(&format!("{ROUTE}{rules}")).await;
    assert!(ask(&world, "/", "").await.contains(EAST));
    // Gone altogether, it is not replaced by the other cluster's.
    world.local.kill();
    let answer = ask(&world, "/", "").await;
    assert_eq!((status(&answer), world.remote.requests()), (503, 0), "{answer}");
    tell(&world, &format!("{ROUTE}  rules:\n  - backendRefs: [{{{IMPORT}, name: web, port: 80}}]\n"), false);
    until(&world, "/", "", |answer| answer.contains(WEST)).await;
}

#[tokio::test]
async fn requests_and_answers_are_changed_as_the_rule_says() {
    let rules = format!(
        "  rules:\n  - matches: [{{path: {{type: PathPrefix, value: /api}}}}]\n    filters:\n    - type: URLRewrite\n      urlRewrite: {{hostname: inner.example, path: {{type: ReplacePrefixMatch, replacePrefixMatch: /}}}}\n    - type: RequestHeaderModifier\n      requestHeaderModifier: {{set: [{{name: x-set, value: new}}], add: [{{name: x-add, value: more}}], remove: [x-gone]}}\n    - type: ResponseHeaderModifier\n      responseHeaderModifier: {{set: [{{name: x-answer, value: 'yes'}}]}}\n    backendRefs: [{{{IMPORT}, name: web, port: 80}}]\n"
    );
    let world = world(&format!("{ROUTE}{rules}")).await;
    let answer = ask(&world, "/api/seen?q=1", "x-set: old\r\nx-add: one\r\nx-gone: 1\r\n").await;
    assert_eq!(status(&answer), 200, "{answer}");
    assert!(answer.contains("x-answer: yes"), "{answer}");
    for line in ["GET http://inner.example/seen?q=1", "x-set: new\n", "x-add: one\n", "x-add: more\n"] {
        assert!(answer.contains(line), "{line} in {answer}");
    }
    assert!(!answer.contains("x-gone") && !answer.contains("x-set: old"), "{answer}");
}

#[tokio::test]
async fn a_redirect_is_answered_at_once() {
    let rules = "  rules:\n  - matches: [{path: {type: Exact, value: /old}}]\n    filters:\n    - type: RequestRedirect\n      requestRedirect: {hostname: new.example, path: {type: ReplaceFullPath, replaceFullPath: /new}, statusCode: 301}\n";
    let world = world(&format!("{ROUTE}{rules}")).await;
    let answer = ask(&world, "/old?a=b", "").await;
    assert_eq!(status(&answer), 301, "{answer}");
    assert!(answer.contains("://new.example"), "{answer}");
    assert!(answer.contains("/new?a=b"), "{answer}");
    assert_eq!((world.local.requests(), world.remote.requests()), (0, 0));
}

#[tokio::test]
async fn what_no_rule_is_for_gets_404_and_what_has_no_backend_500() {
    let rules = format!(
        "  rules:\n  - matches: [{{path: {{type: Exact, value: /none}}}}]\n  - matches: [{{path: {{type: Exact, value: /nothing}}}}]\n    backendRefs: [{{{IMPORT}, name: nothing, port: 80}}]\n"
    );
    let world = world(&format!("{ROUTE}{rules}")).await;
    for (path, wanted, refusal) in
        [("/", 404, "no-route"), ("/none", 500, "no-backend"), ("/nothing", 500, "no-backend")]
    {
        let answer = ask(&world, path, "").await;
        assert_eq!(status(&answer), wanted, "{path}: {answer}");
        assert!(answer.contains(&format!("tombolo-refusal: {refusal}")), "{path}: {answer}");
    }
    assert_eq!((world.local.requests(), world.remote.requests()), (0, 0));
}

#[tokio::test]
async fn a_rules_timeout_and_retries_come_before_the_sidecars_own() {
    let rules = format!(
        "  rules:\n  - matches: [{{path: {{type: Exact, value: /bad}}}}]\n    retry: {{attempts: 1, codes: [503]}}\n    backendRefs: [{{{IMPORT}, name: web, port: 80}}]\n  - timeouts: {{request: 150ms}}\n    backendRefs: [{{{IMPORT}, name: web, port: 80}}]\n"
    );
    let world = world(&format!("{ROUTE}{rules}")).await;
    assert_eq!(status(&ask(&world, "/never", "").await), 504);
    let before = world.local.requests() + world.remote.requests();
    assert_eq!(status(&ask(&world, "/bad", "").await), 503);
    assert_eq!(world.local.requests() + world.remote.requests() - before, 2);
}

#[tokio::test]
async fn a_traffic_policy_weighs_clusters_and_injects_faults() {
    let pinned = format!("{TRAFFIC}  clusters: [{{name: west}}]\n  failover: none\n");
    let world = world(&pinned).await;
    for _ in 0..5 {
        assert!(ask(&world, "/", "").await.contains(WEST));
    }
    let faulty = format!(
        "{TRAFFIC}  faults:\n  - matches: [{{path: {{type: Exact, value: /teapot}}}}]\n    abort: {{status: 418}}\n"
    );
    tell(&world, &faulty, true);
    let answer = until(&world, "/teapot", "", |answer| status(answer) == 418).await;
    assert!(answer.contains("TrafficPolicy shop/web"), "{answer}");
    let (local, remote) = (world.local.requests(), world.remote.requests());
    assert_eq!(status(&ask(&world, "/teapot", "").await), 418);
    assert_eq!((world.local.requests(), world.remote.requests()), (local, remote));
    assert!(ask(&world, "/", "").await.contains(EAST));
}

#[tokio::test]
async fn who_asks_is_told_what_decided_and_why_the_others_were_passed_over() {
    let rules = format!("  rules:\n  - backendRefs: [{{{IMPORT}, name: web, port: 80}}]\n");
    let yaml = format!("{ROUTE}{rules}---\n{TRAFFIC}  clusters: [{{name: west}}]\n  failover: none\n");
    let world = world(&yaml).await;
    let answer = ask(&world, "/", "tombolo-explain: 1\r\n").await;
    for line in [
        "tombolo-route: HTTPRoute shop/web, rule 0\r\n",
        "tombolo-policy: TrafficPolicy shop/web\r\n",
        "tombolo-passed-over: east/e1: the service's TrafficPolicy keeps its requests out of this cluster\r\n",
    ] {
        assert!(answer.contains(line), "{line} in {answer}");
    }
    let unasked = ask(&world, "/", "").await;
    assert!(!unasked.contains("tombolo-"), "{unasked}");
    // A refusal says what decided as well.
    world.gate.kill();
    *world.remote.mood.lock().unwrap() = Mood::AppDead;
    let refused = until(&world, "/", "tombolo-explain: 1\r\n", |answer| status(answer) == 503).await;
    assert!(refused.contains("tombolo-policy: TrafficPolicy shop/web\r\n"), "{refused}");
}

#[tokio::test]
async fn nobody_else_is_told_and_the_application_never_sees_that_it_was_asked() {
    let world = World::with("explainTo: [10.0.0.0/8]\n").await;
    let answer = world.get("/seen").await;
    assert!(status(&answer) == 200 && !answer.contains("tombolo-"), "{answer}");
}

#[tokio::test]
async fn the_access_log_has_a_line_for_each_request() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("access.log");
    let world = World::with(&format!("accessLog: {{file: {}}}\n", file.display())).await;
    assert_eq!(status(&ask(&world, "/cart?secret=1", "authorization: secret\r\n").await), 200);
    world.tell(false, true);
    until(&world, "/", "", |answer| answer.contains(WEST)).await;
    let refused = world.raw("GET http://example.com/ HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n");
    assert_eq!(status(&bounded(refused).await), 403);
    let mut text = String::new();
    eventually("every line to be written", || {
        text = std::fs::read_to_string(&file).unwrap();
        text.lines().last().is_some_and(|line| line.contains("foreign-name"))
    })
    .await;
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let first = &lines[0];
    assert_eq!(
        (&first["path"], &first["status"], &first["tries"]),
        (&"/cart".into(), &200.into(), &1.into()),
        "{first}"
    );
    assert_eq!((&first["cluster"], &first["endpoint"]), (&"east".into(), &"e1".into()), "{first}");
    assert_eq!((&first["backend"], &first["flags"]), (&"shop/web:80".into(), &serde_json::json!(["share"])), "{first}");
    let west = lines.iter().find(|line| line["cluster"] == "west").unwrap();
    assert_eq!(west["reason"], "its cluster by its share, and there the less busy of two, or the one in turn");
    let last = lines.last().unwrap();
    assert_eq!((&last["status"], &last["refusal"]), (&403.into(), &"foreign-name".into()), "{last}");
    assert!(!text.contains("secret"), "{text}");
}

/// Why the endpoints of shop/web are ejected.
fn ejected(world: &World) -> Vec<EjectReason> {
    let route = world.outbound.services.known(WEB).unwrap();
    route.live().targets.iter().filter_map(|target| target.outlier().ejected_for()).collect()
}

#[tokio::test]
async fn outlier_detection_ejects_as_the_policy_says() {
    let strict = format!("{TRAFFIC}  outlierDetection: {{consecutiveGatewayErrors: 1, baseEjectionTime: 20s}}\n");
    let world = world(&strict).await;
    assert_eq!(status(&ask(&world, "/bad", "").await), 503);
    assert_eq!(ejected(&world), [EjectReason::GatewayErrors]);
    assert!(ask(&world, "/", "").await.contains(WEST));
    // Once nobody may be ejected, whoever was is taken back, and stays whatever becomes of requests.
    tell(&world, &format!("{TRAFFIC}  outlierDetection: {{enabled: false}}\n"), true);
    until(&world, "/", "", |answer| answer.contains(EAST)).await;
    world.local.feel(Mood::AppDead);
    for _ in 0..5 {
        assert!(ask(&world, "/", "").await.contains(WEST), "tried here, and then there");
    }
    assert_eq!(ejected(&world), []);
    // Without the policy who refuses is ejected at once.
    tell(&world, "", true);
    let refused = async {
        while ejected(&world) != [EjectReason::Refused] {
            ask(&world, "/", "").await;
        }
    };
    bounded(Box::pin(refused)).await;
}

#[tokio::test]
async fn an_endpoint_that_is_slow_next_to_its_siblings_is_ejected() {
    let policy = format!(
        "{TRAFFIC}  loadBalancing: {{algorithm: round-robin}}\n  outlierDetection: {{slowFactor: 3, baseEjectionTime: 20s}}\n"
    );
    let world = world(&policy).await;
    let slow = Far::start("slow", &world.east.source("web"), &world.trust).await;
    slow.feel(Mood::Takes(150));
    let endpoints = [("e1", true, Some(world.local.address)), ("e2", true, Some(slow.address))];
    let shares = vec![share(&world.east, Origin::Local, &endpoints)];
    let (service, numbers) = ("shop/web".parse().unwrap(), Default::default());
    let view = ServiceView { service, shares, numbers, policies: policies(&world, &policy) };
    world.told.say("shop/web", ServiceState::Known(Arc::new(view)));
    let asking = async {
        while {
            ask(&world, "/", "").await;
            ejected(&world)
        } != [EjectReason::Slow]
        {}
    };
    bounded(Box::pin(asking)).await;
    assert!(slow.requests() >= 5, "{}", slow.requests());
    let before = slow.requests();
    for _ in 0..10 {
        assert!(ask(&world, "/", "").await.contains(EAST));
    }
    assert_eq!(slow.requests(), before);
}

#[tokio::test]
async fn a_retry_budget_of_nothing_leaves_no_further_try() {
    let policy = |percent| {
        format!(
            "{TRAFFIC}  retry: {{attempts: 2, codes: [503], budgetPercent: {percent}}}\n  outlierDetection: {{enabled: false}}\n"
        )
    };
    let world = world(&policy(100)).await;
    let requests = || world.local.requests() + world.remote.requests();
    assert_eq!(status(&ask(&world, "/bad", "").await), 503);
    assert_eq!(requests(), 3);
    tell(&world, &policy(0), true);
    let once = async {
        loop {
            let before = requests();
            assert_eq!(status(&ask(&world, "/bad", "").await), 503);
            if requests() == before + 1 {
                return;
            }
        }
    };
    bounded(Box::pin(once)).await;
    // What the application never got is tried again all the same.
    world.local.feel(Mood::AppDead);
    assert!(ask(&world, "/", "").await.contains(WEST));
}

#[tokio::test]
async fn warm_legs_are_as_many_as_the_policy_allows() {
    for (max, wanted) in [(0, 0), (2, 2)] {
        let world = world(&format!("{TRAFFIC}  warmLegs: {max}\n")).await;
        let listener = world.listener("web.shop:5432").await;
        let mut open = Vec::new();
        for _ in 0..4 {
            let mut connection = TcpStream::connect(listener).await.unwrap();
            let mut greeting = [0; 16];
            bounded(connection.read_exact(&mut greeting)).await.unwrap();
            assert_eq!(&greeting, b"hello from east\n");
            open.push(connection);
        }
        let route = world.outbound.services.route(&"shop/web".parse().unwrap(), 5432).await.unwrap();
        let standing = || route.live().targets.iter().map(|target| target.warm.standing()).sum::<usize>();
        eventually("the warm legs to stand", || standing() == wanted).await;
        assert!(wanted > 0 || world.local.legs.load(Ordering::SeqCst) == 4, "each connection dialled its own");
    }
}

fn metric(process: &Process, line: &str) -> u64 {
    let text = process.metrics.encode();
    text.lines().find_map(|text| text.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0)
}

#[tokio::test]
async fn a_mirror_gets_copies_and_its_answers_are_thrown_away() {
    let mirror = |percent| {
        format!(
            "{ROUTE}  rules:\n  - filters:\n    - type: RequestMirror\n      requestMirror: {{backendRef: {{{IMPORT}, name: canary, port: 80}}, percent: {percent}}}\n    backendRefs: [{{{IMPORT}, name: web, port: 80}}]\n"
        )
    };
    let process = Process::bare("sidecar");
    let world = World::of("", &process).await;
    tell(&world, &mirror(100), true);
    let mirrored =
        |outcome: &str| metric(&process, &format!("tombolo_outbound_mirrored_total{{outcome=\"{outcome}\"}}"));
    assert!(ask(&world, "/", "").await.contains(EAST));
    eventually("the copy", || mirrored("answered") == 1).await;
    let post = |octets: usize| {
        let body = "x".repeat(octets);
        format!(
            "POST http://{WEB}/count HTTP/1.1\r\nHost: {WEB}\r\nContent-Length: {octets}\r\nConnection: close\r\n\r\n{body}"
        )
    };
    assert!(bounded(world.raw(&post(5000))).await.ends_with("\r\n\r\n4\r\n5000\r\n0\r\n\r\n"));
    eventually("the copy with its body", || mirrored("answered") == 2).await;
    // More than is kept is not copied; an answer that is an error, or none at all, is nobody's concern.
    assert!(bounded(world.raw(&post(100_000))).await.contains("100000"));
    assert_eq!(mirrored("dropped"), 1);
    world.remote.feel(Mood::AppDead);
    assert!(ask(&world, "/", "").await.contains(EAST));
    eventually("the copy to fail", || mirrored("failed") == 1).await;
    assert_eq!((world.local.requests(), world.remote.requests()), (4, 2));
    tell(&world, &mirror(0), true);
    world.remote.feel(Mood::Well);
    let quiet = async {
        loop {
            let before = mirrored("answered") + mirrored("failed");
            assert!(ask(&world, "/", "").await.contains(EAST));
            assert!(ask(&world, "/", "").await.contains(EAST));
            if mirrored("answered") + mirrored("failed") == before {
                return;
            }
        }
    };
    bounded(Box::pin(quiet)).await;
}

#[tokio::test]
async fn a_slow_try_is_hedged_where_the_policy_asks_for_it() {
    let process = Process::bare("sidecar");
    let world = World::of("", &process).await;
    let policy = |more: &str| format!("{TRAFFIC}  outlierDetection: {{enabled: false}}\n{more}");
    let hedges = || metric(&process, "tombolo_outbound_hedges_total");
    tell(&world, &policy("  hedging: {after: 50ms}\n"), true);
    assert!(ask(&world, "/", "").await.contains(EAST));
    assert_eq!(hedges(), 0, "who answers in time is met alone");
    world.local.feel(Mood::Takes(700));
    assert!(ask(&world, "/", "").await.contains(WEST));
    assert_eq!(hedges(), 1);
    // One that may not be sent twice is not.
    let post = format!("POST http://{WEB}/ HTTP/1.1\r\nHost: {WEB}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert!(bounded(world.raw(&post)).await.contains(EAST));
    // Both fail or are slow: the one that answers counts, whichever it is.
    world.remote.feel(Mood::AppDead);
    assert!(ask(&world, "/", "").await.contains(EAST));
    assert_eq!(hedges(), 2);
    world.remote.feel(Mood::Well);
    tell(&world, &policy("  hedging: {after: 50ms}\n  retry: {budgetPercent: 0}\n"), true);
    until(&world, "/", "", |answer| answer.contains(EAST)).await;
    let before = hedges();
    assert!(ask(&world, "/", "").await.contains(EAST), "the budget pays for none");
    assert_eq!(hedges(), before);
}
