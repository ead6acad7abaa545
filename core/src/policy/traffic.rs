//! `TrafficPolicy` (tombolo.dev/v1alpha1): how requests to a service are spread, bounded and disturbed. It acts
//! in the caller's sidecar, from the caller's cluster; the rate limit alone acts where the service is delivered.

use std::collections::BTreeSet;

use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::matching::{Head, HttpMatch, is_token};
use super::rate::RateLimit;
use super::route::{ATTEMPTS_MAX, WEIGHT_MAX};
use super::span::Span;
use super::{InvalidField, Resource};
use crate::id::{ClusterId, ServiceName};
use crate::outlier::{self, OutlierConfig};

/// Clusters that one policy may name.
const CLUSTERS_MAX: usize = 64;
/// Faults of one policy.
const FAULTS_MAX: usize = 16;
const WARM_LEGS_MAX: u32 = 16;
/// No pause and no timeout is longer than a day.
const SPAN_MAX: Span = Span::from_secs(86_400);

/// One policy, with the services that it is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficPolicy {
    pub resource: Resource,
    /// Of two policies for one service the older one counts.
    pub created: Timestamp,
    /// All in the policy's own namespace.
    pub targets: BTreeSet<ServiceName>,
    pub spec: TrafficSpec,
}

/// What a policy says. A part that is absent leaves the sidecar's own configuration, or the default, in force.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficSpec {
    /// How an endpoint is chosen.
    pub load_balancing: LoadBalancing,
    /// Weights and order of clusters; all that export the service, local first, unless set.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = [
        {"rule": "self.all(one, has(one.weight)) || self.all(one, !has(one.weight))",
         "message": "either every cluster has a weight or none has"},
        {"rule": "!self.exists(one, has(one.weight)) || self.exists(one, has(one.weight) && one.weight > 0)",
         "message": "all weights are 0: nobody would get a request"},
    ]))]
    pub clusters: Vec<ClusterWeight>,
    /// auto: what a cluster can't carry goes to the others. none: each share stays where it is.
    pub failover: Failover,
    /// When an endpoint is left alone for a while.
    pub outlier_detection: OutlierDetection,
    /// Bounds of one sidecar towards one port of the service.
    pub circuit_breaker: CircuitBreaker,
    /// How long a request may take.
    pub timeouts: Timeouts,
    /// What is tried again.
    pub retry: RetryPolicy,
    /// A second try beside a slow first one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hedging: Option<Hedging>,
    /// Acts where the service is delivered, for each sidecar there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    /// What goes wrong on purpose; the first one that matches counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub faults: Vec<Fault>,
    /// Opaque legs that stay ready for each hot target, 0 to 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 16))]
    pub warm_legs: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancing {
    /// least-request: of two that are drawn, the one with less work and latency. round-robin. consistent-hash.
    pub algorithm: Algorithm,
    /// What keeps a client on one endpoint; needed by, and only of use for, `consistent-hash`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "either")]
    pub hash: Option<HashOn>,
    /// Below this percentage of healthy endpoints, and only while no other cluster has capacity, ejections
    /// are passed over: 0 to 100, 0 is never.
    #[schemars(range(max = 100))]
    pub panic_threshold: u32,
    /// How long a new or returned endpoint takes to its whole share; zero is at once.
    pub slow_start: Span,
    /// Whether endpoints of the caller's zone come first within its cluster.
    pub locality: LocalityPreference,
}

impl Default for LoadBalancing {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            hash: None,
            panic_threshold: 50,
            slow_start: Span::from_secs(10),
            locality: LocalityPreference::default(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// The less loaded of two, by requests under way and peak-EWMA latency.
    #[default]
    LeastRequest,
    RoundRobin,
    ConsistentHash,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HashOn {
    /// The value of a request header.
    Header(String),
    /// The value of a cookie of this name; the sidecar sets none.
    Cookie(String),
    /// The address of the client's connection.
    Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LocalityPreference {
    /// The caller's zone first, others in proportion to what it lacks.
    Zone,
    /// The caller's cluster first, whatever the zone.
    #[default]
    Cluster,
}

/// A cluster's share of the requests, as long as it has healthy capacity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterWeight {
    /// The cluster's id.
    #[schemars(with = "String")]
    pub name: ClusterId,
    /// 0 to 1,000,000. Without weights the list is an order: the first that has capacity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1_000_000))]
    pub weight: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Failover {
    /// What a cluster can't carry goes to the others.
    #[default]
    Auto,
    /// Each cluster's share stays there, healthy or not.
    None,
}

/// When an endpoint is left alone. The defaults are those of [`crate::outlier::OutlierConfig`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierDetection {
    /// false: no endpoint is ever left alone.
    pub enabled: bool,
    /// Resets, lost connections and missed deadlines in a row.
    pub consecutive_failures: u32,
    /// Answers 502, 503 and 504 in a row.
    pub consecutive_gateway_errors: u32,
    /// Answers 500 to 599 in a row; off unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consecutive_server_errors: Option<u32>,
    /// Ejected when its answers take this many times as long as those of its siblings; off unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_factor: Option<u32>,
    /// How long it is left alone the first time; each further time is longer.
    pub base_ejection_time: Span,
    /// The longest that it is left alone.
    pub max_ejection_time: Span,
    /// Whether a hang is noticed (and confirmed) without any timeout.
    pub hang_detection: bool,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            enabled: true,
            consecutive_failures: 3,
            consecutive_gateway_errors: 5,
            consecutive_server_errors: None,
            slow_factor: None,
            base_ejection_time: Span::from_millis(500),
            max_ejection_time: Span::from_secs(30),
            hang_detection: true,
        }
    }
}

