#![allow(clippy::unwrap_used)]
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use tombolo_core::id::SpiffeId;
use tombolo_core::model::{
    AppProtocol, ClusterShare, Export, Freshness, Origin, ServiceKind, ServicePort, SessionAffinity, Transport,
};
use tombolo_leg::discovery::ShareView;
use tombolo_runtime::metrics::Metrics;
use tombolo_trust::svid::SvidSource;

use super::super::observe::Observed;
use super::super::pool::PoolLimits;
use super::*;

/// One service, told by hand; counts how often it was asked for.
struct Told {
    state: watch::Sender<ServiceState>,
    asked: Arc<AtomicUsize>,
}

impl ServiceSource for Told {
    fn subscribe(&self, _: &ServiceName) -> Result<Feed, Refused> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(Feed { updates: self.state.subscribe(), hold: None })
    }
}

fn web() -> ServiceName {
    "shop/web".parse().unwrap()
}

fn view() -> ServiceState {
    let server: SpiffeId = "spiffe://east.tombolo/ns/shop/sa/web".parse().unwrap();
    let export = Export {
        service: web(),
        created: jiff::Timestamp::UNIX_EPOCH,
        kind: ServiceKind::ClusterSetIp,
        session_affinity: SessionAffinity::None,
        ports: [ServicePort { name: "http".into(), port: 80, transport: Transport::Tcp, app: AppProtocol::Http }]
            .into(),
        server_ids: [server].into(),
        endpoints: BTreeMap::new(),
        unmeshed: false,
        routes: Vec::new(),
    };
    let (cluster, origin) = ("west".parse().unwrap(), Origin::Remote);
    let share = ClusterShare { cluster, origin, freshness: Freshness::Fresh, export };
    let shares = vec![ShareView { share, deliveries: BTreeMap::new() }];
    ServiceState::Known(Arc::new(ServiceView {
        service: web(),
        shares,
        numbers: Default::default(),
        policies: Vec::new(),
    }))
}

/// The services, what is told, how often it was asked for, and the metrics.
fn services() -> (Services, watch::Sender<ServiceState>, Arc<AtomicUsize>, Metrics) {
    let (state, asked, metrics) = (watch::Sender::new(view()), Arc::<AtomicUsize>::default(), Metrics::new("sidecar"));
    let around = Surroundings {
        instance: "frontend".parse().unwrap(),
        zone: None,
        svid: SvidSource::new(),
        gateways: Default::default(),
        observed: Observed::new(&metrics),
        pool: PoolLimits { requests_per_leg: 8, legs: 2, idle: Duration::from_secs(1) }.into(),
        warm_legs: 0,
        outlier: Arc::default(),
        retry_share: 0.2,
        upkeep: Arc::default(),
        base: Instant::now(),
    };
    let second = Duration::from_secs(1);
    let limits = ServiceLimits { services: 4, wait: second, idle: second };
    let source = Told { state: state.clone(), asked: asked.clone() };
    (Services::new(Box::new(source), around, limits), state, asked, metrics)
}

#[tokio::test]
async fn a_route_that_stands_is_found_while_every_lock_is_held() {
    let (services, ..) = services();
    let only = "west".parse().unwrap();
    let anywhere = services.route(&web(), 80).await.unwrap();
    let there = services.route_in(&web(), 80, Some(&only)).await.unwrap();
    assert!(!Arc::ptr_eq(&anywhere, &there));
    let entries = lock(&services.entries);
    let routes = lock(&entries.values().next().unwrap().routes);
    // Answered at once, without waiting for anything, or this would never end.
    let found = services.route_in(&web(), 80, Some(&only)).now_or_never().unwrap().unwrap();
    assert!(Arc::ptr_eq(&found, &there));
    let found = services.route(&web(), 80).now_or_never().unwrap().unwrap();
    assert!(Arc::ptr_eq(&found, &anywhere));
    drop(routes);
}

#[tokio::test]
async fn a_route_of_a_service_that_is_gone_is_not_found_and_one_let_go_of_is_made_anew() {
    let (services, state, asked, _) = services();
    let route = services.route(&web(), 80).await.unwrap();
    state.send_replace(ServiceState::Unknown);
    while route.is_exported() {
        tokio::task::yield_now().await;
    }
    assert_eq!(services.route(&web(), 80).await.err().unwrap().refusal, Refusal::UnknownService);
    state.send_replace(view());
    while !route.is_exported() {
        tokio::task::yield_now().await;
    }
    assert!(Arc::ptr_eq(&services.route(&web(), 80).await.unwrap(), &route));
    services.let_go(Instant::now() + Duration::from_secs(2));
    assert!(services.by_service.load().is_empty() && services.routes().is_empty());
    assert!(!Arc::ptr_eq(&services.route(&web(), 80).await.unwrap(), &route));
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn looking_leaves_nothing_behind() {
    let (services, state, asked, metrics) = services();
    let before = metrics.encode();
    let looked = services.look(&web(), 80, None).await.unwrap();
    assert!(looked.route.is_exported());
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert!(services.routes().is_empty() && services.by_service.load().is_empty());
    assert_eq!(services.look(&web(), 81, None).await.err().unwrap().refusal, Refusal::UnknownPort);
    // What requests use is looked at as it is.
    let used = services.route(&web(), 80).await.unwrap();
    assert!(Arc::ptr_eq(&services.look(&web(), 80, None).await.unwrap().route, &used));
    drop((looked, used));
    state.send_replace(ServiceState::Unknown);
    let own = |text: &str| {
        text.lines().filter(|line| line.contains("tombolo_outbound")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(own(&metrics.encode()), own(&before));
}
