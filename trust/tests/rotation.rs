//! What a renewal and a new root mean for connections: live ones go on, new ones use what is new.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::identity_server::{Federation, until};
use common::{ClientStream, Cluster, End, LIFE, ServerStream, end, handshake, trusting};
use jiff::Timestamp;
use rustls::pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tombolo_core::refusal::Refusal;
use tombolo_trust::identity::start;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::Usage;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{ClientAuth, RootInChain, ServerExpectation, client_config, server_config};

const H2: &[&[u8]] = &[b"h2"];
const WEB: &str = "ns/shop/sa/web";

async fn echo(client: &mut ClientStream, server: &mut ServerStream) {
    client.write_all(b"ping").await.unwrap();
    let mut bytes = [0; 4];
    server.read_exact(&mut bytes).await.unwrap();
    server.write_all(&bytes).await.unwrap();
    client.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"ping");
}

fn leaf_shown(stream: &ServerStream) -> Vec<u8> {
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test]
async fn a_live_connection_survives_renewals_and_new_ones_use_the_new_svid() {
    let federation = Federation::start(Duration::from_secs(3), LIFE).await;
    let state = tempfile::tempdir().unwrap();
    federation.add_join(state.path(), WEB, 1);
    let (source, trust) = start(federation.config(state.path())).unwrap();
    let ids = ServerExpectation::Ids {
        trust_domain: federation.cluster.domain(),
        ids: Arc::new([federation.cluster.id(WEB)].into()),
    };
    // Both ends are this one process; the configurations are made once and never touched again.
    let client = client_config(&source, &trust, ids, H2);
    let server = server_config(&source, &trust, ClientAuth::Trusted, H2, RootInChain::No);
    let first = tokio::time::timeout(Duration::from_secs(20), source.wait()).await.unwrap();
    let (live_client, live_server) = handshake(client.clone(), server.clone()).await;
    let (mut live_client, mut live_server) = (live_client.unwrap(), live_server.unwrap());
    assert_eq!(leaf_shown(&live_server), first.chain[0].to_vec());

    let mut before = first;
    for _ in 0..3 {
        until("a renewal", || source.current().unwrap().chain != before.chain).await;
        echo(&mut live_client, &mut live_server).await;
        let (new_client, new_server) = handshake(client.clone(), server.clone()).await;
        new_client.unwrap();
        let shown = leaf_shown(&new_server.unwrap());
        assert_ne!(shown, before.chain[0].to_vec());
        before = source.current().unwrap();
    }
}

#[tokio::test]
async fn a_second_root_is_trusted_before_it_issues() {
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let trust = trusting(&[&east, &west]);
    let server_svid = west.source(WEB);
    let server = server_config(&server_svid, &trust, ClientAuth::Trusted, H2, RootInChain::No);
    let client_svid = SvidSource::new();
    let ids = ServerExpectation::Ids { trust_domain: west.domain(), ids: Arc::new([west.id(WEB)].into()) };
    let client = client_config(&client_svid, &trust, ids, H2);
    let key = IdentityKey::generate().unwrap();
    let renew = || client_svid.set(east.ca.issue_svid(&key, &east.id(WEB), LIFE, Timestamp::now()).unwrap());
    let connect = async || {
        let (client, server) = handshake(client.clone(), server.clone()).await;
        assert_eq!(end(&client) == End::Open, end(&server) == End::Open);
        server.map(|server| (client.unwrap(), server)).map_err(|error| end::<()>(&Err(error)))
    };
    renew();
    let old_leaf = client_svid.current().unwrap().chain.clone();
    let (mut live_client, mut live_server) = connect().await.unwrap();

    let second = east.ca.add_root().unwrap();
    renew();
    assert!(connect().await.is_ok(), "the old root goes on issuing, so nobody needs the new bundle yet");

    // Activated before the bundle was distributed: refused, which is why publishing comes first.
    east.ca.activate(second).unwrap();
    renew();
    assert_eq!(connect().await.unwrap_err(), End::Refused(Refusal::BadCertificate));

    let generation = trust.snapshot().generation();
    assert_eq!(trust.replace_all(vec![east.bundle(), west.bundle()]), []);
    assert!(trust.snapshot().generation() > generation);
    assert!(connect().await.is_ok(), "SVIDs from the new root verify");
    let verdict = trust.snapshot().verify(&old_leaf, Usage::Client, UnixTime::now());
    assert_eq!(verdict, Ok(east.id(WEB)), "and those from the old one");
    echo(&mut live_client, &mut live_server).await;
}

#[tokio::test]
async fn clients_learn_of_a_new_root_with_their_next_renewal() {
    let federation = Federation::start(Duration::from_secs(2), LIFE).await;
    let state = tempfile::tempdir().unwrap();
    federation.add_join(state.path(), WEB, 1);
    let (source, trust) = start(federation.config(state.path())).unwrap();
    tokio::time::timeout(Duration::from_secs(20), source.wait()).await.unwrap();
    let second = federation.cluster.ca.add_root().unwrap();
    let domain = federation.cluster.domain();
    until("the new bundle", || trust.snapshot().bundle(&domain).unwrap().sequence() == 2).await;
    federation.cluster.ca.activate(second).unwrap();
    let before = source.current().unwrap();
    until("a renewal from the new root", || {
        let current = source.current().unwrap();
        current.chain != before.chain && trust.snapshot().verify(&current.chain, Usage::Client, UnixTime::now()).is_ok()
    })
    .await;
}
