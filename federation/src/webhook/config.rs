//! What injection is told.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tombolo_api::inject::{Resolver, Settings};
use tombolo_core::id::{Namespace, TrustDomain};
use tombolo_runtime::config::Problem;
use tombolo_runtime::federation::host_port_problem;

/// DNS servers of `/etc/resolv.conf` that count (resolv.conf(5)).
const SERVERS_MAX: usize = 3;

/// The webhook, and what it adds to Pods.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InjectionConfig {
    /// HTTPS, for the API server.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// The image of sidecars.
    pub image: String,
    /// The image that writes the packet filter's rules; `image` if absent.
    pub capture_image: Option<String>,
    /// host:port at which Pods reach `discovery`.
    pub federation: String,
    /// The Service by which the API server reaches `listen`: its certificate is for `<service>.<namespace>.svc`.
    #[serde(default = "default_service")]
    pub service: String,
    /// Further names that the certificate is for, where the API server reaches it by a URL.
    #[serde(default)]
    pub server_names: Vec<String>,
    /// The MutatingWebhookConfiguration whose `caBundle` is kept current.
    #[serde(default = "default_configuration")]
    pub configuration: String,
    /// The same for the ValidatingWebhookConfiguration.
    #[serde(default = "default_validation")]
    pub validation: String,
    /// DNS servers and domain of the cluster, for Pods that ask their sidecar alone; those of this Pod if absent.
    pub cluster_dns: Option<Vec<IpAddr>>,
    pub cluster_domain: Option<String>,
}

fn default_listen() -> SocketAddr {
    ([0, 0, 0, 0], 15017).into()
}

fn default_service() -> String {
    "tombolo-federation".into()
}

fn default_configuration() -> String {
    "tombolo-injection".into()
}

fn default_validation() -> String {
    "tombolo-validation".into()
}

impl InjectionConfig {
    pub fn problems(&self, problems: &mut Vec<Problem>) {
        problems.extend(host_port_problem("injection.federation", &self.federation));
        if self.image.trim().is_empty() {
            problems.push(Problem::new("injection.image", "name the image of sidecars"));
        }
        let names =
            [("service", &self.service), ("configuration", &self.configuration), ("validation", &self.validation)];
        for (field, name) in names {
            if name.is_empty() {
                problems.push(Problem::new(format!("injection.{field}"), "write the name of an object"));
            }
        }
    }

    pub fn server_names(&self, namespace: &Namespace) -> Vec<String> {
        let service = format!("{}.{namespace}.svc", self.service);
        std::iter::once(service).chain(self.server_names.iter().cloned()).collect()
    }

    /// `resolv_conf` says what of the cluster's DNS is not configured.
    pub fn settings(&self, trust_domain: &TrustDomain, resolv_conf: &Path) -> Settings {
        let found = resolver(&std::fs::read_to_string(resolv_conf).unwrap_or_default());
        let servers = self.cluster_dns.as_ref().map(|servers| servers.iter().map(ToString::to_string).collect());
        Settings {
            image: self.image.clone(),
            capture_image: self.capture_image.clone().unwrap_or_else(|| self.image.clone()),
            federation: self.federation.clone(),
            trust_domain: trust_domain.clone(),
            resolver: Resolver {
                servers: servers.unwrap_or(found.servers),
                domain: self.cluster_domain.clone().unwrap_or(found.domain),
            },
        }
    }
}

/// What the kubelet wrote into a Pod's `/etc/resolv.conf`. Without a search domain of a cluster it is not one of the kubelet's.
fn resolver(resolv_conf: &str) -> Resolver {
    let lines = resolv_conf.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
    let mut found = Resolver { servers: Vec::new(), domain: String::new() };
    for (key, value) in lines {
        match key {
            "nameserver" if found.servers.len() < SERVERS_MAX => {
                found.servers.extend(value.trim().parse::<IpAddr>().ok().map(|address| address.to_string()));
            }
            "search" => {
                let domain = value.split_whitespace().find_map(|search| search.strip_prefix("svc."));
                found.domain = domain.unwrap_or_default().to_owned();
            }
            _ => {}
        }
    }
    if found.domain.is_empty() { Resolver { servers: Vec::new(), domain: "cluster.local".into() } } else { found }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelets_resolv_conf_says_what_the_clusters_dns_is() {
        let text = "search tombolo-system.svc.corp.example svc.corp.example corp.example\nnameserver 10.96.0.10\noptions ndots:5\n";
        let want = Resolver { servers: vec!["10.96.0.10".into()], domain: "corp.example".into() };
        assert_eq!(resolver(text), want);
        for text in ["", "nameserver 192.0.2.1\nsearch example.org\n", "nameserver nonsense\n"] {
            assert_eq!(resolver(text), Resolver { servers: vec![], domain: "cluster.local".into() }, "{text}");
        }
    }
}
