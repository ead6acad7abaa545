//! The rules for `iptables-restore --noflush` and `ip6tables-restore --noflush`: two chains of our own in the table
//! `nat`, and a jump to each from a chain of the kernel's. Each family is one transaction.

use std::fmt::Write as _;

use super::{Action, Cgroup, Family, Interface, Matches, Plan, Rule, family_of};

/// Our chains, each with the chain of the kernel that jumps to it.
const CHAINS: [(&str, &str); 2] = [("TOMBOLO_OUTBOUND", "OUTPUT"), ("TOMBOLO_INBOUND", "PREROUTING")];

/// What of ours stands already, read from what `iptables-save -t nat` wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    chains: [bool; 2],
    jumps: [usize; 2],
}

impl Standing {
    pub fn read(saved: &str) -> Self {
        let mut standing = Self::default();
        for (at, (chain, from)) in CHAINS.iter().enumerate() {
            standing.chains[at] = saved.lines().any(|line| line.split(' ').next() == Some(&format!(":{chain}")));
            let jump = format!("-A {from} -j {chain}");
            standing.jumps[at] = saved.lines().filter(|line| line.trim() == jump).count();
        }
        standing
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Takes away what stands. Must not be applied when nothing does.
pub fn removal(standing: &Standing) -> String {
    let mut text = "*nat\n".to_owned();
    take_down(&mut text, standing);
    text.push_str("COMMIT\n");
    text
}

/// Replaces what stands by the plan, in one transaction.
pub fn ruleset(plan: &Plan, family: Family, standing: &Standing) -> String {
    let mut text = "*nat\n".to_owned();
    // A chain that is declared is emptied, so the deletion of jumps and chains comes after all declarations.
    let rules = [&plan.outbound, &plan.inbound];
    let wanted = CHAINS.iter().zip(rules).filter(|(_, rules)| !rules.is_empty());
    for ((chain, _), _) in wanted.clone() {
        let _ = writeln!(text, ":{chain} - [0:0]");
    }
    for ((chain, _), rules) in wanted.clone() {
        for rule in rules.iter().filter(|rule| family_of(&rule.matches).is_none_or(|of| of == family)) {
            let _ = writeln!(text, "-A {chain} {}", line(rule));
        }
    }
    for (at, (chain, from)) in CHAINS.iter().enumerate() {
        if rules[at].is_empty() {
            take_down_one(&mut text, standing, at);
        } else if standing.jumps[at] == 0 {
            let _ = writeln!(text, "-A {from} -j {chain}");
        }
    }
    text.push_str("COMMIT\n");
    text
}

fn take_down(text: &mut String, standing: &Standing) {
    (0..CHAINS.len()).for_each(|at| take_down_one(text, standing, at));
}

fn take_down_one(text: &mut String, standing: &Standing, at: usize) {
    let (chain, from) = CHAINS[at];
    for _ in 0..standing.jumps[at] {
        let _ = writeln!(text, "-D {from} -j {chain}");
    }
    if standing.chains[at] {
        let _ = writeln!(text, "-F {chain}\n-X {chain}");
    }
}

fn line(Rule { matches, action }: &Rule) -> String {
    let action = match action {
        Action::Leave => "RETURN".to_owned(),
        Action::RedirectTo(port) => format!("REDIRECT --to-ports {port}"),
    };
    format!("{} -j {action}", arguments(matches))
}

fn arguments(matches: &Matches) -> String {
    match matches {
        Matches::Uid(uid) => format!("-m owner --uid-owner {uid}"),
        Matches::Gid(gid) => format!("-m owner --gid-owner {gid}"),
        Matches::Cgroup(Cgroup(path)) => format!("-m cgroup --path \"{path}\""),
        Matches::OutInterface(interface) => format!("-o {}", written(interface)),
        Matches::InInterface(interface) => format!("-i {}", written(interface)),
        Matches::Destination(range) => format!("-d {range}"),
        Matches::Source(range) => format!("-s {range}"),
        Matches::LocalDestination => "-m addrtype --dst-type LOCAL".to_owned(),
        Matches::ForeignDestination => "-m addrtype ! --dst-type LOCAL".to_owned(),
        Matches::TcpPort(port) => format!("-p tcp --dport {port}"),
        Matches::UdpPort(port) => format!("-p udp --dport {port}"),
        Matches::Tcp => "-p tcp".to_owned(),
    }
}

fn written(Interface { name, any_rest }: &Interface) -> String {
    format!("{name}{}", if *any_rest { "+" } else { "" })
}
