#![allow(clippy::unwrap_used)]
use super::super::Kind;
use super::super::matching::OwnedHead;
use super::super::route::{Filters, HeaderChange, Parent};
use super::*;
use jiff::Timestamp;

fn backend(service: &str) -> Backend {
    Backend {
        service: format!("shop/{service}").parse().unwrap(),
        port: None,
        cluster: None,
        weight: 1,
        request_headers: HeaderChange::default(),
        response_headers: HeaderChange::default(),
    }
}

/// A route of `namespace/name` for shop/web, made at second `age`; each rule is a JSON list of matches and goes to
/// a backend of the rule's name.
fn route(kind: Kind, name: &str, age: i64, rules: &[(&str, &str)]) -> Arc<Route> {
    let (namespace, name) = name.split_once('/').unwrap();
    let matches = |text: &str| match kind {
        Kind::HttpRoute => {
            serde_json::from_str::<Vec<HttpMatch>>(text).unwrap().into_iter().map(RequestMatch::Http).collect()
        }
        _ => serde_json::from_str::<Vec<_>>(text).unwrap().into_iter().map(RequestMatch::Grpc).collect(),
    };
    let rule =
        |(to, text): &(&str, &str)| Rule { matches: matches(text), backends: vec![backend(to)], ..Rule::default() };
    Arc::new(Route {
        resource: Resource::new(kind, namespace.parse().unwrap(), name).unwrap(),
        created: Timestamp::from_second(age).unwrap(),
        parents: vec![Parent { service: "shop/web".parse().unwrap(), port: None }],
        rules: rules.iter().map(rule).collect(),
    })
}

fn http(name: &str, age: i64, rules: &[(&str, &str)]) -> Arc<Route> {
    route(Kind::HttpRoute, name, age, rules)
}

fn table(routes: &[Arc<Route>], caller: &str) -> RouteTable {
    RouteTable::new(routes, &"shop/web".parse().unwrap(), 80, &caller.parse().unwrap())
}

fn get(target: &str) -> OwnedHead {
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query.to_owned())));
    let headers = vec![("a".into(), "1".into()), ("b".into(), "2".into())];
    OwnedHead { method: "GET".into(), path: path.into(), query, headers }
}

/// The backend that a request goes to, "404", or "unrouted".
fn goes_to(table: &RouteTable, head: &OwnedHead) -> String {
    match table.pick(head, 0) {
        Decision::Unrouted => "unrouted".into(),
        Decision::NoMatch => "404".into(),
        Decision::Taken(taken) => match taken.action {
            Action::Forward(backend) => backend.service.name().into(),
            Action::Redirect(_) => "redirect".into(),
            Action::NoBackend => "500".into(),
        },
    }
}

