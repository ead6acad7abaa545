//! The bundles of all trust domains that are trusted here, as one immutable snapshot that handshakes read
//! without a lock. Each domain's bundle verifies that domain's identities and no others.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use tokio::sync::watch;
use tombolo_core::bundle::{Acceptance, BundleRefused, accept};
use tombolo_core::id::{ClusterId, SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use webpki::{EndEntityCert, KeyUsage};

use crate::bundle::Bundle;
use crate::certificate::{Refused, bad, read_leaf, read_root};
use crate::tls::provider;

/// A bundle and the cluster that it was bound to at peering.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterBundle {
    pub cluster: ClusterId,
    pub bundle: Bundle,
}

/// A bundle that was offered and not taken; what was held before stays in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the bundle of trust domain {trust_domain} from cluster {cluster} is refused: {reason}")]
pub struct BundleRefusal {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    pub reason: BundleRefusalReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BundleRefusalReason {
    #[error(transparent)]
    Sequence(#[from] BundleRefused),
    #[error("another cluster has brought a bundle for this trust domain; each belongs to one cluster")]
    DomainClaimedTwice,
    #[error("the cluster has brought a bundle for another trust domain; each cluster has one")]
    ClusterHasAnother,
}

/// Whose certificate is verified: the one of the side that dialled, or the one of the side that accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    Client,
    Server,
}

/// What is trusted. Clones share the same content.
#[derive(Debug, Clone, Default)]
pub struct TrustStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    snapshot: ArcSwap<TrustSnapshot>,
    /// Held while a new snapshot is made from the old one; readers never take it.
    writing: Mutex<()>,
    generation: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            snapshot: ArcSwap::from_pointee(TrustSnapshot::default()),
            writing: Mutex::new(()),
            generation: watch::Sender::new(0),
        }
    }
}

impl TrustStore {
    /// A store that trusts nobody.
    pub fn new() -> Self {
        Self::default()
    }

    pub fn snapshot(&self) -> Arc<TrustSnapshot> {
        self.shared.snapshot.load_full()
    }

    /// Yields the generation whenever what is trusted has changed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// Takes `bundles` as all that is trusted. Domains that are absent are dropped, except the one given to
    /// [`TrustStore::set_own`]. A bundle that may not replace the one held is reported, and that one stays.
    pub fn replace_all(&self, bundles: Vec<ClusterBundle>) -> Vec<BundleRefusal> {
        let mut refusals = Vec::new();
        self.update(|current| {
            let mut domains: BTreeMap<TrustDomain, DomainTrust> = BTreeMap::new();
            for ClusterBundle { cluster, bundle } in bundles {
                let trust_domain = bundle.trust_domain().clone();
                let mut refuse = |reason| {
                    refusals.push(BundleRefusal {
                        cluster: cluster.clone(),
                        trust_domain: trust_domain.clone(),
                        reason,
                    });
                };
                if domains.contains_key(&trust_domain) {
                    refuse(BundleRefusalReason::DomainClaimedTwice);
                    continue;
                }
                if domains.values().any(|domain| domain.cluster.as_ref() == Some(&cluster)) {
                    refuse(BundleRefusalReason::ClusterHasAnother);
                    continue;
                }
                let held = current.domains.get(&trust_domain);
                let mut domain = match take(held, bundle) {
                    Ok(domain) => domain,
                    Err((held, reason)) => {
                        refuse(reason.into());
                        held
                    }
                };
                domain.cluster = Some(cluster);
                domains.insert(trust_domain, domain);
            }
            if let Some((own, trust)) = current.own.as_ref().and_then(|own| current.domains.get_key_value(own)) {
                domains.entry(own.clone()).or_insert_with(|| trust.clone());
            }
            TrustSnapshot { domains, ..current.clone() }
        });
        refusals
    }

    /// Takes the bundle of this process's own trust domain, known from its CA file or its federation. It is
    /// never dropped by [`TrustStore::replace_all`], so that renewal stays possible.
    pub fn set_own(&self, bundle: Bundle) -> Result<(), BundleRefused> {
        let mut result = Ok(());
        self.update(|current| {
            let trust_domain = bundle.trust_domain().clone();
            let mut next = TrustSnapshot { own: Some(trust_domain.clone()), ..current.clone() };
            match take(current.domains.get(&trust_domain), bundle) {
                Ok(domain) => {
                    next.domains.insert(trust_domain, domain);
                }
                Err((_, reason)) => result = Err(reason),
            }
            next
        });
        result
    }

    /// Takes `revoked` as all identities that are revoked.
    pub fn set_revoked(&self, revoked: BTreeSet<SpiffeId>) {
        self.update(|current| TrustSnapshot { revoked: revoked.into(), ..current.clone() });
    }

