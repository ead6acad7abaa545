//! Policies written into a cluster's directory, in whole clusters as separate processes.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use support::{World, app, curl, curl_until, link, serve, start_caller, until};

const WEB: &str = "http://web.shop.svc.clusterset.local/";

fn access(account: &str) -> String {
    format!(
        "apiVersion: tombolo.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
         targetRefs: [{{kind: Service, name: web}}]\n  rules:\n  - from: [{{serviceAccounts: [{account}]}}]\n"
    )
}

#[tokio::test]
async fn an_access_policy_decides_about_callers_from_another_cluster_and_its_edit_takes_effect_at_once() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let web = app::http("web-in-west").await;
    west.write_resource("access.yaml", &access("operator")).unwrap();
    serve(&mut west, "web", "http", "http", web.address).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut east).await;
    // It was in force before the service could be called for the first time.
    let denied = until("the service to be known", async || {
        let answer = curl(proxy, &[WEB]).await;
        assert!(!answer.body.starts_with("web-in-west"), "{answer:?}");
        (answer.status == 403).then_some(answer)
    })
    .await;
    assert_eq!(denied.header("tombolo-refusal"), Some("identity-denied"), "{denied:?}");

    west.write_resource("access.yaml", &access("frontend")).unwrap();
    curl_until(proxy, WEB, "web-in-west").await;

    // One that is wrong is reported with its place, and the last good one stays.
    west.write_resource("access.yaml", &access("frontend").replace("rules:", "rulez:")).unwrap();
    let problem = until("the problem to be reported", async || {
        west.status().await.ok()?["problems"].as_array()?.first().cloned()
    })
    .await;
    assert_eq!((problem["file"].as_str(), problem["line"].as_u64()), (Some("access.yaml"), Some(1)), "{problem}");
    let reason = problem["reason"].as_str().unwrap();
    assert!(reason.starts_with("AccessPolicy shop/web: spec.rulez: is not a field here"), "{reason}");
    assert_eq!(curl(proxy, &[WEB]).await.status, 200);

    // A sidecar that starts while its federation is away goes on with what it was told.
    west.write_resource("access.yaml", &access("operator")).unwrap();
    until("the caller to be denied", async || (curl(proxy, &[WEB]).await.status == 403).then_some(())).await;
    // What is told is written within a second.
    let written = Instant::now() + Duration::from_millis(1200);
    until("what was told to be kept", async || (Instant::now() > written).then_some(())).await;
    west.kill("federation").await.unwrap();
    west.kill("web").await.unwrap();
    west.restart("web").await.unwrap();
    until("the restarted sidecar to answer", async || {
        let answer = curl(proxy, &[WEB]).await;
        assert!(!answer.body.starts_with("web-in-west"), "{answer:?}");
        (answer.status == 403).then_some(())
    })
    .await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn default_access_deny_refuses_whom_no_policy_allows() {
    let world = World::new().await;
    let mut east = world.cluster_with("east", json!({}), json!({ "defaultAccess": "deny" })).await;
    let web = app::http("web-in-east").await;
    serve(&mut east, "web", "http", "http", web.address).await;
    let proxy = start_caller(&mut east).await;
    until("the caller to be denied", async || (curl(proxy, &[WEB]).await.status == 403).then_some(())).await;
    east.write_resource("access.yaml", &access("frontend")).unwrap();
    curl_until(proxy, WEB, "web-in-east").await;
    east.stop().await;
}

fn route(version: &str) -> String {
    let import = "group: multicluster.x-k8s.io, kind: ServiceImport";
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
         parentRefs: [{{{import}, name: web}}]\n  rules:\n  \
         - matches: [{{headers: [{{name: x-version, value: {version}}}]}}]\n    \
           backendRefs: [{{{import}, name: canary, port: 80}}]\n  \
         - backendRefs: [{{{import}, name: web, port: 80}}]\n"
    )
}

