use proptest::prelude::*;

use super::*;

const SECRET: [u8; 32] = [1; 32];
const EXPIRES: i64 = 1_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn entry_id(number: u16) -> JoinEntryId {
    let mut octets = [0; 8];
    octets[..2].copy_from_slice(&number.to_be_bytes());
    JoinEntryId::from_random(octets)
}

fn web() -> SpiffeId {
    "spiffe://east.tombolo/ns/shop/sa/web".parse().unwrap()
}

fn entries(uses: u32) -> JoinEntries {
    let mut entries = JoinEntries::default();
    entries.add(entry_id(1), JoinKind::Workload, web(), SECRET, uses, at(EXPIRES), at(0)).unwrap();
    entries
}

#[test]
fn a_key_that_redeems_again_uses_nothing_up_and_is_never_late() {
    let mut entries = entries(1);
    let redeemed = |changed| Ok(Redeemed { spiffe_id: web(), changed });
    assert_eq!(entries.redeem(&entry_id(1), &SECRET, [7; 32], at(10)), redeemed(true));
    assert_eq!(entries.get(&entry_id(1)).unwrap().uses_left(), 0);
    assert_eq!(entries.redeem(&entry_id(1), &SECRET, [7; 32], at(11)), redeemed(false));
    assert_eq!(entries.redeem(&entry_id(1), &SECRET, [7; 32], at(EXPIRES + 5)), redeemed(false));
    assert_eq!(entries.redeem(&entry_id(1), &SECRET, [8; 32], at(12)), Err(JoinRefusal::UsedUp));
}

#[test]
fn refusals_say_nothing_to_whoever_lacks_the_secret() {
    for (what, id, secret, second, want) in [
        ("unknown entry", entry_id(2), SECRET, 10, JoinRefusal::NotKnown),
        ("wrong secret", entry_id(1), [2; 32], 10, JoinRefusal::NotKnown),
        ("wrong secret, expired", entry_id(1), [2; 32], EXPIRES + 1, JoinRefusal::NotKnown),
        ("at the expiry", entry_id(1), SECRET, EXPIRES, JoinRefusal::Expired),
    ] {
        let mut entries = entries(1);
        let before = entries.clone();
        assert_eq!(entries.redeem(&id, &secret, [7; 32], at(second)), Err(want), "{what}");
        assert_eq!(entries, before, "{what}");
    }
}

#[test]
fn entries_are_checked_when_they_are_added() {
    let gateway: SpiffeId = "spiffe://east.tombolo/tombolo/gateway/gw-1".parse().unwrap();
    let odd: SpiffeId = "spiffe://east.tombolo/tombolo/other".parse().unwrap();
    for (kind, id, uses, expires, want) in [
        (JoinKind::Workload, &web(), 1, 10, Ok(())),
        (JoinKind::Role, &gateway, 1, 10, Ok(())),
        (JoinKind::Workload, &gateway, 1, 10, Err(AddError::Reserved)),
        (JoinKind::Workload, &odd, 1, 10, Err(AddError::Reserved)),
        (JoinKind::Role, &odd, 1, 10, Err(AddError::NotARole)),
        (JoinKind::Role, &web(), 1, 10, Err(AddError::NotARole)),
        (JoinKind::Workload, &web(), 0, 10, Err(AddError::Uses)),
        (JoinKind::Workload, &web(), USES_MAX + 1, 10, Err(AddError::Uses)),
        (JoinKind::Workload, &web(), 1, 5, Err(AddError::Expiry)),
    ] {
        let added = JoinEntries::default().add(entry_id(1), kind, id.clone(), SECRET, uses, at(expires), at(5));
        assert_eq!(added, want, "{kind:?} {id} {uses} {expires}");
    }
    let again = entries(1).add(entry_id(1), JoinKind::Workload, web(), SECRET, 1, at(10), at(5));
    assert_eq!(again, Err(AddError::Exists));
}

#[test]
fn entries_are_bounded_and_make_room_once_they_are_of_no_use() {
    let mut entries = JoinEntries::default();
    let add = |entries: &mut JoinEntries, number: usize, now| {
        let id = entry_id(u16::try_from(number).unwrap());
        entries.add(id, JoinKind::Workload, web(), SECRET, 1, at(now + EXPIRES), at(now))
    };
    for number in 0..ENTRIES_MAX {
        add(&mut entries, number, 0).unwrap();
    }
    entries.redeem(&entry_id(5), &SECRET, [7; 32], at(1)).unwrap();
    assert_eq!(add(&mut entries, ENTRIES_MAX, 1), Err(AddError::TooMany));
    add(&mut entries, ENTRIES_MAX, EXPIRES).unwrap();
    assert_eq!(entries.list().count(), 2, "the redeemed one is kept for its key");
    assert!(entries.redeem(&entry_id(5), &SECRET, [7; 32], at(EXPIRES)).is_ok());
}

#[test]
fn removed_entries_are_unknown() {
    let mut entries = entries(2);
    assert!(entries.remove(&entry_id(1)));
    assert!(!entries.remove(&entry_id(1)));
    assert_eq!(entries.redeem(&entry_id(1), &SECRET, [7; 32], at(1)), Err(JoinRefusal::NotKnown));
}

#[test]
fn tokens_survive_their_text_and_hide_their_secret() {
    let token = JoinToken::new(entry_id(3), [9; 32]);
    let text = token.expose();
    assert_eq!(text, "0003000000000000.CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk");
    assert_eq!(format!("{text}\n").parse(), Ok(token.clone()));
    assert_eq!(format!("{token:?}"), "JoinToken(0003000000000000)");
    for bad in
        ["", ".", "0003000000000000", "0003000000000000.", "0003000000000000.CQ", "xyz.CQkJ", &text[1..], &text[..50]]
    {
        assert_eq!(bad.parse::<JoinToken>(), Err(NotAJoinToken), "{bad}");
    }
}

proptest! {
    /// Whatever is redeemed in whatever order: never more keys than uses, and a key that got in stays in.
    #[test]
    fn no_more_keys_than_uses(
        uses in 1_u32..5,
        calls in proptest::collection::vec((0_u8..8, 0_i64..EXPIRES * 2, prop::bool::ANY), 0..40),
    ) {
        let mut entries = entries(uses);
        let mut inside = BTreeSet::new();
        for (key, second, right) in calls {
            let secret = if right { SECRET } else { [0; 32] };
            let redeemed = entries.redeem(&entry_id(1), &secret, [key; 32], at(second));
            let want = right && (inside.contains(&key) || (second < EXPIRES && inside.len() < uses as usize));
            prop_assert_eq!(redeemed.is_ok(), want);
            if want {
                inside.insert(key);
            }
            prop_assert_eq!(entries.get(&entry_id(1)).unwrap().uses_left() as usize, uses as usize - inside.len());
        }
    }

    #[test]
    fn no_text_makes_the_token_parser_panic(text in ".{0,100}") {
        let _ = text.parse::<JoinToken>();
    }
}
