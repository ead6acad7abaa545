//! The Helm chart: what it renders for every file of values in its `ci` folder, what values it refuses, and that a real API
//! server takes it.

#![allow(clippy::unwrap_used)]

mod admitted;
mod checked;
mod configured;
mod refused;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use support::{binary, skip, tools};
use tombolo_testbed::helm;

/// Writes the golden files instead of comparing with them.
const UPDATE: &str = "TOMBOLO_UPDATE_GOLDEN";
const NAMESPACE: &str = "tombolo-system";

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/tombolo")
}

/// Helm, or a skipped test.
fn program() -> Option<PathBuf> {
    let found = helm::find(&tools());
    if found.is_none() {
        skip(helm::NEEDED);
    }
    found
}

/// The files of values, by what stands before `-values.yaml`.
fn cases() -> Vec<(String, PathBuf)> {
    let files = std::fs::read_dir(chart().join("ci")).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<(String, PathBuf)> = files
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().strip_suffix("-values.yaml").unwrap().to_owned();
            (name, path)
        })
        .collect();
    cases.sort();
    assert!(cases.len() >= 4, "{cases:?}");
    cases
}

fn run(program: &Path, arguments: &[&str]) -> Output {
    helm::command(program).args(arguments).arg(chart()).output().unwrap()
}

fn succeed(program: &Path, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(output.status.success(), "helm {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn render(program: &Path, namespace: &str, values: &Path) -> String {
    succeed(program, &["template", "tombolo", "--namespace", namespace, "--values", values.to_str().unwrap()])
}

/// The objects of a YAML text.
fn objects(yaml: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap()
}

#[test]
fn it_is_linted_and_renders_what_the_golden_files_say() {
    let Some(program) = program() else { return };
    for (case, values) in cases() {
        succeed(&program, &["lint", "--strict", "--values", values.to_str().unwrap()]);
        // What is in deploy/kubernetes has a test of its own.
        let rendered = render(&program, NAMESPACE, &values);
        let documents = rendered.split_inclusive("\n---\n").filter(|text| !text.contains("templates/kubernetes.yaml"));
        let rendered: String = documents.collect();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/chart/golden/{case}.yaml"));
        if std::env::var_os(UPDATE).is_some() {
            std::fs::write(&golden, &rendered).unwrap();
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        let differs = rendered.lines().zip(expected.lines()).find(|(got, want)| got != want);
        assert!(
            rendered == expected,
            "{case} is not what {} says; first: {differs:?}. If it should be, run this test with {UPDATE}=1",
            golden.display()
        );
    }
}

#[tokio::test]
async fn its_definitions_are_those_of_the_program() {
    let written = std::fs::read_to_string(chart().join("crds/definitions.yaml")).unwrap();
    let told = binary().run(&["crds"]).await.unwrap();
    assert!(
        written.trim() == told.trim(),
        "run `tombolo crds > deploy/helm/tombolo/crds/definitions.yaml`: the kinds have changed"
    );
}

#[test]
fn what_is_applied_without_it_is_in_it_unchanged() {
    let Some(program) = program() else { return };
    let read = |name: &str| {
        let file = std::fs::read_to_string(chart().join("../../kubernetes").join(name)).unwrap();
        objects(&file).into_iter().filter(|object| object["kind"] != "Namespace").collect::<Vec<_>>()
    };
    let (rights, injection) = (read("rbac.yaml"), read("injection.yaml"));
    assert!(rights.len() >= 5 && injection.len() >= 4, "{rights:#?}{injection:#?}");
    for (case, values) in cases() {
        let rendered = objects(&render(&program, NAMESPACE, &values));
        let injects = case != "hidden";
        let expected: Vec<Value> = rights.iter().chain(injection.iter().filter(|_| injects)).cloned().collect();
        for object in &expected {
            let same = |other: &&Value| other["kind"] == object["kind"] && name(other) == name(object);
            let mut found = rendered.iter().find(same).unwrap_or_else(|| panic!("{case}: no {object:#}")).clone();
            found["metadata"].as_object_mut().unwrap().remove("labels");
            if object["kind"] == "ServiceAccount" {
                found.as_object_mut().unwrap().remove("automountServiceAccountToken");
            }
            assert_eq!(found, *object, "{case}");
        }
        let is_right = |object: &&Value| {
            let kind = object["kind"].as_str().unwrap();
            ["Role", "Binding", "WebhookConfiguration"].iter().any(|end| kind.ends_with(end))
        };
        let count = |objects: &[Value]| objects.iter().filter(is_right).count();
        assert_eq!(count(&rendered), count(&expected), "{case} has rights of its own");
    }
}

/// Whoever reaches the gateways' TCP port is not authenticated there.
#[test]
fn nothing_but_tunnels_is_open_to_the_outside() {
    let Some(program) = program() else { return };
    let mut outside = 0;
    for (case, values) in cases() {
        for object in objects(&render(&program, NAMESPACE, &values)) {
            let kind = object["spec"]["type"].as_str().unwrap_or("ClusterIP");
            assert!(object["kind"] != "Ingress" && object["spec"]["externalIPs"].is_null(), "{case}: {object}");
            if object["kind"] == "Service" && kind != "ClusterIP" {
                outside += 1;
                let ports = object["spec"]["ports"].as_array().unwrap();
                let udp = ports.iter().all(|port| port["protocol"] == "UDP" && port["targetPort"] == "tunnel");
                assert!(udp && ports.len() == 1, "{case}: {object:#}");
            }
            let pod = &object["spec"]["template"]["spec"];
            assert!(pod["hostNetwork"].is_null(), "{case}: {object:#}");
            for container in pod["containers"].as_array().into_iter().flatten() {
                let ports = container["ports"].as_array().unwrap();
                assert!(ports.iter().all(|port| port["hostPort"].is_null()), "{case}: {container:#}");
            }
        }
    }
    assert!(outside >= 3, "only {outside} Services were looked at");
}
