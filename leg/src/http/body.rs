//! Bodies as they come out of a stream, and the pump that puts them into one.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tombolo_core::refusal::Refusal;

use super::BoxError;
use super::client::StreamGuard;

/// How a stream ended when it did not end in order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The far application never got the request (REFUSED_STREAM, or above a GOAWAY's last stream).
    #[error("the far application never got the request")]
    Refused,
    #[error("the stream was reset by its other end: {0}")]
    Reset(Reason),
    /// The far end's TLS did not accept this end's certificate, so no request was read.
    #[error("the far end refused this identity: {0}")]
    Denied(Refusal),
    #[error("the leg was lost: {0}")]
    Lost(String),
}

impl From<h2::Error> for StreamError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(Reason::REFUSED_STREAM) if error.is_remote() => Self::Refused,
            // Only streams above the last one that the peer processes end by its graceful GOAWAY.
            Some(Reason::NO_ERROR) if error.is_go_away() && error.is_remote() => Self::Refused,
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Lost(error.to_string()),
        }
    }
}

/// A body that streams out of a leg. Octets are acknowledged to the other end as they are taken, so that
/// a reader that stops holds back the writer. Dropping it before its end resets the stream.
#[derive(Debug)]
pub struct RecvBody {
    stream: Option<RecvStream>,
    data_done: bool,
    /// From `content-length`, less what has been read.
    remaining: Option<u64>,
    guard: Option<StreamGuard>,
}

impl RecvBody {
    pub(super) fn new(stream: RecvStream, headers: &HeaderMap, guard: Option<StreamGuard>) -> Self {
        let length = headers.get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let remaining = length.and_then(|length| length.parse().ok());
        let mut body = Self { stream: Some(stream), data_done: false, remaining, guard };
        if body.is_end_stream() {
            body.finish();
        }
        body
    }

    /// A body of no octets, for tests and for requests made here.
    pub fn empty() -> Self {
        Self { stream: None, data_done: true, remaining: Some(0), guard: None }
    }

    fn finish(&mut self) {
        self.stream = None;
        if let Some(guard) = self.guard.take() {
            guard.finish();
        }
    }
}

impl Body for RecvBody {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        let this = &mut *self;
        let Some(stream) = this.stream.as_mut() else { return Poll::Ready(None) };
        while !this.data_done {
            match ready!(stream.poll_data(cx)) {
                // The end of a stream may come as a DATA frame without octets.
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    // Fails only on a stream that is gone, which the next poll says better.
                    let _ = stream.flow_control().release_capacity(data.len());
                    this.remaining = this.remaining.map(|left| left.saturating_sub(data.len() as u64));
                    if let Some(guard) = &mut this.guard {
                        guard.carried(data.len());
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(this.fail(error)))),
                None => this.data_done = true,
            }
        }
        let trailers = match this.stream.as_mut() {
            Some(stream) => ready!(stream.poll_trailers(cx)),
            None => Ok(None),
        };
        match trailers {
            Ok(Some(trailers)) => {
                this.finish();
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Ok(None) => {
                this.finish();
                Poll::Ready(None)
            }
            Err(error) => Poll::Ready(Some(Err(this.fail(error)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.as_ref().is_none_or(RecvStream::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        if self.stream.is_none() {
            return SizeHint::with_exact(0);
        }
        self.remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl RecvBody {
    fn fail(&mut self, error: h2::Error) -> StreamError {
        // Dropping the guard, without finishing it, stops a request body that is still being sent.
        self.stream = None;
        self.guard = None;
        error.into()
    }
}

/// How a pump ended.
#[derive(Debug)]
pub(super) enum Pumped {
    /// All of it is on its way.
    Done,
    /// The other end reset the stream, or the leg is gone.
    Stopped,
    /// The body itself failed; the stream was reset.
    BodyFailed(BoxError),
}

/// Sends a body, holding at most one chunk beyond what the peer's window takes. `abandon` is the reason
/// to reset with when the body itself fails, unless it failed by a reset of its own, which is passed on.
pub(super) async fn pump<B>(
    mut body: Pin<Box<B>>,
    mut send: SendStream<Bytes>,
    abandon: Reason,
    mut carried: impl FnMut(usize),
) -> Pumped
where
    B: Body<Data = Bytes> + ?Sized,
    B::Error: Into<BoxError>,
{
    loop {
        if !poll_fn(|cx| poll_room(&mut send, cx)).await {
            return Pumped::Stopped;
        }
        // While the body has nothing to send, a reset by the other end must still be seen.
        let frame = poll_fn(|cx| match body.as_mut().poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Ok(frame)),
            Poll::Pending => send.poll_reset(cx).map(Err),
        });
        let frame = match frame.await {
            Ok(frame) => frame,
            Err(_) => return Pumped::Stopped,
        };
        let sent = match frame {
            None => return finished(send.send_data(Bytes::new(), true)),
            Some(Err(error)) => {
                let error: BoxError = error.into();
                send.send_reset(reset_reason(&error).unwrap_or(abandon));
                return Pumped::BodyFailed(error);
            }
            Some(Ok(frame)) => frame,
        };
        match sent.into_data() {
            Ok(data) => {
                let end = body.is_end_stream();
                carried(data.remaining());
                if send.send_data(data, end).is_err() {
                    return Pumped::Stopped;
                }
                if end {
                    return Pumped::Done;
                }
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    send.reserve_capacity(0);
                    return finished(send.send_trailers(trailers));
                }
            }
        }
    }
}

fn finished(sent: Result<(), h2::Error>) -> Pumped {
    if sent.is_ok() { Pumped::Done } else { Pumped::Stopped }
}

/// Waits until the peer's window has room; `false` when the stream is over.
fn poll_room(send: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<bool> {
    send.reserve_capacity(1);
    while send.capacity() == 0 {
        match ready!(send.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return Poll::Ready(false),
        }
    }
    Poll::Ready(true)
}

/// The reset that a body passes on, when it failed by one.
pub(super) fn reset_reason(error: &BoxError) -> Option<Reason> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&**error);
    while let Some(error) = source {
        if let Some(StreamError::Reset(reason)) = error.downcast_ref() {
            return Some(*reason);
        }
        source = error.source();
    }
    None
}
