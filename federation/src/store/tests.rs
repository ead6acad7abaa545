use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use tombolo_api::proto::catalog::TrustBundle;
use tombolo_core::invitation::InvitationId;
use tombolo_core::model::{Authority, ServiceSelector};

use super::revoked::REVOKED_MAX;
use super::*;
use crate::hub::PeerRecord;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn open(state: &TempDir) -> Result<Store, StoreError> {
    Store::open(state.path(), &"east".parse().unwrap(), &"east.tombolo".parse().unwrap(), at(0))
}

fn peer(cluster: &str) -> PeerRecord {
    PeerRecord {
        cluster: cluster.parse().unwrap(),
        trust_domain: format!("{cluster}.tombolo").parse().unwrap(),
        authority: Authority {
            exports: vec![ServiceSelector::All],
            imports: vec!["shop".parse().unwrap()],
            unmeshed: false,
        },
        bundle: TrustBundle {
            trust_domain: format!("{cluster}.tombolo"),
            sequence: 3,
            roots_der: vec![vec![1, 2, 3]],
            refresh_hint_s: 60,
        },
        gateways: vec![],
    }
}

fn add(store: &Store, cluster: &str) {
    store.change_peering(|peering| peering.insert_peer(peer(cluster))).unwrap();
}

#[test]
fn everything_is_there_again_after_a_restart() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    add(&store, "west");
    let id = InvitationId::from_random([1; 16]);
    let authority = peer("west").authority;
    let invite = |peering: &mut PeeringState| {
        peering.invitations.create(id, [2; 32], authority, Duration::from_secs(60), at(0)).unwrap()
    };
    store.change_peering(invite).unwrap();
    store.save_import(&"west".parse().unwrap(), b"published").unwrap();
    let revoked = store.change_revoked(|revoked| {
        assert_eq!(revoked.revoke("spiffe://east.tombolo/ns/a/sa/b".parse().unwrap()), Ok(true));
        revoked.clone()
    });
    let revoked = revoked.unwrap();
    let (peering, epoch) = (store.peering(), store.epoch());
    drop(store);

    let store = open(&state).unwrap();
    assert_eq!(store.peering(), peering);
    assert_eq!(store.peering().peer(&"west".parse().unwrap()), Some(peer("west")));
    assert_eq!(store.import(&"west".parse().unwrap()).unwrap().as_deref(), Some(b"published".as_slice()));
    assert_eq!((store.revoked(), revoked.sequence), (revoked, 1));
    assert!(store.epoch() > epoch);
}

#[test]
fn every_change_of_what_is_revoked_has_a_higher_sequence() {
    let id = |n: usize| format!("spiffe://east.tombolo/ns/a/sa/{n}").parse().unwrap();
    let mut revoked = Revoked::default();
    for (change, want) in [(true, true), (true, false), (false, true), (false, false), (true, true)] {
        let before = revoked.sequence;
        let changed = if change { revoked.revoke(id(0)).unwrap() } else { revoked.unrevoke(&id(0)) };
        assert_eq!((changed, revoked.sequence), (want, before + u64::from(want)));
    }
    for n in 1..REVOKED_MAX {
        revoked.revoke(id(n)).unwrap();
    }
    assert!(revoked.revoke(id(REVOKED_MAX)).is_err());
    assert_eq!(revoked.revoke(id(5)), Ok(false), "one that is revoked needs no room");
}

#[test]
fn files_are_private_and_temporaries_of_a_kill_are_removed() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    add(&store, "west");
    drop(store);
    let left = state.path().join("federation/.peering.json.0123456789abcdef.tmp");
    fs::write(&left, b"{\"version\":1,\"cont").unwrap();
    let store = open(&state).unwrap();
    assert!(!left.exists());
    assert_eq!(store.peering().peers().count(), 1);
    for entry in fs::read_dir(state.path().join("federation")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
}

#[test]
fn a_damaged_file_is_refused_by_name_with_what_to_do() {
    for file in ["cluster.json", "peering.json", "joins.json", "first-seen.json", "revoked.json"] {
        for garbage in ["", "{", "\u{0}\u{0}\u{0}", "[]", "{\"version\":1}", "{\"version\":1,\"content\":7}"] {
            let state = tempfile::tempdir().unwrap();
            drop(open(&state).unwrap());
            fs::write(state.path().join("federation").join(file), garbage).unwrap();
            let error = open(&state).err().unwrap_or_else(|| panic!("{file} {garbage:?} was read")).to_string();
            assert!(error.contains(file) && error.contains("move it away and lose"), "{error}");
        }
    }
}

