//! The metrics of the outbound side.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tombolo_core::detect::FirstWord;
use tombolo_core::id::{ClusterId, ServiceName};
use tombolo_core::outlier::EjectReason;
use tombolo_core::refusal::Refusal;
use tombolo_core::routing::{Pick, PickReason};
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;
use tombolo_runtime::metrics::prometheus_client::metrics::family::Family;
use tombolo_runtime::metrics::prometheus_client::metrics::gauge::Gauge;
use tombolo_runtime::metrics::{Metrics, Refusals};

type TargetsCounted = HashMap<(ServiceName, ClusterId), Arc<TargetCounters>>;

/// Counters of everything that leaves this sidecar.
#[derive(Clone)]
pub struct Observed {
    pub refusals: Refusals,
    requests: Family<RequestLabels, Counter>,
    retries: Family<RetryLabels, Counter>,
    ejections: Family<EjectionLabels, Counter>,
    detections: Family<DetectionLabels, Counter>,
    mirrored: Family<MirrorLabels, Counter>,
    /// Second tries beside a first one that was slow.
    pub hedges: Counter,
    fallbacks: Fallbacks,
    /// Requests that were answered by another cluster than the one that was tried first.
    pub failovers: Counter,
    pub connections: Gauge,
    pub legs: Gauge,
    pub dials: Counter,
    pub opaque: Gauge,
    targets: Arc<Mutex<TargetsCounted>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    service: String,
    cluster: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabels {
    after: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EjectionLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DetectionLabels {
    protocol: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MirrorLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FallbackLabels {
    reason: &'static str,
}

/// Picks that are not what is preferred, looked up once.
#[derive(Debug, Clone)]
struct Fallbacks {
    spill: Counter,
    panic: Counter,
    failover: Counter,
    again: Counter,
    last_resort: Counter,
}

impl Fallbacks {
    fn new(metrics: &Metrics) -> Self {
        let help = "Tries that went elsewhere than to a fit endpoint of the preferred cluster, by reason";
        let family: Family<FallbackLabels, Counter> = metrics.counters("tombolo_outbound_fallback_picks", help);
        let counter = |reason| family.get_or_create_owned(&FallbackLabels { reason });
        Self {
            spill: counter("spill"),
            panic: counter(PickReason::Panic.name()),
            failover: counter(PickReason::Failover.name()),
            again: counter(PickReason::Again.name()),
            last_resort: counter(PickReason::LastResort.name()),
        }
    }
}

/// The counters of one service in one cluster, looked up once and not for each request.
#[derive(Debug, Clone)]
pub struct TargetCounters {
    pub answered: Counter,
    pub gateway_errors: Counter,
    pub failed: Counter,
    pub refused: Counter,
}

impl Observed {
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            refusals: metrics.refusals("sidecar-outbound"),
            requests: metrics.counters(
                "tombolo_outbound_requests",
                "Tries of outbound requests and connections, by service, cluster and outcome",
            ),
            retries: metrics
                .counters("tombolo_outbound_retries", "Second tries, by how far the try before them had come"),
            ejections: metrics.counters("tombolo_outbound_ejections", "Endpoints ejected because requests failed"),
            detections: metrics.counters(
                "tombolo_outbound_detections",
                "Connections whose protocol was looked for in their first bytes, by what was found",
            ),
            mirrored: metrics.counters(
                "tombolo_outbound_mirrored",
                "Copies of requests, by what became of them: answered, failed, or dropped before they were sent",
            ),
            hedges: metrics.counter("tombolo_outbound_hedges", "Second tries beside a first one that was slow"),
            fallbacks: Fallbacks::new(metrics),
            failovers: metrics.counter(
                "tombolo_outbound_failovers",
                "Requests answered by another cluster than the one that was tried first",
            ),
            connections: metrics.gauge("tombolo_outbound_connections", "Connections of the application"),
            legs: metrics.gauge("tombolo_outbound_legs", "Inner legs that carry requests"),
            dials: metrics.counter("tombolo_outbound_dials", "Inner legs dialled"),
            opaque: metrics.gauge("tombolo_outbound_opaque_connections", "Connections carried as opaque bytes"),
            targets: Arc::default(),
        }
    }

    pub fn target(&self, service: &ServiceName, cluster: &ClusterId) -> Arc<TargetCounters> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let counter = |outcome| {
            let (service, cluster) = (service.to_string(), cluster.to_string());
            self.requests.get_or_create_owned(&RequestLabels { service, cluster, outcome })
        };
        let make = || {
            Arc::new(TargetCounters {
                answered: counter("answered"),
                gateway_errors: counter("gateway-error"),
                failed: counter("failed"),
                refused: counter("refused"),
            })
        };
        targets.entry((service.clone(), cluster.clone())).or_insert_with(make).clone()
    }

    pub fn retried(&self, after: tombolo_core::retry::Progress) {
        use tombolo_core::retry::Progress;
        let after = match after {
            Progress::NotSent => "not-sent",
            Progress::Refused => "refused",
            Progress::Sent => "sent",
            Progress::ResponseBegun => "response-begun",
        };
        self.retries.get_or_create_owned(&RetryLabels { after }).inc();
    }

    /// Counts a pick, unless it is what is preferred.
    pub fn picked(&self, pick: Pick) {
        match pick.reason {
            PickReason::Share | PickReason::Session if pick.spilled => self.fallbacks.spill.inc(),
            PickReason::Share | PickReason::Session => return,
            PickReason::Panic => self.fallbacks.panic.inc(),
            PickReason::Failover => self.fallbacks.failover.inc(),
            PickReason::Again => self.fallbacks.again.inc(),
            PickReason::LastResort => self.fallbacks.last_resort.inc(),
        };
    }

    pub fn ejected(&self, reason: EjectReason) {
        self.ejections.get_or_create_owned(&EjectionLabels { reason: reason.name() }).inc();
    }

    /// `None` when nothing came in time that tells anything.
    pub fn detected(&self, word: Option<&FirstWord>) {
        let protocol = word.map_or("none", FirstWord::name);
        self.detections.get_or_create_owned(&DetectionLabels { protocol }).inc();
    }

    pub fn mirrored(&self, outcome: &'static str) {
        self.mirrored.get_or_create_owned(&MirrorLabels { outcome }).inc();
    }

    pub fn refused(&self, refusal: Refusal) {
        self.refusals.inc(refusal);
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
