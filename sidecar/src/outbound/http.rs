//! One request of the application: its way is chosen, it is sent, and tried again where that is right.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version, request};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use tombolo_core::model::AppProtocol;
use tombolo_core::outlier::Outcome;
use tombolo_core::policy::route::Backend;
use tombolo_core::policy::table::Taken;
use tombolo_core::refusal::Refusal;
use tombolo_core::retry::{self, Exhausted, Progress, Schedule, Verdict};
use tombolo_core::routing::{EndpointKey, Pick, PickReason};
use tombolo_core::trace::TraceParent;
use tombolo_leg::http::{HttpLeg, LegHealth, RecvBody, SendErrorKind, StreamError, headers};
use tombolo_runtime::telemetry::{Kind, Span};

use super::Outbound;
use super::body::{BodySource, ResponseBody};
use super::dial::{Blame, LegFailure};
use super::hedge::Attempt;
use super::mirror::Copies;
use super::policy::{self, Destination, Policies, Retrying, Way};
use super::refuse::{REFUSAL, Refused, is_grpc};
use super::replay::RequestBody;
use super::route::Route;
use super::target::{Flight, Target, Waiting};
use super::trail::Trail;
use super::{explain, switch, tunnel};
use crate::config::ServicePortName;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Legs that turn out to be closed just when a request is put on them, before that counts as a try.
const CLOSED_LEGS_MAX: u32 = 2;
/// Before an endpoint is met again that has just refused; doubled for each further try.
pub(super) const PAUSE: Duration = Duration::from_millis(20);

/// Who calls, and through which listener.
#[derive(Clone)]
pub struct Caller {
    pub address: SocketAddr,
    /// Of a listener that leads to one service; the proxy's callers name it themselves.
    pub fixed: Option<Arc<ServicePortName>>,
}

/// A request that is ready to be tried.
pub(super) struct Outgoing<'a> {
    head: request::Parts,
    body: BodySource,
    idempotent: bool,
    began: Instant,
    /// The session that it belongs to, if the service keeps sessions together.
    pub(super) session: Option<u64>,
    retrying: Retrying<'a>,
}

/// What routes decided about a request.
enum Chosen<'a> {
    /// The way, unless it is that of the service itself, and by which rule.
    Way(Option<Arc<Route>>, Option<(Taken<'a>, &'a Backend)>),
    Answer(Taken<'a>, Response<Full<Bytes>>),
}

impl Default for Chosen<'_> {
    fn default() -> Self {
        Chosen::Way(None, None)
    }
}

/// How a request is treated; the default where no policy speaks of it.
struct Treated<'r, 't> {
    way: Option<Arc<Route>>,
    by: Option<(Taken<'r>, &'r Backend)>,
    retrying: Retrying<'t>,
    session: Option<u64>,
}

impl<'r: 't, 't> Treated<'r, 't> {
    /// `traffic` is what speaks of the service at the end of the way.
    fn new(
        own: Schedule,
        way: Option<Arc<Route>>,
        by: Option<(Taken<'r>, &'r Backend)>,
        traffic: Option<&'t Policies>,
        request: &Request<Incoming>,
    ) -> Self {
        let rule = by.as_ref().map(|(taken, _)| taken.rule);
        let retrying = Retrying::new(own, rule, traffic.and_then(Policies::traffic));
        let session = traffic.and_then(|traffic| traffic.session(request.headers()));
        Self { way, by, retrying, session }
    }

    /// Changes the head of a request as its rule and its backend say; `copied` says whether a copy of it could be sent.
    fn change(
        &self,
        head: &mut request::Parts,
        named: &Route,
        way: &Route,
        speaks_http2: bool,
        copied: bool,
    ) -> Result<Copies, Refused> {
        let mut copies = Copies::default();
        if let Some((taken, backend)) = &self.by {
            policy::change_request(head, taken)?;
            if copied {
                copies = Copies::new(taken, head, named.port, speaks_http2);
            }
            policy::change_for(head, backend);
        }
        if speaks_http2 && way.app() == AppProtocol::Detect {
            headers::say_http2(&mut head.headers);
        }
        Ok(copies)
    }
}

