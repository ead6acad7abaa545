//! `AccessPolicy` and `TrafficPolicy` (tombolo.dev/v1alpha1) as operators write them.
//!
//! The decided form in core is what is read; beside it stand the services that the policy is attached to. An
//! unknown field is refused here, where its author can be told; those who are told of a policy pass it over.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tombolo_core::id::{Namespace, ServiceName};
use tombolo_core::policy::access::{AccessPolicy, AccessSpec};
use tombolo_core::policy::set::Policy;
use tombolo_core::policy::traffic::{TrafficPolicy, TrafficSpec};
use tombolo_core::policy::{InvalidField, Kind, Resource};

use super::{DEFAULT_NAMESPACE, MULTICLUSTER_GROUP};

/// Octets of one resource as it is told to sidecars.
const OCTETS_MAX: usize = 32 * 1024;
/// Services that one policy may name.
pub(super) const TARGETS_MAX: usize = 16;

/// Reads a document as a type of the caller's choice.
pub(super) trait Source {
    type Error;

    fn read<T: DeserializeOwned>(&self) -> Result<T, Self::Error>;
    /// What is wrong with what was read, in words for its author.
    fn refused(&self, reason: String) -> Self::Error;
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document<S> {
    #[serde(rename = "apiVersion")]
    _api_version: IgnoredAny,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    metadata: ObjectMeta,
    spec: S,
    #[serde(default, rename = "status")]
    _status: IgnoredAny,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Attached {
    #[serde(default)]
    target_refs: Vec<TargetRef>,
}

/// `LocalPolicyTargetReference` of the Gateway API (GEP-713).
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "self.kind == 'ServiceImport' ? self.group == 'multicluster.x-k8s.io' \
              : self.kind == 'Service' && self.group in ['', 'core']",
     "message": "name a Service, or a ServiceImport of group multicluster.x-k8s.io"},
]))]
pub(super) struct TargetRef {
    /// Empty for a Service, multicluster.x-k8s.io for a ServiceImport.
    #[serde(default)]
    group: String,
    /// Service or ServiceImport: of one name they are one service.
    kind: String,
    /// In the policy's own namespace.
    name: String,
}

/// Reads an `AccessPolicy`.
pub(super) fn access<R: Source>(source: &R) -> Result<Policy, R::Error> {
    let (resource, targets, _, spec) = policy::<AccessSpec, R>(source, Kind::AccessPolicy)?;
    let named = |error: InvalidField| source.refused(format!("{resource}: {}", error.within("spec")));
    spec.check().map_err(named)?;
    bounded(&spec).map_err(named)?;
    Ok(Policy::Access(AccessPolicy { resource, targets, spec }.into()))
}

/// What stands in the place of an `AccessPolicy` that can't be read, while nothing better is known of it: it refuses every caller
/// of the services that are named, or of all of the namespace where that can't be told. `None` if it would only audit, or if
/// not even its name can be read.
pub(super) fn closed<R: Source>(source: &R) -> Option<Policy> {
    let Anything { metadata, spec } = source.read().ok()?;
    if spec.get("mode").is_some_and(|mode| mode == "audit") {
        return None;
    }
    let resource = resource(Kind::AccessPolicy, &metadata).ok()?;
    let named = |reference: &Value| ServiceName::new(resource.namespace.clone(), reference.get("name")?.as_str()?).ok();
    let references = spec.get("targetRefs").and_then(Value::as_array);
    let targets: Option<BTreeSet<_>> = references.and_then(|references| references.iter().map(named).collect());
    let targets = targets.unwrap_or_default();
    Some(Policy::Access(AccessPolicy { resource, targets, spec: AccessSpec::closed() }.into()))
}

#[derive(Deserialize)]
struct Anything {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
}

/// Reads a `TrafficPolicy`.
pub(super) fn traffic<R: Source>(source: &R) -> Result<Policy, R::Error> {
    let (resource, targets, metadata, spec) = policy::<TrafficSpec, R>(source, Kind::TrafficPolicy)?;
    let named = |error: InvalidField| source.refused(format!("{resource}: {}", error.within("spec")));
    if targets.is_empty() {
        return Err(named(InvalidField::new("targetRefs", "name at least one Service that the policy is for")));
    }
    spec.check().map_err(named)?;
    bounded(&spec).map_err(named)?;
    let created = created(&metadata);
    Ok(Policy::Traffic(TrafficPolicy { resource, created, targets, spec }.into()))
}

