//! A real API server takes what the chart renders, with field validation, and admits its pods where the strictest level of
//! pod security is enforced. There is no node, so nothing runs.

use std::path::Path;

use serde_json::{Value, json};
use tombolo_testbed::kubernetes::{ControlPlane, Programs};

use crate::support::{World, skip, tools};
use crate::{cases, chart, name, objects, program, render};

/// Objects as one text for `kubectl`.
fn text(objects: &[Value]) -> String {
    objects.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n")
}

async fn namespace(plane: &ControlPlane, name: &str) {
    let labels = json!({ "pod-security.kubernetes.io/enforce": "restricted" });
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } });
    plane.apply(&namespace.to_string()).await.unwrap();
}

/// The pod that a Deployment's controller would make.
fn pod(deployment: &Value, namespace: &str) -> Value {
    let template = &deployment["spec"]["template"];
    let mut metadata = template["metadata"].clone();
    metadata["name"] = json!(name(deployment));
    metadata["namespace"] = json!(namespace);
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"] })
}

async fn create(plane: &ControlPlane, object: &Value) -> anyhow::Result<()> {
    plane.kubectl_with(&["create", "--validate=strict", "-f", "-"], &object.to_string()).await.map(drop)
}

async fn install(plane: &ControlPlane, program: &Path, case: &str, values: &Path) -> Vec<Value> {
    let there = format!("tombolo-{case}");
    namespace(plane, &there).await;
    let mut rendered = objects(&render(program, &there, values));
    // Of an operator that this API server does not have.
    rendered.retain(|object| object["kind"] != "ServiceMonitor");
    let apply = ["apply", "--server-side", "--force-conflicts", "--validate=strict", "-f", "-"];
    plane.kubectl_with(&apply, &text(&rendered)).await.unwrap_or_else(|error| panic!("{case}: {error}"));
    rendered
}

#[tokio::test]
async fn an_api_server_takes_it_and_admits_its_pods_as_restricted() {
    let Some(program) = program() else { return };
    let world = World::new().await;
    let programs = match Programs::find(&tools().join("kubernetes")) {
        Ok(programs) => programs,
        Err(missing) => return skip(&missing),
    };
    let plane = ControlPlane::start(programs, &world.directory.path().join("api")).await.unwrap();
    plane.apply(&std::fs::read_to_string(chart().join("crds/definitions.yaml")).unwrap()).await.unwrap();
    for (case, values) in cases() {
        let rendered = install(&plane, &program, &case, &values).await;
        let deployments: Vec<&Value> = rendered.iter().filter(|object| object["kind"] == "Deployment").collect();
        assert_eq!(deployments.len(), 2, "{case}");
        for deployment in deployments {
            let pod = pod(deployment, &format!("tombolo-{case}"));
            create(&plane, &pod).await.unwrap_or_else(|error| panic!("{case}: {error}"));
            // That it was admitted says something: with one thing less it isn't.
            let mut lax = pod.clone();
            lax["metadata"]["name"] = json!("lax");
            lax["spec"]["securityContext"]["runAsNonRoot"] = json!(false);
            let refused = create(&plane, &lax).await.unwrap_err().to_string();
            assert!(refused.contains("violates PodSecurity \"restricted"), "{case}: {refused}");
        }
        let (there, gateways) =
            (format!("tombolo-{case}"), format!("--as=system:serviceaccount:tombolo-{case}:gateway"));
        for asked in [["list", "services"], ["get", "secrets"], ["get", "configmaps"], ["create", "leases"]] {
            let answer = plane.kubectl(&["auth", "can-i", asked[0], asked[1], "-n", &there, &gateways]).await;
            let refused = answer.expect_err("gateways have no rights").to_string();
            assert!(refused.starts_with("kubectl auth can-i"), "{refused}");
        }
        let federation = format!("--as=system:serviceaccount:tombolo-{case}:federation");
        let answer = plane.kubectl(&["auth", "can-i", "list", "services", "-A", &federation]).await;
        assert!(answer.is_ok_and(|answer| answer == "yes"), "{case}: the account is not bound to its role");
    }
}
