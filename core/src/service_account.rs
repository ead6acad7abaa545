//! Which identity a Kubernetes service-account token proves.
//!
//! The token itself is judged by the API server (TokenReview, `authentication.k8s.io/v1`), which also looks whether the Pod
//! that it is bound to is there, with the same uid. What is decided here is whether what it says is proof enough, and
//! of which SPIFFE ID. Nothing that the bearer says of itself takes part in that: what it asks for can only be refused.

use std::collections::BTreeSet;
use std::fmt;

use crate::id::{GatewayId, InvalidName, Namespace, Role, SpiffeId, TrustDomain};

/// Where the API server says what a token is bound to (`TokenReview.status.user.extra`).
pub const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
pub const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// How the API server names service accounts: `system:serviceaccount:<namespace>:<account>`.
const ACCOUNT_PREFIX: &str = "system:serviceaccount:";
/// Most characters of the API server's own words that are passed on.
const REASON_LEN_MAX: usize = 400;

/// The audience that a token must be for, so that a token for anything else proves nothing here, and one for here
/// nothing to others.
pub fn audience(trust_domain: &TrustDomain) -> String {
    format!("tombolo/{trust_domain}")
}

/// What the API server said of a token.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Review {
    pub authenticated: bool,
    /// Why it is not; may be empty.
    pub error: String,
    /// Those of the audiences asked about that the token is for.
    pub audiences: Vec<String>,
    pub username: String,
    /// The Pod that it is bound to: name and uid.
    pub pod: Option<(String, String)>,
}

/// Which accounts of a cluster are what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accounts {
    pub trust_domain: TrustDomain,
    /// Where tombolo is installed. Accounts of other namespaces are workloads, whatever they are called.
    pub namespace: Namespace,
    /// The accounts of that namespace that are gateways.
    pub gateways: BTreeSet<String>,
}

/// What the bearer of a token means to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Workload,
    Role(Role),
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Asked::Workload => f.write_str("workload"),
            Asked::Role(role) => role.fmt(f),
        }
    }
}

/// Why a token proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    #[error(
        "the API server does not accept the service-account token: {reason}; project one with audience {audience} \
         (serviceAccountToken), and read it anew, since it expires and ends with its Pod"
    )]
    NotAuthenticated { reason: String, audience: String },
    #[error("the service-account token is not for audience {audience}; project one that is (serviceAccountToken)")]
    OtherAudience { audience: String },
    #[error("the token is {username:?}'s, which is no service account")]
    NotAnAccount { username: String },
    #[error(
        "the token of service account {account} is not bound to a Pod; use the one that the kubelet projects into the \
         Pod (serviceAccountToken)"
    )]
    Unbound { account: String },
    #[error(
        "service account {account} is no {role}: only accounts of namespace {namespace} that \
         source.kubernetes.roles.{role} of the federation's configuration names are"
    )]
    NotNamed { account: String, role: Role, namespace: Namespace },
    #[error("service account {account} is reserved for the {role}s of this cluster; run workloads as another one")]
    Reserved { account: String, role: Role },
    #[error(transparent)]
    Name(#[from] InvalidName),
}

impl Accounts {
    /// The SPIFFE ID that a token proves.
    ///
    /// A workload is called after its namespace and account, a gateway after its Pod.
    pub fn identity(&self, review: &Review, asked: Asked) -> Result<SpiffeId, TokenRefused> {
        let audience = audience(&self.trust_domain);
        if !review.authenticated {
            let reason = if review.error.is_empty() { "it gives no reason" } else { &review.error };
            let reason = reason.chars().take(REASON_LEN_MAX).collect();
            return Err(TokenRefused::NotAuthenticated { reason, audience });
        }
        // An authenticator that knows of no audiences reports none, and has not looked.
        if !review.audiences.contains(&audience) {
            return Err(TokenRefused::OtherAudience { audience });
        }
        let (namespace, account) = review
            .username
            .strip_prefix(ACCOUNT_PREFIX)
            .and_then(|names| names.split_once(':'))
            .ok_or_else(|| TokenRefused::NotAnAccount { username: shortened(&review.username) })?;
        let full = || shortened(&format!("{namespace}/{account}"));
        let Some((pod, _)) = review.pod.as_ref().filter(|(name, uid)| !name.is_empty() && !uid.is_empty()) else {
            return Err(TokenRefused::Unbound { account: full() });
        };
        let is_gateway = namespace == self.namespace.as_str() && self.gateways.contains(account);
        match asked {
            Asked::Role(Role::Gateway) if is_gateway => {
                let id: GatewayId = pod.parse()?;
                Ok(SpiffeId::role(&self.trust_domain, Role::Gateway, &id.as_str().parse()?))
            }
            Asked::Role(role) => {
                Err(TokenRefused::NotNamed { account: full(), role, namespace: self.namespace.clone() })
            }
            Asked::Workload if is_gateway => Err(TokenRefused::Reserved { account: full(), role: Role::Gateway }),
            Asked::Workload => Ok(SpiffeId::workload(&self.trust_domain, &namespace.parse()?, account)?),
        }
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(REASON_LEN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            trust_domain: "west.tombolo".parse().unwrap(),
            namespace: "mesh".parse().unwrap(),
            gateways: ["gateway".to_owned()].into(),
        }
    }

