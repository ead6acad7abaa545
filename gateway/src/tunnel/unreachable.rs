//! What hosts on the way say of datagrams that the tunnels' socket sent: nobody listens there (ICMP's port-unreachable,
//! RFC 792 and RFC 4443, which Linux queues beside the socket, see `ip(7)`).
//!
//! Anybody who sees or guesses a tunnel's ports can forge such a message. So it makes a tunnel suspect, which has it
//! probed at once, and nothing more.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::registry::Registry;
use super::udp::register;

/// The queue of errors beside a UDP socket.
#[derive(Debug)]
pub struct ErrorQueue(AsyncFd<UdpSocket>);

impl ErrorQueue {
    /// Has the kernel keep what it is told of `socket`'s datagrams. Needs a runtime.
    pub fn of(socket: &socket2::Socket) -> io::Result<Self> {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
        if socket.local_addr()?.is_ipv6() {
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
        }
        register(socket.try_clone()?.into(), Interest::ERROR).map(Self)
    }

    /// To where a datagram went that found nobody.
    async fn next(&self) -> io::Result<SocketAddr> {
        loop {
            let mut ready = self.0.ready(Interest::ERROR).await?;
            if let Ok(message) = ready.try_io(|socket| read(socket.get_ref()))
                && let Some(address) = message?
            {
                return Ok(address);
            }
        }
    }
}

/// Takes one message from the queue; `None` for one that says something else.
fn read(socket: &UdpSocket) -> io::Result<Option<SocketAddr>> {
    // The datagram itself is of no interest, nor is who on the way has spoken.
    let mut control = nix::cmsg_space!([u8; 256]);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut [], Some(&mut control), flags)?;
    let refused = message.cmsgs()?.any(|said| match said {
        ControlMessageOwned::Ipv4RecvErr(error, _) => error.ee_errno == Errno::ECONNREFUSED as u32,
        ControlMessageOwned::Ipv6RecvErr(error, _) => error.ee_errno == Errno::ECONNREFUSED as u32,
        _ => false,
    });
    Ok(message.address.filter(|_| refused).and_then(|address| address_of(&address)))
}

fn address_of(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::new(v4.ip().into(), v4.port()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::new(v6.ip().to_canonical(), v6.port())))
}

/// Whether an error of a call on the socket only reports what became of some datagram that was sent before.
pub fn is_report(error: &io::Error) -> bool {
    use Errno::*;
    let reports =
        [ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, EHOSTDOWN, ENONET, ENOPROTOOPT, EOPNOTSUPP, EPROTO, EACCES, EMSGSIZE];
    error.raw_os_error().is_some_and(|raw| reports.contains(&Errno::from_raw(raw)))
}

/// Tells the tunnels, for as long as the gateway runs.
pub async fn tell_all(registry: Registry, errors: ErrorQueue) {
    loop {
        match errors.next().await {
            Ok(address) => {
                let here =
                    |tunnel: &SocketAddr| (tunnel.ip().to_canonical(), tunnel.port()) == (address.ip(), address.port());
                registry
                    .all()
                    .iter()
                    .filter(|tunnel| here(&tunnel.remote_address()))
                    .for_each(|tunnel| tunnel.unreachable());
            }
            Err(error) => {
                tracing::warn!(%error, "the errors of the tunnel port can't be read: a gateway that dies is noticed later");
                return;
            }
        }
    }
}
