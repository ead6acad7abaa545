//! The sidecar's configuration: one YAML file, parsed once.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_core::capture::parse_range;
use tombolo_core::health::Thresholds;
use tombolo_core::id::{InstanceName, ServiceName};
use tombolo_core::model::AppProtocol;
use tombolo_runtime::config::{Problem, Validate};
use tombolo_runtime::federation::{FederationConfig, host_port_problem, proof_problem};
use tombolo_runtime::logging::LogConfig;
use tombolo_runtime::telemetry::TelemetryConfig;

use crate::capture::config::CaptureConfig;
use crate::dns::config::DnsConfig;
use crate::probes::ProbesConfig;

/// Everything a sidecar is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// The name under which this sidecar registers; `EndpointSlice.endpoints[].targetRef.name` points to it.
    pub instance: InstanceName,
    pub zone: Option<String>,
    pub federation: FederationConfig,
    /// File with the join token. Not needed once an identity is in `state`.
    pub join: Option<PathBuf>,
    /// File with a projected service-account token, in the place of `join` where the federation's source is Kubernetes.
    pub token: Option<PathBuf>,
    /// Directory for the identity's key and certificate.
    pub state: PathBuf,
    /// The application's forward proxy: HTTP/1.1 and HTTP/2 with prior knowledge, CONNECT included.
    #[serde(default = "default_outbound")]
    pub outbound: SocketAddr,
    /// Further listeners, each for one port of one service.
    #[serde(default)]
    pub listeners: Vec<ListenerConfig>,
    /// Where inner legs arrive.
    #[serde(default = "default_inbound")]
    pub inbound: SocketAddr,
    /// What is done with connections that the packet filter redirects here; nothing if absent.
    pub capture: Option<CaptureConfig>,
    /// A DNS server for names of the clusterset and all others; none if absent.
    pub dns: Option<DnsConfig>,
    /// Probes that are answered in the application's place; none if absent.
    pub probes: Option<ProbesConfig>,
    /// host:port at which gateways and other sidecars of this cluster reach `inbound`; its bound address if absent.
    pub advertise: Option<String>,
    /// What the application behind this sidecar serves.
    #[serde(default)]
    pub services: Vec<ServiceConfig>,
    #[serde(default)]
    pub retry: RetryConfig,
    #[serde(default)]
    pub limits: LimitsConfig,
    #[serde(default = "default_admin")]
    pub admin: SocketAddr,
    #[serde(default)]
    pub telemetry: TelemetryConfig,
    #[serde(default)]
    pub log: LogConfig,
    /// A line for each request that leaves; none if absent.
    pub access_log: Option<AccessLogConfig>,
    /// Whose requests with `tombolo-explain: 1` are answered with the way that they took.
    #[serde(default = "default_explain_to")]
    pub explain_to: Vec<String>,
    #[serde(with = "humantime_serde", default = "default_drain_deadline")]
    pub drain_deadline: Duration,
}

/// A file with a JSON line for each request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessLogConfig {
    pub file: PathBuf,
    /// Octets at which the file is renamed to `<file>.1`, in the place of the one before, and begun anew.
    #[serde(default = "default_access_log_octets")]
    pub max_bytes: u64,
}

const ACCESS_LOG_OCTETS_MIN: u64 = 64 * 1024;

fn default_access_log_octets() -> u64 {
    64 * 1024 * 1024
}

/// The application beside the sidecar.
fn default_explain_to() -> Vec<String> {
    ["127.0.0.0/8", "::1/128"].map(str::to_owned).into()
}

/// A local port that leads to one port of one service.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerConfig {
    pub listen: SocketAddr,
    pub to: ServicePortName,
}

/// A service's port, written `db.data:5432` (also `data/db:5432`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    pub service: ServiceName,
    pub port: u16,
}

impl std::fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}:{}", self.service.name(), self.service.namespace(), self.port)
    }
}

impl std::str::FromStr for ServicePortName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (service, port) =
            text.rsplit_once(':').ok_or_else(|| format!("{text:?} has no port: write name.namespace:port"))?;
        let port = port.parse::<u16>().ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| format!("{text:?}: a port is a number from 1 to 65535"))?;
        Ok(Self { service: service.parse().map_err(|error| format!("{error}"))?, port })
    }
}

