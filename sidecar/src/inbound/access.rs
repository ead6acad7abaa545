//! Whether a caller may do what it asks for, by the policies that federation told last.
//!
//! Nobody is served before federation has told what decides about a service: what was told to the process before
//! this one counts until then.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tombolo_core::authz::{Client, authorize_unmeshed};
use tombolo_core::id::ServiceName;
use tombolo_core::policy::access::{Asked, DefaultAccess, HttpAsked, Mode, decide};
use tombolo_core::policy::rate::{RateLimit, TokenBucket};
use tombolo_core::refusal::Refusal;
use tombolo_core::sni::LegTarget;
use tombolo_leg::accept::LegIdentity;
use tombolo_leg::discovery::InboundPolicies;
use tombolo_runtime::logging::Sparsely;

use super::Inbound;
use super::app::App;
use crate::config::ServiceConfig;
use crate::outbound::question::Access;

/// What each service's callers have left of its rate limit.
#[derive(Debug, Default)]
pub(super) struct Buckets(BTreeMap<ServiceName, Mutex<Option<TokenBucket>>>);

impl Buckets {
    pub fn new(services: &[ServiceConfig]) -> Self {
        Self(services.iter().map(|config| (config.service.clone(), Mutex::default())).collect())
    }

    fn take(&self, service: &ServiceName, limit: Option<RateLimit>, now: Instant) -> Result<(), Refusal> {
        let (Some(limit), Some(held)) = (limit, self.0.get(service)) else { return Ok(()) };
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = held.get_or_insert_with(|| TokenBucket::new(limit, now));
        if bucket.limit() != limit {
            bucket.set_limit(limit, now);
        }
        bucket.take(now).map_err(|_| Refusal::RateLimited)
    }
}

impl Inbound {
    /// The application for this leg, if its client may do what it asks for now. `http` is `None` where requests
    /// can't be told apart.
    ///
    /// # Errors
    /// Those of [`tombolo_core::authz::authorize`]; `EndpointGone` before federation has told what decides;
    /// `IdentityDenied` and `RateLimited` as the policies say.
    pub(super) fn admit(&self, leg: &LegIdentity, http: Option<HttpAsked<'_>>) -> Result<&Arc<App>, Refusal> {
        let app = self.authorize(leg)?;
        let service = &leg.target.service;
        let policies = self.authority.policies(service).ok_or(Refusal::EndpointGone)?;
        let client = Client { id: &leg.client_id, cluster: &leg.client_cluster };
        authorize_unmeshed(client, &policies.unmeshed)?;
        let asked = Asked { service, port: leg.target.port, http };
        let verdict = decide(&policies.access, &policies.defaults, client, asked);
        if let Some(reason) = verdict.audit {
            static LOG: Sparsely = Sparsely::new();
            self.observed.audited(leg.client_cluster.as_str());
            if let Some(left_out) = LOG.admit(Instant::now()) {
                tracing::info!(client = %leg.client_id, target = %leg.target, %reason, left_out, "a policy in audit mode would refuse this");
            }
        }
        if !verdict.is_allowed() {
            tracing::debug!(client = %leg.client_id, target = %leg.target, reason = %verdict.reason, "denied by policy");
            return Err(Refusal::IdentityDenied);
        }
        self.buckets.take(service, policies.rate_limit, Instant::now())?;
        Ok(app)
    }

    /// Waits until a policy that was told later denies what a leg was admitted for, and `not_before` is over.
    pub(super) async fn denied_later(
        &self,
        leg: &LegIdentity,
        http: Option<HttpAsked<'_>>,
        not_before: tokio::time::Instant,
    ) -> Refusal {
        let mut told = self.authority.policies_told();
        let service = &leg.target.service;
        let client = Client { id: &leg.client_id, cluster: &leg.client_cluster };
        let asked = Asked { service, port: leg.target.port, http };
        loop {
            // Told between the admission and now, it counts as well.
            told.mark_unchanged();
            let policies = self.authority.policies(service);
            if policies.as_ref().is_some_and(|it| authorize_unmeshed(client, &it.unmeshed).is_err()) {
                tracing::info!(client = %leg.client_id, target = %leg.target, "connection closed: workloads without a sidecar may not call it now");
                return Refusal::IdentityDenied;
            }
            let denied = policies.filter(|it| !decide(&it.access, &it.defaults, client, asked).is_allowed());
            let is_denied = denied.is_some();
            if let Some(policies) = denied.filter(|_| tokio::time::Instant::now() >= not_before) {
                let verdict = decide(&policies.access, &policies.defaults, client, asked);
                tracing::info!(client = %leg.client_id, target = %leg.target, reason = %verdict.reason, "connection closed: a policy denies it now");
                return Refusal::IdentityDenied;
            }
            tokio::select! {
                changed = told.changed() => if changed.is_err() { std::future::pending::<()>().await },
                () = tokio::time::sleep_until(not_before), if is_denied => {}
            }
        }
    }

