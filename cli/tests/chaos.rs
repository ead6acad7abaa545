//! Faults under load between two clusters: a request that may be replayed never fails, whatever is killed, stopped or
//! cut. The bench measures how long each takes; here only failures count.

#![allow(clippy::unwrap_used)]

mod support;

use support::skip;
use tombolo_kind_tests::chaos::{self, FAULTS, Fault, Plan};
use tombolo_kind_tests::lacks;

const TIMES: usize = 3;

/// Runs these faults, and fails naming every outcome in which a request did.
fn check(names: &[&str]) {
    if let Some(lack) = lacks() {
        return skip(&lack);
    }
    let named = |name: &&str| FAULTS.into_iter().find(|fault| fault.name == *name).unwrap_or_else(|| panic!("{name}"));
    let faults: Vec<Fault> = names.iter().map(named).collect();
    let folder = tempfile::Builder::new().prefix("tombolo-test-").tempdir().expect("a temporary folder");
    let binary = env!("CARGO_BIN_EXE_tombolo").into();
    let plan = Plan { binary, times: TIMES, folder: folder.path().to_owned(), faults };
    let wanted = plan.faults.len() * TIMES;
    let outcomes = chaos::run(plan, |outcome| println!("{outcome:?}")).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(outcomes.len(), wanted);
    let bad: Vec<_> = outcomes.iter().filter(|outcome| outcome.failed + outcome.failed_after > 0).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    // A fault that met nobody would have shown nothing.
    assert!(outcomes.iter().all(|outcome| outcome.requests > 100), "{outcomes:#?}");
}

#[test]
fn no_replayable_request_fails_for_what_is_near() {
    check(&[
        "local app killed",
        "local app stopped",
        "local sidecar killed",
        "local sidecar stopped",
        "local gateway killed",
        "local gateway stopped",
        "remote app killed",
        "remote app stopped",
    ]);
}

#[test]
fn no_replayable_request_fails_for_what_is_beyond() {
    check(&[
        "remote sidecar killed",
        "remote sidecar stopped",
        "remote gateway killed",
        "remote gateway stopped",
        "link cut",
        "link cut outwards",
        "link cut inwards",
        "remote cluster killed",
        "remote cluster stopped",
    ]);
}
