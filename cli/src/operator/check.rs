//! `tombolo check`: gathers what there is to know of a running cluster, or of a role before it runs, and prints what
//! `tombolo_core::check` makes of it.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::json;
use tombolo_api::proto::operator::{PeerRow, ServiceRow, StatusRequest, StatusResponse};
use tombolo_core::check::{
    self, Dns, Facts, Finding, Gateway, Peer, Preflight, Root, Service, Severity, Tunnel, findings, preflight,
};
use tombolo_core::id::ServiceName;
use tombolo_runtime::config::{self, Validate};
use tombolo_runtime::federation::FederationConfig;

use super::client::{block_on, connect, refused};
use super::table;
use crate::args::{CheckCommand, Output};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

pub fn run(command: CheckCommand) -> anyhow::Result<()> {
    if command.fix_dns {
        return fix_dns(&command);
    }
    let roles = before_start(&command)?;
    let found = match roles.is_empty() {
        true => findings(&facts(&status(&command)?), Timestamp::now()),
        false => roles.iter().flat_map(preflight).collect(),
    };
    match command.output {
        Output::Json => anstream::println!("{}", serde_json::to_string_pretty(&json!({ "findings": found }))?),
        Output::Table => print(&found),
    }
    let problems = found.iter().filter(|finding| finding.severity == Severity::Problem).count();
    if problems > 0 {
        bail!("{problems} of {} findings are problems", found.len());
    }
    Ok(())
}

fn print(found: &[Finding]) {
    if found.is_empty() {
        anstream::println!("nothing is wrong");
        return;
    }
    let row = |finding: &Finding| {
        let (severity, area) = (finding.severity.as_str(), finding.area.as_str());
        vec![severity.into(), area.into(), finding.what.clone(), finding.fix.clone()]
    };
    table::print(&["severity", "area", "finding", "fix"], found.iter().map(row));
}

fn status(command: &CheckCommand) -> anyhow::Result<StatusResponse> {
    block_on(async {
        let mut operator = connect(&command.socket.state).await?;
        Ok(operator.status(StatusRequest {}).await.map_err(refused)?.into_inner())
    })
}

fn fix_dns(command: &CheckCommand) -> anyhow::Result<()> {
    let server = match command.dns_server {
        Some(server) => server,
        None => {
            let told = status(command)?.dns_address;
            let server: SocketAddr = told.parse().context(
                "the federation has no DNS server: set `dns: {listen: 0.0.0.0:15053}` in its configuration, or name one \
                 with --dns-server",
            )?;
            if server.ip().is_unspecified() {
                let port = server.port();
                bail!(
                    "the federation's DNS server listens at every address: name the one that CoreDNS reaches with \
                       --dns-server ADDRESS:{port} (in Kubernetes the ClusterIP of a Service in front of it)"
                );
            }
            server
        }
    };
    anstream::print!("{}", check::corefile(&server.to_string()));
    Ok(())
}

fn facts(status: &StatusResponse) -> Facts {
    let refused = status.sidecars.iter().flat_map(|row| {
        let refused = row.services.iter().filter(|service| service.contains("(refused: "));
        refused.map(|service| format!("{}: {service}", row.instance))
    });
    let root = |row: &tombolo_api::proto::operator::RootRow| {
        let expires = Timestamp::from_millisecond(row.expires_unix_ms).ok()?;
        Some(Root { cluster: row.cluster.clone(), own: row.own, expires })
    };
    let policies = status.unmatched_policies.iter();
    Facts {
        version: env!("CARGO_PKG_VERSION").into(),
        federation_version: status.version.clone(),
        gateways: status
            .gateways
            .iter()
            .map(|row| Gateway {
                id: row.gateway_id.clone(),
                connected: row.connected,
                advertises: !row.advertise.is_empty(),
            })
            .collect(),
        peers: status.peers.iter().map(peer).collect(),
        services: status.services.iter().map(service).collect(),
        roots: status.roots.iter().filter_map(root).collect(),
        unmatched_policies: policies.map(|row| (row.policy.clone(), row.service.clone())).collect(),
        source_problems: status.problems.iter().map(source_problem).collect(),
        refused_registrations: refused.collect(),
        dns: dns(status),
    }
}

fn source_problem(problem: &tombolo_api::proto::operator::SourceProblem) -> String {
    match problem.line {
        0 => format!("{}: {}", problem.file, problem.reason),
        line => format!("{}:{line}: {}", problem.file, problem.reason),
    }
}

fn peer(row: &PeerRow) -> Peer {
    let tunnels = row.tunnels.iter().map(|tunnel| Tunnel {
        gateway: tunnel.gateway_id.clone(),
        up: tunnel.reach == "up",
        remote_address: if tunnel.remote_address.is_empty() {
            tunnel.remote_gateway_id.clone()
        } else {
            tunnel.remote_address.clone()
        },
        last_error: tunnel.last_error.clone(),
        mtu: tunnel.mtu,
    });
    Peer {
        cluster: row.cluster.clone(),
        sync: row.sync.clone(),
        clock_ahead_ms: row.clock_ahead_ms,
        advertises: !row.gateways.is_empty(),
        imports: !row.imports.is_empty(),
        tunnels: tunnels.collect(),
        last_refusal: row.last_refusal.clone(),
    }
}

