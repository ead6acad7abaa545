//! Sidecars that the admission webhook gives to Pods, asked by a real API server with its own pod security in force.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tombolo_testbed::Cluster;
use tombolo_testbed::kubernetes::ControlPlane;

use crate::control_plane;
use crate::support::{World, binary, until};

const INJECTION: &str = include_str!("../../../deploy/kubernetes/injection.yaml");

/// A federation with injection; the API server reaches its webhook by a URL, as there is no network of Services here.
async fn west(world: &World, plane: &ControlPlane) -> (Cluster, SocketAddr) {
    let kubeconfig = plane.kubeconfig_of_account("tombolo-system", "federation").await.unwrap();
    let federation = json!({
        "source": { "kubernetes": { "kubeconfig": kubeconfig } },
        "injection": {
            "listen": "127.0.0.1:0",
            "image": "registry.example/tombolo:1",
            "federation": "tombolo-federation.tombolo-system.svc:15010",
            "serverNames": ["localhost"],
            "clusterDns": ["10.96.0.10"],
            "clusterDomain": "cluster.local",
        },
    });
    // The configuration comes first, as an installation's does; without roots nobody is asked yet.
    plane.apply(INJECTION).await.unwrap();
    let mut west = Cluster::new(&binary(), "west", world.directory.path(), json!({})).unwrap();
    let address = west.start_federation(federation).await.unwrap().address("webhook").unwrap();
    for (configuration, webhook, path) in [
        ("mutatingwebhookconfiguration/tombolo-injection", "inject.tombolo.dev", "inject"),
        ("validatingwebhookconfiguration/tombolo-validation", "validate.tombolo.dev", "validate"),
    ] {
        let client = json!({ "url": format!("https://localhost:{}/{path}", address.port()), "service": null });
        let patch = json!({ "webhooks": [{ "name": webhook, "clientConfig": client }] }).to_string();
        plane.kubectl(&["patch", configuration, "--type=strategic", "-p", &patch]).await.unwrap();
    }
    (west, address)
}

/// The certificates in `caBundle` of both, as soon as there are `count` of them.
async fn roots(plane: &ControlPlane, count: usize) {
    for name in ["mutatingwebhookconfiguration/tombolo-injection", "validatingwebhookconfiguration/tombolo-validation"]
    {
        roots_of(plane, name, count).await;
    }
}

async fn roots_of(plane: &ControlPlane, name: &str, count: usize) {
    let jsonpath = "-o=jsonpath={.webhooks[0].clientConfig.caBundle}";
    until(&format!("{count} roots in caBundle"), async || {
        let text = plane.kubectl(&["get", name, jsonpath]).await.ok()?;
        let pem = String::from_utf8(data_encoding::BASE64.decode(text.as_bytes()).ok()?).ok()?;
        (pem.matches("BEGIN CERTIFICATE").count() == count).then_some(())
    })
    .await;
}

async fn namespace(plane: &ControlPlane, name: &str, labels: &[(&str, &str)]) {
    let labels: Value = labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    let account =
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "default", "namespace": name } });
    let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } });
    plane.apply(&format!("{object}\n---\n{account}")).await.unwrap();
}

/// A Pod that the restricted level takes.
fn pod(namespace: &str, name: &str, metadata: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": "web" } },
        "spec": {
            "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": "app",
                "image": "none",
                "ports": [{ "name": "web", "containerPort": 8080 }],
                "livenessProbe": { "httpGet": { "path": "/healthz", "port": "web" } },
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
            }],
        },
    });
    for (part, fields) in metadata.as_object().into_iter().flatten() {
        for (key, value) in fields.as_object().unwrap() {
            pod["metadata"][part][key] = value.clone();
        }
    }
    pod
}

/// Creates a Pod, and reads it back.
async fn created(plane: &ControlPlane, pod: &Value) -> anyhow::Result<Value> {
    plane.kubectl_with(&["create", "-f", "-"], &pod.to_string()).await?;
    let text = |field: &str| pod["metadata"][field].as_str().unwrap();
    plane.get("pod", text("namespace"), text("name")).await
}

fn init_containers(pod: &Value) -> Vec<&str> {
    let containers = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    containers.filter_map(|container| container["name"].as_str()).collect()
}

fn config(pod: &Value) -> Value {
    serde_json::from_str(pod["metadata"]["annotations"]["tombolo.dev/injected"].as_str().unwrap()).unwrap()
}

