//! Connections to the application: pooled ones for HTTP/1.1, shared ones for HTTP/2, single ones for bytes.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tombolo_core::id::SpiffeId;
use tombolo_core::model::AppProtocol;
use tombolo_core::refusal::Refusal;
use tombolo_leg::http::upgrade::IoBody;
use tombolo_leg::http::{BoxError, HttpLeg, HttpLimits, LegHealth, RecvBody, SendErrorKind, StreamError};
use tombolo_leg::status::Crossing;

use crate::probe::Found;

/// Requests and connections of one application that are under way at once; above it callers are refused, and may go
/// elsewhere.
pub const IN_USE_MAX: usize = 4096;
/// Fields of a response's head.
pub const RESPONSE_HEADERS_MAX: usize = 256;
/// Octets of a response's head.
const RESPONSE_HEAD_MAX: usize = 64 * 1024;
/// HTTP/1.1 connections that are kept for the next request.
const IDLE_MAX: usize = 128;
/// A kept connection is not used again after this, before the application's own timeout closes it under a request.
const IDLE_FOR: Duration = Duration::from_secs(30);
/// HTTP/2 connections to one application.
const SHARED_MAX: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the application has for a probe; whoever asks may give up earlier.
const PROBE_MAX: Duration = Duration::from_secs(2);
/// What a probe has found holds this long for others who ask.
const PROBE_HOLDS: Duration = Duration::from_millis(100);
/// RFC 9110 section 9.3.7: a request about the server as a whole, which reaches no resource.
const PROBE_HTTP1: &[u8] =
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nUser-Agent: tombolo-probe\r\nConnection: close\r\n\r\n";

/// The application's side of a connection that has switched protocols.
pub type Switched = ReadHalf<TokioIo<hyper::upgrade::Upgraded>>;

/// Why the application gave no response.
#[derive(Debug)]
pub enum AppError {
    /// It never got the request.
    NeverReached(Refusal),
    /// It got it, or may have.
    Broken(BoxError),
}

/// One connection that carries bytes.
pub struct Connection {
    pub tcp: TcpStream,
    _in_use: OwnedSemaphorePermit,
}

/// The application behind one port of one service.
#[derive(Debug)]
pub struct App {
    address: String,
    protocol: AppProtocol,
    in_use: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
    shared: Mutex<Vec<HttpLeg>>,
    /// One probe at a time, however many ask.
    probed: tokio::sync::Mutex<Option<(Instant, Found)>>,
}

#[derive(Debug)]
struct Idle {
    sender: SendRequest<RecvBody>,
    since: Instant,
}

impl App {
    pub fn new(address: String, protocol: AppProtocol) -> Self {
        let in_use = Arc::new(Semaphore::new(IN_USE_MAX));
        let probed = tokio::sync::Mutex::default();
        Self { address, protocol, in_use, idle: Mutex::default(), shared: Mutex::default(), probed }
    }

    /// Whether a request is brought to it in HTTP/2. Where its protocol is not configured, it is spoken to as the
    /// caller speaks where the callers do not know it either, and in HTTP/1.1 where they know it for an HTTP port.
    pub fn speaks_http2(&self, caller_does: bool) -> bool {
        match self.protocol {
            AppProtocol::Http2 | AppProtocol::Grpc => true,
            AppProtocol::Http => false,
            AppProtocol::Tls | AppProtocol::Opaque | AppProtocol::Detect => caller_does,
        }
    }

    pub async fn connect_opaque(&self) -> Result<Connection, Refusal> {
        let in_use = self.in_use.clone().try_acquire_owned().map_err(|_| Refusal::Overloaded)?;
        Ok(Connection { tcp: self.connect().await?, _in_use: in_use })
    }

