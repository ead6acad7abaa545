//! What is wrong with a cluster, or is going to be, with the next step for each: what `tombolo check` prints. Decided from
//! facts that somebody else gathered.

use std::fmt;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

/// Clocks further apart than this are a problem: an SVID is valid from a moment before it is issued.
const CLOCK_APART_MAX: Duration = Duration::from_secs(30);
/// Above this a difference is worth a word.
const CLOCK_APART_WARN: Duration = Duration::from_secs(5);
/// A root that expires sooner is to be replaced now.
const ROOT_SOON: SignedDuration = SignedDuration::from_hours(24 * 30);
/// Datagrams of this size pass every path that QUIC works on (RFC 9000 section 14).
const MTU_MIN: u32 = 1_200;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work.
    Problem,
    /// It works, but is not as it should be, or will not for long.
    Warning,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Problem => "problem",
            Severity::Warning => "warning",
        }
    }
}

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    Configuration,
    Ports,
    Versions,
    Clocks,
    Certificates,
    Gateways,
    Tunnels,
    Mtu,
    Peers,
    Services,
    Conflicts,
    Policies,
    Dns,
    Sidecars,
    Source,
}

impl Area {
    pub fn as_str(self) -> &'static str {
        match self {
            Area::Configuration => "configuration",
            Area::Ports => "ports",
            Area::Versions => "versions",
            Area::Clocks => "clocks",
            Area::Certificates => "certificates",
            Area::Gateways => "gateways",
            Area::Tunnels => "tunnels",
            Area::Mtu => "mtu",
            Area::Peers => "peers",
            Area::Services => "services",
            Area::Conflicts => "conflicts",
            Area::Policies => "policies",
            Area::Dns => "dns",
            Area::Sidecars => "sidecars",
            Area::Source => "source",
        }
    }
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub area: Area,
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// What is known of a running cluster.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Of this program, and of the federation that answered.
    pub version: String,
    pub federation_version: String,
    pub gateways: Vec<Gateway>,
    pub peers: Vec<Peer>,
    pub services: Vec<Service>,
    pub roots: Vec<Root>,
    /// Routes and policies that name services which are not here, with one of these.
    pub unmatched_policies: Vec<(String, String)>,
    /// What the source reports, as `place: reason`.
    pub source_problems: Vec<String>,
    /// Registrations that are refused, as `instance: service (reason)`.
    pub refused_registrations: Vec<String>,
    pub dns: Dns,
}

#[derive(Debug, Clone, Default)]
pub struct Gateway {
    pub id: String,
    pub connected: bool,
    /// Peers can dial it.
    pub advertises: bool,
}

#[derive(Debug, Clone, Default)]
pub struct Peer {
    pub cluster: String,
    /// `fresh`, `stale`, `draining` or `waiting`.
    pub sync: String,
    /// How far the peer's clock is ahead of the own one, as peer sync shows it.
    pub clock_ahead_ms: Option<i64>,
    /// It says where its gateways can be dialled.
    pub advertises: bool,
    /// It may bring something in.
    pub imports: bool,
    pub tunnels: Vec<Tunnel>,
    pub last_refusal: String,
}

#[derive(Debug, Clone, Default)]
pub struct Tunnel {
    pub gateway: String,
    pub up: bool,
    pub remote_address: String,
    pub last_error: String,
    /// Octets of a datagram that the path carries, as QUIC found out; 0 where that is not known.
    pub mtu: u32,
}

#[derive(Debug, Clone, Default)]
pub struct Service {
    pub name: String,
    pub conflicts: Vec<String>,
    /// Clusters that export it to here and whose import grant leaves it out.
    pub excluded: Vec<String>,
    /// This cluster exports it.
    pub exported: bool,
    /// Of the own cluster's share: endpoints, and who may serve.
    pub endpoints: u32,
    pub ready: u32,
    pub has_server_ids: bool,
}

/// A root of a trust domain that counts here.
#[derive(Debug, Clone)]
pub struct Root {
    pub cluster: String,
    pub own: bool,
    pub expires: Timestamp,
}

/// How names of the clusterset are resolved where the check runs.
#[derive(Debug, Clone, Default)]
pub struct Dns {
    /// The cluster reads an API server, whose pods resolve names with its DNS.
    pub kubernetes: bool,
    /// Where the federation answers for `clusterset.local`.
    pub server: Option<String>,
    /// A name that should resolve, and what the resolver said when it did not.
    pub failed: Option<(String, String)>,
}

