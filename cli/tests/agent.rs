//! `tombolo agent`: machines that are clusters of their own, each one process.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{World, app, binary, curl_until, until};
use tokio::process::Command;
use tombolo_testbed::Process;

const WEB: &str = "http://web.shop.svc.clusterset.local/";
const START_TIME_MAX: Duration = Duration::from_secs(30);

struct Agent {
    directory: PathBuf,
    process: Option<Process>,
}

fn free_tcp_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn free_udp_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Agent {
    async fn start(world: &World, cluster: &str, workload: &str, sidecar: Value) -> Self {
        let directory = world.directory.path().join(cluster);
        std::fs::create_dir_all(directory.join("cluster")).unwrap();
        // The same over restarts: where both ends of a link move, nobody finds the other again.
        let tunnel = format!("127.0.0.1:{}", free_udp_port());
        let mut fields = json!({ "outbound": "127.0.0.1:0" });
        fields.as_object_mut().unwrap().extend(sidecar.as_object().unwrap().clone());
        let config = json!({
            "cluster": cluster,
            "state": directory.join("state"),
            "directory": directory.join("cluster"),
            "federation": { "admin": "127.0.0.1:0" },
            "gateway": { "tunnel": tunnel, "advertise": [tunnel] },
            "workloads": [{ "namespace": "shop", "serviceAccount": workload, "sidecar": fields }],
            "drainDeadline": "2s",
        });
        std::fs::write(directory.join("agent.yaml"), serde_saphyr::to_string(&config).unwrap()).unwrap();
        let mut agent = Self { directory, process: None };
        agent.run(workload).await;
        agent
    }

    /// Runs it until everything in it listens.
    async fn run(&mut self, workload: &str) {
        let announced = [self.announcement(workload), self.state().join("gateway/gateway.json")];
        announced.iter().for_each(|file| drop(std::fs::remove_file(file)));
        let config = self.directory.join("agent.yaml").display().to_string();
        let mut process = Process::start(&binary(), "agent", &self.directory, &["agent", "--config", &config]).unwrap();
        for file in &announced {
            process.wait_for(file, Instant::now() + START_TIME_MAX, |_| Some(())).await.unwrap();
        }
        self.process = Some(process);
    }

    async fn kill(&mut self) {
        self.process.take().unwrap().kill().await.unwrap();
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn announcement(&self, workload: &str) -> PathBuf {
        self.state().join(format!("sidecar-{workload}/sidecar.json"))
    }

    fn outbound(&self, workload: &str) -> SocketAddr {
        let text = std::fs::read_to_string(self.announcement(workload)).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["addresses"]["outbound"].as_str().unwrap().parse().unwrap()
    }

    async fn operator(&self, arguments: &[&str]) -> String {
        let state = self.state().display().to_string();
        binary().run(&[arguments, &["--state", &state]].concat()).await.unwrap()
    }

    /// The keys of every identity in it.
    fn keys(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let roles = std::fs::read_dir(self.state()).unwrap().map(|entry| entry.unwrap().path());
        let keys = roles.map(|role| role.join("identity/key.pem")).filter(|key| key.exists());
        keys.chain([self.state().join("federation/ca.json")])
            .map(|key| (key.clone(), std::fs::read(key).unwrap()))
            .collect()
    }
}

#[tokio::test]
async fn two_agents_link_and_a_kill_keeps_their_identities() {
    let world = World::new().await;
    let web = app::http("web-on-the-server").await;
    let service = json!({ "service": "shop/web", "port": 80, "app": web.address, "protocol": "http" });
    let mut server = Agent::start(&world, "server", "web", json!({ "services": [service] })).await;
    let mut laptop = Agent::start(&world, "laptop", "frontend", json!({})).await;
    let yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, annotations: {tombolo.dev/service-accounts: web}}\nspec: {ports: [{name: http, port: 80}]}\n";
    std::fs::write(server.directory.join("cluster/web.yaml"), yaml).unwrap();

    let token = server.operator(&["peer", "invite", "--imports", "none"]).await;
    laptop.operator(&["peer", "accept", &token, "--imports", "shop/*"]).await;
    until("the service to be known", async || {
        binary().run(&["export", "web.shop", "--state", server.state().to_str()?]).await.ok()
    })
    .await;
    let answer = curl_until(laptop.outbound("frontend"), WEB, "web-on-the-server").await;
    assert!(answer.body.contains("URI=spiffe://laptop.tombolo/ns/shop/sa/frontend"), "{answer:?}");
    assert_eq!(answer.header("tombolo-path"), Some("laptop/gateway > server/gateway"));

    for which in [0, 1] {
        let (agent, workload) = if which == 0 { (&mut laptop, "frontend") } else { (&mut server, "web") };
        let (keys, joins) = (agent.keys(), agent.operator(&["join", "list", "-o", "json"]).await);
        assert_eq!(keys.len(), 3, "federation, gateway and sidecar: {keys:?}");
        agent.kill().await;
        agent.run(workload).await;
        assert_eq!(agent.keys(), keys);
        assert_eq!(agent.operator(&["join", "list", "-o", "json"]).await, joins, "nobody had to join again");
        curl_until(laptop.outbound("frontend"), WEB, "web-on-the-server").await;
    }

    // A polite end leaves no announcement behind.
    for (agent, workload) in [(&mut laptop, "frontend"), (&mut server, "web")] {
        agent.process.as_ref().unwrap().signal(Signal::SIGTERM);
        let (announced, federation) = (agent.announcement(workload), agent.state().join("federation/federation.json"));
        until("the agent to drain", async || (!announced.exists() && !federation.exists()).then_some(())).await;
    }
}

