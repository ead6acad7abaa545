//! Publishing and importing together: wherever a subscriber is cut off, it ends with the same import.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use proptest::prelude::*;
use tombolo_core::bundle::BundleRefused;
use tombolo_core::id::{Position, ServiceName, TrustDomain};
use tombolo_core::import::{Import, StreamBroken, UpdateRefused};
use tombolo_core::model::{Endpoint, Export, GatewayAddress};
use tombolo_core::publish::{Change, LOG_COST_MAX, Publication, Published, Revocations, Roots, Update};

fn domain() -> TrustDomain {
    "east.example".parse().unwrap()
}

fn endpoint(id: &str, ready: bool) -> Endpoint {
    Endpoint { id: id.parse().unwrap(), hostname: None, zone: None, weight: 1, ready }
}

fn export(service: &str, endpoints: impl IntoIterator<Item = Endpoint>) -> Arc<Export> {
    let service: ServiceName = service.parse().unwrap();
    let server = format!("spiffe://east.example/ns/{}/sa/x", service.namespace());
    Arc::new(Export {
        service,
        created: Timestamp::UNIX_EPOCH,
        kind: Default::default(),
        session_affinity: Default::default(),
        ports: Default::default(),
        server_ids: [server.parse().unwrap()].into(),
        endpoints: endpoints.into_iter().map(|endpoint| (endpoint.id.clone(), endpoint)).collect(),
        unmeshed: false,
        routes: Vec::new(),
    })
}

fn published(exports: impl IntoIterator<Item = Arc<Export>>) -> Published {
    let exports = exports.into_iter().map(|export| (export.service.clone(), export)).collect();
    Published { exports, ..Default::default() }
}

fn roots(sequence: u64, root: u8) -> Option<Arc<Roots>> {
    Some(Arc::new(Roots { trust_domain: domain(), sequence, der: [vec![root]].into() }))
}

fn feed(import: &mut Import, updates: Vec<Update>) {
    for update in updates {
        let touched = import.handle_update(update).unwrap();
        assert_eq!(touched.refused, None);
    }
}

fn kinds(updates: &[Update]) -> Vec<&'static str> {
    let kind = |update: &Update| match update.change {
        Change::Export(_) => "export",
        Change::ExportRemoved(_) => "export removed",
        Change::Endpoint(..) => "endpoint",
        Change::EndpointRemoved(..) => "endpoint removed",
        Change::Roots(_) => "roots",
        Change::Gateways(_) => "gateways",
        Change::Revocations(_) => "revocations",
        Change::SnapshotBegin => "begin",
        Change::Complete => "complete",
        Change::Heartbeat => "heartbeat",
    };
    updates.iter().map(kind).collect()
}

#[test]
fn one_changed_endpoint_of_a_thousand_is_one_delta() {
    let thousand = |ready: bool| {
        let id = |n: usize| format!("ep{n}");
        export("shop/web", (0..1000).map(|n| endpoint(&id(n), ready || n != 500)))
    };
    let mut publication = Publication::new(7, 0, LOG_COST_MAX);
    publication.publish(published([thousand(true)]));
    let before = publication.position();
    publication.publish(published([thousand(false)]));
    assert_eq!(kinds(&publication.since(before)), ["endpoint"]);
}

#[test]
fn a_position_in_the_log_gets_deltas_and_any_other_a_snapshot() {
    let mut publication = Publication::new(7, 100, 2);
    for ready in [true, false, true, false] {
        publication.publish(published([export("shop/web", [endpoint("a", ready)])]));
    }
    let at = |epoch, revision| Position { epoch, revision };
    assert_eq!(publication.position(), at(7, 104));
    let snapshot = vec!["begin", "export", "complete"];
    for (from, want) in [
        (at(7, 104), vec![]),
        (at(7, 103), vec!["endpoint"]),
        (at(7, 102), vec!["endpoint", "endpoint"]),
        (at(7, 101), snapshot.clone()),
        (at(7, 105), snapshot.clone()),
        (at(6, 103), snapshot.clone()),
        (at(0, 0), snapshot),
    ] {
        assert_eq!(kinds(&publication.since(from)), want, "{from}");
    }
}

