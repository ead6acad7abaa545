//! Identities by tokens of service accounts, which a real API server issues and reviews.

use std::path::PathBuf;

use serde_json::json;
use tombolo_api::proto::identity::identity_client::IdentityClient;
use tombolo_api::proto::identity::issue_request::Proof;
use tombolo_api::proto::identity::{IssueRequest, TokenProof};
use tombolo_core::id::{Role, TrustDomain};
use tombolo_testbed::kubernetes::ControlPlane;
use tombolo_testbed::{Cluster, Sidecar};
use tombolo_trust::bundle::Bundle;
use tombolo_trust::grpc;
use tombolo_trust::key::IdentityKey;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;
use tombolo_trust::tls::{self, ServerExpectation};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::support::{World, app, binary, curl_until, get, link, start_caller, until};
use crate::{WEB, control_plane, export, web};

const AUDIENCE: &str = "tombolo/west.tombolo";
const FEDERATION: &str = "system:serviceaccount:tombolo-system:federation";

/// A Pod of a service account that is made with it. No node will ever run it.
async fn pod(plane: &ControlPlane, namespace: &str, name: &str, account: &str) {
    let account_object = json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": { "name": account, "namespace": namespace },
    });
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "serviceAccountName": account, "containers": [{ "name": "app", "image": "none" }] },
    });
    plane.apply(&format!("{account_object}\n---\n{pod}")).await.unwrap();
}

async fn token_for(plane: &ControlPlane, namespace: &str, account: &str, extra: &[&str]) -> String {
    let create = ["create", "token", account, "-n", namespace];
    plane.kubectl(&[&create, extra].concat()).await.unwrap()
}

/// A token as the kubelet projects it into the Pod.
async fn bound(plane: &ControlPlane, namespace: &str, name: &str, account: &str) -> String {
    let to = ["--audience", AUDIENCE, "--bound-object-kind", "Pod", "--bound-object-name", name];
    token_for(plane, namespace, account, &to).await
}

/// A Pod and the file with its token.
async fn projected(cluster: &Cluster, plane: &ControlPlane, namespace: &str, name: &str, account: &str) -> PathBuf {
    pod(plane, namespace, name, account).await;
    let file = cluster.dir().join(format!("{name}.token"));
    std::fs::write(&file, bound(plane, namespace, name, account).await).unwrap();
    file
}

/// A federation that gives the accounts `gateway` of its namespace the identity of a gateway, and its admin port.
async fn west(world: &World, plane: &ControlPlane) -> (Cluster, IdentityClient<Channel>, std::net::SocketAddr) {
    let kubeconfig = plane.kubeconfig_of_account("tombolo-system", "federation").await.unwrap();
    let kubernetes = json!({ "kubeconfig": kubeconfig, "roles": { "gateway": ["gateway"] } });
    let mut west = Cluster::new(&binary(), "west", world.directory.path(), json!({})).unwrap();
    let federation = json!({ "source": { "kubernetes": kubernetes } });
    let announced = west.start_federation(federation).await.unwrap();
    let bundle = Bundle::load(&std::path::Path::new(&west.state()).join("ca.pem")).unwrap();
    let trust_domain: TrustDomain = bundle.trust_domain().clone();
    let trust = TrustStore::new();
    trust.set_own(bundle).unwrap();
    let expectation = ServerExpectation::Role { trust_domain, role: Role::Federation };
    let tls = tls::client_config(&SvidSource::new(), &trust, expectation, &[grpc::ALPN_H2]);
    let discovery = announced.address("discovery").unwrap().to_string();
    let client = IdentityClient::new(grpc::connect(&discovery, tls).unwrap());
    (west, client, announced.address("admin").unwrap())
}

