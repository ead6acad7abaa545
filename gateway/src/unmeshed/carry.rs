//! One connection: a leg for it, and its bytes until both sides are done.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tombolo_core::refusal::Refusal;
use tombolo_core::routing::EndpointKey;
use tombolo_core::sni::LegTarget;
use tombolo_leg::Alpn;
use tombolo_leg::dial::{Leg, LegRequest, Via};
use tombolo_leg::opaque::{self, CopyEnd, Open};
use tombolo_runtime::telemetry::{Kind, Span};

use super::Shared;
use super::route::{Choice, Route, UnderWay};
use crate::meters::UNMESHED;
use crate::sources::Unfinished;

/// Endpoints that are tried for one connection: nothing of it was read yet, so every failure is safe to repeat.
const TRIES_MAX: usize = 4;
/// For one of them.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For all of them.
const OPEN_WITHIN: Duration = Duration::from_secs(6);

/// A leg whose far application has accepted.
struct Opened {
    leg: Leg,
    _under_way: UnderWay,
}

/// Why none stands.
struct NotOpened {
    refusal: Refusal,
    detail: String,
}

pub(super) async fn connection(
    shared: &Shared,
    route: &Arc<Route>,
    tcp: TcpStream,
    address: SocketAddr,
    unfinished: Unfinished,
) {
    let gateway = &shared.gateway;
    let mut span = gateway.tracer.span(Kind::Client, "connection", None);
    if span.is_recording() {
        span.attr("tombolo.service", &route.service);
        span.attr("tombolo.gateway", &gateway.settings.id);
        span.attr("client.address", address.ip());
        span.attr_int("server.port", route.port.into());
    }
    // Boxed, so that what is only being carried stays small.
    let opened = Box::pin(open(shared, route, address, &span)).await;
    drop(unfinished);
    match opened {
        Ok(opened) => {
            gateway.meters.legs.get_or_create(&UNMESHED).inc();
            let open = gateway.meters.legs_open.get_or_create_owned(&UNMESHED);
            open.inc();
            carry(shared, opened, tcp, &mut span).await;
            open.dec();
        }
        Err(NotOpened { refusal, detail }) => {
            gateway.meters.refused(refusal);
            span.error(refusal);
            tracing::debug!(%address, service = %route.service, reason = refusal.code(), detail, "connection refused");
            opaque::reset(tcp);
        }
    }
}

async fn open(shared: &Shared, route: &Arc<Route>, address: SocketAddr, span: &Span) -> Result<Opened, NotOpened> {
    let end = Instant::now() + OPEN_WITHIN;
    let mut tried: Vec<EndpointKey> = Vec::new();
    let mut last = NotOpened { refusal: Refusal::NoEndpoint, detail: String::new() };
    while tried.len() < TRIES_MAX && Instant::now() < end {
        let snapshot = shared.gateway.snapshot();
        let Some(view) = snapshot.unmeshed.services.get(&route.service) else { break };
        let choice = route.choose(view, &shared.gateway.registry, &tried, address.ip());
        let Some(Choice { key, server_ids, address: direct, under_way }) = choice else { break };
        let domain = shared.gateway.trust.snapshot().domain_of(&key.cluster).cloned();
        let Some(trust_domain) = domain else {
            last = NotOpened { refusal: Refusal::UnknownTrustDomain, detail: key.cluster.to_string() };
            tried.push(key);
            continue;
        };
        let target = LegTarget {
            cluster: key.cluster.clone(),
            service: route.service.clone(),
            port: route.port,
            endpoint: Some(key.endpoint.clone()),
        };
        let request = LegRequest {
            target,
            trust_domain,
            server_ids,
            via: direct.map_or_else(|| Via::Gateway { address: shared.ingress.to_string() }, Via::Direct),
            alpn: Alpn::Tcp,
            trace: span.context(),
            tracestate: None,
            deadline: CONNECT_TIMEOUT,
        };
        match open_once(shared, request, address, span).await {
            Ok(leg) => return Ok(Opened { leg, _under_way: under_way }),
            Err(failed) => {
                tracing::debug!(endpoint = ?key, reason = failed.refusal.code(), failed.detail, "the next endpoint is tried");
                if blames_the_endpoint(failed.refusal) {
                    route.failed(&key);
                }
                last = failed;
            }
        }
        tried.push(key);
    }
    Err(last)
}

/// Whether others had better not try it for a while: a caller that is not wanted says nothing of the endpoint.
fn blames_the_endpoint(refusal: Refusal) -> bool {
    !matches!(
        refusal,
        Refusal::IdentityDenied
            | Refusal::NotExported
            | Refusal::Revoked
            | Refusal::NoCertificate
            | Refusal::RateLimited
            | Refusal::NoTunnel
    )
}

async fn open_once(shared: &Shared, request: LegRequest, client: SocketAddr, span: &Span) -> Result<Leg, NotOpened> {
    let port = request.target.port;
    let dialled = shared.dialer.dial(request).await;
    let mut leg = dialled.map_err(|error| NotOpened { refusal: error.refusal, detail: error.detail })?;
    let message = Open { port, client_address: Some(client), trace: span.context(), tracestate: None };
    match timeout(CONNECT_TIMEOUT, opaque::open(&mut leg.stream, &message)).await {
        Ok(Ok(())) => Ok(leg),
        Ok(Err(error)) => Err(NotOpened { refusal: error.refusal, detail: error.detail }),
        Err(_) => {
            let detail = "the far sidecar did not answer in time".into();
            Err(NotOpened { refusal: Refusal::Timeout, detail })
        }
    }
}

/// Copies until both sides are done; a reset of one becomes a reset of the other.
async fn carry(shared: &Shared, mut opened: Opened, mut tcp: TcpStream, span: &mut Span) {
    let gateway = &shared.gateway;
    let leg = &mut opened.leg;
    let end = tokio::select! {
        ended = opaque::copy_both(&mut leg.stream, &mut tcp) => Ok(ended.end),
        refusal = leg.credentials.refused(&gateway.trust) => Err(refusal),
        () = gateway.drain.stopped() => Err(Refusal::Draining),
    };
    match end {
        Ok(CopyEnd::Closed) => span.ok(),
        Ok(CopyEnd::LegReset(error)) => {
            span.error(&error);
            opaque::reset(tcp);
        }
        Ok(CopyEnd::AppReset(error)) => {
            span.error(&error);
            opaque::reset(opened.leg.stream.into_inner().0);
        }
        Err(refusal) => {
            gateway.meters.refused(refusal);
            span.error(refusal);
            opaque::reset(tcp);
            opaque::reset(opened.leg.stream.into_inner().0);
        }
    }
}