#[test]
fn absence_deletes_only_after_complete() {
    let mut import = Import::new(domain());
    let all = published([export("shop/web", []), export("shop/db", [])]);
    feed(&mut import, all.snapshot(Position { epoch: 1, revision: 5 }));

    let mut snapshot = published([export("shop/web", [])]).snapshot(Position { epoch: 2, revision: 1 });
    let complete = snapshot.pop().unwrap();
    feed(&mut import, snapshot.clone());
    assert_eq!(import.exports().len(), 2, "nothing is gone before complete");
    assert_eq!(import.position(), Position { epoch: 1, revision: 5 }, "nothing to acknowledge either");

    import.handle_reconnect();
    assert_eq!(import.handle_update(complete.clone()), Err(StreamBroken::NoSnapshot), "half a snapshot does not count");
    feed(&mut import, snapshot);
    let touched = import.handle_update(complete).unwrap();
    assert_eq!(touched.services, ["shop/db".parse().unwrap()].into());
    assert_eq!(import.position(), Position { epoch: 2, revision: 1 });
}

#[test]
fn an_update_of_another_epoch_breaks_the_stream() {
    let mut import = Import::new(domain());
    feed(&mut import, published([]).snapshot(Position { epoch: 1, revision: 0 }));
    let change = Change::ExportRemoved("shop/web".parse().unwrap());
    let foreign = Update { position: Position { epoch: 2, revision: 1 }, change };
    assert_eq!(import.handle_update(foreign), Err(StreamBroken::OtherEpoch { held: 1, got: 2 }));
}

fn refusal_of(export: Export) -> Option<UpdateRefused> {
    let mut import = Import::new(domain());
    let snapshot = published([Arc::new(export)]).snapshot(Position { epoch: 1, revision: 0 });
    let mut refused = None;
    for update in snapshot {
        refused = refused.or(import.handle_update(update).unwrap().refused);
    }
    assert_eq!(import.exports().is_empty(), refused.is_some());
    assert_eq!(import.refused().len(), usize::from(refused.is_some()));
    let mut again = Import::new(domain());
    import.snapshot().into_iter().for_each(|update| drop(again.handle_update(update)));
    assert_eq!(again, import, "what is kept reads back, refused exports included");
    refused
}

#[test]
fn exports_outside_the_exporters_rights_are_refused() {
    let web = || Arc::unwrap_or_clone(export("shop/web", []));
    assert_eq!(refusal_of(web()), None);
    let foreign = "spiffe://west.example/ns/shop/sa/x".parse().unwrap();
    let refused = refusal_of(Export { server_ids: [foreign].into(), ..web() });
    assert!(matches!(refused, Some(UpdateRefused::ForeignServerId { .. })));
    let reserved = "spiffe://east.example/tombolo/gateway/x".parse().unwrap();
    let refused = refusal_of(Export { server_ids: [reserved].into(), ..web() });
    assert!(matches!(refused, Some(UpdateRefused::ReservedServerId { .. })));
    let refused = refusal_of(Export { service: "tombolo-system/federation".parse().unwrap(), ..web() });
    assert!(matches!(refused, Some(UpdateRefused::SystemNamespace(_))));
}

#[test]
fn a_refused_export_replaces_the_good_one_before_it() {
    let mut import = Import::new(domain());
    feed(&mut import, published([export("shop/web", [])]).snapshot(Position { epoch: 1, revision: 1 }));
    let foreign = "spiffe://west.example/ns/shop/sa/x".parse().unwrap();
    let bad = Export { server_ids: [foreign].into(), ..Arc::unwrap_or_clone(export("shop/web", [])) };
    let at = |revision| Position { epoch: 1, revision };
    let update = |revision, change| Update { position: at(revision), change };
    assert!(import.handle_update(update(2, Change::Export(bad.into()))).unwrap().refused.is_some());
    assert!(import.exports().is_empty());
    assert_eq!(import.position(), at(2), "a refused update is passed over, not waited for");
    feed(&mut import, vec![update(3, Change::Endpoint("shop/web".parse().unwrap(), endpoint("a", true)))]);
    feed(&mut import, vec![update(4, Change::Export(export("shop/web", [])))]);
    assert_eq!((import.exports().len(), import.refused().len()), (1, 0));
}

