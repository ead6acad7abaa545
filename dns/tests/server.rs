//! The server over real sockets on loopback: what clients that are not ours make of it, and what it does when its
//! resolvers do not answer.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_core::addresses::{Number, Ranges, VirtualAddress};
use tombolo_core::dns::{EndpointPlace, Known, Places, ServiceRecords};
use tombolo_core::id::ServiceName;
use tombolo_core::model::Transport;
use tombolo_dns::server::{CONNECTIONS_MAX, WAITING_MAX};
use tombolo_dns::{DnsServer, Event, Sockets, Upstreams, Zone};

const DEADLINE: Duration = Duration::from_secs(20);

fn address(number: u32) -> VirtualAddress {
    Ranges::default().address(Number(number)).unwrap()
}

/// `shop/web` with one address, `shop/db` with many endpoints; `cut/*` can't be known; `slow/*` never comes.
struct Shop;

impl Zone for Shop {
    fn look_up<'a>(&'a self, service: &'a ServiceName) -> BoxFuture<'a, Known> {
        let ports =
            BTreeMap::from([(("http".to_owned(), Transport::Tcp), 80), (("http".to_owned(), Transport::Udp), 80)]);
        let endpoint = |n: u32| EndpointPlace {
            hostname: format!("db-{n}"),
            cluster: "east".parse().unwrap(),
            address: address(1000 + n),
        };
        let known = match service.to_string().as_str() {
            "shop/web" => Known::Records(ServiceRecords { places: Places::Whole(address(1).into()), ports }),
            "shop/db" => {
                Known::Records(ServiceRecords { places: Places::Endpoints((0..300).map(endpoint).collect()), ports })
            }
            name if name.starts_with("cut/") => Known::CutOff,
            name if name.starts_with("slow/") => return std::future::pending().boxed(),
            _ => Known::Absent,
        };
        std::future::ready(known).boxed()
    }
}

struct Running {
    address: SocketAddr,
    events: Arc<Mutex<Vec<Event>>>,
    server: Arc<DnsServer>,
    _stop: DropGuard,
}

impl Running {
    async fn start(upstreams: &[SocketAddr]) -> Self {
        Self::on(Sockets::bind("127.0.0.1:0".parse().unwrap()).await.unwrap(), upstreams)
    }

    fn on(sockets: Sockets, upstreams: &[SocketAddr]) -> Self {
        let (address, events, stop) =
            (sockets.address(), Arc::<Mutex<Vec<Event>>>::default(), CancellationToken::new());
        let seen = events.clone();
        let server = DnsServer::new(Box::new(Shop), Upstreams::fixed(upstreams), move |event| {
            seen.lock().unwrap().push(event);
        });
        tokio::spawn(tombolo_dns::run(sockets, server.clone(), stop.clone()));
        Self { address, events, server, _stop: stop.drop_guard() }
    }

    fn count(&self, event: Event) -> usize {
        self.events.lock().unwrap().iter().filter(|seen| **seen == event).count()
    }

    async fn until(&self, event: Event, count: usize) {
        let seen = async {
            while self.count(event) < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, seen).await.unwrap_or_else(|_| panic!("{event:?} only {} times", self.count(event)));
    }

    /// What `dig` prints, with single blanks.
    async fn dig(&self, arguments: &str) -> String {
        let port = self.address.port();
        let line = format!("@127.0.0.1 -p {port} +tries=1 +timeout=10 {arguments}");
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let dig = move || Command::new("dig").args(words).stdin(Stdio::null()).output().unwrap();
        let output = timeout(DEADLINE, tokio::task::spawn_blocking(dig)).await.unwrap().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect()
    }

    /// One message over UDP, and what comes back.
    async fn ask(&self, message: &[u8]) -> Vec<u8> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(message, self.address).await.unwrap();
        let mut buffer = vec![0; 65_535];
        let length = timeout(DEADLINE, socket.recv(&mut buffer)).await.expect("an answer").unwrap();
        buffer.truncate(length);
        buffer
    }
}

