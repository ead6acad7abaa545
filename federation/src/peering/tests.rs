use tempfile::TempDir;
use tokio::time::timeout;
use tombolo_api::proto::peering::answer::Kind;
use tombolo_api::proto::peering::{AcceptedBody, Answer, Offer, OfferBody};
use tombolo_core::id::SpiffeId;
use tombolo_core::model::ServiceSelector;
use tombolo_core::source::LocalState;
use tombolo_core::source::declared::{DeclaredBundle, DeclaredPeer, Place};
use tombolo_trust::key::IdentityKey;

use super::*;
use prost::Message;

const DEADLINE: Duration = Duration::from_secs(20);

/// What goes wrong between the two gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mischief {
    #[default]
    None,
    /// Two TLS connections where there should be one: each side sees another exporter value.
    Middle,
    /// One octet of the offer's body is changed.
    OfferChanged,
    /// The offer comes with another cluster's gateway certificate.
    OtherCaller,
    /// The offer comes with the certificate of a workload.
    WorkloadCaller,
    /// The inviting side's gateway puts a root of its own in place of the cluster's ...
    AnswerWithOtherRoot,
    /// ... or beside it ...
    AnswerWithMoreRoots,
    /// ... or another address ...
    AnswerWithOtherAddress,
    /// ... or leaves out the signature.
    AnswerUnsigned,
    /// The answer is lost on its way.
    AnswerLost,
    AnswerGarbage,
}

/// A cluster at the fake network.
struct Endpoint {
    events: mpsc::Sender<PeeringEvent>,
    root_sha256: [u8; 32],
    gateway_chain: Vec<Vec<u8>>,
    workload_chain: Vec<Vec<u8>>,
}

/// A dial that stands, or a knock that waits for its verdict.
struct Connection {
    from: String,
    to: String,
    exporter: Vec<u8>,
}

#[derive(Default)]
struct Network {
    endpoints: Mutex<BTreeMap<String, Endpoint>>,
    connections: Mutex<BTreeMap<String, Connection>>,
    mischief: Mutex<Mischief>,
}

impl Network {
    fn send(&self, to: &str, event: PeeringEvent) {
        self.endpoints.lock().unwrap()[to].events.try_send(event).unwrap();
    }

    fn dial(&self, from: &str, attempt: String, address: &str, pinned: [u8; 32]) {
        let gateway = gateway_id(from);
        let to = address.split('.').next().unwrap();
        let root = self.endpoints.lock().unwrap().get(to).map(|endpoint| endpoint.root_sha256);
        let event = match root {
            None => PeeringEvent::Failed { gateway, attempt, reason: "no answer".into() },
            Some(root) if root != pinned => {
                PeeringEvent::Failed { gateway, attempt, reason: "the server's root is not the pinned one".into() }
            }
            Some(_) => {
                let exporter = rand::random::<[u8; 32]>().to_vec();
                let connection = Connection { from: from.into(), to: to.into(), exporter: exporter.clone() };
                self.connections.lock().unwrap().insert(attempt.clone(), connection);
                PeeringEvent::Exporter { gateway, attempt, exporter }
            }
        };
        self.send(from, event);
    }

    fn offer(&self, attempt: &str, mut offer: Vec<u8>) {
        let mischief = *self.mischief.lock().unwrap();
        let connections = self.connections.lock().unwrap();
        let Connection { from, to, exporter } = &connections[attempt];
        let mut exporter = exporter.clone();
        let endpoints = self.endpoints.lock().unwrap();
        let mut chain = endpoints[from].gateway_chain.clone();
        match mischief {
            Mischief::Middle => exporter[0] ^= 1,
            Mischief::OfferChanged => {
                let mut whole = Offer::decode(offer.as_slice()).unwrap();
                let mut body = OfferBody::decode(whole.body.as_slice()).unwrap();
                body.cluster = "mallory".into();
                whole.body = body.encode_to_vec();
                offer = whole.encode_to_vec();
            }
            Mischief::OtherCaller => chain.clone_from(&endpoints[to].gateway_chain),
            Mischief::WorkloadCaller => chain.clone_from(&endpoints[from].workload_chain),
            _ => {}
        }
        let knock =
            PeeringEvent::Knock { gateway: gateway_id(to), attempt: attempt.to_owned(), exporter, offer, chain };
        endpoints[to].events.try_send(knock).unwrap();
    }

