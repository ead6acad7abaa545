//! Host names of gateways: looked up in a DNS server, followed when they move, kept when nobody answers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use crate::support::*;

const NAME: &str = "gw.east.example";
/// In seconds.
const TTL: u32 = 1;

type Zone = BTreeMap<&'static str, Vec<IpAddr>>;

/// A DNS server on loopback.
struct Dns {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    broken: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

impl Dns {
    async fn start(addresses: &[&str]) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (address, zone) = (socket.local_addr().unwrap(), Arc::<Mutex<Zone>>::default());
        let (broken, asked) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut serving = JoinSet::new();
        serving.spawn(serve(socket, zone.clone(), broken.clone(), asked.clone()));
        let dns = Self { address, zone, broken, asked, _serving: serving };
        dns.says(addresses);
        dns
    }

    fn says(&self, addresses: &[&str]) {
        self.zone.lock().unwrap().insert(NAME, addresses.iter().map(|address| address.parse().unwrap()).collect());
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn serve(socket: UdpSocket, zone: Arc<Mutex<Zone>>, broken: Arc<AtomicBool>, asked: Arc<AtomicUsize>) {
    let mut octets = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut octets).await {
        asked.fetch_add(1, Ordering::Relaxed);
        let query = Message::from_vec(&octets[..length]).unwrap();
        let question = query.queries[0].clone();
        let mut answer = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
        answer.metadata.recursion_available = true;
        let name = question.name().to_string();
        let known = zone.lock().unwrap().get(name.trim_end_matches('.')).cloned().unwrap_or_default();
        if broken.load(Ordering::Relaxed) {
            answer.metadata.response_code = ResponseCode::ServFail;
        }
        for ip in known.iter().filter(|_| !broken.load(Ordering::Relaxed)) {
            let data = match (ip, question.query_type()) {
                (IpAddr::V4(ip), RecordType::A) => RData::A(A(*ip)),
                (IpAddr::V6(ip), RecordType::AAAA) => RData::AAAA(AAAA(*ip)),
                _ => continue,
            };
            answer.add_answer(Record::from_rdata(question.name().clone(), TTL, data));
        }
        answer.add_query(question);
        socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
    }
}

/// East with a path at each of these addresses, all at one port; west knows it by its name.
struct Named {
    east: Cluster,
    _east_node: Node,
    west_node: Node,
    paths: Vec<Path>,
    dns: Dns,
}

impl Named {
    async fn start(paths_at: &[&str], dns: Dns) -> Self {
        let (east, west) = (Cluster::new("east"), Cluster::new("west"));
        let mut east_node = Node::start(&east, "gw-e", &[&west]).await;
        east_node.delivers("shop/web", 80, Sidecar::new().await.echo(), &[&west]);
        let mut paths: Vec<Path> = Vec::new();
        for ip in paths_at {
            let port = paths.first().map_or(0, |path| path.address.port());
            paths.push(Path::at(SocketAddr::new(ip.parse().unwrap(), port), east_node.tunnel).await);
        }
        let options = NodeOptions { resolvers: vec![dns.address], tunnel: any_address(), ..Default::default() };
        let mut west_node = Node::start_with(&west, "gw-w", &[&east], options).await;
        west_node.dials_at(&east, "gw-e", format!("{NAME}:{}", paths[0].address.port()));
        west_node.linked(&east).await;
        east_node.linked(&west).await;
        Self { east, _east_node: east_node, west_node, paths, dns }
    }

    /// Where the tunnel that takes new legs goes.
    fn goes_to(&self) -> Option<IpAddr> {
        let tunnel = self.west_node.gateway().registry.usable(&self.east.id, &"gw-e".parse().unwrap())?;
        Some(tunnel.remote_address().ip())
    }

