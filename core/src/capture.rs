//! Which connections a host's packet filter hands to the sidecar, as a list of rules that each backend writes in
//! its own language ([`nft`], [`iptables`]). Both say the same because both are written from one [`Plan`].
//!
//! Rules are met in order and the first match decides. Only the first packet of a connection meets them.

pub mod iptables;
pub mod nft;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;

/// Excludes of one kind; more than anybody writes by hand, and few enough to walk at each new connection.
pub const EXCLUDES_MAX: usize = 256;
const DNS_PORT: u16 = 53;
/// `IFNAMSIZ` without its closing zero.
const INTERFACE_LENGTH_MAX: usize = 15;

/// What is to be redirected, and what is left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Port of the sidecar that takes TCP connections which processes of this host begin.
    pub outbound: Option<u16>,
    /// Port of the sidecar that takes TCP connections which arrive at this host.
    pub inbound: Option<u16>,
    /// Port of the sidecar that takes DNS queries (UDP and TCP, port 53) of processes of this host.
    pub dns: Option<u16>,
    pub exclude: Excludes,
}

/// What is never redirected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Excludes {
    /// Whose connections are left alone: above all the sidecar's own.
    pub uids: BTreeSet<u32>,
    pub gids: BTreeSet<u32>,
    pub cgroups: BTreeSet<Cgroup>,
    pub interfaces: BTreeSet<Interface>,
    /// Destinations of outbound connections.
    pub outbound_ranges: BTreeSet<IpNet>,
    pub outbound_ports: BTreeSet<u16>,
    /// Sources of inbound connections.
    pub inbound_ranges: BTreeSet<IpNet>,
    pub inbound_ports: BTreeSet<u16>,
}

/// A cgroup (version 2) by its path below the root of the hierarchy: `system.slice/tombolo.service`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cgroup(String);

impl Cgroup {
    /// How many levels below the root it is.
    fn level(&self) -> usize {
        self.0.split('/').count()
    }
}

impl FromStr for Cgroup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.trim_matches('/');
        // The path stands between quotes in a rule, so nothing may end them.
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-@:+\\".contains(c);
        let part = |part: &str| !part.is_empty() && part != "." && part != ".." && part.chars().all(plain);
        if path.len() > 512 || !path.split('/').all(part) {
            return Err(format!("{text:?} is no path below the cgroup root, such as system.slice/tombolo.service"));
        }
        Ok(Self(path.to_owned()))
    }
}

/// A network interface; a `*` at the end stands for any rest of the name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    name: String,
    any_rest: bool,
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, any_rest) = text.strip_suffix('*').map_or((text, false), |name| (name, true));
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-@:".contains(c);
        if name.is_empty() || name.len() > INTERFACE_LENGTH_MAX || !name.chars().all(plain) {
            return Err(format!("{text:?} is no interface name, such as eth0 or veth*"));
        }
        Ok(Self { name: name.to_owned(), any_rest })
    }
}

/// Reads `10.0.0.0/8`, `fd00::/8`, or one address. Bits behind the prefix are cleared.
pub fn parse_range(text: &str) -> Result<IpNet, String> {
    let one = || text.parse::<std::net::IpAddr>().ok().map(IpNet::from);
    let range = text.parse::<IpNet>().ok().or_else(one);
    let range = range.ok_or_else(|| format!("{text:?} is no address range, such as 10.0.0.0/8 or fd00::/8"))?;
    Ok(range.trunc())
}

/// Why options make no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    #[error("nothing to capture: neither outbound, inbound nor DNS")]
    Nothing,
    #[error(
        "the sidecar's own connections would be redirected to itself: name the user, group or cgroup that it runs as \
         (--exclude-uid, --exclude-gid or --exclude-cgroup)"
    )]
    NobodyExcluded,
    #[error("{0} is no port: write a number from 1 to 65535")]
    NoPort(u16),
    #[error("port {0} is to take two kinds of connections; give each its own")]
    SamePort(u16),
    #[error("DNS is to be captured, but port 53 is excluded; leave out one of both")]
    DnsExcluded,
    #[error("{count} {kind} are excluded; at most {EXCLUDES_MAX} can be: merge them into fewer, wider ones")]
    TooMany { kind: &'static str, count: usize },
}

/// What a connection's first packet is looked at for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Matches {
    Uid(u32),
    Gid(u32),
    Cgroup(Cgroup),
    /// The packet leaves by it.
    OutInterface(Interface),
    /// The packet came in by it.
    InInterface(Interface),
    Destination(IpNet),
    Source(IpNet),
    /// The destination is an address of this host, loopback included.
    LocalDestination,
    ForeignDestination,
    TcpPort(u16),
    UdpPort(u16),
    Tcp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The connection goes on as if there were no rules.
    Leave,
    /// The connection is taken by this port of this host.
    RedirectTo(u16),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub matches: Matches,
    pub action: Action,
}

