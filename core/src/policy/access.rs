//! `AccessPolicy` (tombolo.dev/v1alpha1): who may call what. Decided where the service is delivered, for each
//! request (for each connection where requests can't be told apart), after [`crate::authz::authorize`].
//!
//! A denying rule that matches refuses, whatever else allows. A service that any allowing policy selects is
//! refused to everybody whom none of their rules allows. What no policy decides, the default access does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::matching::is_method;
use super::{InvalidField, Resource};
use crate::authz::Client;
use crate::id::{ClusterId, Namespace, ServiceName, SpiffeId};

/// Rules of one policy, and entries of one list in it.
const ENTRIES_MAX: usize = 64;

/// One policy, with the services that it selects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessPolicy {
    pub resource: Resource,
    /// Services of the policy's namespace; empty selects all of them.
    #[serde(default)]
    pub targets: BTreeSet<ServiceName>,
    pub spec: AccessSpec,
}

impl AccessPolicy {
    pub fn selects(&self, service: &ServiceName) -> bool {
        if self.targets.is_empty() {
            return *service.namespace() == self.resource.namespace;
        }
        self.targets.contains(service)
    }
}

/// What a policy says. No rule at all: an allowing policy refuses everybody, a denying one nobody.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct AccessSpec {
    /// allow: only those may call whom a rule of an allowing policy allows. deny: whom a rule matches is refused,
    /// whatever else allows.
    pub action: AccessAction,
    /// enforce, or audit: refuses nobody; what it would have refused is logged and counted.
    pub mode: Mode,
    /// One that matches is enough.
    #[schemars(length(max = 64))]
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AccessAction {
    #[default]
    Allow,
    Deny,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    #[default]
    Enforce,
    /// Decides nothing; what it would have refused is counted and logged.
    Audit,
}

/// Matches when one of `from` and one of `to` do; an absent list is everybody, or everything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Rule {
    /// Who calls; everybody if absent. One that matches is enough.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub from: Vec<Callers>,
    /// What is called; everything if absent. One that matches is enough.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub to: Vec<Calls>,
}

/// Who calls: every list that is given must have an entry that matches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Callers {
    /// `*` stands for any characters of one path segment, or of the trust domain.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub spiffe_ids: Vec<String>,
    /// Of workloads, in whatever cluster: a namespace is the same one everywhere (KEP-1645).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>", length(max = 64))]
    pub namespaces: Vec<Namespace>,
    /// Ids of the callers' clusters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>", length(max = 64))]
    pub clusters: Vec<ClusterId>,
    /// `namespace/name`, or `name` in the policy's own namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub service_accounts: Vec<String>,
}

/// What is called: every list that is given must have an entry that matches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Calls {
    /// The service's ports, 1 to 65535.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub ports: Vec<u16>,
    /// As in the request: GET.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub methods: Vec<String>,
    /// The exact path, or with `*` at its end everything that begins with what is before it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub paths: Vec<String>,
}

/// What becomes of callers that no policy speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DefaultAccess {
    /// The export is the grant.
    #[default]
    Allow,
    Deny,
}

/// The default for all callers, and for those of each peer that has one of its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Defaults {
    pub cluster: DefaultAccess,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<ClusterId, DefaultAccess>,
}

impl Defaults {
    /// A peer's own entry comes before the cluster's.
    pub fn of(&self, cluster: &ClusterId) -> DefaultAccess {
        self.peers.get(cluster).copied().unwrap_or(self.cluster)
    }
}

/// What is asked for. `http` is `None` where requests can't be told apart.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub service: &'a ServiceName,
    pub port: u16,
    pub http: Option<HttpAsked<'a>>,
}

#[derive(Debug, Clone, Copy)]
pub struct HttpAsked<'a> {
    pub method: &'a str,
    /// As it stands in the request, without the query.
    pub path: &'a str,
}

/// The decision, with what decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict<'a> {
    pub reason: Reason<'a>,
    /// Set when policies that only audit would have refused what is allowed.
    pub audit: Option<Reason<'a>>,
}

impl Verdict<'_> {
    pub fn is_allowed(&self) -> bool {
        self.reason.is_allowed()
    }
}

/// What decided. Printed by `explain` and in the logs; never told to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason<'a> {
    /// By the 0-based rule of a policy.
    Allowed(&'a Resource, usize),
    Denied(&'a Resource, usize),
    /// This policy, the first by name, selects the service, and no rule of an allowing one matches.
    NotAllowed(&'a Resource),
    Default(DefaultAccess),
}

impl Reason<'_> {
    pub fn is_allowed(&self) -> bool {
        match self {
            Reason::Allowed(..) | Reason::Default(DefaultAccess::Allow) => true,
            Reason::Denied(..) | Reason::NotAllowed(_) | Reason::Default(DefaultAccess::Deny) => false,
        }
    }
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Allowed(policy, rule) => write!(f, "allowed by {policy}, rule {rule}"),
            Reason::Denied(policy, rule) => write!(f, "denied by {policy}, rule {rule}"),
            Reason::NotAllowed(policy) => {
                write!(f, "denied: {policy} selects the service, and no rule of an allowing policy matches")
            }
            Reason::Default(DefaultAccess::Allow) => f.write_str("allowed: no AccessPolicy selects the service"),
            Reason::Default(DefaultAccess::Deny) => {
                f.write_str("denied: defaultAccess is deny, and no AccessPolicy allows it")
            }
        }
    }
}

