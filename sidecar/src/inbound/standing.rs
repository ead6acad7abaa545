//! What was admitted and goes on for long: ended when a policy that is told later denies it.
//!
//! A connection that has switched protocols (WebSocket, CONNECT) ends at once, as opaque ones do. A response without a
//! stated length (server-sent events, a gRPC stream) ends once it has gone on for [`super::STREAM_GRACE`]. Any other
//! request is short: it finishes, as it does elsewhere.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Method, Request, Uri};
use tokio::time::Instant;
use tombolo_core::policy::access::HttpAsked;
use tombolo_core::refusal::Refusal;
use tombolo_leg::accept::LegIdentity;

use super::Inbound;

/// A response that is done sooner costs no watching.
const SHORT: Duration = Duration::from_secs(1);

/// The parts of a request that policies speak of, kept beyond the request.
#[derive(Debug, Clone)]
pub(super) struct Call {
    method: Method,
    uri: Uri,
}

impl Call {
    pub fn of<B>(request: &Request<B>) -> Self {
        // A connection that switches its protocol crosses as an extended CONNECT, and was a GET (RFC 8441 section 5).
        let is_switch = request.extensions().get::<h2::ext::Protocol>().is_some();
        let method = if is_switch { Method::GET } else { request.method().clone() };
        Self { method, uri: request.uri().clone() }
    }

    pub fn asked(&self) -> HttpAsked<'_> {
        HttpAsked { method: self.method.as_str(), path: self.uri.path() }
    }
}

/// A response under way that may last.
pub struct Standing {
    inbound: Arc<Inbound>,
    leg: Arc<LegIdentity>,
    call: Call,
    began: Instant,
    grace: Duration,
    denied: Option<Pin<Box<dyn Future<Output = Refusal> + Send>>>,
}

impl Standing {
    /// What was given away to another protocol.
    pub(super) fn switched(inbound: &Arc<Inbound>, leg: &Arc<LegIdentity>, call: Call) -> Self {
        Self::new(inbound, leg, call, Duration::ZERO)
    }

    /// A body that may have no end.
    pub(super) fn streaming(inbound: &Arc<Inbound>, leg: &Arc<LegIdentity>, call: Call) -> Self {
        Self::new(inbound, leg, call, inbound.stream_grace)
    }

    fn new(inbound: &Arc<Inbound>, leg: &Arc<LegIdentity>, call: Call, grace: Duration) -> Self {
        Self { inbound: inbound.clone(), leg: leg.clone(), call, began: Instant::now(), grace, denied: None }
    }

    /// Ready when it must end. To be asked after the body, which is `idle` when it has nothing to say.
    pub(super) fn poll_denied(&mut self, cx: &mut Context<'_>, idle: bool) -> Poll<Refusal> {
        if self.denied.is_none() && !idle && self.began.elapsed() < SHORT {
            return Poll::Pending;
        }
        let denied = self.denied.get_or_insert_with(|| {
            let (inbound, leg, call) = (self.inbound.clone(), self.leg.clone(), self.call.clone());
            let not_before = self.began + self.grace;
            Box::pin(async move {
                let refusal = inbound.denied_later(&leg, Some(call.asked()), not_before).await;
                inbound.observed.refused(refusal);
                refusal
            })
        });
        denied.as_mut().poll(cx)
    }
}
