//! Routes and policies on the wire: their decided form as JSON, which is what core reads and writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use tombolo_core::policy::access::{DefaultAccess, Defaults};
use tombolo_core::policy::set::Policy;
use tombolo_core::policy::{Kind, Resource};

use crate::convert::{InvalidMessage, name};
use crate::proto::discovery as wire;

/// Resources that one message may carry.
const POLICIES_MAX: usize = 256;

pub fn policies_to_wire(policies: &[Policy]) -> Vec<wire::Policy> {
    policies.iter().map(policy_to_wire).collect()
}

fn policy_to_wire(policy: &Policy) -> wire::Policy {
    let json = match policy {
        Policy::Route(route) => serde_json::to_vec(route),
        Policy::Traffic(policy) => serde_json::to_vec(policy),
        Policy::Access(policy) => serde_json::to_vec(policy),
    };
    let json = json.expect("policies have no keys but strings");
    wire::Policy { kind: policy.resource().kind.as_str().into(), json }
}

/// The policies of a message; kinds of a newer release are passed over.
///
/// # Errors
/// When there are too many, or one of a known kind can't be read: a policy that refuses must not be lost silently.
pub fn policies_from_wire(policies: Vec<wire::Policy>) -> Result<Vec<Policy>, InvalidMessage> {
    if policies.len() > POLICIES_MAX {
        return Err(InvalidMessage::Value { field: "policies", reason: "more than 256 entries" });
    }
    policies.iter().filter_map(|policy| policy_from_wire(policy).transpose()).collect()
}

fn policy_from_wire(wire: &wire::Policy) -> Result<Option<Policy>, InvalidMessage> {
    let json = wire.json.as_slice();
    let route = || serde_json::from_slice(json).map(|route| Policy::Route(Arc::new(route)));
    let read = match wire.kind.as_str() {
        "HTTPRoute" | "GRPCRoute" => route(),
        "TrafficPolicy" => serde_json::from_slice(json).map(|policy| Policy::Traffic(Arc::new(policy))),
        "AccessPolicy" => serde_json::from_slice(json).map(|policy| Policy::Access(Arc::new(policy))),
        _ => return Ok(None),
    };
    let unreadable = InvalidMessage::Value { field: "policies", reason: "one can't be read; is this release too old?" };
    let policy = read.map_err(|_| unreadable.clone())?;
    if policy.resource().kind.as_str() == wire.kind && has_fitting_kind(&policy) {
        Ok(Some(policy))
    } else {
        Err(unreadable)
    }
}

fn has_fitting_kind(policy: &Policy) -> bool {
    let Resource { kind, .. } = policy.resource();
    match policy {
        Policy::Route(_) => matches!(kind, Kind::HttpRoute | Kind::GrpcRoute),
        Policy::Traffic(_) => *kind == Kind::TrafficPolicy,
        Policy::Access(_) => *kind == Kind::AccessPolicy,
    }
}

/// Both fields of `InboundPolicies` about callers that no policy speaks of.
pub fn defaults_to_wire(defaults: &Defaults) -> (bool, std::collections::HashMap<String, bool>) {
    let denies = |access: DefaultAccess| access == DefaultAccess::Deny;
    let peers = defaults.peers.iter().map(|(cluster, access)| (cluster.to_string(), denies(*access)));
    (denies(defaults.cluster), peers.collect())
}

/// # Errors
/// When a cluster's name is none.
pub fn defaults_from_wire(
    deny: bool,
    of_peers: std::collections::HashMap<String, bool>,
) -> Result<Defaults, InvalidMessage> {
    let access = |deny: bool| if deny { DefaultAccess::Deny } else { DefaultAccess::Allow };
    let peers = of_peers.into_iter().map(|(cluster, deny)| Ok((name("cluster", &cluster)?, access(deny))));
    Ok(Defaults { cluster: access(deny), peers: peers.collect::<Result<BTreeMap<_, _>, InvalidMessage>>()? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tombolo_core::policy::access::{AccessPolicy, AccessSpec};

    fn policy() -> Policy {
        let spec: AccessSpec =
            serde_json::from_str(r#"{"action": "deny", "rules": [{"from": [{"namespaces": ["pay"]}]}]}"#).unwrap();
        let resource = Resource::new(Kind::AccessPolicy, "shop".parse().unwrap(), "web").unwrap();
        Policy::Access(Arc::new(AccessPolicy { resource, targets: ["shop/web".parse().unwrap()].into(), spec }))
    }

    #[test]
    fn policies_arrive_as_they_were_sent_and_newer_kinds_are_passed_over() {
        let mut sent = policies_to_wire(&[policy()]);
        sent.push(wire::Policy { kind: "MoodPolicy".into(), json: b"{}".to_vec() });
        assert_eq!(policies_from_wire(sent).unwrap(), [policy()]);
        let defaults =
            Defaults { cluster: DefaultAccess::Deny, peers: [("west".parse().unwrap(), DefaultAccess::Allow)].into() };
        let (deny, of_peers) = defaults_to_wire(&defaults);
        assert_eq!(defaults_from_wire(deny, of_peers).unwrap(), defaults);
    }

    #[test]
    fn a_field_of_a_newer_release_is_passed_over_and_a_value_that_is_not_understood_is_not() {
        let sent = policies_to_wire(&[policy()]).remove(0);
        let with = |from: &str, to: &str| {
            let json = String::from_utf8(sent.json.clone()).unwrap().replacen(from, to, 1).into_bytes();
            policies_from_wire(vec![wire::Policy { kind: sent.kind.clone(), json }])
        };
        assert_eq!(with(r#""action""#, r#""newer": 1, "action""#).unwrap(), [policy()]);
        for (from, to) in [(r#""deny""#, r#""perhaps""#), ("}", ""), ("AccessPolicy", "TrafficPolicy")] {
            assert!(with(from, to).is_err(), "{to}");
        }
    }
}
