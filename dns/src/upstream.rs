//! The resolvers that know all other names: who they are, and how they are asked.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::message::{Query, REFUSED, SERVFAIL, Transport, rcode, set_id};

/// How long one resolver may take over UDP before the next one is asked.
const UDP_WAIT: Duration = Duration::from_millis(1500);
/// How long one may take over TCP, connecting included.
const TCP_WAIT: Duration = Duration::from_secs(3);
/// Over all resolvers; clients wait five seconds.
const WAIT_MAX: Duration = Duration::from_millis(4500);
/// Rounds over all resolvers.
const ROUNDS: usize = 2;
/// Messages that are not the answer before one resolver is given up: somebody is guessing.
const STRANGERS_MAX: usize = 64;
/// Resolvers that are asked, like those that a stub resolver reads.
const RESOLVERS_MAX: usize = 3;
/// Octets of a file that lists them.
const FILE_LEN_MAX: usize = 64 * 1024;
/// How often the file is looked at.
const FILE_AGE_MAX: Duration = Duration::from_secs(5);

/// Where names of other zones are resolved.
#[derive(Debug)]
pub struct Upstreams {
    file: Option<PathBuf>,
    /// The server's own addresses, which it must not ask itself.
    own: Vec<SocketAddr>,
    state: Mutex<State>,
    /// Those that ask back here.
    left_out: Mutex<BTreeSet<SocketAddr>>,
}

#[derive(Debug, Default)]
struct State {
    resolvers: Arc<[SocketAddr]>,
    looked: Option<Instant>,
    modified: Option<SystemTime>,
}

impl Upstreams {
    /// Nobody: names of other zones are refused.
    pub fn none() -> Self {
        Self::fixed(&[])
    }

    /// Whether there never is one.
    pub(crate) fn is_none(&self) -> bool {
        self.file.is_none() && self.resolvers(Instant::now()).is_empty()
    }

    /// These, in this order.
    pub fn fixed(resolvers: &[SocketAddr]) -> Self {
        let state = State { resolvers: resolvers.into(), ..State::default() };
        Self { file: None, own: Vec::new(), state: Mutex::new(state), left_out: Mutex::default() }
    }

    /// Those that a file in the form of `/etc/resolv.conf` names, as of now.
    pub fn from_file(file: impl Into<PathBuf>) -> Self {
        Self { file: Some(file.into()), own: Vec::new(), state: Mutex::default(), left_out: Mutex::default() }
    }

    /// Leaves out of the file's those at which the server listens: it would ask itself for ever.
    pub fn except(self, own: &[SocketAddr]) -> Self {
        Self { own: own.to_vec(), ..self }
    }

    pub fn resolvers(&self, now: Instant) -> Arc<[SocketAddr]> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = state.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= FILE_AGE_MAX);
        if let Some(file) = self.file.as_ref().filter(|_| due) {
            state.looked = Some(now);
            let modified = std::fs::metadata(file).and_then(|found| found.modified()).ok();
            // A file that can't be read for a moment takes nobody's names away.
            if modified.is_some()
                && modified != state.modified
                && let Ok(text) = std::fs::read(file)
            {
                state.modified = modified;
                let text = String::from_utf8_lossy(&text[..text.len().min(FILE_LEN_MAX)]).into_owned();
                state.resolvers = parse(&text).into_iter().filter(|address| !self.is_own(*address)).collect();
            }
        }
        state.resolvers.clone()
    }

    fn is_own(&self, address: SocketAddr) -> bool {
        let here =
            |own: &SocketAddr| own.ip() == address.ip() || own.ip().is_unspecified() && address.ip().is_loopback();
        self.own.iter().any(|own| own.port() == address.port() && here(own))
    }

    /// From now on these are not asked.
    pub fn leave_out(&self, resolvers: BTreeSet<SocketAddr>) {
        *self.left_out.lock().unwrap_or_else(PoisonError::into_inner) = resolvers;
    }

    /// Asks one resolver, whatever it answers.
    pub(crate) async fn probe(&self, resolver: SocketAddr, query: &Query<'_>) {
        match timeout(UDP_WAIT, over_udp(resolver, query)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!(%resolver, %error, "a resolver does not answer"),
            Err(_) => tracing::debug!(%resolver, "a resolver does not answer in time"),
        }
    }

    fn asked(&self) -> Vec<SocketAddr> {
        let resolvers = self.resolvers(Instant::now());
        let left_out = self.left_out.lock().unwrap_or_else(PoisonError::into_inner);
        resolvers.iter().filter(|resolver| !left_out.contains(resolver)).copied().collect()
    }

    /// The answer of the first resolver that has one; `None` when none has.
    pub async fn ask(&self, query: &Query<'_>, transport: Transport) -> Option<Vec<u8>> {
        let resolvers = self.asked();
        let mut poor = None;
        let asking = async {
            for resolver in std::iter::repeat_n(&resolvers, ROUNDS).flatten() {
                let answer = match transport {
                    Transport::Udp => timeout(UDP_WAIT, over_udp(*resolver, query)).await,
                    Transport::Tcp => timeout(TCP_WAIT, over_tcp(*resolver, query)).await,
                };
                match answer {
                    Ok(Ok(answer)) if !matches!(rcode(&answer), SERVFAIL | REFUSED) => return Some(answer),
                    // Perhaps another one is better off; if not, this is the answer.
                    Ok(Ok(answer)) => {
                        let last = poor.replace(answer).is_some() || resolvers.len() == 1;
                        if last {
                            return None;
                        }
                    }
                    Ok(Err(error)) => tracing::debug!(%resolver, %error, "a resolver does not answer"),
                    Err(_) => tracing::debug!(%resolver, "a resolver does not answer in time"),
                }
            }
            None
        };
        let answer = timeout(WAIT_MAX, asking).await.ok().flatten();
        answer.or(poor)
    }
}

