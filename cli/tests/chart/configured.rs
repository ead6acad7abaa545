//! The configurations that the chart renders are ones that the program takes.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::support::binary;
use crate::{NAMESPACE, cases, name, objects, program, render};

/// What Kubernetes puts into the variables of a pod, one of each family.
const ADDRESSES: [(&str, &str); 2] = [("[$(POD_IP)]", "[fd00::7]"), ("$(POD_IP)", "10.1.0.7")];

/// The files of all ConfigMaps, by the name of the ConfigMap.
fn files(objects: &[Value]) -> BTreeMap<&str, &serde_json::Map<String, Value>> {
    let maps = objects.iter().filter(|object| object["kind"] == "ConfigMap");
    maps.map(|map| (name(map), map["data"].as_object().unwrap())).collect()
}

/// Writes what a Deployment's pod would find in its volumes below `folder`, and gives the arguments of its container with
/// these paths.
fn place(deployment: &Value, configs: &BTreeMap<&str, &serde_json::Map<String, Value>>, folder: &Path) -> Vec<String> {
    let pod = &deployment["spec"]["template"]["spec"];
    let here = folder.to_str().unwrap();
    let moved = |text: &str| text.replace("/etc/", &format!("{here}/etc/")).replace("/var/", &format!("{here}/var/"));
    for mount in pod["containers"][0]["volumeMounts"].as_array().unwrap() {
        let path = folder.join(mount["mountPath"].as_str().unwrap().trim_start_matches('/'));
        std::fs::create_dir_all(&path).unwrap();
        let volume = pod["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        if let Some(map) = volume["configMap"]["name"].as_str().and_then(|name| configs.get(name)) {
            for (file, content) in *map {
                std::fs::write(path.join(file), moved(content.as_str().unwrap())).unwrap();
            }
        }
        if let Some(token) = volume["projected"]["sources"][0]["serviceAccountToken"]["path"].as_str() {
            std::fs::write(path.join(token), "token").unwrap();
        }
    }
    let arguments = pod["containers"][0]["args"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
    let filled = arguments.map(|text| {
        let text = moved(text).replace("$(POD_NAME)", name(deployment));
        ADDRESSES.iter().fold(text, |text, (variable, address)| text.replace(variable, address))
    });
    filled.collect()
}

#[tokio::test]
async fn the_program_takes_every_configuration() {
    let Some(program) = program() else { return };
    for (case, values) in cases() {
        let objects = objects(&render(&program, NAMESPACE, &values));
        let configs = files(&objects);
        let deployments: Vec<&Value> = objects.iter().filter(|object| object["kind"] == "Deployment").collect();
        assert_eq!(deployments.len(), 2, "{case}");
        for deployment in deployments {
            let folder = tempfile::tempdir().unwrap();
            let mut arguments = place(deployment, &configs, folder.path());
            arguments.push("--check-config".into());
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let told = binary().run(&arguments).await;
            assert!(told.is_ok(), "{case}, {}: {}", name(deployment), told.unwrap_err());
        }
    }
}
