//! The cluster's own API server: how it is reached, how kinds of objects are watched, which replica leads, and where
//! others find the root of this cluster.

mod ca;
mod client;
mod lease;
mod watch;

use kube::api::ApiResource;

pub use ca::publish_ca;
pub use client::{ClientError, connect, reason};
pub use lease::{Candidate, Lead, Leader, Leadership, Lost, NotLeading};
pub use watch::{Change, Watch, name_of};

/// A kind of object of an API server.
#[derive(Debug, PartialEq, Eq)]
pub struct Definition {
    pub kind: &'static str,
    pub plural: &'static str,
    /// Empty for the core group.
    pub group: &'static str,
    /// The versions that are understood, the preferred one first.
    pub versions: &'static [&'static str],
}

impl Definition {
    pub fn api_version(&self, version: &str) -> String {
        if self.group.is_empty() { version.to_owned() } else { format!("{}/{version}", self.group) }
    }

    pub fn resource(&self, version: &str) -> ApiResource {
        ApiResource {
            group: self.group.to_owned(),
            version: version.to_owned(),
            api_version: self.api_version(version),
            kind: self.kind.to_owned(),
            plural: self.plural.to_owned(),
        }
    }
}

pub const NAMESPACE: Definition = Definition { kind: "Namespace", plural: "namespaces", group: "", versions: &["v1"] };
pub const SERVICE: Definition = Definition { kind: "Service", plural: "services", group: "", versions: &["v1"] };
pub const ENDPOINT_SLICE: Definition =
    Definition { kind: "EndpointSlice", plural: "endpointslices", group: "discovery.k8s.io", versions: &["v1"] };
pub const SERVICE_EXPORT: Definition = Definition {
    kind: "ServiceExport",
    plural: "serviceexports",
    group: tombolo_api::k8s::MULTICLUSTER_GROUP,
    versions: &["v1beta1", "v1alpha1"],
};
pub const SERVICE_IMPORT: Definition = Definition {
    kind: "ServiceImport",
    plural: "serviceimports",
    group: tombolo_api::k8s::MULTICLUSTER_GROUP,
    versions: &["v1beta1", "v1alpha1"],
};
pub const CLUSTER_PEER: Definition = Definition {
    kind: "ClusterPeer",
    plural: "clusterpeers",
    group: tombolo_api::k8s::TOMBOLO_GROUP,
    versions: &["v1alpha1"],
};
pub const ACCESS_POLICY: Definition = Definition {
    kind: "AccessPolicy",
    plural: "accesspolicies",
    group: tombolo_api::k8s::TOMBOLO_GROUP,
    versions: &["v1alpha1"],
};
pub const TRAFFIC_POLICY: Definition = Definition {
    kind: "TrafficPolicy",
    plural: "trafficpolicies",
    group: tombolo_api::k8s::TOMBOLO_GROUP,
    versions: &["v1alpha1"],
};
pub const HTTP_ROUTE: Definition = Definition {
    kind: "HTTPRoute",
    plural: "httproutes",
    group: tombolo_api::k8s::GATEWAY_GROUP,
    versions: &["v1", "v1beta1"],
};
pub const GRPC_ROUTE: Definition =
    Definition { kind: "GRPCRoute", plural: "grpcroutes", group: tombolo_api::k8s::GATEWAY_GROUP, versions: &["v1"] };
