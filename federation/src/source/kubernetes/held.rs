//! What is held of the API server's objects, and what that amounts to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use tombolo_core::id::ServiceName;
use tombolo_core::source::SourceProblem;
use tombolo_core::source::declared::{Declared, Object, Place};

use super::kind::{Change, Kind, Seen};

/// How reading one kind goes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reading {
    Waiting,
    Listed,
    Failed(String),
    Absent,
}

#[derive(Debug)]
struct Holding {
    /// The last content that could be used, ...
    object: Option<Object>,
    /// ... and what is wrong with the present one.
    problem: Option<String>,
    created: Option<Timestamp>,
    /// The listing that it was last seen in.
    listing: u64,
}

#[derive(Debug)]
struct Objects {
    reading: Reading,
    /// Whether a list was ever complete.
    complete: bool,
    listing: u64,
    left_out: usize,
    held: BTreeMap<Arc<str>, Holding>,
}

/// The objects by kind and name.
#[derive(Debug)]
pub struct Held {
    /// How the API server is called in messages.
    server: String,
    kinds: BTreeMap<Kind, Objects>,
}

impl Held {
    pub fn new(server: String) -> Self {
        let empty =
            || Objects { reading: Reading::Waiting, complete: false, listing: 0, left_out: 0, held: BTreeMap::new() };
        Self { server, kinds: Kind::ALL.iter().map(|kind| (*kind, empty())).collect() }
    }

    pub fn handle_change(&mut self, change: Change) {
        match change {
            Change::ListBegan(kind, _) => {
                let objects = self.of(kind);
                objects.listing += 1;
                objects.left_out = 0;
            }
            Change::Listed(kind) => {
                let objects = self.of(kind);
                let listing = objects.listing;
                objects.held.retain(|_, holding| holding.listing == listing);
                (objects.reading, objects.complete) = (Reading::Listed, true);
            }
            Change::Seen(kind, name, seen) => self.handle_seen(kind, name, seen),
            Change::Gone(kind, name) => drop(self.of(kind).held.remove(&name)),
            Change::Failed(kind, reason) => self.of(kind).reading = Reading::Failed(reason),
            Change::Absent(kind) => self.of(kind).reading = Reading::Absent,
        }
    }

    fn of(&mut self, kind: Kind) -> &mut Objects {
        self.kinds.get_mut(&kind).expect("every kind is there from the start")
    }

    fn handle_seen(&mut self, kind: Kind, name: Arc<str>, seen: Seen) {
        let objects = self.of(kind);
        let (full, listing) = (objects.held.len() >= kind.held_max(), objects.listing);
        let known = objects.held.remove(&name);
        if full && known.is_none() {
            objects.left_out += 1;
            return;
        }
        let (object, problem) = match seen.object {
            Ok(object) => (object, None),
            Err(reason) => (known.and_then(|known| known.object).or(seen.instead), Some(reason)),
        };
        objects.held.insert(name, Holding { object, problem, created: seen.created, listing });
    }

    /// Whether every kind was read once, or is not there to be read.
    pub fn is_complete(&self) -> bool {
        self.kinds.values().all(|objects| objects.complete || objects.reading == Reading::Absent)
    }

    /// Why it is not, for a log.
    pub fn missing(&self) -> Option<(&'static str, &str)> {
        self.kinds.iter().find_map(|(kind, objects)| match &objects.reading {
            Reading::Failed(reason) if !objects.complete => Some((kind.name(), reason.as_str())),
            _ => None,
        })
    }

    pub fn objects(&self) -> Vec<Declared> {
        let held = self.kinds.values().flat_map(|objects| &objects.held);
        let declared = |(name, holding): (&Arc<str>, &Holding)| {
            Some(Declared { place: place(name), object: holding.object.clone()? })
        };
        held.filter_map(declared).collect()
    }

