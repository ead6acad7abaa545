//! The sockets: one UDP and one TCP socket on the same address, with bounds on all that waits.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tombolo_core::dns::{Answer, Known, Subject, answer};

use crate::cache::Cache;
use crate::loops::Probes;
use crate::message::{
    Malformed, NOTIMP, NXDOMAIN, Query, REFUSED, SERVFAIL, TYPE_AXFR, TYPE_IXFR, Transport, answer_malformed, rcode,
};
use crate::upstream::Upstreams;
use crate::zone::{Zone, encode, encode_code, record_type};

/// Questions that wait for their answers at once.
pub const WAITING_MAX: usize = 1024;
/// TCP connections at once; each asks one question after the other.
pub const CONNECTIONS_MAX: usize = 256;
/// A connection that says nothing for this long, or takes nothing, is closed.
const IDLE: Duration = Duration::from_secs(10);
/// Tries to find a port that is free for both.
const PORT_TRIES: usize = 16;

const CLASS_IN: u16 = 1;
const CLASS_ANY: u16 = 255;

/// What became of a message, to be counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A name of the clusterset: with records, or none of the type.
    Answered,
    /// A name of the clusterset that does not exist.
    Denied,
    /// A name of the clusterset that nobody can know now.
    NotKnown,
    /// Another name: told by an upstream resolver, or from the cache.
    Relayed,
    Cached,
    /// Another name, and no resolver answered.
    UpstreamFailed,
    /// A message that is no question, or asks for what is not done here.
    Malformed,
    Refused,
    /// [`WAITING_MAX`] or [`CONNECTIONS_MAX`] is reached.
    Overloaded,
    /// A question of this server's own: a resolver asks back here.
    Looped,
}

impl Event {
    pub const ALL: &'static [Event] = &[
        Event::Answered,
        Event::Denied,
        Event::NotKnown,
        Event::Relayed,
        Event::Cached,
        Event::UpstreamFailed,
        Event::Malformed,
        Event::Refused,
        Event::Overloaded,
        Event::Looped,
    ];

    /// Its name in metrics.
    pub fn code(self) -> &'static str {
        match self {
            Event::Answered => "answered",
            Event::Denied => "denied",
            Event::NotKnown => "not-known",
            Event::Relayed => "relayed",
            Event::Cached => "cached",
            Event::UpstreamFailed => "upstream-failed",
            Event::Malformed => "malformed",
            Event::Refused => "refused",
            Event::Overloaded => "overloaded",
            Event::Looped => "looped",
        }
    }
}

/// A UDP and a TCP socket on the same address.
#[derive(Debug)]
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
    address: SocketAddr,
}

