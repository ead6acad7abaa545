//! Spans reach an OTLP receiver over gRPC on loopback.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span as ReceivedSpan};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tombolo_core::trace::{SpanLink, TraceParent};
use tombolo_runtime::telemetry::{Kind, TelemetryConfig, Tracer};
use tonic::{Request, Response, Status};

#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<ResourceSpans>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().extend(request.into_inner().resource_spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    async fn start() -> (Self, String) {
        let receiver = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(receiver.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (receiver, endpoint)
    }

    fn spans(&self) -> Vec<ReceivedSpan> {
        let received = self.0.lock().unwrap();
        received.iter().flat_map(|resource| &resource.scope_spans).flat_map(|scope| scope.spans.clone()).collect()
    }

    fn service_names(&self) -> Vec<String> {
        let received = self.0.lock().unwrap();
        let attributes = received.iter().flat_map(|resource| &resource.resource.as_ref().unwrap().attributes);
        let names = attributes.filter(|attribute| attribute.key == "service.name");
        names
            .map(|attribute| match attribute.value.as_ref().unwrap().value.as_ref().unwrap() {
                Value::StringValue(name) => name.clone(),
                other => panic!("{other:?}"),
            })
            .collect()
    }
}

fn tracer(endpoint: &str, sample_ratio: f64) -> Tracer {
    let config = TelemetryConfig { otlp: Some(endpoint.to_owned()), sample_ratio, ..TelemetryConfig::default() };
    Tracer::new(&config, "tombolo-sidecar", &[("tombolo.cluster", "east".into())]).unwrap()
}

fn parent(flags: &str) -> TraceParent {
    format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}").parse().unwrap()
}

// On one thread, which is how a small role runs: flushing must not block the exporter's own connection.
#[tokio::test(flavor = "current_thread")]
async fn spans_arrive_with_parents_links_and_attributes() {
    let (receiver, endpoint) = Receiver::start().await;
    let tracer = tracer(&endpoint, 1.0);
    let gateway = SpanLink { trace_id: [7; 16], span_id: [9; 8] };

    let mut client = tracer.span(Kind::Client, "request", Some(parent("01")));
    client.attr("tombolo.path", "east>west");
    client.attr_int("http.response.status_code", 503);
    client.link(gateway);
    client.error("no-endpoint");
    let server = tracer.span(Kind::Server, "serve", client.context());
    let (client_context, server_context) = (client.context().unwrap(), server.context().unwrap());
    assert!(client.is_recording());
    assert_eq!(client.link_to_self(), Some(client_context.span()));
    drop(server);
    drop(client);
    tracer.shutdown().await;

    let spans = receiver.spans();
    assert_eq!(spans.len(), 2, "{spans:#?}");
    let client = spans.iter().find(|span| span.name == "request").unwrap();
    let server = spans.iter().find(|span| span.name == "serve").unwrap();
    assert_eq!(client.trace_id, parent("01").trace_id);
    assert_eq!(client.parent_span_id, parent("01").span_id);
    assert_eq!(client.span_id, client_context.span_id);
    assert_eq!(client.kind, SpanKind::Client as i32);
    assert_eq!(client.status.as_ref().unwrap().message, "no-endpoint");
    assert_eq!((&client.links[0].trace_id, &client.links[0].span_id), (&vec![7; 16], &vec![9; 8]));
    let keys: Vec<_> = client.attributes.iter().map(|attribute| attribute.key.as_str()).collect();
    assert_eq!(keys, ["tombolo.path", "http.response.status_code"]);
    assert_eq!(server.trace_id, client.trace_id);
    assert_eq!(server.parent_span_id, client.span_id);
    assert_eq!(server.span_id, server_context.span_id);
    assert_eq!(server.kind, SpanKind::Server as i32);
    assert_eq!(receiver.service_names(), ["tombolo-sidecar"]);
}

#[tokio::test]
async fn the_callers_sampling_decision_is_kept() {
    let (receiver, endpoint) = Receiver::start().await;
    let all = tracer(&endpoint, 1.0);
    let unsampled = all.span(Kind::Client, "unsampled", Some(parent("00")));
    assert!(!unsampled.is_recording());
    assert_eq!(unsampled.link_to_self(), None);
    let context = unsampled.context().unwrap();
    assert_eq!(context.trace_id, parent("00").trace_id);
    assert!(!context.is_sampled());
    drop(unsampled);

    let none = tracer(&endpoint, 0.0);
    assert!(!none.span(Kind::Client, "new", None).is_recording());
    assert!(none.span(Kind::Client, "sampled", Some(parent("01"))).is_recording());
    all.shutdown().await;
    none.shutdown().await;
    let names: Vec<_> = receiver.spans().into_iter().map(|span| span.name).collect();
    assert_eq!(names, ["sampled"]);
}

#[tokio::test]
async fn a_dead_receiver_holds_nobody_up() {
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", unused.local_addr().unwrap());
    drop(unused);
    let tracer = tracer(&endpoint, 1.0);
    let context = tracer.span(Kind::Client, "request", None).context().unwrap();
    assert!(context.is_sampled());
    let after = tracer.clone();
    tokio::time::timeout(Duration::from_secs(15), tracer.shutdown()).await.unwrap();
    // Spans begun after the end pass their parent through.
    assert_eq!(after.span(Kind::Client, "late", Some(parent("01"))).context(), Some(parent("01")));
}
