//! The resources that operators write, in Kubernetes' own shapes: Service and EndpointSlice as
//! Kubernetes has them, ServiceExport (KEP-1645) and tombolo's ClusterPeer.
//!
//! Kubernetes' resources are read as an API server of a later release may write them: unknown fields
//! are skipped. In tombolo's own resources an unknown field is a mistake and is refused.

mod convert;
mod crd;
pub mod mcs;
mod policy;
mod read;
mod route;
#[cfg(test)]
mod tests;
mod value;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tombolo_core::id::{ClusterId, TrustDomain};
use tombolo_core::model::ServiceSelector;
use tombolo_core::policy::access::DefaultAccess;
use tombolo_core::policy::matching::{GrpcMatch, HttpMatch};
use tombolo_core::policy::set::Policy;

pub use convert::declared;
pub use crd::definitions;
pub use read::{DOCUMENTS_MAX, Document, RawDocument, Unreadable, access_policies, documents, raw_documents};
pub use route::WrittenRoute;
pub use value::{closed_policy, from_value};

pub const MULTICLUSTER_GROUP: &str = "multicluster.x-k8s.io";
pub const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
pub const TOMBOLO_GROUP: &str = "tombolo.dev";
/// The accounts of a Service's namespace that may serve it, separated by commas.
pub const SERVICE_ACCOUNTS_ANNOTATION: &str = "tombolo.dev/service-accounts";
/// Relative share of the requests for each endpoint of a slice; 1 unless set.
pub const WEIGHT_ANNOTATION: &str = "tombolo.dev/weight";
/// On a ServiceExport, or on a Namespace for all exports in it: `allow` lets gateways call it for workloads that have
/// no sidecar; `deny` is the same as nothing.
pub const UNMESHED_ANNOTATION: &str = "tombolo.dev/unmeshed";
/// Which Service an EndpointSlice belongs to (Kubernetes' own label).
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// The namespace of an object that names none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// `ServiceExport` of `multicluster.x-k8s.io/v1beta1` or `v1alpha1`: exports the Service of the same name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceExport {
    pub api_version: String,
    pub kind: String,
    pub metadata: ObjectMeta,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<ServiceExportSpec>,
}

/// What travels with an export beside its Service.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceExportSpec {
    /// Labels for the imports of this service. Not carried yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exported_labels: BTreeMap<String, String>,
    /// Annotations for the imports of this service. Not carried yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exported_annotations: BTreeMap<String, String>,
}

/// `ClusterPeer` of `tombolo.dev/v1alpha1`: what this cluster and one peer grant each other, and with a
/// bundle the peering itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterPeer {
    pub api_version: String,
    pub kind: String,
    pub metadata: ObjectMeta,
    pub spec: ClusterPeerSpec,
    /// Written by tombolo, ignored when read.
    #[serde(default, skip_serializing)]
    pub status: serde::de::IgnoredAny,
}

/// What this cluster and the peer grant each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.bundle) || has(self.trustDomain)", "message": "bundle needs trustDomain beside it"},
    {"rule": "!has(self.gateways) || size(self.gateways) == 0 || has(self.bundle)",
     "message": "gateways needs bundle beside it, to tell them by"},
]))]
pub struct ClusterPeerSpec {
    /// The peer's cluster id.
    #[schemars(with = "String", length(max = 32), regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub cluster: ClusterId,
    /// The peer's trust domain; required beside a bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", length(max = 255))]
    pub trust_domain: Option<TrustDomain>,
    /// What the peer is offered among what is exported; everything unless set.
    #[serde(default = "everything")]
    #[schemars(with = "Vec<Selector>", length(max = 1000))]
    pub exports: Vec<ServiceSelector>,
    /// What the peer may bring in; nothing unless set.
    #[serde(default)]
    #[schemars(with = "Vec<Selector>", length(max = 1000))]
    pub imports: Vec<ServiceSelector>,
    /// `allow` or `deny`: what becomes of the peer's callers that no AccessPolicy speaks of. The cluster's own
    /// `defaultAccess` unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", regex(pattern = "^(allow|deny)$"))]
    pub default_access: Option<DefaultAccess>,
    /// `allow` or `deny`: whether the peer's workloads without a sidecar may call what it is offered, through the peer's
    /// gateways. deny unless set; an export can allow it on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", regex(pattern = "^(allow|deny)$"))]
    pub unmeshed: Option<DefaultAccess>,
    /// The peer's roots: makes the peering without an invitation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<ClusterPeerBundle>,
    /// `host:port` of the peer's gateways.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<String>,
}

/// The roots of a peer's trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterPeerBundle {
    /// One or more PEM certificates.
    pub roots: String,
    /// Bundles with a lower sequence than one seen before are refused.
    #[serde(default)]
    pub sequence: u64,
}

/// How a [`ServiceSelector`] is written: `*`, `namespace`, `namespace/*`, `namespace/name` or `name.namespace`.
#[derive(JsonSchema)]
#[schemars(transparent)]
#[expect(dead_code, reason = "only its schema is used")]
struct Selector(
    #[schemars(
        length(max = 127),
        regex(pattern = r"^(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(/\*|[/.][a-z0-9]([-a-z0-9]*[a-z0-9])?)?)$")
    )]
    String,
);

fn everything() -> Vec<ServiceSelector> {
    vec![ServiceSelector::All]
}

/// One resource of a kind that tombolo reads.
#[derive(Debug, Clone, PartialEq)]
pub enum Resource {
    Namespace(Box<Namespace>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    ServiceExport(Box<ServiceExport>),
    ClusterPeer(Box<ClusterPeer>),
    HttpRoute(Box<WrittenRoute<HttpMatch>>),
    GrpcRoute(Box<WrittenRoute<GrpcMatch>>),
    /// A policy, in the form in which it is decided.
    Policy(Box<Policy>),
}
