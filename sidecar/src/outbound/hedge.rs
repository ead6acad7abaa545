//! A second try beside the first, where a policy asks for it and the first is slow to answer: whichever answers first
//! counts, and the other one is given up.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tombolo_core::routing::{EndpointKey, Pick, PickReason};
use tombolo_core::trace::TraceParent;

use super::Outbound;
use super::http::{Failure, Once, Outgoing};
use super::refuse::Refused;
use super::route::Route;
use super::target::{Flight, Target};

/// One try of a request: where it went, and the load that it is there.
pub struct Attempt {
    pub target: Arc<Target>,
    pub pick: Pick,
    pub flight: Flight,
}

impl Attempt {
    pub fn begin(route: &Route, target: Arc<Target>, pick: Pick) -> Result<Self, Refused> {
        let flight = Flight::begin(target.clone(), route.breaker.requests.enter("requests")?);
        Ok(Self { target, pick, flight })
    }

    /// Another endpoint than `first`, if there is one that is worth it, and the budget pays for it.
    fn beside(route: &Route, tried: &[EndpointKey], first: &Target, session: Option<u64>) -> Option<Self> {
        let now = Instant::now();
        let met = [tried, std::slice::from_ref(&first.key)].concat();
        let (target, pick) = route.pick(&met, session, now)?;
        let worth_it = target.key != first.key && !matches!(pick.reason, PickReason::Again | PickReason::LastResort);
        if !worth_it || !route.may_retry(now) {
            return None;
        }
        Self::begin(route, target, pick).ok()
    }
}

impl Outbound {
    /// One try, and after `after` without an answer another one beside it. `attempt` becomes the one that answered.
    pub(super) async fn hedged(
        self: &Arc<Self>,
        route: &Arc<Route>,
        (attempt, after): (&mut Attempt, Duration),
        tried: &[EndpointKey],
        outgoing: &Outgoing<'_>,
        trace: Option<TraceParent>,
        may_leave: impl Fn() -> bool,
    ) -> Result<Once, Failure> {
        let target = attempt.target.clone();
        let mut first = pin!(self.try_once(&target, outgoing, trace, &may_leave));
        if let Ok(result) = tokio::time::timeout(after, &mut first).await {
            return result;
        }
        let Some(other) = Attempt::beside(route, tried, &target, outgoing.session) else { return first.await };
        self.observed.hedges.inc();
        let beside = other.target.clone();
        let mut second = pin!(self.try_once(&beside, outgoing, trace, &may_leave));
        let charge = |target: &Arc<Target>, failure: &Failure| {
            if let Some(outcome) = failure.outcome {
                route.handle_outcome(target, outcome, Instant::now());
            }
        };
        tokio::select! {
            result = &mut first => match result {
                Ok(answered) => Ok(answered),
                Err(failure) => {
                    charge(&target, &failure);
                    *attempt = other;
                    second.await
                }
            },
            result = &mut second => match result {
                Ok(answered) => {
                    *attempt = other;
                    Ok(answered)
                }
                Err(failure) => {
                    charge(&beside, &failure);
                    first.await
                }
            },
        }
    }
}