impl Serialize for ServicePortName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ServicePortName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One port of one service that the application behind this sidecar serves.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceConfig {
    pub service: ServiceName,
    /// The service's port, as callers know it.
    pub port: u16,
    /// host:port at which the application accepts connections.
    pub app: String,
    /// How the application expects the bytes.
    #[serde(default)]
    pub protocol: AppProtocol,
    #[serde(default)]
    pub health: HealthConfig,
}

/// The active check that decides whether the application is ready.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HealthConfig {
    /// GET this path; any 2xx or 3xx passes.
    pub http: Option<HttpCheck>,
    /// The gRPC health protocol (`grpc.health.v1.Health/Check`).
    pub grpc: Option<GrpcCheck>,
    /// A TCP connection that is accepted passes. This is the check if no other is given.
    pub tcp: Option<TcpCheck>,
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    pub healthy_after: u32,
    pub unhealthy_after: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        let Thresholds { healthy_after, unhealthy_after } = Thresholds::default();
        Self {
            http: None,
            grpc: None,
            tcp: None,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            healthy_after,
            unhealthy_after,
        }
    }
}

impl HealthConfig {
    pub fn thresholds(&self) -> Thresholds {
        Thresholds { healthy_after: self.healthy_after.max(1), unhealthy_after: self.unhealthy_after.max(1) }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpCheck {
    pub path: String,
    /// Sent with the request; `host` among them names whom it is for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcCheck {
    /// The service name in the check; empty asks for the server as a whole.
    #[serde(default)]
    pub service: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TcpCheck {}

/// Second tries of outbound requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RetryConfig {
    /// Tries in all, the first included; 1 never tries again.
    pub tries: u32,
    /// From picking an endpoint until the response's head, connection set-up included. No limit if absent.
    #[serde(with = "humantime_serde")]
    pub per_try_timeout: Option<Duration>,
    /// From the request until the response's head, over all tries. No limit if absent.
    #[serde(with = "humantime_serde")]
    pub deadline: Option<Duration>,
    /// Second tries as a share of the requests, beside ten a second.
    pub budget: f64,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { tries: 3, per_try_timeout: None, deadline: None, budget: 0.2 }
    }
}

/// Bounds on what this sidecar holds at once.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Connections of the application, over all outbound listeners.
    pub connections: usize,
    /// Services known at once through discovery.
    pub services: usize,
    /// Requests that share an inner leg before another is opened.
    pub requests_per_leg: u32,
    /// Shared inner legs for one endpoint.
    pub legs_per_endpoint: usize,
    /// Inner legs for opaque connections that are dialled ahead for an endpoint in use; 0 for none.
    pub warm_legs: usize,
    /// From dialling to the end of the handshake of an inner leg.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Inner legs without a request for this long are closed.
    #[serde(with = "humantime_serde")]
    pub leg_idle: Duration,
    /// How long the first request for a service waits to hear of it.
    #[serde(with = "humantime_serde")]
    pub discovery_wait: Duration,
    /// A service that nothing asked for during this time is no longer followed.
    #[serde(with = "humantime_serde")]
    pub service_idle: Duration,
    /// How long the first bytes of a connection are waited for where they say what it speaks; then it is opaque. Zero
    /// waits for none.
    #[serde(with = "humantime_serde")]
    pub detection_timeout: Duration,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            connections: 16_384,
            services: 1_024,
            requests_per_leg: 64,
            legs_per_endpoint: 8,
            warm_legs: 4,
            connect_timeout: Duration::from_secs(2),
            leg_idle: Duration::from_secs(90),
            discovery_wait: Duration::from_secs(2),
            service_idle: Duration::from_secs(600),
            detection_timeout: Duration::from_millis(200),
        }
    }
}

