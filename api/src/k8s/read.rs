//! Reads files of several YAML documents, each dispatched by its `apiVersion` and `kind`, so that every
//! mistake is reported with its line and one bad document hides no other.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{GATEWAY_GROUP, MULTICLUSTER_GROUP, Resource, TOMBOLO_GROUP, policy};

/// Documents read from one file.
pub const DOCUMENTS_MAX: usize = 1_000;

/// A resource and the line where it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// 1-based line of the first key.
    pub line: u32,
    pub resource: Resource,
}

/// Why a document can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct Unreadable {
    /// 1-based.
    pub line: u32,
    pub reason: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypeMeta {
    api_version: Option<String>,
    kind: Option<String>,
}

/// Reads every document of `text`. Kinds of other software are skipped; all that is wrong is returned.
pub fn documents(text: &str) -> Result<Vec<Document>, Vec<Unreadable>> {
    let (mut read, mut wrong) = (Vec::new(), Vec::new());
    for (count, raw) in split(text).into_iter().enumerate() {
        if count == DOCUMENTS_MAX {
            let reason = format!("more than {DOCUMENTS_MAX} documents in one file; split it");
            wrong.push(Unreadable { line: raw.line, reason });
            break;
        }
        match dispatch(&raw) {
            Ok(Some(resource)) => read.push(Document { line: raw.line, resource }),
            Ok(None) => {}
            Err(unreadable) => wrong.push(unreadable),
        }
    }
    if wrong.is_empty() { Ok(read) } else { Err(wrong) }
}

/// The AccessPolicies of a file that is refused, while nothing better is known of it: in the place of one that can't be read stands
/// one that refuses every caller, so that a mistake opens nothing.
pub fn access_policies(text: &str) -> Vec<Document> {
    let policy = |raw: Raw| {
        let is_access = raw.parse().is_ok_and(|meta: TypeMeta| meta.kind.is_some_and(|kind| kind == "AccessPolicy"));
        let policy = is_access.then(|| policy::access(&raw).ok().or_else(|| policy::closed(&raw))).flatten()?;
        Some(Document { line: raw.line, resource: Resource::Policy(Box::new(policy)) })
    };
    split(text).into_iter().take(DOCUMENTS_MAX).filter_map(policy).collect()
}

/// A document as it was written, of whatever kind.
#[derive(Debug, Clone, PartialEq)]
pub struct RawDocument {
    /// 1-based line of the first key.
    pub line: u32,
    pub text: String,
    pub value: serde_json::Value,
}

/// Reads every document of `text` and judges none.
pub fn raw_documents(text: &str) -> Result<Vec<RawDocument>, Vec<Unreadable>> {
    let (mut read, mut wrong) = (Vec::new(), Vec::new());
    for raw in split(text) {
        match raw.parse() {
            Ok(value) => {
                // The marker's own line.
                let text = match raw.text.split_once('\n') {
                    Some((first, rest)) if first.trim().is_empty() => rest.to_owned(),
                    _ => raw.text,
                };
                read.push(RawDocument { line: raw.line, text, value });
            }
            Err(unreadable) => wrong.push(unreadable),
        }
    }
    if wrong.is_empty() { Ok(read) } else { Err(wrong) }
}

/// One document's text, and the line of its first key.
struct Raw {
    text: String,
    /// Lines of the file before `text`.
    before: u32,
    line: u32,
}

/// Splits at `---` in the first column, which YAML allows nowhere else (YAML 1.2.2 section 9.1.2), and
/// leaves out documents of nothing but comments.
fn split(text: &str) -> Vec<Raw> {
    let mut raws = Vec::new();
    let mut current = Raw { text: String::new(), before: 0, line: 0 };
    for (line, number) in text.trim_start_matches('\u{feff}').split_inclusive('\n').zip(1..) {
        let marker =
            line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n', '\r']));
        let content = match marker {
            Some(rest) => {
                let next = Raw { text: String::new(), before: number - 1, line: 0 };
                raws.push(std::mem::replace(&mut current, next));
                current.text.push_str("   ");
                rest
            }
            None => line,
        };
        let trimmed = content.trim();
        if current.line == 0 && !trimmed.is_empty() && !trimmed.starts_with(['#', '%']) && trimmed != "..." {
            current.line = number;
        }
        current.text.push_str(content);
    }
    raws.push(current);
    raws.retain(|raw| raw.line != 0);
    raws
}

