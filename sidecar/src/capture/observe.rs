//! The metrics of captured connections.

use std::sync::Arc;

use tombolo_core::refusal::Refusal;
use tombolo_runtime::logging::Sparsely;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;
use tombolo_runtime::metrics::prometheus_client::metrics::family::Family;
use tombolo_runtime::metrics::prometheus_client::metrics::gauge::Gauge;
use tombolo_runtime::metrics::{Metrics, Refusals};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    direction: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

/// The counters of both directions, registered once.
#[derive(Clone)]
pub struct Meters {
    refusals: Refusals,
    connections: Family<ConnectionLabels, Counter>,
    passing: Family<DirectionLabels, Gauge>,
}

impl Meters {
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            refusals: metrics.refusals("sidecar-capture"),
            connections: metrics.counters(
                "tombolo_captured_connections",
                "Redirected connections, by direction: carried in the mesh, passed on in plaintext, or refused",
            ),
            passing: metrics.gauges("tombolo_captured_passing", "Redirected connections that are passed on now"),
        }
    }

    pub fn of(&self, direction: &'static str) -> Observed {
        let counter = |outcome| self.connections.get_or_create_owned(&ConnectionLabels { direction, outcome });
        Observed {
            direction,
            refusals: self.refusals.clone(),
            mesh: counter("mesh"),
            passed: counter("passed"),
            refused: counter("refused"),
            passing: self.passing.get_or_create_owned(&DirectionLabels { direction }),
            said: Arc::default(),
        }
    }
}

/// The counters of one direction.
#[derive(Clone)]
pub struct Observed {
    pub direction: &'static str,
    refusals: Refusals,
    /// Carried as a service's, or as an inner leg.
    pub mesh: Counter,
    pub passed: Counter,
    refused: Counter,
    pub passing: Gauge,
    /// Anybody can make a connection that is refused.
    pub said: Arc<Sparsely>,
}

impl Observed {
    pub fn refused(&self, refusal: Refusal) {
        self.refused.inc();
        self.refusals.inc(refusal);
    }
}
