//! The identity client: gets this process its SVID from its federation and keeps it renewed.
//!
//! Nothing that happens to the process locks it out. The key is durable before the first join token is
//! redeemed, and uses of a token are counted by key, so a kill between redeeming and persisting costs nothing.
//! An SVID that expired during a pause renews with the same key within the grace that the federation states,
//! and after that the first proof is tried again: a join token, or a service account's token of Kubernetes.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use tombolo_core::backoff::Backoff;
use tombolo_core::bundle::BundleRefused;
use tombolo_core::id::{Role, TrustDomain};
use tombolo_core::service_account::Asked;

use crate::bundle::{Bundle, InvalidBundle};
use crate::grpc;
use crate::key::KeyError;
use crate::store::TrustStore;
use crate::svid::{Svid, SvidSource, TICK};
use crate::tls::{ServerExpectation, client_config};

mod exchange;
mod persisted;
pub mod unmeshed;

use exchange::{Exchange, ExchangeError};
use persisted::Persisted;

/// Where the identity comes from, and where it is kept.
#[derive(Debug, Clone)]
pub struct IdentityConfig {
    /// host:port of the federation's identity and discovery port.
    pub federation: String,
    /// File with the trust bundle of the own trust domain. It is read again before each exchange, so that
    /// replacing it needs no restart.
    pub ca: PathBuf,
    /// What proves who this process is until there is an SVID, and again when that can't be renewed.
    pub first_proof: Option<FirstProof>,
    /// What it means to be: a service account's token of something else is refused, and not used.
    pub asked: Asked,
    /// Folder for key, SVID and bundle.
    pub state: PathBuf,
}

/// A file with a proof. It may appear later, and is read anew for each exchange that needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstProof {
    /// A join token.
    Join(PathBuf),
    /// A service account's token, which the kubelet replaces before it expires.
    ServiceAccount(PathBuf),
}

impl FirstProof {
    /// From the fields `join` and `token` of a role's configuration, of which at most one is there.
    pub fn of(join: Option<&PathBuf>, token: Option<&PathBuf>) -> Option<Self> {
        join.cloned().map(Self::Join).or_else(|| token.cloned().map(Self::ServiceAccount))
    }
}

