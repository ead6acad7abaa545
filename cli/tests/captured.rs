//! Applications that know nothing of tombolo call across clusters: `tombolo sidecar capture` redirects their DNS queries
//! and their connections. Two hosts, each a network namespace with a whole cluster in it; all that leaves the one
//! arrives at the other, which listens to every address there is and notes what comes in plaintext.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::json;
use support::netns::{End, Namespace, permitted, tie};
use support::{World, app, binary, link, resolver, serve, until};
use tokio::net::{TcpListener, UdpSocket};
use tombolo_testbed::{Cluster, Sidecar};

/// Whom applications run as; everything of tombolo is root, whose connections are not captured.
const APP: u32 = 65534;
const TOOLS: [&str; 4] = ["nft", "iptables-restore", "ip6tables-restore", "curl"];
const WEB: &str = "http://web.shop.svc.clusterset.local";
/// What all ordinary names lead to.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// What a plaintext site was asked, by the address that each caller wanted.
type Heard = Arc<Mutex<Vec<IpAddr>>>;

struct Hosts {
    here: Namespace,
    there: Namespace,
    east: Cluster,
    west: Cluster,
    heard: Heard,
    files: PathBuf,
    _app: app::App,
    _world: World,
}

impl Hosts {
    /// `shop/web` runs in the west, which hears all plaintext; `frontend` captures in the east.
    async fn start() -> Self {
        let world = World::new().await;
        let (here, there) = (Namespace::new(), Namespace::new());
        tie(
            "wire",
            End { namespace: &here, addresses: &["10.9.0.1/24", "fd09::1/64"] },
            End { namespace: &there, addresses: &["10.9.0.2/24", "fd09::2/64"] },
        );
        // Whatever is sent to a virtual address in plaintext would be heard.
        there.ip(&["route", "add", "local", "240.0.0.0/4", "dev", "lo"]);
        there.ip(&["-6", "route", "add", "local", "fd74:6f6d:626f::/48", "dev", "lo"]);
        let heard = Heard::default();
        for port in [80, 81] {
            tokio::spawn(site("plain", there.listen(SocketAddr::from(([0; 16], port))), heard.clone()));
        }
        let socket = there.0.within(|| std::net::UdpSocket::bind((ELSEWHERE, 53))).unwrap().unwrap();
        socket.set_nonblocking(true).unwrap();
        tokio::spawn(resolver::run(UdpSocket::from_std(socket).unwrap(), ELSEWHERE));

        let cluster = async |name: &str, namespace: &Namespace, address: &str| {
            let binary = binary().inside(&namespace.0);
            let mut cluster = Cluster::new(&binary, name, world.directory.path(), json!({})).unwrap();
            cluster.start_federation(json!({})).await.unwrap();
            cluster.start_gateway("gw", json!({ "tunnel": address, "advertise": [address] })).await.unwrap();
            cluster
        };
        let mut east = cluster("east", &here, "10.9.0.1:0").await;
        let mut west = cluster("west", &there, "10.9.0.2:0").await;
        let app = app::http_on("west-web", there.listen("127.0.0.1:0".parse().unwrap()));
        serve(&mut west, "web", "http", "http", app.address).await;
        west.operator(&["export", "shop/web"]).await.unwrap();
        link(&east, &west).await;
        let config = json!({ "capture": {}, "dns": { "upstreams": [SocketAddr::from((ELSEWHERE, 53))] } });
        let sidecar = Sidecar { name: "frontend", workload: "shop/frontend", config };
        east.start_sidecar(sidecar).await.unwrap();
        let files = world.directory.path().to_owned();
        Self { here, there, east, west, heard, files, _app: app, _world: world }
    }

    fn capture(&self, backend: &str) {
        let arguments = ["sidecar", "capture", "--backend", backend, "--exclude-uid", "0", "--dns"];
        self.here.run(env!("CARGO_BIN_EXE_tombolo"), &arguments);
    }

    /// What an application's ordinary `curl` gets: its status (0 for none) and the body, or what it said instead.
    /// `resolv_conf` is the application's, and names nobody who would answer.
    fn curl(&self, resolv_conf: &str, arguments: &[&str]) -> (u16, String) {
        let file = self.files.join("resolv.conf");
        std::fs::write(&file, resolv_conf).unwrap();
        let output = self.here.curl_resolving(APP, &file, &[&["-w", "\n%{http_code}"], arguments].concat());
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap_or_default();
        let status = status.parse().unwrap_or(0);
        let body = if status == 0 { String::from_utf8_lossy(&output.stderr).into_owned() } else { body.to_owned() };
        (status, body)
    }

    #[track_caller]
    fn check(&self, resolv_conf: &str, arguments: &[&str], says: &str) {
        let (status, body) = self.curl(resolv_conf, arguments);
        assert!(status == 200 && body.contains(says), "{arguments:?} with {resolv_conf:?}: {status} {body}");
    }

