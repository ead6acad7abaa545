//! Legs over loopback with real SVIDs: what stands, and what is refused with which reason.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::{CLIENT, Cluster, Pair, SERVER, bounded};
use jiff::{Timestamp, ToSpan};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tombolo_core::refusal::Refusal;
use tombolo_core::trace::{Hop, SpanLink};
use tombolo_leg::Alpn;
use tombolo_leg::client_hello::{ProxyPolicy, read_opening};
use tombolo_leg::dial::{Dialer, LegError, LegRequest, Stage, Via};
use tombolo_leg::status::{self, Crossing, LegRefused, Status};

#[tokio::test]
async fn both_ends_know_each_other() {
    let pair = Pair::new();
    for alpn in Alpn::ALL {
        let (mut leg, mut accepted) = pair.leg(alpn).await;
        assert_eq!(leg.server_id, pair.west.id(SERVER));
        assert_eq!(leg.crossing, Crossing::default());
        let identity = accepted.identity.clone();
        assert_eq!(identity.client_id, pair.east.id(CLIENT));
        assert_eq!(identity.client_cluster.as_str(), "east");
        assert_eq!(identity.target.to_string(), "80.web.shop.svc.west.clusterset.local");
        assert_eq!(identity.alpn, alpn);
        leg.stream.write_all(b"ping").await.unwrap();
        let mut bytes = [0; 4];
        bounded(accepted.stream.read_exact(&mut bytes)).await.unwrap();
    }
}

#[tokio::test]
async fn only_the_named_servers_are_spoken_to() {
    let mut pair = Pair::new();
    pair.acceptor = tombolo_leg::accept::Acceptor::new(&pair.west.svid("ns/shop/sa/other"), &pair.server_trust);
    let (dialled, _) = pair.try_leg(Alpn::H2).await;
    let refused = dialled.unwrap_err();
    assert_eq!((refused.refusal, refused.stage), (Refusal::IdentityDenied, Stage::Handshake));
}

#[tokio::test]
async fn an_identity_that_no_longer_holds_is_refused() {
    let pair = Pair::new();
    pair.client_trust.set_revoked([pair.west.id(SERVER)].into());
    assert_eq!(pair.try_leg(Alpn::H2).await.0.unwrap_err().refusal, Refusal::Revoked);

    let pair = Pair::new();
    pair.client_trust.replace_all(vec![pair.east.bundle()]);
    assert_eq!(pair.try_leg(Alpn::H2).await.0.unwrap_err().refusal, Refusal::UnknownTrustDomain);

    // A client is judged by the server, which says so behind the client's handshake.
    let pair = Pair::new();
    pair.server_trust.set_revoked([pair.east.id(CLIENT)].into());
    assert_eq!(pair.try_leg(Alpn::H2).await.1.unwrap_err().refusal, Refusal::Revoked);

    let mut pair = Pair::new();
    let past = Timestamp::now() - 2.hours();
    let expired = pair.east.svid_at(CLIENT, Duration::from_secs(60), past);
    pair.dialer = Dialer::new(expired, pair.client_trust.clone());
    assert_eq!(pair.try_leg(Alpn::H2).await.1.unwrap_err().refusal, Refusal::Expired);

    let mut pair = Pair::new();
    let foreign = Cluster::new("north");
    pair.dialer = Dialer::new(foreign.svid(CLIENT), pair.client_trust.clone());
    assert_eq!(pair.try_leg(Alpn::H2).await.1.unwrap_err().refusal, Refusal::UnknownTrustDomain);

    let mut pair = Pair::new();
    pair.dialer = Dialer::new(tombolo_trust::svid::SvidSource::new(), pair.client_trust.clone());
    let request = pair.request("127.0.0.1:1".parse().unwrap(), Alpn::H2);
    assert_eq!(pair.dialer.dial(request).await.unwrap_err().refusal, Refusal::NoCertificate);
}

#[tokio::test]
async fn a_leg_ends_when_its_far_end_is_no_longer_trusted() {
    let pair = Pair::new();
    let (leg, accepted) = pair.leg(Alpn::Tcp).await;
    let (client, server) = (leg.credentials, accepted.credentials);
    assert_eq!((client.check(&pair.client_trust), server.check(&pair.server_trust)), (Ok(()), Ok(())));
    let trust = pair.server_trust.clone();
    let waiting = tokio::spawn(async move { server.refused(&trust).await });
    pair.server_trust.set_revoked([pair.east.id("ns/shop/sa/somebody")].into());
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    pair.server_trust.set_revoked([pair.east.id(CLIENT)].into());
    assert_eq!(bounded(waiting).await.unwrap(), Refusal::Revoked);
    pair.client_trust.replace_all(vec![pair.east.bundle()]);
    assert_eq!(client.check(&pair.client_trust), Err(Refusal::UnknownTrustDomain));
}

