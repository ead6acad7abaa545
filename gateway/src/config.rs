//! The gateway's configuration: one YAML file, parsed once.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tombolo_core::id::GatewayId;
use tombolo_runtime::config::{Problem, Validate};
use tombolo_runtime::federation::{FederationConfig, is_host_port, proof_problem};
use tombolo_runtime::logging::LogConfig;
use tombolo_runtime::telemetry::TelemetryConfig;

/// DNS servers of one gateway.
const RESOLVERS_MAX: usize = 8;

/// Everything a gateway is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Stable over restarts; the instance in the gateway's identity.
    pub id: GatewayId,
    pub federation: FederationConfig,
    /// File with the join token. Not needed once an identity is in `state`.
    pub join: Option<PathBuf>,
    /// File with a projected service-account token, in the place of `join` where the federation's source is Kubernetes.
    pub token: Option<PathBuf>,
    /// Directory for the identity and the keys of the tunnel's socket.
    pub state: PathBuf,
    /// UDP address of the tunnels.
    #[serde(default = "default_tunnel")]
    pub tunnel: SocketAddr,
    /// host:port at which peers can dial `tunnel`, with port 0 for the port that it is bound to; empty when they
    /// can't dial it.
    #[serde(default)]
    pub advertise: Vec<String>,
    /// TCP address where this cluster's sidecars bring legs.
    #[serde(default = "default_ingress")]
    pub ingress: SocketAddr,
    /// gRPC address that tells sidecars which clusters are reachable.
    #[serde(default = "default_watch")]
    pub watch: SocketAddr,
    /// host:port at which this cluster's sidecars reach `ingress`; where it is bound, unless that is every address.
    pub advertise_ingress: Option<String>,
    /// The same for `watch`.
    pub advertise_watch: Option<String>,
    /// Address of the listeners for workloads without a sidecar; there are none if absent, or if the federation has no
    /// ports for them.
    pub unmeshed: Option<IpAddr>,
    /// The address at which those workloads reach `unmeshed`, unless that is it.
    pub advertise_unmeshed: Option<IpAddr>,
    /// Sources that these listeners serve; everybody if empty.
    #[serde(default)]
    pub unmeshed_sources: Vec<SourceRange>,
    /// Sources that may put a PROXY header in front of a leg.
    #[serde(default = "default_proxy_sources")]
    pub proxy_sources: Vec<SourceRange>,
    /// DNS servers that know the names of peers' gateways; those of the system when empty.
    #[serde(default)]
    pub resolvers: Vec<SocketAddr>,
    #[serde(default)]
    pub congestion: Congestion,
    #[serde(default)]
    pub limits: LimitsConfig,
    #[serde(default = "default_admin")]
    pub admin: SocketAddr,
    #[serde(default)]
    pub telemetry: TelemetryConfig,
    #[serde(default)]
    pub log: LogConfig,
    #[serde(with = "humantime_serde", default = "default_drain_deadline")]
    pub drain_deadline: Duration,
}

/// Congestion control of the tunnels. Loss-based control starves on a path that loses one packet in a
/// hundred, so the default is rate-based.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    #[default]
    Bbr,
    Cubic,
}

/// Bounds of what callers and peers can make a gateway hold.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Legs of this process.
    pub legs: u32,
    /// Legs that one tunnel connection may carry in each direction.
    pub legs_per_tunnel: u32,
    /// Legs of one source address whose way is not open yet.
    pub unfinished_legs_per_source: u32,
    /// New legs a second of one source address; twice as many at once.
    pub new_legs_per_second_per_source: u32,
    /// Octets that wait for one receiver.
    pub stream_window: u32,
    /// Octets sent on one tunnel connection that are not acknowledged yet.
    pub send_window: u64,
    /// Octets that wait for receivers which have stopped reading, in the whole process.
    pub stalled: u64,
    /// Handshakes on the tunnel port that are under way.
    pub handshakes: u32,
    /// Peering attempts that are under way.
    pub peerings: u32,
    /// Tunnel connections with one peer; the oldest ones end above it.
    pub connections_per_peer: u32,
    /// Sidecars that watch this gateway.
    pub watchers: u32,
    /// Connections of workloads without a sidecar.
    pub unmeshed_connections: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            legs: 20_000,
            legs_per_tunnel: 8_192,
            unfinished_legs_per_source: 4_096,
            new_legs_per_second_per_source: 20_000,
            stream_window: 384 * 1024,
            send_window: 64 * 1024 * 1024,
            stalled: 96 * 1024 * 1024,
            handshakes: 256,
            peerings: 16,
            connections_per_peer: 32,
            watchers: 10_000,
            unmeshed_connections: 4_096,
        }
    }
}

