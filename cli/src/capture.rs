//! `tombolo sidecar capture`: writes the packet filter's rules, or takes them away. What they say is decided in
//! `tombolo_core::capture`; here the tools of the system are run.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, anyhow, bail};
use tombolo_core::capture::{Excludes, Family, Options, Plan, iptables, nft};

use crate::args::{Backend, CaptureCommand, Direction};

/// Seconds that iptables may wait for another process that changes rules.
const LOCK_WAIT: &str = "5";

pub fn run(command: CaptureCommand) -> anyhow::Result<()> {
    if command.remove {
        return remove(command.backend, command.dry_run);
    }
    let backend = command.backend.unwrap_or_default();
    let options = options(&command)?;
    let plan = Plan::new(&options)?;
    match (backend, command.dry_run) {
        (Backend::Nft, true) => print!("{}", nft::ruleset(&plan)),
        (Backend::Iptables, true) => {
            for family in [Family::V4, Family::V6] {
                // What stands is not looked at, so that the text is the same everywhere.
                let text = iptables::ruleset(&plan, family, &iptables::Standing::default());
                print!("# {} --noflush\n{text}", tool(family, "restore"));
            }
        }
        (Backend::Nft, false) => {
            run_nft(&nft::ruleset(&plan))?;
            // Rules of both kinds would redirect twice over; those written last are the ones that count.
            remove_iptables(Tools::IfInstalled)?;
        }
        (Backend::Iptables, false) => {
            families().iter().try_for_each(|family| apply_iptables(&plan, *family))?;
            remove_nft(Tools::IfInstalled)?;
        }
    }
    if !command.dry_run {
        anstream::println!("{}", summary(&options));
    }
    Ok(())
}

fn options(command: &CaptureCommand) -> anyhow::Result<Options> {
    let outbound = command.only != Some(Direction::Inbound);
    let inbound = command.only != Some(Direction::Outbound);
    if command.dns && !outbound {
        bail!(
            "--dns captures queries that leave, and --only inbound captures nothing that does; leave out one of both"
        );
    }
    let own = command.sidecar_port.iter().copied().filter(|_| inbound);
    let exclude = Excludes {
        uids: command.exclude_uid.iter().copied().collect(),
        gids: command.exclude_gid.iter().copied().collect(),
        cgroups: command.exclude_cgroup.iter().cloned().collect(),
        interfaces: command.exclude_interface.iter().cloned().collect(),
        outbound_ranges: command.exclude_outbound_range.iter().copied().collect(),
        outbound_ports: command.exclude_outbound_port.iter().copied().collect(),
        inbound_ranges: command.exclude_inbound_range.iter().copied().collect(),
        inbound_ports: own.chain(command.exclude_inbound_port.iter().copied()).collect::<BTreeSet<u16>>(),
    };
    Ok(Options {
        outbound: outbound.then_some(command.outbound_port),
        inbound: inbound.then_some(command.inbound_port),
        dns: command.dns.then_some(command.dns_port),
        exclude,
    })
}

fn summary(options: &Options) -> String {
    let part = |what: &str, port: Option<u16>| port.map(|port| format!("{what} to port {port}"));
    let parts =
        [part("outbound TCP", options.outbound), part("inbound TCP", options.inbound), part("DNS", options.dns)];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    format!("captured: {}; `tombolo sidecar capture --remove` takes it back", parts.join(", "))
}

fn remove(backend: Option<Backend>, dry_run: bool) -> anyhow::Result<()> {
    if dry_run {
        if backend != Some(Backend::Iptables) {
            print!("{}", nft::removal());
        }
        if backend != Some(Backend::Nft) {
            for family in [Family::V4, Family::V6] {
                let standing = standing(family, Tools::IfInstalled)?;
                if !standing.is_empty() {
                    print!("# {} --noflush\n{}", tool(family, "restore"), iptables::removal(&standing));
                }
            }
        }
        return Ok(());
    }
    match backend {
        Some(Backend::Nft) => remove_nft(Tools::Needed)?,
        Some(Backend::Iptables) => remove_iptables(Tools::Needed)?,
        None => {
            remove_nft(Tools::IfInstalled)?;
            remove_iptables(Tools::IfInstalled)?;
        }
    }
    anstream::println!("nothing is captured any more");
    Ok(())
}

