//! How much of a service's traffic one cluster may carry: its healthy weight against the peak that is
//! remembered of it, falling at once and rising only after a while.

use std::time::{Duration, Instant};

/// A cluster carries all the traffic while at least 1/1.4 (71 %) of its capacity is healthy.
pub const OVER_PROVISIONING: f64 = 1.4;

/// Time constant of the peak: what exceeds today's weight falls to 5 % of itself in ten minutes.
const PEAK_DECAY: Duration = Duration::from_secs(200);

/// A share rises only after the cluster was healthy enough for this long. Traffic therefore comes back to
/// a cluster at most once in this time, which is the bound on flapping.
pub const RISE_HOLD: Duration = Duration::from_secs(3);

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
    rise: Option<Rise>,
}

/// A share that waits to rise: since when, and the least that was possible since then.
#[derive(Debug, Clone, Copy)]
struct Rise {
    since: Instant,
    level: f64,
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
        Self { peak, peak_at: now, granted: possible(weights, peak), rise: None }
    }

    /// Takes in the weights of this moment.
    pub fn observe(&mut self, weights: Weights, now: Instant) -> Grant {
        self.peak = self.peak_at(weights.known as f64, now);
        self.peak_at = now;
        let possible = possible(weights, self.peak);
        if possible <= self.granted {
            (self.granted, self.rise) = (possible, None);
            return Grant { possible, granted: possible };
        }
        let rise = self.rise.get_or_insert(Rise { since: now, level: possible });
        rise.level = rise.level.min(possible);
        if now.saturating_duration_since(rise.since) >= RISE_HOLD {
            self.granted = rise.level;
            self.rise = (possible > self.granted).then_some(Rise { since: now, level: possible });
        }
        Grant { possible, granted: self.granted }
    }

    /// When observing again, without news, would change the grant.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.rise.map(|rise| rise.since + RISE_HOLD)
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

    const ALL: fn(u64) -> Weights = |weight| Weights { known: weight, healthy: weight };

    #[test]
    fn ten_then_none_then_one_endpoint_is_a_tenth() {
        let start = Instant::now();
        let mut capacity = Capacity::new(ALL(10), start);
        assert_eq!(capacity.observe(ALL(0), start + Duration::from_secs(1)).granted, 0.0);
        let back = capacity.observe(ALL(1), start + Duration::from_secs(2));
        assert_eq!(back.granted, 0.0);
        let back = capacity.observe(ALL(1), start + Duration::from_secs(5));
        assert!((0.10..0.15).contains(&back.granted), "{back:?}");
        let later = capacity.observe(ALL(1), start + Duration::from_secs(1800));
        assert_eq!(later.possible, 1.0);
    }

    #[test]
    fn a_share_falls_at_once_and_rises_after_the_hold() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut capacity = Capacity::new(Weights { known: 4, healthy: 4 }, start);
        let half = Weights { known: 4, healthy: 2 };
        assert!((capacity.observe(half, at(100)).granted - 0.7).abs() < 1e-9);
        assert!((capacity.observe(ALL(4), at(200)).granted - 0.7).abs() < 1e-9);
        assert_eq!(capacity.poll_timeout(), Some(at(3200)));
        // A dip during the wait lowers the level that is reached at its end.
        let third = Weights { known: 4, healthy: 3 };
        capacity.observe(third, at(1000));
        assert_eq!(capacity.observe(ALL(4), at(3200)).granted, 1.0);
        assert_eq!(capacity.poll_timeout(), None);
    }

    #[test]
    fn flapping_endpoints_do_not_flap_the_share() {
        let start = Instant::now();
        let mut capacity = Capacity::new(ALL(1), start);
        let mut rises = 0;
        let mut before = 1.0;
        for step in 1..=120_u64 {
            let healthy = u64::from(step % 2 == 0);
            let grant = capacity.observe(Weights { known: 1, healthy }, start + Duration::from_millis(step * 500));
            rises += u32::from(grant.granted > before);
            before = grant.granted;
        }
        assert_eq!(rises, 0, "a share that never holds for {RISE_HOLD:?} never comes back");
    }

    #[test]
    fn how_often_it_is_observed_makes_no_difference() {
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
}
