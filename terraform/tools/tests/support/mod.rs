//! The modules and examples where a test may change them, and Terraform there, without any cloud.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;
use tombolo_testbed::terraform::{NEEDED, command};

pub const PROVIDERS: [&str; 5] = ["aws", "azurerm", "google", "helm", "kubernetes"];

pub fn terraform_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Where `testbed/tools/install` puts programs that are not ours.
pub fn tools() -> PathBuf {
    let named = std::env::var_os("TOMBOLO_TEST_TOOLS").map(PathBuf::from);
    named.unwrap_or_else(|| terraform_folder().join("../target/test-tools"))
}

/// Says by name what a test was skipped for; a failure where everything must run.
pub fn skip(needs: &str) {
    assert!(std::env::var_os("TOMBOLO_REQUIRE_ALL").is_none(), "this test needs {needs}");
    println!("skipped: needs {needs}");
}

/// The Terraform to run; `None` skips a test by name where there is none.
pub fn terraform() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = FOUND.get_or_init(|| tombolo_testbed::terraform::find(&tools()));
    if found.is_none() {
        skip(NEEDED);
    }
    found.as_deref()
}

/// A copy of the modules and examples, and a mirror of providers: the real tree stays as it is.
pub struct Copy {
    directory: TempDir,
    terraform: &'static Path,
}

impl Copy {
    pub fn new() -> Option<Self> {
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

    pub fn folder(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn run(&self, folder: &Path, arguments: &[&str]) -> Output {
        command(self.terraform)
            .args(arguments)
            .current_dir(folder)
            .env("TF_CLI_CONFIG_FILE", self.directory.path().join("settings.tfrc"))
            .env("TF_DISABLE_PLUGIN_TLS", "1")
            .output()
            .unwrap()
    }

    pub fn succeed(&self, folder: &Path, arguments: &[&str]) -> String {
        let output = self.run(folder, arguments);
        let name = folder.strip_prefix(self.directory.path()).unwrap_or(folder).display();
        assert!(output.status.success(), "terraform {arguments:?} in {name}:\n{}", both(&output));
        both(&output)
    }
}

pub fn both(output: &Output) -> String {
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
