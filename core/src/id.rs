//! The names that everything else is keyed by. Each is parsed once, at the edge, and valid from then on.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a name was refused: what was read, and the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a valid {kind}: {rule}")]
pub struct InvalidName {
    pub kind: &'static str,
    pub value: String,
    pub rule: &'static str,
}

fn invalid(kind: &'static str, value: &str, rule: &'static str) -> InvalidName {
    // An oversized name must not become an oversized log line.
    let value = value.chars().take(80).collect();
    InvalidName { kind, value, rule }
}

/// RFC 1123 label: lower-case letters, digits and inner hyphens, 1 to `length_max` characters.
pub(crate) fn is_label(text: &str, length_max: usize) -> bool {
    !text.is_empty()
        && text.len() <= length_max
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) { Ok(Self(text.into())) } else { Err(invalid($kind, text, $rule)) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        via_string!($name);
    };
}

macro_rules! via_string {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

string_id!(
    /// A cluster of the clusterset (KEP-2149 cluster id): a DNS label of at most 32 characters.
    ClusterId, "cluster id", "use a DNS label of at most 32 characters (a-z, 0-9, inner hyphens)",
    |text| is_label(text, 32)
);

string_id!(
    /// A Kubernetes namespace.
    Namespace, "namespace", "use a DNS label of at most 63 characters (a-z, 0-9, inner hyphens)",
    |text| is_label(text, 63)
);

string_id!(
    /// An endpoint of an exported service as its peers see it: opaque, never an address.
    EndpointId, "endpoint id", "use a DNS label of at most 32 characters (a-z, 0-9, inner hyphens)",
    |text| is_label(text, 32)
);

string_id!(
    /// One running gateway, stable over restarts.
    GatewayId, "gateway id", "use a DNS label of at most 63 characters (a-z, 0-9, inner hyphens)",
    |text| is_label(text, 63)
);

impl GatewayId {
    const DECLARED: &str = "declared-";

    /// Stands for whichever gateway is found at the `number`th address that a resource declares of a peer: true ids come
    /// with the first peer sync, and that needs a tunnel.
    pub fn declared(number: usize) -> Self {
        Self(format!("{}{number}", Self::DECLARED).into())
    }

    /// Whether any gateway of the cluster may be meant.
    pub fn is_declared(&self) -> bool {
        self.0.starts_with(Self::DECLARED)
    }
}

string_id!(
    /// One running sidecar as it registers: what `EndpointSlice.endpoints[].targetRef.name` points to.
    InstanceName, "instance name", "use a DNS label of at most 63 characters (a-z, 0-9, inner hyphens)",
    |text| is_label(text, 63)
);

string_id!(
    /// A SPIFFE trust domain (SPIFFE-ID section 2.1): lower-case letters, digits, dots, hyphens and underscores.
    TrustDomain, "trust domain", "use at most 255 of a-z, 0-9, '.', '-', '_' (SPIFFE-ID section 2.1)",
    |text| !text.is_empty()
        && text.len() <= 255
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'))
);

/// A service by namespace and name: the same pair in two clusters of a clusterset is the same service
/// (namespace sameness, KEP-1645). Written `namespace/name`; `name.namespace` and the full
/// `name.namespace.svc.clusterset.local` are read too.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    namespace: Namespace,
    name: Arc<str>,
}

impl ServiceName {
    pub fn new(namespace: Namespace, name: &str) -> Result<Self, InvalidName> {
        if !is_label(name, 63) {
            return Err(invalid(
                "service name",
                name,
                "use a DNS label of at most 63 characters (a-z, 0-9, inner hyphens)",
            ));
        }
        Ok(Self { namespace, name: name.into() })
    }

    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// `web.shop.svc.clusterset.local`, the name that workloads call.
    pub fn clusterset_name(&self) -> String {
        format!("{}.{}.svc.clusterset.local", self.name, self.namespace)
    }
}

impl FromStr for ServiceName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let rule = "write namespace/name, name.namespace or name.namespace.svc.clusterset.local";
        let short = text.strip_suffix(".svc.clusterset.local").unwrap_or(text);
        let (namespace, name) = match short.split_once('/') {
            Some((namespace, name)) => (namespace, name),
            None => {
                let (name, namespace) = short.split_once('.').ok_or_else(|| invalid("service", text, rule))?;
                (namespace, name)
            }
        };
        let namespace = namespace.parse().map_err(|_| invalid("service", text, rule))?;
        Self::new(namespace, name).map_err(|_| invalid("service", text, rule))
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

via_string!(ServiceName);

/// A SPIFFE ID: `spiffe://<trust domain>/<path>` (SPIFFE-ID section 2). At most 2,048 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    path: Arc<str>,
}

/// Which of tombolo's own parts an identity `spiffe://<trust domain>/tombolo/<role>/<instance>` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Federation,
    Gateway,
    /// A gateway that speaks for workloads without a sidecar; its instance is the gateway's id.
    Unmeshed,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Federation => "federation",
            Role::Gateway => "gateway",
            Role::Unmeshed => "unmeshed",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        match text {
            "federation" => Ok(Role::Federation),
            "gateway" => Ok(Role::Gateway),
            "unmeshed" => Ok(Role::Unmeshed),
            _ => Err(invalid("role", text, "use federation, gateway or unmeshed")),
        }
    }
}

/// First path segment of tombolo's own roles; no workload proof can produce a path below it.
const ROLE_SEGMENT: &str = "tombolo";