#[test]
fn a_damaged_import_is_refused_too() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    add(&store, "west");
    let west = "west".parse().unwrap();
    store.save_import(&west, b"published").unwrap();
    let path = state.path().join("federation/import-west");
    let whole = fs::read(&path).unwrap();
    for damaged in [b"".to_vec(), whole[..20].to_vec(), whole[..whole.len() - 1].to_vec(), vec![0; 100]] {
        fs::write(&path, damaged).unwrap();
        let error = store.import(&west).unwrap_err().to_string();
        assert!(error.contains("import-west is damaged"), "{error}");
    }
}

#[test]
fn state_of_a_later_release_or_of_another_cluster_is_refused() {
    let state = tempfile::tempdir().unwrap();
    drop(open(&state).unwrap());
    let other = Store::open(state.path(), &"west".parse().unwrap(), &"west.tombolo".parse().unwrap(), at(0));
    let error = other.err().unwrap().to_string();
    assert!(error.contains("is the state of cluster east (trust domain east.tombolo)"), "{error}");
    fs::write(state.path().join("federation/peering.json"), "{\"version\":2,\"content\":{}}").unwrap();
    let error = open(&state).err().unwrap().to_string();
    assert!(error.contains("written by a later release (format 2)"), "{error}");
}

#[test]
fn two_processes_never_share_a_state_directory() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    let error = open(&state).err().unwrap().to_string();
    assert!(error.contains("another federation runs"), "{error}");
    drop(store);
    assert!(open(&state).is_ok());
}

#[test]
fn two_peers_with_one_trust_domain_are_refused() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    add(&store, "west");
    let twin = PeerRecord { cluster: "north".parse().unwrap(), ..peer("west") };
    store.change_peering(|peering| peering.insert_peer(twin)).unwrap();
    drop(store);
    let error = open(&state).err().unwrap().to_string();
    assert!(error.contains("two peers have one trust domain"), "{error}");
}

#[test]
fn a_change_that_can_not_be_written_has_not_happened() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    // A folder in the file's place: the rename fails, for root too.
    fs::create_dir_all(state.path().join("federation/peering.json/x")).unwrap();
    assert!(store.change_peering(|peering| peering.insert_peer(peer("west"))).is_err());
    assert_eq!(store.peering().peers().count(), 0);
}

#[test]
fn first_seen_times_stay_over_restarts_and_short_absences() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    let web: ServiceName = "shop/web".parse().unwrap();
    let exported: BTreeSet<ServiceName> = [web.clone()].into();
    let seen = |store: &Store, exported: &BTreeSet<ServiceName>, now| {
        store.first_seen(exported, at(now)).unwrap().get(&web).copied()
    };
    assert_eq!(seen(&store, &exported, 0), Some(at(0)));
    drop(store);
    let store = open(&state).unwrap();
    assert_eq!(seen(&store, &exported, 100), Some(at(0)));
    assert_eq!(seen(&store, &BTreeSet::new(), 200), None);
    assert_eq!(seen(&store, &exported, 230), Some(at(0)), "gone for 30 s: the same export");
    assert_eq!(seen(&store, &BTreeSet::new(), 300), None);
    assert_eq!(seen(&store, &exported, 400), Some(at(400)), "gone for 100 s: a new export");
}

#[test]
fn the_import_of_a_removed_peer_is_not_written_again() {
    let state = tempfile::tempdir().unwrap();
    let store = open(&state).unwrap();
    add(&store, "west");
    let west = "west".parse().unwrap();
    store.save_import(&west, b"1").unwrap();
    assert!(store.change_peering(|peering| peering.remove_peer(&west)).unwrap());
    store.remove_import(&west).unwrap();
    store.save_import(&west, b"2").unwrap();
    assert_eq!(store.import(&west).unwrap(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_content_of_a_file_makes_opening_panic(octets in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..400) {
        let state = tempfile::tempdir().unwrap();
        let store = open(&state).unwrap();
        add(&store, "west");
        drop(store);
        let path = state.path().join("federation/peering.json");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..cut.min(whole.len())]).unwrap();
        let _ = open(&state);
        fs::write(&path, &octets).unwrap();
        let _ = open(&state);
    }
}
