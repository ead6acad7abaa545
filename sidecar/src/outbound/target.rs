//! One endpoint of one port of one service: the legs to it, what is under way, and how it has answered.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tombolo_core::id::{ServiceName, SpiffeId};
use tombolo_core::model::Origin;
use tombolo_core::outlier::Outlier;
use tombolo_core::routing::{EndpointKey, Load, PeakEwma};

use super::breaker::{Bounded, Entered};
use super::observe::TargetCounters;
use super::pool::Pool;
use super::route::Surroundings;
use super::warm::WarmLegs;

pub struct Target {
    pub key: EndpointKey,
    common: Arc<Common>,
    pub origin: Origin,
    pub server_ids: Arc<BTreeSet<SpiffeId>>,
    /// Where a local endpoint's sidecar accepts inner legs.
    pub address: Option<Box<str>>,
    pub pool: Pool,
    pub warm: WarmLegs,
    pub counters: Arc<TargetCounters>,
    ready: AtomicBool,
    /// Requests and connections under way.
    in_flight: AtomicU32,
    /// Requests whose response has not begun, and since when there is one.
    waiting: AtomicU32,
    waiting_since_ms: AtomicU64,
    /// When it became fit for requests, if it was not so from the beginning; 0 for then.
    since_ms: AtomicU64,
    /// A [`PeakEwma`] in its bits.
    latency: AtomicU64,
    outlier: Mutex<Outlier>,
}

/// What the endpoints of one port of one service have in common.
pub struct Common {
    pub service: ServiceName,
    pub port: u16,
    /// From which times are counted in this process.
    pub base: Instant,
    /// Requests that wait for a leg, to any endpoint.
    pub pending: Arc<Bounded>,
}

/// What a target is known by, and where it is reached.
pub struct Place {
    pub key: EndpointKey,
    pub origin: Origin,
    pub server_ids: Arc<BTreeSet<SpiffeId>>,
    pub address: Option<Box<str>>,
}

impl Target {
    pub fn new(around: &Surroundings, common: &Arc<Common>, place: Place, ready: bool, since: Option<Instant>) -> Self {
        let Place { key, origin, server_ids, address } = place;
        Self {
            counters: around.observed.target(&common.service, &key.cluster),
            key,
            origin,
            server_ids,
            address,
            pool: Pool::new(around.pool.clone()),
            warm: WarmLegs::new(around.warm_legs),
            ready: AtomicBool::new(ready),
            in_flight: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            waiting_since_ms: AtomicU64::new(0),
            since_ms: AtomicU64::new(since.map_or(0, |since| ms_since(common.base, since))),
            latency: AtomicU64::new(PeakEwma::default().to_bits()),
            common: common.clone(),
            outlier: Mutex::new(Outlier::new(around.outlier.clone())),
        }
    }

    pub fn service(&self) -> &ServiceName {
        &self.common.service
    }

    pub fn port(&self) -> u16 {
        self.common.port
    }

    /// Requests that wait for a leg, to any endpoint of the service.
    pub fn pending(&self) -> &Arc<Bounded> {
        &self.common.pending
    }

    /// Whether it is the same endpoint at the same place.
    pub fn is_at(&self, place: &Place) -> bool {
        self.key == place.key
            && self.address == place.address
            && self.server_ids == place.server_ids
            && self.origin == place.origin
    }

    /// Requests and connections under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// What it has to do; `now_ms` as `ms_since` counts.
    pub fn load_at(&self, now_ms: u64) -> Load {
        Load { in_flight: self.in_flight(), latency_us: self.latency().estimate_us(now_ms) }
    }

    /// The response time to expect, if there has been one.
    pub fn expected_latency(&self, now: Instant) -> Option<Duration> {
        let micros = self.latency().estimate_us(ms_since(self.common.base, now))?;
        Some(Duration::from_micros(micros as u64))
    }

    /// Takes in a response time. Of two at once one may be lost, which an average can bear.
    pub fn sample(&self, after: Duration, now: Instant) {
        let latency = self.latency().observe(after, ms_since(self.common.base, now));
        self.latency.store(latency.to_bits(), Ordering::Relaxed);
    }

    fn latency(&self) -> PeakEwma {
        PeakEwma::from_bits(self.latency.load(Ordering::Relaxed))
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    pub fn is_ejected(&self) -> bool {
        self.outlier().is_ejected()
    }

    pub fn outlier(&self) -> MutexGuard<'_, Outlier> {
        lock(&self.outlier)
    }

    /// Takes in what its own side says of it.
    pub fn becomes_ready(&self, ready: bool, now: Instant) {
        if !self.ready.swap(ready, Ordering::Relaxed) && ready {
            self.begins(now);
            self.outlier().handle_ready_again(now);
        }
    }

    /// Its slow start begins.
    pub fn begins(&self, now: Instant) {
        self.since_ms.store(ms_since(self.common.base, now).max(1), Ordering::Relaxed);
    }

    /// When it became fit for requests, if it was not so from the beginning.
    pub fn since(&self) -> Option<Instant> {
        let since_ms = self.since_ms.load(Ordering::Relaxed);
        (since_ms != 0).then(|| self.common.base + Duration::from_millis(since_ms))
    }

    /// Whether requests were ever sent to it, and not only bytes.
    pub fn carries_requests(&self) -> bool {
        self.waiting_since_ms.load(Ordering::Relaxed) != 0
    }

    /// How many requests wait for their response to begin, and since when some do.
    pub fn waiting(&self) -> Option<(u32, Instant)> {
        let count = self.waiting.load(Ordering::Relaxed);
        let since = self.common.base + Duration::from_millis(self.waiting_since_ms.load(Ordering::Relaxed));
        (count > 0).then_some((count, since))
    }
}

/// A try under way at a target: counted as load until it is dropped.
pub struct Flight {
    pub target: Arc<Target>,
    _entered: Entered,
}

impl Flight {
    pub fn begin(target: Arc<Target>, entered: Entered) -> Self {
        target.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { target, _entered: entered }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.target.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request that waits for its response's head, which is what a hang shows in.
pub struct Waiting<'a> {
    target: &'a Target,
}

impl<'a> Waiting<'a> {
    pub fn begin(target: &'a Target, now: Instant) -> Self {
        if target.waiting.fetch_add(1, Ordering::Relaxed) == 0 {
            target.waiting_since_ms.store(ms_since(target.common.base, now).max(1), Ordering::Relaxed);
        }
        Self { target }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.target.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn ms_since(base: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(base).as_millis()).unwrap_or(u64::MAX)
}
