//! Which functions a sidecar, a gateway and a federation run, written as a linker script that puts them side by side.
//!
//! The kernel maps a program's code 64 KB at a time. What runs is a tenth of the code and lies all over it, so that a process
//! has most of the program mapped. Side by side it is a few megabytes, which also share the processor's caches.
//!
//! A function is known by its crate of origin (the object file's name) and its name. The hash in it changes with the versions of
//! compiler and dependencies: what is not found any more by its whole name is still found without the hash, less tightly
//! packed. A name that is gone costs nothing but its place.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use tombolo_kind_tests::client::{Connection, Target};

use crate::apps::App;
use crate::compare::first_answer;
use crate::mesh::{self, Mesh, Setup};

#[derive(Debug, Args)]
pub struct Given {
    /// The tombolo binary, with its symbols.
    #[arg(long)]
    tombolo: PathBuf,
    /// The linker's map of it.
    #[arg(long)]
    map: PathBuf,
    /// Where the linker script is written.
    #[arg(long)]
    script: PathBuf,
}

const ROLES: [&str; 3] = ["sidecar", "gateway", "federation"];

/// Who runs what comes first, next and so on. What a sidecar runs lies in one piece, and so does what a gateway runs.
const ORDER: [[bool; 3]; 7] = [
    [true, false, false],
    [true, false, true],
    [true, true, true],
    [true, true, false],
    [false, true, false],
    [false, true, true],
    [false, false, true],
];
const CONNECTIONS: usize = 20;
const REQUESTS: usize = 20;

pub async fn run(given: &Given) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("tombolo-layout-").tempdir()?;
    let wrapper = wrapper(&given.tombolo, folder.path())?;
    exercise(&wrapper, folder.path()).await?;
    let mut ran: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(folder.path())? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if let Some(role) = ROLES.into_iter().find(|role| name.starts_with(&format!("{role}."))) {
            ran.entry(role).or_default().extend(functions(&std::fs::read_to_string(&path)?));
        }
    }
    for role in ROLES {
        let count = ran.get(role).map_or(0, BTreeSet::len);
        anyhow::ensure!(count > 1000, "valgrind saw {count} functions of a {role}: is the binary stripped?");
        println!("{role}: {count} functions");
    }
    let map = std::fs::read_to_string(&given.map).with_context(|| format!("reading {}", given.map.display()))?;
    let script = script(&map, &ran);
    std::fs::write(&given.script, &script).with_context(|| format!("writing {}", given.script.display()))?;
    println!("{} lines in {}", script.lines().count(), given.script.display());
    Ok(())
}

/// A program that starts the roles of interest under valgrind, and everything else as it is.
fn wrapper(tombolo: &Path, folder: &Path) -> anyhow::Result<PathBuf> {
    let tombolo = tombolo.canonicalize()?;
    let (tombolo, out) = (tombolo.display(), folder.display());
    let mut text = String::from("#!/bin/sh\ncase \" $* \" in\n");
    for role in ROLES {
        writeln!(
            text,
            "*\" {role} --config \"*) exec valgrind -q --tool=callgrind --demangle=no --callgrind-out-file='{out}/{role}.%p' '{tombolo}' \"$@\" ;;"
        )?;
    }
    writeln!(text, "*) exec '{tombolo}' \"$@\" ;;\nesac")?;
    let path = folder.join("tombolo");
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
    Ok(path)
}

/// What a process does in a day: starts, serves HTTP and opaque bytes, old and new connections, and stops.
async fn exercise(binary: &Path, folder: &Path) -> anyhow::Result<()> {
    let app = App::start("west", folder).await?;
    let setup = Setup { workers: 1, caller: json!({}), local_app: None, remote_app: app.address, binary };
    let mesh = Mesh::start(&setup).await?;
    let targets = [
        Target::direct(mesh.http, mesh::HOST),
        Target::direct(mesh.tcp, mesh::HOST),
        Target::proxied(mesh.outbound, mesh::HOST),
    ];
    for target in &targets {
        first_answer(target).await?;
        for _ in 0..CONNECTIONS {
            let mut connection = Connection::open(target.address).await?;
            for _ in 0..REQUESTS {
                connection.exchange(&target.request("/")).await?;
            }
        }
    }
    mesh.stop().await;
    Ok(())
}

