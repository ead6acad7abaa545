//! What has to be written so that the API server says what the catalogue says: a pure function of both.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use jiff::{Timestamp, Unit};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use tombolo_api::k8s::mcs;
use tombolo_core::catalog::ServiceView;
use tombolo_core::id::{Namespace, ServiceName};
use tombolo_core::mcs::{Import, export_conditions, import};
use tombolo_core::model::ServiceKind;
use tombolo_core::source::{LocalState, SourceProblem};

use super::mirror::{Kind, Mirror};
use super::objects::{self, MANAGED_BY, Reachable, derived_name};
use crate::addresses::Addresses;
use crate::kubernetes::name_of;

/// All that decides what is written.
pub struct Known<'a> {
    pub services: &'a BTreeMap<ServiceName, Arc<ServiceView>>,
    pub local: &'a LocalState,
    pub addresses: Option<&'a Addresses>,
    /// Where gateways of this cluster listen for workloads without a sidecar.
    pub gateways: &'a BTreeSet<IpAddr>,
    pub mirror: &'a Mirror,
    pub now: Timestamp,
}

/// One object to write.
#[derive(Debug, Clone, PartialEq)]
pub enum Write {
    /// Server-side apply.
    Apply { kind: Kind, body: Value },
    /// Server-side apply of the status alone.
    ApplyStatus { kind: Kind, body: Value },
    /// Of exactly this object, not of one that has taken its name since.
    Delete { kind: Kind, namespace: String, name: String, uid: Option<String> },
}

/// What to write, and what can't be.
#[derive(Debug, Default)]
pub struct Plan {
    pub writes: Vec<Write>,
    pub problems: Vec<SourceProblem>,
    /// What is imported, with the ClusterIPs that it has by now.
    pub imported: BTreeMap<ServiceName, Vec<IpAddr>>,
}

/// Compares what is known with what is there.
pub fn plan(known: &Known<'_>) -> Plan {
    let mut planning = Planning {
        known,
        plan: Plan { problems: known.mirror.problems(), ..Plan::default() },
        wanted: BTreeSet::new(),
    };
    planning.exports();
    if let Some(api_version) = known.mirror.api_version(Kind::ServiceImport) {
        planning.imports(&api_version);
        planning.leftovers();
    }
    planning.plan
}

struct Planning<'a> {
    known: &'a Known<'a>,
    plan: Plan,
    /// Names of the objects that are to be there.
    wanted: BTreeSet<Arc<str>>,
}

