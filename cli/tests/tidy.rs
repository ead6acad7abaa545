//! The shape of the workspace: which crate may know which, what the core must not know, and how long a
//! file and a function may be. A deliberate exception is listed here, with its reason.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Lines of a file without its tests.
const FILE_LINES_MAX: usize = 600;
/// Lines of a function, from its `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 80;

/// Files allowed to be longer: path, lines, why.
const LONG_FILES: &[(&str, usize, &str)] = &[];
/// Functions allowed to be longer: path, name, lines, why.
const LONG_FUNCTIONS: &[(&str, &str, usize, &str)] = &[];

/// Which of our crates each crate may depend on, tests included. The three roles never see each other.
const EDGES: &[(&str, &[&str])] = &[
    ("tombolo-core", &[]),
    ("tombolo-api", &["tombolo-core"]),
    ("tombolo-trust", &["tombolo-api", "tombolo-core"]),
    ("tombolo-leg", &["tombolo-api", "tombolo-core", "tombolo-trust"]),
    ("tombolo-dns", &["tombolo-core"]),
    ("tombolo-runtime", &["tombolo-core"]),
    ("tombolo-gateway", ROLE),
    ("tombolo-federation", ROLE_WITH_DNS),
    ("tombolo-sidecar", ROLE_WITH_DNS),
    ("tombolo-testbed", &[]),
    ("tombolo-terraform", &["tombolo-testbed"]),
    ("tombolo-kind-tests", &["tombolo-testbed"]),
    ("tombolo-bench", &["tombolo-kind-tests", "tombolo-testbed"]),
    ("tombolo", ALL),
];
const ROLE: &[&str] = &["tombolo-api", "tombolo-core", "tombolo-leg", "tombolo-runtime", "tombolo-trust"];
const ROLE_WITH_DNS: &[&str] =
    &["tombolo-api", "tombolo-core", "tombolo-dns", "tombolo-leg", "tombolo-runtime", "tombolo-trust"];
const ALL: &[&str] = &[
    "tombolo-api",
    "tombolo-core",
    "tombolo-dns",
    "tombolo-federation",
    "tombolo-gateway",
    "tombolo-kind-tests",
    "tombolo-leg",
    "tombolo-runtime",
    "tombolo-sidecar",
    "tombolo-testbed",
    "tombolo-trust",
];

/// What decisions must not know of: runtimes, networks, TLS, Kubernetes.
const NOT_IN_CORE: &[&str] =
    &["h2", "hyper", "kube", "mio", "quinn", "quinn-proto", "rustls", "socket2", "tokio", "tonic"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn metadata() -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

#[test]
fn crates_depend_on_each_other_as_the_architecture_says() {
    let metadata = metadata();
    let members: BTreeSet<&str> = list(&metadata["workspace_members"]).iter().map(text).collect();
    let packages: Vec<&Value> =
        list(&metadata["packages"]).iter().filter(|package| members.contains(text(&package["id"]))).collect();
    let names: BTreeSet<&str> = packages.iter().map(|package| text(&package["name"])).collect();
    let edges: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    for package in packages {
        let name = text(&package["name"]);
        let allowed = edges.get(name).unwrap_or_else(|| panic!("{name} is new: say in EDGES what it may depend on"));
        for dependency in list(&package["dependencies"]) {
            let dependency = text(&dependency["name"]);
            assert!(
                !names.contains(dependency) || allowed.contains(&dependency),
                "{name} must not depend on {dependency}; see ARCHITECTURE.md"
            );
        }
    }
}

#[test]
fn the_core_does_no_io() {
    let metadata = metadata();
    let nodes: BTreeMap<&str, &Value> =
        list(&metadata["resolve"]["nodes"]).iter().map(|node| (text(&node["id"]), node)).collect();
    let names: BTreeMap<&str, &str> =
        list(&metadata["packages"]).iter().map(|package| (text(&package["id"]), text(&package["name"]))).collect();
    let core = names.iter().find(|(_, name)| **name == "tombolo-core").unwrap().0;
    let mut seen = BTreeSet::from([*core]);
    let mut left = vec![*core];
    while let Some(id) = left.pop() {
        assert!(!NOT_IN_CORE.contains(&names[id]), "tombolo-core depends on {}", names[id]);
        for dependency in list(&nodes[id]["deps"]) {
            let normal = list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
            let id = text(&dependency["pkg"]);
            if normal && seen.insert(id) {
                left.push(id);
            }
        }
    }
    assert!(seen.len() > 3, "the walk found nothing: {seen:?}");
}

/// Every Rust source of the workspace that is not a test, without what is below its `mod tests`.
fn sources() -> Vec<(String, Vec<String>)> {
    let root = root();
    let mut files = Vec::new();
    let members = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path());
    for member in members.filter(|path| path.join("Cargo.toml").is_file()) {
        collect(&member, &mut files);
    }
    assert!(files.len() > 20, "only {} sources found", files.len());
    let without_tests = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let opens_tests =
            |at: &usize| lines[*at] == "#[cfg(test)]" && lines[at + 1..].iter().any(|line| line.contains("mod "));
        let end = (0..lines.len()).find(opens_tests).unwrap_or(lines.len());
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        (name, lines[..end].iter().map(|line| (*line).to_owned()).collect())
    };
    files.iter().map(without_tests).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && !matches!(name, "tests" | "target") {
            collect(&path, files);
        } else if name.ends_with(".rs") && name != "tests.rs" {
            files.push(path);
        }
    }
}

