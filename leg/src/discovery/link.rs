//! One stream to federation that is kept up: reconnects, says everything again, and never stops reading while it
//! has something to say.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use prost::Message as _;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tombolo_api::proto::discovery as wire;
use tombolo_api::proto::discovery::discovery_client::DiscoveryClient;
use tombolo_core::backoff::Backoff;
use tombolo_core::id::Role;
use tombolo_trust::bundle::Bundle;
use tombolo_trust::grpc;
use tombolo_trust::store::{ClusterBundle, TrustStore};
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ServerExpectation};
use tonic::transport::Channel;

use super::memory::{self, Keep, Memory, Subject};

/// Requests that wait for the connection to take them.
const OUTGOING_MAX: usize = 16;
/// Largest message that is read: a snapshot of a gateway, or one service with 10,000 endpoints.
pub(super) const MESSAGE_MAX: usize = 16 * 1024 * 1024;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LONGEST: Duration = Duration::from_secs(5);

/// How to reach the own cluster's federation.
#[derive(Debug, Clone)]
pub struct Federation {
    /// `host:port` of its discovery service.
    pub address: String,
    pub svid: SvidSource,
    pub trust: TrustStore,
    /// File that keeps what federation last told, for a restart while it is away.
    pub memory: Option<PathBuf>,
}

/// Whether federation answers, for readiness and the operator.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkStatus {
    pub connected: bool,
    /// Times that the stream has been up.
    pub connects: u64,
    /// Why it is not up, or was not the last time.
    pub last_error: Option<String>,
    /// Updates that did not convert; what was known before stays in force.
    pub updates_refused: u64,
    /// Bundles that were not taken, a lower sequence among them.
    pub bundles_refused: u64,
    /// Since the start nothing was heard: what is in force was kept by the process before, at this time.
    pub remembered: Option<Timestamp>,
}

/// What a sidecar and a gateway do differently.
pub(super) trait Side: Send + Sync + 'static {
    type Request: Send + 'static;
    type Update: prost::Message + Default;

    fn open(
        client: DiscoveryClient<Channel>,
        requests: ReceiverStream<Self::Request>,
    ) -> impl Future<Output = Result<tonic::Streaming<Self::Update>, tonic::Status>> + Send;

    /// A new stream stands: everything has to be said again.
    fn begin(&self);
    /// The next thing to say, if there is one.
    fn next(&self) -> Option<Self::Request>;
    fn handle(&self, update: Self::Update) -> Result<(), String>;
    /// What an update means for the memory of this side.
    fn keep(update: &Self::Update) -> Keep;
    fn memory(&self) -> Option<&Memory>;
    /// Takes an update that was kept over a restart.
    fn recall(&self, update: Self::Update) -> Result<(), String>;
    /// Whether the latest word on this is still of use.
    fn wants(&self, subject: &Subject) -> bool;
    /// Woken when [`Side::next`] may have more.
    fn changed(&self) -> &Notify;
    fn status(&self) -> &watch::Sender<LinkStatus>;
}

/// Keeps the stream up until `stop`.
pub(super) async fn run<S: Side>(side: Arc<S>, federation: Federation, stop: CancellationToken) {
    let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_LONGEST);
    let keep_up = async {
        loop {
            let connects = side.status().borrow().connects;
            let error = match one_stream(&*side, &federation).await {
                Ok(()) => "federation closed the stream".to_owned(),
                Err(error) => error,
            };
            if side.status().borrow().connects > connects {
                backoff.reset();
            }
            tracing::debug!(%error, "discovery is not connected");
            side.status().send_modify(|status| {
                status.connected = false;
                status.last_error = Some(error);
            });
            tokio::time::sleep(backoff.next_wait(rand::random())).await;
        }
    };
    tokio::select! {
        () = keep_up => {}
        () = memory::save(side.clone(), federation.trust.clone()) => {}
        () = stop.cancelled() => {}
    }
}

