//! What an API server is told for workloads without a sidecar: gateways' listeners in slices, and names in DNS.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::process::Command;
use tombolo_testbed::Cluster;
use tombolo_testbed::kubernetes::ControlPlane;

use crate::support::unmeshed::{free_ports, plain_until};
use crate::support::{World, app, installed, link, serve, until};
use crate::{binary, control_plane};

/// An address of the documentation's network: an API server takes none of loopback for an endpoint.
const GATEWAY: &str = "192.0.2.10";

/// A cluster of that control plane whose gateway listens for workloads without a sidecar, and whose federation answers DNS.
async fn open_cluster(world: &World, plane: &ControlPlane) -> (Cluster, SocketAddr) {
    let kubeconfig = plane.kubeconfig_of_account("tombolo-system", "federation").await.unwrap();
    let mut west = Cluster::new(&binary(), "west", world.directory.path(), json!({})).unwrap();
    let federation = json!({
        "source": { "kubernetes": { "kubeconfig": kubeconfig } },
        "unmeshed": { "ports": free_ports() },
        "dns": { "listen": "127.0.0.1:0" },
    });
    let dns = west.start_federation(federation).await.unwrap().address("dns").unwrap();
    west.start_gateway("gw", json!({ "unmeshed": "127.0.0.1", "advertiseUnmeshed": GATEWAY })).await.unwrap();
    (west, dns)
}

/// An exported Service `shop/<name>` of the directory cluster.
fn declare(east: &Cluster, name: &str, annotations: &Value, spec: &Value) {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name, "namespace": "shop", "annotations": { "tombolo.dev/service-accounts": name } },
        "spec": spec,
    });
    let export = json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1",
        "kind": "ServiceExport",
        "metadata": { "name": name, "namespace": "shop", "annotations": annotations },
    });
    east.write_resource(&format!("shop-{name}.yaml"), &format!("{service}\n---\n{export}\n")).unwrap();
}

/// The slices of the import of `shop/<name>`.
async fn slices(plane: &ControlPlane, name: &str) -> Vec<Value> {
    let selector = format!("multicluster.kubernetes.io/service-name={name}");
    let text = plane.kubectl(&["get", "endpointslices", "-n", "shop", "-l", &selector, "-o", "json"]).await.unwrap();
    let list: Value = serde_json::from_str(&text).unwrap();
    list["items"].as_array().cloned().unwrap_or_default()
}

#[tokio::test]
async fn slices_hold_the_listeners_of_the_gateways_where_the_export_allows_it_and_only_there() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let (mut west, _) = open_cluster(&world, &plane).await;
    let mut east = world.cluster("east").await;
    let web = app::http("web-in-east").await;
    serve(&mut east, "web", "http", "http", web.address).await;
    let spec = json!({ "ports": [{ "name": "http", "port": 80 }] });
    declare(&east, "web", &json!({ "tombolo.dev/unmeshed": "allow" }), &spec);
    link(&west, &east).await;
    let port = until("the listener in the slice", async || {
        let slices = slices(&plane, "web").await;
        let [slice] = slices.as_slice() else { return None };
        let addresses = &slice["endpoints"][0]["addresses"];
        (addresses == &json!([GATEWAY]) && slice["ports"][0]["name"] == "http").then_some(())?;
        slice["ports"][0]["port"].as_u64()
    })
    .await;
    // kube-proxy takes connections to the ClusterIP there; here nobody does, so the gateway is called itself.
    plain_until(SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).unwrap())), "web-in-east").await;
    declare(&east, "web", &json!({}), &spec);
    until("the slice to be empty", async || {
        let slices = slices(&plane, "web").await;
        let empty = slices.iter().all(|slice| slice["endpoints"].as_array().is_none_or(Vec::is_empty));
        (slices.len() == 1 && empty && slices[0]["ports"][0]["port"] == 80).then_some(())
    })
    .await;

    // The Namespace says it for all exports in it.
    let namespace =
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, annotations: {tombolo.dev/unmeshed: allow}}\n";
    east.write_resource("namespace.yaml", namespace).unwrap();
    until("the listener again", async || {
        (slices(&plane, "web").await[0]["endpoints"][0]["addresses"] == json!([GATEWAY])).then_some(())
    })
    .await;
    tokio::join!(east.stop(), west.stop(), plane.stop());
}