impl Planning<'_> {
    fn exports(&mut self) {
        let Some(api_version) = self.known.mirror.api_version(Kind::ServiceExport) else { return };
        for (_, export) in self.known.mirror.all(Kind::ServiceExport) {
            let Some(service) = service_of(export) else { continue };
            let view = self.known.services.get(&service).map(|view| &**view);
            let conditions: Vec<mcs::Condition> = export_conditions(&service, self.known.local, view)
                .into_iter()
                .map(|one| self.condition(export, one.kind, one.holds, one.reason, one.message))
                .collect();
            if !conditions.is_empty() {
                let status = json!({ "conditions": conditions });
                self.status(Kind::ServiceExport, &api_version, export, status);
            }
        }
    }

    fn imports(&mut self, api_version: &str) {
        let namespaces = self.known.mirror.namespaces();
        for (service, view) in self.known.services {
            let Some(import) = importable(service, view, &namespaces) else { continue };
            let name = name_of("ServiceImport", Some(service.namespace().as_str()), service.name());
            match self.known.mirror.get(Kind::ServiceImport, &name) {
                Some(there) if !is_ours(there) => {
                    let reason = "was not written by tombolo and is left alone; remove it, and the import is written";
                    self.plan.problems.push(SourceProblem { file: name.to_string(), line: 0, reason: reason.into() });
                }
                there => self.import(api_version, service, &import, there),
            }
        }
    }

    /// The import comes first: what is derived from it is owned by it, so that it goes when the import goes,
    /// whoever removes that.
    fn import(&mut self, api_version: &str, service: &ServiceName, import: &Import, there: Option<&DynamicObject>) {
        let derived = name_of("Service", Some(service.namespace().as_str()), &derived_name(service));
        let derived = self.known.mirror.get(Kind::Service, &derived);
        let ips = match import.kind {
            ServiceKind::ClusterSetIp => derived.map(|service| addresses(service, "clusterIPs")).unwrap_or_default(),
            ServiceKind::Headless => Vec::new(),
        };
        self.plan.imported.insert(service.clone(), ips.clone());
        let said = self.apply(Kind::ServiceImport, objects::import(api_version, service, import, &ips));
        let Some(there) = there else { return };
        // Writes of one step overtake each other, and nobody may read a status that is ahead of what it speaks of.
        if said {
            let (holds, reason, message) = objects::readiness(import, &ips);
            let ready = self.condition(there, "Ready", holds, reason.into(), message.into());
            self.status(Kind::ServiceImport, api_version, there, objects::import_status(import, ready));
        }
        let Some(owner) = owner(api_version, there) else { return };
        if import.kind == ServiceKind::ClusterSetIp {
            self.apply(Kind::Service, objects::service(service, import, &owner));
            if ips.is_empty() {
                return;
            }
        }
        let is_ipv4 = ips.first().is_none_or(IpAddr::is_ipv4);
        let Known { addresses, gateways, .. } = *self.known;
        let reachable = Reachable { addresses, gateways, is_ipv4 };
        for part in &import.clusters {
            for slice in objects::slices(service, import, part, reachable, &owner) {
                self.apply(Kind::EndpointSlice, slice);
            }
        }
    }

    /// Whether nothing is left to write of it.
    fn apply(&mut self, kind: Kind, body: Value) -> bool {
        let text = |field: &str| body["metadata"][field].as_str().unwrap_or_default();
        let name = name_of(kind.definition().kind, Some(text("namespace")), text("name"));
        let said = self.known.mirror.get(kind, &name).is_some_and(|there| holds(&body, &as_value(there)));
        if !said {
            self.plan.writes.push(Write::Apply { kind, body });
        }
        self.wanted.insert(name);
        said
    }

    fn status(&mut self, kind: Kind, api_version: &str, there: &DynamicObject, status: Value) {
        if holds(&status, &there.data["status"]) {
            return;
        }
        let body = json!({
            "apiVersion": api_version,
            "kind": kind.definition().kind,
            "metadata": { "name": there.metadata.name, "namespace": there.metadata.namespace },
            "status": status,
        });
        self.plan.writes.push(Write::ApplyStatus { kind, body });
    }

    /// A condition whose status is what it was keeps the time since when it is.
    fn condition(
        &self,
        there: &DynamicObject,
        kind: &str,
        holds: bool,
        reason: String,
        message: String,
    ) -> mcs::Condition {
        let status = if holds { "True" } else { "False" };
        let before = there.data["status"]["conditions"].as_array().into_iter().flatten();
        let before = before.filter(|one| one["type"] == kind && one["status"] == status);
        let since = before.filter_map(|one| one["lastTransitionTime"].as_str()?.parse().ok()).next();
        // `metav1.Time` has whole seconds.
        let now = self.known.now.round(Unit::Second).unwrap_or(self.known.now);
        mcs::Condition {
            kind: kind.into(),
            status: status.into(),
            reason,
            message,
            last_transition_time: since.unwrap_or(now),
            observed_generation: there.metadata.generation,
        }
    }

    /// What was written once and is not wanted any more.
    fn leftovers(&mut self) {
        for kind in [Kind::ServiceImport, Kind::Service, Kind::EndpointSlice] {
            for (name, there) in self.known.mirror.all(kind) {
                let going = there.metadata.deletion_timestamp.is_some();
                if going || !is_ours(there) || self.wanted.contains(name) {
                    continue;
                }
                let metadata = there.metadata.clone();
                let (Some(namespace), Some(name)) = (metadata.namespace, metadata.name) else { continue };
                self.plan.writes.push(Write::Delete { kind, namespace, name, uid: metadata.uid });
            }
        }
    }
}

/// A service is imported only where its namespace exists (KEP-1645).
fn importable(service: &ServiceName, view: &ServiceView, namespaces: &BTreeSet<Namespace>) -> Option<Import> {
    namespaces.contains(service.namespace()).then(|| import(view)).flatten()
}

fn is_ours(object: &DynamicObject) -> bool {
    object.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY.0)).is_some_and(|by| by == MANAGED_BY.1)
}

fn service_of(object: &DynamicObject) -> Option<ServiceName> {
    let namespace = object.metadata.namespace.as_ref()?.parse().ok()?;
    ServiceName::new(namespace, object.metadata.name.as_ref()?).ok()
}

fn owner(api_version: &str, import: &DynamicObject) -> Option<OwnerReference> {
    Some(OwnerReference {
        api_version: api_version.to_owned(),
        kind: "ServiceImport".to_owned(),
        name: import.metadata.name.clone()?,
        uid: import.metadata.uid.clone()?,
        ..OwnerReference::default()
    })
}

