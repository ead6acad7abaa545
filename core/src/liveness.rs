//! Whether the far end of a tunnel answers.
//!
//! Probes go out often while legs are in use and seldom while none is. Silence makes a tunnel *suspect*
//! (no new picks, dial again), long silence makes it *dead* (its streams are closed). Anything heard
//! from the far end ends the suspicion.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// How patient to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LivenessConfig {
    /// Between probes while legs are in use, and while an answer is awaited.
    pub probe_in_use: Duration,
    /// Between probes while none is.
    pub probe_idle: Duration,
    /// Silence before suspicion, if three round trips are not longer.
    pub suspect_after: Duration,
    /// Silence before the tunnel is given up.
    pub dead_after: Duration,
}

impl Default for LivenessConfig {
    fn default() -> Self {
        Self {
            probe_in_use: Duration::from_millis(150),
            probe_idle: Duration::from_secs(5),
            suspect_after: Duration::from_millis(400),
            dead_after: Duration::from_secs(60),
        }
    }
}

/// What the silence of the far end means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Up,
    Suspect,
    Dead,
}

/// What the shell has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LivenessEvent {
    SendProbe(u64),
    /// The reach changed to this.
    Reach(Reach),
}

/// Probes of which the answer is still awaited; older ones are forgotten, since any later answer will do.
const OUTSTANDING_MAX: usize = 64;

/// A timer that fires this much late says that this process was held up, not the far end.
const LATE: Duration = Duration::from_millis(200);

/// How long signs of unreachability are disbelieved when one has proved to be wrong.
const DISBELIEF: Duration = Duration::from_secs(60);

/// The state machine of one tunnel.
#[derive(Debug)]
pub struct Liveness {
    config: LivenessConfig,
    reach: Reach,
    in_use: bool,
    next_sequence: u64,
    outstanding: BTreeMap<u64, Instant>,
    last_probe: Option<Instant>,
    heard: Instant,
    /// When the last suspicion ended. Probes from before it were answered over a stall, which says nothing of
    /// how long the path is.
    resumed: Option<Instant>,
    /// Since when somebody who has not proved who he is says that nobody is there.
    unreachable: Option<Instant>,
    /// When that last proved to be wrong.
    refuted: Option<Instant>,
    rtt: Option<Duration>,
    events: VecDeque<LivenessEvent>,
}

impl Liveness {
    /// Starts with a probe at once.
    pub fn new(config: LivenessConfig, now: Instant) -> Self {
        Self {
            config,
            reach: Reach::Up,
            in_use: false,
            next_sequence: 1,
            outstanding: BTreeMap::new(),
            last_probe: None,
            heard: now,
            resumed: None,
            unreachable: None,
            refuted: None,
            rtt: None,
            events: VecDeque::new(),
        }
    }

    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// Smoothed round trip of the probes.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Legs were opened on an unused tunnel, or the last one ended.
    pub fn handle_in_use(&mut self, in_use: bool) {
        self.in_use = in_use;
    }

    /// Something authentic came from the far end.
    pub fn handle_heard(&mut self, now: Instant) {
        if self.reach == Reach::Dead {
            return;
        }
        self.heard = self.heard.max(now);
        // What was under way when nobody was there any more still arrives.
        if self.reach == Reach::Suspect && self.unreachable.is_none() {
            self.resumed = Some(now);
            self.become_reach(Reach::Up);
        }
    }

    /// A sign that nobody is at the far end, from somebody who has not proved who he is (ICMP's port-unreachable):
    /// suspicion and a probe at once, but never death. Only an answer to a probe sent since then ends the
    /// suspicion, and from then on such signs count for nothing for a while.
    pub fn handle_unreachable(&mut self, now: Instant) {
        let disbelieved = self.refuted.is_some_and(|refuted| now.saturating_duration_since(refuted) < DISBELIEF);
        if self.reach == Reach::Up && !disbelieved {
            self.unreachable = Some(now);
            self.become_reach(Reach::Suspect);
            self.send_probe(now);
        }
    }

