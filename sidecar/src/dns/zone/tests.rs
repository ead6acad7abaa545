#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use tombolo_core::addresses::Number;
use tombolo_core::addresses::mesh::{Holder, blocks};
use tombolo_core::dns::Places;
use tombolo_core::model::{
    AppProtocol, ClusterShare, Endpoint, Export, Freshness, Origin, ServiceKind, ServicePort, SessionAffinity,
    Transport,
};
use tombolo_core::refusal::Refusal;
use tombolo_leg::discovery::{ServiceNumbers, ShareView};

use super::*;
use crate::outbound::refuse::Refused;

/// A federation: what it says of each service, and the link to it.
#[derive(Clone, Default)]
struct Told {
    services: Arc<Mutex<BTreeMap<ServiceName, watch::Sender<ServiceState>>>>,
    full: bool,
}

impl Told {
    fn sender(&self, service: &ServiceName) -> watch::Sender<ServiceState> {
        let waiting = || watch::Sender::new(ServiceState::Waiting);
        self.services.lock().unwrap().entry(service.clone()).or_insert_with(waiting).clone()
    }

    fn say(&self, service: &str, state: ServiceState) {
        self.sender(&name(service)).send_replace(state);
    }

    fn asked_for(&self, service: &str) -> bool {
        self.services.lock().unwrap().contains_key(&name(service))
    }
}

impl ServiceSource for Told {
    fn subscribe(&self, service: &ServiceName) -> Result<Feed, Refused> {
        if self.full {
            return Err(Refused::new(Refusal::Overloaded, "full"));
        }
        Ok(Feed { updates: self.sender(service).subscribe(), hold: None })
    }
}

struct World {
    told: Told,
    addresses: watch::Sender<MeshAddresses>,
    status: watch::Sender<LinkStatus>,
    zone: Arc<MeshZone>,
}

impl World {
    /// Connected, with `shop/web` among the addresses.
    fn new(wait: Duration, told: Told) -> Self {
        let mut mesh = MeshAddresses::default();
        mesh.handle_ranges(Ranges::default());
        for (number, block) in blocks([(Number(7), Holder::Service, name("shop/web"))]) {
            mesh.handle_block(number, block).unwrap();
        }
        mesh.handle_complete(&BTreeSet::from([0]));
        let (addresses, status) = (watch::Sender::new(mesh), watch::Sender::new(connected()));
        let limits = ZoneLimits { wait, idle: Duration::from_secs(600) };
        let zone = MeshZone::new(Box::new(told.clone()), addresses.subscribe(), status.subscribe(), limits);
        Self { told, addresses, status, zone: Arc::new(zone) }
    }

    fn patient() -> Self {
        Self::new(Duration::from_secs(60), Told::default())
    }

    fn hasty() -> Self {
        Self::new(Duration::from_millis(20), Told::default())
    }

    fn cut_off(&self) {
        self.status.send_modify(|status| status.connected = false);
    }

    async fn ask(&self, service: &str) -> Known {
        self.zone.look_up(&name(service)).await
    }
}

fn connected() -> LinkStatus {
    LinkStatus { connected: true, connects: 1, ..LinkStatus::default() }
}

fn name(service: &str) -> ServiceName {
    service.parse().unwrap()
}

fn view(service: &str, kind: ServiceKind, numbers: ServiceNumbers) -> ServiceState {
    let endpoint =
        Endpoint { id: "e-1".parse().unwrap(), hostname: Some("db-0".into()), zone: None, weight: 1, ready: true };
    let port = ServicePort { name: "http".into(), port: 80, transport: Transport::Tcp, app: AppProtocol::Http };
    let export = Export {
        service: name(service),
        created: jiff::Timestamp::UNIX_EPOCH,
        kind,
        session_affinity: SessionAffinity::default(),
        ports: BTreeSet::from([port]),
        server_ids: BTreeSet::new(),
        endpoints: BTreeMap::from([(endpoint.id.clone(), endpoint)]),
        unmeshed: false,
        routes: Vec::new(),
    };
    let share =
        ClusterShare { cluster: "west".parse().unwrap(), origin: Origin::Remote, freshness: Freshness::Fresh, export };
    let shares = vec![ShareView { share, deliveries: BTreeMap::new() }];
    ServiceState::Known(Arc::new(ServiceView { service: name(service), shares, numbers, policies: Vec::new() }))
}

fn whole(number: u32) -> ServiceNumbers {
    ServiceNumbers { service: Some(Number(number)), endpoints: BTreeMap::new() }
}