/// A try that ended without a response.
pub(super) struct Failure {
    pub progress: Progress,
    pub refused: Refused,
    pub outcome: Option<Outcome>,
    pub blame: Blame,
    /// The budget has paid for the next try already.
    pub paid: bool,
}

/// An answer, over which leg it came, and after how long.
pub(super) type Once = (Response<RecvBody>, HttpLeg, Duration);

/// The try that was answered.
struct Answered {
    response: Response<RecvBody>,
    flight: Flight,
    leg: HttpLeg,
    pick: Pick,
    tries: u32,
}

impl Outbound {
    /// Answers one request; refusals are answers too.
    pub async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        caller: Caller,
    ) -> Result<Response<ResponseBody>, Infallible> {
        let (version, began) = (request.version(), Instant::now());
        let mut trail = Trail::begin(&request, &caller, self.access_log.is_some());
        let asked = if is_grpc(request.headers()) { request.headers().clone() } else { HeaderMap::new() };
        let (mut response, refused) = match self.answer(request, &caller, &mut trail).await {
            Ok(response) => (response, None),
            Err(refused) => {
                self.observed.refused(refused.refusal);
                let (refusal, detail) = (refused.refusal.code(), &refused.detail);
                tracing::debug!(caller = %caller.address, refusal, %detail, "request refused");
                let mut response = refused.respond(&asked).map(ResponseBody::Own);
                if refused.refusal == Refusal::BadRequest && version < Version::HTTP_2 {
                    // Where a malformed request ends is a matter of opinion; nothing behind it is read.
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                (response, Some((refused.refusal, refused.detail)))
            }
        };
        trail.tell(response.headers_mut());
        if let Some(log) = &self.access_log
            && let Some(line) = trail.end(response.status(), refused, began)
        {
            log.write(line);
        }
        Ok(response)
    }

    async fn answer(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        caller: &Caller,
        trail: &mut Trail,
    ) -> Result<Response<ResponseBody>, Refused> {
        let route = self.route_of(&request, caller).await?;
        let began = Instant::now();
        route.begin(began);
        let mut span = self.span(&request, &route);
        trail.to(&route, span.context());
        if is_plain_connect(&request) {
            return tunnel::connect(self, request, &route, caller, span).await;
        }
        let version = request.version();
        trail.explained = request.headers_mut().remove(&explain::ASK).is_some() && self.may_ask(caller);
        let policies = route.policies();
        let chosen = match &policies {
            Some(policies) => Box::pin(self.choose(policies, &route, &request)).await?,
            None => Chosen::default(),
        };
        let (way, by) = match chosen {
            Chosen::Way(way, by) => (way, by),
            Chosen::Answer(taken, response) => {
                trail.redirected(&taken);
                return Ok(response.map(ResponseBody::Own));
            }
        };
        let traffic = way.as_ref().map_or_else(|| policies.clone(), |way| way.policies());
        trail.decided(by.as_ref().map(|(taken, _)| taken), traffic.as_deref().and_then(Policies::traffic_resource));
        let treated = Treated::new(self.schedule, way, by, traffic.as_deref(), &request);
        if let Some(traffic) = &traffic
            && let Some(response) = Box::pin(traffic.disturb(&request)).await
        {
            trail.answered_here("fault");
            return Ok(response.map(ResponseBody::Own));
        }
        // What only sidecars say to each other is not for applications to say.
        headers::strip_own(request.headers_mut());
        let (mut head, body, switching) = switch::Switching::begin(request)?;
        let body = match &switching {
            Some(_) => BodySource::upgrade(),
            None => BodySource::Request(RequestBody::new(body)),
        };
        headers::to_leg(&mut head).map_err(|error| Refused::new(Refusal::BadRequest, error.to_string()))?;
        if let Some(context) = span.context().filter(|_| span.is_recording()) {
            let value = HeaderValue::from_str(&context.to_string()).expect("hex digits and dashes");
            head.headers.insert(TRACEPARENT, value);
        }
        let way = treated.way.as_ref().unwrap_or(&route);
        let copies = treated.change(&mut head, &route, way, version == Version::HTTP_2, switching.is_none())?;
        let idempotent = switching.is_none() && retry::is_idempotent(head.method.as_str());
        let session = treated.session.or_else(|| way.session(caller.address.ip()));
        let outgoing = Outgoing { head, body, idempotent, began, session, retrying: treated.retrying };
        // What has a body is copied once that was read.
        let copies = copies.send_bodiless(self, &outgoing.body);
        let result = self.try_all(way, &outgoing, span.context(), trail).await;
        copies.send(self, outgoing.body.whole());
        let answered = result.inspect_err(|refused| span.error(refused))?;
        describe(&mut span, &answered);
        let Answered { mut response, flight, leg, pick, tries } = answered;
        // Of what the far side says in tombolo's name only a refusal counts here.
        headers::strip_own_but(response.headers_mut(), Some(&REFUSAL));
        if trail.explained {
            explain::explain(response.headers_mut(), &flight.target, &leg, pick, tries);
        }
        if let Some((taken, backend)) = &treated.by {
            policy::change_response(response.headers_mut(), taken.rule, backend);
        }
        match switching.filter(|_| response.status().is_success()) {
            Some(switching) => {
                let sender = outgoing.body.into_upgrade();
                Ok(switching.finish(self, response, sender, flight, span))
            }
            None => Ok(response.map(|body| ResponseBody::Leg { body, under_way: Some((flight, span)) })),
        }
    }

    /// Whether this caller may be told which way its requests take.
    fn may_ask(&self, caller: &Caller) -> bool {
        self.explain_to.iter().any(|range| range.contains(&caller.address.ip().to_canonical()))
    }

    /// The rule for a request, and the way to its backend.
    async fn choose<'a>(
        &self,
        policies: &'a Policies,
        route: &Arc<Route>,
        request: &Request<Incoming>,
    ) -> Result<Chosen<'a>, Refused> {
        let Some(taken) = policies.rule(request, rand::random())? else { return Ok(Chosen::default()) };
        let backend = match policy::destination(&taken, request, route.port)? {
            Destination::Backend(backend) => backend,
            Destination::Answer(response) => return Ok(Chosen::Answer(taken, response)),
        };
        let way = match policy::way(backend, &route.service, route.port) {
            Way::Own => return Ok(Chosen::Way(None, Some((taken, backend)))),
            Way::Other { service, port, cluster } => self.services.route_in(service, port, cluster).await,
        };
        let way = way.map_err(policy::no_backend)?;
        way.begin(Instant::now());
        Ok(Chosen::Way(Some(way), Some((taken, backend))))
    }

    async fn route_of(&self, request: &Request<Incoming>, caller: &Caller) -> Result<Arc<Route>, Refused> {
        let headers = request.headers();
        if headers.get_all(header::HOST).iter().nth(1).is_some() {
            return Err(Refused::new(Refusal::BadRequest, "the request has more than one Host"));
        }
        if let Some(fixed) = &caller.fixed {
            return self.services.route(&fixed.service, fixed.port).await;
        }
        if request.uri().scheme_str().is_some_and(|scheme| scheme != "http") {
            let detail = "only http:// is carried; a client that speaks TLS itself asks with CONNECT";
            return Err(Refused::new(Refusal::BadRequest, detail));
        }
        let authority = match request.uri().authority() {
            Some(authority) => authority.as_str(),
            None => {
                let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
                host.ok_or_else(|| Refused::new(Refusal::BadRequest, "the request has no host"))?
            }
        };
        match self.services.known(authority) {
            Some(route) => Ok(route),
            None => self.services.resolve(authority, 80).await,
        }
    }

    fn span(&self, request: &Request<Incoming>, route: &Route) -> Span {
        let parent = request.headers().get(&TRACEPARENT).and_then(|value| value.to_str().ok()?.parse().ok());
        let mut span = self.tracer.span(Kind::Client, "request", parent);
        if span.is_recording() {
            span.attr("http.request.method", request.method());
            span.attr("tombolo.service", &route.service);
            span.attr_int("server.port", route.port.into());
        }
        span
    }

    /// Tries until there is an answer or no further try is right.
    async fn try_all(
        self: &Arc<Self>,
        route: &Arc<Route>,
        outgoing: &Outgoing<'_>,
        trace: Option<TraceParent>,
        trail: &mut Trail,
    ) -> Result<Answered, Refused> {
        let Retrying { schedule, backoff, .. } = outgoing.retrying;
        let mut tried: Vec<EndpointKey> = Vec::new();
        let mut number = 1;
        let mut deadline = until(schedule, 1, outgoing.began, Instant::now())?;
        loop {
            let (target, pick) =
                route.pick(&tried, outgoing.session, Instant::now()).ok_or_else(|| no_endpoint(route))?;
            trail.tried(route, &target, pick, &tried, number);
            if number > 1 {
                let again = matches!(pick.reason, PickReason::Again | PickReason::LastResort);
                let pause = if again { PAUSE * (1 << (number - 2).min(6)) } else { Duration::ZERO };
                tokio::time::sleep(pause.max(backoff)).await;
            }
            let mut attempt = Attempt::begin(route, target, pick)?;
            let may_leave = || number < schedule.tries && outgoing.is_replayable() && route.may_retry(Instant::now());
            let result = match outgoing.hedge_after(number) {
                None => within(deadline, self.try_once(&attempt.target, outgoing, trace, may_leave)).await,
                Some(after) => {
                    let hedged = self.hedged(route, (&mut attempt, after), &tried, outgoing, trace, may_leave);
                    let result = within(deadline, Box::pin(hedged)).await;
                    // The one beside may be the one that counts.
                    trail.tried(route, &attempt.target, attempt.pick, &tried, number);
                    result
                }
            };
            let Attempt { target, pick, flight } = attempt;
            let failure = match result {
                Ok((response, _, _))
                    if outgoing.idempotent && number < schedule.tries && is_misdelivered(&response) =>
                {
                    misdelivered(&response, &target)
                }
                Ok((response, _, after))
                    if outgoing.is_tried_again(response.status())
                        && until(schedule, number + 1, outgoing.began, Instant::now()).is_ok()
                        && route.may_retry(Instant::now()) =>
                {
                    answered_badly(response.status(), after, &target)
                }
                Ok((response, leg, after)) => {
                    route.handle_outcome(&target, outcome_of(response.status(), after), Instant::now());
                    if tried.first().is_some_and(|first| first.cluster != target.key.cluster) {
                        self.observed.failovers.inc();
                    }
                    return Ok(Answered { response, flight, leg, pick, tries: number });
                }
                Err(failure) => failure,
            };
            drop(flight);
            let now = Instant::now();
            if let Some(outcome) = failure.outcome {
                route.handle_outcome(&target, outcome, now);
            }
            tracing::debug!(service = %route.service, target = ?target.key, progress = ?failure.progress, refused = %failure.refused, "try failed");
            match retry::judge(failure.progress, outgoing.idempotent, outgoing.body.state()) {
                // More tries are not what an open circuit breaker asks for.
                _ if failure.refused.refusal == Refusal::CircuitOpen => return Err(failure.refused),
                Verdict::Free => {}
                Verdict::Budgeted if failure.paid || route.may_retry(now) => {}
                Verdict::Budgeted | Verdict::No(_) => return Err(failure.refused),
            }
            number += 1;
            deadline = match until(schedule, number, outgoing.began, now) {
                Ok(deadline) => deadline,
                Err(_) => return Err(failure.refused),
            };
            self.observed.retried(failure.progress);
            remember(route, &mut tried, &target, failure.blame);
        }
    }

    pub(super) fn deadline(&self, number: u32, began: Instant, now: Instant) -> Result<Option<Instant>, Refused> {
        until(self.schedule, number, began, now)
    }

    /// One try: a leg, the request, the head of the response and how long it took. `may_leave` is asked when the
    /// far end seems not to answer any more; where no other try is to be had, going on waiting is the better chance.
    pub(super) async fn try_once(
        self: &Arc<Self>,
        target: &Arc<Target>,
        outgoing: &Outgoing<'_>,
        trace: Option<TraceParent>,
        may_leave: impl Fn() -> bool,
    ) -> Result<Once, Failure> {
        let mut closed = 0;
        loop {
            let leg = self.dialer.shared(target, trace).await.map_err(not_sent)?;
            let sent = Instant::now();
            let _waiting = Waiting::begin(target, sent);
            let request = Request::from_parts(outgoing.head.clone(), outgoing.body.attempt());
            let result = {
                let mut sending = pin!(leg.send(request));
                let first = tokio::select! {
                    biased;
                    result = &mut sending => Some(result),
                    () = leg.suspect(), if outgoing.idempotent => None,
                };
                match first {
                    Some(result) => result,
                    None if may_leave() => return Err(left(&leg, target)),
                    None => sending.await,
                }
            };
            let error = match result {
                Ok(response) => return Ok((response, leg, sent.elapsed())),
                Err(error) => error.kind,
            };
            if matches!(error, SendErrorKind::Closed) && closed < CLOSED_LEGS_MAX {
                closed += 1;
                continue;
            }
            return Err(send_failed(error, target));
        }
    }
}

