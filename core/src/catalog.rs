//! The service catalogue of one cluster: its own services and what its peers export to it, joined
//! into one view per service that does not depend on the order in which the parts arrived.

use std::collections::{BTreeMap, BTreeSet};

use crate::conflict::Conflict;
use crate::id::{ClusterId, EndpointId, ServiceName};
use crate::model::ClusterShare;

/// Where a sidecar of this cluster accepts inner legs for one port of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// `host:port`.
    pub address: String,
    pub ready: bool,
}

/// Deliveries of a service of this cluster, by endpoint and port.
pub type Deliveries = BTreeMap<EndpointId, BTreeMap<u16, Delivery>>;

/// One service as this cluster sees it: every cluster's share, inside the import grants.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceView {
    pub service: ServiceName,
    /// In the order of cluster ids. The own cluster's share is here whether it is exported or not.
    pub shares: Vec<ClusterShare>,
    /// Where the endpoints of the own share are delivered.
    pub deliveries: Deliveries,
    pub conflicts: BTreeSet<Conflict>,
    /// Clusters that export it to here but whose import grant leaves it out.
    pub excluded: BTreeSet<ClusterId>,
    /// Whether this cluster exports it.
    pub exported: bool,
    /// The peers that this cluster offers it to.
    pub offered_to: BTreeSet<ClusterId>,
}
