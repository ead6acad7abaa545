//! The server's end of an HTTP leg.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use http_body::Body;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tombolo_core::refusal::Refusal;

use super::body::{Pumped, RecvBody, pump, reset_reason};
use super::expect::ContinueSignal;
use super::records::Records;
use super::{BoxError, FRAME_MAX, HEADERS_MAX, HttpLimits, SEND_BUFFER, expect};
use crate::accept::{AcceptedLeg, LegIdentity};

/// How long a client has for its HTTP/2 preface.
const PREFACE_MAX: Duration = Duration::from_secs(10);

/// How a leg is served, and how it is told to end.
#[derive(Debug, Clone, Default)]
pub struct Serve {
    pub limits: HttpLimits,
    /// GOAWAY; requests under way finish.
    pub drain: CancellationToken,
    /// Closes at once.
    pub abort: CancellationToken,
}

/// A request that gets no response.
#[derive(Debug, thiserror::Error)]
pub enum Abandon {
    /// The application never got it: reset with REFUSED_STREAM, so that its client may always try again.
    #[error("{0}")]
    NeverReachedApp(Refusal),
    /// The application got it and failed in the middle. A reset that the error carries is passed on.
    #[error("{0}")]
    Broken(BoxError),
}

/// Why a leg ended other than in order.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("no HTTP/2 preface within {PREFACE_MAX:?}")]
    PrefaceTimeout,
    #[error(transparent)]
    Connection(#[from] h2::Error),
}

/// Serves a leg until it ends. Each request comes with its leg's [`Arc<LegIdentity>`] in its extensions, and a
/// [`ContinueSignal`] if its client waits for one. Each is served in a task of its own; when its client goes
/// away its future is dropped.
pub async fn serve<S, F, B>(leg: AcceptedLeg, options: Serve, service: S) -> Result<(), ServeError>
where
    S: Fn(Request<RecvBody>) -> F,
    F: Future<Output = Result<Response<B>, Abandon>> + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let AcceptedLeg { stream, identity, .. } = leg;
    let handshake = h2::server::Builder::new()
        .initial_window_size(options.limits.stream_window)
        .initial_connection_window_size(options.limits.connection_window())
        .max_concurrent_streams(options.limits.streams)
        .max_header_list_size(HEADERS_MAX)
        .max_frame_size(FRAME_MAX)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_connect_protocol()
        .handshake::<_, Bytes>(Records::new(stream));
    let mut connection = timeout(PREFACE_MAX, handshake).await.map_err(|_| ServeError::PrefaceTimeout)??;
    // Pinned once: to make them anew for each request would register with both tokens each time.
    let (mut drain, mut abort) = (pin!(options.drain.cancelled()), pin!(options.abort.cancelled()));
    let mut draining = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                None => return Ok(()),
                Some(accepted) => {
                    let (request, respond) = accepted?;
                    let (request, continues) = prepare(request, &identity);
                    tokio::spawn(answer(service(request), respond, continues));
                }
            },
            () = &mut drain, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut abort => {
                connection.abrupt_shutdown(Reason::NO_ERROR);
                // Flushes the GOAWAY if the socket takes it; the connection ends either way.
                let _ = timeout(Duration::from_secs(1), poll_fn(|cx| connection.poll_closed(cx))).await;
                return Ok(());
            }
        }
    }
}

fn prepare(request: Request<h2::RecvStream>, identity: &Arc<LegIdentity>) -> (Request<RecvBody>, Option<Arc<Notify>>) {
    let (mut parts, stream) = request.into_parts();
    parts.extensions.insert(identity.clone());
    let continues = expect::is_expected(&parts.headers).then(|| {
        let notify = Arc::new(Notify::new());
        parts.extensions.insert(ContinueSignal(notify.clone()));
        notify
    });
    let body = RecvBody::new(stream, &parts.headers, None);
    (Request::from_parts(parts, body), continues)
}

async fn answer<F, B>(serving: F, mut respond: SendResponse<Bytes>, continues: Option<Arc<Notify>>)
where
    F: Future<Output = Result<Response<B>, Abandon>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let mut serving = pin!(serving);
    let mut asked = false;
    let outcome = loop {
        tokio::select! {
            biased;
            outcome = &mut serving => break outcome,
            // The client has gone; dropping the service's future tells the application.
            _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
            () = notified(continues.as_deref()), if !asked => {
                asked = true;
                let mut head = Response::new(());
                *head.status_mut() = StatusCode::CONTINUE;
                // Fails only on a stream that is gone.
                let _ = respond.send_informational(head);
            }
        }
    };
    let response = match outcome {
        Ok(response) => response,
        Err(Abandon::NeverReachedApp(_)) => return respond.send_reset(Reason::REFUSED_STREAM),
        Err(Abandon::Broken(error)) => {
            return respond.send_reset(reset_reason(&error).unwrap_or(Reason::INTERNAL_ERROR));
        }
    };
    let (parts, body) = response.into_parts();
    let no_body = body.is_end_stream();
    let Ok(stream) = respond.send_response(Response::from_parts(parts, ()), no_body) else { return };
    if no_body {
        return;
    }
    match pump(Box::pin(body), stream, Reason::INTERNAL_ERROR, |_| ()).await {
        Pumped::Done | Pumped::Stopped => {}
        Pumped::BodyFailed(error) => tracing::debug!(error = %error, "a response's body failed"),
    }
}

async fn notified(notify: Option<&Notify>) {
    match notify {
        Some(notify) => notify.notified().await,
        None => std::future::pending().await,
    }
}