impl OutlierDetection {
    /// What acts, where `own` is what acts without a policy. What is slow is for whoever knows the siblings to say.
    pub fn over(&self, own: OutlierConfig) -> OutlierConfig {
        OutlierConfig {
            enabled: self.enabled,
            failures: self.consecutive_failures,
            gateway_errors: self.consecutive_gateway_errors,
            server_errors: self.consecutive_server_errors.unwrap_or(0),
            slow: if self.slow_factor.is_some() { outlier::SLOW_ANSWERS } else { 0 },
            slow_after: std::time::Duration::MAX,
            pause: self.base_ejection_time.duration(),
            pause_max: self.max_ejection_time.duration(),
            hang_outstanding: if self.hang_detection { own.hang_outstanding } else { u32::MAX },
            ..own
        }
    }
}

/// Bounds of one sidecar towards one service port; what is above one is refused with 503 at once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CircuitBreaker {
    /// Opaque connections under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Requests under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
    /// Requests that wait for a leg.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pending_requests: Option<u32>,
}

/// An HTTPRoute's own timeouts come before these.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Timeouts {
    /// All tries together; zero is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Span>,
    /// One try, connection set-up included; zero is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_try: Option<Span>,
}

/// An HTTPRoute's own retry comes before this.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryPolicy {
    /// Tries beyond the first, 0 to 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 10))]
    pub attempts: Option<u32>,
    /// Answers that are tried again, 400 to 599.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    #[schemars(with = "Vec<u16>", inner(range(min = 400, max = 599)))]
    pub codes: BTreeSet<u16>,
    /// The least pause before a further try.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Span>,
    /// Further tries as a percentage of the requests, 0 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub budget_percent: Option<u32>,
}

/// A second try beside the first, for idempotent requests, out of the retry budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hedging {
    /// How long the first try is waited for.
    pub after: Span,
}

/// What goes wrong on purpose for requests that one of `matches` is satisfied by; every request if none is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Fault {
    /// As `matches` of an HTTPRoute; every request if absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "matches")]
    pub matches: Vec<HttpMatch>,
    /// The request is held up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<Delay>,
    /// The request is answered here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Delay {
    /// For how long.
    pub duration: Span,
    /// 0 to 100.
    #[serde(default = "always")]
    #[schemars(range(max = 100))]
    pub percentage: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Abort {
    /// 400 to 599.
    #[schemars(range(min = 400, max = 599))]
    pub status: u16,
    /// 0 to 100.
    #[serde(default = "always")]
    #[schemars(range(max = 100))]
    pub percentage: u32,
}

/// A text or an object: not a shape that Kubernetes' schemas can say.
fn either(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "x-kubernetes-preserve-unknown-fields": true })
}

/// The Gateway API says what is in them.
fn matches(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 64,
        "items": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
    })
}

fn always() -> u32 {
    100
}

/// What happens to one request on purpose: first the delay, then the abort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Injected {
    pub delay: Option<std::time::Duration>,
    pub abort: Option<u16>,
}

impl TrafficSpec {
    /// What goes wrong for this request: the first fault that matches. Each draw is any number, evenly
    /// distributed.
    pub fn fault(&self, head: &dyn Head, delay_draw: u64, abort_draw: u64) -> Injected {
        let Some(fault) = self.fault_for(head) else { return Injected::default() };
        let hit = |percentage: u32, draw: u64| draw % 100 < u64::from(percentage);
        Injected {
            delay: fault.delay.filter(|delay| hit(delay.percentage, delay_draw)).map(|delay| delay.duration.duration()),
            abort: fault.abort.filter(|abort| hit(abort.percentage, abort_draw)).map(|abort| abort.status),
        }
    }

