#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// `east: a b! c*2 | west@30: d` is the local cluster and one at 30 ms; `!` = not ready, `~` = ejected,
/// `^` = the same because it refused, `*n` = weight. `?` after a cluster's name = suspect, `-` = down, `%` = draining.
fn views(text: &str) -> Vec<ClusterView> {
    let cluster = |(place, text): (usize, &str)| {
        let (head, endpoints) = text.split_once(':').unwrap();
        let (name, rtt) = match head.trim().split_once('@') {
            Some((name, rtt)) => (name, Some(Duration::from_millis(rtt.parse().unwrap()))),
            None => (head.trim(), None),
        };
        let reach = match name.chars().last().unwrap() {
            '?' => ClusterReach::Suspect,
            '-' => ClusterReach::Down,
            _ => ClusterReach::Up,
        };
        let freshness = if name.ends_with('%') { Freshness::Draining } else { Freshness::Fresh };
        ClusterView {
            cluster: name.trim_end_matches(['?', '-', '%']).parse().unwrap(),
            origin: if place == 0 { Origin::Local } else { Origin::Remote },
            freshness,
            reach,
            rtt,
            endpoints: endpoints.split_whitespace().map(endpoint).collect(),
        }
    };
    text.split('|').enumerate().map(cluster).collect()
}

fn endpoint(text: &str) -> EndpointView {
    let (name, weight) = text.split_once('*').unwrap_or((text, "1"));
    EndpointView {
        id: name.trim_end_matches(['!', '~', '^']).parse().unwrap(),
        weight: weight.parse().unwrap(),
        ready: !name.contains('!'),
        ejected: match name.chars().last().unwrap() {
            '~' => Some(EjectReason::GatewayErrors),
            '^' => Some(EjectReason::Refused),
            _ => None,
        },
        near: false,
        since: None,
    }
}

fn default_plan(router: &mut Router, views: Vec<ClusterView>, now: Instant) -> Plan {
    router.plan(views, &Preferences::default(), now)
}

fn draw(random: u64, tried: &[EndpointKey]) -> Draw<'_> {
    Draw { random, turn: random, session: None, tried, now: Instant::now() }
}

fn busy(in_flight: u32) -> Load {
    Load { in_flight, latency_us: None }
}

fn idle(_: usize) -> Load {
    Load::default()
}

fn plan(text: &str) -> Plan {
    default_plan(&mut Router::default(), views(text), Instant::now())
}

fn preferring(text: &str, preferences: &Preferences) -> Plan {
    Router::default().plan(views(text), preferences, Instant::now())
}

#[track_caller]
fn check_shares(text: &str, want: &[(&str, f64)]) {
    check_preferred(text, &Preferences::default(), want);
}

#[track_caller]
fn check_preferred(text: &str, preferences: &Preferences, want: &[(&str, f64)]) {
    let plan = preferring(text, preferences);
    let got: Vec<_> = plan.clusters.iter().map(|cluster| (cluster.cluster.as_str(), cluster.share)).collect();
    assert_eq!(got.len(), want.len(), "{got:?}");
    for (got, want) in got.iter().zip(want) {
        assert!(got.0 == want.0 && (got.1 - want.1).abs() < 1e-9, "{text}: {got:?}, not {want:?}");
    }
}

#[test]
fn shares_follow_healthy_capacity() {
    check_shares("east: a", &[("east", 1.0)]);
    check_shares("east: a | west: b", &[("east", 1.0), ("west", 0.0)]);
    check_shares("east: a b c d! | west: e", &[("east", 1.0), ("west", 0.0)]);
    check_shares("east: a b! | west: c", &[("east", 0.7), ("west", 0.3)]);
    check_shares("east: a b~ | west: c", &[("east", 0.7), ("west", 0.3)]);
    check_shares("east: a*3 b!*7 | west: c", &[("east", 0.42), ("west", 0.58)]);
    check_shares("east: a! | west: b", &[("east", 0.0), ("west", 1.0)]);
    check_shares("east: | west: b", &[("east", 0.0), ("west", 1.0)]);
    // One that is all there is keeps everything, however weak.
    check_shares("east: a b! c! d! | west: e!", &[("east", 1.0), ("west", 0.0)]);
    // All weak: overloaded in proportion.
    check_shares("east: a b! c! d! | west: e f! g! h!", &[("east", 0.5), ("west", 0.5)]);
    check_shares("east: a! | west: b!", &[("east", 0.0), ("west", 0.0)]);
}

