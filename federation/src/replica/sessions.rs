//! Sidecars and gateways that are connected to one replica, as the others have them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tombolo_api::convert::InvalidMessage;
use tombolo_api::proto::replica as wire;
use tombolo_core::id::GatewayId;

use super::wire::{ToldGateway, gateway_from_wire, gateway_to_wire, sidecar_from_wire, sidecar_to_wire};
use crate::hub::{GatewayJoin, GatewayView, HubGone, HubHandle, PeeringCommand, SidecarJoin, View};
use crate::registry::{Attached, Connected, SessionId};

/// Peering commands to one gateway of another replica that wait.
const COMMANDS_MAX: usize = 16;

/// A difference to what was told, either way.
#[derive(Debug)]
pub(super) enum Difference {
    Sidecar(wire::Sidecar),
    SidecarGone(u64),
    Gateway(wire::Gateway),
    GatewayGone(String),
}

/// What the other replica has been told.
#[derive(Default)]
pub(super) struct Told {
    sidecars: BTreeMap<SessionId, Arc<Connected>>,
    gateways: BTreeMap<GatewayId, wire::Gateway>,
}

impl Told {
    /// What has to be told now, of those that `tells` says are to be.
    pub fn differences(&mut self, view: &View, tells: impl Fn(Attached) -> bool) -> Vec<Difference> {
        let mut differences = Vec::new();
        let sidecars = view.sessions.iter().filter(|(_, connected)| tells(connected.attached));
        let sidecars: BTreeMap<_, _> = sidecars.map(|(session, one)| (*session, one.clone())).collect();
        let gateways = view.gateways.values().filter(|gateway| gateway.connected && tells(gateway.attached));
        let to_wire = |gateway: &Arc<GatewayView>| (gateway.gateway.clone(), gateway_to_wire(gateway));
        let gateways: BTreeMap<_, _> = gateways.map(to_wire).collect();
        let gone = self.sidecars.keys().filter(|session| !sidecars.contains_key(session));
        differences.extend(gone.map(|session| Difference::SidecarGone(session.0)));
        let gone = self.gateways.keys().filter(|gateway| !gateways.contains_key(*gateway));
        differences.extend(gone.map(|gateway| Difference::GatewayGone(gateway.to_string())));
        for (session, connected) in &sidecars {
            if !self.sidecars.get(session).is_some_and(|told| Arc::ptr_eq(told, connected)) {
                differences.push(Difference::Sidecar(sidecar_to_wire(*session, &connected.sidecar)));
            }
        }
        for (gateway, wire) in &gateways {
            if self.gateways.get(gateway) != Some(wire) {
                differences.push(Difference::Gateway(wire.clone()));
            }
        }
        (self.sidecars, self.gateways) = (sidecars, gateways);
        differences
    }
}

/// What another replica has told, in this one's hub.
pub(super) struct Mirror {
    hub: HubHandle,
    attached: Attached,
    sidecars: BTreeMap<u64, SessionId>,
    gateways: BTreeMap<GatewayId, (SessionId, ToldGateway)>,
    /// What gateways there are to do.
    orders: mpsc::Sender<(GatewayId, PeeringCommand)>,
}

/// Why what another replica told was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotTaken {
    #[error(transparent)]
    Invalid(#[from] InvalidMessage),
    #[error(transparent)]
    Gone(#[from] HubGone),
}

impl Mirror {
    pub fn new(hub: HubHandle, stream: u64, orders: mpsc::Sender<(GatewayId, PeeringCommand)>) -> Self {
        let attached = Attached::Elsewhere(stream);
        Self { hub, attached, sidecars: BTreeMap::new(), gateways: BTreeMap::new(), orders }
    }

    pub async fn take(&mut self, difference: Difference) -> Result<(), NotTaken> {
        match difference {
            Difference::Sidecar(sidecar) => self.sidecar(sidecar).await,
            Difference::SidecarGone(session) => match self.sidecars.remove(&session) {
                Some(session) => Ok(self.hub.sidecar_gone(session).await?),
                None => Ok(()),
            },
            Difference::Gateway(gateway) => self.gateway(gateway).await,
            Difference::GatewayGone(gateway) => {
                let gateway = gateway.parse::<GatewayId>().ok().and_then(|gateway| self.gateways.remove(&gateway));
                match gateway {
                    Some((session, _)) => Ok(self.hub.gateway_left(session).await?),
                    None => Ok(()),
                }
            }
        }
    }

    /// The stream to the other replica has ended; what it told is kept until the grace has passed.
    pub async fn leave(self) {
        for session in self.sidecars.into_values() {
            // Fails only when the process is stopping.
            let _ = self.hub.sidecar_left(session).await;
        }
        for (session, _) in self.gateways.into_values() {
            let _ = self.hub.gateway_left(session).await;
        }
    }

    async fn sidecar(&mut self, wire: wire::Sidecar) -> Result<(), NotTaken> {
        let told = wire.session;
        let sidecar = sidecar_from_wire(wire)?;
        let session = if let Some(session) = self.sidecars.get(&told) {
            *session
        } else {
            let attached = self.attached;
            let (instance, spiffe_id, zone) = (sidecar.instance, sidecar.spiffe_id, sidecar.zone);
            let joined = self.hub.sidecar_joined(SidecarJoin { instance, spiffe_id, zone, attached }).await?;
            // Where there are too many, those of other replicas are the first to be left out.
            let Some(session) = joined else { return Ok(()) };
            self.sidecars.insert(told, session);
            session
        };
        Ok(self.hub.registered(session, sidecar.claims).await?)
    }

    async fn gateway(&mut self, wire: wire::Gateway) -> Result<(), NotTaken> {
        let told = gateway_from_wire(wire)?;
        let tunnels = told.tunnels.clone();
        let same = |held: &ToldGateway| ToldGateway { tunnels: held.tunnels.clone(), ..told.clone() } == *held;
        let known = self.gateways.get(&told.gateway).filter(|(_, held)| same(held)).map(|(session, _)| *session);
        let session = match known {
            Some(session) => session,
            None => self.join(&told).await?,
        };
        self.gateways.insert(told.gateway.clone(), (session, told));
        Ok(self.hub.tunnels(session, tunnels).await?)
    }

    async fn join(&self, told: &ToldGateway) -> Result<SessionId, HubGone> {
        let (commands, mut received) = mpsc::channel(COMMANDS_MAX);
        let (orders, gateway) = (self.orders.clone(), told.gateway.clone());
        // Ends when the hub knows the gateway by another stream.
        tokio::spawn(async move {
            while let Some(command) = received.recv().await {
                if orders.send((gateway.clone(), command)).await.is_err() {
                    return;
                }
            }
        });
        let join = GatewayJoin {
            gateway: told.gateway.clone(),
            spiffe_id: told.spiffe_id.clone(),
            advertise: told.advertise.clone(),
            ingress_address: told.ingress_address.clone(),
            watch_address: told.watch_address.clone(),
            unmeshed_address: told.unmeshed_address,
            commands,
            attached: self.attached,
        };
        self.hub.gateway_joined(join).await
    }
}