    /// When each export was created (KEP-1645: the oldest wins a conflict).
    pub fn created(&self) -> BTreeMap<ServiceName, Timestamp> {
        let exports = self.kinds[&Kind::ServiceExport].held.values();
        let created = exports.filter_map(|holding| match &holding.object {
            Some(Object::Export(export)) => Some((export.service.clone(), holding.created?)),
            _ => None,
        });
        created.collect()
    }

    pub fn problems(&self) -> Vec<SourceProblem> {
        // A whole cluster has Services that the mesh could not use, and never has to.
        let exported: BTreeSet<&str> = self.kinds[&Kind::ServiceExport].held.keys().map(|name| rest(name)).collect();
        let mut problems = Vec::new();
        for (kind, objects) in &self.kinds {
            problems.extend(self.reading_problem(*kind, objects));
            let ours = |name: &str| *kind != Kind::Service || exported.contains(rest(name));
            let of_objects = objects.held.iter().filter_map(|(name, holding)| {
                let reason = holding.problem.clone().filter(|_| ours(name))?;
                Some(problem(name, reason))
            });
            problems.extend(of_objects);
        }
        problems
    }

    fn reading_problem(&self, kind: Kind, objects: &Objects) -> Option<SourceProblem> {
        let name = kind.name();
        let reason = match &objects.reading {
            Reading::Absent => kind.absent()?,
            Reading::Failed(reason) => {
                format!("{name} can't be watched: {reason}; what was read last stays in force")
            }
            Reading::Waiting | Reading::Listed if objects.left_out > 0 => {
                format!("more than {} {name} objects; {} are left out", kind.held_max(), objects.left_out)
            }
            Reading::Waiting | Reading::Listed => return None,
        };
        Some(problem(&self.server, reason))
    }
}

/// A name without its kind.
fn rest(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, rest)| rest)
}

fn place(name: &Arc<str>) -> Place {
    Place { file: name.clone(), line: 0 }
}