    /// The fault that may strike this request: the first that matches.
    pub fn fault_for(&self, head: &dyn Head) -> Option<&Fault> {
        let matches =
            |fault: &&Fault| fault.matches.is_empty() || fault.matches.iter().any(|one| one.test(head).is_ok());
        self.faults.iter().find(matches)
    }

    /// Checks what the fields' own types can't, with the field named from `spec` on.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), InvalidField> {
        self.check_balancing()?;
        self.check_resilience()?;
        if let Some(limit) = self.rate_limit {
            range("rateLimit.requestsPerSecond", limit.requests_per_second, 1, 10_000_000)?;
            range("rateLimit.burst", limit.burst(), 1, 10_000_000)?;
        }
        if self.faults.len() > FAULTS_MAX {
            return Err(InvalidField::new("faults", format!("more than {FAULTS_MAX}")));
        }
        self.faults.iter().enumerate().try_for_each(|(index, fault)| {
            check_fault(fault).map_err(|error| error.within(&format!("faults[{index}]")))
        })
    }

    fn check_balancing(&self) -> Result<(), InvalidField> {
        let LoadBalancing { algorithm, hash, panic_threshold, slow_start, .. } = &self.load_balancing;
        match (algorithm, hash) {
            (Algorithm::ConsistentHash, None) => {
                return Err(InvalidField::new(
                    "loadBalancing.hash",
                    "consistent-hash needs a header, a cookie or source",
                ));
            }
            (Algorithm::LeastRequest | Algorithm::RoundRobin, Some(_)) => {
                return Err(InvalidField::new("loadBalancing.hash", "only consistent-hash takes it"));
            }
            (_, Some(HashOn::Header(name) | HashOn::Cookie(name))) if !is_token(name) => {
                return Err(InvalidField::new(
                    "loadBalancing.hash",
                    format!("{name:?} is not a name (RFC 9110 token)"),
                ));
            }
            _ => {}
        }
        range("loadBalancing.panicThreshold", *panic_threshold, 0, 100)?;
        span("loadBalancing.slowStart", Some(*slow_start))?;
        if self.clusters.len() > CLUSTERS_MAX {
            return Err(InvalidField::new("clusters", format!("more than {CLUSTERS_MAX}")));
        }
        let weighted = self.clusters.iter().filter(|cluster| cluster.weight.is_some()).count();
        if weighted != 0 && weighted != self.clusters.len() {
            return Err(InvalidField::new("clusters", "either every cluster has a weight or none has"));
        }
        if weighted != 0 && self.clusters.iter().all(|cluster| cluster.weight == Some(0)) {
            return Err(InvalidField::new("clusters", "all weights are 0: nobody would get a request"));
        }
        let mut names = BTreeSet::new();
        for (index, cluster) in self.clusters.iter().enumerate() {
            range(&format!("clusters[{index}].weight"), cluster.weight.unwrap_or(0), 0, WEIGHT_MAX)?;
            if !names.insert(&cluster.name) {
                return Err(InvalidField::new(
                    format!("clusters[{index}].name"),
                    format!("{} is named twice", cluster.name),
                ));
            }
        }
        Ok(())
    }

    fn check_resilience(&self) -> Result<(), InvalidField> {
        let outlier = &self.outlier_detection;
        range("outlierDetection.consecutiveFailures", outlier.consecutive_failures, 1, 10_000)?;
        range("outlierDetection.consecutiveGatewayErrors", outlier.consecutive_gateway_errors, 1, 10_000)?;
        range("outlierDetection.consecutiveServerErrors", outlier.consecutive_server_errors.unwrap_or(1), 1, 10_000)?;
        range("outlierDetection.slowFactor", outlier.slow_factor.unwrap_or(2), 2, 1_000)?;
        span("outlierDetection.maxEjectionTime", Some(outlier.max_ejection_time))?;
        if outlier.base_ejection_time.unless_zero().is_none() || outlier.base_ejection_time > outlier.max_ejection_time
        {
            let reason = "not between nothing and maxEjectionTime";
            return Err(InvalidField::new("outlierDetection.baseEjectionTime", reason));
        }
        for (name, bound) in [
            ("circuitBreaker.maxConnections", self.circuit_breaker.max_connections),
            ("circuitBreaker.maxRequests", self.circuit_breaker.max_requests),
            ("circuitBreaker.maxPendingRequests", self.circuit_breaker.max_pending_requests),
        ] {
            range(name, bound.unwrap_or(1), 1, 10_000_000)?;
        }
        span("timeouts.request", self.timeouts.request)?;
        span("timeouts.perTry", self.timeouts.per_try)?;
        let total = self.timeouts.request.and_then(Span::unless_zero);
        if total.is_some_and(|total| self.timeouts.per_try.is_some_and(|per_try| per_try.duration() > total)) {
            return Err(InvalidField::new("timeouts.perTry", "longer than timeouts.request"));
        }
        range("retry.attempts", self.retry.attempts.unwrap_or(0), 0, ATTEMPTS_MAX)?;
        range("retry.budgetPercent", self.retry.budget_percent.unwrap_or(0), 0, 100)?;
        span("retry.backoff", self.retry.backoff)?;
        if self.retry.codes.iter().any(|code| !(400..600).contains(code)) {
            return Err(InvalidField::new("retry.codes", "a code is not from 400 to 599"));
        }
        if self.hedging.as_ref().is_some_and(|hedging| hedging.after.unless_zero().is_none()) {
            return Err(InvalidField::new("hedging.after", "zero would double every request"));
        }
        span("hedging.after", self.hedging.as_ref().map(|hedging| hedging.after))?;
        range("warmLegs", self.warm_legs.unwrap_or(0), 0, WARM_LEGS_MAX)
    }
}

