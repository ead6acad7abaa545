//! The tunnel port from outside: the handshake, the verdict, and what a connection becomes.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Incoming};
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::time::timeout;
use tombolo_api::proto::tunnel as wire;
use tombolo_api::proto::tunnel::control::Kind;
use tombolo_core::door::{self, ALPN_PEERING, ALPN_TUNNEL, Entry, Verdict};
use tombolo_core::id::{ClusterId, SpiffeId};
use tombolo_core::refusal::Refusal;
use tombolo_runtime::logging::Sparsely;
use tombolo_trust::handshakes::{Handshakes, Place};
use tombolo_trust::store::Usage;
use tombolo_trust::tls::{self, ClientAuth, RootInChain};

use super::connection::{Remote, Tunnel, Validity};
use super::control::{self, ControlStream};
use super::endpoint::{self, UnusableTls};
use super::{close_refused, refusal_of, streams};
use crate::gateway::Gateway;
use crate::peering;

/// How long a handshake may take, and then each step until the tunnel is up.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// Lets the endpoint accept connections.
pub fn open(gateway: &Gateway) -> Result<(), UnusableTls> {
    let settings = &gateway.settings;
    let tls = tls::server_config(
        &gateway.svid,
        &gateway.trust,
        ClientAuth::WellFormed,
        &[ALPN_TUNNEL, ALPN_PEERING],
        RootInChain::ForAlpn(ALPN_PEERING),
    );
    let transport = endpoint::transport(settings.congestion, &settings.limits);
    let config = endpoint::server_config(tls, transport, &settings.limits)?;
    gateway.endpoint.set_server_config(Some(config));
    Ok(())
}

