//! A service under load in simulated time: clusters whose endpoints have their own response times, are killed,
//! hang, answer errors and come back. What must hold is checked at every plan and every request, over many seeds.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BinaryHeap};

use super::*;
use crate::outlier::{Elsewhere, Outcome, Outlier, OutlierEvent};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Well,
    Killed,
    Hung,
    /// Answers 503.
    Failing,
}

struct Endpoint {
    cluster: usize,
    key: EndpointKey,
    mood: Mood,
    latency_ms: u64,
    ready: bool,
    since: Option<Instant>,
    ewma: PeakEwma,
    in_flight: u32,
    waiting: BTreeMap<u64, u64>,
    picked: u32,
    outlier: Outlier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Request,
    Answer { endpoint: usize, request: u64 },
    ProbeDone { endpoint: usize },
    Tick,
}

struct Simulation {
    start: Instant,
    now_ms: u64,
    random: u64,
    endpoints: Vec<Endpoint>,
    clusters: Vec<ClusterId>,
    router: Router,
    plan: Plan,
    events: BinaryHeap<std::cmp::Reverse<(u64, u64, Event)>>,
    serial: u64,
    /// Requests that no endpoint was found for, and those that ended without an answer.
    unplaced: u32,
    failed: u32,
    answered: u32,
    risen: BTreeMap<ClusterId, f64>,
}

