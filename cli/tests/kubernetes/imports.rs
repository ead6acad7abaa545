//! What is written to an API server: imports, what is derived from them, and the conditions of exports. The cases are
//! those of KEP-1645.

use serde_json::{Value, json};
use tombolo_testbed::Cluster;
use tombolo_testbed::kubernetes::ControlPlane;

use crate::support::app;
use crate::support::{World, link, serve, until};
use crate::{cluster, control_plane, control_plane_of, export, problem, start_web, web};

const IMPORT: &str = "serviceimport";

/// Waits until the object satisfies `test`.
async fn object(plane: &ControlPlane, kind: &str, name: &str, what: &str, test: impl Fn(&Value) -> bool) -> Value {
    until(&format!("{kind} {name}: {what}"), async || {
        let found = plane.get(kind, "shop", name).await.ok()?;
        if !test(&found) {
            return None;
        }
        Some(found)
    })
    .await
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<(&'a str, &'a str)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|one| one["type"] == kind)?;
    Some((found["status"].as_str()?, found["reason"].as_str()?))
}

fn clusters(import: &Value) -> Vec<&str> {
    let clusters = import["status"]["clusters"].as_array().into_iter().flatten();
    clusters.filter_map(|one| one["cluster"].as_str()).collect()
}

/// What is derived from the import of `shop/<name>`.
async fn derived(plane: &ControlPlane, kind: &str, name: &str) -> Vec<Value> {
    let selector = format!("multicluster.kubernetes.io/service-name={name}");
    let text = plane.kubectl(&["get", kind, "-n", "shop", "-l", &selector, "-o", "json"]).await.unwrap();
    let list: Value = serde_json::from_str(&text).unwrap();
    list["items"].as_array().cloned().unwrap_or_default()
}

/// Waits until nothing is derived from the import of `shop/<name>`, and the import is gone.
async fn gone(plane: &ControlPlane, name: &str) {
    until(&format!("everything of {name} to be gone"), async || {
        let left = derived(plane, "services,endpointslices", name).await.len();
        (left == 0 && plane.get(IMPORT, "shop", name).await.is_err()).then_some(())
    })
    .await;
}

/// A Service of the directory cluster, exported.
async fn declare(east: &Cluster, namespace: &str, name: &str, spec: Value) {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "annotations": { "tombolo.dev/service-accounts": name },
        },
        "spec": spec,
    });
    let export = json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1",
        "kind": "ServiceExport",
        "metadata": { "name": name, "namespace": namespace },
    });
    east.write_resource(&format!("{namespace}-{name}.yaml"), &format!("{service}\n---\n{export}\n")).unwrap();
}

