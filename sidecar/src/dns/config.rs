//! Where the DNS server listens, and whom it asks for names that are not the clusterset's.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tombolo_runtime::config::Problem;

use super::loopback::LoopbackConfig;
use crate::capture::DNS_PORT;

/// Addresses to listen at; a host has two families.
const LISTEN_MAX: usize = 16;
/// Resolvers that are asked; each that does not answer takes a second and a half of the five that clients wait.
const UPSTREAMS_MAX: usize = 3;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DnsConfig {
    /// UDP and TCP each.
    pub listen: Vec<SocketAddr>,
    /// Resolvers for all other names, in the order in which they are asked; those of `resolv_conf` if absent.
    pub upstreams: Option<Vec<SocketAddr>>,
    /// A file in the form of `/etc/resolv.conf`, whose changes are followed.
    pub resolv_conf: PathBuf,
    /// Answers with addresses of loopback that the sidecar listens at, where nothing is redirected; virtual ones if absent.
    pub loopback: Option<LoopbackConfig>,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            listen: vec![(Ipv4Addr::LOCALHOST, DNS_PORT).into(), (Ipv6Addr::LOCALHOST, DNS_PORT).into()],
            upstreams: None,
            resolv_conf: "/etc/resolv.conf".into(),
            loopback: None,
        }
    }
}

impl DnsConfig {
    pub fn problems(&self, problems: &mut Vec<Problem>) {
        if !(1..=LISTEN_MAX).contains(&self.listen.len()) {
            problems.push(Problem::new("dns.listen", format!("write one to {LISTEN_MAX} addresses")));
        }
        for (n, address) in self.listen.iter().enumerate() {
            if address.port() != 0 && self.listen[..n].contains(address) {
                problems.push(Problem::new(format!("dns.listen[{n}]"), "this address is listed twice"));
            }
        }
        let Some(upstreams) = &self.upstreams else { return };
        if !(1..=UPSTREAMS_MAX).contains(&upstreams.len()) {
            let reason = format!("write one to {UPSTREAMS_MAX} resolvers, or leave it out for those of resolvConf");
            problems.push(Problem::new("dns.upstreams", reason));
        }
        for (n, upstream) in upstreams.iter().enumerate() {
            let field = format!("dns.upstreams[{n}]");
            if upstream.port() == 0 {
                problems.push(Problem::new(field, "nobody listens on port 0"));
            } else if self.listen.iter().any(|own| own.port() == upstream.port() && is_here(own, upstream)) {
                problems.push(Problem::new(field, "this is the server itself, which would ask itself for ever"));
            }
        }
    }
}

fn is_here(own: &SocketAddr, upstream: &SocketAddr) -> bool {
    own.ip() == upstream.ip() || own.ip().is_unspecified() && upstream.ip().is_loopback()
}
