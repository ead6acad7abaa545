//! The demo's steps. Every fact printed is read from the running processes; a step that did not really
//! happen ends the script with its name.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use hyper::HeaderMap;
use serde_json::{Value, json};
use tombolo_testbed::{Binary, Cluster, Process, Sidecar};

use super::app::Greeting;
use super::load::{self, Caller, Load, Outcome, quantile};
use super::screen::Screen;
use crate::args::DemoOptions;

/// File in which a cluster's application says where it listens.
const APP_ADDRESS: &str = "app.address";

/// How long any single condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(15);

pub struct Script {
    binary: Binary,
    east: Cluster,
    west: Cluster,
    tunnel_port: u16,
    /// Outbound listener of the workload `frontend` in east, once it runs.
    frontend: Option<SocketAddr>,
}

impl Script {
    pub fn new(directory: &Path, options: &DemoOptions) -> anyhow::Result<Self> {
        let binary = Binary::this()?;
        let common = match &options.otlp {
            Some(url) => json!({ "telemetry": { "otlp": url } }),
            None => json!({}),
        };
        let cluster = |name| -> anyhow::Result<Cluster> {
            let cluster = Cluster::new(&binary, name, directory, common.clone())?;
            cluster.declare_service("shop", "web", &[("http", 80)])?;
            Ok(cluster)
        };
        Ok(Self {
            east: cluster("east")?,
            west: cluster("west")?,
            binary,
            tunnel_port: options.tunnel_port,
            frontend: None,
        })
    }

    pub async fn run(&mut self, screen: &mut Screen) -> anyhow::Result<()> {
        screen.step("Two clusters, each with its own root of trust");
        self.start(screen).await.context("step 1, starting two clusters")?;
        screen.step("Link them: one invitation, one UDP port");
        self.link(screen).await.context("step 2, linking the clusters")?;
        screen.step("Export web.shop from west; call it from east");
        self.cross(screen).await.context("step 3, a request crosses")?;
        screen.step("A local web.shop in east: local first");
        self.local_first(screen).await.context("step 4, local first")?;
        screen.step("Kill the local app under 200 requests/s");
        let (load, address) = self.fail_over(screen).await.context("step 5, failover")?;
        screen.step("Start it again: traffic returns");
        self.recover(screen, load, address).await.context("step 6, recovery")
    }

    async fn start(&mut self, screen: &Screen) -> anyhow::Result<()> {
        let began = Instant::now();
        let (east, west) = (&mut self.east, &mut self.west);
        let tunnel_port = self.tunnel_port;
        let start_east = async {
            east.start_federation(Value::Null).await?;
            let gateway = east.start_gateway("gw", json!({ "tunnel": format!("127.0.0.1:{tunnel_port}") })).await?;
            let frontend = Sidecar { name: "frontend", workload: "shop/frontend", config: Value::Null };
            let frontend = east.start_sidecar(frontend).await?;
            anyhow::Ok((gateway.address("tunnel")?, frontend.address("outbound")?))
        };
        let start_west = async {
            west.start_federation(Value::Null).await?;
            let gateway = west.start_gateway("gw", Value::Null).await?;
            start_web(west).await?;
            gateway.address("tunnel")
        };
        let ((east_tunnel, frontend), west_tunnel) = tokio::try_join!(start_east, start_west)?;
        self.frontend = Some(frontend);
        for (cluster, tunnel) in [(&self.east, east_tunnel), (&self.west, west_tunnel)] {
            let status = cluster.status().await?;
            let root = text(&status, "rootSha256");
            let domain = text(&status, "trustDomain");
            screen.fact(
                &cluster.name,
                format!("trust domain {domain}, root {}…, tunnel {tunnel}/udp", &root[..16.min(root.len())]),
            );
        }
        let processes = self.east.process_count() + self.west.process_count();
        screen.result(format!("{processes} processes ready after {:.1} s", began.elapsed().as_secs_f64()));
        Ok(())
    }

    async fn link(&mut self, screen: &Screen) -> anyhow::Result<()> {
        screen.command("tombolo peer invite --imports 'shop/*'            # in west");
        let token = self.west.operator(&["peer", "invite", "--imports", "shop/*"]).await?;
        screen.fact("token", format!("{}… ({} characters, one use)", &token[..24.min(token.len())], token.len()));
        screen.command("tombolo peer accept TOKEN --imports 'shop/*'      # in east");
        let accepted = self.east.operator(&["peer", "accept", &token, "--imports", "shop/*"]).await?;
        screen.fact("east", accepted.lines().next().unwrap_or_default());
        let began = Instant::now();
        let rtt_us = until("a tunnel and peer sync in both directions", async || {
            let (east, west) = (self.east.status().await?, self.west.status().await?);
            Ok(peer_in_sync(&east, "west").and(peer_in_sync(&west, "east")))
        })
        .await?;
        #[allow(clippy::cast_precision_loss)]
        let rtt_ms = rtt_us as f64 / 1000.0;
        screen.result(format!(
            "tunnel up (round trip {rtt_ms:.1} ms) and synced both ways after {:.0} ms",
            began.elapsed().as_secs_f64() * 1000.0
        ));
        let again = self.east.operator(&["peer", "accept", &token, "--imports", "shop/*"]).await;
        let refused = again.err().context("the used token was accepted a second time")?;
        let reason = refused.to_string();
        screen.result(format!("the same token again is refused: {}", reason.lines().next().unwrap_or_default()));
        Ok(())
    }

