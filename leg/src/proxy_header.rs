//! The PROXY protocol v2 header (HAProxy's `proxy-protocol.txt`) that a sidecar may put before a leg on
//! its way to a gateway. Its TLVs carry the trace context and ask for the status frame. It is never
//! used for authorization or limits: whoever can connect can write one.
//!
//! TLV types are of the range for custom use (0xE0 to 0xEF, section 2.2.7):
//! `0xE5` status wanted (empty), `0xE6` traceparent, `0xE7` tracestate.

use std::net::SocketAddr;

use ppp::v2::{Addresses, Builder, Command, Header, PROTOCOL_PREFIX, ParseError, Protocol, Version};
use tombolo_core::trace::TraceParent;

const TLV_STATUS_WANTED: u8 = 0xe5;
const TLV_TRACEPARENT: u8 = 0xe6;
const TLV_TRACESTATE: u8 = 0xe7;

/// Largest header that is read, all TLVs included.
pub const LENGTH_MAX: usize = 2048;
/// Largest `tracestate` that is carried (W3C Trace Context section 3.3.1.5 asks for 512 at least).
pub const TRACESTATE_MAX: usize = 512;

/// What is said in front of a leg.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProxyHeader {
    /// Source and destination of the connection that the sender took over, for logs.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    /// The gateway answers with one status frame before the leg's first byte.
    pub status_wanted: bool,
    pub trace: Option<TraceParent>,
    pub tracestate: Option<String>,
}

/// Why a header was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyHeaderError {
    #[error("not a PROXY protocol v2 header")]
    Malformed,
    #[error("a PROXY header of {0} octets is above the limit of {LENGTH_MAX}")]
    TooLong(usize),
}

/// Whether `bytes` can be, or begin, a PROXY v2 header. A TLS ClientHello never does (it starts with 0x16).
pub fn is_prefix(bytes: &[u8]) -> bool {
    let length = bytes.len().min(PROTOCOL_PREFIX.len());
    bytes[..length] == PROTOCOL_PREFIX[..length]
}

impl ProxyHeader {
    pub fn encode(&self) -> Vec<u8> {
        // ppp finds TLVs only behind addresses, so there always are some, if only unspecified ones.
        let unspecified = || (SocketAddr::from(([0, 0, 0, 0], 0)), SocketAddr::from(([0, 0, 0, 0], 0)));
        let addresses = match self.addresses {
            Some((source, destination)) if source.is_ipv4() == destination.is_ipv4() => (source, destination),
            _ => unspecified(),
        };
        let mut builder = Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses);
        let bounded = "every TLV here is bounded";
        if self.status_wanted {
            builder = builder.write_tlv(TLV_STATUS_WANTED, &[]).expect(bounded);
        }
        if let Some(trace) = &self.trace {
            builder = builder.write_tlv(TLV_TRACEPARENT, trace.to_string().as_bytes()).expect(bounded);
        }
        if let Some(state) = self.tracestate.as_deref().filter(|state| state.len() <= TRACESTATE_MAX) {
            builder = builder.write_tlv(TLV_TRACESTATE, state.as_bytes()).expect(bounded);
        }
        builder.build().expect(bounded)
    }

    /// Reads a header from the front of `buffer`: the header and how many octets it took, or `None` while
    /// octets are missing. TLVs that are not known here are skipped.
    pub fn decode(buffer: &[u8]) -> Result<Option<(Self, usize)>, ProxyHeaderError> {
        if !is_prefix(buffer) {
            return Err(ProxyHeaderError::Malformed);
        }
        if let Some(length) = announced_length(buffer).filter(|length| *length > LENGTH_MAX) {
            return Err(ProxyHeaderError::TooLong(length));
        }
        let header = match Header::try_from(buffer) {
            Ok(header) => header,
            Err(ParseError::Incomplete(_) | ParseError::Partial(..)) => return Ok(None),
            Err(_) => return Err(ProxyHeaderError::Malformed),
        };
        let mut read = Self { addresses: socket_addresses(&header), ..Self::default() };
        for tlv in header.tlvs() {
            let tlv = tlv.map_err(|_| ProxyHeaderError::Malformed)?;
            let text = || std::str::from_utf8(&tlv.value).ok();
            match tlv.kind {
                TLV_STATUS_WANTED => read.status_wanted = true,
                // A broken trace context costs the trace, never the request.
                TLV_TRACEPARENT => read.trace = text().and_then(|text| text.parse().ok()),
                TLV_TRACESTATE => {
                    read.tracestate = text().filter(|text| text.len() <= TRACESTATE_MAX).map(str::to_owned);
                }
                _ => {}
            }
        }
        Ok(Some((read, header.len())))
    }
}