/// The SPIFFE ID that a token yields, with a CSR that asks for `uri`.
async fn ask(
    client: &mut IdentityClient<Channel>,
    token: &str,
    role: &str,
    uri: Option<&str>,
) -> Result<String, Status> {
    let csr_der = match uri {
        None => IdentityKey::generate().unwrap().csr_der().unwrap(),
        Some(uri) => {
            let mut params = rcgen::CertificateParams::default();
            params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
            params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec()
        }
    };
    let proof = Some(Proof::Token(TokenProof { token: token.into(), role: role.into() }));
    client.issue(IssueRequest { csr_der, proof }).await.map(|response| response.into_inner().spiffe_id)
}

#[tokio::test]
async fn a_cluster_whose_identities_are_tokens_serves_a_request_of_another_one() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let (mut west, _client, _) = west(&world, &plane).await;
    let token = projected(&west, &plane, "tombolo-system", "gw-0", "gateway").await;
    west.start_gateway("gw-0", json!({ "token": token })).await.unwrap();

    let app = app::http("web-in-west").await;
    plane.apply(&format!("{}---\n{}", web("http", true), export("web"))).await.unwrap();
    let token = projected(&west, &plane, "shop", "web-1", "web").await;
    let service = json!({ "service": "shop/web", "port": 80, "app": app.address, "protocol": "http" });
    let config = json!({ "token": token, "services": [service] });
    west.start_sidecar(Sidecar { name: "web-1", workload: "", config }).await.unwrap();

    let mut east = world.cluster("east").await;
    link(&west, &east).await;
    let proxy = start_caller(&mut east).await;
    let answer = curl_until(proxy, WEB, "web-in-west").await;
    assert_eq!(answer.header("tombolo-server-id"), Some("spiffe://west.tombolo/ns/shop/sa/web"));

    // A restart goes on with the SVID that it has, however stale its token.
    let file = west.dir().join("web-1.token");
    std::fs::write(file, "stale").unwrap();
    west.kill("web-1").await.unwrap();
    west.restart("web-1").await.unwrap();
    curl_until(proxy, WEB, "web-in-west").await;
    tokio::join!(east.stop(), west.stop(), plane.stop());
}