fn default_tunnel() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 15443))
}

fn default_ingress() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15443))
}

fn default_watch() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15012))
}

fn default_admin() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15020))
}

fn default_drain_deadline() -> Duration {
    Duration::from_secs(30)
}

fn default_proxy_sources() -> Vec<SourceRange> {
    ["127.0.0.0/8", "::1/128"].map(|text| text.parse().expect("a constant valid range")).into()
}

impl Validate for Config {
    fn validate(&self) -> Vec<Problem> {
        let mut problems = self.log.problems("log");
        problems.extend(self.telemetry.problems("telemetry"));
        problems.extend(self.federation.problems("federation"));
        problems.extend(proof_problem(self.join.as_ref(), self.token.as_ref()));
        for (number, address) in self.advertise.iter().enumerate() {
            if !is_advertisable(address) {
                problems.push(Problem::new(format!("advertise[{number}]"), "write host:port"));
            }
        }
        problems.extend(reachable("advertiseIngress", self.advertise_ingress.as_deref(), "ingress", self.ingress));
        problems.extend(reachable("advertiseWatch", self.advertise_watch.as_deref(), "watch", self.watch));
        if self.resolvers.len() > RESOLVERS_MAX {
            problems.push(Problem::new("resolvers", format!("at most {RESOLVERS_MAX}")));
        }
        problems.extend(self.unmeshed_problem());
        problems.extend(self.limits.problems());
        problems
    }
}

impl Config {
    /// Where workloads without a sidecar reach the listeners for them.
    pub fn unmeshed_address(&self) -> Option<IpAddr> {
        self.unmeshed.map(|bound| self.advertise_unmeshed.unwrap_or(bound))
    }

    fn unmeshed_problem(&self) -> Option<Problem> {
        let Some(bound) = self.unmeshed else {
            let reason = "needs `unmeshed` beside it, the address that the listeners are bound to";
            return self.advertise_unmeshed.map(|_| Problem::new("advertiseUnmeshed", reason));
        };
        let reason = format!("`unmeshed` is every address ({bound}), so say at which one workloads reach it");
        let reached = self.unmeshed_address().is_some_and(|address| !address.is_unspecified());
        (!reached).then(|| Problem::new("advertiseUnmeshed", reason))
    }
}

/// Sidecars are told where a socket is, and nobody can dial "every address".
fn reachable(field: &str, address: Option<&str>, of: &str, bound: SocketAddr) -> Option<Problem> {
    match address {
        Some(address) if is_advertisable(address) => None,
        Some(_) => Some(Problem::new(field, "write host:port")),
        None if bound.ip().is_unspecified() => {
            let reason = format!(
                "`{of}` listens on every address ({bound}), so say at which one this cluster's sidecars reach it: \
                 {field}: HOST:{}",
                bound.port()
            );
            Some(Problem::new(field, reason))
        }
        None => None,
    }
}

/// Port 0 stands for the port that was bound.
fn is_advertisable(address: &str) -> bool {
    is_host_port(address) || address.strip_suffix(":0").is_some_and(|host| !host.is_empty())
}

impl LimitsConfig {
    fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut at_least = |field: &str, value: u64, least: u64| {
            if value < least {
                problems.push(Problem::new(format!("limits.{field}"), format!("at least {least}")));
            }
        };
        at_least("legs", self.legs.into(), 1);
        at_least("legsPerTunnel", self.legs_per_tunnel.into(), 1);
        at_least("unfinishedLegsPerSource", self.unfinished_legs_per_source.into(), 1);
        at_least("newLegsPerSecondPerSource", self.new_legs_per_second_per_source.into(), 1);
        at_least("streamWindow", self.stream_window.into(), 16 * 1024);
        at_least("sendWindow", self.send_window, self.stream_window.into());
        at_least("stalled", self.stalled, self.stream_window.into());
        at_least("handshakes", self.handshakes.into(), 1);
        at_least("peerings", self.peerings.into(), 1);
        at_least("connectionsPerPeer", self.connections_per_peer.into(), 2);
        at_least("watchers", self.watchers.into(), 1);
        at_least("unmeshedConnections", self.unmeshed_connections.into(), 1);
        // quinn closes a connection with more than 1,024 gaps in one stream: about 2.9 MB of packets.
        if self.stream_window > 2 * 1024 * 1024 {
            problems.push(Problem::new("limits.streamWindow", "at most 2097152"));
        }
        if self.legs_per_tunnel > 100_000 {
            problems.push(Problem::new("limits.legsPerTunnel", "at most 100000"));
        }
        problems
    }
}

