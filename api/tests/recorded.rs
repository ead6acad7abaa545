//! What release 0.1 wrote, as bytes in files: read by this release, and written by it in the same way, so that releases
//! that follow each other understand each other while a mesh is upgraded.
//!
//! A file is never changed. What a later release says beside it goes into a folder of its own version;
//! `TOMBOLO_RECORD=1` writes the files that are missing.
#![allow(clippy::unwrap_used)]
#![allow(clippy::needless_update, reason = "a later release has more fields")]

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use prost::Message;
use tombolo_api::convert::unread_routes;
use tombolo_api::frame;
use tombolo_api::proto::{catalog, discovery, gateway_watch, opaque, peer, tunnel};
use tombolo_core::model::{AppProtocol, Export, ServiceKind, SessionAffinity, Transport};

const FRAME_LEN_MAX: usize = 16 * 1024;
/// A field that no release has: number 1000, a string.
const UNKNOWN_FIELD: &[u8] = &[0xc2, 0x3e, 5, b'l', b'a', b't', b'e', b'r'];

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded/0.1").join(name)
}

fn recorded(name: &str, now: &[u8]) -> Vec<u8> {
    let path = file(name);
    if !path.exists() && std::env::var_os("TOMBOLO_RECORD").is_some() {
        std::fs::write(&path, now).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A message of gRPC.
fn message<M: Message + Default + PartialEq + Debug>(name: &str, said: &M) {
    let now = said.encode_to_vec();
    let bytes = recorded(name, &now);
    assert_eq!(M::decode(bytes.as_slice()).unwrap(), *said, "{name} is read as it was meant");
    assert_eq!(now, bytes, "{name} is written as the release before reads it");
    let later = [bytes.as_slice(), UNKNOWN_FIELD].concat();
    assert_eq!(M::decode(later.as_slice()).unwrap(), *said, "{name} with a field of a later release");
}

/// A message at the head of a stream, with its length in front.
fn framed<M: Message + Default + Clone + PartialEq + Debug>(name: &str, said: &M) {
    let now = frame::encode(said);
    let bytes = recorded(name, &now);
    assert_eq!(frame::decode(&bytes, FRAME_LEN_MAX).unwrap(), Some((said.clone(), bytes.len())), "{name}");
    assert_eq!(now, bytes, "{name} is written as the release before reads it");
    let body = [&bytes[2..], UNKNOWN_FIELD].concat();
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    let later = [length.as_slice(), &body].concat();
    assert_eq!(frame::decode(&later, FRAME_LEN_MAX).unwrap(), Some((said.clone(), later.len())), "{name}");
}

fn export() -> catalog::Export {
    catalog::Export {
        service: "shop/web".into(),
        created_unix_ms: 1_767_225_600_000,
        kind: catalog::ServiceKind::Headless.into(),
        session_affinity: catalog::SessionAffinity::ClientIp.into(),
        ports: vec![
            catalog::ServicePort {
                name: "http".into(),
                port: 80,
                transport: catalog::Transport::Tcp.into(),
                app: catalog::AppProtocol::Http2.into(),
                ..Default::default()
            },
            catalog::ServicePort {
                name: "dns".into(),
                port: 53,
                transport: catalog::Transport::Udp.into(),
                ..Default::default()
            },
        ],
        server_ids: vec!["spiffe://west.tombolo/ns/shop/sa/web".into()],
        endpoints: vec![endpoint()],
        unmeshed: true,
        ..Default::default()
    }
}

fn endpoint() -> catalog::Endpoint {
    catalog::Endpoint {
        id: "0a1b2c3d4e5f6071".into(),
        hostname: "web-0".into(),
        zone: "a".into(),
        weight: 3,
        ready: true,
        ..Default::default()
    }
}

#[test]
fn peer_sync() {
    use peer::sync_update::Kind;
    let hello = peer::Hello { cluster: "east".into(), epoch: 7, revision: 9, ..Default::default() };
    let hello = peer::subscribe_request::Kind::Hello(hello);
    message("sync-hello", &peer::SubscribeRequest { kind: Some(hello) });
    let ack = peer::Ack { epoch: 7, revision: 10, refused: "a reason".into(), ..Default::default() };
    let ack = peer::subscribe_request::Kind::Ack(ack);
    message("sync-ack", &peer::SubscribeRequest { kind: Some(ack) });
    let update = |name: &str, kind| message(name, &peer::SyncUpdate { epoch: 7, revision: 10, kind: Some(kind) });
    update("sync-snapshot-begin", Kind::SnapshotBegin(peer::SnapshotBegin {}));
    update("sync-export", Kind::Export(export()));
    let service = || "shop/web".to_owned();
    update("sync-export-removed", Kind::ExportRemoved(peer::ExportRemoved { service: service() }));
    let changed = peer::EndpointChanged { service: service(), endpoint: Some(endpoint()) };
    update("sync-endpoint", Kind::Endpoint(changed));
    let removed = peer::EndpointRemoved { service: service(), endpoint_id: endpoint().id };
    update("sync-endpoint-removed", Kind::EndpointRemoved(removed));
    let bundle = catalog::TrustBundle {
        trust_domain: "west.tombolo".into(),
        sequence: 4,
        roots_der: vec![vec![0x30, 0x03, 0x02, 0x01, 0x05]],
        refresh_hint_s: 60,
        ..Default::default()
    };
    update("sync-bundle", Kind::Bundle(bundle));
    let gateway = catalog::GatewayAddress { gateway_id: "gw-1".into(), address: "gw.example:15443".into() };
    update("sync-gateways", Kind::Gateways(peer::Gateways { gateways: vec![gateway] }));
    let spiffe_ids = vec!["spiffe://west.tombolo/ns/shop/sa/old".into()];
    update("sync-revocations", Kind::Revocations(peer::Revocations { sequence: 2, spiffe_ids }));
    update("sync-heartbeat", Kind::Heartbeat(peer::Heartbeat { sent_unix_ms: 1_767_225_600_123 }));
    update("sync-complete", Kind::Complete(peer::Complete {}));
}

#[test]
fn frames_of_tunnels_and_legs() {
    use tunnel::control::Kind;
    let header = tunnel::StreamHeader {
        target: "80.web.shop.svc.west.clusterset.local".into(),
        path: vec!["east".into()],
        hops_left: 2,
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
        ..Default::default()
    };
    framed("stream-header", &header);
    let path = vec!["east/gw-1".to_owned(), "west/gw-1".to_owned()];
    let (trace_id, span_id) = (vec![1; 16], vec![2; 8]);
    let accepted = tunnel::Accepted {
        gateway_id: "gw-1".into(),
        path: path.clone(),
        trace_id: trace_id.clone(),
        span_id: span_id.clone(),
        ..Default::default()
    };
    let accepted = tunnel::stream_answer::Kind::Accepted(accepted);
    framed("stream-accepted", &tunnel::StreamAnswer { kind: Some(accepted) });
    let refused = || tunnel::Refused {
        code: "endpoint_gone".into(),
        detail: "it is not ready".into(),
        retry_after_ms: 50,
        gateway_id: "gw-1".into(),
        ..Default::default()
    };
    let kind = tunnel::stream_answer::Kind::Refused(refused());
    framed("stream-refused", &tunnel::StreamAnswer { kind: Some(kind) });
    let hop = tunnel::GatewayHop { gateway_id: "gw-1".into(), cluster: "east".into(), trace_id, span_id };
    let leg = tunnel::LegAccepted { hops: vec![hop], path, ..Default::default() };
    framed("status-accepted", &tunnel::StatusFrame { kind: Some(tunnel::status_frame::Kind::Accepted(leg)) });
    framed("status-refused", &tunnel::StatusFrame { kind: Some(tunnel::status_frame::Kind::Refused(refused())) });
    let hello =
        tunnel::ControlHello { cluster: "east".into(), gateway_id: "gw-1".into(), features: vec!["a-feature".into()] };
    framed("control-hello", &tunnel::Control { kind: Some(Kind::Hello(hello)) });
    framed("control-drain", &tunnel::Control { kind: Some(Kind::Drain(tunnel::Drain { deadline_ms: 30_000 })) });
    framed("control-probe", &tunnel::Control { kind: Some(Kind::Probe(tunnel::Probe { sequence: 300 })) });
    let answer = tunnel::ProbeAnswer { sequence: 300 };
    framed("control-probe-answer", &tunnel::Control { kind: Some(Kind::ProbeAnswer(answer)) });
    let open = opaque::Open { port: 5432, client_address: "192.0.2.1:40000".into(), ..Default::default() };
    framed("open", &open);
    framed("open-refused", &opaque::OpenAnswer { refused: "app_unreachable".into(), ..Default::default() });
}

#[test]
fn discovery_of_sidecars_and_gateways() {
    use discovery::{gateway_request, gateway_update, sidecar_request, sidecar_update};
    let said = |name: &str, kind| message(name, &discovery::SidecarRequest { kind: Some(kind) });
    let hello = discovery::SidecarHello { instance: "web-1".into(), zone: "a".into(), ..Default::default() };
    said("sidecar-hello", sidecar_request::Kind::Hello(hello));
    said("sidecar-subscribe", sidecar_request::Kind::Subscribe("shop/web".into()));
    let registration = discovery::Registration {
        service: "shop/web".into(),
        port: 80,
        inbound_address: "10.1.0.7:15008".into(),
        ready: true,
        ..Default::default()
    };
    let registrations = vec![registration];
    said("sidecar-register", sidecar_request::Kind::Register(discovery::Register { registrations }));
    let readiness = discovery::Readiness { service: "shop/web".into(), port: 80, ready: false };
    said("sidecar-readiness", sidecar_request::Kind::Readiness(readiness));

    let told = |name: &str, kind| message(name, &discovery::SidecarUpdate { kind: Some(kind) });
    let share = discovery::Share {
        cluster: "west".into(),
        local: false,
        freshness: discovery::Freshness::Stale.into(),
        export: Some(export()),
        ..Default::default()
    };
    let service = discovery::Service { service: "shop/web".into(), shares: vec![share], ..Default::default() };
    told("sidecar-service", sidecar_update::Kind::Service(service));
    told("sidecar-service-unknown", sidecar_update::Kind::ServiceUnknown("shop/web".into()));

    let hello = discovery::GatewayHello {
        gateway_id: "gw-1".into(),
        advertise: vec!["gw.example:15443".into()],
        ingress_address: "10.1.0.9:15443".into(),
        watch_address: "10.1.0.9:15012".into(),
        ..Default::default()
    };
    message("gateway-hello", &discovery::GatewayRequest { kind: Some(gateway_request::Kind::Hello(hello)) });
    let endpoint = discovery::DeliveryEndpoint {
        endpoint_id: endpoint().id,
        inbound_address: "10.1.0.7:15008".into(),
        ready: true,
        ..Default::default()
    };
    let delivery = discovery::Delivery {
        service: "shop/web".into(),
        port: 80,
        clusters: vec!["east".into()],
        endpoints: vec![endpoint],
        ..Default::default()
    };
    let peer =
        discovery::PeerLink { cluster: "east".into(), trust_domain: "east.tombolo".into(), ..Default::default() };
    let snapshot = discovery::GatewaySnapshot { peers: vec![peer], deliveries: vec![delivery], ..Default::default() };
    let kind = gateway_update::Kind::Snapshot(snapshot);
    message("gateway-snapshot", &discovery::GatewayUpdate { kind: Some(kind) });
    let reach =
        gateway_watch::PeerReach { cluster: "west".into(), reach: gateway_watch::Reach::Up.into(), rtt_us: 40_000 };
    let state = gateway_watch::GatewayState { gateway_id: "gw-1".into(), draining: true, peers: vec![reach] };
    message("gateway-state", &state);
}

#[test]
fn an_export_means_what_it_meant() {
    let update = peer::SyncUpdate::decode(std::fs::read(file("sync-export")).unwrap().as_slice()).unwrap();
    let Some(peer::sync_update::Kind::Export(export)) = update.kind else { panic!("{update:?}") };
    assert_eq!(unread_routes(&export), None);
    let export = Export::try_from(export).unwrap();
    let (kind, affinity) = (ServiceKind::Headless, SessionAffinity::ClientIp);
    assert_eq!((export.kind, export.session_affinity, export.unmeshed), (kind, affinity, true));
    let ports: Vec<_> = export.ports.iter().map(|port| (port.port, port.transport, port.app)).collect();
    assert_eq!(ports, [(53, Transport::Udp, AppProtocol::Opaque), (80, Transport::Tcp, AppProtocol::Http2)]);
    let endpoint = export.endpoints.values().next().unwrap();
    assert_eq!((endpoint.weight, endpoint.ready, endpoint.hostname.as_deref()), (3, true, Some("web-0")));
}

#[test]
fn what_an_older_release_did_not_say_is_what_it_meant() {
    let older = catalog::Export { service: "shop/web".into(), ..Default::default() };
    let export = Export::try_from(older).unwrap();
    assert_eq!((export.kind, export.session_affinity), (ServiceKind::ClusterSetIp, SessionAffinity::None));
    assert!(!export.unmeshed && export.routes.is_empty() && export.endpoints.is_empty());
}

#[test]
fn a_kind_of_a_later_release_is_passed_over() {
    let later =
        [peer::SyncUpdate { epoch: 7, revision: 11, kind: None }.encode_to_vec(), UNKNOWN_FIELD.to_vec()].concat();
    let read = peer::SyncUpdate::decode(later.as_slice()).unwrap();
    assert_eq!((read.revision, read.kind), (11, None), "its position counts all the same");
    assert_eq!(discovery::GatewayUpdate::decode(UNKNOWN_FIELD).unwrap().kind, None);
    assert_eq!(discovery::SidecarUpdate::decode(UNKNOWN_FIELD).unwrap().kind, None);
    assert_eq!(tunnel::Control::decode(UNKNOWN_FIELD).unwrap().kind, None);
}
