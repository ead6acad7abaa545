//! Workloads without a sidecar: plain `curl` through a gateway's listener, in whole clusters as separate processes.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;

use serde_json::{Value, json};
use support::unmeshed::{free_ports, plain, plain_until};
use support::{World, app, binary, curl, curl_until, in_sync, link, serve, start_caller, until};
use tombolo_testbed::Cluster;

const WEB: &str = "http://web.shop.svc.clusterset.local/";
const DENY: &str = "\
apiVersion: tombolo.dev/v1alpha1
kind: AccessPolicy
metadata: {name: no-strangers, namespace: shop}
spec:
  action: deny
  rules:
  - from: [{spiffeIds: ['spiffe://*/tombolo/unmeshed/*']}]
";

fn export(annotation: &str) -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {{name: web, namespace: shop, \
         annotations: {{{annotation}}}}}\n"
    )
}

const ALLOWED: &str = "tombolo.dev/unmeshed: allow";

/// A cluster with listeners for workloads without a sidecar, as far as exports allow them.
async fn open_cluster(world: &World, name: &str) -> Cluster {
    let mut cluster = Cluster::new(&binary(), name, world.directory.path(), json!({})).unwrap();
    cluster.start_federation(json!({ "unmeshed": { "ports": free_ports() } })).await.unwrap();
    cluster.start_gateway("gw", json!({ "unmeshed": "127.0.0.1" })).await.unwrap();
    cluster
}

/// Where port 80 of `shop/web` has its listener.
async fn listener(cluster: &Cluster) -> Option<SocketAddr> {
    let status = cluster.status().await.ok()?;
    let row = status["services"].as_array()?.iter().find(|row| row["service"] == "shop/web")?.clone();
    let port = u16::try_from(row["listeners"]["80"].as_u64()?).ok()?;
    let gateway: &Value = &status["gateways"][0];
    Some(SocketAddr::new(gateway["unmeshedAddress"].as_str()?.parse().ok()?, port))
}

async fn refused_at(listener: SocketAddr) {
    until(&format!("{listener} to refuse"), async || plain(listener).await.is_none().then_some(())).await;
}

#[tokio::test]
async fn a_plain_client_reaches_what_its_export_allows_local_first_and_nothing_else() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(open_cluster(&world, "east"), world.cluster("west"));
    let in_west = app::http("web-in-west").await;
    serve(&mut west, "web", "http", "http", in_west.address).await;
    west.write_resource("export.yaml", &export("")).unwrap();
    link(&west, &east).await;
    let proxy = start_caller(&mut east).await;
    curl_until(proxy, WEB, "web-in-west").await;
    assert_eq!(listener(&east).await, None, "nothing allows it");

    west.write_resource("export.yaml", &export(ALLOWED)).unwrap();
    let listens = until("the listener", async || listener(&east).await).await;
    plain_until(listens, "web-in-west").await;

    // A policy of the exporter sees who calls, and denies these alone.
    west.write_resource("deny.yaml", DENY).unwrap();
    refused_at(listens).await;
    assert_eq!(curl(proxy, &[WEB]).await.status, 200);
    std::fs::remove_file(west.dir().join("cluster/deny.yaml")).unwrap();
    plain_until(listens, "web-in-west").await;

    // Local first, and the other cluster when the local application dies.
    let in_east = app::http("web-in-east").await;
    serve(&mut east, "web", "http", "http", in_east.address).await;
    east.write_resource("export.yaml", &export(ALLOWED)).unwrap();
    plain_until(listens, "web-in-east").await;
    drop(in_east);
    plain_until(listens, "web-in-west").await;

    // The port stays the service's over a restart of both.
    east.kill("federation").await.unwrap();
    east.kill("gw").await.unwrap();
    east.restart("federation").await.unwrap();
    east.restart("gw").await.unwrap();
    plain_until(listens, "web-in-west").await;
    assert_eq!(listener(&east).await, Some(listens));

    // What is not allowed any more ends.
    west.write_resource("export.yaml", &export("tombolo.dev/unmeshed: deny")).unwrap();
    east.write_resource("export.yaml", &export("")).unwrap();
    refused_at(listens).await;
    until("the listener to be closed", async || listener(&east).await.is_none().then_some(())).await;
    curl_until(proxy, WEB, "web-in-west").await;

    // One peer may be allowed what others are not.
    let peer = "apiVersion: tombolo.dev/v1alpha1\nkind: ClusterPeer\nmetadata: {name: east}\nspec: {cluster: east, imports: ['*'], unmeshed: allow}\n";
    west.write_resource("peer.yaml", peer).unwrap();
    let again = until("the listener", async || listener(&east).await).await;
    assert_eq!(again, listens, "within a day a service has the port that it had");
    plain_until(listens, "web-in-west").await;
    in_sync(&west, "east").await;
    tokio::join!(east.stop(), west.stop());
}
