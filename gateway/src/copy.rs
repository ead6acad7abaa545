//! Carries the bytes of one leg between a TCP connection and a stream of the tunnel, both ways at once.
//!
//! A half-close is carried as a half-close and a reset as a reset. An idle leg holds no buffer: memory
//! is taken when bytes are there, in the size that the leg has lately filled.

use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use futures::FutureExt;
use quinn::{ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;
use tokio::task::coop;
use tokio::time::{timeout, timeout_at};
use tombolo_core::stall::Receiver;

use crate::meters::Meters;
use crate::stalls::{Charge, Stalls};

/// Codes of a stream's RESET_STREAM and STOP_SENDING frames.
pub mod stream_code {
    use quinn::VarInt;

    /// The far end of the leg was reset or is gone.
    pub const RESET: VarInt = VarInt::from_u32(1);
    /// The leg was stalled and its memory was needed.
    pub const STALLED: VarInt = VarInt::from_u32(2);
    /// The stream was refused; the reason was sent as its answer where that was possible.
    pub const REFUSED: VarInt = VarInt::from_u32(3);
}

/// Size of the buffers for bytes from TCP: grows while they are filled, shrinks while they are not.
const READ_MIN: usize = 2 * 1024;
const READ_MAX: usize = 64 * 1024;

/// Octets that the kernel keeps for one receiver beyond what is under way to it. Without this bound it would
/// take megabytes for each that has stopped reading.
const UNSENT_MAX: u32 = 256 * 1024;

/// Chunks of a stream that are handed to the kernel in one call; about one packet each.
const CHUNKS_MAX: usize = 32;

/// How a leg ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegEnd {
    /// Both directions were closed in order.
    Closed,
    /// The TCP side was reset or failed.
    TcpReset,
    /// The stream was reset or stopped by the far gateway.
    StreamReset,
    /// The tunnel is gone.
    TunnelLost,
    /// The receiver had stopped reading, and the memory budget was used up.
    Stalled,
    /// The server said nothing in time.
    Silent,
}

impl LegEnd {
    pub fn as_str(self) -> &'static str {
        match self {
            LegEnd::Closed => "closed",
            LegEnd::TcpReset => "tcp-reset",
            LegEnd::StreamReset => "stream-reset",
            LegEnd::TunnelLost => "tunnel-lost",
            LegEnd::Stalled => "stalled",
            LegEnd::Silent => "silent",
        }
    }
}

/// What the two directions of one leg share.
pub struct Pumps<'a> {
    pub meters: &'a Meters,
    pub stalls: &'a Stalls,
    /// The leg ends when no byte has come out of the tunnel within this time.
    pub first_byte_within: Option<Duration>,
}

/// Sets a TCP connection up to carry a leg.
pub fn prepare(tcp: &TcpStream) {
    // Either only fails on a connection that is gone, which shows soon enough.
    let _ = tcp.set_nodelay(true);
    let _ = socket2::SockRef::from(tcp).set_tcp_notsent_lowat(UNSENT_MAX);
    // A sidecar whose host has vanished would hold its legs, and their far ends, for ever.
    tombolo_leg::dial::keep_alive(tcp);
}

/// Carries until both directions have ended or one has failed; then both ends are told.
pub async fn carry(leg: Pumps<'_>, tcp: &mut TcpStream, send: &mut SendStream, recv: &mut RecvStream) -> LegEnd {
    // A stop can come while nothing is being written and after the other direction has ended.
    let stopped = send.stopped();
    let (read, write) = tcp.split();
    let both = async { tokio::try_join!(into_tunnel(&leg, read, send), out_of_tunnel(&leg, write.as_ref(), recv)) };
    let outcome = tokio::select! {
        biased;
        outcome = both => outcome.map(drop),
        end = stop_received(stopped) => Err(end),
    };
    let Err(end) = outcome else { return LegEnd::Closed };
    let code = if end == LegEnd::Stalled { stream_code::STALLED } else { stream_code::RESET };
    abort(tcp, send, recv, code);
    end
}