fn addresses(object: &DynamicObject, field: &str) -> Vec<IpAddr> {
    let ips = object.data["spec"][field].as_array().into_iter().flatten();
    ips.filter_map(|ip| ip.as_str()?.parse().ok()).collect()
}

fn as_value(object: &DynamicObject) -> Value {
    let mut value = object.data.clone();
    if let Value::Object(fields) = &mut value {
        fields.insert("metadata".into(), json!(object.metadata));
        if let Some(types) = &object.types {
            fields.insert("apiVersion".into(), json!(types.api_version));
            fields.insert("kind".into(), json!(types.kind));
        }
    }
    value
}

/// Whether what is there says all that is wanted. It may say more: what others wrote, and what the API server fills in.
fn holds(wanted: &Value, there: &Value) -> bool {
    match (wanted, there) {
        (Value::Object(wanted), Value::Object(there)) => wanted.iter().all(|(key, value)| match there.get(key) {
            // The items of a list come without them, and an object has only one version for whoever asks.
            _ if key == "apiVersion" && wanted.contains_key("metadata") => true,
            // Conditions of other writers stand beside ours.
            Some(there) if key == "conditions" => each_held(value, there),
            Some(there) => holds(value, there),
            None => value.as_array().is_some_and(Vec::is_empty),
        }),
        (Value::Array(some), Value::Array(all)) => some.len() == all.len() && each_held(wanted, there),
        (Value::Array(some), Value::Null) => some.is_empty(),
        (wanted, there) => wanted == there,
    }
}

