//! Looks at the first octets of a connection, without taking them.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What a connection costs at first; a beginning that says more is rare.
const OCTETS: usize = 2048;

/// Asks `judge` about all octets that came so far whenever there are more, until it has a verdict. `None` when
/// the connection ends before that, or `max` octets are not enough.
pub async fn judged<T>(
    connection: &TcpStream,
    max: usize,
    mut judge: impl FnMut(&[u8]) -> Option<T>,
) -> io::Result<Option<T>> {
    let mut octets = vec![0; OCTETS.min(max)];
    let mut seen = 0;
    loop {
        seen = match beyond(connection, &mut octets, seen).await? {
            Some(seen) => seen,
            None => return Ok(None),
        };
        if let Some(verdict) = judge(&octets[..seen]) {
            return Ok(Some(verdict));
        }
        if seen == max {
            return Ok(None);
        }
        if seen == octets.len() {
            octets.resize(max, 0);
        }
    }
}

/// A connection whose octets were looked at without a verdict: the readiness to be read has been used up by that, so
/// those who would copy them now would wait for further ones. Registered anew, it is as if they had just come.
pub fn afresh(connection: TcpStream) -> io::Result<TcpStream> {
    TcpStream::from_std(connection.into_std()?)
}

/// Peeks once there is more than `seen`; `None` when the connection ends before that.
async fn beyond(connection: &TcpStream, octets: &mut [u8], seen: usize) -> io::Result<Option<usize>> {
    loop {
        let ready = connection.ready(Interest::READABLE).await?;
        // The socket counts as readable until a read would block; saying so for what was seen makes the next octet
        // wake us.
        let peeked =
            connection.try_io(Interest::READABLE, || match recv(connection.as_raw_fd(), octets, MsgFlags::MSG_PEEK)? {
                count if count > seen => Ok(count),
                _ => Err(io::ErrorKind::WouldBlock.into()),
            });
        match peeked {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            // What is closed stays ready for ever: nothing more will come.
            Err(_) if ready.is_read_closed() => return Ok(None),
            Err(_) => {}
        }
    }
}