#[tokio::test]
async fn callers_that_speak_no_tombolo_are_refused() {
    let pair = Pair::new();
    for (bytes, want) in
        [(&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], Refusal::BadClientHello), (b"", Refusal::ConnectionLost)]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut caller = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        caller.write_all(bytes).await.unwrap();
        caller.shutdown().await.unwrap();
        let refused = bounded(pair.acceptor.accept(listener.accept().await.unwrap().0)).await.unwrap_err();
        assert_eq!(refused.refusal, want, "{refused}");
    }
}

#[tokio::test]
async fn nobody_there() {
    let pair = Pair::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Accepts, and never answers.
    let mut request = pair.request(address, Alpn::H2);
    request.deadline = Duration::from_millis(100);
    let refused = pair.dialer.dial(request).await.unwrap_err();
    assert_eq!((refused.refusal, refused.stage), (Refusal::Timeout, Stage::Handshake));
    drop(listener);
    let refused = pair.dialer.dial(pair.request(address, Alpn::H2)).await.unwrap_err();
    assert_eq!((refused.refusal, refused.stage), (Refusal::EndpointUnreachable, Stage::Connect));
}

/// A gateway that answers `status` and, when that is an acceptance, carries the bytes to the acceptor.
async fn through_gateway(pair: &Pair, answer: Option<Status>, change: impl FnOnce(&mut LegRequest)) -> Outcome {
    let gateway = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = gateway.local_addr().unwrap();
    let mut request = pair.request(address, Alpn::H2);
    request.via = Via::Gateway { address: address.to_string() };
    change(&mut request);
    let to = server.local_addr().unwrap();
    let carry = tokio::spawn(async move {
        let (mut near, _) = gateway.accept().await.unwrap();
        let opening = read_opening(&mut near, ProxyPolicy::Read).await.unwrap();
        let proxy = opening.proxy.clone();
        let Some(status) = answer else { return proxy };
        status::write(&mut near, &status).await.unwrap();
        if status.is_ok() {
            let mut far = TcpStream::connect(to).await.unwrap();
            far.write_all(&opening.hello.raw).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        }
        proxy
    });
    let acceptor = pair.acceptor.clone();
    let accept = tokio::spawn(async move { acceptor.accept(server.accept().await.unwrap().0).await });
    let leg = bounded(pair.dialer.dial(request)).await;
    if leg.is_ok() {
        bounded(accept).await.unwrap().unwrap();
    }
    let leg = leg.map(|leg| leg.crossing);
    Outcome { leg, proxy: bounded(carry).await.unwrap() }
}

struct Outcome {
    leg: Result<Crossing, LegError>,
    proxy: Option<tombolo_leg::proxy_header::ProxyHeader>,
}

#[tokio::test]
async fn a_gateway_that_accepts_names_the_way() {
    let pair = Pair::new();
    let hop = Hop {
        gateway_id: "gw-1".parse().unwrap(),
        cluster: "east".parse().unwrap(),
        span: Some(SpanLink { trace_id: [1; 16], span_id: [2; 8] }),
    };
    let crossing = Crossing { hops: vec![hop], path: vec!["east".parse().unwrap(), "west".parse().unwrap()] };
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap();
    let outcome = through_gateway(&pair, Some(Ok(crossing.clone())), |request| {
        request.trace = Some(trace);
        request.tracestate = Some("vendor=1".into());
    })
    .await;
    assert_eq!(outcome.leg.unwrap(), crossing);
    let proxy = outcome.proxy.unwrap();
    assert!(proxy.status_wanted);
    assert_eq!((proxy.trace, proxy.tracestate.as_deref()), (Some(trace), Some("vendor=1")));
    assert!(proxy.addresses.is_some());
}

#[tokio::test]
async fn a_gateway_that_refuses_says_why() {
    let pair = Pair::new();
    let refused = LegRefused {
        refusal: Refusal::NoTunnel,
        detail: "west".into(),
        retry_after: Some(Duration::from_millis(300)),
        gateway_id: Some("gw-1".parse().unwrap()),
    };
    let error = through_gateway(&pair, Some(Err(refused)), |_| ()).await.leg.unwrap_err();
    assert_eq!((error.refusal, error.stage), (Refusal::NoTunnel, Stage::Gateway));
    assert_eq!(error.retry_after, Some(Duration::from_millis(300)));
    assert!(error.detail.contains("gw-1"), "{error}");
}

#[tokio::test]
async fn a_gateway_that_hangs_up_is_told_apart() {
    let pair = Pair::new();
    let error = through_gateway(&pair, None, |_| ()).await.leg.unwrap_err();
    assert_eq!((error.refusal, error.stage), (Refusal::ConnectionLost, Stage::Gateway));
}

#[tokio::test]
async fn the_server_behind_a_gateway_is_verified_end_to_end() {
    let pair = Pair::new();
    let ids = Arc::new(BTreeSet::from([pair.west.id("ns/shop/sa/another")]));
    let error = through_gateway(&pair, Some(Ok(Crossing::default())), |request| request.server_ids = ids).await;
    let error = error.leg.unwrap_err();
    assert_eq!((error.refusal, error.stage), (Refusal::IdentityDenied, Stage::Handshake));
}
