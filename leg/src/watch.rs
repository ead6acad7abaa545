//! What the gateways of the own cluster say of themselves, by gateway: which peers they reach, and whether they
//! are draining.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_api::proto::gateway_watch as wire;
use tombolo_api::proto::gateway_watch::gateway_watch_client::GatewayWatchClient;
use tombolo_core::backoff::Backoff;
use tombolo_core::id::ClusterId;
use tombolo_core::liveness::Reach;
use tombolo_trust::grpc;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ServerExpectation};

use crate::discovery::LocalGateway;

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LONGEST: Duration = Duration::from_secs(5);
/// Peers of one state message; more are refused.
const PEERS_MAX: usize = 10_000;

/// What one gateway last said. It is kept, with `connected` false, while the gateway does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GatewayState {
    pub connected: bool,
    /// Something was said at all.
    pub known: bool,
    /// Finish and close legs through this gateway; open no new ones.
    pub draining: bool,
    pub peers: BTreeMap<ClusterId, PeerReach>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerReach {
    /// `None` before the tunnel has been up for the first time.
    pub reach: Option<Reach>,
    pub rtt: Duration,
}

/// Watches one gateway for as long as it lives. Clones share it.
#[derive(Debug, Clone)]
pub struct GatewayWatch {
    gateway: Arc<LocalGateway>,
    state: watch::Receiver<GatewayState>,
    _stop: Arc<DropGuard>,
}

impl GatewayWatch {
    /// Starts to connect. Needs a runtime, on which it lives.
    pub fn start(gateway: LocalGateway, svid: SvidSource, trust: TrustStore) -> Self {
        let gateway = Arc::new(gateway);
        let (sender, state) = watch::channel(GatewayState::default());
        let stop = CancellationToken::new();
        let (watched, stopped) = (gateway.clone(), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = keep_up(&watched, &svid, &trust, &sender) => {}
                () = stopped.cancelled() => {}
            }
        });
        Self { gateway, state, _stop: Arc::new(stop.drop_guard()) }
    }

    pub fn gateway(&self) -> &LocalGateway {
        &self.gateway
    }

    pub fn state(&self) -> watch::Receiver<GatewayState> {
        self.state.clone()
    }
}

async fn keep_up(gateway: &LocalGateway, svid: &SvidSource, trust: &TrustStore, sender: &watch::Sender<GatewayState>) {
    let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_LONGEST);
    loop {
        let error = one_stream(gateway, svid, trust, sender, &mut backoff).await;
        tracing::debug!(gateway = %gateway.gateway_id, %error, "the gateway's state is not known");
        sender.send_modify(|state| state.connected = false);
        tokio::time::sleep(backoff.next_wait(rand::random())).await;
    }
}

async fn one_stream(
    gateway: &LocalGateway,
    svid: &SvidSource,
    trust: &TrustStore,
    sender: &watch::Sender<GatewayState>,
    backoff: &mut Backoff,
) -> String {
    svid.wait().await;
    let id = gateway.spiffe_id.clone();
    let expectation = ServerExpectation::Ids { trust_domain: id.trust_domain().clone(), ids: Arc::new([id].into()) };
    let config = tls::client_config(svid, trust, expectation, &[grpc::ALPN_H2]);
    let channel = match grpc::connect(&gateway.watch_address, config) {
        Ok(channel) => channel,
        Err(error) => return error.to_string(),
    };
    let mut updates = match GatewayWatchClient::new(channel).watch(wire::WatchRequest {}).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status.to_string(),
    };
    loop {
        let state = match updates.message().await {
            Ok(Some(state)) => state,
            Ok(None) => return "the gateway closed the stream".into(),
            Err(status) => return status.to_string(),
        };
        backoff.reset();
        if state.gateway_id == gateway.gateway_id.as_str() && state.peers.len() <= PEERS_MAX {
            sender.send_replace(from_wire(state));
        } else {
            tracing::warn!(gateway = %gateway.gateway_id, said = %state.gateway_id, "a state of another gateway is refused");
        }
    }
}

fn from_wire(wire: wire::GatewayState) -> GatewayState {
    let peers = wire.peers.into_iter().filter_map(|peer| {
        let reach = match wire::Reach::try_from(peer.reach).unwrap_or(wire::Reach::Unknown) {
            wire::Reach::Unknown => None,
            wire::Reach::Up => Some(Reach::Up),
            wire::Reach::Suspect => Some(Reach::Suspect),
            wire::Reach::Down => Some(Reach::Dead),
        };
        // A name that does not parse can't be routed to either.
        Some((peer.cluster.parse().ok()?, PeerReach { reach, rtt: Duration::from_micros(peer.rtt_us.into()) }))
    });
    GatewayState { connected: true, known: true, draining: wire.draining, peers: peers.collect() }
}
