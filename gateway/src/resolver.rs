//! Host names of peers' gateways, looked up in DNS.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use tombolo_core::resolution::Answer;

/// How long one look-up may take, every server and family included.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Whom to ask: these servers, or those of the system where there are none.
#[derive(Debug, Clone, Default)]
pub struct Resolver {
    servers: Vec<SocketAddr>,
}

impl Resolver {
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers }
    }

    /// The IPv4 and IPv6 addresses of `host:port`, and how long they hold.
    ///
    /// # Errors
    /// Why there are none, for an operator.
    pub async fn lookup(&self, advertised: &str) -> Result<Answer, String> {
        let (host, port) = advertised.rsplit_once(':').ok_or("write host:port")?;
        let port: u16 = port.parse().map_err(|_| "write host:port")?;
        let resolver = self.resolver()?;
        let found = tokio::time::timeout(LOOKUP_TIMEOUT, resolver.lookup_ip(host)).await;
        let found = found.map_err(|_| format!("no resolver answers within {LOOKUP_TIMEOUT:?}"))?;
        let found = found.map_err(|error| error.to_string())?;
        let ttl = found.valid_until().saturating_duration_since(Instant::now());
        Ok(Answer { addresses: found.iter().map(|ip| SocketAddr::new(ip, port)).collect(), ttl })
    }

    /// Made anew for each look-up, which are seldom: so a machine that moves to another network goes on, and what
    /// is asked for after a failed dial comes from no cache.
    fn resolver(&self) -> Result<TokioResolver, String> {
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio().map_err(|error| {
                format!("the system's resolver configuration can't be used ({error}); name servers in `resolvers`")
            })?
        } else {
            let config = ResolverConfig::from_name_servers(self.servers.iter().map(name_server).collect());
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.cache_size = 0;
        builder.build().map_err(|error| error.to_string())
    }
}

fn name_server(address: &SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = address.port();
        connection
    });
    NameServerConfig::new(address.ip(), true, connections.into())
}