/// Whether `client` may do what it asks for.
pub fn decide<'a, P>(policies: &'a [P], defaults: &Defaults, client: Client<'_>, asked: Asked<'_>) -> Verdict<'a>
where
    P: AsRef<AccessPolicy>,
{
    let default = defaults.of(client.cluster);
    let among = |audited: bool| {
        let policies = policies.iter().map(AsRef::as_ref);
        let counted = policies.filter(move |policy| audited || policy.spec.mode == Mode::Enforce);
        judge(counted.filter(|policy| policy.selects(asked.service)), default, client, asked)
    };
    let reason = among(false);
    let audits = policies.iter().any(|policy| policy.as_ref().spec.mode == Mode::Audit);
    let audit =
        if audits && reason.is_allowed() { Some(among(true)).filter(|reason| !reason.is_allowed()) } else { None };
    Verdict { reason, audit }
}

fn judge<'a>(
    policies: impl Iterator<Item = &'a AccessPolicy>,
    default: DefaultAccess,
    client: Client<'_>,
    asked: Asked<'_>,
) -> Reason<'a> {
    let (mut allowed, mut allowing) = (None, None);
    for policy in policies {
        let matched = policy.spec.rules.iter().position(|rule| rule.matches(policy, client, asked));
        match (policy.spec.action, matched) {
            (AccessAction::Deny, Some(rule)) => return Reason::Denied(&policy.resource, rule),
            (AccessAction::Deny, None) => {}
            (AccessAction::Allow, matched) => {
                allowing = allowing.or(Some(&policy.resource));
                allowed = allowed.or(matched.map(|rule| Reason::Allowed(&policy.resource, rule)));
            }
        }
    }
    match (allowed, allowing) {
        (Some(allowed), _) => allowed,
        (None, Some(policy)) => Reason::NotAllowed(policy),
        (None, None) => Reason::Default(default),
    }
}

impl Rule {
    fn matches(&self, policy: &AccessPolicy, client: Client<'_>, asked: Asked<'_>) -> bool {
        let from =
            self.from.is_empty() || self.from.iter().any(|from| from.matches(&policy.resource.namespace, client));
        from && (self.to.is_empty() || self.to.iter().any(|to| to.matches(policy.spec.action, asked)))
    }
}

impl Callers {
    fn matches(&self, own: &Namespace, client: Client<'_>) -> bool {
        let workload = client.id.as_workload();
        let account_matches = |wanted: &String| {
            let (namespace, account) = wanted.split_once('/').unwrap_or((own.as_str(), wanted));
            workload == Some((namespace, account))
        };
        let in_namespace = |wanted: &Namespace| workload.is_some_and(|(namespace, _)| namespace == wanted.as_str());
        (self.spiffe_ids.is_empty() || self.spiffe_ids.iter().any(|pattern| id_matches(pattern, client.id)))
            && (self.namespaces.is_empty() || self.namespaces.iter().any(in_namespace))
            && (self.clusters.is_empty() || self.clusters.contains(client.cluster))
            && (self.service_accounts.is_empty() || self.service_accounts.iter().any(account_matches))
    }
}

fn id_matches(pattern: &str, id: &SpiffeId) -> bool {
    let Some((domain, path)) = pattern.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')) else {
        return false;
    };
    let mut wanted = path.split('/');
    let mut segments = id.path().split('/').skip(1);
    glob(domain.as_bytes(), id.trust_domain().as_str().as_bytes())
        && segments.all(|segment| wanted.next().is_some_and(|wanted| glob(wanted.as_bytes(), segment.as_bytes())))
        && wanted.next().is_none()
}

/// Whether `text` is `pattern` with any octets in the place of each `*`. Linear but for one step back.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut seen, mut star) = (0, 0, None);
    while seen < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, seen));
                at += 1;
            }
            Some(octet) if *octet == text[seen] => (at, seen) = (at + 1, seen + 1),
            _ => {
                let Some((back, from)) = star else { return false };
                star = Some((back, from + 1));
                (at, seen) = (back + 1, from + 1);
            }
        }
    }
    pattern[at..].iter().all(|octet| *octet == b'*')
}