/// Every finding, the worst first.
pub fn findings(facts: &Facts, now: Timestamp) -> Vec<Finding> {
    let mut found = Found::default();
    found.versions(facts);
    found.certificates(facts, now);
    found.gateways(facts);
    for peer in &facts.peers {
        found.clock(peer);
        found.tunnels(peer, facts);
        found.peer(peer);
    }
    facts.services.iter().for_each(|service| found.service(service));
    found.rest(facts);
    found.dns(&facts.dns);
    found.0.sort();
    found.0
}

#[derive(Default)]
struct Found(Vec<Finding>);

impl Found {
    fn problem(&mut self, area: Area, what: impl fmt::Display, fix: impl fmt::Display) {
        self.add(Severity::Problem, area, what, fix);
    }

    fn warning(&mut self, area: Area, what: impl fmt::Display, fix: impl fmt::Display) {
        self.add(Severity::Warning, area, what, fix);
    }

    fn add(&mut self, severity: Severity, area: Area, what: impl fmt::Display, fix: impl fmt::Display) {
        self.0.push(Finding { severity, area, what: what.to_string(), fix: fix.to_string() });
    }

    fn versions(&mut self, facts: &Facts) {
        let (own, theirs) = (&facts.version, &facts.federation_version);
        if own != theirs {
            let what = format!("this program is {own}, the federation {theirs}");
            self.warning(
                Area::Versions,
                what,
                "use the program of the federation's release, or upgrade the federation",
            );
        }
    }

    fn certificates(&mut self, facts: &Facts, now: Timestamp) {
        for root in &facts.roots {
            let left = root.expires.duration_since(now);
            let what = format!("a root of {} expires at {}", root.cluster, root.expires);
            let fix = match root.own {
                true => "make another one and let peers learn it: tombolo trust add-root".to_owned(),
                false => format!("ask the operator of {} to make another root: tombolo trust add-root", root.cluster),
            };
            let others = facts.roots.iter().filter(|other| other.cluster == root.cluster);
            if others.clone().any(|other| other.expires > root.expires) {
                // It is being replaced.
                continue;
            }
            match left {
                left if left <= SignedDuration::ZERO => self.problem(Area::Certificates, what, fix),
                left if left < ROOT_SOON => self.warning(Area::Certificates, what, fix),
                _ => {}
            }
        }
    }

    fn gateways(&mut self, facts: &Facts) {
        for gateway in facts.gateways.iter().filter(|gateway| !gateway.connected) {
            let what = format!("gateway {} is away", gateway.id);
            self.problem(Area::Gateways, what, "see its log and /readyz; it needs the federation's discovery port");
        }
        if facts.gateways.is_empty() {
            let fix = "start one: tombolo join add --gateway gw-1 --out gw-1.join, then tombolo gateway";
            self.problem(Area::Gateways, "the cluster has no gateway, so no other cluster can be reached", fix);
        }
    }

    fn clock(&mut self, peer: &Peer) {
        let Some(ahead_ms) = peer.clock_ahead_ms else { return };
        let apart = Duration::from_millis(ahead_ms.unsigned_abs());
        if apart < CLOCK_APART_WARN {
            return;
        }
        let way = if ahead_ms > 0 { "ahead of" } else { "behind" };
        let what = format!("the clock of {} is {} s {way} the one here", peer.cluster, apart.as_secs());
        let fix = "synchronize the clocks of both (NTP): certificates are judged by them";
        match apart > CLOCK_APART_MAX {
            true => self.problem(Area::Clocks, what, fix),
            false => self.warning(Area::Clocks, what, fix),
        }
    }