fn each_held(wanted: &Value, there: &Value) -> bool {
    let (Value::Array(wanted), Value::Array(there)) = (wanted, there) else { return holds(wanted, there) };
    wanted.iter().all(|one| there.iter().any(|other| holds(one, other)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::addresses::Space;
    use crate::mcs::mirror::Change;
    use tombolo_core::addresses::Ranges;
    use tombolo_core::addresses::allocation::Allocations;
    use tombolo_core::addresses::ports::PortOwner;
    use tombolo_core::mcs::Part;
    use tombolo_core::model::{ClusterShare, Export, Freshness, Origin, ServicePort, SessionAffinity, Transport};

    const UID: &str = "11111111-2222-3333-4444-555555555555";

    fn object(body: Value) -> Box<DynamicObject> {
        Box::new(serde_json::from_value(body).unwrap())
    }

    /// A server that has namespace `shop`, and the objects `there`.
    fn mirror(there: Vec<(Kind, Value)>) -> Mirror {
        let mut mirror = Mirror::default();
        let shop = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } });
        let there: Vec<(Kind, Value)> = [(Kind::Namespace, shop)].into_iter().chain(there).collect();
        for kind in Kind::ALL {
            mirror.handle_change(Change::ListBegan(*kind, kind.definition().versions[0]));
            for (of, body) in there.iter().filter(|(of, _)| of == kind) {
                let metadata = &body["metadata"];
                let name =
                    name_of(of.definition().kind, metadata["namespace"].as_str(), metadata["name"].as_str().unwrap());
                mirror.handle_change(Change::Seen(*of, name, object(body.clone())));
            }
            mirror.handle_change(Change::Listed(*kind));
        }
        mirror
    }

    fn view(name: &str) -> (ServiceName, Arc<ServiceView>) {
        let service: ServiceName = name.parse().unwrap();
        let port = ServicePort {
            name: "http".into(),
            port: 80,
            transport: Transport::Tcp,
            app: tombolo_core::model::AppProtocol::Http,
        };
        let export = Export {
            service: service.clone(),
            created: Timestamp::UNIX_EPOCH,
            kind: ServiceKind::ClusterSetIp,
            session_affinity: SessionAffinity::None,
            ports: [port].into(),
            server_ids: BTreeSet::new(),
            endpoints: BTreeMap::new(),
            unmeshed: false,
            routes: Vec::new(),
        };
        let cluster = "east".parse().unwrap();
        let share = ClusterShare { cluster, origin: Origin::Remote, freshness: Freshness::Fresh, export };
        let view = ServiceView {
            service: service.clone(),
            shares: vec![share],
            deliveries: BTreeMap::new(),
            conflicts: BTreeSet::new(),
            excluded: BTreeSet::new(),
            exported: false,
            offered_to: BTreeSet::new(),
            unmeshed: BTreeSet::new(),
        };
        (service, Arc::new(view))
    }

    fn planned(services: &[&str], mirror: &Mirror) -> Plan {
        let services = services.iter().map(|name| view(name)).collect();
        let local = LocalState::default();
        let now = Timestamp::from_second(1_000).unwrap();
        let gateways = BTreeSet::new();
        plan(&Known { services: &services, local: &local, addresses: None, gateways: &gateways, mirror, now })
    }

    fn told(plan: &Plan) -> Vec<String> {
        let named = |verb: &str, kind: &Kind, metadata: &Value| {
            format!("{verb} {} {}", kind.definition().kind, metadata["name"].as_str().unwrap())
        };
        let told = plan.writes.iter().map(|write| match write {
            Write::Apply { kind, body } => named("apply", kind, &body["metadata"]),
            Write::ApplyStatus { kind, body } => named("status", kind, &body["metadata"]),
            Write::Delete { kind, name, .. } => named("delete", kind, &json!({ "name": name })),
        });
        told.collect()
    }

    /// Carries a plan out the way an API server does, as far as this test goes.
    fn carried_out(mut there: Vec<(Kind, Value)>, plan: &Plan) -> Vec<(Kind, Value)> {
        for write in &plan.writes {
            let same =
                |(kind, one): &(Kind, Value), of: Kind, name: &Value| *kind == of && one["metadata"]["name"] == *name;
            match write {
                Write::Apply { kind, body } => {
                    let mut body = body.clone();
                    body["metadata"]["uid"] = json!(UID);
                    body["metadata"]["generation"] = json!(1);
                    if *kind == Kind::Service {
                        body["spec"]["clusterIPs"] = json!(["10.96.0.7"]);
                    }
                    let status = there.iter().find(|one| same(one, *kind, &body["metadata"]["name"]));
                    body["status"] = status.map(|(_, one)| one["status"].clone()).unwrap_or_default();
                    there.retain(|one| !same(one, *kind, &body["metadata"]["name"]));
                    there.push((*kind, body));
                }
                Write::ApplyStatus { kind, body } => {
                    let found = there.iter_mut().find(|one| same(one, *kind, &body["metadata"]["name"]));
                    found.unwrap().1["status"] = body["status"].clone();
                }
                Write::Delete { kind, name, .. } => there.retain(|one| !same(one, *kind, &json!(name))),
            }
        }
        there
    }

    #[test]
    fn an_import_is_written_step_by_step_until_nothing_is_left_to_write_and_goes_whole() {
        let derived = derived_name(&"shop/web".parse().unwrap());
        let mut there = Vec::new();
        let mut steps = Vec::new();
        loop {
            let plan = planned(&["shop/web", "absent/web"], &mirror(there.clone()));
            if plan.writes.is_empty() {
                break;
            }
            steps.push(told(&plan));
            assert!(steps.len() < 9, "it never ends: {steps:?}");
            there = carried_out(there, &plan);
        }
        let want = [
            vec!["apply ServiceImport web".to_owned()],
            vec!["status ServiceImport web".into(), format!("apply Service {derived}")],
            vec!["apply ServiceImport web".into(), format!("apply EndpointSlice {derived}-east-ipv4-0")],
            vec!["status ServiceImport web".into()],
        ];
        assert_eq!(steps, want);
        let import = &there.iter().find(|(kind, _)| *kind == Kind::ServiceImport).unwrap().1;
        assert_eq!(import["spec"]["ips"], json!(["10.96.0.7"]));
        let known = planned(&["shop/web"], &mirror(there.clone())).imported;
        assert_eq!(known, [("shop/web".parse().unwrap(), vec!["10.96.0.7".parse().unwrap()])].into());
        assert_eq!(import["status"]["conditions"][0]["status"], "True");
        assert_eq!(import["status"]["clusters"], json!([{ "cluster": "east" }]));
        let gone = planned(&[], &mirror(there));
        assert_eq!(gone.writes.len(), 3, "{:?}", told(&gone));
        assert!(gone.writes.iter().all(|write| matches!(write, Write::Delete { uid: Some(uid), .. } if uid == UID)));
    }

    #[test]
    fn what_somebody_else_wrote_is_left_alone_and_reported() {
        let metadata = json!({ "name": "web", "namespace": "shop", "uid": UID });
        let theirs =
            json!({ "apiVersion": "multicluster.x-k8s.io/v1beta1", "kind": "ServiceImport", "metadata": metadata });
        for services in [vec!["shop/web"], vec![]] {
            let plan = planned(&services, &mirror(vec![(Kind::ServiceImport, theirs.clone())]));
            assert_eq!(told(&plan), <[String; 0]>::default());
            assert_eq!(plan.problems.len(), services.len(), "{:?}", plan.problems);
        }
    }

    #[test]
    fn nothing_is_written_into_a_namespace_that_is_being_deleted() {
        let metadata = json!({ "name": "shop", "deletionTimestamp": "2026-01-01T00:00:00Z" });
        let going = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata });
        let plan = planned(&["shop/web"], &mirror(vec![(Kind::Namespace, going)]));
        assert_eq!(told(&plan), <[String; 0]>::default());
    }

    #[test]
    fn headless_slices_hold_virtual_addresses_and_never_any_other() {
        let (service, view) = view("shop/web");
        let import = import(&view).unwrap();
        let import = Import { kind: ServiceKind::Headless, ..import };
        let endpoint = tombolo_core::model::Endpoint {
            id: "a".parse().unwrap(),
            hostname: Some("web-0".into()),
            zone: None,
            weight: 1,
            ready: true,
        };
        let part = Part { ports: import.ports.clone(), endpoints: vec![endpoint], unmeshed: true };
        let owner = OwnerReference::default();
        let cluster = "east".parse().unwrap();
        let gateways = ["10.0.0.5".parse().unwrap()].into();
        let reachable = Reachable { addresses: None, gateways: &gateways, is_ipv4: true };
        let slices = objects::slices(&service, &import, (&cluster, &part), reachable, &owner);
        assert_eq!((slices.len(), &slices[0]["endpoints"]), (1, &json!([])), "no virtual address, no endpoint");
        assert_eq!(slices[0]["metadata"]["labels"]["multicluster.kubernetes.io/source-cluster"], "east");
        assert_eq!(slices[0]["metadata"]["labels"].get("kubernetes.io/service-name"), None);
    }

    #[test]
    fn slices_hold_the_gateways_where_the_export_allows_workloads_without_a_sidecar() {
        let (service, view) = view("shop/web");
        let import = import(&view).unwrap();
        let owner = PortOwner { service: service.clone(), port: 80 };
        let mut held = Allocations::default();
        held.listeners.observe(&[owner].into(), 3, Timestamp::UNIX_EPOCH);
        let space = Space { ranges: Ranges::default(), listeners: Some("20000-20001".parse().unwrap()) };
        let addresses = Addresses::new(&held, space, Default::default(), None);
        let gateways = ["10.0.0.5", "10.0.0.6", "fd00::5"].map(|address| address.parse().unwrap()).into();
        let none = BTreeSet::new();
        let cluster = "east".parse().unwrap();
        let slice = |unmeshed, gateways, is_ipv4| {
            let part = Part { unmeshed, ..import.clusters[&cluster].clone() };
            let reachable = Reachable { addresses: Some(&addresses), gateways, is_ipv4 };
            let slices = objects::slices(&service, &import, (&cluster, &part), reachable, &OwnerReference::default());
            let listed = slices[0]["endpoints"].as_array().unwrap().iter().map(|one| one["addresses"][0].clone());
            (slices[0]["ports"][0]["port"].clone(), listed.collect::<Vec<_>>())
        };
        assert_eq!(slice(true, &gateways, true), (json!(20_000), vec![json!("10.0.0.5"), json!("10.0.0.6")]));
        assert_eq!(slice(true, &gateways, false), (json!(20_000), vec![json!("fd00::5")]));
        assert_eq!(slice(false, &gateways, true), (json!(80), vec![]), "not allowed");
        assert_eq!(slice(true, &none, true), (json!(80), vec![]), "no gateway listens");
    }

    #[test]
    fn what_the_server_and_others_add_is_no_difference_and_what_they_change_is() {
        let wanted = json!({ "spec": { "ports": [{ "port": 80 }], "ips": [] }, "conditions": [{ "type": "Ready" }] });
        for (there, same) in [
            (
                json!({ "spec": { "ports": [{ "port": 80, "targetPort": 80 }] }, "conditions": [{ "type": "Ready" }] }),
                true,
            ),
            (
                json!({ "spec": { "ports": [{ "port": 80 }] }, "conditions": [{ "type": "Other" }, { "type": "Ready" }] }),
                true,
            ),
            (json!({ "spec": { "ports": [{ "port": 81 }] }, "conditions": [{ "type": "Ready" }] }), false),
            (
                json!({ "spec": { "ports": [{ "port": 80 }, { "port": 81 }] }, "conditions": [{ "type": "Ready" }] }),
                false,
            ),
            (json!({ "spec": { "ports": [{ "port": 80 }] }, "conditions": [] }), false),
            (
                json!({ "spec": { "ports": [{ "port": 80 }], "ips": ["10.0.0.1"] }, "conditions": [{ "type": "Ready" }] }),
                false,
            ),
            (Value::Null, false),
        ] {
            assert_eq!(holds(&wanted, &there), same, "{there}");
        }
    }
}
