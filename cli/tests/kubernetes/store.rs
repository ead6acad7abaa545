//! The store in objects of a real API server.

use std::time::Duration;

use jiff::Timestamp;
use tombolo_core::id::TrustDomain;
use tombolo_federation::config::KubernetesConfig;
use tombolo_federation::kubernetes::{Leadership, connect};
use tombolo_federation::store::objects::Objects;
use tombolo_federation::store::{Store, StoreError};
use tombolo_testbed::kubernetes::ControlPlane;

use crate::control_plane;
use crate::support::World;

/// The store as a replica with the rights of the federation's account opens it.
async fn replica(plane: &ControlPlane, world: &World, name: &str) -> (Store, Leadership) {
    let kubeconfig = plane.kubeconfig_of_account("tombolo-system", "federation").await.unwrap();
    let config = KubernetesConfig {
        kubeconfig: Some(kubeconfig),
        context: None,
        namespace: "tombolo-system".parse().unwrap(),
        roles: Default::default(),
        identity: None,
        lease_duration: Duration::from_secs(15),
    };
    let (client, _) = connect(&config).await.unwrap();
    let leadership = Leadership::always();
    let objects = Objects::new(client, &config.namespace, leadership.clone());
    let state = world.directory.path().join(name);
    let domain: TrustDomain = "west.tombolo".parse().unwrap();
    let opened = tokio::task::spawn_blocking(move || Store::follow(objects, &state, &"west".parse().unwrap(), &domain));
    (opened.await.unwrap().unwrap(), leadership)
}

/// As many first-seen times as make a document of some 60 octets each.
async fn fill(store: &Store, count: usize) -> Result<(), StoreError> {
    let services = (0..count).map(|n| format!("a-namespace/a-service-{n}").parse().unwrap()).collect();
    store.off_thread(move |store| store.first_seen(&services, Timestamp::now()).map(drop)).await
}

async fn secrets(plane: &ControlPlane) -> Vec<String> {
    let names = plane.kubectl(&["get", "secrets", "-n", "tombolo-system", "-o", "name"]).await.unwrap();
    names.lines().map(|name| name.trim_start_matches("secret/").to_owned()).collect()
}

#[tokio::test]
async fn a_writer_that_lost_the_lead_overwrites_nothing_and_documents_that_grow_are_split() {
    let world = World::new().await;
    let Some(plane) = control_plane(&world).await else { return };
    let ((one, held), (two, _)) = (replica(&plane, &world, "one").await, replica(&plane, &world, "two").await);
    let refused = fill(&one, 1).await.unwrap_err();
    assert!(matches!(refused, StoreError::NotLeading), "{refused}");
    one.off_thread(|store| store.lead(Timestamp::now())).await.unwrap();
    fill(&one, 10).await.unwrap();

    // Some 1 MiB: several Secrets, each small; and as many again when it has been replaced.
    for count in [8_000, 8_001] {
        fill(&one, count).await.unwrap();
        let all = secrets(&plane).await;
        let parts: Vec<&String> =
            all.iter().filter(|name| name.starts_with("tombolo-federation-first-seen-")).collect();
        assert!(parts.len() > 2 && parts.len() < 10, "{all:?}");
        for part in parts {
            let octets = plane.get("secret", "tombolo-system", part).await.unwrap().to_string().len();
            assert!(octets < 256 * 1024, "{part} has {octets} octets");
        }
    }

    // Another one takes over, in a later epoch: the first can't write even what the second has not touched.
    two.off_thread(|store| store.lead(Timestamp::now())).await.unwrap();
    assert!(two.epoch() > one.epoch());
    assert!(held.holds());
    let before = secrets(&plane).await;
    let overtaken = fill(&one, 8_002).await.unwrap_err();
    assert!(matches!(overtaken, StoreError::Overtaken { .. }), "{overtaken}");
    assert!(!held.holds(), "it knows that it leads no more");
    assert!(secrets(&plane).await.len() > before.len(), "the parts of its write, which nothing names");

    // Whoever takes over next reads what the second left, and clears away what the first has.
    fill(&two, 8_003).await.unwrap();
    let (three, _) = replica(&plane, &world, "three").await;
    three.off_thread(|store| store.lead(Timestamp::now())).await.unwrap();
    assert_eq!(secrets(&plane).await.len(), before.len());
    let services = (0..8_003).map(|n| format!("a-namespace/a-service-{n}").parse().unwrap()).collect();
    let seen = three.off_thread(move |store| store.first_seen(&services, Timestamp::now())).await.unwrap();
    assert_eq!(seen.len(), 8_003);
    plane.stop().await;
}
