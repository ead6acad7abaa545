//! Applications for the tests, in the test's own process.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

/// A running application; it ends, with its connections, when dropped.
pub struct App {
    pub address: SocketAddr,
    task: AbortHandle,
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Body = BoxBody<Bytes, Infallible>;

/// HTTP/1.1: `/` says the name and the verified caller, `/echo` gives the body back as it comes,
/// `/forge` pretends to be tombolo and says which fields it got, `/drip` sends a line every 100 ms for as many seconds as the query says.
pub async fn http(name: &'static str) -> App {
    http_at(name, SocketAddr::from(([127, 0, 0, 1], 0))).await
}

pub async fn http_at(name: &'static str, address: SocketAddr) -> App {
    http_on(name, TcpListener::bind(address).await.unwrap())
}

pub fn http_on(name: &'static str, listener: TcpListener) -> App {
    let address = listener.local_addr().unwrap();
    let serve = async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let service = service_fn(move |request| answer(name, request));
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    };
    App { address, task: tokio::spawn(serve).abort_handle() }
}

async fn answer(name: &str, request: Request<Incoming>) -> Result<Response<Body>, hyper::Error> {
    let header = |key: &str| request.headers().get(key).and_then(|value| value.to_str().ok()).unwrap_or("-").to_owned();
    let body = match request.uri().path() {
        "/echo" => {
            let whole = request.into_body().collect().await?.to_bytes();
            Full::new(whole).boxed()
        }
        "/forge" => {
            let names: Vec<&str> = request.headers().keys().map(|name| name.as_str()).collect();
            let mut response = Response::new(Full::new(Bytes::from(names.join(" "))).boxed());
            for (name, value) in [("tombolo-refusal", "no-tunnel"), ("tombolo-cluster", "mars")] {
                response.headers_mut().insert(name, hyper::header::HeaderValue::from_static(value));
            }
            return Ok(response);
        }
        "/drip" => {
            let seconds: u64 = request.uri().query().and_then(|query| query.parse().ok()).unwrap_or(1);
            let lines = futures::stream::unfold(0, move |index| async move {
                if index == seconds * 10 {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                Some((Ok(Frame::data(Bytes::from(format!("line {index}\n")))), index + 1))
            });
            StreamBody::new(lines).boxed()
        }
        path => {
            let (caller, host) = (header("x-forwarded-client-cert"), header("host"));
            Full::new(Bytes::from(format!("{name} path={path} caller={caller} host={host}\n"))).boxed()
        }
    };
    Ok(Response::new(body))
}

/// TCP where the server speaks first: a banner, then every byte back, until the client is done.
pub async fn banner(banner: &'static str) -> App {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                stream.write_all(banner.as_bytes()).await?;
                let mut everything = Vec::new();
                stream.read_to_end(&mut everything).await?;
                // Only after the client's half-close: so the half-close must have crossed.
                stream.write_all(&everything).await?;
                stream.shutdown().await
            });
        }
    };
    App { address, task: tokio::spawn(serve).abort_handle() }
}

/// TCP that never stops sending.
pub async fn flood() -> App {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let chunk = vec![7; 64 * 1024];
                while stream.write_all(&chunk).await.is_ok() {}
            });
        }
    };
    App { address, task: tokio::spawn(serve).abort_handle() }
}
