//! The hub's state with the time as an argument: freshness and graces.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use jiff::Timestamp;
use tempfile::TempDir;
use tombolo_core::freshness::SILENCE_MAX;
use tombolo_core::model::Freshness;
use tombolo_core::policy::access::DefaultAccess;
use tombolo_core::publish::{Change, Update};
use tombolo_trust::ca::CertificateAuthority;

use super::*;
use crate::registry::{Attached, GRACE};

struct Subject {
    state: State,
    now: Instant,
    _folders: [TempDir; 2],
}

fn cluster(id: &str) -> ClusterId {
    id.parse().unwrap()
}

impl Subject {
    /// East, with peer west whose sync has run once.
    fn new() -> Self {
        let now = Instant::now();
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let domains: [TrustDomain; 2] = ["east.tombolo".parse().unwrap(), "west.tombolo".parse().unwrap()];
        let ca = |n: usize| CertificateAuthority::create_or_load(folders[n].path(), &domains[n]).unwrap();
        let start = HubStart {
            cluster: cluster("east"),
            trust_domain: domains[0].clone(),
            bundle: ca(0).bundle(),
            trust: TrustStore::new(),
            store: Store::open(folders[0].path(), &cluster("east"), &domains[0], Timestamp::now()).unwrap(),
            metrics: Metrics::new("test"),
            default_access: DefaultAccess::Allow,
            remembered: Remembered::default(),
        };
        let record = PeerRecord {
            cluster: cluster("west"),
            trust_domain: domains[1].clone(),
            authority: Authority { exports: vec![], imports: vec![], unmeshed: false },
            bundle: ca(1).bundle().to_wire(),
            gateways: vec![],
        };
        let mut subject = Self { state: State::new(start, LOG_COST_MAX, now), now, _folders: folders };
        let import = Import::new(record.trust_domain.clone());
        subject.input(Input::PeerAdded(Box::new(record), Box::new(import), oneshot::channel().0));
        subject.hear(&[Change::SnapshotBegin, Change::Complete]);
        subject
    }

    fn input(&mut self, input: Input) {
        self.state.handle_input(input, self.now);
        self.state.commit(self.now);
    }

    fn hear(&mut self, changes: &[Change]) {
        let position = Position { epoch: 1, revision: 1 };
        let messages = changes.iter().map(|change| PeerMessage::Update(Update { position, change: change.clone() }));
        self.input(Input::SyncReceived(cluster("west"), messages.collect(), oneshot::channel().0));
    }

    fn gateway(&mut self, session: u64) {
        let join = GatewayJoin {
            gateway: "gw".parse().unwrap(),
            spiffe_id: "spiffe://east.tombolo/tombolo/gateway/gw".parse().unwrap(),
            advertise: vec!["192.0.2.1:1".into()],
            ingress_address: "127.0.0.1:1".into(),
            watch_address: "127.0.0.1:2".into(),
            unmeshed_address: None,
            commands: mpsc::channel(1).0,
            attached: Attached::Here,
        };
        self.input(Input::GatewayJoined(SessionId(session), join));
    }

    fn tunnel(&mut self, session: u64, reach: Reach) {
        let tunnel = TunnelView {
            cluster: cluster("west"),
            remote_gateway: None,
            reach,
            rtt_us: 0,
            remote_address: String::new(),
            dialled_here: true,
            legs: 0,
            last_error: String::new(),
            resolved: Vec::new(),
            mtu: 0,
        };
        self.input(Input::Tunnels(SessionId(session), vec![tunnel]));
    }

    fn wait(&mut self, wait: Duration) {
        self.now += wait;
        self.state.commit(self.now);
    }

    fn freshness(&self) -> Option<Freshness> {
        self.state.view().peers[&cluster("west")].freshness
    }
}