#[test]
fn remote_clusters_are_ranked_by_distance_then_name() {
    check_shares("east: a! | far@80: b | near@20: c", &[("east", 0.0), ("near", 1.0), ("far", 0.0)]);
    check_shares("east: a! | west: b | north@90: c", &[("east", 0.0), ("north", 1.0), ("west", 0.0)]);
    check_shares("east: a! | west: b | north: c", &[("east", 0.0), ("north", 1.0), ("west", 0.0)]);
    check_shares("east: a! | near@20: c d! | far@80: b", &[("east", 0.0), ("near", 0.7), ("far", 0.3)]);
}

#[test]
fn unreachable_and_draining_clusters_get_nothing() {
    for mark in ["?", "-", "%"] {
        check_shares(
            &format!("east: a! | near{mark}@1: b | west@9: c"),
            &[("east", 0.0), ("near", 0.0), ("west", 1.0)],
        );
    }
}

#[track_caller]
fn check_pick(text: &str, tried: &[&str], want: Option<(&str, PickReason)>) {
    let plan = plan(text);
    let tried = plan.endpoints.iter().map(|e| &e.key).filter(|key| tried.contains(&key.endpoint.as_str()));
    let tried: Vec<_> = tried.cloned().collect();
    for random in 0..50 {
        let got = plan.pick(draw(random, &tried), idle);
        let got = got.map(|pick| (plan.endpoints[pick.endpoint].key.endpoint.as_str(), pick.reason));
        assert_eq!(got, want, "{text} {tried:?}");
    }
}

#[test]
fn retries_meet_what_was_not_tried_yet() {
    use PickReason::*;
    check_pick("east: a | west: b", &[], Some(("a", Share)));
    check_pick("east: a | west: b", &["a"], Some(("b", Failover)));
    check_pick("east: a | west: b", &["a", "b"], Some(("a", Again)));
    check_pick("east: a b | west: c", &["a"], Some(("b", Share)));
    // Drawn by its share or reached because the local one was tried: either way the other one.
    let plan = plan("east: a b! | west: c");
    let tried = [plan.endpoints[0].key.clone()];
    for random in 0..50 {
        assert_eq!(plan.pick(draw(random, &tried), idle).unwrap().endpoint, 2);
    }
}

#[test]
fn without_usable_endpoints_the_least_bad_is_tried() {
    use PickReason::*;
    check_pick("east: a! | west: b~", &[], Some(("b", LastResort)));
    check_pick("east: a~ | west: b~", &[], Some(("a", LastResort)));
    check_pick("east: a^ | west: b~", &[], Some(("b", LastResort)));
    check_pick("east: a~ | west: b~", &["a"], Some(("b", LastResort)));
    check_pick("east: a! | west?: b", &[], Some(("b", LastResort)));
    check_pick("east: a! | west-: b", &[], Some(("b", LastResort)));
    check_pick("east: a! | west: b!", &[], Some(("a", LastResort)));
    check_pick("east: a! | west: b!", &["a", "b"], Some(("a", LastResort)));
    check_pick("east: | west:", &[], None);
}

#[test]
fn the_less_loaded_of_two_is_picked() {
    let plan = plan("east: a b");
    for random in 0..100 {
        assert_eq!(plan.pick(draw(random, &[]), |index| busy([5, 2][index])).unwrap().endpoint, 1);
    }
    let weighted = self::plan("east: a*3 b");
    for random in 0..100 {
        // 6 requests on weight 3 are less than 3 on weight 1.
        assert_eq!(weighted.pick(draw(random, &[]), |index| busy([6, 3][index])).unwrap().endpoint, 0);
    }
}

