//! Discovery over real loopback sockets, with a plain gRPC client.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_api::proto::discovery as proto;
use tombolo_api::proto::discovery::discovery_client::DiscoveryClient;
use tombolo_api::proto::discovery::{gateway_request, gateway_update, sidecar_request, sidecar_update};
use tombolo_core::addresses::mesh::{Block, Lookup, MeshAddresses};
use tombolo_core::addresses::{Number, Ranges};
use tombolo_core::id::{Role, SpiffeId};
use tombolo_trust::grpc;
use tombolo_trust::tls::{self, ServerExpectation};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::sidecar::SUBSCRIPTIONS_MAX;
use crate::hub::{PeeringCommand, PeeringEvent};
use crate::registry::GRACE;
use crate::testing::{Addresses, DEADLINE, Federation, service, until};

async fn east() -> (Federation, SocketAddr) {
    let east = Federation::start("east", &Addresses::default()).await;
    let (address, trigger, _) = east.discover().await;
    // Never drained here; the servers end with the test's runtime.
    std::mem::forget(trigger);
    (east, address)
}

fn channel(federation: &Federation, address: SocketAddr, id: &SpiffeId) -> Channel {
    let expectation = ServerExpectation::Role { trust_domain: federation.trust_domain.clone(), role: Role::Federation };
    let svid = federation.svid_of(id);
    grpc::connect(&address.to_string(), tls::client_config(&svid, &federation.trust, expectation, &[b"h2"])).unwrap()
}

/// One sidecar's end of a stream.
struct Sidecar {
    requests: mpsc::Sender<proto::SidecarRequest>,
    updates: Streaming<proto::SidecarUpdate>,
}

impl Sidecar {
    async fn connect(channel: Channel, instance: &str) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(64);
        let hello = proto::SidecarHello { instance: instance.into(), zone: "z1".into() };
        let hello = proto::SidecarRequest { kind: Some(sidecar_request::Kind::Hello(hello)) };
        requests.send(hello).await.unwrap();
        let updates = DiscoveryClient::new(channel).sidecar(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok(Self { requests, updates })
    }

    async fn say(&self, kind: sidecar_request::Kind) {
        self.requests.send(proto::SidecarRequest { kind: Some(kind) }).await.unwrap();
    }

    async fn register(&self, name: &str, ready: bool) {
        let registration =
            proto::Registration { service: name.into(), port: 80, inbound_address: "127.0.0.1:15008".into(), ready };
        self.say(sidecar_request::Kind::Register(proto::Register { registrations: vec![registration] })).await;
    }

    /// The next update that `wanted` takes.
    async fn next<T>(&mut self, wanted: impl Fn(sidecar_update::Kind) -> Option<T>) -> T {
        let find = async {
            loop {
                let update = self.updates.message().await.unwrap().expect("the stream goes on");
                if let Some(found) = update.kind.and_then(&wanted) {
                    return found;
                }
            }
        };
        timeout(DEADLINE, find).await.expect("the update comes")
    }

    async fn next_service(&mut self) -> proto::Service {
        self.next(|kind| match kind {
            sidecar_update::Kind::Service(service) => Some(service),
            _ => None,
        })
        .await
    }
}

/// The name of each policy of a message.
fn policy_names(policies: Vec<proto::Policy>) -> Vec<String> {
    let policies = tombolo_api::policy::policies_from_wire(policies).unwrap();
    policies.iter().map(|policy| policy.resource().name.clone()).collect()
}

