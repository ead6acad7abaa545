//! What modules and examples hand to the Helm chart is what its schema takes.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Copy, both, skip, terraform_folder, tools};
use tombolo_testbed::helm;

/// What the runs of a folder's tests plan, or the states after those that apply.
fn states(copy: &Copy, root: &str) -> Vec<Value> {
    let folder = copy.folder(root);
    copy.succeed(&folder, &["init", "-backend=false", "-input=false", "-no-color"]);
    let told = copy.succeed(&folder, &["test", "-no-color", "-json", "-verbose"]);
    let events = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let shown = |mut event: Value| {
        ["test_state", "test_plan"].map(|kind| event[kind].take()).into_iter().find(|it| !it.is_null())
    };
    events.filter_map(shown).collect()
}

/// The values of every Helm release below `state`, each as the texts that it got.
fn releases(state: &Value) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    if state["type"] == "helm_release" {
        let texts = state["values"]["values"].as_array().or(state["change"]["after"]["values"].as_array()).unwrap();
        found.push(texts.iter().map(|text| text.as_str().unwrap().to_owned()).collect());
    }
    let inner: Vec<&Value> = match state {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => Vec::new(),
    };
    inner.into_iter().for_each(|value| found.extend(releases(value)));
    found
}

/// What `helm template` says of the chart with these values.
fn render(program: &Path, folder: &Path, values: &[String]) -> Result<String, String> {
    let mut command = helm::command(program);
    command.args(["template", "tombolo"]).arg(terraform_folder().join("../deploy/helm/tombolo"));
    for (number, text) in values.iter().enumerate() {
        let file = folder.join(format!("{number}.yaml"));
        fs::write(&file, text).unwrap();
        command.arg("--values").arg(file);
    }
    let output = command.output().unwrap();
    if output.status.success() { Ok(String::from_utf8(output.stdout).unwrap()) } else { Err(both(&output)) }
}

#[test]
fn the_chart_takes_what_they_render() {
    let Some(copy) = Copy::new() else { return };
    let Some(program) = helm::find(&tools()) else { return skip(helm::NEEDED) };
    let scratch = tempfile::tempdir().unwrap();
    for (root, least) in [("modules/mesh", 2), ("examples/kind", 4), ("examples/gke-aks-vm", 4)] {
        let releases: Vec<Vec<String>> = states(&copy, root).iter().flat_map(releases).collect();
        assert!(releases.len() >= least, "{root}: {releases:#?}");
        for values in releases {
            let rendered = render(&program, scratch.path(), &values).unwrap_or_else(|error| panic!("{root}: {error}"));
            assert!(rendered.contains("kind: Deployment"), "{root}: {rendered}");
        }
    }
    // Those for `helm --values`, beside a cluster and an image.
    let image = json!({ "repository": "registry.example.com/tombolo", "tag": "v1" });
    let base = json!({ "cluster": "west", "image": image }).to_string();
    for root in ["examples/eks-gke", "examples/eks-aks"] {
        let states = states(&copy, root);
        let clusters = states[0]["outputs"]["gateway_values"]["value"].as_object().unwrap();
        assert_eq!(clusters.len(), 2, "{root}");
        for (cluster, values) in clusters {
            let rendered = render(&program, scratch.path(), &[base.clone(), values.to_string()])
                .unwrap_or_else(|error| panic!("{root}, {cluster}: {error}"));
            assert!(rendered.contains("  type: LoadBalancer"), "{root}, {cluster}: {rendered}");
        }
    }
    // What this rests on: a misspelt value is refused.
    let wrong = json!({ "gateway": { "advertize": [] } }).to_string();
    assert!(render(&program, scratch.path(), &[base, wrong]).unwrap_err().contains("advertize"));
}