/// The functions named in a profile in callgrind's format: `fn=(id) name` and `cfn=(id) name`, the name once for each id.
fn functions(profile: &str) -> impl Iterator<Item = String> {
    profile.lines().filter_map(|line| {
        let (kind, rest) = line.split_once("=(")?;
        let (_, name) = rest.split_once(") ")?;
        // Recursive calls are told apart by a quote and the depth.
        let name = name.split('\'').next()?;
        matches!(kind, "fn" | "cfn").then(|| without_clone(name).to_owned())
    })
}

/// A symbol without the suffix that LLVM gives to what it moved between modules.
fn without_clone(symbol: &str) -> &str {
    symbol.split_once(".llvm.").map_or(symbol, |(symbol, _)| symbol)
}

/// Patterns of sections, by the pattern of the object files that hold them, in the order of [`ORDER`]: first each function
/// that ran as it is named in this very build, then every function of such a name. A generic function has as many copies as
/// it is used with types, only few of which run, and nothing but the hash tells them apart.
fn script(map: &str, ran: &BTreeMap<&str, BTreeSet<String>>) -> String {
    let (mut exact, mut alike) = (RunBy::new(), RunBy::new());
    for (object, section) in map.lines().filter_map(input_section) {
        let Some(file) = file_pattern(object) else { continue };
        let symbol = section.trim_start_matches(".text.").trim_start_matches("unlikely.").trim_start_matches("hot.");
        let runs = |role: &str| ran.get(role).is_some_and(|ran| ran.contains(without_clone(symbol)));
        let runs = ROLES.map(runs);
        for (run_by, pattern) in [(&mut exact, exact_pattern(section)), (&mut alike, section_pattern(section))] {
            // One copy is the sidecar's, another the gateway's: both run what has this name.
            let all = run_by.entry((file.clone(), pattern)).or_default();
            all.iter_mut().zip(runs).for_each(|(one, runs)| *one |= runs);
        }
    }
    let mut text = String::from(
        "/* Generated by bench/layout: the code that each role runs, by object file and section. */\n\
         SECTIONS\n{\n.text.hot :\n{\n",
    );
    for run_by in [exact, alike] {
        write_groups(&mut text, run_by);
    }
    text.push_str("}\n}\nINSERT BEFORE .text;\n");
    text
}

/// Which roles run what, by patterns of object file and section.
type RunBy = BTreeMap<(String, String), [bool; 3]>;

fn write_groups(text: &mut String, run_by: RunBy) {
    let rank = |by: &[bool; 3]| ORDER.iter().position(|one| one == by);
    let groups: BTreeSet<_> =
        run_by.into_iter().filter_map(|((file, section), by)| Some((rank(&by)?, file, section))).collect();
    let mut open: Option<(usize, String)> = None;
    for (rank, file, section) in groups {
        if open.as_ref().is_none_or(|(at, name)| (*at, name) != (rank, &file)) {
            if open.is_some() {
                text.push_str(")\n");
            }
            let _ = writeln!(text, "{file}(");
            open = Some((rank, file));
        }
        let _ = writeln!(text, "{section}");
    }
    if open.is_some() {
        text.push_str(")\n");
    }
}

/// `object` and `.text.symbol` of a line `address address size align object:(.text.symbol)` of lld's map.
fn input_section(line: &str) -> Option<(&str, &str)> {
    let (object, section) = line.rsplit_once(":(")?;
    let section = section.strip_suffix(')')?;
    section.starts_with(".text.").then_some((object.rsplit('/').next()?, section))
}

/// `binary-hash.crate-hash.crate.hash-cgu.0.rcgu.o` and `binary-hash.binary.hash-cgu.0.rcgu.o` of LLVM's, and
/// `libcrate-hash.rlib(object.o)` of a C library.
fn file_pattern(object: &str) -> Option<String> {
    if let Some((archive, _)) = object.split_once(".rlib(") {
        return Some(format!("*{}-*", archive.rsplit_once('-')?.0));
    }
    let mut parts = object.split('.').skip(1);
    let (first, second) = (parts.next()?, parts.next()?);
    // Without a second name it is code that the compiler made on the way, under a name that is another every time.
    (second != "rcgu").then(|| format!("*.{}.*", first.split('-').next().unwrap_or(first)))
}

