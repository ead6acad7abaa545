//! Which of several replicas leads: an election by a `Lease` (coordination.k8s.io/v1), as `client-go` does it.
//!
//! The record is only ever replaced by whoever has seen its last version (the shell sees to that), and nobody compares
//! clocks: a candidate takes the lease when its version has not changed for as long as it is valid, by the candidate's own
//! monotonic clock. The leader stops counting on it well before that, counted from when it sent its last renewal. So
//! at no moment two of them lead, however long a process was stopped or a message was under way.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// A lease that says to be valid for longer is valid for this long.
const DURATION_MAX: Duration = Duration::from_secs(3_600);

/// What the lease says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Empty when the last leader has given it up.
    pub holder: String,
    /// How long after its last change others leave it alone.
    pub duration: Duration,
    pub acquired: Timestamp,
    pub renewed: Timestamp,
    /// How often it has changed hands.
    pub transitions: u32,
}

/// The lease as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    pub record: Record,
    /// What changes with every write (`metadata.resourceVersion`), whatever the clock of whoever wrote it says.
    pub version: String,
}

/// How a candidate stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Somebody else leads, or nobody yet.
    Standby { holder: Option<String> },
    /// Nobody else does.
    Leading,
    /// The lease could not be renewed for too long, and who holds it now is not known. Nothing is decided meanwhile.
    Unsure,
    /// Somebody else has taken it. What was led has to end.
    Lost { holder: String },
}

/// One candidate's state machine.
#[derive(Debug, Clone)]
pub struct Election {
    identity: String,
    duration: Duration,
    /// The lease as last read, and when it was first seen like that.
    seen: Option<(Read, Instant)>,
    /// When the last renewal that succeeded was sent.
    renewed: Option<Instant>,
    lost: Option<String>,
}

impl Election {
    /// No two candidates have the same `identity`; one that comes back has the one it had.
    pub fn new(identity: String, duration: Duration) -> Self {
        Self { identity, duration, seen: None, renewed: None, lost: None }
    }

    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// How often to ask or to renew: several times within what is left when one attempt fails.
    pub fn interval(&self) -> Duration {
        self.duration / 5
    }

    /// When to ask next.
    pub fn poll_timeout(&self, now: Instant) -> Instant {
        let soon = now + self.interval();
        let others = self.seen.as_ref().filter(|(read, _)| read.record.holder != self.identity);
        // Once it has expired, at once.
        others.map_or(soon, |(read, since)| soon.min((*since + valid_for(&read.record)).max(now)))
    }

    /// The lease as it is now; `None` when there is none. Yields what to replace it with.
    pub fn handle_read(&mut self, read: Option<Read>, now: Instant, wall: Timestamp) -> Option<Record> {
        let Some(read) = read else {
            self.seen = None;
            return Some(self.taken(0, wall));
        };
        if self.seen.as_ref().is_none_or(|(seen, _)| seen.version != read.version) {
            self.seen = Some((read.clone(), now));
        }
        let record = read.record;
        if record.holder == self.identity {
            return Some(Record { renewed: wall, duration: self.duration, ..record });
        }
        if !record.holder.is_empty() {
            if self.renewed.is_some() {
                self.lost = Some(record.holder);
                return None;
            }
            let since = self.seen.as_ref().map_or(now, |(_, since)| *since);
            if now < since + valid_for(&record) {
                return None;
            }
        }
        Some(self.taken(record.transitions.saturating_add(1), wall))
    }

    /// What was to be written at `sent` is what the lease says now.
    pub fn handle_written(&mut self, written: Read, sent: Instant) {
        self.seen = Some((written, sent));
        self.renewed = Some(sent);
    }

    /// The lease has been given up.
    pub fn handle_released(&mut self) {
        (self.renewed, self.seen) = (None, None);
    }

    pub fn standing(&self, now: Instant) -> Standing {
        match (&self.lost, self.renewed) {
            (Some(holder), _) => Standing::Lost { holder: holder.clone() },
            (None, Some(sent)) if now < sent + self.leads_for() => Standing::Leading,
            (None, Some(_)) => Standing::Unsure,
            (None, None) => {
                Standing::Standby { holder: self.seen.as_ref().map(|(read, _)| read.record.holder.clone()) }
            }
        }
    }

    /// Until when it leads without another renewal.
    pub fn leads_until(&self) -> Option<Instant> {
        self.renewed.filter(|_| self.lost.is_none()).map(|sent| sent + self.leads_for())
    }

    /// The record that gives the lease up; `None` when it is not held.
    pub fn release(&self) -> Option<Record> {
        let (read, _) = self.seen.as_ref().filter(|(read, _)| read.record.holder == self.identity)?;
        Some(Record { holder: String::new(), ..read.record.clone() })
    }

    fn leads_for(&self) -> Duration {
        self.duration * 2 / 3
    }

    fn taken(&self, transitions: u32, wall: Timestamp) -> Record {
        Record { holder: self.identity.clone(), duration: self.duration, acquired: wall, renewed: wall, transitions }
    }
}

