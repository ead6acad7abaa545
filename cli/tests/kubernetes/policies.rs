//! Routes and policies that are objects of an API server.

use serde_json::{Value, json};
use tombolo_testbed::kubernetes::ControlPlane;

use crate::support::{World, app, curl, curl_until, link, start_caller, until};
use crate::{WEB, cluster, control_plane, export, problem, serve_object, start_web, web};

/// The kinds of the Gateway API, as far as an API server has to know them to store their objects.
fn gateway_api() -> String {
    let definition = |kind: &str, plural: &str| {
        let anything = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": format!("{plural}.gateway.networking.k8s.io"),
                "annotations": { "api-approved.kubernetes.io": "unapproved, for a test" },
            },
            "spec": {
                "group": "gateway.networking.k8s.io",
                "scope": "Namespaced",
                "names": { "kind": kind, "plural": plural, "singular": kind.to_lowercase() },
                "versions": [
                    { "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": anything } },
                ],
            },
        })
    };
    format!("{}\n---\n{}", definition("HTTPRoute", "httproutes"), definition("GRPCRoute", "grpcroutes"))
}

fn policy(kind: &str, name: &str, spec: &Value) -> String {
    let metadata = json!({ "name": name, "namespace": "shop" });
    json!({ "apiVersion": "tombolo.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec }).to_string()
}

fn access(account: &str) -> String {
    let rules = json!([{ "from": [{ "serviceAccounts": [account] }] }]);
    policy("AccessPolicy", "web", &json!({ "targetRefs": [{ "kind": "Service", "name": "web" }], "rules": rules }))
}

async fn refused(plane: &ControlPlane, yaml: &str, says: &str) {
    let error = plane.apply(yaml).await.unwrap_err().to_string();
    assert!(error.contains(says), "{error}");
}

#[tokio::test]
async fn policies_of_the_api_server_decide_and_it_refuses_what_could_not_be_read() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let mut west = cluster(&world, &plane, "west").await;
    let mut east = world.cluster("east").await;
    let app = app::http("web-in-west").await;
    plane.apply(&format!("{}---\n{}", web("http", true), access("operator"))).await.unwrap();
    start_web(&mut west, app.address).await;
    link(&west, &east).await;
    plane.apply(&export("web")).await.unwrap();
    let proxy = start_caller(&mut east).await;
    let denied = until("the caller to be denied", async || {
        let answer = curl(proxy, &[WEB]).await;
        assert!(!answer.body.starts_with("web-in-west"), "{answer:?}");
        (answer.status == 403).then_some(answer)
    })
    .await;
    assert_eq!(denied.header("tombolo-refusal"), Some("identity-denied"), "{denied:?}");
    plane.apply(&access("frontend")).await.unwrap();
    curl_until(proxy, WEB, "web-in-west").await;
    let shown = plane.kubectl(&["get", "accesspolicies", "-n", "shop", "--no-headers"]).await.unwrap();
    assert_eq!(shown.split_whitespace().take(4).collect::<Vec<_>>(), ["web", "web", "allow", "enforce"]);

    // What a schema can say the API server refuses itself; what it can't is reported with the object's name.
    refused(&plane, &access("frontend").replace("rules", "rulez"), "rulez").await;
    refused(&plane, &access("frontend").replace("\"Service\"", "\"Secret\""), "name a Service, or a ServiceImport")
        .await;
    refused(&plane, &policy("TrafficPolicy", "web", &json!({ "failover": "auto" })), "targetRefs").await;
    let target = json!([{ "kind": "Service", "name": "web" }]);
    let mixed = json!({ "targetRefs": target, "clusters": [{ "name": "east", "weight": 1 }, { "name": "west" }] });
    refused(&plane, &policy("TrafficPolicy", "web", &mixed), "either every cluster has a weight or none has").await;
    let limit = json!({ "targetRefs": target, "rateLimit": { "requestsPerSecond": 0 } });
    refused(&plane, &policy("TrafficPolicy", "web", &limit), "requestsPerSecond").await;
    plane.apply(&access("shop/../frontend")).await.unwrap();
    problem(&west, "AccessPolicy/shop/web", true).await;
    assert_eq!(curl(proxy, &[WEB]).await.status, 200, "the last good content stays in force");
    plane.apply(&access("frontend")).await.unwrap();
    problem(&west, "AccessPolicy/shop/web", false).await;

    let limit = json!({ "targetRefs": target, "rateLimit": { "requestsPerSecond": 1, "burst": 1 } });
    plane.apply(&policy("TrafficPolicy", "web", &limit)).await.unwrap();
    until("the rate limit to be in force", async || (curl(proxy, &[WEB]).await.status == 429).then_some(())).await;
    plane.kubectl(&["delete", "trafficpolicy,accesspolicy", "web", "-n", "shop"]).await.unwrap();
    until("nothing to be refused any more", async || {
        let answers = [curl(proxy, &[WEB]).await, curl(proxy, &[WEB]).await, curl(proxy, &[WEB]).await];
        answers.iter().all(|answer| answer.status == 200).then_some(())
    })
    .await;
    tokio::join!(east.stop(), west.stop(), plane.stop());
}

#[tokio::test]
async fn a_route_of_the_api_server_decides_also_when_its_kind_is_installed_later() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let mut west = cluster(&world, &plane, "west").await;
    let (stable, canary) = (app::http("web-in-west").await, app::http("canary-in-west").await);
    plane.apply(&web("http", true)).await.unwrap();
    start_web(&mut west, stable.address).await;
    serve_object(&mut west, &plane, "canary", canary.address).await;
    let proxy = start_caller(&mut west).await;
    curl_until(proxy, WEB, "web-in-west").await;

    plane.apply(&gateway_api()).await.unwrap();
    plane.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=20s"]).await.unwrap();
    let backend = |name: &str| json!([{ "kind": "Service", "name": name, "port": 80 }]);
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "parentRefs": [{ "group": "", "kind": "Service", "name": "web" }],
            "rules": [
                { "matches": [{ "headers": [{ "name": "x-version", "value": "next" }] }], "backendRefs": backend("canary") },
                { "backendRefs": backend("web") },
            ],
        },
    });
    let of_a_gateway = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": { "name": "edge", "namespace": "shop" },
        "spec": { "parentRefs": [{ "name": "edge" }], "hostnames": ["example.org"], "rules": [] },
    });
    plane.apply(&format!("{route}\n---\n{of_a_gateway}")).await.unwrap();
    until("the route to be in force", async || {
        let answer = curl(proxy, &["-H", "x-version: next", WEB]).await;
        answer.body.starts_with("canary-in-west").then_some(())
    })
    .await;
    assert!(curl(proxy, &[WEB]).await.body.starts_with("web-in-west"));
    problem(&west, "HTTPRoute", false).await;

    // A filter that is not known would let requests pass unchanged: the last good content stays.
    let filters = json!([{ "type": "Polish" }]);
    let mut wrong = route.clone();
    wrong["spec"]["rules"][0]["filters"] = filters;
    plane.apply(&wrong.to_string()).await.unwrap();
    problem(&west, "HTTPRoute/shop/web", true).await;
    assert!(curl(proxy, &["-H", "x-version: next", WEB]).await.body.starts_with("canary-in-west"));
    tokio::join!(west.stop(), plane.stop());
}
