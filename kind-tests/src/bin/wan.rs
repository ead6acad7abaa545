//! `wan`: joins two named network namespaces by a link whose conditions are changed by lines on stdin.

use std::io::BufRead as _;

use anyhow::bail;
use clap::Parser;
use tombolo_kind_tests::wan::{Conditions, End, Wan};
use tombolo_testbed::Namespace;

/// Joins two network namespaces (`ip netns add`) by a link that behaves like a WAN. Lines on stdin change its
/// conditions (`delay-ms=20 a.loss=0.01`), `counts` tells what became of the packets; the end of stdin ends it.
#[derive(Parser)]
struct Options {
    /// Name of the one namespace
    a: String,
    /// Name of the other
    b: String,
    /// Name of the device in both
    #[arg(long, default_value = "wan0")]
    device: String,
    /// Addresses of the device in A, each with its prefix length
    #[arg(long, default_value = "10.77.0.1/30")]
    address_a: Vec<String>,
    /// Addresses of the device in B
    #[arg(long, default_value = "10.77.0.2/30")]
    address_b: Vec<String>,
    /// The same seed loses the same packets
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// delay-ms, jitter-ms, loss, loss-burst, rate-mbit, queue-kb, cut=on|off, dark=IP, lit=IP; with `a.` or `b.` in front, of what leaves that side
    #[arg(value_name = "CONDITION=VALUE")]
    conditions: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let (a, b) = (Namespace::named(&options.a)?, Namespace::named(&options.b)?);
    let [addresses_a, addresses_b] =
        [&options.address_a, &options.address_b].map(|all| all.iter().map(String::as_str).collect::<Vec<_>>());
    let end_a = End { namespace: &a, device: &options.device, addresses: &addresses_a };
    let end_b = End { namespace: &b, device: &options.device, addresses: &addresses_b };
    let wan = Wan::join(end_a, end_b, options.seed)?;
    if !options.conditions.is_empty() {
        change(&wan, options.conditions.iter().map(String::as_str))?;
    }
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "counts" {
            let (a, b) = wan.counts();
            println!("a: {a:?}\nb: {b:?}");
            continue;
        }
        match change(&wan, line.split_whitespace()) {
            Ok(()) => println!("ok"),
            Err(error) => println!("error: {error:#}"),
        }
    }
    Ok(())
}

/// All of the line holds, or nothing of it.
fn change<'a>(wan: &Wan, conditions: impl Iterator<Item = &'a str>) -> anyhow::Result<()> {
    let changes: Vec<_> = conditions.map(Conditions::parse).collect::<anyhow::Result<_>>()?;
    if changes.is_empty() {
        bail!("nothing to change");
    }
    for (side, change) in changes {
        wan.change(side, change);
    }
    Ok(())
}
