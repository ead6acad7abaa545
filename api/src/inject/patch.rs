//! The difference of two Pods as a JSON Patch (RFC 6902), for an admission webhook's answer.

use serde_json::{Value, json};

/// Operations that make `changed` of `original`. Of objects only what differs is written, field by field down to `depth`
/// levels; lists are replaced as a whole.
pub fn between(original: &Value, changed: &Value) -> Vec<Value> {
    let mut operations = Vec::new();
    compare(original, changed, "", 0, &mut operations);
    operations
}

/// Below it a value is replaced as a whole: `/metadata/annotations/x` is the deepest that has to be told apart.
const DEPTH_MAX: usize = 3;

fn compare(original: &Value, changed: &Value, path: &str, depth: usize, operations: &mut Vec<Value>) {
    if original == changed {
        return;
    }
    let (Value::Object(before), Value::Object(after), true) = (original, changed, depth < DEPTH_MAX) else {
        operations.push(json!({ "op": "replace", "path": path, "value": changed }));
        return;
    };
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        operations.push(json!({ "op": "remove", "path": format!("{path}/{}", escaped(key)) }));
    }
    for (key, value) in after {
        let path = format!("{path}/{}", escaped(key));
        match before.get(key) {
            Some(old) => compare(old, value, &path, depth + 1, operations),
            None => operations.push(json!({ "op": "add", "path": path, "value": value })),
        }
    }
}

/// RFC 6901 section 3.
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
