//! The server of peer sync: accepts the inner legs of peers' federations, and tells each what is exported
//! and offered to it.
//!
//! A stream asks the hub for what its peer lacks and sends it on; there is no queue between the two, so a
//! slow peer is told less often and never costs memory.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tombolo_api::proto::peer::peer_sync_server::{PeerSync, PeerSyncServer};
use tombolo_api::proto::peer::{self as wire, subscribe_request::Kind};
use tombolo_core::id::{ClusterId, Position, Role};
use tombolo_core::publish::{Change, Update};
use tombolo_core::refusal::Refusal;
use tombolo_leg::Alpn;
use tombolo_leg::accept::{AcceptedLeg, Acceptor, LegIdentity};
use tombolo_leg::credentials::Credentials;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::logging::Sparsely;
use tombolo_runtime::metrics::Refusals;
use tombolo_trust::handshakes::Handshakes;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

use super::HEARTBEAT_INTERVAL;
use super::wire::to_wire;
use crate::hub::{HubGone, HubHandle};
use crate::kubernetes::Leadership;

/// Legs whose handshake is under way at once; above it, the oldest makes room.
const HANDSHAKES_MAX: usize = 256;
/// Legs of one peer that stand at once; it needs one, and a second while it reconnects.
const LEGS_PER_PEER_MAX: usize = 4;
/// Updates between the stream and its leg; the leg's own flow control bounds the rest.
const UPDATES_MAX: usize = 16;
/// A subscriber's messages are small.
const MESSAGE_OCTETS_MAX: usize = 64 * 1024;
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Pause after `accept` failed, which it does when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a publisher works with.
#[derive(Clone)]
pub struct Publisher {
    pub hub: HubHandle,
    pub svid: SvidSource,
    pub trust: TrustStore,
    pub refusals: Refusals,
    pub drain: DrainWatch,
    /// Nothing is published but while it holds.
    pub leadership: Leadership,
}

impl Publisher {
    /// Serves until the process drains.
    pub async fn serve(self, listener: TcpListener) -> Result<(), tonic::transport::Error> {
        let (accepted, legs) = mpsc::channel(UPDATES_MAX);
        let drain = self.drain.clone();
        let accepting = tokio::spawn(accept_all(listener, self.clone(), accepted));
        let service = Service { publisher: self, streams: Arc::default() };
        let server = PeerSyncServer::new(service).max_decoding_message_size(MESSAGE_OCTETS_MAX);
        let served = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_INTERVAL))
            .max_concurrent_streams(4)
            .add_service(server)
            .serve_with_incoming_shutdown(ReceiverStream::new(legs), async move { drain.draining().await })
            .await;
        accepting.abort();
        served
    }

    /// Only a federation of a peer may come here, and only for this cluster's federation.
    fn authorize(&self, leg: &LegIdentity) -> Result<(), Refusal> {
        if !self.leadership.holds() {
            return Err(Refusal::Draining);
        }
        let view = self.hub.view();
        if !leg.target.is_federation() || leg.target.cluster != view.cluster {
            return Err(Refusal::NotExported);
        }
        if leg.client_id.as_role() != Some(Role::Federation) {
            return Err(Refusal::WrongRole);
        }
        let peer = view.peers.get(&leg.client_cluster).ok_or(Refusal::UnknownCluster)?;
        if peer.trust_domain == *leg.client_id.trust_domain() { Ok(()) } else { Err(Refusal::IdentityDenied) }
    }
}

async fn accept_all(listener: TcpListener, publisher: Publisher, accepted: mpsc::Sender<io::Result<Connection>>) {
    let acceptor = Acceptor::with_alpn(&publisher.svid, &publisher.trust, &[Alpn::H2]);
    let handshakes = Handshakes::new(HANDSHAKES_MAX);
    let places = Places::default();
    loop {
        let (tcp, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "can't accept a leg of peer sync");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, publisher, accepted) = (acceptor.clone(), publisher.clone(), accepted.clone());
        let (handshake, places) = (handshakes.begin(), places.clone());
        tokio::spawn(async move {
            match handshake.run(admit(&acceptor, &publisher, tcp, &places)).await {
                Ok(Ok((AcceptedLeg { stream, identity, credentials }, place))) => {
                    let peer = PeerLeg { identity, credentials };
                    // Fails only when the server has stopped.
                    let _ = accepted.send(Ok(Connection { stream, peer, _place: place })).await;
                }
                Ok(Err((refusal, detail))) => refused(&publisher, address, refusal, &detail),
                Err(displaced) => refused(&publisher, address, Refusal::Overloaded, &displaced.to_string()),
            }
        });
    }
}

async fn admit(
    acceptor: &Acceptor,
    publisher: &Publisher,
    tcp: TcpStream,
    places: &Places,
) -> Result<(AcceptedLeg, Place), (Refusal, String)> {
    let leg = acceptor.accept(tcp).await.map_err(|error| (error.refusal, error.detail))?;
    let refused = |refusal| (refusal, format!("{} for {}", leg.identity.client_id, leg.identity.target));
    publisher.authorize(&leg.identity).map_err(refused)?;
    let place = Place::take(places, &leg.identity.client_cluster).ok_or_else(|| refused(Refusal::Overloaded))?;
    Ok((leg, place))
}

fn refused(publisher: &Publisher, address: SocketAddr, refusal: Refusal, detail: &str) {
    static LOG: Sparsely = Sparsely::new();
    publisher.refusals.inc(refusal);
    if let Some(left_out) = LOG.admit(Instant::now()) {
        tracing::warn!(%address, reason = refusal.code(), detail, left_out, "a leg of peer sync is refused");
    }
}

