//! Active health checks of the applications behind this sidecar. Their verdicts are what peers see as readiness.

mod check;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tombolo_core::health::{CheckResult, Health, Verdict};
use tombolo_core::id::ServiceName;
use tombolo_runtime::drain::DrainWatch;

use crate::config::ServiceConfig;
pub use check::Check;

/// Whoever is told that an application is ready, or no longer.
pub trait ReadySink: Send + Sync + 'static {
    fn set_ready(&self, service: &ServiceName, port: u16, ready: bool);
}

/// The verdicts as they stand, for the operator.
#[derive(Debug, Clone, Default)]
pub struct Verdicts {
    board: Arc<Mutex<BTreeMap<(ServiceName, u16), Checked>>>,
}

/// One application's verdict, and why its last check failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    pub verdict: Verdict,
    pub last_failure: Option<String>,
}

impl Verdicts {
    pub fn now(&self) -> BTreeMap<(ServiceName, u16), Checked> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the operator is shown.
    pub fn state(&self) -> Value {
        let row = |((service, port), checked): (&(ServiceName, u16), &Checked)| {
            json!({
                "service": service,
                "port": port,
                "verdict": checked.verdict,
                "lastFailure": checked.last_failure,
            })
        };
        self.now().iter().map(row).collect()
    }

    fn set(&self, config: &ServiceConfig, checked: Checked) {
        let key = (config.service.clone(), config.port);
        self.board.lock().unwrap_or_else(PoisonError::into_inner).insert(key, checked);
    }
}

/// Checks every application until the drain begins, and says then that none is ready.
pub async fn run(services: Vec<ServiceConfig>, sink: Arc<dyn ReadySink>, verdicts: Verdicts, drain: DrainWatch) {
    let mut tasks = tokio::task::JoinSet::new();
    for config in services.clone() {
        tasks.spawn(watch(config, sink.clone(), verdicts.clone()));
    }
    drain.draining().await;
    tasks.shutdown().await;
    for config in &services {
        sink.set_ready(&config.service, config.port, false);
    }
}

async fn watch(config: ServiceConfig, sink: Arc<dyn ReadySink>, verdicts: Verdicts) {
    let mut health = Health::new(config.health.thresholds());
    let check = Check::new(&config.app, config.health.http.as_ref(), config.health.grpc.as_ref());
    // A zero interval would be a busy loop.
    let mut ticks = interval(config.health.interval.max(Duration::from_millis(10)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let outcome = match timeout(config.health.timeout, check.run()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("no answer within {:?}", config.health.timeout)),
        };
        let result = if outcome.is_ok() { CheckResult::Passed } else { CheckResult::Failed };
        let changed = health.handle_result(result);
        let last_failure = outcome.err();
        if let Some(verdict) = changed {
            let reason = last_failure.as_deref().unwrap_or("the check passed");
            tracing::info!(service = %config.service, port = config.port, ?verdict, %reason, "readiness changed");
            sink.set_ready(&config.service, config.port, verdict.is_ready());
        }
        verdicts.set(&config, Checked { verdict: health.verdict(), last_failure });
    }
}
