//! The admission webhooks. The API server asks about each new Pod of a namespace with injection, and `tombolo_api::inject`
//! decides; and about each policy, route and peer that is written, which is read as the source will read it. Beside them, in
//! every namespace with injection the trust bundle is kept as a ConfigMap.

mod admission;
mod bundles;
pub mod config;
mod server;
mod tls;
mod validation;

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use kube::Client;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tombolo_core::id::{ClusterId, Namespace, TrustDomain};
use tombolo_runtime::metrics::Metrics;
use tombolo_trust::ca::CertificateAuthority;

use admission::Injector;
use bundles::Bundles;
use config::InjectionConfig;
use server::Server;
use tls::Certificate;

/// What the webhook needs of its federation.
pub struct Start<'a> {
    pub client: Client,
    pub config: &'a InjectionConfig,
    pub cluster: &'a ClusterId,
    pub namespace: &'a Namespace,
    pub trust_domain: &'a TrustDomain,
    pub ca: &'a CertificateAuthority,
    pub metrics: &'a Metrics,
}

/// Listens, and runs in `tasks` from then on. Yields where.
pub async fn start(start: Start<'_>, tasks: &mut JoinSet<()>) -> anyhow::Result<SocketAddr> {
    let Start { client, config, cluster, namespace, trust_domain, ca, metrics } = start;
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.with_context(|| format!("can't listen on {} (injection.listen)", config.listen))?;
    let address = listener.local_addr()?;
    let settings = config.settings(trust_domain, Path::new("/etc/resolv.conf"));
    if settings.resolver.servers.is_empty() {
        tracing::warn!(
            "no DNS server of this cluster is known (injection.clusterDns): Pods get no tombolo.dev/capture: dns"
        );
    }
    let certificate = Certificate::new(ca.clone(), config.server_names(namespace))?;
    let bundles = Bundles::new(client.clone(), namespace.clone(), ca.clone());
    let injector = Injector::new(client.clone(), settings, bundles.clone());
    let server = Server::new(listener, certificate.tls(), injector, cluster.clone(), metrics);
    tasks.spawn(server.run());
    tasks.spawn(certificate.keep(client, config.configuration.clone(), config.validation.clone()));
    tasks.spawn(bundles.run());
    Ok(address)
}
