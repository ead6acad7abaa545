//! Replicas of one federation whose state is in objects of the API server, each with a state directory of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tombolo_testbed::kubernetes::ControlPlane;
use tombolo_testbed::{Announced, Cluster, Process, Sidecar};

use crate::leader::{free, held_by, written};
use crate::support::app::App;
use crate::support::{World, app, binary, curl, curl_until, in_sync, link, start_caller, until};
use crate::{WEB, control_plane, export, web};

const LEASE: Duration = Duration::from_secs(5);
const REMOTE: &str = "http://remote.shop.svc.clusterset.local/";

/// The part of a replica's configuration that is its own.
fn replica(kubeconfig: &Path, identity: &str) -> Value {
    let kubernetes = json!({ "kubeconfig": kubeconfig, "identity": identity, "leaseDuration": "5s" });
    json!({ "source": { "kubernetes": kubernetes }, "store": "kubernetes" })
}

/// The second replica of `west`, beside the one that the testbed knows.
struct Second {
    config: Value,
    process: Process,
}

impl Second {
    async fn start(west: &Cluster, kubeconfig: &Path) -> (Self, Announced) {
        let mut config = replica(kubeconfig, "two");
        config["cluster"] = json!("west");
        config["state"] = json!(state_of_second(west));
        for address in ["discovery", "legs", "admin"] {
            config[address] = json!(free());
        }
        Self::start_with(west, config).await
    }

    async fn start_with(west: &Cluster, config: Value) -> (Self, Announced) {
        let file = west.dir().join("two.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        let announce = west.dir().join("two/federation.json");
        let _ = std::fs::remove_file(&announce);
        let arguments = ["federation", "--config", &file.display().to_string()];
        let mut process = Process::start(&binary(), "two", west.dir(), &arguments).unwrap();
        let read = |text: &str| serde_json::from_str::<Announced>(text).ok();
        let announced = process.wait_for(&announce, Instant::now() + Duration::from_secs(30), read).await.unwrap();
        (Self { config, process }, announced)
    }
}

fn state_of_second(west: &Cluster) -> String {
    west.dir().join("two").display().to_string()
}

async fn status_of_second(west: &Cluster) -> Option<Value> {
    let state = state_of_second(west);
    serde_json::from_str(&binary().run(&["status", "-o", "json", "--state", &state]).await.ok()?).ok()
}

/// A sidecar of `west` that knows the federation under `address` alone.
async fn sidecar_at(west: &mut Cluster, address: &str, name: &str, workload: &str, services: Value) -> SocketAddr {
    let config = json!({ "federation": { "address": address }, "services": services });
    let announced = west.start_sidecar(Sidecar { name, workload, config }).await.unwrap();
    announced.address("outbound").unwrap()
}

/// What the sidecar of `shop/web` delivers.
fn serving(app: SocketAddr) -> Value {
    let health = json!({ "tcp": {}, "interval": "200ms", "timeout": "1s" });
    json!([{ "service": "shop/web", "port": 80, "app": app, "protocol": "http", "health": health }])
}

/// The row of `peer` in what `cluster` says.
async fn peer(cluster: &Cluster, peer: &str) -> Value {
    let status = cluster.status().await.unwrap();
    status["peers"].as_array().unwrap().iter().find(|row| row["cluster"] == peer).unwrap().clone()
}

/// `east`, which exports `remote` and takes everything of others.
async fn east(world: &World) -> (Cluster, App) {
    let mut east = world.cluster("east").await;
    let app = app::http("remote-in-east").await;
    crate::support::serve(&mut east, "remote", "http", "http", app.address).await;
    east.operator(&["export", "remote.shop"]).await.unwrap();
    (east, app)
}

/// Both replicas of `west`, with a gateway that knows both; the first one leads.
async fn west(world: &World, plane: &ControlPlane) -> (Cluster, Second, [String; 2]) {
    let kubeconfig = plane.kubeconfig_of_account("tombolo-system", "federation").await.unwrap();
    let mut west = Cluster::new(&binary(), "west", world.directory.path(), json!({})).unwrap();
    let one = west.start_federation(replica(&kubeconfig, "one")).await.unwrap().address("discovery").unwrap();
    let (second, two) = Second::start(&west, &kubeconfig).await;
    let two = two.address("discovery").unwrap();
    let both = format!("{one},{two}");
    west.start_gateway("gw", json!({ "federation": { "address": both } })).await.unwrap();
    (west, second, [both, two.to_string()])
}

#[tokio::test]
async fn every_replica_answers_and_another_one_leads_when_the_leader_dies() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let (mut west, second, [_, two]) = west(&world, &plane).await;
    let (mut east, _remote) = east(&world).await;
    link(&west, &east).await;

