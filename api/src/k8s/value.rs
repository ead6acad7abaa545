//! Reads one resource as an API server sends it: a JSON object whose kind is known from where it came.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{GATEWAY_GROUP, MULTICLUSTER_GROUP, Resource, TOMBOLO_GROUP, policy};

/// Reads `object`, which is of this `apiVersion` and kind; `None` for a kind that tombolo does not read.
pub fn from_value(api_version: &str, kind: &str, mut object: Value) -> Result<Option<Resource>, String> {
    if let Some(fields) = object.as_object_mut() {
        // The items of a list come without them.
        fields.insert("apiVersion".into(), api_version.into());
        fields.insert("kind".into(), kind.into());
    }
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    Ok(Some(match (group, kind) {
        ("", "Namespace") => Resource::Namespace(read(kind, object)?),
        ("", "Service") => Resource::Service(read(kind, object)?),
        ("discovery.k8s.io", "EndpointSlice") => Resource::EndpointSlice(read(kind, object)?),
        (MULTICLUSTER_GROUP, "ServiceExport") => Resource::ServiceExport(read(kind, object)?),
        (TOMBOLO_GROUP, "ClusterPeer") => Resource::ClusterPeer(read(kind, object)?),
        (GATEWAY_GROUP, "HTTPRoute") => Resource::HttpRoute(read(kind, object)?),
        (GATEWAY_GROUP, "GRPCRoute") => Resource::GrpcRoute(read(kind, object)?),
        (TOMBOLO_GROUP, "AccessPolicy") => Resource::Policy(Box::new(policy::access(&Json { kind, object })?)),
        (TOMBOLO_GROUP, "TrafficPolicy") => Resource::Policy(Box::new(policy::traffic(&Json { kind, object })?)),
        _ => return Ok(None),
    }))
}

/// What stands in the place of an AccessPolicy that can't be read, while nothing better is known of it: it refuses every caller.
pub fn closed_policy(object: Value) -> Option<Resource> {
    let policy = policy::closed(&Json { kind: "AccessPolicy", object })?;
    Some(Resource::Policy(Box::new(policy)))
}

/// A policy, which is read several times over.
struct Json<'a> {
    kind: &'a str,
    object: Value,
}

impl policy::Source for Json<'_> {
    type Error = String;

    fn read<T: DeserializeOwned>(&self) -> Result<T, String> {
        read(self.kind, self.object.clone())
    }

    fn refused(&self, reason: String) -> String {
        reason
    }
}

fn read<T: DeserializeOwned>(kind: &str, object: Value) -> Result<T, String> {
    serde_json::from_value(object).map_err(|error| format!("{kind} can't be read: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn policy(spec: Value) -> Result<Option<Resource>, String> {
        let object = json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": spec });
        from_value("tombolo.dev/v1alpha1", "AccessPolicy", object)
    }

    #[test]
    fn policies_are_read_as_strictly_as_in_a_file() {
        let rules = json!([{ "from": [{ "namespaces": ["ops"] }] }]);
        assert!(matches!(policy(json!({ "rules": rules })), Ok(Some(Resource::Policy(_)))));
        let refused = policy(json!({ "rulez": rules })).unwrap_err();
        assert_eq!(refused, "AccessPolicy shop/web: spec.rulez: is not a field here; check its spelling");
        let refused = policy(json!({ "action": "perhaps" })).unwrap_err();
        assert!(refused.starts_with("AccessPolicy can't be read: "), "{refused}");
    }

    #[test]
    fn routes_are_read_in_either_version() {
        let spec = json!({ "parentRefs": [{ "kind": "Service", "group": "", "name": "web" }], "rules": [] });
        let object = json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": spec });
        for (version, kind) in [("v1", "HTTPRoute"), ("v1beta1", "HTTPRoute"), ("v1", "GRPCRoute")] {
            let read = from_value(&format!("gateway.networking.k8s.io/{version}"), kind, object.clone()).unwrap();
            assert!(matches!(read, Some(Resource::HttpRoute(_) | Resource::GrpcRoute(_))), "{version} {kind}");
        }
    }
}
