//! Holds a tunnel with every gateway of every peer that can be dialled: one task for each.
//!
//! A gateway is dialled while no usable tunnel with it exists, whoever had dialled that one. A tunnel that
//! was dialled here is renewed when the SVID of either end has been: the new one is up before the old one
//! loses its place.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tombolo_core::backoff::Backoff;
use tombolo_core::door::ALPN_TUNNEL;
use tombolo_core::id::{ClusterId, GatewayId, Role, TrustDomain};
use tombolo_trust::tls::{self, ServerExpectation};

use super::connection::Tunnel;
use super::control::ControlStream;
use super::doorway::{self, Dialled};
use super::{close_refused, endpoint, refusal_of};
use crate::gateway::Gateway;
use crate::meters::Peer;

/// How long one address may take until both hellos are said.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LONGEST: Duration = Duration::from_secs(5);
/// Over which the dials after a renewal of the SVID are spread.
const RENEWAL_SPREAD: Duration = Duration::from_millis(200);
/// Addresses of one gateway that are tried in a row.
const ADDRESSES_MAX: usize = 8;
/// Server name of the TLS handshake; nobody routes by it.
const SERVER_NAME: &str = "gateway.tombolo";

/// One gateway of a peer, as it can be dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Destination {
    cluster: ClusterId,
    trust_domain: TrustDomain,
    gateway: GatewayId,
    /// host:port; names are resolved at each dial.
    addresses: Vec<String>,
}

/// Keeps one dialling task for each destination of the current snapshot.
pub async fn dial_all(gateway: Arc<Gateway>) {
    let mut snapshot = gateway.subscribe();
    let mut tasks: BTreeMap<(ClusterId, GatewayId), (Destination, JoinSet<()>)> = BTreeMap::new();
    loop {
        let wanted = destinations(&gateway);
        // Dropping a task's set ends it.
        tasks.retain(|key, (destination, _)| wanted.get(key) == Some(destination));
        for (key, destination) in wanted {
            tasks.entry(key).or_insert_with(|| {
                let mut task = JoinSet::new();
                task.spawn(hold(gateway.clone(), destination.clone()));
                (destination, task)
            });
        }
        tokio::select! {
            changed = snapshot.changed() => if changed.is_err() { return },
            () = gateway.drain.draining() => return,
        }
    }
}

fn destinations(gateway: &Gateway) -> BTreeMap<(ClusterId, GatewayId), Destination> {
    let snapshot = gateway.snapshot();
    let mut wanted: BTreeMap<_, Destination> = BTreeMap::new();
    for (cluster, link) in &snapshot.peers {
        for address in &link.gateways {
            let destination = wanted.entry((cluster.clone(), address.gateway.clone())).or_insert_with(|| Destination {
                cluster: cluster.clone(),
                trust_domain: link.trust_domain.clone(),
                gateway: address.gateway.clone(),
                addresses: Vec::new(),
            });
            if destination.addresses.len() < ADDRESSES_MAX {
                destination.addresses.push(address.address.clone());
            }
        }
    }
    wanted
}

async fn hold(gateway: Arc<Gateway>, destination: Destination) {
    let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_LONGEST);
    let mut changed = gateway.registry.subscribe();
    let mut svid = gateway.svid.subscribe();
    loop {
        wait_until_needed(&gateway, &destination, &mut changed, &mut svid).await;
        // Whatever is renewed from here on calls for another dial.
        svid.borrow_and_update();
        match dial_any(&gateway, &destination).await {
            Ok(()) => {
                backoff.reset();
                set_error(&gateway, &destination, None);
            }
            Err(reason) => {
                tracing::info!(peer = %destination.cluster, gateway = %destination.gateway, reason, "dialling failed");
                let peer = Peer { peer: destination.cluster.to_string() };
                gateway.meters.dials_failed.get_or_create(&peer).inc();
                set_error(&gateway, &destination, Some(reason));
                tokio::time::sleep(backoff.next_wait(rand::random())).await;
            }
        }
    }
}

fn set_error(gateway: &Gateway, destination: &Destination, error: Option<String>) {
    let mut errors = gateway.dial_errors.lock().expect("nothing panics while it notes a dial's error");
    let key = (destination.cluster.clone(), destination.gateway.clone());
    match error {
        Some(error) => errors.insert(key, error),
        None => errors.remove(&key),
    };
}

