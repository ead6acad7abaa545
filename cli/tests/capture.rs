//! `tombolo sidecar capture` in network namespaces of the test's own: what is redirected, what is left alone, and
//! that rules are whole, single and removable.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::process::Output;

use support::netns::{End, Namespace, permitted, tie};
use tokio::net::TcpListener;
use tombolo_sidecar::capture::origin::{OriginError, original_destination};

/// The user whose connections are captured; this process, which stands in for the sidecar, is root.
const APP: u32 = 65534;
const BACKENDS: [&str; 2] = ["nft", "iptables"];
const TOOLS: [&str; 4] = ["nft", "iptables-restore", "ip6tables-restore", "curl"];

/// A host with an application and a sidecar, and a host beyond.
struct Hosts {
    here: Namespace,
    beyond: Namespace,
}

impl Hosts {
    fn new() -> Self {
        let (here, beyond) = (Namespace::new(), Namespace::new());
        tie(
            "wire",
            End { namespace: &here, addresses: &["10.9.0.1/24", "fd09::1/64"] },
            End { namespace: &beyond, addresses: &["10.9.0.2/24", "fd09::2/64"] },
        );
        Self { here, beyond }
    }

    fn capture(&self, arguments: &[&str]) -> Output {
        let mut command = self.here.command(env!("CARGO_BIN_EXE_tombolo"));
        command.args(["sidecar", "capture"]).args(arguments).output().unwrap()
    }

    #[track_caller]
    fn captured(&self, arguments: &[&str]) -> String {
        let output = self.capture(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Every rule of the host that is about addresses, without counters and comments.
    fn rules(&self) -> String {
        let mut rules = Vec::new();
        for tool in ["iptables-save", "ip6tables-save"] {
            let saved = self.here.run(tool, &["-t", "nat"]);
            let of_ours = |line: &&str| !line.starts_with(['#', ':']) || line.starts_with(":TOMBOLO");
            rules.extend(saved.lines().filter(of_ours).map(str::to_owned));
        }
        if self.here.run("nft", &["list", "tables"]).contains("table inet tombolo") {
            rules.push(self.here.run("nft", &["list", "table", "inet", "tombolo"]));
        }
        rules.join("\n")
    }
}

/// Connects as the application would, and says where the connection was going that `sidecar` then took.
async fn origin(from: &Namespace, uid: u32, url: &str, sidecar: &TcpListener) -> Result<SocketAddr, OriginError> {
    let mut command = tokio::process::Command::from(from.command("setpriv"));
    let uid = uid.to_string();
    command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "curl", "-sS", "-m", "10", url]);
    let mut curl = command.kill_on_drop(true).spawn().unwrap();
    let (taken, _) = tokio::time::timeout(std::time::Duration::from_secs(10), sidecar.accept()).await.unwrap().unwrap();
    let origin = original_destination(&taken);
    drop(taken);
    let _ = curl.kill().await;
    origin
}

#[tokio::test]
async fn a_redirected_connection_keeps_its_original_destination() {
    let Some(()) = permitted(&TOOLS) else { return };
    for backend in BACKENDS {
        let hosts = Hosts::new();
        let out4 = hosts.here.listen("127.0.0.1:15002".parse().unwrap());
        let out6 = hosts.here.listen("[::1]:15002".parse().unwrap());
        // One socket for both families: IPv4 connections have mapped addresses in it.
        let inbound = hosts.here.listen("[::]:15006".parse().unwrap());
        hosts.captured(&["--backend", backend, "--exclude-uid", "0"]);
        let to: SocketAddr = "240.1.2.3:80".parse().unwrap();
        assert_eq!(origin(&hosts.here, APP, "http://240.1.2.3/", &out4).await.unwrap(), to, "{backend}");
        let to: SocketAddr = "[fd00:1::5]:8080".parse().unwrap();
        assert_eq!(origin(&hosts.here, APP, "http://[fd00:1::5]:8080/", &out6).await.unwrap(), to, "{backend}");
        let to: SocketAddr = "10.9.0.1:8080".parse().unwrap();
        assert_eq!(origin(&hosts.beyond, 0, "http://10.9.0.1:8080/", &inbound).await.unwrap(), to, "{backend}");
        let to: SocketAddr = "[fd09::1]:8080".parse().unwrap();
        assert_eq!(origin(&hosts.beyond, 0, "http://[fd09::1]:8080/", &inbound).await.unwrap(), to, "{backend}");
        // The same ports without a redirection: nobody was going anywhere else.
        let direct = origin(&hosts.here, APP, "http://127.0.0.1:15002/", &out4).await;
        assert!(matches!(direct, Err(OriginError::NotRedirected)), "{backend}: {direct:?}");
        let direct = origin(&hosts.beyond, 0, "http://10.9.0.1:15006/", &inbound).await;
        assert!(matches!(direct, Err(OriginError::NotRedirected)), "{backend}: {direct:?}");
    }
}

