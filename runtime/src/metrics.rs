//! The metrics of one process, in the OpenMetrics text format.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};
use tombolo_core::refusal::Refusal;

mod own;

pub use prometheus_client;

/// Every metric of one process. Registering happens at the start; the metrics themselves are shared
/// handles that cost an atomic addition.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    refusals: Family<RefusalLabels, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    role: &'static str,
    reason: &'static str,
}

/// The refusals of one role: `tombolo_refusals_total{role,reason}`, with every reason at zero from the
/// start, so that an alert can be written before the first one happens.
#[derive(Debug, Clone)]
pub struct Refusals {
    by_reason: Arc<[Counter]>,
}

impl Metrics {
    /// `process` is the role that the process was started as.
    pub fn new(process: &str) -> Self {
        let mut registry = Registry::default();
        let refusals = Family::<RefusalLabels, Counter>::default();
        registry.register("tombolo_refusals", "Legs, requests and connections refused, by reason", refusals.clone());
        let build = Info::new(vec![
            ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("process".to_owned(), process.to_owned()),
        ]);
        registry.register("tombolo_build", "The running program", build);
        registry.register_collector(Box::new(own::OwnProcess));
        Self { registry: Arc::new(Mutex::new(registry)), refusals }
    }

    pub fn refusals(&self, role: &'static str) -> Refusals {
        let counter =
            |refusal: &Refusal| self.refusals.get_or_create_owned(&RefusalLabels { role, reason: refusal.code() });
        Refusals { by_reason: Refusal::ALL.iter().map(counter).collect() }
    }

    /// Adds a metric of any kind. `name` is complete but for the `_total` of counters, which is added.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner).register(name, help, metric.clone());
        metric
    }

    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(name, help, Counter::default())
    }

    /// A counter for each set of labels. Labels must come from a closed set: each makes a time series.
    pub fn counters<L>(&self, name: &str, help: &str) -> Family<L, Counter>
    where
        L: EncodeLabelSet + fmt::Debug + Clone + Eq + std::hash::Hash + Send + Sync + 'static,
    {
        self.register(name, help, Family::default())
    }

    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    pub fn gauges<L>(&self, name: &str, help: &str) -> Family<L, Gauge>
    where
        L: EncodeLabelSet + fmt::Debug + Clone + Eq + std::hash::Hash + Send + Sync + 'static,
    {
        self.register(name, help, Family::default())
    }

    /// Upper bounds of the buckets in the unit that `name` ends with.
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(name, help, Histogram::new(buckets.iter().copied()))
    }

    /// All metrics, as OpenMetrics text.
    pub fn encode(&self) -> String {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        text::encode(&mut text, &registry).expect("writing to a String can't fail");
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Refusals {
    pub fn inc(&self, refusal: Refusal) {
        // `Refusal::ALL` lists the variants in the order of their discriminants.
        self.by_reason[refusal as usize].inc();
    }

    pub fn count(&self, refusal: Refusal) -> u64 {
        self.by_reason[refusal as usize].get()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn every_refusal_is_there_from_the_start() {
        let metrics = Metrics::new("gateway");
        let refusals = metrics.refusals("gateway");
        let text = metrics.encode();
        for refusal in Refusal::ALL {
            let line = format!("tombolo_refusals_total{{role=\"gateway\",reason=\"{}\"}} 0\n", refusal.code());
            assert!(text.contains(&line), "{line}{text}");
        }
        for refusal in Refusal::ALL {
            refusals.inc(*refusal);
            assert_eq!(refusals.count(*refusal), 1);
            let line = format!("reason=\"{}\"}} 1\n", refusal.code());
            assert!(metrics.encode().contains(&line), "{line}");
        }
        // The handle of a second caller counts on.
        metrics.refusals("gateway").inc(Refusal::NotExported);
        assert_eq!(refusals.count(Refusal::NotExported), 2);
    }

    #[test]
    fn the_process_reports_itself() {
        let metrics = Metrics::new("sidecar");
        metrics.gauge("tombolo_tunnels", "Tunnels").set(3);
        let text = metrics.encode();
        let line = |name: &str| {
            let line =
                text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{text}"));
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        assert!(line("process_resident_memory_bytes") > 100_000.0);
        assert!(line("process_open_fds") > 2.0);
        assert!(line("process_cpu_seconds_total") >= 0.0);
        assert!(line("process_start_time_seconds") > 1.6e9);
        assert_eq!(line("tombolo_tunnels"), 3.0);
        assert!(text.contains("tombolo_build_info{version="), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
