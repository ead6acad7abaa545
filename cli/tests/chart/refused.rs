//! Values that can't work are refused before anything is rendered, with a message that names them.

use serde_json::{Value, json};

use crate::{program, run};

/// What is set beside a cluster and an image, and what the message must name. Helm's words differ between its releases, the
/// field's path doesn't.
fn cases() -> Vec<(Value, &'static str)> {
    let digest = format!("sha256:{}", "0".repeat(64));
    vec![
        (json!({ "cluster": "" }), "cluster"),
        (json!({ "cluster": "West" }), "cluster"),
        (json!({ "cluster": "a".repeat(33) }), "cluster"),
        (json!({ "clutser": "west" }), "clutser"),
        (json!({ "trustDomain": "West!" }), "trustDomain"),
        (json!({ "image": { "repository": "" } }), "repository"),
        (json!({ "image": { "digest": "sha256:00" } }), "digest"),
        (json!({ "image": { "digest": "" } }), "image"),
        (json!({ "image": { "digest": digest, "tag": "v1" } }), "image"),
        (json!({ "image": { "digest": "", "tag": "not a tag" } }), "tag"),
        (json!({ "image": { "pullPolicy": "Sometimes" } }), "pullPolicy"),
        (json!({ "ipFamily": "IPv5" }), "ipFamily"),
        (json!({ "spread": "Never" }), "spread"),
        (json!({ "log": { "format": "xml" } }), "format"),
        (json!({ "telemetry": { "otlp": "collector:4317" } }), "otlp"),
        (json!({ "telemetry": { "sampleRatio": 2 } }), "sampleRatio"),
        (json!({ "federation": { "replicas": 0 } }), "replicas"),
        (json!({ "federation": { "replcias": 2 } }), "replcias"),
        (json!({ "federation": { "svidLife": "an hour" } }), "svidLife"),
        (json!({ "federation": { "defaultAccess": "ask" } }), "defaultAccess"),
        (json!({ "federation": { "virtualAddresses": { "ipv4": "10.0.0.0/16" } } }), "ipv4"),
        (json!({ "federation": { "leaseSeconds": 1 } }), "leaseSeconds"),
        (json!({ "federation": { "resources": { "limits": { "cpu": "much" } } } }), "cpu"),
        (json!({ "federation": { "resources": { "limit": {} } } }), "limit"),
        (json!({ "federation": { "tolerations": [{ "effect": "None" }] } }), "effect"),
        (json!({ "gateway": { "replicas": "two" } }), "replicas"),
        (json!({ "gateway": { "advertise": ["gw.west.example.com"] } }), "advertise"),
        (json!({ "gateway": { "advertise": ["gw.west.example.com:0"] } }), "advertise"),
        (json!({ "gateway": { "tunnelPort": 70000 } }), "tunnelPort"),
        (json!({ "gateway": { "adminPort": 15443 } }), "adminPort"),
        (json!({ "gateway": { "congestion": "reno" } }), "congestion"),
        (json!({ "gateway": { "service": { "type": "ExternalName" } } }), "type"),
        (json!({ "gateway": { "service": { "ports": [] } } }), "ports"),
        (json!({ "gateway": { "service": { "nodePort": 65536 } } }), "nodePort"),
        (json!({ "gateway": { "service": { "externalTrafficPolicy": "Any" } } }), "externalTrafficPolicy"),
        (json!({ "gateway": { "service": { "annotations": { "a": 1 } } } }), "annotations"),
        (json!({ "injection": { "captureImage": "two words" } }), "captureImage"),
        (json!({ "dns": { "clusterIP": "dns.example.com" } }), "clusterIP"),
        (json!({ "dns": { "enable": true } }), "enable"),
        (json!({ "unmeshed": { "ports": "20000" } }), "ports"),
        (json!({ "unmeshed": { "ports": "15000-15999" } }), "ports"),
        (json!({ "unmeshed": { "sources": ["everybody"] } }), "sources"),
        (json!({ "networkPolicy": { "adminFrom": [{}] } }), "adminFrom"),
        (json!({ "networkPolicy": { "adminFrom": [{ "ipBlock": { "cdir": "::/0" } }] } }), "cdir"),
        (json!({ "serviceMonitor": { "interval": "soon" } }), "interval"),
    ]
}

#[test]
fn what_can_not_work_is_refused_by_name() {
    let Some(program) = program() else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.yaml");
    let image = json!({ "repository": "registry.example.com/tombolo", "digest": format!("sha256:{}", "1".repeat(64)) });
    std::fs::write(&base, json!({ "cluster": "west", "image": image }).to_string()).unwrap();
    let changed = folder.path().join("changed.yaml");
    let (base, changed) = (base.to_str().unwrap(), changed.to_str().unwrap());
    let template = |change: &Value| {
        std::fs::write(changed, change.to_string()).unwrap();
        run(&program, &["template", "tombolo", "--values", base, "--values", changed])
    };
    let taken = template(&json!({}));
    assert!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
    for (change, names) in cases() {
        let refused = template(&change);
        let told = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{change} was taken");
        assert!(told.contains("schema") && told.contains(names), "{change} must be refused by {names}: {told}");
    }
}
