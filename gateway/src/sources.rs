//! What one source address may ask of the ingress, where nobody is authenticated.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use tombolo_core::refusal::Refusal;

use crate::config::LimitsConfig;

/// Sources that are remembered. Above it, those that ask for nothing are forgotten; if none is, new ones are refused.
const SOURCES_MAX: usize = 16_384;

/// Bounds unfinished legs and new legs a second, by source address.
#[derive(Debug, Clone)]
pub struct SourceLimits(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    unfinished_max: u32,
    per_second: f64,
    sources: Mutex<HashMap<IpAddr, Source>>,
}

#[derive(Debug)]
struct Source {
    unfinished: u32,
    /// A token bucket that holds two seconds' worth.
    tokens: f64,
    refilled: Instant,
}

impl SourceLimits {
    pub fn new(limits: &LimitsConfig) -> Self {
        Self(Arc::new(Inner {
            unfinished_max: limits.unfinished_legs_per_source,
            per_second: limits.new_legs_per_second_per_source.into(),
            sources: Mutex::default(),
        }))
    }

    pub fn admit(&self, source: IpAddr) -> Result<Unfinished, Refusal> {
        self.admit_at(source, Instant::now())
    }

    fn admit_at(&self, address: IpAddr, now: Instant) -> Result<Unfinished, Refusal> {
        let full = self.0.per_second * 2.0;
        let mut sources = self.lock();
        if sources.len() >= SOURCES_MAX && !sources.contains_key(&address) {
            let refilled = |source: &Source| now.saturating_duration_since(source.refilled).as_secs() >= 2;
            sources.retain(|_, source| source.unfinished > 0 || !refilled(source));
            if sources.len() >= SOURCES_MAX {
                return Err(Refusal::Overloaded);
            }
        }
        let source = sources.entry(address).or_insert(Source { unfinished: 0, tokens: full, refilled: now });
        let passed = now.saturating_duration_since(source.refilled).as_secs_f64();
        source.tokens = (source.tokens + passed * self.0.per_second).min(full);
        source.refilled = now;
        if source.unfinished >= self.0.unfinished_max || source.tokens < 1.0 {
            return Err(Refusal::Overloaded);
        }
        source.tokens -= 1.0;
        source.unfinished += 1;
        Ok(Unfinished { address, limits: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Source>> {
        self.0.sources.lock().expect("nothing panics while it counts sources")
    }
}

/// A leg whose way is not open yet.
#[derive(Debug)]
pub struct Unfinished {
    address: IpAddr,
    limits: SourceLimits,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(source) = self.limits.lock().get_mut(&self.address) {
            source.unfinished = source.unfinished.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    fn limits() -> SourceLimits {
        SourceLimits::new(&LimitsConfig {
            unfinished_legs_per_source: 2,
            new_legs_per_second_per_source: 3,
            ..Default::default()
        })
    }

    #[test]
    fn unfinished_legs_are_bounded_for_each_source() {
        let (limits, now) = (limits(), Instant::now());
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let held = [limits.admit_at(one, now).unwrap(), limits.admit_at(one, now).unwrap()];
        assert_eq!(limits.admit_at(one, now).unwrap_err(), Refusal::Overloaded);
        assert!(limits.admit_at(other, now).is_ok());
        drop(held);
        assert!(limits.admit_at(one, now).is_ok());
    }

    #[test]
    fn new_legs_come_at_a_bounded_rate() {
        let (limits, now) = (limits(), Instant::now());
        let source = IpAddr::from([192, 0, 2, 1]);
        let admitted = |at| (0..20).filter(|_| limits.admit_at(source, at).is_ok()).count();
        assert_eq!(admitted(now), 6);
        assert_eq!(admitted(now + Duration::from_secs(1)), 3);
        assert_eq!(admitted(now + Duration::from_secs(60)), 6);
    }

    #[test]
    fn forgotten_sources_make_room() {
        let (limits, now) = (limits(), Instant::now());
        for number in 0..SOURCES_MAX as u32 {
            limits.admit_at(IpAddr::from(number.to_be_bytes()), now).unwrap();
        }
        let late = IpAddr::from([255, 0, 0, 1]);
        assert!(limits.admit_at(late, now).is_err());
        assert!(limits.admit_at(late, now + Duration::from_secs(3)).is_ok());
    }
}
