//! One direction of a link as a state machine: packets go in, and come out when they have arrived.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::conditions::Conditions;

/// Packets under way at once. A link that is longer than that for its rate drops.
const UNDER_WAY_MAX: usize = 1 << 16;

/// What became of the packets so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub arrived: u64,
    /// By chance.
    pub lost: u64,
    /// For want of room in the queue.
    pub dropped: u64,
    /// By a cut, or at a dark address.
    pub severed: u64,
}

pub struct Direction {
    conditions: Conditions,
    random: StdRng,
    /// Whether the last packet was lost, for losses in a row.
    losing: bool,
    /// When the last bit that was accepted will have left the queue.
    sent_until: Option<Instant>,
    under_way: VecDeque<(Instant, Vec<u8>)>,
    counts: Counts,
}

impl Direction {
    pub fn new(seed: u64) -> Self {
        Self {
            conditions: Conditions::default(),
            random: StdRng::seed_from_u64(seed),
            losing: false,
            sent_until: None,
            under_way: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    pub fn change(&mut self, change: impl FnOnce(&mut Conditions)) {
        change(&mut self.conditions);
        if self.conditions.cut {
            self.counts.severed += self.under_way.len() as u64;
            self.under_way.clear();
        }
    }

    /// A packet enters.
    pub fn handle_packet(&mut self, packet: &[u8], now: Instant) {
        if self.conditions.cut || self.is_dark(packet) {
            self.counts.severed += 1;
            return;
        }
        if self.is_lost() {
            self.counts.lost += 1;
            return;
        }
        let Some(sent) = self.enqueue(packet.len() as u64, now) else {
            self.counts.dropped += 1;
            return;
        };
        let jitter = self.conditions.jitter.mul_f64(self.random.random());
        let arrives = sent + self.conditions.delay + jitter;
        // A packet never overtakes one before it.
        let arrives = self.under_way.back().map_or(arrives, |(last, _)| arrives.max(*last));
        self.under_way.push_back((arrives, packet.to_vec()));
    }

    /// The next packet that has arrived.
    pub fn poll_packet(&mut self, now: Instant) -> Option<Vec<u8>> {
        let (_, packet) = self.under_way.pop_front_if(|(arrives, _)| *arrives <= now)?;
        self.counts.arrived += 1;
        Some(packet)
    }

    /// When the next packet arrives.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.under_way.front().map(|(arrives, _)| *arrives)
    }

    fn is_dark(&self, packet: &[u8]) -> bool {
        let dark = |address| self.conditions.dark.contains(&address);
        !self.conditions.dark.is_empty() && ends(packet).is_none_or(|(from, to)| dark(from) || dark(to))
    }

    fn is_lost(&mut self) -> bool {
        let Conditions { loss, loss_burst, .. } = self.conditions;
        if loss <= 0.0 {
            self.losing = false;
            return false;
        }
        let random: f64 = self.random.random();
        if loss_burst <= 1.0 || loss >= 1.0 {
            return random < loss;
        }
        // A row of losses ends with 1/burst and begins so often that the share comes to `loss`.
        self.losing =
            if self.losing { random >= 1.0 / loss_burst } else { random < loss / (loss_burst * (1.0 - loss)) };
        self.losing
    }

    /// When a packet of this length will have been sent; `None` if there is no room for it.
    fn enqueue(&mut self, length: u64, now: Instant) -> Option<Instant> {
        if self.under_way.len() >= UNDER_WAY_MAX {
            return None;
        }
        let Some(rate) = self.conditions.rate else {
            self.sent_until = None;
            return Some(now);
        };
        let start = self.sent_until.map_or(now, |until| until.max(now));
        let waiting = start.saturating_duration_since(now).as_secs_f64() * rate as f64 / 8.0;
        if waiting + length as f64 > self.conditions.queue as f64 {
            return None;
        }
        let sent = start + Duration::from_secs_f64(length as f64 * 8.0 / rate as f64);
        self.sent_until = Some(sent);
        Some(sent)
    }
}

/// Source and destination of an IP packet.
fn ends(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => {
            let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            Some((Ipv4Addr::from(from).into(), Ipv4Addr::from(to).into()))
        }
        6 => {
            let from: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            Some((Ipv6Addr::from(from).into(), Ipv6Addr::from(to).into()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn direction(change: impl FnOnce(&mut Conditions)) -> Direction {
        let mut direction = Direction::new(7);
        direction.change(change);
        direction
    }

    /// When each packet that arrives does, in milliseconds, if one of 1,000 octets enters every `gap`.
    fn arrivals(direction: &mut Direction, count: u32, gap: Duration) -> Vec<u128> {
        let start = Instant::now();
        for n in 0..count {
            direction.handle_packet(&[0x45; 1000], start + gap * n);
        }
        let mut arrived = Vec::new();
        while let Some(at) = direction.poll_timeout() {
            assert!(direction.poll_packet(at.checked_sub(Duration::from_nanos(1)).unwrap_or(at)).is_none());
            assert!(direction.poll_packet(at).is_some());
            arrived.push((at - start).as_millis());
        }
        arrived
    }

    #[test]
    fn packets_take_the_delay() {
        let mut perfect = direction(|_| {});
        assert_eq!(arrivals(&mut perfect, 3, MS), [0, 1, 2]);
        let mut long = direction(|conditions| conditions.delay = 20 * MS);
        assert_eq!(arrivals(&mut long, 3, MS), [20, 21, 22]);
    }

    #[test]
    fn jitter_spreads_them_and_keeps_their_order() {
        let mut jittery = direction(|conditions| (conditions.delay, conditions.jitter) = (20 * MS, 10 * MS));
        let arrived = arrivals(&mut jittery, 1000, 20 * MS);
        let delays: Vec<u128> = arrived.iter().enumerate().map(|(n, at)| at - 20 * n as u128).collect();
        assert!(delays.iter().all(|delay| (20..=30).contains(delay)), "{delays:?}");
        assert!(delays.iter().any(|delay| *delay <= 21) && delays.iter().any(|delay| *delay >= 29));
        let close = arrivals(&mut jittery, 1000, MS / 10);
        assert!(close.is_sorted());
    }

    #[test]
    fn the_share_that_is_lost_is_the_one_that_was_asked_for() {
        for (loss, burst) in [(0.01, 1.0), (0.2, 1.0), (0.01, 4.0), (0.2, 10.0)] {
            let mut lossy = direction(|conditions| (conditions.loss, conditions.loss_burst) = (loss, burst));
            let arrived = arrivals(&mut lossy, 200_000, Duration::from_micros(1)).len();
            let lost = 1.0 - arrived as f64 / 200_000.0;
            // 65,536 may be under way; what was lost is counted before.
            let counted = lossy.counts().lost as f64 / 200_000.0;
            assert!((counted / loss - 1.0).abs() < 0.15, "{loss} {burst}: {counted} {lost}");
        }
    }

    #[test]
    fn losses_come_in_rows_of_the_mean_length() {
        let mut lossy = direction(|conditions| (conditions.loss, conditions.loss_burst) = (0.1, 5.0));
        let lost: Vec<bool> = (0..200_000).map(|_| lossy.is_lost()).collect();
        let rows = lost.windows(2).filter(|pair| !pair[0] && pair[1]).count();
        let mean = lost.iter().filter(|lost| **lost).count() as f64 / rows as f64;
        assert!((4.5..5.5).contains(&mean), "{mean}");
    }

    #[test]
    fn the_rate_paces_and_the_queue_is_bounded() {
        // 8 Mbit/s is a packet of 1,000 octets each millisecond.
        let rate = |conditions: &mut Conditions| (conditions.rate, conditions.queue) = (Some(8_000_000), 10_000);
        assert_eq!(arrivals(&mut direction(rate), 5, Duration::ZERO), [1, 2, 3, 4, 5]);
        let mut full = direction(rate);
        assert_eq!(arrivals(&mut full, 50, Duration::ZERO).len(), 10);
        assert_eq!(full.counts(), Counts { arrived: 10, dropped: 40, ..Counts::default() });
        // At half the rate nobody waits.
        assert_eq!(arrivals(&mut direction(rate), 4, 2 * MS), [1, 3, 5, 7]);
    }

    #[test]
    fn a_cut_severs_what_is_under_way_and_what_comes() {
        let mut link = direction(|conditions| conditions.delay = 20 * MS);
        let start = Instant::now();
        link.handle_packet(&[0x45; 100], start);
        link.change(|conditions| conditions.cut = true);
        link.handle_packet(&[0x45; 100], start);
        assert_eq!((link.poll_timeout(), link.counts().severed), (None, 2));
        link.change(|conditions| conditions.cut = false);
        link.handle_packet(&[0x45; 100], start);
        assert!(link.poll_packet(start + 20 * MS).is_some());
    }

    #[test]
    fn a_dark_address_neither_sends_nor_receives() {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        let now = Instant::now();
        for (dark, arrives) in [([10, 0, 0, 1], false), ([10, 0, 0, 2], false), ([10, 0, 0, 3], true)] {
            let mut link = direction(|conditions| conditions.dark = [Ipv4Addr::from(dark).into()].into());
            link.handle_packet(&packet, now);
            assert_eq!(link.poll_packet(now).is_some(), arrives, "{dark:?}");
        }
        let mut packet = vec![0; 48];
        (packet[0], packet[39]) = (0x60, 9);
        let mut link = direction(|conditions| conditions.dark = ["::9".parse().expect("an address")].into());
        link.handle_packet(&packet, now);
        link.handle_packet(&[], now);
        link.handle_packet(&[0x45; 10], now);
        assert_eq!((link.poll_timeout(), link.counts().severed), (None, 3));
    }
}
