//! Makes legs: straight to a local endpoint's sidecar, or through the gateways of this cluster in turn.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;
use tombolo_core::id::{ClusterId, GatewayId};
use tombolo_core::model::Origin;
use tombolo_core::refusal::Refusal;
use tombolo_core::silence::SilenceConfig;
use tombolo_core::sni::LegTarget;
use tombolo_core::trace::TraceParent;
use tombolo_leg::Alpn;
use tombolo_leg::dial::{Dialer, Leg, LegError, LegRequest, Stage, Via};
use tombolo_leg::http::{HttpLeg, HttpLimits};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;

use super::gateways::{Gateway, Gateways};
use super::observe::{Counted, Observed};
use super::pool::{Acquire, Dialled, Stamp};
use super::refuse::Refused;
use super::target::Target;

/// Silence of a gateway after which the next one is asked too, if its path's round trips do not take longer (the
/// connection attempt delay of RFC 8305, section 5, which recommends 250 ms and no less than 100 ms).
const OVERTAKE_AFTER: Duration = Duration::from_millis(200);
/// Round trips of a tunnel that a leg may take: the gateways' answer and the handshake, and one that is lost.
const OVERTAKE_ROUND_TRIPS: u32 = 3;
/// Gateways that are asked at the same time for one leg.
const GATEWAYS_AT_ONCE: usize = 3;

/// Where the fault lies when a leg does not stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The endpoint, its sidecar or its cluster: another endpoint may do.
    Endpoint,
    /// No gateway here has a way to the cluster.
    Way,
    /// This sidecar itself, for every endpoint of that cluster.
    Here,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{refused}")]
pub struct LegFailure {
    pub refused: Refused,
    pub blame: Blame,
}

/// Dials legs with this sidecar's identity.
pub struct LegDialer {
    dialer: Dialer,
    trust: TrustStore,
    svid_version: watch::Receiver<u64>,
    pub gateways: Gateways,
    connect_timeout: Duration,
    /// With gateways that fall silent.
    pub patience: SilenceConfig,
    http: HttpLimits,
    observed: Observed,
}

/// A leg and the gateway of this cluster that it crosses, if any.
pub struct WithGateway<T> {
    pub leg: T,
    pub gateway: Option<Arc<Gateway>>,
}

impl LegDialer {
    pub fn new(
        svid: &SvidSource,
        trust: &TrustStore,
        gateways: Gateways,
        connect_timeout: Duration,
        patience: SilenceConfig,
        observed: Observed,
    ) -> Self {
        Self {
            dialer: Dialer::new(svid.clone(), trust.clone()),
            trust: trust.clone(),
            svid_version: svid.subscribe(),
            gateways,
            connect_timeout,
            patience,
            http: HttpLimits::default(),
            observed,
        }
    }

    pub fn trust(&self) -> &TrustStore {
        &self.trust
    }

    /// The versions that a leg dialled now would bear.
    pub fn stamp(&self) -> Stamp {
        Stamp { svid: *self.svid_version.borrow(), trust: self.trust.snapshot().generation() }
    }

    /// A shared leg to `target`, dialled if there is none. The dial goes on if the caller gives up, for
    /// others may wait for it.
    pub async fn shared(
        self: &Arc<Self>,
        target: &Arc<Target>,
        trace: Option<TraceParent>,
    ) -> Result<HttpLeg, LegFailure> {
        let mut entered = None;
        loop {
            let mut waiting = match target.pool.acquire(self.stamp()) {
                Acquire::Leg(leg) => return Ok(leg),
                Acquire::Wait(waiting) => waiting,
                Acquire::Dial(dialling) => {
                    let waiting = dialling.subscribe();
                    let (dialer, target) = (self.clone(), target.clone());
                    tokio::spawn(async move {
                        let result = dialer.http(&target, trace).await.map_err(Arc::new);
                        target.pool.dialled(dialling, result);
                    });
                    waiting
                }
            };
            if entered.is_none() {
                let full = |refused| LegFailure { refused, blame: Blame::Here };
                entered = Some(target.pending().enter("requests that wait for a leg").map_err(full)?);
            }
            let result = waiting.wait_for(Option::is_some).await.map(|result| result.clone());
            if let Ok(Some(Err(failure))) = result {
                return Err(LegFailure::clone(&failure));
            }
        }
    }