/// Waits while a usable tunnel is there that needs no renewal yet.
async fn wait_until_needed(
    gateway: &Gateway,
    destination: &Destination,
    changed: &mut watch::Receiver<u64>,
    svid: &mut watch::Receiver<u64>,
) {
    loop {
        changed.borrow_and_update();
        let tunnel = match destination.gateway.is_declared() {
            // With a tunnel to any gateway the peer says what others it has.
            true => gateway.registry.usable_with_any(&destination.cluster),
            false => gateway.registry.usable(&destination.cluster, &destination.gateway),
        };
        let Some(tunnel) = tunnel else { return };
        let renewal = if tunnel.dialled_here { Some(renewal_in(&tunnel)) } else { None };
        tokio::select! {
            _ = changed.changed() => {}
            Ok(()) = svid.changed(), if tunnel.dialled_here => {
                // All gateways of a cluster need not renew all their tunnels in the same instant.
                tokio::time::sleep(RENEWAL_SPREAD.mul_f64(rand::random())).await;
                return;
            }
            () = tokio::time::sleep(renewal.unwrap_or_default()), if renewal.is_some() => return,
        }
    }
}

/// When the far end, which renews its SVID at half its life, will have had the time to.
fn renewal_in(tunnel: &Tunnel) -> Duration {
    let validity = tunnel.remote.validity;
    let life = validity.life();
    let renewed_by = Duration::from_secs(validity.not_before.as_secs()) + life.mul_f64(0.65);
    // If it had not when this tunnel came up, it is asked again a little later.
    let again_at = Duration::from_secs(tunnel.established.as_secs()) + life.mul_f64(0.15);
    let now = Duration::from_secs(UnixTime::now().as_secs());
    renewed_by.max(again_at).saturating_sub(now).max(Duration::from_millis(500))
}

async fn dial_any(gateway: &Arc<Gateway>, destination: &Destination) -> Result<(), String> {
    let mut last = "it advertises no address".to_owned();
    for address in &destination.addresses {
        let resolved = match tokio::net::lookup_host(address).await {
            Ok(resolved) => resolved.take(ADDRESSES_MAX).collect::<Vec<_>>(),
            Err(error) => {
                last = format!("{address} does not resolve: {error}");
                continue;
            }
        };
        for resolved in resolved {
            match timeout(DIAL_TIMEOUT, dial(gateway, destination, resolved)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(reason)) => last = format!("{resolved}: {reason}"),
                Err(_) => {
                    last = format!(
                        "{resolved} does not answer within {DIAL_TIMEOUT:?}; maybe a firewall drops UDP on the way"
                    );
                }
            }
        }
    }
    Err(last)
}

async fn dial(gateway: &Arc<Gateway>, destination: &Destination, address: SocketAddr) -> Result<(), String> {
    let settings = &gateway.settings;
    let expectation = ServerExpectation::Role { trust_domain: destination.trust_domain.clone(), role: Role::Gateway };
    let tls = tls::client_config(&gateway.svid, &gateway.trust, expectation, &[ALPN_TUNNEL]);
    let config = endpoint::client_config(tls, endpoint::transport(settings.congestion, &settings.limits))
        .map_err(|error| error.to_string())?;
    let connecting = gateway.endpoint.connect_with(config, address, SERVER_NAME).map_err(|error| error.to_string())?;
    let connection = connecting.await.map_err(|error| reason(&error))?;
    // Dropped half-way, the far end must not wait for the hello.
    let half_open = CloseOnDrop(Some(connection));
    let connection = half_open.0.clone().expect("set above");

    let chain = doorway::peer_chain(&connection);
    let id = tls::identity_of(&chain).map_err(|refusal| refusal.to_string())?;
    let remote = doorway::remote(destination.cluster.clone(), id, chain).map_err(|refusal| refusal.to_string())?;
    if remote.gateway != destination.gateway && !destination.gateway.is_declared() {
        return Err(format!("the gateway there is {}, not {}", remote.gateway, destination.gateway));
    }
    endpoint::admit(&connection, &settings.limits);
    let (send, recv) = connection.open_bi().await.map_err(|error| reason(&error))?;
    let mut stream = ControlStream::new(send, recv);
    let refused = |error: super::control::ControlError| match connection.close_reason() {
        Some(close) => reason(&close),
        None => error.to_string(),
    };
    stream.write(doorway::own_hello(gateway)).await.map_err(refused)?;
    let hello = stream.read_hello().await.map_err(refused)?;
    if let Err(refusal) = doorway::check_hello(&hello, &remote) {
        close_refused(&connection, refusal);
        return Err(refusal.to_string());
    }
    half_open.keep();
    doorway::begin(gateway, connection, remote, Dialled::Here, stream);
    Ok(())
}

/// What ended a connection, for an operator.
fn reason(error: &quinn::ConnectionError) -> String {
    match refusal_of(error) {
        tombolo_core::refusal::Refusal::ConnectionLost => error.to_string(),
        refusal => format!("{refusal} ({error})"),
    }
}

struct CloseOnDrop(Option<quinn::Connection>);

impl CloseOnDrop {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            connection.close(super::CLOSE_DONE, b"gave up");
        }
    }
}
