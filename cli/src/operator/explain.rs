//! `tombolo explain`: which way a request would take now, and why. Asked of a running sidecar, at its admin port.

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::time::Duration;
use tokio::net::TcpStream;
use tombolo_sidecar::explain::PATH;
use tombolo_sidecar::outbound::question::{Access, Explanation, Outcome};

use super::client::block_on;
use super::table;
use crate::args::{ExplainCommand, Output};

/// A service that nobody used yet is asked for first.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(command: ExplainCommand) -> anyhow::Result<()> {
    let answer = block_on(async {
        let asking = ask(&command);
        tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| {
            bail!(
                "the sidecar at {} has not answered within {PATIENCE:?}; see http://{}/readyz",
                command.admin,
                command.admin
            )
        })
    })?;
    if command.output == Output::Json {
        anstream::println!("{answer:#}");
        return Ok(());
    }
    let explanation =
        serde_json::from_value(answer).context("reading the answer: is the sidecar of another release?")?;
    print(&explanation);
    Ok(())
}

async fn ask(command: &ExplainCommand) -> anyhow::Result<Value> {
    let admin = command.admin;
    let stream = TcpStream::connect(admin).await.with_context(|| {
        format!(
            "no sidecar answers at {admin}: name the `admin` address of its configuration with --admin; a running one \
             also writes it into sidecar.json in its state directory"
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("url", &command.url).append_pair("method", &command.method);
    if let Some(from) = &command.from {
        query.append_pair("from", from);
    }
    for (name, value) in &command.header {
        query.append_pair("header", &format!("{name}:{value}"));
    }
    let request = Request::get(format!("{PATH}?{}", query.finish())).header(HOST, admin.to_string());
    let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let answer = serde_json::from_slice::<Value>(&body);
    match (status, answer) {
        (StatusCode::OK, Ok(answer)) => Ok(answer),
        (_, Ok(answer)) if answer["error"]["text"].is_string() => {
            Err(anyhow!("{}", answer["error"]["text"].as_str().unwrap_or_default()))
        }
        (StatusCode::NOT_FOUND, _) => {
            bail!("what answers at {admin} is no sidecar: name the `admin` address of a sidecar with --admin")
        }
        (status, _) => bail!("{admin} answered {status}: {}", String::from_utf8_lossy(&body).trim()),
    }
}

fn print(explanation: &Explanation) {
    let Explanation { request, outcome, routes, backends, traffic_policies, limits, clusters, endpoints, access } =
        explanation;
    anstream::println!(
        "{} {} of {} port {}, from {}",
        request.method,
        request.path,
        request.service,
        request.port,
        request.from
    );
    if let Some(outcome) = outcome {
        anstream::println!("-> {}", said(outcome));
    }
    print_access(access);
    section("routes", &["", "resource", "rule", "why"], routes, |row| {
        vec![mark(row.taken), row.resource.clone(), optional(row.rule.as_ref()), row.reason.clone()]
    });
    section("backends of the rule", &["", "service", "port", "cluster", "weight", "why"], backends, |row| {
        let (port, cluster) =
            (row.port.to_string(), row.cluster.as_ref().map_or_else(|| "any".into(), ToString::to_string));
        vec![mark(row.taken), row.service.to_string(), port, cluster, row.weight.to_string(), row.reason.clone()]
    });
    section("policies", &["", "resource", "why"], traffic_policies, |row| {
        vec![mark(row.taken), row.resource.clone(), row.reason.clone()]
    });
    section("limits", &["limit", "at once", "state"], limits, |row| {
        vec![row.limit.clone(), row.max.to_string(), if row.open { "reached: refused" } else { "not reached" }.into()]
    });
    section("clusters", &["cluster", "where", "share", "weight", "why"], clusters, |row| {
        let place = if row.local { "local" } else { "remote" };
        let share = format!("{:.0} %", row.share * 100.0);
        vec![row.cluster.to_string(), place.into(), share, optional(row.weight.as_ref()), row.reason.clone()]
    });
    section("endpoints", &["", "cluster", "endpoint", "weight", "requests", "latency", "why"], endpoints, |row| {
        let latency = row.latency_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1} ms"));
        let (weight, requests) = (row.weight.to_string(), row.requests.to_string());
        let (cluster, endpoint) = (row.cluster.to_string(), row.endpoint.to_string());
        vec![mark(row.taken), cluster, endpoint, weight, requests, latency, row.reason.clone()]
    });
}

fn said(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Forward { service, port, cluster, endpoint, reason } => {
            format!("endpoint {endpoint} of {service} port {port} in cluster {cluster}: {reason}")
        }
        Outcome::Redirect { status, decided_by } => format!("answered with {status} by {decided_by}"),
        Outcome::Refused { refusal, status, reason } => format!("refused with {status} ({}): {reason}", refusal.code()),
    }
}

fn print_access(access: &Access) {
    let verdict = match access.allowed {
        Some(true) => "may call",
        Some(false) => "may not call",
        None => "not known here whether it may call",
    };
    anstream::println!("{verdict}: {}", access.reason);
}

fn section<T>(title: &str, header: &[&str], rows: &[T], row: impl Fn(&T) -> Vec<String>) {
    if !rows.is_empty() {
        anstream::println!("\n{title}");
        table::print(header, rows.iter().map(row));
    }
}

fn mark(taken: bool) -> String {
    if taken { "->".into() } else { String::new() }
}

fn optional(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}
