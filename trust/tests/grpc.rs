//! gRPC over our TLS: who is at the other end, and what a bad client can't do.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::identity_server::until;
use common::{Cluster, trusting};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tombolo_api::proto::identity::identity_client::IdentityClient;
use tombolo_api::proto::identity::identity_server::{Identity, IdentityServer};
use tombolo_api::proto::identity::{IssueRequest, IssueResponse};
use tombolo_core::id::Role;
use tombolo_core::refusal::Refusal;
use tombolo_trust::grpc::{ALPN_H2, Incoming, connect, peer_id, refusal_of_status};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{ClientAuth, RootInChain, ServerExpectation, client_config, server_config};
use tonic::{Code, Request, Response, Status};

/// Answers with the identity of whoever asks.
struct WhoAmI;

#[tonic::async_trait]
impl Identity for WhoAmI {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let peer = peer_id(&request);
        let chain_der = peer.iter().flat_map(|peer| peer.chain.iter().map(|c| c.to_vec())).collect();
        let spiffe_id = peer.map(|peer| peer.id.to_string()).unwrap_or_default();
        Ok(Response::new(IssueResponse { spiffe_id, chain_der, bundle: None }))
    }
}

struct Server {
    east: Cluster,
    trust: TrustStore,
    address: String,
    refused: Arc<Mutex<Vec<Refusal>>>,
}

async fn serve() -> Server {
    let east = Cluster::new("east");
    let trust = trusting(&[&east]);
    let svid = east.source("tombolo/federation/fed-1");
    let config = server_config(&svid, &trust, ClientAuth::Optional, &[ALPN_H2], RootInChain::No);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let refused: Arc<Mutex<Vec<Refusal>>> = Arc::default();
    let count = refused.clone();
    let incoming = Incoming::new(listener, config, Arc::new(move |refusal, _| count.lock().unwrap().push(refusal)));
    let service = IdentityServer::new(WhoAmI);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    Server { east, trust, address, refused }
}

impl Server {
    async fn ask(&self, svid: &SvidSource, role: Role) -> Result<IssueResponse, Status> {
        let expectation = ServerExpectation::Role { trust_domain: self.east.domain(), role };
        let config = client_config(svid, &self.trust, expectation, &[ALPN_H2]);
        let mut client = IdentityClient::new(connect(&self.address, config).unwrap());
        Ok(client.issue(IssueRequest::default()).await?.into_inner())
    }
}

#[tokio::test]
async fn the_identity_of_the_client_is_in_the_request() {
    let server = serve().await;
    let svid = server.east.source("ns/shop/sa/web");
    let answer = server.ask(&svid, Role::Federation).await.unwrap();
    assert_eq!(answer.spiffe_id, server.east.id("ns/shop/sa/web").to_string());
    assert_eq!(answer.chain_der, [svid.current().unwrap().chain[0].to_vec()]);
    assert_eq!(server.ask(&SvidSource::new(), Role::Federation).await.unwrap().spiffe_id, "");
}

#[tokio::test]
async fn why_a_call_failed_can_be_told() {
    let server = serve().await;
    let status = server.ask(&SvidSource::new(), Role::Gateway).await.unwrap_err();
    assert_eq!((status.code(), refusal_of_status(&status)), (Code::Unavailable, Some(Refusal::WrongRole)));
    let foreign = Cluster::new("foreign").source("ns/shop/sa/web");
    assert!(server.ask(&foreign, Role::Federation).await.is_err());
    until("both are counted", || {
        let refused = server.refused.lock().unwrap();
        refused.contains(&Refusal::UnknownTrustDomain)
    })
    .await;
}

#[tokio::test]
async fn bad_clients_are_counted_and_disturb_nobody() {
    let server = serve().await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(&server.address).await.unwrap());
    }
    let mut rubbish = TcpStream::connect(&server.address).await.unwrap();
    rubbish.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = rubbish.read_to_end(&mut rest).await;
    let given_up = TcpStream::connect(&server.address).await.unwrap();
    drop(given_up);
    let svid = server.east.source("ns/shop/sa/web");
    assert!(server.ask(&svid, Role::Federation).await.is_ok());
    until("the rubbish", || server.refused.lock().unwrap().contains(&Refusal::BadClientHello)).await;
    until("the silent ones", || {
        let refused = server.refused.lock().unwrap();
        refused.iter().filter(|refusal| **refusal == Refusal::HandshakeTimeout).count() == silent.len()
    })
    .await;
}

#[tokio::test]
async fn addresses_are_checked() {
    let trust = TrustStore::new();
    let expectation = ServerExpectation::Role { trust_domain: "east".parse().unwrap(), role: Role::Federation };
    let config = client_config(&SvidSource::new(), &trust, expectation, &[ALPN_H2]);
    for (address, valid) in [
        ("127.0.0.1:15010", true),
        ("[::1]:15010", true),
        ("federation.east.example:15010", true),
        ("localhost", false),
        ("", false),
        ("a b:1", false),
        ("host:99999", false),
    ] {
        assert_eq!(connect(address, config.clone()).is_ok(), valid, "{address}");
    }
}
