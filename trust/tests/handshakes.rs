//! Real handshakes over loopback: each expectation of a server against each demand on a client, and what
//! either side sees of a refusal.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::forged::{Forged, Forger, uri, valid};
use common::{Cluster, End, end, handshake, trusting};
use jiff::{SignedDuration, Timestamp};
use rcgen::{BasicConstraints, IsCa};
use rustls::pki_types::UnixTime;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use tombolo_core::id::{Role, SpiffeId};
use tombolo_core::refusal::Refusal;
use tombolo_trust::store::{ClusterBundle, TrustStore, Usage};
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{
    ClientAuth, RootInChain, ServerExpectation, client_config, identity_of, provider, server_config,
};

const H2: &[&[u8]] = &[b"h2"];
const PEERING: &[&[u8]] = &[b"tombolo-peering/1"];

const WEB: &str = "ns/shop/sa/web";
const GATEWAY: &str = "tombolo/gateway/gw-1";

fn ids(ids: &[SpiffeId]) -> ServerExpectation {
    ServerExpectation::Ids { trust_domain: ids[0].trust_domain().clone(), ids: Arc::new(ids.iter().cloned().collect()) }
}

fn role(cluster: &Cluster, role: Role) -> ServerExpectation {
    ServerExpectation::Role { trust_domain: cluster.domain(), role }
}

fn past() -> Timestamp {
    Timestamp::now() - SignedDuration::from_hours(2)
}

/// Both ends when `refusal` was decided by the server, else by nobody.
fn by_server(refusal: Option<Refusal>) -> (End, End) {
    match refusal {
        Some(refusal) => (End::Told(refusal), End::Refused(refusal)),
        None => (End::Open, End::Open),
    }
}

fn by_client(refusal: Option<Refusal>) -> (End, End) {
    let (server, client) = by_server(refusal);
    (client, server)
}

/// Makes what a client shows, anew for each handshake.
type Show<'a> = &'a dyn Fn() -> Option<Forged>;
/// What is shown, with what Trusted, Optional and WellFormed say to it.
type Case<'a> = (&'a str, Show<'a>, Option<Refusal>, Option<Refusal>, Option<Refusal>);

/// A certificate with the key of another.
fn tampered(one: Forged, other: Forged) -> Forged {
    Forged { chain: one.chain, key: other.key }
}

fn certified(forged: Forged) -> CertifiedKey {
    let key = provider().key_provider.load_private_key(forged.key).unwrap();
    CertifiedKey::new(forged.chain, key)
}

fn showing_client(config: Arc<ClientConfig>, forged: Forged) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(&config);
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certified(forged)));
    Arc::new(config)
}

fn showing_server(config: Arc<ServerConfig>, forged: Forged) -> Arc<ServerConfig> {
    let mut config = ServerConfig::clone(&config);
    config.cert_resolver = Arc::new(SingleCertAndKey::from(certified(forged)));
    Arc::new(config)
}