#[test]
fn files_are_short() {
    let mut long = Vec::new();
    for (path, lines) in sources() {
        let allowed = LONG_FILES.iter().find(|(long, ..)| *long == path).map_or(FILE_LINES_MAX, |(_, lines, _)| *lines);
        if lines.len() > allowed {
            long.push(format!("{path}: {} lines, at most {allowed}: split it by noun", lines.len()));
        }
    }
    assert!(long.is_empty(), "\n{}", long.join("\n"));
}

#[test]
fn functions_are_short() {
    let mut long = Vec::new();
    for (path, lines) in sources() {
        for (name, length) in functions(&lines) {
            let listed = LONG_FUNCTIONS.iter().find(|(file, function, ..)| *file == path && *function == name);
            let allowed = listed.map_or(FUNCTION_LINES_MAX, |(_, _, lines, _)| *lines);
            if length > allowed {
                long.push(format!("{path}: {name}: {length} lines, at most {allowed}"));
            }
        }
    }
    assert!(long.is_empty(), "\n{}", long.join("\n"));
}

/// Names and lengths of all functions. The formatter puts a function's closing brace below its first letter.
fn functions(lines: &[String]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some(name) = function_name(code) else { continue };
        let indent = line.len() - code.len();
        let closing = format!("{}}}", " ".repeat(indent));
        // A declaration without a body ends in `;` before any brace opens.
        let ends = |(_, line): &(usize, &String)| {
            **line == closing || (line.ends_with(';') && line.len() - line.trim_start().len() == indent)
        };
        if let Some((end, _)) = lines.iter().enumerate().skip(at).find(ends) {
            found.push((name.to_owned(), end - at + 1));
        }
    }
    found
}

fn function_name(code: &str) -> Option<&str> {
    let before = code.find("fn ")?;
    let qualifiers = |word: &str| {
        matches!(word, "async" | "const" | "unsafe" | "extern" | "\"C\"" | "pub")
            || word.starts_with("pub(")
            || word.ends_with(')')
    };
    if !code[..before].split_whitespace().all(qualifiers) {
        return None;
    }
    code[before + 3..].split(['(', '<']).next()
}

#[test]
fn functions_are_found_where_the_formatter_puts_them() {
    let source = "\
pub async fn one(a: u8) -> u8 {
    a
}

impl X {
    pub(crate) fn two<T>(
        &self,
    ) {
        if a {
        }
    }
    fn three();
}
";
    let lines: Vec<String> = source.lines().map(str::to_owned).collect();
    let found = functions(&lines);
    assert_eq!(found, [("one".to_owned(), 3), ("two".to_owned(), 6), ("three".to_owned(), 1)]);
}

#[test]
fn types_are_named_by_nouns_of_the_field() {
    let vague = ["Manager", "Util", "Utils", "Helper", "Context"];
    for (path, lines) in sources() {
        for line in &lines {
            let mut words =
                line.trim_start().split([' ', '<', '(', '{', ';']).skip_while(|word| word.starts_with("pub"));
            if !matches!(words.next(), Some("struct" | "enum" | "trait")) {
                continue;
            }
            let name = words.next().unwrap_or_default();
            assert!(!vague.iter().any(|vague| name.ends_with(vague)), "{path}: {name} says nothing; find the noun");
        }
    }
}
