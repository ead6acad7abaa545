//! The small HTTP application of the demo: it answers with its name and with what it was told about its caller.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderValue;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use crate::args::DemoAppOptions;

/// What the application answers; the demo reads it back.
#[derive(Debug, Serialize, Deserialize)]
pub struct Greeting {
    pub app: String,
    pub path: String,
    /// `x-forwarded-client-cert`, set by the sidecar from the identity that it verified.
    pub caller: Option<String>,
    pub traceparent: Option<String>,
}

pub fn run(options: DemoAppOptions) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener =
            TcpListener::bind(options.listen).await.with_context(|| format!("listening on {}", options.listen))?;
        let address = listener.local_addr()?.to_string();
        std::fs::write(&options.announce, address)
            .with_context(|| format!("writing {}", options.announce.display()))?;
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors, most likely: connections that end give some back.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let name = options.name.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| answer(&name, request));
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    })
}

async fn answer(name: &str, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let header = |key: &str| request.headers().get(key).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let greeting = Greeting {
        app: name.to_owned(),
        path: request.uri().path().to_owned(),
        caller: header("x-forwarded-client-cert"),
        traceparent: header("traceparent"),
    };
    let mut body = serde_json::to_vec(&greeting).unwrap_or_default();
    body.push(b'\n');
    let mut response = Response::new(Full::from(body));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
    // For clients that read no bodies.
    if let Ok(name) = HeaderValue::from_str(name) {
        response.headers_mut().insert("x-app", name);
    }
    Ok(response)
}