/// Completes when the far gateway wants no more of this stream, never otherwise.
async fn stop_received(stopped: impl Future<Output = Result<Option<VarInt>, StoppedError>>) -> LegEnd {
    match stopped.await {
        Ok(Some(_)) => LegEnd::StreamReset,
        // All was delivered, or the loss of the tunnel shows elsewhere too.
        Ok(None) | Err(_) => std::future::pending().await,
    }
}

/// Resets both sides of a leg. What is closed already stays so.
pub fn abort(tcp: &TcpStream, send: &mut SendStream, recv: &mut RecvStream, code: VarInt) {
    let _ = send.reset(code);
    let _ = recv.stop(code);
    reset_tcp(tcp);
}

/// Makes the coming close of `tcp` a reset, so that its peer does not take it for an orderly end.
pub fn reset_tcp(tcp: &TcpStream) {
    let _ = socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

async fn into_tunnel(leg: &Pumps<'_>, mut tcp: ReadHalf<'_>, send: &mut SendStream) -> Result<(), LegEnd> {
    let mut size = READ_MIN;
    let mut buffer = BytesMut::new();
    loop {
        let count = read(&mut tcp, &mut buffer, size).await.map_err(|_| LegEnd::TcpReset)?;
        if count == 0 {
            // The far gateway may have stopped the stream; then there is nobody left to tell.
            let _ = send.finish();
            return Ok(());
        }
        let full = buffer.len() == buffer.capacity();
        size = if full { (size * 2).min(READ_MAX) } else { size.min(count.max(READ_MIN) * 2) };
        send.write_chunk(buffer.split().freeze()).await.map_err(write_end)?;
        leg.meters.into_tunnel.inc_by(count as u64);
    }
}

/// Waits for bytes and reads them, 0 at the end; takes memory for `size` of them when there are any.
async fn read(tcp: &mut ReadHalf<'_>, buffer: &mut BytesMut, size: usize) -> io::Result<usize> {
    loop {
        tcp.readable().await?;
        if buffer.capacity() < READ_MIN {
            *buffer = BytesMut::with_capacity(size);
        }
        // Unlike `try_read_buf`, a read that leaves room waits for more without asking the kernel once more.
        if let Some(read) = tcp.read_buf(buffer).now_or_never() {
            return read;
        }
        // There was nothing after all. Or this task has had its turn: reading then pretends that there is nothing, while
        // `readable` goes on saying that there is, so that nobody else would ever run.
        *buffer = BytesMut::new();
        coop::consume_budget().await;
    }
}

fn write_end(error: WriteError) -> LegEnd {
    match error {
        WriteError::Stopped(_) => LegEnd::StreamReset,
        WriteError::ConnectionLost(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => LegEnd::TunnelLost,
    }
}

fn read_end(error: ReadError) -> LegEnd {
    match error {
        ReadError::Reset(_) => LegEnd::StreamReset,
        ReadError::ConnectionLost(_)
        | ReadError::ClosedStream
        | ReadError::IllegalOrderedRead
        | ReadError::ZeroRttRejected => LegEnd::TunnelLost,
    }
}

async fn out_of_tunnel(leg: &Pumps<'_>, tcp: &TcpStream, recv: &mut RecvStream) -> Result<(), LegEnd> {
    let mut sink = Sink { receiver: leg.stalls.receiver(), charge: None };
    let mut first = leg.first_byte_within;
    loop {
        let mut chunks = [const { Bytes::new() }; CHUNKS_MAX];
        let waiting = if sink.receiver.lags() { recv.read_chunks(&mut chunks).now_or_never() } else { None };
        let read = match waiting {
            Some(read) => read,
            None => {
                sink.caught_up();
                next_chunks(recv, &mut chunks, first.take()).await?
            }
        };
        match read.map_err(read_end)? {
            Some(count) => {
                write_all(leg, tcp, &mut sink, &mut chunks[..count]).await?;
                // Neither a stream that has more nor a receiver that takes it would ever let others run.
                coop::consume_budget().await;
            }
            None => {
                // ENOTCONN when the other side is gone: the up direction will say so.
                let _ = socket2::SockRef::from(tcp).shutdown(std::net::Shutdown::Write);
                return Ok(());
            }
        }
    }
}

async fn next_chunks(
    recv: &mut RecvStream,
    chunks: &mut [Bytes],
    within: Option<Duration>,
) -> Result<Result<Option<usize>, ReadError>, LegEnd> {
    match within {
        None => Ok(recv.read_chunks(chunks).await),
        Some(within) => timeout(within, recv.read_chunks(chunks)).await.map_err(|_| LegEnd::Silent),
    }
}

/// The receiving end of a leg, and its charge while it is stalled.
struct Sink {
    receiver: Receiver,
    charge: Option<Charge>,
}

impl Sink {
    fn caught_up(&mut self) {
        self.receiver.handle_caught_up();
        self.charge = None;
    }

    fn took(&mut self, octets: usize) {
        if self.receiver.lags() {
            let now = Instant::now();
            self.receiver.handle_taken(octets as u64, now);
            if self.receiver.stalled_since(now).is_none() {
                self.charge = None;
            }
        }
    }

    /// Waits until TCP takes more; from when it is stalled the wait is charged to the stall budget.
    async fn writable(&mut self, leg: &Pumps<'_>, tcp: &TcpStream) -> Result<(), LegEnd> {
        let now = Instant::now();
        self.receiver.handle_blocked(now);
        let stalls_at = self.receiver.stalls_at().expect("it is blocked");
        if stalls_at > now
            && let Ok(ready) = timeout_at(stalls_at.into(), tcp.writable()).await
        {
            return ready.map_err(|_| LegEnd::TcpReset);
        }
        let since = self.receiver.stalled_since(Instant::now()).unwrap_or(now);
        let charge = self.charge.get_or_insert_with(|| leg.stalls.charge(since));
        tokio::select! {
            biased;
            () = charge.reset() => Err(LegEnd::Stalled),
            ready = tcp.writable() => ready.map_err(|_| LegEnd::TcpReset),
        }
    }
}

async fn write_all(leg: &Pumps<'_>, tcp: &TcpStream, sink: &mut Sink, mut chunks: &mut [Bytes]) -> Result<(), LegEnd> {
    while !chunks.is_empty() {
        let mut slices = [IoSlice::new(&[]); CHUNKS_MAX];
        for (slice, chunk) in slices.iter_mut().zip(chunks.iter()) {
            *slice = IoSlice::new(chunk);
        }
        match tcp.try_write_vectored(&slices[..chunks.len()]) {
            Ok(0) => return Err(LegEnd::TcpReset),
            Ok(count) => {
                leg.meters.out_of_tunnel.inc_by(count as u64);
                sink.took(count);
                chunks = advance(chunks, count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sink.writable(leg, tcp).await?,
            Err(_) => return Err(LegEnd::TcpReset),
        }
    }
    Ok(())
}

/// Drops the first `count` octets of `chunks`; memory of whole chunks is given back at once.
fn advance(chunks: &mut [Bytes], mut count: usize) -> &mut [Bytes] {
    let mut whole = 0;
    for chunk in chunks.iter_mut() {
        if count < chunk.len() {
            chunk.advance(count);
            break;
        }
        count -= chunk.len();
        *chunk = Bytes::new();
        whole += 1;
    }
    &mut chunks[whole..]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_legs_other_end_is_probed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        prepare(&tcp);
        let socket = socket2::SockRef::from(&tcp);
        assert!(socket.keepalive().unwrap());
        assert!(socket.tcp_keepalive_time().unwrap() <= Duration::from_secs(30));
    }
    #[test]
    fn a_leg_that_has_had_its_turn_lets_others_run() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let task = runtime.spawn(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (mut far, _) = listener.accept().await.unwrap();
            far.write_all(b"bytes").await.unwrap();
            near.readable().await.unwrap();
            while coop::has_budget_remaining() {
                coop::consume_budget().await;
            }
            read(&mut near.split().0, &mut BytesMut::new(), READ_MIN).await.unwrap()
        });
        let read = runtime.block_on(async { timeout(Duration::from_secs(10), task).await });
        // The runtime's end would wait for a task that never yields.
        runtime.shutdown_background();
        assert_eq!(read.expect("the task yields").unwrap(), 5);
    }
}