impl Outgoing<'_> {
    /// Whether this answer is one that a route or policy has tried again, where that is safe.
    fn is_tried_again(&self, status: StatusCode) -> bool {
        self.retrying.codes.is_some_and(|codes| codes.contains(&status.as_u16())) && self.is_replayable()
    }

    /// When another try begins beside the one of this number, if that is right.
    fn hedge_after(&self, number: u32) -> Option<Duration> {
        self.retrying.hedge_after(number).filter(|_| self.idempotent && self.body.is_empty())
    }

    /// Whether it may be sent again although the application may have got it.
    fn is_replayable(&self) -> bool {
        retry::judge(Progress::Sent, self.idempotent, self.body.state()) == Verdict::Budgeted
    }
}

/// Until when the try of this number may last.
fn until(schedule: Schedule, number: u32, began: Instant, now: Instant) -> Result<Option<Instant>, Refused> {
    schedule.deadline(number, began, now).map_err(|exhausted| match exhausted {
        Exhausted::Time => Refused::new(Refusal::Timeout, exhausted.to_string()),
        Exhausted::Tries => Refused::new(Refusal::ConnectionLost, exhausted.to_string()),
    })
}

/// An answer that is not good enough: the budget has paid for another try.
fn answered_badly(status: StatusCode, after: Duration, target: &Target) -> Failure {
    let detail = format!("endpoint {} in {} answered {status}", target.key.endpoint, target.key.cluster);
    let refused = Refused::new(Refusal::ConnectionLost, detail);
    let outcome = Some(outcome_of(status, after));
    Failure { progress: Progress::Sent, refused, outcome, blame: Blame::Endpoint, paid: true }
}