#[test]
fn a_silent_peer_becomes_stale_and_drains_only_without_a_tunnel() {
    let mut subject = Subject::new();
    subject.gateway(1);
    subject.tunnel(1, Reach::Up);
    assert_eq!(subject.freshness(), Some(Freshness::Fresh));
    assert_eq!(subject.state.poll_timeout(), Some(subject.now + SILENCE_MAX), "it wakes by itself");
    subject.wait(SILENCE_MAX);
    assert_eq!(subject.freshness(), Some(Freshness::Stale));
    subject.tunnel(1, Reach::Down);
    assert_eq!(subject.freshness(), Some(Freshness::Draining));
    subject.tunnel(1, Reach::Up);
    assert_eq!(subject.freshness(), Some(Freshness::Stale));
    subject.hear(&[Change::Heartbeat]);
    subject.wait(Duration::ZERO);
    assert_eq!(subject.freshness(), Some(Freshness::Fresh));
}

#[test]
fn heartbeats_and_measurements_wake_nobody() {
    let mut subject = Subject::new();
    subject.gateway(1);
    subject.tunnel(1, Reach::Up);
    let generation = subject.state.view().generation;
    subject.hear(&[Change::Heartbeat]);
    subject.tunnel(1, Reach::Up);
    assert_eq!(subject.state.view().generation, generation);
    assert!(subject.state.view().peers[&cluster("west")].last_heard.is_some());
}

#[test]
fn a_gateway_counts_as_connected_for_the_grace_and_is_published_for_longer() {
    let mut subject = Subject::new();
    subject.gateway(1);
    let connected = |subject: &Subject| subject.state.view().gateways[&"gw".parse::<GatewayId>().unwrap()].connected;
    subject.input(Input::GatewayLeft(SessionId(1)));
    assert!(connected(&subject));
    subject.wait(GRACE);
    assert!(!connected(&subject));
    assert!(!subject.state.published_base().gateways.is_empty());
    subject.gateway(2);
    assert!(connected(&subject));
    // The end of a stream that was replaced changes nothing.
    subject.input(Input::GatewayLeft(SessionId(1)));
    subject.wait(GRACE);
    assert!(connected(&subject));
}

#[test]
fn a_peer_that_comes_back_never_sees_a_revision_twice() {
    let mut subject = Subject::new();
    subject.gateway(1);
    let published = |subject: &Subject| subject.state.view().peers[&cluster("west")].published;
    let before = published(&subject);
    let (bundle, domain) = (subject.state.bundle.to_wire(), "west.tombolo".parse::<TrustDomain>().unwrap());
    subject.input(Input::PeerRemoved(cluster("west"), oneshot::channel().0));
    assert!(subject.state.view().peers.is_empty());
    let record = PeerRecord {
        cluster: cluster("west"),
        trust_domain: domain.clone(),
        authority: Authority { exports: vec![], imports: vec![], unmeshed: false },
        bundle,
        gateways: vec![],
    };
    let import = Import::new(domain);
    subject.input(Input::PeerAdded(Box::new(record), Box::new(import), oneshot::channel().0));
    assert!(published(&subject).revision > before.revision);
    assert_eq!(published(&subject).epoch, before.epoch);
}

#[test]
fn declared_peers_that_are_not_made_are_shown_beside_other_problems() {
    let mut subject = Subject::new();
    let problem = |file: &str| SourceProblem { file: file.into(), line: 3, reason: "no".into() };
    let shown =
        |subject: &Subject| subject.state.view().problems.iter().map(|one| one.file.clone()).collect::<Vec<_>>();
    subject.input(Input::DeclaredRefused(vec![problem("b.yaml")]));
    subject.input(Input::LocalChanged(LocalState { problems: vec![problem("a.yaml")], ..LocalState::default() }));
    assert_eq!(shown(&subject), ["a.yaml", "b.yaml"]);
    subject.input(Input::DeclaredRefused(vec![]));
    assert_eq!(shown(&subject), ["a.yaml"]);
}
