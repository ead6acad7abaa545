//! The name that an inner leg carries in its TLS ClientHello, and by which gateways route it.
//!
//! `[e-<endpoint-id>.]<port>.<service>.<namespace>.svc.<cluster>.clusterset.local`. The longest possible
//! name stays under the 253 octets of a host name (RFC 1035 section 2.3.4).

use std::fmt;
use std::str::FromStr;

use crate::id::{ClusterId, EndpointId, InvalidName, Namespace, ServiceName};

/// The destination of an inner leg: one port of a service in one cluster, and perhaps one endpoint of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LegTarget {
    pub cluster: ClusterId,
    pub service: ServiceName,
    pub port: u16,
    /// `None` lets the gateway of the target cluster choose among the ready endpoints.
    pub endpoint: Option<EndpointId>,
}

/// Namespace of tombolo's own services; no workload can be exported from it.
pub const SYSTEM_NAMESPACE: &str = "tombolo-system";

impl LegTarget {
    /// The implicit export that peer sync travels to: the federation service of `cluster`.
    pub fn federation(cluster: ClusterId) -> Self {
        let namespace: Namespace = SYSTEM_NAMESPACE.parse().expect("a constant valid label");
        let service = ServiceName::new(namespace, "federation").expect("a constant valid label");
        Self { cluster, service, port: 443, endpoint: None }
    }

    pub fn is_federation(&self) -> bool {
        self.service.namespace().as_str() == SYSTEM_NAMESPACE && self.service.name() == "federation" && self.port == 443
    }
}

impl fmt::Display for LegTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(endpoint) = &self.endpoint {
            write!(f, "e-{endpoint}.")?;
        }
        let (name, namespace) = (self.service.name(), self.service.namespace());
        write!(f, "{}.{name}.{namespace}.svc.{}.clusterset.local", self.port, self.cluster)
    }
}

impl FromStr for LegTarget {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        parse(text).ok_or_else(|| InvalidName {
            kind: "leg target",
            value: text.chars().take(260).collect(),
            rule: "write [e-<endpoint>.]<port>.<service>.<namespace>.svc.<cluster>.clusterset.local",
        })
    }
}

fn parse(text: &str) -> Option<LegTarget> {
    // TLS stacks keep the case that the caller wrote; host names compare without it.
    let lower = text.to_ascii_lowercase();
    let labels: Vec<&str> = lower.strip_suffix(".clusterset.local")?.split('.').collect();
    let (endpoint, labels) = match labels.split_first()? {
        (first, rest) if rest.len() == 5 => (Some(first.strip_prefix("e-")?.parse().ok()?), rest),
        _ => (None, labels.as_slice()),
    };
    let [port, name, namespace, "svc", cluster] = labels else { return None };
    // One spelling a port: "080" and "+80" would otherwise name the same target twice.
    let number: u16 = port.parse().ok().filter(|number| *number != 0)?;
    if number.to_string() != *port {
        return None;
    }
    let service = ServiceName::new(namespace.parse().ok()?, name).ok()?;
    Some(LegTarget { cluster: cluster.parse().ok()?, service, port: number, endpoint })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn targets_read_back_what_they_print() {
        for text in [
            "80.web.shop.svc.west.clusterset.local",
            "e-abc123.5432.db.data.svc.eu-1.clusterset.local",
            "443.federation.tombolo-system.svc.west.clusterset.local",
        ] {
            assert_eq!(text.parse::<LegTarget>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "web.shop.svc.clusterset.local",
            "0.web.shop.svc.west.clusterset.local",
            "080.web.shop.svc.west.clusterset.local",
            "+80.web.shop.svc.west.clusterset.local",
            "65536.web.shop.svc.west.clusterset.local",
            "x.80.web.shop.svc.west.clusterset.local",
            "e-.80.web.shop.svc.west.clusterset.local",
            "e-a.e-b.80.web.shop.svc.west.clusterset.local",
            "80.web.shop.pod.west.clusterset.local",
            "80.web.shop.svc.west.cluster.local",
            "80.web.shop.svc.west.clusterset.local.",
        ] {
            assert!(text.parse::<LegTarget>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_longest_target_is_a_valid_host_name() {
        let (long, short) = ("x".repeat(63), "y".repeat(32));
        let target: LegTarget = format!("e-{short}.65535.{long}.{long}.svc.{short}.clusterset.local").parse().unwrap();
        assert!(target.to_string().len() <= 253);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,300}") {
            let _ = text.parse::<LegTarget>();
        }

        #[test]
        fn what_parses_prints_itself(text in "(e-[a-z0-9]{1,4}\\.)?[0-9]{1,6}\\.[a-z-]{1,4}\\.[a-z]{1,4}\\.svc\\.[a-z]{1,4}\\.clusterset\\.local") {
            if let Ok(target) = text.parse::<LegTarget>() {
                prop_assert_eq!(target.to_string(), text);
            }
        }
    }
}