    async fn http(&self, target: &Target, trace: Option<TraceParent>) -> Result<Dialled, LegFailure> {
        // Taken before dialling: a leg is never newer than its stamp says.
        let stamp = self.stamp();
        let WithGateway { leg, gateway } = self.dial(target, Alpn::H2, trace).await?;
        let counted = Counted::new(&self.observed.legs);
        let credentials = leg.credentials.clone();
        let leg = HttpLeg::start(leg, self.http).await.map_err(|error| LegFailure {
            refused: Refused::new(Refusal::ConnectionLost, error.to_string()),
            blame: Blame::Endpoint,
        })?;
        Ok(Dialled { leg, stamp, gateway: gateway.map(|gateway| gateway.id.clone()), credentials, counted })
    }

    /// Whether a gateway says anything at all about a leg to `target`; that it refuses one will do.
    pub async fn answers(&self, gateway: &Gateway, target: &Target) -> bool {
        let Some(trust_domain) = self.trust.snapshot().domain_of(&target.key.cluster).cloned() else { return false };
        let request = LegRequest {
            target: target.leg_target(),
            trust_domain,
            server_ids: target.server_ids.clone(),
            via: Via::Gateway { address: gateway.ingress.clone() },
            alpn: Alpn::Tcp,
            trace: None,
            tracestate: None,
            deadline: self.connect_timeout,
        };
        match self.dialer.dial(request).await {
            Ok(_) => true,
            Err(error) => match error.stage {
                Stage::Connect => false,
                Stage::Gateway => !matches!(error.refusal, Refusal::Timeout | Refusal::ConnectionLost),
                Stage::Handshake => true,
            },
        }
    }

    /// A leg of its own.
    pub async fn dial(
        &self,
        target: &Target,
        alpn: Alpn,
        trace: Option<TraceParent>,
    ) -> Result<WithGateway<Leg>, LegFailure> {
        self.observed.dials.inc();
        let trust_domain = self.trust.snapshot().domain_of(&target.key.cluster).cloned().ok_or_else(|| LegFailure {
            refused: Refused::new(Refusal::UnknownTrustDomain, format!("no trust bundle of {}", target.key.cluster)),
            blame: Blame::Here,
        })?;
        let request = |via, deadline| LegRequest {
            target: target.leg_target(),
            trust_domain: trust_domain.clone(),
            server_ids: target.server_ids.clone(),
            via,
            alpn,
            trace,
            tracestate: None,
            deadline,
        };
        match (&target.address, target.origin) {
            (Some(address), Origin::Local) => {
                let via = Via::Direct(address.to_string());
                let leg = self
                    .dialer
                    .dial(request(via, self.connect_timeout))
                    .await
                    .map_err(|error| blame_endpoint(error, target))?;
                Ok(WithGateway { leg, gateway: None })
            }
            (None, Origin::Local) => Err(LegFailure {
                refused: Refused::new(Refusal::EndpointGone, format!("no sidecar delivers {}", target.key.endpoint)),
                blame: Blame::Endpoint,
            }),
            (_, Origin::Remote) => self.through_gateways(target, request).await,
        }
    }