#[tokio::test]
async fn imports_are_written_as_the_kep_says_repaired_and_removed_without_a_trace() {
    let world = World::new().await;
    let Some(mut plane) = control_plane(&world).await else { return };
    plane.start_controllers().unwrap();
    let mut west = cluster(&world, &plane, "west").await;
    let mut east = world.cluster("east").await;
    let ports = json!([{ "name": "http", "port": 80 }, { "name": "dns", "port": 53, "protocol": "UDP" }]);
    declare(&east, "shop", "web", json!({ "ports": ports, "sessionAffinity": "ClientIP" })).await;
    declare(&east, "later", "web", json!({ "ports": [{ "name": "http", "port": 80 }] })).await;
    link(&west, &east).await;

    // Where the namespace exists there is an import, with the address of the derived Service, ...
    let ready = |import: &Value| condition(import, "Ready") == Some(("True", "Ready"));
    let import = object(&plane, IMPORT, "web", "ready", ready).await;
    let spec = &import["spec"];
    assert_eq!((&spec["type"], &spec["sessionAffinity"]), (&json!("ClusterSetIP"), &json!("ClientIP")));
    let want = json!([
        { "name": "dns", "port": 53, "protocol": "UDP" },
        { "name": "http", "port": 80, "protocol": "TCP", "appProtocol": "http" },
    ]);
    assert_eq!((&spec["ports"], clusters(&import)), (&want, vec!["east"]));
    let services = derived(&plane, "services", "web").await;
    assert_eq!(services.len(), 1);
    assert_eq!(spec["ips"], services[0]["spec"]["clusterIPs"]);
    assert_eq!((&services[0]["spec"]["type"], &services[0]["spec"]["selector"]), (&json!("ClusterIP"), &Value::Null));
    // ... and one slice for each cluster, which holds no address of another network.
    let slices = until("the slice", async || {
        let slices = derived(&plane, "endpointslices", "web").await;
        (!slices.is_empty()).then_some(slices)
    })
    .await;
    let labels = &slices[0]["metadata"]["labels"];
    assert_eq!((slices.len(), &labels["multicluster.kubernetes.io/source-cluster"]), (1, &json!("east")));
    assert_eq!(labels["kubernetes.io/service-name"], services[0]["metadata"]["name"]);
    assert_eq!(labels["endpointslice.kubernetes.io/managed-by"], "tombolo.dev");
    assert_eq!(slices[0]["endpoints"].as_array().map(Vec::len).unwrap_or_default(), 0);
    // One field manager owns all of it.
    for object in [&import, &services[0], &slices[0]] {
        let text = plane
            .kubectl(&[
                "get",
                object["kind"].as_str().unwrap(),
                object["metadata"]["name"].as_str().unwrap(),
                "-n",
                "shop",
                "--show-managed-fields",
                "-o",
                "jsonpath={.metadata.managedFields[*].manager}",
            ])
            .await
            .unwrap();
        assert!(text.split(' ').all(|manager| manager == "tombolo-federation"), "{text}");
    }

    // Where it does not exist there is none, until it does; a namespace that goes takes all along.
    plane.kubectl(&["create", "namespace", "later"]).await.unwrap();
    until("the import in the new namespace", async || plane.get(IMPORT, "later", "web").await.ok()).await;
    plane.kubectl(&["delete", "namespace", "later", "--timeout=20s"]).await.unwrap();

    // What somebody changes or removes is as it was a moment later.
    let before = import["metadata"]["uid"].clone();
    let patch = r#"[{"op": "replace", "path": "/spec/ports", "value": [{"port": 1}]}]"#;
    plane.kubectl(&["patch", IMPORT, "web", "-n", "shop", "--type=json", "-p", patch]).await.unwrap();
    object(&plane, IMPORT, "web", "repaired", |import| import["spec"]["ports"] == want).await;
    plane.kubectl(&["delete", IMPORT, "web", "-n", "shop"]).await.unwrap();
    let again =
        object(&plane, IMPORT, "web", "written again", |import| ready(import) && import["metadata"]["uid"] != before)
            .await;
    until("what is derived to be owned by the new import", async || {
        let owned = derived(&plane, "services,endpointslices", "web").await;
        let uid = |one: &Value| one["metadata"]["ownerReferences"][0]["uid"] == again["metadata"]["uid"];
        (owned.len() == 2 && owned.iter().all(uid)).then_some(())
    })
    .await;

    // Somebody else's import is left alone, and `status` says so.
    let theirs = json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1",
        "kind": "ServiceImport",
        "metadata": { "name": "theirs", "namespace": "shop" },
        "spec": { "type": "ClusterSetIP", "ports": [{ "port": 7 }] },
    });
    plane.apply(&theirs.to_string()).await.unwrap();
    declare(&east, "shop", "theirs", json!({ "ports": [{ "name": "http", "port": 80 }] })).await;
    problem(&west, "ServiceImport/shop/theirs", true).await;
    assert_eq!(plane.get(IMPORT, "shop", "theirs").await.unwrap()["spec"], theirs["spec"]);

    std::fs::remove_file(east.dir().join("cluster/shop-web.yaml")).unwrap();
    gone(&plane, "web").await;
    tokio::join!(east.stop(), west.stop(), plane.stop());
}

