//! The gateway's discovery: its snapshot, and the peerings that it relays without holding a secret of them.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_api::proto::discovery as wire;
use tombolo_api::proto::discovery::discovery_client::DiscoveryClient;
use tombolo_core::id::GatewayId;
use tombolo_trust::store::TrustStore;
use tonic::transport::Channel;
use wire::gateway_request::Kind as Request;
use wire::gateway_update::Kind as Update;

use super::link::{self, Federation, LinkStatus, Side};
use super::memory::{Keep, Memory, Subject, recall};
use super::model::{
    GatewaySnapshot, GatewayWelcome, PeeringCommand, PeeringReport, TunnelReport, gateway_snapshot, peering_command,
    peering_report_to_wire, revoked, tunnels_to_wire,
};

/// Peering reports that wait for the stream.
const REPORTS_MAX: usize = 64;
/// Peering commands that wait for the gateway.
const COMMANDS_MAX: usize = 64;

/// What a gateway says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayHello {
    pub gateway_id: GatewayId,
    /// `host:port` of the QUIC tunnel as peers can reach it; empty when this side can't be dialled.
    pub advertise: Vec<String>,
    pub ingress_address: String,
    pub watch_address: String,
    /// Where workloads without a sidecar reach its listeners, if it has any.
    pub unmeshed_address: Option<IpAddr>,
}

/// A handle on the gateway's discovery. Clones share it; it ends when the last one is gone.
#[derive(Debug, Clone)]
pub struct GatewayDiscovery {
    state: Arc<State>,
    _stop: Arc<DropGuard>,
}

/// Reports wait for a federation that has been away too long; the peering has to begin anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("federation does not take peering reports; is it running?")]
pub struct ReportsFull;

#[derive(Debug)]
struct State {
    hello: GatewayHello,
    trust: TrustStore,
    unsaid: Mutex<Unsaid>,
    changed: Notify,
    status: watch::Sender<LinkStatus>,
    welcome: watch::Sender<Option<GatewayWelcome>>,
    snapshot: watch::Sender<Option<Arc<GatewaySnapshot>>>,
    commands: mpsc::Sender<PeeringCommand>,
    memory: Option<Memory>,
}

#[derive(Debug, Default)]
struct Unsaid {
    hello: bool,
    bundles: bool,
    /// The latest report counts; `tunnels_unsaid` when it is newer than what federation has.
    tunnels: Vec<TunnelReport>,
    tunnels_unsaid: bool,
    reports: VecDeque<PeeringReport>,
}

impl GatewayDiscovery {
    /// Starts to connect. Needs a runtime, on which it lives. The receiver gets what federation has the gateway do
    /// for peerings.
    pub fn start(federation: Federation, hello: GatewayHello) -> (Self, mpsc::Receiver<PeeringCommand>) {
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let state = Arc::new(State {
            hello,
            trust: federation.trust.clone(),
            unsaid: Mutex::default(),
            changed: Notify::new(),
            status: watch::Sender::default(),
            welcome: watch::Sender::default(),
            snapshot: watch::Sender::default(),
            commands,
            memory: federation.memory.clone().map(Memory::new),
        });
        if let Some(memory) = &state.memory {
            recall(&*state, memory, &federation.trust);
        }
        let stop = CancellationToken::new();
        tokio::spawn(link::run(state.clone(), federation, stop.clone()));
        (Self { state, _stop: Arc::new(stop.drop_guard()) }, received)
    }

    pub fn welcome(&self) -> watch::Receiver<Option<GatewayWelcome>> {
        self.state.welcome.subscribe()
    }

    /// `None` before the first one; kept while federation is away.
    pub fn snapshot(&self) -> watch::Receiver<Option<Arc<GatewaySnapshot>>> {
        self.state.snapshot.subscribe()
    }

    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.state.status.subscribe()
    }

    /// Reports the state of all tunnels; replaces the report before.
    pub fn report_tunnels(&self, tunnels: Vec<TunnelReport>) {
        let mut unsaid = self.state.unsaid();
        if unsaid.tunnels != tunnels {
            unsaid.tunnels = tunnels;
            unsaid.tunnels_unsaid = true;
            self.state.changed.notify_one();
        }
    }

    /// Reports of a peering; in order.
    pub fn report_peering(&self, report: PeeringReport) -> Result<(), ReportsFull> {
        let mut unsaid = self.state.unsaid();
        if unsaid.reports.len() >= REPORTS_MAX {
            return Err(ReportsFull);
        }
        unsaid.reports.push_back(report);
        self.state.changed.notify_one();
        Ok(())
    }
}

