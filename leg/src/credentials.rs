//! What the other end of a live leg has shown, kept so that a leg ends when it is no longer trusted: a bundle
//! withdrawn, a root retired, an identity revoked.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, UnixTime};
use tombolo_core::refusal::Refusal;
use tombolo_trust::store::{TrustStore, Usage};

/// The chain that the other end's handshake was signed for.
#[derive(Debug, Clone)]
pub struct Credentials {
    chain: Arc<[CertificateDer<'static>]>,
    usage: Usage,
    verified: UnixTime,
}

impl Credentials {
    pub(crate) fn new(chain: &[CertificateDer<'static>], usage: Usage) -> Self {
        Self { chain: chain.into(), usage, verified: UnixTime::now() }
    }

    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Whether the leg would still be accepted. The time is that of its handshake: a leg outlives the
    /// certificate it began with, not the trust in it.
    pub fn check(&self, trust: &TrustStore) -> Result<(), Refusal> {
        trust.snapshot().verify(&self.chain, self.usage, self.verified).map(drop)
    }

    /// Resolves when the leg must end, with the reason. Never, if the store is gone.
    pub async fn refused(&self, trust: &TrustStore) -> Refusal {
        let mut generations = trust.subscribe();
        loop {
            if let Err(refusal) = self.check(trust) {
                return refusal;
            }
            if generations.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}
