//! The CustomResourceDefinitions of every kind that tombolo brings along, made from the types that read and write
//! them, so that the API server accepts what this program understands and nothing else.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use tombolo_core::policy::access::AccessSpec;
use tombolo_core::policy::traffic::TrafficSpec;

use super::mcs::{ServiceExportStatus, ServiceImportSpec, ServiceImportStatus};
use super::policy::{TARGETS_MAX, TargetRef};
use super::{ClusterPeerSpec, MULTICLUSTER_GROUP, ServiceExportSpec, TOMBOLO_GROUP};

/// All definitions, as JSON objects.
pub fn definitions() -> Vec<Value> {
    let condition =
        |name: &str| (name.to_owned(), "string", format!(".status.conditions[?(@.type==\"{name}\")].status"));
    vec![
        Definition {
            group: MULTICLUSTER_GROUP,
            versions: &["v1alpha1", "v1beta1"],
            kind: "ServiceExport",
            plural: "serviceexports",
            short_names: &["svcex", "svcexport"],
            namespaced: true,
            about: "Exports the Service of the same name and namespace to other clusters.",
            spec: schema_of::<ServiceExportSpec>(),
            spec_required: false,
            status: Some(schema_of::<ServiceExportStatus>()),
            columns: vec![condition("Valid"), condition("Ready"), condition("Conflict")],
        },
        Definition {
            group: MULTICLUSTER_GROUP,
            versions: &["v1alpha1", "v1beta1"],
            kind: "ServiceImport",
            plural: "serviceimports",
            short_names: &["svcim", "svcimport"],
            namespaced: true,
            about: "A service that one or more clusters export under this name and namespace; written by tombolo.",
            spec: schema_of::<ServiceImportSpec>(),
            spec_required: false,
            status: Some(schema_of::<ServiceImportStatus>()),
            columns: vec![
                ("Type".into(), "string", ".spec.type".into()),
                ("IP".into(), "string", ".spec.ips".into()),
                ("Clusters".into(), "string", ".status.clusters[*].cluster".into()),
            ],
        },
        Definition {
            group: TOMBOLO_GROUP,
            versions: &["v1alpha1"],
            kind: "ClusterPeer",
            plural: "clusterpeers",
            short_names: &["peer"],
            namespaced: false,
            about: "What this cluster and one peer grant each other; with a bundle in it, the peering itself.",
            spec: schema_of::<ClusterPeerSpec>(),
            spec_required: true,
            status: None,
            columns: vec![
                ("Cluster".into(), "string", ".spec.cluster".into()),
                ("Exports".into(), "string", ".spec.exports".into()),
                ("Imports".into(), "string", ".spec.imports".into()),
            ],
        },
        policy(
            "AccessPolicy",
            "accesspolicies",
            "Who may call a service; decided where the service is delivered, for each request.",
            attached(schema_of::<AccessSpec>(), "The services that it selects; all of the namespace if absent.", 0),
            &[("Action", ".spec.action"), ("Mode", ".spec.mode")],
        ),
        policy(
            "TrafficPolicy",
            "trafficpolicies",
            "How requests to a service are spread, bounded and disturbed; the older of two for one service counts.",
            attached(schema_of::<TrafficSpec>(), "The services that it is for.", 1),
            &[("Failover", ".spec.failover"), ("Rate limit", ".spec.rateLimit.requestsPerSecond")],
        ),
    ]
    .into_iter()
    .map(Definition::build)
    .collect()
}

fn policy(
    kind: &'static str,
    plural: &'static str,
    about: &'static str,
    spec: Value,
    columns: &[(&str, &str)],
) -> Definition {
    let targets = [("Targets", ".spec.targetRefs[*].name")];
    let column = |(name, path): &(&str, &str)| ((*name).to_owned(), "string", (*path).to_owned());
    Definition {
        group: TOMBOLO_GROUP,
        versions: &["v1alpha1"],
        kind,
        plural,
        short_names: &[],
        namespaced: true,
        about,
        spec,
        spec_required: true,
        status: None,
        columns: targets.iter().chain(columns).map(column).collect(),
    }
}

/// The schema of a policy's spec, with the services that it is attached to.
fn attached(mut spec: Value, about: &str, targets_min: usize) -> Value {
    let mut targets = json!({
        "type": "array",
        "description": about,
        "maxItems": TARGETS_MAX,
        "items": schema_of::<TargetRef>(),
    });
    if targets_min > 0 {
        targets["minItems"] = json!(targets_min);
        spec["required"] = json!(["targetRefs"]);
    }
    spec["properties"]["targetRefs"] = targets;
    spec
}

