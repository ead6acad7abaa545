//! The client's end of an HTTP leg.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::task::noop_waker_ref;
use h2::Reason;
use h2::client::{ResponseFuture, SendRequest};
use http::{Method, Request, Response, StatusCode};
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{oneshot, watch};
use tombolo_core::id::SpiffeId;
use tombolo_core::refusal::Refusal;

use super::body::{Pumped, RecvBody, StreamError, pump};
use super::driver::{Driver, Heard, LegHealth, Shared};
use super::records::Records;
use super::{BULK_FROM, BoxError, FRAME_MAX, HEADERS_MAX, HttpLimits, SEND_BUFFER, expect};
use crate::dial::Leg;
use crate::status::Crossing;

/// How long an upgrade waits for the peer's settings, which say whether it can.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// A handle on a leg that carries requests. The connection closes by itself when every handle is gone and
/// the last request is done.
#[derive(Debug, Clone)]
pub struct HttpLeg {
    sender: SendRequest<Bytes>,
    shared: Arc<Shared>,
    crossing: Arc<Crossing>,
    server_id: SpiffeId,
    streams_max: usize,
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct SendError<B> {
    pub kind: SendErrorKind,
    /// The request, when nothing of it has left: it can be sent on another leg.
    pub unsent: Option<Box<Request<B>>>,
}

#[derive(Debug, thiserror::Error)]
pub enum SendErrorKind {
    /// This leg takes no requests any more.
    #[error("the leg takes no new requests")]
    Closed,
    /// The request can't be said in HTTP/2, or the far end does not know how to upgrade.
    #[error("the request can't be sent over a leg: {0}")]
    Unsendable(String),
    /// The request's own body failed.
    #[error("the request's body failed: {0}")]
    Body(BoxError),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl<B> SendError<B> {
    /// The far application can't have seen the request, so that another try is always safe.
    pub fn is_safe_to_retry(&self) -> bool {
        self.unsent.is_some()
            || matches!(self.kind, SendErrorKind::Closed | SendErrorKind::Stream(StreamError::Refused))
    }

    pub fn refusal(&self) -> Refusal {
        match &self.kind {
            SendErrorKind::Stream(StreamError::Refused) => Refusal::AppUnreachable,
            SendErrorKind::Stream(StreamError::Denied(refusal)) => *refusal,
            SendErrorKind::Unsendable(_) => Refusal::BadRequest,
            SendErrorKind::Closed | SendErrorKind::Body(_) | SendErrorKind::Stream(_) => Refusal::ConnectionLost,
        }
    }
}

impl HttpLeg {
    /// Starts HTTP/2 on a leg that was dialled with ALPN `h2`.
    pub async fn start(leg: Leg, limits: HttpLimits) -> Result<Self, StreamError> {
        let Leg { stream, server_id, crossing, rtt, .. } = leg;
        Self::over(stream, server_id, crossing, rtt, limits).await
    }

    /// The same over any stream; `rtt` is a first estimate.
    pub async fn over<T>(
        stream: T,
        server_id: SpiffeId,
        crossing: Crossing,
        rtt: Duration,
        limits: HttpLimits,
    ) -> Result<Self, StreamError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let shared = Shared::new(rtt);
        let io = Heard { io: Records::new(stream), shared: shared.clone() };
        let (sender, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(limits.stream_window)
            .initial_connection_window_size(limits.connection_window())
            .initial_max_send_streams(limits.streams as usize)
            .max_header_list_size(HEADERS_MAX)
            .max_frame_size(FRAME_MAX)
            .max_send_buffer_size(SEND_BUFFER)
            .handshake(io)
            .await?;
        tokio::spawn(Driver::new(connection, shared.clone()));
        Ok(Self { sender, shared, crossing: Arc::new(crossing), server_id, streams_max: limits.streams as usize })
    }

    /// The gateways and clusters that the leg crosses.
    pub fn crossing(&self) -> &Arc<Crossing> {
        &self.crossing
    }

    pub fn server_id(&self) -> &SpiffeId {
        &self.server_id
    }

    /// Requests whose response has not ended.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Acquire)
    }

    /// How long no request has been under way; `None` while one is.
    pub fn idle_for(&self) -> Option<Duration> {
        self.shared.idle_for()
    }

    /// Smoothed round trip of the PINGs, end to end.
    pub fn rtt(&self) -> Duration {
        self.shared.rtt()
    }

