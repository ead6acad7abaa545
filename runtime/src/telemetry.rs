//! Spans over OTLP/gRPC, with W3C trace context. Without an exporter a span is its parent passed
//! through: one branch, no allocation, and trace context still crosses unaltered.

use std::fmt::{self, Display};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer as _, TracerProvider,
};
use opentelemetry::{Context as OtelContext, KeyValue};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span as SdkSpan,
};
use serde::{Deserialize, Serialize};
use tombolo_core::trace::{SpanLink, TraceParent};

use crate::config::Problem;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Where spans go, as `http://host:4317` (OTLP over gRPC). Absent: no spans.
    pub otlp: Option<String>,
    /// The share of traces begun here that are recorded, 0 to 1. A trace begun elsewhere keeps its
    /// caller's decision.
    pub sample_ratio: f64,
    /// The longest that a finished span waits to be sent.
    #[serde(with = "humantime_serde")]
    pub flush_interval: Duration,
}

/// Finished spans that wait to be sent; above this, spans are dropped and the exporter logs it.
const QUEUE_MAX: usize = 4096;
const BATCH_MAX: usize = 512;
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { otlp: None, sample_ratio: 1.0, flush_interval: Duration::from_secs(1) }
    }
}

impl TelemetryConfig {
    /// What is wrong with it; `field` is its place in the file.
    pub fn problems(&self, field: &str) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(otlp) = &self.otlp
            && (!otlp.starts_with("http://") || otlp.parse::<hyper::Uri>().is_err())
        {
            problems.push(Problem::new(format!("{field}.otlp"), "write http://host:port, the OTLP/gRPC endpoint"));
        }
        if self.otlp.as_ref().is_some_and(|otlp| otlp.contains('@')) {
            let reason = "no credentials in the address: it is shown on the admin port and in logs";
            problems.push(Problem::new(format!("{field}.otlp"), reason));
        }
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            problems.push(Problem::new(format!("{field}.sampleRatio"), "write a number from 0 to 1"));
        }
        problems
    }
}

#[derive(Debug, thiserror::Error)]
#[error("telemetry.otlp: {0}")]
pub struct TelemetryError(#[from] opentelemetry_otlp::ExporterBuildError);

#[derive(Clone, Default)]
pub enum Tracer {
    /// No exporter is configured.
    #[default]
    Off,
    On(Box<Recorder>),
}

/// Where the spans of one service go.
#[derive(Clone)]
pub struct Recorder {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

/// Which side of a call a span describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Client,
    Server,
    Internal,
}

impl Tracer {
    /// `service` and `attributes` name the process in every span. Must be called inside a tokio runtime.
    pub fn new(
        config: &TelemetryConfig,
        service: &str,
        attributes: &[(&'static str, String)],
    ) -> Result<Self, TelemetryError> {
        let Some(otlp) = &config.otlp else { return Ok(Tracer::Off) };
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(otlp)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let batch = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_MAX)
            .with_max_export_batch_size(BATCH_MAX)
            .with_scheduled_delay(config.flush_interval)
            .build();
        let resource = Resource::builder_empty()
            .with_service_name(service.to_owned())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attributes(attributes.iter().map(|(key, value)| KeyValue::new(*key, value.clone())))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batch).build())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio))))
            .with_resource(resource)
            .build();
        Ok(Tracer::On(Box::new(Recorder { tracer: provider.tracer("tombolo"), provider })))
    }

    pub fn is_on(&self) -> bool {
        matches!(self, Tracer::On(_))
    }

    /// Begins a span that ends when it is dropped. Without a parent it begins a trace.
    pub fn span(&self, kind: Kind, name: &'static str, parent: Option<TraceParent>) -> Span {
        match self {
            Tracer::Off => Span::Off { parent },
            Tracer::On(recorder) => recorder.span(kind, name, parent, None),
        }
    }

    /// As [`span`](Self::span), for what began at `start`.
    pub fn span_since(&self, start: SystemTime, kind: Kind, name: &'static str, parent: Option<TraceParent>) -> Span {
        match self {
            Tracer::Off => Span::Off { parent },
            Tracer::On(recorder) => recorder.span(kind, name, parent, Some(start)),
        }
    }

    /// Sends what is recorded and ends the exporter. Spans begun later pass their parents through.
    pub async fn shutdown(self) {
        let Tracer::On(recorder) = self else { return };
        // The exporter blocks until its thread is done, which needs this runtime to go on.
        let flush = tokio::task::spawn_blocking(move || recorder.provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT));
        match flush.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans could not be sent to telemetry.otlp"),
            Err(error) => tracing::warn!(%error, "flushing spans failed"),
        }
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_on() { "Tracer::On" } else { "Tracer::Off" })
    }
}

