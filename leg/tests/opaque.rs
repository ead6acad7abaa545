//! Opaque bytes over legs on loopback: opening, half-closes, resets, and protocols where the server speaks first.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Pair, bounded};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tombolo_core::refusal::Refusal;
use tombolo_leg::Alpn;
use tombolo_leg::opaque::{self, Copied, CopyEnd, Ended, Open, accept_open, answer, copy_both, open};

fn an_open() -> Open {
    Open {
        port: 80,
        client_address: Some("192.0.2.1:999".parse().unwrap()),
        trace: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap()),
        tracestate: None,
    }
}

/// A pair of connected sockets.
async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// client <-> near sidecar =leg= far sidecar <-> server: what the two applications hold, and how the two copies end.
struct Path {
    client: TcpStream,
    server: TcpStream,
    near: JoinHandle<Ended>,
    far: JoinHandle<Ended>,
    _pair: Pair,
}

async fn path() -> Path {
    let pair = Pair::new();
    let (mut leg, mut accepted) = pair.leg(Alpn::Tcp).await;
    let (client, mut near_app) = sockets().await;
    let (server, mut far_app) = sockets().await;
    let far = async {
        assert_eq!(accept_open(&mut accepted.stream).await.unwrap(), Some(an_open()));
        answer(&mut accepted.stream, Ok(())).await.unwrap();
    };
    let said = an_open();
    let (opened, ()) = bounded(async { tokio::join!(open(&mut leg.stream, &said), far) }).await;
    opened.unwrap();
    let near = tokio::spawn(async move {
        let ended = copy_both(&mut leg.stream, &mut near_app).await;
        match &ended.end {
            CopyEnd::Closed => {}
            CopyEnd::LegReset(_) => opaque::reset(near_app),
            CopyEnd::AppReset(_) => opaque::reset(leg.stream.into_inner().0),
        }
        ended
    });
    let far = tokio::spawn(async move {
        let ended = copy_both(&mut accepted.stream, &mut far_app).await;
        match &ended.end {
            CopyEnd::Closed => {}
            CopyEnd::LegReset(_) => opaque::reset(far_app),
            CopyEnd::AppReset(_) => opaque::reset(accepted.stream.into_inner().0),
        }
        ended
    });
    Path { client, server, near, far, _pair: pair }
}

#[tokio::test]
async fn the_server_may_speak_first() {
    let mut path = path().await;
    path.server.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    bounded(path.client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

#[tokio::test]
async fn a_half_close_leaves_the_other_direction_open() {
    let mut path = path().await;
    path.client.write_all(b"all I have").await.unwrap();
    path.client.shutdown().await.unwrap();
    let mut received = Vec::new();
    bounded(path.server.read_to_end(&mut received)).await.unwrap();
    assert_eq!(received, b"all I have");
    path.server.write_all(b"and the answer").await.unwrap();
    path.server.shutdown().await.unwrap();
    let mut answered = Vec::new();
    bounded(path.client.read_to_end(&mut answered)).await.unwrap();
    assert_eq!(answered, b"and the answer");
    let (near, far) = (bounded(path.near).await.unwrap(), bounded(path.far).await.unwrap());
    assert!(matches!((&near.end, &far.end), (CopyEnd::Closed, CopyEnd::Closed)), "{near:?} {far:?}");
    assert_eq!(near.copied, Copied { to_leg: 10, from_leg: 14 });
    assert_eq!(far.copied, Copied { to_leg: 14, from_leg: 10 });
}

#[tokio::test]
async fn a_reset_arrives_as_a_reset() {
    for from_client in [true, false] {
        let mut path = path().await;
        path.client.write_all(b"x").await.unwrap();
        bounded(path.server.read_u8()).await.unwrap();
        let mut other = if from_client {
            opaque::reset(path.client);
            path.server
        } else {
            opaque::reset(path.server);
            path.client
        };
        let read = bounded(other.read(&mut [0; 8])).await;
        assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "client: {from_client}");
        let (near, far) = (bounded(path.near).await.unwrap(), bounded(path.far).await.unwrap());
        match from_client {
            true => assert!(matches!((near.end, far.end), (CopyEnd::AppReset(_), CopyEnd::LegReset(_)))),
            false => assert!(matches!((near.end, far.end), (CopyEnd::LegReset(_), CopyEnd::AppReset(_)))),
        }
    }
}

#[tokio::test]
async fn much_arrives_as_it_left_and_a_stalled_reader_holds_its_writer() {
    let path = path().await;
    let sent: Vec<u8> = (0..32 * 1024 * 1024u32).map(|n| (n * 31 % 251) as u8).collect();
    let (mut read, mut write) = path.client.into_split();
    let bytes = sent.clone();
    let writing = tokio::spawn(async move {
        write.write_all(&bytes).await.unwrap();
        write.shutdown().await.unwrap();
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!writing.is_finished(), "32 MiB went somewhere although nobody reads");
    let (mut server_read, mut server_write) = path.server.into_split();
    let echo = tokio::spawn(async move {
        tokio::io::copy(&mut server_read, &mut server_write).await.unwrap();
        server_write.shutdown().await.unwrap();
    });
    let mut received = Vec::new();
    bounded(read.read_to_end(&mut received)).await.unwrap();
    assert!(received == sent);
    bounded(writing).await.unwrap();
    bounded(echo).await.unwrap();
}

#[tokio::test]
async fn a_refusal_carries_its_reason() {
    let pair = Pair::new();
    let (mut leg, mut accepted) = pair.leg(Alpn::Tcp).await;
    let far = async {
        accept_open(&mut accepted.stream).await.unwrap();
        answer(&mut accepted.stream, Err(Refusal::AppUnreachable)).await.unwrap();
    };
    let said = an_open();
    let (opened, ()) = bounded(async { tokio::join!(open(&mut leg.stream, &said), far) }).await;
    let error = opened.unwrap_err();
    assert_eq!((error.refusal, error.refused), (Refusal::AppUnreachable, true));
}

#[tokio::test]
async fn an_unused_leg_ends_quietly_and_a_bad_open_does_not() {
    let pair = Pair::new();
    let (leg, mut accepted) = pair.leg(Alpn::Tcp).await;
    let mut stream = leg.stream;
    stream.shutdown().await.unwrap();
    assert_eq!(bounded(accept_open(&mut accepted.stream)).await.unwrap(), None);

    for bytes in [&b"\xff\xff"[..], b"\0\x03\xff\xff\xff", b"\0\0"] {
        let (mut leg, mut accepted) = pair.leg(Alpn::Tcp).await;
        leg.stream.write_all(bytes).await.unwrap();
        let error = bounded(accept_open(&mut accepted.stream)).await.unwrap_err();
        assert_eq!((error.refusal, error.refused), (Refusal::BadHeader, false), "{bytes:?}");
    }
}

#[tokio::test]
async fn a_long_tracestate_never_makes_open_too_long() {
    let pair = Pair::new();
    let (mut leg, mut accepted) = pair.leg(Alpn::Tcp).await;
    let long = Open { tracestate: Some("x".repeat(500)), ..an_open() };
    let far = async {
        let got = accept_open(&mut accepted.stream).await.unwrap().unwrap();
        answer(&mut accepted.stream, Ok(())).await.unwrap();
        got
    };
    let (opened, got) = bounded(async { tokio::join!(open(&mut leg.stream, &long), far) }).await;
    opened.unwrap();
    assert_eq!(got, an_open());
}
