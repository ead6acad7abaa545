#![allow(clippy::unwrap_used)]
use std::sync::Arc;

use super::super::Kind;
use super::*;

/// A policy `shop/<name>` for shop/web.
fn policy(name: &str, spec: &str) -> Arc<AccessPolicy> {
    let spec: AccessSpec = serde_json::from_str(spec).unwrap();
    assert_eq!(spec.check(), Ok(()), "{name}");
    Arc::new(AccessPolicy {
        resource: Resource::new(Kind::AccessPolicy, "shop".parse().unwrap(), name).unwrap(),
        targets: ["shop/web".parse().unwrap()].into(),
        spec,
    })
}

/// Who asks (as `cluster:namespace/account`) for what (`METHOD path`, or empty for a connection of bytes).
fn reason(policies: &[Arc<AccessPolicy>], defaults: &Defaults, who: &str, what: &str) -> (String, Option<String>) {
    let (cluster, account) = who.split_once(':').unwrap();
    let (namespace, account) = account.split_once('/').unwrap();
    let id: SpiffeId = format!("spiffe://{cluster}.tombolo/ns/{namespace}/sa/{account}").parse().unwrap();
    let cluster: ClusterId = cluster.parse().unwrap();
    let http = what.split_once(' ').map(|(method, path)| HttpAsked { method, path });
    let service = "shop/web".parse().unwrap();
    let asked = Asked { service: &service, port: 80, http };
    let verdict = decide(policies, defaults, Client { id: &id, cluster: &cluster }, asked);
    (verdict.reason.to_string(), verdict.audit.map(|audit| audit.to_string()))
}

fn check(policies: &[Arc<AccessPolicy>], cases: &[(&str, &str, &str)]) {
    for (who, what, want) in cases {
        let (got, audit) = reason(policies, &Defaults::default(), who, what);
        assert!(got.starts_with(want), "{who} {what}: {got}");
        assert_eq!(audit, None);
    }
}

#[test]
fn without_a_policy_the_default_decides() {
    check(&[], &[("west:x/y", "GET /", "allowed: no AccessPolicy"), ("west:x/y", "", "allowed: no AccessPolicy")]);
    let deny = |cluster: DefaultAccess, west| Defaults { cluster, peers: [("west".parse().unwrap(), west)].into() };
    use DefaultAccess::{Allow, Deny};
    for (defaults, who, allowed) in [
        (deny(Deny, Allow), "east:a/b", false),
        (deny(Deny, Allow), "west:a/b", true),
        (deny(Allow, Deny), "west:a/b", false),
        (deny(Allow, Deny), "north:a/b", true),
    ] {
        let want = if allowed { "allowed: no" } else { "denied: defaultAccess" };
        assert!(reason(&[], &defaults, who, "GET /").0.starts_with(want), "{defaults:?} {who}");
    }
}

