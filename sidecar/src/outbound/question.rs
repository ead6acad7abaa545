//! What would become of a request that nobody sends: the same decisions in the same order as in [`super::http`], asked for
//! their reasons. No draw is taken, nothing is counted, and no request is any later for it.

use std::time::Instant;

use http::{HeaderMap, Method, Request, Uri};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tombolo_core::id::{ClusterId, EndpointId, ServiceName, SpiffeId};
use tombolo_core::model::{AppProtocol, Origin};
use tombolo_core::policy::table::{BackendVerdict, Verdict};
use tombolo_core::refusal::Refusal;
use tombolo_core::routing;

use super::Outbound;
use super::policy::{self, Considered, Destination, Policies, Way};
use super::refuse::Refused;
use super::route::Route;
use super::services::Looked;
use super::{http as requests, name};

/// A request as somebody imagines it.
#[derive(Debug, Clone)]
pub struct Imagined {
    pub method: Method,
    pub url: Uri,
    pub headers: HeaderMap,
}

/// The answer. Its JSON is documented (docs/explain.md) and only grows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub request: Asked,
    /// `None` where this sidecar delivers the service to callers that choose elsewhere.
    pub outcome: Option<Outcome>,
    /// Rules of routes in the order in which they are tried, then the routes that take no part.
    pub routes: Vec<RouteRow>,
    /// Backends of the rule that was taken.
    pub backends: Vec<BackendRow>,
    pub traffic_policies: Vec<PolicyRow>,
    pub limits: Vec<LimitRow>,
    /// In the order of preference.
    pub clusters: Vec<ClusterRow>,
    pub endpoints: Vec<EndpointRow>,
    pub access: Access,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    pub method: String,
    pub service: ServiceName,
    pub port: u16,
    pub path: String,
    pub from: SpiffeId,
    /// What the port carries; routes take part where it is no bytes, and the URL says `http`.
    pub protocol: Option<AppProtocol>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Outcome {
    Forward {
        service: ServiceName,
        port: u16,
        cluster: ClusterId,
        endpoint: EndpointId,
        reason: String,
    },
    /// Answered by the route itself.
    Redirect {
        status: u16,
        decided_by: String,
    },
    Refused {
        refusal: Refusal,
        status: u16,
        reason: String,
    },
}