    /// Asks on a fresh connection whether it is at work: HTTP/1.1 by `OPTIONS *`, HTTP/2 by a PING. `identity` is the
    /// one that the application goes by.
    pub async fn probe(&self, identity: &SpiffeId) -> Found {
        let mut probed = self.probed.lock().await;
        if let Some((_, found)) = probed.filter(|(at, _)| at.elapsed() < PROBE_HOLDS) {
            return found;
        }
        let asked = async {
            if self.speaks_http2(false) { self.probe_http2(identity).await } else { self.probe_http1().await }
        };
        let found = timeout(PROBE_MAX, asked).await.unwrap_or(Found::Silent);
        *probed = Some((Instant::now(), found));
        found
    }

    async fn probe_http1(&self) -> Found {
        let Ok(mut tcp) = self.connect().await else { return Found::Refused };
        // Whoever closes the connection, even unasked, is at work: a stopped process does not.
        if tcp.write_all(PROBE_HTTP1).await.is_ok() {
            let _ = tcp.read_u8().await;
        }
        Found::Alive
    }

    async fn probe_http2(&self, identity: &SpiffeId) -> Found {
        let Ok(tcp) = self.connect().await else { return Found::Refused };
        let crossing = Crossing::default();
        if let Ok(fresh) = HttpLeg::over(tcp, identity.clone(), crossing, Duration::ZERO, HttpLimits::default()).await {
            fresh.answers().await;
        }
        Found::Alive
    }

    /// Sends a request in HTTP/1.1, in origin form with its `Host` set.
    pub async fn send_http1(self: &Arc<Self>, mut request: Request<RecvBody>) -> Result<Response<AppBody>, AppError> {
        let in_use = self.acquire()?;
        // A kept connection may have been closed by the application; a request that did not leave comes back.
        while let Some(mut sender) = self.take_idle() {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(self.answered(response, sender, in_use)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(AppError::Broken(error.into_error().into())),
                },
            }
        }
        let tcp = self.connect().await.map_err(AppError::NeverReached)?;
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(RESPONSE_HEADERS_MAX)
            .max_buf_size(RESPONSE_HEAD_MAX)
            .handshake(TokioIo::new(tcp))
            .await
            .map_err(|error| AppError::Broken(error.into()))?;
        tokio::spawn(connection.with_upgrades());
        match sender.try_send_request(request).await {
            Ok(response) => Ok(self.answered(response, sender, in_use)),
            Err(mut error) => match error.take_message() {
                Some(_) => Err(AppError::NeverReached(Refusal::AppUnreachable)),
                None => Err(AppError::Broken(error.into_error().into())),
            },
        }
    }

    /// Sends a request in HTTP/2, its `:authority` unaltered. `identity` is the one that the application goes by.
    pub async fn send_http2(
        &self,
        mut request: Request<RecvBody>,
        identity: &SpiffeId,
    ) -> Result<Response<AppBody>, AppError> {
        let in_use = self.acquire()?;
        for _ in 0..2 {
            let connection = self.shared_connection(identity).await?;
            let error = match connection.send(request).await {
                Ok(response) => {
                    return Ok(response.map(|body| AppBody { kind: AppBodyKind::Http2(body), _in_use: in_use }));
                }
                Err(error) => error,
            };
            match (error.kind, error.unsent) {
                (SendErrorKind::Closed, Some(unsent)) => request = *unsent,
                (SendErrorKind::Stream(StreamError::Refused), _) => {
                    return Err(AppError::NeverReached(Refusal::AppUnreachable));
                }
                (kind, _) => return Err(AppError::Broken(kind.into())),
            }
        }
        Err(AppError::NeverReached(Refusal::AppUnreachable))
    }

    fn acquire(&self) -> Result<OwnedSemaphorePermit, AppError> {
        self.in_use.clone().try_acquire_owned().map_err(|_| AppError::NeverReached(Refusal::Overloaded))
    }

    async fn connect(&self) -> Result<TcpStream, Refusal> {
        let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(self.address.as_str())).await;
        match connected {
            Ok(Ok(tcp)) => {
                // Without it the connection only is slower.
                let _ = tcp.set_nodelay(true);
                Ok(tcp)
            }
            Ok(Err(error)) => {
                tracing::debug!(app = %self.address, %error, "the application does not accept connections");
                Err(Refusal::AppUnreachable)
            }
            Err(_) => Err(Refusal::AppUnreachable),
        }
    }

    fn answered(
        self: &Arc<Self>,
        response: Response<Incoming>,
        sender: SendRequest<RecvBody>,
        in_use: OwnedSemaphorePermit,
    ) -> Response<AppBody> {
        let kept = Kept { sender: Some(sender), app: self.clone() };
        response.map(|body| {
            let mut body = AppBody { kind: AppBodyKind::Http1 { body, kept }, _in_use: in_use };
            body.keep_if_done();
            body
        })
    }

    /// The connection that was used last; one that is still busy with the end of its request stays for later.
    fn take_idle(&self) -> Option<SendRequest<RecvBody>> {
        let mut idle = self.idle();
        idle.retain(|kept| !kept.sender.is_closed() && kept.since.elapsed() < IDLE_FOR);
        let ready = idle.iter().rposition(|kept| kept.sender.is_ready())?;
        Some(idle.remove(ready).sender)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn shared_connection(&self, identity: &SpiffeId) -> Result<HttpLeg, AppError> {
        {
            let mut shared = self.shared();
            shared.retain(|connection| connection.health() != LegHealth::Gone);
            if let Some(usable) = shared.iter().find(|connection| connection.is_usable()) {
                return Ok(usable.clone());
            }
            if shared.len() >= SHARED_MAX {
                return Err(AppError::NeverReached(Refusal::Overloaded));
            }
        }
        let tcp = self.connect().await.map_err(AppError::NeverReached)?;
        let connection =
            HttpLeg::over(tcp, identity.clone(), Crossing::default(), Duration::ZERO, HttpLimits::default())
                .await
                .map_err(|_| AppError::NeverReached(Refusal::AppUnreachable))?;
        self.shared().push(connection.clone());
        Ok(connection)
    }

    fn shared(&self) -> MutexGuard<'_, Vec<HttpLeg>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An HTTP/1.1 connection that goes back into the pool when its response has ended in order.
#[derive(Debug)]
struct Kept {
    sender: Option<SendRequest<RecvBody>>,
    app: Arc<App>,
}

impl Kept {
    fn keep(&mut self) {
        let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) else { return };
        let mut idle = self.app.idle();
        if idle.len() < IDLE_MAX {
            idle.push(Idle { sender, since: Instant::now() });
        }
    }
}

