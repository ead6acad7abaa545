//! The identity client against a real identity server: nothing that happens to either locks the client out.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::identity_server::{Federation, until};
use jiff::Timestamp;
use tokio::runtime::Runtime;
use tombolo_api::proto::identity::TokenProof;
use tombolo_core::id::Role;
use tombolo_core::service_account::Asked;
use tombolo_trust::bundle::Bundle;
use tombolo_trust::identity::{FirstProof, IdentityConfig, start};
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::{Svid, SvidSource};

const SHORT: Duration = Duration::from_secs(2);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

async fn first(source: &SvidSource) -> Arc<Svid> {
    tokio::time::timeout(Duration::from_secs(20), source.wait()).await.unwrap()
}

fn is_valid(source: &SvidSource) -> bool {
    source.current().is_some_and(|svid| !svid.has_expired(Timestamp::now()))
}

/// A client on a runtime of its own, which can be killed: it is gone at whichever await it has reached, and
/// whatever it had not written is lost.
struct Process {
    runtime: Option<Runtime>,
    source: SvidSource,
    trust: TrustStore,
}

impl Process {
    fn start(config: IdentityConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (source, trust) = {
            let _inside = runtime.enter();
            start(config).unwrap()
        };
        Self { runtime: Some(runtime), source, trust }
    }

    fn kill(self) {}
}

