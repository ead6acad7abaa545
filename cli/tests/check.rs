//! `tombolo check`: what is wrong with a running cluster, and with a role before it runs.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{TcpListener, UdpSocket};

use serde_json::{Value, json};
use support::{World, link, until};
use tombolo_testbed::Cluster;

/// Whether all is well, and the findings.
async fn check(arguments: &[&str]) -> (bool, Vec<Value>) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tombolo"));
    let output = command.args(["check", "-o", "json"]).args(arguments).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let told: Value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error} in {text:?}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), told["findings"].as_array().unwrap().clone())
}

async fn of(cluster: &Cluster) -> (bool, Vec<Value>) {
    check(&["--state", &cluster.state()]).await
}

fn is(finding: &Value, severity: &str, area: &str, what: &str) -> bool {
    finding["severity"] == severity && finding["area"] == area && finding["what"].as_str().unwrap().contains(what)
}

#[tokio::test]
async fn what_is_wrong_is_told_with_its_fix_until_it_is_mended() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    link(&west, &east).await;
    until("east to be well", async || of(&east).await.0.then_some(())).await;

    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{port: 80}]}\n";
    let export =
        "apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: web, namespace: shop}\n";
    east.write_resource("web.yaml", &format!("{service}---\n{export}")).unwrap();
    let fix = until("the export that nobody may serve", async || {
        let (well, findings) = of(&east).await;
        let found = findings.iter().find(|one| is(one, "problem", "services", "shop/web"))?;
        assert!(!well, "{findings:?}");
        Some(found["fix"].as_str()?.to_owned())
    })
    .await;
    assert!(fix.contains("tombolo.dev/service-accounts"), "{fix}");
    let policy = "apiVersion: tombolo.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: none, namespace: shop}\nspec:\n  \
                  targetRefs: [{kind: Service, name: wep}]\n  rules: []\n";
    east.write_resource("web.yaml", policy).unwrap();
    until("the policy that matches nothing", async || {
        let (well, findings) = of(&east).await;
        findings.iter().find(|one| is(one, "warning", "policies", "shop/wep"))?;
        well.then_some(())
    })
    .await;
    std::fs::remove_file(east.dir().join("cluster/web.yaml")).unwrap();

    east.kill("gw").await.unwrap();
    until("the gateway that is away", async || {
        let (well, findings) = of(&east).await;
        findings.iter().find(|one| is(one, "problem", "gateways", "gw"))?;
        (!well).then_some(())
    })
    .await;
    east.restart("gw").await.unwrap();
    until("east to be well again", async || of(&east).await.0.then_some(())).await;
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn before_a_role_runs_it_is_told_what_it_will_not_get() {
    let directory = tempfile::tempdir().unwrap();
    let taken = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let (discovery, tunnel) = (taken.0.local_addr().unwrap(), taken.1.local_addr().unwrap());
    let state = directory.path().join("state");
    let write = |name: &str, config: Value| {
        let path = directory.path().join(name);
        std::fs::write(&path, config.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let source = json!({ "directory": directory.path() });
    let ports =
        json!({ "cluster": "east", "state": state, "source": source, "discovery": discovery, "admin": "127.0.0.1:0" });
    let (well, findings) = check(&["--federation", &write("federation.yaml", ports)]).await;
    assert!(!well && findings.len() == 1, "{findings:?}");
    assert!(is(&findings[0], "problem", "ports", &format!("{discovery}/tcp")), "{findings:?}");

    let missing = directory.path().join("missing");
    let gateway = json!({
        "id": "gw",
        "state": state,
        "federation": { "address": discovery, "ca": missing.join("ca.pem") },
        "token": missing.join("token"),
        "tunnel": tunnel,
        "ingress": "127.0.0.1:0",
        "watch": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
    });
    let (well, findings) = check(&["--gateway", &write("gateway.yaml", gateway)]).await;
    assert!(!well, "{findings:?}");
    for what in [&format!("{tunnel}/udp"), "federation.ca", "token"] {
        assert!(findings.iter().any(|one| one["what"].as_str().unwrap().contains(what)), "{what}: {findings:?}");
    }
}

#[tokio::test]
async fn the_configuration_for_core_dns_names_the_federations_server() {
    let world = World::new().await;
    let mut east = world.cluster("east").await;
    let refused = east.operator(&["check", "--fix-dns"]).await.unwrap_err().to_string();
    assert!(refused.contains("has no DNS server") && refused.contains("--dns-server"), "{refused}");
    let corefile = east.operator(&["check", "--fix-dns", "--dns-server", "10.96.0.53:53"]).await.unwrap();
    assert!(corefile.contains("clusterset.local") && corefile.contains("10.96.0.53:53"), "{corefile}");
    east.stop().await;
}
