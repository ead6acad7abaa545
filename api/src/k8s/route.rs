//! `HTTPRoute` and `GRPCRoute` (gateway.networking.k8s.io/v1) as operators write them, and how they become the form in
//! which they are decided. Only routes whose parent is a Service or a ServiceImport (GAMMA, GEP-1426) are ours.
//!
//! Unknown fields are those of a later release of the Gateway API and are passed over; an unknown filter is not, since
//! a request that should be changed would pass as it is.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use tombolo_core::id::{ClusterId, Namespace, ServiceName};
use tombolo_core::policy::matching::{GrpcMatch, HttpMatch};
use tombolo_core::policy::route::{
    Backend, Filters, Fraction, HeaderChange, Mirror, Parent, PathChange, RULES_MAX, Redirect, RequestMatch, Retry,
    Rewrite, Route, Rule, Timeouts,
};
use tombolo_core::policy::set::Policy;
use tombolo_core::policy::{InvalidField, Kind, Resource};

use super::policy::{bounded, created, is_service, resource};

/// Services that one route may be bound to (the Gateway API's own limit).
const PARENTS_MAX: usize = 32;

/// A route as written; `M` is the kind's match.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct WrittenRoute<M> {
    pub metadata: ObjectMeta,
    pub spec: Spec<M>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec<M> {
    #[serde(default)]
    parent_refs: Vec<ParentRef>,
    #[serde(default)]
    hostnames: Vec<String>,
    #[serde(default = "Vec::new")]
    rules: Vec<WrittenRule<M>>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ParentRef {
    #[serde(default = "gateway_group")]
    group: String,
    #[serde(default = "gateway")]
    kind: String,
    namespace: Option<Namespace>,
    name: String,
    section_name: Option<String>,
    port: Option<u16>,
}

fn gateway_group() -> String {
    "gateway.networking.k8s.io".into()
}

fn gateway() -> String {
    "Gateway".into()
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenRule<M> {
    name: Option<String>,
    #[serde(default = "Vec::new")]
    matches: Vec<M>,
    #[serde(default)]
    filters: Vec<Filter>,
    #[serde(default)]
    backend_refs: Vec<BackendRef>,
    #[serde(default)]
    timeouts: Timeouts,
    retry: Option<Retry>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BackendRef {
    #[serde(default)]
    group: String,
    #[serde(default = "service")]
    kind: String,
    namespace: Option<Namespace>,
    name: String,
    port: Option<u16>,
    #[serde(default = "one")]
    weight: u32,
    #[serde(default)]
    filters: Vec<Filter>,
}

fn service() -> String {
    "Service".into()
}

fn one() -> u32 {
    1
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter {
    #[serde(rename = "type")]
    kind: String,
    request_header_modifier: Option<HeaderModifier>,
    response_header_modifier: Option<HeaderModifier>,
    request_redirect: Option<WrittenRedirect>,
    url_rewrite: Option<WrittenRewrite>,
    request_mirror: Option<WrittenMirror>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenMirror {
    backend_ref: BackendRef,
    percent: Option<u32>,
    fraction: Option<WrittenFraction>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct WrittenFraction {
    numerator: u32,
    #[serde(default = "hundred")]
    denominator: u32,
}

fn hundred() -> u32 {
    100
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct HeaderModifier {
    #[serde(default)]
    set: Vec<Header>,
    #[serde(default)]
    add: Vec<Header>,
    #[serde(default)]
    remove: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<WrittenPath>,
    port: Option<u16>,
    #[serde(default = "found")]
    status_code: u16,
}

fn found() -> u16 {
    302
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct WrittenRewrite {
    hostname: Option<String>,
    path: Option<WrittenPath>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenPath {
    #[serde(rename = "type")]
    kind: String,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

/// A match of either kind.
pub trait Match: Into<RequestMatch> {
    const KIND: Kind;
}

impl Match for HttpMatch {
    const KIND: Kind = Kind::HttpRoute;
}

impl Match for GrpcMatch {
    const KIND: Kind = Kind::GrpcRoute;
}

/// The route in the form in which it is decided; `None` where none of its parents is a service. A backend of kind
/// Service means the endpoints of `own`, the cluster where it is written; a ServiceImport those of all clusters.
///
/// # Errors
/// What is wrong, with the resource and the field.
pub(super) fn route<M: Match>(written: WrittenRoute<M>, own: &ClusterId) -> Result<Option<Policy>, String> {
    let resource = resource(M::KIND, &written.metadata)?;
    let created = created(&written.metadata);
    let name = resource.to_string();
    let named = |error: InvalidField| format!("{name}: {}", error.within("spec"));
    let conversion = Conversion { resource, own };
    let parents = conversion.parents(&written.spec.parent_refs).map_err(named)?;
    if parents.is_empty() {
        return Ok(None);
    }
    if !written.spec.hostnames.is_empty() {
        return Err(named(InvalidField::new(
            "hostnames",
            "a route of a service has none; match the header host instead",
        )));
    }
    if written.spec.rules.len() > RULES_MAX {
        return Err(named(InvalidField::new("rules", format!("more than {RULES_MAX} rules"))));
    }
    let rule = |(at, rule): (usize, WrittenRule<M>)| {
        conversion.rule(rule).map_err(|error| error.within(&format!("rules[{at}]")))
    };
    let rules = written.spec.rules.into_iter().enumerate().map(rule).collect::<Result<_, _>>().map_err(named)?;
    let route = Route { resource: conversion.resource, created, parents, rules };
    bounded(&route).map_err(named)?;
    Ok(Some(Policy::Route(route.into())))
}

/// The one filter of which a rule may have several.
const MIRROR: &str = "RequestMirror";

struct Conversion<'a> {
    resource: Resource,
    own: &'a ClusterId,
}

impl Conversion<'_> {
    fn parents(&self, written: &[ParentRef]) -> Result<Vec<Parent>, InvalidField> {
        if written.len() > PARENTS_MAX {
            return Err(InvalidField::new("parentRefs", format!("more than {PARENTS_MAX} entries")));
        }
        let ours = written.iter().enumerate().filter(|(_, parent)| is_service(&parent.group, &parent.kind));
        let parent = |(at, parent): (usize, &ParentRef)| {
            let invalid = |field: &str, reason: String| InvalidField::new(format!("parentRefs[{at}].{field}"), reason);
            if parent.section_name.is_some() {
                return Err(invalid("sectionName", "name the port by its number, in `port`".into()));
            }
            let service = self.service(parent.namespace.as_ref(), &parent.name);
            Ok(Parent { service: service.map_err(|reason| invalid("name", reason))?, port: parent.port })
        };
        ours.map(parent).collect()
    }

    fn service(&self, namespace: Option<&Namespace>, name: &str) -> Result<ServiceName, String> {
        let namespace = namespace.unwrap_or(&self.resource.namespace).clone();
        ServiceName::new(namespace, name).map_err(|error| error.to_string())
    }

    fn rule<M: Match>(&self, written: WrittenRule<M>) -> Result<Rule, InvalidField> {
        let backend = |(at, backend): (usize, BackendRef)| {
            self.backend(backend).map_err(|error| error.within(&format!("backendRefs[{at}]")))
        };
        let rule = Rule {
            name: written.name,
            matches: written.matches.into_iter().map(Into::into).collect(),
            filters: self.filters(written.filters)?,
            backends: written.backend_refs.into_iter().enumerate().map(backend).collect::<Result<_, _>>()?,
            timeouts: written.timeouts,
            retry: written.retry,
        };
        rule.check()?;
        Ok(rule)
    }

    fn backend(&self, written: BackendRef) -> Result<Backend, InvalidField> {
        if !is_service(&written.group, &written.kind) {
            let reason =
                format!("{:?} of group {:?} is neither Service nor ServiceImport", written.kind, written.group);
            return Err(InvalidField::new("kind", reason));
        }
        let service = self.service(written.namespace.as_ref(), &written.name);
        let filters = self.filters(written.filters)?;
        if filters.rewrite.is_some() || filters.redirect.is_some() || !filters.mirrors.is_empty() {
            return Err(InvalidField::new("filters", "a backend takes header modifiers only"));
        }
        Ok(Backend {
            service: service.map_err(|reason| InvalidField::new("name", reason))?,
            port: written.port,
            cluster: (written.kind == "Service").then(|| self.own.clone()),
            weight: written.weight,
            request_headers: filters.request_headers,
            response_headers: filters.response_headers,
        })
    }

    fn filters(&self, written: Vec<Filter>) -> Result<Filters, InvalidField> {
        let mut filters = Filters::default();
        let mut seen: Vec<String> = Vec::new();
        for (at, filter) in written.into_iter().enumerate() {
            let at = format!("filters[{at}]");
            if filter.kind != MIRROR && seen.contains(&filter.kind) {
                return Err(InvalidField::new(format!("{at}.type"), format!("{} stands here twice", filter.kind)));
            }
            seen.push(filter.kind.clone());
            let missing = |field: &str| InvalidField::new(format!("{at}.{field}"), "is missing");
            let headers = |field: &str, written: Option<HeaderModifier>| {
                let changed = header_change(written.ok_or_else(|| missing(field))?);
                changed.map_err(|error| error.within(field).within(&at))
            };
            match filter.kind.as_str() {
                "RequestHeaderModifier" => {
                    filters.request_headers = headers("requestHeaderModifier", filter.request_header_modifier)?;
                }
                "ResponseHeaderModifier" => {
                    filters.response_headers = headers("responseHeaderModifier", filter.response_header_modifier)?;
                }
                "RequestRedirect" => {
                    let written = filter.request_redirect.ok_or_else(|| missing("requestRedirect"))?;
                    let redirect = redirect(written).map_err(|error| error.within("requestRedirect").within(&at));
                    filters.redirect = Some(redirect?);
                }
                "URLRewrite" => {
                    let written = filter.url_rewrite.ok_or_else(|| missing("urlRewrite"))?;
                    let path = written.path.map(path).transpose();
                    let path = path.map_err(|error| error.within("urlRewrite").within(&at))?;
                    let hostname =
                        hostname(written.hostname).map_err(|error| error.within("urlRewrite").within(&at))?;
                    filters.rewrite = Some(Rewrite { hostname, path });
                }
                MIRROR => {
                    let written = filter.request_mirror.ok_or_else(|| missing("requestMirror"))?;
                    let mirror = self.mirror(written).map_err(|error| error.within("requestMirror").within(&at));
                    filters.mirrors.push(mirror?);
                }
                other => {
                    let reason = format!(
                        "{other:?} is not carried; RequestHeaderModifier, ResponseHeaderModifier, RequestRedirect, \
                         URLRewrite and RequestMirror are"
                    );
                    return Err(InvalidField::new(format!("{at}.type"), reason));
                }
            }
        }
        Ok(filters)
    }

    fn mirror(&self, written: WrittenMirror) -> Result<Mirror, InvalidField> {
        let backend = self.backend(written.backend_ref).map_err(|error| error.within("backendRef"))?;
        let fraction = match (written.percent, written.fraction) {
            (None, None) => Fraction::ALL,
            (Some(percent), None) if percent <= 100 => Fraction { numerator: percent, denominator: 100 },
            (Some(percent), None) => {
                return Err(InvalidField::new("percent", format!("{percent} is not from 0 to 100")));
            }
            (None, Some(WrittenFraction { numerator, denominator })) => Fraction { numerator, denominator },
            (Some(_), Some(_)) => {
                return Err(InvalidField::new("fraction", "percent stands here too; write one of them"));
            }
        };
        Ok(Mirror { backend, fraction })
    }
}

fn header_change(written: HeaderModifier) -> Result<HeaderChange, InvalidField> {
    let pairs = |headers: Vec<Header>| headers.into_iter().map(|header| (header.name, header.value)).collect();
    HeaderChange { set: pairs(written.set), add: pairs(written.add), remove: written.remove }.checked()
}

fn redirect(written: WrittenRedirect) -> Result<Redirect, InvalidField> {
    if let Some(scheme) = written.scheme.as_deref().filter(|scheme| !matches!(*scheme, "http" | "https")) {
        return Err(InvalidField::new("scheme", format!("{scheme:?} is not http or https")));
    }
    Ok(Redirect {
        scheme: written.scheme,
        hostname: hostname(written.hostname)?,
        path: written.path.map(path).transpose()?,
        port: written.port,
        status: written.status_code,
    })
}

/// A DNS name without wildcards (`PreciseHostname`).
fn hostname(written: Option<String>) -> Result<Option<String>, InvalidField> {
    let valid = |name: &str| {
        let octet = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        name.len() <= 253 && name.split('.').all(|label| !label.is_empty() && label.bytes().all(octet))
    };
    match written {
        Some(name) if !valid(&name) => Err(InvalidField::new("hostname", format!("{name:?} is not a DNS name"))),
        written => Ok(written),
    }
}

fn path(written: WrittenPath) -> Result<PathChange, InvalidField> {
    let WrittenPath { kind, replace_full_path, replace_prefix_match } = written;
    let (field, value) = match kind.as_str() {
        "ReplaceFullPath" => ("replaceFullPath", replace_full_path),
        "ReplacePrefixMatch" => ("replacePrefixMatch", replace_prefix_match),
        other => {
            return Err(InvalidField::new(
                "path.type",
                format!("{other:?} is not ReplaceFullPath or ReplacePrefixMatch"),
            ));
        }
    };
    let invalid = |reason: String| InvalidField::new(format!("path.{field}"), reason);
    let value = value.ok_or_else(|| invalid("is missing".into()))?;
    let printable = value.bytes().all(|b| b.is_ascii_graphic()) && !value.contains(['?', '#']);
    let absolute = value.starts_with('/') || (kind == "ReplacePrefixMatch" && value.is_empty());
    if !printable || !absolute || value.len() > 1_024 {
        return Err(invalid(format!("{value:?} is not an absolute path of printable ASCII without a query")));
    }
    Ok(if kind == "ReplaceFullPath" {
        PathChange::ReplaceFullPath(value)
    } else {
        PathChange::ReplacePrefixMatch(value)
    })
}