/// Whether a tool that is not installed is an error, or means that there is nothing to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tools {
    Needed,
    IfInstalled,
}

fn remove_nft(tools: Tools) -> anyhow::Result<()> {
    if tools == Tools::IfInstalled && !is_installed("nft") {
        return Ok(());
    }
    run_nft(&nft::removal())
}

fn remove_iptables(tools: Tools) -> anyhow::Result<()> {
    for family in families() {
        let standing = standing(family, tools)?;
        if !standing.is_empty() {
            restore(family, &iptables::removal(&standing))?;
        }
    }
    Ok(())
}

fn apply_iptables(plan: &Plan, family: Family) -> anyhow::Result<()> {
    let standing = standing(family, Tools::Needed)?;
    let applied = restore(family, &iptables::ruleset(plan, family, &standing));
    if applied.is_err() && family == Family::V6 {
        // Half of it would be worse than nothing: IPv4 through the sidecar, IPv6 past it.
        remove_iptables(Tools::Needed).context("taking back the rules for IPv4, because those for IPv6 failed")?;
    }
    applied
}

/// The families that this host speaks.
fn families() -> Vec<Family> {
    let speaks_v6 = std::path::Path::new("/proc/net/if_inet6").exists();
    if speaks_v6 { vec![Family::V4, Family::V6] } else { vec![Family::V4] }
}

fn tool(family: Family, verb: &str) -> String {
    match family {
        Family::V4 => format!("iptables-{verb}"),
        Family::V6 => format!("ip6tables-{verb}"),
    }
}

fn standing(family: Family, tools: Tools) -> anyhow::Result<iptables::Standing> {
    let tool = tool(family, "save");
    if tools == Tools::IfInstalled && !is_installed(&tool) {
        return Ok(iptables::Standing::default());
    }
    Ok(iptables::Standing::read(&run_tool(&tool, &["-t", "nat"], "")?))
}

fn restore(family: Family, text: &str) -> anyhow::Result<()> {
    run_tool(&tool(family, "restore"), &["--noflush", "--wait", LOCK_WAIT], text).map(drop)
}

fn run_nft(text: &str) -> anyhow::Result<()> {
    run_tool("nft", &["-f", "-"], text).map(drop)
}

fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

/// Runs a tool with a text as its standard input; yields what it wrote.
fn run_tool(tool: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    if !is_installed(tool) {
        let (package, other) = if tool == "nft" { ("nftables", "iptables") } else { ("iptables", "nft") };
        bail!("{tool} is not installed: apt-get install {package}, or take --backend {other}");
    }
    let mut child = Command::new(tool)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {tool}"))?;
    let mut stdin = child.stdin.take().context("the standard input of the tool")?;
    // A tool that ends before it has read everything says why in its output.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(refused(tool, String::from_utf8_lossy(&output.stderr).trim()))
}

/// The likely cause behind a tool's own words.
fn refused(tool: &str, said: &str) -> anyhow::Error {
    let denied = ["Operation not permitted", "Permission denied", "you must be root"];
    let cause = if denied.iter().any(|words| said.contains(words)) {
        "this needs the capability NET_ADMIN in the network namespace: run it as root (sudo), or in Kubernetes as an \
         init container with securityContext.capabilities.add: [NET_ADMIN]"
    } else if said.contains("cgroup") {
        "is there a cgroup (version 2) of that path, and does the kernel match on it?"
    } else {
        "is the kernel's packet filter (nf_tables, nf_nat) available in this network namespace?"
    };
    anyhow!("{tool} refused the rules; nothing was changed by it: {cause}\n{said}")
}
