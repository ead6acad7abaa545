//! The stream of one sidecar.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tombolo_api::convert::{InvalidMessage, name, port};
use tombolo_api::policy::policies_to_wire;
use tombolo_api::proto::discovery as proto;
use tombolo_api::proto::discovery::sidecar_request::Kind as Asked;
use tombolo_api::proto::discovery::sidecar_update::Kind;
use tombolo_core::catalog::ServiceView;
use tombolo_core::id::{ClusterId, Namespace, ServiceName, SpiffeId};
use tombolo_core::policy::access::Defaults;
use tombolo_core::policy::set::{Policy, PolicySet};
use tombolo_core::refusal::Refusal;
use tombolo_runtime::drain::DrainWatch;
use tombolo_runtime::metrics::Refusals;
use tombolo_trust::bundle::Bundle;
use tonic::{Status, Streaming};

use super::{DiscoveryService, Ended, first, next_generation, wire};
use crate::addresses::Addresses;
use crate::hub::{HubHandle, SidecarJoin, View};
use crate::registry::{Attached, SessionId};

/// Services that one sidecar may follow at once.
pub const SUBSCRIPTIONS_MAX: usize = 1024;

pub(super) struct SidecarStream {
    hub: HubHandle,
    id: SpiffeId,
    session: SessionId,
    requests: Streaming<proto::SidecarRequest>,
    updates: mpsc::Sender<Result<proto::SidecarUpdate, Status>>,
    refusals: Refusals,
    drain: DrainWatch,
    changes: watch::Receiver<u64>,
    told: Told,
}

/// What the sidecar has been told; `None` is nothing yet.
#[derive(Default)]
struct Told {
    bundles: Option<Arc<BTreeMap<ClusterId, Bundle>>>,
    gateways: Option<proto::LocalGateways>,
    revoked: Option<Arc<BTreeSet<SpiffeId>>>,
    grants: Option<proto::InboundGrants>,
    registrations: BTreeMap<(String, u32), proto::RegistrationResult>,
    addresses: Option<Arc<Addresses>>,
    imported: Option<Arc<BTreeMap<ServiceName, Vec<IpAddr>>>>,
    policies: Option<(Arc<PolicySet>, Arc<Defaults>)>,
    /// What decides about callers, for each registered service.
    inbound: BTreeMap<ServiceName, proto::InboundPolicies>,
    /// Every subscription: the view that was sent, or that it is unknown.
    services: BTreeMap<ServiceName, Option<Known>>,
}

#[derive(Clone)]
enum Known {
    Unknown,
    View(Arc<ServiceView>, proto::ServiceNumbers, Vec<Policy>),
}

impl Known {
    fn of(view: &View, service: &ServiceName, caller: Option<&Namespace>) -> Self {
        let known = view.services.get(service).filter(|view| !view.shares.is_empty());
        let Some(known) = known else { return Known::Unknown };
        let policies = caller.map(|caller| view.policies.used(service, caller)).unwrap_or_default();
        Known::View(known.clone(), wire::numbers(known, view.addresses.as_deref()), policies)
    }

    fn is(&self, other: &Known) -> bool {
        match (self, other) {
            (Known::Unknown, Known::Unknown) => true,
            (Known::View(a, numbers, policies), Known::View(b, others, told)) => {
                Arc::ptr_eq(a, b) && numbers == others && policies == told
            }
            _ => false,
        }
    }

    /// Whether it is what `view` says, as far as can be seen without looking numbers and policies up.
    fn is_of(&self, view: &View, service: &ServiceName) -> bool {
        let known = view.services.get(service).filter(|view| !view.shares.is_empty());
        match (self, known) {
            (Known::Unknown, None) => true,
            (Known::View(told, ..), Some(known)) => Arc::ptr_eq(told, known),
            _ => false,
        }
    }
}

fn malformed(error: InvalidMessage) -> Status {
    Status::invalid_argument(error.to_string())
}

impl SidecarStream {
    pub(super) async fn begin(
        service: &DiscoveryService,
        id: SpiffeId,
        mut requests: Streaming<proto::SidecarRequest>,
        updates: mpsc::Sender<Result<proto::SidecarUpdate, Status>>,
    ) -> Result<Self, Status> {
        let Some(Asked::Hello(hello)) = first(&mut requests).await?.and_then(|first| first.kind) else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        let zone = (!hello.zone.is_empty()).then(|| hello.zone.chars().take(63).collect::<String>());
        let instance = name("instance", &hello.instance).map_err(malformed)?;
        let attached = Attached::Here;
        let join = SidecarJoin { instance, spiffe_id: id.clone(), zone: zone.clone(), attached };
        let joined = service.hub.sidecar_joined(join).await;
        let joined = joined.map_err(|_| Status::unavailable(Refusal::Draining.explanation()))?;
        let Some(session) = joined else {
            service.refusals.inc(Refusal::Overloaded);
            return Err(Status::resource_exhausted(Refusal::Overloaded.explanation()));
        };
        let view = service.hub.view();
        let welcome = proto::Welcome {
            cluster: view.cluster.to_string(),
            trust_domain: view.trust_domain.to_string(),
            zone: zone.unwrap_or_default(),
            tells_policies: true,
        };
        let stream = Self {
            hub: service.hub.clone(),
            id,
            session,
            requests,
            updates,
            refusals: service.refusals.clone(),
            drain: service.drain.clone(),
            changes: service.hub.changes(),
            told: Told::default(),
        };
        // The channel is new and has room.
        let _ = stream.updates.try_send(Ok(proto::SidecarUpdate { kind: Some(Kind::Welcome(welcome)) }));
        Ok(stream)
    }

