//! What a gateway reads before it has answered anything: PROXY header and ClientHello, from callers of all kinds.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tombolo_core::refusal::Refusal;
use tombolo_leg::client_hello::{LENGTH_MAX, Opening, OpeningError, ProxyPolicy, read_opening};
use tombolo_leg::proxy_header::ProxyHeader;

const NAME: &str = "80.web.shop.svc.west.clusterset.local";

fn hello(alpn: &[&[u8]]) -> Vec<u8> {
    let mut config = ClientConfig::builder_with_provider(tombolo_trust::tls::provider().clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let mut client = ClientConnection::new(Arc::new(config), ServerName::try_from(NAME).unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// Cuts the one record of a ClientHello into records of `size` octets.
fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
    let (head, body) = hello.split_at(5);
    let mut bytes = Vec::new();
    for chunk in body.chunks(size) {
        bytes.extend_from_slice(&head[..3]);
        bytes.extend_from_slice(&u16::try_from(chunk.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(chunk);
    }
    bytes
}

async fn read(bytes: &[u8], policy: ProxyPolicy) -> Result<Opening, OpeningError> {
    // Whatever comes behind the hello is not needed to read it.
    read_opening(&mut &*bytes, policy).await
}

#[tokio::test]
async fn a_hello_is_kept_as_it_came() {
    let whole = hello(&[b"h2", b"tombolo/tcp"]);
    for size in [whole.len(), 100, 17, 1] {
        let bytes = in_records(&whole, size);
        let opening = read(&bytes, ProxyPolicy::Read).await.unwrap();
        assert_eq!(opening.hello.raw, bytes, "records of {size}");
        assert_eq!(opening.hello.server_name.as_deref(), Some(NAME));
        assert_eq!(opening.hello.alpn, [&b"h2"[..], b"tombolo/tcp"]);
        assert_eq!(opening.proxy, None);
    }
}

#[tokio::test]
async fn a_hello_may_come_octet_by_octet_behind_its_header() {
    let header = ProxyHeader { status_wanted: true, tracestate: Some("a=b".into()), ..Default::default() };
    let hello = hello(&[b"h2"]);
    let sent = [header.encode(), hello.clone()].concat();
    let (mut near, mut far) = duplex(64 * 1024);
    let write = async {
        for octet in &sent {
            far.write_all(&[*octet]).await.unwrap();
            tokio::task::yield_now().await;
        }
        far
    };
    let (opening, _far) = tokio::join!(read_opening(&mut near, ProxyPolicy::Read), write);
    let opening = opening.unwrap();
    assert_eq!(opening.proxy, Some(header));
    assert_eq!(opening.hello.raw, hello);
}

#[tokio::test]
async fn what_is_no_hello_is_refused() {
    let header = ProxyHeader { status_wanted: true, ..Default::default() };
    let proxied = [header.encode(), hello(&[])].concat();
    let mut oversized = header.encode();
    oversized[14..16].copy_from_slice(&[0xff, 0xff]);
    // A handshake message that claims 60,000 octets, and goes on for ever.
    let mut endless = Vec::new();
    for record in 0..20u8 {
        endless.extend_from_slice(&[0x16, 3, 1, 0x04, 0]);
        let start: &[u8] = if record == 0 { &[1, 0, 0xea, 0x60] } else { &[0; 4] };
        endless.extend_from_slice(start);
        endless.extend_from_slice(&[0; 1020]);
    }
    assert!(endless.len() > LENGTH_MAX);
    let garbage: Vec<u8> = (0..5000u32).map(|n| (n * 31 % 251) as u8).collect();
    for (what, bytes, policy, want) in [
        ("nothing", &b""[..], ProxyPolicy::Read, Refusal::BadClientHello),
        ("http", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", ProxyPolicy::Read, Refusal::BadClientHello),
        ("garbage", &garbage, ProxyPolicy::Read, Refusal::BadClientHello),
        ("half a hello", &hello(&[])[..50], ProxyPolicy::Read, Refusal::BadClientHello),
        ("an endless hello", &endless, ProxyPolicy::Read, Refusal::BadClientHello),
        ("half a header", &header.encode()[..13], ProxyPolicy::Read, Refusal::BadClientHello),
        ("an oversized header", &oversized, ProxyPolicy::Read, Refusal::BadHeader),
        ("a header that is not allowed", &proxied, ProxyPolicy::Refuse, Refusal::BadHeader),
    ] {
        assert_eq!(read(bytes, policy).await.unwrap_err().refusal, want, "{what}");
    }
}

#[tokio::test]
async fn a_header_read_before_the_refusal_still_asks_for_the_status() {
    let header = ProxyHeader { status_wanted: true, ..Default::default() };
    let bytes = [header.encode(), b"nonsense".to_vec()].concat();
    assert_eq!(read(&bytes, ProxyPolicy::Read).await.unwrap_err().proxy, Some(header));
}

#[tokio::test]
async fn a_slow_caller_has_five_seconds() {
    let (mut near, mut far) = duplex(1024);
    far.write_all(&hello(&[])[..40]).await.unwrap();
    let began = std::time::Instant::now();
    let refused = read_opening(&mut near, ProxyPolicy::Read).await.unwrap_err();
    assert_eq!(refused.refusal, Refusal::HandshakeTimeout);
    assert_eq!(began.elapsed().as_secs(), Duration::from_secs(5).as_secs());
    drop(near);
    assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0);
}
