//! The UDP socket as the kernel sees it, woken by what it waits for and by nothing else.
//!
//! The kernel says that a UDP socket can be written to whenever a datagram has left it, so a socket that is registered for
//! that is woken once more for each datagram that it sends, just when the receiver wants the processor. So this one is
//! registered for reading; for writing only while a send buffer is full.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use quinn::UdpPoller;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime wait for this of a socket, and for nothing else.
#[expect(unsafe_code, reason = "tokio has no safe way to register a socket for one direction")]
pub fn register(socket: UdpSocket, interest: Interest) -> io::Result<AsyncFd<UdpSocket>> {
    // SAFETY: a `UdpSocket` owns its descriptor and never changes it; moved into the `AsyncFd`, it is open as long as that lives.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

#[derive(Debug)]
pub struct QuietSocket {
    socket: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    /// Set by whoever found the send buffer full, cleared by whoever saw that there is room again.
    full: AtomicBool,
}

impl QuietSocket {
    /// `socket` must be non-blocking. Needs a runtime.
    pub fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket: register(socket, Interest::READABLE)?, state, full: AtomicBool::new(false) })
    }

    pub fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.sending(|socket| self.state.send(socket.into(), transmit))
    }

    fn sending(&self, send: impl FnOnce(&UdpSocket) -> io::Result<()>) -> io::Result<()> {
        let sent = send(self.socket.get_ref());
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            self.full.store(true, Ordering::Relaxed);
        }
        sent
    }

    pub fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.socket.poll_read_ready(cx))?;
            if let Ok(received) = ready.try_io(|socket| self.state.recv(socket.get_ref().into(), bufs, meta)) {
                // Fewer than there was room for: the kernel had no more, and tells of the next one, so nobody has to ask again.
                if received.as_ref().is_ok_and(|&received| received < bufs.len()) {
                    ready.clear_ready();
                }
                return Poll::Ready(received);
            }
        }
    }

    pub fn poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(FullBuffer { socket: self, room: None })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.get_ref().local_addr()
    }

    pub fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    pub fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room in the send buffer. quinn asks before each datagram, so nothing is registered until one found no room; and
/// what is registered is new for each wait, so that it never speaks of an earlier one.
#[derive(Debug)]
struct FullBuffer {
    socket: Arc<QuietSocket>,
    room: Option<AsyncFd<UdpSocket>>,
}

impl UdpPoller for FullBuffer {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waiting = match self.room.take() {
            Some(waiting) => waiting,
            None if !self.socket.full.load(Ordering::Relaxed) => return Poll::Ready(Ok(())),
            None => register(self.socket.socket.get_ref().try_clone()?, Interest::WRITABLE)?,
        };
        let polled = waiting.poll_write_ready(cx).map_ok(drop);
        if polled.is_pending() {
            self.room = Some(waiting);
        } else {
            self.socket.full.store(false, Ordering::Relaxed);
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::Ipv4Addr;
    use std::sync::atomic::AtomicUsize;
    use std::task::{Wake, Waker};
    use std::time::Duration;

    use super::*;

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn bound() -> UdpSocket {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    fn transmit(destination: SocketAddr, contents: &[u8]) -> Transmit<'_> {
        Transmit { destination, ecn: None, contents, segment_size: None, src_ip: None }
    }

    fn received(socket: &QuietSocket, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let (mut first, mut second) = ([0; 2048], [0; 2048]);
        let mut bufs = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        socket.poll_recv(cx, &mut bufs, &mut [RecvMeta::default(); 2])
    }

    #[tokio::test]
    async fn sending_wakes_nobody_and_a_datagram_wakes_the_receiver() {
        let socket = QuietSocket::new(bound()).unwrap();
        let other = bound();
        let counter = Arc::new(Counter::default());
        let waker = Waker::from(counter.clone());
        let mut cx = Context::from_waker(&waker);
        assert!(received(&socket, &mut cx).is_pending());
        for _ in 0..50 {
            socket.try_send(&transmit(other.local_addr().unwrap(), b"out")).unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(counter.0.load(Ordering::Relaxed), 0);
        // Each datagram wakes, also the one after a turn that took all there was.
        for turn in 1..=3 {
            other.send_to(b"in", socket.local_addr().unwrap()).unwrap();
            let waited = async {
                while counter.0.load(Ordering::Relaxed) < turn {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), waited).await.unwrap();
            assert!(matches!(received(&socket, &mut cx), Poll::Ready(Ok(1))));
            assert!(received(&socket, &mut cx).is_pending());
        }
    }

    /// A socket whose buffer fills for sure: nobody reads at the other end until the test does.
    fn pair() -> (Arc<QuietSocket>, std::os::unix::net::UnixDatagram) {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let ours = UdpSocket::from(std::os::fd::OwnedFd::from(ours));
        let socket = register(ours, Interest::READABLE).unwrap();
        let state = UdpSocketState::new((&bound()).into()).unwrap();
        (Arc::new(QuietSocket { socket, state, full: AtomicBool::new(false) }), theirs)
    }

    #[tokio::test]
    async fn a_full_send_buffer_is_waited_for_and_each_wait_is_its_own() {
        let (socket, theirs) = pair();
        let mut poller = socket.clone().poller();
        let mut room = async |within| {
            tokio::time::timeout(within, std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx))).await
        };
        assert!(room(Duration::ZERO).await.is_ok(), "nobody found it full");
        for _ in 0..3 {
            while socket.sending(|socket| socket.send(b"full").map(drop)).is_ok() {}
            assert!(room(Duration::from_millis(20)).await.is_err(), "the buffer was full, and was said to have room");
            while theirs.recv(&mut [0; 16]).is_ok() {}
            room(Duration::from_secs(10)).await.unwrap().unwrap();
            assert!(room(Duration::ZERO).await.is_ok(), "there is room until somebody finds none");
        }
    }
}
