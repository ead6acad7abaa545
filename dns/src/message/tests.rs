#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

pub(crate) const NAME: &[u8] = b"\x03www\x07example\x03com\0";

/// A query with recursion desired.
pub(crate) fn question(id: u16, name: &[u8], kind: u16) -> Vec<u8> {
    let head = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    [&head, name, &kind.to_be_bytes(), &[0, 1]].concat()
}

pub(crate) struct Sample {
    pub rcode: u8,
    pub ttl: u32,
    pub answers: u16,
    /// An SOA record with this minimum.
    pub denial: Option<u32>,
    pub truncated: bool,
    pub trailing: bool,
}

impl Default for Sample {
    fn default() -> Self {
        Self { rcode: 0, ttl: 60, answers: 1, denial: None, truncated: false, trailing: false }
    }
}

pub(crate) fn response(id: u16, name: &[u8], kind: u16, sample: &Sample) -> Vec<u8> {
    let mut octets = question(id, name, kind);
    octets[2] = 0x81 | if sample.truncated { 2 } else { 0 };
    octets[3] = 0x80 | sample.rcode;
    octets[6..8].copy_from_slice(&sample.answers.to_be_bytes());
    octets[9] = u8::from(sample.denial.is_some());
    let record = |kind: u16, rdata: &[u8]| {
        let ttl = sample.ttl.to_be_bytes();
        [&[0xc0, 12][..], &kind.to_be_bytes(), &[0, 1], &ttl, &u16::try_from(rdata.len()).unwrap().to_be_bytes(), rdata]
            .concat()
    };
    for n in 0..sample.answers {
        octets.extend(record(1, &[192, 0, 2, u8::try_from(n % 256).unwrap()]));
    }
    if let Some(minimum) = sample.denial {
        octets.extend(record(TYPE_SOA, &[&[0; 18][..], &minimum.to_be_bytes()].concat()));
    }
    octets.extend(vec![0; usize::from(sample.trailing)]);
    octets
}

#[test]
fn a_question_is_read() {
    let octets = question(7, NAME, 28);
    let query = Query::read(&octets).unwrap();
    assert_eq!((query.id(), query.kind(), query.class(), query.limit(Transport::Udp)), (7, 28, 1, 512));
    assert_eq!(query.labels(), [&b"www"[..], b"example", b"com"]);
    let root = question(7, b"\0", 2);
    assert!(Query::read(&root).unwrap().labels().is_empty());
    let servfail = query.answer_code(SERVFAIL);
    assert!(query.is_answered_by(7, &servfail));
    assert_eq!((servfail.len(), rcode(&servfail)), (octets.len(), SERVFAIL));
}

#[test]
fn what_makes_no_sense_is_told_apart() {
    let good = question(7, NAME, 1);
    let check = |octets: &[u8], want| assert_eq!(Query::read(octets).err(), Some(want), "{octets:?}");
    for short in 0..HEADER_LEN {
        check(&good[..short], Malformed::Ignore);
        assert_eq!(answer_malformed(&good[..short]), None);
    }
    for short in HEADER_LEN..good.len() {
        check(&good[..short], Malformed::Answer);
    }
    check(&response(7, NAME, 1, &Sample::default()), Malformed::Ignore);
    check(&question(7, b"\xc0\x0c", 1), Malformed::Answer);
    check(
        &question(7, &[&[63; 64][..], &[63; 64], &[63; 64], &[63; 64], &[63; 64], &[0]].concat(), 1),
        Malformed::Answer,
    );
    let mut two = good.clone();
    two[5] = 2;
    check(&two, Malformed::Answer);
    let mut records = good.clone();
    records[7] = 1;
    check(&records, Malformed::Answer);
    assert_eq!(answer_malformed(&two).unwrap()[2..], [0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn only_the_answer_to_the_question_is_taken() {
    let asked = question(7, NAME, 65);
    let query = Query::read(&asked).unwrap();
    let good = response(9, NAME, 65, &Sample::default());
    assert!(query.is_answered_by(9, &good));
    assert!(query.is_answered_by(9, &response(9, b"\x03WWW\x07example\x03com\0", 65, &Sample::default())));
    assert!(!query.is_answered_by(8, &good), "another id");
    assert!(!query.is_answered_by(9, &response(9, b"\x03wwx\x07example\x03com\0", 65, &Sample::default())));
    // 'A' and 'a' differ in a type.
    assert!(!query.is_answered_by(9, &response(9, NAME, 97, &Sample::default())));
    assert!(!query.is_answered_by(9, &question(9, NAME, 65)), "a question");
    assert!(!query.is_answered_by(9, &good[..20]));
    let mut bare = good[..HEADER_LEN].to_vec();
    bare[4..].fill(0);
    bare[3] = 0x80 | FORMERR;
    assert!(query.is_answered_by(9, &bare), "an error without a question");
    bare[3] = 0x80;
    assert!(!query.is_answered_by(9, &bare), "success without a question");
}

proptest! {
    /// Nothing that anybody sends makes this panic.
    #[test]
    fn any_octets_are_read(octets in proptest::collection::vec(any::<u8>(), 0..200), at in 0_usize..200) {
        if let Ok(query) = Query::read(&octets) {
            query.labels();
            query.cache_key();
            prop_assert!(query.question().len() >= 5);
            prop_assert!(query.is_answered_by(query.id(), &query.answer_code(SERVFAIL)));
        }
        answer_malformed(&octets);
        if octets.len() >= HEADER_LEN {
            keeping(&octets, at);
        }
    }

    /// A real message with some octets changed: still no panic, and what is kept can be counted down.
    #[test]
    fn damaged_messages_are_read(
        answers in 0_u16..5,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut octets = response(7, NAME, 1, &Sample { answers, denial: Some(3), ..Sample::default() });
        for (at, value) in damage {
            let at = at.index(octets.len());
            octets[at] = value;
        }
        octets.truncate(HEADER_LEN + cut.index(octets.len() - HEADER_LEN));
        let question_end = HEADER_LEN + NAME.len() + 4;
        if let Some(kept) = keeping(&octets, question_end) {
            count_down(&mut octets, &kept.ttls_at, 1);
        }
        let asked = question(7, NAME, 1);
        Query::read(&asked).unwrap().is_answered_by(7, &octets);
        let _ = Query::read(&octets);
    }
}