/// A request that went away from where no answer was to be expected any more.
fn left(leg: &HttpLeg, target: &Target) -> Failure {
    let (why, outcome) = match leg.health() {
        // Whoever abandoned the leg has judged the endpoint.
        LegHealth::Abandoned => ("the endpoint does not answer", None),
        LegHealth::Live | LegHealth::Suspect | LegHealth::Gone => ("the leg is silent", Some(Outcome::Failed)),
    };
    let detail = format!("endpoint {} in {}: {why}", target.key.endpoint, target.key.cluster);
    let refused = Refused::new(Refusal::ConnectionLost, detail);
    Failure { progress: Progress::Sent, refused, outcome, blame: Blame::Endpoint, paid: true }
}

/// Bounds one try by its deadline. What had become of it then is not known, so it counts as sent.
async fn within<T>(deadline: Option<Instant>, attempt: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let Some(deadline) = deadline else { return attempt.await };
    match tokio::time::timeout_at(deadline.into(), attempt).await {
        Ok(result) => result,
        Err(_) => Err(Failure {
            progress: Progress::Sent,
            refused: Refused::new(Refusal::Timeout, "no response began in time"),
            outcome: Some(Outcome::Failed),
            blame: Blame::Endpoint,
            paid: false,
        }),
    }
}