    /// Whether a new request may be put on this leg: it is live, not retired, has had no GOAWAY, has a
    /// stream left, and carries no bulk.
    pub fn is_usable(&self) -> bool {
        !self.shared.retired.load(Ordering::Acquire)
            && self.shared.bulk.load(Ordering::Acquire) == 0
            && self.in_flight() < self.streams_max.min(self.sender.current_max_send_streams())
            && self.shared.health_now() == LegHealth::Live
            && !self.has_ended()
    }

    /// The peer said GOAWAY, or the connection failed.
    fn has_ended(&self) -> bool {
        let mut sender = self.sender.clone();
        matches!(sender.poll_ready(&mut Context::from_waker(noop_waker_ref())), Poll::Ready(Err(_)))
    }

    /// Takes no new requests from now on, in any handle. What is under way finishes.
    pub fn retire(&self) {
        self.shared.retired.store(true, Ordering::Release);
    }

    /// As [`HttpLeg::retire`], and [`HttpLeg::suspect`] resolves: the far application does not answer.
    pub fn abandon(&self) {
        self.retire();
        self.shared.become_health(LegHealth::Abandoned);
    }

    /// Somebody else says that the way of this leg is broken: it is suspect until the far end answers a PING that
    /// leaves now.
    pub fn doubt(&self) {
        self.shared.doubt();
    }

    /// Closes the connection now; what is under way fails.
    pub fn abort(&self) {
        self.retire();
        self.shared.abort();
    }

    pub fn health(&self) -> LegHealth {
        self.shared.health_now()
    }

    pub fn health_changes(&self) -> watch::Receiver<LegHealth> {
        self.shared.health()
    }

    /// Resolves when the far end has answered the first PING, which shows that it is at work and not only that its
    /// kernel accepts connections; `false` when the connection ends before.
    pub async fn answers(&self) -> bool {
        let (mut settled, mut health) = (self.shared.settled(), self.shared.health());
        tokio::select! {
            settled = settled.wait_for(|settled| *settled) => settled.is_ok(),
            _ = health.wait_for(|health| *health == LegHealth::Gone) => false,
        }
    }

    /// Resolves when the leg is suspect, abandoned or gone: requests that wait on it and may be tried elsewhere
    /// should be.
    pub async fn suspect(&self) {
        let mut health = self.shared.health();
        // The sender lives as long as this handle.
        let _ = health.wait_for(|health| *health != LegHealth::Live).await;
    }

    /// Sends a request and waits for the head of its response. The body goes on streaming behind it. Dropping
    /// the future, or the response's body before its end, resets the stream.
    ///
    /// The URI must be absolute (or an authority for CONNECT), see [`super::headers`]. A request with
    /// [`h2::ext::Protocol`] in its extensions is an extended CONNECT (RFC 8441). With `Expect: 100-continue` the body is
    /// polled when the far application asks for it.
    pub async fn send<B>(&self, request: Request<B>) -> Result<Response<RecvBody>, SendError<B>>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let closed = |request| SendError { kind: SendErrorKind::Closed, unsent: Some(Box::new(request)) };
        if self.shared.retired.load(Ordering::Acquire) {
            return Err(closed(request));
        }
        if request.extensions().get::<h2::ext::Protocol>().is_some() && !self.upgrades().await {
            let kind = SendErrorKind::Unsendable("the far side does not support extended CONNECT".into());
            return Err(SendError { kind, unsent: Some(Box::new(request)) });
        }
        let guard = StreamGuard::begin(&self.shared);
        let mut sender = match self.sender.clone().ready().await {
            Ok(sender) => sender,
            Err(_) => return Err(closed(request)),
        };
        let waits = expect::is_expected(request.headers());
        let tunnels = request.method() == Method::CONNECT;
        let (parts, body) = request.into_parts();
        let no_body = body.is_end_stream() && !tunnels;
        // A broken request was not sent either, but no other leg would take it.
        let failed = |kind: SendErrorKind| SendError { kind: self.explain(kind), unsent: None };
        let (response, stream) = sender
            .send_request(Request::from_parts(parts, ()), no_body)
            .map_err(|error| failed(SendErrorKind::Unsendable(error.to_string())))?;
        drop(sender);
        if no_body {
            let response = response.await.map_err(|error| failed(StreamError::from(error).into()))?;
            return Ok(guard.wrap(response, None));
        }
        let bulk = guard.counter();
        let pumping = Box::pin(pump(Box::pin(body), stream, Reason::CANCEL, bulk));
        exchange(response, pumping, waits, guard).await.map_err(failed)
    }

    fn explain(&self, kind: SendErrorKind) -> SendErrorKind {
        match kind {
            SendErrorKind::Stream(error) => SendErrorKind::Stream(self.shared.explain(error)),
            kind => kind,
        }
    }

