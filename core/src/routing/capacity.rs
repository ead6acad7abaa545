//! How much of a service's traffic one cluster may carry: its healthy weight against the peak that is
//! remembered of it, falling at once and rising step by step.

use std::time::{Duration, Instant};

/// A cluster carries all the traffic while at least 1/1.4 (71 %) of its capacity is healthy.
pub const OVER_PROVISIONING: f64 = 1.4;

/// Time constant of the peak: what exceeds today's weight falls to 5 % of itself in ten minutes.
const PEAK_DECAY: Duration = Duration::from_secs(200);

/// Traffic comes back to a cluster in steps of [`RISE_STEP`], each after the cluster was healthy enough for this
/// long. So a share that has fallen begins to return within a second and is whole again after five; and in any
/// time T, however endpoints flap, the traffic that moves back to a cluster is at most T/500 ms steps. As
/// what falls must have risen before, that bounds how much moves away as well.
pub const RISE_HOLD: Duration = Duration::from_millis(500);
pub const RISE_STEP: f64 = 0.1;
/// Ten steps of a tenth are the whole, whatever binary fractions make of that.
const ROUNDING: f64 = 1e-9;

/// Weight of one cluster's endpoints for one service and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weights {
    /// Of every endpoint that is known, ready or not.
    pub known: u64,
    /// Of the endpoints that may be picked.
    pub healthy: u64,
}

/// What is remembered of one cluster between plans.
#[derive(Debug, Clone)]
pub struct Capacity {
    peak: f64,
    peak_at: Instant,
    granted: f64,
    /// Since when more than what is granted was possible without a break.
    rising: Option<Instant>,
}

/// The share of the traffic that a cluster could carry, and the share that it is trusted with. 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grant {
    pub possible: f64,
    pub granted: f64,
}

impl Capacity {
    /// What is seen first is believed at once: there is no history to be careful about.
    pub fn new(weights: Weights, now: Instant) -> Self {
        let peak = weights.known as f64;
        Self { peak, peak_at: now, granted: possible(weights, peak), rising: None }
    }

    /// Takes in the weights of this moment.
    pub fn observe(&mut self, weights: Weights, now: Instant) -> Grant {
        self.peak = self.peak_at(weights.known as f64, now);
        self.peak_at = now;
        let possible = possible(weights, self.peak);
        if possible <= self.granted {
            (self.granted, self.rising) = (possible, None);
            return Grant { possible, granted: possible };
        }
        let since = *self.rising.get_or_insert(now);
        if now.saturating_duration_since(since) >= RISE_HOLD {
            // One step however late it is looked at: what was not observed is not trusted.
            let step = self.granted + RISE_STEP;
            self.granted = if step + ROUNDING < possible { step } else { possible };
            self.rising = (possible > self.granted).then_some(now);
        }
        Grant { possible, granted: self.granted }
    }

    /// When observing again, without news, would change the grant.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.rising.map(|since| since + RISE_HOLD)
    }

    fn peak_at(&self, known: f64, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.peak_at).as_secs_f64();
        let excess = (self.peak - known).max(0.0) * (-elapsed / PEAK_DECAY.as_secs_f64()).exp();
        // Below 1 % of today's weight nothing is left to remember; the share can reach exactly 1 again.
        if excess < known * 0.01 { known } else { known + excess }
    }
}