impl From<Refused> for Outcome {
    fn from(refused: Refused) -> Self {
        let status = refused.status().as_u16();
        Outcome::Refused { refusal: refused.refusal, status, reason: refused.to_string() }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    pub resource: String,
    /// 0-based; `None` for a route that takes no part.
    pub rule: Option<usize>,
    pub taken: bool,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendRow {
    pub service: ServiceName,
    pub port: u16,
    /// The one cluster that is meant, if it is one.
    pub cluster: Option<ClusterId>,
    pub weight: u32,
    pub taken: bool,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PolicyRow {
    pub resource: String,
    pub taken: bool,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LimitRow {
    pub limit: String,
    pub max: u32,
    pub open: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterRow {
    pub cluster: ClusterId,
    pub local: bool,
    /// Part of the requests, 0 to 1.
    pub share: f64,
    pub weight: Option<u32>,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointRow {
    pub cluster: ClusterId,
    pub endpoint: EndpointId,
    pub weight: u32,
    pub taken: bool,
    pub reason: String,
    /// Under way from here.
    pub requests: u32,
    /// What an answer is expected to take; `None` before there was one.
    pub latency_ms: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Access {
    /// `None` where it is not known here.
    pub allowed: Option<bool>,
    pub reason: String,
}

/// The service and port that a request is for.
///
/// # Errors
/// As for a request: `BadRequest`, or `ForeignName`.
pub fn target(imagined: &Imagined) -> Result<(ServiceName, u16), Refused> {
    let port = match imagined.url.scheme_str() {
        Some("http") => 80,
        Some("https") => 443,
        _ => {
            let detail = "write the whole URL: http://NAME.NAMESPACE.svc.clusterset.local/PATH (https:// for what is carried as it is)";
            return Err(Refused::new(Refusal::BadRequest, detail));
        }
    };
    let authority = imagined.url.authority().ok_or_else(|| Refused::new(Refusal::BadRequest, "the URL has no host"))?;
    name::parse(authority.as_str(), port)
}

/// An answer in which nothing is decided yet.
pub fn blank(imagined: &Imagined, service: ServiceName, port: u16, from: SpiffeId, access: Access) -> Explanation {
    let request = Asked {
        method: imagined.method.to_string(),
        path: imagined.url.path().to_owned(),
        service,
        port,
        from,
        protocol: None,
    };
    let (routes, backends, traffic_policies, limits) = Default::default();
    let (clusters, endpoints) = Default::default();
    Explanation { request, outcome: None, routes, backends, traffic_policies, limits, clusters, endpoints, access }
}

impl Outbound {
    /// Fills in what would become of the request now.
    ///
    /// # Errors
    /// What a request would be refused with before anything about it is decided.
    pub async fn explain(&self, imagined: &Imagined, explanation: &mut Explanation) -> Result<(), Refused> {
        let (service, port) = (explanation.request.service.clone(), explanation.request.port);
        let looked = self.services.look(&service, port, None).await?;
        let route = &looked.route;
        explanation.request.protocol = Some(route.app());
        let request = imagined_request(imagined);
        let policies = route.policies();
        let is_bytes = matches!(route.app(), AppProtocol::Opaque | AppProtocol::Tls);
        let is_http = !is_bytes && imagined.url.scheme_str() == Some("http");
        let decided = match &policies {
            Some(policies) if is_http => self.follow(policies, route, &request, explanation).await,
            _ => Ok(Decided::Service),
        };
        match decided {
            Ok(Decided::Service) => explain_way(route, &request, is_http, explanation),
            Ok(Decided::Elsewhere(looked)) => explain_way(&looked.route, &request, is_http, explanation),
            Ok(Decided::Answered(outcome)) => explanation.outcome = Some(outcome),
            Err(refused) => explanation.outcome = Some(refused.into()),
        }
        Ok(())
    }

    /// What the routes decide.
    async fn follow(
        &self,
        policies: &Policies,
        route: &Route,
        request: &Request<()>,
        explanation: &mut Explanation,
    ) -> Result<Decided, Refused> {
        explanation.routes = policies.considered(request).iter().map(route_row).collect();
        let Some(taken) = policies.rule(request, 0)? else { return Ok(Decided::Service) };
        explanation.backends = taken
            .backends()
            .into_iter()
            .map(|(backend, verdict)| BackendRow {
                service: backend.service.clone(),
                port: backend.port.unwrap_or(route.port),
                cluster: backend.cluster.clone(),
                weight: backend.weight,
                taken: matches!(verdict, BackendVerdict::Taken(_)),
                reason: verdict.to_string(),
            })
            .collect();
        let backend = match policy::destination(&taken, request, route.port)? {
            Destination::Backend(backend) => backend,
            Destination::Answer(answer) => {
                let (status, decided_by) = (answer.status().as_u16(), policy::decided_by(&taken));
                return Ok(Decided::Answered(Outcome::Redirect { status, decided_by }));
            }
        };
        match policy::way(backend, &route.service, route.port) {
            Way::Own => Ok(Decided::Service),
            Way::Other { service, port, cluster } => {
                let looked = self.services.look(service, port, cluster).await;
                Ok(Decided::Elsewhere(looked.map_err(policy::no_backend)?))
            }
        }
    }
}

enum Decided {
    /// The request goes to the service that it names.
    Service,
    Elsewhere(Looked),
    Answered(Outcome),
}

fn imagined_request(imagined: &Imagined) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = imagined.method.clone();
    *request.uri_mut() = imagined.url.clone();
    *request.headers_mut() = imagined.headers.clone();
    request
}

fn route_row(considered: &Considered<'_>) -> RouteRow {
    RouteRow {
        resource: considered.resource.to_string(),
        rule: considered.rule.map(|(index, _)| index),
        taken: considered.verdict == Verdict::Taken,
        reason: considered.verdict.to_string(),
    }
}

/// Which endpoint of the way, and why not the others.
fn explain_way(way: &Route, request: &Request<()>, is_http: bool, explanation: &mut Explanation) {
    let now = Instant::now();
    let policies = way.policies();
    explanation.traffic_policies = policies
        .iter()
        .flat_map(|policies| policies.traffic_considered(request))
        .map(|(resource, taken, reason)| PolicyRow { resource: resource.to_string(), taken, reason })
        .collect();
    let session = policies.as_ref().and_then(|policies| policies.session(request.headers()));
    let session = session.or_else(|| way.session(std::net::Ipv4Addr::LOCALHOST.into()));
    let (live, pick, verdicts) = way.explain(session, now);
    explanation.clusters = live
        .plan
        .clusters
        .iter()
        .map(|cluster| ClusterRow {
            cluster: cluster.cluster.clone(),
            local: cluster.origin == Origin::Local,
            share: cluster.share,
            weight: cluster.weight,
            reason: cluster.reason().to_string(),
        })
        .collect();
    let targets = live.plan.endpoints.iter().zip(&live.targets).zip(verdicts);
    explanation.endpoints = targets
        .map(|((endpoint, target), verdict)| EndpointRow {
            cluster: endpoint.key.cluster.clone(),
            endpoint: endpoint.key.endpoint.clone(),
            weight: endpoint.weight,
            taken: matches!(verdict, routing::Verdict::Picked(_)),
            reason: verdict.to_string(),
            requests: target.in_flight(),
            latency_ms: target.expected_latency(now).map(|latency| latency.as_secs_f64() * 1e3),
        })
        .collect();
    let (what, bound) =
        if is_http { ("requests", &way.breaker.requests) } else { ("connections", &way.breaker.connections) };
    explanation.limits = bound
        .max()
        .map(|max| LimitRow { limit: what.into(), max, open: bound.refuses(what).is_some() })
        .into_iter()
        .collect();
    explanation.outcome = Some(match (pick, bound.refuses(what)) {
        (None, _) => requests::no_endpoint(way).into(),
        (Some(_), Some(refused)) => refused.into(),
        (Some(pick), None) => {
            let key = &live.plan.endpoints[pick.endpoint].key;
            let (cluster, endpoint) = (key.cluster.clone(), key.endpoint.clone());
            Outcome::Forward {
                service: way.service.clone(),
                port: way.port,
                cluster,
                endpoint,
                reason: pick.reason.to_string(),
            }
        }
    });
}

/// As the admin port shows a refusal of the question itself.
pub fn refused(refused: &Refused) -> Value {
    serde_json::json!({ "error": { "refusal": refused.refusal, "text": refused.to_string() } })
}
