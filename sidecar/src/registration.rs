//! What this sidecar registers with its federation: each (service, port) that its application serves.

use std::sync::Arc;

use tombolo_core::id::ServiceName;
use tombolo_leg::discovery::{Registration, RegistrationVerdict, SidecarDiscovery};

use crate::config::ServiceConfig;
use crate::health::ReadySink;

/// Registers everything as not ready yet; health checks say when it is. `inbound` is `host:port` where gateways and
/// the other sidecars of the cluster reach this one's inbound listener.
pub fn register(discovery: &SidecarDiscovery, services: &[ServiceConfig], inbound: &str) {
    let registration = |config: &ServiceConfig| Registration {
        service: config.service.clone(),
        port: config.port,
        inbound_address: inbound.to_owned(),
        ready: false,
    };
    discovery.register(services.iter().map(registration).collect());
}

/// Says in the log what federation decides about the registrations, whenever it changes. Ends with discovery.
pub async fn watch(discovery: SidecarDiscovery) {
    let mut verdicts = discovery.verdicts();
    // Only the receiver is kept, so that this task does not keep discovery alive.
    drop(discovery);
    let mut known = verdicts.borrow_and_update().clone();
    while verdicts.changed().await.is_ok() {
        let now = verdicts.borrow_and_update().clone();
        for (key, verdict) in now.iter().filter(|(key, verdict)| known.get(*key) != Some(*verdict)) {
            tell(key, verdict);
        }
        known = now;
    }
}

fn tell((service, port): &(ServiceName, u16), verdict: &RegistrationVerdict) {
    match verdict {
        RegistrationVerdict::Accepted { endpoint_id } => {
            tracing::info!(%service, port, endpoint = %endpoint_id, "registered");
        }
        RegistrationVerdict::Refused { reason } => {
            tracing::warn!(%service, port, %reason, "federation refuses the registration; it asks again when the source changes");
        }
    }
}

/// Readiness goes to federation as soon as it changes.
#[derive(Debug)]
pub struct TellFederation(pub SidecarDiscovery);

impl TellFederation {
    pub fn new(discovery: SidecarDiscovery) -> Arc<Self> {
        Arc::new(Self(discovery))
    }
}

impl ReadySink for TellFederation {
    fn set_ready(&self, service: &ServiceName, port: u16, ready: bool) {
        self.0.set_ready(service, port, ready);
    }
}
