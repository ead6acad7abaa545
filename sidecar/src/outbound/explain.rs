//! What a request's way was, for the caller that asks (`tombolo-explain: 1`) and for its span.

use http::header::{HeaderMap, HeaderName, HeaderValue};
use tombolo_core::id::SpiffeId;
use tombolo_core::routing::Pick;
use tombolo_leg::http::HttpLeg;
use tombolo_leg::status::Crossing;
use tombolo_runtime::telemetry::Span;

use super::target::Target;

/// A request with this header gets its way told in the headers of the response.
pub const ASK: HeaderName = HeaderName::from_static("tombolo-explain");
const CLUSTER: HeaderName = HeaderName::from_static("tombolo-cluster");
const ENDPOINT: HeaderName = HeaderName::from_static("tombolo-endpoint");
/// `east/gw-east > west/gw-west`: each gateway crossed with its cluster; the cluster alone for a direct leg.
const PATH: HeaderName = HeaderName::from_static("tombolo-path");
const SERVER_ID: HeaderName = HeaderName::from_static("tombolo-server-id");
const TRIES: HeaderName = HeaderName::from_static("tombolo-tries");
const REASON: HeaderName = HeaderName::from_static("tombolo-pick");

pub fn explain(headers: &mut HeaderMap, target: &Target, leg: &HttpLeg, pick: Pick, tries: u32) {
    let mut say = |name: HeaderName, value: String| {
        // Names and identities are ASCII by their own rules.
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    };
    say(CLUSTER, target.key.cluster.to_string());
    say(ENDPOINT, target.key.endpoint.to_string());
    say(PATH, path(target, leg.crossing()));
    say(SERVER_ID, leg.server_id().to_string());
    say(TRIES, tries.to_string());
    say(REASON, pick.reason.name().to_owned());
}

/// The same in a span, with links to the spans of the gateways' legs.
pub fn describe(span: &mut Span, target: &Target, crossing: &Crossing, server_id: &SpiffeId) {
    if !span.is_recording() {
        return;
    }
    span.attr("tombolo.cluster", &target.key.cluster);
    span.attr("tombolo.endpoint", &target.key.endpoint);
    span.attr("tombolo.server_id", server_id);
    span.attr("tombolo.path", path(target, crossing));
    for hop in &crossing.hops {
        if let Some(link) = hop.span {
            span.link(link);
        }
    }
}

pub fn path(target: &Target, crossing: &Crossing) -> String {
    if crossing.hops.is_empty() {
        return target.key.cluster.to_string();
    }
    let hops: Vec<_> = crossing.hops.iter().map(|hop| format!("{}/{}", hop.cluster, hop.gateway_id)).collect();
    hops.join(" > ")
}
