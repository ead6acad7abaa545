//! The services that this sidecar's application uses: asked for at the first use, followed while in use,
//! let go of when idle. Requests read snapshots; only the first one for a name waits.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tombolo_core::id::{ClusterId, ServiceName};
use tombolo_core::refusal::Refusal;
use tombolo_leg::discovery::{ServiceState, ServiceView, SidecarDiscovery, Subscription};

use super::name;
use super::refuse::Refused;
use super::route::{Route, Surroundings};

/// What is told about one service, for as long as it is held. Clones hold it too.
#[derive(Clone)]
pub struct Feed {
    pub updates: watch::Receiver<ServiceState>,
    pub hold: Option<Subscription>,
}

/// Where services are learnt about: the federation, or whoever stands in for it.
pub trait ServiceSource: Send + Sync {
    fn subscribe(&self, service: &ServiceName) -> Result<Feed, Refused>;
}

impl ServiceSource for SidecarDiscovery {
    fn subscribe(&self, service: &ServiceName) -> Result<Feed, Refused> {
        let held = SidecarDiscovery::subscribe(self, service)
            .map_err(|error| Refused::new(Refusal::Overloaded, error.to_string()))?;
        Ok(Feed { updates: held.updates(), hold: Some(held) })
    }
}

#[derive(Debug, Clone, Copy)]
pub struct ServiceLimits {
    /// Services followed at once.
    pub services: usize,
    /// How long the first request for a service waits.
    pub wait: Duration,
    /// Without use for this long a service is let go of.
    pub idle: Duration,
}

/// Ports of one service that can be asked for at once; a caller that tries them all gets no further.
const PORTS_MAX: usize = 256;

pub struct Services {
    source: Box<dyn ServiceSource>,
    around: Surroundings,
    limits: ServiceLimits,
    /// By authority as requests write it, for the hot path.
    by_authority: ArcSwap<HashMap<Box<str>, Arc<Route>>>,
    /// The routes of all entries, for the hot path too: what a request's own route sends elsewhere looks here.
    by_service: ArcSwap<HashMap<ServiceName, Vec<Arc<Route>>>>,
    entries: Mutex<BTreeMap<ServiceName, Entry>>,
}

/// By port, and by the one cluster that a route means.
type Routes = Arc<Mutex<BTreeMap<(u16, Option<ClusterId>), Arc<Route>>>>;

struct Entry {
    feed: Feed,
    routes: Routes,
    follower: AbortHandle,
}

/// A route that somebody looks at, with what keeps it informed while it is one that no request uses.
pub struct Looked {
    pub route: Arc<Route>,
    _feed: Option<Feed>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Services {
    pub fn new(source: Box<dyn ServiceSource>, around: Surroundings, limits: ServiceLimits) -> Self {
        let (by_authority, by_service) = Default::default();
        Self { source, around, limits, by_authority, by_service, entries: Mutex::default() }
    }

    /// The route for an authority that was resolved before.
    pub fn known(&self, authority: &str) -> Option<Arc<Route>> {
        self.by_authority.load().get(authority).filter(|route| route.is_exported()).cloned()
    }

    /// The route for an authority; waits for the first word on its service. `port` is what the scheme implies.
    pub async fn resolve(&self, authority: &str, port: u16) -> Result<Arc<Route>, Refused> {
        let (service, port) = name::parse(authority, port)?;
        let route = self.route(&service, port).await?;
        self.remember(authority, &route);
        Ok(route)
    }

    pub async fn route(&self, service: &ServiceName, port: u16) -> Result<Arc<Route>, Refused> {
        self.route_in(service, port, None).await
    }

    /// The route to the endpoints of one cluster alone, or of all. Takes a lock only where there is none yet.
    pub async fn route_in(
        &self,
        service: &ServiceName,
        port: u16,
        only: Option<&ClusterId>,
    ) -> Result<Arc<Route>, Refused> {
        if let Some(route) = self.standing(service, port, only) {
            return Ok(route);
        }
        let (mut updates, routes) = {
            let mut entries = lock(&self.entries);
            let entry = self.entry(&mut entries, service)?;
            (entry.feed.updates.clone(), entry.routes.clone())
        };
        self.told(&mut updates, service, port).await?;
        let key = (port, only.cloned());
        let route = {
            let mut routes = lock(&routes);
            if let Some(route) = routes.get(&key) {
                return Ok(route.clone());
            }
            if routes.len() >= PORTS_MAX {
                return Err(Refused::new(Refusal::Overloaded, format!("{service}: too many of its ports are in use")));
            }
            let route = Arc::new(Route::new(service.clone(), port, key.1.clone(), self.around.clone()));
            let now = Instant::now();
            route.begin(now);
            // Read again under the lock: the follower may have handed a newer state to the other routes just now.
            let newest = match &*updates.borrow() {
                ServiceState::Known(newest) => Some(newest.clone()),
                ServiceState::Waiting | ServiceState::Unknown => None,
            };
            route.apply(newest, now);
            routes.insert(key, route.clone());
            route
        };
        self.index(&lock(&self.entries));
        Ok(route)
    }

    /// The route that is there already and has somewhere to go.
    fn standing(&self, service: &ServiceName, port: u16, only: Option<&ClusterId>) -> Option<Arc<Route>> {
        let known = self.by_service.load();
        let of_service = known.get(service)?.iter();
        let mut meant = of_service.filter(|route| route.port == port && route.only.as_ref() == only);
        meant.next().filter(|route| route.is_exported()).cloned()
    }

    /// The route as [`route_in`](Self::route_in) has it, for somebody who sends nothing: nobody else sees that it was
    /// looked at. A service that no request uses is asked for, and let go of.
    pub async fn look(&self, service: &ServiceName, port: u16, only: Option<&ClusterId>) -> Result<Looked, Refused> {
        if let Some(route) = self.standing(service, port, only) {
            return Ok(Looked { route, _feed: None });
        }
        let held = lock(&self.entries).get(service).map(|entry| entry.feed.clone());
        let mut feed = match held {
            Some(feed) => feed,
            None => self.source.subscribe(service)?,
        };
        let view = self.told(&mut feed.updates, service, port).await?;
        let route = Arc::new(Route::new(service.clone(), port, only.cloned(), self.around.unseen()));
        route.apply(Some(view), Instant::now());
        Ok(Looked { route, _feed: Some(feed) })
    }

    /// Waits for the first word on a service; it must have the port.
    async fn told(
        &self,
        updates: &mut watch::Receiver<ServiceState>,
        service: &ServiceName,
        port: u16,
    ) -> Result<Arc<ServiceView>, Refused> {
        let told = updates.wait_for(|state| !matches!(state, ServiceState::Waiting));
        let state = match tokio::time::timeout(self.limits.wait, told).await {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) | Err(_) => {
                let detail = format!("{service}: the federation has not answered; see /readyz of this sidecar");
                return Err(Refused::new(Refusal::Timeout, detail));
            }
        };
        let ServiceState::Known(view) = state else {
            return Err(Refused::new(Refusal::UnknownService, service.to_string()));
        };
        if !view.shares.iter().any(|share| share.share.export.port(port).is_some()) {
            let has: Vec<_> = view.shares.iter().flat_map(|share| &share.share.export.ports).map(|p| p.port).collect();
            return Err(Refused::new(Refusal::UnknownPort, format!("{service} has no TCP port {port}, but {has:?}")));
        }
        Ok(view)
    }