/// Why the identity client can't start. What can heal by itself is retried instead, and logged.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("the CA file is refused: {0}; copy `ca.pem` from the federation's state directory")]
    Ca(InvalidBundle),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("can't use the state directory {path}: {source}", path = path.display())]
    State { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Federation(#[from] grpc::InvalidAddress),
}

/// First and longest wait after a failed exchange.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(5);

/// Starts the client on the current runtime. A persisted SVID is in force when this returns, unless it has
/// expired; otherwise wait for the first with [`SvidSource::wait`]. The client stops some seconds after the
/// last other clone of the source is gone.
pub fn start(config: IdentityConfig) -> Result<(SvidSource, TrustStore), IdentityError> {
    let client = Client::new(config)?;
    let (svid, trust) = (client.svid.clone(), client.trust.clone());
    tokio::spawn(client.run());
    Ok((svid, trust))
}

/// Whether an SVID was kept in this state folder before: then no join token is needed.
pub fn has_identity(state: &std::path::Path) -> bool {
    persisted::svid_path(state).exists()
}

struct Client {
    config: IdentityConfig,
    trust_domain: TrustDomain,
    persisted: Persisted,
    exchange: Exchange,
    svid: SvidSource,
    trust: TrustStore,
    /// The newest SVID, also when it has expired: it proves the next renewal.
    latest: Option<Svid>,
}

impl Client {
    fn new(config: IdentityConfig) -> Result<Self, IdentityError> {
        let pinned = Bundle::load(&config.ca).map_err(IdentityError::Ca)?;
        let trust_domain = pinned.trust_domain().clone();
        let persisted = Persisted::open(&config.state)
            .map_err(|source| IdentityError::State { path: config.state.clone(), source })?;
        let key = persisted.key()?;

        let trust = TrustStore::new();
        let kept = persisted.bundle().filter(|bundle| *bundle.trust_domain() == trust_domain);
        if let Some(kept) = kept.as_ref().filter(|kept| is_stranger(&pinned, kept)) {
            let (file, kept) = (pinned.sequence(), kept.sequence());
            tracing::warn!(
                file, kept, path = %config.state.join(persisted::FOLDER).display(),
                "the CA file shares no root with the newer bundle that is kept; if the federation's CA was made anew, remove the kept folder"
            );
        }
        offer(&trust, pinned);
        if let Some(kept) = kept {
            offer(&trust, kept);
        }
        let svid = SvidSource::new();
        let latest = persisted.svid(&key).filter(|latest| *latest.id.trust_domain() == trust_domain);
        if let Some(latest) = latest.as_ref().filter(|latest| !latest.has_expired(Timestamp::now())) {
            svid.set(latest.clone());
        }
        // No certificate is shown in the handshake: the proof is in the message, and an expired one would end
        // the handshake.
        let expectation = ServerExpectation::Role { trust_domain: trust_domain.clone(), role: Role::Federation };
        let tls = client_config(&SvidSource::new(), &trust, expectation, &[grpc::ALPN_H2]);
        let exchange = Exchange::new(&config.federation, tls, key, config.asked)?;
        Ok(Self { config, trust_domain, persisted, exchange, svid, trust, latest })
    }

    async fn run(mut self) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
        let mut due = self.next_renewal();
        while self.svid.is_shared() {
            let now = Timestamp::now();
            if now < due {
                let left = due.duration_since(now).unsigned_abs();
                tokio::time::sleep(left.min(TICK)).await;
                continue;
            }
            match self.renew().await {
                Ok(()) => {
                    backoff.reset();
                    due = self.next_renewal().max(soonest(self.latest.as_ref(), Timestamp::now()));
                }
                Err(error) => {
                    let wait = backoff.next_wait(rand::random());
                    tracing::warn!(%error, federation = self.config.federation, retry_ms = wait.as_millis(), "no SVID from the federation yet");
                    due = Timestamp::now().saturating_add(wait).unwrap_or(Timestamp::MAX);
                }
            }
        }
    }

    fn next_renewal(&self) -> Timestamp {
        self.latest.as_ref().map_or(Timestamp::MIN, |latest| latest.renewal_time(rand::random()))
    }

    /// One exchange: renews by the SVID that there is, else by the first proof.
    async fn renew(&mut self) -> Result<(), ExchangeError> {
        self.read_ca_file().await;
        let first_proof = self.config.first_proof.as_ref();
        let (chain, bundle) = self.exchange.run(self.latest.as_ref(), first_proof).await?;
        if *bundle.trust_domain() != self.trust_domain {
            return Err(ExchangeError::OtherDomain(bundle.trust_domain().clone()));
        }
        offer(&self.trust, bundle);
        let svid = Svid::new(chain, self.exchange.private_key())?;
        if *svid.id.trust_domain() != self.trust_domain {
            return Err(ExchangeError::OtherDomain(svid.id.trust_domain().clone()));
        }
        // It is used even if it can't be kept: a restart gets another with the same key.
        if let Err(error) = self.keep(&svid).await {
            let path = self.config.state.display();
            tracing::warn!(%error, %path, "the SVID can't be written; check space and permissions");
        }
        tracing::info!(id = %svid.id, not_after = %svid.not_after, "SVID issued");
        self.latest = Some(svid.clone());
        self.svid.set(svid);
        Ok(())
    }

    /// Off this thread, which may carry requests: writing waits for the disk.
    async fn keep(&self, svid: &Svid) -> io::Result<()> {
        let (persisted, svid) = (self.persisted.clone(), svid.clone());
        let bundle = self.trust.snapshot().bundle(&self.trust_domain).cloned();
        let written = tokio::task::spawn_blocking(move || persisted.save(&svid, bundle.as_ref()));
        written.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)))
    }

    /// Whoever missed a rotation is helped by a new CA file.
    async fn read_ca_file(&self) {
        let path = self.config.ca.clone();
        let Ok(read) = tokio::task::spawn_blocking(move || Bundle::load(&path)).await else { return };
        match read {
            Ok(bundle) if *bundle.trust_domain() == self.trust_domain => offer(&self.trust, bundle),
            Ok(bundle) => {
                let found = bundle.trust_domain();
                tracing::warn!(%found, want = %self.trust_domain, "the CA file is now of another trust domain; restart to take it");
            }
            Err(error) => tracing::debug!(%error, "the CA file can't be read; going on with what was read before"),
        }
    }
}

/// When the SVID that was just issued may be renewed at the soonest: a tenth of its life from now. It matters
/// where this machine's clock is so far ahead that every new SVID looks old.
fn soonest(latest: Option<&Svid>, now: Timestamp) -> Timestamp {
    let life = latest.map_or(RETRY_LONGEST, |svid| svid.not_after.duration_since(svid.not_before).unsigned_abs());
    now.saturating_add(life / 10).unwrap_or(Timestamp::MAX)
}

/// Whether the CA file is older than the kept bundle and has nothing in common with it.
fn is_stranger(file: &Bundle, kept: &Bundle) -> bool {
    file.sequence() < kept.sequence() && !file.roots().iter().any(|root| kept.roots().contains(root))
}

/// The newest bundle stays in force whatever is offered.
fn offer(trust: &TrustStore, bundle: Bundle) {
    match trust.set_own(bundle) {
        Ok(()) => {}
        // A CA file that was copied once grows old, which is nothing to report.
        Err(reason @ BundleRefused::LowerSequence { .. }) => {
            tracing::debug!(%reason, "an older bundle of the own trust domain is not taken");
        }
        Err(reason @ BundleRefused::SameSequenceOtherContent { .. }) => {
            tracing::warn!(%reason, "an offered bundle of the own trust domain is not taken; copy `ca.pem` from the federation again");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::ca::CertificateAuthority;
    use crate::key::IdentityKey;

    #[test]
    fn a_clock_that_is_ahead_does_not_make_it_ask_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let ca = CertificateAuthority::create_or_load(folder.path(), &"east".parse().unwrap()).unwrap();
        let (key, id) = (IdentityKey::generate().unwrap(), "spiffe://east/ns/a/sa/b".parse().unwrap());
        let (hour, now) = (Duration::from_secs(3600), Timestamp::now());
        let svid = ca.issue_svid(&key, &id, hour, now - Duration::from_secs(86_400)).unwrap();
        assert!(svid.renewal_time(0.5) < now);
        assert!(soonest(Some(&svid), now) >= now + hour / 10);
    }
}