impl Drop for Process {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

#[tokio::test]
async fn of_several_addresses_those_that_refuse_and_those_that_never_answer_cost_a_moment_each() {
    let federation = Federation::start(HOUR, DAY).await;
    // One replica whose process was stopped, and one that has gone.
    let stopped = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let addresses = format!("{}, {gone},{}", stopped.local_addr().unwrap(), federation.address);
    // The order is random: now and then the right one comes last.
    for _ in 0..8 {
        let state = tempfile::tempdir().unwrap();
        federation.add_join(state.path(), "ns/shop/sa/web", 1);
        let config = IdentityConfig { federation: addresses.clone(), ..federation.config(state.path()) };
        let began = Instant::now();
        let (source, _trust) = start(config).unwrap();
        first(&source).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn a_workload_joins_once_and_renews_for_ever() {
    let federation = Federation::start(Duration::from_secs(4), DAY).await;
    let state = tempfile::tempdir().unwrap();
    *federation.state.key_file.lock().unwrap() = Some(state.path().join("identity/key.pem"));
    let entry = federation.add_join(state.path(), "ns/shop/sa/web", 1);
    let (source, trust) = start(federation.config(state.path())).unwrap();
    let svid = first(&source).await;
    assert_eq!(svid.id, federation.cluster.id("ns/shop/sa/web"));
    assert_eq!(trust.snapshot().own(), Some(&federation.cluster.domain()));
    fs::remove_file(state.path().join("token")).unwrap();

    let (mut seen, mut changes) = (BTreeSet::from([svid.chain[0].to_vec()]), source.subscribe());
    while seen.len() < 4 {
        tokio::time::timeout(Duration::from_secs(20), changes.changed()).await.unwrap().unwrap();
        let svid = source.current().unwrap();
        assert!(!svid.has_expired(Timestamp::now()), "renewed before it expires");
        seen.insert(svid.chain[0].to_vec());
    }
    assert_eq!(federation.log()[..4], ["join", "renew", "renew", "renew"]);
    assert_eq!(federation.uses_left(&entry), 0);
}

#[tokio::test]
async fn a_service_accounts_token_is_read_anew_each_time_and_renewal_needs_none() {
    let federation = Federation::start(Duration::from_secs(4), DAY).await;
    let state = tempfile::tempdir().unwrap();
    let token = |text: &str| TokenProof { token: text.into(), role: "gateway".into() };
    let id = federation.cluster.id("tombolo/gateway/gw-0");
    *federation.state.token.lock().unwrap() = Some((token("new"), id.clone()));
    let file = state.path().join("token");
    fs::write(&file, "old").unwrap();
    let config = IdentityConfig {
        first_proof: Some(FirstProof::ServiceAccount(file.clone())),
        asked: Asked::Role(Role::Gateway),
        ..federation.config(state.path())
    };
    let (source, _trust) = start(config).unwrap();
    until("the old token to be refused", || federation.log().contains(&"refused")).await;
    fs::write(&file, "new\n").unwrap();
    assert_eq!(first(&source).await.id, id);
    fs::remove_file(&file).unwrap();
    until("a renewal", || federation.log().contains(&"renew")).await;
    assert!(is_valid(&source));
}

#[tokio::test]
async fn a_restart_goes_on_with_what_was_kept() {
    let federation = Federation::start(HOUR, DAY).await;
    let state = tempfile::tempdir().unwrap();
    federation.add_join(state.path(), "tombolo/gateway/gw-1", 1);
    let process = Process::start(federation.config(state.path()));
    let svid = first(&process.source).await;
    until("the SVID is kept", || state.path().join("identity/svid.pem").exists()).await;
    process.kill();

    federation.state.down.store(true, Ordering::SeqCst);
    let process = Process::start(federation.config(state.path()));
    let kept = process.source.current().expect("in force at once, without the federation");
    assert_eq!((&kept.id, &kept.chain), (&svid.id, &svid.chain));
    assert_eq!(process.trust.snapshot().bundle(&federation.cluster.domain()), Some(&federation.cluster.ca.bundle()));
}

#[tokio::test]
async fn a_kill_between_redeeming_and_persisting_costs_no_use() {
    let federation = Federation::start(HOUR, DAY).await;
    let state = tempfile::tempdir().unwrap();
    let entry = federation.add_join(state.path(), "ns/shop/sa/web", 1);
    federation.state.lose.store(1_000, Ordering::SeqCst);
    for round in 1..=3 {
        let process = Process::start(federation.config(state.path()));
        until("a redemption", || federation.log().len() >= round).await;
        assert!(process.source.current().is_none());
        process.kill();
        assert_eq!(federation.uses_left(&entry), 0);
    }
    federation.state.lose.store(0, Ordering::SeqCst);
    let process = Process::start(federation.config(state.path()));
    assert_eq!(first(&process.source).await.id, federation.cluster.id("ns/shop/sa/web"));
    assert!(!federation.log().contains(&"refused"));
}

#[tokio::test]
async fn a_kill_at_any_moment_locks_nobody_out() {
    let federation = Federation::start(SHORT, DAY).await;
    let state = tempfile::tempdir().unwrap();
    let entry = federation.add_join(state.path(), "ns/shop/sa/web", 1);
    for round in 0..60 {
        let process = Process::start(federation.config(state.path()));
        tokio::time::sleep(Duration::from_micros(round * 500)).await;
        process.kill();
    }
    let process = Process::start(federation.config(state.path()));
    assert_eq!(first(&process.source).await.id, federation.cluster.id("ns/shop/sa/web"));
    assert_eq!(federation.uses_left(&entry), 0);
    assert!(!federation.log().contains(&"refused"));
}

#[tokio::test]
async fn a_state_directory_that_can_not_be_written_costs_no_use() {
    let federation = Federation::start(HOUR, DAY).await;
    let state = tempfile::tempdir().unwrap();
    let entry = federation.add_join(state.path(), "ns/shop/sa/web", 1);
    // A folder where the SVID should go: the rename fails, also for root.
    fs::create_dir_all(state.path().join("identity/svid.pem")).unwrap();
    for _ in 0..2 {
        let process = Process::start(federation.config(state.path()));
        assert_eq!(first(&process.source).await.id, federation.cluster.id("ns/shop/sa/web"));
        process.kill();
    }
    assert_eq!(federation.uses_left(&entry), 0);
    assert_eq!(federation.log(), ["join", "join"]);
}

#[tokio::test]
async fn a_pause_longer_than_the_life_heals_by_itself() {
    let federation = Federation::start(SHORT, DAY).await;
    let state = tempfile::tempdir().unwrap();
    federation.add_join(state.path(), "ns/shop/sa/web", 1);
    let process = Process::start(federation.config(state.path()));
    first(&process.source).await;
    fs::remove_file(state.path().join("token")).unwrap();
    federation.state.down.store(true, Ordering::SeqCst);
    until("the expiry", || !is_valid(&process.source)).await;
    federation.state.down.store(false, Ordering::SeqCst);
    until("the running process recovers", || is_valid(&process.source)).await;

    // The same over a restart: an expired SVID is not shown to anybody, but it proves the renewal.
    federation.state.down.store(true, Ordering::SeqCst);
    until("the expiry", || !is_valid(&process.source)).await;
    process.kill();
    let process = Process::start(federation.config(state.path()));
    assert!(process.source.current().is_none());
    federation.state.down.store(false, Ordering::SeqCst);
    until("the restarted process recovers", || is_valid(&process.source)).await;
}

#[tokio::test]
async fn after_the_grace_the_token_is_tried_again() {
    let federation = Federation::start(SHORT, Duration::ZERO).await;
    let state = tempfile::tempdir().unwrap();
    let entry = federation.add_join(state.path(), "ns/shop/sa/web", 1);
    let (source, _) = start(federation.config(state.path())).unwrap();
    first(&source).await;
    let expire = async || {
        federation.state.down.store(true, Ordering::SeqCst);
        until("the expiry and the end of the grace", || {
            source.current().unwrap().not_after + Duration::from_secs(1) < Timestamp::now()
        })
        .await;
        federation.state.down.store(false, Ordering::SeqCst);
    };
    expire().await;
    until("the same key joins again", || is_valid(&source)).await;
    assert_eq!(federation.uses_left(&entry), 0);

    fs::remove_file(state.path().join("token")).unwrap();
    expire().await;
    let before = federation.log().len();
    until("a refusal", || federation.log()[before..].contains(&"refused")).await;
    assert!(!is_valid(&source));
    federation.add_join(state.path(), "ns/shop/sa/web", 1);
    until("a new token is picked up", || is_valid(&source)).await;
}

#[tokio::test]
async fn a_revoked_identity_gets_nothing() {
    let federation = Federation::start(SHORT, DAY).await;
    let state = tempfile::tempdir().unwrap();
    federation.add_join(state.path(), "ns/shop/sa/web", 1);
    let (source, _) = start(federation.config(state.path())).unwrap();
    first(&source).await;
    federation.state.revoked.lock().unwrap().insert(federation.cluster.id("ns/shop/sa/web"));
    until("the expiry", || !is_valid(&source)).await;
    assert!(federation.log().contains(&"refused"));
}

#[tokio::test]
async fn a_federation_of_another_root_gets_no_secret() {
    let (federation, other) = (Federation::start(HOUR, DAY).await, Federation::start(HOUR, DAY).await);
    let state = tempfile::tempdir().unwrap();
    federation.add_join(state.path(), "ns/shop/sa/web", 1);
    let ca = state.path().join("ca.pem");
    fs::copy(other.cluster.folder.path().join("ca.pem"), &ca).unwrap();
    let config = IdentityConfig { ca: ca.clone(), ..federation.config(state.path()) };
    let (source, _) = start(config).unwrap();
    until("a refused handshake", || !federation.refused.lock().unwrap().is_empty()).await;
    assert_eq!((federation.log(), source.current().is_none()), (vec![], true));

    // The right file, with a higher sequence than the wrong one had, needs no restart.
    let right = federation.cluster.ca.bundle();
    let right = Bundle::new(right.trust_domain().clone(), 2, right.roots().to_vec()).unwrap();
    right.save(&ca).unwrap();
    first(&source).await;
}

#[tokio::test]
async fn the_client_stops_when_nobody_uses_it() {
    let federation = Federation::start(SHORT, DAY).await;
    let state = tempfile::tempdir().unwrap();
    federation.add_join(state.path(), "ns/shop/sa/web", 1);
    let (source, trust) = start(federation.config(state.path())).unwrap();
    first(&source).await;
    drop((source, trust));
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let renewals = federation.log().len();
        tokio::time::sleep(SHORT * 2).await;
        if federation.log().len() == renewals {
            break;
        }
        assert!(Instant::now() < deadline, "it goes on renewing");
    }
}

#[tokio::test]
async fn what_can_not_heal_is_refused_at_the_start() {
    let federation = Federation::start(HOUR, DAY).await;
    let state = tempfile::tempdir().unwrap();
    let config = federation.config(state.path());
    let missing = IdentityConfig { ca: state.path().join("none.pem"), ..config.clone() };
    assert!(start(missing).unwrap_err().to_string().contains("none.pem"));
    let address = IdentityConfig { federation: "nowhere".into(), ..config.clone() };
    assert!(start(address).unwrap_err().to_string().contains("host:port"));
    fs::write(state.path().join("identity/key.pem"), "rubbish").unwrap();
    assert!(start(config).unwrap_err().to_string().contains("key.pem"));
}
