use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tombolo_api::proto::operator::operator_client::OperatorClient;
use tombolo_core::policy::access::DefaultAccess;
use tombolo_runtime::metrics::Metrics;
use tombolo_trust::store::TrustStore;
use tonic::transport::{Channel, Endpoint};

use super::*;
use crate::hub::{self, HubStart};
use crate::kubernetes::Leadership;
use crate::source::{self, SourceSettings};

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  namespace: shop\n  annotations: {tombolo.dev/service-accounts: web}\nspec: {ports: [{port: 80}]}\n";

/// A federation's control parts, served on a real socket.
struct Running {
    _stop: oneshot::Sender<()>,
    state: TempDir,
    source: TempDir,
    client: OperatorClient<Channel>,
}

async fn connect(socket: &Path) -> OperatorClient<Channel> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://operator").connect_with_connector(connector).await.unwrap();
    OperatorClient::new(channel)
}

impl Running {
    async fn new() -> Self {
        let (state, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(directory.path().join("web.yaml"), WEB).unwrap();
        let (cluster, trust_domain) = ("east".parse().unwrap(), "east.tombolo".parse().unwrap());
        let store = Store::open(state.path(), &cluster, &trust_domain, Timestamp::now()).unwrap();
        let ca = CertificateAuthority::create_or_load(state.path(), &trust_domain).unwrap();
        let start = HubStart {
            cluster: cluster.clone(),
            trust_domain: trust_domain.clone(),
            bundle: ca.bundle(),
            trust: TrustStore::new(),
            store: store.clone(),
            metrics: Metrics::new("federation"),
            default_access: DefaultAccess::Allow,
            remembered: Default::default(),
        };
        let (hub, events) = hub::start(start);
        let settings = SourceSettings {
            directory: directory.path().into(),
            cluster: cluster.clone(),
            trust_domain: trust_domain.clone(),
        };
        let source = source::start(settings, store.clone()).await;
        let relay = Box::new(hub.clone());
        let peering = Peering::start(ca.clone(), cluster, store.clone(), relay, Box::new(|_| ())).await.unwrap();
        peering.handle_events(events);
        let service = OperatorService {
            trust_domain,
            hub,
            store,
            source,
            peering,
            ca,
            lead: Lead::alone(Leadership::always()),
            surroundings: Surroundings { version: "1.2.3", dns: None, kubernetes: false },
        };
        let socket = OperatorSocket::bind(state.path()).unwrap();
        let path = socket.path().to_owned();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(socket.serve(service.server(), async { _ = stopped.await }));
        let client = connect(&path).await;
        Self { _stop: stop, state, source: directory, client }
    }
}

#[tokio::test]
async fn join_entries_are_added_listed_and_removed() {
    let mut running = Running::new().await;
    let request = JoinAddRequest { workload: "ns/shop/sa/web".into(), uses: 3, ..Default::default() };
    let added = running.client.join_add(request).await.unwrap().into_inner();
    assert_eq!(added.spiffe_id, "spiffe://east.tombolo/ns/shop/sa/web");
    assert_eq!(added.token.parse::<JoinToken>().unwrap().entry_id.to_string(), added.entry_id);
    let request = JoinAddRequest { role: "gateway".into(), instance: "gw-1".into(), ..Default::default() };
    let gateway = running.client.join_add(request).await.unwrap().into_inner();
    assert_eq!(gateway.spiffe_id, "spiffe://east.tombolo/tombolo/gateway/gw-1");

    let entries = running.client.join_list(JoinListRequest {}).await.unwrap().into_inner().entries;
    let uses: std::collections::BTreeMap<_, _> =
        entries.iter().map(|row| (row.entry_id.clone(), row.uses_left)).collect();
    assert_eq!((uses[&added.entry_id], uses[&gateway.entry_id]), (3, 1));
    let remove = JoinRemoveRequest { entry_id: added.entry_id };
    running.client.join_remove(remove.clone()).await.unwrap();
    assert_eq!(running.client.join_remove(remove).await.unwrap_err().code(), Code::NotFound);

    for (request, want) in [
        (JoinAddRequest { workload: "shop/web".into(), ..Default::default() }, "write the workload as ns/<namespace>"),
        (JoinAddRequest { workload: "ns/Shop/sa/web".into(), ..Default::default() }, "namespace: \"Shop\""),
        (JoinAddRequest { workload: "ns/shop/sa/we b".into(), ..Default::default() }, "service account: "),
        (JoinAddRequest { role: "sidecar".into(), instance: "x".into(), ..Default::default() }, "role: \"sidecar\""),
        (JoinAddRequest { role: "gateway".into(), ..Default::default() }, "instance: \"\""),
    ] {
        let refused = running.client.join_add(request).await.unwrap_err();
        assert!(refused.code() == Code::InvalidArgument && refused.message().starts_with(want), "{refused:?}");
    }
}

#[tokio::test]
async fn services_are_exported_and_withdrawn() {
    let mut running = Running::new().await;
    let request = ExportRequest { service: "web.shop".into() };
    let exported = running.client.export(request.clone()).await.unwrap().into_inner();
    assert_eq!((exported.file.as_str(), exported.already), ("exports/shop.web.yaml", false));
    assert!(running.source.path().join(&exported.file).exists());
    assert!(running.client.export(request).await.unwrap().into_inner().already);
    let request = UnexportRequest { service: "shop/web".into() };
    assert_eq!(running.client.unexport(request.clone()).await.unwrap().into_inner().file, exported.file);
    assert_eq!(running.client.unexport(request).await.unwrap_err().code(), Code::NotFound);
    let refused = running.client.export(ExportRequest { service: "shop/db".into() }).await.unwrap_err();
    assert!(refused.message().starts_with("no Service shop/db is declared in "), "{refused:?}");
    let refused = running.client.export(ExportRequest { service: "nonsense".into() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn invitations_are_made_and_listed() {
    let mut running = Running::new().await;
    let refused = running.client.peer_invite(PeerInviteRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "no gateway: {refused:?}");
    let request = PeerInviteRequest { addresses: vec!["gw.example:15443".into()], life_s: 60, ..Default::default() };
    let invited = running.client.peer_invite(request).await.unwrap().into_inner();
    let token: Token = invited.token.parse().unwrap();
    assert_eq!(
        (token.cluster.as_str(), token.addresses.as_slice()),
        ("east", ["gw.example:15443".to_owned()].as_slice())
    );
    let list = running.client.peer_list(PeerListRequest {}).await.unwrap().into_inner();
    assert_eq!(list.invitations.len(), 1);
    assert_eq!(
        (list.invitations[0].id.as_str(), list.invitations[0].state.as_str()),
        (invited.invitation_id.as_str(), "open")
    );
    assert!(
        !std::fs::read_to_string(running.state.path().join("federation/peering.json"))
            .unwrap()
            .contains(&invited.token)
    );

    let own = PeerAcceptRequest { token: invited.token.clone(), ..Default::default() };
    let refused = running.client.peer_accept(own).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    let cut = PeerAcceptRequest { token: invited.token[..50].into(), ..Default::default() };
    let refused = running.client.peer_accept(cut).await.unwrap_err();
    assert!(refused.message().starts_with("the token is damaged"), "{refused:?}");
    let selector = PeerInviteRequest { imports: vec!["Shop!".into()], ..Default::default() };
    assert_eq!(running.client.peer_invite(selector).await.unwrap_err().code(), Code::InvalidArgument);
    let unknown = PeerRemoveRequest { cluster: "west".into() };
    assert_eq!(running.client.peer_remove(unknown).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn status_and_roots_are_shown() {
    let mut running = Running::new().await;
    let before = running.client.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((before.cluster.as_str(), before.version.as_str()), ("east", "1.2.3"));
    assert_eq!(before.root_sha256.len(), 64);
    let added = running.client.trust_add_root(TrustAddRootRequest {}).await.unwrap().into_inner();
    assert!(added.bundle_sequence > before.bundle_sequence);
    assert_ne!(added.root_sha256, before.root_sha256);
    let after = running.client.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(after.bundle_sequence, added.bundle_sequence);
    assert_eq!(after.root_sha256, before.root_sha256, "the new root is published, not yet issuing");
}

#[tokio::test]
async fn identities_are_revoked_and_taken_back() {
    let mut running = Running::new().await;
    const WEB_ID: &str = "spiffe://east.tombolo/ns/shop/sa/web";
    let request = JoinAddRequest { workload: "ns/shop/sa/web".into(), ..Default::default() };
    running.client.join_add(request.clone()).await.unwrap();
    running.client.join_add(JoinAddRequest { workload: "ns/shop/sa/db".into(), ..request }).await.unwrap();
    let revoke = TrustRevokeRequest { spiffe_id: WEB_ID.into() };
    let revoked = running.client.trust_revoke(revoke.clone()).await.unwrap().into_inner();
    assert_eq!((revoked.sequence, revoked.already, revoked.join_entries_removed), (1, false, 1));
    let again = running.client.trust_revoke(revoke).await.unwrap().into_inner();
    assert_eq!((again.sequence, again.already, again.join_entries_removed), (1, true, 0));
    let status = running.client.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.revoked, status.revocation_sequence), (vec![WEB_ID.to_owned()], 1));
    assert_eq!(running.client.join_list(JoinListRequest {}).await.unwrap().into_inner().entries.len(), 1);

    let unrevoke = TrustUnrevokeRequest { spiffe_id: WEB_ID.into() };
    assert_eq!(running.client.trust_unrevoke(unrevoke.clone()).await.unwrap().into_inner().sequence, 2);
    assert_eq!(running.client.trust_unrevoke(unrevoke).await.unwrap_err().code(), Code::NotFound);
    assert!(running.client.status(StatusRequest {}).await.unwrap().into_inner().revoked.is_empty());
    for (id, want) in [
        ("web", "identity: "),
        ("spiffe://west.tombolo/ns/shop/sa/web", "spiffe://west.tombolo/ns/shop/sa/web is of another trust domain"),
        (
            "spiffe://east.tombolo/tombolo/federation/federation",
            "spiffe://east.tombolo/tombolo/federation/federation is this federation itself",
        ),
    ] {
        let refused = running.client.trust_revoke(TrustRevokeRequest { spiffe_id: id.into() }).await.unwrap_err();
        assert!(refused.message().starts_with(want), "{refused:?}");
    }
}

#[tokio::test]
async fn the_socket_is_private_replaces_a_dead_one_and_spares_a_live_one() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().join(socket::SOCKET);
    // What a killed process leaves: a socket that nobody listens on.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let live = OperatorSocket::bind(state.path()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = OperatorSocket::bind(state.path()).unwrap_err().to_string();
    assert!(error.starts_with("another process serves "), "{error}");
    drop(live);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    let error = OperatorSocket::bind(state.path()).unwrap_err().to_string();
    assert!(error.ends_with("exists and is not a socket; move it away"), "{error}");
    let long = state.path().join("x".repeat(100));
    std::fs::create_dir(&long).unwrap();
    let error = OperatorSocket::bind(&long).unwrap_err().to_string();
    assert!(error.contains("use a shorter state directory"), "{error}");
}
