//! What the API server has of the objects that imports and exports are written to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kube::api::DynamicObject;
use tombolo_core::id::Namespace;
use tombolo_core::source::SourceProblem;

use crate::kubernetes::{self, Change as AnyChange, Definition};

pub type Change = AnyChange<Kind, Box<DynamicObject>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Namespace,
    ServiceExport,
    ServiceImport,
    Service,
    EndpointSlice,
}

impl Kind {
    pub const ALL: &[Kind] =
        &[Kind::Namespace, Kind::ServiceExport, Kind::ServiceImport, Kind::Service, Kind::EndpointSlice];

    pub fn definition(self) -> &'static Definition {
        match self {
            Kind::Namespace => &kubernetes::NAMESPACE,
            Kind::ServiceExport => &kubernetes::SERVICE_EXPORT,
            Kind::ServiceImport => &kubernetes::SERVICE_IMPORT,
            Kind::Service => &kubernetes::SERVICE,
            Kind::EndpointSlice => &kubernetes::ENDPOINT_SLICE,
        }
    }

    /// Of Services and slices only those that were written here. All imports: somebody else's must be left alone.
    pub fn labels(self) -> Option<&'static str> {
        match self {
            Kind::Service | Kind::EndpointSlice => {
                Some("app.kubernetes.io/managed-by=tombolo,multicluster.kubernetes.io/service-name")
            }
            Kind::Namespace | Kind::ServiceExport | Kind::ServiceImport => None,
        }
    }

    fn held_max(self) -> usize {
        match self {
            Kind::Namespace | Kind::ServiceExport | Kind::ServiceImport | Kind::Service => 10_000,
            Kind::EndpointSlice => 50_000,
        }
    }
}

/// What is kept of an object.
pub fn reduce(mut object: DynamicObject) -> Box<DynamicObject> {
    object.metadata.managed_fields = None;
    object.metadata.annotations = None;
    if object.types.as_ref().is_some_and(|types| types.kind == "Namespace") {
        object.data = serde_json::Value::Null;
        object.metadata.labels = None;
    }
    Box::new(object)
}

#[derive(Debug, Default)]
struct Objects {
    /// Whether a list was ever complete, or the API server does not know the kind.
    known: bool,
    version: Option<&'static str>,
    problem: Option<String>,
    listing: u64,
    held: BTreeMap<Arc<str>, (u64, Box<DynamicObject>)>,
}

/// The objects by kind and name.
#[derive(Debug, Default)]
pub struct Mirror {
    kinds: BTreeMap<Kind, Objects>,
}

impl Mirror {
    pub fn handle_change(&mut self, change: Change) {
        match change {
            Change::ListBegan(kind, version) => {
                let objects = self.of(kind);
                objects.listing += 1;
                objects.version = Some(version);
            }
            Change::Listed(kind) => {
                let objects = self.of(kind);
                let listing = objects.listing;
                objects.held.retain(|_, (seen, _)| *seen == listing);
                (objects.known, objects.problem) = (true, None);
            }
            Change::Seen(kind, name, object) => self.handle_seen(kind, name, object),
            Change::Gone(kind, name) => drop(self.of(kind).held.remove(&name)),
            Change::Failed(kind, reason) => self.of(kind).problem = Some(reason),
            Change::Absent(kind) => *self.of(kind) = Objects { known: true, ..Objects::default() },
        }
    }

    fn of(&mut self, kind: Kind) -> &mut Objects {
        self.kinds.entry(kind).or_default()
    }

    fn handle_seen(&mut self, kind: Kind, name: Arc<str>, object: Box<DynamicObject>) {
        let objects = self.of(kind);
        if objects.held.len() >= kind.held_max() && !objects.held.contains_key(&name) {
            objects.problem = Some(format!("there are more than {}; others are left out", kind.held_max()));
            return;
        }
        let listing = objects.listing;
        objects.held.insert(name, (listing, object));
    }

    /// Whether all that there is was seen once; before, what is missing may only be late.
    pub fn is_complete(&self) -> bool {
        Kind::ALL.iter().all(|kind| self.kinds.get(kind).is_some_and(|objects| objects.known))
    }

    /// The `apiVersion` in which a kind is written; `None` where the API server does not know it.
    pub fn api_version(&self, kind: Kind) -> Option<String> {
        self.kinds.get(&kind)?.version.map(|version| kind.definition().api_version(version))
    }

    pub fn get(&self, kind: Kind, name: &str) -> Option<&DynamicObject> {
        self.kinds.get(&kind)?.held.get(name).map(|(_, object)| &**object)
    }

    pub fn all(&self, kind: Kind) -> impl Iterator<Item = (&Arc<str>, &DynamicObject)> {
        self.kinds.get(&kind).into_iter().flat_map(|objects| &objects.held).map(|(name, (_, object))| (name, &**object))
    }

    /// Those in which something can be written: one that is being deleted takes no new objects.
    pub fn namespaces(&self) -> BTreeSet<Namespace> {
        let there = self.all(Kind::Namespace).filter(|(_, object)| object.metadata.deletion_timestamp.is_none());
        there.filter_map(|(_, object)| object.metadata.name.as_ref()?.parse().ok()).collect()
    }

    pub fn problems(&self) -> Vec<SourceProblem> {
        let problem = |(kind, objects): (&Kind, &Objects)| {
            let name = kind.definition().kind;
            let reason = objects.problem.as_ref()?;
            let reason = format!("{name} can't be watched: {reason}; imports and conditions are not kept up to date");
            Some(SourceProblem { file: name.into(), line: 0, reason })
        };
        self.kinds.iter().filter_map(problem).collect()
    }
}
