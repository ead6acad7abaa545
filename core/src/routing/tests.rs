#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// `east: a b! c*2 | west@30: d` is the local cluster and one at 30 ms; `!` = not ready, `~` = ejected,
/// `*n` = weight. `?` after a cluster's name = suspect, `-` = down, `%` = draining.
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
        id: name.trim_end_matches(['!', '~']).parse().unwrap(),
        weight: weight.parse().unwrap(),
        ready: !name.contains('!'),
        ejected: name.contains('~'),
    }
}

fn plan(text: &str) -> Plan {
    Router::default().plan(views(text), Instant::now())
}

#[track_caller]
fn check_shares(text: &str, want: &[(&str, f64)]) {
    let plan = plan(text);
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
        let got = plan.pick(random, &tried, |_| 0);
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
        assert_eq!(plan.pick(random, &tried, |_| 0).unwrap().endpoint, 2);
    }
}

#[test]
fn without_usable_endpoints_the_least_bad_is_tried() {
    use PickReason::*;
    check_pick("east: a! | west: b~", &[], Some(("b", LastResort)));
    check_pick("east: a~ | west: b~", &[], Some(("a", LastResort)));
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
        assert_eq!(plan.pick(random, &[], |index| [5, 2][index]).unwrap().endpoint, 1);
    }
    let weighted = self::plan("east: a*3 b");
    for random in 0..100 {
        // 6 requests on weight 3 are less than 3 on weight 1.
        assert_eq!(weighted.pick(random, &[], |index| [6, 3][index]).unwrap().endpoint, 0);
    }
}

#[test]
fn picks_follow_the_shares() {
    let plan = plan("east: a b! | west: c");
    let local = (0..10_000).filter(|random| {
        let pick = plan.pick(*random, &[], |_| 0).unwrap();
        plan.endpoints[pick.endpoint].key.cluster.as_str() == "east"
    });
    let local = local.count();
    assert!((6_800..7_200).contains(&local), "{local}");
}

#[test]
fn traffic_returns_after_the_hold_but_at_once_where_nothing_else_is() {
    let start = Instant::now();
    let mut router = Router::default();
    let mut local = |text: &str, at: u64| {
        let plan = router.plan(views(text), start + Duration::from_millis(at));
        plan.clusters[0].share
    };
    assert_eq!(local("east: a | west: b", 0), 1.0);
    assert_eq!(local("east: a~ | west: b", 100), 0.0);
    assert_eq!(local("east: a | west: b", 200), 0.0);
    assert_eq!(local("east: a | west: b!", 300), 1.0);
    assert_eq!(local("east: a | west: b", 3200), 1.0);
}

#[test]
fn small_changes_of_rtt_do_not_reorder() {
    let start = Instant::now();
    let mut router = Router::default();
    let mut nearest = |text: &str| {
        let plan = router.plan(views(text), start);
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
                ejected,
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
        let plan = Router::default().plan(views, Instant::now());
        let usable = plan.endpoints.iter().any(|endpoint| endpoint.standing == Standing::Usable);
        let sum: f64 = plan.clusters.iter().map(|cluster| cluster.share).sum();
        let want = f64::from(u8::from(usable));
        prop_assert!((sum - want).abs() < 1e-9);
        let pick = plan.pick(random, &[], |_| 0);
        prop_assert_eq!(pick.is_some(), !plan.endpoints.is_empty());
        if let Some(pick) = pick {
            prop_assert_eq!(plan.endpoints[pick.endpoint].standing == Standing::Usable, usable);
        }
    }

    #[test]
    fn the_order_of_arrival_makes_no_difference(views in any_views(), random: u64, turn in 0_usize..5) {
        let now = Instant::now();
        let mut turned = views.clone();
        let by = turn % turned.len();
        turned.rotate_left(by);
        turned.iter_mut().for_each(|view| view.endpoints.reverse());
        let (plan, turned) = (Router::default().plan(views, now), Router::default().plan(turned, now));
        prop_assert_eq!(plan.pick(random, &[], |_| 0), turned.pick(random, &[], |_| 0));
        prop_assert_eq!(plan, turned);
    }

    #[test]
    fn more_ready_endpoints_never_lower_a_share(views in any_views(), which in 0_usize..5) {
        let now = Instant::now();
        let before = Router::default().plan(views.clone(), now);
        let mut better = views;
        if let Some(endpoint) = better[0].endpoints.get_mut(which) {
            (endpoint.ready, endpoint.ejected) = (true, false);
        }
        let after = Router::default().plan(better, now);
        prop_assert!(after.clusters[0].share >= before.clusters[0].share - 1e-9);
    }

    #[test]
    fn a_retry_never_meets_a_tried_endpoint_while_another_is_usable(views in any_views(), randoms: [u64; 6]) {
        let plan = Router::default().plan(views, Instant::now());
        let usable = plan.endpoints.iter().filter(|endpoint| endpoint.standing == Standing::Usable).count();
        let mut tried = Vec::new();
        for random in randoms.into_iter().take(usable) {
            let pick = plan.pick(random, &tried, |_| 0).unwrap();
            let key = &plan.endpoints[pick.endpoint].key;
            prop_assert!(!tried.contains(key));
            tried.push(key.clone());
        }
    }
}
