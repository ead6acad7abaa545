#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

const FAST: Outcome = Outcome::Answered { after: Duration::from_millis(1) };
const BAD_GATEWAY: Outcome = Outcome::GatewayError { after: Duration::from_millis(1) };

struct Bench {
    outlier: Outlier,
    start: Instant,
}

impl Bench {
    fn new() -> Self {
        Self { outlier: Outlier::new(Arc::default()), start: Instant::now() }
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn outcome(&mut self, outcome: Outcome, ms: u64) -> Option<OutlierEvent> {
        self.outlier.handle_outcome(outcome, Elsewhere::Capacity, self.at(ms))
    }

    fn tick(&mut self, ms: u64) -> Option<OutlierEvent> {
        self.outlier.handle_timeout(Elsewhere::Capacity, self.at(ms))
    }

    fn probe(&mut self, answered: bool, ms: u64) -> Option<OutlierEvent> {
        self.outlier.handle_probe(answered, Elsewhere::Capacity, self.at(ms))
    }
}

#[track_caller]
fn check(outcomes: &[Outcome], elsewhere: Elsewhere, want: Option<EjectReason>) {
    let mut outlier = Outlier::new(Arc::default());
    let now = Instant::now();
    let events: Vec<_> = outcomes.iter().filter_map(|o| outlier.handle_outcome(*o, elsewhere, now)).collect();
    assert_eq!(events, want.map(OutlierEvent::Ejected).into_iter().collect::<Vec<_>>());
    assert_eq!(outlier.is_ejected(), want.is_some());
}

#[test]
fn rows_of_failures_eject() {
    use Elsewhere::*;
    use Outcome::*;
    check(&[Refused], Capacity, Some(EjectReason::Refused));
    check(&[Refused, Refused], Nothing, None);
    check(&[Failed, Failed], Capacity, None);
    check(&[Failed, Failed, Failed], Capacity, Some(EjectReason::Failures));
    check(&[Failed, Failed, FAST, Failed], Capacity, None);
    check(&[BAD_GATEWAY; 4], Capacity, None);
    check(&[BAD_GATEWAY; 5], Capacity, Some(EjectReason::GatewayErrors));
    check(&[BAD_GATEWAY, BAD_GATEWAY, FAST, BAD_GATEWAY, BAD_GATEWAY, BAD_GATEWAY], Capacity, None);
    check(&[Failed; 9], Nothing, None);
}

#[test]
fn server_errors_and_slow_answers_count_where_they_are_asked_to() {
    let slow = Outcome::Answered { after: Duration::from_millis(900) };
    let error = Outcome::ServerError { after: Duration::from_millis(1) };
    check(&[error; 20], Elsewhere::Capacity, None);
    check(&[slow; 20], Elsewhere::Capacity, None);
    let config =
        OutlierConfig { server_errors: 3, slow: 2, slow_after: Duration::from_millis(500), ..OutlierConfig::default() };
    let ejected = |outcomes: &[Outcome]| {
        let mut outlier = Outlier::new(config.into());
        let now = Instant::now();
        outcomes.iter().find_map(|outcome| outlier.handle_outcome(*outcome, Elsewhere::Capacity, now))
    };
    assert_eq!(ejected(&[error, error, FAST, error, error]), None);
    assert_eq!(ejected(&[error, BAD_GATEWAY, error]), Some(OutlierEvent::Ejected(EjectReason::ServerErrors)));
    assert_eq!(ejected(&[slow, FAST, slow]), None);
    assert_eq!(ejected(&[slow, slow]), Some(OutlierEvent::Ejected(EjectReason::Slow)));
}

#[test]
fn an_ejected_endpoint_returns_by_a_probe() {
    let mut bench = Bench::new();
    assert_eq!(bench.outcome(Outcome::Refused, 0), Some(OutlierEvent::Ejected(EjectReason::Refused)));
    assert_eq!(bench.tick(499), None);
    assert_eq!(bench.tick(500), Some(OutlierEvent::Probe));
    assert_eq!(bench.tick(501), None);
    assert_eq!(bench.probe(false, 510), None);
    assert_eq!(bench.tick(1509), None);
    assert_eq!(bench.tick(1510), Some(OutlierEvent::Probe));
    assert_eq!(bench.probe(true, 1520), Some(OutlierEvent::Restored));
    assert!(!bench.outlier.is_ejected());
}

#[test]
fn a_probe_without_a_result_has_failed() {
    let mut bench = Bench::new();
    bench.outcome(Outcome::Refused, 0);
    assert_eq!(bench.tick(500), Some(OutlierEvent::Probe));
    assert_eq!(bench.tick(2500), None);
    assert_eq!(bench.outlier.poll_timeout(), Some(bench.at(3500)));
}

#[test]
fn pauses_grow_and_are_forgiven() {
    let mut bench = Bench::new();
    let mut ms = 0;
    for pause in [500, 1_000, 2_000] {
        bench.outcome(Outcome::Refused, ms);
        assert_eq!(bench.outlier.poll_timeout(), Some(bench.at(ms + pause)));
        ms += pause;
        bench.tick(ms);
        bench.probe(true, ms);
    }
    // Twice the last pause is not enough, a little more is.
    ms += 4_000;
    bench.outcome(Outcome::Refused, ms);
    assert_eq!(bench.outlier.poll_timeout(), Some(bench.at(ms + 4_000)));
    ms += 4_000;
    bench.tick(ms);
    bench.probe(true, ms);
    ms += 8_001;
    bench.outcome(Outcome::Refused, ms);
    assert_eq!(bench.outlier.poll_timeout(), Some(bench.at(ms + 500)));
}

#[test]
fn what_fails_now_and_then_is_not_kept_out_ever_longer() {
    let mut bench = Bench::new();
    let mut ms = 0;
    for _ in 0..20 {
        bench.outcome(Outcome::Refused, ms);
        assert_eq!(bench.outlier.poll_timeout(), Some(bench.at(ms + 500)));
        for failed in [500, 1_500, 2_500] {
            assert_eq!(bench.tick(ms + failed), Some(OutlierEvent::Probe));
            bench.probe(false, ms + failed);
        }
        assert_eq!(bench.tick(ms + 3_500), Some(OutlierEvent::Probe));
        assert_eq!(bench.probe(true, ms + 3_500), Some(OutlierEvent::Restored));
        ms += 5_000;
    }
}

#[test]
fn a_hang_is_suspected_then_probed() {
    let mut bench = Bench::new();
    for _ in 0..100 {
        bench.outcome(Outcome::Answered { after: Duration::from_millis(100) }, 0);
    }
    // 100 ms lie in the bucket up to 131 ms; four times that.
    let oldest = bench.at(1);
    assert_eq!(bench.outlier.handle_outstanding(5, oldest, bench.at(500)), None);
    assert_eq!(bench.outlier.handle_outstanding(2, oldest, bench.at(600)), None);
    assert_eq!(bench.outlier.handle_outstanding(5, oldest, bench.at(600)), Some(OutlierEvent::Probe));
    assert_eq!(bench.outlier.handle_outstanding(5, oldest, bench.at(610)), None);
    assert_eq!(bench.probe(true, 620), None);
    // It lives: twice the silence before it is asked again.
    assert_eq!(bench.outlier.handle_outstanding(5, oldest, bench.at(1_600)), None);
    assert_eq!(bench.outlier.handle_outstanding(5, oldest, bench.at(1_700)), Some(OutlierEvent::Probe));
    assert_eq!(bench.probe(false, 1_710), Some(OutlierEvent::Ejected(EjectReason::Hung)));
}

#[test]
fn a_probe_for_a_hang_is_waited_for_as_long_as_the_endpoint_usually_takes() {
    for (usual_ms, want_ms) in [(1, 300), (100, 4 * 131), (10_000, 2_000)] {
        let mut bench = Bench::new();
        for _ in 0..100 {
            bench.outcome(Outcome::Answered { after: Duration::from_millis(usual_ms) }, 0);
        }
        let oldest = bench.at(0);
        assert_eq!(bench.outlier.handle_outstanding(3, oldest, bench.at(100_000)), Some(OutlierEvent::Probe));
        let due = bench.outlier.poll_timeout().unwrap() - bench.at(100_000);
        assert!(due.abs_diff(Duration::from_millis(want_ms)) < Duration::from_millis(1), "{usual_ms}: {due:?}");
        let event = bench.outlier.handle_timeout(Elsewhere::Capacity, bench.at(100_000) + due);
        assert_eq!(event, Some(OutlierEvent::Ejected(EjectReason::Hung)));
    }
}

#[test]
fn without_history_nothing_hangs() {
    let mut bench = Bench::new();
    let oldest = bench.at(0);
    assert_eq!(bench.outlier.handle_outstanding(100, oldest, bench.at(60_000)), None);
}

#[test]
fn what_a_broken_way_did_is_forgiven_when_it_stands_again() {
    let mut bench = Bench::new();
    bench.outcome(Outcome::Refused, 0);
    let mut ms = 0;
    for pause in [500, 1_000, 1_000, 1_000] {
        ms += pause;
        assert_eq!(bench.tick(ms), Some(OutlierEvent::Probe));
        assert_eq!(bench.probe(false, ms), None);
    }
    assert_eq!(bench.outlier.poll_timeout(), Some(bench.at(ms + 1_000)));
    bench.outlier.handle_way_up(bench.at(ms + 10));
    assert_eq!(bench.tick(ms + 10), Some(OutlierEvent::Probe));
    // A way that breaks and stands again while the probe is under way.
    bench.outlier.handle_way_up(bench.at(ms + 15));
    assert_eq!(bench.probe(false, ms + 20), None);
    assert_eq!(bench.tick(ms + 1_020), Some(OutlierEvent::Probe));
    assert_eq!(bench.probe(true, ms + 1_030), Some(OutlierEvent::Restored));
    // Who is not ejected has nothing to be forgiven.
    bench.outlier.handle_way_up(bench.at(ms + 1_040));
    assert_eq!(bench.outlier.poll_timeout(), None);
}

#[test]
fn readiness_declared_anew_ends_an_ejection() {
    let mut bench = Bench::new();
    bench.outcome(Outcome::Refused, 0);
    assert_eq!(bench.outlier.handle_ready_again(bench.at(10)), Some(OutlierEvent::Restored));
    assert_eq!(bench.outlier.handle_ready_again(bench.at(11)), None);
}

proptest! {
    #[test]
    fn the_p99_lies_above_almost_all(samples in prop::collection::vec(0_u64..5_000_000, 20..3000)) {
        let mut latency = Latency::default();
        samples.iter().for_each(|micros| latency.record(Duration::from_micros(*micros)));
        let p99 = latency.p99().unwrap();
        let top = samples.iter().copied().max().unwrap();
        prop_assert!(p99 <= Duration::from_micros(2 * top.max(1)));
    }

    #[test]
    fn an_ejected_endpoint_always_has_a_timeout(steps in prop::collection::vec((0_u8..7, any::<bool>()), 0..60)) {
        let mut outlier = Outlier::new(Arc::default());
        let mut now = Instant::now();
        for (step, flag) in steps {
            now += Duration::from_millis(300);
            let elsewhere = if flag { Elsewhere::Capacity } else { Elsewhere::Nothing };
            let _ = match step {
                0 => outlier.handle_outcome(Outcome::Refused, elsewhere, now),
                1 => outlier.handle_outcome(Outcome::Failed, elsewhere, now),
                2 => outlier.handle_outcome(FAST, elsewhere, now),
                3 => outlier.handle_probe(flag, elsewhere, now),
                4 => outlier.handle_outstanding(5, now, now),
                5 => {
                    outlier.handle_way_up(now);
                    None
                }
                _ => outlier.handle_timeout(elsewhere, now),
            };
            prop_assert!(!outlier.is_ejected() || outlier.poll_timeout().is_some());
        }
    }
}

#[test]
fn what_is_slow_is_so_next_to_its_siblings() {
    let ms = Duration::from_millis;
    for (factor, siblings, want) in [
        (3, vec![], Duration::MAX),
        (3, vec![100], ms(300)),
        (3, vec![100, 900], ms(300)),
        (3, vec![900, 200, 100], ms(600)),
        (10, vec![1, 1, 1], ms(50)),
    ] {
        assert_eq!(slow_after(factor, siblings.iter().map(|millis| ms(*millis))), want, "{factor} {siblings:?}");
    }
}

#[test]
fn whoever_may_not_be_ejected_is_taken_back_and_stays() {
    let now = Instant::now();
    let mut outlier = Outlier::new(Arc::default());
    let refused = |outlier: &mut Outlier| outlier.handle_outcome(Outcome::Refused, Elsewhere::Capacity, now);
    assert_eq!(refused(&mut outlier), Some(OutlierEvent::Ejected(EjectReason::Refused)));
    let off = OutlierConfig { enabled: false, ..OutlierConfig::default() };
    assert_eq!(outlier.set_config(off.into(), now), Some(OutlierEvent::Restored));
    assert_eq!(refused(&mut outlier), None);
    (0..50).for_each(|_| {
        let fast = Outcome::Answered { after: Duration::from_millis(1) };
        assert_eq!(outlier.handle_outcome(fast, Elsewhere::Capacity, now), None);
    });
    let later = now + Duration::from_secs(60);
    assert_eq!(outlier.handle_outstanding(100, now, later), None, "a hang is not even asked about");
    assert_eq!(outlier.set_config(Arc::default(), later), None);
    assert_eq!(outlier.handle_outstanding(100, now, later), Some(OutlierEvent::Probe));
}
