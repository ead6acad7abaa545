//! Carries a peering attempt between two federations. The gateway holds no secret of it and judges
//! nothing: it hands on the TLS exporter value, the offer and the answer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::Connection;
use rustls::pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tombolo_core::door::ALPN_PEERING;
use tombolo_core::id::Role;
use tombolo_core::refusal::Refusal;
use tombolo_leg::discovery::{PeeringCommand, PeeringReport};
use tombolo_trust::peering::{EXPORTER_LABEL, EXPORTER_LEN};
use tombolo_trust::tls::{self, ServerExpectation};

use crate::gateway::Gateway;
use crate::tunnel::{CLOSE_DONE, endpoint, refusal_of};

/// Largest offer or answer.
const MESSAGE_MAX: usize = 64 * 1024;
/// How long a caller has, from its handshake to the answer.
const KNOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a caller has to read the answer.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long each step of a dial may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Reports that wait for the stream to the federation.
const REPORTS_MAX: usize = 64;

type Waiting = Arc<Mutex<BTreeMap<String, oneshot::Sender<Vec<u8>>>>>;

/// The attempts that are under way. Clones share them.
#[derive(Debug, Clone)]
pub struct PeeringRelay {
    reports: mpsc::Sender<PeeringReport>,
    /// Offers for connections dialled here, and verdicts for those that were accepted, by attempt.
    waiting: Waiting,
    room: Arc<Semaphore>,
}

impl PeeringRelay {
    /// Also returns the reports, to be sent to the federation.
    pub fn new(at_once: usize) -> (Self, mpsc::Receiver<PeeringReport>) {
        let (reports, receiver) = mpsc::channel(REPORTS_MAX);
        (Self { reports, waiting: Waiting::default(), room: Arc::new(Semaphore::new(at_once)) }, receiver)
    }

    fn enter(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        self.room.clone().try_acquire_owned().map_err(|_| Refusal::Overloaded)
    }

    fn expect(&self, attempt: &str) -> Awaited {
        let (sender, message) = oneshot::channel();
        self.lock().insert(attempt.to_owned(), sender);
        Awaited { attempt: attempt.to_owned(), message, relay: self.clone() }
    }