#[test]
fn picks_follow_the_shares() {
    let plan = plan("east: a b! | west: c");
    let local = (0..10_000).filter(|random| {
        let pick = plan.pick(draw(*random, &[]), idle).unwrap();
        plan.endpoints[pick.endpoint].key.cluster.as_str() == "east"
    });
    let local = local.count();
    assert!((6_800..7_200).contains(&local), "{local}");
}

#[test]
fn traffic_returns_in_steps_but_at_once_where_nothing_else_is() {
    let start = Instant::now();
    let mut router = Router::default();
    let mut local = |text: &str, at: u64| {
        let plan = default_plan(&mut router, views(text), start + Duration::from_millis(at));
        (plan.clusters[0].share * 10.0).round() as u32
    };
    assert_eq!(local("east: a | west: b", 0), 10);
    assert_eq!(local("east: a~ | west: b", 100), 0);
    assert_eq!(local("east: a | west: b", 200), 0);
    assert_eq!(local("east: a | west: b", 699), 0);
    assert_eq!(local("east: a | west: b", 700), 1);
    assert_eq!(local("east: a | west: b", 1_200), 2);
    // What is healthy is used before anybody is overloaded, even if it was to come back slowly.
    assert_eq!(local("east: a | west: b c! d!", 1_300), 5);
    assert_eq!(local("east: a | west: b! c! d!", 1_400), 10);
    // Both return: then the nearer one first.
    assert_eq!(local("east: a | west: b c d", 1_500), 10);
}

fn names(names: &[&str]) -> Vec<ClusterId> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

#[test]
fn an_explicit_order_goes_before_nearness() {
    let order = |order: &[&str]| Preferences { order: names(order), ..Preferences::default() };
    let text = "east: a | near@20: b | far@80: c";
    check_preferred(text, &order(&["far"]), &[("far", 1.0), ("east", 0.0), ("near", 0.0)]);
    check_preferred(text, &order(&["near", "far", "east"]), &[("near", 1.0), ("far", 0.0), ("east", 0.0)]);
    let text = "east: a | near@20: b | far@80: c d!";
    check_preferred(text, &order(&["gone", "far"]), &[("far", 0.7), ("east", 0.3), ("near", 0.0)]);
}

#[test]
fn weights_split_and_what_can_not_be_carried_goes_elsewhere() {
    let weights = |weights: &[(&str, u32)], failover| Preferences {
        weights: weights.iter().map(|(name, weight)| (name.parse().unwrap(), *weight)).collect(),
        failover,
        ..Preferences::default()
    };
    let canary = weights(&[("east", 90), ("west", 10)], Failover::Auto);
    check_preferred("east: a | west@9: b", &canary, &[("east", 0.9), ("west", 0.1)]);
    check_preferred("east: a | west@9: b!", &canary, &[("east", 1.0), ("west", 0.0)]);
    check_preferred("east: a b! | west@9: b | z@20: c", &canary, &[("east", 0.7), ("west", 0.3), ("z", 0.0)]);
    check_preferred("east: a! | west@9: b! | z@20: c", &canary, &[("east", 0.0), ("west", 0.0), ("z", 1.0)]);
    let pinned = weights(&[("east", 1), ("west", 1)], Failover::None);
    check_preferred("east: a! | west@9: b c d! e! | z@20: c", &pinned, &[("east", 0.0), ("west", 1.0), ("z", 0.0)]);
    check_preferred("east: a! | west@9: b! | z@20: c", &pinned, &[("east", 0.0), ("west", 0.0), ("z", 0.0)]);
}

#[test]
fn without_failover_nothing_leaves_the_first_cluster() {
    let pinned = Preferences { failover: Failover::None, ..Preferences::default() };
    check_preferred("east: a b! c! d! | west: e", &pinned, &[("east", 1.0), ("west", 0.0)]);
    let plan = preferring("east: a! b~ | west: e", &pinned);
    for random in 0..20 {
        let pick = plan.pick(draw(random, &[]), idle).unwrap();
        assert_eq!((pick.endpoint, pick.reason), (1, PickReason::LastResort));
        let tried: Vec<_> = plan.endpoints[..2].iter().map(|endpoint| endpoint.key.clone()).collect();
        assert!(plan.pick(draw(random, &tried), idle).unwrap().endpoint < 2);
    }
    assert_eq!(plan.endpoints[2].standing, Standing::Excluded);
}