impl Simulation {
    /// `sizes` endpoints in each cluster; the first is local.
    fn new(seed: u64, sizes: &[usize]) -> Self {
        let start = Instant::now();
        let clusters: Vec<ClusterId> = (0..sizes.len()).map(|n| format!("c{n}").parse().unwrap()).collect();
        let mut endpoints = Vec::new();
        for (cluster, size) in sizes.iter().enumerate() {
            for n in 0..*size {
                endpoints.push(Endpoint {
                    cluster,
                    key: EndpointKey {
                        cluster: clusters[cluster].clone(),
                        endpoint: format!("e{cluster}-{n}").parse().unwrap(),
                    },
                    mood: Mood::Well,
                    latency_ms: 5,
                    ready: true,
                    since: None,
                    ewma: PeakEwma::default(),
                    in_flight: 0,
                    waiting: BTreeMap::new(),
                    picked: 0,
                    outlier: Outlier::new(std::sync::Arc::default()),
                });
            }
        }
        let mut router = Router::default();
        let plan = router.plan(Vec::new(), &Preferences::default(), start);
        let mut simulation = Self {
            start,
            now_ms: 0,
            random: seed,
            endpoints,
            clusters,
            router,
            plan,
            events: BinaryHeap::new(),
            serial: 0,
            unplaced: 0,
            failed: 0,
            answered: 0,
            risen: BTreeMap::new(),
        };
        simulation.replan();
        simulation.at(0, Event::Tick);
        simulation
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.now_ms)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        affinity::mix(self.random) % bound
    }

    fn at(&mut self, after_ms: u64, event: Event) {
        self.serial += 1;
        self.events.push(std::cmp::Reverse((self.now_ms + after_ms, self.serial, event)));
    }

    fn views(&self) -> Vec<ClusterView> {
        let view = |(n, cluster): (usize, &ClusterId)| ClusterView {
            cluster: cluster.clone(),
            origin: if n == 0 { Origin::Local } else { Origin::Remote },
            freshness: Freshness::Fresh,
            reach: ClusterReach::Up,
            rtt: Some(Duration::from_millis(20 * n as u64)),
            endpoints: self
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.cluster == n)
                .map(|endpoint| EndpointView {
                    id: endpoint.key.endpoint.clone(),
                    weight: 1,
                    ready: endpoint.ready,
                    ejected: endpoint.outlier.ejected_for(),
                    near: false,
                    since: endpoint.since,
                })
                .collect(),
        };
        self.clusters.iter().enumerate().map(view).collect()
    }

    fn replan(&mut self) {
        let plan = self.router.plan(self.views(), &Preferences::default(), self.now());
        for cluster in &plan.clusters {
            let others = plan.endpoints.iter().filter(|endpoint| endpoint.key.cluster != cluster.cluster);
            let beside = others.filter(|endpoint| endpoint.standing == Standing::Usable).count();
            assert!(!cluster.panic || beside == 0, "panic although another cluster has capacity");
        }
        let sum: f64 = plan.clusters.iter().map(|cluster| cluster.share).sum();
        let usable = plan.endpoints.iter().any(|endpoint| endpoint.standing == Standing::Usable);
        assert!((sum - f64::from(u8::from(usable))).abs() < 1e-9, "shares add up to {sum} at {} ms", self.now_ms);
        for cluster in &plan.clusters {
            let before = self.plan.clusters.iter().find(|old| old.cluster == cluster.cluster);
            let rise = before.map_or(0.0, |before| f64::max(cluster.granted - before.granted, 0.0));
            let risen = self.risen.entry(cluster.cluster.clone()).or_default();
            *risen += rise;
            let bound = RISE_STEP * (self.now_ms as f64 / RISE_HOLD.as_millis() as f64).floor();
            assert!(*risen <= bound + 1e-9, "{} came back faster than its bound", cluster.cluster);
        }
        self.plan = plan;
    }

    fn index_of(&self, picked: usize) -> usize {
        let key = &self.plan.endpoints[picked].key;
        self.endpoints.iter().position(|endpoint| endpoint.key == *key).unwrap()
    }

    fn elsewhere(&self, endpoint: usize) -> Elsewhere {
        let beside = self.plan.has_capacity_beside(&self.endpoints[endpoint].key);
        if beside { Elsewhere::Capacity } else { Elsewhere::Nothing }
    }

    /// One request, tried up to three times where the endpoint refuses.
    fn request(&mut self) {
        let mut tried: Vec<EndpointKey> = Vec::new();
        for _ in 0..3 {
            let (random, now_ms) = (self.below(u64::MAX), self.now_ms);
            let load = |index: usize| {
                let endpoint = &self.endpoints[self.index_of(index)];
                Load { in_flight: endpoint.in_flight, latency_us: endpoint.ewma.estimate_us(now_ms) }
            };
            let draw = Draw { random, turn: random, session: None, tried: &tried, now: self.now() };
            let Some(pick) = self.plan.pick(draw, load) else {
                self.unplaced += 1;
                return;
            };
            let standing = self.plan.endpoints[pick.endpoint].standing;
            let usable = self.plan.endpoints.iter().any(|endpoint| endpoint.standing == Standing::Usable);
            let panic = self.plan.clusters.iter().any(|cluster| cluster.panic);
            assert!(standing == Standing::Usable || !usable || panic, "an unfit endpoint was picked beside a fit one");
            let at = self.index_of(pick.endpoint);
            self.endpoints[at].picked += 1;
            match self.endpoints[at].mood {
                Mood::Killed => {
                    tried.push(self.endpoints[at].key.clone());
                    self.outcome(at, Outcome::Refused);
                }
                Mood::Hung => return self.wait(at, None),
                Mood::Well | Mood::Failing => {
                    let latency_ms = self.endpoints[at].latency_ms;
                    let jitter = self.below(latency_ms / 2 + 1);
                    return self.wait(at, Some(latency_ms + jitter));
                }
            }
        }
        self.failed += 1;
    }

    fn wait(&mut self, endpoint: usize, answer_ms: Option<u64>) {
        let request = self.serial;
        self.endpoints[endpoint].in_flight += 1;
        self.endpoints[endpoint].waiting.insert(request, self.now_ms);
        if let Some(answer_ms) = answer_ms {
            self.at(answer_ms, Event::Answer { endpoint, request });
        }
    }

    fn answer(&mut self, at: usize, request: u64) {
        // What hangs by now, or was sent elsewhere, does not answer any more.
        if self.endpoints[at].mood == Mood::Hung {
            return;
        }
        let now_ms = self.now_ms;
        let Some(began) = self.endpoints[at].waiting.remove(&request) else { return };
        self.endpoints[at].in_flight -= 1;
        let after = Duration::from_millis(now_ms - began);
        match self.endpoints[at].mood {
            Mood::Failing => self.outcome(at, Outcome::GatewayError { after }),
            Mood::Killed => {
                self.outcome(at, Outcome::Failed);
                self.request();
            }
            Mood::Well | Mood::Hung => {
                self.answered += 1;
                self.endpoints[at].ewma = self.endpoints[at].ewma.observe(after, now_ms);
                self.outcome(at, Outcome::Answered { after });
            }
        }
    }

    fn outcome(&mut self, at: usize, outcome: Outcome) {
        let (elsewhere, now) = (self.elsewhere(at), self.now());
        let event = self.endpoints[at].outlier.handle_outcome(outcome, elsewhere, now);
        self.act(at, event);
    }

    fn act(&mut self, at: usize, event: Option<OutlierEvent>) {
        match event {
            None => {}
            Some(OutlierEvent::Probe) => self.at(20, Event::ProbeDone { endpoint: at }),
            Some(OutlierEvent::Ejected(reason)) => {
                self.replan();
                if reason.leaves_waiting() {
                    // Those that wait are sent elsewhere.
                    let waiting = std::mem::take(&mut self.endpoints[at].waiting);
                    self.endpoints[at].in_flight -= u32::try_from(waiting.len()).unwrap();
                    waiting.iter().for_each(|_| self.request());
                }
            }
            Some(OutlierEvent::Restored) => {
                self.endpoints[at].since = Some(self.now());
                self.replan();
            }
        }
    }

    fn tick(&mut self) {
        for at in 0..self.endpoints.len() {
            let (elsewhere, now) = (self.elsewhere(at), self.now());
            let endpoint = &mut self.endpoints[at];
            let timed = endpoint.outlier.handle_timeout(elsewhere, now);
            let oldest = endpoint.waiting.values().min().map(|ms| self.start + Duration::from_millis(*ms));
            let count = endpoint.waiting.len() as u32;
            let hung = oldest.and_then(|oldest| endpoint.outlier.handle_outstanding(count, oldest, now));
            self.act(at, timed);
            self.act(at, hung);
        }
        if self.router.poll_timeout().is_some_and(|due| due <= self.now()) {
            self.replan();
        }
        self.at(50, Event::Tick);
    }

    fn probe_done(&mut self, at: usize) {
        let answered = matches!(self.endpoints[at].mood, Mood::Well | Mood::Failing);
        if !answered && self.endpoints[at].mood == Mood::Hung {
            // It is the timeout that tells.
            return;
        }
        let (elsewhere, now) = (self.elsewhere(at), self.now());
        let event = self.endpoints[at].outlier.handle_probe(answered, elsewhere, now);
        self.act(at, event);
    }

    /// Runs for a while at so many requests a second.
    fn run(&mut self, for_ms: u64, rate: u64) {
        let end = self.now_ms + for_ms;
        self.events.retain(|entry| entry.0.2 != Event::Request);
        self.at(0, Event::Request);
        while self.events.peek().is_some_and(|entry| entry.0.0 <= end) {
            let (at, _, event) = self.events.pop().unwrap().0;
            self.now_ms = at;
            match event {
                Event::Request => {
                    self.request();
                    let pause = 500 / rate + self.below(1_000 / rate);
                    self.at(pause.max(1), Event::Request);
                }
                Event::Answer { endpoint, request } => self.answer(endpoint, request),
                Event::ProbeDone { endpoint } => self.probe_done(endpoint),
                Event::Tick => self.tick(),
            }
        }
        self.now_ms = end;
    }

    fn feel(&mut self, endpoint: usize, mood: Mood) {
        self.endpoints[endpoint].mood = mood;
    }

    fn ready(&mut self, endpoint: usize, ready: bool) {
        let was = std::mem::replace(&mut self.endpoints[endpoint].ready, ready);
        if ready && !was {
            let now = self.now();
            self.endpoints[endpoint].since = Some(now);
            self.endpoints[endpoint].outlier.handle_ready_again(now);
        }
        self.replan();
    }

    /// How many requests each endpoint got while `for_ms` passed.
    fn picked(&mut self, for_ms: u64, rate: u64) -> Vec<u32> {
        self.endpoints.iter_mut().for_each(|endpoint| endpoint.picked = 0);
        self.run(for_ms, rate);
        self.endpoints.iter().map(|endpoint| endpoint.picked).collect()
    }
}