#[track_caller]
fn at(known: Known, number: u32) {
    let expected = Ranges::default().address(Number(number)).unwrap();
    match known {
        Known::Records(ServiceRecords { places: Places::Whole(address), ports }) => {
            assert_eq!(address, expected.into());
            assert_eq!(ports[&("http".to_owned(), Transport::Tcp)], 80);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_first_question_waits_for_the_federation() {
    let world = World::patient();
    let zone = world.zone.clone();
    let asking = tokio::spawn(async move { zone.look_up(&name("shop/new")).await });
    while !world.told.asked_for("shop/new") {
        tokio::task::yield_now().await;
    }
    // A service that has no address yet is waited for, too.
    world.told.say("shop/new", view("shop/new", ServiceKind::ClusterSetIp, ServiceNumbers::default()));
    tokio::task::yield_now().await;
    assert!(!asking.is_finished());
    world.told.say("shop/new", view("shop/new", ServiceKind::ClusterSetIp, whole(9)));
    at(asking.await.unwrap(), 9);
    // From then on it is known, and followed.
    world.told.say("shop/new", view("shop/new", ServiceKind::ClusterSetIp, whole(10)));
    at(world.ask("shop/new").await, 10);
}

#[tokio::test]
async fn only_a_federation_that_is_there_denies() {
    let world = World::hasty();
    world.told.say("shop/gone", ServiceState::Unknown);
    assert_eq!(world.ask("shop/gone").await, Known::Absent);
    world.cut_off();
    assert_eq!(world.ask("shop/gone").await, Known::CutOff);
    assert_eq!(world.ask("shop/never-heard-of").await, Known::CutOff);
}

#[tokio::test]
async fn without_a_word_from_the_federation_the_address_is_told_and_nothing_denied() {
    let web = Ranges::default().address(Number(7)).unwrap();
    let world = World::hasty();
    assert_eq!(world.ask("shop/web").await, Known::Address(web), "it did not answer in time");
    assert_eq!(world.ask("shop/db").await, Known::CutOff);
    let world = World::patient();
    world.cut_off();
    assert_eq!(world.ask("shop/web").await, Known::Address(web), "and once it has gone nobody waits for it");
    world.addresses.send_replace(MeshAddresses::default());
    let world = World::new(Duration::from_millis(20), Told { full: true, ..Told::default() });
    assert_eq!(world.ask("shop/web").await, Known::Address(web), "too many services are followed already");
    assert_eq!(world.ask("shop/db").await, Known::CutOff);
}

#[tokio::test]
async fn what_was_told_stays_in_force_while_the_federation_is_away() {
    let world = World::hasty();
    world.told.say("shop/api", view("shop/api", ServiceKind::ClusterSetIp, whole(8)));
    at(world.ask("shop/api").await, 8);
    world.cut_off();
    at(world.ask("shop/api").await, 8);
}

#[tokio::test]
async fn endpoints_of_headless_services_have_addresses_of_their_own() {
    let world = World::hasty();
    let key = ("west".parse().unwrap(), "e-1".parse().unwrap());
    let numbers = ServiceNumbers { service: None, endpoints: BTreeMap::from([(key, Number(20))]) };
    world.told.say("shop/db", view("shop/db", ServiceKind::Headless, numbers));
    let Known::Records(records) = world.ask("shop/db").await else { panic!("it is known") };
    let Places::Endpoints(endpoints) = records.places else { panic!("it is headless") };
    assert_eq!(endpoints.len(), 1);
    assert_eq!(endpoints[0].hostname, "db-0");
    assert_eq!(endpoints[0].address, Ranges::default().address(Number(20)).unwrap());
}

#[tokio::test]
async fn made_up_names_neither_grow_it_nor_keep_others_out() {
    let world = World::hasty();
    world.told.say("shop/api", view("shop/api", ServiceKind::ClusterSetIp, whole(8)));
    for n in 0..2 * SERVICES_MAX {
        world.told.say(&format!("made-up/n{n}"), ServiceState::Unknown);
        assert_eq!(world.ask(&format!("made-up/n{n}")).await, Known::Absent);
    }
    assert_eq!(world.zone.len(), SERVICES_MAX);
    at(world.ask("shop/api").await, 8);
    // What nobody exports goes first, what is in use stays.
    let now = Instant::now();
    world.zone.let_go(now + UNKNOWN_IDLE);
    assert_eq!(world.zone.len(), 1);
    assert_eq!(world.zone.state()[0]["service"], "shop/api");
    world.zone.let_go(now + Duration::from_secs(601));
    assert!(world.zone.is_empty());
}