/// Addresses by prefix, written `10.0.0.0/8`; a bare address names itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceRange {
    base: IpAddr,
    prefix: u32,
}

impl SourceRange {
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.base, address.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                same_prefix(base.to_bits().into(), address.to_bits().into(), 32 - self.prefix)
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                same_prefix(base.to_bits(), address.to_bits(), 128 - self.prefix)
            }
            _ => false,
        }
    }
}

fn same_prefix(one: u128, other: u128, ignored: u32) -> bool {
    (one ^ other).checked_shr(ignored).unwrap_or(0) == 0
}

impl FromStr for SourceRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is no address range: write 10.0.0.0/8, fd00::/8 or one address");
        let (base, prefix) = match text.split_once('/') {
            Some((base, prefix)) => (base, Some(prefix)),
            None => (text, None),
        };
        let base: IpAddr = base.parse().map_err(|_| refuse())?;
        let longest = if base.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(longest), str::parse).map_err(|_| refuse())?;
        if prefix > longest { Err(refuse()) } else { Ok(Self { base, prefix }) }
    }
}

impl fmt::Display for SourceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl Serialize for SourceRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SourceRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::Path;

    const SMALLEST: &str = "id: gw-1\nfederation:\n  address: fed:15010\n  ca: /ca.pem\nstate: /state\n";

    fn parse(text: &str) -> Result<Config, String> {
        tombolo_runtime::config::parse(text, Path::new("gateway.yaml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_smallest_file_is_enough() {
        let config = parse(SMALLEST).unwrap();
        assert_eq!(config.tunnel, "0.0.0.0:15443".parse().unwrap());
        assert_eq!(config.ingress, "127.0.0.1:15443".parse().unwrap());
        assert_eq!(config.congestion, Congestion::Bbr);
        assert!(config.advertise.is_empty());
    }

    #[test]
    fn every_address_is_fine_where_it_is_said_how_to_reach_it() {
        let more = "ingress: 0.0.0.0:15443\nadvertiseIngress: 10.0.0.5:15443\nwatch: '[::]:0'\nadvertiseWatch: gw.internal:0\n";
        assert_eq!(parse(&format!("{SMALLEST}{more}")).unwrap().advertise_watch.as_deref(), Some("gw.internal:0"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, part) in [
            ("tunel: 1.2.3.4:5\n", "tunel"),
            ("advertise: [nowhere]\n", "advertise[0]"),
            ("advertiseIngress: nowhere\n", "advertiseIngress: write host:port"),
            ("ingress: 0.0.0.0:15443\n", "advertiseIngress: HOST:15443"),
            ("watch: '[::]:15012'\n", "`watch` listens on every address ([::]:15012)"),
            ("unmeshed: 0.0.0.0\n", "`unmeshed` is every address (0.0.0.0)"),
            ("advertiseUnmeshed: 10.0.0.5\n", "needs `unmeshed`"),
            ("limits:\n  streamWindow: 3000000\n", "limits.streamWindow"),
            ("limits:\n  stalled: 1\n", "limits.stalled"),
            ("congestion: reno\n", "reno"),
            ("resolvers: [dns.example]\n", "invalid socket address"),
            (
                "resolvers: ['10.0.0.1:1', '10.0.0.1:2', '10.0.0.1:3', '10.0.0.1:4', '10.0.0.1:5', '10.0.0.1:6', '10.0.0.1:7', '10.0.0.1:8', '10.0.0.1:9']\n",
                "at most 8",
            ),
            ("proxySources: [10.0.0.0/33]\n", "10.0.0.0/33"),
        ] {
            let error = parse(&format!("{SMALLEST}{more}")).unwrap_err();
            assert!(error.contains(part), "{more}: {error}");
        }
    }

    #[test]
    fn ranges_hold_what_they_name() {
        for (range, address, holds) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.0.0.0/8", "::ffff:10.0.0.1", true),
            ("0.0.0.0/0", "192.0.2.1", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("::/0", "2001:db8::1", true),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
        ] {
            let range: SourceRange = range.parse().unwrap();
            assert_eq!(range.contains(address.parse().unwrap()), holds, "{range} {address}");
        }
    }
}