#[test]
fn a_slow_endpoint_gets_less_than_a_tenth() {
    for seed in 0..20 {
        for rate in [20, 100, 500] {
            let mut simulation = Simulation::new(seed, &[4]);
            simulation.endpoints[3].latency_ms = 50;
            simulation.run(2_000, rate);
            let picked = simulation.picked(20_000, rate);
            let all: u32 = picked.iter().sum();
            assert!(picked[3] * 10 < all, "seed {seed}, {rate}/s: {picked:?}");
            assert!(picked[3] > 0, "it is asked now and then: {picked:?}");
        }
    }
}

#[test]
fn a_slow_endpoint_that_recovers_gets_its_part_again() {
    for seed in 0..10 {
        let mut simulation = Simulation::new(seed, &[4]);
        simulation.endpoints[3].latency_ms = 50;
        simulation.run(5_000, 200);
        simulation.endpoints[3].latency_ms = 5;
        simulation.run(30_000, 200);
        let picked = simulation.picked(10_000, 200);
        assert!(picked[3] * 10 > picked.iter().sum::<u32>(), "seed {seed}: {picked:?}");
    }
}

#[test]
fn an_endpoint_without_a_sample_is_neither_starved_nor_flooded() {
    for seed in 0..20 {
        let mut simulation = Simulation::new(seed, &[4]);
        simulation.ready(3, false);
        simulation.run(3_000, 300);
        simulation.ready(3, true);
        let first = simulation.picked(500, 300);
        let all: u32 = first.iter().sum();
        assert!((1..=all / 5).contains(&first[3]), "seed {seed}: {first:?}");
        simulation.run(6_000, 300);
        let later = simulation.picked(5_000, 300);
        let part = f64::from(later[3]) / f64::from(later.iter().sum::<u32>());
        assert!((0.15..0.35).contains(&part), "seed {seed}: {later:?}");
    }
}

