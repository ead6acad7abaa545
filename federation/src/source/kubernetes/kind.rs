//! What is watched of an API server as a source, and what is kept of it.

use jiff::Timestamp;
use kube::api::DynamicObject;
use serde_json::Value;
use tombolo_api::k8s;
use tombolo_core::id::ClusterId;
use tombolo_core::policy::set::POLICIES_MAX;
use tombolo_core::source::declared::Object;

use crate::kubernetes::{self, Change as AnyChange, Definition};

/// What became of one kind's objects.
pub type Change = AnyChange<Kind, Seen>;

/// A kind of object that is watched in all namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Service,
    EndpointSlice,
    ServiceExport,
    ClusterPeer,
    HttpRoute,
    GrpcRoute,
    TrafficPolicy,
    AccessPolicy,
    Namespace,
}

impl Kind {
    pub const ALL: &[Kind] = &[
        Kind::Service,
        Kind::EndpointSlice,
        Kind::ServiceExport,
        Kind::ClusterPeer,
        Kind::HttpRoute,
        Kind::GrpcRoute,
        Kind::TrafficPolicy,
        Kind::AccessPolicy,
        Kind::Namespace,
    ];

    pub fn definition(self) -> &'static Definition {
        match self {
            Kind::Service => &kubernetes::SERVICE,
            Kind::EndpointSlice => &kubernetes::ENDPOINT_SLICE,
            Kind::ServiceExport => &kubernetes::SERVICE_EXPORT,
            Kind::ClusterPeer => &kubernetes::CLUSTER_PEER,
            Kind::HttpRoute => &kubernetes::HTTP_ROUTE,
            Kind::GrpcRoute => &kubernetes::GRPC_ROUTE,
            Kind::TrafficPolicy => &kubernetes::TRAFFIC_POLICY,
            Kind::AccessPolicy => &kubernetes::ACCESS_POLICY,
            Kind::Namespace => &kubernetes::NAMESPACE,
        }
    }

    pub fn name(self) -> &'static str {
        self.definition().kind
    }

    /// What is derived from imports, by this or any other implementation, is nobody's service or endpoint here.
    pub fn labels(self) -> Option<&'static str> {
        match self {
            Kind::Service => Some("!multicluster.kubernetes.io/service-name"),
            Kind::EndpointSlice => Some("kubernetes.io/service-name,!multicluster.kubernetes.io/service-name"),
            Kind::ServiceExport
            | Kind::ClusterPeer
            | Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TrafficPolicy
            | Kind::AccessPolicy
            | Kind::Namespace => None,
        }
    }

    /// Objects of this kind that are held at most.
    pub fn held_max(self) -> usize {
        match self {
            // Routes of gateways and most Namespaces are held as names alone.
            Kind::Service | Kind::ServiceExport | Kind::HttpRoute | Kind::GrpcRoute | Kind::Namespace => 10_000,
            Kind::TrafficPolicy | Kind::AccessPolicy => 2 * POLICIES_MAX,
            Kind::EndpointSlice => 50_000,
            Kind::ClusterPeer => 1_000,
        }
    }

    /// What to do when the API server does not serve it; `None` where that is as good.
    pub fn absent(self) -> Option<String> {
        let Definition { kind, group, .. } = self.definition();
        let is_ours = !matches!(self, Kind::HttpRoute | Kind::GrpcRoute);
        is_ours.then(|| {
            format!("this API server serves no {kind} ({group}); install it: tombolo crds | kubectl apply -f -")
        })
    }
}

/// What is needed of an object.
#[derive(Debug)]
pub struct Seen {
    /// What it declares, if that is anybody's affair here, or why it can't be used.
    pub object: Result<Option<Object>, String>,
    /// What is in force instead of one that can't be used and of which nothing better is known.
    pub instead: Option<Object>,
    /// `metadata.creationTimestamp`
    pub created: Option<Timestamp>,
}

impl Seen {
    pub fn of(api_version: &str, cluster: &ClusterId, kind: Kind, object: DynamicObject) -> Self {
        let created = object.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let object = match whole(object) {
            Ok(object) => object,
            Err(reason) => return Self { object: Err(reason), instead: None, created },
        };
        let copy = (kind == Kind::AccessPolicy).then(|| object.clone());
        let object = declared(api_version, cluster, kind, object);
        let closed = || k8s::declared(k8s::closed_policy(copy?)?, cluster).ok().flatten();
        let instead = if object.is_err() { closed() } else { None };
        Self { object, instead, created }
    }
}

/// The object as it was sent, but for who manages which of its fields.
fn whole(mut object: DynamicObject) -> Result<Value, String> {
    object.metadata.managed_fields = None;
    let metadata = serde_json::to_value(&object.metadata).map_err(|error| error.to_string())?;
    if let Value::Object(fields) = &mut object.data {
        fields.insert("metadata".into(), metadata);
    }
    Ok(object.data)
}

fn declared(api_version: &str, cluster: &ClusterId, kind: Kind, object: Value) -> Result<Option<Object>, String> {
    let resource = k8s::from_value(api_version, kind.name(), object)?;
    k8s::declared(resource.ok_or_else(|| format!("{api_version} {} is not read", kind.name()))?, cluster)
}