struct Definition {
    group: &'static str,
    /// The last one is what is stored.
    versions: &'static [&'static str],
    kind: &'static str,
    plural: &'static str,
    short_names: &'static [&'static str],
    namespaced: bool,
    about: &'static str,
    spec: Value,
    spec_required: bool,
    status: Option<Value>,
    /// Name, type and path of what `kubectl get` shows, beside name and age.
    columns: Vec<(String, &'static str, String)>,
}

impl Definition {
    fn build(self) -> Value {
        let stored = self.versions.last().copied().unwrap_or_default();
        let versions: Vec<Value> =
            self.versions.iter().map(|version| self.version(version, *version == stored)).collect();
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": { "name": format!("{}.{}", self.plural, self.group) },
            "spec": {
                "group": self.group,
                "scope": if self.namespaced { "Namespaced" } else { "Cluster" },
                "names": {
                    "kind": self.kind,
                    "listKind": format!("{}List", self.kind),
                    "plural": self.plural,
                    "singular": self.kind.to_lowercase(),
                    "shortNames": self.short_names,
                },
                "versions": versions,
            },
        })
    }

    fn version(&self, version: &str, stored: bool) -> Value {
        let mut properties = json!({
            "apiVersion": { "type": "string" },
            "kind": { "type": "string" },
            "metadata": { "type": "object" },
            "spec": self.spec,
        });
        let mut required = Vec::new();
        if self.spec_required {
            required.push("spec");
        }
        let mut columns: Vec<Value> = self
            .columns
            .iter()
            .map(|(name, kind, path)| json!({ "name": name, "type": kind, "jsonPath": path }))
            .collect();
        columns.push(json!({ "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" }));
        let mut built = json!({
            "name": version,
            "served": true,
            "storage": stored,
            "additionalPrinterColumns": columns,
        });
        if let Some(status) = &self.status {
            properties["status"] = status.clone();
            built["subresources"] = json!({ "status": {} });
        }
        let mut schema = json!({ "type": "object", "description": self.about, "properties": properties });
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        built["schema"] = json!({ "openAPIV3Schema": schema });
        built
    }
}

/// The structural schema of a type: what the API server takes of JSON Schema, and no more.
fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    structural(&mut schema);
    schema
}

/// Rewrites a schema, and those inside it, to what "Specifying a structural schema" of Kubernetes allows.
fn structural(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    // An optional struct comes as the struct or null; an absent field needs no null.
    if let Some(Value::Array(choices)) = fields.remove("anyOf") {
        let some = choices
            .into_iter()
            .find(|choice| choice.get("nullable").is_none() && choice.get("type") != Some(&json!("null")));
        if let Some(Value::Object(some)) = some {
            for (key, value) in some {
                fields.entry(key).or_insert(value);
            }
        }
    }
    // A choice of words comes with an explanation for each.
    if let Some(Value::Array(choices)) = fields.remove("oneOf") {
        let words = |choice: Value| match (choice.get("const"), choice.get("enum")) {
            (Some(word), _) => vec![word.clone()],
            (None, Some(Value::Array(words))) => words.clone(),
            (None, _) => Vec::new(),
        };
        fields.insert("type".into(), json!("string"));
        fields.insert("enum".into(), choices.into_iter().flat_map(words).collect());
    }
    for key in ["title", "$schema", "nullable"] {
        fields.remove(key);
    }
    // What is absent means its default whenever it is read; written out it would stay when the default changes.
    if matches!(fields.get("default"), Some(Value::Null | Value::Object(_))) {
        fields.remove("default");
    }
    // Unknown fields are pruned, or refused by a strict client, by the API server itself.
    if fields.get("additionalProperties") == Some(&Value::Bool(false)) {
        fields.remove("additionalProperties");
    }
    // Kubernetes knows signed formats only; the range says the rest.
    match fields.get("format").and_then(Value::as_str) {
        Some("uint64") => _ = fields.insert("format".into(), json!("int64")),
        Some("uint8" | "uint16" | "uint32") => _ = fields.remove("format"),
        _ => {}
    }
    for_each_inside(fields, structural);
}

