//! The bodies of requests and responses as they pass through here.

use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::ReadHalf;
use tokio::sync::oneshot;
use tombolo_core::retry::BodyState;
use tombolo_leg::http::upgrade::IoBody;
use tombolo_leg::http::{BoxError, RecvBody, StreamError};
use tombolo_runtime::telemetry::Span;

use super::replay::{Replay, RequestBody};
use super::target::Flight;

/// What comes from the application after it has switched protocols.
pub type UpgradedRead = ReadHalf<TokioIo<Upgraded>>;

/// Where the body of each try comes from.
pub enum BodySource {
    Request(RequestBody),
    /// The bytes of an upgraded connection, which begin only after the answer.
    Upgrade(Mutex<Option<oneshot::Sender<UpgradedRead>>>),
}

/// The body of one try.
pub enum TryBody {
    Request(Replay),
    Upgrade(IoBody<UpgradedRead>),
}

impl BodySource {
    pub fn upgrade() -> Self {
        Self::Upgrade(Mutex::new(None))
    }

    pub fn state(&self) -> BodyState {
        match self {
            Self::Request(body) => body.state(),
            Self::Upgrade(_) => BodyState::Replayable,
        }
    }

    /// Whether there is nothing to send, now or later.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Request(body) => body.is_empty(),
            Self::Upgrade(_) => false,
        }
    }

    /// All of it, where it was read to its end and is still kept.
    pub fn whole(&self) -> Option<Bytes> {
        match self {
            Self::Request(body) => body.whole(),
            Self::Upgrade(_) => None,
        }
    }

    pub fn attempt(&self) -> TryBody {
        match self {
            Self::Request(body) => TryBody::Request(body.attempt()),
            Self::Upgrade(slot) => {
                let (body, sender) = IoBody::pending();
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
                TryBody::Upgrade(body)
            }
        }
    }

    /// Takes what hands the upgraded connection to the try that succeeded.
    pub fn into_upgrade(self) -> Option<oneshot::Sender<UpgradedRead>> {
        match self {
            Self::Request(_) => None,
            Self::Upgrade(slot) => slot.into_inner().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl Body for TryBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Request(body) => Pin::new(body).poll_frame(cx),
            Self::Upgrade(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Request(body) => body.is_end_stream(),
            Self::Upgrade(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Request(body) => body.size_hint(),
            Self::Upgrade(_) => SizeHint::default(),
        }
    }
}

/// The body of a response to the application.
pub enum ResponseBody {
    /// Streams out of a leg. The try counts as load, and its span lasts, until it is done.
    Leg { body: RecvBody, under_way: Option<(Flight, Span)> },
    /// Made here.
    Own(Full<Bytes>),
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        match self.get_mut() {
            Self::Leg { body, under_way } => {
                let frame = Pin::new(&mut *body).poll_frame(cx);
                match &frame {
                    Poll::Ready(Some(Err(error))) => {
                        if let Some((_, span)) = under_way {
                            span.error(error);
                        }
                        *under_way = None;
                    }
                    Poll::Ready(None) => *under_way = None,
                    Poll::Ready(Some(Ok(_))) | Poll::Pending => {}
                }
                frame
            }
            Self::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Leg { body, .. } => body.is_end_stream(),
            Self::Own(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Leg { body, .. } => body.size_hint(),
            Self::Own(body) => body.size_hint(),
        }
    }
}