    fn tunnels(&mut self, peer: &Peer, facts: &Facts) {
        let cluster = &peer.cluster;
        if !peer.tunnels.iter().any(|tunnel| tunnel.up) {
            let own = facts.gateways.iter().any(|gateway| gateway.advertises);
            let errors = peer.tunnels.iter().filter(|tunnel| !tunnel.last_error.is_empty());
            let told: Vec<String> =
                errors.map(|tunnel| format!("{}: {}", tunnel.remote_address, tunnel.last_error)).collect();
            let why = if told.is_empty() { String::new() } else { format!(" ({})", told.join("; ")) };
            let fix = match (own, peer.advertises) {
                (false, false) => {
                    "one side must be reachable: set `advertise` of a gateway, here or there, and open its UDP port"
                }
                _ => {
                    "open the UDP port of the gateways that can be dialled (15443 unless set) in firewalls and security \
                      groups, in the direction of the side that advertises it"
                }
            };
            self.problem(Area::Tunnels, format!("no tunnel to {cluster} answers{why}"), fix);
        }
        for tunnel in peer.tunnels.iter().filter(|tunnel| tunnel.up && tunnel.mtu != 0 && tunnel.mtu <= MTU_MIN) {
            let (gateway, remote, mtu) = (&tunnel.gateway, &tunnel.remote_address, tunnel.mtu);
            let what =
                format!("the path from {gateway} to {remote} ({cluster}) carries datagrams of {mtu} octets only");
            let fix = "raise the MTU of the overlay or VPN on the way, or let ICMP \"too big\" pass; until then bulk traffic \
                       takes more packets";
            self.warning(Area::Mtu, what, fix);
        }
    }

    fn peer(&mut self, peer: &Peer) {
        let cluster = &peer.cluster;
        match peer.sync.as_str() {
            "fresh" => {}
            "waiting" => {
                let what = format!("{cluster} has not been heard of yet");
                self.warning(
                    Area::Peers,
                    what,
                    "it needs a tunnel, and the peering on both sides: tombolo peer list there",
                );
            }
            sync => {
                let what = format!("what is known of {cluster} is {sync}: its federation is silent");
                self.problem(Area::Peers, what, "see the log of its federation, and the tunnels to it");
            }
        }
        if !peer.last_refusal.is_empty() {
            let what = format!("an update of {cluster} was refused: {}", peer.last_refusal);
            self.warning(Area::Peers, what, "the operator of that cluster has to mend what it exports");
        }
        if !peer.imports {
            let what = format!("{cluster} may export nothing to here");
            self.warning(
                Area::Peers,
                what,
                "grant it namespaces if that is not meant: spec.imports of its ClusterPeer",
            );
        }
    }

    fn service(&mut self, service: &Service) {
        let name = &service.name;
        if !service.conflicts.is_empty() {
            let what = format!("{name}: the clusters that export it disagree: {}", service.conflicts.join(", "));
            self.warning(Area::Conflicts, what, "make the Services alike; the oldest export counts until then");
        }
        for cluster in &service.excluded {
            let what = format!("{name}: {cluster} exports it, but may not bring it in here");
            self.warning(Area::Services, what, "add it to spec.imports of the ClusterPeer if it is wanted");
        }
        if !service.exported {
            return;
        }
        if !service.has_server_ids {
            let what = format!("{name} is exported, and nobody may serve it");
            self.problem(Area::Services, what, "annotate its Service with tombolo.dev/service-accounts: ACCOUNT");
        } else if service.ready == 0 {
            let of = service.endpoints;
            let what = format!("{name} is exported, and none of its {of} endpoints here is ready");
            self.warning(Area::Services, what, "see the health checks of its sidecars, and `tombolo status`");
        }
    }

    fn rest(&mut self, facts: &Facts) {
        for (policy, service) in &facts.unmatched_policies {
            let what = format!("{policy} names {service}, which is not here");
            self.warning(Area::Policies, what, "correct the name, or remove the policy");
        }
        for problem in &facts.source_problems {
            self.problem(Area::Source, problem, "mend the object; its last good content stays in force");
        }
        for registration in &facts.refused_registrations {
            let fix =
                "let the sidecar's account serve the service (tombolo.dev/service-accounts), or correct its `services`";
            self.problem(Area::Sidecars, registration, fix);
        }
    }

    fn dns(&mut self, dns: &Dns) {
        if let Some((name, error)) = &dns.failed {
            let what = format!("{name} does not resolve here: {error}");
            let fix = "forward clusterset.local to the federation's DNS server: tombolo check --fix-dns";
            self.warning(Area::Dns, what, fix);
        }
        if dns.kubernetes && dns.server.is_none() {
            let what =
                "the federation has no DNS server, so that pods without a sidecar can't resolve clusterset.local";
            self.warning(Area::Dns, what, "set `dns: {listen: 0.0.0.0:15053}` in the federation's configuration");
        }
    }
}

