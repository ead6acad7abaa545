//! Seventeen faults in turn, between two clusters in network namespaces of their own, with a link between them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use tombolo_kind_tests::chaos::{self, FAULTS, Outcome, Plan};

use crate::load::percentile;
use crate::report::{Bar, Figures, Series, Want};

/// Most requests of one fault that may take longer than [`chaos::PROMPT`], and the longest that one may take.
struct Bars {
    slow: Option<f64>,
    slowest_p50_ms: Option<f64>,
    slowest_p99_ms: Option<f64>,
}

/// Beside that none fails, which holds for all.
fn bars_of(fault: &str) -> Bars {
    let none = Bars { slow: None, slowest_p50_ms: None, slowest_p99_ms: None };
    match fault {
        "local app killed" | "remote app killed" => {
            Bars { slowest_p50_ms: Some(40.0), slowest_p99_ms: Some(150.0), ..none }
        }
        "local app stopped" | "remote app stopped" => Bars { slow: Some(120.0), ..none },
        "remote gateway killed" => Bars { slowest_p50_ms: Some(50.0), ..none },
        "remote gateway stopped" => Bars { slowest_p99_ms: Some(700.0), ..none },
        "link cut" | "link cut outwards" | "link cut inwards" | "remote cluster stopped" => {
            Bars { slow: Some(60.0), slowest_p99_ms: Some(700.0), ..none }
        }
        _ => none,
    }
}

/// Runs every fault `times` times with the default configuration.
pub async fn run(binary: &Path, times: usize, figures: &mut Figures, bars: &mut Vec<Bar>) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("tombolo-bench-").tempdir()?;
    let plan = Plan { binary: binary.to_owned(), faults: FAULTS.to_vec(), times, folder: folder.path().to_owned() };
    let carried_out = tokio::task::spawn_blocking(|| chaos::run(plan, |outcome| eprintln!("failover, {outcome:?}")));
    let outcomes = carried_out.await.context("carrying out the faults")??;
    for fault in FAULTS {
        let own: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.fault == fault.name).collect();
        record(figures.entry(format!("matrix: {}", fault.name)).or_default(), &own);
        judge(fault.name, &own, bars);
    }
    Ok(())
}

fn judge(fault: &str, outcomes: &[&Outcome], bars: &mut Vec<Bar>) {
    let mut bar = |what: &str, want: Option<f64>, got: f64| {
        if let Some(want) = want {
            bars.push(Bar::new(format!("matrix, {fault}: {what}"), Want::AtMost(want), Some(got)));
        }
    };
    let failed: usize = outcomes.iter().map(|outcome| outcome.failed + outcome.failed_after).sum();
    bar("failed requests", Some(0.0), failed as f64);
    let Bars { slow, slowest_p50_ms, slowest_p99_ms } = bars_of(fault);
    let most = outcomes.iter().map(|outcome| outcome.slow).max().unwrap_or(0);
    bar("requests over 250 ms, the most of one fault", slow, most as f64);
    let slowest = sorted(outcomes, |outcome| outcome.slowest_ms);
    bar("slowest request, ms, p50", slowest_p50_ms, percentile(&slowest, 0.5));
    bar("slowest request, ms, p99", slowest_p99_ms, percentile(&slowest, 0.99));
}

fn record(figures: &mut BTreeMap<String, Series>, outcomes: &[&Outcome]) {
    let mut one = |name: String, value: f64| figures.entry(name).or_default().push(value);
    one("faults".into(), outcomes.len() as f64);
    one("requests during faults".into(), outcomes.iter().map(|outcome| outcome.requests as f64).sum());
    one("failed during faults".into(), outcomes.iter().map(|outcome| outcome.failed as f64).sum());
    one("failed between faults".into(), outcomes.iter().map(|outcome| outcome.failed_after as f64).sum());
    one("slow during faults".into(), outcomes.iter().map(|outcome| outcome.slow as f64).sum());
    for (name, values) in [
        ("settled", sorted(outcomes, |outcome| outcome.settled_ms)),
        ("slowest request", sorted(outcomes, |outcome| outcome.slowest_ms)),
    ] {
        for (label, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
            one(format!("{name}, ms, {label}"), percentile(&values, share));
        }
    }
}

fn sorted(outcomes: &[&Outcome], value: impl Fn(&Outcome) -> u32) -> Vec<u32> {
    let mut values: Vec<u32> = outcomes.iter().map(|outcome| value(outcome)).collect();
    values.sort_unstable();
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_belongs_to_a_fault_that_there_is() {
        let with_bars = FAULTS.iter().filter(|fault| {
            let bars = bars_of(fault.name);
            bars.slow.is_some() || bars.slowest_p50_ms.is_some() || bars.slowest_p99_ms.is_some()
        });
        assert_eq!(with_bars.count(), 10);
    }
}
