//! Two clusters in two network namespaces, and the link between them.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tombolo_testbed::{Binary, Cluster, Namespace, Sidecar};

use super::Plan;
use super::fault::{APP, Blow, CARRIER, GATEWAY, GATEWAY_2, Home, SERVER, Victim};
use crate::client::{Connection, Target};
use crate::wan::{End, Side, Wan};

pub const HOST: &str = "web.shop.svc.clusterset.local";
const EAST_ADDRESS: &str = "10.9.0.1";
const WEST_ADDRESS: &str = "10.9.0.2";
/// One way.
const DELAY: Duration = Duration::from_millis(2);
const LINK_TIME_MAX: Duration = Duration::from_secs(30);
/// Requests of which one should cross, where half of them do.
const CARRIER_TRIES: usize = 64;
const CARRIER_TIME_MAX: Duration = Duration::from_secs(5);

pub struct World {
    /// The caller's forward proxy.
    pub proxy: SocketAddr,
    east: Cluster,
    west: Cluster,
    wan: Wan,
    /// Where the applications listen, east's first.
    apps: [SocketAddr; 2],
    /// Which gateway [`CARRIER`] stands for since the last blow.
    carrier: String,
}

impl World {
    /// The calling thread is in `east` already.
    pub async fn start(plan: &Plan, east_side: &Namespace, west_side: &Namespace) -> anyhow::Result<Self> {
        let end = |namespace, address: &'static [&'static str]| End { namespace, device: "wan0", addresses: address };
        let wan = Wan::join(end(east_side, &["10.9.0.1/24"]), end(west_side, &["10.9.0.2/24"]), 1)?;
        wan.change(Side::Both, |conditions| conditions.delay = DELAY);
        let binary = Binary::at(&plan.binary).with_variable("TOMBOLO_WORKERS", "1");
        let (mut east, app_east) = cluster(Home::East, &binary.clone().inside(east_side), plan).await?;
        let (mut west, app_west) = cluster(Home::West, &binary.inside(west_side), plan).await?;
        for (name, listen) in [(GATEWAY, EAST_ADDRESS), (GATEWAY_2, EAST_ADDRESS)] {
            east.start_gateway(name, gateway(listen)).await?;
        }
        west.start_gateway(GATEWAY, gateway(WEST_ADDRESS)).await?;
        // Two of three endpoints are not there, so that half of the traffic crosses.
        east.write_resource("slice.yaml", SLICE)?;
        for (cluster, app) in [(&mut east, app_east), (&mut west, app_west)] {
            serve(cluster, app).await?;
        }
        let token = west.operator(&["peer", "invite", "--imports", "*"]).await?;
        let token = token.split_whitespace().last().context("`peer invite` printed no token")?;
        east.operator(&["peer", "accept", token, "--imports", "*"]).await?;
        west.operator(&["export", "shop/web"]).await?;
        in_sync(&east, Home::West).await?;
        let caller = Sidecar { name: "caller", workload: "shop/caller", config: Value::Null };
        let proxy = east.start_sidecar(caller).await?.address("outbound")?;
        Ok(Self { proxy, east, west, wan, apps: [app_east, app_west], carrier: GATEWAY.to_owned() })
    }

    pub async fn strike(&mut self, blow: &Blow) -> anyhow::Result<()> {
        self.carrier = carrier(self.proxy).await?;
        match *blow {
            Blow::Kill(victims) => {
                for victim in victims {
                    let name = self.name_of(*victim);
                    self.cluster(victim.home).kill(&name).await?;
                }
            }
            Blow::Stop(victims) => self.signal(victims, Signal::SIGSTOP)?,
            Blow::Cut(side) => self.wan.change(side, |conditions| conditions.cut = true),
        }
        Ok(())
    }

    pub async fn mend(&mut self, blow: &Blow) -> anyhow::Result<()> {
        match *blow {
            // In the order in which they need each other.
            Blow::Kill(victims) => {
                for victim in victims.iter().rev() {
                    self.start_again(*victim).await?;
                }
            }
            Blow::Stop(victims) => self.signal(victims, Signal::SIGCONT)?,
            Blow::Cut(side) => self.wan.change(side, |conditions| conditions.cut = false),
        }
        Ok(())
    }

    /// What the caller's sidecar and the gateways wrote last.
    pub fn last_words(&self) -> String {
        let processes = [(&self.east, "caller"), (&self.east, GATEWAY), (&self.west, GATEWAY), (&self.west, SERVER)];
        let tail = |(cluster, name): (&Cluster, &str)| {
            let tail = cluster.process(name).map(|process| process.log_tail());
            format!("{} of {}:\n{}", name, cluster.name, tail.unwrap_or_else(|error| format!("    {error}\n")))
        };
        processes.into_iter().map(tail).collect()
    }

    pub async fn stop(mut self) {
        self.east.stop().await;
        self.west.stop().await;
    }

    fn cluster(&mut self, home: Home) -> &mut Cluster {
        match home {
            Home::East => &mut self.east,
            Home::West => &mut self.west,
        }
    }

    fn name_of(&self, victim: Victim) -> String {
        if victim.process == CARRIER { self.carrier.clone() } else { victim.process.to_owned() }
    }

    fn signal(&mut self, victims: &[Victim], signal: Signal) -> anyhow::Result<()> {
        for victim in victims {
            let name = self.name_of(*victim);
            self.cluster(victim.home).process(&name)?.signal(signal);
        }
        Ok(())
    }

    async fn start_again(&mut self, victim: Victim) -> anyhow::Result<()> {
        if victim.process == APP {
            let listen = self.apps[victim.home as usize];
            start_app(self.cluster(victim.home), listen).await?;
        } else {
            let name = self.name_of(victim);
            self.cluster(victim.home).restart(&name).await?;
        }
        Ok(())
    }
}

