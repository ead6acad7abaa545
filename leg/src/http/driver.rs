//! The task that owns a client's HTTP/2 connection, and what it knows of its liveness.
//!
//! While a request waits and nothing has arrived for [`PING_AFTER`], a PING goes out. When that is unanswered for
//! [`ANSWER_WITHIN`] and nothing at all has arrived for [`SUSPECT_AFTER`], and both for three round trips, the leg is
//! suspect: requests that may be tried elsewhere should be. Anything that arrives makes it live again; silent for [`DEAD_AFTER`] it is closed.
//! A leg without requests has no timer and sends nothing.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::task::AtomicWaker;
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use tombolo_core::refusal::Refusal;
use tombolo_trust::tls::refused_by_peer;

use super::body::StreamError;

/// Silence after which a leg with a waiting request is probed.
pub const PING_AFTER: Duration = Duration::from_millis(150);
/// Least time that a probe may go unanswered before the leg is suspect.
pub const ANSWER_WITHIN: Duration = Duration::from_millis(250);
/// Least silence before the leg is suspect, as of a tunnel.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(400);
/// Silence after which a suspect leg is closed.
pub const DEAD_AFTER: Duration = Duration::from_secs(60);
/// A timer that fires this much late says that this process was held up, not the far end.
const LATE: Duration = Duration::from_millis(200);
/// Reads of what had arrived before a write failed.
const LAST_READS_MAX: usize = 64;

/// Whether the far end of a leg answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegHealth {
    Live,
    /// A probe has gone unanswered for too long while a request waits.
    Suspect,
    /// Its user has given the far application up: it takes no new requests, and those that wait should leave.
    Abandoned,
    /// The connection has ended.
    Gone,
}

/// What the handles and the driver of one leg share.
#[derive(Debug)]
pub(super) struct Shared {
    base: Instant,
    /// Milliseconds since `base` of the last octets that arrived, and of the moment when requests began to wait.
    heard_ms: AtomicU64,
    active_ms: AtomicU64,
    pub(super) in_flight: AtomicUsize,
    pub(super) bulk: AtomicUsize,
    pub(super) retired: AtomicBool,
    aborted: AtomicBool,
    /// Somebody else says that the way is broken, and the driver has not taken it in yet.
    doubted: AtomicBool,
    /// The driver has no timer and must be woken when a request begins to wait.
    parked: AtomicBool,
    waker: AtomicWaker,
    health: watch::Sender<LegHealth>,
    /// The first PING was answered: the peer's settings are known.
    settled: watch::Sender<bool>,
    rtt_us: AtomicU64,
    /// Why the far end's TLS refused this one; it says so only behind the handshake.
    denied: OnceLock<Refusal>,
}

impl Shared {
    pub(super) fn new(rtt: Duration) -> Arc<Self> {
        Arc::new(Self {
            base: Instant::now(),
            heard_ms: AtomicU64::new(0),
            active_ms: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            bulk: AtomicUsize::new(0),
            retired: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            doubted: AtomicBool::new(false),
            parked: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            health: watch::Sender::new(LegHealth::Live),
            settled: watch::Sender::new(false),
            rtt_us: AtomicU64::new(micros(rtt)),
            denied: OnceLock::new(),
        })
    }

    pub(super) fn health(&self) -> watch::Receiver<LegHealth> {
        self.health.subscribe()
    }

    pub(super) fn health_now(&self) -> LegHealth {
        *self.health.borrow()
    }

    pub(super) fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    pub(super) fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    /// The reason that the far end's TLS gave, if that is how the leg was lost.
    pub(super) fn explain(&self, error: StreamError) -> StreamError {
        match (error, self.denied.get()) {
            (StreamError::Lost(_), Some(refusal)) => StreamError::Denied(*refusal),
            (error, _) => error,
        }
    }