    async fn cross(&mut self, screen: &Screen) -> anyhow::Result<()> {
        let proxy = self.frontend()?;
        let mut caller = Caller::new(proxy);
        let refused = caller.call().await.err().context("an unexported service was reachable")?;
        screen.fact("before", format!("{refused:#}").lines().next().unwrap_or_default());
        screen.command("tombolo export web.shop                           # in west");
        self.west.operator(&["export", "web.shop"]).await?;
        let began = Instant::now();
        let (headers, greeting) = until("a crossing request to succeed", async || Ok(caller.call().await.ok())).await?;
        let took = began.elapsed();
        screen.command(&format!("curl -x http://{proxy} {}", load::URL));
        ensure!(greeting.app == "web in west", "{} answered instead of web in west", greeting.app);
        show_path(screen, &headers, &greeting)?;
        screen.result(format!("first success {:.0} ms after the export", took.as_secs_f64() * 1000.0));
        Ok(())
    }

    async fn local_first(&mut self, screen: &Screen) -> anyhow::Result<()> {
        start_web(&mut self.east).await?;
        let mut caller = Caller::new(self.frontend()?);
        let (headers, greeting) = until("the local endpoint to take the traffic", async || {
            Ok(caller.call().await.ok().filter(|(_, greeting)| greeting.app == "web in east"))
        })
        .await?;
        show_path(screen, &headers, &greeting)?;
        screen.result("answered in its own cluster, straight from sidecar to sidecar");
        Ok(())
    }

    async fn fail_over(&mut self, screen: &Screen) -> anyhow::Result<(Load, SocketAddr)> {
        let mut load = Load::start(self.frontend()?);
        let mut before = Vec::new();
        until("a steady load on the local app", async || {
            before.extend(load.drain());
            Ok((before.len() >= 200).then_some(()))
        })
        .await?;
        let lost = before.iter().filter(|outcome| outcome.answer.is_err()).count();
        ensure!(lost == 0, "{lost} of {} requests failed before anything was killed", before.len());
        screen.fact(
            "before",
            format!(
                "{} requests, p50 {}, p99 {}",
                before.len(),
                ms(quantile(&before, 0.5)),
                ms(quantile(&before, 0.99))
            ),
        );
        let pid = self.app_pid();
        let address = std::fs::read_to_string(self.east.dir().join(APP_ADDRESS))?.parse()?;
        let killed = Instant::now();
        self.east.kill("app").await?;
        screen.command(&format!("kill -9 {pid}                                     # web in east"));
        let mut after: Vec<Outcome> = Vec::new();
        until("a second of answers from west alone", async || {
            after.extend(load.drain());
            let settled = Instant::now() - Duration::from_secs(1);
            let recent: Vec<_> = after.iter().filter(|outcome| outcome.began > settled).collect();
            Ok((killed.elapsed() > Duration::from_millis(1500)
                && recent.len() > 50
                && recent.iter().all(|outcome| served_by(outcome, "west")))
            .then_some(()))
        })
        .await?;
        let since: Vec<Outcome> = after.into_iter().filter(|outcome| outcome.began >= killed).collect();
        let failed = since.iter().filter(|outcome| outcome.answer.is_err()).count();
        let first =
            since.iter().filter(|outcome| served_by(outcome, "west")).map(|outcome| outcome.began + outcome.took).min();
        let first = first.map(|at| at.saturating_duration_since(killed)).context("no request was answered by west")?;
        screen.fact("west", format!("first answer {} after the kill", ms(first)));
        screen.fact("slowest", ms(quantile(&since, 1.0)));
        if let Some(reason) = since.iter().find_map(|outcome| outcome.answer.as_ref().err()) {
            bail!("{failed} of {} requests failed, first: {reason}", since.len());
        }
        screen.result(format!("{failed} of {} requests failed", since.len()));
        Ok((load, address))
    }

