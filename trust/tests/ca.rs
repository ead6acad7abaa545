//! The CA and what the identity server decides with it.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use common::forged::{Forger, uri};
use common::{Cluster, LIFE, domain};
use jiff::{SignedDuration, Timestamp};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};
use rustls::pki_types::CertificateDer;
use tombolo_core::join::{JoinEntries, JoinEntryId, JoinKind, JoinRefusal};
use tombolo_core::refusal::Refusal;
use tombolo_trust::bundle::{Bundle, root_sha256};
use tombolo_trust::ca::{CSR_LEN_MAX, CaError, CertificateAuthority, CheckedCsr, InvalidCsr};
use tombolo_trust::issuer::{IssueRefusal, Issuer};
use tombolo_trust::key::IdentityKey;
use tombolo_trust::peering::sha256;
use tombolo_trust::svid::Svid;
use x509_parser::prelude::{FromDer, X509Certificate};

fn csr(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    change(&mut params);
    params.serialize_request(key).unwrap().der().to_vec()
}

#[test]
fn nothing_that_a_csr_asks_for_is_signed() {
    let (east, key) = (Cluster::new("east"), KeyPair::generate().unwrap());
    let greedy = csr(&key, |params| {
        params.subject_alt_names = vec![
            uri("spiffe://east.tombolo/tombolo/federation/fed-1"),
            SanType::DnsName("bank.example".try_into().unwrap()),
        ];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, "root");
    });
    let now = Timestamp::now();
    let chain = east.ca.issue(&greedy, &east.id("ns/shop/sa/web"), LIFE, now).unwrap();
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap().value.general_names.clone();
    assert_eq!(names.len(), 1);
    assert!(names[0].to_string().contains("spiffe://east.tombolo/ns/shop/sa/web"));
    let constraints = leaf.basic_constraints().unwrap().expect("an explicit CA:FALSE");
    assert!(!constraints.value.ca);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    assert!(!leaf.subject().to_string().contains("root"));
}

#[test]
fn a_csr_that_asks_for_another_identity_than_the_proven_one_is_refused() {
    let (east, key, now) = (Cluster::new("east"), KeyPair::generate().unwrap(), Timestamp::now());
    let issuer = Issuer { ca: east.ca.clone(), life: LIFE, grace: LIFE };
    let web = east.id("ns/shop/sa/web");
    let asking = |uris: &[&str]| {
        let csr = csr(&key, |params| params.subject_alt_names = uris.iter().map(|text| uri(text)).collect());
        issuer.issue(&CheckedCsr::new(&csr).unwrap(), &web, now, &BTreeSet::new())
    };
    assert_eq!(asking(&["spiffe://east.tombolo/ns/shop/sa/web"]).unwrap().id, web);
    for uris in [
        &["spiffe://east.tombolo/tombolo/gateway/gw-1"][..],
        &["spiffe://east.tombolo/ns/shop/sa/web", "spiffe://east.tombolo/ns/shop/sa/db"],
        &["https://bank.example"],
    ] {
        let refused = asking(uris).unwrap_err();
        assert!(matches!(&refused, IssueRefusal::OtherId { proven, .. } if *proven == web), "{refused:?}");
    }
}

#[test]
fn csrs_are_checked() {
    let key = KeyPair::generate().unwrap();
    let good = csr(&key, |_| {});
    assert!(CheckedCsr::new(&good).is_ok());
    let mut tampered = good.clone();
    *tampered.last_mut().unwrap() ^= 1;
    let trailing = [&good[..], b"x"].concat();
    let rsa = csr(&KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap(), |_| {});
    for (what, csr, want) in [
        ("empty", vec![], InvalidCsr::Malformed),
        ("tampered", tampered, InvalidCsr::Malformed),
        ("trailing octets", trailing, InvalidCsr::Malformed),
        ("too long", vec![0x30; CSR_LEN_MAX + 1], InvalidCsr::TooLong),
        ("another kind of key", rsa, InvalidCsr::Key),
    ] {
        assert_eq!(CheckedCsr::new(&csr).unwrap_err(), want, "{what}");
    }
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        assert!(CheckedCsr::new(&csr(&key, |_| {})).is_ok());
    }
}

