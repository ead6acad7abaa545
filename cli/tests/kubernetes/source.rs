//! What is read of an API server.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tombolo_testbed::Cluster;

use crate::support::{World, app, curl, curl_until, link, start_caller, until};
use crate::{WEB, cluster, control_plane, export, problem, start_web, web};

async fn refused_as(proxy: SocketAddr, reason: &str) {
    until(&format!("{WEB} to be refused as {reason}"), async || {
        (curl(proxy, &[WEB]).await.header("tombolo-refusal") == Some(reason)).then_some(())
    })
    .await;
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