    fn of(username: &str) -> Review {
        Review {
            authenticated: true,
            error: String::new(),
            audiences: vec!["tombolo/west.tombolo".into()],
            username: username.into(),
            pod: Some(("gw-0".into(), "6a1f".into())),
        }
    }

    const GATEWAY: Asked = Asked::Role(Role::Gateway);

    #[test]
    fn an_account_is_what_its_namespace_and_the_configuration_make_it() {
        for (username, asked, want) in [
            ("system:serviceaccount:shop:web", Asked::Workload, Ok("ns/shop/sa/web")),
            ("system:serviceaccount:mesh:other", Asked::Workload, Ok("ns/mesh/sa/other")),
            ("system:serviceaccount:mesh:gateway", GATEWAY, Ok("tombolo/gateway/gw-0")),
            // Called like ours, and elsewhere; ours, and not named; named, and no workload.
            ("system:serviceaccount:tombolo-system:gateway", GATEWAY, Err("tombolo-system/gateway is no gateway")),
            ("system:serviceaccount:tombolo-system:gateway", Asked::Workload, Ok("ns/tombolo-system/sa/gateway")),
            ("system:serviceaccount:tombolo:gateway", Asked::Workload, Ok("ns/tombolo/sa/gateway")),
            ("system:serviceaccount:mesh:federation", GATEWAY, Err("mesh/federation is no gateway")),
            ("system:serviceaccount:mesh:gateway", Asked::Workload, Err("reserved for the gateways")),
            // No token makes a federation.
            ("system:serviceaccount:mesh:gateway", Asked::Role(Role::Federation), Err("is no federation")),
            ("admin", Asked::Workload, Err("\"admin\"'s, which is no service account")),
            ("system:serviceaccount:shop", Asked::Workload, Err("no service account")),
            ("system:serviceaccount:shop:a/../b", Asked::Workload, Err("not a valid SPIFFE ID")),
            ("system:serviceaccount:a.b:web", Asked::Workload, Err("not a valid namespace")),
        ] {
            let got = accounts().identity(&of(username), asked);
            match want {
                Ok(path) => assert_eq!(got.unwrap().to_string(), format!("spiffe://west.tombolo/{path}"), "{username}"),
                Err(reason) => {
                    let refused = got.unwrap_err().to_string();
                    assert!(refused.contains(reason), "{username} as {asked}: {refused}");
                }
            }
        }
    }

    #[test]
    fn a_token_that_is_not_whole_proves_nothing() {
        let web = || of("system:serviceaccount:shop:web");
        let pod = |name: &str, uid: &str| Some((name.to_owned(), uid.to_owned()));
        for (review, want) in [
            (Review { authenticated: false, error: "token has expired".into(), ..web() }, "token has expired"),
            (Review { authenticated: false, ..web() }, "it gives no reason"),
            (Review { audiences: vec![], ..web() }, "not for audience tombolo/west.tombolo"),
            (Review { audiences: vec!["tombolo/west".into()], ..web() }, "not for audience tombolo/west.tombolo"),
            (Review { pod: None, ..web() }, "shop/web is not bound to a Pod"),
            (Review { pod: pod("web-1", ""), ..web() }, "is not bound to a Pod"),
            (Review { pod: pod("", "6a1f"), ..web() }, "is not bound to a Pod"),
        ] {
            let refused = accounts().identity(&review, Asked::Workload).unwrap_err().to_string();
            assert!(refused.contains(want), "{review:?}: {refused}");
        }
        let dotted = Review { pod: pod("gw.0", "6a1f"), ..of("system:serviceaccount:mesh:gateway") };
        assert!(matches!(accounts().identity(&dotted, GATEWAY), Err(TokenRefused::Name(_))));
    }

    #[test]
    fn what_others_wrote_is_not_repeated_at_length() {
        let long = Review { error: "x".repeat(100_000), ..Review::default() };
        assert!(accounts().identity(&long, Asked::Workload).unwrap_err().to_string().len() < 1_000);
        let long = of(&"x".repeat(100_000));
        assert!(accounts().identity(&long, Asked::Workload).unwrap_err().to_string().len() < 1_000);
    }
}