impl Validate for Config {
    fn validate(&self) -> Vec<Problem> {
        let mut problems = self.telemetry.problems("telemetry");
        problems.extend(self.log.problems("log"));
        problems.extend(self.federation.problems("federation"));
        problems.extend(proof_problem(self.join.as_ref(), self.token.as_ref()));
        if let Some(advertise) = &self.advertise {
            problems.extend(host_port_problem("advertise", advertise));
        } else if self.inbound.ip().is_unspecified() && !self.services.is_empty() {
            let (inbound, port) = (self.inbound, self.inbound.port());
            let reason = format!(
                "`inbound` listens on every address ({inbound}), so say at which one gateways and sidecars reach it: \
                 advertise: HOST:{port}"
            );
            problems.push(Problem::new("advertise", reason));
        }
        if let Some(capture) = &self.capture {
            capture.problems(&mut problems);
        }
        if self.access_log.as_ref().is_some_and(|log| log.max_bytes < ACCESS_LOG_OCTETS_MIN) {
            let reason = format!("write at least {ACCESS_LOG_OCTETS_MIN}, or the file is renamed all the time");
            problems.push(Problem::new("accessLog.maxBytes", reason));
        }
        for (n, range) in self.explain_to.iter().enumerate() {
            if let Err(reason) = parse_range(range) {
                problems.push(Problem::new(format!("explainTo[{n}]"), reason));
            }
        }
        if let Some(dns) = &self.dns {
            dns.problems(&mut problems);
            if dns.loopback.is_some() && self.capture.is_some() {
                let reason =
                    "has no use beside capture, which takes connections to virtual addresses; leave out one of both";
                problems.push(Problem::new("dns.loopback", reason));
            }
        }
        if let Some(probes) = &self.probes {
            probes.problems(&mut problems);
        }
        self.retry.problems(&mut problems);
        self.limits.problems(&mut problems);
        for (n, service) in self.services.iter().enumerate() {
            service.problems(&format!("services[{n}]"), &mut problems);
            let same = |other: &&ServiceConfig| (&other.service, other.port) == (&service.service, service.port);
            if self.services[..n].iter().any(|other| same(&other)) {
                problems.push(Problem::new(format!("services[{n}]"), "this service and port are listed twice"));
            }
        }
        for (n, listener) in self.listeners.iter().enumerate() {
            let fixed = listener.listen.port() != 0;
            if fixed && self.listeners[..n].iter().any(|other| other.listen == listener.listen) {
                problems.push(Problem::new(format!("listeners[{n}].listen"), "two listeners have this address"));
            }
        }
        problems
    }
}

impl RetryConfig {
    fn problems(&self, problems: &mut Vec<Problem>) {
        if !(1..=10).contains(&self.tries) {
            problems.push(Problem::new("retry.tries", "write a number from 1 (never again) to 10"));
        }
        if !(0.0..=1.0).contains(&self.budget) {
            problems.push(Problem::new("retry.budget", "write a share from 0 to 1"));
        }
        for (field, time) in [("retry.perTryTimeout", self.per_try_timeout), ("retry.deadline", self.deadline)] {
            if time.is_some_and(|time| time.is_zero()) {
                problems.push(Problem::new(field, "nothing answers in no time; leave it out for no limit"));
            }
        }
    }
}

impl LimitsConfig {
    fn problems(&self, problems: &mut Vec<Problem>) {
        let zero = [
            ("limits.connections", self.connections == 0),
            ("limits.services", self.services == 0),
            ("limits.requestsPerLeg", self.requests_per_leg == 0),
            ("limits.legsPerEndpoint", self.legs_per_endpoint == 0),
            ("limits.connectTimeout", self.connect_timeout.is_zero()),
            ("limits.legIdle", self.leg_idle.is_zero()),
            ("limits.discoveryWait", self.discovery_wait.is_zero()),
            ("limits.serviceIdle", self.service_idle.is_zero()),
        ];
        let zero = zero.into_iter().filter(|(_, is_zero)| *is_zero);
        problems.extend(zero.map(|(field, _)| Problem::new(field, "must be above zero")));
    }
}