    fn entry<'a>(
        &self,
        entries: &'a mut BTreeMap<ServiceName, Entry>,
        service: &ServiceName,
    ) -> Result<&'a mut Entry, Refused> {
        if !entries.contains_key(service) {
            if entries.len() >= self.limits.services {
                let detail = format!("{} services are in use already (limits.services)", entries.len());
                return Err(Refused::new(Refusal::Overloaded, detail));
            }
            let feed = self.source.subscribe(service)?;
            let routes = Arc::default();
            let follower = tokio::spawn(follow(feed.updates.clone(), Arc::clone(&routes))).abort_handle();
            entries.insert(service.clone(), Entry { feed, routes, follower });
        }
        Ok(entries.get_mut(service).expect("inserted just now"))
    }

    fn remember(&self, authority: &str, route: &Arc<Route>) {
        let names_max = self.limits.services.saturating_mul(4);
        self.by_authority.rcu(|names| {
            // Spellings are the caller's choice, so their number is bounded by forgetting them all.
            let mut names = if names.len() >= names_max { HashMap::new() } else { HashMap::clone(names) };
            names.insert(authority.into(), route.clone());
            names
        });
    }

    /// Makes the routes of these entries known to requests.
    fn index(&self, entries: &BTreeMap<ServiceName, Entry>) {
        let routes = |entry: &Entry| lock(&entry.routes).values().cloned().collect::<Vec<_>>();
        let all = entries.iter().map(|(service, entry)| (service.clone(), routes(entry)));
        self.by_service.store(Arc::new(all.collect()));
    }

    /// All routes in use.
    pub fn routes(&self) -> Vec<Arc<Route>> {
        let entries = lock(&self.entries);
        entries.values().flat_map(|entry| lock(&entry.routes).values().cloned().collect::<Vec<_>>()).collect()
    }

    /// Lets go of what was not used for long.
    pub fn let_go(&self, now: Instant) {
        let mut entries = lock(&self.entries);
        let idle = |entry: &Entry| {
            let routes = lock(&entry.routes);
            // A service that nobody exports has no route; asking again is cheap.
            !routes.is_empty() && routes.values().all(|route| route.idle_for(now) >= self.limits.idle)
                || routes.is_empty() && matches!(*entry.feed.updates.borrow(), ServiceState::Unknown)
        };
        let before = entries.len();
        entries.retain(|_, entry| !idle(entry));
        if entries.len() != before {
            self.index(&entries);
            let gone = |route: &Arc<Route>| !entries.contains_key(&route.service);
            self.by_authority.rcu(|names| {
                let mut names = HashMap::clone(names);
                names.retain(|_, route| !gone(route));
                names
            });
        }
    }
}

/// Hands what is told about a service to its routes.
async fn follow(mut updates: watch::Receiver<ServiceState>, routes: Routes) {
    while updates.changed().await.is_ok() {
        let view = match &*updates.borrow_and_update() {
            // A new subscription after a reconnection knows nothing yet; the last state stays in force.
            ServiceState::Waiting => continue,
            ServiceState::Unknown => None,
            ServiceState::Known(view) => Some(view.clone()),
        };
        let routes: Vec<_> = lock(&routes).values().cloned().collect();
        let now = Instant::now();
        routes.iter().for_each(|route| route.apply(view.clone(), now));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
