//! The admin port: read-only for ever, plain HTTP/1.1, on loopback unless configured otherwise. Health,
//! readiness, metrics, and the configuration and state that the process runs with, without secrets.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::metrics::Metrics;
use crate::readiness::Readiness;

/// Connections served at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 32;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is closed after this long whatever it does, so that idle ones can't use up the limit.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);
const HEADER_BYTES_MAX: usize = 16 * 1024;

/// What the process is doing, computed when asked for.
pub type StateView = Arc<dyn Fn() -> Value + Send + Sync>;

/// What a question is answered with: a status, and a JSON document.
pub type Answer = Pin<Box<dyn Future<Output = (StatusCode, Value)> + Send>>;

/// A question to the process, asked with the query of a GET, by callers of this machine alone. An answer changes nothing
/// that anybody else could see.
pub type Question = Arc<dyn Fn(&str) -> Answer + Send + Sync>;

/// Questions by their path.
pub type Questions = BTreeMap<&'static str, Question>;

/// The running admin server; it ends when this is dropped.
#[derive(Debug)]
pub struct Admin {
    address: SocketAddr,
    _stop: DropGuard,
}

struct Pages {
    metrics: Metrics,
    readiness: Readiness,
    config: Value,
    state: StateView,
    questions: Questions,
}

impl Admin {
    /// `config` and `state` are shown to whoever can reach `address`: no secrets.
    pub async fn start(
        address: SocketAddr,
        metrics: Metrics,
        readiness: Readiness,
        config: Value,
        state: StateView,
    ) -> std::io::Result<Self> {
        Self::start_with(address, metrics, readiness, config, state, Questions::new()).await
    }

    /// As [`start`](Self::start), for a process that also answers questions.
    pub async fn start_with(
        address: SocketAddr,
        metrics: Metrics,
        readiness: Readiness,
        config: Value,
        state: StateView,
        questions: Questions,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "the admin port is open to other machines; it shows configuration and state");
        }
        let stop = CancellationToken::new();
        let pages = Arc::new(Pages { metrics, readiness, config, state, questions });
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(listener, pages)));
        Ok(Self { address, _stop: stop.drop_guard() })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept(listener: TcpListener, pages: Arc<Pages>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        match listener.accept().await {
            Ok((stream, caller)) => {
                let pages = pages.clone();
                tokio::spawn(async move {
                    serve(stream, caller, pages).await;
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: it passes, and spinning would not help.
                tracing::warn!(%error, "the admin port can't accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, caller: SocketAddr, pages: Arc<Pages>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let pages = pages.clone();
        async move { Ok::<_, Infallible>(pages.answer(&request, caller).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIFE, connection).await {
        tracing::debug!(%error, "an admin connection failed");
    }
}

impl Pages {
    async fn answer(&self, request: &Request<Incoming>, caller: SocketAddr) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "the admin port is read-only\n".into());
            response.headers_mut().insert(ALLOW, "GET, HEAD".parse().expect("a valid header"));
            return response;
        }
        if let Some(question) = self.questions.get(request.uri().path()) {
            if !caller.ip().to_canonical().is_loopback() {
                return text(StatusCode::FORBIDDEN, "this is answered to callers of this machine alone\n".into());
            }
            let (status, answer) = question(request.uri().query().unwrap_or_default()).await;
            return response(status, "application/json", format!("{answer:#}\n"));
        }
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok\n".into()),
            "/readyz" => self.readyz(),
            "/metrics" => response(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                self.metrics.encode(),
            ),
            "/config" => json(&self.config),
            "/state" => json(&(self.state)()),
            _ => {
                let questions: String = self.questions.keys().map(|path| format!(" {path}")).collect();
                text(StatusCode::NOT_FOUND, format!("see /livez /readyz /metrics /config /state{questions}\n"))
            }
        }
    }

    fn readyz(&self) -> Response<Full<Bytes>> {
        let states = self.readiness.states();
        let lines = states.iter().map(|state| match &state.why_not {
            None => format!("[+] {}\n", state.name),
            Some(why_not) => format!("[-] {}: {why_not}\n", state.name),
        });
        let ready = states.iter().all(|state| state.why_not.is_none());
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let verdict = if ready { "ready\n" } else { "not ready\n" };
        text(status, lines.chain([verdict.to_owned()]).collect())
    }
}

fn json(value: &Value) -> Response<Full<Bytes>> {
    response(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", body)
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let builder =
        Response::builder().status(status).header(CONTENT_TYPE, content_type).header(CACHE_CONTROL, "no-store");
    builder.body(Full::from(body)).expect("all parts are valid")
}