#[track_caller]
fn check_panic(text: &str, threshold: f64, want: &[&str]) {
    let plan = preferring(text, &Preferences { panic_threshold: threshold, ..Preferences::default() });
    let picked = (0..200).map(|random| plan.pick(draw(random, &[]), idle).unwrap().endpoint);
    let picked: std::collections::BTreeSet<_> = picked.map(|at| plan.endpoints[at].key.endpoint.as_str()).collect();
    assert_eq!(picked.into_iter().collect::<Vec<_>>(), want, "{text}");
}

#[test]
fn in_panic_ejected_endpoints_are_asked_unless_another_cluster_has_a_fit_one() {
    check_panic("east: a b~ c~ d!", 0.5, &["a", "b", "c"]);
    check_panic("east: a b~ c~ d!", 0.3, &["a"]);
    check_panic("east: a b~ c~ d!", 0.0, &["a"]);
    check_panic("east: a b~", 0.5, &["a"]);
    check_panic("east: a b~ c~ | west: e!", 0.5, &["a", "b", "c"]);
    check_panic("east: a b~ c~ | west: e", 0.5, &["a", "e"]);
    check_panic("east: a b^ c^ d~", 0.5, &["a", "d"]);
    check_panic("east: a b^ c^", 0.5, &["a"]);
    check_panic("east: a~ b~ | west: e f~ g~", 0.5, &["e", "f", "g"]);
}

#[test]
fn the_callers_zone_comes_first_as_far_as_it_is_healthy() {
    let zoned = Preferences { zone_first: true, ..Preferences::default() };
    let part = |text: &str, preferences: &Preferences| {
        let mut views = views(text);
        views[0].endpoints.iter_mut().for_each(|endpoint| endpoint.near = endpoint.id.as_str().starts_with('n'));
        let plan = Router::default().plan(views, preferences, Instant::now());
        let near = |random: &u64| {
            let pick = plan.pick(draw(*random, &[]), idle).unwrap();
            plan.endpoints[pick.endpoint].key.endpoint.as_str().starts_with('n')
        };
        (0..1_000).filter(near).count()
    };
    assert_eq!(part("east: n1 n2 x y", &zoned), 1_000);
    assert!((450..550).contains(&part("east: n1 n2 x y", &Preferences::default())));
    // Half of the zone is healthy: 70 % by preference, and a third of the rest.
    assert!((770..830).contains(&part("east: n1 n2! x y", &zoned)));
    assert_eq!(part("east: n1! n2! x y", &zoned), 0);
    assert_eq!(part("east: x y", &zoned), 0);
}

#[test]
fn each_in_turn_as_often_as_its_weight_says() {
    let plan = preferring("east: a b*3 c", &Preferences { balance: Balance::RoundRobin, ..Preferences::default() });
    let picked: Vec<usize> = (0..500).map(|turn| plan.pick(draw(turn, &[]), idle).unwrap().endpoint).collect();
    for round in picked.chunks(5) {
        let times = [0, 1, 2].map(|index| round.iter().filter(|picked| **picked == index).count());
        assert_eq!(times, [1, 3, 1], "{round:?}");
    }
    assert!(picked.windows(3).all(|three| three != [1, 1, 1]), "turns are spread");
}

fn of_sessions(text: &str) -> Vec<String> {
    let plan = preferring(text, &Preferences { balance: Balance::ConsistentHash, ..Preferences::default() });
    let of = |number: u64| {
        let session = Some(session(format!("user-{number}").as_bytes()));
        let pick = |random| plan.pick(Draw { session, ..draw(random, &[]) }, |index| busy(index as u32)).unwrap();
        let (one, other) = (pick(number), pick(number + 77));
        assert_eq!(one, other, "neither chance nor load moves a session");
        assert_eq!(one.reason, PickReason::Session);
        plan.endpoints[one.endpoint].key.endpoint.to_string()
    };
    (0..2_000).map(of).collect()
}