    /// Asks one gateway after the other. One that refuses or fails makes room for the next at once; one that is
    /// silent, as a stopped process is, is overtaken.
    async fn through_gateways(
        &self,
        target: &Target,
        request: impl Fn(Via, Duration) -> LegRequest,
    ) -> Result<WithGateway<Leg>, LegFailure> {
        let end = Instant::now() + self.connect_timeout;
        let cluster = &target.key.cluster;
        let mut tried: Vec<GatewayId> = Vec::new();
        let mut last = LegFailure {
            refused: Refused::new(Refusal::NoTunnel, format!("to {cluster}: this cluster has no gateway")),
            blame: Blame::Way,
        };
        let mut lost = pin!(self.gateways.lost(cluster));
        let mut asked: Vec<Arc<Gateway>> = Vec::new();
        let mut dials = FuturesUnordered::new();
        let mut next = self.gateways.choose(cluster, &tried, rand::random());
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if let Some(gateway) = next.take().filter(|_| !left.is_zero()) {
                tried.push(gateway.id.clone());
                asked.push(gateway.clone());
                let dial = self.dialer.dial(request(Via::Gateway { address: gateway.ingress.clone() }, left));
                dials.push(async move { (gateway, dial.await) });
            }
            let following = self.gateways.choose(cluster, &tried, rand::random()).filter(|_| !left.is_zero());
            let overtake = following.is_some() && dials.len() < GATEWAYS_AT_ONCE;
            tokio::select! {
                Some((gateway, result)) = dials.next() => {
                    asked.retain(|asked| asked.id != gateway.id);
                    match result {
                        Ok(leg) => {
                            gateway.worked();
                            // Those that were asked before this one and have said nothing.
                            asked.iter().for_each(|silent| silent.failed());
                            return Ok(WithGateway { leg, gateway: Some(gateway) });
                        }
                        Err(error) if error.refusal == Refusal::NoCertificate => return Err(blame_here(error)),
                        Err(error) if is_the_gateways(&error, &gateway) => last = blame_way(error, &gateway),
                        Err(error) => return Err(blame_endpoint(error, target)),
                    }
                    next = following;
                }
                () = tokio::time::sleep(patience(&asked, cluster)), if overtake => next = following,
                // Where nobody is asked any more, the last answer says more.
                () = &mut lost, if !dials.is_empty() => return Err(way_lost(cluster)),
                else => return Err(last),
            }
        }
    }
}

/// The way to a cluster broke while somebody waited for something to come over it: another cluster may do.
pub fn way_lost(cluster: &ClusterId) -> LegFailure {
    let detail = format!("to {cluster}: its way was lost while a leg was waited for");
    LegFailure { refused: Refused::new(Refusal::NoTunnel, detail), blame: Blame::Way }
}

/// How long the gateway that was asked last may be silent before the next one is asked too.
fn patience(asked: &[Arc<Gateway>], cluster: &ClusterId) -> Duration {
    let rtt = asked.last().and_then(|gateway| gateway.reach(cluster).rtt).unwrap_or_default();
    OVERTAKE_AFTER.max(rtt * OVERTAKE_ROUND_TRIPS)
}

/// Whether another gateway may succeed where this one did not.
fn is_the_gateways(error: &LegError, gateway: &Gateway) -> bool {
    match (error.stage, error.refusal) {
        // The tunnel of another gateway may stand.
        (Stage::Gateway, Refusal::NoTunnel) => true,
        (Stage::Connect, _)
        | (
            Stage::Gateway,
            Refusal::Draining
            | Refusal::Overloaded
            | Refusal::ConnectionLost
            | Refusal::Timeout
            | Refusal::HandshakeTimeout,
        ) => {
            gateway.failed();
            true
        }
        (Stage::Gateway | Stage::Handshake, _) => false,
    }
}

fn blame_way(error: LegError, gateway: &Gateway) -> LegFailure {
    let detail = format!("gateway {}: {}", gateway.id, error.detail);
    let refused = Refused { refusal: error.refusal, detail, retry_after: error.retry_after };
    LegFailure { refused, blame: Blame::Way }
}

/// This process has no identity yet: no endpoint and no gateway is to blame.
fn blame_here(error: LegError) -> LegFailure {
    let refused = Refused { refusal: error.refusal, detail: error.detail, retry_after: error.retry_after };
    LegFailure { refused, blame: Blame::Here }
}

fn blame_endpoint(error: LegError, target: &Target) -> LegFailure {
    if error.refusal == Refusal::NoCertificate {
        return blame_here(error);
    }
    let detail = format!("endpoint {} in {}: {}", target.key.endpoint, target.key.cluster, error.detail);
    let refused = Refused { refusal: error.refusal, detail, retry_after: error.retry_after };
    LegFailure { refused, blame: Blame::Endpoint }
}

impl Target {
    pub fn leg_target(&self) -> LegTarget {
        LegTarget {
            cluster: self.key.cluster.clone(),
            service: self.service().clone(),
            port: self.port(),
            endpoint: Some(self.key.endpoint.clone()),
        }
    }
}
