//! `tombolo explain`, asked of running sidecars in whole clusters.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;

use serde_json::{Value, json};
use support::{World, app, binary, curl, curl_until, get, link, serve, until};
use tombolo_testbed::Sidecar;

const WEB: &str = "http://web.shop.svc.clusterset.local/cart";

async fn explain(admin: SocketAddr, arguments: &[&str]) -> anyhow::Result<String> {
    let admin = admin.to_string();
    let mut all = vec!["explain", "--admin", &admin];
    all.extend_from_slice(arguments);
    binary().run(&all).await
}

async fn explained(admin: SocketAddr, arguments: &[&str]) -> Value {
    // A sidecar that has just started knows nothing yet, and says so.
    let arguments = [&["-o", "json"], arguments].concat();
    let text = until("an answer", async || explain(admin, &arguments).await.ok()).await;
    serde_json::from_str(&text).unwrap()
}

/// Asks until the request would go to this cluster.
async fn explained_to(admin: SocketAddr, cluster: &str) -> Value {
    until(&format!("{WEB} to go to {cluster}"), async || {
        let answer = explained(admin, &[WEB]).await;
        (answer["outcome"]["cluster"] == cluster).then_some(answer)
    })
    .await
}

/// What is said of the one endpoint in that cluster.
fn endpoint<'a>(answer: &'a Value, cluster: &str) -> &'a Value {
    answer["endpoints"].as_array().unwrap().iter().find(|row| row["cluster"] == cluster).unwrap()
}

/// What the sidecar counts of requests.
async fn counted(admin: SocketAddr) -> Vec<String> {
    let metrics = get(admin, "/metrics").await;
    let of_requests = |line: &&str| line.starts_with("tombolo_outbound") || line.starts_with("tombolo_refusals");
    metrics.lines().filter(of_requests).map(str::to_owned).collect()
}

const PINNED: &str = "apiVersion: tombolo.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  \
     targetRefs: [{kind: Service, name: web}]\n  clusters: [{name: west}]\n  failover: none\n";
const OPERATORS: &str = "apiVersion: tombolo.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  \
     targetRefs: [{kind: Service, name: web}]\n  rules:\n  - from: [{serviceAccounts: [operator]}]\n";