fn valid_for(record: &Record) -> Duration {
    record.duration.min(DURATION_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DURATION: Duration = Duration::from_secs(15);

    fn election(identity: &str) -> Election {
        Election::new(identity.into(), DURATION)
    }

    fn held_by(holder: &str, renewed_s: i64) -> Read {
        let renewed = Timestamp::from_second(renewed_s).unwrap();
        let record = Record {
            holder: holder.into(),
            duration: DURATION,
            acquired: Timestamp::UNIX_EPOCH,
            renewed,
            transitions: 3,
        };
        read(record, &renewed_s.to_string())
    }

    fn read(record: Record, version: &str) -> Read {
        Read { record, version: version.into() }
    }

    #[test]
    fn a_lease_is_taken_when_there_is_none_when_it_was_given_up_and_when_it_did_not_change_for_long_enough() {
        let start = Instant::now();
        let wall = Timestamp::from_second(1_000).unwrap();
        for (record, after_s, takes) in [
            (None, 0, Some(0)),
            (Some(held_by("", 1)), 0, Some(4)),
            (Some(held_by("a", 1)), 0, Some(3)),
            (Some(held_by("b", 1)), 14, None),
            (Some(held_by("b", 1)), 15, Some(4)),
            // Its clock may be wrong by as much as it likes.
            (Some(held_by("b", 9_999_999)), 15, Some(4)),
        ] {
            let mut a = election("a");
            a.handle_read(record.clone(), start, wall);
            let written = a.handle_read(record.clone(), start + Duration::from_secs(after_s), wall);
            assert_eq!(written.as_ref().map(|written| written.transitions), takes, "{record:?} after {after_s} s");
            assert!(written.is_none_or(|written| written.holder == "a" && written.renewed == wall));
        }
    }

    #[test]
    fn every_renewal_begins_the_wait_anew() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut a = election("a");
        assert_eq!(a.handle_read(Some(held_by("b", 1)), at(0), Timestamp::UNIX_EPOCH), None);
        assert_eq!(a.handle_read(Some(held_by("b", 2)), at(14), Timestamp::UNIX_EPOCH), None);
        assert_eq!(a.handle_read(Some(held_by("b", 2)), at(28), Timestamp::UNIX_EPOCH), None);
        assert_eq!(a.poll_timeout(at(28)), at(29), "the moment when it expires");
        assert!(a.handle_read(Some(held_by("b", 2)), at(29), Timestamp::UNIX_EPOCH).is_some());
    }

    #[test]
    fn a_leader_that_can_not_renew_stops_counting_on_it_and_one_that_finds_another_has_lost() {
        let start = Instant::now();
        let mut a = election("a");
        let record = a.handle_read(None, start, Timestamp::UNIX_EPOCH).unwrap();
        a.handle_written(read(record.clone(), "1"), start);
        assert_eq!(a.standing(start + Duration::from_secs(9)), Standing::Leading);
        let late = start + Duration::from_secs(10);
        assert_eq!(a.standing(late), Standing::Unsure);
        // Nobody has taken it: it goes on.
        let mut back = a.clone();
        let again = back.handle_read(Some(read(record, "1")), late, Timestamp::UNIX_EPOCH).unwrap();
        back.handle_written(read(again, "2"), late);
        assert_eq!(back.standing(late), Standing::Leading);
        assert_eq!(a.handle_read(Some(held_by("b", 1)), late, Timestamp::UNIX_EPOCH), None);
        assert_eq!(a.standing(late), Standing::Lost { holder: "b".into() });
        assert_eq!(a.leads_until(), None);
    }

    #[test]
    fn what_is_given_up_is_free_at_once() {
        let now = Instant::now();
        let (mut a, mut b) = (election("a"), election("b"));
        assert_eq!(a.release(), None);
        let record = a.handle_read(None, now, Timestamp::UNIX_EPOCH).unwrap();
        a.handle_written(read(record, "1"), now);
        let released = a.release().unwrap();
        a.handle_released();
        assert_eq!(a.standing(now), Standing::Standby { holder: None });
        assert!(b.handle_read(Some(read(released, "2")), now, Timestamp::UNIX_EPOCH).is_some());
    }

    /// What a candidate is about to write, in the place of which version, and when it sent it.
    type Pending = Option<(Record, u64, Instant)>;

    /// What happens to one candidate in a step of the simulation.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// It reads, and writes what it wants to.
        Asks,
        /// It reads, and is stopped before it writes what it wanted to.
        Reads,
        /// It writes what it had read for, if nobody wrote meanwhile.
        Writes,
        /// It writes, and never hears that it did.
        WritesUnheard,
        Passes,
    }

    proptest! {
        #[test]
        fn never_do_two_lead(steps in prop::collection::vec(
            (0usize..3, 0u64..9_000, prop_oneof![
                4 => Just(Step::Asks), 1 => Just(Step::Reads), 1 => Just(Step::Writes),
                1 => Just(Step::WritesUnheard), 1 => Just(Step::Passes),
            ]), 1..200)) {
            let start = Instant::now();
            let mut now = start;
            let (mut stored, mut version): (Option<Record>, u64) = (None, 0);
            let mut candidates: Vec<(Election, Pending)> =
                ["a", "b", "c"].map(|name| (election(name), None)).into();
            for (who, after_ms, step) in steps {
                now += Duration::from_millis(after_ms);
                // Each clock is wrong in its own way.
                let wall = Timestamp::from_second(1_000 * (3 - who as i64)).unwrap();
                let (election, pending) = &mut candidates[who];
                if matches!(step, Step::Asks | Step::Reads) {
                    let there = stored.clone().map(|record| read(record, &version.to_string()));
                    *pending = election.handle_read(there, now, wall).map(|record| (record, version, now));
                }
                if matches!(step, Step::Asks | Step::Writes | Step::WritesUnheard)
                    && let Some((record, seen, sent)) = pending.take()
                    && seen == version
                {
                    (stored, version) = (Some(record.clone()), version + 1);
                    if !matches!(step, Step::WritesUnheard) {
                        election.handle_written(read(record, &version.to_string()), sent);
                    }
                }
                let leading = candidates.iter().filter(|(one, _)| one.standing(now) == Standing::Leading);
                prop_assert!(leading.count() <= 1, "{candidates:?}");
            }
        }
    }
}