/// The name servers of a `resolv.conf`.
fn parse(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let value = words.next().filter(|word| *word == "nameserver").and_then(|_| words.next())?;
        value.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 53))
    };
    text.lines().filter_map(address).take(RESOLVERS_MAX).collect()
}

fn io_timeout() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "too many messages that are not the answer")
}

/// One question from a port of its own, under an id that nobody can guess: both have to be hit by a forged answer,
/// and the socket is connected, so that nobody else is listened to.
async fn over_udp(resolver: SocketAddr, query: &Query<'_>) -> io::Result<Vec<u8>> {
    let any: IpAddr = if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(resolver).await?;
    let id: u16 = rand::random();
    let mut octets = query.octets.to_vec();
    set_id(&mut octets, id);
    socket.send(&octets).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    for _ in 0..STRANGERS_MAX {
        let length = socket.recv(&mut buffer).await?;
        if query.is_answered_by(id, &buffer[..length]) {
            set_id(&mut buffer, query.id());
            return Ok(buffer[..length].to_vec());
        }
    }
    Err(io_timeout())
}

async fn over_tcp(resolver: SocketAddr, query: &Query<'_>) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    let id: u16 = rand::random();
    let mut octets = u16::try_from(query.octets.len()).map_err(|_| io_timeout())?.to_be_bytes().to_vec();
    octets.extend(query.octets);
    set_id(&mut octets[2..], id);
    stream.write_all(&octets).await?;
    for _ in 0..STRANGERS_MAX {
        let mut answer = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut answer).await?;
        if query.is_answered_by(id, &answer) {
            set_id(&mut answer, query.id());
            return Ok(answer);
        }
    }
    Err(io_timeout())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn name_servers_are_read_from_a_file() {
        let text = "# comment\nsearch example.com\nnameserver 192.0.2.1\nnameserver\t2001:db8::1 # two\n\
                    nameserver fe80::1%eth0\nnameserver name\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n";
        let read: Vec<_> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(read, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_lost_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resolv.conf");
        let upstreams = Upstreams::from_file(&file).except(&["127.0.0.1:53".parse().unwrap()]);
        let now = Instant::now();
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        assert!(upstreams.resolvers(now).is_empty());
        std::fs::write(&file, "nameserver 127.0.0.1\nnameserver 192.0.2.1\n").unwrap();
        assert!(upstreams.resolvers(at(4)).is_empty(), "looked at every five seconds");
        assert_eq!(*upstreams.resolvers(at(5)), ["192.0.2.1:53".parse().unwrap()], "without itself");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(upstreams.resolvers(at(10)).len(), 1);
        std::fs::write(&file, "nameserver 192.0.2.9\n").unwrap();
        std::fs::File::open(&file).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(*upstreams.resolvers(at(15)), ["192.0.2.9:53".parse().unwrap()]);
    }
}
