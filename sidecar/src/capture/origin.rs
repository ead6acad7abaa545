//! Where a redirected connection was going.

use std::net::{IpAddr, SocketAddr};

use socket2::SockRef;
use tokio::net::TcpStream;

/// Why a connection has no original destination.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    #[error("the connection came to this port by itself; only redirected ones are taken (`tombolo sidecar capture`)")]
    NotRedirected,
    #[error("the kernel does not tell where the connection was going; is connection tracking on? ({0})")]
    Unknown(#[source] std::io::Error),
}

/// The destination that the connection had before the packet filter changed it (`SO_ORIGINAL_DST`,
/// `IP6T_SO_ORIGINAL_DST`).
pub fn original_destination(connection: &TcpStream) -> Result<SocketAddr, OriginError> {
    let local = plain(connection.local_addr().map_err(OriginError::Unknown)?);
    let socket = SockRef::from(connection);
    // A socket of IPv6 that took an IPv4 connection is asked as one of IPv4.
    let told = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    let told = match told {
        Ok(told) => told,
        // Nothing in the host tracks connections, so nothing can have redirected this one.
        Err(error) if matches!(error.raw_os_error(), Some(ENOENT | ENOPROTOOPT)) => {
            return Err(OriginError::NotRedirected);
        }
        Err(error) => return Err(OriginError::Unknown(error)),
    };
    match told.as_socket().map(plain) {
        Some(original) if (original.ip(), original.port()) != (local.ip(), local.port()) => Ok(original),
        Some(_) => Err(OriginError::NotRedirected),
        None => Err(OriginError::Unknown(std::io::ErrorKind::InvalidData.into())),
    }
}

const ENOENT: i32 = 2;
const ENOPROTOOPT: i32 = 92;

/// An IPv4 address that is written as one of IPv6, as IPv4. A zone stays: link-local addresses mean nothing without.
pub fn plain(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_connection_that_nobody_redirected_has_no_origin() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address).await else { continue };
            let _caller = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (taken, _) = listener.accept().await.unwrap();
            assert!(matches!(original_destination(&taken), Err(OriginError::NotRedirected)), "{address}");
        }
    }

    #[test]
    fn mapped_addresses_are_those_of_ipv4() {
        let mapped = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(plain(mapped), "10.0.0.1:80".parse().unwrap());
        let zoned = "[fe80::1%3]:80".parse().unwrap();
        assert_eq!(plain(zoned), zoned);
    }
}