    /// An answer to the probe of this number; a number that was never sent counts for nothing.
    pub fn handle_answer(&mut self, sequence: u64, now: Instant) {
        let Some(sent) = self.outstanding.get(&sequence).copied() else { return };
        self.outstanding = self.outstanding.split_off(&(sequence + 1));
        if self.unreachable.is_some_and(|since| sent >= since) {
            self.unreachable = None;
            self.refuted = Some(now);
        }
        self.handle_heard(now);
        if self.resumed.is_none_or(|resumed| sent >= resumed) {
            let sample = now.saturating_duration_since(sent);
            // RFC 6298's weight: steady, yet a new path shows within a second of probes.
            self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
    }

    /// When `handle_timeout` wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.reach {
            Reach::Dead => None,
            Reach::Up => Some(self.suspect_at().map_or(self.next_probe(), |at| at.min(self.next_probe()))),
            Reach::Suspect => Some(self.next_probe().min(self.dead_at())),
        }
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        if self.reach == Reach::Dead {
            return;
        }
        let late = self.poll_timeout().is_some_and(|at| now.saturating_duration_since(at) > LATE);
        if late && self.reach == Reach::Up {
            // The answers may be waiting in the socket: ask again before suspecting anybody.
            self.outstanding.clear();
        }
        if self.reach == Reach::Up && self.suspect_at().is_some_and(|at| at <= now) {
            self.become_reach(Reach::Suspect);
        }
        if self.reach == Reach::Suspect && self.dead_at() <= now {
            self.become_reach(Reach::Dead);
        } else if self.next_probe() <= now {
            self.send_probe(now);
        }
    }

    pub fn poll_event(&mut self) -> Option<LivenessEvent> {
        self.events.pop_front()
    }

    fn send_probe(&mut self, now: Instant) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        if self.outstanding.len() >= OUTSTANDING_MAX {
            // The oldest one dates the silence, so the second oldest goes.
            let second = self.outstanding.keys().nth(1).copied();
            second.and_then(|second| self.outstanding.remove(&second));
        }
        self.outstanding.insert(sequence, now);
        self.last_probe = Some(now);
        self.events.push_back(LivenessEvent::SendProbe(sequence));
    }

    fn next_probe(&self) -> Instant {
        let hurry = self.in_use || !self.outstanding.is_empty() || self.reach == Reach::Suspect;
        let wait = if hurry { self.config.probe_in_use } else { self.config.probe_idle };
        self.last_probe.map_or(self.heard, |last| last + wait)
    }

    fn silence_allowed(&self) -> Duration {
        self.config.suspect_after.max(self.rtt.unwrap_or_default() * 3)
    }

    /// Silence counts only while an answer is owed.
    fn suspect_at(&self) -> Option<Instant> {
        let (_, oldest) = self.outstanding.first_key_value()?;
        // In use, the silence began up to one interval before the first probe that went unanswered.
        let began = if self.in_use { oldest.checked_sub(self.config.probe_in_use).unwrap_or(*oldest) } else { *oldest };
        Some(began.max(self.heard) + self.silence_allowed())
    }

    fn dead_at(&self) -> Instant {
        self.heard + self.config.dead_after
    }

    fn become_reach(&mut self, reach: Reach) {
        if self.reach != reach {
            self.reach = reach;
            self.events.push_back(LivenessEvent::Reach(reach));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Runs the machine up to `end`, answering each probe after `answer`; returns the changes of reach.
    fn run(
        liveness: &mut Liveness,
        start: Instant,
        end: Duration,
        answer: impl Fn(Duration) -> Option<Duration>,
    ) -> Vec<(u128, Reach)> {
        let mut answers: BTreeMap<Instant, u64> = BTreeMap::new();
        let mut changes = Vec::new();
        loop {
            let timer = liveness.poll_timeout();
            let arrival = answers.keys().next().copied();
            let Some(now) = timer.into_iter().chain(arrival).min().filter(|now| *now <= start + end) else { break };
            if let Some(sequence) = answers.remove(&now) {
                liveness.handle_answer(sequence, now);
            } else {
                liveness.handle_timeout(now);
            }
            while let Some(event) = liveness.poll_event() {
                match event {
                    LivenessEvent::Reach(reach) => changes.push(((now - start).as_millis(), reach)),
                    LivenessEvent::SendProbe(sequence) => {
                        if let Some(delay) = answer(now - start) {
                            answers.insert(now + delay, sequence);
                        }
                    }
                }
            }
        }
        changes
    }

    fn machine(start: Instant) -> Liveness {
        Liveness::new(LivenessConfig::default(), start)
    }

    #[test]
    fn an_answering_tunnel_is_never_suspected() {
        let start = Instant::now();
        for (in_use, rtt) in [(true, 1), (true, 300), (true, 2_000), (false, 1), (false, 399)] {
            let mut liveness = machine(start);
            liveness.handle_in_use(in_use);
            liveness.rtt = Some(MS * rtt);
            assert_eq!(run(&mut liveness, start, MS * 60_000, |_| Some(MS * rtt)), [], "{in_use} {rtt}");
            assert!(liveness.rtt().is_some_and(|measured| measured <= MS * rtt));
        }
    }

    #[test]
    fn silence_in_use_is_suspect_after_400_ms_and_dead_after_a_minute() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        let changes = run(&mut liveness, start, MS * 90_000, |at| (at < MS * 1_000).then_some(MS));
        let [(suspect, Reach::Suspect), (dead, Reach::Dead)] = changes[..] else { panic!("{changes:?}") };
        assert!((1_250..=1_550).contains(&suspect), "{suspect}");
        assert!((60_850..=61_100).contains(&dead), "{dead}");
        assert_eq!(liveness.poll_timeout(), None);
    }

    #[test]
    fn a_long_path_gets_three_round_trips() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        let changes = run(&mut liveness, start, MS * 8_000, |at| (at < MS * 3_000).then_some(MS * 300));
        let [(suspect, Reach::Suspect)] = changes[..] else { panic!("{changes:?}") };
        assert!((4_000..=4_400).contains(&suspect), "{suspect}");
    }

    #[test]
    fn idle_silence_is_noticed_soon_after_the_next_probe() {
        let start = Instant::now();
        let mut liveness = machine(start);
        let changes = run(&mut liveness, start, MS * 20_000, |at| (at < MS * 4_000).then_some(MS));
        assert_eq!(changes, [(5_400, Reach::Suspect)]);
    }

    #[test]
    fn an_answer_ends_the_suspicion_and_the_dead_stay_dead() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        let gap = |at: Duration| (!(MS * 1_000..MS * 3_000).contains(&at)).then_some(MS);
        let changes = run(&mut liveness, start, MS * 5_000, gap);
        let [(_, Reach::Suspect), (up, Reach::Up)] = changes[..] else { panic!("{changes:?}") };
        assert!((3_000..=3_200).contains(&up), "{up}");

        run(&mut liveness, start, MS * 120_000, |_| None);
        assert_eq!(liveness.reach(), Reach::Dead);
        liveness.handle_heard(start + MS * 120_001);
        assert_eq!(liveness.reach(), Reach::Dead);
    }

    #[test]
    fn unreachable_is_suspect_at_once_and_never_dead() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        run(&mut liveness, start, MS * 1_000, |_| Some(MS));
        liveness.handle_unreachable(start + MS * 1_001);
        assert_eq!(liveness.poll_event(), Some(LivenessEvent::Reach(Reach::Suspect)));
        let Some(LivenessEvent::SendProbe(probe)) = liveness.poll_event() else { panic!("no probe") };
        // What was sent before nobody was there, and a repetition of the sign.
        liveness.handle_heard(start + MS * 1_002);
        liveness.handle_unreachable(start + MS * 1_003);
        assert_eq!((liveness.reach(), liveness.poll_event()), (Reach::Suspect, None));
        liveness.handle_answer(probe, start + MS * 1_010);
        assert_eq!(liveness.poll_event(), Some(LivenessEvent::Reach(Reach::Up)));

        // It was wrong: whoever forges it has to wait.
        for (ms, want) in [(1_020, Reach::Up), (61_009, Reach::Up), (61_011, Reach::Suspect)] {
            liveness.handle_unreachable(start + MS * ms);
            assert_eq!(liveness.reach(), want, "{ms}");
        }
    }

    #[test]
    fn where_nobody_is_silence_counts_as_ever() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        run(&mut liveness, start, MS * 1_000, |_| Some(MS));
        liveness.handle_unreachable(start + MS * 1_001);
        let changes = run(&mut liveness, start, MS * 90_000, |_| None);
        let [(1_001..=1_200, Reach::Suspect), (dead, Reach::Dead)] = changes[..] else { panic!("{changes:?}") };
        assert!((60_850..=61_100).contains(&dead), "{dead}");
    }

    #[test]
    fn answers_that_a_stall_held_up_do_not_make_it_more_patient() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        // Whatever is asked in the stall is answered, all at once, when it ends.
        run(&mut liveness, start, MS * 1_400, |_| Some(MS));
        let changes = run(&mut liveness, start, MS * 8_000, |at| Some((MS * 5_000).saturating_sub(at).max(MS)));
        let [(_, Reach::Suspect), (up, Reach::Up)] = changes[..] else { panic!("{changes:?}") };
        assert_eq!(up, 5_000);
        assert!(liveness.rtt() <= Some(MS), "{:?}", liveness.rtt());
        let changes = run(&mut liveness, start, MS * 9_000, |_| None);
        let [(suspect, Reach::Suspect)] = changes[..] else { panic!("{changes:?}") };
        assert!((8_250..=8_550).contains(&suspect), "{suspect}");
    }

    #[test]
    fn a_path_that_has_become_long_is_learned() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        run(&mut liveness, start, MS * 1_000, |_| Some(MS));
        let changes = run(&mut liveness, start, MS * 20_000, |_| Some(MS * 2_000));
        assert!(changes.len() <= 2, "{changes:?}");
        assert!(liveness.rtt() >= Some(MS * 1_900), "{:?}", liveness.rtt());
    }

    #[test]
    fn a_pause_of_this_process_is_not_the_fault_of_the_far_end() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        run(&mut liveness, start, MS * 1_000, |_| Some(MS));
        let woken = start + MS * 31_000;
        liveness.handle_timeout(woken);
        assert_eq!(liveness.reach(), Reach::Up);
        assert!(matches!(liveness.poll_event(), Some(LivenessEvent::SendProbe(_))));
        let changes = run(&mut liveness, start, MS * 33_000, |_| None);
        let [(suspect, Reach::Suspect)] = changes[..] else { panic!("{changes:?}") };
        assert!((31_250..=31_600).contains(&suspect), "{suspect}");
    }

    #[test]
    fn answers_to_nothing_count_for_nothing() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_answer(77, start + MS);
        liveness.handle_answer(u64::MAX, start + MS);
        assert_eq!(liveness.rtt(), None);
    }

    #[test]
    fn unanswered_probes_are_bounded() {
        let start = Instant::now();
        let mut liveness = machine(start);
        liveness.handle_in_use(true);
        run(&mut liveness, start, MS * 50_000, |_| None);
        assert_eq!(liveness.outstanding.len(), OUTSTANDING_MAX);
    }
}