/// A name in wire form.
fn wire(name: &str) -> Vec<u8> {
    let mut octets: Vec<u8> =
        name.split('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).collect();
    octets.push(0);
    octets
}

fn question(id: u16, name: &str, kind: u16) -> Vec<u8> {
    [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0], &wire(name), &kind.to_be_bytes(), &[0, 1]].concat()
}

fn rcode(message: &[u8]) -> u8 {
    message[3] & 0xf
}

fn has_dig(test: &str) -> bool {
    let found = Command::new("dig").arg("-v").stderr(Stdio::null()).status().is_ok();
    assert!(found || std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(), "{test} needs dig (Debian: bind9-dnsutils)");
    if !found {
        eprintln!("skipped: {test} needs dig (Debian: bind9-dnsutils)");
    }
    found
}

/// How a resolver of a test behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Habit {
    /// Answers with an address and whatever records the question had.
    Good,
    /// Forged messages first: another id, another question.
    Forged,
    ServFail,
    /// Sets TC over UDP.
    Truncating,
    Silent,
}

/// A resolver that is not ours to trust; yields its address and counts what it is asked.
async fn resolver(habit: Habit) -> (SocketAddr, Arc<AtomicUsize>) {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let (counted, also) = (asked.clone(), asked.clone());
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_535];
        loop {
            let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
            counted.fetch_add(1, Ordering::SeqCst);
            for answer in answers(habit, &buffer[..length]) {
                udp.send_to(&answer, from).await.unwrap();
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            also.fetch_add(1, Ordering::SeqCst);
            let mut query = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut query).await.unwrap();
            let habit = if habit == Habit::Truncating { Habit::Good } else { habit };
            for answer in answers(habit, &query) {
                stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat()).await.unwrap();
            }
        }
    });
    (address, asked)
}

fn answers(habit: Habit, query: &[u8]) -> Vec<Vec<u8>> {
    let mut good = query.to_vec();
    good[2] |= 0x80;
    good[3] |= 0x80;
    let question_end = 12 + query[12..].iter().position(|octet| *octet == 0).unwrap() + 5;
    // Behind the question, in front of what the client said of itself.
    let record = [&[0xc0, 12], &query[question_end - 4..question_end], &[0, 0, 0, 30, 0, 4, 192, 0, 2, 7]].concat();
    good[7] = 1;
    good.splice(question_end..question_end, record);
    let mut other = good.clone();
    match habit {
        Habit::Good => vec![good],
        Habit::Silent => vec![],
        Habit::ServFail => {
            let mut failed = query.to_vec();
            failed[2] |= 0x80;
            failed[3] = 0x82;
            vec![failed]
        }
        Habit::Truncating => {
            let mut cut = query.to_vec();
            cut[2] |= 0x82;
            vec![cut]
        }
        Habit::Forged => {
            let at = question_end + 15;
            other[at] = 66;
            let (mut id, mut name) = (other.clone(), other);
            id[0] ^= 0x55;
            name[13] ^= 1;
            vec![id, name, query.to_vec(), b"short".to_vec(), good]
        }
    }
}