#[tokio::test]
async fn exports_say_what_became_of_them_and_conflicts_are_told_on_all_and_cleared() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let mut west = cluster(&world, &plane, "west").await;
    let mut east = world.cluster("east").await;
    link(&west, &east).await;
    let condition_is = |kind: &'static str, status: &'static str, reason: &'static str| {
        move |object: &Value| condition(object, kind) == Some((status, reason))
    };

    // Valid: a Service that can be exported, none, and one that can't be.
    plane.apply(&export("nothing")).await.unwrap();
    let no_service = condition_is("Valid", "False", "NoService");
    let refused = object(&plane, "serviceexport", "nothing", "without a Service", no_service).await;
    assert_eq!(condition(&refused, "Ready"), Some(("False", "Failed")));
    let alias = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "alias", "namespace": "shop" },
        "spec": { "type": "ExternalName", "externalName": "example.org" },
    });
    plane.apply(&format!("{alias}\n---\n{}", export("alias"))).await.unwrap();
    let invalid = condition_is("Valid", "False", "InvalidServiceType");
    object(&plane, "serviceexport", "alias", "of a type that can't be exported", invalid).await;
    plane.apply(&format!("{}---\n{}", web("http", true), export("web"))).await.unwrap();
    let agreed = condition_is("Conflict", "False", "NoConflicts");
    let fine = object(&plane, "serviceexport", "web", "exported", agreed).await;
    assert_eq!(condition(&fine, "Valid"), Some(("True", "Valid")));
    assert_eq!(condition(&fine, "Ready"), Some(("True", "Exported")));
    let since = |object: &Value| object["status"]["conditions"][0]["lastTransitionTime"].clone();
    let (valid_since, generation) = (since(&fine), fine["metadata"]["generation"].clone());
    assert_eq!(fine["status"]["conditions"][0]["observedGeneration"], generation);
    // An export alone makes an import in its own cluster, too; one that is refused makes none.
    let import = object(&plane, IMPORT, "web", "own", |import| clusters(import) == ["west"]).await;
    assert_eq!(import["spec"]["type"], "ClusterSetIP");
    for name in ["alias", "nothing"] {
        assert!(plane.get(IMPORT, "shop", name).await.is_err(), "{name}");
    }

    // The younger export disagrees on everything: the older one counts, and the port that lost goes nowhere.
    let ports = json!([{ "name": "http", "port": 8080 }, { "name": "metrics", "port": 90 }]);
    let spec = json!({ "clusterIP": "None", "sessionAffinity": "ClientIP", "ports": ports });
    declare(&east, "shop", "web", spec).await;
    let all = condition_is("Conflict", "True", "PortConflict,TypeConflict,SessionAffinityConflict");
    let conflicting = object(&plane, "serviceexport", "web", "in conflict", all).await;
    let told = conflicting["status"]["conditions"].to_string();
    assert!(told.contains("that of west counts: it is the oldest"), "{told}");
    let import = object(&plane, IMPORT, "web", "of both", |import| clusters(import) == ["east", "west"]).await;
    let want = json!([
        { "name": "http", "port": 80, "protocol": "TCP", "appProtocol": "http" },
        { "name": "metrics", "port": 90, "protocol": "TCP" },
    ]);
    let spec = &import["spec"];
    assert_eq!((&spec["ports"], &spec["type"]), (&want, &json!("ClusterSetIP")));
    assert_eq!(spec["sessionAffinity"], "None");
    let ports_of = async |cluster: &str| {
        let slices = derived(&plane, "endpointslices", "web").await;
        let of = |one: &&Value| one["metadata"]["labels"]["multicluster.kubernetes.io/source-cluster"] == cluster;
        let ports = slices.iter().find(of)?["ports"].as_array()?.clone();
        Some(ports.iter().filter_map(|port| port["port"].as_u64()).collect::<Vec<_>>())
    };
    until("each port to go to the clusters that expose it", async || {
        (ports_of("east").await? == [90] && ports_of("west").await? == [80]).then_some(())
    })
    .await;
    // The other cluster has come to the same.
    let row = until("the other cluster to see the conflict", async || {
        let status = east.status().await.ok()?;
        let row = status["services"].as_array()?.iter().find(|row| row["service"] == "shop/web")?.clone();
        (row["conflicts"].as_array()?.len() == 3).then_some(row)
    })
    .await;
    assert_eq!(row["conflicts"], json!(["PortConflict", "TypeConflict", "SessionAffinityConflict"]));

    // When they agree the condition clears; what did not change keeps its time.
    declare(&east, "shop", "web", json!({ "ports": [{ "name": "http", "port": 80 }] })).await;
    let cleared =
        object(&plane, "serviceexport", "web", "agreed", condition_is("Conflict", "False", "NoConflicts")).await;
    assert_eq!(since(&cleared), valid_since);
    plane.kubectl(&["delete", "serviceexport", "web", "-n", "shop"]).await.unwrap();
    object(&plane, IMPORT, "web", "of the other alone", |import| clusters(import) == ["east"]).await;
    tokio::join!(east.stop(), west.stop(), plane.stop());
}

