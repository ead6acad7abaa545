//! Clusters whose federation reads a real API server, beside some that read a directory.

#![allow(clippy::unwrap_used)]

mod identity;
mod imports;
mod injection;
mod leader;
mod peering;
mod policies;
mod replicas;
mod source;
mod store;
#[path = "../support/mod.rs"]
mod support;
mod unmeshed;

use std::net::SocketAddr;

use serde_json::{Value, json};
use support::{World, binary, skip, tools, until};
use tombolo_testbed::kubernetes::{ControlPlane, Programs};
use tombolo_testbed::{Cluster, Sidecar};

const WEB: &str = "http://web.shop.svc.clusterset.local/";
const RBAC: &str = include_str!("../../../deploy/kubernetes/rbac.yaml");

/// A control plane with everything that an operator installs in it; `None` where its programs are missing.
async fn control_plane(world: &World) -> Option<ControlPlane> {
    control_plane_of(world, "api", |crds| crds).await
}

/// The same with a name of its own, and with the definitions changed.
async fn control_plane_of(world: &World, name: &str, change: impl FnOnce(String) -> String) -> Option<ControlPlane> {
    let programs = match Programs::find(&tools().join("kubernetes")) {
        Ok(programs) => programs,
        Err(missing) => {
            skip(&missing);
            return None;
        }
    };
    let plane = ControlPlane::start(programs, &world.directory.path().join(name)).await.unwrap();
    let crds = change(binary().run(&["crds"]).await.unwrap());
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
    start_server(cluster, "web", app).await;
}

/// The sidecar `<name>-1`, which delivers `shop/<name>`.
async fn start_server(cluster: &mut Cluster, name: &str, app: SocketAddr) {
    let service = json!({
        "service": format!("shop/{name}"),
        "port": 80,
        "app": app,
        "protocol": "http",
        "health": { "tcp": {}, "interval": "200ms", "timeout": "1s" },
    });
    let (instance, workload) = (format!("{name}-1"), format!("shop/{name}"));
    let config = json!({ "services": [service] });
    cluster.start_sidecar(Sidecar { name: &instance, workload: &workload, config }).await.unwrap();
}

/// Declares `shop/<name>` like [`web`], and starts what serves it.
async fn serve_object(cluster: &mut Cluster, plane: &ControlPlane, name: &str, app: SocketAddr) {
    plane.apply(&web("http", true).replace("web", name)).await.unwrap();
    start_server(cluster, name, app).await;
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