#[tokio::test]
async fn dig_reads_every_kind_of_answer() {
    if !has_dig("dig_reads_every_kind_of_answer") {
        return;
    }
    let running = Running::start(&[]).await;
    let web = "web.shop.svc.clusterset.local";
    assert_eq!(running.dig(&format!("+short {web} A")).await, "240.1.0.1\n");
    assert_eq!(running.dig(&format!("+short {web} AAAA")).await, "fd74:6f6d:626f::1\n");
    assert_eq!(running.dig("+short dns-version.clusterset.local TXT").await, "\"1.0.0\"\n");
    let server = running.dig(&format!("_http._tcp.{web} SRV")).await;
    assert!(
        server.contains(&format!("SRV 0 100 80 {web}.")) && server.contains("ANSWER: 1, AUTHORITY: 0, ADDITIONAL: 3"),
        "{server}"
    );
    assert_eq!(running.dig("+short db-7.east.db.shop.svc.clusterset.local").await, "240.1.3.239\n");

    let absent = running.dig("none.shop.svc.clusterset.local").await;
    assert!(absent.contains("status: NXDOMAIN") && absent.contains("SOA ns.dns.clusterset.local."), "{absent}");
    assert!(absent.contains("clusterset.local. 5 IN") && absent.contains(" qr aa rd ra"), "{absent}");
    let none = running.dig(&format!("{web} MX")).await;
    assert!(none.contains("status: NOERROR") && none.contains("ANSWER: 0, AUTHORITY: 1"), "{none}");
    assert!(running.dig(&format!("east.{web}")).await.contains("status: NXDOMAIN"));
    let cut = running.dig("web.cut.svc.clusterset.local").await;
    assert!(cut.contains("status: SERVFAIL") && !cut.contains("SOA"), "{cut}");
    assert!(running.dig(&format!("{web} +edns=1 +noednsnegotiation")).await.contains("status: BADVERS"));
    assert!(running.dig(&format!("{web} CH A")).await.contains("status: REFUSED"));
    assert!(running.dig(&format!("{web} +opcode=notify")).await.contains("status: NOTIMP"));
    // The client's own spelling comes back.
    assert!(running.dig("WeB.shop.svc.clusterset.local").await.contains("\nWeB.shop.svc.clusterset.local."));
    assert_eq!((running.count(Event::NotKnown), running.count(Event::Refused)), (1, 3));
}

#[tokio::test]
async fn an_answer_too_large_for_udp_comes_over_tcp() {
    if !has_dig("an_answer_too_large_for_udp_comes_over_tcp") {
        return;
    }
    let running = Running::start(&[]).await;
    let db = "db.shop.svc.clusterset.local";
    let cut = running.dig(&format!("+ignore +bufsize=1232 {db}")).await;
    assert!(cut.contains(" tc ") && cut.contains("ANSWER: 0"), "{cut}");
    assert_eq!(running.dig(&format!("+short {db}")).await.lines().count(), 300);
    let servers = running.dig(&format!("+tcp +noall +answer _http._tcp.{db} SRV")).await;
    assert_eq!(servers.lines().filter(|line| line.contains("SRV 0 100 80 db-")).count(), 300);
}

#[tokio::test]
async fn other_names_are_relayed_as_they_are_and_kept() {
    if !has_dig("other_names_are_relayed_as_they_are_and_kept") {
        return;
    }
    let (upstream, asked) = resolver(Habit::Good).await;
    let running = Running::start(&[upstream]).await;
    let first = running.dig("+nocookie www.example.com A").await;
    assert!(first.contains("www.example.com. 30 IN A 192.0.2.7"), "{first}");
    assert_eq!(running.dig("+nocookie +short www.example.com A").await, "192.0.2.7\n");
    assert_eq!(asked.load(Ordering::SeqCst), 1, "the second answer is the first one's");
    assert_eq!((running.count(Event::Relayed), running.count(Event::Cached)), (1, 1));
    // What nobody here has heard of passes both ways.
    let unknown = running.dig("+nocookie +unknownformat www.example.com TYPE65280").await;
    assert!(unknown.contains(r"TYPE65280 \# 4 C0000207"), "{unknown}");
    // A search path put behind a name of the clusterset makes it an ordinary name.
    let searched = running.dig("+nocookie web.shop.svc.clusterset.local.cluster.local").await;
    assert!(searched.contains("192.0.2.7"), "{searched}");
    // Cookies and wishes for DNSSEC are asked for anew, and the option comes back as it went.
    let before = asked.load(Ordering::SeqCst);
    for arguments in
        ["+dnssec +nocookie", "+cookie=0123456789abcdef", "+cookie=0123456789abcdef", "+subnet=192.0.2.0/24"]
    {
        let told = running.dig(&format!("{arguments} www.example.com")).await;
        assert!(told.contains("192.0.2.7"), "{told}");
        assert!(!arguments.starts_with("+subnet") || told.contains("CLIENT-SUBNET: 192.0.2.0/24"), "{told}");
    }
    assert_eq!(asked.load(Ordering::SeqCst) - before, 4);
    assert!(running.dig("+nocookie +tcp +short other.example.com").await.contains("192.0.2.7"));
}