#[test]
fn a_hung_endpoint_is_left_within_seven_hundred_milliseconds() {
    for seed in 0..30 {
        let mut simulation = Simulation::new(seed, &[1, 1]);
        simulation.run(2_000, 200);
        simulation.feel(0, Mood::Hung);
        simulation.run(700, 200);
        assert!(simulation.endpoints[0].outlier.is_ejected(), "seed {seed}");
        assert!(simulation.endpoints[0].waiting.is_empty(), "those that waited were sent elsewhere");
        assert_eq!(simulation.picked(1_000, 200)[0], 0);
        simulation.feel(0, Mood::Well);
        simulation.run(8_000, 200);
        let picked = simulation.picked(2_000, 200);
        assert!(picked[0] > 0, "seed {seed}: it has come back: {picked:?}");
    }
}

#[test]
fn a_slow_app_that_makes_progress_is_left_alone() {
    for seed in 0..10 {
        let mut simulation = Simulation::new(seed, &[1, 1]);
        simulation.run(2_000, 200);
        // Two seconds for each answer, from one request to the next.
        simulation.endpoints[0].latency_ms = 2_000;
        simulation.run(10_000, 50);
        assert!(!simulation.endpoints[0].outlier.is_ejected(), "seed {seed}");
    }
}

#[test]
fn when_every_target_hangs_one_stays() {
    for seed in 0..10 {
        let mut simulation = Simulation::new(seed, &[1, 1]);
        simulation.run(2_000, 200);
        simulation.feel(0, Mood::Hung);
        simulation.feel(1, Mood::Hung);
        simulation.run(5_000, 200);
        let ejected = simulation.endpoints.iter().filter(|endpoint| endpoint.outlier.is_ejected()).count();
        assert!(ejected < 2, "seed {seed}: somebody must be asked");
        assert_eq!(simulation.unplaced, 0);
    }
}

#[test]
fn traffic_begins_to_return_within_a_second_and_not_as_a_herd() {
    for seed in 0..20 {
        let mut simulation = Simulation::new(seed, &[2, 2]);
        simulation.run(1_000, 400);
        simulation.ready(0, false);
        simulation.ready(1, false);
        let away = simulation.picked(2_000, 400);
        assert_eq!(away[0] + away[1], 0);
        simulation.ready(0, true);
        simulation.ready(1, true);
        let first = simulation.picked(1_000, 400);
        let (back, all) = (first[0] + first[1], first.iter().sum::<u32>());
        assert!(back > 0 && back * 4 < all, "seed {seed}: {first:?}");
        simulation.run(6_000, 400);
        let all_back = simulation.picked(1_000, 400);
        assert_eq!(all_back[2] + all_back[3], 0, "seed {seed}: {all_back:?}");
    }
}

#[test]
fn whatever_happens_requests_find_a_fit_endpoint_while_there_is_one() {
    for seed in 0..60 {
        let mut simulation = Simulation::new(seed, &[3, 2, 2]);
        for _ in 0..12 {
            let endpoint = simulation.below(7) as usize;
            match simulation.below(6) {
                0 => simulation.feel(endpoint, Mood::Killed),
                1 => simulation.feel(endpoint, Mood::Hung),
                2 => simulation.feel(endpoint, Mood::Failing),
                3 => simulation.ready(endpoint, false),
                4 => simulation.endpoints[endpoint].latency_ms = 200,
                _ => {
                    simulation.feel(endpoint, Mood::Well);
                    simulation.ready(endpoint, true);
                }
            }
            // One is always well: then nobody is turned away.
            simulation.feel(6, Mood::Well);
            simulation.ready(6, true);
            let for_ms = 200 + simulation.below(2_000);
            simulation.run(for_ms, 100);
        }
        assert_eq!(simulation.unplaced, 0, "seed {seed}");
        assert!(simulation.answered > 300, "seed {seed}: {}", simulation.answered);
        // Up to three dead ones can be met one after the other before each is known for what it is.
        assert!(simulation.failed * 100 < simulation.answered, "seed {seed}: {}", simulation.failed);
    }
}
