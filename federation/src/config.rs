//! The federation's configuration: one YAML file, parsed once.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_core::addresses::Ranges;
use tombolo_core::addresses::ports::PortRange;
use tombolo_core::id::{ClusterId, Namespace, TrustDomain};
use tombolo_core::policy::access::DefaultAccess;
use tombolo_core::sni::SYSTEM_NAMESPACE;
use tombolo_runtime::config::{Problem, Validate};
use tombolo_runtime::logging::LogConfig;
use tombolo_runtime::telemetry::TelemetryConfig;

use crate::webhook::config::InjectionConfig;

/// Shortest and longest life of an SVID that makes sense: renewal happens at half of it.
const SVID_LIFE_MIN: Duration = Duration::from_secs(4);
/// Below it an API server that is slow for a moment changes the leader.
const LEASE_DURATION_MIN: Duration = Duration::from_secs(5);
const LEASE_DURATION_MAX: Duration = Duration::from_secs(300);
const SVID_LIFE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Everything a federation is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    pub cluster: ClusterId,
    /// The cluster's own trust domain; `<cluster>.tombolo` if absent. It can't be changed later.
    pub trust_domain: Option<TrustDomain>,
    /// Directory of the CA, of peers and of everything else that must outlive a restart; with another `store`, of the
    /// operator's socket and of what can be had again.
    pub state: PathBuf,
    pub source: SourceConfig,
    /// Where the CA, peers and everything else is kept that must outlive a restart.
    #[serde(default)]
    pub store: StoreConfig,
    /// Discovery and identity, for this cluster's sidecars and gateways.
    #[serde(default = "default_discovery")]
    pub discovery: SocketAddr,
    /// Inner legs of peer sync, brought by this cluster's gateways.
    #[serde(default = "default_legs")]
    pub legs: SocketAddr,
    /// The host, by name or address, under which gateways and other replicas reach `legs` and `discovery`; if absent,
    /// where those listen, or where that is every address and the source is an API server, the address towards that.
    pub advertise: Option<String>,
    #[serde(default = "default_admin")]
    pub admin: SocketAddr,
    /// The admission webhook that gives Pods their sidecars; none if absent. It needs an API server as the source.
    pub injection: Option<InjectionConfig>,
    /// How long an SVID lives; it is renewed at half of that.
    #[serde(default = "default_svid_life", with = "humantime_serde")]
    pub svid_life: Duration,
    /// Where the addresses lie that services have in this cluster, on its own machines only.
    #[serde(default)]
    pub virtual_addresses: Ranges,
    /// Lets workloads without a sidecar call what their exports allow; nobody may if absent.
    #[serde(default)]
    pub unmeshed: Option<UnmeshedConfig>,
    /// A DNS server for `clusterset.local` alone, to which the cluster's own resolver forwards; there is none if absent.
    #[serde(default)]
    pub dns: Option<DnsConfig>,
    /// What becomes of callers that no AccessPolicy speaks of: `allow` or `deny`.
    #[serde(default)]
    pub default_access: DefaultAccess,
    #[serde(default)]
    pub telemetry: TelemetryConfig,
    #[serde(default)]
    pub log: LogConfig,
    #[serde(default = "default_drain_deadline", with = "humantime_serde")]
    pub drain_deadline: Duration,
}

/// What there is for workloads that have no sidecar.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UnmeshedConfig {
    /// The TCP ports that gateways listen on, one for each port of a service.
    pub ports: PortRange,
}

/// Where names of the clusterset are answered for whoever has no sidecar.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DnsConfig {
    /// UDP and TCP.
    pub listen: SocketAddr,
}

/// Where the cluster's own services are declared: one of the two.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum SourceConfig {
    /// Directory of Kubernetes-shaped YAML, watched.
    Directory(PathBuf),
    /// This cluster's own API server.
    Kubernetes(KubernetesConfig),
}

/// Where everything durable is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StoreConfig {
    /// In the state directory.
    #[default]
    Directory,
    /// In Secrets of the namespace where tombolo is installed; needs a source of the same kind.
    Kubernetes,
}