/// What was found out about one role before it runs.
#[derive(Debug, Clone, Default)]
pub struct Preflight {
    /// `federation`, `gateway` or `sidecar`.
    pub role: String,
    /// Sockets that can't be had, as `field address`, and why.
    pub sockets: Vec<(String, String)>,
    /// Files and directories that can't be used, as `field path`, and why.
    pub files: Vec<(String, String)>,
    /// The federation's address, and why it can't be reached.
    pub federation: Option<(String, String)>,
    /// Host names that peers are to dial and that do not resolve here, and why.
    pub names: Vec<(String, String)>,
    /// A gateway that no peer can dial.
    pub hidden: bool,
}

/// Every finding about a role that is to be started, the worst first.
pub fn preflight(facts: &Preflight) -> Vec<Finding> {
    let mut found = Found::default();
    let role = &facts.role;
    for (socket, error) in &facts.sockets {
        let fix =
            "end what listens there (ss -lntup), or configure another port; ports below 1024 need CAP_NET_BIND_SERVICE";
        found.problem(Area::Ports, format!("{role}: {socket} can't be bound: {error}"), fix);
    }
    for (file, error) in &facts.files {
        let fix = "correct the path or its permissions; ca.pem and join tokens come from the federation's machine";
        found.problem(Area::Configuration, format!("{role}: {file}: {error}"), fix);
    }
    if let Some((address, error)) = &facts.federation {
        let fix = "start the federation first, and let its discovery port (TCP 15010 unless set) through";
        found.problem(Area::Ports, format!("{role}: the federation at {address} can't be reached: {error}"), fix);
    }
    for (name, error) in &facts.names {
        let fix = "peers resolve it by themselves; make sure that they can, or advertise an address";
        found.warning(Area::Dns, format!("{role}: advertise: {name} does not resolve here: {error}"), fix);
    }
    if facts.hidden {
        let what = format!("{role}: `advertise` is empty, so that no peer can dial this gateway");
        found.warning(Area::Gateways, what, "fine behind NAT where every peer can be dialled; otherwise set it");
    }
    found.0.sort();
    found.0
}

