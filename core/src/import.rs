//! What one peer has published to this cluster, as far as it was acceptable, and how each further update
//! changes it.
//!
//! Import grants are not applied here but where views are made, so that a widened grant takes effect
//! without asking the peer again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::bundle::{self, BundleRefused, Version};
use crate::id::{EndpointId, Position, ServiceName, SpiffeId, TrustDomain};
use crate::model::{Endpoint, Export, GatewayAddress};
use crate::policy::InvalidField;
use crate::publish::{Change, Published, Revocations, Roots, Update};
use crate::sni::SYSTEM_NAMESPACE;

/// Bounds on what one peer may make this cluster hold.
pub const EXPORTS_MAX: usize = 10_000;
pub const ENDPOINTS_MAX: usize = 10_000;
pub const ENDPOINTS_TOTAL_MAX: usize = 100_000;
/// Routes, over all of a peer's exports.
pub const ROUTES_TOTAL_MAX: usize = 1_000;
const PORTS_MAX: usize = 256;
const SERVER_IDS_MAX: usize = 256;
const GATEWAYS_MAX: usize = 64;
const ROOTS_MAX: usize = 32;
const REVOCATIONS_MAX: usize = 10_000;

/// Why an update of a peer is not taken. The position moves on all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdateRefused {
    #[error("{0}: services of namespace tombolo-system can't be exported")]
    SystemNamespace(ServiceName),
    #[error("{service}: server identity {id} does not lie in the exporter's trust domain {trust_domain}")]
    ForeignServerId { service: ServiceName, id: SpiffeId, trust_domain: TrustDomain },
    #[error("{service}: server identity {id} is reserved for tombolo's own roles")]
    ReservedServerId { service: ServiceName, id: SpiffeId },
    #[error("{0}: an endpoint of a service that is not exported")]
    UnknownService(ServiceName),
    #[error("the bundle is of trust domain {offered}, but the peer's is {held}")]
    ForeignBundle { held: TrustDomain, offered: TrustDomain },
    #[error(transparent)]
    Bundle(#[from] BundleRefused),
    #[error("a peer can revoke only its own identities, and {0} is not one")]
    ForeignRevocation(SpiffeId),
    #[error("revocations of sequence {offered}, but {held} is held: they never go back")]
    RevocationsWentBack { held: u64, offered: u64 },
    #[error("revocations of the same sequence {0} may only grow")]
    RevocationsShrank(u64),
    #[error("{service} is taken without one of its routes: {reason}")]
    Route { service: ServiceName, reason: InvalidField },
    #[error("more than {limit} {what} from one peer")]
    TooMany { limit: usize, what: &'static str },
}

/// The stream itself makes no sense: end it and begin again from the last position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamBroken {
    #[error("an update of epoch {got} outside a snapshot, while epoch {held} is held")]
    OtherEpoch { held: u64, got: u64 },
    #[error("the snapshot ended before it began")]
    NoSnapshot,
}

/// What an update touched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Touched {
    pub services: BTreeSet<ServiceName>,
    pub roots: bool,
    pub gateways: bool,
    pub revocations: bool,
    pub refused: Option<UpdateRefused>,
}

/// An export that breaks a rule: held back, shown to the operator, and kept so that it is still known
/// after a restart.
#[derive(Debug, Clone, PartialEq)]
pub struct RefusedExport {
    pub reason: UpdateRefused,
    pub export: Arc<Export>,
}

/// What is held of one peer. Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct Import {
    trust_domain: TrustDomain,
    position: Position,
    held: Published,
    refused: BTreeMap<ServiceName, RefusedExport>,
    endpoints_total: usize,
    /// Services whose exports bring routes.
    routed: BTreeSet<ServiceName>,
    routes_total: usize,
    /// Services named by the snapshot that is being received.
    snapshot: Option<BTreeSet<ServiceName>>,
}