/// How the API server of this cluster is reached, and as whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubernetesConfig {
    /// The service account that the pod runs as, if absent.
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig; its current one if absent.
    pub context: Option<String>,
    /// Where tombolo is installed.
    #[serde(default = "default_namespace")]
    pub namespace: Namespace,
    /// Which service accounts of that namespace are parts of tombolo.
    #[serde(default)]
    pub roles: RolesConfig,
    /// What tells this replica from others in the election of the leader; the host's name if absent.
    pub identity: Option<String>,
    /// How long the leader may be silent until another replica takes over.
    #[serde(default = "default_lease_duration", with = "humantime_serde")]
    pub lease_duration: Duration,
}

/// Service accounts, by name. Only what is named here at installation can get a role's identity by a token.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RolesConfig {
    pub gateway: BTreeSet<String>,
}

fn default_lease_duration() -> Duration {
    Duration::from_secs(15)
}

fn default_namespace() -> Namespace {
    SYSTEM_NAMESPACE.parse().expect("a constant valid label")
}

fn default_discovery() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 15010).into()
}

fn default_legs() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn default_admin() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 15020).into()
}

fn default_svid_life() -> Duration {
    Duration::from_secs(3600)
}

fn default_drain_deadline() -> Duration {
    Duration::from_secs(10)
}

impl Config {
    pub fn trust_domain(&self) -> TrustDomain {
        let derived = || format!("{}.tombolo", self.cluster).parse().expect("a cluster id is part of a trust domain");
        self.trust_domain.clone().unwrap_or_else(derived)
    }
}

/// A DNS subdomain (RFC 1123), as Kubernetes takes it.
fn is_account_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
    !name.is_empty() && name.len() <= 253 && name.bytes().all(allowed)
}