impl ServiceConfig {
    fn problems(&self, field: &str, problems: &mut Vec<Problem>) {
        if self.port == 0 {
            problems.push(Problem::new(format!("{field}.port"), "a port is a number from 1 to 65535"));
        }
        problems.extend(host_port_problem(&format!("{field}.app"), &self.app));
        let health = &self.health;
        let checks = [health.http.is_some(), health.grpc.is_some(), health.tcp.is_some()];
        if checks.iter().filter(|given| **given).count() > 1 {
            problems.push(Problem::new(format!("{field}.health"), "choose one of http, grpc and tcp"));
        }
        if health.http.as_ref().is_some_and(|http| !http.path.starts_with('/')) {
            problems.push(Problem::new(format!("{field}.health.http.path"), "a path begins with /"));
        }
        if health.interval.is_zero() || health.timeout.is_zero() {
            problems.push(Problem::new(format!("{field}.health"), "interval and timeout must be above zero"));
        }
    }
}

fn default_outbound() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15001))
}

fn default_inbound() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15008))
}

fn default_admin() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15020))
}

fn default_drain_deadline() -> Duration {
    Duration::from_secs(10)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::Path;
    use tombolo_runtime::config::parse;

    #[test]
    fn listener_targets_are_read_in_two_spellings() {
        for text in ["db.data:5432", "data/db:5432"] {
            let target: ServicePortName = text.parse().unwrap();
            assert_eq!(target.to_string(), "db.data:5432");
        }
        for text in ["db.data", "db:5432", "db.data:0", "db.data:x", ""] {
            assert!(text.parse::<ServicePortName>().is_err(), "{text}");
        }
    }

    const SMALL: &str = "instance: web-1\nfederation: {address: 'localhost:15010', ca: ca.pem}\nstate: state\n";

    #[track_caller]
    fn check(more: &str, complaint: Option<&str>) {
        let text = format!("{SMALL}{more}");
        let told = parse::<Config>(&text, Path::new("sidecar.yaml")).err().map(|error| error.to_string());
        match (told, complaint) {
            (None, None) => {}
            (Some(told), Some(complaint)) => assert!(told.contains(complaint), "{told}"),
            (told, complaint) => panic!("{more}: {told:?}, not {complaint:?}"),
        }
    }

    #[test]
    fn files_are_checked() {
        check("", None);
        check("listeners: [{listen: '127.0.0.1:5432', to: 'db.data:5432'}]\nretry: {perTryTimeout: 250ms}\n", None);
        check(
            "services: [{service: shop/web, port: 80, app: 'localhost:8080', protocol: http, health: {http: {path: /}}}]\n",
            None,
        );
        check("listeners: [{listen: '127.0.0.1:5432', to: 'db'}]\n", Some("sidecar.yaml:4:"));
        check("dns: {}\n", None);
        check("dns: {listen: ['10.0.0.1:53'], upstreams: ['10.0.0.10:53']}\n", None);
        check("dns: {listen: []}\n", Some("dns.listen: write one"));
        check("dns: {listen: ['127.0.0.1:53', '127.0.0.1:53']}\n", Some("dns.listen[1]: this address is listed twice"));
        check("dns: {upstreams: []}\n", Some("dns.upstreams: write one"));
        check("dns: {upstreams: ['127.0.0.1:15053']}\n", Some("dns.upstreams[0]: this is the server itself"));
        check("dns: {listen: ['0.0.0.0:53'], upstreams: ['127.0.0.1:53']}\n", Some("the server itself"));
        check("retry: {tries: 0}\n", Some("retry.tries"));
        check("limits: {connections: 0}\n", Some("limits.connections: must be above zero"));
        check("advertise: here\n", Some("advertise: write host:port"));
        let everywhere = "inbound: 0.0.0.0:15008\nservices: [{service: shop/web, port: 80, app: '127.0.0.1:1'}]\n";
        check(everywhere, Some("`inbound` listens on every address (0.0.0.0:15008)"));
        check(&format!("{everywhere}advertise: 10.0.0.7:15008\n"), None);
        check("services: [{service: shop/web, port: 80, app: x}]\n", Some("services[0].app"));
        check("capture: {}\n", None);
        check("capture: {plaintext: strict, addressesWait: 500ms}\n", None);
        check("capture: {inbound: 15002}\n", Some("capture.inbound: outbound and inbound connections need a port"));
        check("capture: {plaintext: maybe}\n", Some("sidecar.yaml:4:"));
        check("colour: red\n", Some("unknown field `colour`"));
    }
}
