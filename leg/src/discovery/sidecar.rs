//! The sidecar's discovery: services on demand, gateways of the cluster, grants, and its own registrations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tombolo_api::convert::{InvalidMessage, name};
use tombolo_api::proto::discovery as wire;
use tombolo_api::proto::discovery::discovery_client::DiscoveryClient;
use tombolo_core::addresses::mesh::MeshAddresses;
use tombolo_core::id::{InstanceName, ServiceName};
use tombolo_trust::store::TrustStore;
use tonic::transport::Channel;
use wire::sidecar_request::Kind as Request;
use wire::sidecar_update::Kind as Update;

use super::link::{self, Federation, LinkStatus, Side};
use super::memory::{Keep, Memory, Subject, recall};
use super::model::{
    InboundGrants, InboundPolicies, LocalGateway, Registration, RegistrationVerdict, ServiceState, ServiceView,
    ToldPolicies, Welcome, address_block, address_ranges, imported_addresses, inbound_grants, inbound_policies,
    local_gateways, registration_result, registration_to_wire, revoked,
};

/// Services that one sidecar may be subscribed to at once.
pub const SUBSCRIPTIONS_MAX: usize = 10_000;

/// What was registered, and what federation decided.
pub type Verdicts = BTreeMap<(ServiceName, u16), RegistrationVerdict>;

/// The limit of subscriptions is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {SUBSCRIPTIONS_MAX} services are in use at once")]
pub struct TooManySubscriptions;

/// A handle on the sidecar's discovery. Clones share it; it ends when the last one is gone.
#[derive(Debug, Clone)]
pub struct SidecarDiscovery {
    state: Arc<State>,
    _stop: Arc<DropGuard>,
}

/// Keeps a service subscribed for as long as it lives.
#[derive(Debug)]
pub struct Subscription {
    service: ServiceName,
    updates: watch::Receiver<ServiceState>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    instance: InstanceName,
    zone: Option<String>,
    trust: TrustStore,
    wanted: Mutex<Wanted>,
    changed: Notify,
    status: watch::Sender<LinkStatus>,
    welcome: watch::Sender<Option<Welcome>>,
    gateways: watch::Sender<Arc<Vec<LocalGateway>>>,
    verdicts: watch::Sender<Arc<Verdicts>>,
    grants: ArcSwap<InboundGrants>,
    policies: ArcSwap<ToldPolicies>,
    /// Marked as changed whenever policies were told.
    policies_told: watch::Sender<()>,
    addresses: watch::Sender<MeshAddresses>,
    memory: Option<Memory>,
    /// Services that the process before knew, for as long as federation has not answered this one.
    remembered: Mutex<BTreeMap<ServiceName, Arc<ServiceView>>>,
}

/// The set of mesh addresses is told in parts.
enum Addresses {
    Ranges(wire::AddressRanges),
    Block(wire::AddressBlock),
    Complete(wire::AddressesComplete),
}

/// What federation is to know, and what of it has not been said on the present stream.
#[derive(Debug, Default)]
struct Wanted {
    services: BTreeMap<ServiceName, Wish>,
    /// Services whose subscription is to be said or taken back.
    unsaid: BTreeSet<ServiceName>,
    /// Services that federation believes to be subscribed.
    said: BTreeSet<ServiceName>,
    registrations: BTreeMap<(ServiceName, u16), Registration>,
    registrations_unsaid: bool,
    readiness_unsaid: BTreeSet<(ServiceName, u16)>,
    hello_unsaid: bool,
    bundles_unsaid: bool,
}

#[derive(Debug)]
struct Wish {
    handles: usize,
    state: watch::Sender<ServiceState>,
}

impl SidecarDiscovery {
    /// Starts to connect. Needs a runtime, on which it lives.
    pub fn start(federation: Federation, instance: InstanceName, zone: Option<String>) -> Self {
        let state = Arc::new(State {
            instance,
            zone,
            trust: federation.trust.clone(),
            wanted: Mutex::default(),
            changed: Notify::new(),
            status: watch::Sender::default(),
            welcome: watch::Sender::default(),
            gateways: watch::Sender::default(),
            verdicts: watch::Sender::default(),
            grants: ArcSwap::default(),
            policies: ArcSwap::default(),
            policies_told: watch::Sender::default(),
            addresses: watch::Sender::default(),
            memory: federation.memory.clone().map(Memory::new),
            remembered: Mutex::default(),
        });
        if let Some(memory) = &state.memory {
            recall(&*state, memory, &federation.trust);
        }
        let stop = CancellationToken::new();
        tokio::spawn(link::run(state.clone(), federation, stop.clone()));
        Self { state, _stop: Arc::new(stop.drop_guard()) }
    }