/// The section's name as it is, but for what LLVM appends to what it moves between modules.
fn exact_pattern(section: &str) -> String {
    match section.split_once(".llvm.") {
        Some((section, _)) => format!("{section}.llvm.*"),
        None => section.to_owned(),
    }
}

/// The section's name, with a wildcard for each hash and version in it.
fn section_pattern(section: &str) -> String {
    let section = without_clone(section);
    if let Some((name, hash)) = section.rsplit_once("17h")
        && name.contains("_ZN")
        && hash.len() == 17
    {
        return format!("{name}17h*");
    }
    if let Some((prefix, rest)) = section.split_once("aws_lc_") {
        let name = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '_');
        return format!("{prefix}aws_lc_*_{name}");
    }
    // The newer mangling: `Cs`, the crate's hash in base 62, `_`.
    let mut pattern = String::new();
    let mut rest = section;
    while let Some((before, after)) = rest.split_once("Cs") {
        pattern.push_str(before);
        pattern.push_str("Cs");
        rest = after;
        if let Some((hash, after)) = rest.split_once('_')
            && (8..=12).contains(&hash.len())
            && hash.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            pattern.push_str("*_");
            rest = after;
        }
    }
    pattern + rest
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn hashes_and_versions_are_wildcards() {
        for (section, pattern) in [
            (".text._ZN2h25frame4Head5parse17h0123456789abcdefE", ".text._ZN2h25frame4Head5parse17h*"),
            (".text.unlikely._ZN4core3fmt3fmt17h0123456789abcdefE.llvm.12345", ".text.unlikely._ZN4core3fmt3fmt17h*"),
            (".text._RNvCsfLfy6EI15iL_7___rustc12___rust_alloc", ".text._RNvCs*_7___rustc12___rust_alloc"),
            (".text.aws_lc_0_47_0_SHA256_Init", ".text.aws_lc_*_SHA256_Init"),
            (".text.memcpy_plain", ".text.memcpy_plain"),
        ] {
            assert_eq!(section_pattern(section), pattern);
        }
    }

    #[test]
    fn an_object_file_is_known_by_its_crate() {
        for (object, pattern) in [
            ("tombolo-0f.h2-1a.h2.9844-cgu.2.rcgu.o.rcgu.o", Some("*.h2.*")),
            ("tombolo-0f.tombolo.1f96-cgu.1.rcgu.o", Some("*.tombolo.*")),
            ("tombolo-0f.ankcsau2qa88.rcgu.o", None),
            ("libaws_lc_sys-5e88.rlib(bcm.o)", Some("*libaws_lc_sys-*")),
            ("crti.o", None),
        ] {
            assert_eq!(file_pattern(object).as_deref(), pattern, "{object}");
        }
    }

    #[test]
    fn what_a_role_runs_lies_together_and_what_nobody_runs_is_left_where_it_was() {
        let map = "  1  1 1 16   /t/tombolo-0f.h2-1a.h2.98-cgu.2.rcgu.o.rcgu.o:(.text._ZN2h21a17h0000000000000001E)\n\
                   \x20 1  1 1 16   /t/tombolo-0f.h2-1a.h2.98-cgu.2.rcgu.o.rcgu.o:(.text._ZN2h21b17h0000000000000002E)\n\
                   \x20 1  1 1 16   /t/tombolo-0f.h2-1a.h2.98-cgu.2.rcgu.o.rcgu.o:(.text._ZN2h21c17h0000000000000003E)\n";
        let profile = "fn=(1) _ZN2h21a17h0000000000000001E\nfn=(2) _ZN2h21b17h0000000000000002E'2\nfn=(1)\ncalls=1 2\n";
        let ran = BTreeMap::from([
            ("sidecar", functions(profile).collect::<BTreeSet<_>>()),
            ("gateway", BTreeSet::from(["_ZN2h21b17h0000000000000002E".to_owned()])),
            ("federation", BTreeSet::new()),
        ]);
        let script = script(map, &ran);
        let order = ["_ZN2h21a17h0000000000000001E", "_ZN2h21b17h0000000000000002E", "_ZN2h21a17h*", "_ZN2h21b17h*"];
        let places = order.map(|pattern| script.find(pattern).unwrap());
        assert!(places.is_sorted(), "{script}");
        assert!(!script.contains("_ZN2h21c"), "{script}");
    }
}