#[tokio::test]
async fn a_route_sends_some_requests_to_another_service_and_its_edit_takes_effect_at_once() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let (web, canary) = (app::http("web-in-west").await, app::http("canary-in-west").await);
    serve(&mut west, "web", "http", "http", web.address).await;
    serve(&mut west, "canary", "http", "http", canary.address).await;
    link(&west, &east).await;
    for service in ["web.shop", "canary.shop"] {
        west.operator(&["export", service]).await.unwrap();
    }
    east.write_resource("route.yaml", &route("next")).unwrap();
    let proxy = start_caller(&mut east).await;
    curl_until(proxy, WEB, "web-in-west").await;
    let versioned = async |version: &str, wanted: &str| {
        let header = format!("x-version: {version}");
        until("the route to be in force", async || {
            curl(proxy, &["-H", &header, WEB]).await.body.starts_with(wanted).then_some(())
        })
        .await;
    };
    versioned("next", "canary-in-west").await;
    assert!(curl(proxy, &[WEB]).await.body.starts_with("web-in-west"));
    east.write_resource("route.yaml", &route("beta")).unwrap();
    versioned("beta", "canary-in-west").await;
    assert!(curl(proxy, &["-H", "x-version: next", WEB]).await.body.starts_with("web-in-west"));

    // A filter that is not known would let requests pass unchanged, so the route is refused, and the last good one stays.
    let wrong = route("gamma").replace("    backendRefs", "    filters: [{type: Polish}]\n    backendRefs");
    east.write_resource("route.yaml", &wrong).unwrap();
    let problem = until("the problem to be reported", async || {
        east.status().await.ok()?["problems"].as_array()?.first().cloned()
    })
    .await;
    let reason = problem["reason"].as_str().unwrap();
    assert!(reason.contains("HTTPRoute shop/web: spec.rules[0].filters[0]"), "{reason}");
    versioned("beta", "canary-in-west").await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn a_producers_route_travels_with_its_export_and_a_consumers_own_comes_before_it() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let (web, canary) = (app::http("web-in-west").await, app::http("canary-in-west").await);
    serve(&mut west, "web", "http", "http", web.address).await;
    serve(&mut west, "canary", "http", "http", canary.address).await;
    west.write_resource("route.yaml", &route("next")).unwrap();
    link(&west, &east).await;
    // The route leads to a service that is not exported, and stays at home.
    west.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut east).await;
    curl_until(proxy, WEB, "web-in-west").await;
    let versioned = async |version: &str| {
        let header = format!("x-version: {version}");
        curl(proxy, &["-H", "tombolo-explain: 1", "-H", &header, WEB]).await
    };
    let answer = versioned("next").await;
    assert!(answer.body.starts_with("web-in-west") && answer.header("tombolo-route").is_none(), "{answer:?}");

    west.operator(&["export", "canary.shop"]).await.unwrap();
    let arrives = async |version: &str, name: &str, by: &str| {
        until(&format!("{version} to go to {name} by {by}"), async || {
            let answer = versioned(version).await;
            (answer.body.starts_with(name) && answer.header("tombolo-route") == Some(by)).then_some(())
        })
        .await;
    };
    arrives("next", "canary-in-west", "HTTPRoute shop/web of cluster west, rule 0").await;
    arrives("other", "web-in-west", "HTTPRoute shop/web of cluster west, rule 1").await;

    east.write_resource("route.yaml", &route("beta")).unwrap();
    arrives("beta", "canary-in-west", "HTTPRoute shop/web, rule 0").await;
    arrives("next", "web-in-west", "HTTPRoute shop/web, rule 1").await;
    std::fs::remove_file(east.dir().join("cluster/route.yaml")).unwrap();
    arrives("next", "canary-in-west", "HTTPRoute shop/web of cluster west, rule 0").await;

    // An edit in the producer's cluster is in force in the consumer's.
    west.write_resource("route.yaml", &route("gamma")).unwrap();
    arrives("gamma", "canary-in-west", "HTTPRoute shop/web of cluster west, rule 0").await;
    west.operator(&["unexport", "canary.shop"]).await.unwrap();
    until("the route to be taken back", async || {
        let answer = versioned("gamma").await;
        (answer.body.starts_with("web-in-west") && answer.header("tombolo-route").is_none()).then_some(())
    })
    .await;
    tokio::join!(east.stop(), west.stop());
}