fn announced_length(buffer: &[u8]) -> Option<usize> {
    let at = PROTOCOL_PREFIX.len() + 2;
    let length = buffer.get(at..at + 2)?;
    Some(at + 2 + usize::from(u16::from_be_bytes([length[0], length[1]])))
}

fn socket_addresses(header: &Header<'_>) -> Option<(SocketAddr, SocketAddr)> {
    // LOCAL means that the sender speaks for itself; its addresses are to be ignored (section 2.2).
    if header.command == Command::Local {
        return None;
    }
    let (source, destination) = match header.addresses {
        Addresses::IPv4(v4) => (
            SocketAddr::from((v4.source_address, v4.source_port)),
            SocketAddr::from((v4.destination_address, v4.destination_port)),
        ),
        Addresses::IPv6(v6) => (
            SocketAddr::from((v6.source_address, v6.source_port)),
            SocketAddr::from((v6.destination_address, v6.destination_port)),
        ),
        Addresses::Unspecified | Addresses::Unix(_) => return None,
    };
    (!source.ip().is_unspecified()).then_some((source, destination))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn full() -> ProxyHeader {
        ProxyHeader {
            addresses: Some(("192.0.2.1:9".parse().unwrap(), "192.0.2.2:80".parse().unwrap())),
            status_wanted: true,
            trace: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap()),
            tracestate: Some("a=b".into()),
        }
    }

    #[test]
    fn a_header_reads_back_at_any_cut() {
        for header in [full(), ProxyHeader::default(), ProxyHeader { status_wanted: true, ..Default::default() }] {
            let mut bytes = header.encode();
            let whole = bytes.len();
            bytes.extend_from_slice(&[0x16, 3, 1]);
            for cut in 0..whole {
                assert!(is_prefix(&bytes[..cut]));
                assert_eq!(ProxyHeader::decode(&bytes[..cut]), Ok(None), "{cut}");
            }
            assert_eq!(ProxyHeader::decode(&bytes), Ok(Some((header, whole))));
        }
    }

    #[test]
    fn bad_headers_are_refused() {
        let mut long = full().encode();
        long[14..16].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(ProxyHeader::decode(&long), Err(ProxyHeaderError::TooLong(65_551)));
        let mut bytes = full().encode();
        // A TLV that claims more than there is.
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&[TLV_TRACESTATE, 0xff, 0xff, 0]);
        assert_eq!(ProxyHeader::decode(&bytes), Err(ProxyHeaderError::Malformed));
        assert_eq!(ProxyHeader::decode(b"GET / HTTP/1.1\r\n"), Err(ProxyHeaderError::Malformed));
        assert!(!is_prefix(&[0x16]));
    }

    #[test]
    fn a_broken_trace_is_dropped_and_nothing_else() {
        let bytes = Builder::with_addresses(
            Version::Two | Command::Proxy,
            Protocol::Stream,
            (SocketAddr::from(([0, 0, 0, 0], 0)), SocketAddr::from(([0, 0, 0, 0], 0))),
        )
        .write_tlv(TLV_TRACEPARENT, b"nonsense")
        .and_then(|builder| builder.write_tlv(0xef, b"of a newer release"))
        .and_then(|builder| builder.write_tlv(TLV_STATUS_WANTED, &[]))
        .and_then(Builder::build)
        .unwrap();
        let (header, _) = ProxyHeader::decode(&bytes).unwrap().unwrap();
        assert_eq!(header, ProxyHeader { status_wanted: true, ..Default::default() });
    }
}
