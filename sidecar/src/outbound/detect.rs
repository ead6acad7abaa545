//! What a connection to one port speaks, where nobody has said it, and to which service it goes. Decided in
//! `tombolo_core::detect`; here its first octets are looked at.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tombolo_core::detect::{self, FirstWord, Hello, OCTETS_MAX};
use tombolo_core::model::AppProtocol;
use tombolo_core::refusal::Refusal;
use tombolo_leg::client_hello::{FirstOctets, judge};

use super::refuse::Refused;
use super::route::Route;
use super::{Outbound, name};
use crate::peek;

/// How a connection is carried.
pub enum Carried {
    Http1,
    Http2,
    /// As bytes, to a port of this service.
    Bytes(Arc<Route>),
    /// The same, with octets that were seen in vain, see [`peek::afresh`].
    Unclear(Arc<Route>),
}

/// Looks at the first octets of a connection to `route`.
///
/// # Errors
/// When its ClientHello names a service of which nothing can be learnt now.
pub async fn detect(outbound: &Outbound, connection: &TcpStream, route: Arc<Route>) -> Result<Carried, Refused> {
    let word = first_word(connection, outbound.detection_timeout).await;
    outbound.observed.detected(word.as_ref());
    match (word, route.app()) {
        (Some(FirstWord::Tls { server_name }), _) => {
            Ok(Carried::Bytes(by_server_name(outbound, route, server_name.as_deref()).await?))
        }
        (Some(FirstWord::Http1), AppProtocol::Detect) => Ok(Carried::Http1),
        (Some(FirstWord::Http2), AppProtocol::Detect) => Ok(Carried::Http2),
        (None, _) => Ok(Carried::Unclear(route)),
        (Some(_), _) => Ok(Carried::Bytes(route)),
    }
}

/// `None` when nothing that tells anything came in time. A connection that ends or breaks says the same: carrying it
/// shows the application what became of it.
async fn first_word(connection: &TcpStream, within: Duration) -> Option<FirstWord> {
    let judged = peek::judged(connection, OCTETS_MAX, |octets| detect::judge(octets, hello));
    tokio::time::timeout(within, judged).await.ok()?.ok().flatten()
}

fn hello(octets: &[u8]) -> Hello {
    match judge(octets) {
        FirstOctets::Hello { server_name, .. } => Hello::Whole { server_name },
        FirstOctets::Incomplete => Hello::Partial,
        FirstOctets::Other => Hello::NotOne,
    }
}

/// The service that a ClientHello names, at the same port; the one that the connection was going to when the name is
/// none of the clusterset, or nobody exports it with this port.
async fn by_server_name(outbound: &Outbound, route: Arc<Route>, name: Option<&str>) -> Result<Arc<Route>, Refused> {
    let Some(Ok((service, port))) = name.map(|name| name::parse(name, route.port)) else { return Ok(route) };
    if service == route.service {
        return Ok(route);
    }
    match outbound.services.route(&service, port).await {
        Ok(named) => Ok(named),
        Err(Refused { refusal: Refusal::UnknownService | Refusal::UnknownPort, .. }) => Ok(route),
        Err(refused) => Err(refused),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;

    /// A ClientHello as rustls writes it, in records of at most `fragment` octets.
    fn client_hello(name: &str, fragment: usize) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
        let mut octets = Vec::new();
        client.write_tls(&mut octets).unwrap();
        let handshake = &octets[5..];
        let record = |part: &[u8]| [&octets[..3], &u16::try_from(part.len()).unwrap().to_be_bytes(), part].concat();
        handshake.chunks(fragment).flat_map(record).collect()
    }

    #[test]
    fn a_client_hello_tells_its_name_however_it_is_cut() {
        let name = "db.data.svc.clusterset.local";
        let whole = Some(FirstWord::Tls { server_name: Some(name.to_owned()) });
        for fragment in [16 * 1024, 500, 64, 7] {
            let octets = client_hello(name, fragment);
            assert_eq!(detect::judge(&octets, hello), whole, "{fragment}");
            for length in 1..octets.len() {
                assert_eq!(detect::judge(&octets[..length], hello), None, "{length} octets in records of {fragment}");
            }
            assert_eq!(detect::judge(&[&octets[..], b"early data"].concat(), hello), whole);
        }
    }

    #[test]
    fn what_only_begins_like_a_client_hello_is_opaque() {
        let octets = client_hello("db.data.svc.clusterset.local", 16 * 1024);
        for (at, octet) in [(1, 9), (5, 2), (6, 0xff)] {
            let mut wrong = octets.clone();
            wrong[at] = octet;
            assert_eq!(detect::judge(&wrong, hello), Some(FirstWord::Opaque), "octet {at} is {octet}");
        }
    }
}
