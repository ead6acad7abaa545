//! Brings a leg to the sidecar of an endpoint in this cluster.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_leg::status::LegRefused;

use crate::copy;
use crate::gateway::Gateway;
use crate::snapshot::LegOrigin;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Endpoints that are tried where the target names none.
const TRIES_MAX: usize = 2;

/// Connects to the sidecar that `target` leads to, and sends it the ClientHello.
pub async fn deliver(
    gateway: &Gateway,
    target: &LegTarget,
    origin: LegOrigin<'_>,
    hello: &[u8],
) -> Result<TcpStream, LegRefused> {
    let tries = if target.endpoint.is_some() { 1 } else { TRIES_MAX };
    let choice = gateway.next_choice();
    let mut detail = String::new();
    for attempt in 0..tries {
        let snapshot = gateway.snapshot();
        let address = snapshot
            .deliver(target, origin, choice.wrapping_add(attempt))
            .map_err(|refusal| gateway.refuse(refusal, target.to_string()))?;
        match timeout(CONNECT_TIMEOUT, connect(address, hello)).await {
            Ok(Ok(tcp)) => return Ok(tcp),
            // The address stays here: another cluster has no use for it.
            Ok(Err(error)) => {
                tracing::info!(%target, address, %error, "the endpoint's sidecar can't be reached");
                detail = error.kind().to_string();
            }
            Err(_) => {
                tracing::info!(%target, address, "the endpoint's sidecar does not accept within {CONNECT_TIMEOUT:?}");
                detail = "the connection was not accepted in time".into();
            }
        }
    }
    Err(gateway.refuse(Refusal::EndpointUnreachable, detail))
}

async fn connect(address: &str, hello: &[u8]) -> std::io::Result<TcpStream> {
    let mut tcp = TcpStream::connect(address).await?;
    copy::prepare(&tcp);
    tcp.write_all(hello).await?;
    Ok(tcp)
}