    // A workload that knows the follower only gets its identity there, is published by the leader, and finds everybody.
    plane.apply(&format!("{}---\n{}", web("http", true), export("web"))).await.unwrap();
    let web_app = app::http("web-in-west").await;
    sidecar_at(&mut west, &two, "web-1", "shop/web", serving(web_app.address)).await;
    let in_west = sidecar_at(&mut west, &two, "frontend", "shop/frontend", json!([])).await;
    let in_east = start_caller(&mut east).await;
    curl_until(in_east, WEB, "web-in-west").await;
    curl_until(in_west, WEB, "web-in-west").await;
    curl_until(in_west, REMOTE, "remote-in-east").await;
    until("both replicas to know the same services", async || {
        let (one, two) = (west.status().await.ok()?, status_of_second(&west).await?);
        (one["services"] == two["services"] && two["leader"] == "one" && one["leader"] == "this replica").then_some(())
    })
    .await;

    // What changes something is for the leader.
    let state = state_of_second(&west);
    for command in [["join", "add", "--workload", "shop/x"].as_slice(), &["peer", "invite", "--imports", "*"]] {
        let refused = binary().run(&[command, &["--state", &state]].concat()).await.unwrap_err().to_string();
        assert!(refused.contains("replica one leads"), "{refused}");
    }
    let ca = plane.get("configmap", "tombolo-system", "tombolo-ca").await.unwrap();
    assert_eq!(ca["data"]["ca.pem"], std::fs::read_to_string(Path::new(&state).join("ca.pem")).unwrap());

    let before = peer(&east, "west").await;
    west.kill("federation").await.unwrap();
    let killed = Instant::now();
    while killed.elapsed() < LEASE / 2 {
        assert_eq!(curl(in_west, &[REMOTE]).await.status, 200, "nobody leads, and traffic goes on");
        assert_eq!(curl(in_east, &[WEB]).await.status, 200);
    }
    held_by(&plane, "two").await;
    let took = killed.elapsed();
    assert!(took < LEASE + LEASE / 5 + Duration::from_secs(1), "it took {took:?}");
    plane.apply(&export("second")).await.unwrap();
    written(&plane, "second").await;
    // Peers go on without a new peering, in a later epoch.
    let after = until("east to hear of the new leader", async || {
        let row = peer(&east, "west").await;
        (row["epoch"].as_u64() > before["epoch"].as_u64() && row["sync"] == "fresh").then_some(row)
    })
    .await;
    assert_eq!(after["lastRefusal"], before["lastRefusal"], "nothing that was published is of an earlier epoch");
    let leads = status_of_second(&west).await.unwrap();
    assert_eq!((&leads["epoch"], &leads["leader"]), (&after["epoch"], &json!("this replica")));
    curl_until(in_east, WEB, "web-in-west").await;

    // Whoever comes back follows.
    west.restart("federation").await.unwrap();
    until("the first replica to follow", async || {
        let (one, two) = (west.status().await.ok()?, status_of_second(&west).await?);
        (one["leader"] == "two" && one["services"] == two["services"]).then_some(())
    })
    .await;

    // All state directories are lost: everything is in the objects.
    west.kill("federation").await.unwrap();
    let Second { config, process } = second;
    process.kill().await.unwrap();
    for state in [west.state(), state_of_second(&west)] {
        std::fs::remove_dir_all(state).unwrap();
    }
    west.restart("federation").await.unwrap();
    let (second, _) = Second::start_with(&west, config).await;
    in_sync(&east, "west").await;
    in_sync(&west, "east").await;
    curl_until(in_west, REMOTE, "remote-in-east").await;
    curl_until(in_east, WEB, "web-in-west").await;
    tokio::join!(east.stop(), west.stop(), second.process.stop(Duration::from_secs(5)));
    plane.stop().await;
}

