//! Which sidecar may deliver which service, and how registrations and declared endpoints become the
//! endpoints that this cluster serves.
//!
//! A declared endpoint (slice) is ready only when a sidecar has registered for it and says so; a
//! registration that no slice declares adds an endpoint.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::catalog::{Delivery, LocalShare};
use crate::id::{EndpointId, InstanceName, ServiceName, SpiffeId};
use crate::model::{Endpoint, Export, Transport};
use crate::sni::SYSTEM_NAMESPACE;
use crate::source::{LocalService, LocalState};

/// What one sidecar has registered for one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    /// Id of the endpoint should no slice declare one for this instance.
    pub endpoint: EndpointId,
    pub spiffe_id: SpiffeId,
    pub zone: Option<String>,
    pub ports: BTreeMap<u16, Delivery>,
}

pub type Registrations = BTreeMap<ServiceName, BTreeMap<InstanceName, Registered>>;

/// Why a registration is not in force (yet): it is judged again whenever the source changes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistrationRefused {
    #[error("no Service {0} is declared in this cluster's source")]
    UnknownService(ServiceName),
    #[error("Service {service} has no TCP port {port}")]
    UnknownPort { service: ServiceName, port: u16 },
    #[error("{id} may not serve {service}; name its service account in the annotation tombolo.dev/service-accounts")]
    IdentityNotAllowed { service: ServiceName, id: SpiffeId },
}

/// Whether `id` may deliver this port of this service.
pub fn check(state: &LocalState, service: &ServiceName, port: u16, id: &SpiffeId) -> Result<(), RegistrationRefused> {
    let declared = state.services.get(service).ok_or_else(|| RegistrationRefused::UnknownService(service.clone()))?;
    if !declared.ports.iter().any(|declared| declared.port == port && declared.transport == Transport::Tcp) {
        return Err(RegistrationRefused::UnknownPort { service: service.clone(), port });
    }
    if !declared.server_ids.contains(id) {
        return Err(RegistrationRefused::IdentityNotAllowed { service: service.clone(), id: id.clone() });
    }
    Ok(())
}

/// Every declared service with the endpoints that it really has.
pub fn local_shares(state: &LocalState, registrations: &Registrations) -> BTreeMap<ServiceName, LocalShare> {
    let none = BTreeMap::new();
    let share = |(name, declared): (&ServiceName, &LocalService)| {
        (name.clone(), local_share(state, declared, registrations.get(name).unwrap_or(&none)))
    };
    state.services.iter().map(share).collect()
}

fn local_share(
    state: &LocalState,
    declared: &LocalService,
    registered: &BTreeMap<InstanceName, Registered>,
) -> LocalShare {
    let in_force = |registered: &Registered| -> BTreeMap<u16, Delivery> {
        let allowed = |port: u16| check(state, &declared.service, port, &registered.spiffe_id).is_ok();
        registered.ports.iter().filter(|(port, _)| allowed(**port)).map(|(port, d)| (*port, d.clone())).collect()
    };
    let mut by_instance: BTreeMap<&InstanceName, (&Registered, BTreeMap<u16, Delivery>)> =
        registered.iter().map(|(instance, registered)| (instance, (registered, in_force(registered)))).collect();
    by_instance.retain(|_, (_, ports)| !ports.is_empty());

    let (mut endpoints, mut deliveries) = (BTreeMap::new(), BTreeMap::new());
    for (id, slice) in &declared.endpoints {
        let registered = slice.instance.as_ref().and_then(|instance| by_instance.remove(instance));
        let mut endpoint = Endpoint {
            id: id.clone(),
            hostname: slice.hostname.clone(),
            zone: slice.zone.clone(),
            weight: slice.weight.max(1),
            ready: false,
        };
        if let Some((registered, mut ports)) = registered {
            endpoint.zone = endpoint.zone.or_else(|| registered.zone.clone());
            ports.values_mut().for_each(|delivery| delivery.ready &= slice.declared_ready);
            endpoint.ready = ports.values().all(|delivery| delivery.ready);
            deliveries.insert(id.clone(), ports);
        }
        endpoints.insert(id.clone(), endpoint);
    }
    for (registered, ports) in by_instance.into_values() {
        let (id, zone) = (registered.endpoint.clone(), registered.zone.clone());
        let ready = ports.values().all(|delivery| delivery.ready);
        endpoints.insert(id.clone(), Endpoint { id: id.clone(), hostname: None, zone, weight: 1, ready });
        deliveries.insert(id, ports);
    }
    let export = Export {
        service: declared.service.clone(),
        created: declared.exported.unwrap_or(Timestamp::MAX),
        kind: declared.kind,
        session_affinity: declared.session_affinity,
        ports: declared.ports.clone(),
        server_ids: declared.server_ids.clone(),
        endpoints,
        unmeshed: declared.unmeshed,
        routes: state.policies.produced(&declared.service),
    };
    let exported = declared.exported.is_some() && declared.service.namespace().as_str() != SYSTEM_NAMESPACE;
    LocalShare { export: Arc::new(export), exported, deliveries }
}