fn for_each_inside(fields: &mut Map<String, Value>, apply: fn(&mut Value)) {
    if let Some(Value::Object(properties)) = fields.get_mut("properties") {
        properties.values_mut().for_each(apply);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inside) = fields.get_mut(key) {
            apply(inside);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn spec(kind: &str) -> Value {
        let definitions = definitions();
        let found = definitions.iter().find(|definition| definition["spec"]["names"]["kind"] == kind).unwrap();
        let versions = found["spec"]["versions"].as_array().unwrap();
        versions.last().unwrap()["schema"]["openAPIV3Schema"]["properties"].clone()
    }

    fn names(schema: &Value) -> Vec<&str> {
        let mut names: Vec<&str> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_multi_cluster_kinds_have_the_fields_of_mcs_api() {
        assert_eq!(names(&spec("ServiceExport")["spec"]), ["exportedAnnotations", "exportedLabels"]);
        let import = spec("ServiceImport");
        let fields = [
            "internalTrafficPolicy",
            "ipFamilies",
            "ips",
            "ports",
            "sessionAffinity",
            "sessionAffinityConfig",
            "trafficDistribution",
            "type",
        ];
        assert_eq!(names(&import["spec"]), fields);
        assert_eq!(import["spec"]["required"], json!(["ports", "type"]));
        assert_eq!(import["spec"]["ips"], Value::Null);
        assert_eq!(import["spec"]["properties"]["ips"]["maxItems"], 2);
        let port = &import["spec"]["properties"]["ports"]["items"];
        assert_eq!(names(port), ["appProtocol", "name", "port", "protocol"]);
        assert_eq!(port["required"], json!(["port"]));
        let affinity = &import["spec"]["properties"]["sessionAffinityConfig"]["properties"]["clientIP"];
        assert_eq!(names(affinity), ["timeoutSeconds"]);
        assert_eq!(names(&import["status"]), ["clusters", "conditions"]);
        let condition = &import["status"]["properties"]["conditions"]["items"];
        let required = ["lastTransitionTime", "message", "reason", "status", "type"];
        let mut said: Vec<&str> = condition["required"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        said.sort_unstable();
        assert_eq!(said, required);
    }

    #[test]
    fn policies_have_the_fields_that_are_read_and_their_words() {
        let spec_of = |kind: &str| spec(kind)["spec"].clone();
        let access = spec_of("AccessPolicy");
        assert_eq!(names(&access), ["action", "mode", "rules", "targetRefs"]);
        assert_eq!(access["properties"]["action"]["enum"], json!(["allow", "deny"]));
        let rule = &access["properties"]["rules"]["items"];
        assert_eq!(
            names(&rule["properties"]["from"]["items"]),
            ["clusters", "namespaces", "serviceAccounts", "spiffeIds"]
        );
        assert_eq!(names(&rule["properties"]["to"]["items"]), ["methods", "paths", "ports"]);
        let traffic = spec_of("TrafficPolicy");
        assert_eq!(traffic["required"], json!(["targetRefs"]));
        let algorithm = &traffic["properties"]["loadBalancing"]["properties"]["algorithm"];
        assert_eq!(algorithm["enum"], json!(["round-robin", "consistent-hash", "least-request"]));
        let span = &traffic["properties"]["timeouts"]["properties"]["perTry"];
        assert_eq!((&span["type"], span["pattern"].is_string()), (&json!("string"), true));
        // Every field of a policy that says everything has a place in the schema.
        let all = serde_json::to_value(TrafficSpec::default()).unwrap();
        for (name, value) in all.as_object().unwrap() {
            for inside in value.as_object().into_iter().flat_map(Map::keys) {
                assert!(traffic["properties"][name]["properties"][inside].is_object(), "{name}.{inside}");
            }
        }
    }

    #[test]
    fn schemas_are_structural_and_every_field_is_explained() {
        fn check(path: &str, schema: &Value) {
            for foreign in ["anyOf", "oneOf", "$ref", "$schema", "nullable", "title", "definitions"] {
                assert!(schema.get(foreign).is_none(), "{path}: {foreign}: {schema}");
            }
            let free = schema["x-kubernetes-preserve-unknown-fields"] == true;
            assert!(schema["type"].is_string() || free, "{path}: {schema}");
            for (name, inside) in schema["properties"].as_object().into_iter().flatten() {
                let path = format!("{path}.{name}");
                let meta = matches!(name.as_str(), "apiVersion" | "kind" | "metadata");
                assert!(meta || inside["description"].is_string(), "{path} is not explained");
                check(&path, inside);
            }
            for key in ["items", "additionalProperties"] {
                if let Some(inside) = schema.get(key) {
                    check(&format!("{path}[]"), inside);
                }
            }
        }
        for definition in definitions() {
            for version in definition["spec"]["versions"].as_array().unwrap() {
                let kind = definition["spec"]["names"]["kind"].as_str().unwrap();
                check(kind, &version["schema"]["openAPIV3Schema"]);
            }
        }
    }
}