    /// What `admit` would say to such a call, and why; counts and takes nothing. `None` where the port is
    /// not delivered here.
    pub fn explain(
        &self,
        client: Client<'_>,
        service: &ServiceName,
        port: u16,
        http: Option<HttpAsked<'_>>,
    ) -> Option<Access> {
        if !self.ports.contains(&(service.clone(), port)) {
            return None;
        }
        let (allowed, reason) = self.judge(client, service, port, http);
        Some(Access { allowed: Some(allowed), reason })
    }

    fn judge(
        &self,
        client: Client<'_>,
        service: &ServiceName,
        port: u16,
        http: Option<HttpAsked<'_>>,
    ) -> (bool, String) {
        let unmet = || (false, "the federation has not told what decides; see /readyz of this sidecar".to_owned());
        let Some(cluster) = self.authority.cluster() else { return unmet() };
        let target = LegTarget { cluster, service: service.clone(), port, endpoint: None };
        if let Err(refusal) = self.authorize_client(client, &target) {
            return (false, refusal.to_string());
        }
        let Some(policies) = self.authority.policies(service) else { return unmet() };
        if authorize_unmeshed(client, &policies.unmeshed).is_err() {
            let reason = "denied: its export does not allow workloads without a sidecar (tombolo.dev/unmeshed)";
            return (false, reason.into());
        }
        let verdict = decide(&policies.access, &policies.defaults, client, Asked { service, port, http });
        let audit = verdict.audit.map(|reason| format!("; in audit mode: {reason}")).unwrap_or_default();
        (verdict.is_allowed(), format!("{}{audit}", verdict.reason))
    }

    /// Whether something decides about callers of the application at this port, so that nobody may come without an
    /// identity.
    pub(crate) fn is_guarded(&self, app_port: u16) -> bool {
        let mut behind = self.app_ports.iter().filter(|(port, _)| *port == app_port);
        behind.any(|(_, service)| self.authority.policies(service).is_none_or(|policies| guards(&policies)))
    }
}

fn guards(policies: &InboundPolicies) -> bool {
    policies.defaults.cluster == DefaultAccess::Deny
        || policies.access.iter().any(|policy| policy.spec.mode == Mode::Enforce)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_rate_limit_is_the_services_and_follows_its_policy() {
        let name: ServiceName = "shop/web".parse().unwrap();
        let buckets = Buckets([(name.clone(), Mutex::default())].into());
        let now = Instant::now();
        let limit = |rate, burst| Some(RateLimit { requests_per_second: rate, burst: Some(burst) });
        assert_eq!([(); 3].map(|()| buckets.take(&name, None, now)), [Ok(()); 3]);
        let twice = [(); 3].map(|()| buckets.take(&name, limit(1, 2), now));
        assert_eq!(twice, [Ok(()), Ok(()), Err(Refusal::RateLimited)]);
        let later = now + Duration::from_secs(1);
        assert_eq!(buckets.take(&name, limit(1, 2), later), Ok(()));
        assert_eq!(buckets.take(&name, limit(1, 2), later), Err(Refusal::RateLimited));
        // From now on it fills a hundred times as fast.
        assert_eq!(buckets.take(&name, limit(100, 2), later), Err(Refusal::RateLimited));
        assert_eq!(buckets.take(&name, limit(100, 2), later + Duration::from_millis(10)), Ok(()));
    }
}