/// Answers every HTTP request with a name.
async fn site(name: &'static str, listener: TcpListener) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let _ = stream.read(&mut [0; 1024]).await;
            let answer =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{name}", name.len());
            let _ = stream.write_all(answer.as_bytes()).await;
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_excluded_reaches_its_destination() {
    let Some(()) = permitted(&TOOLS) else { return };
    for backend in BACKENDS {
        let hosts = Hosts::new();
        for address in ["127.0.0.1:15002", "[::1]:15002", "[::]:15006"] {
            tokio::spawn(site("sidecar", hosts.here.listen(address.parse().unwrap())));
        }
        for port in [80, 81, 82] {
            tokio::spawn(site("app", hosts.here.listen(SocketAddr::from(([0; 16], port)))));
            tokio::spawn(site("beyond", hosts.beyond.listen(SocketAddr::from(([0; 16], port)))));
        }
        hosts.beyond.ip(&["address", "add", "10.9.1.2/32", "dev", "lo"]);
        hosts.beyond.ip(&["address", "add", "10.9.2.2/32", "dev", "wire"]);
        hosts.here.ip(&["address", "add", "10.9.2.1/32", "dev", "wire"]);
        let (here, beyond) = (&hosts.here, &hosts.beyond);
        let excludes = [
            ["--exclude-uid", "0"],
            ["--exclude-gid", "1000"],
            ["--exclude-outbound-range", "10.9.1.0/24,fd09::2"],
            ["--exclude-outbound-port", "82"],
            ["--exclude-inbound-range", "10.9.2.2"],
            ["--exclude-inbound-port", "81"],
        ];
        hosts.captured(&[&["--backend", backend][..], excludes.as_flattened()].concat());
        for (from, uid, url, want) in [
            (here, APP, "http://10.9.0.2/", "sidecar"),
            (here, APP, "http://10.9.0.2:81/", "sidecar"),
            (here, APP, "http://10.9.0.2:82/", "beyond"),
            (here, APP, "http://[fd09::2]/", "beyond"),
            (here, APP, "http://10.9.1.2/", "beyond"),
            (here, 0, "http://10.9.0.2/", "beyond"),
            (here, 1000, "http://10.9.0.2/", "beyond"),
            // An application that calls itself needs nobody in between.
            (here, APP, "http://127.0.0.1/", "app"),
            (here, APP, "http://10.9.0.1/", "app"),
            (here, APP, "http://[fd09::1]/", "app"),
            (beyond, 0, "http://10.9.0.1/", "sidecar"),
            (beyond, 0, "http://[fd09::1]/", "sidecar"),
            (beyond, 0, "http://10.9.0.1:81/", "app"),
            (beyond, 0, "http://10.9.2.1/", "sidecar"),
        ] {
            let output = from.curl_as(uid, &[url]);
            let said = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert_eq!(said.0, want, "{backend}: {uid} to {url}: {}", said.1);
        }
        let from_excluded = beyond.curl_as(0, &["--interface", "10.9.2.2", "http://10.9.0.1/"]);
        assert_eq!(String::from_utf8_lossy(&from_excluded.stdout), "app", "{backend}");
    }
}

#[test]
fn rules_are_whole_single_and_removable() {
    let Some(()) = permitted(&TOOLS) else { return };
    let hosts = Hosts::new();
    hosts.here.run("iptables", &["-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.7", "-j", "ACCEPT"]);
    let before = hosts.rules();
    for backend in BACKENDS {
        let arguments = ["--backend", backend, "--exclude-uid", "1337", "--exclude-uid", "nobody", "--dns"];
        assert!(hosts.captured(&arguments).contains("DNS to port 15053"));
        let once = hosts.rules();
        assert!(once.contains("15002") && once.contains("15006") && once.contains("15053"), "{once}");
        // Another plan in between, so that the second time is no mere repetition.
        hosts.captured(&["--backend", backend, "--only", "inbound", "--inbound-port", "1"]);
        let between = hosts.rules();
        assert!(!between.contains("15053") && !between.contains("15002"), "{between}");
        hosts.captured(&arguments);
        assert_eq!(hosts.rules(), once, "{backend}");
        hosts.captured(&arguments);
        assert_eq!(hosts.rules(), once, "{backend}");
        hosts.captured(&["--remove"]);
        assert_eq!(hosts.rules(), before, "{backend}");
        hosts.captured(&["--remove", "--backend", backend]);
        assert_eq!(hosts.rules(), before, "{backend}");
    }
    // One backend's rules replace the other's.
    hosts.captured(&["--backend", "iptables", "--exclude-uid", "1337"]);
    hosts.captured(&["--backend", "nft", "--exclude-uid", "1337"]);
    assert!(!hosts.rules().contains("TOMBOLO"), "{}", hosts.rules());
    hosts.captured(&["--backend", "iptables", "--exclude-uid", "1337"]);
    assert!(!hosts.rules().contains("table inet tombolo"), "{}", hosts.rules());
    hosts.captured(&["--remove"]);
    assert_eq!(hosts.rules(), before);
}

#[test]
fn a_dry_run_prints_what_the_tools_take_and_changes_nothing() {
    let Some(()) = permitted(&TOOLS) else { return };
    let hosts = Hosts::new();
    let before = hosts.rules();
    let excludes =
        ["--exclude-uid", "1337", "--exclude-interface", "veth*,docker0", "--exclude-outbound-range", "fd00::/8"];
    let text = hosts.captured(&[&["--dry-run", "--dns"][..], &excludes].concat());
    assert_eq!(hosts.rules(), before);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &text).unwrap();
    let path = file.path().to_str().unwrap();
    hosts.here.run("nft", &["-c", "-f", path]);
    hosts.here.run("nft", &["-f", path]);
    let by_hand = hosts.here.run("nft", &["list", "ruleset"]);
    hosts.captured(&[&["--dns"][..], &excludes].concat());
    assert_eq!(hosts.here.run("nft", &["list", "ruleset"]), by_hand);
    let text = hosts.captured(&[&["--dry-run", "--backend", "iptables"][..], &excludes].concat());
    let (v4, v6) = text.split_once("# ip6tables-restore --noflush\n").unwrap();
    for (tool, text) in [("iptables-restore", v4), ("ip6tables-restore", v6)] {
        std::fs::write(file.path(), text).unwrap();
        hosts.here.run(tool, &["--test", "--noflush", path]);
    }
}