impl Validate for Config {
    fn validate(&self) -> Vec<Problem> {
        let mut problems = self.telemetry.problems("telemetry");
        problems.extend(self.log.problems("log"));
        if !(SVID_LIFE_MIN..=SVID_LIFE_MAX).contains(&self.svid_life) {
            problems.push(Problem::new("svidLife", "write 4s to 30days"));
        }
        match &self.source {
            SourceConfig::Directory(directory) if !directory.is_dir() => {
                problems.push(Problem::new("source.directory", "no such directory"));
            }
            SourceConfig::Kubernetes(KubernetesConfig { kubeconfig: Some(file), .. }) if !file.is_file() => {
                problems.push(Problem::new("source.kubernetes.kubeconfig", "no such file"));
            }
            SourceConfig::Kubernetes(KubernetesConfig { kubeconfig: None, context: Some(_), .. }) => {
                problems.push(Problem::new("source.kubernetes.context", "needs kubeconfig beside it"));
            }
            SourceConfig::Directory(_) | SourceConfig::Kubernetes(_) => {}
        }
        if let Some(injection) = &self.injection {
            injection.problems(&mut problems);
            if let SourceConfig::Directory(_) = &self.source {
                problems.push(Problem::new("injection", "needs source.kubernetes: an API server has to ask"));
            }
        }
        if self.store == StoreConfig::Kubernetes && matches!(self.source, SourceConfig::Directory(_)) {
            problems.push(Problem::new("store", "kubernetes needs source.kubernetes beside it"));
        }
        if let SourceConfig::Kubernetes(kubernetes) = &self.source {
            let duration = kubernetes.lease_duration;
            if !(LEASE_DURATION_MIN..=LEASE_DURATION_MAX).contains(&duration) || duration.subsec_nanos() != 0 {
                problems.push(Problem::new("source.kubernetes.leaseDuration", "write whole seconds from 5s to 5m"));
            }
            if kubernetes.roles.gateway.iter().any(|account| !is_account_name(account)) {
                let reason = "write names of service accounts of source.kubernetes.namespace, without a namespace";
                problems.push(Problem::new("source.kubernetes.roles.gateway", reason));
            }
            if kubernetes.identity.as_ref().is_some_and(String::is_empty) {
                problems.push(Problem::new("source.kubernetes.identity", "write a name, another one for each replica"));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::path::Path;
    use tombolo_runtime::config::parse;

    #[test]
    fn little_has_to_be_said() {
        let text = "cluster: east\nstate: /var/lib/x\nsource: {directory: /}\n";
        let config: Config = parse(text, Path::new("f.yaml")).unwrap();
        assert_eq!(config.trust_domain().as_str(), "east.tombolo");
        assert_eq!((config.discovery.port(), config.legs.port(), config.admin.port()), (15010, 0, 15020));
        assert_eq!(config.svid_life, Duration::from_secs(3600));
    }

    #[test]
    fn virtual_addresses_lie_where_no_network_is() {
        let read = |range: &str| {
            let text =
                format!("cluster: east\nstate: /x\nsource: {{directory: /}}\nvirtualAddresses: {{ipv4: {range}}}\n");
            parse::<Config>(&text, Path::new("f.yaml"))
        };
        let config = read("240.7.0.0/20").unwrap();
        assert_eq!((config.virtual_addresses.count(), config.virtual_addresses.ipv6), (4096, Ranges::default().ipv6));
        let refused = read("10.96.0.0/12").unwrap_err().to_string();
        assert!(refused.contains("f.yaml:4:") && refused.contains("240.0.0.0/4"), "{refused}");
    }

    #[test]
    fn the_source_is_a_directory_or_an_api_server() {
        let source = |source: &str| {
            let text = format!("cluster: east\nstate: /x\nsource: {source}\n");
            parse::<Config>(&text, Path::new("f.yaml")).map(|config| config.source).map_err(|error| error.to_string())
        };
        let SourceConfig::Kubernetes(kubernetes) = source("{kubernetes: {}}").unwrap() else { panic!("a directory") };
        assert_eq!((kubernetes.kubeconfig, kubernetes.namespace.as_str()), (None, "tombolo-system"));
        for (text, want) in [
            ("{directory: /, kubernetes: {}}", "f.yaml:3"),
            ("{}", "f.yaml:3"),
            ("{kubernetes: {kubeconfig: /no/such}}", "source.kubernetes.kubeconfig"),
            ("{kubernetes: {context: east}}", "source.kubernetes.context"),
            ("{kubernetes: {leaseDuration: 1s}}", "source.kubernetes.leaseDuration"),
            ("{kubernetes: {identity: ''}}", "source.kubernetes.identity"),
            ("{kubernetes: {roles: {gateway: [mesh/gateway]}}}", "source.kubernetes.roles.gateway"),
            ("{kubernetes: {roles: {federation: [x]}}}", "federation"),
            ("{kubernetes: {kubeconfg: /}}", "kubeconfg"),
        ] {
            let refused = source(text).unwrap_err();
            assert!(refused.contains(want), "{text}: {refused}");
        }
    }

    #[test]
    fn the_store_is_a_directory_unless_there_is_an_api_server_to_keep_it() {
        let read = |text: &str| {
            let text = format!("cluster: east\nstate: /x\n{text}");
            parse::<Config>(&text, Path::new("f.yaml")).map(|config| config.store).map_err(|error| error.to_string())
        };
        assert_eq!(read("source: {kubernetes: {}}\n"), Ok(StoreConfig::Directory));
        assert_eq!(read("source: {kubernetes: {}}\nstore: kubernetes\n"), Ok(StoreConfig::Kubernetes));
        let refused = read("source: {directory: /}\nstore: kubernetes\n").unwrap_err();
        assert!(refused.contains("f.yaml:4:") && refused.contains("needs source.kubernetes"), "{refused}");
        assert!(read("source: {kubernetes: {}}\nstore: etcd\n").unwrap_err().contains("f.yaml:4:"));
    }

    #[test]
    fn what_can_not_work_is_refused_at_its_line() {
        let text = "cluster: east\nstate: /x\nsource:\n  directory: /no/such\nsvidLife: 1s\n";
        let refused = parse::<Config>(text, Path::new("f.yaml")).unwrap_err().to_string();
        assert!(refused.contains("f.yaml:5:") && refused.contains("svidLife"), "{refused}");
        assert!(refused.contains("f.yaml:4:") && refused.contains("source.directory"), "{refused}");
    }
}
