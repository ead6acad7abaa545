//! Every module and example below `terraform/`, without any cloud: formatted, initialised from a mirror on disk,
//! validated and tested with mock providers against the real schemas; each validation refuses with its message; what is
//! wrong is found.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use regex::Regex;
use serde_json::{Value, json};
use support::{Copy, PROVIDERS, both, skip, terraform, terraform_folder, tools};
use tombolo_testbed::terraform::command;

/// `modules/NAME` and `examples/NAME`, all of them.
fn roots() -> Vec<String> {
    let mut roots = Vec::new();
    for folder in ["modules", "examples"] {
        let entries = fs::read_dir(terraform_folder().join(folder)).unwrap();
        roots.extend(entries.map(|entry| format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap())));
    }
    roots.sort();
    assert!(roots.len() >= 3, "{roots:?}");
    roots
}

/// All `.tf` files of a folder, one after the other.
fn source(root: &str) -> String {
    let files = fs::read_dir(terraform_folder().join(root)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = files.filter(|path| path.extension() == Some(OsStr::new("tf"))).collect();
    files.sort();
    files.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// A mock for each provider that the source needs, and for each of its aliases.
fn mocks(source: &str) -> serde_json::Map<String, Value> {
    let alias = Regex::new(r#"provider "(\w+)" \{\n +alias += "(\w+)""#).unwrap();
    let needed = PROVIDERS.iter().filter(|name| source.contains(&format!("hashicorp/{name}\"")));
    let mock = |name: &&str| {
        let aliases = alias.captures_iter(source).filter(|found| found[1] == **name);
        let aliases: Vec<Value> = aliases.map(|found| json!({ "alias": &found[2] })).collect();
        ((*name).to_owned(), if aliases.is_empty() { json!({}) } else { aliases.into() })
    };
    needed.map(mock).collect()
}

#[test]
fn everything_is_formatted() {
    let Some(terraform) = terraform() else { return };
    let mut command = command(terraform);
    command.args(["fmt", "-check", "-diff", "-recursive"]).arg(terraform_folder());
    let output = command.output().unwrap();
    assert!(output.status.success(), "run terraform fmt -recursive terraform\n{}", both(&output));
}

#[test]
fn the_tables_of_every_readme_are_what_the_variables_say() {
    let output = Command::new("python3").arg(terraform_folder().join("tools/tables")).arg("--check").output();
    let Ok(output) = output else { return skip("python3") };
    assert!(output.status.success(), "{}", both(&output));
}

#[test]
fn every_module_and_example_is_valid_and_passes_its_tests() {
    let Some(copy) = Copy::new() else { return };
    let success = Regex::new(r"Success! (\d+) passed, 0 failed").unwrap();
    for root in roots() {
        let folder = copy.folder(&root);
        copy.succeed(&folder, &["init", "-backend=false", "-input=false", "-no-color"]);
        copy.succeed(&folder, &["validate", "-no-color"]);
        let told = copy.succeed(&folder, &["test", "-no-color"]);
        let passed = success.captures(&told);
        assert!(passed.is_some_and(|count| &count[1] != "0"), "{root} has no test that passed:\n{told}");
    }
}

/// One file of tests for each refusal, since a run that ends in an error ends its file.
#[test]
fn every_validation_refuses_with_its_message() {
    let Some(copy) = Copy::new() else { return };
    let message = Regex::new(r#"error_message\s*=\s*"([^"]+)""#).unwrap();
    for root in roots() {
        let messages: BTreeSet<String> =
            message.captures_iter(&source(&root)).map(|found| found[1].to_owned()).collect();
        let file = terraform_folder().join(&root).join("tests/refusals.json");
        let refusals: Value = match fs::read_to_string(&file) {
            Ok(text) => serde_json::from_str(&text).unwrap(),
            Err(_) => {
                assert!(messages.is_empty(), "{root} validates, but has no {}", file.display());
                continue;
            }
        };
        let refused = refusals["refused"].as_array().unwrap();
        let says: Vec<&str> = refused.iter().map(|case| case["says"].as_str().unwrap()).collect();
        for message in &messages {
            assert!(
                says.iter().any(|says| message.contains(says)),
                "{root}: no refusal is tested that says: {message}"
            );
        }
        let folder = copy.folder(&root);
        fs::read_dir(folder.join("tests")).unwrap().for_each(|entry| fs::remove_file(entry.unwrap().path()).unwrap());
        for (number, case) in refused.iter().enumerate() {
            let mut variables = refusals["base"].clone();
            variables.as_object_mut().unwrap().extend(case["set"].as_object().unwrap().clone());
            let mut test = json!({ "variables": variables, "run": { "refused": { "command": "plan" } } });
            let mocks = mocks(&source(&root));
            if !mocks.is_empty() {
                test["mock_provider"] = mocks.into();
            }
            fs::write(folder.join(format!("tests/{number:02}.tftest.json")), test.to_string()).unwrap();
        }
        copy.succeed(&folder, &["init", "-backend=false", "-input=false", "-no-color"]);
        let told = both(&copy.run(&folder, &["test", "-no-color", "-json"]));
        let events: Vec<Value> = told.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        for (number, case) in refused.iter().enumerate() {
            let says = case["says"].as_str().unwrap();
            let file = format!("tests/{number:02}.tftest.json");
            let mut said = events.iter().filter(|event| event["@testfile"] == *file && event["@level"] == "error");
            let heard =
                said.any(|event| event["diagnostic"]["detail"].as_str().is_some_and(|text| text.contains(says)));
            assert!(heard, "{root}: {} must be refused with {says:?}; told:\n{told}", case["set"]);
        }
    }
}

/// What the tests themselves rest on: a provider of this mirror refuses what the real one refuses.
#[test]
fn the_schemas_find_mistakes() {
    let Some(copy) = Copy::new() else { return };
    let folder = copy.folder("scratch");
    fs::create_dir(&folder).unwrap();
    let header = "terraform {\n  required_providers {\n    aws = { source = \"hashicorp/aws\" }\n    azurerm = { source = \"hashicorp/azurerm\" }\n    helm = { source = \"hashicorp/helm\" }\n    kubernetes = { source = \"hashicorp/kubernetes\" }\n  }\n}\n";
    let cases = [
        ("resource \"aws_eip\" \"a\" { domain = \"vpc\" }", None),
        ("resource \"aws_eip\" \"a\" { domian = \"vpc\" }", Some("An argument named \"domian\" is not expected here")),
        (
            "resource \"aws_eip\" \"a\" { tags = \"x\" }",
            Some("Inappropriate value for attribute \"tags\": map of string required"),
        ),
        (
            "resource \"aws_eip\" \"a\" { domain = \"vcp\" }",
            Some("aws_eip.domain is \"vcp\"; the API knows standard, vpc."),
        ),
        (
            "resource \"aws_eip\" \"a\" { arn = \"x\" }",
            Some("aws_eip.arn is set; its value is decided by the provider."),
        ),
        ("resource \"aws_eip\" \"a\" {\n  timeout {}\n}", Some("Blocks of type \"timeout\" are not expected here")),
        (
            "resource \"aws_instance\" \"a\" {\n  metadata_options { http_token = \"required\" }\n}",
            Some("An argument named \"http_token\" is not expected here"),
        ),
        (
            "resource \"aws_instance\" \"a\" {\n  metadata_options { http_tokens = \"always\" }\n}",
            Some("aws_instance.metadata_options.http_tokens is \"always\"; the API knows optional, required."),
        ),
        (
            "resource \"aws_vpc_security_group_ingress_rule\" \"a\" { ip_protocol = \"udp\" }",
            Some("\"security_group_id\" is required"),
        ),
        (
            "provider \"helm\" {\n  kubernetes = { config_context = \"x\" }\n}\nresource \"helm_release\" \"a\" {\n  name = \"a\"\n  chart = \"x\"\n}",
            None,
        ),
        (
            "provider \"helm\" {\n  kubernetes {}\n}\nresource \"helm_release\" \"a\" {\n  name = \"a\"\n  chart = \"x\"\n}",
            Some("Blocks of type \"kubernetes\" are not expected here"),
        ),
        (
            "provider \"helm\" {\n  kubernetes = { config_path = [\"x\"] }\n}\nresource \"helm_release\" \"a\" {\n  name = \"a\"\n  chart = \"x\"\n}",
            Some("Inappropriate value for attribute \"kubernetes\": attribute \"config_path\": string required"),
        ),
        (
            "resource \"helm_release\" \"a\" {\n  name = \"a\"\n  chart = \"x\"\n  values = \"x\"\n}",
            Some("Inappropriate value for attribute \"values\": list of string required"),
        ),
        (
            "resource \"kubernetes_secret_v1\" \"a\" {\n  metadata {}\n  data_write_only = {}\n}",
            Some("An argument named \"data_write_only\" is not expected here"),
        ),
        ("resource \"aws_lb\" \"a\" {}", Some("does not support resource type \"aws_lb\"")),
        (
            "provider \"azurerm\" {\n  feature {}\n}\nresource \"azurerm_role_assignment\" \"a\" {\n  scope = \"x\"\n  principal_id = \"x\"\n}",
            Some("Blocks of type \"feature\" are not expected here"),
        ),
    ];
    fs::write(folder.join("main.tf"), header).unwrap();
    copy.succeed(&folder, &["init", "-backend=false", "-input=false", "-no-color"]);
    for (body, says) in cases {
        fs::write(folder.join("main.tf"), format!("{header}{body}\n")).unwrap();
        let output = copy.run(&folder, &["validate", "-no-color", "-json"]);
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = told.to_string().replace("\\\"", "\"");
        match says {
            None => assert_eq!(told["valid"], true, "{body}:\n{text}"),
            Some(says) => {
                assert!(told["valid"] == false && text.contains(says), "{body} must be refused with {says:?}:\n{text}")
            }
        }
    }
}

/// Where a resource deliberately does what the scanner warns of, a comment in it says why.
#[test]
fn the_policy_scanner_finds_nothing() {
    let checkov = tools().join("checkov/bin/checkov");
    if !checkov.is_file() {
        return skip("checkov (testbed/tools/install brings it)");
    }
    let mut command = Command::new(checkov);
    command.args(["--framework", "terraform", "--skip-download", "--compact", "--output", "json", "--directory"]);
    let output = command.arg(terraform_folder()).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", both(&output)));
    let summary = &report["summary"];
    assert!(output.status.success() && summary["failed"] == 0, "{:#}", report["results"]["failed_checks"]);
    assert!(summary["passed"].as_u64() > Some(30) && summary["parsing_errors"] == 0, "{summary}");
    for skipped in report["results"]["skipped_checks"].as_array().unwrap() {
        let reason = skipped["check_result"]["suppress_comment"].as_str().unwrap_or_default();
        assert!(reason.split_whitespace().count() >= 5, "a reason for {}: {reason:?}", skipped["check_id"]);
    }
}
