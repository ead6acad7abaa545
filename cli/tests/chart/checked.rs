//! What others' tools say of the rendered chart: the schemas of each supported release of Kubernetes, and a policy scan.

use std::process::Command;

use serde_json::Value;

use crate::support::{skip, tools};
use crate::{NAMESPACE, cases, program, render};

/// Releases of Kubernetes that the chart is for (`kubeVersion` in Chart.yaml is the first one).
const RELEASES: [&str; 6] = ["1.32", "1.33", "1.34", "1.35", "1.36", "1.37"];

/// What the policy scan would have otherwise, and why it is as it is.
const SKIPPED: [(&str, &str); 4] = [
    ("CKV_K8S_38", "the federation watches its cluster and writes imports, by the rights of its account"),
    ("CKV_K8S_155", "the federation keeps caBundle current in its own two webhook configurations, named in the rule"),
    ("CKV_K8S_43", "an image that was loaded into the nodes has no digest there (hidden-values.yaml)"),
    ("CKV_K8S_15", "that one is in no registry either"),
];

/// A folder with each rendered case in a file of its own.
fn rendered() -> Option<tempfile::TempDir> {
    let program = program()?;
    // The scanner passes over hidden folders, which those of `tempdir` are.
    let folder = tempfile::Builder::new().prefix("tombolo-test-").tempdir().unwrap();
    for (case, values) in cases() {
        let text = render(&program, NAMESPACE, &values);
        // Kinds of operators have no schema here.
        let documents = text.split("\n---\n").filter(|document| !document.contains("kind: ServiceMonitor"));
        let text = documents.collect::<Vec<_>>().join("\n---\n");
        std::fs::write(folder.path().join(format!("{case}.yaml")), text).unwrap();
    }
    Some(folder)
}

#[test]
fn every_object_is_valid_in_every_supported_release() {
    let python = tools().join("venv/bin/python3");
    let importable = Command::new(&python).args(["-c", "import kubernetes_validate"]).output();
    if !importable.is_ok_and(|output| output.status.success()) {
        return skip("kubernetes-validate (testbed/tools/install brings it)");
    }
    let Some(folder) = rendered() else { return };
    let files: Vec<_> = cases().into_iter().map(|(case, _)| folder.path().join(format!("{case}.yaml"))).collect();
    let validate = |release: &str, files: &[std::path::PathBuf]| {
        let mut command = Command::new(&python);
        command.args(["-m", "kubernetes_validate", "--strict", "--kubernetes-version", release]).args(files);
        let output = command.output().unwrap();
        let told = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
        (output.status.success(), told)
    };
    for release in RELEASES {
        let (valid, told) = validate(release, &files);
        assert!(valid, "{release}: {told}");
    }
    // What this rests on: a misspelt field is found.
    let text = std::fs::read_to_string(&files[0]).unwrap().replace("replicas:", "replcias:");
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, text).unwrap();
    let (valid, told) = validate(RELEASES[0], &[wrong]);
    assert!(!valid && told.contains("replcias"), "{told}");
}

#[test]
fn the_policy_scanner_finds_nothing_that_has_no_reason() {
    let checkov = tools().join("checkov/bin/checkov");
    if !checkov.is_file() {
        return skip("checkov (testbed/tools/install brings it)");
    }
    let Some(folder) = rendered() else { return };
    let skipped: Vec<&str> = SKIPPED.iter().map(|(check, _)| *check).collect();
    let mut command = Command::new(checkov);
    command.args(["--framework", "kubernetes", "--skip-download", "--compact", "--output", "json", "--directory"]);
    command.arg(folder.path());
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let failed = report["results"]["failed_checks"].as_array().unwrap();
    let found = failed.iter().map(|check| (check["check_id"].as_str().unwrap(), check["resource"].as_str().unwrap()));
    let new: Vec<_> = found.clone().filter(|(check, _)| !skipped.contains(check)).collect();
    assert!(new.is_empty(), "{new:#?}");
    for check in skipped {
        assert!(found.clone().any(|(found, _)| found == check), "{check} is found no more: take it off the list");
    }
    let summary = &report["summary"];
    assert!(summary["passed"].as_u64() > Some(200) && summary["parsing_errors"] == 0, "{summary}");
}