#[tokio::test]
async fn a_headless_import_has_virtual_addresses_in_its_slices_and_no_address_of_its_own() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let mut west = cluster(&world, &plane, "west").await;
    let mut east = world.cluster("east").await;
    link(&west, &east).await;
    let web = app::http("web-in-east").await;
    serve(&mut east, "web", "http", "http", web.address).await;
    declare(&east, "shop", "web", json!({ "clusterIP": "None", "ports": [{ "name": "http", "port": 80 }] })).await;
    let ready = |import: &Value| condition(import, "Ready") == Some(("True", "Ready"));
    let import = object(&plane, IMPORT, "web", "ready", ready).await;
    assert_eq!((&import["spec"]["type"], &import["spec"]["ips"]), (&json!("Headless"), &Value::Null));
    let slice = until("the endpoint in the slice", async || {
        let slices = derived(&plane, "endpointslices", "web").await;
        let [slice] = slices.as_slice() else { return None };
        (slice["endpoints"][0]["conditions"]["ready"] == true).then(|| slice.clone())
    })
    .await;
    let address: std::net::Ipv4Addr = slice["endpoints"][0]["addresses"][0].as_str().unwrap().parse().unwrap();
    assert_eq!(address.octets()[0], 240, "{address} is not one of this cluster's own virtual addresses");
    assert_eq!(slice["metadata"]["labels"].get("kubernetes.io/service-name"), None);
    assert_eq!(derived(&plane, "services", "web").await, <[Value; 0]>::default());

    // The endpoint goes with its sidecar; the type follows the export.
    east.stop_one("web", std::time::Duration::from_secs(3)).await.unwrap();
    until("the slice to have no ready endpoint", async || {
        let slices = derived(&plane, "endpointslices", "web").await;
        let ready = |one: &Value| one["conditions"]["ready"] == true;
        slices.iter().all(|slice| !slice["endpoints"].as_array().is_some_and(|all| all.iter().any(ready))).then_some(())
    })
    .await;
    declare(&east, "shop", "web", json!({ "ports": [{ "name": "http", "port": 80 }] })).await;
    object(&plane, IMPORT, "web", "of the other type", |import| {
        import["spec"]["type"] == "ClusterSetIP" && import["spec"]["ips"].is_array() && ready(import)
    })
    .await;
    tokio::join!(east.stop(), west.stop(), plane.stop());
}

#[tokio::test]
async fn a_server_that_has_only_v1alpha1_is_read_and_written_in_it() {
    let world = World::new().await;
    let only_alpha = |crds: String| {
        let mut parts = crds.split("name: v1beta1\n");
        let first = parts.next().unwrap_or_default().to_owned();
        let parts: Vec<String> = parts.map(|part| part.replacen("served: true", "served: false", 1)).collect();
        assert_eq!(parts.len(), 2, "{crds}");
        [vec![first], parts].concat().join("name: v1beta1\n")
    };
    let Some(plane) = control_plane_of(&world, "api", only_alpha).await else { return };
    assert!(plane.kubectl(&["get", "serviceimports.v1beta1.multicluster.x-k8s.io"]).await.is_err());
    let mut west = cluster(&world, &plane, "west").await;
    let app = app::http("web-in-west").await;
    plane.apply(&format!("{}---\n{}", web("http", true), export("web").replace("v1beta1", "v1alpha1"))).await.unwrap();
    start_web(&mut west, app.address).await;
    let exported = |export: &Value| condition(export, "Ready") == Some(("True", "Exported"));
    object(&plane, "serviceexport", "web", "exported", exported).await;
    let import = object(&plane, IMPORT, "web", "ready", |import| condition(import, "Ready").is_some()).await;
    assert_eq!(import["apiVersion"], "multicluster.x-k8s.io/v1alpha1");
    tokio::join!(west.stop(), plane.stop());
}
