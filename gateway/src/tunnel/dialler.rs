//! Holds a tunnel with every gateway of every peer that can be dialled: one task for each.
//!
//! A gateway is dialled while no usable tunnel with it exists, whoever had dialled that one. A tunnel that
//! was dialled here is renewed when the SVID of either end has been, and moved when the names of that gateway
//! have other addresses (`tombolo_core::resolution`): the new one is up before the old one loses its place.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::UnixTime;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tombolo_core::backoff::Backoff;
use tombolo_core::door::ALPN_TUNNEL;
use tombolo_core::id::{ClusterId, GatewayId, Role, TrustDomain};
use tombolo_core::resolution::{AddressBook, Decision};
use tombolo_trust::tls::{self, ServerExpectation};

use super::connection::Tunnel;
use super::control::ControlStream;
use super::doorway::{self, Dialled};
use super::{close_refused, endpoint, refusal_of};
use crate::gateway::{Gateway, LastDial};
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
    /// host:port
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
        gateway.dials.lock().expect("nothing panics while it notes a dial").retain(|key, _| wanted.contains_key(key));
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

/// What the dialling task of one gateway shares with the one that looks its names up.
struct Names {
    book: watch::Sender<AddressBook>,
    /// Rung when no address answered.
    unanswered: Notify,
}

impl Names {
    /// Looks up whatever is due, for as long as it is polled.
    async fn follow(&self, gateway: &Gateway) {
        loop {
            let now = Instant::now();
            let due = self.book.borrow().due(now);
            for name in due {
                let answer = gateway.resolver.lookup(&name).await;
                if let Err(error) = &answer {
                    tracing::info!(name, error, "a gateway's name does not resolve");
                }
                self.book.send_if_modified(|book| book.handle_answer(&name, answer, Instant::now()));
            }
            let due = self.book.borrow().poll_timeout();
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or(now).into()), if due.is_some() => {}
                () = self.unanswered.notified() => {
                    self.book.send_if_modified(|book| {
                        book.handle_dial_failed(Instant::now());
                        false
                    });
                }
            }
        }
    }
}

async fn hold(gateway: Arc<Gateway>, destination: Destination) {
    let book = AddressBook::new(destination.addresses.iter().map(String::as_str), Instant::now());
    let names = Names { book: watch::Sender::new(book), unanswered: Notify::new() };
    tokio::join!(names.follow(&gateway), keep_dialled(&gateway, &destination, &names));
}

async fn keep_dialled(gateway: &Arc<Gateway>, destination: &Destination, names: &Names) {
    let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_LONGEST);
    let mut wakes = Wakes {
        tunnels: gateway.registry.subscribe(),
        svid: gateway.svid.subscribe(),
        addresses: names.book.subscribe(),
    };
    loop {
        wait_until_needed(gateway, destination, names, &mut wakes).await;
        // Whatever is renewed or found out from here on calls for another dial.
        wakes.svid.borrow_and_update();
        wakes.addresses.borrow_and_update();
        match dial_any(gateway, destination, names).await {
            Ok(()) => {
                backoff.reset();
                note(gateway, destination, names, None);
            }
            Err(reason) => {
                tracing::info!(peer = %destination.cluster, gateway = %destination.gateway, reason, "dialling failed");
                let peer = Peer { peer: destination.cluster.to_string() };
                gateway.meters.dials_failed.get_or_create(&peer).inc();
                names.unanswered.notify_one();
                note(gateway, destination, names, Some(reason));
                tokio::select! {
                    () = tokio::time::sleep(backoff.next_wait(rand::random())) => {}
                    _ = wakes.addresses.changed() => {}
                }
            }
        }
    }
}

/// Notes where the last dial went, and why it failed.
fn note(gateway: &Gateway, destination: &Destination, names: &Names, error: Option<String>) {
    let dial = LastDial { addresses: names.book.borrow().addresses(), error };
    let mut dials = gateway.dials.lock().expect("nothing panics while it notes a dial");
    dials.insert((destination.cluster.clone(), destination.gateway.clone()), dial);
}

/// What may call for a dial.
struct Wakes {
    tunnels: watch::Receiver<u64>,
    svid: watch::Receiver<u64>,
    addresses: watch::Receiver<AddressBook>,
}

/// Waits while a usable tunnel is there that needs no renewal yet, and that is where it should be.
async fn wait_until_needed(gateway: &Gateway, destination: &Destination, names: &Names, wakes: &mut Wakes) {
    loop {
        wakes.tunnels.borrow_and_update();
        let tunnel = match destination.gateway.is_declared() {
            // With a tunnel to any gateway the peer says what others it has.
            true => gateway.registry.usable_with_any(&destination.cluster),
            false => gateway.registry.usable(&destination.cluster, &destination.gateway),
        };
        let Some(tunnel) = tunnel else { return };
        let may_move = tunnel.dialled_here && !destination.gateway.is_declared();
        let decision = wakes.addresses.borrow_and_update().decide(Some(tunnel.remote_address()));
        if may_move && decision != Decision::Keep {
            tracing::info!(peer = %destination.cluster, gateway = %destination.gateway,
                from = %tunnel.remote_address(), "the gateway has other addresses now");
            return;
        }
        note(gateway, destination, names, None);
        let renewal = if tunnel.dialled_here { Some(renewal_in(&tunnel)) } else { None };
        tokio::select! {
            _ = wakes.tunnels.changed() => {}
            _ = wakes.addresses.changed() => {}
            Ok(()) = wakes.svid.changed(), if tunnel.dialled_here => {
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

async fn dial_any(gateway: &Arc<Gateway>, destination: &Destination, names: &Names) -> Result<(), String> {
    // Names that were never looked up are waited for; the look-up has a time limit of its own.
    let mut book = names.book.subscribe();
    let known = book.wait_for(|book| book.is_answered() || !book.addresses().is_empty()).await;
    let known = known.expect("the sender is held by the caller").clone();
    let Decision::Dial(addresses) = known.decide(None) else { unreachable!("there is no tunnel that could be kept") };
    let mut last = known.error().unwrap_or_else(|| "it advertises no address".to_owned());
    for address in addresses {
        match timeout(DIAL_TIMEOUT, dial(gateway, destination, address)).await {
            Ok(Ok(())) => {
                names.book.send_if_modified(|book| {
                    book.handle_dialled(address);
                    false
                });
                return Ok(());
            }
            Ok(Err(reason)) => last = format!("{address}: {reason}"),
            Err(_) => {
                last =
                    format!("{address} does not answer within {DIAL_TIMEOUT:?}; maybe a firewall drops UDP on the way");
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
