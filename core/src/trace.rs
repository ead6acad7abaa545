//! W3C trace context (`traceparent`, Trace Context Level 2), and the gateways that a leg crossed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{ClusterId, GatewayId};

/// The trace that a request or a leg belongs to, and the span that is the parent of what comes next.
/// `trace_id` and `span_id` are never all zero in a value that was parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    /// Bit 0: sampled. Bit 1: the trace id is random. The others are passed on as zero.
    pub flags: u8,
}

/// Why a `traceparent` was refused. Its sender's trace is then ignored and a new one may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a W3C traceparent (version-traceid-spanid-flags in lower-case hex)")]
pub struct InvalidTraceParent;

const SAMPLED: u8 = 0b01;
const KNOWN_FLAGS: u8 = 0b11;
/// `00-<32 hex>-<16 hex>-<2 hex>`.
const LENGTH: usize = 55;

impl TraceParent {
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// The same trace with another span as the parent.
    pub fn child(&self, span_id: [u8; 8]) -> Self {
        Self { span_id, ..*self }
    }

    pub fn span(&self) -> SpanLink {
        SpanLink { trace_id: self.trace_id, span_id: self.span_id }
    }
}

impl FromStr for TraceParent {
    type Err = InvalidTraceParent;

    /// A version above 00 is read by its first four fields, as the specification asks; version ff is refused.
    fn from_str(text: &str) -> Result<Self, InvalidTraceParent> {
        let bytes = text.as_bytes();
        let head = bytes.get(..LENGTH).ok_or(InvalidTraceParent)?;
        let dashes = [2, 35, 52].iter().all(|at| head[*at] == b'-');
        let [version] = hex(&head[..2])?;
        let length_ok = match version {
            0xff => false,
            0 => bytes.len() == LENGTH,
            _ => bytes.len() == LENGTH || bytes[LENGTH] == b'-',
        };
        if !dashes || !length_ok {
            return Err(InvalidTraceParent);
        }
        let [flags] = hex(&head[53..55])?;
        let parent = Self { trace_id: hex(&head[3..35])?, span_id: hex(&head[36..52])?, flags: flags & KNOWN_FLAGS };
        if parent.span().is_valid() { Ok(parent) } else { Err(InvalidTraceParent) }
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("00-")?;
        write_hex(f, &self.trace_id)?;
        f.write_str("-")?;
        write_hex(f, &self.span_id)?;
        write!(f, "-{:02x}", self.flags)
    }
}

/// A span of some trace, named so that another span can link to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SpanLink {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
}

impl SpanLink {
    /// From the octets of a wire message: `None` when they are empty, of another length or all zero,
    /// which is how a process without tracing answers.
    pub fn from_octets(trace_id: &[u8], span_id: &[u8]) -> Option<Self> {
        let link = Self { trace_id: trace_id.try_into().ok()?, span_id: span_id.try_into().ok()? };
        link.is_valid().then_some(link)
    }

    fn is_valid(&self) -> bool {
        self.trace_id != [0; 16] && self.span_id != [0; 8]
    }
}

/// A gateway that a leg crossed, as the status frame names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    pub gateway_id: GatewayId,
    pub cluster: ClusterId,
    /// That gateway's span for the leg; `None` when it is not traced.
    pub span: Option<SpanLink>,
}

fn hex<const N: usize>(text: &[u8]) -> Result<[u8; N], InvalidTraceParent> {
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Ok(bytes)
}

/// Upper-case digits are refused: the specification allows lower case only.
fn nibble(digit: u8) -> Result<u8, InvalidTraceParent> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(InvalidTraceParent),
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECIFIED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn the_specifications_example_reads_back() {
        let parent: TraceParent = SPECIFIED.parse().unwrap();
        assert_eq!(parent.trace_id[..3], [0x0a, 0xf7, 0x65]);
        assert_eq!(parent.span_id, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
        assert!(parent.is_sampled());
        assert_eq!(parent.to_string(), SPECIFIED);
        let child = parent.child([7; 8]);
        assert_eq!(child.to_string(), "00-0af7651916cd43dd8448eb211c80319c-0707070707070707-01");
    }

    #[test]
    fn malformed_and_foreign_versions() {
        let cases = [
            ("", false),
            ("00", false),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0", false),
            ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", false),
            ("00-00000000000000000000000000000000-b7ad6b7169203331-01", false),
            ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", false),
            ("00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", false),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x", false),
            ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", false),
            ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", true),
            ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-later", true),
            ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01later", false),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333\u{e9}-1", false),
        ];
        for (text, valid) in cases {
            assert_eq!(text.parse::<TraceParent>().is_ok(), valid, "{text}");
        }
        let unknown_flags: TraceParent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff".parse().unwrap();
        assert_eq!(unknown_flags.flags, 0b11);
    }

    #[test]
    fn absent_octets_are_no_link() {
        assert_eq!(SpanLink::from_octets(&[], &[]), None);
        assert_eq!(SpanLink::from_octets(&[0; 16], &[1; 8]), None);
        assert_eq!(SpanLink::from_octets(&[1; 16], &[1; 7]), None);
        assert!(SpanLink::from_octets(&[1; 16], &[1; 8]).is_some());
    }
}
