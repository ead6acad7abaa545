//! Opaque bytes out of a leg, to one connection of the application.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tombolo_core::refusal::Refusal;
use tombolo_leg::accept::{AcceptedLeg, LegIdentity};
use tombolo_leg::opaque::{self, CopyEnd, Ended, Open, copy_both};
use tombolo_runtime::telemetry::{Kind, Span};

use super::Inbound;
use super::observe::Counted;

/// Serves one opaque leg to its end. A leg that no application connection has taken yet ends with the drain; one
/// that is taken goes on until both sides are done.
pub(super) async fn serve(inbound: Arc<Inbound>, mut leg: AcceptedLeg, drain: CancellationToken) {
    let opened = tokio::select! {
        opened = opaque::accept_open(&mut leg.stream) => opened,
        () = drain.cancelled() => return,
        refusal = leg.credentials.refused(&inbound.trust) => return untrusted(&inbound, &leg.identity, refusal),
    };
    let open = match opened {
        Ok(Some(open)) => open,
        Ok(None) => return,
        Err(error) => {
            inbound.observed.refused(error.refusal);
            tracing::debug!(client = %leg.identity.client_id, %error, "opaque leg refused");
            // A caller that said something else than OPEN may not read the answer either.
            let _ = opaque::answer(&mut leg.stream, Err(error.refusal)).await;
            return;
        }
    };
    let mut span = inbound.tracer.span(Kind::Server, "connection", open.trace);
    describe(&mut span, &leg.identity, open.client_address);
    match deliver(&inbound, &mut leg, &open).await {
        Ok(app) => carry(&inbound, leg, app, span).await,
        Err(refusal) => {
            inbound.observed.refused(refusal);
            span.error(refusal);
            tracing::debug!(client = %leg.identity.client_id, target = %leg.identity.target, refusal = refusal.code(), "connection refused");
            // The caller learns the reason, or that the leg is gone; either way it is told.
            let _ = opaque::answer(&mut leg.stream, Err(refusal)).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut leg.stream).await;
        }
    }
}

async fn deliver(inbound: &Inbound, leg: &mut AcceptedLeg, open: &Open) -> Result<super::app::Connection, Refusal> {
    if open.port != leg.identity.target.port {
        return Err(Refusal::TargetMismatch);
    }
    let app = inbound.admit(&leg.identity, None)?;
    let connection = app.connect_opaque().await?;
    opaque::answer(&mut leg.stream, Ok(())).await.map_err(|_| Refusal::ConnectionLost)?;
    Ok(connection)
}

async fn carry(inbound: &Inbound, mut leg: AcceptedLeg, mut app: super::app::Connection, mut span: Span) {
    let _counted = Counted::new(&inbound.observed.opaque);
    let ended = tokio::select! {
        ended = copy_both(&mut leg.stream, &mut app.tcp) => Ok(ended),
        refusal = inbound.denied_later(&leg.identity, None, Instant::now()) => {
            inbound.observed.refused(refusal);
            Err(refusal)
        }
        refusal = leg.credentials.refused(&inbound.trust) => {
            untrusted(inbound, &leg.identity, refusal);
            Err(refusal)
        }
    };
    let Ended { copied, end } = match ended {
        Ok(ended) => ended,
        // Neither end may take it for the other's last word.
        Err(refusal) => {
            span.error(refusal);
            opaque::reset(app.tcp);
            opaque::reset(leg.stream.into_inner().0);
            return;
        }
    };
    inbound.observed.opaque_octets.inc_by(copied.from_leg + copied.to_leg);
    if span.is_recording() {
        span.attr("tombolo.bytes_in", copied.from_leg);
        span.attr("tombolo.bytes_out", copied.to_leg);
    }
    match end {
        CopyEnd::Closed => span.ok(),
        CopyEnd::LegReset(error) => {
            span.error(&error);
            opaque::reset(app.tcp);
        }
        CopyEnd::AppReset(error) => {
            span.error(&error);
            opaque::reset(leg.stream.into_inner().0);
        }
    }
}

fn untrusted(inbound: &Inbound, leg: &LegIdentity, refusal: Refusal) {
    inbound.observed.refused(refusal);
    tracing::info!(client = %leg.client_id, refusal = refusal.code(), "leg closed: its client is no longer trusted");
}

fn describe(span: &mut Span, leg: &LegIdentity, client_address: Option<SocketAddr>) {
    if !span.is_recording() {
        return;
    }
    span.attr("tombolo.service", &leg.target.service);
    span.attr_int("server.port", leg.target.port.into());
    span.attr("tombolo.client_id", &leg.client_id);
    span.attr("tombolo.client_cluster", &leg.client_cluster);
    if let Some(address) = client_address {
        span.attr("client.address", address);
    }
}