#[tokio::test]
async fn a_sidecar_is_told_what_decides_before_it_is_registered_and_whenever_that_changes() {
    let (east, address) = east().await;
    let inbound = |kind| match kind {
        sidecar_update::Kind::InboundPolicies(told) => Some(told),
        sidecar_update::Kind::Registration(result) => panic!("registered before policies were told: {result:?}"),
        _ => None,
    };
    east.declare_with(&["shop/web"], vec![east.access("first", "shop/web"), east.access("other", "shop/api")]).await;
    let web = east.web(&service("shop/web"));
    let mut server = Sidecar::connect(channel(&east, address, &web), "web-1").await.unwrap();
    server.register("shop/web", true).await;
    let told = server.next(inbound).await;
    assert_eq!((told.service.as_str(), told.deny_by_default), ("shop/web", false));
    assert_eq!(policy_names(told.policies), ["first"]);
    let mut client = Sidecar::connect(channel(&east, address, &web), "client").await.unwrap();
    client.say(sidecar_request::Kind::Subscribe("shop/web".into())).await;
    assert_eq!(policy_names(client.next_service().await.policies), Vec::<String>::new());

    let again = |kind| match kind {
        sidecar_update::Kind::InboundPolicies(told) => Some(told.policies),
        _ => None,
    };
    // What does not concern the service is no news to its server.
    east.declare_with(&["shop/web"], vec![east.access("first", "shop/web"), east.access("newer", "shop/api")]).await;
    east.declare_with(&["shop/web"], vec![east.access("second", "shop/web"), east.traffic("slow", "shop/web")]).await;
    assert_eq!(policy_names(server.next(again).await), ["second", "slow"]);
    assert_eq!(policy_names(client.next_service().await.policies), ["slow"]);
    east.declare(&["shop/web"]).await;
    assert_eq!(policy_names(server.next(again).await), Vec::<String>::new());
    assert_eq!(policy_names(client.next_service().await.policies), Vec::<String>::new());
}

#[tokio::test]
async fn a_sidecar_registers_and_another_learns_where() {
    let (east, address) = east().await;
    east.declare(&["shop/web"]).await;
    let web = east.web(&service("shop/web"));
    let mut server = Sidecar::connect(channel(&east, address, &web), "web-1").await.unwrap();
    server.register("shop/web", false).await;
    let result = server
        .next(|kind| match kind {
            sidecar_update::Kind::Registration(result) => Some(result),
            _ => None,
        })
        .await;
    assert_eq!((result.refused.as_str(), result.endpoint_id.len()), ("", 16));

    let mut client = Sidecar::connect(channel(&east, address, &web), "client").await.unwrap();
    client.say(sidecar_request::Kind::Subscribe("shop/web".into())).await;
    let told = client.next_service().await;
    let [share] = &told.shares[..] else { panic!("{told:?}") };
    assert!(share.local && !share.export.as_ref().unwrap().endpoints[0].ready);
    assert_eq!(share.deliveries[0].inbound_address, "127.0.0.1:15008");
    assert_eq!(share.deliveries[0].endpoint_id, result.endpoint_id);

    let ready = proto::Readiness { service: "shop/web".into(), port: 80, ready: true };
    server.say(sidecar_request::Kind::Readiness(ready)).await;
    assert!(client.next_service().await.shares[0].export.as_ref().unwrap().endpoints[0].ready);

    drop(server);
    let began = std::time::Instant::now();
    assert!(client.next_service().await.shares[0].export.as_ref().unwrap().endpoints.is_empty());
    assert!(began.elapsed() > GRACE - Duration::from_secs(1), "a registration outlives its stream by the grace");
}

#[tokio::test]
async fn views_come_on_demand_and_only_when_they_change() {
    let (east, address) = east().await;
    east.declare(&["shop/web", "shop/db"]).await;
    let web = east.web(&service("shop/web"));
    let mut client = Sidecar::connect(channel(&east, address, &web), "client").await.unwrap();
    for name in ["shop/web", "shop/none"] {
        client.say(sidecar_request::Kind::Subscribe(name.into())).await;
    }
    let unknown = |kind| match kind {
        sidecar_update::Kind::ServiceUnknown(name) => Some(name),
        _ => None,
    };
    assert_eq!(client.next_service().await.service, "shop/web");
    assert_eq!(client.next(unknown).await, "shop/none");
    // What was not asked for, or not changed, does not come: the next word is about shop/none.
    east.register("db-1", "shop/db", true).await;
    east.declare(&["shop/web", "shop/db", "shop/none"]).await;
    assert_eq!(client.next_service().await.service, "shop/none");
    // What was let go of does not come either.
    client.say(sidecar_request::Kind::Unsubscribe("shop/none".into())).await;
    client.say(sidecar_request::Kind::Subscribe("shop/later".into())).await;
    assert_eq!(client.next(unknown).await, "shop/later");
    east.declare(&["shop/db"]).await;
    assert_eq!(client.next(unknown).await, "shop/web");
}

