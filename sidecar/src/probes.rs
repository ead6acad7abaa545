//! Answers probes in the application's place: of a kubelet, whose plaintext may not come in where capture is strict. Each path
//! stands for one question, which the application is asked then and there on loopback.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tombolo_runtime::config::Problem;
use tombolo_runtime::drain::DrainWatch;

use crate::config::{GrpcCheck, HttpCheck, TcpCheck};
use crate::health::Check;

/// Connections served at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is closed after this long whatever it does.
const CONNECTION_LIFE: Duration = Duration::from_secs(90);
const TARGETS_MAX: usize = 128;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where probes are answered, and what each asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProbesConfig {
    pub listen: SocketAddr,
    pub targets: Vec<ProbeConfig>,
}

/// One question.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProbeConfig {
    /// Of the request that asks it.
    pub path: String,
    /// host:port of the application.
    pub app: String,
    pub http: Option<HttpCheck>,
    pub grpc: Option<GrpcCheck>,
    /// A TCP connection that is accepted passes. This is the question if no other is given.
    pub tcp: Option<TcpCheck>,
    #[serde(with = "humantime_serde", default = "default_timeout")]
    pub timeout: Duration,
}

fn default_timeout() -> Duration {
    Duration::from_secs(1)
}

impl ProbesConfig {
    pub fn problems(&self, problems: &mut Vec<Problem>) {
        if !(1..=TARGETS_MAX).contains(&self.targets.len()) {
            problems.push(Problem::new("probes.targets", format!("write one to {TARGETS_MAX}")));
        }
        for (n, target) in self.targets.iter().enumerate() {
            let field = |name: &str| format!("probes.targets[{n}].{name}");
            if !target.path.starts_with('/') {
                problems.push(Problem::new(field("path"), "a path begins with /"));
            } else if self.targets[..n].iter().any(|other| other.path == target.path) {
                problems.push(Problem::new(field("path"), "two targets have this path"));
            }
            let kinds = [target.http.is_some(), target.grpc.is_some(), target.tcp.is_some()];
            if kinds.into_iter().filter(|given| *given).count() > 1 {
                problems.push(Problem::new(field("http"), "write only one of http, grpc and tcp"));
            }
            if target.timeout.is_zero() {
                problems.push(Problem::new(field("timeout"), "nothing answers in no time"));
            }
        }
    }
}

struct Target {
    check: Check,
    timeout: Duration,
}

type Targets = Arc<BTreeMap<String, Target>>;

/// Binds, and answers until the process has drained: while it drains the application is still there to be asked.
pub async fn start(config: &ProbesConfig, drain: DrainWatch) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.with_context(|| format!("probes.listen: can't listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let target = |target: &ProbeConfig| {
        let check = Check::new(&target.app, target.http.as_ref(), target.grpc.as_ref());
        (target.path.clone(), Target { check, timeout: target.timeout })
    };
    let targets: Targets = Arc::new(config.targets.iter().map(target).collect());
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, targets) => {}
            () = drain.stopped() => {}
        }
    });
    Ok(address)
}

async fn accept(listener: TcpListener, targets: Targets) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let targets = targets.clone();
                tokio::spawn(async move {
                    serve(stream, targets).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the probes' port can't accept; is the limit of open files reached?");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, targets: Targets) {
    let service = service_fn(move |request: Request<Incoming>| {
        let targets = targets.clone();
        async move { Ok::<_, Infallible>(answer(&request, &targets).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = timeout(CONNECTION_LIFE, connection).await {
        tracing::debug!(%error, "a probe's connection failed");
    }
}

async fn answer(request: &Request<Incoming>, targets: &BTreeMap<String, Target>) -> Response<Full<Bytes>> {
    let (status, text) = match targets.get(request.uri().path()) {
        _ if !matches!(*request.method(), Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, "probes are asked with GET\n".to_owned())
        }
        None => {
            (StatusCode::NOT_FOUND, "no probe has this path; see probes in the sidecar's configuration\n".to_owned())
        }
        Some(target) => match timeout(target.timeout, target.check.run()).await {
            Ok(Ok(())) => (StatusCode::OK, "ok\n".to_owned()),
            Ok(Err(reason)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            Err(_) => (StatusCode::GATEWAY_TIMEOUT, format!("no answer within {:?}\n", target.timeout)),
        },
    };
    Response::builder().status(status).body(Full::from(text)).expect("all parts are valid")
}