    /// Asks for a service and its changes, until the subscription is dropped. What is known of it already is
    /// there at once.
    pub fn subscribe(&self, service: &ServiceName) -> Result<Subscription, TooManySubscriptions> {
        let mut wanted = self.state.wanted();
        if !wanted.services.contains_key(service) {
            if wanted.services.len() >= SUBSCRIPTIONS_MAX {
                return Err(TooManySubscriptions);
            }
            let known = self.state.remembered().get(service).cloned();
            let wish = Wish {
                handles: 0,
                state: watch::Sender::new(known.map_or(ServiceState::Waiting, ServiceState::Known)),
            };
            wanted.services.insert(service.clone(), wish);
            wanted.unsaid.insert(service.clone());
            self.state.changed.notify_one();
        }
        let wish = wanted.services.get_mut(service).expect("inserted just now");
        wish.handles += 1;
        let updates = wish.state.subscribe();
        Ok(Subscription { service: service.clone(), updates, state: self.state.clone() })
    }

    /// Replaces everything that is registered.
    pub fn register(&self, registrations: Vec<Registration>) {
        let mut wanted = self.state.wanted();
        wanted.registrations = registrations
            .into_iter()
            .map(|registration| ((registration.service.clone(), registration.port), registration))
            .collect();
        wanted.registrations_unsaid = true;
        self.state.changed.notify_one();
    }

    /// Says that a registered application is ready, or not.
    pub fn set_ready(&self, service: &ServiceName, port: u16, ready: bool) {
        let mut wanted = self.state.wanted();
        let key = (service.clone(), port);
        let Some(registration) = wanted.registrations.get_mut(&key) else { return };
        if std::mem::replace(&mut registration.ready, ready) != ready {
            wanted.readiness_unsaid.insert(key);
            self.state.changed.notify_one();
        }
    }

    pub fn welcome(&self) -> watch::Receiver<Option<Welcome>> {
        self.state.welcome.subscribe()
    }

    pub fn gateways(&self) -> watch::Receiver<Arc<Vec<LocalGateway>>> {
        self.state.gateways.subscribe()
    }

    /// What federation decided about each registration, by service and port.
    pub fn verdicts(&self) -> watch::Receiver<Arc<Verdicts>> {
        self.state.verdicts.subscribe()
    }

    /// Which clusters may call what is registered here, as of now.
    pub fn grants(&self) -> arc_swap::Guard<Arc<InboundGrants>> {
        self.state.grants.load()
    }

    /// What decides about callers of a service that is registered here, as of now. `None` before it was told:
    /// nobody may call then.
    pub fn inbound_policies(&self, service: &ServiceName) -> Option<Arc<InboundPolicies>> {
        self.state.policies.load().of(service)
    }

    /// Changes whenever policies about callers were told, of whatever service.
    pub fn inbound_policies_told(&self) -> watch::Receiver<()> {
        self.state.policies_told.subscribe()
    }

    /// Every virtual address of the mesh, as far as it was told; what is there is cheap to clone.
    pub fn addresses(&self) -> watch::Receiver<MeshAddresses> {
        self.state.addresses.subscribe()
    }

    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.state.status.subscribe()
    }

    /// Services that are subscribed to, for the operator.
    pub fn subscriptions(&self) -> Vec<ServiceName> {
        self.state.wanted().services.keys().cloned().collect()
    }
}

impl Subscription {
    pub fn service(&self) -> &ServiceName {
        &self.service
    }

    /// What is known as of now.
    pub fn now(&self) -> ServiceState {
        self.updates.borrow().clone()
    }

    pub fn updates(&self) -> watch::Receiver<ServiceState> {
        self.updates.clone()
    }
}

impl Clone for Subscription {
    fn clone(&self) -> Self {
        if let Some(wish) = self.state.wanted().services.get_mut(&self.service) {
            wish.handles += 1;
        }
        Self { service: self.service.clone(), updates: self.updates.clone(), state: self.state.clone() }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut wanted = self.state.wanted();
        let Some(wish) = wanted.services.get_mut(&self.service) else { return };
        wish.handles -= 1;
        if wish.handles == 0 {
            wanted.services.remove(&self.service);
            wanted.unsaid.insert(self.service.clone());
            self.state.changed.notify_one();
        }
    }
}