    pub(super) fn request_begins(&self) {
        if self.in_flight.fetch_add(1, Ordering::AcqRel) == 0 {
            self.active_ms.store(self.now_ms(), Ordering::Relaxed);
        }
        if self.parked.swap(false, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    pub(super) fn request_ends(&self) {
        if self.in_flight.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.active_ms.store(self.now_ms(), Ordering::Relaxed);
        }
    }

    /// How long no request has been under way; `None` while one is.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        (self.in_flight.load(Ordering::Acquire) == 0)
            .then(|| Duration::from_millis(self.now_ms().saturating_sub(self.active_ms.load(Ordering::Relaxed))))
    }

    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(super) fn doubt(&self) {
        self.doubted.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn now_ms(&self) -> u64 {
        self.base.elapsed().as_millis().try_into().unwrap_or(u64::MAX)
    }

    fn heard(&self) {
        self.heard_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn heard_at(&self) -> Instant {
        self.base + Duration::from_millis(self.heard_ms.load(Ordering::Relaxed))
    }

    /// Since when something could have arrived and has not.
    fn quiet_since(&self) -> Instant {
        self.heard_at().max(self.base + Duration::from_millis(self.active_ms.load(Ordering::Relaxed)))
    }

    pub(super) fn become_health(&self, health: LegHealth) {
        self.health.send_if_modified(|now| {
            let changed = match *now {
                LegHealth::Live | LegHealth::Suspect => *now != health,
                LegHealth::Abandoned => health == LegHealth::Gone,
                LegHealth::Gone => false,
            };
            if changed {
                *now = health;
            }
            changed
        });
    }
}

/// When a leg is suspect that has been silent since `quiet_since`, with a probe under way since `sent`.
fn suspect_at(quiet_since: Instant, sent: Instant, rtt: Duration) -> Instant {
    (quiet_since + SUSPECT_AFTER.max(rtt * 3)).max(sent + ANSWER_WITHIN.max(rtt * 3))
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

/// Notes when octets arrive.
pub(super) struct Heard<T> {
    pub(super) io: T,
    pub(super) shared: Arc<Shared>,
}

impl<T: AsyncRead + Unpin> Heard<T> {
    /// A far end that refuses this one says why and closes, and a write may find out before the next read
    /// does: what it said is still there.
    fn hear_why(&mut self, cx: &mut Context<'_>) {
        let mut octets = [0; 1024];
        for _ in 0..LAST_READS_MAX {
            let mut buf = ReadBuf::new(&mut octets);
            match Pin::new(&mut *self).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {}
                _ => return,
            }
        }
    }

    fn after_write<V>(&mut self, cx: &mut Context<'_>, written: std::io::Result<V>) -> Poll<std::io::Result<V>> {
        if written.is_err() {
            self.hear_why(cx);
        }
        Poll::Ready(written)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Heard<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        if buf.filled().len() > before {
            self.shared.heard();
        }
        if let Some(refusal) = read.as_ref().err().and_then(refused_by_peer) {
            // Only the first is kept: it is the cause of what follows.
            let _ = self.shared.denied.set(refusal);
        }
        Poll::Ready(read)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Heard<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        self.after_write(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs));
        self.after_write(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.io).poll_flush(cx));
        self.after_write(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Resolves when the connection has ended.
pub(super) struct Driver<T> {
    connection: h2::client::Connection<Heard<T>, Bytes>,
    ping: PingPong,
    sent: Option<Instant>,
    /// The PING under way was held up: its answer says how long the stall was, not how long the path is.
    stalled: bool,
    /// The one before was held up. If this one is too, the path has become long.
    measuring_again: bool,
    /// Only the answer to a PING ends the suspicion: what was under way before the way broke still arrives.
    doubtful: bool,
    timer: Pin<Box<Sleep>>,
    armed: bool,
    shared: Arc<Shared>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    pub(super) fn new(mut connection: h2::client::Connection<Heard<T>, Bytes>, shared: Arc<Shared>) -> Self {
        let ping = connection.ping_pong().expect("taken once, here");
        let timer = Box::pin(tokio::time::sleep(PING_AFTER));
        let mut driver = Self {
            connection,
            ping,
            sent: None,
            stalled: false,
            measuring_again: false,
            doubtful: false,
            timer,
            armed: false,
            shared,
        };
        // The answer to the first PING comes behind the peer's settings and is the first measured round trip.
        driver.probe(Instant::now());
        driver
    }

    fn probe(&mut self, now: Instant) {
        if self.ping.send_ping(Ping::opaque()).is_ok() {
            self.sent = Some(now);
            self.stalled = false;
        }
    }

    fn poll_pong(&mut self, cx: &mut Context<'_>) {
        while let Some(sent) = self.sent {
            match self.ping.poll_pong(cx) {
                Poll::Ready(Ok(_)) => {
                    self.sent = None;
                    self.doubtful = false;
                    self.measure(sent, Instant::now());
                    self.shared.settled.send_if_modified(|settled| !std::mem::replace(settled, true));
                }
                Poll::Ready(Err(_)) => self.sent = None,
                Poll::Pending => return,
            }
        }
    }

    /// Takes in the answer to the PING that was sent at `sent`.
    fn measure(&mut self, sent: Instant, now: Instant) {
        // This process may have been held up itself, and has not looked yet.
        let overslept = self.armed && now.saturating_duration_since(self.timer.deadline()) > LATE;
        if (self.stalled || overslept) && !self.measuring_again {
            self.measuring_again = true;
            self.probe(now);
        } else {
            self.measuring_again = false;
            self.sample(now.saturating_duration_since(sent));
        }
    }

    /// RFC 6298's weight.
    fn sample(&self, sample: Duration) {
        let before = self.shared.rtt_us.load(Ordering::Relaxed);
        let smoothed = if before == 0 { micros(sample) } else { (before * 7 + micros(sample)) / 8 };
        self.shared.rtt_us.store(smoothed.max(1), Ordering::Relaxed);
    }

    /// Suspects the leg because of what was said of its way, and asks.
    fn take_in_doubt(&mut self, now: Instant) {
        if self.shared.doubted.swap(false, Ordering::AcqRel) {
            if self.sent.is_none() {
                self.probe(now);
            }
            self.doubtful = self.sent.is_some();
            self.shared.become_health(LegHealth::Suspect);
        }
    }

    /// Decides what the silence means and arms the timer for the next look. `true` when the leg is dead.
    fn look(&mut self, now: Instant) -> bool {
        let shared = self.shared.clone();
        if shared.in_flight.load(Ordering::Acquire) == 0 {
            shared.parked.store(true, Ordering::Release);
            // A request may have begun in between and found nobody parked.
            if shared.in_flight.load(Ordering::Acquire) == 0 || !shared.parked.swap(false, Ordering::AcqRel) {
                self.armed = false;
                return false;
            }
        }
        let quiet_since = shared.quiet_since();
        if self.sent.is_none() && now >= quiet_since + PING_AFTER {
            self.probe(now);
        }
        let next = match self.sent {
            None => quiet_since + PING_AFTER,
            Some(sent) => {
                let since = quiet_since.max(sent);
                if now >= since + DEAD_AFTER {
                    return true;
                }
                let suspect_at = suspect_at(quiet_since, sent, shared.rtt());
                if now >= suspect_at {
                    self.stalled = true;
                    shared.become_health(LegHealth::Suspect);
                    since + DEAD_AFTER
                } else {
                    suspect_at
                }
            }
        };
        self.timer.as_mut().reset(next.max(now + Duration::from_millis(1)));
        self.armed = true;
        false
    }

    fn poll_liveness(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let heard = self.sent.is_none_or(|sent| !self.doubtful && self.shared.heard_at() > sent);
        if heard && self.shared.health_now() == LegHealth::Suspect {
            self.shared.become_health(LegHealth::Live);
            self.armed = false;
        }
        loop {
            if !self.armed && self.look(Instant::now()) {
                return Poll::Ready(());
            }
            if !self.armed {
                return Poll::Pending;
            }
            let deadline = self.timer.deadline();
            ready!(self.timer.as_mut().poll(cx));
            self.armed = false;
            let now = Instant::now();
            if now.saturating_duration_since(deadline) > LATE {
                // What was sent meanwhile may wait in the socket: read it before suspecting anybody.
                self.timer.as_mut().reset(now + PING_AFTER);
                self.armed = true;
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Future for Driver<T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.shared.waker.register(cx.waker());
        let ended = this.shared.aborted.load(Ordering::Acquire) || Pin::new(&mut this.connection).poll(cx).is_ready();
        if !ended {
            this.poll_pong(cx);
            this.take_in_doubt(Instant::now());
            if this.poll_liveness(cx).is_pending() {
                // PINGs that were just queued leave with the next poll of the connection, which h2 wakes.
                return Poll::Pending;
            }
        }
        this.shared.become_health(LegHealth::Gone);
        Poll::Ready(())
    }
}

impl<T> Drop for Driver<T> {
    fn drop(&mut self) {
        self.shared.become_health(LegHealth::Gone);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn silence_is_suspect_when_a_question_had_the_time_to_be_answered() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        for (sent, rtt, want) in [
            // Asked after 150 ms.
            (150, 1, 400),
            (150, 80, 400),
            // Asked late, as after a pause of this process, or on a long path.
            (390, 1, 640),
            (150, 100, 450),
            (150, 300, 1_050),
            // A question of before, to which nothing of what came since was the answer.
            (0, 1, 400),
        ] {
            assert_eq!(suspect_at(start, at(sent), Duration::from_millis(rtt)), at(want), "{sent} {rtt}");
        }
    }

    /// A connection that the far end has refused and closed, with octets and the alert still to be read.
    struct Refused(usize);

    impl AsyncRead for Refused {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.0 += 1;
            if self.0 < 3 {
                buf.put_slice(b"settings");
                return Poll::Ready(Ok(()));
            }
            let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRevoked);
            Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, alert)))
        }
    }

    impl AsyncWrite for Refused {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_write_that_fails_first_does_not_hide_the_reason() {
        let shared = Shared::new(Duration::ZERO);
        let mut heard = Heard { io: Refused(0), shared: shared.clone() };
        assert_eq!(heard.write(b"request").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(shared.denied.get(), Some(&Refusal::Revoked));
    }
}