    fn dial(&self) -> tombolo_gateway::gateway::LastDial {
        let dials = self.west_node.gateway().dials.lock().unwrap();
        dials.values().next().cloned().unwrap_or_default()
    }
}

/// Reaches every address of loopback, as a gateway's socket does.
fn any_address() -> SocketAddr {
    "0.0.0.0:0".parse().unwrap()
}

/// Opens legs without a pause until it is stopped; counts those that did their work.
async fn load(ingress: SocketAddr, stop: Arc<AtomicBool>) -> usize {
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        let (mut leg, status) = open(ingress, WEB).await;
        status.unwrap_or_else(|refused| panic!("leg {done}: {refused:?}"));
        echoes(&mut leg, "a request").await;
        done += 1;
    }
    done
}

#[tokio::test]
async fn a_name_that_moves_is_followed_and_no_request_is_lost() {
    let dns = Dns::start(&["127.0.0.1"]).await;
    let named = Named::start(&["127.0.0.1", "127.0.0.2"], dns).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut loads = JoinSet::new();
    for _ in 0..4 {
        loads.spawn(load(named.west_node.ingress, stop.clone()));
    }
    let mut standing = named.west_node.accepted(WEB).await;
    echoes(&mut standing, "before").await;

    named.dns.says(&["127.0.0.2"]);
    let second: IpAddr = "127.0.0.2".parse().unwrap();
    eventually("the tunnel moves", || named.goes_to() == Some(second)).await;
    echoes(&mut standing, "still over the old one").await;
    assert_eq!(named.west_node.gateway().registry.all().len(), 2, "the old one serves until its legs are done");
    drop(standing);
    eventually("the old one retires", || named.west_node.gateway().registry.all().len() == 1).await;
    named.paths[0].cut();
    echoes(&mut named.west_node.accepted(WEB).await, "over the new one").await;

    stop.store(true, Ordering::Relaxed);
    let done: usize = loads.join_all().await.into_iter().sum();
    assert!(done > 20, "{done}");
}

#[tokio::test]
async fn a_name_that_nobody_resolves_any_more_keeps_its_addresses() {
    let named = Named::start(&["127.0.0.1"], Dns::start(&["127.0.0.1"]).await).await;
    named.dns.broken.store(true, Ordering::Relaxed);
    let asked = named.dns.asked();
    eventually("it is asked for again when its time is over", || named.dns.asked() > asked).await;
    let number = named.west_node.gateway().registry.all()[0].number;
    named.west_node.gateway().registry.all()[0].connection.close(0_u32.into(), b"test");
    let again = || named.west_node.gateway().registry.all().iter().any(|tunnel| tunnel.number > number);
    eventually("it is dialled at the last good address", again).await;
    echoes(&mut named.west_node.accepted(WEB).await, "again").await;
    assert_eq!(named.dial().addresses, [named.paths[0].address]);
}

#[tokio::test]
async fn each_address_of_a_name_is_tried() {
    // Nobody is at the first, and the socket is of the other family than the last.
    let dns = Dns::start(&["127.0.0.9", "127.0.0.1", "::1"]).await;
    let named = Named::start(&["127.0.0.1"], dns).await;
    assert_eq!(named.goes_to(), Some("127.0.0.1".parse().unwrap()));
    assert_eq!(named.dial().addresses.len(), 3);
    assert_eq!(named.dial().error, None);
}

#[tokio::test]
async fn what_does_not_resolve_is_said() {
    let dns = Dns::start(&[]).await;
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let options = NodeOptions { resolvers: vec![dns.address], ..Default::default() };
    let mut west_node = Node::start_with(&west, "gw-w", &[&east], options).await;
    west_node.dials_at(&east, "gw-e", format!("{NAME}:1"));
    let said = |part: &str| {
        let dials = west_node.gateway().dials.lock().unwrap();
        dials.values().any(|dial| dial.error.as_ref().is_some_and(|error| error.contains(part)))
    };
    eventually("why", || said("gw.east.example:1 does not resolve")).await;
    // And looked up again while it is not dialled.
    let asked = dns.asked();
    eventually("another look-up", || dns.asked() > asked + 2).await;
    tokio::time::timeout(Duration::from_secs(1), west_node.running.gateway.resolver.lookup("nonsense"))
        .await
        .unwrap()
        .unwrap_err();
}