/// The Gateway API's written precedence, criterion by criterion: the first of each pair wins, in whatever order
/// the rules and the routes are written.
#[test]
fn precedence_of_http_matches() {
    let p = |kind: &str, value: &str| format!(r#""path": {{"type": "{kind}", "value": "{value}"}}"#);
    let prefix = p("PathPrefix", "/a/b");
    for (winner, loser, why) in [
        (p("Exact", "/a/b"), p("PathPrefix", "/a/b"), "exact before prefix"),
        (p("Exact", "/a/b"), p("RegularExpression", "/a/b|/much/longer/than/the/exact/one"), "exact before regex"),
        (p("RegularExpression", "/a/.*"), p("PathPrefix", "/a/b"), "regex before prefix"),
        (p("PathPrefix", "/a/b"), p("PathPrefix", "/a"), "longest prefix"),
        (p("PathPrefix", "/a/b"), format!(r#"{}, "method": "GET""#, p("PathPrefix", "/a")), "prefix before method"),
        (
            format!(r#"{prefix}, "method": "GET""#),
            format!(r#"{prefix}, "headers": [{{"name": "a", "value": "1"}}, {{"name": "b", "value": "2"}}]"#),
            "method before headers",
        ),
        (
            format!(r#"{prefix}, "headers": [{{"name": "a", "value": "1"}}, {{"name": "b", "value": "2"}}]"#),
            format!(r#"{prefix}, "headers": [{{"name": "a", "value": "1"}}]"#),
            "most headers",
        ),
        (
            format!(r#"{prefix}, "headers": [{{"name": "a", "value": "1"}}]"#),
            format!(r#"{prefix}, "queryParams": [{{"name": "q", "value": "1"}}, {{"name": "r", "value": "1"}}]"#),
            "headers before query",
        ),
        (
            format!(r#"{prefix}, "queryParams": [{{"name": "q", "value": "1"}}, {{"name": "r", "value": "1"}}]"#),
            format!(r#"{prefix}, "queryParams": [{{"name": "q", "value": "1"}}]"#),
            "most query parameters",
        ),
    ] {
        let (winner, loser) = (format!("[{{{winner}}}]"), format!("[{{{loser}}}]"));
        let head = get("/a/b?q=1&r=1");
        for rules in [[("win", winner.as_str()), ("lose", &loser)], [("lose", &loser), ("win", winner.as_str())]] {
            assert_eq!(goes_to(&table(&[http("shop/r", 1, &rules)], "shop"), &head), "win", "{why}, one route");
            // Also across routes, though the loser's be the older one.
            let routes = [http("shop/r", 9, &[("win", &winner)]), http("shop/a", 1, &[("lose", &loser)])];
            assert_eq!(goes_to(&table(&routes, "shop"), &head), "win", "{why}, two routes");
        }
    }
}

#[test]
fn ties_go_to_the_oldest_then_the_first_name_then_the_first_rule() {
    let all = "[{}]";
    for (routes, want) in [
        (vec![http("shop/a", 2, &[("new", all)]), http("shop/z", 1, &[("old", all)])], "old"),
        (vec![http("shop/b", 1, &[("second", all)]), http("shop/a", 1, &[("first", all)])], "first"),
        (vec![http("shop/a", 1, &[("one", all), ("two", all)])], "one"),
        // A rule without a match is one that matches every path.
        (vec![http("shop/a", 1, &[("one", "[]"), ("two", all)])], "one"),
        (vec![http("shop/a", 1, &[("one", "[]"), ("two", r#"[{"path": {"value": "/x"}}]"#)])], "two"),
    ] {
        assert_eq!(goes_to(&table(&routes, "shop"), &get("/x")), want);
    }
}

#[test]
fn precedence_of_grpc_matches() {
    let head = OwnedHead { method: "POST".into(), ..get("/shop.Cart/Add") };
    let exact = r#"[{"method": {"service": "shop.Cart", "method": "Add"}}]"#;
    let service = r#"[{"method": {"service": "shop.Cart"}}]"#;
    let method = r#"[{"method": {"method": "Add"}}]"#;
    let header = r#"[{"method": {"service": "shop.Cart"}, "headers": [{"name": "a", "value": "1"}]}]"#;
    for (winner, loser) in [(exact, service), (service, method), (exact, header), (header, service), (method, "[{}]")] {
        let rules = [("lose", loser), ("win", winner)];
        assert_eq!(goes_to(&table(&[route(Kind::GrpcRoute, "shop/r", 1, &rules)], "shop"), &head), "win", "{winner}");
    }
}

#[test]
fn who_a_route_speaks_of() {
    let all = "[{}]";
    let (own, consumers) = (http("shop/own", 1, &[("own", all)]), http("front/theirs", 9, &[("theirs", all)]));
    let mut far = (*http("shop/far", 1, &[("far", all)])).clone();
    far.resource.cluster = Some("west".parse().unwrap());
    let far = Arc::new(far);
    let grpc = route(Kind::GrpcRoute, "shop/grpc", 5, &[("grpc", all)]);
    for (routes, caller, want) in [
        (vec![], "shop", "unrouted"),
        (vec![consumers.clone()], "shop", "unrouted"),
        (vec![consumers.clone()], "front", "theirs"),
        (vec![own.clone(), consumers.clone()], "front", "theirs"),
        (vec![own.clone(), consumers.clone()], "shop", "own"),
        (vec![far.clone(), own.clone()], "shop", "own"),
        (vec![far.clone()], "shop", "far"),
        (vec![own.clone(), grpc.clone()], "shop", "own"),
        (vec![http("shop/x", 1, &[("x", r#"[{"path": {"value": "/x"}}]"#)])], "shop", "404"),
    ] {
        assert_eq!(goes_to(&table(&routes, caller), &get("/")), want, "{caller}: {routes:?}");
    }
    let only_81 =
        Route { parents: vec![Parent { service: "shop/web".parse().unwrap(), port: Some(81) }], ..(*own).clone() };
    assert_eq!(goes_to(&table(&[Arc::new(only_81)], "shop"), &get("/")), "unrouted");
}

#[test]
fn every_rule_is_explained() {
    let rules = [("cart", r#"[{"path": {"value": "/cart"}}]"#), ("post", r#"[{"method": "POST"}]"#), ("rest", "[{}]")];
    let routes = [http("shop/web", 1, &rules), http("shop/other", 2, &[("other", "[{}]")]), http("front/x", 1, &[])];
    let table = table(&routes, "shop");
    let explained: Vec<String> = table
        .explain(&get("/cart"))
        .iter()
        .map(|one| format!("{} {:?} {}", one.resource, one.rule.map(|(index, _)| index), one.verdict))
        .collect();
    assert_eq!(
        explained,
        [
            "HTTPRoute shop/web Some(0) taken",
            "HTTPRoute shop/web Some(1) the method is not POST",
            "HTTPRoute shop/web Some(2) a rule before it matches too (more specific, older, or written first)",
            "HTTPRoute shop/other Some(0) a rule before it matches too (more specific, older, or written first)",
            "HTTPRoute front/x None it is for another port, or for callers of its own namespace",
        ]
    );
}

#[test]
fn a_published_route_stays_in_its_cluster() {
    let west = "west".parse().unwrap();
    let published = http("shop/web", 1, &[("v2", "[{}]")]).published(&west).unwrap();
    assert_eq!(published.resource.to_string(), "HTTPRoute shop/web of cluster west");
    assert_eq!(published.rules[0].backends[0].cluster, Some(west.clone()));
    let mut abroad = (*http("shop/web", 1, &[("v2", "[{}]")])).clone();
    abroad.rules[0].backends[0].cluster = Some("north".parse().unwrap());
    assert_eq!(abroad.published(&west), None);
}

#[test]
fn what_crosses_the_wire_is_the_same_route() {
    let rules =
        [("a", r#"[{"path": {"type": "RegularExpression", "value": "/v[0-9]"}, "method": "GET"}]"#), ("b", "[]")];
    for route in [
        http("shop/web", 1, &rules),
        route(Kind::GrpcRoute, "shop/g", 1, &[("a", r#"[{"method": {"service": "x"}}]"#)]),
    ] {
        let mut route = (*route).clone();
        route.rules[0].filters = Filters { mirrors: vec![], ..Filters::default() };
        let json = serde_json::to_string(&route).unwrap();
        assert_eq!(serde_json::from_str::<Route>(&json).unwrap(), route);
        // A field of a newer release is skipped.
        let newer = json.replacen('{', r#"{"aFieldOfALaterRelease": 1, "#, 1);
        assert_eq!(serde_json::from_str::<Route>(&newer).unwrap(), route);
    }
}

#[test]
fn every_backend_of_the_taken_rule_is_explained() {
    let mut shop = (*http("shop/web", 0, &[("web", "[]")])).clone();
    let weighed = |service, weight| Backend { weight, ..backend(service) };
    shop.rules[0].backends = vec![weighed("dark", 0), weighed("web", 3), weighed("canary", 1)];
    let table = table(&[Arc::new(shop)], "shop");
    let said = |draw| {
        let Decision::Taken(taken) = table.pick(&get("/"), draw) else { panic!("not taken") };
        let line = |(backend, why): (&Backend, BackendVerdict)| format!("{}: {why}", backend.service.name());
        taken.backends().into_iter().map(line).collect::<Vec<_>>()
    };
    let dark = "dark: its weight is 0";
    let [taken, beside] = ["drawn", "another is drawn"];
    assert_eq!(
        said(0),
        [
            dark,
            &format!("web: {taken}: 75.0 % of the rule's requests"),
            &format!("canary: {beside}: 25.0 % of the rule's requests")
        ]
    );
    assert_eq!(
        said(3),
        [
            dark,
            &format!("web: {beside}: 75.0 % of the rule's requests"),
            &format!("canary: {taken}: 25.0 % of the rule's requests")
        ]
    );
    let table = self::table(&[http("shop/web", 0, &[("web", "[]")])], "shop");
    let Decision::Taken(taken) = table.pick(&get("/"), 9) else { panic!("not taken") };
    assert_eq!(taken.backends()[0].1.to_string(), "all of the rule's requests");
}
