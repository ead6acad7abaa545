//! Accepts the application's connections: the forward proxy, and listeners that lead to one service.
//!
//! Limits: request heads up to 64 KiB and 100 fields over HTTP/1.1 (431 above), 64 KiB over HTTP/2; a head
//! must be complete 120 s after its connection became idle; 256 requests at once over one HTTP/2 connection.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tombolo_core::model::AppProtocol;
use tombolo_core::refusal::Refusal;

use super::Outbound;
use super::detect::{Carried, detect};
use super::http::Caller;
use super::observe::Counted;
use super::refuse::Refused;
use super::tunnel;
use crate::config::ServicePortName;
use crate::peek;

pub const HEAD_MAX: usize = 64 * 1024;
pub const FIELDS_MAX: usize = 100;
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
const STREAMS_MAX: u32 = 256;
const STREAM_WINDOW: u32 = 256 * 1024;
/// The first octets of HTTP/2 with prior knowledge (RFC 9113 section 3.4); no HTTP/1.1 method begins so.
const PREFACE: &[u8] = b"PRI ";
/// After an error of the listening socket, such as no free file descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the drain begins. Connections that are open then finish what is under way.
pub async fn run(outbound: Arc<Outbound>, listener: TcpListener, fixed: Option<ServicePortName>) {
    let fixed = fixed.map(Arc::new);
    let room = Arc::new(Semaphore::new(outbound.connections_max));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = outbound.drain.draining() => return,
        };
        let (connection, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed; is the limit of open files reached?");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            outbound.observed.refused(Refusal::Overloaded);
            tracing::debug!(caller = %address, "connection refused: limits.connections is reached");
            continue;
        };
        let caller = Caller { address, fixed: fixed.clone() };
        let outbound = outbound.clone();
        tokio::spawn(async move {
            let _held = (permit, Counted::new(&outbound.observed.connections), outbound.drain.track());
            serve(&outbound, connection, caller).await;
        });
    }
}

/// Serves one connection to its end.
pub(crate) async fn serve(outbound: &Arc<Outbound>, connection: TcpStream, caller: Caller) {
    let address = caller.address;
    // Fails only on a socket that is gone already.
    let _ = connection.set_nodelay(true);
    let carried = tokio::select! {
        carried = carried(outbound, &connection, &caller) => carried,
        // A connection that has said nothing yet is no work to wait for.
        () = outbound.drain.draining() => return,
    };
    let result = match carried {
        Ok(Some(Carried::Http1)) => http1(outbound, connection, caller).await,
        Ok(Some(Carried::Http2)) => http2(outbound, connection, caller).await,
        Ok(Some(Carried::Bytes(route))) => return tunnel::forward(outbound, connection, &route, &caller).await,
        Ok(Some(Carried::Unclear(route))) => match peek::afresh(connection) {
            Ok(connection) => return tunnel::forward(outbound, connection, &route, &caller).await,
            Err(error) => {
                return tracing::warn!(caller = %address, %error, "a connection was lost; is the limit of open files reached?");
            }
        },
        Ok(None) => return,
        Err(refused) => return tunnel::refuse(outbound, connection, &caller, &refused),
    };
    match result {
        Err(error) if error.is_parse() => {
            outbound.observed.refused(Refusal::BadRequest);
            tracing::debug!(caller = %address, refusal = Refusal::BadRequest.code(), %error, "request refused");
        }
        Err(error) => tracing::debug!(caller = %address, %error, "a connection of the application ended"),
        Ok(()) => {}
    }
}

/// How a connection is carried; `None` when it ends before it has said anything.
async fn carried(outbound: &Outbound, connection: &TcpStream, caller: &Caller) -> Result<Option<Carried>, Refused> {
    if let Some(fixed) = &caller.fixed {
        let route = outbound.services.route(&fixed.service, fixed.port).await?;
        match route.app() {
            AppProtocol::Http | AppProtocol::Http2 | AppProtocol::Grpc => {}
            AppProtocol::Opaque => return Ok(Some(Carried::Bytes(route))),
            AppProtocol::Tls | AppProtocol::Detect => return detect(outbound, connection, route).await.map(Some),
        }
    }
    Ok(match tokio::time::timeout(HEAD_TIMEOUT, speaks_http2(connection)).await {
        Ok(Ok(Some(true))) => Some(Carried::Http2),
        Ok(Ok(Some(false))) => Some(Carried::Http1),
        Ok(Ok(None) | Err(_)) | Err(_) => None,
    })
}

/// Whether HTTP is spoken in version 2, with prior knowledge.
async fn speaks_http2(connection: &TcpStream) -> io::Result<Option<bool>> {
    let judge = |octets: &[u8]| match PREFACE.starts_with(octets) {
        true => (octets.len() == PREFACE.len()).then_some(true),
        false => Some(false),
    };
    peek::judged(connection, PREFACE.len(), judge).await
}

async fn http1(outbound: &Arc<Outbound>, connection: TcpStream, caller: Caller) -> Result<(), hyper::Error> {
    let service = service_fn(|request| outbound.clone().handle(request, caller.clone()));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_header_size(HEAD_MAX)
        .max_buf_size(2 * HEAD_MAX)
        .max_headers(FIELDS_MAX)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(connection), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result,
        () = outbound.drain.draining() => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        result = connection => result,
        () = outbound.drain.stopped() => Ok(()),
    }
}

async fn http2(outbound: &Arc<Outbound>, connection: TcpStream, caller: Caller) -> Result<(), hyper::Error> {
    let service = service_fn(|request| outbound.clone().handle(request, caller.clone()));
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        // Streams that stall must not use up what the others need.
        .initial_connection_window_size(STREAMS_MAX * STREAM_WINDOW)
        .max_header_list_size(HEAD_MAX as u32)
        .auto_date_header(false)
        .enable_connect_protocol()
        .serve_connection(TokioIo::new(connection), service);
    let mut connection = pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result,
        () = outbound.drain.draining() => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        result = connection => result,
        () = outbound.drain.stopped() => Ok(()),
    }
}
