//! HTTPS for the API server: two paths, one method, everything bounded.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tombolo_core::id::ClusterId;
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;
use tombolo_runtime::metrics::prometheus_client::metrics::family::Family;

use super::admission::{Injector, NotAnswered, Verdict};
use super::validation;

/// Where the API server asks about Pods, and about what tombolo reads.
const INJECT: &str = "/inject";
const VALIDATE: &str = "/validate";
/// Connections at once; more wait to be accepted. An API server keeps one or two.
const CONNECTIONS_MAX: usize = 64;
/// Questions under way at once; more wait their turn.
const QUESTIONS_MAX: usize = 32;
/// Largest question: an object may have 1.5 MiB, and is sent with what it was before.
const QUESTION_OCTETS_MAX: usize = 4 * 1024 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    webhook: &'static str,
    outcome: &'static str,
}

/// The listening server.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    shared: Arc<Shared>,
}

struct Shared {
    injector: Injector,
    cluster: ClusterId,
    questions: Semaphore,
    outcomes: Family<OutcomeLabels, Counter>,
}

impl Server {
    pub fn new(
        listener: TcpListener,
        tls: Arc<ServerConfig>,
        injector: Injector,
        cluster: ClusterId,
        metrics: &Metrics,
    ) -> Self {
        let help = "Objects that the API server asked about, by webhook and outcome";
        let outcomes = metrics.counters("tombolo_admissions", help);
        let shared = Shared { injector, cluster, questions: Semaphore::new(QUESTIONS_MAX), outcomes };
        Self { listener, acceptor: TlsAcceptor::from(tls), shared: Arc::new(shared) }
    }

    pub async fn run(self) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let place = places.clone().acquire_owned().await.expect("never closed");
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let (acceptor, shared) = (self.acceptor.clone(), self.shared.clone());
                    tokio::spawn(async move {
                        serve(stream, address, acceptor, shared).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the webhook can't accept; is the limit of open files reached?");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn serve(stream: TcpStream, address: SocketAddr, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    let stream = match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return tracing::info!(%address, %error, "a connection to the webhook has no TLS that works; does the API server have the right caBundle?");
        }
        Err(_) => return,
    };
    let service = service_fn(move |request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(shared.answer(request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%address, %error, "a connection to the webhook failed");
    }
}

impl Shared {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let webhook = match request.uri().path() {
            INJECT => "inject",
            VALIDATE => "validate",
            _ => {
                return text(StatusCode::NOT_FOUND, format!("these are tombolo's webhooks, {INJECT} and {VALIDATE}\n"));
            }
        };
        if *request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "an AdmissionReview is posted\n".into());
        }
        let body = Limited::new(request.into_body(), QUESTION_OCTETS_MAX);
        let Ok(Ok(body)) = timeout(BODY_TIMEOUT, body.collect()).await else {
            return text(StatusCode::BAD_REQUEST, format!("no body of at most {QUESTION_OCTETS_MAX} octets came\n"));
        };
        let _turn = self.questions.acquire().await.expect("never closed");
        let review: Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
        let answered = match webhook {
            "inject" => self.injector.answer(&review).await.map(|(answer, verdict)| {
                let refused = if let Verdict::Refused(refused) = &verdict { Some(refused.to_string()) } else { None };
                (answer, verdict.code(), refused)
            }),
            _ => validation::answer(&review, &self.cluster)
                .map(|(answer, refused)| (answer, if refused.is_some() { "refused" } else { "allowed" }, refused)),
        };
        match answered {
            Ok((answer, outcome, refused)) => {
                self.count(webhook, outcome);
                if let Some(reason) = refused {
                    let namespace = review["request"]["namespace"].as_str();
                    tracing::info!(webhook, namespace, reason, "an object is refused");
                }
                response(StatusCode::OK, "application/json", answer.to_string())
            }
            Err(error) => {
                self.count(webhook, "failed");
                tracing::warn!(webhook, %error, "the API server's question has no answer");
                let status = match error {
                    NotAnswered::Malformed(_) => StatusCode::BAD_REQUEST,
                    NotAnswered::Api(_) | NotAnswered::Timeout => StatusCode::INTERNAL_SERVER_ERROR,
                };
                text(status, format!("{error}\n"))
            }
        }
    }

    fn count(&self, webhook: &'static str, outcome: &'static str) {
        self.outcomes.get_or_create_owned(&OutcomeLabels { webhook, outcome }).inc();
    }
}

fn text(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", text)
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let response = Response::builder().status(status).header(CONTENT_TYPE, content_type);
    response.body(Full::from(body)).expect("all parts are valid")
}