#[tokio::test]
async fn forged_answers_are_passed_over() {
    let (upstream, _) = resolver(Habit::Forged).await;
    let running = Running::start(&[upstream]).await;
    for id in [1, 2] {
        let answer = running.ask(&question(id, "www.example.com", 1)).await;
        assert_eq!((&answer[..2], answer.last()), (&id.to_be_bytes()[..], Some(&7)), "{answer:?}");
    }
    assert_eq!(running.count(Event::Cached), 1);
}

#[tokio::test]
async fn the_next_resolver_is_asked_when_one_does_not_answer() {
    // A port that nobody listens on refuses at once.
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (failing, _) = resolver(Habit::ServFail).await;
    let (good, asked) = resolver(Habit::Good).await;
    let running = Running::start(&[closed, failing, good]).await;
    assert_eq!(rcode(&running.ask(&question(1, "a.example.com", 1)).await), 0);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    // A silent one costs its time and no more.
    let (silent, _) = resolver(Habit::Silent).await;
    let running = Running::start(&[silent, good]).await;
    assert_eq!(rcode(&running.ask(&question(1, "b.example.com", 1)).await), 0);
    // Where all fail, what one of them said is told.
    let running = Running::start(&[failing]).await;
    assert_eq!(rcode(&running.ask(&question(1, "a.example.com", 1)).await), 2);
    assert_eq!(running.count(Event::Relayed), 1);
}

#[tokio::test]
async fn an_answer_that_is_cut_short_is_not_kept() {
    let (upstream, asked) = resolver(Habit::Truncating).await;
    let running = Running::start(&[upstream]).await;
    for n in 1..=2 {
        let answer = running.ask(&question(n, "www.example.com", 1)).await;
        assert_eq!(answer[2] & 2, 2, "the client is told to come over TCP");
        assert_eq!(asked.load(Ordering::SeqCst), usize::from(n));
    }
}

#[tokio::test]
async fn without_any_resolver_the_clusterset_still_answers() {
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    // A server that never has one is asked for the wrong names (REFUSED); one whose resolver is away fails (SERVFAIL).
    for (upstreams, code, counted) in [(&[][..], 5, Event::Refused), (&[closed], 2, Event::UpstreamFailed)] {
        let running = Running::start(upstreams).await;
        assert_eq!(rcode(&running.ask(&question(1, "www.example.com", 1)).await), code);
        assert_eq!(rcode(&running.ask(&question(2, "web.shop.svc.clusterset.local", 1)).await), 0);
        assert_eq!((running.count(counted), running.count(Event::Answered)), (1, 1));
    }
}

#[tokio::test]
async fn whatever_is_sent_the_server_goes_on() {
    let (upstream, _) = resolver(Habit::Good).await;
    let running = Running::start(&[upstream]).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    // A small generator with a fixed seed: the same octets in each run.
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let base = question(7, "_http._tcp.web.shop.svc.clusterset.local", 33);
    for n in 0..2000 {
        let mut octets = base.clone();
        for _ in 0..random() % 4 {
            let at = random() as usize % octets.len();
            octets[at] = random() as u8;
        }
        if n % 3 == 0 {
            octets.truncate(random() as usize % octets.len());
        }
        socket.send_to(&octets, running.address).await.unwrap();
        // In step, so that nothing is lost in the socket's buffer.
        if n % 50 == 0 {
            assert_eq!(rcode(&running.ask(&base).await), 0);
        }
    }
    assert!(running.count(Event::Malformed) > 100);
    assert_eq!(rcode(&running.ask(&question(1, "web.shop.svc.clusterset.local", 1)).await), 0);
    // Two questions in one message get an answer that says so; an answer gets none.
    let mut two = base.clone();
    two[5] = 2;
    assert_eq!(rcode(&running.ask(&two).await), 1);
}