    async fn upgrades(&self) -> bool {
        let mut settled = self.shared.settled();
        let wait = settled.wait_for(|settled| *settled);
        let _ = tokio::time::timeout(SETTLE_MAX, wait).await;
        self.sender.is_extended_connect_protocol_enabled()
    }
}

/// Sends the body while waiting for the response's head, then leaves the rest of it to a task.
async fn exchange<P>(
    mut response: ResponseFuture,
    mut pumping: Pin<Box<P>>,
    waits: bool,
    guard: StreamGuard,
) -> Result<Response<RecvBody>, SendErrorKind>
where
    P: Future<Output = Pumped> + Send + 'static,
{
    let mut held = waits;
    let mut sending = true;
    let mut patience = pin!(tokio::time::sleep(expect::WAIT_MAX));
    let head = loop {
        tokio::select! {
            biased;
            answer = poll_fn(|cx| poll_answer(&mut response, held, cx)) => match answer {
                Answer::Asked => held = false,
                Answer::Head(head) => break head,
            },
            () = &mut patience, if held => held = false,
            pumped = &mut pumping, if sending && !held => {
                sending = false;
                if let Pumped::BodyFailed(error) = pumped {
                    return Err(SendErrorKind::Body(error));
                }
            }
        }
    };
    let head = head.map_err(StreamError::from)?;
    // A final answer other than a success, without having asked for the body, declines it.
    if held && !head.status().is_success() {
        sending = false;
    }
    if !sending {
        return Ok(guard.wrap(head, None));
    }
    let (stop, stopped) = oneshot::channel();
    tokio::spawn(async move {
        tokio::select! {
            _ = pumping => {}
            // Dropping the pump resets the stream. A response that ended in order leaves the body alone.
            _ = stopped.then(|stop| async move { if stop.is_ok() { std::future::pending().await } }) => {}
        }
    });
    Ok(guard.wrap(head, Some(stop)))
}

/// What comes back on a stream before its body.
enum Answer {
    /// 100: the far application asks for the request's body.
    Asked,
    Head(Result<Response<h2::RecvStream>, h2::Error>),
}

/// Informational responses other than 100 are passed over.
fn poll_answer(response: &mut ResponseFuture, held: bool, cx: &mut Context<'_>) -> Poll<Answer> {
    if held {
        // Polled until it is pending, so that the next one wakes this task.
        while let Poll::Ready(Some(Ok(interim))) = response.poll_informational(cx) {
            if interim.status() == StatusCode::CONTINUE {
                return Poll::Ready(Answer::Asked);
            }
        }
    }
    Pin::new(response).poll(cx).map(Answer::Head)
}

/// Counts a request for as long as its response has not ended.
#[derive(Debug)]
pub(super) struct StreamGuard {
    shared: Arc<Shared>,
    carried: u64,
    bulk: bool,
    /// Dropped without a word it stops the request's body; sent on, it lets it finish.
    stop: Option<oneshot::Sender<()>>,
}

impl StreamGuard {
    fn begin(shared: &Arc<Shared>) -> Self {
        shared.request_begins();
        Self { shared: shared.clone(), carried: 0, bulk: false, stop: None }
    }

    fn wrap(mut self, response: Response<h2::RecvStream>, stop: Option<oneshot::Sender<()>>) -> Response<RecvBody> {
        self.stop = stop;
        let (parts, stream) = response.into_parts();
        let body = RecvBody::new(stream, &parts.headers, Some(self));
        Response::from_parts(parts, body)
    }

    pub(super) fn carried(&mut self, octets: usize) {
        self.carried += octets as u64;
        if !self.bulk && self.carried > BULK_FROM {
            self.bulk = true;
            self.shared.bulk.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The response ended in order.
    pub(super) fn finish(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Counts the octets of the request's body, which may outlive the response.
    fn counter(&self) -> impl FnMut(usize) + Send + 'static {
        let mut upload = Upload { shared: self.shared.clone(), carried: 0, bulk: false };
        move |octets| upload.carried(octets)
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        if self.bulk {
            self.shared.bulk.fetch_sub(1, Ordering::AcqRel);
        }
        self.shared.request_ends();
    }
}

struct Upload {
    shared: Arc<Shared>,
    carried: u64,
    bulk: bool,
}

impl Upload {
    fn carried(&mut self, octets: usize) {
        self.carried += octets as u64;
        if !self.bulk && self.carried > BULK_FROM {
            self.bulk = true;
            self.shared.bulk.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.bulk {
            self.shared.bulk.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
