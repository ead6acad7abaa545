//! The clients of peer sync: one for each peer. Each dials the peer's federation over a gateway of this
//! cluster, resumes where it is, applies what comes, and acknowledges what has been made durable.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_api::proto::peer::peer_sync_client::PeerSyncClient;
use tombolo_api::proto::peer::{self as wire, subscribe_request::Kind};
use tombolo_core::backoff::Backoff;
use tombolo_core::id::{ClusterId, SpiffeId, TrustDomain};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_leg::Alpn;
use tombolo_leg::credentials::Credentials;
use tombolo_leg::dial::{Dialer, Leg, LegError, LegRequest, Via};
use tombolo_trust::store::TrustStore;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint, Uri};

use super::STREAM_SILENCE_MAX;
use super::keeping::{Durable, Keeping};
use super::wire::from_wire;
use crate::hub::{HubGone, HubHandle, Reach, SyncEnds, View};
use crate::store::StoreError;

/// Updates that are applied and made durable together.
const RUN_MAX: usize = 256;
/// Acknowledgements that wait for the leg.
const ACKS_MAX: usize = 16;
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LONGEST: Duration = Duration::from_secs(5);
/// A stream that stood this long counts as a success.
const SUCCESS_AFTER: Duration = Duration::from_secs(10);
/// Characters of a refusal that the publisher is told.
const REFUSED_LEN_MAX: usize = 500;

/// Which way the leg to a peer's federation leaves this process, as things are; `None` when there is none.
pub type Route = Arc<dyn Fn(&View, &ClusterId) -> Option<Via> + Send + Sync>;

/// Over a connected gateway of this cluster, one with a tunnel to the peer that answers if there is any.
pub fn over_gateways(view: &View, cluster: &ClusterId) -> Option<Via> {
    let connected = || view.gateways.values().filter(|gateway| gateway.connected);
    let answers = |tunnels: &[crate::hub::TunnelView]| {
        tunnels.iter().any(|tunnel| tunnel.cluster == *cluster && tunnel.reach == Reach::Up)
    };
    let best = connected().find(|gateway| answers(&gateway.tunnels)).or_else(|| connected().next())?;
    Some(Via::Gateway { address: best.ingress_address.clone() })
}