#[test]
fn who_is_selected_by_one_is_denied_to_all_others() {
    let policies = [
        policy("by-account", r#"{"rules": [{"from": [{"serviceAccounts": ["frontend", "ops/probe"]}]}]}"#),
        policy("by-place", r#"{"rules": [{"from": [{"namespaces": ["pay"], "clusters": ["west"]}]}]}"#),
        policy("by-id", r#"{"rules": [{"from": [{"spiffeIds": ["spiffe://*.tombolo/ns/batch-*/sa/*"]}]}]}"#),
    ];
    check(
        &policies,
        &[
            ("east:shop/frontend", "GET /", "allowed by AccessPolicy shop/by-account, rule 0"),
            ("west:shop/frontend", "", "allowed by AccessPolicy shop/by-account"),
            ("east:ops/probe", "GET /", "allowed by AccessPolicy shop/by-account"),
            ("east:ops/frontend", "GET /", "denied: AccessPolicy shop/by-account selects"),
            ("west:pay/x", "GET /", "allowed by AccessPolicy shop/by-place"),
            ("east:pay/x", "GET /", "denied: "),
            ("north:batch-7/job", "GET /", "allowed by AccessPolicy shop/by-id"),
            ("north:batch/job", "GET /", "denied: "),
        ],
    );
    check(&[policy("nobody", "{}")], &[("east:shop/frontend", "GET /", "denied: AccessPolicy shop/nobody selects")]);
}

#[test]
fn what_is_called() {
    let rules = r#"{"rules": [{"to": [{"methods": ["GET"], "paths": ["/", "/cart", "/api/*"]}, {"ports": [9000]}]}]}"#;
    check(
        &[policy("p", rules)],
        &[
            ("east:a/b", "GET /", "allowed"),
            ("east:a/b", "GET /cart", "allowed"),
            ("east:a/b", "GET /cart/", "denied"),
            ("east:a/b", "POST /cart", "denied"),
            ("east:a/b", "GET /api/x/y", "allowed"),
            // What an application might read as another path lets nobody in.
            ("east:a/b", "GET /api/../admin", "denied"),
            ("east:a/b", "GET /api/%2e%2e/admin", "denied"),
            ("east:a/b", "GET /api//x", "denied"),
            ("east:a/b", "GET /api/..;x/admin", "denied"),
            ("east:a/b", "GET /api/\\..\\admin", "denied"),
            // Bytes have neither method nor path.
            ("east:a/b", "", "denied"),
        ],
    );
    let ports_only = policy("p", r#"{"rules": [{"to": [{"ports": [80]}]}]}"#);
    check(&[ports_only], &[("east:a/b", "", "allowed")]);
}

#[test]
fn a_denial_comes_before_every_permission() {
    let deny = policy("z-deny", r#"{"action": "deny", "rules": [{"to": [{"paths": ["/admin*"]}]}]}"#);
    let allow = policy("a-allow", r#"{"rules": [{}]}"#);
    let cases = [
        ("east:a/b", "GET /x", "allowed"),
        ("east:a/b", "GET /admin/x", "denied by AccessPolicy shop/z-deny, rule 0"),
        // What can't be seen slips past no denial.
        ("east:a/b", "GET /x/../admin", "denied by AccessPolicy shop/z-deny"),
        ("east:a/b", "GET //admin", "denied by AccessPolicy shop/z-deny"),
        ("east:a/b", "", "denied by AccessPolicy shop/z-deny"),
    ];
    check(&[allow, deny.clone()], &cases);
    check(&[deny], &cases);
}

#[test]
fn an_auditing_policy_decides_nothing_and_says_what_it_would_have() {
    let audited = policy("a", r#"{"mode": "audit", "rules": [{"from": [{"namespaces": ["shop"]}]}]}"#);
    let (got, audit) = reason(std::slice::from_ref(&audited), &Defaults::default(), "east:x/y", "GET /");
    assert!(got.starts_with("allowed: no AccessPolicy"), "{got}");
    assert!(audit.unwrap().starts_with("denied: AccessPolicy shop/a selects"));
    assert_eq!(reason(&[audited], &Defaults::default(), "east:shop/y", "GET /").1, None);
}

#[test]
fn a_policy_without_targets_selects_its_namespace() {
    let mut all = (*policy("all", "{}")).clone();
    all.targets.clear();
    assert!(all.selects(&"shop/web".parse().unwrap()) && all.selects(&"shop/db".parse().unwrap()));
    assert!(!all.selects(&"data/db".parse().unwrap()));
}

#[test]
fn what_is_wrong_is_refused_with_its_field() {
    for (spec, want) in [
        (r#"{"rules": [{"from": [{}]}]}"#, "rules[0].from[0].spiffeIds: an empty entry"),
        (r#"{"rules": [{"to": [{}]}]}"#, "rules[0].to[0].ports: an empty entry"),
        (
            r#"{"rules": [{"from": [{"spiffeIds": ["east/ns/shop"]}]}]}"#,
            "rules[0].from[0].spiffeIds[0]: \"east/ns/shop\"",
        ),
        (r#"{"rules": [{"from": [{"serviceAccounts": ["a/b/c"]}]}]}"#, "rules[0].from[0].serviceAccounts[0]"),
        (r#"{"rules": [{"to": [{"methods": ["get"]}]}]}"#, "rules[0].to[0].methods: \"get\""),
        (r#"{"rules": [{"to": [{"paths": ["cart"]}]}]}"#, "rules[0].to[0].paths: \"cart\""),
        (r#"{"rules": [{"to": [{"paths": ["/a*b"]}]}]}"#, "rules[0].to[0].paths: \"/a*b\""),
        (r#"{"rules": [{"to": [{"paths": ["/a/../b"]}]}]}"#, "rules[0].to[0].paths: "),
        (r#"{"rules": [{"to": [{"ports": [0]}]}]}"#, "rules[0].to[0].ports: a port"),
    ] {
        let error = serde_json::from_str::<AccessSpec>(spec).unwrap().check().unwrap_err().to_string();
        assert!(error.starts_with(want), "{spec}: {error}");
    }
}

proptest::proptest! {
    #[test]
    fn globs_match_what_they_stand_for(parts in proptest::collection::vec("[ab]{0,3}", 1..4), fill in "[ab]{0,3}") {
        let text = parts.join(&fill);
        assert!(glob(parts.join("*").as_bytes(), text.as_bytes()));
        assert!(!glob(format!("{}c", parts.join("*")).as_bytes(), text.as_bytes()));
    }

    #[test]
    fn no_path_makes_it_panic_and_dots_are_always_seen(path in "[/.%a;\\\\]{0,12}") {
        let _ = is_ambiguous(&path);
        assert!(is_ambiguous(&format!("{path}/../x")));
    }
}
