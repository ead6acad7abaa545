//! What goes on beside the requests: ejections and probes, idle legs and services, gateways and trust.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tombolo_core::id::ClusterId;
use tombolo_core::liveness::Reach;
use tombolo_core::model::{AppProtocol, Origin};
use tombolo_core::routing::ClusterReach;
use tombolo_leg::Alpn;
use tombolo_leg::discovery::LocalGateway;
use tombolo_leg::http::{SendErrorKind, StreamError};
use tombolo_leg::opaque::{self, Open};
use tombolo_leg::watch::{GatewayState, GatewayWatch};
use tombolo_trust::svid::SvidSource;

use super::Outbound;
use super::gateways::PeerReach;
use super::route::Route;
use super::target::Target;
use super::warm;
use crate::probe::{self, Found};

/// How often ejections and hangs are looked at while requests wait for their responses, and while there are any.
const STEP_WAITING: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(100);
/// How often legs and services are looked through.
const SWEEP: Duration = Duration::from_secs(1);
/// A probe that takes longer has failed.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);

/// Tends everything until it is dropped.
pub async fn run(outbound: Arc<Outbound>) {
    let mut probes = JoinSet::new();
    let mut swept = Instant::now();
    let mut trust = outbound.dialer.trust().subscribe();
    loop {
        let now = Instant::now();
        let routes = outbound.services.routes();
        let mut step = SWEEP;
        for route in &routes {
            for target in route.handle_timeout(now) {
                probes.spawn(probe(outbound.clone(), route.clone(), target));
            }
            if route.is_waiting() {
                step = STEP_WAITING;
            } else if route.idle_for(now) < SWEEP || route.poll_timeout().is_some() {
                step = step.min(STEP);
            }
        }
        if now.duration_since(swept) >= SWEEP {
            swept = now;
            sweep(&outbound, &routes);
            outbound.services.let_go(now);
        }
        tokio::select! {
            () = tokio::time::sleep(step) => {}
            () = outbound.upkeep.notified(), if step == SWEEP => {}
            Ok(()) = trust.changed() => check_trust(&outbound),
            Some(_) = probes.join_next() => {}
        }
    }
}

fn sweep(outbound: &Outbound, routes: &[Arc<Route>]) {
    let stamp = outbound.dialer.stamp();
    for target in routes.iter().flat_map(|route| route.live().targets.clone()) {
        let leaving = |dialled: &super::pool::Dialled| {
            dialled.gateway.as_ref().is_some_and(|gateway| outbound.gateways.is_draining(gateway))
        };
        target.pool.sweep(stamp, leaving);
        target.warm.sweep(stamp, Instant::now(), |gateway| outbound.gateways.is_draining(gateway));
        if !outbound.drain.is_draining() {
            warm::replenish(&outbound.dialer, &target);
        }
    }
}

/// Ends at once what is no longer trusted.
fn check_trust(outbound: &Outbound) {
    for target in outbound.services.routes().iter().flat_map(|route| route.live().targets.clone()) {
        target.pool.check_trust(outbound.dialer.trust());
        target.warm.keep(outbound.dialer.stamp());
    }
}

async fn probe(outbound: Arc<Outbound>, route: Arc<Route>, target: Arc<Target>) {
    let asked = async {
        let by_request = match route.app() {
            AppProtocol::Http | AppProtocol::Http2 | AppProtocol::Grpc => true,
            AppProtocol::Tls | AppProtocol::Opaque => false,
            AppProtocol::Detect => target.carries_requests(),
        };
        if by_request { probe_http(&outbound, &target).await } else { probe_opaque(&outbound, &target).await }
    };
    let answered = tokio::time::timeout(PROBE_TIMEOUT, asked).await.unwrap_or(false);
    route.handle_probe(&target, answered, Instant::now());
}

/// The far sidecar asks its application on a fresh connection; a far gateway or sidecar that fails is as bad.
async fn probe_http(outbound: &Arc<Outbound>, target: &Arc<Target>) -> bool {
    let Ok(leg) = outbound.dialer.shared(target, None).await else { return false };
    let question = probe::question(&format!("{}:{}", target.service().clusterset_name(), target.port()));
    match leg.send(question).await {
        Ok(response) => match probe::found(response.headers()) {
            Some(found) => found == Found::Alive,
            // A sidecar that has passed it on to its application.
            None => !response.status().is_server_error() || !response.headers().contains_key(super::refuse::REFUSAL),
        },
        // An application that does not like OPTIONS is alive; one that died in the middle gives INTERNAL_ERROR.
        Err(error) => matches!(
            error.kind,
            SendErrorKind::Stream(StreamError::Reset(reason)) if reason != h2::Reason::INTERNAL_ERROR
        ),
    }
}

async fn probe_opaque(outbound: &Arc<Outbound>, target: &Arc<Target>) -> bool {
    let Ok(mut dialled) = outbound.dialer.dial(target, Alpn::Tcp, None).await else { return false };
    let message = Open { port: target.port(), client_address: None, trace: None, tracestate: None };
    opaque::open(&mut dialled.leg.stream, &message).await.is_ok()
}

/// Follows the gateways of the cluster, and what each says of itself.
pub async fn follow_gateways(
    outbound: Arc<Outbound>,
    mut list: watch::Receiver<Arc<Vec<LocalGateway>>>,
    svid: SvidSource,
) {
    loop {
        let gateways = list.borrow_and_update().clone();
        outbound.gateways.replace(&gateways);
        refresh(&outbound);
        let mut watches = JoinSet::new();
        for gateway in gateways.iter() {
            let watch = GatewayWatch::start(gateway.clone(), svid.clone(), outbound.dialer.trust().clone());
            watches.spawn(follow_gateway(outbound.clone(), watch));
        }
        if list.changed().await.is_err() {
            // The federation's word is kept while it is away; this ends only with the process.
            std::future::pending::<()>().await;
        }
    }
}

async fn follow_gateway(outbound: Arc<Outbound>, watch: GatewayWatch) {
    let mut states = watch.state();
    while states.changed().await.is_ok() {
        let state = states.borrow_and_update().clone();
        let gateway = &watch.gateway().gateway_id;
        let lost = outbound.gateways.observe(gateway, state.draining, peers(&state));
        // Before the requests that leave their legs pick anew.
        refresh(&outbound);
        let routes = outbound.services.routes();
        for target in routes.iter().flat_map(|route| route.live().targets.clone()) {
            if target.origin == Origin::Remote && lost.contains(&target.key.cluster) {
                target.pool.doubt(gateway);
                target.warm.leave(gateway);
            }
        }
        outbound.gateways.announce(&lost);
        if state.draining {
            sweep(&outbound, &outbound.services.routes());
        }
    }
}

fn peers(state: &GatewayState) -> Option<BTreeMap<ClusterId, PeerReach>> {
    let peer = |peer: &tombolo_leg::watch::PeerReach| {
        let reach = match peer.reach {
            None => ClusterReach::Unknown,
            Some(Reach::Up) => ClusterReach::Up,
            Some(Reach::Suspect) => ClusterReach::Suspect,
            Some(Reach::Dead) => ClusterReach::Down,
        };
        PeerReach { reach, rtt: Some(peer.rtt).filter(|rtt| !rtt.is_zero()) }
    };
    // What a gateway said before it fell silent says nothing of now.
    state.connected.then(|| state.peers.iter().map(|(cluster, reach)| (cluster.clone(), peer(reach))).collect())
}

fn refresh(outbound: &Outbound) {
    let now = Instant::now();
    outbound.services.routes().iter().for_each(|route| route.refresh(now));
}