impl State {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remembered(&self) -> MutexGuard<'_, BTreeMap<ServiceName, Arc<ServiceView>>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle_addresses(&self, update: Addresses) -> Result<(), String> {
        let mut result = Ok(());
        self.addresses.send_modify(|addresses| {
            result = match update {
                Addresses::Ranges(ranges) => address_ranges(&ranges).map(|ranges| addresses.handle_ranges(ranges)),
                Addresses::Block(block) => address_block(&block).and_then(|held| {
                    addresses.handle_block(block.block, held).map_err(|error| format!("address block: {error}"))
                }),
                Addresses::Complete(complete) => {
                    addresses.handle_complete(&complete.blocks.into_iter().collect());
                    Ok(())
                }
            };
        });
        result
    }

    fn show(&self, service: &ServiceName, state: ServiceState) {
        // A service that was let go of meanwhile has no place any more.
        if let Some(wish) = self.wanted().services.get(service) {
            wish.state.send_replace(state);
        }
    }
}

impl Wanted {
    /// The next subscription to say or take back; a change that was undone meanwhile is not worth a word.
    fn next_subscription(&mut self) -> Option<Request> {
        while let Some(service) = self.unsaid.pop_first() {
            match (self.services.contains_key(&service), self.said.contains(&service)) {
                (true, false) => {
                    self.said.insert(service.clone());
                    return Some(Request::Subscribe(service.to_string()));
                }
                (false, true) => {
                    self.said.remove(&service);
                    return Some(Request::Unsubscribe(service.to_string()));
                }
                (true, true) => {
                    // Let go of and taken up again: the new handle has no state yet.
                    self.said.remove(&service);
                    self.unsaid.insert(service.clone());
                    return Some(Request::Unsubscribe(service.to_string()));
                }
                (false, false) => {}
            }
        }
        None
    }

    fn next_readiness(&mut self) -> Option<Request> {
        while let Some(key) = self.readiness_unsaid.pop_first() {
            if let Some(registration) = self.registrations.get(&key) {
                let (service, port) = (key.0.to_string(), key.1.into());
                return Some(Request::Readiness(wire::Readiness { service, port, ready: registration.ready }));
            }
        }
        None
    }
}

impl Side for State {
    type Request = wire::SidecarRequest;
    type Update = wire::SidecarUpdate;

    async fn open(
        mut client: DiscoveryClient<Channel>,
        requests: ReceiverStream<wire::SidecarRequest>,
    ) -> Result<tonic::Streaming<wire::SidecarUpdate>, tonic::Status> {
        client.sidecar(requests).await.map(tonic::Response::into_inner)
    }

    fn begin(&self) {
        let mut wanted = self.wanted();
        wanted.hello_unsaid = true;
        wanted.registrations_unsaid = !wanted.registrations.is_empty();
        wanted.readiness_unsaid.clear();
        wanted.said.clear();
        wanted.unsaid = wanted.services.keys().cloned().collect();
        wanted.bundles_unsaid = true;
    }

    fn next(&self) -> Option<wire::SidecarRequest> {
        let mut wanted = self.wanted();
        let kind = if std::mem::take(&mut wanted.hello_unsaid) {
            Request::Hello(wire::SidecarHello {
                instance: self.instance.to_string(),
                zone: self.zone.clone().unwrap_or_default(),
            })
        } else if std::mem::take(&mut wanted.registrations_unsaid) {
            wanted.readiness_unsaid.clear();
            let registrations = wanted.registrations.values().map(registration_to_wire).collect();
            Request::Register(wire::Register { registrations })
        } else if let Some(request) = wanted.next_readiness() {
            request
        } else if let Some(request) = wanted.next_subscription() {
            request
        } else if std::mem::take(&mut wanted.bundles_unsaid) {
            Request::Bundles(link::bundles_in_force(&self.trust))
        } else {
            return None;
        };
        Some(wire::SidecarRequest { kind: Some(kind) })
    }

