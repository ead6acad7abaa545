//! Two replicas of one cluster's federation: one leads, the other stands by.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tombolo_testbed::kubernetes::ControlPlane;
use tombolo_testbed::{Announced, Cluster, Process};

use crate::support::{World, app, binary, curl, curl_until, get, start_caller, until};
use crate::{WEB, control_plane, export, start_web, web};

const LEASE: Duration = Duration::from_secs(6);

async fn lease(plane: &ControlPlane) -> Option<Value> {
    Some(plane.get("lease", "tombolo-system", "tombolo-federation").await.ok()?["spec"].clone())
}

pub async fn held_by(plane: &ControlPlane, holder: &str) -> Value {
    until(&format!("{holder} to hold the lease"), async || {
        lease(plane).await.filter(|lease| lease["holderIdentity"] == holder)
    })
    .await
}

/// Waits until the export of a Service that is not there says so, which only the leader writes.
pub async fn written(plane: &ControlPlane, name: &str) {
    until(&format!("the condition of {name}"), async || {
        let export = plane.get("serviceexport", "shop", name).await.ok()?;
        (export["status"]["conditions"][0]["reason"] == "NoService").then_some(())
    })
    .await;
}

/// The configuration of one replica of `west`; all of them have one state directory.
fn replica(plane_config: &std::path::Path, identity: &str) -> Value {
    let kubernetes = json!({ "kubeconfig": plane_config, "identity": identity, "leaseDuration": "6s" });
    json!({ "source": { "kubernetes": kubernetes } })
}

/// A further replica, on the addresses that sidecars and gateways know. It announces itself when it leads.
fn stand_by(west: &Cluster, extra: &Value, name: &str, addresses: &Announced, admin: SocketAddr) -> Process {
    let mut config = extra.clone();
    config["cluster"] = json!("west");
    config["state"] = json!(west.state());
    config["admin"] = json!(admin);
    for address in ["discovery", "legs"] {
        config[address] = json!(addresses.address(address).unwrap());
    }
    let file = west.dir().join(format!("{name}.yaml"));
    std::fs::write(&file, config.to_string()).unwrap();
    let file = file.display().to_string();
    Process::start(&binary(), name, west.dir(), &["federation", "--config", &file]).unwrap()
}

/// An address on loopback where nobody listens yet.
pub fn free() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

async fn stands_by(admin: SocketAddr, holder: &str) {
    until("the replica to stand by", async || {
        get(admin, "/readyz").await.contains(&format!("{holder} leads")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn one_of_two_replicas_leads_and_the_other_takes_over_within_the_lease_and_never_beside_it() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let kubeconfig = plane.kubeconfig_of_account("tombolo-system", "federation").await.unwrap();
    let mut west = Cluster::new(&binary(), "west", world.directory.path(), json!({})).unwrap();
    let addresses = west.start_federation(replica(&kubeconfig, "one")).await.unwrap();
    west.start_gateway("gw", Value::Null).await.unwrap();
    let app = app::http("web-in-west").await;
    plane.apply(&format!("{}---\n{}", web("http", true), export("web"))).await.unwrap();
    start_web(&mut west, app.address).await;
    let proxy = start_caller(&mut west).await;
    curl_until(proxy, WEB, "web-in-west").await;
    plane.apply(&export("first")).await.unwrap();
    written(&plane, "first").await;

    // As long as the leader renews its lease, however often that is, the other one does nothing.
    let (two, three) = (free(), free());
    let mut standby = stand_by(&west, &replica(&kubeconfig, "two"), "two", &addresses, two);
    stands_by(two, "one").await;
    let before = held_by(&plane, "one").await;
    until("the lease to be renewed", async || (lease(&plane).await?["renewTime"] != before["renewTime"]).then_some(()))
        .await;
    assert_eq!(before["leaseTransitions"], 0);

    west.kill("federation").await.unwrap();
    let killed = Instant::now();
    let taken = held_by(&plane, "two").await;
    let took = killed.elapsed();
    // The lease's duration, and one interval in which the candidate asks.
    assert!(took < LEASE + LEASE / 5 + Duration::from_secs(1), "it took {took:?}");
    assert_eq!(taken["leaseTransitions"], 1);
    plane.apply(&export("second")).await.unwrap();
    written(&plane, "second").await;
    assert_eq!(curl(proxy, &[WEB]).await.status, 200);
    until("sidecars to find the new leader", async || (get(two, "/state").await.contains("web-1")).then_some(())).await;

    // A leader that was stopped for longer than its lease is overtaken. It never writes again, and the new one does not
    // touch the state before it has ended.
    let mut third = stand_by(&west, &replica(&kubeconfig, "three"), "three", &addresses, three);
    stands_by(three, "two").await;
    standby.signal(Signal::SIGSTOP);
    held_by(&plane, "three").await;
    plane.apply(&export("third")).await.unwrap();
    standby.signal(Signal::SIGCONT);
    let ended = tokio::time::timeout(Duration::from_secs(10), standby.wait()).await.unwrap().unwrap();
    assert!(!ended.success(), "{}", standby.log_tail());
    assert!(standby.log_tail().contains("three has taken the lease"), "{}", standby.log_tail());
    written(&plane, "third").await;
    assert_eq!(lease(&plane).await.unwrap()["leaseTransitions"], 2);

    // Who stops politely gives the lease up.
    assert!(!third.has_ended().unwrap());
    third.stop(Duration::from_secs(15)).await;
    held_by(&plane, "").await;
    west.stop().await;
    plane.stop().await;
}