    /// Nothing that was meant for the mesh has arrived anywhere in plaintext.
    #[track_caller]
    fn nothing_leaked(&self) {
        let heard = self.heard.lock().unwrap();
        let ordinary = ["10.9.0.2".parse().unwrap(), "fd09::2".parse().unwrap()];
        assert!(heard.iter().all(|wanted| ordinary.contains(wanted)), "{heard:?}");
    }

    /// An address of the service, as the sidecar's DNS tells it.
    fn address(&self, record: &str) -> IpAddr {
        let name = WEB.strip_prefix("http://").unwrap();
        self.here.run("dig", &["+short", "@127.0.0.1", "-p", "15053", record, name]).trim().parse().unwrap()
    }
}

/// Answers every request, to whatever address it was sent, and notes that address.
async fn site(name: &'static str, listener: TcpListener, heard: Heard) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    while let Ok((mut stream, _)) = listener.accept().await {
        heard.lock().unwrap().push(stream.local_addr().unwrap().ip().to_canonical());
        tokio::spawn(async move {
            let _ = stream.read(&mut [0; 1024]).await;
            let answer =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{name}", name.len());
            let _ = stream.write_all(answer.as_bytes()).await;
        });
    }
}

/// Resolvers that nobody answers at; the last ones are asked over TCP.
const RESOLVERS: [&str; 4] = [
    "nameserver 198.51.100.53\n",
    "nameserver 2001:db8::53\n",
    "nameserver 198.51.100.53\noptions use-vc\n",
    "nameserver 2001:db8::53\noptions use-vc\n",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_knows_of_nothing_reaches_another_cluster() {
    let Some(()) = permitted(&[&TOOLS[..], &["dig"]].concat()) else { return };
    let mut hosts = Hosts::start().await;
    // The trap works: without capture, what is sent to a virtual address is heard.
    hosts.check(RESOLVERS[0], &["http://240.1.0.99/"], "plain");
    hosts.check(RESOLVERS[0], &["http://[fd74:6f6d:626f::99]/"], "plain");
    hosts.heard.lock().unwrap().clear();

    for backend in ["iptables", "nft"] {
        hosts.capture(backend);
        until("the remote cluster to answer", async || {
            let (status, body) = hosts.curl(RESOLVERS[0], &[WEB]);
            (status == 200 && body.contains("west-web")).then_some(())
        })
        .await;
        for resolver in RESOLVERS {
            hosts.check(resolver, &["-4", WEB], "west-web");
            hosts.check(resolver, &["-6", WEB], "west-web");
            // Not of the mesh: the name is resolved as before, and the connection goes there.
            hosts.check(resolver, &["http://www.example.com/"], "plain");
        }
        hosts.check(RESOLVERS[0], &["http://10.9.0.2:81/"], "plain");
        hosts.check(RESOLVERS[0], &["http://[fd09::2]/"], "plain");
        assert_eq!(hosts.curl(RESOLVERS[0], &["http://none.shop.svc.clusterset.local/"]).0, 0, "no such name");
        // Plaintext that comes in reaches the application, too.
        let own = hosts.here.listen("10.9.0.1:8080".parse().unwrap());
        let own = tokio::spawn(site("east-app", own, Heard::default()));
        let output = hosts.there.curl_as(APP, &["http://10.9.0.1:8080/"]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "east-app");
        own.abort();
    }
    hosts.nothing_leaked();

    // Of the mesh, but not to be carried.
    let (v4, v6) = (hosts.address("A"), hosts.address("AAAA"));
    let (status, body) = hosts.curl(RESOLVERS[0], &[&format!("{WEB}:81/")]);
    assert!(status != 200, "no such port: {body}");
    for unassigned in ["http://240.1.0.99/", "http://[fd74:6f6d:626f::99]/"] {
        let (status, said) = hosts.curl(RESOLVERS[0], &[unassigned]);
        // Reset, which curl may meet in its connect already.
        let refused = said.contains("reset") || said.contains("(7) Failed to connect");
        assert!(status == 0 && refused, "{unassigned}: {status} {said}");
    }
    hosts.west.kill("web").await.unwrap();
    for family in ["-4", "-6"] {
        let (status, body) = hosts.curl(RESOLVERS[0], &[family, WEB]);
        assert_eq!(status, 503, "{body}");
    }
    // Without a sidecar, too: connections are redirected to nobody.
    hosts.east.kill("frontend").await.unwrap();
    for address in [SocketAddr::from((v4, 80)), SocketAddr::from((v6, 80))] {
        let (status, said) = hosts.curl(RESOLVERS[0], &[&format!("http://{address}/")]);
        assert!(status == 0 && said.contains("onnect"), "{address}: {status} {said}");
    }
    hosts.nothing_leaked();
    hosts.here.run(env!("CARGO_BIN_EXE_tombolo"), &["sidecar", "capture", "--remove"]);
    hosts.check(RESOLVERS[0], &["http://10.9.0.2/"], "plain");
    hosts.east.stop().await;
    hosts.west.stop().await;
}
