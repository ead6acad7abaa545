//! Opaque legs that stand before an application connection needs them.
//!
//! Each opaque connection takes a leg of its own, whose handshake crosses every gateway and back. So an endpoint
//! in use keeps a few that were dialled ahead; its application notices nothing of one until OPEN is sent.
//! There are as many as the last second took, at least one and at most `warmLegs` of the service's TrafficPolicy or `limits.warmLegs`; none for an endpoint
//! that has had no connection for 15 s. A leg dialled with an older SVID or other trust bundles is
//! closed, as is one that ends at a gateway that drains, or that has lost the way.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::{Duration, Instant};

use futures::task::noop_waker_ref;
use tokio::io::ReadBuf;
use tombolo_core::id::GatewayId;
use tombolo_leg::Alpn;
use tombolo_leg::dial::Leg;

use super::dial::{LegDialer, WithGateway};
use super::pool::Stamp;
use super::target::Target;

/// How long legs are kept warm after the last connection.
const WARM_FOR: Duration = Duration::from_secs(15);

/// The warm legs of one endpoint.
pub struct WarmLegs {
    max: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    legs: Vec<Warm>,
    /// How many there should be.
    wanted: usize,
    /// Connections since the last sweep, and when the last one came.
    taken: usize,
    used: Option<Instant>,
    filling: bool,
}

struct Warm {
    leg: WithGateway<Leg>,
    stamp: Stamp,
}

impl Warm {
    fn gateway(&self) -> Option<&GatewayId> {
        self.leg.gateway.as_ref().map(|gateway| &gateway.id)
    }
}

impl WarmLegs {
    pub fn new(max: usize) -> Self {
        Self { max: AtomicUsize::new(max), state: Mutex::default() }
    }

    /// There are never more than `max`; what stands above that is closed with the next sweep.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// A connection needs a leg.
    pub fn handle_use(&self, now: Instant) {
        let mut state = self.lock();
        state.taken += 1;
        state.used = Some(now);
        state.wanted = state.wanted.max(state.taken).min(self.max());
    }

    /// A leg that stands, if there is one. Its far end may have gone all the same, which shows when OPEN is
    /// not answered.
    pub fn take(&self, stamp: Stamp) -> Option<WithGateway<Leg>> {
        let mut state = self.lock();
        while let Some(warm) = state.legs.pop() {
            if warm.stamp == stamp && is_quiet(&warm.leg.leg) {
                return Some(warm.leg);
            }
        }
        None
    }

    /// Closes what is out of date or no longer needed; `is_leaving` names gateways that drain.
    pub fn sweep(&self, stamp: Stamp, now: Instant, is_leaving: impl Fn(&GatewayId) -> bool) {
        let mut state = self.lock();
        let in_use = state.used.is_some_and(|used| now.saturating_duration_since(used) < WARM_FOR);
        let wanted = if in_use { state.taken.max(1).min(self.max()) } else { 0 };
        (state.wanted, state.taken) = (wanted, 0);
        state.legs.truncate(wanted);
        state
            .legs
            .retain(|warm| warm.stamp == stamp && !warm.gateway().is_some_and(&is_leaving) && is_quiet(&warm.leg.leg));
    }

    /// Closes at once what was dialled with anything else than this.
    pub fn keep(&self, stamp: Stamp) {
        self.lock().legs.retain(|warm| warm.stamp == stamp);
    }

    /// Closes at once what crosses a gateway that says that it does not reach the cluster any more.
    pub fn leave(&self, gateway: &GatewayId) {
        self.lock().legs.retain(|warm| warm.gateway() != Some(gateway));
    }

    pub fn standing(&self) -> usize {
        self.lock().legs.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to dial for an endpoint, held by one at a time.
struct Filling(Arc<Target>);

impl Filling {
    /// `None` when enough legs stand, or somebody dials already.
    fn begin(target: &Arc<Target>) -> Option<Self> {
        let mut state = target.warm.lock();
        let begins = !state.filling && state.legs.len() < state.wanted;
        state.filling |= begins;
        begins.then(|| Self(target.clone()))
    }

    fn is_short(&self) -> bool {
        let state = self.0.warm.lock();
        state.legs.len() < state.wanted
    }

    fn add(&self, warm: Warm) {
        let mut state = self.0.warm.lock();
        if state.legs.len() < state.wanted {
            state.legs.push(warm);
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.0.warm.lock().filling = false;
    }
}

/// Dials what `target` is short of, beside everything else and one after the other.
pub fn replenish(dialer: &Arc<LegDialer>, target: &Arc<Target>) {
    let Some(filling) = Filling::begin(target) else { return };
    let dialer = dialer.clone();
    tokio::spawn(async move {
        while filling.is_short() {
            // Taken before dialling: a leg is never newer than its stamp says.
            let stamp = dialer.stamp();
            // A failure is left for the next connection, which dials itself and tells why.
            let Ok(leg) = dialer.dial(&filling.0, Alpn::Tcp, None).await else { return };
            filling.add(Warm { leg, stamp });
        }
    });
}

/// Nothing comes out of a leg before OPEN is answered, so that anything to read is its end.
fn is_quiet(leg: &Leg) -> bool {
    let mut octet = [0];
    let mut task = Context::from_waker(noop_waker_ref());
    leg.stream.get_ref().0.poll_peek(&mut task, &mut ReadBuf::new(&mut octet)).is_pending()
}