fn problem(file: &str, reason: String) -> SourceProblem {
    SourceProblem { file: file.to_owned(), line: 0, reason }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tombolo_core::policy::access::AccessSpec;
    use tombolo_core::policy::set::Policy;
    use tombolo_core::source::declared::DeclaredExport;

    fn held() -> Held {
        Held::new("https://192.0.2.1:6443".into())
    }

    fn export(name: &str) -> Change {
        let object = Ok(Some(Object::Export(DeclaredExport { service: name.parse().unwrap(), unmeshed: false })));
        seen(Kind::ServiceExport, name, object)
    }

    fn seen(kind: Kind, name: &str, object: Result<Option<Object>, String>) -> Change {
        let created = Some(Timestamp::UNIX_EPOCH);
        Change::Seen(kind, format!("{}/{name}", kind.name()).into(), Seen { object, instead: None, created })
    }

    fn names(held: &Held) -> Vec<String> {
        held.objects().iter().map(|declared| declared.place.to_string()).collect()
    }

    fn listed(held: &mut Held, kind: Kind, objects: Vec<Change>) {
        held.handle_change(Change::ListBegan(kind, "v1"));
        objects.into_iter().for_each(|change| held.handle_change(change));
        held.handle_change(Change::Listed(kind));
    }

    #[test]
    fn what_a_new_list_does_not_name_is_gone_when_the_list_is_complete_and_not_before() {
        let mut held = held();
        listed(&mut held, Kind::ServiceExport, vec![export("shop/web"), export("shop/db")]);
        held.handle_change(Change::ListBegan(Kind::ServiceExport, "v1beta1"));
        held.handle_change(export("shop/web"));
        assert_eq!(names(&held), ["ServiceExport/shop/db", "ServiceExport/shop/web"]);
        held.handle_change(Change::Listed(Kind::ServiceExport));
        assert_eq!(names(&held), ["ServiceExport/shop/web"]);
        held.handle_change(Change::Gone(Kind::ServiceExport, "ServiceExport/shop/web".into()));
        assert_eq!((names(&held).len(), held.created().len()), (0, 0));
    }

    #[test]
    fn it_is_complete_when_each_kind_was_listed_or_is_not_there() {
        let mut held = held();
        for kind in Kind::ALL.iter().filter(|kind| **kind != Kind::ClusterPeer) {
            listed(&mut held, *kind, vec![]);
        }
        held.handle_change(Change::Failed(Kind::ClusterPeer, "no route".into()));
        assert_eq!((held.is_complete(), held.missing()), (false, Some(("ClusterPeer", "no route"))));
        held.handle_change(Change::Absent(Kind::ClusterPeer));
        assert!(held.is_complete());
        let problems = held.problems();
        assert!(problems[0].reason.contains("tombolo crds | kubectl apply"), "{problems:?}");
        // Nobody has to have the Gateway API.
        held.handle_change(Change::Absent(Kind::HttpRoute));
        assert_eq!((held.is_complete(), held.problems().len()), (true, problems.len()));
    }

    #[test]
    fn what_was_read_stays_while_the_server_is_away_and_the_problem_goes_with_the_next_list() {
        let mut held = held();
        listed(&mut held, Kind::ServiceExport, vec![export("shop/web")]);
        held.handle_change(Change::Failed(Kind::ServiceExport, "connection refused".into()));
        assert_eq!(names(&held), ["ServiceExport/shop/web"]);
        let problem = held.problems().remove(0);
        assert_eq!(problem.file, "https://192.0.2.1:6443");
        assert!(problem.reason.contains("connection refused"), "{problem:?}");
        listed(&mut held, Kind::ServiceExport, vec![export("shop/web")]);
        assert_eq!(held.problems(), []);
    }

    #[test]
    fn an_object_that_turned_bad_keeps_its_last_good_content_and_only_the_meshs_affairs_are_reported() {
        let mut held = held();
        listed(&mut held, Kind::ServiceExport, vec![export("shop/web")]);
        held.handle_change(seen(Kind::ServiceExport, "shop/web", Err("odd".into())));
        held.handle_change(seen(Kind::Service, "shop/web", Err("odd too".into())));
        held.handle_change(seen(Kind::Service, "kube-system/other", Err("nobody's affair".into())));
        assert_eq!(names(&held), ["ServiceExport/shop/web"]);
        let reasons: Vec<String> = held.problems().into_iter().map(|problem| problem.reason).collect();
        assert_eq!(reasons, ["odd too", "odd"]);
    }

    #[test]
    fn an_access_policy_that_was_never_good_is_replaced_by_one_that_refuses_everybody() {
        let mut held = held();
        let policy = |spec: serde_json::Value| {
            let object = serde_json::json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": spec });
            let object = serde_json::from_value(object).unwrap();
            let seen = Seen::of("tombolo.dev/v1alpha1", &"east".parse().unwrap(), Kind::AccessPolicy, object);
            Change::Seen(Kind::AccessPolicy, "AccessPolicy/shop/web".into(), seen)
        };
        let rules = |held: &Held| match &held.objects()[..] {
            [Declared { object: Object::Policy(Policy::Access(policy)), .. }] => policy.spec.clone(),
            other => panic!("{other:?}"),
        };
        held.handle_change(policy(serde_json::json!({ "rulez": [] })));
        assert_eq!(rules(&held), AccessSpec::closed());
        held.handle_change(policy(serde_json::json!({ "rules": [] })));
        assert_eq!(rules(&held).rules, []);
        held.handle_change(policy(serde_json::json!({ "rulez": [] })));
        assert_eq!(rules(&held).rules, [], "its last good content stays in force");
    }

    #[test]
    fn what_is_above_the_bound_is_left_out_and_counted() {
        let mut held = held();
        let max = Kind::ClusterPeer.held_max();
        let many = (0..max + 3).map(|n| seen(Kind::ClusterPeer, &format!("peer-{n}"), Err("odd".into())));
        listed(&mut held, Kind::ClusterPeer, many.collect());
        let of_server = held.problems().into_iter().find(|problem| problem.file.starts_with("https")).unwrap();
        assert!(of_server.reason.contains("3 are left out"), "{of_server:?}");
    }
}
