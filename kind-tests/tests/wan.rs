//! The emulator against itself: real sockets in two namespaces, and what a link does to their datagrams.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tombolo_kind_tests::lacks;
use tombolo_kind_tests::wan::{Conditions, End, Side, Wan};
use tombolo_testbed::Namespace;

const MS: Duration = Duration::from_millis(1);
/// Octets of a datagram whose packet, with the headers of IP and UDP, has 1,000.
const PAYLOAD: usize = 972;

/// Two namespaces and a link between them.
struct Pair {
    a: Namespace,
    b: Namespace,
    wan: Wan,
}

impl Pair {
    /// `None` where the machine lacks something, which is named; a failure where everything must run.
    fn join() -> Option<Self> {
        Self::join_at(&["10.9.0.1/24", "10.9.0.3/24"], &["10.9.0.2/24"])
    }

    fn join_at(addresses_a: &[&str], addresses_b: &[&str]) -> Option<Self> {
        if let Some(lack) = lacks() {
            assert!(std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(), "this test needs {lack}");
            println!("skipped: needs {lack}");
            return None;
        }
        let (a, b) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        let end_a = End { namespace: &a, device: "wan0", addresses: addresses_a };
        let end_b = End { namespace: &b, device: "wan0", addresses: addresses_b };
        Some(Self { wan: Wan::join(end_a, end_b, 1).unwrap(), a, b })
    }

    fn change(&self, texts: &[&str]) {
        for text in texts {
            let (side, change) = Conditions::parse(text).unwrap();
            self.wan.change(side, change);
        }
    }

    /// A socket in each, connected to the other.
    fn sockets(&self, a: &str, b: &str) -> (UdpSocket, UdpSocket) {
        let a = socket(&self.a, a);
        let b = socket(&self.b, b);
        a.connect(b.local_addr().unwrap()).unwrap();
        b.connect(a.local_addr().unwrap()).unwrap();
        (a, b)
    }
}

fn socket(namespace: &Namespace, address: &str) -> UdpSocket {
    let address: SocketAddr = address.parse().unwrap();
    let socket = namespace.within(|| UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(500 * MS)).unwrap();
    socket
}

/// Sends one datagram and waits for it at the other end.
fn passes(from: &UdpSocket, to: &UdpSocket) -> Option<Duration> {
    let sent = Instant::now();
    from.send(&[1; PAYLOAD]).unwrap();
    to.recv(&mut [0; 2000]).ok().map(|_| sent.elapsed())
}

/// Sends `count` datagrams in a row; when each that arrives does.
fn burst(from: &UdpSocket, to: &UdpSocket, count: u32, gap: Duration) -> Vec<Duration> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..count {
                if let Some(early) = (gap * n).checked_sub(start.elapsed()) {
                    std::thread::sleep(early);
                }
                from.send(&[1; PAYLOAD]).unwrap();
            }
        });
        let mut arrived = Vec::new();
        while to.recv(&mut [0; 2000]).is_ok() {
            arrived.push(start.elapsed());
        }
        arrived
    })
}

#[test]
fn packets_take_the_delay_in_each_direction() {
    let Some(pair) = Pair::join_at(&["10.9.0.1/24", "fd09::1/64"], &["10.9.0.2/24", "fd09::2/64"]) else { return };
    for (a, b) in [("10.9.0.1:0", "10.9.0.2:0"), ("[fd09::1]:0", "[fd09::2]:0")] {
        pair.change(&["a.delay-ms=30", "b.delay-ms=5"]);
        let (a, b) = pair.sockets(a, b);
        // A busy machine makes single packets later, never earlier.
        let fastest = |from, to| (0..20).map(|_| passes(from, to).unwrap()).min().unwrap();
        let (there, back) = (fastest(&a, &b), fastest(&b, &a));
        assert!(there >= 30 * MS && there < 33 * MS, "{there:?}");
        assert!(back >= 5 * MS && back < 8 * MS, "{back:?}");
        pair.change(&["delay-ms=0"]);
        assert!(fastest(&a, &b) < 3 * MS);
    }
}

#[test]
fn jitter_spreads_the_delay() {
    let Some(pair) = Pair::join() else { return };
    pair.change(&["delay-ms=10", "jitter-ms=20"]);
    let (a, b) = pair.sockets("10.9.0.1:0", "10.9.0.2:0");
    let mut delays: Vec<Duration> = (0..60).map(|_| passes(&a, &b).unwrap()).collect();
    delays.sort();
    assert!(delays[0] >= 10 * MS && delays[0] < 15 * MS, "{delays:?}");
    assert!(delays[30] > 14 * MS && delays[55] > 24 * MS, "{delays:?}");
}

#[test]
fn the_share_that_is_lost_is_the_one_that_was_asked_for() {
    let Some(pair) = Pair::join() else { return };
    pair.change(&["a.loss=0.1"]);
    let (a, b) = pair.sockets("10.9.0.1:0", "10.9.0.2:0");
    let arrived = burst(&a, &b, 4000, MS / 5).len();
    let (counts, _) = pair.wan.counts();
    assert_eq!(counts.arrived + counts.lost, 4000, "{counts:?}");
    assert_eq!(counts.arrived, arrived as u64, "{counts:?}");
    assert!((320..480).contains(&counts.lost), "{counts:?}");
    assert!((0..20).all(|_| passes(&b, &a).is_some()), "the other direction loses nothing");
}