    /// Publishes what `change` makes of the current snapshot, if that differs.
    fn update(&self, change: impl FnOnce(&TrustSnapshot) -> TrustSnapshot) {
        let _writing = self.shared.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.snapshot();
        let mut next = change(&current);
        if next == *current {
            return;
        }
        next.generation = current.generation + 1;
        let generation = next.generation;
        self.shared.snapshot.store(Arc::new(next));
        self.shared.generation.send_replace(generation);
    }
}

/// The trust in one domain after `offered`; with a refusal, what was held.
fn take(held: Option<&DomainTrust>, offered: Bundle) -> Result<DomainTrust, (DomainTrust, BundleRefused)> {
    let cluster = held.and_then(|held| held.cluster.clone());
    match (accept(held.map(|held| held.bundle.version()), offered.version()), held) {
        (Ok(Acceptance::Same), Some(held)) => Ok(held.clone()),
        (Err(reason), Some(held)) => Err((held.clone(), reason)),
        (Ok(_) | Err(_), _) => {
            let anchors = Anchors::new(offered.roots());
            Ok(DomainTrust { cluster, bundle: Arc::new(offered), anchors: Arc::new(anchors) })
        }
    }
}

/// All that is trusted at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrustSnapshot {
    generation: u64,
    domains: BTreeMap<TrustDomain, DomainTrust>,
    own: Option<TrustDomain>,
    revoked: Arc<BTreeSet<SpiffeId>>,
}

#[derive(Debug, Clone)]
struct DomainTrust {
    /// Unknown for the own domain until the federation has told.
    cluster: Option<ClusterId>,
    bundle: Arc<Bundle>,
    anchors: Arc<Anchors>,
}

impl PartialEq for DomainTrust {
    fn eq(&self, other: &Self) -> bool {
        // The anchors are made from the bundle.
        self.cluster == other.cluster && self.bundle == other.bundle
    }
}

impl TrustSnapshot {
    /// Grows with every change; part of the key of pooled legs.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The cluster that a trust domain was bound to at peering.
    pub fn cluster_of(&self, trust_domain: &TrustDomain) -> Option<&ClusterId> {
        self.domains.get(trust_domain)?.cluster.as_ref()
    }

    /// The trust domain that a cluster was bound to at peering.
    pub fn domain_of(&self, cluster: &ClusterId) -> Option<&TrustDomain> {
        self.domains.iter().find(|(_, domain)| domain.cluster.as_ref() == Some(cluster)).map(|(domain, _)| domain)
    }

    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<&Bundle> {
        self.domains.get(trust_domain).map(|domain| &*domain.bundle)
    }

