//! Where a peer's gateway is dialled: the addresses that its host names have, and what their change calls for.
//!
//! A gateway advertises `host:port`. A host name is asked for again when its answer's time to live ends (bounded by
//! [`TTL_MIN`] and [`TTL_MAX`]) and when a dial fails. A failed answer takes nothing back: the addresses of the last
//! good one stay. Where a tunnel stands at an address that the names no longer have, another one is dialled, and the
//! one that stands serves until that is up.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Answers are kept this long at least, whatever their time to live.
pub const TTL_MIN: Duration = Duration::from_secs(1);
/// No answer is kept longer, so that a name that was moved is followed within this time.
pub const TTL_MAX: Duration = Duration::from_secs(300);
/// After an answer that failed.
pub const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Addresses of one name that count.
pub const ADDRESSES_MAX: usize = 8;

/// What a resolver says of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub addresses: Vec<SocketAddr>,
    pub ttl: Duration,
}

/// What to do about the tunnel with one gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The tunnel that stands is where it should be, or nobody knows better.
    Keep,
    /// Dial these, in this order; the first that answers will do.
    Dial(Vec<SocketAddr>),
}

/// The addresses of one gateway, by the `host:port` that it advertises.
#[derive(Debug, Clone, Default)]
pub struct AddressBook {
    entries: Vec<Entry>,
    /// Where it was reached last; that goes first.
    worked: Option<SocketAddr>,
}

#[derive(Debug, Clone)]
struct Entry {
    advertised: String,
    addresses: Vec<SocketAddr>,
    /// When it is asked for; never where an address was advertised.
    due: Option<Instant>,
    /// When the last answer came, and why it was none.
    answered: Option<Instant>,
    error: Option<String>,
}

impl AddressBook {
    /// Names are due at once; addresses stand for themselves.
    pub fn new<'a>(advertised: impl IntoIterator<Item = &'a str>, now: Instant) -> Self {
        let entry = |advertised: &'a str| {
            let address: Option<SocketAddr> = advertised.parse().ok();
            Entry {
                advertised: advertised.to_owned(),
                addresses: address.into_iter().collect(),
                due: address.is_none().then_some(now),
                answered: address.is_some().then_some(now),
                error: None,
            }
        };
        Self { entries: advertised.into_iter().map(entry).collect(), worked: None }
    }

    /// The names to ask for now.
    pub fn due(&self, now: Instant) -> Vec<String> {
        let due = self.entries.iter().filter(|entry| entry.due.is_some_and(|due| due <= now));
        due.map(|entry| entry.advertised.clone()).collect()
    }

    /// When the next name is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.entries.iter().filter_map(|entry| entry.due).min()
    }

    /// Takes in what a resolver says of a name. Returns whether what is known has changed.
    pub fn handle_answer(&mut self, advertised: &str, answer: Result<Answer, String>, now: Instant) -> bool {
        let mut changed = false;
        for entry in self.entries.iter_mut().filter(|entry| entry.advertised == advertised && entry.due.is_some()) {
            changed |= entry.answered.replace(now).is_none();
            match &answer {
                Ok(Answer { addresses, ttl }) if !addresses.is_empty() => {
                    let addresses = &addresses[..addresses.len().min(ADDRESSES_MAX)];
                    let same = entry.addresses.len() == addresses.len()
                        && entry.addresses.iter().all(|address| addresses.contains(address));
                    if !same {
                        entry.addresses = addresses.to_vec();
                    }
                    changed |= !same || entry.error.is_some();
                    entry.due = Some(now + (*ttl).clamp(TTL_MIN, TTL_MAX));
                    entry.error = None;
                }
                Ok(Answer { .. }) => changed |= entry.fail("it has no address", now),
                Err(error) => changed |= entry.fail(error, now),
            }
        }
        changed
    }

    /// No address of this gateway answers: its names may have others by now.
    pub fn handle_dial_failed(&mut self, now: Instant) {
        for entry in &mut self.entries {
            if let (Some(due), Some(answered)) = (entry.due, entry.answered) {
                entry.due = Some(due.min((answered + TTL_MIN).max(now)));
            }
        }
    }

    /// A tunnel is up at this address.
    pub fn handle_dialled(&mut self, address: SocketAddr) {
        self.worked = Some(address);
    }

    /// Every name was asked for, whatever came of it.
    pub fn is_answered(&self) -> bool {
        self.entries.iter().all(|entry| entry.answered.is_some())
    }

    /// All addresses that are known, each once, in the order in which they are dialled.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let all = self.entries.iter().flat_map(|entry| &entry.addresses);
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in self.worked.iter().filter(|worked| self.knows(worked)).chain(all) {
            if !addresses.contains(address) {
                addresses.push(*address);
            }
        }
        addresses
    }

    /// Why a name has no address, or only those of an older answer.
    pub fn error(&self) -> Option<String> {
        let failed = self.entries.iter().find_map(|entry| Some((entry, entry.error.as_ref()?)));
        failed.map(|(entry, error)| format!("{} does not resolve: {error}", entry.advertised))
    }

    /// What to do where a tunnel that was dialled here stands at `standing`, or none stands.
    pub fn decide(&self, standing: Option<SocketAddr>) -> Decision {
        let addresses = self.addresses();
        match standing {
            Some(standing) if addresses.is_empty() || self.knows(&standing) => Decision::Keep,
            Some(_) | None => Decision::Dial(addresses),
        }
    }

    fn knows(&self, address: &SocketAddr) -> bool {
        // A socket for both families names an IPv4 address in its mapped form.
        let plain = |address: &SocketAddr| (address.ip().to_canonical(), address.port());
        self.entries.iter().flat_map(|entry| &entry.addresses).any(|known| plain(known) == plain(address))
    }
}