/// What a sidecar has been told of addresses, up to the next `Complete`, and how many blocks that took.
async fn addresses(client: &mut Sidecar, mesh: &mut MeshAddresses) -> usize {
    let mut blocks = 0;
    loop {
        let kind = client
            .next(|kind| match kind {
                sidecar_update::Kind::AddressRanges(_)
                | sidecar_update::Kind::AddressBlock(_)
                | sidecar_update::Kind::AddressesComplete(_) => Some(kind),
                _ => None,
            })
            .await;
        match kind {
            sidecar_update::Kind::AddressRanges(ranges) => {
                mesh.handle_ranges(Ranges { ipv4: ranges.ipv4.parse().unwrap(), ipv6: ranges.ipv6.parse().unwrap() })
            }
            sidecar_update::Kind::AddressBlock(block) => {
                let held = Block::new(block.services, block.endpoints, &block.names).unwrap();
                mesh.handle_block(block.block, held).unwrap();
                blocks += 1;
            }
            sidecar_update::Kind::AddressesComplete(complete) => {
                mesh.handle_complete(&complete.blocks.into_iter().collect());
                return blocks;
            }
            _ => unreachable!("nothing else was asked for"),
        }
    }
}

#[tokio::test]
async fn the_set_of_addresses_comes_whole_and_then_in_changed_blocks() {
    let (east, address) = east().await;
    let names: Vec<String> = (0..192).map(|n| format!("shop/web-{n:03}")).collect();
    let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
    east.declare(&names[..191]).await;
    let web = east.web(&service("shop/web"));
    let mut client = Sidecar::connect(channel(&east, address, &web), "client").await.unwrap();
    client.say(sidecar_request::Kind::Subscribe("shop/web-000".into())).await;
    assert_eq!(client.next_service().await.numbers, Some(proto::ServiceNumbers::default()), "none yet");
    east.allocate().await;
    let mut mesh = MeshAddresses::default();
    assert_eq!(addresses(&mut client, &mut mesh).await, 3);
    assert!(mesh.is_complete() && mesh.len() == 191);
    let told = client.next_service().await.numbers.unwrap();
    let at = Ranges::default().address(Number(told.service)).unwrap();
    assert_eq!(mesh.lookup(at.ipv4.into()), Lookup::Mesh(service("shop/web-000")));

    // One more begins a fourth block; the three are not told again.
    east.declare(&names).await;
    assert_eq!(addresses(&mut client, &mut mesh).await, 1);
    assert_eq!(mesh.len(), 192);
    // The last of a block takes the block with it, and another one costs its own block.
    let last = names.pop().unwrap();
    east.declare(&names).await;
    assert_eq!(addresses(&mut client, &mut mesh).await, 0);
    assert_eq!((mesh.len(), mesh.of_service(&service(last))), (191, None));
    names.remove(5);
    east.declare(&names).await;
    let block = client.next(|kind| match kind {
        sidecar_update::Kind::AddressBlock(block) => Some(block),
        _ => None,
    });
    assert_eq!(block.await.names.len(), 62, "of the 63 numbers of block 0");
}

#[tokio::test]
async fn registrations_follow_the_source_and_the_identity() {
    let (east, address) = east().await;
    let web = east.web(&service("shop/web"));
    let mut server = Sidecar::connect(channel(&east, address, &web), "web-1").await.unwrap();
    server.register("shop/web", true).await;
    let verdict = |kind| match kind {
        sidecar_update::Kind::Registration(result) => Some(result.refused),
        _ => None,
    };
    assert!(server.next(verdict).await.contains("no Service"));
    east.declare(&["shop/web"]).await;
    assert_eq!(server.next(verdict).await, "", "in force as soon as the source allows it");

    let other = "spiffe://east.tombolo/ns/shop/sa/other".parse().unwrap();
    let mut other = Sidecar::connect(channel(&east, address, &other), "web-2").await.unwrap();
    other.register("shop/web", true).await;
    assert!(other.next(verdict).await.contains("may not serve"));
    assert_eq!(east.shares("shop/web")["east"], 1);
}

