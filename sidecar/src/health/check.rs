//! One check of one application: a TCP connection, an HTTP request, or the gRPC health protocol.

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tonic::transport::{Channel, Endpoint};

use crate::config::{GrpcCheck, HttpCheck};

/// What is asked of an application. Any answer but a good one is a failure, with its reason.
pub enum Check {
    Tcp { address: String },
    Http { address: String, http: HttpCheck },
    Grpc { channel: Result<Channel, String>, service: String },
}

impl Check {
    /// A TCP connection is the check if no other is given.
    pub fn new(app: &str, http: Option<&HttpCheck>, grpc: Option<&GrpcCheck>) -> Self {
        let address = app.to_owned();
        if let Some(grpc) = grpc {
            let endpoint = Endpoint::from_shared(format!("http://{address}"));
            let channel = endpoint.map(|endpoint| endpoint.connect_lazy()).map_err(|error| error.to_string());
            return Self::Grpc { channel, service: grpc.service.clone() };
        }
        match http {
            Some(http) => Self::Http { address, http: http.clone() },
            None => Self::Tcp { address },
        }
    }

    pub async fn run(&self) -> Result<(), String> {
        match self {
            Self::Tcp { address } => connect(address).await.map(drop),
            Self::Http { address, http } => get(address, http).await,
            Self::Grpc { channel, service } => grpc(channel.clone()?, service).await,
        }
    }
}

async fn connect(address: &str) -> Result<TcpStream, String> {
    TcpStream::connect(address).await.map_err(|error| format!("{address}: {error}"))
}

/// On a connection of its own, so that one that is stuck is not asked again.
async fn get(address: &str, check: &HttpCheck) -> Result<(), String> {
    let text = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = http1::handshake(TokioIo::new(connect(address).await?)).await.map_err(text)?;
    let _driver = AbortOnDrop(tokio::spawn(connection).abort_handle());
    let path = &check.path;
    let mut request = Request::get(path).header(header::CONNECTION, "close");
    let named = |name: &str| check.headers.keys().any(|given| given.eq_ignore_ascii_case(name));
    if !named("host") {
        request = request.header(header::HOST, address);
    }
    if !named("user-agent") {
        request = request.header(header::USER_AGENT, concat!("tombolo/", env!("CARGO_PKG_VERSION")));
    }
    for (name, value) in &check.headers {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
    let status = sender.send_request(request).await.map_err(text)?.status();
    if status.is_success() || status.is_redirection() { Ok(()) } else { Err(format!("GET {path} answered {status}")) }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// `grpc.health.v1.HealthCheckRequest` (grpc/health/v1/health.proto).
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`; 1 is SERVING.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SERVING: i32 = 1;

async fn grpc(channel: Channel, service: &str) -> Result<(), String> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| describe(&error))?;
    let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec = tonic_prost::ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
    let request = tonic::Request::new(HealthCheckRequest { service: service.to_owned() });
    let answer = client.unary(request, path, codec).await.map_err(|status| status.to_string())?;
    let status = answer.into_inner().status;
    if status == SERVING { Ok(()) } else { Err(format!("the health service answered status {status}")) }
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
