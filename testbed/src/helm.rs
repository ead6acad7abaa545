//! Where Helm is, for tests of the chart below `deploy/helm/`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What to say where there is none.
pub const NEEDED: &str = "Helm 3.18 or newer (testbed/tools/install brings one)";
/// The first one that refuses a chart's values by all of its JSON schema.
const FIRST: (u32, u32) = (3, 18);

/// The Helm of the variable `HELM`, that `testbed/tools/install` linked in `tools`, or of the `PATH`.
pub fn find(tools: &Path) -> Option<PathBuf> {
    let named = std::env::var_os("HELM").map(PathBuf::from);
    let candidates = named.into_iter().chain([tools.join("helm"), PathBuf::from("helm")]);
    candidates.into_iter().find(|program| is_new_enough(program))
}

/// A command that the user's settings have no part in.
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HELM_")) {
        command.env_remove(name);
    }
    command.env("HELM_NO_PLUGINS", "1").env("KUBECONFIG", "/dev/null");
    command
}

fn is_new_enough(program: &Path) -> bool {
    let Ok(output) = command(program).args(["version", "--template", "{{.Version}}"]).output() else { return false };
    let text = String::from_utf8_lossy(&output.stdout);
    let mut numbers = text.trim_start_matches('v').split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= FIRST
}