fn service(row: &ServiceRow) -> Service {
    let own = row.shares.iter().find(|share| share.local);
    Service {
        name: row.service.clone(),
        conflicts: row.conflicts.clone(),
        excluded: row.excluded.clone(),
        exported: own.is_some_and(|share| share.exported),
        endpoints: own.map_or(0, |share| share.endpoints),
        ready: own.map_or(0, |share| share.ready),
        has_server_ids: own.is_some_and(|share| !share.server_ids.is_empty()),
    }
}

/// Only where an API server is the source does this machine's resolver have to know the names: elsewhere sidecars answer.
fn dns(status: &StatusResponse) -> Dns {
    let server = Some(status.dns_address.clone()).filter(|address| !address.is_empty());
    let exported = status.services.iter().find(|row| row.shares.iter().any(|share| !share.local || share.exported));
    let name = exported.and_then(|row| Some(row.service.parse::<ServiceName>().ok()?.clusterset_name()));
    let failed = name.filter(|_| status.kubernetes && server.is_some()).and_then(|name| {
        let error = (name.as_str(), 0).to_socket_addrs().err()?;
        Some((name, error.to_string()))
    });
    Dns { kubernetes: status.kubernetes, server, failed }
}

/// What is known of each role whose configuration was given.
fn before_start(command: &CheckCommand) -> anyhow::Result<Vec<Preflight>> {
    let mut roles = Vec::new();
    if let Some(path) = &command.federation {
        roles.push(federation(&load(path)?));
    }
    if let Some(path) = &command.gateway {
        roles.push(gateway(&load(path)?));
    }
    if let Some(path) = &command.sidecar {
        roles.push(sidecar(&load(path)?));
    }
    Ok(roles)
}

fn load<C: DeserializeOwned + Validate>(path: &Path) -> anyhow::Result<C> {
    Ok(config::load(path)?)
}

fn federation(config: &tombolo_federation::Config) -> Preflight {
    let mut facts = Preflight { role: "federation".into(), ..Preflight::default() };
    facts.tcp("discovery", config.discovery);
    facts.tcp("legs", config.legs);
    facts.tcp("admin", config.admin);
    if let Some(dns) = &config.dns {
        facts.tcp("dns.listen", dns.listen);
        facts.udp("dns.listen", dns.listen);
    }
    facts.writable("state", &config.state);
    facts
}

fn gateway(config: &tombolo_gateway::Config) -> Preflight {
    let mut facts = Preflight { role: "gateway".into(), hidden: config.advertise.is_empty(), ..Preflight::default() };
    facts.udp("tunnel", config.tunnel);
    facts.tcp("ingress", config.ingress);
    facts.tcp("watch", config.watch);
    facts.tcp("admin", config.admin);
    facts.joins(&config.federation, config.join.as_deref(), config.token.as_deref(), &config.state);
    for address in &config.advertise {
        if let Err(error) = address.to_socket_addrs() {
            facts.names.push((address.clone(), error.to_string()));
        }
    }
    facts
}

fn sidecar(config: &tombolo_sidecar::Config) -> Preflight {
    let mut facts = Preflight { role: "sidecar".into(), ..Preflight::default() };
    facts.tcp("outbound", config.outbound);
    facts.tcp("inbound", config.inbound);
    facts.tcp("admin", config.admin);
    config.listeners.iter().for_each(|listener| facts.tcp("listeners", listener.listen));
    facts.joins(&config.federation, config.join.as_deref(), config.token.as_deref(), &config.state);
    facts
}

/// What gathering adds to the facts.
trait Gather {
    fn tcp(&mut self, field: &str, address: SocketAddr);
    fn udp(&mut self, field: &str, address: SocketAddr);
    fn writable(&mut self, field: &str, path: &Path);
    /// Of `join` and `token` a configuration has one at the most.
    fn joins(&mut self, federation: &FederationConfig, join: Option<&Path>, token: Option<&Path>, state: &Path);
}

impl Gather for Preflight {
    fn tcp(&mut self, field: &str, address: SocketAddr) {
        if let Err(error) = TcpListener::bind(address) {
            self.sockets.push((format!("{field} {address}/tcp"), error.to_string()));
        }
    }

    fn udp(&mut self, field: &str, address: SocketAddr) {
        if let Err(error) = UdpSocket::bind(address) {
            self.sockets.push((format!("{field} {address}/udp"), error.to_string()));
        }
    }

    /// The role makes the directory itself; the nearest one that is there has to let it.
    fn writable(&mut self, field: &str, path: &Path) {
        let there = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("."));
        if let Err(error) = nix::unistd::access(there, nix::unistd::AccessFlags::W_OK) {
            self.files.push((format!("{field} {}", path.display()), format!("{}: {error}", there.display())));
        }
    }

    fn joins(&mut self, federation: &FederationConfig, join: Option<&Path>, token: Option<&Path>, state: &Path) {
        self.writable("state", state);
        if let Err(error) = std::fs::read(&federation.ca) {
            self.files.push((format!("federation.ca {}", federation.ca.display()), error.to_string()));
        }
        let joined = tombolo_trust::identity::has_identity(state);
        let proofs = [("join", join), ("token", token)].into_iter().filter(|_| !joined);
        for (field, path) in proofs.filter_map(|(field, path)| Some((field, path?))) {
            if let Err(error) = std::fs::read(path) {
                self.files.push((format!("{field} {}", path.display()), error.to_string()));
            }
        }
        if let Err(error) = reach(&federation.address) {
            self.federation = Some((federation.address.clone(), error.to_string()));
        }
    }
}

fn reach(address: &str) -> std::io::Result<()> {
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}
