//! Answers of upstream resolvers, for as long as these allow. Octets with their times to live counted down; nothing is
//! understood that does not have to be.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::message::{HEADER_LEN, Keeping, Query, Transport, count_down, keeping, set_id};

/// Answers kept at once.
pub const ENTRIES_MAX: usize = 4096;
/// Octets of all of them.
pub const OCTETS_MAX: usize = 4 * 1024 * 1024;
/// However long an answer says that it holds.
pub const KEPT_MAX: Duration = Duration::from_secs(3600);
/// What an entry costs beside its octets.
const ENTRY_COST: usize = 200;

#[derive(Debug, Default)]
pub struct Cache {
    entries: HashMap<Box<[u8]>, Entry>,
    /// Keys by the order in which they came: the oldest makes room.
    by_age: BTreeMap<u64, Box<[u8]>>,
    next: u64,
    octets: usize,
}

#[derive(Debug)]
struct Entry {
    serial: u64,
    answer: Bytes,
    keeping: Keeping,
    since: Instant,
    until: Instant,
}

impl Entry {
    fn cost(&self, key: &[u8]) -> usize {
        self.answer.len() + 2 * key.len() + 2 * self.keeping.ttls_at.len() + ENTRY_COST
    }
}

impl Cache {
    /// The answer to `query` as if it had just come.
    pub fn get(&mut self, query: &Query<'_>, transport: Transport, now: Instant) -> Option<Vec<u8>> {
        let key = query.cache_key()?;
        let entry = self.entries.get(&key)?;
        if now >= entry.until {
            self.remove(&key);
            return None;
        }
        // Upstream knows how to cut it short.
        if entry.answer.len() > query.limit(transport) {
            return None;
        }
        let mut answer = entry.answer.to_vec();
        set_id(&mut answer, query.id());
        // As this client spells the name, which may be how it recognizes answers to its own questions.
        answer[HEADER_LEN..HEADER_LEN + query.question().len()].copy_from_slice(query.question());
        let elapsed = now.saturating_duration_since(entry.since).as_secs();
        count_down(&mut answer, &entry.keeping.ttls_at, elapsed.try_into().unwrap_or(u32::MAX));
        Some(answer)
    }

