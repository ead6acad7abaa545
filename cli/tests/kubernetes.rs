//! A cluster whose federation reads a real API server, beside one that reads a directory.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use support::{World, app, binary, curl, curl_until, link, skip, start_caller, tools, until};
use tombolo_testbed::kubernetes::{ControlPlane, Programs};
use tombolo_testbed::{Cluster, Sidecar};

const WEB: &str = "http://web.shop.svc.clusterset.local/";
const RBAC: &str = include_str!("../../deploy/kubernetes/rbac.yaml");

/// A control plane with everything that an operator installs in it; `None` where its programs are missing.
async fn control_plane(world: &World) -> Option<ControlPlane> {
    let programs = match Programs::find(&tools().join("kubernetes")) {
        Ok(programs) => programs,
        Err(missing) => {
            skip(&missing);
            return None;
        }
    };
    let plane = ControlPlane::start(programs, &world.directory.path().join("api")).await.unwrap();
    let crds = binary().run(&["crds"]).await.unwrap();
    plane.apply(&format!("{crds}\n---\n{RBAC}")).await.unwrap();
    plane.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=20s"]).await.unwrap();
    plane.kubectl(&["create", "namespace", "shop"]).await.unwrap();
    Some(plane)
}

/// A cluster of that control plane: its federation has the rights of its service account, and no others.
async fn cluster(world: &World, plane: &ControlPlane, name: &str) -> Cluster {
    let kubeconfig = plane.kubeconfig_of_account("tombolo-system", "federation").await.unwrap();
    let source = json!({ "kubernetes": { "kubeconfig": kubeconfig } });
    world.cluster_with(name, json!({}), json!({ "source": source })).await
}

/// `shop/web` with one port, served by service account `web`, and its one endpoint `web-1`.
fn web(port: &str, ready: bool) -> String {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "web",
            "namespace": "shop",
            "annotations": { "tombolo.dev/service-accounts": "web" },
        },
        "spec": { "ports": [{ "name": port, "port": 80 }] },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": "web-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4",
        "endpoints": [{
            "addresses": ["10.1.0.7"],
            "conditions": { "ready": ready },
            "targetRef": { "kind": "Pod", "namespace": "shop", "name": "web-1" },
        }],
        "ports": [{ "name": port, "port": 8080 }],
    });
    format!("{service}\n---\n{slice}\n")
}

fn export(service: &str) -> String {
    json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1",
        "kind": "ServiceExport",
        "metadata": { "name": service, "namespace": "shop" },
    })
    .to_string()
}

async fn start_web(cluster: &mut Cluster, app: SocketAddr) {
    let service = json!({
        "service": "shop/web",
        "port": 80,
        "app": app,
        "protocol": "http",
        "health": { "tcp": {}, "interval": "200ms", "timeout": "1s" },
    });
    let sidecar = Sidecar { name: "web-1", workload: "shop/web", config: json!({ "services": [service] }) };
    cluster.start_sidecar(sidecar).await.unwrap();
}

async fn refused_as(proxy: SocketAddr, reason: &str) {
    until(&format!("{WEB} to be refused as {reason}"), async || {
        (curl(proxy, &[WEB]).await.header("tombolo-refusal") == Some(reason)).then_some(())
    })
    .await;
}

/// Waits until a problem of the source contains `text`, or until none does.
async fn problem(cluster: &Cluster, text: &str, there: bool) -> Value {
    until(&format!("a problem about {text:?} to be there: {there}"), async || {
        let status = cluster.status().await.ok()?;
        let about = |problem: &&Value| problem.to_string().contains(text);
        let found = status["problems"].as_array()?.iter().find(about).cloned();
        (found.is_some() == there).then(|| found.unwrap_or_default())
    })
    .await
}

/// Waits until `cluster` knows of `count` ready endpoints of `shop/web` in another cluster.
async fn ready_elsewhere(cluster: &Cluster, count: u64) {
    until(&format!("{count} ready endpoints in another cluster"), async || {
        let status = cluster.status().await.ok()?;
        let service = status["services"].as_array()?.iter().find(|service| service["service"] == "shop/web")?.clone();
        let share = service["shares"].as_array()?.iter().find(|share| share["local"] == false)?.clone();
        (share["ready"] == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_an_api_server_exports_is_called_from_a_directory_cluster_also_while_that_server_is_away() {
    let world = World::new().await;
    let Some(mut plane) = control_plane(&world).await else { return };
    let mut west = cluster(&world, &plane, "west").await;
    let mut east = world.cluster("east").await;
    let app = app::http("web-in-west").await;
    plane.apply(&web("http", true)).await.unwrap();
    start_web(&mut west, app.address).await;
    link(&west, &east).await;
    let proxy = start_caller(&mut east).await;
    refused_as(proxy, "unknown-service").await;

    // Exports are objects, written by whoever may write them there.
    let said = west.operator(&["export", "web.shop"]).await.unwrap_err().to_string();
    assert!(said.contains("kubectl"), "{said}");
    plane.apply(&export("web")).await.unwrap();
    let answer = curl_until(proxy, WEB, "web-in-west").await;
    assert_eq!(answer.header("tombolo-server-id"), Some("spiffe://west.tombolo/ns/shop/sa/web"));

    // What the API server says of an endpoint reaches the other cluster, however well its sidecar is.
    plane.apply(&web("http", false)).await.unwrap();
    ready_elsewhere(&east, 0).await;
    plane.apply(&web("http", true)).await.unwrap();
    ready_elsewhere(&east, 1).await;

    // An export that can't be is a problem with the object's name.
    plane.apply(&export("nothing")).await.unwrap();
    let found = problem(&west, "NoService", true).await;
    assert_eq!((&found["file"], &found["line"]), (&json!("ServiceExport/shop/nothing"), &json!(0)));

    plane.kill_apiserver().await.unwrap();
    problem(&west, "what was read last stays in force", true).await;
    for _ in 0..20 {
        assert_eq!(curl(proxy, &[WEB]).await.status, 200);
    }
    // A federation that starts meanwhile waits, and callers go on with what they were told.
    west.stop_one("federation", Duration::from_secs(3)).await.unwrap();
    assert_eq!(curl(proxy, &[WEB]).await.status, 200);
    let (restarted, started) = tokio::join!(west.restart("federation"), plane.start_apiserver());
    restarted.unwrap();
    started.unwrap();
    curl_until(proxy, WEB, "web-in-west").await;

    // The watches of a server that came back are as good as new.
    plane.kill_apiserver().await.unwrap();
    problem(&west, "what was read last stays in force", true).await;
    plane.start_apiserver().await.unwrap();
    problem(&west, "what was read last stays in force", false).await;
    plane.kubectl(&["delete", "serviceexport", "web", "-n", "shop"]).await.unwrap();
    refused_as(proxy, "unknown-service").await;
    tokio::join!(east.stop(), west.stop(), plane.stop());
}
