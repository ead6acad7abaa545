//! Real handshakes over loopback: each expectation of a server against each demand on a client, and what
//! either side sees of a refusal.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Cluster, End, end, handshake, trusting};
use tombolo_core::id::Role;
use tombolo_trust::tls::{ClientAuth, RootInChain, ServerExpectation, client_config, server_config};

const H2: &[&[u8]] = &[b"h2"];

#[tokio::test]
async fn two_clusters_meet() {
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let trust = trusting(&[&east, &west]);
    let ids = ServerExpectation::Ids { trust_domain: west.domain(), ids: Arc::new([west.id("ns/shop/sa/web")].into()) };
    let client = client_config(&east.source("ns/shop/sa/front"), &trust, ids, H2);
    let server = server_config(&west.source("ns/shop/sa/web"), &trust, ClientAuth::Trusted, H2, RootInChain::No);
    let (client, server) = handshake(client, server).await;
    assert_eq!((end(&client), end(&server)), (End::Open, End::Open));
    let role = ServerExpectation::Role { trust_domain: west.domain(), role: Role::Gateway };
    let client = client_config(&east.source("ns/shop/sa/front"), &trust, role, H2);
    let server = server_config(&west.source("ns/shop/sa/web"), &trust, ClientAuth::Trusted, H2, RootInChain::No);
    let (client, server) = handshake(client, server).await;
    println!("{client:?} {server:?}");
}