impl Recorder {
    fn span(&self, kind: Kind, name: &'static str, parent: Option<TraceParent>, start: Option<SystemTime>) -> Span {
        let kind = match kind {
            Kind::Client => SpanKind::Client,
            Kind::Server => SpanKind::Server,
            Kind::Internal => SpanKind::Internal,
        };
        let mut builder = SpanBuilder::from_name(name).with_kind(kind);
        builder.start_time = start;
        let mut scope = OtelContext::new();
        if let Some(parent) = parent {
            scope = scope.with_remote_span_context(remote(parent));
        }
        let span = self.tracer.build_with_context(builder, &scope);
        // After shutdown the tracer makes spans without a context.
        if span.span_context().is_valid() { Span::On(Box::new(span)) } else { Span::Off { parent } }
    }
}

fn remote(parent: TraceParent) -> SpanContext {
    let flags = TraceFlags::new(parent.flags);
    let (trace_id, span_id) = (TraceId::from_bytes(parent.trace_id), SpanId::from_bytes(parent.span_id));
    SpanContext::new(trace_id, span_id, flags, true, TraceState::NONE)
}

/// A span under way; it ends when it is dropped.
pub enum Span {
    Off { parent: Option<TraceParent> },
    On(Box<SdkSpan>),
}

impl Span {
    /// The context for what happens inside this span; without tracing, its parent unaltered.
    pub fn context(&self) -> Option<TraceParent> {
        match self {
            Span::Off { parent } => *parent,
            Span::On(span) => {
                let context = span.span_context();
                Some(TraceParent {
                    trace_id: context.trace_id().to_bytes(),
                    span_id: context.span_id().to_bytes(),
                    flags: context.trace_flags().to_u8(),
                })
            }
        }
    }

    /// This span, for others to link to; `None` when it is not recorded.
    pub fn link_to_self(&self) -> Option<SpanLink> {
        if self.is_recording() { self.context().map(|context| context.span()) } else { None }
    }

    /// Whether attributes go anywhere: ask before computing a costly one.
    pub fn is_recording(&self) -> bool {
        match self {
            Span::Off { .. } => false,
            Span::On(span) => span.is_recording(),
        }
    }

    /// Nothing is formatted unless the span is recorded.
    pub fn attr(&mut self, key: &'static str, value: impl Display) {
        if let Span::On(span) = self {
            span.set_attribute(KeyValue::new(key, value.to_string()));
        }
    }

    pub fn attr_int(&mut self, key: &'static str, value: i64) {
        if let Span::On(span) = self {
            span.set_attribute(KeyValue::new(key, value));
        }
    }

    pub fn link(&mut self, to: SpanLink) {
        if let Span::On(span) = self {
            let (trace_id, span_id) = (TraceId::from_bytes(to.trace_id), SpanId::from_bytes(to.span_id));
            span.add_link(SpanContext::new(trace_id, span_id, TraceFlags::SAMPLED, true, TraceState::NONE), Vec::new());
        }
    }

    pub fn ok(&mut self) {
        if let Span::On(span) = self {
            span.set_status(Status::Ok);
        }
    }

    pub fn error(&mut self, reason: impl Display) {
        if let Span::On(span) = self {
            span.set_status(Status::error(reason.to_string()));
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Span").field(&self.context()).finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn without_an_exporter_the_parent_passes_through() {
        let tracer = Tracer::new(&TelemetryConfig::default(), "sidecar", &[]).unwrap();
        assert!(!tracer.is_on());
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok();
        let mut span = tracer.span(Kind::Client, "request", parent);
        span.attr("key", "value");
        span.link(parent.unwrap().span());
        assert_eq!(span.context(), parent);
        assert_eq!(span.link_to_self(), None);
        assert_eq!(tracer.span(Kind::Client, "request", None).context(), None);
        tracer.shutdown().await;
    }

    #[test]
    fn bad_settings_are_named() {
        let config = TelemetryConfig { otlp: Some("localhost:4317".into()), sample_ratio: 2.0, ..Default::default() };
        let fields: Vec<_> = config.problems("telemetry").into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["telemetry.otlp", "telemetry.sampleRatio"]);
        let config = TelemetryConfig { otlp: Some("http://user:secret@collector:4317".into()), ..Default::default() };
        assert!(config.problems("telemetry").iter().any(|problem| problem.reason.contains("no credentials")));
    }
}
