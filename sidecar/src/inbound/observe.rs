//! The metrics of the inbound side.

use tombolo_core::refusal::Refusal;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;
use tombolo_runtime::metrics::prometheus_client::metrics::family::Family;
use tombolo_runtime::metrics::prometheus_client::metrics::gauge::Gauge;
use tombolo_runtime::metrics::{Metrics, Refusals};

/// Counters of everything that enters here.
#[derive(Clone)]
pub struct Observed {
    refusals: Refusals,
    requests: Family<RequestLabels, Counter>,
    audited: Family<ClusterLabel, Counter>,
    /// Legs whose handshake is done.
    pub legs: Gauge,
    pub opaque: Gauge,
    pub opaque_octets: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    cluster: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClusterLabel {
    cluster: String,
}

impl Observed {
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            refusals: metrics.refusals("sidecar-inbound"),
            requests: metrics.counters(
                "tombolo_inbound_requests",
                "Requests from other sidecars, by the caller's cluster and outcome",
            ),
            audited: metrics.counters(
                "tombolo_inbound_audited",
                "Requests and connections that a policy in audit mode would have refused, by the caller's cluster",
            ),
            legs: metrics.gauge("tombolo_inbound_legs", "Inner legs that stand"),
            opaque: metrics.gauge("tombolo_inbound_opaque_connections", "Opaque connections to the application"),
            opaque_octets: metrics.counter("tombolo_inbound_opaque_bytes", "Bytes carried opaquely, both directions"),
        }
    }

    pub fn refused(&self, refusal: Refusal) {
        self.refusals.inc(refusal);
    }

    pub fn audited(&self, cluster: &str) {
        self.audited.get_or_create_owned(&ClusterLabel { cluster: cluster.to_owned() }).inc();
    }

    /// The cluster comes from a verified identity, so there are no more labels than peers.
    pub fn request(&self, cluster: &str, outcome: &'static str) {
        self.requests.get_or_create_owned(&RequestLabels { cluster: cluster.to_owned(), outcome }).inc();
    }
}

/// Adds one to a gauge for as long as it lives.
pub struct Counted(Gauge);

impl Counted {
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
