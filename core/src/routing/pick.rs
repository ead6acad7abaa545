//! One try's endpoint, out of a plan.

use std::time::Instant;

use serde::Serialize;

use super::{Balance, EndpointKey, Load, Plan, PlannedCluster, Standing, affinity};

/// The endpoint for one try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Pick {
    /// Index into [`Plan::endpoints`].
    pub endpoint: usize,
    pub reason: PickReason,
    /// Its cluster is not the first in the order of preference.
    pub spilled: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PickReason {
    /// The cluster was chosen by its share, the endpoint as the better of two, or in turn.
    Share,
    /// The endpoint is the session's.
    Session,
    /// So few endpoints are fit that this one is asked although it was ejected.
    Panic,
    /// Every usable endpoint of the chosen cluster was tried already: the next cluster.
    Failover,
    /// Every usable endpoint anywhere was tried already: one of them again.
    Again,
    /// No endpoint is usable anywhere: the least bad.
    LastResort,
}

impl PickReason {
    /// As it is written for people.
    pub fn name(self) -> &'static str {
        match self {
            PickReason::Share => "share",
            PickReason::Session => "session",
            PickReason::Panic => "panic",
            PickReason::Failover => "failover",
            PickReason::Again => "again",
            PickReason::LastResort => "last-resort",
        }
    }
}

/// A draw like any other, after which the first cluster that gets requests is chosen: for `explain`, which is to say
/// the same every time.
pub const FIRST: u64 = GAMMA.wrapping_neg();

/// What one pick depends on beside the plan.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// Decides between equals.
    pub random: u64,
    /// Counts the requests, for [`Balance::RoundRobin`].
    pub turn: u64,
    /// The session that the request belongs to, see [`super::session`].
    pub session: Option<u64>,
    /// The endpoints that this request need not meet again.
    pub tried: &'a [EndpointKey],
    pub now: Instant,
}

/// Endpoints that get requests, and the sums of weights up to each.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Candidates {
    indices: Vec<usize>,
    weight_sums: Vec<u64>,
}

impl Candidates {
    pub(super) fn push(&mut self, index: usize, weight: u32) {
        self.indices.push(index);
        self.weight_sums.push(self.weight_sums.last().copied().unwrap_or(0) + u64::from(weight));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    pub(super) fn contains(&self, index: usize) -> bool {
        self.indices.contains(&index)
    }

    fn sum(&self) -> u64 {
        self.weight_sums.last().copied().unwrap_or(0)
    }

    /// The place of the one within whose weight `at` falls.
    fn find(&self, at: u64) -> Option<usize> {
        (at < self.sum()).then(|| self.weight_sums.partition_point(|upto| *upto <= at))
    }

    fn draw(&self, random: u64) -> Option<usize> {
        self.find(random.checked_rem(self.sum())?)
    }

    /// Runs through all units of weight before it meets one again, and spreads those of one endpoint.
    fn in_turn(&self, turn: u64) -> Option<usize> {
        let sum = self.sum();
        let at = u128::from(turn) * u128::from(stride(sum));
        self.find(u64::try_from(at.checked_rem(u128::from(sum))?).ok()?)
    }
}

/// About the golden ratio of `sum`, and without a common divisor.
fn stride(sum: u64) -> u64 {
    let mut stride = ((sum as f64 * 0.618_034) as u64).max(1);
    while common_divisor(stride, sum) > 1 {
        stride += 1;
    }
    stride
}

fn common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// The least of its part that an endpoint gets in its slow start.
const WARMING_MIN: f64 = 0.1;

impl Plan {
    /// Picks the endpoint for one try. `load` says what an endpoint has to do.
    pub fn pick(&self, draw: Draw<'_>, load: impl Fn(usize) -> Load) -> Option<Pick> {
        let mut random = SplitMix(draw.random);
        let (endpoint, reason) = self.pick_any(draw, &mut random, &load)?;
        let spilled = self.clusters.first().is_some_and(|first| first.cluster != self.endpoints[endpoint].key.cluster);
        Some(Pick { endpoint, reason, spilled })
    }

    fn pick_any(
        &self,
        draw: Draw<'_>,
        random: &mut SplitMix,
        load: &impl Fn(usize) -> Load,
    ) -> Option<(usize, PickReason)> {
        let own = random.next();
        // A session's cluster is drawn by the session, so that it moves no more than shares do.
        let by_session = draw.session.filter(|_| self.balance == Balance::ConsistentHash);
        let Some(first) = self.draw_cluster(by_session.map_or(own, affinity::mix)) else {
            let endpoint = self.last_resort(random.next(), draw.tried)?;
            return Some((endpoint, PickReason::LastResort));
        };
        if let Some(endpoint) = self.pick_within(first, random, draw, load) {
            let panic = self.endpoints[endpoint].standing != Standing::Usable;
            let reason = match by_session {
                _ if panic => PickReason::Panic,
                Some(_) => PickReason::Session,
                None => PickReason::Share,
            };
            return Some((endpoint, reason));
        }
        for cluster in &self.clusters {
            if let Some(endpoint) = self.pick_within(cluster, random, draw, load) {
                return Some((endpoint, PickReason::Failover));
            }
        }
        let endpoint = self.pick_within(first, random, Draw { tried: &[], ..draw }, load)?;
        Some((endpoint, PickReason::Again))
    }

    /// Whether somebody else could answer if this endpoint took no more requests.
    pub fn has_capacity_beside(&self, key: &EndpointKey) -> bool {
        self.endpoints.iter().any(|other| other.standing == Standing::Usable && other.key != *key)
    }