fn check_fault(fault: &Fault) -> Result<(), InvalidField> {
    if fault.delay.is_none() && fault.abort.is_none() {
        return Err(InvalidField::new("delay", "neither a delay nor an abort is given"));
    }
    if fault.matches.len() > FAULTS_MAX {
        return Err(InvalidField::new("matches", format!("more than {FAULTS_MAX}")));
    }
    if let Some(delay) = fault.delay {
        range("delay.percentage", delay.percentage, 0, 100)?;
        span("delay.duration", Some(delay.duration))?;
    }
    if let Some(abort) = fault.abort {
        range("abort.percentage", abort.percentage, 0, 100)?;
        range("abort.status", abort.status.into(), 400, 599)?;
    }
    Ok(())
}

fn range(path: &str, value: u32, min: u32, max: u32) -> Result<(), InvalidField> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(InvalidField::new(path, format!("{value} is not from {min} to {max}")))
}

fn span(path: &str, value: Option<Span>) -> Result<(), InvalidField> {
    match value.filter(|value| *value > SPAN_MAX) {
        Some(value) => Err(InvalidField::new(path, format!("{value} is longer than a day"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::matching::OwnedHead;
    use super::*;
    use std::time::Duration;

    fn spec(json: &str) -> TrafficSpec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn an_empty_policy_is_the_default_one() {
        assert_eq!(spec("{}"), TrafficSpec::default());
        assert_eq!(TrafficSpec::default().check(), Ok(()));
        // The defaults written here are those that act where there is no policy.
        let (policy, acting) = (OutlierDetection::default(), OutlierConfig::default());
        assert_eq!(policy.consecutive_failures, acting.failures);
        assert_eq!(policy.consecutive_gateway_errors, acting.gateway_errors);
        assert_eq!(policy.base_ejection_time.duration(), acting.pause);
        assert_eq!(policy.max_ejection_time.duration(), acting.pause_max);
    }

    #[test]
    fn outlier_detection_acts_as_it_is_written() {
        let own = OutlierConfig::default();
        let over = |json: &str| spec(&format!(r#"{{"outlierDetection": {json}}}"#)).outlier_detection.over(own);
        let unwritten = OutlierConfig { slow_after: Duration::MAX, ..own };
        for (json, want) in [
            ("{}", unwritten),
            (r#"{"enabled": false}"#, OutlierConfig { enabled: false, ..unwritten }),
            (r#"{"consecutiveFailures": 7}"#, OutlierConfig { failures: 7, ..unwritten }),
            (r#"{"consecutiveGatewayErrors": 2}"#, OutlierConfig { gateway_errors: 2, ..unwritten }),
            (r#"{"consecutiveServerErrors": 4}"#, OutlierConfig { server_errors: 4, ..unwritten }),
            (r#"{"slowFactor": 3}"#, OutlierConfig { slow: outlier::SLOW_ANSWERS, ..unwritten }),
            (r#"{"baseEjectionTime": "2s"}"#, OutlierConfig { pause: Duration::from_secs(2), ..unwritten }),
            (r#"{"maxEjectionTime": "5s"}"#, OutlierConfig { pause_max: Duration::from_secs(5), ..unwritten }),
            (r#"{"hangDetection": false}"#, OutlierConfig { hang_outstanding: u32::MAX, ..unwritten }),
        ] {
            assert_eq!(over(json), want, "{json}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let full = spec(
            r#"{"loadBalancing": {"algorithm": "consistent-hash", "hash": {"cookie": "session"}, "slowStart": "30s"},
                "clusters": [{"name": "east", "weight": 90}, {"name": "west", "weight": 10}], "failover": "none",
                "outlierDetection": {"consecutiveServerErrors": 5}, "circuitBreaker": {"maxRequests": 100},
                "timeouts": {"request": "2s", "perTry": "500ms"}, "retry": {"attempts": 2, "codes": [503]},
                "hedging": {"after": "200ms"}, "rateLimit": {"requestsPerSecond": 10},
                "faults": [{"matches": [{"path": {"value": "/cart"}}], "abort": {"status": 503, "percentage": 1}}],
                "warmLegs": 2}"#,
        );
        assert_eq!(full.check(), Ok(()));
        assert_eq!(spec(&serde_json::to_string(&full).unwrap()), full);
        assert_eq!(spec(r#"{"loadBalancing": {"algorithm": "consistent-hash", "hash": "source"}}"#).check(), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_field() {
        for (json, want) in [
            (r#"{"loadBalancing": {"algorithm": "consistent-hash"}}"#, "loadBalancing.hash: consistent-hash needs"),
            (r#"{"loadBalancing": {"hash": "source"}}"#, "loadBalancing.hash: only consistent-hash"),
            (r#"{"loadBalancing": {"panicThreshold": 101}}"#, "loadBalancing.panicThreshold: 101 is not from 0 to 100"),
            (r#"{"loadBalancing": {"slowStart": "25h"}}"#, "loadBalancing.slowStart: 25h is longer than a day"),
            (r#"{"clusters": [{"name": "a", "weight": 1}, {"name": "b"}]}"#, "clusters: either every cluster"),
            (r#"{"clusters": [{"name": "a", "weight": 0}]}"#, "clusters: all weights are 0"),
            (r#"{"clusters": [{"name": "a"}, {"name": "a"}]}"#, "clusters[1].name: a is named twice"),
            (r#"{"outlierDetection": {"consecutiveFailures": 0}}"#, "outlierDetection.consecutiveFailures: 0 is not"),
            (r#"{"outlierDetection": {"baseEjectionTime": "60s"}}"#, "outlierDetection.baseEjectionTime: not between"),
            (r#"{"circuitBreaker": {"maxRequests": 0}}"#, "circuitBreaker.maxRequests: 0 is not"),
            (r#"{"timeouts": {"request": "1s", "perTry": "2s"}}"#, "timeouts.perTry: longer"),
            (r#"{"retry": {"attempts": 11}}"#, "retry.attempts: 11 is not from 0 to 10"),
            (r#"{"retry": {"codes": [200]}}"#, "retry.codes: a code is not"),
            (r#"{"hedging": {"after": "0s"}}"#, "hedging.after: zero would"),
            (r#"{"rateLimit": {"requestsPerSecond": 0}}"#, "rateLimit.requestsPerSecond: 0 is not"),
            (r#"{"faults": [{}]}"#, "faults[0].delay: neither"),
            (r#"{"faults": [{"abort": {"status": 200}}]}"#, "faults[0].abort.status: 200 is not"),
            (r#"{"warmLegs": 17}"#, "warmLegs: 17 is not from 0 to 16"),
        ] {
            let error = spec(json).check().unwrap_err().to_string();
            assert!(error.starts_with(want), "{json}: {error}");
        }
    }

    #[test]
    fn the_first_fault_that_matches_is_injected_by_its_percentage() {
        let spec = spec(
            r#"{"faults": [
                {"matches": [{"path": {"value": "/slow"}}], "delay": {"duration": "2s", "percentage": 50}},
                {"abort": {"status": 503, "percentage": 10}}]}"#,
        );
        let head = |path: &str| OwnedHead { method: "GET".into(), path: path.into(), ..Default::default() };
        let slow = Injected { delay: Some(Duration::from_secs(2)), abort: None };
        assert_eq!(spec.fault(&head("/slow"), 49, 0), slow);
        assert_eq!(spec.fault(&head("/slow"), 50, 0), Injected::default());
        assert_eq!(spec.fault(&head("/x"), 0, 109), Injected { delay: None, abort: Some(503) });
        assert_eq!((0..1_000).filter(|draw| spec.fault(&head("/x"), 0, *draw).abort.is_some()).count(), 100);
    }
}