/// What a subscriber works with.
#[derive(Clone)]
pub struct Subscriber {
    pub hub: HubHandle,
    pub dialer: Dialer,
    pub trust: TrustStore,
    pub route: Route,
    no_ids: Arc<BTreeSet<SpiffeId>>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnded {
    #[error("no gateway of this cluster is connected")]
    NoRoute,
    #[error("no leg to the peer's federation: {0}")]
    Leg(#[from] LegError),
    #[error("the leg could not carry gRPC: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("the peer ended the stream: {0}")]
    Status(#[from] tonic::Status),
    #[error("the peer ended the stream")]
    Closed,
    #[error("the peer was silent for {STREAM_SILENCE_MAX:?}")]
    Silent,
    #[error("the peer is no longer trusted: {0}")]
    Untrusted(Refusal),
    #[error(transparent)]
    Rejected(#[from] SyncEnds),
    #[error(transparent)]
    NotDurable(#[from] StoreError),
    #[error(transparent)]
    Gone(#[from] HubGone),
}

impl Subscriber {
    pub fn new(hub: HubHandle, dialer: Dialer, trust: TrustStore, route: Route) -> Self {
        Self { hub, dialer, trust, route, no_ids: Arc::default() }
    }

    /// Keeps one subscription to each peer, until the hub ends or this is dropped.
    pub async fn run(self) {
        let mut changes = self.hub.changes();
        let mut subscriptions: BTreeMap<(ClusterId, TrustDomain), Subscription> = BTreeMap::new();
        loop {
            changes.borrow_and_update();
            let view = self.hub.view();
            let peer = |cluster: &ClusterId| view.peers.get(cluster).map(|peer| &peer.trust_domain);
            subscriptions.retain(|(cluster, domain), _| peer(cluster) == Some(domain));
            for (cluster, peer) in view.peers.iter() {
                let key = (cluster.clone(), peer.trust_domain.clone());
                subscriptions.entry(key).or_insert_with(|| {
                    let follow = self.clone().follow(cluster.clone(), peer.trust_domain.clone());
                    Subscription(tokio::spawn(follow))
                });
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    async fn follow(self, cluster: ClusterId, trust_domain: TrustDomain) {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_LONGEST);
        let mut last_reason = String::new();
        loop {
            let began = tokio::time::Instant::now();
            let mut taken = false;
            let Err(ended) = self.stream(&cluster, &trust_domain, &mut taken).await;
            if matches!(ended, StreamEnded::Gone(_)) {
                return;
            }
            let reason = ended.to_string();
            // The same failure over and over is told once.
            if taken || reason != last_reason {
                tracing::info!(%cluster, reason, "peer sync is interrupted");
                last_reason = reason;
            }
            if taken && began.elapsed() >= SUCCESS_AFTER {
                backoff.reset();
            }
            let wait = backoff.next_wait(rand::random());
            if self.wait(&cluster, wait).await {
                backoff.reset();
            }
        }
    }

    /// Waits, but not on when a tunnel to the peer begins to answer; returns whether one did.
    async fn wait(&self, cluster: &ClusterId, wait: Duration) -> bool {
        let mut changes = self.hub.changes();
        let answers = || {
            let view = self.hub.view();
            let mut tunnels = view.gateways.values().flat_map(|gateway| gateway.tunnels.clone());
            tunnels.any(|tunnel| tunnel.cluster == *cluster && tunnel.reach == Reach::Up)
        };
        if answers() {
            sleep(wait).await;
            return false;
        }
        let begins = async {
            while !answers() {
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        timeout(wait, begins).await.is_ok()
    }

    /// One stream, from the dial to its end. `taken` becomes true when the first update has come.
    async fn stream(
        &self,
        cluster: &ClusterId,
        trust_domain: &TrustDomain,
        taken: &mut bool,
    ) -> Result<std::convert::Infallible, StreamEnded> {
        let via = (self.route)(&self.hub.view(), cluster).ok_or(StreamEnded::NoRoute)?;
        let request = LegRequest {
            target: LegTarget::federation(cluster.clone()),
            trust_domain: trust_domain.clone(),
            server_ids: self.no_ids.clone(),
            via,
            alpn: Alpn::H2,
            trace: None,
            tracestate: None,
            deadline: DIAL_DEADLINE,
        };
        let leg = self.dialer.dial(request).await?;
        let credentials: Credentials = leg.credentials.clone();
        let channel = channel_over(leg).await?;
        tokio::select! {
            ended = self.follow_updates(cluster, channel, taken) => ended,
            refusal = credentials.refused(&self.trust) => Err(StreamEnded::Untrusted(refusal)),
        }
    }

    async fn follow_updates(
        &self,
        cluster: &ClusterId,
        channel: Channel,
        taken: &mut bool,
    ) -> Result<std::convert::Infallible, StreamEnded> {
        let position = self.hub.sync_began(cluster.clone()).await?.ok_or(SyncEnds::NoPeer)?;
        let (requests, outgoing) = mpsc::channel(ACKS_MAX);
        let hello = wire::Hello {
            cluster: self.hub.view().cluster.to_string(),
            epoch: position.epoch,
            revision: position.revision,
            features: Vec::new(),
        };
        send(&requests, Kind::Hello(hello)).await?;
        let mut client = PeerSyncClient::new(channel);
        let subscribed = client.subscribe(ReceiverStream::new(outgoing));
        let mut updates = timeout(STREAM_SILENCE_MAX, subscribed).await.map_err(|_| StreamEnded::Silent)??.into_inner();
        let mut keeping = Keeping::new(self.hub.clone(), cluster.clone());
        loop {
            tokio::select! {
                run = next_run(&mut updates) => {
                    let run = run?;
                    if !*taken {
                        tracing::info!(%cluster, from = %position, "peer sync runs");
                        *taken = true;
                    }
                    if let Some(ahead_ms) = run.last().and_then(clock_ahead_ms) {
                        self.hub.clock(cluster.clone(), ahead_ms).await?;
                    }
                    let messages = run.into_iter().map(from_wire).collect();
                    keeping.take(self.hub.sync_received(cluster.clone(), messages).await?);
                }
                durable = keeping.next() => {
                    let Durable { position, refused } = durable?;
                    let refused = refused.unwrap_or_default().chars().take(REFUSED_LEN_MAX).collect();
                    let ack = wire::Ack { epoch: position.epoch, revision: position.revision, refused };
                    send(&requests, Kind::Ack(ack)).await?;
                }
            }
        }
    }
}

struct Subscription(JoinHandle<()>);

impl Drop for Subscription {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn send(requests: &mpsc::Sender<wire::SubscribeRequest>, kind: Kind) -> Result<(), StreamEnded> {
    let request = wire::SubscribeRequest { kind: Some(kind) };
    match timeout(STREAM_SILENCE_MAX, requests.send(request)).await {
        Ok(sent) => sent.map_err(|_| StreamEnded::Closed),
        Err(_) => Err(StreamEnded::Silent),
    }
}

/// How far the sender's clock is ahead, less the time that the message took; only heartbeats tell.
fn clock_ahead_ms(update: &wire::SyncUpdate) -> Option<i64> {
    let Some(wire::sync_update::Kind::Heartbeat(wire::Heartbeat { sent_unix_ms })) = update.kind else { return None };
    (sent_unix_ms > 0).then(|| sent_unix_ms.saturating_sub(Timestamp::now().as_millisecond()))
}

/// The next update, and those that are there with it.
async fn next_run(updates: &mut Streaming<wire::SyncUpdate>) -> Result<Vec<wire::SyncUpdate>, StreamEnded> {
    let first = timeout(STREAM_SILENCE_MAX, updates.message()).await.map_err(|_| StreamEnded::Silent)??;
    let mut run = vec![first.ok_or(StreamEnded::Closed)?];
    while run.len() < RUN_MAX {
        // An end or an error is there again at the next call.
        match updates.message().now_or_never() {
            Some(Ok(Some(update))) => run.push(update),
            _ => break,
        }
    }
    Ok(run)
}

/// gRPC over a leg that stands already; when the leg ends, so does the channel.
pub(super) async fn channel_over(leg: Leg) -> Result<Channel, tonic::transport::Error> {
    let mut stream = Some(TokioIo::new(leg.stream));
    let connect = tower::service_fn(move |_: Uri| {
        let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { stream }
    });
    Endpoint::from_static("http://federation")
        .http2_keep_alive_interval(STREAM_SILENCE_MAX)
        .keep_alive_timeout(STREAM_SILENCE_MAX)
        .connect_with_connector(connect)
        .await
}