#[tokio::test]
async fn subscriptions_of_one_sidecar_are_bounded() {
    let (east, address) = east().await;
    let web = east.web(&service("shop/web"));
    let mut client = Sidecar::connect(channel(&east, address, &web), "client").await.unwrap();
    let mut told = 0;
    for n in 0..=SUBSCRIPTIONS_MAX {
        client.say(sidecar_request::Kind::Subscribe(format!("shop/s{n}"))).await;
        if n % 32 == 0 {
            client.next(|kind| matches!(kind, sidecar_update::Kind::ServiceUnknown(_)).then_some(())).await;
            told += 1;
        }
    }
    while told <= SUBSCRIPTIONS_MAX {
        client.next(|kind| matches!(kind, sidecar_update::Kind::ServiceUnknown(_)).then_some(())).await;
        told += 1;
    }
    let refusals = east.metrics.refusals("federation");
    assert_eq!(refusals.count(tombolo_core::refusal::Refusal::Overloaded), 1);
}

#[tokio::test]
async fn each_kind_of_stream_is_for_its_own_identities() {
    let (east, address) = east().await;
    let gateway: SpiffeId = "spiffe://east.tombolo/tombolo/gateway/gw".parse().unwrap();
    let refused = Sidecar::connect(channel(&east, address, &gateway), "x").await;
    assert_eq!(refused.err().map(|status| status.code()), Some(Code::PermissionDenied));
    let web = east.web(&service("shop/web"));
    for (id, hello) in [(&web, "gw"), (&gateway, "other")] {
        let refused = Gateway::connect(channel(&east, address, id), hello).await;
        assert_eq!(refused.err().map(|status| status.code()), Some(Code::PermissionDenied), "{id} as {hello}");
    }
}

/// One gateway's end of a stream.
struct Gateway {
    requests: mpsc::Sender<proto::GatewayRequest>,
    updates: Streaming<proto::GatewayUpdate>,
}

impl Gateway {
    async fn connect(channel: Channel, id: &str) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(64);
        let hello = proto::GatewayHello {
            gateway_id: id.into(),
            advertise: vec!["192.0.2.1:15443".into()],
            ingress_address: "127.0.0.1:15443".into(),
            watch_address: "127.0.0.1:15012".into(),
            unmeshed_address: String::new(),
        };
        let hello = proto::GatewayRequest { kind: Some(gateway_request::Kind::Hello(hello)) };
        requests.send(hello).await.unwrap();
        let updates = DiscoveryClient::new(channel).gateway(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok(Self { requests, updates })
    }

    async fn say(&self, kind: gateway_request::Kind) {
        self.requests.send(proto::GatewayRequest { kind: Some(kind) }).await.unwrap();
    }

    async fn next<T>(&mut self, wanted: impl Fn(gateway_update::Kind) -> Option<T>) -> T {
        let find = async {
            loop {
                let update = self.updates.message().await.unwrap().expect("the stream goes on");
                if let Some(found) = update.kind.and_then(&wanted) {
                    return found;
                }
            }
        };
        timeout(DEADLINE, find).await.expect("the update comes")
    }
}

fn snapshot(kind: gateway_update::Kind) -> Option<proto::GatewaySnapshot> {
    match kind {
        gateway_update::Kind::Snapshot(snapshot) => Some(snapshot),
        _ => None,
    }
}