impl SpiffeId {
    /// The identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    pub fn workload(
        trust_domain: &TrustDomain,
        namespace: &Namespace,
        service_account: &str,
    ) -> Result<Self, InvalidName> {
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The identity of one of tombolo's own roles: `spiffe://<trust domain>/tombolo/<role>/<instance>`.
    pub fn role(trust_domain: &TrustDomain, role: Role, instance: &InstanceName) -> Self {
        Self { trust_domain: trust_domain.clone(), path: format!("/{ROLE_SEGMENT}/{role}/{instance}").into() }
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading slash.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Namespace and service account of a workload's identity (`/ns/<namespace>/sa/<account>`).
    pub fn as_workload(&self) -> Option<(&str, &str)> {
        let (namespace, account) = self.path.strip_prefix("/ns/")?.split_once("/sa/")?;
        (!namespace.contains('/') && !account.contains('/')).then_some((namespace, account))
    }

    /// The role that this identity names, if it is one of tombolo's own.
    pub fn as_role(&self) -> Option<Role> {
        let mut segments = self.path.split('/').skip(1);
        let (first, role, instance) = (segments.next()?, segments.next()?, segments.next()?);
        (first == ROLE_SEGMENT && !instance.is_empty() && segments.next().is_none()).then(|| role.parse().ok())?
    }

    /// The identity under which a gateway begins legs for workloads without a sidecar; `None` for any other than a
    /// gateway's.
    pub fn unmeshed_of(&self) -> Option<Self> {
        let instance = self.path.rsplit('/').next().filter(|_| self.as_role() == Some(Role::Gateway))?;
        let path = format!("/{ROLE_SEGMENT}/{}/{instance}", Role::Unmeshed).into();
        Some(Self { trust_domain: self.trust_domain.clone(), path })
    }

    /// Whether the path lies where only tombolo's own roles may be.
    pub fn is_reserved(&self) -> bool {
        self.path.split('/').nth(1) == Some(ROLE_SEGMENT)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let rule = "write spiffe://<trust domain>/<path> (SPIFFE-ID section 2)";
        let refuse = || invalid("SPIFFE ID", text, rule);
        if text.len() > 2048 {
            return Err(refuse());
        }
        let rest = text.strip_prefix("spiffe://").ok_or_else(refuse)?;
        let slash = rest.find('/').ok_or_else(refuse)?;
        let (domain, path) = rest.split_at(slash);
        let segment_ok = |segment: &str| {
            !segment.is_empty()
                && segment != "."
                && segment != ".."
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        };
        if !path[1..].split('/').all(segment_ok) {
            return Err(refuse());
        }
        let trust_domain = domain.parse().map_err(|_| refuse())?;
        Ok(Self { trust_domain, path: path.into() })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

via_string!(SpiffeId);

/// A position in what one federation publishes to one peer. `epoch` changes with each new leader or lost
/// history, `revision` counts within it; only revisions of the same epoch can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Position {
    pub epoch: u64,
    pub revision: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names_are_read_in_three_spellings() {
        for text in ["shop/web", "web.shop", "web.shop.svc.clusterset.local"] {
            let service: ServiceName = text.parse().unwrap();
            assert_eq!(service.to_string(), "shop/web", "{text}");
            assert_eq!(service.clusterset_name(), "web.shop.svc.clusterset.local");
        }
        for text in ["web", "shop/", "/web", "Shop/web", "a.b.c", "shop/web/x", ""] {
            assert!(text.parse::<ServiceName>().is_err(), "{text}");
        }
    }

    #[test]
    fn cluster_ids_are_short_dns_labels() {
        for (text, valid) in [
            ("east", true),
            ("eu-west-1", true),
            ("a", true),
            ("", false),
            ("-east", false),
            ("east-", false),
            ("East", false),
            ("ea.st", false),
            (&"x".repeat(32), true),
            (&"x".repeat(33), false),
        ] {
            assert_eq!(text.parse::<ClusterId>().is_ok(), valid, "{text}");
        }
    }

    #[test]
    fn spiffe_ids_follow_the_specification() {
        let id: SpiffeId = "spiffe://east.example/ns/shop/sa/web".parse().unwrap();
        assert_eq!(id.trust_domain().as_str(), "east.example");
        assert_eq!(id.path(), "/ns/shop/sa/web");
        assert_eq!(id.as_role(), None);
        for text in [
            "https://east.example/ns/shop",
            "spiffe://east.example",
            "spiffe://east.example/",
            "spiffe://EAST/ns",
            "spiffe://east.example/ns//sa",
            "spiffe://east.example/ns/../sa",
            "spiffe://east.example/ns/a?b",
            "spiffe://user@east.example/ns",
            "spiffe:///ns",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_exact_role_paths_name_a_role() {
        let domain: TrustDomain = "east.example".parse().unwrap();
        let gateway = SpiffeId::role(&domain, Role::Gateway, &"gw-1".parse().unwrap());
        assert_eq!(gateway.to_string(), "spiffe://east.example/tombolo/gateway/gw-1");
        assert_eq!(gateway.as_role(), Some(Role::Gateway));
        let unmeshed = gateway.unmeshed_of().unwrap();
        assert_eq!(unmeshed.to_string(), "spiffe://east.example/tombolo/unmeshed/gw-1");
        assert_eq!((unmeshed.as_role(), unmeshed.unmeshed_of()), (Some(Role::Unmeshed), None));
        for path in ["/tombolo/gateway", "/tombolo/gateway/a/b", "/tombolo/sidecar/x", "/ns/tombolo/sa/gateway"] {
            let id: SpiffeId = format!("spiffe://east.example{path}").parse().unwrap();
            assert_eq!(id.as_role(), None, "{path}");
        }
        let odd: SpiffeId = "spiffe://east.example/tombolo/sidecar/x".parse().unwrap();
        assert!(odd.is_reserved());
    }
}
