//! How busy and how slow an endpoint is, as far as picking goes.

use std::time::Duration;

/// What one endpoint has to do at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Requests and connections under way.
    pub in_flight: u32,
    /// The response time to expect, in microseconds; `None` before the first response.
    pub latency_us: Option<f32>,
}

impl Load {
    /// The time that one more request would take here, were each unit of weight a server of its own. Where the latency
    /// of one of the two compared is not known, both are judged by what is under way: an endpoint without a
    /// sample then gets as many requests at once as its siblings have, and no more.
    pub(super) fn is_less_than(self, weight: f32, other: Load, other_weight: f32) -> bool {
        let (own, theirs) = match (self.latency_us, other.latency_us) {
            (Some(own), Some(theirs)) => (own, theirs),
            _ => (1.0, 1.0),
        };
        let cost = |load: Load, latency: f32| (load.in_flight as f32 + 1.0) * latency;
        cost(self, own) * other_weight < cost(other, theirs) * weight
    }
}

/// Peak-sensitive moving average of response times: it jumps up with a slow response and comes down over
/// [`PeakEwma::DECAY`]. Without responses it fades, so that an endpoint that was slow once is asked again.
///
/// Eight octets, so that a shell can keep it in one atomic number ([`PeakEwma::to_bits`]).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PeakEwma {
    /// Microseconds; zero stands for no sample.
    latency_us: f32,
    /// Milliseconds since the shell's base, modulo 2^32.
    at_ms: u32,
}

impl PeakEwma {
    /// Time constant: what is left of a peak is 37 % after this time, 5 % after three times this.
    pub const DECAY: Duration = Duration::from_secs(5);

    /// Takes in one response time. `now_ms` counts from any moment that stays the same.
    #[must_use]
    pub fn observe(self, sample: Duration, now_ms: u64) -> Self {
        let sample_us = (sample.as_micros() as f32).max(1.0);
        let at_ms = now_ms as u32;
        let before = self.latency_us;
        let latency_us = if sample_us >= before {
            sample_us
        } else {
            let kept = self.kept(at_ms);
            before * kept + sample_us * (1.0 - kept)
        };
        Self { latency_us, at_ms }
    }

    /// The latency to expect, in microseconds.
    pub fn estimate_us(self, now_ms: u64) -> Option<f32> {
        (self.latency_us > 0.0).then(|| (self.latency_us * self.kept(now_ms as u32)).max(1.0))
    }

    pub fn to_bits(self) -> u64 {
        u64::from(self.latency_us.to_bits()) << 32 | u64::from(self.at_ms)
    }

    pub fn from_bits(bits: u64) -> Self {
        Self { latency_us: f32::from_bits((bits >> 32) as u32), at_ms: bits as u32 }
    }

    fn kept(self, now_ms: u32) -> f32 {
        let idle_ms = now_ms.wrapping_sub(self.at_ms);
        // Two threads may take their times in one order and report in the other.
        if idle_ms > u32::MAX / 2 { 1.0 } else { (-(idle_ms as f32) / Self::DECAY.as_millis() as f32).exp() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_peak_is_believed_at_once_and_fades() {
        let mut ewma = PeakEwma::default();
        assert_eq!(ewma.estimate_us(0), None);
        ewma = ewma.observe(MS(2), 0);
        assert_eq!(ewma.estimate_us(0), Some(2_000.0));
        ewma = ewma.observe(MS(100), 10);
        assert_eq!(ewma.estimate_us(10), Some(100_000.0));
        for step in 1..=500 {
            ewma = ewma.observe(MS(2), 10 + step * 10);
        }
        let after = ewma.estimate_us(5_010).unwrap_or_default();
        assert!((37_000.0..40_000.0).contains(&after), "{after}");
        let idle = ewma.estimate_us(10_010).unwrap_or_default();
        assert!((idle / after - 0.368).abs() < 0.01, "{idle}");
    }

    #[test]
    fn less_load_wins_and_an_unknown_latency_is_no_advantage() {
        let load = |in_flight, latency_us| Load { in_flight, latency_us };
        for (one, other, want) in [
            (load(1, Some(10.0)), load(2, Some(10.0)), true),
            (load(5, Some(10.0)), load(2, Some(100.0)), true),
            (load(0, None), load(0, Some(9.0)), false),
            (load(0, None), load(1, Some(9.0)), true),
            (load(2, None), load(1, Some(9_000.0)), false),
        ] {
            assert_eq!(one.is_less_than(1.0, other, 1.0), want, "{one:?} {other:?}");
        }
        assert!(load(5, None).is_less_than(3.0, load(2, None), 1.0));
    }

    proptest! {
        #[test]
        fn it_stays_within_its_samples_and_survives_being_packed(
            samples in prop::collection::vec((1_u64..10_000_000, 0_u64..5_000), 1..200),
            from in any::<u32>(),
        ) {
            let mut ewma = PeakEwma::default();
            let mut now_ms = u64::from(from);
            let (mut least, mut most) = (f32::MAX, 0.0_f32);
            for (micros, pause) in samples {
                now_ms += pause;
                ewma = PeakEwma::from_bits(ewma.observe(Duration::from_micros(micros), now_ms).to_bits());
                (least, most) = (least.min(micros as f32), most.max(micros as f32));
                let estimate = ewma.estimate_us(now_ms).unwrap_or_default();
                prop_assert!((least * 0.999..=most * 1.001).contains(&estimate), "{estimate} {least} {most}");
            }
        }
    }
}
