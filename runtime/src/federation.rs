//! How a role reaches its cluster's federation, and what an address in a configuration has to look like.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::Problem;

/// How to reach this cluster's federation.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FederationConfig {
    /// host:port of its discovery and identity service; several with commas where it has replicas.
    pub address: String,
    /// The cluster's root certificate (PEM), which pins the federation.
    pub ca: PathBuf,
}

impl FederationConfig {
    /// `field` is the path of this part in the file.
    pub fn problems(&self, field: &str) -> Vec<Problem> {
        let field = format!("{field}.address");
        let mut problems = self.address.split(',').filter_map(|one| host_port_problem(&field, one.trim()));
        problems.next().into_iter().collect()
    }
}

/// Complains where both kinds of first proof are configured: it would not be clear which one counts.
pub fn proof_problem(join: Option<&PathBuf>, token: Option<&PathBuf>) -> Option<Problem> {
    let reason = "is set beside join; keep one of the two: join outside of Kubernetes, token in a pod";
    (join.is_some() && token.is_some()).then(|| Problem::new("token", reason))
}

/// Complains about `text` unless it is `host:port`.
pub fn host_port_problem(field: &str, text: &str) -> Option<Problem> {
    (!is_host_port(text)).then(|| Problem::new(field, "write host:port"))
}

/// Whether `text` is a host, by name or address, and a port other than 0.
pub fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    !host.is_empty() && !host.contains(char::is_whitespace) && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_federation_has_one_address_or_several() {
        for (address, problems) in [("a:1", 0), ("a:1,b:2", 0), ("a:1, [::1]:2", 0), ("a:1,", 1), ("a,b", 1), ("", 1)] {
            let config = FederationConfig { address: address.into(), ca: "/ca.pem".into() };
            assert_eq!(config.problems("federation").len(), problems, "{address}");
        }
    }

    #[test]
    fn addresses() {
        for (text, is) in [
            ("fed.internal:15010", true),
            ("127.0.0.1:1", true),
            ("[::1]:15010", true),
            ("fed.internal", false),
            (":15010", false),
            ("fed:0", false),
            ("fed:70000", false),
            ("fed internal:1", false),
            ("", false),
        ] {
            assert_eq!(is_host_port(text), is, "{text}");
        }
    }
}