async fn one_stream<S: Side>(side: &S, federation: &Federation) -> Result<(), String> {
    let svid = federation.svid.wait().await;
    let trust_domain = svid.id.trust_domain().clone();
    let expectation = ServerExpectation::Role { trust_domain, role: Role::Federation };
    let config = tls::client_config(&federation.svid, &federation.trust, expectation, &[grpc::ALPN_H2]);
    let channel = grpc::connect(&federation.address, config).map_err(|error| error.to_string())?;
    let client = DiscoveryClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
    let (outgoing, requests) = mpsc::channel(OUTGOING_MAX);
    side.begin();
    // Some servers answer with headers only after the first message.
    if let Some(first) = side.next() {
        outgoing.try_send(first).map_err(|_| "the channel is new".to_owned())?;
    }
    let mut updates = S::open(client, ReceiverStream::new(requests)).await.map_err(|status| describe(&status))?;
    side.status().send_modify(|status| {
        status.connected = true;
        status.connects += 1;
        status.last_error = None;
    });
    let mut pending = side.next();
    loop {
        tokio::select! {
            permit = outgoing.reserve(), if pending.is_some() => {
                let permit = permit.map_err(|_| "federation stopped reading".to_owned())?;
                if let Some(request) = pending.take() {
                    permit.send(request);
                }
                pending = side.next();
            }
            () = side.changed().notified(), if pending.is_none() => pending = side.next(),
            update = updates.message() => match update.map_err(|status| describe(&status))? {
                None => return Ok(()),
                Some(update) => {
                    take(side, update);
                    if pending.is_none() {
                        pending = side.next();
                    }
                }
            },
        }
    }
}

fn take<S: Side>(side: &S, update: S::Update) {
    // As they came, in case they are kept; most are small, and all are rare beside requests.
    let kept = side.memory().map(|memory| (memory, S::keep(&update), update.encode_to_vec()));
    if let Err(reason) = side.handle(update) {
        tracing::warn!(%reason, "an update from federation is refused; what was known before stays in force");
        side.status().send_modify(|status| status.updates_refused += 1);
        return;
    }
    if let Some((memory, keep, octets)) = kept {
        memory.note(keep, || octets);
    }
    side.status().send_if_modified(|status| status.remembered.take().is_some());
}

fn describe(status: &tonic::Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Takes all bundles that are trusted here. One that can't be read, or is lower than the one held, is reported
/// and the one held stays.
pub(super) fn take_bundles(trust: &TrustStore, wire: wire::Bundles, status: &watch::Sender<LinkStatus>) {
    let held = trust.snapshot();
    let mut refused = 0;
    let mut bundles = Vec::with_capacity(wire.bundles.len());
    for entry in wire.bundles {
        let Some(bundle) = entry.bundle else { continue };
        let trust_domain = bundle.trust_domain.clone();
        let read = entry.cluster.parse().map_err(|error| format!("{error}")).and_then(|cluster| {
            let bundle = Bundle::from_wire(bundle).map_err(|error| error.to_string())?;
            Ok(ClusterBundle { cluster, bundle })
        });
        match read {
            Ok(bundle) => bundles.push(bundle),
            Err(reason) => {
                refused += 1;
                tracing::warn!(%trust_domain, %reason, "a trust bundle is refused; the one held stays in force");
                let kept = trust_domain.parse().ok().and_then(|domain| {
                    let cluster = held.cluster_of(&domain)?.clone();
                    Some(ClusterBundle { cluster, bundle: held.bundle(&domain)?.clone() })
                });
                bundles.extend(kept);
            }
        }
    }
    for refusal in trust.replace_all(bundles) {
        refused += 1;
        tracing::warn!(%refusal, "a trust bundle is refused; the one held stays in force");
    }
    if refused > 0 {
        status.send_modify(|status| status.bundles_refused += refused);
    }
}

/// The highest sequence in force, by trust domain.
pub(super) fn bundles_in_force(trust: &TrustStore) -> wire::BundlesInForce {
    let snapshot = trust.snapshot();
    let sequences =
        snapshot.domains().filter_map(|domain| Some((domain.to_string(), snapshot.bundle(domain)?.sequence())));
    wire::BundlesInForce { sequences: sequences.collect() }
}