/// Who is at the other end of a leg, in the extensions of each request.
#[derive(Debug, Clone)]
struct PeerLeg {
    identity: Arc<LegIdentity>,
    credentials: Credentials,
}

struct Connection {
    stream: TlsStream<TcpStream>,
    peer: PeerLeg,
    _place: Place,
}

/// How many legs of each peer stand.
type Places = Arc<Mutex<BTreeMap<ClusterId, usize>>>;

/// One leg's room, given back when it ends. Each peer has its own, so that none can take it from another.
struct Place {
    places: Places,
    cluster: ClusterId,
}

impl Place {
    fn take(places: &Places, cluster: &ClusterId) -> Option<Self> {
        let mut held = places.lock().unwrap_or_else(PoisonError::into_inner);
        let legs = held.entry(cluster.clone()).or_default();
        if *legs >= LEGS_PER_PEER_MAX {
            return None;
        }
        *legs += 1;
        Some(Self { places: places.clone(), cluster: cluster.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(legs) = held.get_mut(&self.cluster) {
            *legs -= 1;
            if *legs == 0 {
                held.remove(&self.cluster);
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerLeg;

    fn connect_info(&self) -> PeerLeg {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, octets)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct Service {
    publisher: Publisher,
    /// The stream of each peer: a later one ends the one before.
    streams: Arc<Mutex<BTreeMap<ClusterId, CancellationToken>>>,
}

#[tonic::async_trait]
impl PeerSync for Service {
    type SubscribeStream = ReceiverStream<Result<wire::SyncUpdate, Status>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<wire::SubscribeRequest>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let leg = request.extensions().get::<PeerLeg>().cloned();
        let leg = leg.ok_or_else(|| Status::unauthenticated(Refusal::NoCertificate.explanation()))?;
        let mut requests = request.into_inner();
        let first = timeout(HELLO_TIMEOUT, requests.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello came"))??;
        let Some(Kind::Hello(hello)) = first.and_then(|first| first.kind) else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        let cluster = leg.identity.client_cluster.clone();
        if hello.cluster != cluster.as_str() {
            self.publisher.refusals.inc(Refusal::IdentityDenied);
            let reason = format!("this trust domain is bound to cluster {cluster}, not to the one that Hello names");
            return Err(Status::permission_denied(reason));
        }
        let from = Position { epoch: hello.epoch, revision: hello.revision };
        tracing::info!(%cluster, %from, "the peer subscribes");
        let replaced = CancellationToken::new();
        let earlier =
            self.streams.lock().unwrap_or_else(PoisonError::into_inner).insert(cluster.clone(), replaced.clone());
        earlier.iter().for_each(CancellationToken::cancel);
        let (updates, sent) = mpsc::channel(UPDATES_MAX);
        let publisher = self.publisher.clone();
        tokio::spawn(async move {
            let hub = publisher.hub.clone();
            tokio::select! {
                ended = publish(&hub, &cluster, from, &updates) => {
                    if let Err(status) = ended {
                        let _ = updates.send(Err(status)).await;
                    }
                }
                () = acknowledgements(&hub, &cluster, requests) => {}
                refusal = leg.credentials.refused(&publisher.trust) => {
                    publisher.refusals.inc(refusal);
                    let _ = updates.try_send(Err(Status::permission_denied(refusal.explanation())));
                }
                () = replaced.cancelled() => {}
                () = publisher.leadership.lapses() => {
                    let _ = updates.try_send(Err(Status::unavailable("this replica is not known to lead any more")));
                }
                () = publisher.drain.draining() => {
                    let _ = updates.try_send(Err(Status::unavailable(Refusal::Draining.explanation())));
                }
            }
            tracing::info!(%cluster, "the peer's subscription has ended");
        });
        Ok(Response::new(ReceiverStream::new(sent)))
    }
}

/// Sends what the peer lacks, and heartbeats, until the peering or the stream ends.
async fn publish(
    hub: &HubHandle,
    cluster: &ClusterId,
    mut held: Position,
    updates: &mpsc::Sender<Result<wire::SyncUpdate, Status>>,
) -> Result<(), Status> {
    let gone = |_: HubGone| Status::unavailable(Refusal::Draining.explanation());
    let mut changes = hub.changes();
    let mut heartbeats = tokio::time::interval(HEARTBEAT_INTERVAL);
    heartbeats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        changes.borrow_and_update();
        let published = hub.view().peers.get(cluster).map(|peer| peer.published);
        if published != Some(held) {
            let Some((run, position)) = hub.published_since(cluster.clone(), held).await.map_err(gone)? else {
                return Err(Status::permission_denied(Refusal::UnknownCluster.explanation()));
            };
            tracing::debug!(%cluster, %position, updates = run.len(), "publishing");
            for update in run {
                if updates.send(Ok(to_wire(&update))).await.is_err() {
                    return Ok(());
                }
            }
            held = position;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            _ = heartbeats.tick() => {
                let heartbeat = Update { position: held, change: Change::Heartbeat };
                if updates.send(Ok(to_wire(&heartbeat))).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

async fn acknowledgements(hub: &HubHandle, cluster: &ClusterId, mut requests: Streaming<wire::SubscribeRequest>) {
    while let Ok(Some(request)) = requests.message().await {
        // A kind of a newer release is passed over.
        let Some(Kind::Ack(ack)) = request.kind else { continue };
        let position = Position { epoch: ack.epoch, revision: ack.revision };
        let refused = (!ack.refused.is_empty()).then_some(ack.refused);
        if hub.acked(cluster.clone(), position, refused).await.is_err() {
            return;
        }
    }
}