    /// Keeps an answer, if it and its question allow that. It was checked to be the answer to `query`.
    pub fn put(&mut self, query: &Query<'_>, answer: &[u8], now: Instant) {
        let question_end = HEADER_LEN + query.question().len();
        let Some(key) = query.cache_key() else { return };
        if answer.len() < question_end || answer[4..6] != [0, 1] {
            return;
        }
        let Some(keeping) = keeping(answer, question_end) else { return };
        self.remove(&key);
        let until = now + Duration::from_secs(keeping.ttl_s.into()).min(KEPT_MAX);
        let entry = Entry { serial: self.next, answer: Bytes::copy_from_slice(answer), keeping, since: now, until };
        self.next += 1;
        self.octets += entry.cost(&key);
        self.by_age.insert(entry.serial, key.clone());
        self.entries.insert(key, entry);
        while self.entries.len() > ENTRIES_MAX || self.octets > OCTETS_MAX {
            let Some((_, oldest)) = self.by_age.first_key_value() else { break };
            let oldest = oldest.clone();
            self.remove(&oldest);
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn remove(&mut self, key: &[u8]) {
        if let Some(entry) = self.entries.remove(key) {
            self.octets -= entry.cost(key);
            self.by_age.remove(&entry.serial);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::message::tests::{NAME, Sample, question, response};

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// What comes back for `asked` at `at` after `answer` to `query` was kept at 0: id, and the first record's time.
    #[track_caller]
    fn check(query: &[u8], answer: &[u8], asked: &[u8], at: u64, want: Option<(u16, u32)>) {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.put(&Query::read(query).unwrap(), answer, now);
        let asked = Query::read(asked).unwrap();
        let found = cache.get(&asked, Transport::Udp, now + seconds(at));
        let told = found.map(|found| {
            assert!(asked.is_answered_by(asked.id(), &found));
            assert_eq!(&found[HEADER_LEN..HEADER_LEN + asked.question().len()], asked.question());
            let ttl_at = HEADER_LEN + asked.question().len() + 6;
            (crate::message::id(&found), u32::from_be_bytes(found[ttl_at..ttl_at + 4].try_into().unwrap()))
        });
        assert_eq!(told, want);
    }

    #[test]
    fn times_to_live_are_counted_down() {
        let (query, answer) = (question(7, NAME, 1), response(7, NAME, 1, &Sample { ttl: 30, ..Sample::default() }));
        let again = question(9, NAME, 1);
        check(&query, &answer, &again, 0, Some((9, 30)));
        check(&query, &answer, &again, 29, Some((9, 1)));
        check(&query, &answer, &again, 30, None);
        // Spelled in another way it is the same question, and each client sees its own spelling.
        check(&query, &answer, &question(9, b"\x03wWw\x07eXample\x03com\0", 1), 10, Some((9, 20)));
        check(&query, &answer, &question(9, NAME, 28), 0, None);
        let long = response(7, NAME, 1, &Sample { ttl: 1_000_000, ..Sample::default() });
        check(&query, &long, &again, KEPT_MAX.as_secs() - 1, Some((9, 1_000_000 - 3599)));
        check(&query, &long, &again, KEPT_MAX.as_secs(), None);
    }

    #[test]
    fn what_may_differ_is_kept_apart() {
        let (query, answer) = (question(7, NAME, 1), response(7, NAME, 1, &Sample::default()));
        let edns = |ttl: u32, options: &[u8]| {
            let mut query = question(9, NAME, 1);
            query[11] = 1;
            query.extend([0, 0, 41, 4, 208]);
            query.extend(ttl.to_be_bytes());
            query.extend(u16::try_from(options.len()).unwrap().to_be_bytes());
            query.extend(options);
            query
        };
        check(&query, &answer, &edns(0, &[]), 0, None);
        check(&edns(0, &[]), &answer, &edns(0, &[]), 0, Some((9, 60)));
        check(&edns(0, &[]), &answer, &edns(0x8000, &[]), 0, None);
        check(&edns(0x8000, &[]), &answer, &edns(0x8000, &[]), 0, Some((9, 60)));
        // Options and versions that may mean anything are never kept.
        for odd in [edns(0, &[0, 10, 0, 0]), edns(0x0001_0000, &[]), edns(1, &[])] {
            check(&odd, &answer, &odd, 0, None);
        }
        let mut checking_disabled = question(9, NAME, 1);
        checking_disabled[3] |= 0x10;
        check(&query, &answer, &checking_disabled, 0, None);
        let mut update = query.clone();
        update[2] |= 5 << 3;
        check(&update, &answer, &update, 0, None);
    }

    #[test]
    fn only_what_may_be_kept_is_kept() {
        let query = question(7, NAME, 1);
        for (sample, want) in [
            (Sample { ttl: 0, ..Sample::default() }, None),
            (Sample { ttl: 1 << 31, ..Sample::default() }, None),
            (Sample { rcode: 2, ..Sample::default() }, None),
            (Sample { truncated: true, ..Sample::default() }, None),
            (Sample { rcode: 3, denial: Some(20), answers: 0, ..Sample::default() }, Some((7, 60))),
            (Sample { rcode: 0, denial: Some(20), answers: 0, ..Sample::default() }, Some((7, 60))),
            (Sample { rcode: 3, denial: None, answers: 0, ..Sample::default() }, None),
            (Sample { trailing: true, ..Sample::default() }, None),
        ] {
            check(&query, &response(7, NAME, 1, &sample), &query, 0, want);
        }
        // A denial holds for as long as its SOA record says.
        let denial = response(7, NAME, 1, &Sample { rcode: 3, denial: Some(20), answers: 0, ..Sample::default() });
        check(&query, &denial, &query, 19, Some((7, 41)));
        check(&query, &denial, &query, 20, None);
    }

    #[test]
    fn it_stays_within_its_bounds() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let name = |n: usize| [b"\x08".as_slice(), format!("{n:08}").as_bytes(), b"\0"].concat();
        let large = Sample { answers: 100, ..Sample::default() };
        for n in 0..ENTRIES_MAX + 10 {
            let query = question(1, &name(n), 1);
            cache.put(&Query::read(&query).unwrap(), &response(1, &name(n), 1, &Sample::default()), now);
        }
        assert_eq!(cache.len(), ENTRIES_MAX);
        let first = question(1, &name(0), 1);
        assert!(cache.get(&Query::read(&first).unwrap(), Transport::Udp, now).is_none());
        for n in 0..ENTRIES_MAX {
            let query = question(1, &name(n), 1);
            cache.put(&Query::read(&query).unwrap(), &response(1, &name(n), 1, &large), now);
            assert!(cache.octets <= OCTETS_MAX);
        }
        assert!(cache.len() < ENTRIES_MAX && cache.len() == cache.by_age.len());
        // An answer that is larger than the client takes over UDP is asked for again.
        let last = question(1, &name(ENTRIES_MAX - 1), 1);
        let last = Query::read(&last).unwrap();
        assert!(cache.get(&last, Transport::Udp, now).is_none());
        assert!(cache.get(&last, Transport::Tcp, now).is_some());
    }
}