impl Entry {
    fn fail(&mut self, error: &str, now: Instant) -> bool {
        self.due = Some(now + RETRY_AFTER);
        let changed = self.error.as_deref() != Some(error);
        self.error = Some(error.to_owned());
        changed
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GW: &str = "gw.west.example:15443";

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn answer(texts: &[&str], ttl: u64) -> Result<Answer, String> {
        Ok(Answer { addresses: addresses(texts), ttl: Duration::from_secs(ttl) })
    }

    fn dial(texts: &[&str]) -> Decision {
        Decision::Dial(addresses(texts))
    }

    #[test]
    fn what_is_dialled_and_what_stays() {
        let now = Instant::now();
        let servfail = || Err("SERVFAIL".to_owned());
        type Case<'a> = (&'a [&'a str], Vec<Result<Answer, String>>, Option<&'a str>, Decision);
        let cases: Vec<Case<'_>> = vec![
            (&["10.0.0.1:1"], vec![], None, dial(&["10.0.0.1:1"])),
            (&["10.0.0.1:1"], vec![], Some("10.0.0.1:1"), Decision::Keep),
            // Another address is advertised than the tunnel's.
            (&["10.0.0.1:1"], vec![], Some("10.0.0.9:1"), dial(&["10.0.0.1:1"])),
            (&["10.0.0.1:1"], vec![], Some("[::ffff:10.0.0.1]:1"), Decision::Keep),
            (&[GW], vec![], None, dial(&[])),
            // Nobody knows better.
            (&[GW], vec![], Some("10.0.0.1:1"), Decision::Keep),
            (&[GW], vec![answer(&["10.0.0.1:1", "[fd00::1]:1"], 60)], None, dial(&["10.0.0.1:1", "[fd00::1]:1"])),
            (&[GW], vec![answer(&["10.0.0.1:1", "[fd00::1]:1"], 60)], Some("[fd00::1]:1"), Decision::Keep),
            // It has moved.
            (
                &[GW],
                vec![answer(&["10.0.0.1:1"], 60), answer(&["10.0.0.2:1"], 60)],
                Some("10.0.0.1:1"),
                dial(&["10.0.0.2:1"]),
            ),
            // One of several went.
            (
                &[GW],
                vec![answer(&["10.0.0.1:1", "10.0.0.2:1"], 60), answer(&["10.0.0.2:1"], 60)],
                Some("10.0.0.2:1"),
                Decision::Keep,
            ),
            // A failed answer takes nothing back, nor does an empty one.
            (&[GW], vec![answer(&["10.0.0.1:1"], 60), servfail()], Some("10.0.0.1:1"), Decision::Keep),
            (&[GW], vec![answer(&["10.0.0.1:1"], 60), servfail()], None, dial(&["10.0.0.1:1"])),
            (&[GW], vec![answer(&["10.0.0.1:1"], 60), answer(&[], 60)], None, dial(&["10.0.0.1:1"])),
            (&[GW], vec![servfail()], None, dial(&[])),
            // A name beside an address.
            (
                &["10.0.0.5:1", GW],
                vec![answer(&["10.0.0.5:1", "10.0.0.6:1"], 60)],
                None,
                dial(&["10.0.0.5:1", "10.0.0.6:1"]),
            ),
        ];
        for (advertised, answers, standing, want) in cases {
            let mut book = AddressBook::new(advertised.iter().copied(), now);
            for answer in &answers {
                book.handle_answer(GW, answer.clone(), now);
            }
            let standing = standing.map(|text| text.parse().unwrap());
            assert_eq!(book.decide(standing), want, "{advertised:?} {answers:?} {standing:?}");
        }
    }