#[test]
fn sessions_stay_where_they_are_when_others_come_and_go() {
    let four = of_sessions("east: a b c d");
    let count = |name: &str| four.iter().filter(|of| *of == name).count();
    for name in ["a", "b", "c", "d"] {
        assert!((430..570).contains(&count(name)), "{name}: {}", count(name));
    }
    let three = of_sessions("east: a b c d!");
    assert!(four.iter().zip(&three).all(|(before, after)| before == after || before == "d"));
    let five = of_sessions("east: a b c d e");
    assert!(four.iter().zip(&five).all(|(before, after)| before == after || after == "e"));
    let heavy = of_sessions("east: a*3 b").iter().filter(|of| *of == "a").count();
    assert!((1_420..1_580).contains(&heavy), "{heavy}");
    // A share that falls moves only the sessions of its cluster that it no longer has room for.
    let spilled = of_sessions("east: a b c! d! | west: e");
    let kept = spilled.iter().filter(|of| *of != "e").count();
    assert!((1_330..1_470).contains(&kept), "{kept}");
    assert!(
        four.iter().zip(&spilled).all(|(before, after)| before == after || after == "e" || "cd".contains(&**before))
    );
}

#[test]
fn requests_without_a_session_are_balanced() {
    let plan = preferring("east: a b", &Preferences { balance: Balance::ConsistentHash, ..Preferences::default() });
    for random in 0..50 {
        let pick = plan.pick(draw(random, &[]), |index| busy([5, 2][index])).unwrap();
        assert_eq!((pick.endpoint, pick.reason), (1, PickReason::Share));
    }
}

#[test]
fn a_new_endpoint_starts_slowly() {
    for balance in [Balance::LeastRequest, Balance::RoundRobin] {
        let start = Instant::now();
        let preferences = Preferences { balance, slow_start: Duration::from_secs(10), ..Preferences::default() };
        let mut views = views("east: a b c d");
        views[0].endpoints[3].since = Some(start);
        let plan = Router::default().plan(views, &preferences, start);
        let part = |age_s| {
            let now = start + Duration::from_secs(age_s);
            let pick = |random| plan.pick(Draw { now, ..draw(random, &[]) }, idle).unwrap().endpoint;
            (0..40_000).filter(|random| pick(*random) == 3).count()
        };
        for (age_s, want) in [(0, 800..1_200), (5, 4_600..5_400), (9, 8_500..9_500), (10, 9_500..10_500)] {
            let part = part(age_s);
            assert!(want.contains(&part), "{balance:?} after {age_s} s: {part}");
        }
    }
}

#[test]
fn small_changes_of_rtt_do_not_reorder() {
    let start = Instant::now();
    let mut router = Router::default();
    let mut nearest = |text: &str| {
        let plan = default_plan(&mut router, views(text), start);
        plan.clusters[1].cluster.to_string()
    };
    assert_eq!(nearest("east: a! | north@20: b | west@22: c"), "north");
    assert_eq!(nearest("east: a! | north@24: b | west@22: c"), "north");
    assert_eq!(nearest("east: a! | north@60: b | west@22: c"), "west");
}

#[test]
fn an_ejection_needs_somebody_else() {
    let plan = plan("east: a | west: b!");
    assert!(!plan.has_capacity_beside(&plan.endpoints[0].key));
    let plan = self::plan("east: a | west: b");
    assert!(plan.has_capacity_beside(&plan.endpoints[0].key));
}

type AnyCluster = (Vec<(u32, bool, bool)>, ClusterReach, Freshness, Option<u64>);

