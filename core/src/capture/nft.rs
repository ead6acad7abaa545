//! The rules for `nft -f -`: one table of our own, replaced as a whole in one transaction.

use std::fmt::Write as _;

use ipnet::IpNet;

use super::{Action, Cgroup, Interface, Matches, Plan, Rule};

/// Takes the table away; succeeds where there is none.
pub fn removal() -> String {
    // `delete` fails for what is not there, `add` never does.
    "add table inet tombolo\ndelete table inet tombolo\n".to_owned()
}

/// Replaces whatever was there. `-100` is the priority of destination NAT at every hook; its name is not known at
/// `output` to older releases of nft.
pub fn ruleset(plan: &Plan) -> String {
    let mut text = removal();
    text.push_str("table inet tombolo {\n");
    for (name, hook, rules) in [("outbound", "output", &plan.outbound), ("inbound", "prerouting", &plan.inbound)] {
        if rules.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\tchain {name} {{");
        let _ = writeln!(text, "\t\ttype nat hook {hook} priority -100; policy accept;");
        for rule in rules {
            let _ = writeln!(text, "\t\t{}", line(rule));
        }
        text.push_str("\t}\n");
    }
    text.push_str("}\n");
    text
}

fn line(Rule { matches, action }: &Rule) -> String {
    let action = match action {
        Action::Leave => "return".to_owned(),
        Action::RedirectTo(port) => format!("redirect to :{port}"),
    };
    format!("{} {action}", expression(matches))
}

fn expression(matches: &Matches) -> String {
    match matches {
        Matches::Uid(uid) => format!("meta skuid {uid}"),
        Matches::Gid(gid) => format!("meta skgid {gid}"),
        Matches::Cgroup(cgroup) => {
            let Cgroup(path) = cgroup;
            format!("socket cgroupv2 level {} \"{path}\"", cgroup.level())
        }
        Matches::OutInterface(interface) => format!("oifname {}", quoted(interface)),
        Matches::InInterface(interface) => format!("iifname {}", quoted(interface)),
        Matches::Destination(range) => format!("{} daddr {range}", protocol(range)),
        Matches::Source(range) => format!("{} saddr {range}", protocol(range)),
        Matches::LocalDestination => "fib daddr type local".to_owned(),
        Matches::ForeignDestination => "fib daddr type != local".to_owned(),
        Matches::TcpPort(port) => format!("tcp dport {port}"),
        Matches::UdpPort(port) => format!("udp dport {port}"),
        Matches::Tcp => "meta l4proto tcp".to_owned(),
    }
}

fn quoted(Interface { name, any_rest }: &Interface) -> String {
    format!("\"{name}{}\"", if *any_rest { "*" } else { "" })
}

fn protocol(range: &IpNet) -> &'static str {
    match range {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}