    #[test]
    fn names_are_asked_for_when_their_time_is_over_or_a_dial_failed() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for (ttl, due) in [(0, 1), (30, 30), (300, 300), (86_400, 300)] {
            let mut book = AddressBook::new([GW, "10.0.0.1:1"], start);
            assert_eq!(book.due(start), [GW]);
            book.handle_answer(GW, answer(&["10.0.0.2:1"], ttl), start);
            assert_eq!((book.poll_timeout(), book.due(start)), (Some(at(due)), vec![]), "{ttl}");
            assert_eq!(book.due(at(due)), [GW]);
            // At once, but not more often than the least time to live allows.
            book.handle_dial_failed(start);
            assert_eq!(book.poll_timeout(), Some(at(1)), "{ttl}");
        }
        let mut book = AddressBook::new([GW], start);
        book.handle_answer(GW, Err("SERVFAIL".into()), start);
        assert_eq!(book.poll_timeout(), Some(at(5)));
        book.handle_dial_failed(at(3));
        assert_eq!(book.due(at(3)), [GW]);
        assert_eq!(AddressBook::new(["10.0.0.1:1"], start).poll_timeout(), None);
    }

    #[test]
    fn what_has_changed_is_told_once_and_what_worked_goes_first() {
        let now = Instant::now();
        let mut book = AddressBook::new([GW], now);
        assert!(!book.is_answered());
        assert!(book.handle_answer(GW, answer(&["10.0.0.1:1", "10.0.0.2:1"], 60), now));
        assert!(book.is_answered());
        // Servers turn their answers round; that is no change.
        assert!(!book.handle_answer(GW, answer(&["10.0.0.2:1", "10.0.0.1:1"], 60), now));
        book.handle_dialled("10.0.0.2:1".parse().unwrap());
        assert_eq!(book.addresses(), addresses(&["10.0.0.2:1", "10.0.0.1:1"]));
        assert!(book.handle_answer(GW, Err("SERVFAIL".into()), now));
        assert!(!book.handle_answer(GW, Err("SERVFAIL".into()), now));
        assert_eq!(book.error().unwrap(), format!("{GW} does not resolve: SERVFAIL"));
        assert!(book.handle_answer(GW, answer(&["10.0.0.3:1"], 60), now));
        assert_eq!((book.addresses(), book.error()), (addresses(&["10.0.0.3:1"]), None));
        let many: Vec<String> = (0..20).map(|n| format!("10.0.1.{n}:1")).collect();
        book.handle_answer(GW, answer(&many.iter().map(String::as_str).collect::<Vec<_>>(), 60), now);
        assert_eq!(book.addresses().len(), ADDRESSES_MAX);
        // Of a name that nobody advertises nothing is kept.
        assert!(!book.handle_answer("other.example:1", answer(&["10.0.0.9:1"], 60), now));
    }
}