    fn hand_over(&self, attempt: &str, message: Vec<u8>) {
        match self.lock().remove(attempt) {
            // Whoever waited may have given up in this moment.
            Some(waiting) => drop(waiting.send(message)),
            None => tracing::info!(attempt, "a peering message came for an attempt that has ended"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, oneshot::Sender<Vec<u8>>>> {
        self.waiting.lock().expect("nothing panics while it notes a peering attempt")
    }

    /// Reports are few and small; while the federation is away there is nobody to ask.
    fn report(&self, report: PeeringReport) -> Result<(), Refusal> {
        self.reports.try_send(report).map_err(|_| Refusal::Overloaded)
    }
}

/// A message from the federation that an attempt waits for.
struct Awaited {
    attempt: String,
    message: oneshot::Receiver<Vec<u8>>,
    relay: PeeringRelay,
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.relay.lock().remove(&self.attempt);
    }
}

/// Does what the federation asks for.
pub fn handle(gateway: &Arc<Gateway>, command: PeeringCommand) {
    match command {
        PeeringCommand::Dial { attempt, addresses, root_sha256, cluster: _ } => {
            tokio::spawn(dial(gateway.clone(), attempt, addresses, root_sha256));
        }
        PeeringCommand::Offer { attempt, offer: message } | PeeringCommand::Verdict { attempt, answer: message } => {
            gateway.peering.hand_over(&attempt, message);
        }
    }
}

fn exporter(connection: &Connection) -> Result<Vec<u8>, Refusal> {
    let mut value = vec![0; EXPORTER_LEN];
    connection.export_keying_material(&mut value, EXPORTER_LABEL, b"").map_err(|_| Refusal::ConnectionLost)?;
    Ok(value)
}

/// Serves a caller that was let in to peer: one offer, one answer.
pub async fn accept(
    gateway: &Gateway,
    connection: &Connection,
    chain: Vec<CertificateDer<'static>>,
) -> Result<(), Refusal> {
    let _room = gateway.peering.enter()?;
    timeout(KNOCK_TIMEOUT, relay_knock(gateway, connection, chain)).await.map_err(|_| Refusal::Timeout)??;
    // The caller closes when it has read the answer; a close from here could overtake it.
    let _ = timeout(GOODBYE_TIMEOUT, connection.closed()).await;
    connection.close(CLOSE_DONE, b"done");
    Ok(())
}

async fn relay_knock(
    gateway: &Gateway,
    connection: &Connection,
    chain: Vec<CertificateDer<'static>>,
) -> Result<(), Refusal> {
    let (mut send, mut recv) = connection.accept_bi().await.map_err(|error| refusal_of(&error))?;
    let offer = recv.read_to_end(MESSAGE_MAX).await.map_err(|_| Refusal::BadHeader)?;
    let attempt = format!("{:032x}", rand::random::<u128>());
    let mut awaited = gateway.peering.expect(&attempt);
    gateway.peering.report(PeeringReport::Knock {
        attempt,
        exporter: exporter(connection)?,
        offer,
        chain_der: chain.iter().map(|certificate| certificate.to_vec()).collect(),
    })?;
    let answer = (&mut awaited.message).await.map_err(|_| Refusal::ConnectionLost)?;
    send.write_all(&answer).await.map_err(|_| Refusal::ConnectionLost)?;
    send.finish().map_err(|_| Refusal::ConnectionLost)
}

async fn dial(gateway: Arc<Gateway>, attempt: String, addresses: Vec<String>, root_sha256: [u8; 32]) {
    let report = match relay_offer(&gateway, &attempt, &addresses, root_sha256).await {
        Ok(answer) => PeeringReport::Answer { attempt, answer },
        Err(reason) => {
            tracing::info!(attempt, reason, "peering failed");
            PeeringReport::Failed { attempt, reason }
        }
    };
    // Full only while the federation is away, which then knows nothing of the attempt either.
    let _ = gateway.peering.report(report);
}

async fn relay_offer(
    gateway: &Gateway,
    attempt: &str,
    addresses: &[String],
    root_sha256: [u8; 32],
) -> Result<Vec<u8>, String> {
    let _room = gateway.peering.enter().map_err(|refusal| refusal.to_string())?;
    let mut awaited = gateway.peering.expect(attempt);
    let connection = Dialled(connect_any(gateway, addresses, root_sha256).await?);
    let exporter = exporter(&connection.0).map_err(|refusal| refusal.to_string())?;
    let report = PeeringReport::Exporter { attempt: attempt.to_owned(), exporter };
    gateway.peering.report(report).map_err(|refusal| refusal.to_string())?;
    let offer = match timeout(STEP_TIMEOUT, &mut awaited.message).await {
        Ok(Ok(offer)) => offer,
        _ => return Err("the federation made no offer in time".into()),
    };
    match timeout(STEP_TIMEOUT, exchange(&connection.0, &offer)).await {
        Ok(answer) => answer,
        Err(_) => Err("the other cluster gave no answer in time".into()),
    }
}

/// Closes the connection when the attempt is over.
struct Dialled(Connection);

impl Drop for Dialled {
    fn drop(&mut self) {
        self.0.close(CLOSE_DONE, b"done");
    }
}

async fn exchange(connection: &Connection, offer: &[u8]) -> Result<Vec<u8>, String> {
    let failed = |error: &dyn std::fmt::Display| match connection.close_reason() {
        Some(close) => format!("{} ({close})", refusal_of(&close)),
        None => error.to_string(),
    };
    let (mut send, mut recv) = connection.open_bi().await.map_err(|error| failed(&error))?;
    send.write_all(offer).await.map_err(|error| failed(&error))?;
    send.finish().map_err(|error| failed(&error))?;
    recv.read_to_end(MESSAGE_MAX).await.map_err(|error| failed(&error))
}

async fn connect_any(gateway: &Gateway, addresses: &[String], sha256: [u8; 32]) -> Result<Connection, String> {
    let mut last = "the token names no address".to_owned();
    for address in addresses.iter().take(8) {
        match timeout(STEP_TIMEOUT, connect(gateway, address, sha256)).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(reason)) => last = format!("{address}: {reason}"),
            Err(_) => last = format!("{address} does not answer; maybe a firewall drops UDP on the way"),
        }
    }
    Err(last)
}

async fn connect(gateway: &Gateway, address: &str, sha256: [u8; 32]) -> Result<Connection, String> {
    let resolved = match address.parse() {
        Ok(address) => vec![address],
        Err(_) => gateway.resolver.lookup(address).await?.addresses,
    };
    let expectation = ServerExpectation::PinnedRoot { sha256, role: Role::Gateway };
    let tls = tls::client_config(&gateway.svid, &gateway.trust, expectation, &[ALPN_PEERING]);
    let settings = &gateway.settings;
    let transport = endpoint::transport(settings.congestion, &settings.limits);
    let config = endpoint::client_config(tls, transport).map_err(|error| error.to_string())?;
    let mut last = "the name has no address".to_owned();
    for address in resolved.into_iter().take(4) {
        let connecting = gateway.endpoint.connect_with(config.clone(), address, "gateway.tombolo");
        match connecting.map_err(|error| error.to_string())?.await {
            Ok(connection) => return Ok(connection),
            Err(error) => last = format!("{} ({error})", refusal_of(&error)),
        }
    }
    Err(last)
}