#[tokio::test]
async fn at_the_bound_questions_are_refused_and_counted() {
    let running = Running::start(&[]).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let slow = question(1, "web.slow.svc.clusterset.local", 1);
    let mut sent = 0;
    let mut buffer = [0; 512];
    // Until one is refused: some of the others may have been lost before they were read.
    let refused = loop {
        assert!(sent < 20 * WAITING_MAX, "nothing was refused");
        socket.send_to(&slow, running.address).await.unwrap();
        sent += 1;
        if let Ok(received) = timeout(Duration::from_micros(200), socket.recv(&mut buffer)).await {
            break received.unwrap();
        }
    };
    assert!(sent > WAITING_MAX && rcode(&buffer[..refused]) == 2);
    assert!(running.count(Event::Overloaded) >= 1);
}

#[tokio::test]
async fn connections_are_bounded_and_carry_one_question_after_the_other() {
    let running = Running::start(&[]).await;
    let mut first = TcpStream::connect(running.address).await.unwrap();
    let framed = |message: &[u8]| [&(message.len() as u16).to_be_bytes()[..], message].concat();
    let web = framed(&question(3, "web.shop.svc.clusterset.local", 1));
    for _ in 0..3 {
        // In two parts, as a network may bring it.
        first.write_all(&web[..5]).await.unwrap();
        first.write_all(&web[5..]).await.unwrap();
        let mut answer = vec![0; timeout(DEADLINE, first.read_u16()).await.unwrap().unwrap().into()];
        first.read_exact(&mut answer).await.unwrap();
        assert_eq!((answer[1], rcode(&answer)), (3, 0));
    }
    let mut held = Vec::new();
    while held.len() < CONNECTIONS_MAX {
        held.push(TcpStream::connect(running.address).await.unwrap());
    }
    running.until(Event::Overloaded, 1).await;
    let mut over = held.pop().unwrap();
    let closed = timeout(DEADLINE, over.read(&mut [0])).await.unwrap();
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    // Whoever was there before goes on.
    first.write_all(&web).await.unwrap();
    assert!(timeout(DEADLINE, first.read_u16()).await.unwrap().unwrap() > 12);
}

#[tokio::test]
async fn a_resolver_that_asks_back_is_found_and_left_alone() {
    let free = || Sockets::bind("127.0.0.1:0".parse().unwrap());
    let (here, there) = (free().await.unwrap(), free().await.unwrap());
    let (near, far) = (here.address(), there.address());
    let (near, far) = (Running::on(here, &[far]), Running::on(there, &[near]));
    for running in [&near, &far] {
        tokio::spawn(tombolo_dns::loops::watch(running.server.clone(), CancellationToken::new()));
    }
    near.until(Event::Looped, 1).await;
    far.until(Event::Looped, 1).await;
    // From the moment on at which the finding is acted upon, nothing goes round any more.
    let failed = async {
        loop {
            let before = far.events.lock().unwrap().len();
            let answer = near.ask(&question(7, "example.com", 1)).await;
            assert_eq!((answer[0], answer[1], answer[3] & 15), (0, 7, 2), "SERVFAIL");
            if far.events.lock().unwrap().len() == before {
                return;
            }
        }
    };
    timeout(DEADLINE, failed).await.expect("the resolver that asks back is still asked");
    assert!(near.count(Event::UpstreamFailed) > 0);
}