    async fn recover(&mut self, screen: &Screen, mut load: Load, address: SocketAddr) -> anyhow::Result<()> {
        start_app(&mut self.east, address).await?;
        let began = Instant::now();
        let mut seen = Vec::new();
        until("traffic to return to the local app", async || {
            let fresh = load.drain();
            let home = fresh.iter().any(|outcome| served_by(outcome, "east"));
            seen.extend(fresh);
            Ok(home.then_some(()))
        })
        .await?;
        let took = began.elapsed();
        seen.extend(load.stop().await);
        let failed = seen.iter().filter(|outcome| outcome.answer.is_err()).count();
        if let Some(reason) = seen.iter().find_map(|outcome| outcome.answer.as_ref().err()) {
            bail!("{failed} of {} requests failed, first: {reason}", seen.len());
        }
        screen.result(format!(
            "back in east {} after the app was up; {failed} of {} requests failed",
            ms(took),
            seen.len()
        ));
        Ok(())
    }

    /// What to try while everything is up.
    pub fn explain_by_hand(&self, screen: &Screen) {
        let Some(proxy) = self.frontend else { return };
        let tombolo = self.binary.path().display();
        screen.line("\nEverything stays up. To try by hand, in another terminal:\n");
        screen.line(format!("  curl -x http://{proxy} {}", load::URL));
        screen.line(format!("  curl -x http://{proxy} -H 'tombolo-explain: 1' -i {}", load::URL));
        screen.line(format!("  {tombolo} status --state {}", self.east.state()));
        screen.line(format!("  kill -9 {}    # the local app: curl again, west answers", self.app_pid()));
        screen.line(format!("  {tombolo} unexport web.shop --state {}", self.west.state()));
        screen.line("\nCtrl-C stops everything and removes its files.");
    }

    pub async fn stop(&mut self) {
        tokio::join!(self.east.stop(), self.west.stop());
    }

    fn app_pid(&self) -> u32 {
        self.east.process("app").ok().and_then(Process::pid).unwrap_or_default()
    }

    fn frontend(&self) -> anyhow::Result<SocketAddr> {
        self.frontend.context("the frontend's sidecar is not running")
    }
}

/// The application `web` of a cluster and the sidecar that delivers to it.
async fn start_web(cluster: &mut Cluster) -> anyhow::Result<()> {
    let app = start_app(cluster, SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let service = json!({
        "service": "shop/web",
        "port": 80,
        "app": app,
        "protocol": "http",
        "health": { "http": { "path": "/healthz" }, "interval": "200ms", "timeout": "1s" },
    });
    let sidecar = Sidecar { name: "web", workload: "shop/web", config: json!({ "services": [service] }) };
    cluster.start_sidecar(sidecar).await?;
    Ok(())
}

/// The application alone; given an address, it comes back where it was.
async fn start_app(cluster: &mut Cluster, listen: SocketAddr) -> anyhow::Result<SocketAddr> {
    let (announce, name) = (cluster.dir().join(APP_ADDRESS), format!("web in {}", cluster.name));
    let (listen, path) = (listen.to_string(), announce.display().to_string());
    let arguments = ["demo-app", "--listen", &listen, "--name", &name, "--announce", &path];
    cluster.start_other("app", &arguments, &announce, |text| text.parse().ok()).await
}

/// Prints which way a request took and who proved to be who, as the far ends tell it.
fn show_path(screen: &Screen, headers: &HeaderMap, greeting: &Greeting) -> anyhow::Result<()> {
    let header = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.map(str::to_owned).with_context(|| format!("the sidecar gave no {name} header"))
    };
    screen.fact("answered by", &greeting.app);
    screen.fact("path", header("tombolo-path")?);
    screen.fact("server is", format!("{} (verified by the caller's sidecar)", header("tombolo-server-id")?));
    let caller = greeting.caller.as_deref().context("the application was not told who called")?;
    let uri = caller.split(';').find_map(|part| part.strip_prefix("URI=")).unwrap_or(caller);
    screen.fact("caller is", format!("{uri} (verified by the server's sidecar)"));
    Ok(())
}

fn served_by(outcome: &Outcome, cluster: &str) -> bool {
    outcome.answer.as_ref().is_ok_and(|app| app.ends_with(cluster))
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// The round trip of the tunnel to `peer` in microseconds, once it is up and peer sync is fresh.
fn peer_in_sync(status: &Value, peer: &str) -> Option<u64> {
    let rows = status.get("peers")?.as_array()?;
    let row = rows.iter().find(|row| text(row, "cluster") == peer)?;
    let tunnels = row.get("tunnels")?.as_array()?;
    let tunnel = tunnels.iter().find(|tunnel| text(tunnel, "reach") == "up")?;
    (text(row, "sync") == "fresh").then(|| tunnel.get("rttUs").and_then(Value::as_u64))?
}

/// Asks until there is an answer; after [`PATIENCE`] says what was waited for.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {PATIENCE:?} for {what}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