impl State {
    fn unsaid(&self) -> MutexGuard<'_, Unsaid> {
        self.unsaid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, command: PeeringCommand) -> Result<(), String> {
        let Err(error) = self.commands.try_send(command) else { return Ok(()) };
        let (PeeringCommand::Dial { attempt, .. }
        | PeeringCommand::Offer { attempt, .. }
        | PeeringCommand::Verdict { attempt, .. }) = error.into_inner();
        let reason = "the gateway has too many peerings under way".to_owned();
        let mut unsaid = self.unsaid();
        if unsaid.reports.len() < REPORTS_MAX {
            unsaid.reports.push_back(PeeringReport::Failed { attempt, reason: reason.clone() });
        }
        Err(reason)
    }
}

impl Side for State {
    type Request = wire::GatewayRequest;
    type Update = wire::GatewayUpdate;

    async fn open(
        mut client: DiscoveryClient<Channel>,
        requests: ReceiverStream<wire::GatewayRequest>,
    ) -> Result<tonic::Streaming<wire::GatewayUpdate>, tonic::Status> {
        client.gateway(requests).await.map(tonic::Response::into_inner)
    }

    fn begin(&self) {
        let mut unsaid = self.unsaid();
        unsaid.hello = true;
        unsaid.bundles = true;
        unsaid.tunnels_unsaid = true;
    }

    fn next(&self) -> Option<wire::GatewayRequest> {
        let mut unsaid = self.unsaid();
        let kind = if std::mem::take(&mut unsaid.hello) {
            Request::Hello(wire::GatewayHello {
                gateway_id: self.hello.gateway_id.to_string(),
                advertise: self.hello.advertise.clone(),
                ingress_address: self.hello.ingress_address.clone(),
                watch_address: self.hello.watch_address.clone(),
                unmeshed_address: self.hello.unmeshed_address.map(|address| address.to_string()).unwrap_or_default(),
            })
        } else if let Some(report) = unsaid.reports.pop_front() {
            peering_report_to_wire(report)
        } else if std::mem::take(&mut unsaid.tunnels_unsaid) {
            Request::Tunnels(tunnels_to_wire(&unsaid.tunnels))
        } else if std::mem::take(&mut unsaid.bundles) {
            Request::Bundles(link::bundles_in_force(&self.trust))
        } else {
            return None;
        };
        Some(wire::GatewayRequest { kind: Some(kind) })
    }

    fn handle(&self, update: wire::GatewayUpdate) -> Result<(), String> {
        let Some(kind) = update.kind else {
            // An update of a newer release.
            return Ok(());
        };
        match kind {
            Update::Welcome(welcome) => {
                let welcome = welcome.try_into().map_err(|error| format!("{error}"))?;
                self.welcome.send_replace(Some(welcome));
            }
            Update::Snapshot(snapshot) => {
                let wire::GatewaySnapshot { peers, deliveries, bundles, unmeshed } = snapshot;
                let snapshot = gateway_snapshot(peers, deliveries, unmeshed.unwrap_or_default())
                    .map_err(|error| error.to_string())?;
                // Trust first: whoever sees the new peers can verify them.
                if let Some(bundles) = bundles {
                    link::take_bundles(&self.trust, bundles, &self.status);
                    self.unsaid().bundles = true;
                    self.changed.notify_one();
                }
                self.snapshot.send_replace(Some(Arc::new(snapshot)));
            }
            Update::Revoked(ids) => self.trust.set_revoked(revoked(ids).map_err(|error| error.to_string())?),
            kind @ (Update::PeeringDial(_) | Update::PeeringOffer(_) | Update::PeeringVerdict(_)) => {
                if let Some(command) = peering_command(kind).map_err(|error| error.to_string())? {
                    self.command(command)?;
                }
            }
        }
        Ok(())
    }

    fn keep(update: &wire::GatewayUpdate) -> Keep {
        match &update.kind {
            Some(Update::Welcome(_)) => Keep::Latest(Subject::Welcome),
            Some(Update::Revoked(_)) => Keep::Latest(Subject::Revoked),
            Some(Update::Snapshot(_)) => Keep::Latest(Subject::Snapshot),
            Some(Update::PeeringDial(_) | Update::PeeringOffer(_) | Update::PeeringVerdict(_)) | None => Keep::Nothing,
        }
    }

    fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    fn recall(&self, update: wire::GatewayUpdate) -> Result<(), String> {
        self.handle(update)
    }

    fn wants(&self, _: &Subject) -> bool {
        true
    }

    fn changed(&self) -> &Notify {
        &self.changed
    }

    fn status(&self) -> &watch::Sender<LinkStatus> {
        &self.status
    }
}
