//! What the Terraform modules without a cloud render, applied for real: user data whose configuration two agents take, and
//! `ClusterPeer`s that link them.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{World, app, binary, curl_until, skip, tools};
use tombolo_testbed::{Process, terraform};

const WEB: &str = "http://web.shop.svc.clusterset.local/";
const START_TIME_MAX: Duration = Duration::from_secs(30);

fn free_tcp_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A machine that got the user data of `vm-agent`: its files, below a directory of the test's.
struct Machine {
    directory: PathBuf,
    sidecar: String,
    _process: Process,
}

impl Machine {
    async fn start(program: &Path, world: &World, cluster: &str, inputs: Value) -> Self {
        let directory = world.directory.path().join(cluster);
        let rendered =
            terraform::apply(program, &directory.join("terraform"), ("vm-agent", "user_data"), &inputs).unwrap();
        let user_data = rendered.as_str().unwrap();
        let cloud_config: Value = serde_saphyr::from_str(user_data.strip_prefix("#cloud-config\n").unwrap()).unwrap();
        let here = directory.to_str().unwrap();
        for file in cloud_config["write_files"].as_array().unwrap() {
            let path = file["path"].as_str().unwrap();
            let path = path.replace("/etc/tombolo", here).replace("/usr/", &format!("{here}/usr/"));
            let path = path.replace("/etc/systemd", &format!("{here}/systemd"));
            let content = file["content"].as_str().unwrap().replace("/etc/tombolo", here);
            std::fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
            std::fs::write(&path, content.replace("/var/lib/tombolo", &format!("{here}/state"))).unwrap();
        }
        let config = directory.join("agent.yaml").display().to_string();
        // Both machines are this one here, so the one port that every machine has to itself is chosen freely.
        let arguments = ["agent", "--config", &config, "--set", "federation.admin=127.0.0.1:0"];
        binary().run(&[&arguments[..], &["--check-config"]].concat()).await.unwrap();
        let mut process = Process::start(&binary(), "agent", &directory, &arguments).unwrap();
        let account = inputs["workloads"][0]["service_account"].as_str().unwrap();
        let sidecar = format!("sidecar-{account}/sidecar.json");
        for file in ["gateway/gateway.json", &sidecar] {
            let file = directory.join("state").join(file);
            process.wait_for(&file, Instant::now() + START_TIME_MAX, |_| Some(())).await.unwrap();
        }
        Self { directory, sidecar, _process: process }
    }

    fn roots(&self) -> String {
        std::fs::read_to_string(self.directory.join("state/federation/ca.pem")).unwrap()
    }

    fn outbound(&self) -> SocketAddr {
        let text = std::fs::read_to_string(self.directory.join("state").join(&self.sidecar)).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["addresses"]["outbound"].as_str().unwrap().parse().unwrap()
    }
}

#[tokio::test]
async fn machines_of_vm_agent_are_linked_by_what_peering_renders() {
    let Some(program) = terraform::find(&tools()) else { return skip(terraform::NEEDED) };
    let world = World::new().await;
    let web = app::http("web-in-the-west").await;
    let tunnel = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let advertise = format!("127.0.0.1:{tunnel}");
    let fetched = json!({ "url": "https://example.com/tombolo", "sha256": "0123456789abcdef".repeat(4) });
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../terraform/examples/aws-gcp-vm/west");
    let read = |name: &str| std::fs::read_to_string(example.join(name)).unwrap();
    let serves = json!([{ "service": "shop/web", "port": 80, "app": web.address, "protocol": "http" }]);
    let outbound = || format!("127.0.0.1:{}", free_tcp_port());
    let inputs = json!({
        "cluster": "west", "program": fetched, "tunnel_port": tunnel, "advertise": [advertise],
        "workloads": [{ "namespace": "shop", "service_account": "web", "outbound": outbound(), "services": serves }],
        "cluster_files": { "service.yaml": read("service.yaml"), "export.yaml": read("export.yaml") },
    });
    let west = Machine::start(&program, &world, "west", inputs).await;
    let unused = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let inputs = json!({
        "cluster": "east", "program": fetched, "tunnel_port": unused,
        "workloads": [{ "namespace": "shop", "service_account": "frontend", "outbound": outbound() }],
    });
    let east = Machine::start(&program, &world, "east", inputs).await;

    let clusters = json!({ "clusters": {
        "west": { "roots": west.roots(), "gateways": [advertise] },
        "east": { "roots": east.roots(), "imports": ["shop/*"] },
    } });
    let rendered =
        terraform::apply(&program, &world.directory.path().join("peering"), ("peering", "manifests"), &clusters)
            .unwrap();
    for (name, machine) in [("west", &west), ("east", &east)] {
        let manifest = rendered[name].as_str().unwrap();
        std::fs::write(machine.directory.join("cluster/peer.yaml"), manifest).unwrap();
    }
    let answer = curl_until(east.outbound(), WEB, "web-in-the-west").await;
    assert!(answer.body.contains("URI=spiffe://east.tombolo/ns/shop/sa/frontend"), "{answer:?}");
    assert_eq!(answer.header("tombolo-path"), Some("east/gateway > west/gateway"));
}