    fn handle(&self, update: wire::SidecarUpdate) -> Result<(), String> {
        let Some(kind) = update.kind else {
            // An update of a newer release.
            return Ok(());
        };
        let refused = |error: InvalidMessage| error.to_string();
        match kind {
            Update::Welcome(welcome) => {
                // It answers: whatever is asked for from now on, it knows better.
                self.remembered().clear();
                self.policies
                    .rcu(|told| ToldPolicies { unknown_there: !welcome.tells_policies, ..ToldPolicies::clone(told) });
                self.welcome.send_replace(Some(welcome.try_into().map_err(refused)?));
            }
            Update::Bundles(bundles) => {
                link::take_bundles(&self.trust, bundles, &self.status);
                self.wanted().bundles_unsaid = true;
                self.changed.notify_one();
            }
            Update::Gateways(gateways) => {
                self.gateways.send_replace(Arc::new(local_gateways(gateways).map_err(refused)?));
            }
            Update::Service(service) => {
                let view: ServiceView = service.try_into().map_err(refused)?;
                self.show(&view.service.clone(), ServiceState::Known(Arc::new(view)));
            }
            Update::ServiceUnknown(service) => {
                self.show(&name("service", &service).map_err(refused)?, ServiceState::Unknown);
            }
            Update::Registration(result) => {
                let (key, verdict) = registration_result(result).map_err(refused)?;
                self.verdicts.send_modify(|verdicts| {
                    Arc::make_mut(verdicts).insert(key, verdict);
                });
            }
            Update::InboundPolicies(policies) => {
                let (service, policies) = inbound_policies(policies).map_err(refused)?;
                let policies = Arc::new(policies);
                self.policies.rcu(|told| {
                    let mut told = ToldPolicies::clone(told);
                    told.services.insert(service.clone(), policies.clone());
                    told
                });
                self.policies_told.send_replace(());
            }
            Update::InboundGrants(grants) => {
                self.grants.store(Arc::new(inbound_grants(grants).map_err(refused)?));
            }
            Update::Revoked(ids) => self.trust.set_revoked(revoked(ids).map_err(refused)?),
            Update::AddressRanges(ranges) => self.handle_addresses(Addresses::Ranges(ranges))?,
            Update::AddressBlock(block) => self.handle_addresses(Addresses::Block(block))?,
            Update::AddressesComplete(complete) => self.handle_addresses(Addresses::Complete(complete))?,
            Update::ImportedAddresses(told) => {
                let imported = imported_addresses(told).map_err(refused)?;
                self.addresses.send_modify(|addresses| addresses.handle_imported(imported));
            }
        }
        Ok(())
    }

    fn keep(update: &wire::SidecarUpdate) -> Keep {
        match &update.kind {
            Some(Update::Welcome(_)) => Keep::Latest(Subject::Welcome),
            Some(Update::Revoked(_)) => Keep::Latest(Subject::Revoked),
            Some(Update::Bundles(_)) => Keep::Latest(Subject::Bundles),
            Some(Update::Gateways(_)) => Keep::Latest(Subject::Gateways),
            Some(Update::InboundPolicies(told)) => Keep::Latest(Subject::InboundPolicies(told.service.clone())),
            Some(Update::InboundGrants(_)) => Keep::Latest(Subject::Grants),
            Some(Update::AddressRanges(_)) => Keep::Latest(Subject::AddressRanges),
            Some(Update::AddressBlock(block)) => Keep::Latest(Subject::AddressBlock(block.block)),
            Some(Update::AddressesComplete(_)) => Keep::Latest(Subject::AddressesComplete),
            Some(Update::ImportedAddresses(_)) => Keep::Latest(Subject::ImportedAddresses),
            Some(Update::Service(service)) => Keep::Latest(Subject::Service(service.service.clone())),
            Some(Update::ServiceUnknown(service)) => Keep::Forget(Subject::Service(service.clone())),
            // What is registered is said anew, and decided anew.
            Some(Update::Registration(_)) | None => Keep::Nothing,
        }
    }

    fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    fn recall(&self, update: wire::SidecarUpdate) -> Result<(), String> {
        let Some(Update::Service(service)) = update.kind else { return self.handle(update) };
        let view: ServiceView = service.try_into().map_err(|error: InvalidMessage| error.to_string())?;
        self.remembered().insert(view.service.clone(), Arc::new(view));
        Ok(())
    }

    fn wants(&self, subject: &Subject) -> bool {
        match subject {
            Subject::Service(service) => {
                service.parse().is_ok_and(|service: ServiceName| self.wanted().services.contains_key(&service))
            }
            Subject::InboundPolicies(service) => {
                self.wanted().registrations.keys().any(|(registered, _)| registered.to_string() == *service)
            }
            Subject::AddressBlock(block) => self.addresses.borrow().has_block(*block),
            _ => true,
        }
    }

    fn changed(&self) -> &Notify {
        &self.changed
    }

    fn status(&self) -> &watch::Sender<LinkStatus> {
        &self.status
    }
}