#[test]
fn bundles_and_revocations_never_go_back_even_in_a_new_epoch() {
    let revoked = |sequence, names: &[&str]| {
        let ids = names.iter().map(|name| format!("spiffe://east.example/ns/a/sa/{name}").parse().unwrap());
        Arc::new(Revocations { sequence, ids: ids.collect() })
    };
    let mut import = Import::new(domain());
    let state =
        |sequence, root, revocations| Published { roots: roots(sequence, root), revocations, ..Default::default() };
    feed(&mut import, state(3, 1, revoked(2, &["x"])).snapshot(Position { epoch: 5, revision: 0 }));

    let mut refusal = |change| {
        let snapshot = [Change::SnapshotBegin, change, Change::Complete];
        let position = Position { epoch: 6, revision: 0 };
        let touched = snapshot.map(|change| import.handle_update(Update { position, change }).unwrap());
        touched.into_iter().find_map(|touched| touched.refused)
    };
    let bundle = |sequence, root| Change::Roots(roots(sequence, root).unwrap());
    let lower = BundleRefused::LowerSequence { held: 3, offered: 2 };
    assert_eq!(refusal(bundle(2, 2)), Some(UpdateRefused::Bundle(lower)));
    let other = BundleRefused::SameSequenceOtherContent { sequence: 3 };
    assert_eq!(refusal(bundle(3, 2)), Some(UpdateRefused::Bundle(other)));
    let foreign = Roots { trust_domain: "west.example".parse().unwrap(), sequence: 9, der: Default::default() };
    assert!(matches!(refusal(Change::Roots(foreign.into())), Some(UpdateRefused::ForeignBundle { .. })));
    assert_eq!(refusal(bundle(4, 2)), None);

    let back = UpdateRefused::RevocationsWentBack { held: 2, offered: 1 };
    assert_eq!(refusal(Change::Revocations(revoked(1, &["x", "y"]))), Some(back));
    assert_eq!(refusal(Change::Revocations(revoked(2, &["y"]))), Some(UpdateRefused::RevocationsShrank(2)));
    let foreign: Arc<Revocations> =
        Revocations { sequence: 9, ids: ["spiffe://west.example/ns/a/sa/x".parse().unwrap()].into() }.into();
    assert!(matches!(refusal(Change::Revocations(foreign)), Some(UpdateRefused::ForeignRevocation(_))));
    assert_eq!(refusal(Change::Revocations(revoked(2, &["x", "y"]))), None);
    assert_eq!(import.roots().unwrap().sequence, 4);
    assert_eq!(import.revocations().ids.len(), 2);
}

#[test]
fn a_publisher_does_not_forget_its_gateways_or_go_back() {
    let mut publication = Publication::new(1, 0, LOG_COST_MAX);
    let gateway = GatewayAddress { gateway: "gw".parse().unwrap(), address: "192.0.2.1:1".into() };
    let state = Published { gateways: vec![gateway].into(), roots: roots(2, 1), ..Default::default() };
    assert!(publication.publish(state.clone()));
    assert!(!publication.publish(Published { roots: roots(1, 1), ..Default::default() }));
    assert_eq!(publication.since(Position::default()), state.snapshot(publication.position()));
}