/// What `dig` prints in short form, one record a line, or the status of an answer without records.
async fn dig(server: SocketAddr, name: &str, kind: &str) -> String {
    let (at, port) = (format!("@{}", server.ip()), server.port().to_string());
    let arguments = [&at, "-p", &port, "+tries=1", "+time=4", "+noall", "+answer", "+comments", name, kind];
    let output = Command::new("dig").args(arguments).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut records: Vec<String> = text
        .lines()
        .filter(|line| !line.starts_with(';') && !line.is_empty())
        .map(|line| line.split_whitespace().skip(4).collect::<Vec<_>>().join(" "))
        .collect();
    records.sort();
    if !records.is_empty() {
        return records.join("\n");
    }
    let status = text.split("status: ").nth(1).and_then(|rest| rest.split(',').next());
    status.unwrap_or("no answer").to_owned()
}

/// Asks until the answer is that.
async fn answers(server: SocketAddr, name: &str, kind: &str, want: &str) {
    let name = format!("{name}.clusterset.local");
    let mut last = String::new();
    until(&format!("{name} {kind} to be {want}"), async || {
        last = dig(server, &name, kind).await;
        (last == want).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_federation_answers_names_of_the_clusterset_with_what_is_imported() {
    let world = World::new().await;
    let Some(()) = installed(&["dig"]) else { return };
    let Some(plane) = control_plane(&world).await else { return };
    let (mut west, dns) = open_cluster(&world, &plane).await;
    let mut east = world.cluster("east").await;
    let database = app::banner("hello").await;
    serve(&mut east, "db", "tcp-db", "opaque", database.address).await;
    let ports = json!([{ "name": "http", "port": 80 }, { "name": "dns", "port": 80, "protocol": "UDP" }]);
    declare(&east, "web", &json!({}), &json!({ "ports": ports }));
    let headless = json!({ "clusterIP": "None", "ports": [{ "name": "tcp-db", "port": 80 }] });
    declare(&east, "db", &json!({}), &headless);
    link(&west, &east).await;
    let import = until("the import to have its address", async || {
        let import = plane.get("serviceimport", "shop", "web").await.ok()?;
        import["spec"]["ips"][0].as_str().map(str::to_owned)
    })
    .await;

    let corefile = west.operator(&["check", "--fix-dns"]).await.unwrap();
    assert!(corefile.contains(&format!("forward . {dns}")), "{corefile}");
    let server = &dns;
    let web = "web.shop.svc";
    answers(*server, web, "A", &import).await;
    for (name, kind, want) in [
        (web, "AAAA", "NOERROR"),
        ("_http._tcp.web.shop.svc", "SRV", "0 100 80 web.shop.svc.clusterset.local."),
        ("_dns._udp.web.shop.svc", "SRV", "0 100 80 web.shop.svc.clusterset.local."),
        ("_none._tcp.web.shop.svc", "SRV", "NXDOMAIN"),
        ("none.shop.svc", "A", "NXDOMAIN"),
        ("east.web.shop.svc", "A", "NXDOMAIN"),
        ("web.absent.svc", "A", "NXDOMAIN"),
        ("dns-version", "TXT", "\"1.0.0\""),
    ] {
        answers(*server, name, kind, want).await;
    }

    // A headless service: its endpoints' virtual addresses, by the service's name and by their own.
    let endpoint = until("the endpoint of the headless service", async || {
        let address = dig(*server, "db.shop.svc.clusterset.local", "A").await;
        address.starts_with("240.").then_some(address)
    })
    .await;
    let target = dig(*server, "_tcp-db._tcp.db.shop.svc.clusterset.local", "SRV").await;
    let host = target.strip_prefix("0 100 80 ").and_then(|name| name.strip_suffix(".clusterset.local.")).unwrap();
    assert!(host.ends_with(".east.db.shop.svc"), "{host}");
    answers(*server, host, "A", &endpoint).await;

    tokio::join!(east.stop(), west.stop(), plane.stop());
}
