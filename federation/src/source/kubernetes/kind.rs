//! What is watched of an API server.

use kube::api::ApiResource;
use kube::runtime::watcher;
use tombolo_api::k8s::{MULTICLUSTER_GROUP, SERVICE_NAME_LABEL, TOMBOLO_GROUP};

/// Objects in one page of a list.
const PAGE: u32 = 500;
/// How long one watch request lasts; a connection that died without a word is noticed after it.
const WATCH_S: u32 = 120;

/// A kind of object that is watched in all namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Service,
    EndpointSlice,
    ServiceExport,
    ClusterPeer,
}

impl Kind {
    pub const ALL: &[Kind] = &[Kind::Service, Kind::EndpointSlice, Kind::ServiceExport, Kind::ClusterPeer];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::ServiceExport => "ServiceExport",
            Kind::ClusterPeer => "ClusterPeer",
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Kind::Service => "services",
            Kind::EndpointSlice => "endpointslices",
            Kind::ServiceExport => "serviceexports",
            Kind::ClusterPeer => "clusterpeers",
        }
    }

    fn group(self) -> &'static str {
        match self {
            Kind::Service => "",
            Kind::EndpointSlice => "discovery.k8s.io",
            Kind::ServiceExport => MULTICLUSTER_GROUP,
            Kind::ClusterPeer => TOMBOLO_GROUP,
        }
    }

    /// The versions that are understood, the preferred one first.
    pub fn versions(self) -> &'static [&'static str] {
        match self {
            Kind::Service | Kind::EndpointSlice => &["v1"],
            Kind::ServiceExport => &["v1beta1", "v1alpha1"],
            Kind::ClusterPeer => &["v1alpha1"],
        }
    }

    pub fn resource(self, version: &str) -> ApiResource {
        let (group, kind, plural) = (self.group().to_owned(), self.name().to_owned(), self.plural().to_owned());
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        ApiResource { group, version: version.to_owned(), api_version, kind, plural }
    }

    /// How it is listed and watched.
    pub fn selection(self) -> watcher::Config {
        let all = watcher::Config::default().page_size(PAGE).timeout(WATCH_S);
        match self {
            // Slices of anything else, imports of other implementations for one, are nobody's endpoints here.
            Kind::EndpointSlice => all.labels(SERVICE_NAME_LABEL),
            Kind::Service | Kind::ServiceExport | Kind::ClusterPeer => all,
        }
    }

    /// Objects of this kind that are held at most.
    pub fn held_max(self) -> usize {
        match self {
            Kind::Service | Kind::ServiceExport => 10_000,
            Kind::EndpointSlice => 50_000,
            Kind::ClusterPeer => 1_000,
        }
    }

    /// What to do when the API server does not serve it.
    pub fn absent(self) -> String {
        let name = self.name();
        format!("this API server serves no {name} ({}); install it: tombolo crds | kubectl apply -f -", self.group())
    }
}