#[tokio::test]
async fn a_request_is_explained_before_and_after_its_endpoint_dies_and_a_policy_changes() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let near = app::http("web-in-east").await;
    let far = app::http("web-in-west").await;
    serve(&mut east, "web", "http", "http", near.address).await;
    serve(&mut west, "web", "http", "http", far.address).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config: json!({}) };
    let frontend = east.start_sidecar(sidecar).await.unwrap();
    let (proxy, admin) = (frontend.address("outbound").unwrap(), frontend.address("admin").unwrap());

    // Asked before any request: the service is one that the sidecar has not used yet.
    let before = counted(admin).await;
    let answer = until("both clusters to be known", async || {
        let answer = explained(admin, &[WEB, "--from", "shop/frontend"]).await;
        (answer["clusters"].as_array()?.len() == 2).then_some(answer)
    })
    .await;
    let answer = if answer["outcome"]["cluster"] == "east" { answer } else { explained_to(admin, "east").await };
    assert_eq!(answer["request"]["from"], "spiffe://east.tombolo/ns/shop/sa/frontend");
    assert_eq!(endpoint(&answer, "east")["taken"], true, "{answer:#}");
    let carried = "its cluster gets nothing: the clusters before it carry everything";
    assert_eq!(endpoint(&answer, "west")["reason"], carried, "{answer:#}");
    assert_eq!(answer["access"]["allowed"], Value::Null, "{answer:#}");
    assert_eq!(counted(admin).await, before, "nothing is counted");
    let state: Value = serde_json::from_str(&get(admin, "/state").await).unwrap();
    assert_eq!(state["outbound"]["routes"], json!([]), "nothing is kept");
    let table = explain(admin, &[WEB]).await.unwrap();
    assert!(table.contains("in cluster east") && table.contains(carried), "{table}");
    curl_until(proxy, WEB, "web-in-east").await;

    drop(near);
    let answer = explained_to(admin, "west").await;
    assert_eq!(endpoint(&answer, "east")["reason"], "not ready: its own side says so, or no sidecar delivers it");
    curl_until(proxy, WEB, "web-in-west").await;

    east.write_resource("traffic.yaml", PINNED).unwrap();
    let kept = "the service's TrafficPolicy keeps its requests out of this cluster";
    let answer = until("the policy to be told", async || {
        let answer = explained(admin, &[WEB]).await;
        (endpoint(&answer, "east")["reason"] == kept).then_some(answer)
    })
    .await;
    assert_eq!(answer["trafficPolicies"][0]["resource"], "TrafficPolicy shop/web", "{answer:#}");
    // A request's own answer says the same.
    let answered = curl(proxy, &["-H", "tombolo-explain: 1", WEB]).await;
    assert_eq!(answered.header("tombolo-policy"), Some("TrafficPolicy shop/web"), "{answered:?}");
    assert!(answered.header("tombolo-passed-over").unwrap().ends_with(kept), "{answered:?}");

    let unknown = explain(admin, &["http://nothing.shop.svc.clusterset.local/"]).await.unwrap_err().to_string();
    assert!(
        unknown.contains("no cluster of the clusterset exports") && unknown.contains("tombolo status"),
        "{unknown}"
    );
    let foreign = explain(admin, &["http://example.com/"]).await.unwrap_err().to_string();
    assert!(foreign.contains("svc.clusterset.local"), "{foreign}");
    let other = explain(admin, &[WEB, "--from", "shop/api"]).await.unwrap_err().to_string();
    assert!(other.contains("this sidecar speaks for spiffe://east.tombolo/ns/shop/sa/frontend"), "{other}");
    let gateway: Value = serde_json::from_slice(&std::fs::read(east.dir().join("gw/gateway.json")).unwrap()).unwrap();
    let gateway: SocketAddr = gateway["addresses"]["admin"].as_str().unwrap().parse().unwrap();
    let wrong = explain(gateway, &[WEB]).await.unwrap_err().to_string();
    assert!(wrong.contains("is no sidecar") && wrong.contains("--admin"), "{wrong}");
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn the_sidecar_that_delivers_a_service_says_who_may_call() {
    let world = World::new().await;
    let mut east = world.cluster("east").await;
    let web = app::http("web-in-east").await;
    serve(&mut east, "web", "http", "http", web.address).await;
    let announced: Value =
        serde_json::from_slice(&std::fs::read(east.dir().join("web/sidecar.json")).unwrap()).unwrap();
    let admin: SocketAddr = announced["addresses"]["admin"].as_str().unwrap().parse().unwrap();
    let access = async |allowed: bool| {
        until("the policies to be told", async || {
            let answer = explained(admin, &[WEB, "--from", "shop/frontend"]).await;
            assert_eq!(answer["outcome"], Value::Null);
            (answer["access"]["allowed"] == allowed).then(|| answer["access"]["reason"].as_str().unwrap().to_owned())
        })
        .await
    };
    assert_eq!(access(true).await, "allowed: no AccessPolicy selects the service");
    east.write_resource("access.yaml", OPERATORS).unwrap();
    let denied = "denied: AccessPolicy shop/web selects the service, and no rule of an allowing policy matches";
    assert_eq!(access(false).await, denied);
    let table = explain(admin, &[WEB, "--from", "shop/frontend"]).await.unwrap();
    assert!(table.contains(&format!("may not call: {denied}")), "{table}");
    let allowed = explained(admin, &[WEB, "--from", "shop/operator"]).await;
    assert_eq!(allowed["access"]["reason"], "allowed by AccessPolicy shop/web, rule 0");
    let stranger = explained_error(admin, &[WEB, "--from", "spiffe://nowhere/ns/a/sa/b"]).await;
    assert!(stranger.contains("nowhere is not trusted here"), "{stranger}");
    east.stop().await;
}

async fn explained_error(admin: SocketAddr, arguments: &[&str]) -> String {
    explain(admin, arguments).await.unwrap_err().to_string()
}
