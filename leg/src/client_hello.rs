//! Reads what a caller sends before anybody has answered: perhaps a PROXY v2 header, then a TLS
//! ClientHello. Nothing is terminated; the octets are kept so that they can be carried on as they came.

use std::time::Duration;

use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};
use tombolo_core::refusal::Refusal;

use crate::proxy_header::{self, ProxyHeader};

/// Largest ClientHello, record headers included. It may span several records (RFC 8446 section 5.1).
pub const LENGTH_MAX: usize = 16 * 1024;
/// How long a caller has for its header and ClientHello.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// Protocols of the ALPN extension that are looked at; a caller may offer more.
const ALPN_MAX: usize = 16;

/// A ClientHello, and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// Every octet read behind the PROXY header, to be carried on first.
    pub raw: Vec<u8>,
    /// The SNI host name as it was written.
    pub server_name: Option<String>,
    pub alpn: Vec<Vec<u8>>,
}

/// What a caller said before anybody answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    pub proxy: Option<ProxyHeader>,
    pub hello: ClientHello,
}

/// Why an opening was refused. `proxy` is what had been read of it, so that an asked-for status
/// frame can still carry the reason.
#[derive(Debug, thiserror::Error)]
#[error("{refusal}: {detail}")]
pub struct OpeningError {
    pub refusal: Refusal,
    pub detail: String,
    pub proxy: Option<ProxyHeader>,
}

/// Whether a PROXY header in front of the ClientHello is read or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyPolicy {
    Read,
    Refuse,
}

/// Reads an opening within [`DEADLINE`].
///
/// # Errors
/// `HandshakeTimeout` at the deadline, `BadHeader` for a PROXY header that is malformed, oversized or not
/// allowed, `BadClientHello` for anything else, an end of the stream included.
pub async fn read_opening(io: &mut (impl AsyncRead + Unpin), policy: ProxyPolicy) -> Result<Opening, OpeningError> {
    let deadline = Instant::now() + DEADLINE;
    let mut reader = Reader { buffer: Vec::with_capacity(2048), proxy: None };
    match timeout_at(deadline, reader.read(io, policy)).await {
        Ok(Ok(hello)) => Ok(Opening { proxy: reader.proxy, hello }),
        Ok(Err((refusal, detail))) => Err(OpeningError { refusal, detail, proxy: reader.proxy }),
        Err(_) => Err(OpeningError {
            refusal: Refusal::HandshakeTimeout,
            detail: format!("no whole ClientHello within {DEADLINE:?}"),
            proxy: reader.proxy,
        }),
    }
}

/// What the first octets of a connection are, when they are only looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstOctets {
    /// A whole ClientHello; its octets stay where they are.
    Hello { server_name: Option<String>, alpn: Vec<Vec<u8>> },
    /// The beginning of one.
    Incomplete,
    /// Something else, or a ClientHello of more than [`LENGTH_MAX`] octets.
    Other,
}

/// Judges octets that were peeked at; none at all are the beginning of anything.
pub fn judge(octets: &[u8]) -> FirstOctets {
    let mut acceptor = Acceptor::default();
    let mut offered = 0;
    while offered < octets.len() {
        let Ok(taken) = acceptor.read_tls(&mut &octets[offered..]) else { return FirstOctets::Other };
        offered += taken;
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let alpn = hello.alpn().into_iter().flatten().take(ALPN_MAX).map(<[u8]>::to_vec).collect();
                return FirstOctets::Hello { server_name: hello.server_name().map(str::to_owned), alpn };
            }
            Ok(None) => {}
            Err(_) => return FirstOctets::Other,
        }
    }
    if octets.len() >= LENGTH_MAX { FirstOctets::Other } else { FirstOctets::Incomplete }
}

struct Reader {
    buffer: Vec<u8>,
    proxy: Option<ProxyHeader>,
}

impl Reader {
    async fn read(
        &mut self,
        io: &mut (impl AsyncRead + Unpin),
        policy: ProxyPolicy,
    ) -> Result<ClientHello, (Refusal, String)> {
        self.read_proxy(io, policy).await?;
        let mut acceptor = Acceptor::default();
        let mut offered = 0;
        loop {
            // rustls takes at most 4 KiB a call.
            while offered < self.buffer.len() {
                let taken = acceptor.read_tls(&mut &self.buffer[offered..]).map_err(|error| refused(&error))?;
                offered += taken;
                match acceptor.accept() {
                    Ok(Some(accepted)) => return Ok(self.hello(&accepted.client_hello())),
                    Ok(None) => {}
                    Err((error, _)) => return Err(refused(&error)),
                }
            }
            if self.buffer.len() >= LENGTH_MAX {
                return Err(refused(&format!("no whole ClientHello in {LENGTH_MAX} octets")));
            }
            self.fill(io, LENGTH_MAX).await?;
        }
    }

    async fn read_proxy(
        &mut self,
        io: &mut (impl AsyncRead + Unpin),
        policy: ProxyPolicy,
    ) -> Result<(), (Refusal, String)> {
        loop {
            self.fill(io, LENGTH_MAX).await?;
            if !proxy_header::is_prefix(&self.buffer) {
                return Ok(());
            }
            if policy == ProxyPolicy::Refuse {
                return Err((Refusal::BadHeader, "a PROXY header from a source that may send none".into()));
            }
            match ProxyHeader::decode(&self.buffer).map_err(|error| (Refusal::BadHeader, error.to_string()))? {
                Some((header, length)) => {
                    self.buffer.drain(..length);
                    self.proxy = Some(header);
                    return Ok(());
                }
                None => continue,
            }
        }
    }

    async fn fill(&mut self, io: &mut (impl AsyncRead + Unpin), length_max: usize) -> Result<(), (Refusal, String)> {
        let room = length_max.saturating_sub(self.buffer.len());
        let count = (&mut *io).take(room as u64).read_buf(&mut self.buffer).await.map_err(|error| refused(&error))?;
        if count == 0 { Err(refused(&"the caller closed before its ClientHello was whole")) } else { Ok(()) }
    }

    fn hello(&mut self, hello: &rustls::server::ClientHello<'_>) -> ClientHello {
        ClientHello {
            raw: std::mem::take(&mut self.buffer),
            server_name: hello.server_name().map(str::to_owned),
            alpn: hello.alpn().into_iter().flatten().take(ALPN_MAX).map(<[u8]>::to_vec).collect(),
        }
    }
}

fn refused(reason: &impl ToString) -> (Refusal, String) {
    (Refusal::BadClientHello, reason.to_string())
}
