//! What a cluster's source declares: the services, exports and grants that its operator wrote.

pub mod declared;
mod reduce;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use crate::id::{ClusterId, EndpointId, InstanceName, ServiceName, SpiffeId};
use crate::model::{Authority, ServiceKind, ServicePort, SessionAffinity};
use crate::policy::access::DefaultAccess;
use crate::policy::set::PolicySet;

pub use reduce::{ENDPOINTS_MAX, PROBLEMS_MAX, Purpose, SERVICES_MAX, Surroundings, reduce};

/// All that the source declares, as one consistent reading.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LocalState {
    pub services: BTreeMap<ServiceName, LocalService>,
    /// Grants written as resources; for a peer named here they replace those given at the invitation.
    pub peers: BTreeMap<ClusterId, Authority>,
    /// Peerings that are made by a resource alone, with the peer's bundle in it.
    pub declared_peers: BTreeMap<ClusterId, (declared::Place, declared::DeclaredPeer)>,
    /// Default access of peers that have one of their own.
    pub peer_access: BTreeMap<ClusterId, DefaultAccess>,
    /// Routes and policies.
    pub policies: Arc<PolicySet>,
    /// Exports that are not in force, and why.
    pub refused_exports: BTreeMap<ServiceName, ExportRefused>,
    /// What could not be read; the last good reading of it stays in force.
    pub problems: Vec<SourceProblem>,
}

/// Why a `ServiceExport` exports nothing; the first two are printed as KEP-1645 names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportRefused {
    NoService,
    InvalidServiceType,
    ReservedNamespace,
    /// There are more services than this program takes.
    TooMany,
}

/// A service of this cluster, exported or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalService {
    pub service: ServiceName,
    /// When its export was first seen; `None` while it is not exported.
    pub exported: Option<Timestamp>,
    pub kind: ServiceKind,
    pub session_affinity: SessionAffinity,
    pub ports: BTreeSet<ServicePort>,
    /// The identities that may serve it. Empty means that nobody may.
    pub server_ids: BTreeSet<SpiffeId>,
    pub endpoints: BTreeMap<EndpointId, LocalEndpoint>,
    /// Gateways may call it for workloads that have no sidecar.
    pub unmeshed: bool,
}

/// An endpoint as a slice declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// The registered sidecar that delivers to it; without one it can't become ready.
    pub instance: Option<InstanceName>,
    pub hostname: Option<String>,
    pub zone: Option<String>,
    pub weight: u32,
    /// The slice's own `ready` condition; a registration must confirm it.
    pub declared_ready: bool,
}

/// A part of the source that is refused, for the operator who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SourceProblem {
    pub file: String,
    /// 1-based; 0 when the problem has no line.
    pub line: u32,
    pub reason: String,
}
