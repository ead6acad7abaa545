//! A request's body, kept up to a limit while it passes, so that a second try can begin it anew.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tombolo_core::retry::{BodyState, REPLAY_MAX};
use tombolo_leg::http::BoxError;

/// The body of one request, over all its tries.
pub enum RequestBody<B = Incoming> {
    /// Nothing to send, and nothing to keep.
    Empty,
    Kept(Arc<Mutex<Tape<B>>>),
}

/// What was read of a body so far, and where the rest comes from.
pub struct Tape<B> {
    source: B,
    kept: VecDeque<Bytes>,
    kept_octets: usize,
    /// More was read than is kept.
    spent: bool,
    ended: bool,
    trailers: Option<http::HeaderMap>,
    /// The try that may read on; an older one that still runs must not steal octets.
    attempt: u32,
}

impl<B: Body<Data = Bytes> + Unpin> RequestBody<B> {
    pub fn new(source: B) -> Self {
        if source.is_end_stream() {
            return Self::Empty;
        }
        let (kept, kept_octets, attempt) = (VecDeque::new(), 0, 0);
        let tape = Tape { source, kept, kept_octets, spent: false, ended: false, trailers: None, attempt };
        Self::Kept(Arc::new(Mutex::new(tape)))
    }

    pub fn state(&self) -> BodyState {
        match self {
            Self::Empty => BodyState::Replayable,
            Self::Kept(tape) if lock(tape).spent => BodyState::Spent,
            Self::Kept(_) => BodyState::Replayable,
        }
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// All of it, where it was read to its end and is still kept; without its trailers.
    pub fn whole(&self) -> Option<Bytes> {
        let Self::Kept(tape) = self else { return Some(Bytes::new()) };
        let tape = lock(tape);
        let whole = !tape.spent && (tape.ended || tape.source.is_end_stream());
        whole.then(|| tape.kept.iter().map(Bytes::as_ref).collect::<Vec<&[u8]>>().concat().into())
    }

    /// The body for the next try, from its beginning. The one of the try before ends.
    pub fn attempt(&self) -> Replay<B> {
        match self {
            Self::Empty => Replay { tape: None, attempt: 0, at: 0, done: true },
            Self::Kept(tape) => {
                let mut locked = lock(tape);
                locked.attempt += 1;
                Replay { attempt: locked.attempt, tape: Some(tape.clone()), at: 0, done: false }
            }
        }
    }
}

fn lock<B>(tape: &Mutex<Tape<B>>) -> std::sync::MutexGuard<'_, Tape<B>> {
    tape.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body of one try.
pub struct Replay<B = Incoming> {
    tape: Option<Arc<Mutex<Tape<B>>>>,
    attempt: u32,
    at: usize,
    done: bool,
}

/// The body now belongs to a later try.
#[derive(Debug, thiserror::Error)]
#[error("the request is tried elsewhere")]
struct Superseded;

impl<B> Body for Replay<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let Some(tape) = this.tape.as_ref().filter(|_| !this.done) else { return Poll::Ready(None) };
        let mut tape = lock(tape);
        if tape.attempt != this.attempt {
            return Poll::Ready(Some(Err(Superseded.into())));
        }
        if let Some(chunk) = tape.kept.get(this.at) {
            this.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        if tape.ended {
            this.done = true;
            return Poll::Ready(tape.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        match ready!(Pin::new(&mut tape.source).poll_frame(cx)) {
            None => {
                (tape.ended, this.done) = (true, true);
                Poll::Ready(None)
            }
            Some(Err(error)) => Poll::Ready(Some(Err(error.into()))),
            Some(Ok(frame)) => {
                if tape.keep(&frame) {
                    this.at += 1;
                }
                this.done = frame.is_trailers();
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let Some(tape) = self.tape.as_ref().filter(|_| !self.done) else { return true };
        let tape = lock(tape);
        let nothing_kept = self.at == tape.kept.len() && tape.trailers.is_none();
        nothing_kept && (tape.ended || tape.source.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let Some(tape) = self.tape.as_ref().filter(|_| !self.done) else { return SizeHint::with_exact(0) };
        let tape = lock(tape);
        let kept: usize = tape.kept.iter().skip(self.at).map(Bytes::len).sum();
        let rest = tape.source.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + kept as u64);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + kept as u64);
        }
        hint
    }
}

impl<B> Tape<B> {
    /// Keeps a frame for a later try, unless there is too much already. Tells whether it takes a place
    /// among the kept chunks.
    fn keep(&mut self, frame: &Frame<Bytes>) -> bool {
        if let Some(trailers) = frame.trailers_ref() {
            (self.ended, self.trailers) = (true, Some(trailers.clone()));
            return false;
        }
        let Some(data) = frame.data_ref() else { return false };
        if self.spent || self.kept_octets + data.len() > REPLAY_MAX {
            self.spent = true;
            // Every chunk has been passed on by the only try that may read.
            self.kept = VecDeque::new();
            self.kept_octets = 0;
            return false;
        }
        self.kept_octets += data.len();
        self.kept.push_back(data.clone());
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use http_body_util::{BodyExt, StreamBody};
    use std::convert::Infallible;

    type Chunks = StreamBody<futures::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

    fn body(chunks: &[&'static [u8]], trailers: bool) -> Chunks {
        let mut frames: Vec<_> = chunks.iter().map(|chunk| Ok(Frame::data(Bytes::from_static(chunk)))).collect();
        if trailers {
            let mut map = http::HeaderMap::new();
            map.insert("grpc-status", http::HeaderValue::from_static("0"));
            frames.push(Ok(Frame::trailers(map)));
        }
        StreamBody::new(futures::stream::iter(frames))
    }

    async fn read(replay: Replay<Chunks>) -> (Bytes, bool) {
        let collected = replay.collect().await.unwrap();
        let trailers = collected.trailers().is_some();
        (collected.to_bytes(), trailers)
    }

    #[tokio::test]
    async fn a_small_body_begins_anew_for_each_try() {
        let body = RequestBody::new(body(&[b"ab", b"c"], true));
        let mut first = body.attempt();
        assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert_eq!((body.state(), body.whole()), (BodyState::Replayable, None));
        assert_eq!(read(body.attempt()).await, (Bytes::from_static(b"abc"), true));
        assert!(first.frame().await.unwrap().is_err(), "the first try may not read on");
        assert_eq!(body.whole(), Some(Bytes::from_static(b"abc")));
        assert_eq!(read(body.attempt()).await, (Bytes::from_static(b"abc"), true));
    }

    #[tokio::test]
    async fn a_large_body_passes_once() {
        static CHUNK: [u8; 40_000] = [7; 40_000];
        let body = RequestBody::new(body(&[&CHUNK, &CHUNK, &CHUNK], false));
        let mut replay = body.attempt();
        replay.frame().await.unwrap().unwrap();
        assert_eq!(body.state(), BodyState::Replayable);
        let mut octets = 40_000;
        while let Some(frame) = replay.frame().await {
            octets += frame.unwrap().into_data().unwrap().len();
        }
        assert_eq!((octets, body.state(), body.whole()), (120_000, BodyState::Spent, None));
    }

    #[tokio::test]
    async fn an_absent_body_is_replayable() {
        let body = RequestBody::new(http_body_util::Empty::<Bytes>::new());
        assert!(matches!(body, RequestBody::Empty));
        assert!(body.attempt().is_end_stream());
    }
}
