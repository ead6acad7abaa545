//! One request out of a leg: authorized, turned into what the application speaks, and answered.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use tombolo_core::id::SpiffeId;
use tombolo_core::refusal::Refusal;
use tombolo_leg::accept::LegIdentity;
use tombolo_leg::http::upgrade::{self, write_body};
use tombolo_leg::http::{Abandon, BoxError, ContinueSignal, RecvBody, headers};
use tombolo_runtime::telemetry::{Kind, Span};

use super::Inbound;
use super::app::{App, AppBody, AppError};
use super::standing::{Call, Standing};
use crate::outbound::refuse::Refused;
use crate::probe;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The body of a response into a leg.
pub enum ResponseBody {
    /// The application's. The span lasts until it is done.
    App { body: AppBody, span: Option<Span>, standing: Option<Box<Standing>> },
    /// Made here.
    Own(Full<Bytes>),
}

/// Serves one request.
pub(super) async fn handle(
    inbound: Arc<Inbound>,
    request: Request<RecvBody>,
) -> Result<Response<ResponseBody>, Abandon> {
    let leg = request.extensions().get::<Arc<LegIdentity>>().expect("every request of a leg carries it").clone();
    let mut span = begin_span(&inbound, &request, &leg);
    let cluster = leg.client_cluster.as_str();
    // Whether the application is at work may be asked by whoever may know of the service at all.
    let is_question = probe::is_question(&request);
    let call = Call::of(&request);
    let admitted = if is_question { inbound.authorize(&leg) } else { inbound.admit(&leg, Some(call.asked())) };
    let app = match admitted {
        Ok(app) => app.clone(),
        Err(refusal @ Refusal::EndpointGone) => {
            inbound.observed.request(cluster, "unreachable");
            inbound.observed.refused(refusal);
            span.error(refusal);
            return Err(Abandon::NeverReachedApp(refusal));
        }
        Err(refusal) => {
            inbound.observed.request(cluster, "refused");
            return Ok(refuse(&inbound, refusal, &leg, request.headers(), &mut span));
        }
    };
    if is_question {
        return answer_probe(&inbound, &app).await;
    }
    let tunnels = request.method() == Method::CONNECT;
    match forward(&inbound, &app, request, &leg, &span).await {
        Ok(response) => {
            inbound.observed.request(cluster, "answered");
            span.attr_int("http.response.status_code", response.status().as_u16().into());
            let standing = if tunnels && response.status().is_success() {
                Some(Box::new(Standing::switched(&inbound, &leg, call)))
            } else if response.body().size_hint().exact().is_none() {
                Some(Box::new(Standing::streaming(&inbound, &leg, call)))
            } else {
                None
            };
            Ok(response.map(|body| ResponseBody::App { body, span: Some(span), standing }))
        }
        Err(Failed::Refused(refusal)) => {
            inbound.observed.request(cluster, "refused");
            Ok(refuse(&inbound, refusal, &leg, &HeaderMap::new(), &mut span))
        }
        Err(Failed::App(AppError::NeverReached(refusal))) => {
            inbound.observed.request(cluster, "unreachable");
            inbound.observed.refused(refusal);
            span.error(refusal);
            Err(Abandon::NeverReachedApp(refusal))
        }
        Err(Failed::App(AppError::Broken(error))) => {
            inbound.observed.request(cluster, "broken");
            span.error(&error);
            tracing::debug!(target = %leg.target, %error, "the application broke off");
            Err(Abandon::Broken(error))
        }
    }
}

/// Another sidecar asks whether the application is at work.
async fn answer_probe(inbound: &Inbound, app: &App) -> Result<Response<ResponseBody>, Abandon> {
    let own = inbound.svid.current().map(|svid| svid.id.clone());
    let own = own.ok_or(Abandon::NeverReachedApp(Refusal::NoCertificate))?;
    Ok(probe::answer::<Full<Bytes>>(app.probe(&own).await).map(ResponseBody::Own))
}

enum Failed {
    Refused(Refusal),
    App(AppError),
}

fn begin_span(inbound: &Inbound, request: &Request<RecvBody>, leg: &LegIdentity) -> Span {
    let parent = request.headers().get(&TRACEPARENT).and_then(|value| value.to_str().ok()?.parse().ok());
    let mut span = inbound.tracer.span(Kind::Server, "request", parent);
    if span.is_recording() {
        span.attr("http.request.method", request.method());
        span.attr("url.path", request.uri().path());
        span.attr("tombolo.service", &leg.target.service);
        span.attr_int("server.port", leg.target.port.into());
        span.attr("tombolo.client_id", &leg.client_id);
        span.attr("tombolo.client_cluster", &leg.client_cluster);
    }
    span
}

/// 421 for what this sidecar does not deliver: the request may be right elsewhere (RFC 9110 section 15.5.20).
fn refuse(
    inbound: &Inbound,
    refusal: Refusal,
    leg: &LegIdentity,
    asked: &HeaderMap,
    span: &mut Span,
) -> Response<ResponseBody> {
    inbound.observed.refused(refusal);
    span.error(refusal);
    tracing::debug!(client = %leg.client_id, target = %leg.target, refusal = refusal.code(), "request refused");
    let detail = format!("{} for {}", leg.target, leg.client_id);
    let mut response = Refused::new(refusal, detail).respond(asked);
    let is_grpc = response.status() == StatusCode::OK;
    match refusal {
        _ if is_grpc => {}
        Refusal::UnknownService | Refusal::UnknownPort | Refusal::TargetMismatch => {
            *response.status_mut() = StatusCode::MISDIRECTED_REQUEST;
        }
        // Here it is the client that lacks the right, whatever the service's name is good for elsewhere.
        Refusal::NotExported => *response.status_mut() = StatusCode::FORBIDDEN,
        _ => {}
    }
    response.map(ResponseBody::Own)
}

