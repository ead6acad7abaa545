use super::*;
use crate::model::ServiceSelector;
use proptest::prelude::*;

const NOW: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(NOW + seconds).unwrap()
}

fn token() -> Token {
    Token {
        id: InvitationId::from_random([7; 16]),
        expires: at(3600),
        cluster: "east".parse().unwrap(),
        trust_domain: "east.tombolo".parse().unwrap(),
        root_sha256: [9; 32],
        seed: Seed::new([3; 32]),
        addresses: vec!["gw.example:15443".into(), "[2001:db8::1]:15443".into()],
    }
}

fn authority() -> Authority {
    Authority { exports: vec![ServiceSelector::All], imports: vec![], unmeshed: false }
}

fn open(now: Timestamp) -> (Invitations, InvitationId) {
    let mut invitations = Invitations::default();
    let id = InvitationId::from_random([1; 16]);
    invitations.create(id, [0; 32], authority(), Duration::from_secs(60), now).unwrap();
    (invitations, id)
}

fn attempt(id: InvitationId) -> Attempt {
    Attempt {
        id,
        proof_ok: true,
        root_sha256: [5; 32],
        cluster: "west".parse().unwrap(),
        trust_domain: "west.tombolo".parse().unwrap(),
    }
}

/// Redeems at `seconds` as cluster east, which is peered with south.
fn redeem(invitations: &mut Invitations, attempt: &Attempt, seconds: i64) -> Result<Redemption, Refused> {
    let peers = [("south".parse().unwrap(), "south.tombolo".parse().unwrap())].into();
    let bindings = Bindings {
        own_cluster: &"east".parse().unwrap(),
        own_trust_domain: &"east.tombolo".parse().unwrap(),
        peers: &peers,
    };
    invitations.redeem(attempt, &bindings, at(seconds))
}

#[test]
fn a_token_reads_back_what_it_prints_however_it_was_wrapped() {
    let text = token().to_string();
    assert!(text.starts_with("tombolo1."));
    assert_eq!(text.parse::<Token>().unwrap(), token());
    let wrapped = format!("  {}\r\n  {}\n", &text[..70], &text[70..]);
    assert_eq!(wrapped.parse::<Token>().unwrap(), token());
}

#[test]
fn the_secret_is_not_in_debug_output() {
    let shown = format!("{:?}", token());
    assert!(shown.contains("Seed(..)") && !shown.contains("3, 3, 3"), "{shown}");
}

#[test]
fn a_damaged_token_is_told_apart_from_a_wrong_one() {
    let text = token().to_string();
    let swapped = {
        let mut octets = text.clone().into_bytes();
        octets[40] = if octets[40] == b'A' { b'B' } else { b'A' };
        String::from_utf8(octets).unwrap()
    };
    for (case, text, want) in [
        ("empty", String::new(), TokenError::NotAToken),
        ("something else", "ghp_123".into(), TokenError::NotAToken),
        ("a join token", "a1b2.c2VjcmV0".into(), TokenError::NotAToken),
        ("a later version", "tombolo2.AAAA".into(), TokenError::OtherVersion),
        ("prefix only", "tombolo1.".into(), TokenError::Damaged),
        ("truncated", text[..text.len() - 8].into(), TokenError::Damaged),
        ("head missing", text[5..].into(), TokenError::NotAToken),
        ("a character changed", swapped, TokenError::Damaged),
        ("not base64url", format!("{}!", &text[..text.len() - 1]), TokenError::Damaged),
        ("doubled", format!("{text}{text}"), TokenError::Damaged),
    ] {
        assert_eq!(text.parse::<Token>().unwrap_err(), want, "{case}");
    }
}

#[test]
fn a_whole_token_with_bad_content_names_the_field() {
    let encode = |mut octets: Vec<u8>| {
        octets.extend_from_slice(&crc32(&octets).to_be_bytes());
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&octets))
    };
    let mut octets = vec![0; 16 + 8 + 32 + 32];
    push_text(&mut octets, "EAST");
    assert_eq!(encode(octets).parse::<Token>().unwrap_err(), TokenError::Invalid("cluster id"));
    let bad_address = Token { addresses: vec!["no port".into()], ..token() };
    assert_eq!(bad_address.to_string().parse::<Token>().unwrap_err(), TokenError::Invalid("gateway address"));
}