    pub(super) async fn run(mut self) {
        if let Err(Ended::Told(status)) = self.follow().await {
            let _ = self.updates.try_send(Err(*status));
        }
        // Fails only when the process is stopping.
        let _ = self.hub.sidecar_left(self.session).await;
    }

    async fn follow(&mut self) -> Result<(), Ended> {
        loop {
            self.changes.borrow_and_update();
            self.tell().await?;
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.handle(request).await?,
                    None => return Err(Ended::Closed),
                },
                changed = next_generation(&self.hub, &mut self.changes, &self.id) => changed?,
                () = self.drain.draining() => {
                    return Err(Status::unavailable(Refusal::Draining.explanation()).into());
                }
                () = self.updates.closed() => return Err(Ended::Closed),
            }
        }
    }

    async fn handle(&mut self, request: proto::SidecarRequest) -> Result<(), Ended> {
        match request.kind {
            Some(Asked::Subscribe(service)) => self.subscribe(&service).await?,
            Some(Asked::Unsubscribe(service)) => {
                let service: ServiceName = name("service", &service).map_err(malformed)?;
                self.told.services.remove(&service);
            }
            Some(Asked::Register(register)) => {
                let claims: Result<Vec<_>, _> = register.registrations.into_iter().map(wire::claim).collect();
                self.told.registrations.clear();
                self.hub.registered(self.session, claims.map_err(malformed)?).await?;
            }
            Some(Asked::Readiness(proto::Readiness { service, port: number, ready })) => {
                let service = name("service", &service).map_err(malformed)?;
                let number = port("port", number).map_err(malformed)?;
                self.hub.readiness(self.session, service, number, ready).await?;
            }
            Some(Asked::Bundles(bundles)) => {
                let sequences = wire::bundles_in_force(bundles).map_err(malformed)?;
                self.hub.bundles_in_force(self.session, sequences).await?;
            }
            // A second Hello changes nothing; a kind of a newer release is passed over.
            Some(Asked::Hello(_)) | None => {}
        }
        Ok(())
    }

    async fn subscribe(&mut self, service: &str) -> Result<(), Ended> {
        let Ok(parsed) = service.parse::<ServiceName>() else {
            // A name that can't exist is unknown, and the sidecar's other subscriptions go on.
            let text = service.chars().take(200).collect();
            return self.send(Kind::ServiceUnknown(text)).await;
        };
        if self.told.services.len() >= SUBSCRIPTIONS_MAX && !self.told.services.contains_key(&parsed) {
            self.refusals.inc(Refusal::Overloaded);
            tracing::warn!(id = %self.id, %parsed, "more than {SUBSCRIPTIONS_MAX} subscriptions of one sidecar");
            return self.send(Kind::ServiceUnknown(parsed.to_string())).await;
        }
        // Asked for again, it is told again.
        self.told.services.insert(parsed, None);
        Ok(())
    }

    /// Sends what differs from what was sent.
    async fn tell(&mut self) -> Result<(), Ended> {
        let view = self.hub.view();
        // The view keeps the allocation of what has not changed.
        if !self.told.bundles.as_ref().is_some_and(|told| Arc::ptr_eq(told, &view.bundles)) {
            self.told.bundles = Some(view.bundles.clone());
            self.send(Kind::Bundles(wire::bundles(&view))).await?;
        }
        if !self.told.revoked.as_ref().is_some_and(|told| Arc::ptr_eq(told, &view.revoked)) {
            self.told.revoked = Some(view.revoked.clone());
            self.send(Kind::Revoked(wire::revoked(&view))).await?;
        }
        let gateways = wire::gateways(&view);
        if self.told.gateways.as_ref() != Some(&gateways) {
            self.told.gateways = Some(gateways.clone());
            self.send(Kind::Gateways(gateways)).await?;
        }
        let repoliced = self.told.policies.as_ref().is_none_or(|(policies, access)| {
            !Arc::ptr_eq(policies, &view.policies) || !Arc::ptr_eq(access, &view.access)
        });
        self.told.policies = Some((view.policies.clone(), view.access.clone()));
        self.tell_inbound_policies(&view, repoliced).await?;
        self.tell_registrations(&view).await?;
        let reimported = self.told.imported.as_ref().map(Arc::as_ptr) != view.imported.as_ref().map(Arc::as_ptr);
        if let Some(imported) = view.imported.as_ref().filter(|_| reimported) {
            // First, since a sidecar is ready when it knows all the others.
            self.told.imported = Some(imported.clone());
            self.send(Kind::ImportedAddresses(wire::imported_addresses(imported))).await?;
        }
        let addresses = view.addresses.as_ref();
        let renumbered = self.told.addresses.as_ref().map(Arc::as_ptr) != addresses.map(Arc::as_ptr);
        if let Some(addresses) = addresses.filter(|_| renumbered) {
            self.tell_addresses(addresses).await?;
        }
        self.tell_services(&view, renumbered || repoliced).await
    }

    /// The set of mesh addresses: the blocks that differ, and then which there are.
    async fn tell_addresses(&mut self, addresses: &Arc<Addresses>) -> Result<(), Ended> {
        let told = self.told.addresses.replace(addresses.clone());
        let told = told.filter(|told| told.ranges == addresses.ranges);
        if told.is_none() {
            self.send(Kind::AddressRanges(wire::address_ranges(&addresses.ranges))).await?;
        }
        let before = told.map(|told| told.blocks.clone());
        for (number, block) in &addresses.blocks {
            let known = before.as_ref().and_then(|before| before.get(number));
            if !known.is_some_and(|known| Arc::ptr_eq(known, block)) {
                self.send(Kind::AddressBlock(wire::address_block(*number, block))).await?;
            }
        }
        if before.is_none_or(|before| !before.keys().eq(addresses.blocks.keys())) {
            let blocks = addresses.blocks.keys().copied().collect();
            self.send(Kind::AddressesComplete(proto::AddressesComplete { blocks })).await?;
        }
        Ok(())
    }

    /// Before the registrations: nobody is to be served without what decides about callers.
    async fn tell_inbound_policies(&mut self, view: &View, repoliced: bool) -> Result<(), Ended> {
        let Some(own) = view.sidecars.get(&self.session) else { return Ok(()) };
        self.told.inbound.retain(|service, _| own.inbound_grants.contains_key(service));
        for service in own.inbound_grants.keys() {
            let told = self.told.inbound.get(service);
            if told.is_some_and(|told| !repoliced && told.unmeshed == wire::unmeshed_callers(view, service)) {
                continue;
            }
            let policies = wire::inbound_policies(view, service);
            if told != Some(&policies) {
                self.told.inbound.insert(service.clone(), policies.clone());
                self.send(Kind::InboundPolicies(policies)).await?;
            }
        }
        Ok(())
    }

    async fn tell_registrations(&mut self, view: &View) -> Result<(), Ended> {
        let Some(own) = view.sidecars.get(&self.session) else { return Ok(()) };
        for verdict in &own.registrations {
            let result = proto::RegistrationResult {
                service: verdict.service.to_string(),
                port: verdict.port.into(),
                refused: verdict.refused.clone().unwrap_or_default(),
                endpoint_id: verdict.endpoint.to_string(),
            };
            let key = (result.service.clone(), result.port);
            if self.told.registrations.get(&key) != Some(&result) {
                if !result.refused.is_empty() {
                    self.refusals.inc(Refusal::IdentityDenied);
                    tracing::warn!(id = %self.id, reason = result.refused, "a registration is refused");
                }
                self.told.registrations.insert(key, result.clone());
                self.send(Kind::Registration(result)).await?;
            }
        }
        let grant = |(service, clusters): (&ServiceName, &BTreeSet<_>)| proto::InboundGrant {
            service: service.to_string(),
            clusters: clusters.iter().map(ToString::to_string).collect(),
        };
        let grants = proto::InboundGrants { grants: own.inbound_grants.iter().map(grant).collect() };
        if self.told.grants.as_ref() != Some(&grants) {
            self.told.grants = Some(grants.clone());
            self.send(Kind::InboundGrants(grants)).await?;
        }
        Ok(())
    }

    async fn tell_services(&mut self, view: &View, anew: bool) -> Result<(), Ended> {
        let caller = self.id.as_workload().and_then(|(namespace, _)| namespace.parse::<Namespace>().ok());
        let news: Vec<(ServiceName, Known)> = (self.told.services.iter())
            .filter(|(service, told)| anew || !told.as_ref().is_some_and(|told| told.is_of(view, service)))
            .map(|(service, told)| (service, told, Known::of(view, service, caller.as_ref())))
            .filter(|(_, told, known)| !told.as_ref().is_some_and(|told| told.is(known)))
            .map(|(service, _, known)| (service.clone(), known))
            .collect();
        for (service, known) in news {
            self.told.services.insert(service.clone(), Some(known.clone()));
            match known {
                Known::Unknown => self.send(Kind::ServiceUnknown(service.to_string())).await?,
                Known::View(view, numbers, policies) => {
                    let policies = policies_to_wire(&policies);
                    self.send(Kind::Service(proto::Service { policies, ..wire::service(&view, numbers) })).await?;
                }
            }
        }
        Ok(())
    }

    async fn send(&self, kind: Kind) -> Result<(), Ended> {
        self.updates.send(Ok(proto::SidecarUpdate { kind: Some(kind) })).await.map_err(|_| Ended::Closed)
    }
}