#[tokio::test]
async fn a_gateway_learns_peers_and_deliveries_and_sidecars_learn_of_it() {
    let (east, address) = east().await;
    let west = Federation::start("west", &east.addresses).await;
    east.declare(&["shop/web"]).await;
    east.register("web-1", "shop/web", true).await;
    let id: SpiffeId = "spiffe://east.tombolo/tombolo/gateway/gw".parse().unwrap();
    let mut gateway = Gateway::connect(channel(&east, address, &id), "gw").await.unwrap();
    let welcome = |kind| match kind {
        gateway_update::Kind::Welcome(welcome) => Some(welcome.federation_leg_address),
        _ => None,
    };
    assert_eq!(gateway.next(welcome).await, "127.0.0.1:7");
    let first = gateway.next(snapshot).await;
    assert!(first.peers.is_empty() && first.deliveries.is_empty(), "nothing is offered to anybody: {first:?}");

    east.peer(&west, "*").await;
    let peered = gateway.next(|kind| snapshot(kind).filter(|snapshot| !snapshot.deliveries.is_empty())).await;
    assert_eq!(peered.peers[0].cluster, "west");
    let delivery = &peered.deliveries[0];
    assert_eq!(
        (delivery.service.as_str(), delivery.port, &delivery.clusters[..]),
        ("shop/web", 80, &["west".into()][..])
    );
    assert!(delivery.endpoints[0].ready);
    assert_eq!(peered.bundles.unwrap().bundles.len(), 2);

    let web = east.web(&service("shop/web"));
    let mut sidecar = Sidecar::connect(channel(&east, address, &web), "client").await.unwrap();
    let gateways = |kind| match kind {
        sidecar_update::Kind::Gateways(gateways) => Some(gateways.gateways),
        _ => None,
    };
    assert_eq!(sidecar.next(gateways).await[0].ingress_address, "127.0.0.1:15443");

    let state = proto::TunnelState { cluster: "west".into(), reach: proto::Reach::Up.into(), ..Default::default() };
    gateway.say(gateway_request::Kind::Tunnels(proto::TunnelStates { tunnels: vec![state] })).await;
    until("the tunnel is seen", || {
        let view = east.hub.view();
        view.gateways.values().any(|gateway| gateway.tunnels.iter().any(|tunnel| tunnel.cluster == west.cluster))
    })
    .await;
    drop(gateway);
    let gone = sidecar.next(|kind| gateways(kind).filter(Vec::is_empty)).await;
    assert!(gone.is_empty());
}

#[tokio::test]
async fn peering_messages_are_relayed_both_ways() {
    let (mut east, address) = east().await;
    let id: SpiffeId = "spiffe://east.tombolo/tombolo/gateway/gw".parse().unwrap();
    let mut gateway = Gateway::connect(channel(&east, address, &id), "gw").await.unwrap();
    let knock =
        proto::PeeringKnock { attempt: "1".into(), exporter: vec![1], offer: vec![2], chain_der: vec![vec![3]] };
    gateway.say(gateway_request::Kind::Knock(knock)).await;
    let event = timeout(DEADLINE, east.peering.recv()).await.unwrap().unwrap();
    let PeeringEvent::Knock { gateway: from, attempt, chain, .. } = event else { panic!("{event:?}") };
    assert_eq!((attempt.as_str(), chain), ("1", vec![vec![3]]));
    east.hub.command(from, PeeringCommand::Verdict { attempt, answer: vec![4] }).await.unwrap();
    let verdict = |kind| match kind {
        gateway_update::Kind::PeeringVerdict(verdict) => Some(verdict.answer),
        _ => None,
    };
    assert_eq!(gateway.next(verdict).await, [4]);
    let nobody =
        east.hub.command("other".parse().unwrap(), PeeringCommand::Offer { attempt: "2".into(), offer: vec![] });
    assert!(nobody.await.is_err());
}

#[tokio::test]
async fn a_restart_of_the_federation_takes_nothing_away() {
    let (east, address) = east().await;
    east.declare(&["shop/web"]).await;
    let web = east.web(&service("shop/web"));
    let id: SpiffeId = "spiffe://east.tombolo/tombolo/gateway/gw".parse().unwrap();
    let _gateway = Gateway::connect(channel(&east, address, &id), "gw").await.unwrap();
    let server = Sidecar::connect(channel(&east, address, &web), "web-1").await.unwrap();
    server.register("shop/web", true).await;
    let folder = east.folder.path().to_owned();
    until("it is remembered", || {
        let remembered = crate::hub::remembered::load(&folder);
        (remembered.sidecars.len(), remembered.gateways.len()) == (1, 1)
    })
    .await;
    let again = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("connected.json"), again.path().join("connected.json")).unwrap();
    let east = Federation::start_in(again, "east", &Addresses::default()).await;
    east.declare(&["shop/web"]).await;
    until("the source is read", || !east.shares("shop/web").is_empty()).await;
    assert_eq!(east.shares("shop/web")["east"], 1, "ready before its sidecar is back");
    assert!(east.hub.view().gateways.values().all(|gateway| gateway.connected));
}
