//! Terraform, for tests of the modules below `terraform/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

/// The first one that knows what the modules need: validations that look at other variables.
const MINOR_MIN: u32 = 9;
/// What to say where there is none.
pub const NEEDED: &str = "Terraform 1.9 or newer (testbed/tools/install brings one)";

/// The Terraform of the variable `TERRAFORM`, of the `PATH`, or that `testbed/tools/install` put into `tools`.
pub fn find(tools: &Path) -> Option<PathBuf> {
    let named = std::env::var_os("TERRAFORM").map(PathBuf::from);
    let candidates = named.into_iter().chain([PathBuf::from("terraform"), tools.join("terraform")]);
    candidates.into_iter().find(|program| is_new_enough(program))
}

/// A command that neither the user's settings nor the network have a part in.
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TF_")) {
        command.env_remove(name);
    }
    command.env("TF_CLI_CONFIG_FILE", "/dev/null").env("TF_IN_AUTOMATION", "1").env("CHECKPOINT_DISABLE", "1");
    command
}

/// Applies one module with these inputs, in a folder of its own, and answers with one of its outputs. For modules without a provider.
pub fn apply(program: &Path, folder: &Path, (module, output): (&str, &str), inputs: &Value) -> anyhow::Result<Value> {
    std::fs::create_dir_all(folder)?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../terraform/modules").join(module).canonicalize()?;
    let mut call = inputs.as_object().context("inputs are an object")?.clone();
    call.insert("source".to_owned(), json!(source));
    let value = format!("${{module.it.{output}}}");
    let root = json!({ "module": { "it": call }, "output": { "it": { "value": value } } });
    std::fs::write(folder.join("main.tf.json"), root.to_string())?;
    let run = |arguments: &[&str]| {
        let output = command(program).args(arguments).current_dir(folder).output()?;
        let said = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
        ensure!(output.status.success(), "terraform {arguments:?}:\n{said}");
        Ok(output.stdout)
    };
    run(&["init", "-input=false", "-no-color"])?;
    run(&["apply", "-auto-approve", "-input=false", "-no-color"])?;
    Ok(serde_json::from_slice(&run(&["output", "-json", "it"])?)?)
}

fn is_new_enough(program: &Path) -> bool {
    let Ok(output) = command(program).args(["version", "-json"]).output() else { return false };
    let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout) else { return false };
    let version = answer["terraform_version"].as_str().unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (1, MINOR_MIN)
}