/// CoreDNS' server block that forwards the clusterset's zone to `server` (`host:port`).
///
/// Answers have a TTL of five seconds, denials too; a resolver that keeps them longer would keep names that are gone.
pub fn corefile(server: &str) -> String {
    format!(
        "clusterset.local:53 {{\n    errors\n    cache 5 {{\n        denial 9984 5\n    }}\n    forward . {server} {{\n        \
         max_concurrent 1000\n    }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Facts {
        let tunnel = Tunnel { gateway: "gw".into(), up: true, mtu: 1_452, ..Tunnel::default() };
        let peer = Peer {
            cluster: "west".into(),
            sync: "fresh".into(),
            clock_ahead_ms: Some(-40),
            advertises: true,
            imports: true,
            tunnels: vec![tunnel],
            last_refusal: String::new(),
        };
        let service = Service {
            name: "shop/web".into(),
            exported: true,
            endpoints: 2,
            ready: 1,
            has_server_ids: true,
            ..Service::default()
        };
        Facts {
            version: "1.0.0".into(),
            federation_version: "1.0.0".into(),
            gateways: vec![Gateway { id: "gw".into(), connected: true, advertises: true }],
            peers: vec![peer],
            services: vec![service],
            roots: vec![Root { cluster: "east".into(), own: true, expires: at(24 * 400) }],
            dns: Dns { kubernetes: true, server: Some("10.96.0.9:15053".into()), failed: None },
            ..Facts::default()
        }
    }

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + hours * 3600).unwrap()
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Facts), want: &[(Severity, Area, &str)]) {
        let mut facts = healthy();
        change(&mut facts);
        let found = findings(&facts, at(0));
        let seen: Vec<_> = found.iter().map(|one| (one.severity, one.area)).collect();
        assert_eq!(seen, want.iter().map(|(severity, area, _)| (*severity, *area)).collect::<Vec<_>>(), "{found:?}");
        for (one, (_, _, part)) in found.iter().zip(want) {
            assert!(one.what.contains(part) && !one.fix.is_empty(), "{one:?}");
        }
    }

    #[test]
    fn a_healthy_cluster_has_no_findings() {
        check(|_| {}, &[]);
    }

    #[test]
    fn each_fact_that_is_wrong_is_found_with_its_fix() {
        use Area::{
            Certificates, Clocks, Conflicts, Dns, Gateways, Mtu, Peers, Policies, Services, Sidecars, Source, Tunnels,
            Versions,
        };
        use Severity::{Problem, Warning};
        check(|facts| facts.version = "1.1.0".into(), &[(Warning, Versions, "1.0.0")]);
        check(|facts| facts.peers[0].clock_ahead_ms = Some(9_000), &[(Warning, Clocks, "9 s ahead of")]);
        check(|facts| facts.peers[0].clock_ahead_ms = Some(-40_000), &[(Problem, Clocks, "40 s behind")]);
        check(|facts| facts.roots[0].expires = at(24), &[(Warning, Certificates, "a root of east expires")]);
        check(|facts| facts.roots[0].expires = at(-1), &[(Problem, Certificates, "east")]);
        let newer = |facts: &mut Facts| {
            facts.roots[0].expires = at(1);
            facts.roots.push(Root { cluster: "east".into(), own: true, expires: at(24 * 400) });
        };
        check(newer, &[]);
        check(|facts| facts.gateways[0].connected = false, &[(Problem, Gateways, "gw is away")]);
        check(|facts| facts.gateways.clear(), &[(Problem, Gateways, "no gateway")]);
        let silent = |facts: &mut Facts| {
            let refused = Tunnel { remote_address: "gw:1".into(), last_error: "timed out".into(), ..Tunnel::default() };
            facts.peers[0].tunnels = vec![refused];
        };
        check(silent, &[(Problem, Tunnels, "no tunnel to west answers (gw:1: timed out)")]);
        check(|facts| facts.peers[0].tunnels[0].mtu = 1_200, &[(Warning, Mtu, "1200 octets")]);
        check(|facts| facts.peers[0].sync = "stale".into(), &[(Problem, Peers, "stale")]);
        check(|facts| facts.peers[0].sync = "waiting".into(), &[(Warning, Peers, "not been heard")]);
        check(|facts| facts.peers[0].imports = false, &[(Warning, Peers, "may export nothing")]);
        check(|facts| facts.peers[0].last_refusal = "odd".into(), &[(Warning, Peers, "odd")]);
        check(|facts| facts.services[0].ready = 0, &[(Warning, Services, "none of its 2 endpoints")]);
        check(|facts| facts.services[0].has_server_ids = false, &[(Problem, Services, "nobody may serve")]);
        check(|facts| facts.services[0].excluded = vec!["west".into()], &[(Warning, Services, "west exports it")]);
        check(
            |facts| facts.services[0].conflicts = vec!["PortConflict".into()],
            &[(Warning, Conflicts, "PortConflict")],
        );
        let unmatched = ("AccessPolicy shop/x".to_owned(), "shop/wbe".to_owned());
        check(|facts| facts.unmatched_policies.push(unmatched), &[(Warning, Policies, "shop/wbe")]);
        check(|facts| facts.source_problems.push("a.yaml:3: odd".into()), &[(Problem, Source, "a.yaml:3")]);
        check(|facts| facts.refused_registrations.push("web-1: shop/web".into()), &[(Problem, Sidecars, "web-1")]);
        check(|facts| facts.dns.server = None, &[(Warning, Dns, "no DNS server")]);
        let failed = ("web.shop.svc.clusterset.local".to_owned(), "no such host".to_owned());
        check(|facts| facts.dns.failed = Some(failed), &[(Warning, Dns, "does not resolve")]);
    }

    #[test]
    fn what_would_hinder_a_role_is_found_before_it_runs() {
        let nothing = Preflight { role: "gateway".into(), ..Preflight::default() };
        assert_eq!(preflight(&nothing), []);
        let pair = |one: &str| (one.to_owned(), "odd".to_owned());
        let all = Preflight {
            sockets: vec![pair("tunnel 0.0.0.0:15443/udp")],
            files: vec![pair("federation.ca /ca.pem")],
            federation: Some(pair("fed:15010")),
            names: vec![pair("gw.example:15443")],
            hidden: true,
            ..nothing
        };
        let found = preflight(&all);
        let problems = found.iter().filter(|one| one.severity == Severity::Problem).count();
        assert_eq!((found.len(), problems), (5, 3), "{found:?}");
        assert!(found.iter().all(|one| one.what.starts_with("gateway: ") && !one.fix.is_empty()), "{found:?}");
    }

    #[test]
    fn problems_come_before_warnings() {
        let both = |facts: &mut Facts| {
            facts.version = "2".into();
            facts.gateways[0].connected = false;
        };
        check(both, &[(Severity::Problem, Area::Gateways, "gw"), (Severity::Warning, Area::Versions, "2")]);
    }
}