    pub fn domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.domains.keys()
    }

    /// The trust domain of this process.
    pub fn own(&self) -> Option<&TrustDomain> {
        self.own.as_ref()
    }

    pub fn revoked(&self) -> &BTreeSet<SpiffeId> {
        &self.revoked
    }

    /// Verifies a chain, leaf first, against the bundle of the trust domain that the leaf itself names.
    pub fn verify(&self, chain: &[CertificateDer<'_>], usage: Usage, now: UnixTime) -> Result<SpiffeId, Refusal> {
        self.verify_in_detail(chain, usage, now).map_err(|refused| refused.refusal)
    }

    /// As [`TrustSnapshot::verify`]; a refusal says what exactly was wrong.
    pub fn verify_in_detail(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<SpiffeId, Refused> {
        let leaf = read_leaf(chain)?;
        let id = leaf.id;
        let Some(domain) = self.domains.get(id.trust_domain()) else {
            let detail = "no bundle is held for the trust domain";
            return Err(Refused { refusal: Refusal::UnknownTrustDomain, detail });
        };
        domain.anchors.verify_once(chain, (leaf.not_before, leaf.not_after), usage, now)?;
        if self.revoked.contains(&id) {
            return Err(Refused { refusal: Refusal::Revoked, detail: "the identity was revoked" });
        }
        Ok(id)
    }
}

/// Leaves whose signature is known to be good, at most. Only what a root of the domain has issued gets in.
const VERIFIED_MAX: usize = 512;

/// The roots of one domain, read once.
#[derive(Debug)]
pub(crate) struct Anchors {
    anchors: Vec<TrustAnchor<'static>>,
    /// When each of them is valid.
    validity: Vec<(UnixTime, UnixTime)>,
    /// Leaves (DER) that have verified against all of these roots, for which uses.
    verified: Mutex<HashMap<Vec<u8>, Uses>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    client: bool,
    server: bool,
}

impl Uses {
    fn of(&mut self, usage: Usage) -> &mut bool {
        match usage {
            Usage::Client => &mut self.client,
            Usage::Server => &mut self.server,
        }
    }
}

impl Anchors {
    /// Roots that can't be read are left out; a `Bundle` has none.
    pub(crate) fn new(roots: &[CertificateDer<'_>]) -> Self {
        let anchor = |root| {
            let read = read_root(root).ok()?;
            let anchor = webpki::anchor_from_trusted_cert(root).ok()?.to_owned();
            Some((anchor, (read.not_before, read.not_after)))
        };
        let (anchors, validity) = roots.iter().filter_map(anchor).unzip();
        Self { anchors, validity, verified: Mutex::default() }
    }

    /// As [`Anchors::verify`], but a leaf that a root itself has issued has its signature checked once: peers
    /// show the same one at each handshake. Time counts each time; who holds the leaf's key is for the handshake.
    fn verify_once(
        &self,
        chain: &[CertificateDer<'_>],
        leaf_validity: (UnixTime, UnixTime),
        usage: Usage,
        now: UnixTime,
    ) -> Result<(), Refused> {
        let within = |(from, until): &(UnixTime, UnixTime)| *from <= now && now <= *until;
        let [leaf] = chain else { return self.verify(chain, usage, now) };
        if !within(&leaf_validity) || !self.validity.iter().all(within) {
            return self.verify(chain, usage, now);
        }
        if self.verified().get_mut(&**leaf).is_some_and(|uses| *uses.of(usage)) {
            return Ok(());
        }
        self.verify(chain, usage, now)?;
        let mut verified = self.verified();
        if verified.len() >= VERIFIED_MAX && !verified.contains_key(&**leaf) {
            verified.clear();
        }
        *verified.entry(leaf.to_vec()).or_default().of(usage) = true;
        Ok(())
    }

    fn verified(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Uses>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those in their validity, which webpki takes for granted.
    fn valid_at(&self, now: UnixTime) -> Cow<'_, [TrustAnchor<'static>]> {
        let valid = |validity: &(UnixTime, UnixTime)| validity.0 <= now && now <= validity.1;
        if self.validity.iter().all(valid) {
            return Cow::Borrowed(&self.anchors);
        }
        let both = self.anchors.iter().zip(&self.validity);
        Cow::Owned(both.filter(|(_, validity)| valid(validity)).map(|(anchor, _)| anchor.clone()).collect())
    }

    /// Builds a path from the leaf to one of these roots.
    pub(crate) fn verify(&self, chain: &[CertificateDer<'_>], usage: Usage, now: UnixTime) -> Result<(), Refused> {
        if self.anchors.is_empty() {
            return Err(bad("the bundle of the trust domain is empty: everything of it is revoked"));
        }
        let anchors = self.valid_at(now);
        if anchors.is_empty() {
            return Err(Refused { refusal: Refusal::Expired, detail: "no root of the trust domain is valid now" });
        }
        let [leaf, intermediates @ ..] = chain else {
            return Err(Refused { refusal: Refusal::NoCertificate, detail: "the chain is empty" });
        };
        let key_usage = match usage {
            Usage::Client => KeyUsage::client_auth(),
            Usage::Server => KeyUsage::server_auth(),
        };
        let algorithms = provider().signature_verification_algorithms.all;
        let end_entity = EndEntityCert::try_from(leaf).map_err(refused)?;
        end_entity
            .verify_for_usage(algorithms, &anchors, intermediates, now, key_usage, None, None)
            .map(drop)
            .map_err(refused)
    }
}

fn refused(error: webpki::Error) -> Refused {
    use webpki::Error as E;
    let detail = match error {
        E::CertExpired { .. } | E::InvalidCertValidity => {
            return Refused { refusal: Refusal::Expired, detail: "the certificate has expired" };
        }
        E::CertNotValidYet { .. } => {
            return Refused { refusal: Refusal::Expired, detail: "the certificate is not valid yet" };
        }
        E::UnknownIssuer => "no root of the trust domain has issued the certificate",
        E::InvalidSignatureForPublicKey => "the signature of the certificate is wrong",
        E::CaUsedAsEndEntity => "the leaf is a CA certificate",
        E::RequiredEkuNotFoundContext(_) => "the extended key usage does not allow this use",
        E::NameConstraintViolation => "a name constraint is violated",
        E::PathLenConstraintViolated | E::MaximumPathDepthExceeded => "the chain is longer than allowed",
        E::BadDer | E::BadDerTime | E::TrailingData(_) => "the certificate is not valid DER",
        _ => "the certificate does not verify",
    };
    bad(detail)
}