/// Accepts connections until the endpoint is closed. When all handshakes that may be under way are, the oldest
/// makes room: nobody keeps a peer's gateway out by beginning handshakes without an end.
pub async fn accept_all(gateway: Arc<Gateway>) {
    let max = gateway.settings.limits.handshakes as usize;
    let handshakes = Handshakes::new(max);
    while let Some(incoming) = gateway.endpoint.accept().await {
        // Above half of the room, callers have to show that their address is their own.
        if handshakes.under_way() >= max / 2 && incoming.may_retry() {
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(let_in(gateway.clone(), incoming, handshakes.begin()));
    }
}

async fn let_in(gateway: Arc<Gateway>, incoming: Incoming, place: Place) {
    let address = incoming.remote_address();
    match place.run(enter(&gateway, incoming)).await {
        Ok(None) => {}
        // Peering has a bound of its own.
        Ok(Some((connection, chain))) => {
            let outcome = peering::accept(&gateway, &connection, chain).await;
            outcome.unwrap_or_else(|refusal| refuse(&gateway, &connection, refusal));
        }
        Err(displaced) => {
            turned_away(&gateway, address, Refusal::Overloaded, &displaced);
        }
    }
}

/// A caller that may make an offer of peering.
type Knocking = (Connection, Vec<CertificateDer<'static>>);

/// The handshake and the verdict. A tunnel is up when this returns.
async fn enter(gateway: &Arc<Gateway>, incoming: Incoming) -> Option<Knocking> {
    let address = incoming.remote_address();
    let connection = match timeout(STEP_TIMEOUT, incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            turned_away(gateway, address, refusal_of(&error), &error);
            return None;
        }
        Err(_) => {
            turned_away(gateway, address, Refusal::HandshakeTimeout, &Refusal::HandshakeTimeout);
            return None;
        }
    };
    let chain = peer_chain(&connection);
    let entry = match door::decide(alpn(&connection).as_deref(), &verdict(gateway, &chain)) {
        Entry::Tunnel(_) if gateway.drain.is_draining() => Entry::Refuse(Refusal::Draining),
        Entry::Tunnel(cluster) if !gateway.snapshot().peers.contains_key(&cluster) => {
            Entry::Refuse(Refusal::UnknownCluster)
        }
        entry => entry,
    };
    match entry {
        Entry::Tunnel(cluster) => {
            // The handshake is over when the hellos are said.
            let outcome = accept_tunnel(gateway, &connection, cluster, chain).await;
            outcome.unwrap_or_else(|refusal| refuse(gateway, &connection, refusal));
            None
        }
        Entry::Peering => Some((connection, chain)),
        Entry::Refuse(refusal) => {
            refuse(gateway, &connection, refusal);
            None
        }
    }
}

/// Counts a handshake that came to nothing; strangers may cause as many as they like.
fn turned_away(gateway: &Gateway, address: SocketAddr, refusal: Refusal, error: &dyn fmt::Display) {
    static LOG: Sparsely = Sparsely::new();
    gateway.meters.refused(refusal);
    if let Some(left_out) = LOG.admit(Instant::now()) {
        tracing::info!(%address, reason = refusal.code(), %error, left_out, "handshake on the tunnel port failed");
    }
}

fn refuse(gateway: &Gateway, connection: &Connection, refusal: Refusal) {
    static LOG: Sparsely = Sparsely::new();
    gateway.meters.refused(refusal);
    if let Some(left_out) = LOG.admit(Instant::now()) {
        let identity = tls::identity_of(&peer_chain(connection)).map(|id| id.to_string()).unwrap_or_default();
        let (address, explanation) = (connection.remote_address(), refusal.explanation());
        tracing::info!(%address, identity, reason = refusal.code(), left_out, "{explanation}");
    }
    close_refused(connection, refusal);
}

fn alpn(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// The certificates that the far end presented, leaf first.
pub fn peer_chain(connection: &Connection) -> Vec<CertificateDer<'static>> {
    let identity = connection.peer_identity().and_then(|identity| identity.downcast().ok());
    identity.map(|chain: Box<Vec<CertificateDer<'static>>>| *chain).unwrap_or_default()
}

/// What a caller's chain proves now. TLS has only checked that the caller holds the leaf's key.
fn verdict(gateway: &Gateway, chain: &[CertificateDer<'_>]) -> Verdict {
    let trust = gateway.trust.snapshot();
    match trust.verify(chain, Usage::Client, UnixTime::now()) {
        Ok(id) => {
            let role = id.as_role();
            let snapshot = gateway.snapshot();
            match trust.cluster_of(id.trust_domain()) {
                _ if *id.trust_domain() == snapshot.trust_domain => Verdict::Own { role },
                Some(cluster) if *cluster == snapshot.cluster => Verdict::Own { role },
                Some(cluster) => Verdict::Peer { cluster: cluster.clone(), role },
                None => Verdict::Unbound { role },
            }
        }
        Err(Refusal::UnknownTrustDomain) => match tls::identity_of(chain) {
            Ok(id) => Verdict::Unbound { role: id.as_role() },
            Err(refusal) => Verdict::Invalid(refusal),
        },
        Err(refusal) => Verdict::Invalid(refusal),
    }
}

/// A gateway's id is the instance that its identity names.
pub fn remote(cluster: ClusterId, id: SpiffeId, chain: Vec<CertificateDer<'static>>) -> Result<Remote, Refusal> {
    let instance = id.path().rsplit('/').next().unwrap_or_default();
    let gateway = instance.parse().map_err(|_| Refusal::WrongRole)?;
    Ok(Remote { cluster, gateway, validity: Validity::of_leaf(&chain), spiffe_id: id, chain })
}

async fn accept_tunnel(
    gateway: &Arc<Gateway>,
    connection: &Connection,
    cluster: ClusterId,
    chain: Vec<CertificateDer<'static>>,
) -> Result<(), Refusal> {
    let remote = remote(cluster, tls::identity_of(&chain)?, chain)?;
    endpoint::admit(connection, &gateway.settings.limits);
    let opening = async {
        let (send, recv) = connection.accept_bi().await.map_err(|error| refusal_of(&error))?;
        let mut stream = ControlStream::new(send, recv);
        let hello = stream.read_hello().await.map_err(|_| Refusal::BadHeader)?;
        check_hello(&hello, &remote)?;
        stream.write(own_hello(gateway)).await.map_err(|_| Refusal::ConnectionLost)?;
        Ok(stream)
    };
    let stream = timeout(STEP_TIMEOUT, opening).await.map_err(|_| Refusal::HandshakeTimeout)??;
    begin(gateway, connection.clone(), remote, Dialled::There, stream);
    Ok(())
}

/// Which side dialled a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialled {
    Here,
    There,
}

pub fn own_hello(gateway: &Gateway) -> Kind {
    Kind::Hello(wire::ControlHello {
        cluster: gateway.snapshot().cluster.to_string(),
        gateway_id: gateway.settings.id.to_string(),
        features: Vec::new(),
    })
}

/// A hello must name who the certificate has proved.
pub fn check_hello(hello: &wire::ControlHello, remote: &Remote) -> Result<(), Refusal> {
    let same = hello.cluster == remote.cluster.as_str() && hello.gateway_id == remote.gateway.as_str();
    if same { Ok(()) } else { Err(Refusal::IdentityDenied) }
}

/// Both sides have said hello: the tunnel takes legs from now on.
pub fn begin(
    gateway: &Arc<Gateway>,
    connection: Connection,
    remote: Remote,
    dialled: Dialled,
    stream: ControlStream,
) -> Arc<Tunnel> {
    let number = gateway.registry.next_number();
    let (tunnel, orders) = Tunnel::new(connection, remote, dialled == Dialled::Here, number);
    let tunnel = Arc::new(tunnel);
    tracing::info!(peer = %tunnel.remote.cluster, gateway = %tunnel.remote.gateway, ?dialled,
        address = %tunnel.remote_address(), "tunnel is up");
    gateway.registry.add(tunnel.clone());
    let registry = gateway.registry.clone();
    tokio::spawn(control::run(tunnel.clone(), registry, gateway.settings.liveness, stream, orders));
    tokio::spawn(streams::accept_all(gateway.clone(), tunnel.clone()));
    tokio::spawn(see_off(gateway.clone(), tunnel.clone()));
    tunnel
}

async fn see_off(gateway: Arc<Gateway>, tunnel: Arc<Tunnel>) {
    let error = tunnel.connection.closed().await;
    tracing::info!(peer = %tunnel.remote.cluster, gateway = %tunnel.remote.gateway, %error, "tunnel is gone");
    gateway.registry.remove(&tunnel);
}
