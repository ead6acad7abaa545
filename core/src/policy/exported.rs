//! Routes that travel with an export (GEP-1426: a producer's routes speak of every consumer's requests, unless the
//! consumer has one of its own).
//!
//! The exporter says only what a peer can follow: [`offered`]. The importer believes nothing of it: what a route is
//! about, what it changes and where it leads is checked anew ([`admit`]), and what it leads to must be exported by the
//! same cluster, too ([`acceptable`]).

use std::sync::Arc;

use super::route::{HeaderChange, RULES_MAX, Route, Rule};
use super::{InvalidField, Kind};
use crate::id::{ClusterId, ServiceName};
use crate::model::{ClusterShare, Export, Origin};

/// Routes of one service that a peer may send; others are passed over.
pub const OF_EXPORT_MAX: usize = 32;

/// A service's export as one peer is told it: with the routes that lead nowhere but to what the peer is offered.
pub fn offered(export: &Arc<Export>, cluster: &ClusterId, is_offered: impl Fn(&ServiceName) -> bool) -> Arc<Export> {
    if export.routes.is_empty() {
        return export.clone();
    }
    let told = |route: &Arc<Route>| {
        let mut route = route.published(cluster).filter(|route| route.services().into_iter().all(&is_offered))?;
        route.parents.retain(|parent| parent.service == export.service);
        Some(Arc::new(route))
    };
    let routes = export.routes.iter().filter_map(told).take(OF_EXPORT_MAX).collect();
    Arc::new(Export { routes, ..(**export).clone() })
}

/// Leaves of an export's routes those that `cluster` may have. Yields why the first of the others is refused.
pub fn admit(export: Arc<Export>, cluster: &ClusterId) -> (Arc<Export>, Option<InvalidField>) {
    if export.routes.is_empty() {
        return (export, None);
    }
    let mut refused = None;
    let mut routes = Vec::new();
    for route in &export.routes {
        let room = || (routes.len() < OF_EXPORT_MAX).then_some(());
        let room =
            room().ok_or_else(|| InvalidField::new("routes", format!("more than {OF_EXPORT_MAX} of one service")));
        match room.and_then(|()| check(route, &export.service, cluster)) {
            Ok(()) => routes.push(route.clone()),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    if refused.is_none() {
        return (export, None);
    }
    (Arc::new(Export { routes, ..Arc::unwrap_or_clone(export) }), refused)
}

/// The routes of an admitted export that lead only to services of which `is_exported` holds.
pub fn acceptable(export: &Export, is_exported: impl Fn(&ServiceName) -> bool) -> Vec<Arc<Route>> {
    let leads_there = |route: &&Arc<Route>| route.services().into_iter().all(&is_exported);
    export.routes.iter().filter(leads_there).cloned().collect()
}

/// The routes of other clusters that speak of a service's requests, given all that share it: those of the oldest export,
/// as with every conflict (KEP-1645), and none where this cluster has the service itself.
pub fn leading<'a>(shares: impl IntoIterator<Item = &'a ClusterShare>) -> &'a [Arc<Route>] {
    let first = shares.into_iter().min_by_key(|share| (share.origin, share.export.created, &share.cluster));
    first.filter(|share| share.origin == Origin::Remote).map_or(&[], |share| &share.export.routes)
}

fn check(route: &Route, service: &ServiceName, cluster: &ClusterId) -> Result<(), InvalidField> {
    let resource = &route.resource;
    let of = |error: InvalidField| {
        InvalidField::new(format!("{} {}/{}", resource.kind, resource.namespace, resource.name), error.to_string())
    };
    let wrong = |path: &str, reason: String| Err(of(InvalidField::new(path, reason)));
    if !matches!(resource.kind, Kind::HttpRoute | Kind::GrpcRoute) {
        return wrong("kind", "not a route".into());
    }
    if resource.cluster.as_ref() != Some(cluster) {
        return wrong("cluster", format!("not that of {cluster}, which sent it"));
    }
    if let Err(reason) = super::Resource::new(resource.kind, resource.namespace.clone(), &resource.name) {
        return wrong("metadata.name", reason);
    }
    if resource.namespace != *service.namespace() {
        return wrong("metadata.namespace", format!("not that of {service}: a consumer's route does not travel"));
    }
    if route.parents.is_empty() || route.parents.iter().any(|parent| parent.service != *service) {
        return wrong("parentRefs", format!("names another service than {service}, with which it came"));
    }
    if route.parents.len() > RULES_MAX || route.rules.len() > RULES_MAX {
        return wrong("rules", format!("more than {RULES_MAX} rules or parents"));
    }
    for (index, rule) in route.rules.iter().enumerate() {
        check_rule(rule, cluster).map_err(|error| of(error.within(&format!("rules[{index}]"))))?;
    }
    Ok(())
}

fn check_rule(rule: &Rule, cluster: &ClusterId) -> Result<(), InvalidField> {
    rule.check()?;
    let mirrors = rule.filters.mirrors.iter().map(|mirror| &mirror.backend);
    for backend in rule.backends.iter().chain(mirrors) {
        if backend.cluster.as_ref() != Some(cluster) {
            return Err(InvalidField::new("backendRefs", format!("leads to another cluster than {cluster}")));
        }
        check_headers(&backend.request_headers)?;
        check_headers(&backend.response_headers)?;
    }
    check_headers(&rule.filters.request_headers)?;
    check_headers(&rule.filters.response_headers)
}

/// Names in lower case, none that frame a message: as [`HeaderChange::checked`] leaves them.
fn check_headers(change: &HeaderChange) -> Result<(), InvalidField> {
    let checked = change.clone().checked().map_err(|error| error.within("filters"))?;
    if checked == *change {
        Ok(())
    } else {
        Err(InvalidField::new("filters", "a header is named twice, or not in lower case"))
    }
}