#[test]
fn svids_live_as_long_as_told_and_never_longer_than_their_root() {
    let (east, key, now) = (Cluster::new("east"), IdentityKey::generate().unwrap(), Timestamp::now());
    let issue = |life| east.ca.issue_svid(&key, &east.id("ns/a/sa/b"), life, now);
    for (life_s, backdate_s) in [(10, 1), (3_600, 60), (86_400, 60)] {
        let svid = issue(Duration::from_secs(life_s)).unwrap();
        let seconds = |from: Timestamp, to: Timestamp| to.duration_since(from).as_secs();
        assert!((0..=1).contains(&(life_s as i64 - seconds(now, svid.not_after))));
        assert!((0..=1).contains(&(seconds(svid.not_before, now) - backdate_s)));
    }
    let for_ever = issue(Duration::from_secs(100 * 365 * 86_400)).unwrap();
    assert!(for_ever.not_after < now + SignedDuration::from_hours(11 * 365 * 24));
    assert_ne!(issue(LIFE).unwrap().chain, issue(LIFE).unwrap().chain, "each has its own serial number");
    let late = now + SignedDuration::from_hours(11 * 365 * 24);
    let refused = east.ca.issue_svid(&key, &east.id("ns/a/sa/b"), LIFE, late);
    assert!(matches!(refused, Err(CaError::RootExpired)));
    let foreign = "spiffe://west.tombolo/ns/a/sa/b".parse().unwrap();
    assert!(matches!(east.ca.issue_svid(&key, &foreign, LIFE, now), Err(CaError::ForeignIdentity(_))));
}

