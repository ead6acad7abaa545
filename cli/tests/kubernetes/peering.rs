//! Peerings that are declared on both sides, as `modules/peering` of `terraform/` renders them.

use serde_json::{Value, json};
use tombolo_testbed::{Cluster, terraform};

use crate::support::{World, app, curl, curl_until, in_sync, skip, start_caller, tools, until};
use crate::{WEB, cluster, control_plane_of, export, start_web, web};

/// The roots of a cluster's trust domain, as its operator hands them out.
fn roots(cluster: &Cluster) -> String {
    std::fs::read_to_string(cluster.dir().join("federation/ca.pem")).unwrap()
}

/// Where the gateway of `cluster` can be dialled.
async fn tunnel(cluster: &Cluster) -> Value {
    until("the address of the gateway's tunnels", async || {
        let text = std::fs::read_to_string(cluster.dir().join("gw/gateway.json")).ok()?;
        let announced: Value = serde_json::from_str(&text).ok()?;
        Some(announced["addresses"]["tunnel"].clone()).filter(Value::is_string)
    })
    .await
}

#[tokio::test]
async fn two_clusters_are_linked_by_the_objects_that_the_terraform_module_renders() {
    let Some(program) = terraform::find(&tools()) else { return skip(terraform::NEEDED) };
    let world = World::new().await;
    let Some(west_plane) = control_plane_of(&world, "west-api", |crds| crds).await else { return };
    let Some(east_plane) = control_plane_of(&world, "east-api", |crds| crds).await else { return };
    let mut west = cluster(&world, &west_plane, "west").await;
    let mut east = cluster(&world, &east_plane, "east").await;
    let app = app::http("web-in-the-west").await;
    west_plane.apply(&format!("{}---\n{}", web("http", true), export("web"))).await.unwrap();
    start_web(&mut west, app.address).await;
    let caller = start_caller(&mut east).await;

    let clusters = json!({ "clusters": {
        "west": { "roots": roots(&west), "gateways": [tunnel(&west).await] },
        "east": { "roots": roots(&east), "imports": ["shop/*"] },
    } });
    let folder = world.directory.path().join("peering");
    let manifests = terraform::apply(&program, &folder, ("peering", "manifests"), &clusters).unwrap();
    for (name, plane) in [("west", &west_plane), ("east", &east_plane)] {
        plane.apply(manifests[name].as_str().unwrap()).await.unwrap();
    }
    in_sync(&west, "east").await;
    in_sync(&east, "west").await;
    let answer = curl_until(caller, WEB, "web-in-the-west").await;
    assert!(answer.body.contains("URI=spiffe://east.tombolo/ns/shop/sa/frontend"), "{answer:?}");

    // Whoever takes its object back ends it: the exporting side delivers nothing more, the importing side withdraws the import.
    west_plane.kubectl(&["delete", "clusterpeer", "east"]).await.unwrap();
    until("requests to be refused", async || (curl(caller, &[WEB]).await.status == 503).then_some(())).await;
    east_plane.kubectl(&["delete", "clusterpeer", "west"]).await.unwrap();
    until("the import to be withdrawn", async || {
        east_plane.get("serviceimport", "shop", "web").await.is_err().then_some(())
    })
    .await;
    tokio::join!(east.stop(), west.stop(), west_plane.stop(), east_plane.stop());
}