pub(super) fn not_sent(failure: LegFailure) -> Failure {
    let outcome = match failure.blame {
        Blame::Endpoint => Some(Outcome::Refused),
        Blame::Way => Some(Outcome::Failed),
        Blame::Here => None,
    };
    Failure { progress: Progress::NotSent, refused: failure.refused, outcome, blame: failure.blame, paid: false }
}

pub(super) fn send_failed(error: SendErrorKind, target: &Target) -> Failure {
    let detail = format!("endpoint {} in {}: {error}", target.key.endpoint, target.key.cluster);
    let (progress, refusal, outcome) = match error {
        SendErrorKind::Closed => (Progress::NotSent, Refusal::ConnectionLost, None),
        // No other endpoint would take it either.
        SendErrorKind::Unsendable(_) | SendErrorKind::Body(_) => (Progress::ResponseBegun, Refusal::BadRequest, None),
        SendErrorKind::Stream(StreamError::Refused) => {
            (Progress::Refused, Refusal::AppUnreachable, Some(Outcome::Refused))
        }
        // The far sidecar does not want this client, and said so before it read anything.
        SendErrorKind::Stream(StreamError::Denied(refusal)) => (Progress::NotSent, refusal, None),
        SendErrorKind::Stream(StreamError::Reset(_) | StreamError::Lost(_)) => {
            (Progress::Sent, Refusal::ConnectionLost, Some(Outcome::Failed))
        }
    };
    Failure { progress, refused: Refused::new(refusal, detail), outcome, blame: Blame::Endpoint, paid: false }
}