impl Sockets {
    /// With port 0, one that is free for both.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let mut tries = PORT_TRIES;
        loop {
            let tcp = TcpListener::bind(address).await?;
            let bound = tcp.local_addr()?;
            match UdpSocket::bind(bound).await {
                Ok(udp) => return Ok(Self { udp, tcp, address: bound }),
                Err(error) if address.port() == 0 && error.kind() == io::ErrorKind::AddrInUse && tries > 1 => {
                    tries -= 1
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Answers messages; knows nothing of sockets.
pub struct DnsServer {
    zone: Box<dyn Zone>,
    upstreams: Arc<Upstreams>,
    cache: Mutex<Cache>,
    turn: AtomicUsize,
    probes: Probes,
    observe: Box<dyn Fn(Event) + Send + Sync>,
}

impl DnsServer {
    pub fn new(
        zone: Box<dyn Zone>,
        upstreams: impl Into<Arc<Upstreams>>,
        observe: impl Fn(Event) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (cache, turn) = (Mutex::default(), AtomicUsize::new(0));
        let (upstreams, probes) = (upstreams.into(), Probes::default());
        Arc::new(Self { zone, upstreams, cache, turn, probes, observe: Box::new(observe) })
    }

    pub(crate) fn upstreams(&self) -> &Upstreams {
        &self.upstreams
    }

    pub(crate) fn probes(&self) -> &Probes {
        &self.probes
    }

    /// The answer to one message; `None` when it deserves none.
    pub async fn handle(&self, octets: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let query = match Query::read(octets) {
            Ok(query) => query,
            Err(malformed) => {
                (self.observe)(Event::Malformed);
                return if malformed == Malformed::Answer { answer_malformed(octets) } else { None };
            }
        };
        if self.probes.came_back(&query) {
            (self.observe)(Event::Looped);
            return Some(query.answer_code(REFUSED));
        }
        match Subject::read(query.labels().into_iter()) {
            Some(subject) => self.answer(&query, &subject, transport).await,
            None => Some(self.relay(&query, transport).await),
        }
    }

    async fn answer(&self, query: &Query<'_>, subject: &Subject, transport: Transport) -> Option<Vec<u8>> {
        let refuse = |event, octets| {
            (self.observe)(event);
            Some(octets)
        };
        if !query.is_standard() {
            return refuse(Event::Refused, query.answer_code(NOTIMP));
        }
        if !matches!(query.class(), CLASS_IN | CLASS_ANY) || matches!(query.kind(), TYPE_AXFR | TYPE_IXFR) {
            return refuse(Event::Refused, query.answer_code(REFUSED));
        }
        let Ok(message) = Message::from_vec(query.octets) else {
            return refuse(Event::Malformed, answer_malformed(query.octets)?);
        };
        if message.version() > 0 {
            return refuse(Event::Refused, encode_code(&message, ResponseCode::BADVERS)?);
        }
        let known = match subject.service() {
            Some(service) => self.zone.look_up(service).await,
            None => Known::Absent,
        };
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let decided = answer(subject, record_type(query.kind()), &known, turn);
        let event = match &decided {
            Answer::Records { .. } | Answer::NoData => Event::Answered,
            Answer::NxDomain => Event::Denied,
            Answer::ServFail => Event::NotKnown,
        };
        (self.observe)(event);
        let encoded = encode(&message, decided, transport, query.limit(transport));
        Some(encoded.unwrap_or_else(|| query.answer_code(SERVFAIL)))
    }

    async fn relay(&self, query: &Query<'_>, transport: Transport) -> Vec<u8> {
        // The answer to a transfer is many messages.
        let transfer = matches!(query.kind(), TYPE_AXFR | TYPE_IXFR) && query.is_standard();
        if transfer || self.upstreams.is_none() {
            (self.observe)(Event::Refused);
            return query.answer_code(REFUSED);
        }
        let cached = self.cache().get(query, transport, Instant::now());
        if let Some(cached) = cached {
            (self.observe)(Event::Cached);
            return cached;
        }
        let Some(answer) = self.upstreams.ask(query, transport).await else {
            (self.observe)(Event::UpstreamFailed);
            return query.answer_code(SERVFAIL);
        };
        if matches!(rcode(&answer), 0 | NXDOMAIN) {
            self.cache().put(query, &answer, Instant::now());
        }
        (self.observe)(Event::Relayed);
        answer
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn overloaded(&self, octets: &[u8]) -> Option<Vec<u8>> {
        (self.observe)(Event::Overloaded);
        Query::read(octets).ok().map(|query| query.answer_code(SERVFAIL))
    }
}

/// Serves until `stop`; questions that wait then are still answered, over UDP at least.
pub async fn run(sockets: Sockets, server: Arc<DnsServer>, stop: CancellationToken) {
    let Sockets { udp, tcp, .. } = sockets;
    let waiting = Arc::new(Semaphore::new(WAITING_MAX));
    tokio::select! {
        () = run_udp(Arc::new(udp), server.clone(), waiting.clone()) => {}
        () = run_tcp(tcp, server, waiting, stop.clone()) => {}
        () = stop.cancelled() => {}
    }
}

async fn run_udp(socket: Arc<UdpSocket>, server: Arc<DnsServer>, waiting: Arc<Semaphore>) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // What the kernel reports here concerns an answer sent before, to a client that has gone.
                tracing::debug!(%error, "receiving DNS messages");
                tokio::task::yield_now().await;
                continue;
            }
        };
        let octets = &buffer[..length];
        let Ok(permit) = waiting.clone().try_acquire_owned() else {
            if let Some(answer) = server.overloaded(octets) {
                let _ = socket.try_send_to(&answer, from);
            }
            continue;
        };
        tokio::spawn(answer_datagram(socket.clone(), server.clone(), octets.to_vec(), from, permit));
    }
}

async fn answer_datagram(
    socket: Arc<UdpSocket>,
    server: Arc<DnsServer>,
    octets: Vec<u8>,
    from: SocketAddr,
    _waiting: OwnedSemaphorePermit,
) {
    if let Some(answer) = server.handle(&octets, Transport::Udp).await
        && let Err(error) = socket.send_to(&answer, from).await
    {
        tracing::debug!(%error, %from, "sending a DNS answer");
    }
}

async fn run_tcp(listener: TcpListener, server: Arc<DnsServer>, waiting: Arc<Semaphore>, stop: CancellationToken) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting DNS connections");
                // Descriptors have run out, or the client was gone already.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            (server.observe)(Event::Overloaded);
            continue;
        };
        let (server, waiting, stop) = (server.clone(), waiting.clone(), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                _ = converse(stream, &server, &waiting) => {}
                () = stop.cancelled() => {}
            }
            drop(permit);
        });
    }
}

/// One question after the other, until the client has no more.
async fn converse(mut stream: TcpStream, server: &DnsServer, waiting: &Semaphore) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let octets = timeout(IDLE, async {
            let mut octets = vec![0; stream.read_u16().await?.into()];
            stream.read_exact(&mut octets).await?;
            io::Result::Ok(octets)
        });
        let octets = octets.await??;
        let answer = match waiting.try_acquire() {
            Ok(_permit) => server.handle(&octets, Transport::Tcp).await,
            Err(_) => server.overloaded(&octets),
        };
        let Some(answer) = answer else { return Ok(()) };
        let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
}