impl Import {
    /// Nothing yet, from a peer whose identities lie in `trust_domain`.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            position: Position::default(),
            held: Published::default(),
            refused: BTreeMap::new(),
            endpoints_total: 0,
            routed: BTreeSet::new(),
            routes_total: 0,
            snapshot: None,
        }
    }

    /// The position up to which everything is held: where to resume. Zero before the first snapshot ended.
    pub fn position(&self) -> Position {
        self.position
    }

    pub fn exports(&self) -> &BTreeMap<ServiceName, Arc<Export>> {
        &self.held.exports
    }

    /// Services whose exports bring routes.
    pub fn routed(&self) -> &BTreeSet<ServiceName> {
        &self.routed
    }

    pub fn refused(&self) -> &BTreeMap<ServiceName, RefusedExport> {
        &self.refused
    }

    pub fn roots(&self) -> Option<&Arc<Roots>> {
        self.held.roots.as_ref()
    }

    pub fn gateways(&self) -> &Arc<Vec<GatewayAddress>> {
        &self.held.gateways
    }

    pub fn revocations(&self) -> &Arc<Revocations> {
        &self.held.revocations
    }

    /// Whether a snapshot is being received, during which nothing can be acknowledged.
    pub fn in_snapshot(&self) -> bool {
        self.snapshot.is_some()
    }

    /// Takes the bundle that the peering brought, unless a later one is held.
    pub fn seed_roots(&mut self, roots: Arc<Roots>) {
        if self.held.roots.as_ref().is_none_or(|held| held.sequence < roots.sequence) {
            self.held.roots = Some(roots);
        }
    }

    /// A new stream begins: a snapshot that was cut off counts for nothing but what it added.
    pub fn handle_reconnect(&mut self) {
        self.snapshot = None;
    }

    /// Everything held, as updates that [`Import::handle_update`] reads back; refused exports included.
    pub fn snapshot(&self) -> Vec<Update> {
        let mut updates = self.held.snapshot(self.position);
        let complete = updates.pop().expect("a snapshot ends in Complete");
        let refused = self.refused.values().map(|refused| Change::Export(refused.export.clone()));
        updates.extend(refused.map(|change| Update { position: self.position, change }));
        updates.push(complete);
        updates
    }

    /// Applies one update. What it breaks of the rules is in `refused`, and everything else holds.
    pub fn handle_update(&mut self, update: Update) -> Result<Touched, StreamBroken> {
        let Update { position, change } = update;
        match change {
            Change::Heartbeat => return Ok(Touched::default()),
            Change::SnapshotBegin => {
                self.snapshot = Some(BTreeSet::new());
                return Ok(Touched::default());
            }
            Change::Complete => return self.complete(position),
            _ => {}
        }
        if self.snapshot.is_none() && position.epoch != self.position.epoch {
            return Err(StreamBroken::OtherEpoch { held: self.position.epoch, got: position.epoch });
        }
        let mut touched = Touched::default();
        touched.refused = self.apply(change, &mut touched).err();
        if self.snapshot.is_none() {
            self.position.revision = self.position.revision.max(position.revision);
        }
        Ok(touched)
    }

    /// Passes over an update that could not be read: a kind of a newer release, or a malformed value.
    pub fn handle_unreadable(&mut self, position: Position) {
        if self.snapshot.is_none() && position.epoch == self.position.epoch {
            self.position.revision = self.position.revision.max(position.revision);
        }
    }

    fn apply(&mut self, change: Change, touched: &mut Touched) -> Result<(), UpdateRefused> {
        match change {
            Change::Export(export) => self.export(export, touched),
            Change::ExportRemoved(service) => {
                self.remove(&service, touched);
                Ok(())
            }
            Change::Endpoint(service, endpoint) => self.endpoint(service, endpoint, touched),
            Change::EndpointRemoved(service, id) => self.endpoint_removed(service, &id, touched),
            Change::Roots(roots) => {
                touched.roots = self.new_roots(roots)?;
                Ok(())
            }
            Change::Gateways(gateways) => {
                limit(gateways.len(), GATEWAYS_MAX, "gateway addresses")?;
                touched.gateways = self.held.gateways != gateways;
                self.held.gateways = gateways;
                Ok(())
            }
            Change::Revocations(revocations) => {
                touched.revocations = self.new_revocations(revocations)?;
                Ok(())
            }
            Change::SnapshotBegin | Change::Complete | Change::Heartbeat => Ok(()),
        }
    }

    /// Absence deletes here and nowhere else.
    fn complete(&mut self, position: Position) -> Result<Touched, StreamBroken> {
        let named = self.snapshot.take().ok_or(StreamBroken::NoSnapshot)?;
        let mut touched = Touched::default();
        let known: Vec<ServiceName> = self.held.exports.keys().chain(self.refused.keys()).cloned().collect();
        for service in known.iter().filter(|service| !named.contains(*service)) {
            self.remove(service, &mut touched);
        }
        self.position = position;
        Ok(touched)
    }

    fn export(&mut self, export: Arc<Export>, touched: &mut Touched) -> Result<(), UpdateRefused> {
        let service = export.service.clone();
        if let Some(named) = &mut self.snapshot
            && named.len() < EXPORTS_MAX
        {
            named.insert(service.clone());
        }
        // The peer no longer says what it said before, so the earlier export goes even if this one is refused.
        let before = self.held.exports.get(&service).cloned();
        self.remove(&service, touched);
        // Above the bound it is its routes that there is no room for, not the service.
        let no_room = limit(self.routes_total + export.routes.len(), ROUTES_TOTAL_MAX, "routes").err();
        let export = match &no_room {
            Some(_) => Arc::new(Export { routes: Vec::new(), ..Arc::unwrap_or_clone(export) }),
            None => export,
        };
        if let Err(reason) = self.acceptable(&export) {
            if self.refused.len() < EXPORTS_MAX && !matches!(reason, UpdateRefused::TooMany { .. }) {
                self.refused.insert(service, RefusedExport { reason: reason.clone(), export });
            }
            return Err(reason);
        }
        if before.is_none_or(|before| before != export) {
            touched.services.insert(service.clone());
        } else {
            touched.services.remove(&service);
        }
        self.endpoints_total += export.endpoints.len();
        self.routes_total += export.routes.len();
        if !export.routes.is_empty() {
            self.routed.insert(service.clone());
        }
        self.held.exports.insert(service, export);
        no_room.map_or(Ok(()), Err)
    }

    fn acceptable(&self, export: &Export) -> Result<(), UpdateRefused> {
        let service = &export.service;
        limit(self.held.exports.len() + 1, EXPORTS_MAX, "exports")?;
        limit(self.endpoints_total + export.endpoints.len(), ENDPOINTS_TOTAL_MAX, "endpoints")?;
        limit(export.endpoints.len(), ENDPOINTS_MAX, "endpoints of one service")?;
        limit(export.ports.len(), PORTS_MAX, "ports of one service")?;
        limit(export.server_ids.len(), SERVER_IDS_MAX, "server identities of one service")?;
        if service.namespace().as_str() == SYSTEM_NAMESPACE {
            return Err(UpdateRefused::SystemNamespace(service.clone()));
        }
        for id in &export.server_ids {
            let (service, id) = (service.clone(), id.clone());
            if *id.trust_domain() != self.trust_domain {
                return Err(UpdateRefused::ForeignServerId { service, id, trust_domain: self.trust_domain.clone() });
            }
            if id.is_reserved() {
                return Err(UpdateRefused::ReservedServerId { service, id });
            }
        }
        Ok(())
    }

    fn remove(&mut self, service: &ServiceName, touched: &mut Touched) {
        self.refused.remove(service);
        if let Some(export) = self.held.exports.remove(service) {
            self.endpoints_total -= export.endpoints.len();
            self.routes_total -= export.routes.len();
            self.routed.remove(service);
            touched.services.insert(service.clone());
        }
    }

    fn endpoint(
        &mut self,
        service: ServiceName,
        endpoint: Endpoint,
        touched: &mut Touched,
    ) -> Result<(), UpdateRefused> {
        if self.refused.contains_key(&service) {
            return Ok(());
        }
        let Some(export) = self.held.exports.get_mut(&service) else {
            return Err(UpdateRefused::UnknownService(service));
        };
        let held = export.endpoints.get(&endpoint.id);
        if held == Some(&endpoint) {
            return Ok(());
        }
        if held.is_none() {
            limit(export.endpoints.len() + 1, ENDPOINTS_MAX, "endpoints of one service")?;
            limit(self.endpoints_total + 1, ENDPOINTS_TOTAL_MAX, "endpoints")?;
            self.endpoints_total += 1;
        }
        Arc::make_mut(export).endpoints.insert(endpoint.id.clone(), endpoint);
        touched.services.insert(service);
        Ok(())
    }

    fn endpoint_removed(
        &mut self,
        service: ServiceName,
        id: &EndpointId,
        touched: &mut Touched,
    ) -> Result<(), UpdateRefused> {
        if self.refused.contains_key(&service) {
            return Ok(());
        }
        let Some(export) = self.held.exports.get_mut(&service) else {
            return Err(UpdateRefused::UnknownService(service));
        };
        if export.endpoints.contains_key(id) {
            Arc::make_mut(export).endpoints.remove(id);
            self.endpoints_total -= 1;
            touched.services.insert(service);
        }
        Ok(())
    }

    fn new_roots(&mut self, roots: Arc<Roots>) -> Result<bool, UpdateRefused> {
        if roots.trust_domain != self.trust_domain {
            let (held, offered) = (self.trust_domain.clone(), roots.trust_domain.clone());
            return Err(UpdateRefused::ForeignBundle { held, offered });
        }
        limit(roots.der.len(), ROOTS_MAX, "roots")?;
        // The rule compares digests; here, where the roots themselves are at hand, any two different values do.
        let version = |roots: &Roots, digest| Version { sequence: roots.sequence, digest };
        let held = self.held.roots.as_deref().map(|held| version(held, [u8::from(held.der != roots.der); 32]));
        let new = bundle::accept(held, version(&roots, [0; 32]))? == bundle::Acceptance::Replace;
        if new {
            self.held.roots = Some(roots);
        }
        Ok(new)
    }

    fn new_revocations(&mut self, offered: Arc<Revocations>) -> Result<bool, UpdateRefused> {
        limit(offered.ids.len(), REVOCATIONS_MAX, "revocations")?;
        if let Some(foreign) = offered.ids.iter().find(|id| *id.trust_domain() != self.trust_domain) {
            return Err(UpdateRefused::ForeignRevocation(foreign.clone()));
        }
        let held = &self.held.revocations;
        if offered.sequence < held.sequence {
            return Err(UpdateRefused::RevocationsWentBack { held: held.sequence, offered: offered.sequence });
        }
        if offered.sequence == held.sequence && !offered.ids.is_superset(&held.ids) {
            return Err(UpdateRefused::RevocationsShrank(held.sequence));
        }
        let new = *held != offered;
        self.held.revocations = offered;
        Ok(new)
    }
}

fn limit(count: usize, limit: usize, what: &'static str) -> Result<(), UpdateRefused> {
    if count > limit { Err(UpdateRefused::TooMany { limit, what }) } else { Ok(()) }
}
