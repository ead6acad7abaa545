//! gRPC over our TLS, in both directions. tonic itself terminates nothing: identities are verified here.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rand::seq::SliceRandom;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_stream::Stream;
use tombolo_core::id::SpiffeId;
use tombolo_core::refusal::Refusal;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::handshakes::{Displaced, Handshakes, Place};
use crate::tls::{identity_of, refusal_of};

/// ALPN of gRPC.
pub const ALPN_H2: &[u8] = b"h2";

/// Addresses that are tried for one connection.
const ADDRESSES_MAX: usize = 32;
/// How long one address may say nothing before the next one is tried beside it.
const NEXT_AFTER: Duration = Duration::from_millis(300);
/// How long a TCP connection and its handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes under way at once at one listener; above it, the oldest makes room.
const HANDSHAKES_MAX: usize = 512;
/// Connections without an identity at one listener; above it, the oldest makes room. They only ask for an SVID.
const ANONYMOUS_MAX: usize = 512;
const ANONYMOUS_LIFE: Duration = Duration::from_secs(60);
/// Connections open at once at one listener; above it, new ones are refused as [`Refusal::Overloaded`].
const CONNECTIONS_MAX: usize = 8_192;
/// Connections that wait for tonic to take them.
const ACCEPTED_MAX: usize = 16;
/// After this long without a word, the other side is asked whether it lives.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after `accept` failed, which it does when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not host:port")]
pub struct InvalidAddress(pub String);

/// A channel to `address`, which connects when it is first used and again whenever the connection is lost. Several
/// addresses (`host:port`, with commas), and several that a name resolves to, are tried until one answers. The
/// configuration should offer [`ALPN_H2`].
pub fn connect(address: &str, config: Arc<ClientConfig>) -> Result<Channel, InvalidAddress> {
    let invalid = || InvalidAddress(address.chars().take(300).collect());
    let targets = address.split(',').map(|one| Target::new(one.trim()).ok_or_else(invalid));
    let targets: Arc<[Target]> = targets.collect::<Result<Vec<_>, _>>()?.into();
    // The scheme keeps tonic from bringing TLS of its own.
    let uri: Uri = format!("http://{}", targets[0].authority).parse().map_err(|_| invalid())?;
    let connector = TlsConnector::from(config);
    let dial = tower::service_fn(move |_: Uri| {
        let (targets, connector) = (targets.clone(), connector.clone());
        async move { dial(&targets, &connector).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from(uri)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_with_connector_lazy(dial))
}

/// One `host:port`.
struct Target {
    authority: String,
    host: String,
    port: u16,
    name: ServerName<'static>,
}

impl Target {
    fn new(address: &str) -> Option<Self> {
        let uri: Uri = format!("http://{address}").parse().ok()?;
        let host = uri.host()?.trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host.clone()).ok()?;
        Some(Self { authority: address.to_owned(), host, port: uri.port_u16()?, name })
    }
}

async fn dial(targets: &[Target], connector: &TlsConnector) -> io::Result<client::TlsStream<TcpStream>> {
    match timeout(HANDSHAKE_TIMEOUT, dial_any(targets, connector)).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the connection was not established in time")),
    }
}

/// Tries all addresses in random order, the next one when one has failed or has said nothing for a moment: a replica
/// that was stopped still accepts connections, and one whose machine is gone refuses none.
async fn dial_any(targets: &[Target], connector: &TlsConnector) -> io::Result<client::TlsStream<TcpStream>> {
    let (mut addresses, mut failure) = (Vec::new(), None);
    for target in targets {
        match tokio::net::lookup_host((target.host.as_str(), target.port)).await {
            Ok(found) => addresses.extend(found.map(|address| (address, target.name.clone()))),
            Err(error) => failure = Some(error),
        }
    }
    addresses.shuffle(&mut rand::rng());
    addresses.truncate(ADDRESSES_MAX);
    let mut left = addresses.into_iter();
    let mut attempts = JoinSet::new();
    loop {
        match left.next() {
            Some((address, name)) => _ = attempts.spawn(attempt(address, name, connector.clone())),
            None if attempts.is_empty() => break,
            None => {}
        }
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended.map_err(io::Error::other).flatten() {
                Ok(stream) => return Ok(stream),
                // One that was reached and refused says more than one that was not reached.
                Err(error) if failure.as_ref().is_none_or(|known| refusal_of(known).is_none()) => failure = Some(error),
                Err(_) => {}
            },
            () = tokio::time::sleep(NEXT_AFTER), if left.len() > 0 => {}
        }
    }
    Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

