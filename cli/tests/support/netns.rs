//! Network namespaces of a test's own, which leave nothing behind: no named namespace, no interface, no rule.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The testbed's namespace, with what a test does in one.
pub struct Namespace(pub tombolo_testbed::Namespace);

/// What a namespaced test needs beside root; `None` skips the test by name, unless everything must run.
pub fn permitted(tools: &[&str]) -> Option<()> {
    super::installed(&[&["ip", "nsenter", "unshare", "setpriv"], tools].concat())?;
    if !nix::unistd::geteuid().is_root() {
        super::skip("root, to make network namespaces");
        return None;
    }
    Some(())
}

impl Namespace {
    pub fn new() -> Self {
        Self(tombolo_testbed::Namespace::new().expect("root may make a network namespace"))
    }

    /// Runs `program` in here.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.0.path().display())).arg(program).stdin(Stdio::null());
        command
    }

    /// Runs to its end what must succeed; yields what it wrote.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn ip(&self, arguments: &[&str]) {
        self.0.ip(arguments).unwrap();
    }

    /// Runs `curl` as another user than everything of tombolo.
    pub fn curl_as(&self, uid: u32, arguments: &[&str]) -> Output {
        let uid = uid.to_string();
        let mut command = self.command("setpriv");
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "curl", "-sS", "-m", "10"]);
        command.args(arguments).output().unwrap()
    }

    /// The same with a `resolv.conf` of its own.
    pub fn curl_resolving(&self, uid: u32, resolv_conf: &Path, arguments: &[&str]) -> Output {
        let script = "mount --bind \"$1\" /etc/resolv.conf && shift && exec setpriv --clear-groups --reuid \"$0\" \
                      --regid \"$0\" curl -sS -m 10 \"$@\"";
        let mut command = self.command("unshare");
        command.args(["--mount", "sh", "-c", script, &uid.to_string()]).arg(resolv_conf);
        command.args(arguments).output().unwrap()
    }

    /// A listener in here that is served by the test's own runtime.
    pub fn listen(&self, address: SocketAddr) -> tokio::net::TcpListener {
        let listener = self.0.within(|| std::net::TcpListener::bind(address)).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        tokio::net::TcpListener::from_std(listener).unwrap()
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
    let peer = b.namespace.0.path().display().to_string();
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
