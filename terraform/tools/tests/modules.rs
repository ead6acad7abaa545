//! Every module and example below `terraform/`, without any cloud: formatted, initialised from a mirror on disk,
//! validated and tested with mock providers against the real schemas; each validation refuses with its message; what is
//! wrong is found.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use regex::Regex;
use serde_json::{Value, json};
use tempfile::TempDir;

const PROVIDERS: [&str; 3] = ["aws", "azurerm", "google"];
/// The first one that knows what the modules need: validations that look at other variables.
const TERRAFORM_MINOR_MIN: u32 = 9;

fn terraform_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The Terraform to run: of `TERRAFORM`, in the `PATH`, or from `testbed/tools/install`; `None` skips a test by name where
/// there is none, which fails where everything must run.
fn terraform() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let named = std::env::var_os("TERRAFORM").map(PathBuf::from);
        let tools = std::env::var_os("TOMBOLO_TEST_TOOLS").map(PathBuf::from);
        let tools = tools.unwrap_or_else(|| terraform_folder().join("../target/test-tools"));
        let candidates = named.into_iter().chain([PathBuf::from("terraform"), tools.join("terraform")]);
        candidates.into_iter().find(|program| is_new_enough(program))
    });
    if found.is_none() {
        let needs = format!("Terraform 1.{TERRAFORM_MINOR_MIN} or newer (testbed/tools/install brings one)");
        assert!(std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(), "this test needs {needs}");
        println!("skipped: needs {needs}");
    }
    found.as_deref()
}

fn is_new_enough(program: &Path) -> bool {
    let Ok(output) = Command::new(program).args(["version", "-json"]).env_remove("TF_CLI_CONFIG_FILE").output() else {
        return false;
    };
    let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout) else { return false };
    let version = answer["terraform_version"].as_str().unwrap_or_default().to_owned();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (1, TERRAFORM_MINOR_MIN)
}

/// A copy of the modules and examples, and a mirror of providers: the real tree stays as it is.
struct Copy {
    directory: TempDir,
    terraform: &'static Path,
}

impl Copy {
    fn new() -> Option<Self> {
        let terraform = terraform()?;
        let directory = TempDir::new().unwrap();
        for folder in ["modules", "examples"] {
            copy(&terraform_folder().join(folder), &directory.path().join(folder));
        }
        let platform = match std::env::consts::ARCH {
            "x86_64" => "linux_amd64",
            "aarch64" => "linux_arm64",
            other => panic!("no platform of Terraform's for {other}"),
        };
        let schemas = terraform_folder().join("tools/schemas");
        for name in PROVIDERS {
            let schema = fs::read_to_string(schemas.join(format!("{name}.json"))).unwrap();
            let version =
                serde_json::from_str::<Value>(&schema).unwrap()["provider_version"].as_str().unwrap().to_owned();
            let package = format!("mirror/registry.terraform.io/hashicorp/{name}/{version}/{platform}");
            let package = directory.path().join(package);
            fs::create_dir_all(&package).unwrap();
            fs::write(package.join("schema.json"), schema).unwrap();
            fs::copy(schemas.join("enums.json"), package.join("enums.json")).unwrap();
            let executable = package.join(format!("terraform-provider-{name}_v{version}"));
            let ours = env!("CARGO_BIN_EXE_terraform-provider-schema");
            fs::hard_link(ours, &executable).or_else(|_| fs::copy(ours, &executable).map(drop)).unwrap();
        }
        let mirror = directory.path().join("mirror");
        let settings =
            format!("provider_installation {{\n  filesystem_mirror {{ path = \"{}\" }}\n}}\n", mirror.display());
        fs::write(directory.path().join("settings.tfrc"), settings).unwrap();
        Some(Self { directory, terraform })
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn run(&self, folder: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new(self.terraform);
        command.args(arguments).current_dir(folder);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TF_")) {
            command.env_remove(name);
        }
        command
            .env("TF_CLI_CONFIG_FILE", self.directory.path().join("settings.tfrc"))
            .env("TF_DISABLE_PLUGIN_TLS", "1")
            .env("TF_IN_AUTOMATION", "1")
            .env("CHECKPOINT_DISABLE", "1")
            .output()
            .unwrap()
    }

    fn succeed(&self, folder: &Path, arguments: &[&str]) -> String {
        let output = self.run(folder, arguments);
        let name = folder.strip_prefix(self.directory.path()).unwrap_or(folder).display();
        assert!(output.status.success(), "terraform {arguments:?} in {name}:\n{}", both(&output));
        both(&output)
    }
}

fn both(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let name = entry.file_name();
        // What an operator's own runs left in the tree is none of the test's.
        if entry.path().is_dir() && name != ".terraform" {
            copy(&entry.path(), &to.join(name));
        } else if entry.path().is_file() && name != ".terraform.lock.hcl" {
            fs::copy(entry.path(), to.join(name)).unwrap();
        }
    }
}

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

#[test]
fn everything_is_formatted() {
    let Some(terraform) = terraform() else { return };
    let mut command = Command::new(terraform);
    command.args(["fmt", "-check", "-diff", "-recursive"]).arg(terraform_folder()).env_remove("TF_CLI_CONFIG_FILE");
    let output = command.output().unwrap();
    assert!(output.status.success(), "run terraform fmt -recursive terraform\n{}", both(&output));
}

#[test]
fn the_tables_of_every_readme_are_what_the_variables_say() {
    let output = Command::new("python3").arg(terraform_folder().join("tools/tables")).arg("--check").output();
    let Ok(output) = output else {
        assert!(std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(), "this test needs python3");
        println!("skipped: needs python3");
        return;
    };
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
            let mocks = PROVIDERS.iter().filter(|name| source(&root).contains(&format!("hashicorp/{name}\"")));
            let mocks: serde_json::Map<String, Value> = mocks.map(|name| ((*name).to_owned(), json!({}))).collect();
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
    let header = "terraform {\n  required_providers {\n    aws = { source = \"hashicorp/aws\" }\n    azurerm = { source = \"hashicorp/azurerm\" }\n  }\n}\n";
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