/// The body of an application's response. The request counts as under way until it is dropped.
#[derive(Debug)]
pub struct AppBody {
    kind: AppBodyKind,
    _in_use: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum AppBodyKind {
    Http1 { body: Incoming, kept: Kept },
    Http2(RecvBody),
    Switched(IoBody<Switched>),
}

impl AppBody {
    /// The same request, after the application has switched protocols.
    pub fn switched(self, read: Switched) -> Self {
        Self { kind: AppBodyKind::Switched(IoBody::new(read)), _in_use: self._in_use }
    }

    fn keep_if_done(&mut self) {
        if let AppBodyKind::Http1 { body, kept } = &mut self.kind
            && body.is_end_stream()
        {
            kept.keep();
        }
    }
}

impl Body for AppBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.kind {
            AppBodyKind::Http1 { body, kept } => {
                let frame = Pin::new(&mut *body).poll_frame(cx);
                match &frame {
                    Poll::Ready(None) => kept.keep(),
                    Poll::Ready(Some(Ok(_))) if body.is_end_stream() => kept.keep(),
                    Poll::Ready(Some(_)) | Poll::Pending => {}
                }
                frame.map_err(Into::into)
            }
            AppBodyKind::Http2(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            AppBodyKind::Switched(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            AppBodyKind::Http1 { body, .. } => body.is_end_stream(),
            AppBodyKind::Http2(body) => body.is_end_stream(),
            AppBodyKind::Switched(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            AppBodyKind::Http1 { body, .. } => body.size_hint(),
            AppBodyKind::Http2(body) => body.size_hint(),
            AppBodyKind::Switched(body) => body.size_hint(),
        }
    }
}
