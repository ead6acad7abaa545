//! Who a replica is, and where others reach it.

use std::net::SocketAddr;

use anyhow::Context;
use tokio::net::UdpSocket;
use tonic::transport::Uri;

use super::parts::OpenedSource;
use crate::config::Config;

/// What a replica is called that is not given a name: in a pod, the pod's name.
pub fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("reading the host's name")?;
    anyhow::ensure!(!name.trim().is_empty(), "this host has no name; set source.kubernetes.identity");
    Ok(name.trim().to_owned())
}

/// `host:port` under which gateways and other replicas reach a listener.
pub async fn reached_at(config: &Config, source: &OpenedSource, bound: SocketAddr) -> anyhow::Result<String> {
    if let Some(host) = &config.advertise {
        let host = if host.contains(':') { format!("[{}]", host.trim_matches(['[', ']'])) } else { host.clone() };
        return Ok(format!("{host}:{}", bound.port()));
    }
    match source {
        OpenedSource::Kubernetes { server, .. } if bound.ip().is_unspecified() => {
            let address = towards(server).await;
            let address =
                address.with_context(|| format!("finding this host's address towards {server}; set advertise"));
            Ok(SocketAddr::new(address?.ip(), bound.port()).to_string())
        }
        OpenedSource::Kubernetes { .. } | OpenedSource::Directory(_) => Ok(bound.to_string()),
    }
}

/// The address that this host uses towards the API server. Nothing is sent.
async fn towards(server: &str) -> anyhow::Result<SocketAddr> {
    let uri: Uri = server.parse()?;
    let host = uri.host().context("the API server's URL has no host")?.trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(443);
    let there = tokio::net::lookup_host((host, port)).await?.next().context("its name has no address")?;
    let any: SocketAddr = if there.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(there).await?;
    Ok(socket.local_addr()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::path::Path;
    use tombolo_runtime::config::parse;

    #[tokio::test]
    async fn a_listener_is_reached_where_it_listens_or_where_the_operator_says() {
        for (advertise, bound, want) in [
            ("", "127.0.0.1:7", "127.0.0.1:7"),
            ("advertise: fed-0.fed\n", "0.0.0.0:7", "fed-0.fed:7"),
            ("advertise: '2001:db8::1'\n", "0.0.0.0:7", "[2001:db8::1]:7"),
        ] {
            let text = format!("cluster: east\nstate: /x\nsource: {{directory: /}}\n{advertise}");
            let config: Config = parse(&text, Path::new("f.yaml")).unwrap();
            let source = OpenedSource::Directory("/".into());
            assert_eq!(reached_at(&config, &source, bound.parse().unwrap()).await.unwrap(), want);
        }
        assert!(towards("https://127.0.0.1:6443").await.unwrap().ip().is_loopback());
        assert!(towards("https://[::1]").await.is_ok_and(|address| address.ip().is_loopback()));
    }
}