#[tokio::test]
async fn a_state_whose_objects_were_deleted_is_restored_and_peers_take_it_without_a_new_peering() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let (mut west, second, _) = west(&world, &plane).await;
    let (mut east, _remote) = east(&world).await;
    link(&west, &east).await;
    let in_west = start_caller(&mut west).await;
    curl_until(in_west, REMOTE, "remote-in-east").await;

    let file = world.directory.path().join("west.backup").display().to_string();
    let config = west.dir().join("federation.yaml").display().to_string();
    binary().run(&["backup", &file, "--config", &config]).await.unwrap();
    let refused = binary().run(&["restore", &file, "--config", &config]).await.unwrap_err().to_string();
    assert!(refused.contains("holds the state of a federation already"), "{refused}");

    // A leader whose objects are gone writes them no more: it ends.
    let all = ["delete", "secrets,configmaps,leases", "--all", "-n", "tombolo-system"];
    plane.kubectl(&all).await.unwrap();
    west.operator(&["join", "add", "--workload", "shop/late"]).await.unwrap_err();
    until("the leader to end", async || {
        west.process("federation").ok()?.log_tail().contains("this one leads no more").then_some(())
    })
    .await;
    west.kill("federation").await.unwrap();
    let Second { config: second, process } = second;
    process.kill().await.unwrap();
    for state in [west.state(), state_of_second(&west)] {
        std::fs::remove_dir_all(state).unwrap();
    }
    plane.kubectl(&all).await.unwrap();
    assert_eq!(curl(in_west, &[REMOTE]).await.status, 200, "traffic needs no federation");
    binary().run(&["restore", &file, "--config", &config]).await.unwrap();
    west.restart("federation").await.unwrap();
    let (second, _) = Second::start_with(&west, second).await;
    in_sync(&east, "west").await;
    in_sync(&west, "east").await;
    curl_until(in_west, REMOTE, "remote-in-east").await;
    tokio::join!(east.stop(), west.stop(), second.process.stop(Duration::from_secs(5)));
    plane.stop().await;
}

#[tokio::test]
async fn traffic_goes_on_while_the_api_server_is_stopped_and_nothing_is_published() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let (mut west, second, [both, _]) = west(&world, &plane).await;
    let (mut east, _remote) = east(&world).await;
    link(&west, &east).await;
    plane.apply(&web("http", true)).await.unwrap();
    let web_app = app::http("web-in-west").await;
    sidecar_at(&mut west, &both, "web-1", "shop/web", serving(web_app.address)).await;
    plane.apply(&export("web")).await.unwrap();
    let (in_west, in_east) = (start_caller(&mut west).await, start_caller(&mut east).await);
    curl_until(in_east, WEB, "web-in-west").await;
    curl_until(in_west, REMOTE, "remote-in-east").await;

    plane.signal_apiserver(Signal::SIGSTOP).unwrap();
    let stopped = Instant::now();
    let mut told = false;
    while stopped.elapsed() < 3 * LEASE {
        assert_eq!(curl(in_east, &[WEB]).await.status, 200);
        assert_eq!(curl(in_west, &[REMOTE]).await.status, 200);
        let status = west.status().await.unwrap();
        told |= status["leader"] == "nobody" && status["problems"].to_string().contains("can't be renewed");
    }
    assert!(told, "{}", west.status().await.unwrap());
    plane.signal_apiserver(Signal::SIGCONT).unwrap();
    until("somebody to lead again", async || {
        let (one, two) = (west.status().await.ok(), status_of_second(&west).await);
        [one, two].into_iter().flatten().any(|status| status["leader"] == "this replica").then_some(())
    })
    .await;
    plane.apply(&export("late")).await.unwrap();
    written(&plane, "late").await;
    in_sync(&east, "west").await;
    assert_eq!(curl(in_east, &[WEB]).await.status, 200);
    tokio::join!(east.stop(), west.stop(), second.process.stop(Duration::from_secs(5)));
    plane.stop().await;
}
