//! Network namespaces of a test's own. Each lives exactly as long as one child process of the test, which ends with
//! the test however that ends, so nothing is ever left behind: no named namespace, no interface, no rule.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use nix::sched::{CloneFlags, setns};

/// An empty network namespace with its loopback up.
pub struct Namespace {
    holder: Child,
}

/// What a namespaced test needs beside root; `None` skips the test by name, unless everything must run.
pub fn permitted(tools: &[&str]) -> Option<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = |tool: &&&str| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file());
    if let Some(missing) = ["ip", "nsenter", "unshare", "setpriv"].iter().chain(tools).find(|tool| !installed(tool)) {
        super::skip(&format!("{missing} (Debian: iproute2, util-linux, nftables, iptables, curl)"));
        return None;
    }
    if !nix::unistd::geteuid().is_root() {
        super::skip("root, to make network namespaces");
        return None;
    }
    Some(())
}

impl Namespace {
    pub fn new() -> Self {
        // `cat` ends when this process's end of its standard input closes, by a kill too.
        let holder = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("unshare starts");
        let namespace = Self { holder };
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        let deadline = std::time::Instant::now() + super::PATIENCE;
        while std::fs::read_link(namespace.path()).map_or(true, |there| there == own) {
            assert!(std::time::Instant::now() < deadline, "no namespace was made; may this process make one?");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    /// A command line that runs `program` in here.
    pub fn enter(&self, program: &str) -> Vec<String> {
        vec!["nsenter".into(), format!("--net={}", self.path().display()), program.into()]
    }

    pub fn command(&self, program: &str) -> Command {
        let line = self.enter(program);
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null());
        command
    }

    /// Runs to its end what must succeed; yields what it wrote.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn ip(&self, arguments: &[&str]) {
        self.run("ip", arguments);
    }

    /// Runs `curl` as another user than everything of tombolo.
    pub fn curl_as(&self, uid: u32, arguments: &[&str]) -> Output {
        let uid = uid.to_string();
        let mut command = self.command("setpriv");
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "curl", "-sS", "-m", "10"]);
        command.args(arguments).output().unwrap()
    }

    /// Does something in here that makes sockets: they stay in this namespace wherever they are used.
    pub fn within<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(self.path()).unwrap();
        std::thread::scope(|scope| {
            let made = scope.spawn(move || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
                make()
            });
            made.join().unwrap()
        })
    }

    /// A listener in here that is served by the test's own runtime.
    pub fn listen(&self, address: SocketAddr) -> tokio::net::TcpListener {
        let listener = self.within(|| std::net::TcpListener::bind(address)).unwrap();
        listener.set_nonblocking(true).unwrap();
        tokio::net::TcpListener::from_std(listener).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// One end of a cable.
pub struct End<'a> {
    pub namespace: &'a Namespace,
    pub addresses: &'a [&'a str],
}

/// Ties two namespaces together; each end gets its addresses (with prefix), and sends what it knows no other way
/// for to the other end.
pub fn tie(name: &str, a: End<'_>, b: End<'_>) {
    let peer = b.namespace.holder.id().to_string();
    a.namespace.ip(&["link", "add", name, "type", "veth", "peer", "name", name, "netns", &peer]);
    for end in [&a, &b] {
        for address in end.addresses {
            // Duplicate address detection would keep an IPv6 address unusable for a second.
            let flags: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
            end.namespace.ip(&[&["address", "add", address, "dev", name], flags].concat());
        }
        end.namespace.ip(&["link", "set", name, "up"]);
    }
    for (end, other) in [(&a, &b), (&b, &a)] {
        for address in other.addresses {
            let gateway: IpAddr = address.split('/').next().unwrap().parse().unwrap();
            let family = if gateway.is_ipv4() { "-4" } else { "-6" };
            end.namespace.ip(&[family, "route", "replace", "default", "via", &gateway.to_string(), "dev", name]);
        }
    }
}