#[tokio::test]
async fn what_is_asked_of_clients() {
    let (east, foreign) = (Forger::new("east"), Forger::new("foreign"));
    let (other_east, server) = (Forger::new("east"), Cluster::new("server"));
    let trust = trusting(&[&server]);
    trust
        .replace_all(vec![server.bundle(), ClusterBundle { cluster: "east".parse().unwrap(), bundle: east.bundle(1) }]);
    trust.set_revoked(["spiffe://east.tombolo/ns/shop/sa/gone".parse().unwrap()].into());
    let server_svid = server.source(WEB);
    let expect = ids(&[server.id(WEB)]);

    use Refusal as R;
    let cases: &[Case<'_>] = &[
        ("nothing", &|| None, Some(R::NoCertificate), None, Some(R::NoCertificate)),
        ("a good one", &|| Some(east.leaf(WEB, |_| {})), None, None, None),
        ("a role's", &|| Some(east.leaf(GATEWAY, |_| {})), None, None, None),
        (
            "of an unknown domain",
            &|| Some(foreign.leaf(WEB, |_| {})),
            Some(R::UnknownTrustDomain),
            Some(R::UnknownTrustDomain),
            None,
        ),
        (
            "of another root",
            &|| Some(other_east.leaf(WEB, |_| {})),
            Some(R::BadCertificate),
            Some(R::BadCertificate),
            None,
        ),
        ("expired", &|| Some(east.leaf(WEB, |p| valid(p, -100, -1))), Some(R::Expired), Some(R::Expired), None),
        ("revoked", &|| Some(east.leaf("ns/shop/sa/gone", |_| {})), Some(R::Revoked), Some(R::Revoked), None),
        (
            "with two names",
            &|| Some(east.leaf(WEB, |p| p.subject_alt_names.push(uri("spiffe://east.tombolo/x")))),
            Some(R::BadCertificate),
            Some(R::BadCertificate),
            Some(R::BadCertificate),
        ),
        (
            "a CA",
            &|| Some(east.leaf(WEB, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
            Some(R::BadCertificate),
            Some(R::BadCertificate),
            Some(R::BadCertificate),
        ),
        (
            "of another key",
            &|| Some(tampered(east.leaf(WEB, |_| {}), east.leaf(WEB, |_| {}))),
            Some(R::BadCertificate),
            Some(R::BadCertificate),
            Some(R::BadCertificate),
        ),
    ];
    for (what, shown, trusted, optional, well_formed) in cases {
        for (auth, want) in
            [(ClientAuth::Trusted, *trusted), (ClientAuth::Optional, *optional), (ClientAuth::WellFormed, *well_formed)]
        {
            let mut client = client_config(&SvidSource::new(), &trust, expect.clone(), H2);
            if let Some(forged) = shown() {
                client = showing_client(client, forged);
            }
            let server = server_config(&server_svid, &trust, auth, H2, RootInChain::No);
            let (client, server) = handshake(client, server).await;
            assert_eq!((end(&client), end(&server)), by_server(want), "{what} {auth:?}");
        }
    }
}

#[tokio::test]
async fn what_is_expected_of_servers() {
    let (east, west, foreign) = (Cluster::new("east"), Cluster::new("west"), Cluster::new("foreign"));
    let trust = trusting(&[&east, &west]);
    let hour = Duration::from_secs(3600);
    let forger = Forger::new("west");

    use Refusal as R;
    let cases = [
        ("the one named", west.source(WEB), ids(&[west.id(WEB)]), None),
        ("one of those named", west.source(WEB), ids(&[west.id(WEB), west.id("ns/shop/sa/web2")]), None),
        ("another", west.source("ns/shop/sa/db"), ids(&[west.id(WEB)]), Some(R::IdentityDenied)),
        ("another domain's", east.source(WEB), ids(&[west.id(WEB)]), Some(R::IdentityDenied)),
        ("unknown domain", foreign.source(WEB), ids(&[foreign.id(WEB)]), Some(R::UnknownTrustDomain)),
        ("expired", west.source_at(WEB, hour, past()), ids(&[west.id(WEB)]), Some(R::Expired)),
        ("role", west.source(GATEWAY), role(&west, Role::Gateway), None),
        ("other role", west.source(GATEWAY), role(&west, Role::Federation), Some(R::WrongRole)),
        ("workload as role", west.source(WEB), role(&west, Role::Gateway), Some(R::WrongRole)),
        ("another domain's role", east.source(GATEWAY), role(&west, Role::Gateway), Some(R::IdentityDenied)),
        (
            "workload that looks like a role",
            west.source("ns/tombolo/gateway/gw-1"),
            role(&west, Role::Gateway),
            Some(R::WrongRole),
        ),
    ];
    for (what, svid, expectation, want) in cases {
        for auth in [ClientAuth::Trusted, ClientAuth::Optional, ClientAuth::WellFormed] {
            let client = client_config(&east.source("ns/shop/sa/front"), &trust, expectation.clone(), H2);
            let server = server_config(&svid, &trust, auth, H2, RootInChain::No);
            let (client, server) = handshake(client, server).await;
            assert_eq!((end(&client), end(&server)), by_client(want), "{what} {auth:?}");
        }
    }
    // A server that does not hold the key of the certificate that it shows, and one of another root.
    let server = || server_config(&west.source(WEB), &trust, ClientAuth::Optional, H2, RootInChain::No);
    let client = || client_config(&SvidSource::new(), &trust, ids(&[west.id(WEB)]), H2);
    let real = west.source(WEB).current().unwrap();
    let stolen = Forged { chain: real.chain.clone(), key: forger.leaf(WEB, |_| {}).key };
    for (what, shown) in [("another key", stolen), ("another root", forger.leaf(WEB, |_| {}))] {
        let (client, server) = handshake(client(), showing_server(server(), shown)).await;
        assert_eq!((end(&client), end(&server)), by_client(Some(R::BadCertificate)), "{what}");
    }
    let no_certificate = server_config(&SvidSource::new(), &trust, ClientAuth::Optional, H2, RootInChain::No);
    let (client, server) = handshake(client(), no_certificate).await;
    assert!(client.is_err() && server.is_err());
}

#[tokio::test]
async fn a_pinned_root_needs_no_bundle() {
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let (east_trust, west_trust) = (trusting(&[&east]), trusting(&[&west]));
    let second = west.ca.add_root().unwrap();
    let pin = west.ca.active_root_sha256();
    west_trust.replace_all(vec![west.bundle()]);
    let pinned = |sha256| ServerExpectation::PinnedRoot { sha256, role: Role::Gateway };
    let with_root = RootInChain::ForAlpn(PEERING[0]);
    let expired = || west.source_at(GATEWAY, Duration::from_secs(3600), past());

    use Refusal as R;
    for (what, svid, expectation, alpn, root, want) in [
        ("the pinned one", west.source(GATEWAY), pinned(pin), PEERING, with_root, None),
        (
            "another root of the domain",
            west.source(GATEWAY),
            pinned(second),
            PEERING,
            with_root,
            Some(R::BadCertificate),
        ),
        ("another root", west.source(GATEWAY), pinned([7; 32]), PEERING, with_root, Some(R::BadCertificate)),
        ("no root sent", west.source(GATEWAY), pinned(pin), PEERING, RootInChain::No, Some(R::BadCertificate)),
        ("another ALPN", west.source(GATEWAY), pinned(pin), H2, with_root, Some(R::BadCertificate)),
        ("a workload", west.source(WEB), pinned(pin), PEERING, with_root, Some(R::WrongRole)),
        ("another role", west.source("tombolo/federation/f"), pinned(pin), PEERING, with_root, Some(R::WrongRole)),
    ] {
        let client = client_config(&east.source(GATEWAY), &east_trust, expectation, alpn);
        let server = server_config(&svid, &west_trust, ClientAuth::WellFormed, &[PEERING[0], H2[0]], root);
        let (client, server) = handshake(client, server).await;
        assert_eq!((end(&client), end(&server)), by_client(want), "{what}");
    }
    // An expired server finds no root that verifies it, so it can't be met at all.
    let client = client_config(&east.source(GATEWAY), &east_trust, pinned(pin), PEERING);
    let server = server_config(&expired(), &west_trust, ClientAuth::WellFormed, PEERING, with_root);
    let (client, server) = handshake(client, server).await;
    assert!(client.is_err() && server.is_err());

    // A chain that ends in the pinned root which did not issue the leaf.
    let (forger, mut chain) = (Forger::new("west"), Vec::new());
    let forged = forger.leaf(GATEWAY, |_| {});
    chain.extend(forged.chain);
    chain.extend(
        west.ca.bundle().roots().iter().filter(|root| tombolo_trust::bundle::root_sha256(root) == pin).cloned(),
    );
    let client = client_config(&east.source(GATEWAY), &east_trust, pinned(pin), PEERING);
    let server = server_config(&west.source(GATEWAY), &west_trust, ClientAuth::WellFormed, PEERING, with_root);
    let (client, server) = handshake(client, showing_server(server, Forged { chain, key: forged.key })).await;
    assert_eq!((end(&client), end(&server)), by_client(Some(R::BadCertificate)));

    // What a pin names must be a root that signed itself, not a CA below another.
    let below = forger.leaf_below(GATEWAY, |p| p.subject_alt_names = vec![uri("spiffe://west.tombolo")]);
    let sha256 = tombolo_trust::bundle::root_sha256(&below.chain[1]);
    let client = client_config(&east.source(GATEWAY), &east_trust, pinned(sha256), PEERING);
    let server = server_config(&west.source(GATEWAY), &west_trust, ClientAuth::WellFormed, PEERING, with_root);
    let (client, server) = handshake(client, showing_server(server, below)).await;
    assert_eq!((end(&client), end(&server)), by_client(Some(R::BadCertificate)));
}

#[tokio::test]
async fn no_common_protocol_is_refused() {
    let east = Cluster::new("east");
    let trust = trusting(&[&east]);
    let svid = east.source(WEB);
    let client = client_config(&svid, &trust, ids(&[east.id(WEB)]), &[b"tombolo/tcp"]);
    let server = server_config(&svid, &trust, ClientAuth::Trusted, H2, RootInChain::No);
    let (client, server) = handshake(client, server).await;
    assert_eq!((end(&client), end(&server)), by_server(Some(Refusal::BadAlpn)));
}

#[tokio::test]
async fn nothing_is_resumed_so_a_revocation_holds_at_once() {
    let east = Cluster::new("east");
    let trust = trusting(&[&east]);
    let client = client_config(&east.source(WEB), &trust, ids(&[east.id("ns/shop/sa/db")]), H2);
    let server = server_config(&east.source("ns/shop/sa/db"), &trust, ClientAuth::Trusted, H2, RootInChain::No);
    for _ in 0..2 {
        let (client, server) = handshake(client.clone(), server.clone()).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        assert_eq!(client.get_ref().1.handshake_kind(), server.get_ref().1.handshake_kind());
        assert!(client.get_ref().1.handshake_kind() != Some(rustls::HandshakeKind::Resumed));
        assert_eq!(client.get_ref().1.tls13_tickets_received(), 0);
        assert_eq!(client.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        let chain = server.get_ref().1.peer_certificates().unwrap();
        assert_eq!(identity_of(chain), Ok(east.id(WEB)));
    }
    trust.set_revoked([east.id(WEB)].into());
    let (client, server) = handshake(client, server).await;
    assert_eq!((end(&client), end(&server)), by_server(Some(Refusal::Revoked)));
}

#[tokio::test]
async fn a_well_formed_chain_is_judged_by_the_store_afterwards() {
    let (east, foreign) = (Cluster::new("east"), Cluster::new("foreign"));
    let trust = trusting(&[&east]);
    let client = client_config(&foreign.source(GATEWAY), &trust, ids(&[east.id(WEB)]), H2);
    let server = server_config(&east.source(WEB), &trust, ClientAuth::WellFormed, H2, RootInChain::No);
    let (_client, server) = handshake(client, server).await;
    let server = server.unwrap();
    let chain = server.get_ref().1.peer_certificates().unwrap();
    let verdict = |trust: &TrustStore| trust.snapshot().verify(chain, Usage::Client, UnixTime::now());
    assert_eq!(verdict(&trust), Err(Refusal::UnknownTrustDomain));
    trust.replace_all(vec![east.bundle(), foreign.bundle()]);
    assert_eq!(verdict(&trust), Ok(foreign.id(GATEWAY)));
}
