//! What HTTP/2 writes at once, as one TLS record and one call.
//!
//! h2 writes the head of a larger frame and its payload one after the other, and each write into TLS becomes
//! a record and a call to the kernel of its own. Collected up to the size of a record they become one. h2
//! flushes whenever it has nothing more to say, so nothing waits here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most that fits into one record (RFC 8446 section 5.1).
const RECORD: usize = 16 * 1024;

/// Collects writes until they fill a record or are flushed.
#[derive(Debug)]
pub(super) struct Records<T> {
    io: T,
    pending: Vec<u8>,
    written: usize,
}

impl<T> Records<T> {
    pub(super) fn new(io: T) -> Self {
        Self { io, pending: Vec::new(), written: 0 }
    }
}

impl<T: AsyncWrite + Unpin> Records<T> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.pending.len() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.pending[self.written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.written += count,
            }
        }
        self.pending.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Records<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

/// Not vectored: h2 then copies small payloads behind their heads itself.
impl<T: AsyncWrite + Unpin> AsyncWrite for Records<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.pending.len() >= RECORD {
            ready!(self.poll_drain(cx))?;
        }
        let taken = buf.len().min(RECORD - self.pending.len());
        self.pending.extend_from_slice(&buf[..taken]);
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Notes the size of each write.
    struct Sizes(Vec<usize>);

    impl AsyncWrite for Sizes {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.0.push(buf.len());
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn writes_become_full_records_and_one_at_the_flush() {
        let mut records = Records::new(Sizes(Vec::new()));
        for size in [9, 300, 2 * RECORD, 5] {
            records.write_all(&vec![0; size]).await.unwrap();
        }
        records.flush().await.unwrap();
        records.flush().await.unwrap();
        assert_eq!(records.io.0, [RECORD, RECORD, 314]);
    }

    #[tokio::test]
    async fn nothing_is_lost_or_reordered_where_the_reader_is_slow() {
        let (near, mut far) = tokio::io::duplex(1000);
        let sent: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            let mut records = Records::new(near);
            for piece in sent.chunks(7_001) {
                records.write_all(piece).await.unwrap();
            }
            records.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), far.read_to_end(&mut received)).await.unwrap().unwrap();
        writing.await.unwrap();
        assert_eq!(received, expected);
    }
}