async fn attempt(
    address: SocketAddr,
    name: ServerName<'static>,
    connector: TlsConnector,
) -> io::Result<client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    connector.connect(name, stream).await
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct PeerId {
    pub id: SpiffeId,
    /// As the peer sent it, leaf first.
    pub chain: Arc<[CertificateDer<'static>]>,
}

/// What tonic puts into the extensions of each request.
#[derive(Debug, Clone)]
pub struct Peer {
    /// `None` when the client sent no certificate, which only `ClientAuth::Optional` lets through.
    pub id: Option<PeerId>,
    pub address: SocketAddr,
}

/// The identity that the handshake of this request's connection verified.
pub fn peer_id<T>(request: &tonic::Request<T>) -> Option<PeerId> {
    request.extensions().get::<Peer>()?.id.clone()
}

/// Why this side refused the server's certificate, if that is what made the call fail.
pub fn refusal_of_status(status: &tonic::Status) -> Option<Refusal> {
    causes(status).find_map(|cause| refusal_of(cause.downcast_ref::<io::Error>()?))
}

/// The innermost cause of a call that failed before it was answered; tonic itself only says that it did.
pub fn cause_of_status(status: &tonic::Status) -> String {
    causes(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

fn causes(status: &tonic::Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |cause| cause.source())
}

/// Called with each connection that was refused, so that the role can count it.
pub type OnRefused = Arc<dyn Fn(Refusal, SocketAddr) + Send + Sync>;

/// Connections whose handshake is done, for `serve_with_incoming`. It ends only when it is dropped; a failed
/// handshake is reported to `on_refused` and never ends it.
#[derive(Debug)]
pub struct Incoming {
    accepted: mpsc::Receiver<Connection>,
}

impl Incoming {
    /// Accepts on `listener`. Needs a runtime, on which the handshakes run.
    pub fn new(listener: TcpListener, config: Arc<ServerConfig>, on_refused: OnRefused) -> Self {
        let (ready, accepted) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(accept_all(listener, TlsAcceptor::from(config), ready, on_refused));
        Self { accepted }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.accepted.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

async fn accept_all(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<Connection>,
    on_refused: OnRefused,
) {
    let (handshakes, anonymous) = (Handshakes::new(HANDSHAKES_MAX), Handshakes::new(ANONYMOUS_MAX));
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let (stream, address) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = ready.closed() => return,
        };
        let Ok(open) = connections.clone().try_acquire_owned() else {
            on_refused(Refusal::Overloaded, address);
            continue;
        };
        let (acceptor, ready, on_refused) = (acceptor.clone(), ready.clone(), on_refused.clone());
        let (place, anonymous) = (handshakes.begin(), anonymous.clone());
        tokio::spawn(async move {
            let handshake = timeout(HANDSHAKE_TIMEOUT, handshake(stream, address, acceptor, open, &anonymous));
            let result = match place.run(handshake).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(Some(Refusal::HandshakeTimeout)),
                Err(Displaced) => Err(Some(Refusal::Overloaded)),
            };
            match result {
                Ok(connection) => {
                    // Fails only when the server has stopped.
                    let _ = ready.send(connection).await;
                }
                Err(Some(refusal)) => on_refused(refusal, address),
                Err(None) => {}
            }
        });
    }
}

/// An error without a refusal is a connection that its client gave up.
async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    open: OwnedSemaphorePermit,
    anonymous: &Handshakes,
) -> Result<Connection, Option<Refusal>> {
    stream.set_nodelay(true).map_err(|_| None)?;
    let stream = acceptor.accept(stream).await.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => Some(refusal_of(&error).unwrap_or(Refusal::BadClientHello)),
        _ => None,
    })?;
    let id = match stream.get_ref().1.peer_certificates() {
        Some(chain) => Some(PeerId { id: identity_of(chain).map_err(Some)?, chain: chain.to_vec().into() }),
        None => None,
    };
    let anonymous = id
        .is_none()
        .then(|| Anonymous { place: anonymous.begin(), ends: Box::pin(tokio::time::sleep(ANONYMOUS_LIFE)) });
    Ok(Connection { stream, peer: Peer { id, address }, anonymous, _open: open })
}

/// One accepted connection.
#[derive(Debug)]
pub struct Connection {
    stream: server::TlsStream<TcpStream>,
    peer: Peer,
    anonymous: Option<Anonymous>,
    /// Counts this connection as open.
    _open: OwnedSemaphorePermit,
}

/// What a connection has whose client has proved nothing: a place that it can lose, and little time.
#[derive(Debug)]
struct Anonymous {
    place: Place,
    ends: Pin<Box<Sleep>>,
}

impl Anonymous {
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.place.poll_displaced(cx).is_ready() { Poll::Ready(()) } else { self.ends.as_mut().poll(cx) }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(anonymous) = &mut self.anonymous
            && anonymous.poll_ended(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
