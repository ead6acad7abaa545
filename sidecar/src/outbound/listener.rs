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
use tombolo_core::refusal::Refusal;

use super::Outbound;
use super::http::Caller;
use super::observe::Counted;
use super::tunnel;
use crate::config::ServicePortName;

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
    if let Some(fixed) = &caller.fixed {
        match outbound.services.route(&fixed.service, fixed.port).await {
            Ok(route) if !route.app().is_http() => return tunnel::forward(outbound, connection, &route, &caller).await,
            Ok(_) => {}
            Err(refused) => return tunnel::refuse(outbound, connection, &caller, &refused),
        }
    }
    let spoken = tokio::select! {
        spoken = speaks_http2(&connection) => spoken,
        // A connection that has said nothing yet is no work to wait for.
        () = outbound.drain.draining() => return,
    };
    let result = match spoken {
        Ok(true) => http2(outbound, connection, caller).await,
        Ok(false) => http1(outbound, connection, caller).await,
        Err(_) => return,
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

/// Looks at the first octets without taking them.
async fn speaks_http2(connection: &TcpStream) -> io::Result<bool> {
    let peeked = async {
        let mut first = [0; PREFACE.len()];
        loop {
            let count = connection.peek(&mut first).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if first[..count] != PREFACE[..count] || count == PREFACE.len() {
                return Ok(count == PREFACE.len() && first == *PREFACE);
            }
            // The rest of the preface is on its way; there is no event for "more than these octets".
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(HEAD_TIMEOUT, peeked).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
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
