//! Copies bytes both ways between a leg and an application connection, keeping half-closes and resets.
//!
//! A direction that has nothing to carry owns no buffer: each poll reads into one scratch buffer of the
//! thread, and only what the other side does not take at once is kept. So an idle connection costs
//! no buffer memory, and a stalled one at most [`SCRATCH`] octets a direction.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Octets that are read at once, and the most that is held for a stalled direction.
pub const SCRATCH: usize = 64 * 1024;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
}

/// Octets carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copied {
    pub from_leg: u64,
    pub to_leg: u64,
}

/// Which side ended a copy in a way that is not a close.
#[derive(Debug)]
pub enum CopyEnd {
    /// Both directions were closed in order.
    Closed,
    /// The leg failed or was reset: the application connection has to be reset too.
    LegReset(io::Error),
    /// The application's connection failed or was reset: the leg has to be reset too.
    AppReset(io::Error),
}

/// How a copy ended, and what it had carried until then.
#[derive(Debug)]
pub struct Ended {
    pub copied: Copied,
    pub end: CopyEnd,
}

/// Carries bytes until both directions are closed or one side is reset. An end of the stream on one side
/// becomes a half-close of the other. After a reset the caller passes it on with [`reset`].
pub async fn copy_both<L, A>(leg: &mut L, app: &mut A) -> Ended
where
    L: AsyncRead + AsyncWrite + Unpin,
    A: AsyncRead + AsyncWrite + Unpin,
{
    let (mut to_leg, mut from_leg) = (Direction::default(), Direction::default());
    let end = poll_fn(|cx| {
        let out = match to_leg.poll(cx, app, leg) {
            Poll::Ready(Err(Broken::Source(error))) => return Poll::Ready(CopyEnd::AppReset(error)),
            Poll::Ready(Err(Broken::Sink(error))) => return Poll::Ready(CopyEnd::LegReset(error)),
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
        };
        match from_leg.poll(cx, leg, app) {
            Poll::Ready(Err(Broken::Source(error))) => return Poll::Ready(CopyEnd::LegReset(error)),
            Poll::Ready(Err(Broken::Sink(error))) => return Poll::Ready(CopyEnd::AppReset(error)),
            Poll::Ready(Ok(())) => {}
            Poll::Pending => return Poll::Pending,
        }
        ready!(out);
        Poll::Ready(CopyEnd::Closed)
    })
    .await;
    Ended { copied: Copied { from_leg: from_leg.carried, to_leg: to_leg.carried }, end }
}

/// Makes the close of this connection a reset (RST) instead of an orderly end: drops it with
/// `SO_LINGER` 0, so that the other end can tell a broken stream from a finished one.
pub fn reset(connection: TcpStream) {
    // Fails only on a socket that is gone already.
    let _ = socket2::SockRef::from(&connection).set_linger(Some(std::time::Duration::ZERO));
}

enum Broken {
    Source(io::Error),
    Sink(io::Error),
}

#[derive(Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Copying,
    Closing,
    Done,
}

#[derive(Default)]
struct Direction {
    /// What the sink has not taken yet.
    held: Vec<u8>,
    held_at: usize,
    phase: Phase,
    unflushed: bool,
    carried: u64,
}

impl Direction {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut (impl AsyncRead + Unpin),
        sink: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<Result<(), Broken>> {
        loop {
            match self.phase {
                Phase::Done => return Poll::Ready(Ok(())),
                Phase::Closing => {
                    ready!(Pin::new(&mut *sink).poll_shutdown(cx)).map_err(Broken::Sink)?;
                    self.phase = Phase::Done;
                }
                Phase::Copying => {
                    ready!(self.poll_held(cx, sink))?;
                    ready!(self.poll_once(cx, source, sink))?;
                }
            }
        }
    }

    fn poll_held(&mut self, cx: &mut Context<'_>, sink: &mut (impl AsyncWrite + Unpin)) -> Poll<Result<(), Broken>> {
        while self.held_at < self.held.len() {
            let count =
                ready!(Pin::new(&mut *sink).poll_write(cx, &self.held[self.held_at..])).map_err(Broken::Sink)?;
            if count == 0 {
                return Poll::Ready(Err(Broken::Sink(io::ErrorKind::WriteZero.into())));
            }
            self.held_at += count;
            self.unflushed = true;
        }
        self.held = Vec::new();
        self.held_at = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads once and writes what the sink takes; the rest is held. When nothing can be read the sink is
    /// flushed, because TLS keeps what the socket did not take.
    fn poll_once(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut (impl AsyncRead + Unpin),
        sink: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<Result<(), Broken>> {
        let read = SHARED.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            let read = Pin::new(&mut *source).poll_read(cx, &mut buffer);
            read.map_ok(|()| self.write(cx, sink, buffer.filled()))
        });
        match read {
            Poll::Ready(Ok(written)) => Poll::Ready(written),
            Poll::Ready(Err(error)) => Poll::Ready(Err(Broken::Source(error))),
            Poll::Pending => {
                if self.unflushed {
                    ready!(Pin::new(&mut *sink).poll_flush(cx)).map_err(Broken::Sink)?;
                    self.unflushed = false;
                }
                Poll::Pending
            }
        }
    }

    fn write(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut (impl AsyncWrite + Unpin),
        mut bytes: &[u8],
    ) -> Result<(), Broken> {
        if bytes.is_empty() {
            self.phase = Phase::Closing;
            return Ok(());
        }
        self.carried += bytes.len() as u64;
        self.unflushed = true;
        while !bytes.is_empty() {
            match Pin::new(&mut *sink).poll_write(cx, bytes) {
                Poll::Ready(Ok(0)) => return Err(Broken::Sink(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => bytes = &bytes[count..],
                Poll::Ready(Err(error)) => return Err(Broken::Sink(error)),
                Poll::Pending => break,
            }
        }
        self.held.extend_from_slice(bytes);
        Ok(())
    }
}
