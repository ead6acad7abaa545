//! What became of one request, for the headers of its answer (where a permitted caller asks for them) and for the access
//! log. Where neither is wanted, nothing is kept of it.

use std::time::Instant;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Request, StatusCode};
use tombolo_core::policy::Resource;
use tombolo_core::policy::table::Taken;
use tombolo_core::refusal::Refusal;
use tombolo_core::routing::{EndpointKey, Pick};
use tombolo_core::trace::TraceParent;

use super::access_log::Line;
use super::http::Caller;
use super::policy::decided_by;
use super::route::Route;
use super::target::Target;

const ROUTE: HeaderName = HeaderName::from_static("tombolo-route");
const POLICY: HeaderName = HeaderName::from_static("tombolo-policy");
/// `west/e1: not ready; ...`: each endpoint that was not taken, and why.
const PASSED_OVER: HeaderName = HeaderName::from_static("tombolo-passed-over");

/// Kept while a request is under way.
#[derive(Default)]
pub struct Trail {
    /// The caller asked, and may.
    pub explained: bool,
    line: Option<Box<Line>>,
    route: Option<String>,
    policy: Option<String>,
    passed_over: Option<String>,
    trace: Option<TraceParent>,
}

impl Trail {
    /// `logged` says whether there is an access log.
    pub fn begin<B>(request: &Request<B>, caller: &Caller, logged: bool) -> Self {
        let line = logged.then(|| Box::new(Line::begin(request, caller.address)));
        Self { line, ..Self::default() }
    }

    pub fn to(&mut self, route: &Route, trace: Option<TraceParent>) {
        self.trace = trace;
        if let Some(line) = &mut self.line {
            (line.service, line.port) = (Some(route.service.to_string()), Some(route.port));
        }
    }

    /// Which rule of which route, and which policy decided.
    pub fn decided(&mut self, taken: Option<&Taken<'_>>, policy: Option<&Resource>) {
        if self.explained || self.line.is_some() {
            self.route = taken.map(decided_by);
            self.policy = policy.map(ToString::to_string);
        }
    }

    /// A try begins at this endpoint.
    pub fn tried(&mut self, way: &Route, target: &Target, pick: Pick, tried: &[EndpointKey], number: u32) {
        if self.explained {
            self.passed_over = Some(way.passed_over(target, pick.reason, tried));
        }
        if let Some(line) = &mut self.line {
            line.backend = Some(format!("{}:{}", way.service, way.port));
            line.cluster = Some(target.key.cluster.to_string());
            line.endpoint = Some(target.key.endpoint.to_string());
            (line.tries, line.reason) = (number, Some(pick.reason.to_string()));
            line.flags.retain(|flag| *flag == RETRIED);
            if number > 1 && line.flags.is_empty() {
                line.flags.push(RETRIED);
            }
            line.flags.push(pick.reason.name());
            if pick.spilled {
                line.flags.push("spilled");
            }
        }
    }

    pub fn redirected(&mut self, by: &Taken<'_>) {
        self.decided(Some(by), None);
        self.answered_here("redirect");
    }

    /// It was answered on purpose by a policy or a route.
    pub fn answered_here(&mut self, flag: &'static str) {
        if let Some(line) = &mut self.line {
            line.flags.push(flag);
        }
    }

    /// Says it in the headers of the answer.
    pub fn tell(&self, headers: &mut HeaderMap) {
        if !self.explained {
            return;
        }
        let said = [(ROUTE, &self.route), (POLICY, &self.policy), (PASSED_OVER, &self.passed_over)];
        for (name, value) in said {
            let value = value.as_ref().filter(|value| !value.is_empty());
            if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
                headers.insert(name, value);
            }
        }
    }

    /// The line for the access log, if there is one.
    pub fn end(self, status: StatusCode, refused: Option<(Refusal, String)>, began: Instant) -> Option<Box<Line>> {
        let mut line = self.line?;
        (line.route, line.policy, line.status) = (self.route, self.policy, status.as_u16());
        line.head_ms = began.elapsed().as_secs_f64() * 1e3;
        line.trace_id = self.trace.map(|trace| trace.to_string());
        if let Some((refusal, detail)) = refused {
            (line.refusal, line.detail) = (Some(refusal), Some(detail));
        }
        Some(line)
    }
}

const RETRIED: &str = "retried";
