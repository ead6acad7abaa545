//! How much the modules' tests see: changes one thing after the other in each cloud's module and asks whether
//! `terraform test` notices. `terraform/mutate` runs it; it fails below [`CAUGHT_MIN`], and for a survivor without a reason.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use regex::Regex;
use serde_json::Value;
use support::{Copy, terraform_folder};

const MODULES: [&str; 3] = ["modules/aws-gateway", "modules/azure-gateway", "modules/gcp-gateway"];
const FILES: [&str; 2] = ["main.tf", "outputs.tf"];
const CAUGHT_MIN: f64 = 0.95;

/// Changes that nothing can notice: module, kind and part of the line, and why.
const REASONS: &[(&str, &str, &str, &str)] = &[];

/// One change of one line.
#[derive(Clone)]
struct Mutant {
    module: &'static str,
    file: &'static str,
    line: usize,
    kind: &'static str,
    before: String,
    after: String,
}

struct Patterns {
    attribute: Regex,
    block: Regex,
    resource: Regex,
    literal: Regex,
    number: Regex,
    port: Regex,
}

impl Patterns {
    fn new() -> Self {
        let compiled = |pattern: &str| Regex::new(pattern).unwrap();
        Self {
            attribute: compiled(r#"^( +)("?)([A-Za-z][-\w./]*)("?)( *)= (.+)$"#),
            block: compiled(r"^  ([a-z_]+) \{$"),
            resource: compiled(r#"^resource "(\w+)" "\w+" \{$"#),
            literal: compiled(r#""((?:[^"\\$]|\\.|\$\{[^}]*\})*)""#),
            number: compiled(r"= (\d+)$"),
            port: compiled(r"var\.(tunnel|health)_port"),
        }
    }
}

/// All mutants of a file. What stands in it is what `terraform fmt` wrote, one attribute a line.
fn mutants(module: &'static str, file: &'static str, patterns: &Patterns, enums: &Value) -> Vec<Mutant> {
    let text = fs::read_to_string(terraform_folder().join(module).join(file)).unwrap();
    let (mut found, mut resource) = (Vec::new(), String::new());
    for (line, before) in text.lines().enumerate() {
        let comment = before.trim_start().starts_with('#');
        let prose = before.trim_start().starts_with("description") && file == "outputs.tf";
        if comment || prose || before.starts_with("output") || before.starts_with("locals") {
            continue;
        }
        let mut add = |kind, after: String| {
            found.push(Mutant { module, file, line, kind, before: before.to_owned(), after });
        };
        if let Some(head) = patterns.resource.captures(before) {
            resource = head[1].to_owned();
            add("resource type", before.replacen(&resource, &format!("{resource}x"), 1));
            continue;
        }
        if let Some(block) = patterns.block.captures(before) {
            add("nested block", before.replacen(&block[1], &format!("{}x", &block[1]), 1));
            continue;
        }
        let Some(attribute) = patterns.attribute.captures(before) else { continue };
        let (indent, name, value) = (&attribute[1], &attribute[3], &attribute[6]);
        add("name", format!("{indent}{}{name}x{}{}= {value}", &attribute[2], &attribute[4], &attribute[5]));
        if !value.ends_with(['{', '[', '(']) {
            add("removed", String::new());
            add("null", format!("{indent}{}{name}{} = null", &attribute[2], &attribute[4]));
            add("type", format!("{indent}{}{name}{} = {{ wrong = [\"type\"] }}", &attribute[2], &attribute[4]));
        }
        for literal in patterns.literal.captures_iter(value) {
            let whole = literal.get(1).unwrap();
            let at = before.len() - value.len();
            let with = |new: &str| format!("{}{new}{}", &before[..at + whole.start()], &before[at + whole.end()..]);
            add("value", with(&format!("{}x", whole.as_str())));
            let others = enums["values"][format!("{resource}.{name}")].as_array();
            let others =
                others.into_iter().flatten().filter_map(Value::as_str).filter(|other| *other != whole.as_str());
            others.for_each(|other| add("enum", with(other)));
        }
        if let Some(number) = patterns.number.captures(before) {
            let more = number[1].parse::<u64>().unwrap() + 1;
            add("value", before.replacen(&format!("= {}", &number[1]), &format!("= {more}"), 1));
        }
        if let Some(port) = patterns.port.find(before).filter(|_| !before.contains("${")) {
            add("value", before.replacen(port.as_str(), &format!("({} - 1)", port.as_str()), 1));
        }
    }
    found
}

/// Whether the module's own tests fail with it.
fn is_caught(copy: &Copy, mutant: &Mutant) -> bool {
    let folder = copy.folder(mutant.module);
    let path = folder.join(mutant.file);
    let text = fs::read_to_string(&path).unwrap();
    let lines = text.lines().enumerate();
    let changed: Vec<&str> = lines.map(|(at, line)| if at == mutant.line { &mutant.after } else { line }).collect();
    fs::write(&path, changed.join("\n") + "\n").unwrap();
    let caught = !copy.run(&folder, &["test", "-no-color"]).status.success();
    fs::write(&path, text).unwrap();
    caught
}

fn prepared() -> Option<Copy> {
    let copy = Copy::new()?;
    for module in MODULES {
        let folder = copy.folder(module);
        copy.succeed(&folder, &["init", "-backend=false", "-input=false", "-no-color"]);
        copy.succeed(&folder, &["test", "-no-color"]);
    }
    Some(copy)
}

fn reason(mutant: &Mutant) -> Option<&'static str> {
    let about = |(module, kind, part, _): &&(&str, &str, &str, &str)| {
        mutant.module == *module && mutant.kind == *kind && mutant.before.contains(part)
    };
    REASONS.iter().find(about).map(|(.., why)| *why)
}

fn main() {
    let began = Instant::now();
    let enums = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/enums.json")).unwrap();
    let enums: Value = serde_json::from_str(&enums).unwrap();
    let patterns = Patterns::new();
    let pairs = MODULES.iter().flat_map(|module| FILES.map(|file| (*module, file)));
    let all: Vec<Mutant> = pairs.flat_map(|(module, file)| mutants(module, file, &patterns, &enums)).collect();
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let Some(copy) = prepared() else { return };
                while let Some(mutant) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let caught = is_caught(&copy, mutant);
                    results.lock().unwrap().push((mutant.clone(), caught));
                }
                // What failed did so for its mutant: without one, everything still passes.
                MODULES.iter().for_each(|module| drop(copy.succeed(&copy.folder(module), &["test", "-no-color"])));
            });
        }
    });
    let results = results.into_inner().unwrap();
    if results.is_empty() {
        return;
    }
    let mut table = BTreeMap::<(&str, &str), (usize, usize)>::new();
    for (mutant, caught) in &results {
        let cell = table.entry((mutant.module, mutant.kind)).or_default();
        *cell = (cell.0 + usize::from(*caught), cell.1 + 1);
    }
    for ((module, kind), (caught, of)) in &table {
        println!("{module:24} {kind:14} {caught:4} of {of:4} caught");
    }
    let survivors: Vec<&Mutant> = results.iter().filter(|(_, caught)| !caught).map(|(mutant, _)| mutant).collect();
    for mutant in &survivors {
        let why = reason(mutant).unwrap_or("NO REASON");
        println!(
            "survived: {}/{}:{}: {}: {} -> {}\n    {why}",
            mutant.module,
            mutant.file,
            mutant.line + 1,
            mutant.kind,
            mutant.before.trim(),
            mutant.after.trim()
        );
    }
    let caught = (results.len() - survivors.len()) as f64 / results.len() as f64;
    println!("{} mutants, {:.1} % caught, {} s", results.len(), caught * 100.0, began.elapsed().as_secs());
    assert!(caught >= CAUGHT_MIN, "at least {:.0} % must be caught", CAUGHT_MIN * 100.0);
    assert!(survivors.iter().all(|mutant| reason(mutant).is_some()), "each survivor needs a reason");
}