type Read<S> = (Resource, BTreeSet<ServiceName>, ObjectMeta, S);

fn policy<S, R>(source: &R, kind: Kind) -> Result<Read<S>, R::Error>
where
    S: DeserializeOwned,
    R: Source,
{
    let Document { metadata, spec: Attached { target_refs }, .. } = source.read()?;
    // What is wrong in a field is said with its place in the file, which only this way of reading knows.
    let spec = source.read::<Document<S>>()?.spec;
    let resource = resource(kind, &metadata).map_err(|reason| source.refused(reason))?;
    let named = |error: InvalidField| source.refused(format!("{resource}: {}", error.within("spec")));
    let mut written = source.read::<Document<Value>>()?.spec;
    if let Some(fields) = written.as_object_mut() {
        fields.remove("targetRefs");
    }
    if let Some(path) = unknown_field::<S>(written) {
        return Err(named(InvalidField::new(path, "is not a field here; check its spelling")));
    }
    let targets = targets(&resource.namespace, &target_refs).map_err(named)?;
    Ok((resource, targets, metadata, spec))
}

/// `metadata.namespace` and `metadata.name` of a resource.
pub(super) fn resource(kind: Kind, metadata: &ObjectMeta) -> Result<Resource, String> {
    let name = metadata.name.as_ref().ok_or_else(|| format!("{kind}: metadata.name is missing"))?;
    let namespace: Namespace = metadata
        .namespace
        .as_deref()
        .unwrap_or(DEFAULT_NAMESPACE)
        .parse()
        .map_err(|error| format!("{kind} {name:?}: metadata.namespace: {error}"))?;
    Resource::new(kind, namespace, name).map_err(|reason| format!("{kind} {name:?}: {reason}"))
}

/// When it was written, as far as that is known: a file need not say, and then its name decides.
pub(super) fn created(metadata: &ObjectMeta) -> jiff::Timestamp {
    metadata.creation_timestamp.as_ref().map_or(jiff::Timestamp::UNIX_EPOCH, |time| time.0)
}

fn targets(own: &Namespace, references: &[TargetRef]) -> Result<BTreeSet<ServiceName>, InvalidField> {
    if references.len() > TARGETS_MAX {
        return Err(InvalidField::new("targetRefs", format!("more than {TARGETS_MAX} entries")));
    }
    let target = |(index, reference): (usize, &TargetRef)| {
        let at = |field: &str| format!("targetRefs[{index}].{field}");
        if !is_service(&reference.group, &reference.kind) {
            let TargetRef { group, kind, .. } = reference;
            let reason = format!("{kind:?} of group {group:?} is neither Service nor ServiceImport");
            return Err(InvalidField::new(at("kind"), reason));
        }
        ServiceName::new(own.clone(), &reference.name).map_err(|error| InvalidField::new(at("name"), error.to_string()))
    };
    references.iter().enumerate().map(target).collect()
}

/// A Service and a ServiceImport of one name are one service.
pub(super) fn is_service(group: &str, kind: &str) -> bool {
    matches!((group, kind), ("" | "core", "Service") | (MULTICLUSTER_GROUP, "ServiceImport"))
}

/// What one resource may cost everybody who is told of it.
pub(super) fn bounded<S: Serialize>(spec: &S) -> Result<(), InvalidField> {
    match serde_json::to_vec(spec).map(|json| json.len()) {
        Ok(octets) if octets <= OCTETS_MAX => Ok(()),
        Ok(octets) => Err(InvalidField::new("", format!("{octets} octets of JSON are more than {OCTETS_MAX}"))),
        Err(error) => Err(InvalidField::new("", error.to_string())),
    }
}

/// The path of the first field that was written and is none of `S`, whether it says anything or not.
fn unknown_field<S: DeserializeOwned>(written: Value) -> Option<String> {
    let mut first = None;
    // That it can be read was seen before.
    let _ = serde_ignored::deserialize::<_, _, S>(written, |path| {
        first.get_or_insert_with(|| path_of(&path));
    });
    first
}

/// `rules[1].to[0].path`
fn path_of(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", path_of(parent)),
        Path::Map { parent, key } => match path_of(parent) {
            parent if parent.is_empty() => key.clone(),
            parent => format!("{parent}.{key}"),
        },
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => path_of(parent),
    }
}
