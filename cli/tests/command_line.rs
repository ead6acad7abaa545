//! The command line: complete help, and refusals that say where and why.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn tombolo(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tombolo")).args(arguments).env_remove("TOMBOLO_STATE").output().unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_command_explains_itself() {
    for command in [
        &["--help"][..],
        &["federation", "--help"],
        &["gateway", "--help"],
        &["sidecar", "--help"],
        &["sidecar", "capture", "--help"],
        &["agent", "--help"],
        &["peer", "invite", "--help"],
        &["peer", "accept", "--help"],
        &["peer", "list", "--help"],
        &["peer", "remove", "--help"],
        &["export", "--help"],
        &["unexport", "--help"],
        &["status", "--help"],
        &["join", "add", "--help"],
        &["trust", "add-root", "--help"],
        &["trust", "revoke", "--help"],
        &["trust", "unrevoke", "--help"],
        &["backup", "--help"],
        &["restore", "--help"],
        &["crds", "--help"],
        &["inject", "--help"],
        &["demo", "--help"],
    ] {
        let output = tombolo(command);
        assert!(output.status.success(), "{command:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("Usage: tombolo"), "{command:?}: {text}");
        // An option without a word about it is no help.
        let bare = text
            .lines()
            .any(|line| line.trim_start().starts_with("--") && !line.trim().contains("  ") && !line.contains('<'));
        assert!(!bare, "{command:?}: {text}");
    }
}

#[test]
fn a_bad_file_is_refused_with_file_line_and_reason() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("federation.yaml");
    std::fs::write(&file, "cluster: east\nstate: /tmp/none\nsource:\n  directory: /tmp/none\nadmni: 127.0.0.1:0\n")
        .unwrap();
    let output = tombolo(&["federation", "--check-config", "--config", file.to_str().unwrap()]);
    assert!(!output.status.success());
    let said = errors(&output);
    assert!(said.contains("federation.yaml:5") && said.contains("admni"), "{said}");

    std::fs::write(&file, "cluster: East!\nstate: /tmp/none\nsource:\n  directory: /tmp/none\n").unwrap();
    let said = errors(&tombolo(&["federation", "--check-config", "--config", file.to_str().unwrap()]));
    assert!(said.contains("federation.yaml:1") && said.contains("DNS label"), "{said}");
}

#[test]
fn a_good_file_passes_and_flags_win_over_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("federation.yaml");
    let text = format!("cluster: east\nstate: {0}\nsource:\n  directory: {0}\n", directory.path().display());
    std::fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    let output = tombolo(&["federation", "--check-config", "--config", path]);
    assert!(output.status.success(), "{}", errors(&output));
    let said = errors(&tombolo(&["federation", "--check-config", "--config", path, "--set", "cluster=Not A Label"]));
    assert!(said.contains("cluster"), "{said}");
}

#[test]
fn a_missing_federation_is_named_with_the_next_step() {
    let directory = tempfile::tempdir().unwrap();
    let said = errors(&tombolo(&["status", "--state", directory.path().to_str().unwrap()]));
    assert!(said.contains("operator.sock") && said.contains("--state"), "{said}");
}

#[test]
fn a_script_must_say_what_a_peer_may_bring_in() {
    let output = Command::new(env!("CARGO_BIN_EXE_tombolo"))
        .args(["peer", "invite", "--state", "/nonexistent"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(errors(&output).contains("--imports is required without a terminal"), "{}", errors(&output));
}

#[test]
fn the_configuration_reference_is_valid() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("cluster")).unwrap();
    std::fs::write(directory.path().join("kubeconfig"), "").unwrap();
    let here = directory.path().to_str().unwrap();
    let document =
        include_str!("../../docs/configuration.md").replace("/etc/tombolo", here).replace("/var/lib/tombolo", here);
    let mut checked = Vec::new();
    for part in document.split("<!-- check: ").skip(1) {
        let (role, rest) = part.split_once(" -->").unwrap();
        let yaml = rest.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
        let file = directory.path().join(format!("{role}.yaml"));
        std::fs::write(&file, yaml).unwrap();
        let output = tombolo(&[role, "--check-config", "--config", file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", errors(&output));
        checked.push(role);
    }
    assert_eq!(checked, ["federation", "federation", "federation", "gateway", "sidecar", "agent"]);
}

/// A Deployment with every kind of probe, annotated.
fn deployment(annotations: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: shop}}\nspec:\n  template:\n    metadata:\n      \
         annotations: {annotations}\n    spec:\n      containers:\n        - name: app\n          image: web:1\n          \
         ports: [{{name: http, containerPort: 8080}}]\n          \
         livenessProbe: {{httpGet: {{path: /healthz, port: http, httpHeaders: [{{name: Host, value: web}}]}}}}\n          \
         readinessProbe: {{grpc: {{port: 8081}}, timeoutSeconds: 2}}\n          startupProbe: {{tcpSocket: {{port: http}}}}\n"
    )
}

#[test]
fn manifests_are_injected_with_configurations_that_the_sidecar_takes() {
    let directory = tempfile::tempdir().unwrap();
    let inject = |annotations: &str, further: &[&str]| {
        let file = directory.path().join("shop.yaml");
        std::fs::write(&file, deployment(annotations)).unwrap();
        let common = ["inject", file.to_str().unwrap(), "--image", "tombolo:1", "--trust-domain", "west.tombolo"];
        tombolo(&[&common, further].concat())
    };
    for (annotations, further, want) in [
        ("{}", &[][..], "tombolo-capture"),
        ("{tombolo.dev/plaintext: strict}", &[], "port: 15022"),
        ("{}", &["--pod-security", "restricted", "--cluster-dns", "10.96.0.10"], "dnsPolicy: None"),
        ("{tombolo.dev/capture: off}", &[], "tombolo-sidecar"),
        ("{tombolo.dev/sidecar: '{retry: {tries: 5}}'}", &[], "tries"),
    ] {
        let output = inject(annotations, further);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(want), "{annotations}: {}{text}", errors(&output));
        assert!(errors(&output).contains("Deployment/shop/web: injected"), "{}", errors(&output));
    }
    for (annotations, want) in [
        (
            "{tombolo.dev/capture: ebpf}",
            "shop.yaml:1: annotation tombolo.dev/capture: \"ebpf\" is none of init, dns, off",
        ),
        ("{tombolo.dev/sidecar: '{retry: {tries: 99}}'}", "Deployment/shop/web: the sidecar would refuse this"),
        ("{tombolo.dev/capture: dns}", "needs to know the cluster's DNS server"),
    ] {
        let output = inject(annotations, &[]);
        assert!(!output.status.success() && output.stdout.is_empty(), "{annotations}");
        assert!(errors(&output).contains(want), "{annotations}: {}", errors(&output));
    }
}
