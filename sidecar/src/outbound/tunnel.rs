//! Opaque bytes: CONNECT, and the listeners of ports that are not HTTP. One connection takes one leg; the
//! endpoint is chosen, and another one tried, before the first byte of the application is read.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tombolo_core::outlier::Outcome;
use tombolo_core::refusal::Refusal;
use tombolo_core::retry::{self, BodyState, Progress, Verdict};
use tombolo_core::routing::{EndpointKey, PickReason};
use tombolo_core::trace::TraceParent;
use tombolo_leg::Alpn;
use tombolo_leg::credentials::Credentials;
use tombolo_leg::dial::Leg;
use tombolo_leg::opaque::{self, CopyEnd, Open, OpenError};
use tombolo_runtime::telemetry::{Kind, Span};

use super::body::ResponseBody;
use super::crossing::Crossing;
use super::dial::{Blame, WithGateway, way_lost};
use super::http::{Caller, Failure, no_endpoint, not_sent, remember};
use super::observe::Counted;
use super::refuse::Refused;
use super::route::Route;
use super::target::{Flight, Target};
use super::{Outbound, explain, warm};

/// A leg whose far application has accepted.
pub struct Opened {
    leg: Leg,
    crossing: Option<Crossing>,
    flight: Flight,
}

/// Why a connection is ended from here.
enum Ended {
    Untrusted(Refusal),
    GatewaySilent,
    Stopped,
}

/// Answers CONNECT: 200 only when the far application has accepted.
pub async fn connect(
    outbound: &Arc<Outbound>,
    mut request: Request<Incoming>,
    route: &Arc<Route>,
    caller: &Caller,
    mut span: Span,
) -> Result<Response<ResponseBody>, Refused> {
    let opened = open(outbound, route, caller, span.context()).await.inspect_err(|refused| span.error(refused))?;
    describe(&mut span, &opened);
    let on_upgrade = hyper::upgrade::on(&mut request);
    let outbound = outbound.clone();
    let work = outbound.drain.track();
    tokio::spawn(async move {
        let _held = (work, span);
        let Ok(upgraded) = on_upgrade.await else { return };
        match upgraded.downcast::<TokioIo<TcpStream>>() {
            Ok(parts) => carry(&outbound, opened, parts.io.into_inner(), &parts.read_buf).await,
            // A stream of an HTTP/2 connection: its end is a close, whatever happened.
            Err(upgraded) => carry_stream(&outbound, opened, TokioIo::new(upgraded)).await,
        }
    });
    Ok(Response::new(ResponseBody::Own(Full::default())))
}

/// Carries a connection that came in on a listener of its own.
pub async fn forward(outbound: &Arc<Outbound>, connection: TcpStream, route: &Arc<Route>, caller: &Caller) {
    route.begin(Instant::now());
    let mut span = outbound.tracer.span(Kind::Client, "connection", None);
    if span.is_recording() {
        span.attr("tombolo.service", &route.service);
        span.attr_int("server.port", route.port.into());
    }
    match open(outbound, route, caller, span.context()).await {
        Ok(opened) => {
            describe(&mut span, &opened);
            carry(outbound, opened, connection, &Bytes::new()).await;
        }
        Err(refused) => {
            span.error(&refused);
            refuse(outbound, connection, caller, &refused);
        }
    }
}

/// Opaque bytes have no place for an answer: a reset tells the application that this is no orderly end.
pub fn refuse(outbound: &Outbound, connection: TcpStream, caller: &Caller, refused: &Refused) {
    outbound.observed.refused(refused.refusal);
    tracing::info!(caller = %caller.address, refusal = refused.refusal.code(), detail = %refused.detail, "connection refused");
    opaque::reset(connection);
}

fn describe(span: &mut Span, opened: &Opened) {
    if span.is_recording() {
        explain::describe(span, &opened.flight.target, &opened.leg.crossing, &opened.leg.server_id);
    }
}

/// Opens a leg, trying other endpoints where one refuses. Nothing of the application is at stake yet, so
/// every failure is safe to repeat.
pub async fn open(
    outbound: &Arc<Outbound>,
    route: &Arc<Route>,
    caller: &Caller,
    trace: Option<TraceParent>,
) -> Result<Opened, Refused> {
    let began = Instant::now();
    let session = route.session(caller.address.ip());
    let mut tried: Vec<EndpointKey> = Vec::new();
    let mut number = 1;
    loop {
        outbound.deadline(number, began, Instant::now())?;
        let (target, pick) = route.pick(&tried, session, Instant::now()).ok_or_else(|| no_endpoint(route))?;
        if number > 1 && matches!(pick.reason, PickReason::Again | PickReason::LastResort) {
            tokio::time::sleep(super::http::PAUSE * (1 << (number - 2).min(6))).await;
        }
        let flight = Flight::begin(target.clone(), route.breaker.connections.enter("connections")?);
        let tried_at = Instant::now();
        let failure = match open_once(outbound, &target, caller, trace).await {
            Ok(WithGateway { leg, gateway }) => {
                route.handle_outcome(&target, Outcome::Answered { after: tried_at.elapsed() }, Instant::now());
                if tried.first().is_some_and(|first| first.cluster != target.key.cluster) {
                    outbound.observed.failovers.inc();
                }
                let crossing = gateway.map(|gateway| Crossing::begin(&outbound.dialer, &gateway, &target));
                return Ok(Opened { leg, crossing, flight });
            }
            Err(failure) => failure,
        };
        if let Some(outcome) = failure.outcome {
            route.handle_outcome(&target, outcome, Instant::now());
        }
        tracing::debug!(service = %route.service, target = ?target.key, refused = %failure.refused, "opening failed");
        let verdict = retry::judge(failure.progress, true, BodyState::Replayable);
        number += 1;
        if number > outbound.schedule.tries || matches!(verdict, Verdict::No(_)) {
            return Err(failure.refused);
        }
        outbound.observed.retried(failure.progress);
        remember(route, &mut tried, &target, failure.blame);
    }
}

