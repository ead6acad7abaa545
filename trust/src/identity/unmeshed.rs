//! The second identity of a gateway: the one under which it begins legs for workloads without a sidecar.

use jiff::Timestamp;
use tombolo_core::backoff::Backoff;

use super::exchange::{Exchange, ExchangeError};
use super::persisted::Persisted;
use super::{IdentityConfig, IdentityError, RETRY_FIRST, RETRY_LONGEST};
use crate::grpc;
use crate::store::TrustStore;
use crate::svid::{Svid, SvidSource};
use crate::tls::{ServerExpectation, client_config};
use tombolo_core::id::Role;

/// Keeps an SVID of the role `unmeshed` beside `own`, the gateway's, for as long as the returned source is used. It is
/// issued anew whenever the gateway's is, so that it lives as long, and is not kept on disk.
pub fn start(config: &IdentityConfig, own: SvidSource, trust: &TrustStore) -> Result<SvidSource, IdentityError> {
    let state = |source| IdentityError::State { path: config.state.clone(), source };
    let key = Persisted::open(&config.state).map_err(state)?.key()?;
    let trust_domain = crate::bundle::Bundle::load(&config.ca).map_err(IdentityError::Ca)?.trust_domain().clone();
    let expectation = ServerExpectation::Role { trust_domain, role: Role::Federation };
    let tls = client_config(&SvidSource::new(), trust, expectation, &[grpc::ALPN_H2]);
    let exchange = Exchange::new(&config.federation, tls, key, config.asked)?;
    let svid = SvidSource::new();
    tokio::spawn(run(exchange, own, svid.clone()));
    Ok(svid)
}

async fn run(mut exchange: Exchange, own: SvidSource, svid: SvidSource) {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
    let mut renewed = own.subscribe();
    while svid.is_shared() {
        // First, so that a renewal meanwhile is not missed.
        renewed.mark_unchanged();
        let gateway = own.wait().await;
        match issue(&mut exchange, &gateway).await {
            Ok(issued) => {
                tracing::info!(id = %issued.id, not_after = %issued.not_after, "SVID issued");
                svid.set(issued);
                backoff.reset();
                if renewed.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let wait = backoff.next_wait(rand::random());
                let id = svid.current().filter(|held| !held.has_expired(Timestamp::now()));
                tracing::warn!(%error, held = id.is_some(), retry_ms = wait.as_millis(), "no SVID for workloads without a sidecar");
                tokio::time::sleep(wait).await;
            }
        }
    }
}

async fn issue(exchange: &mut Exchange, own: &Svid) -> Result<Svid, ExchangeError> {
    let (chain, _) = exchange.unmeshed(own).await?;
    Ok(Svid::new(chain, exchange.private_key())?)
}