#[test]
fn the_rate_paces_and_the_queue_is_bounded() {
    let Some(pair) = Pair::join() else { return };
    // 1,000 packets of 1,000 octets at 16 Mbit/s take half a second.
    pair.change(&["a.rate-mbit=16", "a.queue-kb=2000"]);
    let (a, b) = pair.sockets("10.9.0.1:0", "10.9.0.2:0");
    let arrived = burst(&a, &b, 1000, Duration::ZERO);
    let last = *arrived.last().unwrap();
    assert_eq!(arrived.len(), 1000, "{:?}", pair.wan.counts());
    assert!((500 * MS..600 * MS).contains(&last), "{last:?}");
    // At 0.8 Mbit/s one takes 10 ms, and ten have room.
    pair.change(&["a.rate-mbit=0.8", "a.queue-kb=10"]);
    let arrived = burst(&a, &b, 100, Duration::ZERO).len();
    assert!((10..=13).contains(&arrived), "{arrived}");
}

#[test]
fn a_cut_lets_nothing_pass_until_it_ends() {
    let Some(pair) = Pair::join() else { return };
    let (a, b) = pair.sockets("10.9.0.1:0", "10.9.0.2:0");
    b.set_read_timeout(Some(50 * MS)).unwrap();
    a.set_read_timeout(Some(50 * MS)).unwrap();
    for (cut, there, back) in
        [("cut=on", false, false), ("a.cut=off", true, false), ("cut=off", true, true), ("a.cut=on", false, true)]
    {
        pair.change(&[cut]);
        assert_eq!((passes(&a, &b).is_some(), passes(&b, &a).is_some()), (there, back), "{cut}");
    }
}

#[test]
fn a_dark_address_is_cut_off_alone() {
    let Some(pair) = Pair::join() else { return };
    let (a, b) = pair.sockets("10.9.0.1:0", "10.9.0.2:0");
    let (other, far) = pair.sockets("10.9.0.3:0", "10.9.0.2:0");
    pair.wan.change(Side::Both, |conditions| {
        conditions.dark.insert([10, 9, 0, 1].into());
    });
    for socket in [&a, &b] {
        socket.set_read_timeout(Some(50 * MS)).unwrap();
    }
    assert_eq!((passes(&a, &b), passes(&b, &a)), (None, None));
    assert!(passes(&other, &far).is_some() && passes(&far, &other).is_some());
    pair.change(&["lit=10.9.0.1"]);
    assert!(passes(&a, &b).is_some());
}

#[test]
fn the_kernel_answers_for_a_closed_port() {
    let Some(pair) = Pair::join() else { return };
    let (a, b) = pair.sockets("10.9.0.1:0", "10.9.0.2:0");
    drop(b);
    a.send(&[1]).unwrap();
    let error = a.recv(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn namespaces_see_nothing_of_each_other_or_of_this_one() {
    let Some(pair) = Pair::join() else { return };
    let outside = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = outside.local_addr().unwrap();
    for namespace in [&pair.a, &pair.b] {
        let refused = namespace.within(|| std::net::TcpStream::connect(address)).unwrap().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        // The same address and port is free in both.
        namespace.within(|| std::net::TcpListener::bind(address)).unwrap().unwrap();
    }
    let panicked = std::panic::catch_unwind(|| pair.a.within(|| panic!("inside")));
    assert!(panicked.is_err());
    std::net::TcpStream::connect(address).expect("this thread is back");
    drop(pair.wan);
    assert!(!pair.a.ip(&["link"]).unwrap().contains("wan0"), "the device outlived its link");
}

/// Removed with its namespaces, whatever becomes of the test.
struct Named([String; 2]);

impl Drop for Named {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

#[test]
fn the_program_takes_its_conditions_from_stdin() {
    if lacks().is_some() {
        return drop(Pair::join());
    }
    let named = Named(["a", "b"].map(|end| format!("tombolo-test-{}-{end}", std::process::id())));
    for name in &named.0 {
        assert!(Command::new("ip").args(["netns", "add", name]).status().unwrap().success());
    }
    let [a, b] = named.0.each_ref().map(|name| Namespace::named(name).unwrap());
    let mut wan = Command::new(env!("CARGO_BIN_EXE_wan"))
        .args(&named.0)
        .arg("delay-ms=20")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = wan.stdin.take().unwrap();
    let mut lines = BufReader::new(wan.stdout.take().unwrap()).lines();
    let mut answer = || lines.next().unwrap().unwrap();
    assert_eq!(answer(), "ready");
    let (a, b) = (socket(&a, "10.77.0.1:0"), socket(&b, "10.77.0.2:0"));
    a.connect(b.local_addr().unwrap()).unwrap();
    assert!(passes(&a, &b).unwrap() >= 20 * MS);
    writeln!(stdin, "delay-ms=40 b.cut=on").unwrap();
    assert_eq!(answer(), "ok");
    assert!(passes(&a, &b).unwrap() >= 40 * MS);
    writeln!(stdin, "delay-ms=0 loss=most").unwrap();
    assert_eq!(answer(), "error: `loss=most`: not a number: invalid float literal");
    assert!(passes(&a, &b).unwrap() >= 40 * MS, "a line holds as a whole or not at all");
    writeln!(stdin, "counts").unwrap();
    assert_eq!(answer(), "a: Counts { arrived: 3, lost: 0, dropped: 0, severed: 0 }");
    drop(stdin);
    assert!(wan.wait().unwrap().success());
}