    fn draw_cluster(&self, random: u64) -> Option<&PlannedCluster> {
        let mut at = fraction(random);
        let mut last = None;
        for cluster in self.clusters.iter().filter(|cluster| cluster.share > 0.0) {
            if at < cluster.share {
                return Some(cluster);
            }
            at -= cluster.share;
            last = Some(cluster);
        }
        last
    }

    fn pick_within(
        &self,
        cluster: &PlannedCluster,
        random: &mut SplitMix,
        draw: Draw<'_>,
        load: &impl Fn(usize) -> Load,
    ) -> Option<usize> {
        let session = draw.session.filter(|_| self.balance == Balance::ConsistentHash);
        // A session's zone goes by the session, and by another number than its cluster.
        let mut own = || session.map_or_else(|| random.next(), |session| affinity::mix(!session));
        let near = !cluster.near.is_empty() && fraction(own()) < cluster.near_share;
        if near && let Some(picked) = self.pick_untried(&cluster.near, random, draw, load) {
            return Some(picked);
        }
        self.pick_untried(&cluster.candidates, random, draw, load)
    }

    fn pick_untried(
        &self,
        candidates: &Candidates,
        random: &mut SplitMix,
        draw: Draw<'_>,
        load: &impl Fn(usize) -> Load,
    ) -> Option<usize> {
        if draw.tried.is_empty() {
            return self.pick_among(candidates, random, draw, load);
        }
        let mut untried = Candidates::default();
        for index in &candidates.indices {
            let endpoint = &self.endpoints[*index];
            if !draw.tried.contains(&endpoint.key) {
                untried.push(*index, endpoint.weight);
            }
        }
        self.pick_among(&untried, random, draw, load)
    }

    fn pick_among(
        &self,
        candidates: &Candidates,
        random: &mut SplitMix,
        draw: Draw<'_>,
        load: &impl Fn(usize) -> Load,
    ) -> Option<usize> {
        match (self.balance, draw.session) {
            (Balance::ConsistentHash, Some(session)) => self.of_session(candidates, session),
            (Balance::RoundRobin, _) => {
                let first = candidates.in_turn(draw.turn)?;
                let second = (first + 1) % candidates.indices.len();
                let [first, second] = [first, second].map(|place| candidates.indices[place]);
                Some(self.unless_cold(first, second, random, draw.now))
            }
            (Balance::LeastRequest | Balance::ConsistentHash, _) => {
                self.better_of_two(candidates, random, draw.now, load)
            }
        }
    }

    fn of_session(&self, candidates: &Candidates, session: u64) -> Option<usize> {
        let score = |index: &usize| {
            let endpoint = &self.endpoints[*index];
            affinity::score(session, endpoint.number, endpoint.weight)
        };
        candidates.indices.iter().copied().max_by(|a, b| score(a).total_cmp(&score(b)))
    }

    fn better_of_two(
        &self,
        candidates: &Candidates,
        random: &mut SplitMix,
        now: Instant,
        load: &impl Fn(usize) -> Load,
    ) -> Option<usize> {
        let count = candidates.indices.len();
        let first = candidates.draw(random.next())?;
        if count == 1 {
            return Some(candidates.indices[first]);
        }
        let mut second = candidates.draw(random.next())?;
        if second == first {
            // One step further is as good as drawing again, and ends.
            second = (first + 1) % count;
        }
        let (first, second) = (candidates.indices[first], candidates.indices[second]);
        let weight = |index: usize| self.endpoints[index].weight as f32;
        let second_is_better = load(second).is_less_than(weight(second), load(first), weight(first));
        let (better, other) = if second_is_better { (second, first) } else { (first, second) };
        Some(self.unless_cold(better, other, random, now))
    }

    /// An endpoint in its slow start gives up what is more than its part to the one that it was compared with.
    fn unless_cold(&self, chosen: usize, other: usize, random: &mut SplitMix, now: Instant) -> usize {
        let (warmth, others) = (self.warmth(chosen, now), self.warmth(other, now));
        // Two that are equally cold have nobody to leave it to.
        if warmth < others && fraction(random.next()) * others >= warmth { other } else { chosen }
    }

    /// The part of its share that an endpoint is given, up to 1.
    fn warmth(&self, index: usize, now: Instant) -> f64 {
        let Some(since) = self.endpoints[index].warming else { return 1.0 };
        let age = now.saturating_duration_since(since);
        if age >= self.slow_start { 1.0 } else { age.div_duration_f64(self.slow_start).max(WARMING_MIN) }
    }

    /// The best standing that is left; untried before tried, near before far.
    fn last_resort(&self, random: u64, tried: &[EndpointKey]) -> Option<usize> {
        let rank = |endpoint: &super::PlannedEndpoint| (endpoint.standing, tried.contains(&endpoint.key));
        let allowed = || self.endpoints.iter().filter(|endpoint| endpoint.standing != Standing::Excluded);
        let best = allowed().map(rank).min()?;
        let cluster = &allowed().find(|endpoint| rank(endpoint) == best)?.key.cluster;
        let mut candidates = Candidates::default();
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            if endpoint.key.cluster == *cluster && rank(endpoint) == best {
                candidates.push(index, endpoint.weight);
            }
        }
        candidates.draw(random).map(|at| candidates.indices[at])
    }
}

/// 53 bits, the precision of a double, as a number from 0 up to but not including 1.
fn fraction(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}

/// SplitMix64: turns one random number into as many as a pick needs.
struct SplitMix(u64);

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        affinity::mix(self.0)
    }
}