/// Endpoints that the next try need not meet: this one, or all of its cluster if there is no way to it.
pub(super) fn remember(route: &Route, tried: &mut Vec<EndpointKey>, target: &Target, blame: Blame) {
    match blame {
        Blame::Endpoint => tried.push(target.key.clone()),
        Blame::Way | Blame::Here => {
            let live = route.live();
            let same = live.plan.endpoints.iter().filter(|endpoint| endpoint.key.cluster == target.key.cluster);
            tried.extend(same.map(|endpoint| endpoint.key.clone()));
        }
    }
}

pub(super) fn no_endpoint(route: &Route) -> Refused {
    Refused::new(Refusal::NoEndpoint, format!("{} port {} has no endpoint in any cluster", route.service, route.port))
}

pub(super) fn outcome_of(status: StatusCode, after: Duration) -> Outcome {
    match status {
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
            Outcome::GatewayError { after }
        }
        _ if status.is_server_error() => Outcome::ServerError { after },
        _ => Outcome::Answered { after },
    }
}

/// Whether the far sidecar says that it does not deliver this service, any more or yet. An application could
/// say so too, which is why only idempotent requests go elsewhere for it.
fn is_misdelivered(response: &Response<RecvBody>) -> bool {
    response.status() == StatusCode::MISDIRECTED_REQUEST && response.headers().contains_key(&REFUSAL)
}

fn misdelivered(response: &Response<RecvBody>, target: &Target) -> Failure {
    let code = response.headers().get(&REFUSAL).and_then(|code| Refusal::from_code(code.to_str().ok()?));
    let detail = format!("endpoint {} in {} does not deliver it", target.key.endpoint, target.key.cluster);
    let refused = Refused::new(code.unwrap_or(Refusal::EndpointGone), detail);
    Failure { progress: Progress::Sent, refused, outcome: Some(Outcome::Refused), blame: Blame::Endpoint, paid: false }
}

fn is_plain_connect<B: Body>(request: &Request<B>) -> bool {
    request.method() == Method::CONNECT && request.extensions().get::<hyper::ext::Protocol>().is_none()
}

fn describe(span: &mut Span, answered: &Answered) {
    if !span.is_recording() {
        return;
    }
    span.attr_int("http.response.status_code", answered.response.status().as_u16().into());
    explain::describe(span, &answered.flight.target, answered.leg.crossing(), answered.leg.server_id());
    span.attr_int("tombolo.tries", answered.tries.into());
}
