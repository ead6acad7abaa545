//! Requests that switch protocols, WebSocket above all: HTTP/1.1 `Upgrade` and HTTP/2 extended CONNECT.

use std::sync::Arc;

use http::header::{self, HeaderValue};
use http::{Request, Response, StatusCode, request};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;
use tombolo_core::refusal::Refusal;
use tombolo_leg::http::RecvBody;
use tombolo_leg::http::upgrade::{requested, to_extended_connect, write_body};
use tombolo_runtime::telemetry::Span;

use super::Outbound;
use super::body::{ResponseBody, UpgradedRead};
use super::observe::Counted;
use super::refuse::Refused;
use super::target::Flight;

/// A request that asked to switch, and what its caller's connection needs for it.
pub struct Switching {
    on_upgrade: OnUpgrade,
    /// HTTP/1.1: the protocol, and what a WebSocket's 101 has to say. HTTP/2 has neither.
    http1: Option<(HeaderValue, Option<HeaderValue>)>,
}

impl Switching {
    /// Turns a request that asks for another protocol into an extended CONNECT; leaves others alone.
    pub fn begin(mut request: Request<Incoming>) -> Result<(request::Parts, Incoming, Option<Self>), Refused> {
        let protocol = request.extensions_mut().remove::<hyper::ext::Protocol>();
        let http1 = requested(request.headers()).map(HeaderValue::from_str).transpose();
        let http1 = http1.map_err(|_| Refused::new(Refusal::BadRequest, "the name in Upgrade is not valid"))?;
        if protocol.is_none() && http1.is_none() {
            let (mut head, body) = request.into_parts();
            head.extensions.clear();
            return Ok((head, body, None));
        }
        let on_upgrade = hyper::upgrade::on(&mut request);
        let (mut head, body) = request.into_parts();
        // What hyper keeps there belongs to this connection only.
        head.extensions.clear();
        let http1 = match (protocol, http1) {
            (Some(protocol), _) => {
                head.extensions.insert(h2::ext::Protocol::from(protocol.as_str()));
                None
            }
            (None, http1) => http1.map(|protocol| (protocol, to_extended_connect(&mut head))),
        };
        Ok((head, body, Some(Self { on_upgrade, http1 })))
    }

    /// Answers the caller and carries bytes both ways from then on.
    pub fn finish(
        self,
        outbound: &Arc<Outbound>,
        response: Response<RecvBody>,
        sender: Option<oneshot::Sender<UpgradedRead>>,
        flight: Flight,
        span: Span,
    ) -> Response<ResponseBody> {
        let (mut head, body) = response.into_parts();
        if let Some((protocol, accept)) = self.http1 {
            head.status = StatusCode::SWITCHING_PROTOCOLS;
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            head.headers.insert(header::UPGRADE, protocol);
            if let Some(accept) = accept {
                head.headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
            }
        }
        head.headers.remove(header::CONTENT_LENGTH);
        let work = outbound.drain.track();
        let counted = Counted::new(&outbound.observed.opaque);
        let on_upgrade = self.on_upgrade;
        tokio::spawn(async move {
            let _held = (work, counted, flight, span);
            // A caller that goes away before its connection is handed over drops both bodies, which resets the stream.
            let (Ok(upgraded), Some(sender)) = (on_upgrade.await, sender) else { return };
            let (read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            if sender.send(read).is_err() {
                return;
            }
            if let Err(error) = write_body(body, &mut write).await {
                tracing::debug!(%error, "an upgraded connection ended early");
            }
        });
        Response::from_parts(head, ResponseBody::Own(Full::default()))
    }
}