#[test]
fn the_ca_is_kept_private_and_found_again() {
    let east = Cluster::new("east");
    let (folder, pin) = (east.folder.path(), east.ca.active_root_sha256());
    let mode = |name: &str| fs::metadata(folder.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca.json"), mode("ca.pem")), (0o600, 0o644));
    assert!(!fs::read_to_string(folder.join("ca.pem")).unwrap().contains("PRIVATE"));
    let second = east.ca.add_root().unwrap();
    fs::remove_file(folder.join("ca.pem")).unwrap();

    let again = CertificateAuthority::create_or_load(folder, &domain("east")).unwrap();
    assert_eq!((again.bundle(), again.active_root_sha256()), (east.ca.bundle(), pin));
    assert_eq!((again.bundle().sequence(), again.bundle().roots().len()), (2, 2));
    assert_eq!(Bundle::load(&folder.join("ca.pem")).unwrap(), again.bundle());
    again.activate(second).unwrap();
    let again = CertificateAuthority::create_or_load(folder, &domain("east")).unwrap();
    assert_eq!((again.active_root_sha256(), again.bundle().sequence()), (second, 2));
    assert!(matches!(again.activate([0; 32]), Err(CaError::UnknownRoot)));
    while again.bundle().roots().len() < 16 {
        again.add_root().unwrap();
    }
    assert!(matches!(again.add_root(), Err(CaError::TooManyRoots)));
    assert!(!format!("{again:?}").to_lowercase().contains("key"));
}

#[test]
fn a_damaged_or_foreign_state_is_never_overwritten() {
    let east = Cluster::new("east");
    let path = east.folder.path().join("ca.json");
    let load = |name| CertificateAuthority::create_or_load(east.folder.path(), &domain(name));
    assert!(matches!(load("west"), Err(CaError::OtherDomain { .. })));
    let good = fs::read_to_string(&path).unwrap();
    let other = Cluster::new("east");
    let theirs = fs::read_to_string(other.folder.path().join("ca.json")).unwrap();
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let (mut wrong_key, mut no_active) = (value(&good), value(&good));
    wrong_key["roots"][0]["key"] = value(&theirs)["roots"][0]["key"].clone();
    no_active["active"] = "00".repeat(32).into();
    for bad in ["", "{}", &good[..good.len() / 2], &wrong_key.to_string(), &no_active.to_string()] {
        fs::write(&path, bad).unwrap();
        assert!(load("east").is_err(), "{}", &bad[..bad.len().min(20)]);
        assert_eq!(fs::read_to_string(&path).unwrap(), bad);
    }
    fs::write(&path, good).unwrap();
    assert_eq!(load("east").unwrap().bundle(), east.ca.bundle());
}

const SECRET: &[u8] = b"thirty-two octets of randomness.";

fn entry_id() -> JoinEntryId {
    JoinEntryId::from_random([1; 8])
}

fn setting() -> (Cluster, Issuer, JoinEntries, Timestamp) {
    let (east, now, mut entries) = (Cluster::new("east"), Timestamp::now(), JoinEntries::default());
    let issuer = Issuer { ca: east.ca.clone(), life: LIFE, grace: Duration::from_secs(86_400) };
    let expires = now + SignedDuration::from_hours(1);
    let web = east.id("ns/shop/sa/web");
    entries.add(entry_id(), JoinKind::Workload, web, sha256(SECRET), 1, expires, now).unwrap();
    (east, issuer, entries, now)
}

#[test]
fn the_identity_comes_from_the_join_entry() {
    let (east, issuer, mut entries, now) = setting();
    let key = IdentityKey::generate().unwrap();
    let csr = key.csr_der().unwrap();
    let mut join = |entry: &str, secret: &[u8], csr: &[u8], revoked: &BTreeSet<_>| {
        let request = Issuer::read_join(entry, secret, csr)?;
        issuer.issue_join(&mut entries, &request, now, revoked)
    };
    let (none, entry) = (BTreeSet::new(), entry_id().to_string());
    let (issued, changed) = join(&entry, SECRET, &csr, &none).unwrap();
    assert_eq!((issued.id.clone(), changed), (east.id("ns/shop/sa/web"), true));
    assert_eq!(Svid::new(issued.chain, key.private_key_der()).unwrap().id, issued.id);
    assert_eq!(issued.bundle, east.ca.bundle());
    let (_, changed) = join(&entry, SECRET, &csr, &none).unwrap();
    assert!(!changed, "the same key again");

    let other = IdentityKey::generate().unwrap().csr_der().unwrap();
    let web: BTreeSet<_> = [east.id("ns/shop/sa/web")].into();
    use IssueRefusal as I;
    for (what, result, refusal) in [
        ("another key", join(&entry, SECRET, &other, &none), Refusal::IdentityDenied),
        ("another secret", join(&entry, b"guess", &csr, &none), Refusal::IdentityDenied),
        ("a huge secret", join(&entry, &[0; 2000], &csr, &none), Refusal::IdentityDenied),
        ("another entry", join("0000000000000000", SECRET, &csr, &none), Refusal::IdentityDenied),
        ("no entry", join("../etc", SECRET, &csr, &none), Refusal::IdentityDenied),
        ("no CSR", join(&entry, SECRET, b"", &none), Refusal::BadRequest),
        ("revoked", join(&entry, SECRET, &csr, &web), Refusal::Revoked),
    ] {
        let error = result.map(drop).unwrap_err();
        assert_eq!(error.refusal(), refusal, "{what}");
        assert!(!matches!(error, I::Ca(_)), "{what}");
    }
    let refused = join(&entry, SECRET, &other, &none).unwrap_err();
    assert!(matches!(refused, I::Join(JoinRefusal::UsedUp)));
    assert_eq!(tonic::Status::from(refused).code(), tonic::Code::PermissionDenied);
}

#[test]
fn renewal_needs_the_svid_and_its_key() {
    let (east, issuer, _, now) = setting();
    let (key, other) = (IdentityKey::generate().unwrap(), IdentityKey::generate().unwrap());
    let id = east.id("ns/shop/sa/web");
    let issue = |ca: &CertificateAuthority, key, at| {
        let svid = ca.issue_svid(key, &id, LIFE, at).unwrap();
        svid.chain.iter().map(|certificate| certificate.to_vec()).collect::<Vec<_>>()
    };
    let (csr, foreign, none) = (key.csr_der().unwrap(), Cluster::new("east"), BTreeSet::new());
    let own = || issue(&east.ca, &key, now);
    // The SVID's life is an hour and the grace a day.
    let after = |hours: f64| now + SignedDuration::from_secs_f64(hours * 3600.0);
    for hours in [0.0, 0.5, 2.0, 24.9] {
        assert_eq!(issuer.renew(&own(), &csr, after(hours), &none).unwrap().id, id, "after {hours} hours");
    }
    let der = |chain: Vec<CertificateDer<'_>>| chain.iter().map(|one| one.to_vec()).collect::<Vec<_>>();
    let west = der(Forger::new("west").leaf("ns/a/sa/b", |_| {}).chain);
    let root = der(east.ca.bundle().roots().to_vec());
    for (what, chain, csr, hours, refusal) in [
        ("another key's CSR", own(), &other.csr_der().unwrap(), 0.0, Refusal::IdentityDenied),
        ("another's SVID", issue(&east.ca, &other, now), &csr, 0.0, Refusal::IdentityDenied),
        ("after the grace", own(), &csr, 25.1, Refusal::Expired),
        ("from the future", issue(&east.ca, &key, after(1.0)), &csr, 0.0, Refusal::Expired),
        ("another root", issue(&foreign.ca, &key, now), &csr, 0.0, Refusal::BadCertificate),
        ("another root, expired", issue(&foreign.ca, &key, now), &csr, 2.0, Refusal::BadCertificate),
        ("another domain", west, &csr, 0.0, Refusal::UnknownTrustDomain),
        ("nothing", vec![], &csr, 0.0, Refusal::NoCertificate),
        ("rubbish", vec![vec![1, 2, 3]], &csr, 0.0, Refusal::BadCertificate),
        ("the root itself", root, &csr, 0.0, Refusal::BadCertificate),
        ("no CSR", own(), &vec![], 0.0, Refusal::BadRequest),
    ] {
        assert_eq!(issuer.renew(&chain, csr, after(hours), &none).unwrap_err().refusal(), refusal, "{what}");
    }
    let revoked = issuer.renew(&own(), &csr, now, &[id.clone()].into());
    assert_eq!(revoked.unwrap_err().refusal(), Refusal::Revoked);
}

#[test]
fn the_active_root_issues_until_another_is_activated() {
    let east = Cluster::new("east");
    let (first, key) = (east.ca.active_root_sha256(), IdentityKey::generate().unwrap());
    let issuer_of = || {
        let svid = east.ca.issue_svid(&key, &east.id("ns/a/sa/b"), LIFE, Timestamp::now()).unwrap();
        let (_, leaf) = X509Certificate::from_der(&svid.chain[0]).unwrap();
        let bundle = east.ca.bundle();
        let root = bundle
            .roots()
            .iter()
            .find(|root| X509Certificate::from_der(root).unwrap().1.subject().as_raw() == leaf.issuer().as_raw());
        root_sha256(root.unwrap())
    };
    assert_eq!(issuer_of(), first);
    let second = east.ca.add_root().unwrap();
    assert_eq!((issuer_of(), east.ca.bundle().sequence()), (first, 2));
    east.ca.activate(second).unwrap();
    assert_eq!((issuer_of(), east.ca.bundle().sequence()), (second, 2));
}

#[test]
fn renewal_comes_near_half_of_the_life() {
    let (east, key, now) = (Cluster::new("east"), IdentityKey::generate().unwrap(), Timestamp::now());
    for life_s in [4.0, 10.0, 3_600.0, 86_400.0] {
        let svid = east.ca.issue_svid(&key, &east.id("ns/a/sa/b"), Duration::from_secs_f64(life_s), now).unwrap();
        for random in [0.0, 0.5, 1.0] {
            let after_s = svid.renewal_time(random).duration_since(now).as_secs_f64();
            // Certificates hold whole seconds only.
            assert!(after_s > life_s * 0.35 - 1.0 && after_s < life_s * 0.55 + 1.0, "{life_s} {random}: {after_s}");
        }
    }
}

#[tokio::test]
async fn a_process_with_the_ca_renews_its_own_svid() {
    let east = Cluster::new("east");
    // Certificates hold whole seconds: a shorter life may be renewed within the second in which it began.
    let source = east.ca.own_svid(&east.id("tombolo/federation/fed-1"), Duration::from_secs(4)).unwrap();
    let mut changes = source.subscribe();
    for _ in 0..2 {
        let before = source.current().unwrap();
        // A change that was there before `before` was read is told of too.
        let renewed = async {
            while source.current().unwrap().chain == before.chain {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap();
        let after = source.current().unwrap();
        assert!(after.not_after > before.not_after && after.id == before.id);
    }
}