fn any_views() -> impl Strategy<Value = Vec<ClusterView>> {
    let endpoint = (1_u32..4, any::<bool>(), prop::bool::weighted(0.2));
    let cluster = (
        prop::collection::vec(endpoint, 0..5),
        prop::sample::select(vec![ClusterReach::Up, ClusterReach::Unknown, ClusterReach::Suspect, ClusterReach::Down]),
        prop::sample::select(vec![Freshness::Fresh, Freshness::Stale, Freshness::Draining]),
        prop::option::of(1_u64..100),
    );
    prop::collection::vec(cluster, 1..5).prop_map(|clusters| {
        let view = |(place, (endpoints, reach, freshness, rtt)): (usize, AnyCluster)| {
            let endpoints = endpoints.into_iter().enumerate().map(|(n, (weight, ready, ejected))| EndpointView {
                id: format!("e{place}-{n}").parse().unwrap(),
                weight,
                ready,
                ejected: ejected.then_some(EjectReason::GatewayErrors),
                near: false,
                since: None,
            });
            ClusterView {
                cluster: format!("c{place}").parse().unwrap(),
                origin: if place == 0 { Origin::Local } else { Origin::Remote },
                freshness,
                reach,
                rtt: rtt.map(Duration::from_millis),
                endpoints: endpoints.collect(),
            }
        };
        clusters.into_iter().enumerate().map(view).collect()
    })
}

proptest! {
    #[test]
    fn shares_add_up_and_only_usable_endpoints_are_picked(views in any_views(), random: u64) {
        let plan = default_plan(&mut Router::default(), views, Instant::now());
        let usable = plan.endpoints.iter().any(|endpoint| endpoint.standing == Standing::Usable);
        let sum: f64 = plan.clusters.iter().map(|cluster| cluster.share).sum();
        let want = f64::from(u8::from(usable));
        prop_assert!((sum - want).abs() < 1e-9);
        let pick = plan.pick(draw(random, &[]), idle);
        prop_assert_eq!(pick.is_some(), !plan.endpoints.is_empty());
        if let Some(pick) = pick {
            let picked = &plan.endpoints[pick.endpoint];
            let panic = plan.clusters.iter().any(|cluster| cluster.panic && cluster.cluster == picked.key.cluster);
            let doubtful = panic && picked.standing == Standing::Ejected;
            prop_assert!(picked.standing == Standing::Usable || doubtful || !usable);
            let beside = plan.endpoints.iter().any(|other| {
                other.key.cluster != picked.key.cluster && other.standing == Standing::Usable
            });
            prop_assert!(!(doubtful && beside), "an ejected endpoint although another cluster has a fit one");
        }
    }

    #[test]
    fn the_order_of_arrival_makes_no_difference(views in any_views(), random: u64, turn in 0_usize..5) {
        let now = Instant::now();
        let mut turned = views.clone();
        let by = turn % turned.len();
        turned.rotate_left(by);
        turned.iter_mut().for_each(|view| view.endpoints.reverse());
        let [plan, turned] = [views, turned].map(|views| default_plan(&mut Router::default(), views, now));
        prop_assert_eq!(plan.pick(draw(random, &[]), idle), turned.pick(draw(random, &[]), idle));
        prop_assert_eq!(plan, turned);
    }

    #[test]
    fn more_ready_endpoints_never_lower_a_share(views in any_views(), which in 0_usize..5) {
        let now = Instant::now();
        let before = default_plan(&mut Router::default(), views.clone(), now);
        let mut better = views;
        if let Some(endpoint) = better[0].endpoints.get_mut(which) {
            (endpoint.ready, endpoint.ejected) = (true, None);
        }
        let after = default_plan(&mut Router::default(), better, now);
        prop_assert!(after.clusters[0].share >= before.clusters[0].share - 1e-9);
    }

    #[test]
    fn a_retry_never_meets_a_tried_endpoint_while_another_is_usable(views in any_views(), randoms: [u64; 6]) {
        let plan = default_plan(&mut Router::default(), views, Instant::now());
        let usable = plan.endpoints.iter().filter(|endpoint| endpoint.standing == Standing::Usable).count();
        let mut tried = Vec::new();
        for random in randoms.into_iter().take(usable) {
            let pick = plan.pick(draw(random, &tried), idle).unwrap();
            let key = &plan.endpoints[pick.endpoint].key;
            prop_assert!(!tried.contains(key));
            tried.push(key.clone());
        }
    }
}

