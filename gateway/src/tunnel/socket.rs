//! The UDP socket as quinn sees it: each datagram in memory of its own.
//!
//! The kernel hands over runs of datagrams in one piece (UDP GRO). quinn would keep such a piece for as long
//! as one datagram of it waits for a stalled receiver, many times the octets that it counts for that
//! stream. So the runs are taken apart here; a copy within the cache costs far less than the calls saved.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};

use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use super::udp::QuietSocket;
use super::unreachable::is_report;

/// The largest run that the kernel hands over.
const RUN_MAX: usize = 64 * 1024;

/// Takes runs of datagrams apart.
#[derive(Debug)]
pub struct SplittingSocket {
    inner: Arc<QuietSocket>,
    runs: Mutex<Runs>,
}

impl SplittingSocket {
    pub fn new(inner: QuietSocket) -> Self {
        Self { inner: Arc::new(inner), runs: Mutex::new(Runs::new()) }
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().expect("nothing panics while it takes a run apart")
    }
}

impl AsyncUdpSocket for SplittingSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut runs = self.runs();
        loop {
            let count = runs.hand_over(bufs, meta);
            if count > 0 {
                return Poll::Ready(Ok(count));
            }
            match ready!(runs.poll_receive(cx, &self.inner)) {
                Err(error) if is_report(&error) => {}
                received => received?,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Runs that were received, and how much of them was handed over.
struct Runs {
    buffer: Box<[u8]>,
    metas: [RecvMeta; BATCH_SIZE],
    count: usize,
    /// The run and the octet within it that come next.
    run: usize,
    offset: usize,
}

impl Runs {
    fn new() -> Self {
        Self {
            // Pages that are never written to take no memory.
            buffer: vec![0; BATCH_SIZE * RUN_MAX].into(),
            metas: [RecvMeta::default(); BATCH_SIZE],
            count: 0,
            run: 0,
            offset: 0,
        }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, socket: &QuietSocket) -> Poll<io::Result<()>> {
        let mut chunks = self.buffer.chunks_mut(RUN_MAX).map(IoSliceMut::new);
        let mut bufs: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| chunks.next().expect("the buffer holds a chunk for each run"));
        self.count = ready!(socket.poll_recv(cx, &mut bufs, &mut self.metas))?;
        (self.run, self.offset) = (0, 0);
        Poll::Ready(Ok(()))
    }

    /// Copies as many datagrams as there are buffers for. One that is larger than its buffer is dropped:
    /// it is larger than any that this endpoint has allowed.
    fn hand_over(&mut self, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let mut handed = 0;
        while handed < bufs.len().min(meta.len()) && self.run < self.count {
            let run = self.metas[self.run];
            let octets = &self.buffer[self.run * RUN_MAX..][..run.len][self.offset..];
            let length = octets.len().min(if run.stride == 0 { run.len } else { run.stride });
            if length == 0 {
                (self.run, self.offset) = (self.run + 1, 0);
                continue;
            }
            self.offset += length;
            if let Some(buf) = bufs[handed].get_mut(..length) {
                buf.copy_from_slice(&octets[..length]);
                meta[handed] = RecvMeta { len: length, stride: length, ..run };
                handed += 1;
            }
        }
        handed
    }
}

impl fmt::Debug for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runs").field("count", &self.count).field("run", &self.run).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What comes out of these runs (octets and stride), through `slots` buffers of 4 octets at a time.
    fn check(runs_in: &[(&[u8], usize)], slots: usize, want: &[&[u8]]) {
        let mut runs = Runs::new();
        for (at, (octets, stride)) in runs_in.iter().enumerate() {
            runs.buffer[at * RUN_MAX..][..octets.len()].copy_from_slice(octets);
            runs.metas[at] = RecvMeta { len: octets.len(), stride: *stride, ..RecvMeta::default() };
        }
        runs.count = runs_in.len();
        let mut out = Vec::new();
        loop {
            let mut memory = vec![[0; 4]; slots];
            let mut bufs: Vec<_> = memory.iter_mut().map(|slot| IoSliceMut::new(slot)).collect();
            let mut meta = vec![RecvMeta::default(); slots];
            let count = runs.hand_over(&mut bufs, &mut meta);
            if count == 0 {
                break;
            }
            out.extend(bufs.iter().zip(&meta).take(count).map(|(buf, meta)| buf[..meta.len].to_vec()));
        }
        assert_eq!(out, want);
    }

    #[test]
    fn runs_come_out_as_single_datagrams_in_order() {
        for slots in 1..5 {
            check(&[], slots, &[]);
            check(&[(b"abcdef", 2), (b"xyz", 3)], slots, &[b"ab", b"cd", b"ef", b"xyz"]);
            check(&[(b"abcde", 2), (b"", 0), (b"x", 1)], slots, &[b"ab", b"cd", b"e", b"x"]);
            check(&[(b"abc", 0)], slots, &[b"abc"]);
            check(&[(b"too long", 8), (b"ok", 2)], slots, &[b"ok"]);
        }
    }
}