    fn verdict(&self, attempt: &str, mut answer: Vec<u8>) {
        let from = self.connections.lock().unwrap().remove(attempt).unwrap().from;
        let (gateway, attempt) = (gateway_id(&from), attempt.to_owned());
        let event = match *self.mischief.lock().unwrap() {
            Mischief::AnswerLost => PeeringEvent::Failed { gateway, attempt, reason: "connection lost".into() },
            Mischief::AnswerGarbage => PeeringEvent::Answer { gateway, attempt, answer: vec![0xff; 10] },
            mischief => {
                answer = tamper(mischief, answer);
                PeeringEvent::Answer { gateway, attempt, answer }
            }
        };
        self.send(&from, event);
    }
}

fn tamper(mischief: Mischief, answer: Vec<u8>) -> Vec<u8> {
    let Some(Kind::Accepted(mut accepted)) = Answer::decode(answer.as_slice()).unwrap().kind else { return answer };
    let mut body = AcceptedBody::decode(accepted.body.as_slice()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let other = CertificateAuthority::create_or_load(state.path(), &body.trust_domain.parse().unwrap()).unwrap();
    let (other, bundle) = (other.bundle().to_wire(), body.bundle.as_mut().unwrap());
    match mischief {
        Mischief::AnswerWithOtherRoot => *bundle = other,
        Mischief::AnswerWithMoreRoots => bundle.roots_der.extend(other.roots_der),
        Mischief::AnswerWithOtherAddress => body.gateways[0].address = "mallory.example:15443".into(),
        Mischief::AnswerUnsigned => accepted.signature.clear(),
        _ => return answer,
    }
    accepted.body = body.encode_to_vec();
    Answer { kind: Some(Kind::Accepted(accepted)) }.encode_to_vec()
}

fn gateway_id(cluster: &str) -> GatewayId {
    format!("gw-{cluster}").parse().unwrap()
}

/// The hub and the gateway of one cluster.
#[derive(Clone)]
struct FakeRelay {
    cluster: String,
    network: Arc<Network>,
    gateways: Arc<Mutex<Vec<RelayGateway>>>,
    peers: Arc<Mutex<BTreeMap<ClusterId, PeerRecord>>>,
    problems: Arc<Mutex<Vec<SourceProblem>>>,
}

#[tonic::async_trait]
impl Relay for FakeRelay {
    fn gateways(&self) -> Vec<RelayGateway> {
        self.gateways.lock().unwrap().clone()
    }

    async fn command(&self, _: GatewayId, command: PeeringCommand) -> Result<(), CommandRefused> {
        match command {
            PeeringCommand::Dial { attempt, addresses, root_sha256, .. } => {
                self.network.dial(&self.cluster, attempt, &addresses[0], root_sha256);
            }
            PeeringCommand::Offer { attempt, offer } => self.network.offer(&attempt, offer),
            PeeringCommand::Verdict { attempt, answer } => self.network.verdict(&attempt, answer),
        }
        Ok(())
    }

    async fn peer_added(&self, record: PeerRecord) -> Result<(), HubGone> {
        self.peers.lock().unwrap().insert(record.cluster.clone(), record);
        Ok(())
    }

    async fn peer_removed(&self, cluster: ClusterId) -> Result<(), HubGone> {
        self.peers.lock().unwrap().remove(&cluster);
        Ok(())
    }

    async fn declared_refused(&self, problems: Vec<SourceProblem>) -> Result<(), HubGone> {
        *self.problems.lock().unwrap() = problems;
        Ok(())
    }
}

struct Cluster {
    state: TempDir,
    peering: Peering,
    relay: FakeRelay,
    ca: CertificateAuthority,
    refusals: Arc<Mutex<Vec<&'static str>>>,
}

fn chain(ca: &CertificateAuthority, path: &str) -> Vec<Vec<u8>> {
    let id: SpiffeId = format!("spiffe://{}{path}", ca.bundle().trust_domain()).parse().unwrap();
    let csr = IdentityKey::generate().unwrap().csr_der().unwrap();
    let chain = ca.issue(&csr, &id, Duration::from_secs(3600), Timestamp::now()).unwrap();
    chain.iter().map(|certificate| certificate.to_vec()).collect()
}

impl Cluster {
    async fn named(name: &str, network: &Arc<Network>) -> Self {
        Self::with_domain(name, &format!("{name}.tombolo"), network).await
    }

    async fn with_domain(name: &str, domain: &str, network: &Arc<Network>) -> Self {
        let state = tempfile::tempdir().unwrap();
        let ca = CertificateAuthority::create_or_load(state.path(), &domain.parse().unwrap()).unwrap();
        let gateway = RelayGateway {
            gateway: gateway_id(name),
            advertise: vec![format!("{name}.example:15443")],
            connected: true,
        };
        let relay = FakeRelay {
            cluster: name.into(),
            network: network.clone(),
            gateways: Arc::new(Mutex::new(vec![gateway])),
            peers: Arc::default(),
            problems: Arc::default(),
        };
        let refusals = Arc::default();
        let peering = start(&state, &ca, &relay, &refusals).await;
        Self { state, peering, relay, ca, refusals }
    }

    /// Kills the process and starts another one with the same state.
    async fn restart(mut self) -> Self {
        let spare = tempfile::tempdir().unwrap();
        let unused = self.relay.clone();
        self.peering = start(&spare, &self.ca, &unused, &self.refusals).await;
        self.relay.peers.lock().unwrap().clear();
        let deadline = tokio::time::Instant::now() + DEADLINE;
        // The old task ends when its sender is replaced, and only then gives up the lock.
        loop {
            match Store::open(self.state.path(), &self.cluster(), self.ca.bundle().trust_domain(), Timestamp::now()) {
                Ok(store) => break drop(store),
                Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
            }
            tokio::task::yield_now().await;
        }
        self.peering = start(&self.state, &self.ca, &self.relay, &self.refusals).await;
        self
    }

    fn cluster(&self) -> ClusterId {
        self.relay.cluster.parse().unwrap()
    }

    async fn invite(&self) -> Token {
        self.peering.invite(Duration::from_secs(3600), grants("shop"), vec![]).await.unwrap().token
    }

    async fn refused(&self, token: &Token) -> String {
        timeout(DEADLINE, self.peering.accept(token, grants("data"))).await.unwrap().unwrap_err().to_string()
    }

    fn peers(&self) -> Vec<String> {
        let stored: Vec<_> = self.peering.shared.store.peering().peers().map(|peer| peer.cluster.to_string()).collect();
        let told: Vec<_> = self.relay.peers.lock().unwrap().keys().map(ToString::to_string).collect();
        assert_eq!(stored, told, "the hub knows what the store keeps");
        stored
    }
}

async fn start(
    state: &TempDir,
    ca: &CertificateAuthority,
    relay: &FakeRelay,
    refusals: &Arc<Mutex<Vec<&'static str>>>,
) -> Peering {
    let cluster: ClusterId = relay.cluster.parse().unwrap();
    let store = Store::open(state.path(), &cluster, ca.bundle().trust_domain(), Timestamp::now()).unwrap();
    let (events, received) = mpsc::channel(64);
    let endpoint = Endpoint {
        events,
        root_sha256: ca.active_root_sha256(),
        gateway_chain: chain(ca, &format!("/tombolo/gateway/gw-{cluster}")),
        workload_chain: chain(ca, "/ns/shop/sa/web"),
    };
    relay.network.endpoints.lock().unwrap().insert(cluster.to_string(), endpoint);
    let refusals = refusals.clone();
    let on_refused = Box::new(move |code| refusals.lock().unwrap().push(code));
    let peering = Peering::start(ca.clone(), cluster, store, Box::new(relay.clone()), on_refused).await.unwrap();
    peering.handle_events(received);
    peering
}

fn grants(namespace: &str) -> Authority {
    Authority { exports: vec![ServiceSelector::All], imports: vec![namespace.parse().unwrap()], unmeshed: false }
}

async fn east_and_west() -> (Arc<Network>, Cluster, Cluster) {
    let network = Arc::new(Network::default());
    let (east, west) = (Cluster::named("east", &network).await, Cluster::named("west", &network).await);
    (network, east, west)
}

#[tokio::test]
async fn an_invitation_binds_both_sides_and_outlives_a_restart() {
    let (_network, east, west) = east_and_west().await;
    let token = east.invite().await;
    assert_eq!(token.addresses, ["east.example:15443"]);
    let accepted = west.peering.accept(&token, grants("data")).await.unwrap();
    assert_eq!((accepted.cluster.as_str(), accepted.trust_domain.as_str()), ("east", "east.tombolo"));
    assert_eq!(accepted.root_sha256, east.ca.active_root_sha256());
    let (east, west) = (east.restart().await, west.restart().await);
    assert_eq!((east.peers(), west.peers()), (vec!["west".to_owned()], vec!["east".to_owned()]));
    let of = |cluster: &Cluster, peer: &str| cluster.relay.peers.lock().unwrap()[peer].clone();
    let (there, here) = (of(&east, "west"), of(&west, "east"));
    assert_eq!((there.authority, here.authority), (grants("shop"), grants("data")), "each side's own decision");
    assert_eq!((there.bundle, here.bundle), (west.ca.bundle().to_wire(), east.ca.bundle().to_wire()));
    assert_eq!(there.gateways[0].address, "west.example:15443");
    assert_eq!(here.gateways[0].gateway, gateway_id("east"));
}

#[tokio::test]
async fn a_used_invitation_is_refused_to_everybody_else() {
    let (network, east, west) = east_and_west().await;
    let north = Cluster::named("north", &network).await;
    let token = east.invite().await;
    west.peering.accept(&token, grants("data")).await.unwrap();
    let error = north.refused(&token).await;
    assert!(error.starts_with("cluster east refused: the invitation was used already; ask for a new one"), "{error}");
    assert_eq!((east.peers(), north.peers()), (vec!["west".to_owned()], vec![]));
    assert_eq!(*east.refusals.lock().unwrap(), ["used"]);
}

#[tokio::test]
async fn a_lost_answer_costs_nothing() {
    let (network, east, west) = east_and_west().await;
    let token = east.invite().await;
    *network.mischief.lock().unwrap() = Mischief::AnswerLost;
    let error = west.refused(&token).await;
    assert!(error.contains("could not reach cluster east: connection lost"), "{error}");
    *network.mischief.lock().unwrap() = Mischief::None;
    let (east, west) = (east.restart().await, west.restart().await);
    west.peering.accept(&token, grants("data")).await.unwrap();
    assert_eq!((east.peers(), west.peers()), (vec!["west".to_owned()], vec!["east".to_owned()]));
}

#[tokio::test]
async fn expiry_is_told_on_both_sides() {
    let (_network, east, west) = east_and_west().await;
    let mut token = east.peering.invite(Duration::from_secs(1), grants("shop"), vec![]).await.unwrap().token;
    let left = token.expires.duration_since(Timestamp::now());
    tokio::time::sleep(left.unsigned_abs() + Duration::from_millis(1)).await;
    let error = west.refused(&token).await;
    assert!(error.starts_with("the invitation expired at "), "{error}");
    // A clock that runs behind, or a token whose date was changed: the inviting side decides.
    token.expires = Timestamp::now() + Duration::from_secs(3600);
    let error = west.refused(&token.to_string().parse().unwrap()).await;
    assert!(error.starts_with("cluster east refused: the invitation has expired"), "{error}");
}

#[tokio::test]
async fn guesses_are_counted_and_close_the_invitation() {
    let (_network, east, west) = east_and_west().await;
    let token = east.invite().await;
    let unknown = Token { id: InvitationId::from_random([9; 16]), ..token.clone() };
    let error = west.refused(&unknown).await;
    assert!(error.contains("no such invitation is known here"), "{error}");
    let guessed = Token { seed: Seed::new([9; 32]), ..token.clone() };
    for _ in 0..5 {
        let error = west.refused(&guessed).await;
        assert!(error.contains("the proof does not match the invitation"), "{error}");
    }
    let east = east.restart().await;
    let error = west.refused(&token).await;
    assert!(error.contains("too many failed tries have closed the invitation"), "{error}");
    assert_eq!(
        *east.refusals.lock().unwrap(),
        ["unknown", "bad-proof", "bad-proof", "bad-proof", "bad-proof", "bad-proof", "too-many-tries"]
    );
}

#[tokio::test]
async fn whoever_sits_between_the_gateways_gets_nowhere() {
    for (mischief, want, code) in [
        (Mischief::Middle, "something sits between the two gateways", Some("bad-proof")),
        (Mischief::OfferChanged, "the proof does not match", Some("bad-proof")),
        (Mischief::OtherCaller, "certificate does not fit the offer", Some("bad-certificate")),
        (Mischief::WorkloadCaller, "it is not a gateway's", Some("bad-certificate")),
        (Mischief::AnswerWithOtherRoot, "does not come from the cluster that the token names (another root)", None),
        (Mischief::AnswerWithMoreRoots, "the pinned root has not signed it", None),
        (Mischief::AnswerWithOtherAddress, "the pinned root has not signed it", None),
        (Mischief::AnswerUnsigned, "the pinned root has not signed it", None),
        (Mischief::AnswerGarbage, "the answer can't be read", None),
    ] {
        let (network, east, west) = east_and_west().await;
        let token = east.invite().await;
        *network.mischief.lock().unwrap() = mischief;
        let error = west.refused(&token).await;
        assert!(error.contains(want), "{mischief:?}: {error}");
        assert_eq!(east.refusals.lock().unwrap().first().copied(), code, "{mischief:?}");
        assert_eq!(west.peers(), Vec::<String>::new(), "{mischief:?}: nothing is stored");
    }
}

#[tokio::test]
async fn another_root_behind_the_address_is_refused_by_its_pin() {
    let network = Arc::new(Network::default());
    let (east, west) = (Cluster::named("east", &network).await, Cluster::named("west", &network).await);
    let token = east.invite().await;
    let wrong = Token { root_sha256: [1; 32], ..token.clone() };
    let error = west.refused(&wrong).await;
    assert!(error.contains("the server's root is not the pinned one"), "{error}");
    // Even if the gateway let it pass, the inviting side compares the root that was seen.
    network.endpoints.lock().unwrap().get_mut("east").unwrap().root_sha256 = [1; 32];
    let error = west.refused(&wrong).await;
    assert!(error.contains("the token pins a root that this cluster does not publish"), "{error}");
    assert_eq!((east.peers(), west.peers()), (vec![], vec![]));
}

#[tokio::test]
async fn names_are_bound_one_to_one() {
    let (network, east, west) = east_and_west().await;
    let error = east.refused(&east.invite().await).await;
    assert!(error.contains("the token was made by this cluster itself"), "{error}");
    west.peering.accept(&east.invite().await, grants("data")).await.unwrap();
    let error = west.refused(&east.invite().await).await;
    assert!(error.contains("bound to a peer already; remove that peer"), "{error}");
    // Known to west only: east refuses a second cluster of west's trust domain.
    let twin = Cluster::with_domain("twin", "west.tombolo", &network).await;
    let error = twin.refused(&east.invite().await).await;
    assert!(error.starts_with("cluster east refused: the cluster id or the trust domain is bound"), "{error}");
}

#[tokio::test]
async fn a_removed_peer_is_gone_at_once_and_needs_a_new_invitation() {
    let (_network, east, west) = east_and_west().await;
    let token = east.invite().await;
    west.peering.accept(&token, grants("data")).await.unwrap();
    east.peering.remove("west".parse().unwrap()).await.unwrap();
    let east = east.restart().await;
    assert_eq!(east.peers(), Vec::<String>::new());
    let error = east.peering.remove("west".parse().unwrap()).await.unwrap_err().to_string();
    assert_eq!(error, "no peer west; see `tombolo peer list`");
    west.peering.remove("east".parse().unwrap()).await.unwrap();
    assert!(west.refused(&token).await.contains("used already"));
    west.peering.accept(&east.invite().await, grants("data")).await.unwrap();
    assert_eq!((east.peers(), west.peers()), (vec!["west".to_owned()], vec!["east".to_owned()]));
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let (network, east, west) = east_and_west().await;
    let token = east.invite().await;
    west.relay.gateways.lock().unwrap()[0].connected = false;
    assert!(west.refused(&token).await.starts_with("no gateway of this cluster is connected"));
    east.relay.gateways.lock().unwrap()[0].advertise.clear();
    let hour = Duration::from_secs(3600);
    let error = east.peering.invite(hour, grants("shop"), vec![]).await.unwrap_err().to_string();
    assert!(error.starts_with("no gateway of this cluster can be dialled: set `advertise`"), "{error}");
    let error = east.peering.invite(hour, grants("shop"), vec!["nonsense".into()]).await.unwrap_err().to_string();
    assert_eq!(error, "\"nonsense\" is not host:port of a gateway");
    let error = east.peering.invite(Duration::ZERO, grants("shop"), vec!["a:1".into()]).await.unwrap_err().to_string();
    assert!(error.starts_with("an invitation lives from"), "{error}");
    west.relay.gateways.lock().unwrap()[0].connected = true;
    network.endpoints.lock().unwrap().remove("east");
    let error = west.refused(&token).await;
    assert!(error.contains("check that UDP to one of east.example:15443 gets through"), "{error}");
}

fn declares(peer: DeclaredPeer) -> LocalState {
    let place = Place { file: "peers.yaml".into(), line: 7 };
    LocalState { declared_peers: [(peer.cluster.clone(), (place, peer))].into(), ..LocalState::default() }
}

#[tokio::test]
async fn a_declared_peer_that_is_not_made_is_a_problem_until_the_cause_is_gone() {
    let (network, east, west) = east_and_west().await;
    let north = Cluster::with_domain("north", "west.tombolo", &network).await;
    west.peering.accept(&east.invite().await, grants("data")).await.unwrap();
    let bundle = |ca: &CertificateAuthority| DeclaredBundle { sequence: 1, roots_pem: ca.bundle().to_pem() };
    let peer = |cluster: &str, domain: &str, bundle| DeclaredPeer {
        cluster: cluster.parse().unwrap(),
        trust_domain: Some(domain.parse().unwrap()),
        authority: grants("shop"),
        default_access: None,
        bundle: Some(bundle),
        gateways: vec!["north.example:15443".into()],
    };
    let twin = peer("north", "west.tombolo", bundle(&north.ca));
    let taken = "ClusterPeer north claims trust domain west.tombolo, which is bound to peer west";
    for (peer, want) in [
        (twin.clone(), taken),
        (peer("west", "north.tombolo", bundle(&north.ca)), "ClusterPeer west claims trust domain north.tombolo, but"),
        (
            peer("north", "north.tombolo", bundle(&north.ca)),
            "ClusterPeer north has a bundle that is refused: a root belongs",
        ),
        (peer("west", "west.tombolo", bundle(&west.ca)), ""),
    ] {
        east.peering.apply_declared(&declares(peer)).await.unwrap();
        let problems = east.relay.problems.lock().unwrap().clone();
        assert_eq!(problems.len(), usize::from(!want.is_empty()), "{problems:?}");
        for problem in problems {
            assert!(
                (problem.file.as_str(), problem.line) == ("peers.yaml", 7) && problem.reason.starts_with(want),
                "{problem:?}"
            );
        }
        assert_eq!(east.peers(), ["west"]);
    }
    // Whoever was in the way goes: what is declared is judged again.
    east.peering.apply_declared(&declares(twin.clone())).await.unwrap();
    let again = east.peering.shared.bindings_changed.notified();
    east.peering.remove("west".parse().unwrap()).await.unwrap();
    timeout(DEADLINE, again).await.unwrap();
    east.peering.apply_declared(&declares(twin)).await.unwrap();
    assert!(east.relay.problems.lock().unwrap().is_empty());
    assert!(east.relay.peers.lock().unwrap().contains_key("north"));
}

#[tokio::test]
async fn a_resource_with_a_bundle_peers_and_its_removal_ends_that() {
    let (_network, east, west) = east_and_west().await;
    let bundle = DeclaredBundle { sequence: 4, roots_pem: west.ca.bundle().to_pem() };
    let peer = DeclaredPeer {
        cluster: "west".parse().unwrap(),
        trust_domain: Some("west.tombolo".parse().unwrap()),
        authority: grants("shop"),
        default_access: None,
        bundle: Some(bundle),
        gateways: vec!["west.example:15443".into()],
    };
    let state = declares(peer);
    east.peering.apply_declared(&state).await.unwrap();
    let record = east.relay.peers.lock().unwrap()["west"].clone();
    assert_eq!((record.bundle.sequence, record.gateways[0].address.as_str()), (4, "west.example:15443"));
    let error = east.peering.remove("west".parse().unwrap()).await.unwrap_err().to_string();
    assert!(error.contains("is declared by a ClusterPeer in the source;"), "{error}");
    let error = west.refused(&east.invite().await).await;
    assert!(error.contains("bound to a peer already"), "{error}");
    east.peering.apply_declared(&LocalState::default()).await.unwrap();
    assert_eq!(east.peers(), Vec::<String>::new());
}

#[tokio::test]
async fn whatever_knocks_gets_an_answer_and_nothing_breaks() {
    let (network, east, west) = east_and_west().await;
    let known = east.invite().await.id.to_string();
    let offers: Vec<Vec<u8>> = (0..200_u32)
        .map(|n| match n % 4 {
            0 => (0..n).map(|_| rand::random()).collect(),
            1 => Offer { invitation_id: known.clone(), body: vec![1; n as usize], proof: vec![2; 64] }.encode_to_vec(),
            2 => Offer { invitation_id: "x".repeat(n as usize), body: vec![], proof: vec![] }.encode_to_vec(),
            _ => vec![0x0a; MESSAGE_OCTETS_MAX + 1],
        })
        .collect();
    for (n, offer) in offers.into_iter().enumerate() {
        let attempt = format!("knock-{n}");
        let mut waiting = {
            let (sender, waiting) = mpsc::channel(1);
            west.peering.shared.attempts().insert(attempt.clone(), sender);
            waiting
        };
        let connection = Connection { from: "west".into(), to: "east".into(), exporter: vec![0; 32] };
        network.connections.lock().unwrap().insert(attempt.clone(), connection);
        network.offer(&attempt, offer);
        let event = timeout(DEADLINE, waiting.recv()).await.unwrap().unwrap();
        let PeeringEvent::Answer { answer, .. } = event else { panic!("{event:?}") };
        let answer = Answer::decode(answer.as_slice()).unwrap();
        assert!(matches!(answer.kind, Some(Kind::Refused(_))), "{answer:?}");
        west.peering.shared.attempts().remove(&attempt);
    }
    assert_eq!(east.refusals.lock().unwrap().len(), 200);
    assert_eq!(east.peers(), Vec::<String>::new());
}