#[tokio::test]
async fn pods_get_the_sidecar_that_their_namespace_allows() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    const INJECT: (&str, &str) = ("tombolo.dev/inject", "enabled");
    const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
    namespace(&plane, "open", &[INJECT]).await;
    namespace(&plane, "base", &[INJECT, (ENFORCE, "baseline")]).await;
    namespace(&plane, "tight", &[INJECT, (ENFORCE, "restricted")]).await;
    namespace(&plane, "plain", &[]).await;
    let (mut west, _) = west(&world, &plane).await;
    roots(&plane, 1).await;
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "web", "namespace": "open" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "name": "http", "port": 80, "targetPort": "web" }] },
    });
    plane.apply(&service.to_string()).await.unwrap();

    // The API server takes up a changed configuration within a moment.
    let mut tries = 0;
    let open = until("a Pod to be injected", async || {
        tries += 1;
        let pod = created(&plane, &pod("open", &format!("web-{tries}"), &json!({}))).await.unwrap();
        (!init_containers(&pod).is_empty()).then_some(pod)
    })
    .await;
    assert_eq!(init_containers(&open), ["tombolo-capture", "tombolo-sidecar"]);
    let served = json!([{ "service": "open/web", "port": 80, "app": "127.0.0.1:8080", "protocol": "http" }]);
    assert_eq!(config(&open)["services"], served);
    let bundle =
        until("the trust bundle in the namespace", async || plane.get("configmap", "open", "tombolo-ca").await.ok());
    let own = std::fs::read_to_string(std::path::Path::new(&west.state()).join("ca.pem")).unwrap();
    assert_eq!(bundle.await["data"]["ca.pem"], own);

    // What enforces pod security admits what came of it, the sidecar as a DNS server of the Pod included.
    for namespace in ["base", "tight"] {
        let pod = created(&plane, &pod(namespace, "web", &json!({}))).await.unwrap();
        assert_eq!(init_containers(&pod), ["tombolo-sidecar"], "{namespace}");
        assert_eq!(pod["spec"]["dnsConfig"]["nameservers"], json!(["127.0.0.1"]), "{namespace}");
        assert_eq!(config(&pod)["dns"]["upstreams"], json!(["10.96.0.10:53"]));
    }
    let forced = pod("tight", "forced", &json!({ "annotations": { "tombolo.dev/capture": "init" } }));
    let refused = created(&plane, &forced).await.unwrap_err().to_string();
    assert!(refused.contains("tombolo can't give this Pod a sidecar") && refused.contains("NET_ADMIN"), "{refused}");

    // Strict inbound asks the sidecar in the place of the application.
    let strict = pod("open", "strict", &json!({ "annotations": { "tombolo.dev/plaintext": "strict" } }));
    let strict = created(&plane, &strict).await.unwrap();
    assert_eq!(strict["spec"]["containers"][0]["livenessProbe"]["httpGet"]["port"], 15022);
    let out = pod("open", "out", &json!({ "labels": { "tombolo.dev/inject": "disabled" } }));
    for pod in [out, pod("plain", "web", &json!({}))] {
        assert_eq!(init_containers(&created(&plane, &pod).await.unwrap()), [""; 0]);
    }

    // A policy that could not be read is refused by its author's own kubectl.
    let policy = json!({
        "apiVersion": "tombolo.dev/v1alpha1",
        "kind": "AccessPolicy",
        "metadata": { "name": "web", "namespace": "open" },
        "spec": { "targetRefs": [{ "kind": "Service", "name": "web" }], "rules": [{ "from": [{ "serviceAccounts": ["shop/../frontend"] }] }] },
    });
    until("a policy to be refused with its reason", async || {
        let applied = plane.kubectl_with(&["create", "-f", "-"], &policy.to_string()).await;
        match applied {
            Err(error) => error.to_string().contains("validate.tombolo.dev").then_some(()),
            Ok(_) => {
                plane.kubectl(&["delete", "accesspolicy", "web", "-n", "open"]).await.unwrap();
                None
            }
        }
    })
    .await;

    // A new root is known to the API server before it issues anything.
    west.operator(&["trust", "add-root"]).await.unwrap();
    roots(&plane, 2).await;
    let again = created(&plane, &pod("tight", "again", &json!({}))).await.unwrap();
    assert_eq!(init_containers(&again), ["tombolo-sidecar"]);

    // Without a federation Pods start as they are.
    west.stop().await;
    let alone = created(&plane, &pod("open", "alone", &json!({}))).await.unwrap();
    assert_eq!(init_containers(&alone), [""; 0]);
    plane.stop().await;
}