/// One endpoint: over legs that stand already, as long as they turn out to be gone, then over a new one.
async fn open_once(
    outbound: &Arc<Outbound>,
    target: &Arc<Target>,
    caller: &Caller,
    trace: Option<TraceParent>,
) -> Result<WithGateway<Leg>, Failure> {
    let message = Open { port: target.port(), client_address: Some(caller.address), trace, tracestate: None };
    target.warm.handle_use(Instant::now());
    while let Some(leg) = target.warm.take(outbound.dialer.stamp()) {
        match open_leg(outbound, target, leg, &message).await? {
            Ok(leg) => {
                warm::replenish(&outbound.dialer, target);
                return Ok(leg);
            }
            Err(error) if error.refusal == Refusal::ConnectionLost && !error.refused => {}
            Err(error) => return Err(open_failed(target, error)),
        }
    }
    let leg = outbound.dialer.dial(target, Alpn::Tcp, trace).await.map_err(not_sent)?;
    let leg = open_leg(outbound, target, leg, &message).await?.map_err(|error| open_failed(target, error))?;
    warm::replenish(&outbound.dialer, target);
    Ok(leg)
}

/// What the far sidecar says to OPEN; a failure when nothing can be heard of it any more.
async fn open_leg(
    outbound: &Outbound,
    target: &Target,
    mut leg: WithGateway<Leg>,
    message: &Open,
) -> Result<Result<WithGateway<Leg>, OpenError>, Failure> {
    let answer = tokio::time::timeout(outbound.connect_timeout, opaque::open(&mut leg.leg.stream, message));
    let answer = tokio::select! {
        answer = answer => answer,
        () = outbound.gateways.lost(&target.key.cluster) => return Err(not_sent(way_lost(&target.key.cluster))),
    };
    Ok(match answer {
        Ok(answer) => answer.map(|()| leg),
        Err(_) => Err(OpenError {
            refusal: Refusal::Timeout,
            detail: "the far sidecar did not answer in time".to_owned(),
            refused: false,
        }),
    })
}

fn open_failed(target: &Target, OpenError { refusal, detail, .. }: OpenError) -> Failure {
    let detail = format!("endpoint {} in {}: {detail}", target.key.endpoint, target.key.cluster);
    let outcome = match refusal {
        // It is this caller that is not wanted; the endpoint is well.
        Refusal::IdentityDenied | Refusal::NotExported | Refusal::Revoked => None,
        _ => Some(Outcome::Refused),
    };
    let refused = Refused::new(refusal, detail);
    Failure { progress: Progress::NotSent, refused, outcome, blame: Blame::Endpoint, paid: false }
}

/// Copies until both sides are done; a reset of one becomes a reset of the other.
async fn carry(outbound: &Outbound, opened: Opened, mut connection: TcpStream, early: &Bytes) {
    let Opened { mut leg, mut crossing, flight } = opened;
    let _held = (flight, Counted::new(&outbound.observed.opaque));
    // What the caller sent behind its CONNECT was read with it.
    if !early.is_empty() && leg.stream.write_all(early).await.is_err() {
        return opaque::reset(connection);
    }
    let credentials = leg.credentials.clone();
    let end = tokio::select! {
        ended = opaque::copy_both(&mut leg.stream, &mut connection) => Some(ended.end),
        ended = end_early(outbound, &credentials, crossing.as_mut()) => {
            account_for(outbound, &leg, &ended);
            None
        }
    };
    match end {
        Some(CopyEnd::Closed) => {}
        Some(CopyEnd::LegReset(error)) => {
            tracing::debug!(%error, "the leg of a connection was reset");
            opaque::reset(connection);
        }
        Some(CopyEnd::AppReset(_)) => opaque::reset(leg.stream.into_inner().0),
        None => {
            opaque::reset(connection);
            opaque::reset(leg.stream.into_inner().0);
        }
    }
}

async fn carry_stream(outbound: &Outbound, opened: Opened, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let Opened { mut leg, mut crossing, flight } = opened;
    let _held = (flight, Counted::new(&outbound.observed.opaque));
    let credentials = leg.credentials.clone();
    let end = tokio::select! {
        ended = opaque::copy_both(&mut leg.stream, &mut stream) => Some(ended.end),
        ended = end_early(outbound, &credentials, crossing.as_mut()) => {
            account_for(outbound, &leg, &ended);
            None
        }
    };
    if !matches!(end, Some(CopyEnd::Closed)) {
        opaque::reset(leg.stream.into_inner().0);
    }
}

/// Completes when a connection that stands must end, whatever its two ends think.
async fn end_early(outbound: &Outbound, credentials: &Credentials, crossing: Option<&mut Crossing>) -> Ended {
    let given_up = async {
        match crossing {
            Some(crossing) => crossing.given_up().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        refusal = credentials.refused(outbound.dialer.trust()) => Ended::Untrusted(refusal),
        () = given_up => Ended::GatewaySilent,
        () = outbound.drain.stopped() => Ended::Stopped,
    }
}

fn account_for(outbound: &Outbound, leg: &Leg, ended: &Ended) {
    match ended {
        Ended::Untrusted(refusal) => {
            tracing::info!(server = %leg.server_id, %refusal, "connection closed: its server is no longer trusted");
            outbound.observed.refused(*refusal);
        }
        Ended::GatewaySilent => outbound.observed.refused(Refusal::Timeout),
        Ended::Stopped => {}
    }
}
