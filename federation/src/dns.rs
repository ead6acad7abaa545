//! Names of the clusterset for whoever has no sidecar: the cluster's own resolver forwards `clusterset.local` to here.
//!
//! Where there is an API server, what is imported has the addresses that its `ServiceImport` says (DNS specification of
//! the Multi-Cluster Services API, 1.0.0), and nothing else exists. Elsewhere services have their virtual addresses.

use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tombolo_core::addresses::allocation::Owner;
use tombolo_core::catalog::ServiceView;
use tombolo_core::dns::{Known, Place, ServiceRecords};
use tombolo_core::id::{ClusterId, EndpointId, ServiceName};
use tombolo_core::mcs;
use tombolo_core::model::{ClusterShare, Origin};
use tombolo_dns::{DnsServer, Event, Sockets, Upstreams, Zone};
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::encoding::EncodeLabelSet;

use crate::hub::{HubHandle, View};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// Binds the sockets; yields where, and what serves on them.
pub async fn start(
    listen: SocketAddr,
    hub: HubHandle,
    metrics: &Metrics,
) -> std::io::Result<(SocketAddr, impl Future<Output = ()> + Send + use<>)> {
    let sockets = Sockets::bind(listen).await?;
    let address = sockets.address();
    let counted = metrics.counters::<OutcomeLabels>("tombolo_dns_messages", "DNS messages, by what became of them");
    let observe = move |event: Event| {
        counted.get_or_create_owned(&OutcomeLabels { outcome: event.code() }).inc();
    };
    let server = DnsServer::new(Box::new(HubZone(hub)), Upstreams::none(), observe);
    Ok((address, tombolo_dns::run(sockets, server, CancellationToken::new())))
}

struct HubZone(HubHandle);

impl Zone for HubZone {
    fn look_up<'a>(&'a self, service: &'a ServiceName) -> BoxFuture<'a, Known> {
        Box::pin(std::future::ready(known(&self.0.view(), service)))
    }
}

fn known(view: &Arc<View>, service: &ServiceName) -> Known {
    let Some(found) = view.services.get(service).filter(|found| !found.shares.is_empty()) else {
        return Known::Absent;
    };
    match &view.imported {
        None => records(view, found, found.shares.iter(), virtual_place(view, found)),
        Some(imported) => {
            let Some(addresses) = imported.get(service).filter(|_| mcs::import(found).is_some()) else {
                return Known::Absent;
            };
            let place = (!addresses.is_empty()).then(|| addresses.iter().copied().collect::<Place>());
            // What the own cluster keeps to itself is no part of the import.
            let exporting = found.shares.iter().filter(|share| share.origin == Origin::Remote || found.exported);
            records(view, found, exporting, place)
        }
    }
}

fn virtual_place(view: &View, service: &ServiceView) -> Option<Place> {
    let addresses = view.addresses.as_ref()?;
    let number = addresses.number(&Owner::service(service.service.clone()))?;
    addresses.ranges.address(number).map(Into::into)
}

/// Not known as long as it has no address yet.
fn records<'a>(
    view: &View,
    service: &ServiceView,
    shares: impl Iterator<Item = &'a ClusterShare> + Clone,
    whole: Option<Place>,
) -> Known {
    let endpoint = |cluster: &ClusterId, endpoint: &EndpointId| {
        let addresses = view.addresses.as_ref()?;
        let owner = Owner { service: service.service.clone(), endpoint: Some((cluster.clone(), endpoint.clone())) };
        addresses.ranges.address(addresses.number(&owner)?)
    };
    ServiceRecords::of(shares, whole, endpoint).map_or(Known::CutOff, Known::Records)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::collections::BTreeMap;
    use tombolo_core::dns::Places;

    use crate::testing::{Addresses as Peers, Federation, service, until};

    #[tokio::test]
    async fn what_is_imported_has_the_addresses_of_its_import_and_nothing_else_exists() {
        let east = Federation::start("east", &Peers::default()).await;
        east.declare(&["shop/web", "shop/other"]).await;
        east.hub.settled().await.unwrap();
        let web = service("shop/web");
        assert_eq!(known(&east.hub.view(), &web), Known::CutOff, "no address yet");
        assert_eq!(known(&east.hub.view(), &service("shop/none")), Known::Absent);
        east.allocate().await;
        let place = |web: &ServiceName| match known(&east.hub.view(), web) {
            Known::Records(records) => match records.places {
                Places::Whole(place) => Some(place),
                Places::Endpoints(_) => None,
            },
            _ => None,
        };
        until("it has a virtual address", || place(&web).is_some()).await;
        assert_eq!(place(&web).unwrap().ipv4.unwrap().octets()[0], 240);

        let imported = [(web.clone(), vec!["10.96.0.7".parse().unwrap()]), (service("shop/other"), vec![])];
        east.hub.imported(Arc::new(BTreeMap::from(imported))).await.unwrap();
        east.hub.settled().await.unwrap();
        let found = place(&web).unwrap();
        assert_eq!((found.ipv4, found.ipv6), (Some("10.96.0.7".parse().unwrap()), None));
        assert_eq!(known(&east.hub.view(), &service("shop/other")), Known::CutOff, "its import has no address yet");
        east.hub.imported(Arc::default()).await.unwrap();
        east.hub.settled().await.unwrap();
        assert_eq!(known(&east.hub.view(), &web), Known::Absent, "its namespace is not here");
    }
}
