//! Copies of requests for another service (`RequestMirror` of the Gateway API), whose answers are thrown away.
//!
//! A request without a body is copied at once; one with a body when its answer begins, if the whole body was read by then and
//! is still kept (64 KiB). The copies that are under way at once are bounded; what is above that is not sent. No copy is
//! tried twice, and none delays anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, header, request};
use http_body_util::{BodyExt as _, Full};
use tombolo_core::model::AppProtocol;
use tombolo_core::policy::route::Backend;
use tombolo_core::policy::table::Taken;
use tombolo_leg::http::headers;

use super::body::BodySource;
use super::http::{no_endpoint, outcome_of};
use super::policy;
use super::refuse::Refused;
use super::target::Flight;
use super::{Outbound, http::send_failed};

/// Copies under way at once, in one sidecar.
pub const COPIES_MAX: usize = 256;
/// From sending a copy to the end of its answer.
const COPY_TIME_MAX: Duration = Duration::from_secs(30);

/// The copies of one request that are to be sent; mostly none.
#[derive(Default)]
pub struct Copies(Vec<Copy>);

struct Copy {
    backend: Backend,
    port: u16,
    head: request::Parts,
    speaks_http2: bool,
}

impl Copies {
    /// `head` is the request as the rule has changed it; `port` the one that it was sent to.
    pub fn new(taken: &Taken<'_>, head: &request::Parts, port: u16, speaks_http2: bool) -> Self {
        let drawn = taken.rule.filters.mirrors.iter().filter(|mirror| mirror.fraction.takes(rand::random()));
        let copy = |backend: &Backend| {
            let mut head = head.clone();
            head.headers.remove(header::EXPECT);
            policy::change_for(&mut head, backend);
            Copy { port: backend.port.unwrap_or(port), backend: backend.clone(), head, speaks_http2 }
        };
        Self(drawn.map(|mirror| copy(&mirror.backend)).collect())
    }

    /// Sends those of a request without a body; the others wait until it was read.
    pub fn send_bodiless(self, outbound: &Arc<Outbound>, body: &BodySource) -> Self {
        if !body.is_empty() {
            return self;
        }
        self.send(outbound, Some(Bytes::new()));
        Self::default()
    }

    /// Sends each with this body; `None` when not all of it is at hand.
    pub fn send(self, outbound: &Arc<Outbound>, body: Option<Bytes>) {
        for copy in self.0 {
            let (Some(body), Ok(room)) = (body.clone(), outbound.copies.clone().try_acquire_owned()) else {
                outbound.observed.mirrored("dropped");
                continue;
            };
            let outbound = outbound.clone();
            tokio::spawn(async move {
                let _room = room;
                let carried = tokio::time::timeout(COPY_TIME_MAX, copy.carry(&outbound, body)).await;
                outbound.observed.mirrored(match carried {
                    Ok(Ok(())) => "answered",
                    Ok(Err(refused)) => {
                        tracing::debug!(%refused, "the copy of a request was not answered");
                        "failed"
                    }
                    Err(_) => "failed",
                });
            });
        }
    }
}

impl Copy {
    async fn carry(self, outbound: &Arc<Outbound>, body: Bytes) -> Result<(), Refused> {
        let Self { backend, port, mut head, speaks_http2 } = self;
        let route = outbound.services.route_in(&backend.service, port, backend.cluster.as_ref()).await?;
        if speaks_http2 && route.app() == AppProtocol::Detect {
            headers::say_http2(&mut head.headers);
        }
        route.begin(Instant::now());
        let (target, _) = route.pick(&[], None, Instant::now()).ok_or_else(|| no_endpoint(&route))?;
        let _flight = Flight::begin(target.clone(), route.breaker.requests.enter("requests")?);
        let leg = outbound.dialer.shared(&target, None).await.map_err(|failure| failure.refused)?;
        let sent = Instant::now();
        match leg.send(Request::from_parts(head, Full::new(body))).await {
            Ok(response) => {
                let outcome = outcome_of(response.status(), sent.elapsed());
                route.handle_outcome(&target, outcome, Instant::now());
                let mut answer = response.into_body();
                // Read to its end: whoever answers is not to see a caller that goes away.
                while let Some(frame) = answer.frame().await {
                    frame.map_err(|error| {
                        Refused::new(tombolo_core::refusal::Refusal::ConnectionLost, error.to_string())
                    })?;
                }
                Ok(())
            }
            Err(error) => {
                let failure = send_failed(error.kind, &target);
                if let Some(outcome) = failure.outcome {
                    route.handle_outcome(&target, outcome, Instant::now());
                }
                Err(failure.refused)
            }
        }
    }
}
