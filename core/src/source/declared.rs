//! The objects of a source as its operator wrote them, each parsed but not yet seen beside the others.

use std::fmt;
use std::sync::Arc;

use crate::id::{ClusterId, InstanceName, Namespace, ServiceName, TrustDomain};
use crate::model::{Authority, ServicePort, SessionAffinity};
use crate::policy::access::DefaultAccess;
use crate::policy::set::Policy;

/// Where an object was written: a file and line, or an object of an API server by kind, namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub file: Arc<str>,
    /// 1-based line of the object's first key; 0 where there are no lines.
    pub line: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.file),
            line => write!(f, "{}:{line}", self.file),
        }
    }
}

/// An object and where it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declared {
    pub place: Place,
    pub object: Object,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    Service(DeclaredService),
    Slice(DeclaredSlice),
    Export(DeclaredExport),
    Peer(DeclaredPeer),
    Policy(Policy),
    /// One that allows something for all exports in it; others are nobody's affair.
    Namespace(DeclaredNamespace),
}

/// What of `Service.spec.type` and `clusterIP` matters to the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceType {
    ClusterIp,
    Headless,
    /// An alias of a DNS name: has no endpoints of its own and can't be exported (KEP-1645).
    ExternalName,
}

/// `Service` (v1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredService {
    pub service: ServiceName,
    pub service_type: ServiceType,
    pub session_affinity: SessionAffinity,
    pub ports: Vec<ServicePort>,
    /// The accounts of the Service's namespace that may serve it.
    pub service_accounts: Vec<String>,
}

/// `EndpointSlice` (discovery.k8s.io/v1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredSlice {
    pub name: String,
    pub service: ServiceName,
    pub endpoints: Vec<DeclaredEndpoint>,
}

/// One endpoint of a slice. Its address stays behind: peers never see one, and sidecars register theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredEndpoint {
    /// `targetRef.name`: the sidecar that delivers to it.
    pub instance: Option<InstanceName>,
    /// What tells it apart from its neighbours where no instance is named: host name or address.
    pub key: String,
    pub hostname: Option<String>,
    pub zone: Option<String>,
    pub weight: u32,
    pub ready: bool,
}

/// `ServiceExport` (multicluster.x-k8s.io).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredExport {
    pub service: ServiceName,
    /// Gateways may call it for workloads that have no sidecar.
    pub unmeshed: bool,
}

/// `Namespace` (v1) whose exports gateways may call for workloads that have no sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredNamespace {
    pub name: Namespace,
}

/// `ClusterPeer` (tombolo.dev/v1alpha1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredPeer {
    pub cluster: ClusterId,
    pub trust_domain: Option<TrustDomain>,
    pub authority: Authority,
    /// What becomes of the peer's callers that no policy speaks of; the cluster's default unless set.
    pub default_access: Option<DefaultAccess>,
    /// With a bundle the resource makes the peering; without one it only grants.
    pub bundle: Option<DeclaredBundle>,
    /// `host:port` of the peer's gateways.
    pub gateways: Vec<String>,
}

/// The roots of a peer's trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredBundle {
    pub sequence: u64,
    /// One or more PEM certificates.
    pub roots_pem: String,
}