#[tokio::test]
async fn an_agent_whose_part_cannot_start_says_which_and_ends() {
    let world = World::new().await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let directory = world.directory.path();
    std::fs::create_dir(directory.join("cluster")).unwrap();
    let config = json!({
        "cluster": "laptop",
        "state": directory.join("state"),
        "directory": directory.join("cluster"),
        "federation": { "admin": "127.0.0.1:0" },
        "gateway": { "tunnel": "127.0.0.1:0", "ingress": taken.local_addr().unwrap() },
    });
    std::fs::write(directory.join("agent.yaml"), serde_saphyr::to_string(&config).unwrap()).unwrap();
    let mut command = Command::new(binary().path());
    command.args(["agent", "--config"]).arg(directory.join("agent.yaml")).kill_on_drop(true).stdin(Stdio::null());
    let output = tokio::time::timeout(START_TIME_MAX, command.output()).await.expect("it ends by itself").unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && errors.contains("error: gateway: can't listen on TCP"), "{errors}");
}

/// The README's example, as it stands there but for its ports.
#[tokio::test]
async fn the_example_of_the_readme_works_when_pasted() {
    let world = World::new().await;
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let example = readme.split("<!-- check: agents -->").nth(1).unwrap();
    let mut script = example.split("```sh\n").nth(1).unwrap().split("```").next().unwrap().to_owned();
    let ports = [free_tcp_port(), free_udp_port(), free_udp_port(), free_tcp_port()];
    for (port, free) in ["8080", "16443", "17443", "16001"].into_iter().zip(ports) {
        assert!(script.contains(port), "{port}");
        script = script.replace(port, &free.to_string());
    }
    let path = format!("{}:{}", binary().path().parent().unwrap().display(), std::env::var("PATH").unwrap());
    // Whatever the example leaves running ends with it.
    let script = format!("set -e\ntrap 'kill $(jobs -p)' EXIT\n{script}");
    let mut command = Command::new("bash");
    command.args(["-c", &script]).current_dir(world.directory.path()).env("PATH", path).env_remove("TOMBOLO_STATE");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
    let (shown, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && shown.contains("hello from the server"), "{script}\n{shown}\n{errors}");
}
