//! What operators decide about requests: routes (Gateway API), `TrafficPolicy`, `AccessPolicy`.
//!
//! A resource is parsed and validated once, where it is written; its patterns are compiled then. From
//! there on a shell uses it like this:
//!
//! - The caller's sidecar builds one [`table::RouteTable`] for each port of a service from the
//!   [`route::Route`]s that discovery sent, and keeps it in its snapshot. For each request it gives
//!   [`table::RouteTable::pick`] the request's [`matching::Head`] and a random number, and gets the rule, its
//!   filters, its times and the backend. It has to know (be subscribed to)
//!   [`table::RouteTable::services`]. Other clusters' routes come with their exports: [`exported::leading`]. No table, or an empty one: the request goes to the service itself.
//! - [`traffic::TrafficPolicy`] of the backend's service then says how its clusters and endpoints are
//!   chosen and how long tries last. [`traffic::TrafficSpec::fault`] says what goes wrong on purpose.
//! - The sidecar that delivers a service asks [`access::decide`] for each request (for each connection
//!   where requests can't be told apart) and then the [`rate::TokenBucket`] of the service's rate limit.
//!
//! Where each acts: routes, load balancing, retries and faults in the caller's sidecar, from the caller's
//! cluster; access and rate limits where the service is delivered.

pub mod access;
pub mod exported;
pub mod matching;
pub mod pattern;
pub mod rate;
pub mod route;
pub mod set;
pub mod span;
pub mod table;
pub mod traffic;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{ClusterId, Namespace};

/// The kinds of resources that decide about requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
    TrafficPolicy,
    AccessPolicy,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::HttpRoute => "HTTPRoute",
            Kind::GrpcRoute => "GRPCRoute",
            Kind::TrafficPolicy => "TrafficPolicy",
            Kind::AccessPolicy => "AccessPolicy",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which resource decided: `HTTPRoute shop/web`, with the cluster where it is another one's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Resource {
    pub kind: Kind,
    pub namespace: Namespace,
    /// A DNS subdomain, at most 253 characters.
    pub name: String,
    /// The cluster that wrote it, unless it is the own one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterId>,
}

impl Resource {
    /// # Errors
    /// When `name` is not a DNS subdomain, in words for its author.
    pub fn new(kind: Kind, namespace: Namespace, name: &str) -> Result<Self, String> {
        let label = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > 253 || !name.split('.').all(label) {
            let shown: String = name.chars().take(80).collect();
            return Err(format!("metadata.name {shown:?} is not a DNS subdomain of at most 253 characters"));
        }
        Ok(Self { kind, namespace, name: name.into(), cluster: None })
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)?;
        match &self.cluster {
            Some(cluster) => write!(f, " of cluster {cluster}"),
            None => Ok(()),
        }
    }
}

/// A field whose value is refused, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct InvalidField {
    /// From the resource's root: `spec.rules[0].timeouts.request`.
    pub path: String,
    pub reason: String,
}

impl InvalidField {
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }

    /// The same field seen from further up.
    #[must_use]
    pub fn within(self, parent: &str) -> Self {
        Self { path: format!("{parent}.{}", self.path), reason: self.reason }
    }
}