/// Which gateway of the caller's cluster carries its requests, as the sidecar explains.
async fn carrier(proxy: SocketAddr) -> anyhow::Result<String> {
    let request = Target::proxied(proxy, HOST).request_with("/", "tombolo-explain: 1\r\n");
    for _ in 0..CARRIER_TRIES {
        let mut connection = Connection::open(proxy).await?;
        let answer = tokio::time::timeout(CARRIER_TIME_MAX, connection.exchange(&request)).await??;
        // As in `east/gw-1 > west/gw`.
        let path = answer.path.as_deref();
        let gateway = path.and_then(|path| path.split_once(" > ")?.0.split_once('/').map(|(_, gateway)| gateway));
        if let Some(gateway) = gateway {
            return Ok(gateway.to_owned());
        }
    }
    bail!("none of {CARRIER_TRIES} requests crossed to the other cluster")
}

const SLICE: &str = "\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 80}]
endpoints:
- {addresses: [10.1.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: web}}
- {addresses: [10.1.0.2], conditions: {ready: true}, targetRef: {kind: Pod, name: web-2}}
- {addresses: [10.1.0.3], conditions: {ready: true}, targetRef: {kind: Pod, name: web-3}}
";

fn gateway(address: &str) -> Value {
    json!({ "tunnel": format!("{address}:0"), "advertise": [format!("{address}:0")] })
}

/// A cluster with its federation and its application.
async fn cluster(home: Home, binary: &Binary, plan: &Plan) -> anyhow::Result<(Cluster, SocketAddr)> {
    let mut cluster = Cluster::new(binary, home.name(), &plan.folder, json!({}))?;
    cluster.declare_service("shop", "web", &[("http", 80)])?;
    cluster.start_federation(json!({})).await?;
    let app = start_app(&mut cluster, SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    Ok((cluster, app))
}

async fn start_app(cluster: &mut Cluster, listen: SocketAddr) -> anyhow::Result<SocketAddr> {
    let announce = cluster.dir().join("app.address");
    let (listen, name, path) = (listen.to_string(), cluster.name.clone(), announce.display().to_string());
    let arguments = ["demo-app", "--listen", &listen, "--name", &name, "--announce", &path];
    cluster.start_other(APP, &arguments, Path::new(&announce), |text| text.parse().ok()).await
}

async fn serve(cluster: &mut Cluster, app: SocketAddr) -> anyhow::Result<()> {
    // The kernel accepts connections for a stopped application: what is found out is found out by the requests.
    let service = json!({
        "service": "shop/web", "port": 80, "app": app, "protocol": "http",
        "health": { "tcp": {}, "interval": "500ms", "timeout": "1s" },
    });
    let config = json!({ "services": [service] });
    cluster.start_sidecar(Sidecar { name: SERVER, workload: "shop/web", config }).await?;
    Ok(())
}

async fn in_sync(cluster: &Cluster, peer: Home) -> anyhow::Result<()> {
    let deadline = Instant::now() + LINK_TIME_MAX;
    loop {
        let status = cluster.status().await?;
        let peers = status["peers"].as_array().into_iter().flatten();
        if peers.into_iter().any(|row| row["cluster"] == peer.name() && row["sync"] == "fresh") {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{} is not in sync with {} after {LINK_TIME_MAX:?}: {status}", cluster.name, peer.name());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