impl Calls {
    fn matches(&self, action: AccessAction, asked: Asked<'_>) -> bool {
        if !self.ports.is_empty() && !self.ports.contains(&asked.port) {
            return false;
        }
        if self.methods.is_empty() && self.paths.is_empty() {
            return true;
        }
        // What can't be seen must not let anybody in, and must not let anybody slip past a denial.
        let unseen = action == AccessAction::Deny;
        let Some(http) = asked.http else { return unseen };
        if !self.methods.is_empty() && !self.methods.iter().any(|method| method == http.method) {
            return false;
        }
        if self.paths.is_empty() {
            return true;
        }
        if is_ambiguous(http.path) {
            return unseen;
        }
        self.paths.iter().any(|wanted| match wanted.strip_suffix('*') {
            Some(prefix) => http.path.starts_with(prefix),
            None => http.path == wanted,
        })
    }
}

/// A path that the application may read as another one: empty, dot or encoded elements.
fn is_ambiguous(path: &str) -> bool {
    let odd = |element: &str| {
        let element = element.split(';').next().unwrap_or(element);
        matches!(element, "" | "." | "..")
    };
    let inner = path.strip_prefix('/').unwrap_or(path);
    let inner = inner.strip_suffix('/').unwrap_or(inner);
    path.contains(['%', '\\'])
        || (!inner.is_empty() && inner.split('/').any(odd))
        || !path.starts_with('/')
        || path == "//"
}

impl AccessSpec {
    /// Refuses everybody: what stands in the place of a policy of which nothing better is known.
    pub fn closed() -> Self {
        Self { action: AccessAction::Deny, mode: Mode::Enforce, rules: vec![Rule::default()] }
    }

    /// Checks what the fields' own types can't, with the field named from `spec` on.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), InvalidField> {
        bounded("rules", self.rules.len())?;
        self.rules
            .iter()
            .enumerate()
            .try_for_each(|(index, rule)| rule.check().map_err(|error| error.within(&format!("rules[{index}]"))))
    }
}

impl Rule {
    fn check(&self) -> Result<(), InvalidField> {
        bounded("from", self.from.len())?;
        bounded("to", self.to.len())?;
        for (index, from) in self.from.iter().enumerate() {
            from.check().map_err(|error| error.within(&format!("from[{index}]")))?;
        }
        for (index, to) in self.to.iter().enumerate() {
            to.check().map_err(|error| error.within(&format!("to[{index}]")))?;
        }
        Ok(())
    }
}

impl Callers {
    fn check(&self) -> Result<(), InvalidField> {
        if *self == Callers::default() {
            let reason = "an empty entry would be everybody; leave `from` out to mean that";
            return Err(InvalidField::new("spiffeIds", reason));
        }
        bounded("spiffeIds", self.spiffe_ids.len())?;
        bounded("namespaces", self.namespaces.len())?;
        bounded("clusters", self.clusters.len())?;
        bounded("serviceAccounts", self.service_accounts.len())?;
        for (index, pattern) in self.spiffe_ids.iter().enumerate() {
            // With something harmless in the place of each star it must be an identity.
            if pattern.replace('*', "x").parse::<SpiffeId>().is_err() {
                let reason =
                    format!("{pattern:?} is not spiffe://<trust domain>/<path>, with * for parts of a segment");
                return Err(InvalidField::new(format!("spiffeIds[{index}]"), reason));
            }
        }
        for (index, account) in self.service_accounts.iter().enumerate() {
            let (namespace, name) = account.split_once('/').unwrap_or(("default", account));
            let valid = namespace.parse::<Namespace>().is_ok() && !name.is_empty() && !name.contains(['/', '*']);
            if !valid {
                let reason = format!("{account:?} is not a service account's name, or namespace/name");
                return Err(InvalidField::new(format!("serviceAccounts[{index}]"), reason));
            }
        }
        Ok(())
    }
}

impl Calls {
    fn check(&self) -> Result<(), InvalidField> {
        if *self == Calls::default() {
            return Err(InvalidField::new("ports", "an empty entry would be everything; leave `to` out to mean that"));
        }
        bounded("ports", self.ports.len())?;
        bounded("methods", self.methods.len())?;
        bounded("paths", self.paths.len())?;
        if self.ports.contains(&0) {
            return Err(InvalidField::new("ports", "a port is a number from 1 to 65535"));
        }
        if let Some(method) = self.methods.iter().find(|method| !is_method(method)) {
            return Err(InvalidField::new(
                "methods",
                format!("{method:?} is not a method (write GET, POST and so on)"),
            ));
        }
        let wrong = |path: &&String| {
            let text = path.strip_suffix('*').unwrap_or(path);
            text.contains(['*', '?', '#']) || is_ambiguous(text)
        };
        match self.paths.iter().find(wrong) {
            Some(path) => {
                let reason =
                    format!("{path:?} is not an absolute path without dot or encoded elements, with * at its end only");
                Err(InvalidField::new("paths", reason))
            }
            None => Ok(()),
        }
    }
}

fn bounded(path: &str, length: usize) -> Result<(), InvalidField> {
    if length > ENTRIES_MAX {
        return Err(InvalidField::new(path, format!("more than {ENTRIES_MAX} entries")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