fn dispatch(raw: &Raw) -> Result<Option<Resource>, Unreadable> {
    let unreadable = |reason: String| Unreadable { line: raw.line, reason };
    let meta: TypeMeta = raw.parse()?;
    let (Some(version), Some(kind)) = (meta.api_version, meta.kind) else {
        return Err(unreadable("every document needs apiVersion and kind".into()));
    };
    let group = version.split_once('/').map_or("", |(group, _)| group);
    let resource = match (version.as_str(), kind.as_str()) {
        ("v1", "Namespace") => Resource::Namespace(raw.parse()?),
        ("v1", "Service") => Resource::Service(raw.parse()?),
        ("discovery.k8s.io/v1", "EndpointSlice") => Resource::EndpointSlice(raw.parse()?),
        ("multicluster.x-k8s.io/v1beta1" | "multicluster.x-k8s.io/v1alpha1", "ServiceExport") => {
            Resource::ServiceExport(raw.parse()?)
        }
        ("tombolo.dev/v1alpha1", "ClusterPeer") => Resource::ClusterPeer(raw.parse()?),
        ("gateway.networking.k8s.io/v1" | "gateway.networking.k8s.io/v1beta1", "HTTPRoute") => {
            Resource::HttpRoute(raw.parse()?)
        }
        ("gateway.networking.k8s.io/v1", "GRPCRoute") => Resource::GrpcRoute(raw.parse()?),
        ("tombolo.dev/v1alpha1", "AccessPolicy") => Resource::Policy(Box::new(policy::access(raw)?)),
        ("tombolo.dev/v1alpha1", "TrafficPolicy") => Resource::Policy(Box::new(policy::traffic(raw)?)),
        ("v1", "List") => return Err(unreadable("List is not read; write its items as documents of their own".into())),
        // A known kind under another version would otherwise be left out without a word.
        (_, "Service" | "EndpointSlice" | "ServiceExport" | "ClusterPeer" | "AccessPolicy" | "TrafficPolicy") => {
            return Err(unreadable(format!("{kind} is not read as {version}; use {}", version_of(&kind))));
        }
        (_, "HTTPRoute" | "GRPCRoute") if group == GATEWAY_GROUP => {
            return Err(unreadable(format!("{kind} is not read as {version}; use {GATEWAY_GROUP}/v1")));
        }
        _ if group == TOMBOLO_GROUP => {
            let known = "ClusterPeer, AccessPolicy and TrafficPolicy";
            return Err(unreadable(format!("{version} has no kind {kind}; it has {known}")));
        }
        // ServiceImport and whatever the group may gain are written by others.
        _ if group == MULTICLUSTER_GROUP => return Ok(None),
        _ => return Ok(None),
    };
    Ok(Some(resource))
}

fn version_of(kind: &str) -> &'static str {
    match kind {
        "Service" => "v1",
        "EndpointSlice" => "discovery.k8s.io/v1",
        "ServiceExport" => "multicluster.x-k8s.io/v1beta1",
        _ => "tombolo.dev/v1alpha1",
    }
}

impl policy::Source for Raw {
    type Error = Unreadable;

    fn read<T: DeserializeOwned>(&self) -> Result<T, Unreadable> {
        self.parse()
    }

    fn refused(&self, reason: String) -> Unreadable {
        Unreadable { line: self.line, reason }
    }
}

impl Raw {
    fn parse<T: DeserializeOwned>(&self) -> Result<T, Unreadable> {
        let options = serde_saphyr::options! { with_snippet: false };
        serde_saphyr::from_str_with_options(&self.text, options).map_err(|error| {
            let line = error.location().and_then(|at| u32::try_from(at.line()).ok()).filter(|line| *line != 0);
            let line = line.map_or(self.line, |line| self.before + line);
            Unreadable { line, reason: reason_of(&error) }
        })
    }
}

/// The parser's own words on one line, without the place, which is told on its own.
fn reason_of(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let text = match error.location() {
        Some(at) => text.replace(&format!(" at line {}, column {}", at.line(), at.column()), ""),
        None => text,
    };
    // What was written may be quoted in the message, and may be long or contain control characters.
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let printable = words.chars().filter(|c| !c.is_control());
    if words.chars().count() > 300 { printable.take(299).chain(['…']).collect() } else { printable.collect() }
}
