//! Reads one resource as an API server sends it: a JSON object whose kind is known from where it came.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Resource, TOMBOLO_GROUP};

/// Reads `object`, which is of this `apiVersion` and kind; `None` for a kind that tombolo does not read.
pub fn from_value(api_version: &str, kind: &str, mut object: Value) -> Result<Option<Resource>, String> {
    if let Some(fields) = object.as_object_mut() {
        // The items of a list come without them.
        fields.insert("apiVersion".into(), api_version.into());
        fields.insert("kind".into(), kind.into());
    }
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    Ok(Some(match (group, kind) {
        ("", "Service") => Resource::Service(read(kind, object)?),
        ("discovery.k8s.io", "EndpointSlice") => Resource::EndpointSlice(read(kind, object)?),
        ("multicluster.x-k8s.io", "ServiceExport") => Resource::ServiceExport(read(kind, object)?),
        (TOMBOLO_GROUP, "ClusterPeer") => Resource::ClusterPeer(read(kind, object)?),
        _ => return Ok(None),
    }))
}

fn read<T: DeserializeOwned>(kind: &str, object: Value) -> Result<T, String> {
    serde_json::from_value(object).map_err(|error| format!("{kind} can't be read: {error}"))
}