/// The rules of both directions; an empty list is a direction that is not captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// For packets that processes of this host send.
    pub outbound: Vec<Rule>,
    /// For packets that arrive at an interface.
    pub inbound: Vec<Rule>,
}

impl Plan {
    /// # Errors
    /// When nothing would be captured, or the sidecar would capture itself, or options contradict one another.
    pub fn new(options: &Options) -> Result<Self, CaptureError> {
        check(options)?;
        Ok(Self { outbound: outbound(options), inbound: inbound(options) })
    }
}

fn check(Options { outbound, inbound, dns, exclude }: &Options) -> Result<(), CaptureError> {
    let ports: Vec<u16> = [outbound, inbound, dns].into_iter().flatten().copied().collect();
    if ports.is_empty() {
        return Err(CaptureError::Nothing);
    }
    let mut excluded = exclude.outbound_ports.iter().chain(&exclude.inbound_ports).chain(&ports);
    if let Some(zero) = excluded.find(|port| **port == 0) {
        return Err(CaptureError::NoPort(*zero));
    }
    if let Some(at) = (1..ports.len()).find(|at| ports[..*at].contains(&ports[*at])) {
        return Err(CaptureError::SamePort(ports[at]));
    }
    let owners = exclude.uids.len() + exclude.gids.len() + exclude.cgroups.len();
    if (outbound.is_some() || dns.is_some()) && owners == 0 {
        return Err(CaptureError::NobodyExcluded);
    }
    if dns.is_some() && exclude.outbound_ports.contains(&DNS_PORT) {
        return Err(CaptureError::DnsExcluded);
    }
    let counts = [
        ("owners", owners),
        ("interfaces", exclude.interfaces.len()),
        ("outbound ranges", exclude.outbound_ranges.len()),
        ("outbound ports", exclude.outbound_ports.len()),
        ("inbound ranges", exclude.inbound_ranges.len()),
        ("inbound ports", exclude.inbound_ports.len()),
    ];
    let many = counts.into_iter().find(|(_, count)| *count > EXCLUDES_MAX);
    many.map_or(Ok(()), |(kind, count)| Err(CaptureError::TooMany { kind, count }))
}

fn outbound(Options { outbound, dns, exclude, .. }: &Options) -> Vec<Rule> {
    if outbound.is_none() && dns.is_none() {
        return Vec::new();
    }
    let mut rules = Vec::new();
    let mut leave = |matches| rules.push(Rule { matches, action: Action::Leave });
    exclude.uids.iter().for_each(|uid| leave(Matches::Uid(*uid)));
    exclude.gids.iter().for_each(|gid| leave(Matches::Gid(*gid)));
    exclude.cgroups.iter().for_each(|cgroup| leave(Matches::Cgroup(cgroup.clone())));
    exclude.interfaces.iter().for_each(|interface| leave(Matches::OutInterface(interface.clone())));
    exclude.outbound_ranges.iter().for_each(|range| leave(Matches::Destination(*range)));
    exclude.outbound_ports.iter().for_each(|port| leave(Matches::TcpPort(*port)));
    if let Some(port) = dns {
        // Before local destinations are left alone: a resolver of the host's own often is at 127.0.0.53.
        let action = Action::RedirectTo(*port);
        rules.push(Rule { matches: Matches::UdpPort(DNS_PORT), action });
        rules.push(Rule { matches: Matches::TcpPort(DNS_PORT), action });
    }
    if let Some(port) = outbound {
        rules.push(Rule { matches: Matches::LocalDestination, action: Action::Leave });
        rules.push(Rule { matches: Matches::Tcp, action: Action::RedirectTo(*port) });
    }
    rules
}

fn inbound(Options { inbound, exclude, .. }: &Options) -> Vec<Rule> {
    let Some(port) = inbound else { return Vec::new() };
    let mut rules = Vec::new();
    let mut leave = |matches| rules.push(Rule { matches, action: Action::Leave });
    // What is only routed by this host is not meant for its applications.
    leave(Matches::ForeignDestination);
    leave(Matches::InInterface(Interface { name: "lo".to_owned(), any_rest: false }));
    exclude.interfaces.iter().for_each(|interface| leave(Matches::InInterface(interface.clone())));
    exclude.inbound_ranges.iter().for_each(|range| leave(Matches::Source(*range)));
    exclude.inbound_ports.iter().for_each(|port| leave(Matches::TcpPort(*port)));
    rules.push(Rule { matches: Matches::Tcp, action: Action::RedirectTo(*port) });
    rules
}

/// The two families that a rule may be about; `None` for both.
fn family_of(matches: &Matches) -> Option<Family> {
    match matches {
        Matches::Destination(range) | Matches::Source(range) => Some(match range {
            IpNet::V4(_) => Family::V4,
            IpNet::V6(_) => Family::V6,
        }),
        _ => None,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

#[cfg(test)]
mod tests;