#[test]
fn addresses_are_host_and_port() {
    for (text, valid) in [
        ("127.0.0.1:15443", true),
        ("gw-1.example.com:443", true),
        ("[::1]:1", true),
        ("::1:1", false),
        ("[gw]:1", false),
        ("gw.example", false),
        (":15443", false),
        ("gw:0", false),
        ("gw:65536", false),
        ("gw:+1", false),
        ("a b:1", false),
        ("http://gw:1", false),
    ] {
        assert_eq!(is_address(text), valid, "{text}");
    }
    assert!(!is_address(&format!("{}:1", "x".repeat(254))));
}

#[test]
fn crc_matches_its_published_check_value() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

#[test]
fn an_invitation_binds_once_and_repeats_for_the_same_root_only() {
    let (mut invitations, id) = open(at(0));
    let first = attempt(id);
    assert_eq!(redeem(&mut invitations, &first, 1), Ok(Redemption::Accept(authority())));
    for second in 2..20 {
        assert_eq!(redeem(&mut invitations, &first, second), Ok(Redemption::Repeat), "repeats are free");
    }
    let other_root = Attempt { root_sha256: [6; 32], ..first.clone() };
    assert_eq!(redeem(&mut invitations, &other_root, 20), Err(Refused::Used));
    let other_cluster = Attempt { cluster: "north".parse().unwrap(), ..first.clone() };
    assert_eq!(redeem(&mut invitations, &other_cluster, 21), Err(Refused::Used));
    assert_eq!(redeem(&mut invitations, &first, 60), Err(Refused::Expired), "a repeat must come before the expiry");
}

#[test]
fn every_refusal_has_its_reason() {
    let id = InvitationId::from_random([1; 16]);
    let good = attempt(id);
    for (case, attempt, seconds, want) in [
        ("guessed", Attempt { id: InvitationId::from_random([2; 16]), ..good.clone() }, 1, Refused::Unknown),
        ("expired", good.clone(), 60, Refused::Expired),
        ("bad proof", Attempt { proof_ok: false, ..good.clone() }, 1, Refused::BadProof),
        ("our cluster id", Attempt { cluster: "east".parse().unwrap(), ..good.clone() }, 1, Refused::OwnName),
        (
            "our trust domain",
            Attempt { trust_domain: "east.tombolo".parse().unwrap(), ..good.clone() },
            1,
            Refused::OwnName,
        ),
        (
            "a peer's cluster id",
            Attempt { cluster: "south".parse().unwrap(), ..good.clone() },
            1,
            Refused::AlreadyBound,
        ),
        (
            "a peer's trust domain",
            Attempt { trust_domain: "south.tombolo".parse().unwrap(), ..good.clone() },
            1,
            Refused::AlreadyBound,
        ),
    ] {
        let (mut invitations, _) = open(at(0));
        assert_eq!(redeem(&mut invitations, &attempt, seconds), Err(want), "{case}");
        assert_eq!(redeem(&mut invitations, &good, 2), Ok(Redemption::Accept(authority())), "{case}: still open");
    }
}

#[test]
fn five_failed_tries_close_an_invitation() {
    let (mut invitations, id) = open(at(0));
    let wrong = Attempt { proof_ok: false, ..attempt(id) };
    for _ in 0..TRIES_MAX {
        assert_eq!(redeem(&mut invitations, &wrong, 1), Err(Refused::BadProof));
    }
    assert_eq!(redeem(&mut invitations, &wrong, 1), Err(Refused::TooManyTries));
    assert_eq!(redeem(&mut invitations, &attempt(id), 1), Err(Refused::TooManyTries), "even with the right proof");
    assert_eq!(invitations.get(&id).unwrap().state(at(1)), "closed after failed tries");
}

