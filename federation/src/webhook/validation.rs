//! Policies, routes and peers as they are written: what the federation could not read is refused at once, with the reason that
//! `tombolo status` would give later.

use serde_json::{Value, json};
use tombolo_api::k8s::{declared, from_value};
use tombolo_core::id::ClusterId;

use super::admission::NotAnswered;

/// Answers a review with another one; with the reason where the object is refused.
pub fn answer(review: &Value, cluster: &ClusterId) -> Result<(Value, Option<String>), NotAnswered> {
    let request = &review["request"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let uid = text(&request["uid"]).ok_or(NotAnswered::Malformed("request.uid is missing"))?;
    let kind = text(&request["kind"]["kind"]).ok_or(NotAnswered::Malformed("request.kind is missing"))?;
    let version = text(&request["object"]["apiVersion"]).ok_or(NotAnswered::Malformed("request.object is missing"))?;
    let judged = if is_ours(request, &kind) { judge(&version, &kind, &request["object"], cluster) } else { Ok(()) };
    let mut response = json!({ "uid": uid, "allowed": judged.is_ok() });
    if let Err(reason) = &judged {
        response["status"] = json!({ "code": 422, "reason": "Invalid", "message": reason });
    }
    let answer = json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response });
    Ok((answer, judged.err()))
}

fn judge(version: &str, kind: &str, object: &Value, cluster: &ClusterId) -> Result<(), String> {
    match from_value(version, kind, object.clone())? {
        Some(resource) => declared(resource, cluster).map(drop),
        None => Ok(()),
    }
}

/// Routes of gateways are somebody else's, and may say what tombolo has not heard of. What is only labelled anew, or on its
/// way out, is not judged again.
fn is_ours(request: &Value, kind: &str) -> bool {
    let (object, old) = (&request["object"], &request["oldObject"]);
    if old.is_object() && old["spec"] == object["spec"] {
        return false;
    }
    let parents = object["spec"]["parentRefs"].as_array().into_iter().flatten();
    let mut kinds = parents.filter_map(|parent| parent["kind"].as_str());
    !matches!(kind, "HTTPRoute" | "GRPCRoute") || kinds.any(|kind| matches!(kind, "Service" | "ServiceImport"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn review(kind: &str, spec: &Value) -> Value {
        let object = json!({
            "apiVersion": "tombolo.dev/v1alpha1",
            "kind": kind,
            "metadata": { "name": "web", "namespace": "shop" },
            "spec": spec,
        });
        json!({ "request": { "uid": "1", "kind": { "kind": kind }, "object": object } })
    }

    #[test]
    fn what_can_not_be_read_is_refused_with_the_reason_of_a_file() {
        let cluster = "west".parse().unwrap();
        let targets = json!([{ "kind": "Service", "name": "web" }]);
        let good = json!({ "targetRefs": targets, "rules": [{ "from": [{ "namespaces": ["ops"] }] }] });
        let (said, refused) = answer(&review("AccessPolicy", &good), &cluster).unwrap();
        assert_eq!((&said["response"], refused), (&json!({ "uid": "1", "allowed": true }), None));
        let wrong = json!({ "targetRefs": targets, "rulez": [] });
        let (said, refused) = answer(&review("AccessPolicy", &wrong), &cluster).unwrap();
        let reason = "AccessPolicy shop/web: spec.rulez: is not a field here; check its spelling";
        assert_eq!((&said["response"]["allowed"], refused.as_deref()), (&json!(false), Some(reason)));
        assert_eq!(said["response"]["status"]["message"], reason);
        let mut labelled = review("AccessPolicy", &wrong);
        labelled["request"]["oldObject"] = labelled["request"]["object"].clone();
        assert_eq!(answer(&labelled, &cluster).unwrap().1, None, "or nobody could take a finalizer away");
        let mut route = review("HTTPRoute", &json!({ "parentRefs": [{ "name": "edge" }], "rules": 7 }));
        route["request"]["object"]["apiVersion"] = json!("gateway.networking.k8s.io/v1");
        assert_eq!(answer(&route, &cluster).unwrap().1, None, "a gateway's");
        route["request"]["object"]["spec"]["parentRefs"][0]["kind"] = json!("Service");
        assert!(answer(&route, &cluster).unwrap().1.unwrap().contains("HTTPRoute"));
        // What is not tombolo's is no affair of it.
        assert_eq!(answer(&review("Other", &json!({})), &cluster).unwrap().1, None);
        assert!(answer(&json!({}), &cluster).is_err());
    }
}
