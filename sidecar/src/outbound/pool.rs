//! The shared legs of one endpoint.
//!
//! What the contract asks of the pool's key holds by construction: a pool belongs to one endpoint of one
//! cluster, service and port with one set of permitted server identities, and each leg in it bears the
//! version of the client's SVID and of the trust bundles that it was dialled with. A leg of another version
//! gets no new requests; what is under way on it finishes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tombolo_core::id::GatewayId;
use tombolo_leg::credentials::Credentials;
use tombolo_leg::http::{HttpLeg, LegHealth};
use tombolo_trust::store::TrustStore;

use super::dial::LegFailure;
use super::observe::Counted;

/// What a leg's certificates were checked with: versions of the own SVID and of the trust bundles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub svid: u64,
    pub trust: u64,
}

/// A leg that was dialled for a pool.
pub struct Dialled {
    pub leg: HttpLeg,
    pub stamp: Stamp,
    pub gateway: Option<GatewayId>,
    pub credentials: Credentials,
    pub counted: Counted,
}

#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    pub requests_per_leg: usize,
    pub legs: usize,
    pub idle: Duration,
}

type DialResult = Option<Result<(), Arc<LegFailure>>>;

/// What to do to get a leg.
pub enum Acquire {
    Leg(HttpLeg),
    /// Somebody dials; look again when it says so.
    Wait(watch::Receiver<DialResult>),
    /// Nobody dials: the caller does, and reports with [`Pool::dialled`].
    Dial(Dialling),
}

/// The right to dial for a pool; others wait for its result.
pub struct Dialling {
    result: watch::Sender<DialResult>,
}

impl Dialling {
    pub fn subscribe(&self) -> watch::Receiver<DialResult> {
        self.result.subscribe()
    }
}

pub struct Pool {
    limits: Arc<PoolLimits>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    legs: Vec<Dialled>,
    /// Legs without new requests whose last ones are under way.
    retiring: Vec<Dialled>,
    dialling: Option<watch::Receiver<DialResult>>,
}

impl Pool {
    pub fn new(limits: Arc<PoolLimits>) -> Self {
        Self { limits, state: Mutex::default() }
    }

    /// A leg for one request, or how to get one.
    pub fn acquire(&self, stamp: Stamp) -> Acquire {
        let mut state = self.lock();
        state.drop_unfit(stamp);
        // Asking a leg whether it is usable takes its locks: mostly the least busy one is, and one answer is enough.
        let least = state.legs.iter().min_by_key(|dialled| dialled.leg.in_flight());
        let least = match least.filter(|dialled| dialled.leg.is_usable()) {
            Some(least) => Some(least),
            None => state.legs.iter().filter(|d| d.leg.is_usable()).min_by_key(|d| d.leg.in_flight()),
        };
        if let Some(least) = least.filter(|dialled| dialled.leg.in_flight() < self.limits.requests_per_leg) {
            return Acquire::Leg(least.leg.clone());
        }
        let dialling =
            state.dialling.as_ref().filter(|result| result.borrow().is_none() && result.has_changed().is_ok());
        if let Some(result) = dialling {
            // Busy legs are better than waiting for another one.
            return least.map_or_else(|| Acquire::Wait(result.clone()), |least| Acquire::Leg(least.leg.clone()));
        }
        if state.legs.len() >= self.limits.legs {
            // Every leg is full: HTTP/2 queues the request on the one that has least to do.
            let live = state.legs.iter().filter(|dialled| dialled.leg.health() == LegHealth::Live);
            if let Some(least) = live.min_by_key(|dialled| dialled.leg.in_flight()) {
                return Acquire::Leg(least.leg.clone());
            }
        }
        let (result, receiver) = watch::channel(None);
        state.dialling = Some(receiver);
        Acquire::Dial(Dialling { result })
    }

    /// Ends a dial: all who wait look again, or fail with it.
    pub fn dialled(&self, dialling: Dialling, result: Result<Dialled, Arc<LegFailure>>) {
        let mut state = self.lock();
        state.dialling = None;
        let result = result.map(|dialled| state.legs.push(dialled));
        drop(state);
        dialling.result.send_replace(Some(result));
    }

    /// The endpoint does not answer: no leg takes new requests, and those that wait and may leave do.
    pub fn abandon(&self) {
        let mut state = self.lock();
        state.legs.iter().chain(&state.retiring).for_each(|dialled| dialled.leg.abandon());
        state.retire(|_| true);
    }

    /// A gateway says that it does not reach the endpoint's cluster: the legs through it are suspect until they answer.
    pub fn doubt(&self, gateway: &GatewayId) {
        let state = self.lock();
        let through =
            state.legs.iter().chain(&state.retiring).filter(|dialled| dialled.gateway.as_ref() == Some(gateway));
        through.for_each(|dialled| dialled.leg.doubt());
    }

    /// Closes what idles, is dead or out of date; `is_unfit` names further reasons.
    pub fn sweep(&self, stamp: Stamp, is_unfit: impl Fn(&Dialled) -> bool) {
        let mut state = self.lock();
        state.drop_unfit(stamp);
        state.retire(|dialled| {
            let idle = dialled.leg.idle_for().is_some_and(|idle| idle >= self.limits.idle);
            idle || is_unfit(dialled)
        });
        state.retiring.retain(|dialled| dialled.leg.in_flight() > 0 && dialled.leg.health() != LegHealth::Gone);
    }

    /// Ends the legs whose server is no longer trusted, and all that is under way on them.
    pub fn check_trust(&self, trust: &TrustStore) {
        let mut state = self.lock();
        let state = &mut *state;
        for legs in [&mut state.legs, &mut state.retiring] {
            legs.retain(|dialled| {
                let refused = dialled.credentials.check(trust).err();
                if let Some(refusal) = refused {
                    tracing::info!(server = %dialled.leg.server_id(), %refusal, "leg closed: its server is no longer trusted");
                    dialled.leg.abort();
                }
                refused.is_none()
            });
        }
    }

    pub fn legs(&self) -> usize {
        self.lock().legs.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn drop_unfit(&mut self, stamp: Stamp) {
        self.retire(|dialled| dialled.stamp != stamp || dialled.leg.health() == LegHealth::Gone);
    }

    /// Moves legs to where they get no new requests.
    fn retire(&mut self, is_unfit: impl Fn(&Dialled) -> bool) {
        if !self.legs.iter().any(&is_unfit) {
            return;
        }
        let (unfit, fit): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.legs).into_iter().partition(|dialled| is_unfit(dialled));
        self.legs = fit;
        for dialled in unfit {
            dialled.leg.retire();
            if dialled.leg.in_flight() > 0 {
                self.retiring.push(dialled);
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for dialled in &self.lock().legs {
            dialled.leg.retire();
        }
    }
}