#[tokio::test]
async fn what_a_token_does_not_prove_nobody_gets() {
    let world = World::new().await;
    let Some(mut plane) = control_plane(&world).await else { return };
    let (mut west, mut client, admin) = west(&world, &plane).await;
    plane.kubectl(&["create", "namespace", "tombolo"]).await.unwrap();
    for (namespace, name, account) in [
        ("shop", "web-1", "web"),
        ("shop", "gone", "web"),
        ("tombolo-system", "gw-0", "gateway"),
        ("tombolo-system", "helper", "helper"),
        ("tombolo", "gw-0", "gateway"),
    ] {
        pod(&plane, namespace, name, account).await;
    }
    let web = bound(&plane, "shop", "web-1", "web").await;
    let gateway = bound(&plane, "tombolo-system", "gw-0", "gateway").await;
    let id = |path: &str| format!("spiffe://west.tombolo/{path}");
    assert_eq!(ask(&mut client, &web, "", None).await.unwrap(), id("ns/shop/sa/web"));
    assert_eq!(ask(&mut client, &web, "", Some(&id("ns/shop/sa/web"))).await.unwrap(), id("ns/shop/sa/web"));
    assert_eq!(ask(&mut client, &gateway, "gateway", None).await.unwrap(), id("tombolo/gateway/gw-0"));

    let to_web = ["--bound-object-kind", "Pod", "--bound-object-name", "web-1"];
    let for_east = [&to_web[..], &["--audience", "tombolo/east.tombolo"]].concat();
    let other_audience = token_for(&plane, "shop", "web", &for_east).await;
    let unbound = token_for(&plane, "shop", "web", &["--audience", AUDIENCE]).await;
    let helper = bound(&plane, "tombolo-system", "helper", "helper").await;
    let like_ours = bound(&plane, "tombolo", "gw-0", "gateway").await;
    let gone = bound(&plane, "shop", "gone", "web").await;
    let delete = ["delete", "pod", "gone", "-n", "shop", "--force", "--grace-period=0"];
    plane.kubectl(&delete).await.unwrap();
    // Another one of the same name has another uid.
    pod(&plane, "shop", "gone", "web").await;

    let forged = id("tombolo/gateway/gw-0");
    let denied = Code::PermissionDenied;
    for (token, role, uri, code, want) in [
        (other_audience.as_str(), "", None, denied, "audience tombolo/west.tombolo"),
        (&unbound, "", None, denied, "shop/web is not bound to a Pod"),
        (&gone, "", None, denied, "does not accept the service-account token"),
        ("nonsense", "", None, denied, "does not accept the service-account token"),
        ("", "", None, Code::InvalidArgument, "has 1 to"),
        (&web, "gateway", None, denied, "shop/web is no gateway"),
        (&like_ours, "gateway", None, denied, "tombolo/gateway is no gateway"),
        (&helper, "gateway", None, denied, "tombolo-system/helper is no gateway"),
        (&gateway, "", None, denied, "reserved for the gateways"),
        (&gateway, "federation", None, Code::InvalidArgument, "\"federation\" is not what"),
        (&web, "", Some(forged.as_str()), denied, "the CSR asks for \"spiffe://west.tombolo/tombolo/gateway/gw-0\""),
    ] {
        let refused = ask(&mut client, token, role, uri).await.unwrap_err();
        assert!(refused.code() == code && refused.message().contains(want), "{want}: {refused:?}");
    }
    let metrics = get(admin, "/metrics").await;
    for counted in ["\"identity-denied\"} 5", "\"wrong-role\"} 4", "\"bad-request\"} 2"] {
        assert!(
            metrics.contains(&format!("tombolo_refusals_total{{role=\"federation\",reason={counted}")),
            "{metrics}"
        );
    }

    // Without the API server nobody is vouched for, and whoever asks hears it.
    plane.kill_apiserver().await.unwrap();
    let refused = ask(&mut client, &web, "", None).await.unwrap_err();
    assert!(refused.code() == Code::Internal && refused.message().contains("can't review"), "{refused:?}");
    plane.start_apiserver().await.unwrap();
    until("the API server to vouch again", async || ask(&mut client, &web, "", None).await.ok()).await;
    west.stop().await;
    plane.stop().await;
}

#[tokio::test]
async fn the_federations_account_may_do_what_it_does_and_nothing_else() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let may = async |verb: &str, resource: &str, namespace: &str| {
        let (resource, part) = resource.split_once('/').unwrap_or((resource, ""));
        let part = format!("--subresource={part}");
        plane.kubectl(&["auth", "can-i", verb, resource, &part, "-n", namespace, "--as", FEDERATION]).await.is_ok()
    };
    for (verb, resource, namespace) in [
        ("create", "tokenreviews.authentication.k8s.io", "shop"),
        ("list", "services", "shop"),
        ("watch", "serviceexports.multicluster.x-k8s.io", "shop"),
        ("patch", "serviceimports.multicluster.x-k8s.io/status", "shop"),
        ("create", "leases.coordination.k8s.io", "tombolo-system"),
    ] {
        assert!(may(verb, resource, namespace).await, "{verb} {resource} in {namespace}");
    }
    for (verb, resource, namespace) in [
        ("get", "secrets", "shop"),
        ("create", "serviceaccounts/token", "shop"),
        ("impersonate", "users", "shop"),
        ("create", "pods", "shop"),
        ("create", "pods/exec", "tombolo-system"),
        ("get", "tokenreviews.authentication.k8s.io", "shop"),
        ("create", "subjectaccessreviews.authorization.k8s.io", "shop"),
        ("create", "clusterrolebindings.rbac.authorization.k8s.io", "shop"),
        ("create", "leases.coordination.k8s.io", "shop"),
        ("patch", "serviceexports.multicluster.x-k8s.io", "shop"),
    ] {
        assert!(!may(verb, resource, namespace).await, "{verb} {resource} in {namespace}");
    }
    plane.stop().await;
}
