//! Connections that the kernel's packet filter redirected to this sidecar (`tombolo sidecar capture`): applications
//! that know nothing of it call, and are called, through it.
//!
//! - [`origin`] asks the kernel where a connection was going.
//! - [`outbound`] carries what goes to a virtual address as the service that has it, and passes the rest on as it is.
//! - [`inbound`] takes inner legs out of what arrives at any port, and passes plaintext on or refuses it.
//! - [`loops`] notices connections of the sidecar's own that come back to it.
//!
//! What is passed on is copied and never looked into. A refusal is a reset, before anything was sent anywhere.

pub mod config;
pub mod inbound;
pub mod loops;
pub mod observe;
pub mod origin;
pub mod outbound;
mod pass;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tombolo_core::addresses::mesh::MeshAddresses;
use tombolo_core::refusal::Refusal;
use tombolo_leg::opaque;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::metrics::Metrics;

use crate::inbound::Inbound;
use crate::outbound::Outbound;
use config::CaptureConfig;
use inbound::CapturedInbound;
use loops::Loops;
use observe::{Meters, Observed};
use outbound::CapturedOutbound;

/// Where captured outbound connections arrive.
pub const OUTBOUND_PORT: u16 = 15002;
/// Where captured inbound connections arrive.
pub const INBOUND_PORT: u16 = 15006;
/// Where captured DNS queries arrive.
pub const DNS_PORT: u16 = 15053;
/// Inbound legs and the admin port: what connects there means the sidecar itself.
pub const OWN_PORTS: [u16; 2] = [15008, 15020];

const BACKLOG: u32 = 1024;
/// After an error of the listening socket, such as no free file descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves both directions; yields the names and addresses of the listeners.
pub fn start(
    config: &CaptureConfig,
    outbound: &Arc<Outbound>,
    inbound: &Arc<Inbound>,
    addresses: watch::Receiver<MeshAddresses>,
    metrics: &Metrics,
) -> anyhow::Result<Vec<(String, SocketAddr)>> {
    let (loops, meters) = (Loops::default(), Meters::new(metrics));
    let room = outbound.connections_max;
    let captured_outbound =
        CapturedOutbound::new(outbound.clone(), addresses, config.addresses_wait, loops.clone(), &meters);
    let captured_inbound = CapturedInbound::new(inbound.clone(), config.plaintext, room, loops, &meters);
    let listening = |field, port| format!("capture.{field}: can't listen on port {port}");
    let outbound = listen_outbound(config.outbound).with_context(|| listening("outbound", config.outbound))?;
    let inbound = listen_inbound(config.inbound).with_context(|| listening("inbound", config.inbound))?;
    let mut bound = named("captured-outbound", &outbound)?;
    bound.extend(named("captured-inbound", &inbound)?);
    outbound
        .into_iter()
        .for_each(|listener| drop(tokio::spawn(run(captured_outbound.clone(), listener, Origin::Redirected))));
    inbound
        .into_iter()
        .for_each(|listener| drop(tokio::spawn(run(captured_inbound.clone(), listener, Origin::Redirected))));
    Ok(bound)
}

fn named(name: &str, listeners: &[TcpListener]) -> io::Result<Vec<(String, SocketAddr)>> {
    let named = |listener: &TcpListener| {
        let address = listener.local_addr()?;
        let family = if address.is_ipv4() { "" } else { "-v6" };
        Ok((format!("{name}{family}"), address))
    };
    listeners.iter().map(named).collect()
}

/// Listens where redirected connections of processes of this host arrive: at loopback, in each family that it has.
pub fn listen_outbound(port: u16) -> io::Result<Vec<TcpListener>> {
    let first = listen(Ipv4Addr::LOCALHOST.into(), port)?;
    // Port 0 picked one; the other family takes the same.
    let port = first.local_addr()?.port();
    listen_too(first, Ipv6Addr::LOCALHOST.into(), port)
}

/// Listens where redirected connections from elsewhere arrive: at whatever address has the interface.
pub fn listen_inbound(port: u16) -> io::Result<Vec<TcpListener>> {
    let first = listen(Ipv4Addr::UNSPECIFIED.into(), port)?;
    let port = first.local_addr()?.port();
    listen_too(first, Ipv6Addr::UNSPECIFIED.into(), port)
}

fn listen_too(first: TcpListener, address: IpAddr, port: u16) -> io::Result<Vec<TcpListener>> {
    match listen(address, port) {
        Ok(second) => Ok(vec![first, second]),
        // A host without IPv6 has no connections of it to capture.
        Err(error) if matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported) => {
            Ok(vec![first])
        }
        Err(error) => Err(error),
    }
}

pub(crate) fn listen(address: IpAddr, port: u16) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        // The socket beside it has the connections of IPv4.
        socket2::SockRef::from(&socket).set_only_v6(true)?;
    }
    socket.bind(SocketAddr::new(address, port))?;
    socket.listen(BACKLOG)
}

/// One direction of capture.
pub trait Captured: Send + Sync + 'static {
    fn observed(&self) -> &Observed;
    fn drain(&self) -> &DrainWatch;
    fn room(&self) -> &Arc<Semaphore>;
    /// Serves one connection that was going to `origin`, to its end.
    fn serve(
        self: Arc<Self>,
        connection: TcpStream,
        peer: SocketAddr,
        origin: SocketAddr,
    ) -> impl Future<Output = ()> + Send;
}

/// Where connections to a listener were going.
#[derive(Debug, Clone, Copy)]
pub enum Origin {
    /// Wherever the packet filter has them from.
    Redirected,
    /// The address for which it listens.
    Fixed(SocketAddr),
}

/// Accepts until the drain begins; what is open then goes on.
pub async fn run(captured: Arc<impl Captured>, listener: TcpListener, origin: Origin) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = captured.drain().draining() => return,
        };
        let (connection, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a captured connection failed; is the limit of open files reached?");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = captured.room().clone().try_acquire_owned() else {
            refuse(captured.observed(), connection, Refusal::Overloaded, "limits.connections is reached");
            continue;
        };
        let captured = captured.clone();
        tokio::spawn(async move {
            let _held = (permit, captured.drain().track());
            // Fails only on a socket that is gone already.
            let _ = connection.set_nodelay(true);
            let destination = match origin {
                Origin::Redirected => origin::original_destination(&connection),
                Origin::Fixed(origin) => Ok(origin),
            };
            match destination {
                Ok(origin) => captured.serve(connection, origin::plain(peer), origin).await,
                Err(error) => refuse(captured.observed(), connection, Refusal::NotRedirected, &error),
            }
        });
    }
}

/// Resets a connection, so that its other end can tell that from an orderly close.
fn refuse(observed: &Observed, connection: TcpStream, refusal: Refusal, detail: impl std::fmt::Display) {
    observed.refused(refusal);
    if let Some(left_out) = observed.said.admit(std::time::Instant::now()) {
        tracing::info!(direction = observed.direction, refusal = refusal.code(), %detail, left_out, "captured connection refused");
    }
    opaque::reset(connection);
}
