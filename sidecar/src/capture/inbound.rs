//! Redirected connections that arrive at this host, at any port. Inner legs are told by what their ClientHello asks
//! for and are served like those that come to the inbound port. Anything else is plaintext to the mesh, the
//! application's own TLS included: it is passed on or refused.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_leg::Alpn;
use tombolo_leg::accept::HANDSHAKE_MAX;
use tombolo_leg::client_hello::{self, FirstOctets, LENGTH_MAX};
use tombolo_runtime::drain::DrainWatch;
use tombolo_trust::handshakes::{Handshakes, Place};

use super::config::Plaintext;
use super::loops::Loops;
use super::observe::{Meters, Observed};
use super::pass::Passage;
use super::{Captured, refuse};
use crate::inbound::{HANDSHAKES_MAX, Inbound};
use crate::peek;

/// A caller that says nothing for so long may be waiting for the application to speak first, so that is dialled.
/// A sidecar sends its ClientHello as soon as it is connected.
const SILENCE: Duration = Duration::from_millis(50);

pub struct CapturedInbound {
    inbound: Arc<Inbound>,
    plaintext: Plaintext,
    loops: Loops,
    observed: Observed,
    room: Arc<Semaphore>,
    handshakes: Handshakes,
    draining: CancellationToken,
}

impl CapturedInbound {
    pub fn new(inbound: Arc<Inbound>, plaintext: Plaintext, room: usize, loops: Loops, meters: &Meters) -> Arc<Self> {
        let draining = CancellationToken::new();
        let (begun, drain) = (draining.clone(), inbound.drain.clone());
        tokio::spawn(async move {
            drain.draining().await;
            begun.cancel();
        });
        Arc::new(Self {
            inbound,
            plaintext,
            loops,
            observed: meters.of("inbound"),
            room: Arc::new(Semaphore::new(room)),
            handshakes: Handshakes::new(HANDSHAKES_MAX),
            draining,
        })
    }

    async fn leg(&self, connection: TcpStream, place: Place) {
        self.observed.mesh.inc();
        self.inbound.clone().leg(connection, place, self.draining.clone()).await;
    }

    async fn strict(&self, connection: TcpStream) {
        let mut place = self.handshakes.begin();
        let said = tokio::select! {
            said = timeout(HANDSHAKE_MAX, first_word(&connection)) => said,
            () = std::future::poll_fn(|cx| place.poll_displaced(cx)) => {
                return refuse(&self.observed, connection, Refusal::Overloaded, "too many handshakes are under way");
            }
        };
        match said {
            Ok(Ok(FirstWord::Leg)) => self.leg(connection, place).await,
            Ok(Ok(FirstWord::Plaintext)) => refuse(&self.observed, connection, Refusal::Plaintext, "no inner leg"),
            Ok(Err(error)) => refuse(&self.observed, connection, Refusal::ConnectionLost, error),
            Err(_) => refuse(&self.observed, connection, Refusal::HandshakeTimeout, "nothing was said"),
        }
    }

    async fn permissive(&self, connection: TcpStream, peer: SocketAddr, origin: SocketAddr) {
        let passage = Passage { observed: &self.observed, drain: &self.inbound.drain, loops: &self.loops };
        match timeout(SILENCE, first_word(&connection)).await {
            Ok(Ok(FirstWord::Leg)) => self.leg(connection, self.handshakes.begin()).await,
            // One that ends without a word is passed on too: a check may want to know no more than that.
            Ok(Ok(FirstWord::Plaintext) | Err(_)) => {
                tracing::debug!(caller = %peer, %origin, "plaintext passed on");
                passage.pass(connection, origin).await;
            }
            Err(_) => {
                let far = match passage.dial(origin).await {
                    Ok(far) => far,
                    Err((refusal, detail)) => return refuse(&self.observed, connection, refusal, detail),
                };
                let is_leg = tokio::select! {
                    biased;
                    _ = far.tcp.readable() => false,
                    said = first_word(&connection) => matches!(said, Ok(FirstWord::Leg)),
                    () = self.inbound.drain.stopped() => false,
                };
                if is_leg {
                    drop(far);
                    return self.leg(connection, self.handshakes.begin()).await;
                }
                tracing::debug!(caller = %peer, %origin, "plaintext passed on");
                match peek::afresh(connection) {
                    Ok(connection) => passage.carry(connection, far).await,
                    Err(error) => {
                        tracing::warn!(%error, "a captured connection was lost; is the limit of open files reached?")
                    }
                }
            }
        }
    }
}

impl Captured for CapturedInbound {
    fn observed(&self) -> &Observed {
        &self.observed
    }

    fn drain(&self) -> &DrainWatch {
        &self.inbound.drain
    }

    fn room(&self) -> &Arc<Semaphore> {
        &self.room
    }

    async fn serve(self: Arc<Self>, connection: TcpStream, peer: SocketAddr, origin: SocketAddr) {
        let _taken = match self.loops.taken(peer, origin) {
            Ok(taken) => taken,
            Err(error) => return refuse(&self.observed, connection, Refusal::CaptureLoop, error),
        };
        match self.plaintext {
            Plaintext::Strict => self.strict(connection).await,
            // Plaintext has no identity that a policy could allow.
            Plaintext::Permissive if self.inbound.is_guarded(origin.port()) => self.strict(connection).await,
            Plaintext::Permissive => self.permissive(connection, peer, origin).await,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstWord {
    Leg,
    Plaintext,
}

/// Looks at the first octets, without taking them, until they say what the connection is.
async fn first_word(connection: &TcpStream) -> io::Result<FirstWord> {
    let judged = peek::judged(connection, LENGTH_MAX, |octets| match client_hello::judge(octets) {
        FirstOctets::Hello { server_name, alpn } => Some(judge(server_name.as_deref(), &alpn)),
        FirstOctets::Other => Some(FirstWord::Plaintext),
        FirstOctets::Incomplete => None,
    });
    Ok(judged.await?.unwrap_or(FirstWord::Plaintext))
}

fn judge(server_name: Option<&str>, alpn: &[Vec<u8>]) -> FirstWord {
    let is_target = server_name.is_some_and(|name| name.parse::<LegTarget>().is_ok());
    let is_ours = alpn.iter().any(|protocol| Alpn::from_bytes(protocol).is_some());
    if is_target && is_ours { FirstWord::Leg } else { FirstWord::Plaintext }
}