#[test]
fn a_removed_peer_does_not_come_back_with_its_old_token() {
    let (mut invitations, id) = open(at(0));
    redeem(&mut invitations, &attempt(id), 1).unwrap();
    invitations.peer_removed(&"west".parse().unwrap());
    assert_eq!(redeem(&mut invitations, &attempt(id), 2), Err(Refused::Used));
}

#[test]
fn life_and_number_are_bounded() {
    let mut invitations = Invitations::default();
    let id = |n: u32| {
        let mut octets = [0; 16];
        octets[..4].copy_from_slice(&n.to_be_bytes());
        InvitationId::from_random(octets)
    };
    for life in [Duration::ZERO, LIFE_MAX + Duration::from_secs(1)] {
        assert_eq!(invitations.create(id(0), [0; 32], authority(), life, at(0)), Err(CreateError::Life));
    }
    for n in 0..INVITATIONS_MAX as u32 {
        invitations.create(id(n), [0; 32], authority(), LIFE_DEFAULT, at(0)).unwrap();
    }
    assert_eq!(invitations.create(id(0), [0; 32], authority(), LIFE_DEFAULT, at(0)), Err(CreateError::TooMany));
    let two_days = 2 * 24 * 3600;
    assert!(invitations.create(id(0), [0; 32], authority(), LIFE_DEFAULT, at(two_days)).is_ok(), "old ones make room");
    let again = invitations.create(id(0), [0; 32], authority(), LIFE_DEFAULT, at(two_days));
    assert_eq!(again, Err(CreateError::Exists));
}

#[test]
fn states_are_shown_in_words() {
    let (mut invitations, id) = open(at(0));
    let state = |invitations: &Invitations, seconds| invitations.get(&id).unwrap().state(at(seconds));
    assert_eq!(state(&invitations, 1), "open");
    assert_eq!(state(&invitations, 61), "expired");
    redeem(&mut invitations, &attempt(id), 2).unwrap();
    assert_eq!(state(&invitations, 3), "redeemed by west");
    invitations.peer_removed(&"west".parse().unwrap());
    assert_eq!(state(&invitations, 4), "spent");
}

#[test]
fn the_number_of_peers_is_bounded() {
    let peers = (0..PEERS_MAX).map(|n| (format!("c{n}").parse().unwrap(), format!("d{n}").parse().unwrap())).collect();
    let (east, domain) = ("east".parse().unwrap(), "east.tombolo".parse().unwrap());
    let bindings = Bindings { own_cluster: &east, own_trust_domain: &domain, peers: &peers };
    let check = |cluster: &str, domain: &str| bindings.check(&cluster.parse().unwrap(), &domain.parse().unwrap());
    assert_eq!(check("west", "west.tombolo"), Err(Refused::TooManyPeers));
    assert_eq!(check("c1", "west.tombolo"), Err(Refused::AlreadyBound));
}

#[test]
fn refusal_codes_are_distinct() {
    let codes: std::collections::BTreeSet<_> = Refused::ALL.iter().map(|refused| refused.code()).collect();
    assert_eq!(codes.len(), Refused::ALL.len());
}

proptest! {
    #[test]
    fn no_text_makes_the_token_parser_panic(text in "(tombolo[0-9]?\\.)?\\PC{0,400}") {
        let _ = text.parse::<Token>();
    }

    #[test]
    fn no_octets_behind_a_right_checksum_make_it_panic(mut octets in proptest::collection::vec(any::<u8>(), 0..300)) {
        octets.extend_from_slice(&crc32(&octets).to_be_bytes());
        let _ = format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&octets)).parse::<Token>();
    }

    #[test]
    fn one_changed_character_is_always_found(index in 9_usize..200, replacement in "[A-Za-z0-9_-]") {
        let text = token().to_string();
        let mut changed = text.clone();
        changed.replace_range(index..index + 1, &replacement);
        prop_assert!(changed == text || changed.parse::<Token>() == Err(TokenError::Damaged));
    }
}