async fn forward(
    inbound: &Inbound,
    app: &Arc<App>,
    mut request: Request<RecvBody>,
    leg: &LegIdentity,
    span: &Span,
) -> Result<Response<AppBody>, Failed> {
    let own = inbound.svid.current().map(|svid| svid.id.clone());
    let own = own.ok_or(Failed::App(AppError::NeverReached(Refusal::NoCertificate)))?;
    let speaks_http2 = app.speaks_http2(headers::says_http2(request.headers()));
    headers::strip_own(request.headers_mut());
    request.headers_mut().insert(headers::CLIENT_CERT, client_cert(&own, &leg.client_id));
    if let Some(context) = span.context().filter(|_| span.is_recording()) {
        let value = HeaderValue::from_str(&context.to_string()).expect("hex digits and dashes");
        request.headers_mut().insert(TRACEPARENT, value);
    }
    let mut response = if speaks_http2 {
        let asks = request.extensions_mut().remove::<ContinueSignal>();
        headers::strip_hop_by_hop(request.headers_mut());
        if let Some(asks) = asks {
            // An HTTP/2 application takes the body as it comes, so that it is asked for at once.
            request.headers_mut().remove(header::EXPECT);
            asks.send();
        }
        app.send_http2(request, &own).await.map_err(Failed::App)?
    } else {
        send_http1(app, request).await?
    };
    headers::strip_hop_by_hop(response.headers_mut());
    // The caller takes them for the word of this sidecar.
    headers::strip_own(response.headers_mut());
    *response.version_mut() = Version::HTTP_2;
    Ok(response)
}

/// The header that tells the application who calls. What the caller itself wrote under this name is replaced.
fn client_cert(own: &SpiffeId, client: &SpiffeId) -> HeaderValue {
    HeaderValue::from_str(&format!("By={own};URI={client}")).expect("SPIFFE IDs are visible ASCII")
}

async fn send_http1(app: &Arc<App>, mut request: Request<RecvBody>) -> Result<Response<AppBody>, Failed> {
    if let Some(asks) = request.extensions_mut().remove::<ContinueSignal>() {
        hyper::ext::on_informational(&mut request, move |interim| {
            if interim.status() == StatusCode::CONTINUE {
                asks.send();
            }
        });
    }
    headers::to_http1(&mut request).map_err(|_| Failed::Refused(Refusal::BadRequest))?;
    let extended = request.extensions().get::<h2::ext::Protocol>().is_some();
    if !extended && request.method() != Method::CONNECT {
        return app.send_http1(request).await.map_err(Failed::App);
    }
    let accept = upgrade::to_http1_upgrade(&mut request, rand::random());
    // The request itself has no body: what follows belongs to the other protocol.
    let (parts, from_client) = request.into_parts();
    let request = Request::from_parts(parts, RecvBody::empty());
    let mut response = app.send_http1(request).await.map_err(Failed::App)?;
    let switched =
        response.status() == StatusCode::SWITCHING_PROTOCOLS || (!extended && response.status().is_success());
    if !switched {
        return Ok(response);
    }
    let given = response.headers_mut().remove(header::SEC_WEBSOCKET_ACCEPT);
    if accept.is_some() && accept != given {
        return Err(Failed::App(AppError::Broken("the application answered another WebSocket key".into())));
    }
    let upgraded =
        hyper::upgrade::on(&mut response).await.map_err(|error| Failed::App(AppError::Broken(error.into())))?;
    let (read, mut write) = tokio::io::split(TokioIo::new(upgraded));
    tokio::spawn(async move {
        // When the client resets, both halves go and the application's connection with them.
        if let Err(error) = write_body(from_client, &mut write).await {
            tracing::debug!(%error, "an upgraded connection broke off");
        }
    });
    *response.status_mut() = StatusCode::OK;
    Ok(response.map(|body| body.switched(read)))
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::App { body, span, standing } => {
                let mut frame = Pin::new(body).poll_frame(cx);
                let denied = standing.as_mut().map(|standing| standing.poll_denied(cx, frame.is_pending()));
                if let (Some(Poll::Ready(refusal)), false) = (denied, matches!(frame, Poll::Ready(None))) {
                    // It is asked no more.
                    *standing = None;
                    frame = Poll::Ready(Some(Err(refusal.to_string().into())));
                }
                match &frame {
                    Poll::Ready(Some(Err(error))) => {
                        if let Some(mut span) = span.take() {
                            span.error(error);
                        }
                    }
                    Poll::Ready(None) => *span = None,
                    Poll::Ready(Some(Ok(_))) | Poll::Pending => {}
                }
                frame
            }
            Self::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::App { body, .. } => body.is_end_stream(),
            Self::Own(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::App { body, .. } => body.size_hint(),
            Self::Own(body) => body.size_hint(),
        }
    }
}