fn possible(weights: Weights, peak: f64) -> f64 {
    if peak <= 0.0 { 0.0 } else { (OVER_PROVISIONING * weights.healthy as f64 / peak).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: fn(u64) -> Weights = |weight| Weights { known: weight, healthy: weight };

    #[test]
    fn ten_then_none_then_one_endpoint_is_a_tenth() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut capacity = Capacity::new(ALL(10), start);
        assert_eq!(capacity.observe(ALL(0), at(1_000)).granted, 0.0);
        assert_eq!(capacity.observe(ALL(1), at(2_000)).granted, 0.0);
        for step in 1..=10 {
            let back = capacity.observe(ALL(1), at(2_000 + step * 500));
            let want = if step == 1 { 0.1..0.1001 } else { 0.1..0.15 };
            assert!(want.contains(&back.granted), "{step}: {back:?}");
        }
        let later = capacity.observe(ALL(1), at(1_800_000));
        assert_eq!(later.possible, 1.0);
    }

    #[test]
    fn a_share_falls_at_once_and_rises_in_steps() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut capacity = Capacity::new(ALL(4), start);
        let half = Weights { known: 4, healthy: 2 };
        let mut granted = |weights, ms| (capacity.observe(weights, at(ms)).granted * 100.0).round() as u32;
        assert_eq!(granted(half, 100), 70);
        assert_eq!(granted(ALL(4), 200), 70);
        assert_eq!(granted(ALL(4), 699), 70);
        assert_eq!(granted(ALL(4), 700), 80);
        // Less, but still more than is granted: the wait goes on.
        assert_eq!(granted(Weights { known: 4, healthy: 3 }, 1_000), 80);
        assert_eq!(granted(ALL(4), 1_200), 90);
        assert_eq!(granted(half, 1_300), 70);
        assert_eq!(granted(ALL(4), 1_400), 70);
        assert_eq!(capacity.poll_timeout(), Some(at(1_900)));
    }

    #[test]
    fn a_return_begins_within_a_second_and_ends_within_six() {
        let start = Instant::now();
        let mut capacity = Capacity::new(ALL(1), start);
        capacity.observe(Weights { known: 1, healthy: 0 }, start);
        let mut steps = Vec::new();
        for tenth in 0..=60_u64 {
            let before = capacity.granted;
            if capacity.observe(ALL(1), start + Duration::from_millis(tenth * 100)).granted > before {
                steps.push(tenth);
            }
        }
        assert_eq!(steps, (1..=10).map(|step| step * 5).collect::<Vec<_>>());
        assert_eq!(capacity.poll_timeout(), None);
    }

    #[test]
    fn how_often_it_is_observed_makes_no_difference_to_the_peak() {
        let start = Instant::now();
        let (mut often, mut once) = (Capacity::new(ALL(10), start), Capacity::new(ALL(10), start));
        often.observe(ALL(2), start);
        once.observe(ALL(2), start);
        for second in 1..=300 {
            often.observe(ALL(2), start + Duration::from_secs(second));
        }
        let end = start + Duration::from_secs(300);
        let (often, once) = (often.observe(ALL(2), end), once.observe(ALL(2), end));
        assert!((often.possible - once.possible).abs() < 1e-6, "{often:?} {once:?}");
    }

    proptest! {
        /// The bound on flapping that [`RISE_HOLD`] states.
        #[test]
        fn however_endpoints_flap_the_share_moves_within_its_bound(
            news in prop::collection::vec((0_u64..=8, 0_u64..900), 1..200)
        ) {
            let start = Instant::now();
            let mut capacity = Capacity::new(ALL(8), start);
            let (mut ms, mut before, mut risen, mut fallen) = (0, 1.0, 0.0, 0.0);
            for (healthy, pause) in news {
                ms += pause;
                let grant = capacity.observe(Weights { known: 8, healthy }, start + Duration::from_millis(ms));
                prop_assert!(grant.granted <= grant.possible);
                risen += f64::max(grant.granted - before, 0.0);
                fallen += f64::max(before - grant.granted, 0.0);
                before = grant.granted;
                let bound = RISE_STEP * (ms as f64 / RISE_HOLD.as_millis() as f64).floor();
                prop_assert!(risen <= bound + 1e-9, "{risen} after {ms} ms");
                prop_assert!(fallen <= bound + 1.0 + 1e-9, "{fallen} after {ms} ms");
            }
        }

        #[test]
        fn more_healthy_weight_never_carries_less(known in 1_u64..100, one in 0_u64..100, other in 0_u64..100) {
            let share = |healthy: u64| {
                Capacity::new(Weights { known, healthy: healthy.min(known) }, Instant::now()).granted
            };
            prop_assert!(share(one.max(other)) >= share(one.min(other)));
        }
    }
}