#[test]
fn refusals_name_the_cause_and_the_fix() {
    let Some(()) = permitted(&TOOLS) else { return };
    let hosts = Hosts::new();
    let before = hosts.rules();
    for (arguments, said) in [
        (&[][..], "--exclude-uid, --exclude-gid or --exclude-cgroup"),
        (&["--exclude-uid", "no-such-user"], "this host knows no user"),
        (&["--exclude-uid", "1", "--exclude-outbound-range", "10.0.0.0/99"], "is no address range"),
        (&["--exclude-uid", "1", "--exclude-interface", "a b"], "is no interface name"),
        (&["--exclude-uid", "1", "--inbound-port", "15002"], "port 15002 is to take two kinds of connections"),
        (&["--only", "inbound", "--dns"], "leave out one of both"),
        (&["--exclude-cgroup", "no/such/cgroup"], "is there a cgroup"),
    ] {
        let output = hosts.capture(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && errors.contains(said), "{arguments:?}: {errors}");
        assert_eq!(hosts.rules(), before, "{arguments:?}");
    }
    let tombolo = env!("CARGO_BIN_EXE_tombolo");
    for backend in BACKENDS {
        let run = |wrapper: &[&str]| {
            let mut command = hosts.here.command(wrapper[0]);
            command.args(&wrapper[1..]).args([
                tombolo,
                "sidecar",
                "capture",
                "--exclude-uid",
                "1",
                "--backend",
                backend,
            ]);
            let output = command.output().unwrap();
            assert!(!output.status.success(), "{wrapper:?}");
            String::from_utf8_lossy(&output.stderr).into_owned()
        };
        let errors = run(&["env", "PATH=/nowhere"]);
        assert!(errors.contains("is not installed: apt-get install"), "{errors}");
        let errors = run(&["setpriv", "--bounding-set=-net_admin"]);
        assert!(errors.contains("the capability NET_ADMIN"), "{errors}");
        assert_eq!(hosts.rules(), before);
    }
}
