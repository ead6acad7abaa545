//! What the store verifies and what it refuses, certificate by certificate.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::forged::{Forged, Forger, uri, valid};
use common::{Cluster, domain};
use jiff::Timestamp;
use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use rustls::pki_types::{CertificateDer, UnixTime};
use tombolo_core::bundle::BundleRefused;
use tombolo_core::refusal::Refusal;
use tombolo_trust::bundle::{Bundle, InvalidBundle};
use tombolo_trust::issuer::Issuer;
use tombolo_trust::store::{BundleRefusalReason, ClusterBundle, TrustStore, Usage};
use tombolo_trust::svid::Svid;

fn store(bundles: &[(&str, Bundle)]) -> TrustStore {
    let store = TrustStore::new();
    assert_eq!(store.replace_all(cluster_bundles(bundles)), []);
    store
}

fn cluster_bundles(bundles: &[(&str, Bundle)]) -> Vec<ClusterBundle> {
    let cluster =
        |(name, bundle): &(&str, Bundle)| ClusterBundle { cluster: name.parse().unwrap(), bundle: bundle.clone() };
    bundles.iter().map(cluster).collect()
}

fn verify(store: &TrustStore, chain: &[CertificateDer<'_>], usage: Usage) -> Result<String, Refusal> {
    store.snapshot().verify(chain, usage, UnixTime::now()).map(|id| id.to_string())
}

const WEB: &str = "spiffe://east.tombolo/ns/shop/sa/web";

#[test]
fn leaves_are_verified_strictly() {
    type Change = fn(&mut CertificateParams);
    let cases: &[(&str, Change, Result<(), Refusal>)] = &[
        ("as it should be", |_| {}, Ok(())),
        (
            "a DNS name beside the URI",
            |p| p.subject_alt_names.push(SanType::DnsName("web".try_into().unwrap())),
            Ok(()),
        ),
        ("no basic constraints", |p| p.is_ca = IsCa::NoCa, Ok(())),
        ("expired", |p| valid(p, -100, -1), Err(Refusal::Expired)),
        ("not yet valid", |p| valid(p, 60, 120), Err(Refusal::Expired)),
        (
            "two URIs",
            |p| p.subject_alt_names.push(uri("spiffe://east.tombolo/ns/a/sa/b")),
            Err(Refusal::BadCertificate),
        ),
        ("the same URI twice", |p| p.subject_alt_names.push(uri(WEB)), Err(Refusal::BadCertificate)),
        ("no names", |p| p.subject_alt_names.clear(), Err(Refusal::BadCertificate)),
        (
            "a DNS name only",
            |p| p.subject_alt_names = vec![SanType::DnsName("web".try_into().unwrap())],
            Err(Refusal::BadCertificate),
        ),
        (
            "another scheme",
            |p| p.subject_alt_names = vec![uri("https://east.tombolo/ns/a")],
            Err(Refusal::BadCertificate),
        ),
        ("no path", |p| p.subject_alt_names = vec![uri("spiffe://east.tombolo")], Err(Refusal::BadCertificate)),
        ("an empty URI", |p| p.subject_alt_names = vec![uri("")], Err(Refusal::BadCertificate)),
        (
            "another domain",
            |p| p.subject_alt_names = vec![uri("spiffe://west.tombolo/ns/a/sa/b")],
            Err(Refusal::BadCertificate),
        ),
        (
            "an unknown domain",
            |p| p.subject_alt_names = vec![uri("spiffe://mars/ns/a/sa/b")],
            Err(Refusal::UnknownTrustDomain),
        ),
        ("a CA", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), Err(Refusal::BadCertificate)),
        ("no key usage", |p| p.key_usages.clear(), Err(Refusal::BadCertificate)),
        (
            "no digital signature",
            |p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment],
            Err(Refusal::BadCertificate),
        ),
        ("may sign certificates", |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign), Err(Refusal::BadCertificate)),
        ("may sign CRLs", |p| p.key_usages.push(KeyUsagePurpose::CrlSign), Err(Refusal::BadCertificate)),
        (
            "for code",
            |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
            Err(Refusal::BadCertificate),
        ),
    ];
    let (east, west) = (Forger::new("east"), Forger::new("west"));
    let store = store(&[("east", east.bundle(1)), ("west", west.bundle(1))]);
    for (what, change, want) in cases {
        let chain = east.leaf("ns/shop/sa/web", change).chain;
        for usage in [Usage::Client, Usage::Server] {
            assert_eq!(verify(&store, &chain, usage), want.map(|()| WEB.to_owned()), "{what} {usage:?}");
        }
    }
    let client_only = east.leaf("ns/shop/sa/web", |p| {
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    assert!(verify(&store, &client_only.chain, Usage::Client).is_ok());
    assert_eq!(verify(&store, &client_only.chain, Usage::Server), Err(Refusal::BadCertificate));
    assert_eq!(verify(&store, &[], Usage::Client), Err(Refusal::NoCertificate));
}

#[test]
fn a_bundle_verifies_its_own_domain_and_no_other() {
    let (east, other_east, west) = (Forger::new("east"), Forger::new("east"), Forger::new("west"));
    let leaf = |forger: &Forger| forger.leaf("ns/shop/sa/web", |_| {}).chain;
    let store = store(&[("east", east.bundle(1)), ("west", west.bundle(1))]);
    assert!(verify(&store, &leaf(&east), Usage::Client).is_ok());
    assert!(verify(&store, &leaf(&west), Usage::Client).is_ok());
    assert_eq!(verify(&store, &leaf(&other_east), Usage::Client), Err(Refusal::BadCertificate));
    let alone = |forger: &Forger, of: &Forger| {
        of.bundle(1).verify(&leaf(forger), Usage::Client, UnixTime::now()).map_err(|refused| refused.refusal).map(drop)
    };
    assert_eq!(alone(&east, &east), Ok(()));
    assert_eq!(alone(&other_east, &east), Err(Refusal::BadCertificate));
    assert_eq!(alone(&west, &east), Err(Refusal::UnknownTrustDomain));
    // The root sent along makes no difference.
    let mut chain = leaf(&other_east);
    chain.push(other_east.root());
    assert_eq!(verify(&store, &chain, Usage::Client), Err(Refusal::BadCertificate));
    // A signature that was tampered with.
    let mut tampered = leaf(&east)[0].to_vec();
    *tampered.last_mut().unwrap() ^= 1;
    assert_eq!(verify(&store, &[tampered.into()], Usage::Client), Err(Refusal::BadCertificate));
}

#[test]
fn intermediates_are_followed() {
    let east = Forger::new("east");
    let good = east.leaf_below("ns/shop/sa/web", |_| {});
    let store_of = |forger: &Forger| store(&[("east", forger.bundle(1))]);
    assert_eq!(verify(&store_of(&east), &good.chain, Usage::Server), Ok(WEB.into()));
    assert_eq!(verify(&store_of(&east), &good.chain[..1], Usage::Server), Err(Refusal::BadCertificate));
    let not_a_ca = east.leaf_below("ns/shop/sa/web", |p| p.is_ca = IsCa::ExplicitNoCa);
    assert_eq!(verify(&store_of(&east), &not_a_ca.chain, Usage::Server), Err(Refusal::BadCertificate));
    let long: Vec<_> = std::iter::repeat_n(good.chain[0].clone(), 9).collect();
    assert_eq!(verify(&store_of(&east), &long, Usage::Server), Err(Refusal::BadCertificate));
}

#[test]
fn an_expired_root_verifies_nothing() {
    let root = Forger::with("east", |p| valid(p, -100, -1));
    let chain = root.leaf("ns/shop/sa/web", |_| {}).chain;
    assert_eq!(verify(&store(&[("east", root.bundle(1))]), &chain, Usage::Client), Err(Refusal::Expired));
}

#[test]
fn what_has_verified_before_is_judged_again() {
    let (east, other_east) = (Forger::new("east"), Forger::new("east"));
    let chain = east.leaf("ns/shop/sa/web", |p| {
        valid(p, -100, 100);
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    let chain = chain.chain;
    let store = store(&[("east", east.bundle(1))]);
    let now = UnixTime::now();
    let at = |seconds: u64| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let verify_at = |time| store.snapshot().verify(&chain, Usage::Client, time).map(drop);
    for _ in 0..2 {
        assert_eq!(verify_at(now), Ok(()));
        assert_eq!(verify(&store, &chain, Usage::Server), Err(Refusal::BadCertificate));
        assert_eq!(verify_at(at(now.as_secs() + 200)), Err(Refusal::Expired));
        assert_eq!(verify_at(at(now.as_secs() - 200)), Err(Refusal::Expired));
    }
    store.set_revoked([WEB.parse().unwrap()].into());
    assert_eq!(verify_at(now), Err(Refusal::Revoked));
    store.set_revoked([].into());
    assert_eq!(verify_at(now), Ok(()));
    assert_eq!(store.replace_all(cluster_bundles(&[("east", other_east.bundle(2))])), []);
    assert_eq!(verify_at(now), Err(Refusal::BadCertificate));
}

#[test]
fn no_roots_means_that_everything_is_revoked() {
    let east = Forger::new("east");
    let chain = east.leaf("ns/shop/sa/web", |_| {}).chain;
    let store = store(&[("east", east.bundle(1))]);
    let empty = Bundle::new(domain("east"), 2, vec![]).unwrap();
    assert_eq!(store.replace_all(cluster_bundles(&[("east", empty)])), []);
    assert_eq!(verify(&store, &chain, Usage::Client), Err(Refusal::BadCertificate));
}

#[test]
fn a_single_identity_can_be_revoked() {
    let east = Forger::new("east");
    let store = store(&[("east", east.bundle(1))]);
    let (web, db) = (east.leaf("ns/shop/sa/web", |_| {}).chain, east.leaf("ns/shop/sa/db", |_| {}).chain);
    let generation = store.snapshot().generation();
    store.set_revoked([WEB.parse().unwrap()].into());
    assert!(store.snapshot().generation() > generation);
    assert_eq!(verify(&store, &web, Usage::Client), Err(Refusal::Revoked));
    assert!(verify(&store, &db, Usage::Client).is_ok());
    store.set_revoked([].into());
    assert!(verify(&store, &web, Usage::Client).is_ok());
}

#[test]
fn only_newer_bundles_replace_and_the_rest_is_still_taken() {
    let (old, new, west) = (Forger::new("east"), Forger::new("east"), Forger::new("west"));
    let store = store(&[("east", new.bundle(5))]);
    let refused = store.replace_all(cluster_bundles(&[("east", old.bundle(4)), ("west", west.bundle(1))]));
    assert_eq!(refused.len(), 1);
    let reason = BundleRefusalReason::Sequence(BundleRefused::LowerSequence { held: 5, offered: 4 });
    assert_eq!((refused[0].cluster.as_str(), refused[0].reason), ("east", reason));
    let snapshot = store.snapshot();
    assert_eq!(snapshot.bundle(&domain("east")), Some(&new.bundle(5)), "the last good one stays");
    assert_eq!(snapshot.bundle(&domain("west")), Some(&west.bundle(1)));

    let refused = store.replace_all(cluster_bundles(&[("east", old.bundle(5))]));
    let reason = BundleRefusalReason::Sequence(BundleRefused::SameSequenceOtherContent { sequence: 5 });
    assert_eq!(refused[0].reason, reason);
    assert_eq!(store.snapshot().domains().collect::<Vec<_>>(), [&domain("east")], "absent domains are dropped");
}

#[test]
fn clusters_and_domains_are_bound_one_to_one() {
    let (east, west) = (Forger::new("east"), Forger::new("west"));
    let store = TrustStore::new();
    let refused = store.replace_all(cluster_bundles(&[
        ("east", east.bundle(1)),
        ("thief", east.bundle(2)),
        ("east", west.bundle(1)),
        ("west", west.bundle(1)),
    ]));
    let reasons: Vec<_> = refused.iter().map(|refusal| refusal.reason).collect();
    assert_eq!(reasons, [BundleRefusalReason::DomainClaimedTwice, BundleRefusalReason::ClusterHasAnother]);
    let snapshot = store.snapshot();
    assert_eq!(snapshot.cluster_of(&domain("east")).map(|cluster| cluster.as_str()), Some("east"));
    assert_eq!(snapshot.domain_of(&"west".parse().unwrap()), Some(&domain("west")));
    assert_eq!(snapshot.bundle(&domain("east")), Some(&east.bundle(1)));
}

#[test]
fn the_own_domain_stays_and_unchanged_trust_is_no_news() {
    let (east, west) = (Forger::new("east"), Forger::new("west"));
    let store = TrustStore::new();
    let mut changes = store.subscribe();
    store.set_own(east.bundle(1)).unwrap();
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    assert_eq!(store.replace_all(cluster_bundles(&[("west", west.bundle(1))])), []);
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    let snapshot = store.snapshot();
    assert_eq!((snapshot.own(), snapshot.cluster_of(&domain("east"))), (Some(&domain("east")), None));

    assert_eq!(store.replace_all(cluster_bundles(&[("west", west.bundle(1))])), []);
    store.set_own(east.bundle(1)).unwrap();
    assert!(!changes.has_changed().unwrap());
    assert_eq!(store.set_own(east.bundle(0)), Err(BundleRefused::LowerSequence { held: 1, offered: 0 }));
    assert!(!changes.has_changed().unwrap());
}

#[test]
fn bundles_hold_only_roots_of_their_domain() {
    let (east, west) = (Forger::new("east"), Forger::new("west"));
    let new = |roots| Bundle::new(domain("east"), 1, roots);
    let leaf = east.leaf("ns/shop/sa/web", |_| {}).chain.remove(0);
    let pathful = Forger::with("east", |p| p.subject_alt_names = vec![uri("spiffe://east.tombolo/x")]);
    let nameless = Forger::with("east", |p| p.subject_alt_names.clear());
    let weak = Forger::with("east", |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    assert!(matches!(new(vec![west.root()]), Err(InvalidBundle::ForeignRoot { .. })));
    for (what, root) in [
        ("a leaf", leaf),
        ("a path", pathful.root()),
        ("no name", nameless.root()),
        ("may not sign", weak.root()),
        ("rubbish", vec![1, 2, 3].into()),
    ] {
        assert!(matches!(new(vec![root]), Err(InvalidBundle::Root(_))), "{what}");
    }
    assert!(matches!(new(vec![east.root(); 17]), Err(InvalidBundle::TooManyRoots)));
    let (second, twice) = (Forger::new("east"), new(vec![east.root(), east.root()]).unwrap());
    assert_eq!(twice.roots(), [east.root()]);
    let (one, other) = (new(vec![east.root(), second.root()]), new(vec![second.root(), east.root()]));
    assert_eq!(one.unwrap().version(), other.unwrap().version());
}

#[test]
fn bundles_survive_the_wire_and_their_file() {
    let (one, two, folder) = (Forger::new("east"), Forger::new("east"), tempfile::tempdir().unwrap());
    let full = Bundle::new(domain("east"), 7, vec![one.root(), two.root()]).unwrap();
    let empty = Bundle::new(domain("east"), 8, vec![]).unwrap();
    for bundle in [full.clone(), empty] {
        assert_eq!(Bundle::from_wire(bundle.to_wire()).unwrap(), bundle);
        bundle.save(&folder.path().join("ca.pem")).unwrap();
        assert_eq!(Bundle::load(&folder.path().join("ca.pem")).unwrap(), bundle);
    }
    let text = full.to_pem();
    let certificates_only = &text[text.find("-----").unwrap()..];
    let read = Bundle::from_pem(certificates_only.as_bytes()).unwrap();
    assert_eq!((read.sequence(), read.roots()), (0, full.roots()));
    for bad in ["", "hello", "Trust-Domain: EAST\n", "Trust-Domain: east\nSequence: x\n", &text[..text.len() - 60]] {
        assert!(Bundle::from_pem(bad.as_bytes()).is_err(), "{bad}");
    }
}

fn forged() -> &'static (TrustStore, Vec<u8>, Issuer) {
    static FORGED: std::sync::OnceLock<(TrustStore, Vec<u8>, Issuer)> = std::sync::OnceLock::new();
    FORGED.get_or_init(|| {
        let east = Forger::new("east");
        let leaf: Forged = east.leaf("ns/shop/sa/web", |_| {});
        let ca = Cluster::new("east").ca;
        let issuer = Issuer { ca, life: Duration::from_secs(60), grace: Duration::from_secs(60) };
        (store(&[("east", east.bundle(1))]), leaf.chain[0].to_vec(), issuer)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_bytes_make_anything_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let (store, _, issuer) = forged();
        let now = Timestamp::now();
        prop_assert!(verify(store, &[bytes.clone().into()], Usage::Client).is_err());
        prop_assert!(Bundle::new(domain("east"), 1, vec![bytes.clone().into()]).is_err());
        prop_assert!(issuer.renew(std::slice::from_ref(&bytes), &bytes, now, &[].into()).is_err());
        prop_assert!(Issuer::read_join("0011223344556677", b"secret", &bytes).is_err());
        let _ = Bundle::from_pem(&bytes);
    }

    /// Closer to the parser's edges: one right certificate with some octets changed or cut off never verifies.
    #[test]
    fn a_damaged_certificate_never_verifies(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let (store, leaf, issuer) = forged();
        let mut bytes = leaf.clone();
        for (at, change) in changes {
            let at = at.index(bytes.len());
            bytes[at] ^= change;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        prop_assume!(bytes != *leaf);
        prop_assert!(verify(store, &[bytes.clone().into()], Usage::Client).is_err());
        prop_assert!(issuer.renew(std::slice::from_ref(&bytes), leaf, Timestamp::now(), &[].into()).is_err());
        let key = tombolo_trust::key::IdentityKey::generate().unwrap().private_key_der();
        prop_assert!(Svid::new(vec![bytes.into()], key).is_err());
    }
}