/// What `explain` says of each endpoint, after a pick with the draw that is always the same.
#[track_caller]
fn check_explained(plan: &Plan, tried: &[EndpointKey], want: &[(&str, &str)]) {
    let pick = plan.pick(draw(FIRST, tried), idle);
    let said = plan.explain(pick, tried);
    let said: Vec<(String, String)> =
        plan.endpoints.iter().zip(said).map(|(it, said)| (it.key.endpoint.to_string(), said.to_string())).collect();
    let said: Vec<(&str, &str)> = said.iter().map(|(id, said)| (id.as_str(), said.as_str())).collect();
    assert_eq!(said, want);
}

#[test]
fn every_endpoint_has_a_reason() {
    let share = "its cluster by its share, and there the less busy of two, or the one in turn";
    let carried = "its cluster gets nothing: the clusters before it carry everything";
    check_explained(&plan("east: a | west@30: b"), &[], &[("a", share), ("b", carried)]);
    check_explained(
        &plan("east: a! b^ c~ | west@30: d | north?@9: e | south-@9: f | far%@9: g"),
        &[],
        &[
            ("a", "not ready: its own side says so, or no sidecar delivers it"),
            ("b", "ejected: nobody answers there (refused)"),
            ("c", "ejected: requests to it failed (gateway-errors)"),
            ("g", "nothing is heard from its cluster"),
            ("e", "the tunnel to its cluster is silent"),
            ("f", "there is no tunnel to its cluster"),
            ("d", share),
        ],
    );
    let key = EndpointKey { cluster: "east".parse().unwrap(), endpoint: "a".parse().unwrap() };
    let next = "the next cluster: all fit endpoints of the one before were tried";
    check_explained(&plan("east: a | west@30: b"), &[key], &[("a", "tried already"), ("b", next)]);
    check_explained(
        &plan("east: a! | west@30: b^"),
        &[],
        &[
            ("a", "not ready: its own side says so, or no sidecar delivers it"),
            ("b", "no endpoint is fit anywhere, and this is the least bad"),
        ],
    );
}

#[test]
fn weights_and_pins_are_reasons() {
    let weights = [("east".parse().unwrap(), 0), ("west".parse().unwrap(), 1)];
    let preferences = Preferences { weights: weights.into(), ..Preferences::default() };
    let share = "its cluster by its share, and there the less busy of two, or the one in turn";
    let zero = "its cluster gets nothing: its weight is 0";
    check_explained(&preferring("east: a | west@30: b", &preferences), &[], &[("a", zero), ("b", share)]);
    let pinned = Preferences { failover: Failover::None, ..Preferences::default() };
    let kept = "the service's TrafficPolicy keeps its requests out of this cluster";
    check_explained(&preferring("east: a | west@30: b", &pinned), &[], &[("a", share), ("b", kept)]);
}

proptest! {
    /// What is explained as getting requests is what gets them, and nothing else is.
    #[test]
    fn explanations_and_picks_agree(marks in proptest::collection::vec(0_u8..4, 1..7), randoms in proptest::collection::vec(any::<u64>(), 64)) {
        let name = |(n, mark): (usize, &u8)| format!("e{n}{}", ["", "!", "~", "^"][usize::from(*mark)]);
        let text: Vec<String> = marks.iter().enumerate().map(name).collect();
        let (near, far) = text.split_at(text.len() / 2);
        let plan = plan(&format!("east: {} | west@30: {}", near.join(" "), far.join(" ")));
        for random in randoms {
            let pick = plan.pick(draw(random, &[]), idle).unwrap();
            let said = plan.explain(Some(pick), &[]);
            prop_assert_eq!(said[pick.endpoint], Verdict::Picked(pick.reason));
            if pick.reason == PickReason::Share {
                // Whatever another draw would have picked is said to be fit as well.
                let without = plan.explain(None, &[]);
                prop_assert_eq!(without[pick.endpoint], Verdict::Beside(Balance::LeastRequest));
            }
        }
    }
}