/// One step of a random history.
#[derive(Debug, Clone)]
enum Step {
    Publish(BTreeMap<u8, BTreeMap<u8, bool>>, u64),
    /// The subscriber receives at most this many updates and is then cut off (or not).
    Receive {
        updates: usize,
        cut: bool,
    },
    /// The publisher restarts: a new epoch, an empty log.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let endpoints = prop::collection::btree_map(0..4u8, any::<bool>(), 0..4);
    let exports = prop::collection::btree_map(0..4u8, endpoints, 0..4);
    prop_oneof![
        4 => (exports, 0..3u64).prop_map(|(exports, sequence)| Step::Publish(exports, sequence)),
        4 => (0..6usize, any::<bool>()).prop_map(|(updates, cut)| Step::Receive { updates, cut }),
        1 => Just(Step::Restart),
    ]
}

fn state_of(exports: &BTreeMap<u8, BTreeMap<u8, bool>>, sequence: u64) -> Published {
    let name = |n: &u8| format!("shop/s{n}");
    let one = |(n, endpoints): (&u8, &BTreeMap<u8, bool>)| {
        export(&name(n), endpoints.iter().map(|(id, ready)| endpoint(&format!("e{id}"), *ready)))
    };
    Published { roots: roots(sequence, 1), ..published(exports.iter().map(one)) }
}

proptest! {
    #[test]
    fn any_cut_and_resume_yields_the_same_import(
        steps in prop::collection::vec(step(), 0..40),
        log_cost_max in 0..12usize,
    ) {
        let mut publication = Publication::new(1, 0, log_cost_max);
        let mut epoch = 1;
        let mut last = Published::default();
        let mut import = Import::new(domain());
        // What the stream has still to deliver; a stream that was not cut goes on where it is.
        let mut sent = Position::default();
        let mut pending: Vec<Update> = Vec::new();
        for step in steps {
            match step {
                Step::Publish(exports, sequence) => {
                    let sequence = last.roots.as_ref().map_or(0, |roots| roots.sequence).max(sequence);
                    last = state_of(&exports, sequence);
                    publication.publish(last.clone());
                }
                Step::Receive { updates, cut } => {
                    if pending.is_empty() {
                        pending = publication.since(sent);
                        sent = publication.position();
                    }
                    let rest = pending.split_off(updates.min(pending.len()));
                    feed(&mut import, std::mem::replace(&mut pending, rest));
                    if cut {
                        import.handle_reconnect();
                        pending.clear();
                        sent = import.position();
                    }
                }
                Step::Restart => {
                    epoch += 1;
                    publication = Publication::new(epoch, 0, log_cost_max);
                    publication.publish(last.clone());
                    import.handle_reconnect();
                    pending.clear();
                    sent = import.position();
                }
            }
        }
        feed(&mut import, pending);
        feed(&mut import, publication.since(sent));
        prop_assert_eq!(import.position(), publication.position());
        prop_assert_eq!(import.exports(), &last.exports);

        let mut kept = Import::new(domain());
        feed(&mut kept, import.snapshot());
        prop_assert_eq!(kept, import);
    }

    #[test]
    fn a_reconnect_within_the_log_sends_each_change_once(changes in 1..50usize, held in 0..50usize) {
        let mut publication = Publication::new(1, 0, LOG_COST_MAX);
        publication.publish(published([export("shop/web", [endpoint("a", true)])]));
        let first = publication.position().revision;
        for n in 0..changes {
            publication.publish(published([export("shop/web", [endpoint("a", n % 2 == 1)])]));
        }
        let held = held.min(changes);
        let from = Position { epoch: 1, revision: first + u64::try_from(held).unwrap() };
        prop_assert_eq!(publication.since(from).len(), changes - held);
    }
}

#[test]
fn limits_hold() {
    let mut import = Import::new(domain());
    let many = export("shop/web", (0..10_001).map(|n| endpoint(&format!("e{n}"), true)));
    let mut refused = Vec::new();
    for update in published([many]).snapshot(Position { epoch: 1, revision: 0 }) {
        refused.extend(import.handle_update(update).unwrap().refused);
    }
    assert!(matches!(refused[..], [UpdateRefused::TooMany { limit: 10_000, .. }]), "{refused:?}");
    assert!(import.exports().is_empty());
}
