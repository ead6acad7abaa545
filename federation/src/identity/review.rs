//! Asks the API server about service-account tokens (TokenReview, `authentication.k8s.io/v1`).

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tombolo_core::id::{Role, SpiffeId};
use tombolo_core::service_account::{Accounts, Asked, POD_NAME, POD_UID, Review, TokenRefused, audience};

use crate::kubernetes::reason;

/// Reviews that the API server is asked for at the same time.
const AT_ONCE: usize = 16;
/// How long one may take, waiting for its turn included; less than the bearer waits.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Longest token that is passed on, in octets.
const TOKEN_LEN_MAX: usize = 16 * 1024;

/// Has tokens reviewed, and says whom they prove.
pub struct Reviewer {
    api: Api<TokenReview>,
    accounts: Accounts,
    turns: Semaphore,
    time_max: Duration,
}

/// Why a token proved nothing, or not yet.
#[derive(Debug, thiserror::Error)]
pub enum NotProven {
    #[error(transparent)]
    Refused(#[from] TokenRefused),
    #[error("{0:?} is not what a service account's token can be for; use gateway, or nothing for a workload")]
    UnknownRole(String),
    #[error("a service account's token has 1 to {TOKEN_LEN_MAX} octets")]
    Length,
    #[error("the API server can't review the service-account token: {0}")]
    Failed(String),
    #[error("the API server did not review the service-account token within {0:?}; trying again may help")]
    Timeout(Duration),
}

impl Reviewer {
    pub fn new(client: Client, accounts: Accounts) -> Self {
        Self { api: Api::all(client), accounts, turns: Semaphore::new(AT_ONCE), time_max: TIME_MAX }
    }

    /// The SPIFFE ID that `token` proves; `role` is what its bearer means to be, empty for a workload.
    pub async fn identity(&self, token: String, role: &str) -> Result<SpiffeId, NotProven> {
        let asked = match role {
            "" => Asked::Workload,
            role => Asked::Role(role.parse().map_err(|_| unknown(role))?),
        };
        if token.is_empty() || token.len() > TOKEN_LEN_MAX {
            return Err(NotProven::Length);
        }
        if asked == Asked::Role(Role::Federation) {
            return Err(unknown(role));
        }
        let status =
            timeout(self.time_max, self.review(token)).await.map_err(|_| NotProven::Timeout(self.time_max))??;
        Ok(self.accounts.identity(&review_of(status), asked)?)
    }

    async fn review(&self, token: String) -> Result<TokenReviewStatus, NotProven> {
        let _turn = self.turns.acquire().await.expect("nobody closes the semaphore");
        let audiences = Some(vec![audience(&self.accounts.trust_domain)]);
        let spec = TokenReviewSpec { token: Some(token), audiences };
        let review = TokenReview { metadata: ObjectMeta::default(), spec, status: None };
        let reviewed = self.api.create(&PostParams::default(), &review).await;
        let reviewed = reviewed.map_err(|error| NotProven::Failed(reason(&error)))?;
        reviewed.status.ok_or_else(|| NotProven::Failed("its answer has no status".into()))
    }
}

fn unknown(role: &str) -> NotProven {
    NotProven::UnknownRole(role.chars().take(80).collect())
}

fn review_of(status: TokenReviewStatus) -> Review {
    let user = status.user.unwrap_or_default();
    let extra = user.extra.unwrap_or_default();
    let pod = only(&extra, POD_NAME).zip(only(&extra, POD_UID));
    Review {
        authenticated: status.authenticated.unwrap_or(false),
        error: status.error.unwrap_or_default(),
        audiences: status.audiences.unwrap_or_default(),
        username: user.username.unwrap_or_default(),
        pod,
    }
}

/// The one value of `key`.
fn only(extra: &BTreeMap<String, Vec<String>>, key: &str) -> Option<String> {
    match extra.get(key)?.as_slice() {
        [value] => Some(value.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::json;
    use tokio::sync::mpsc;
    use tombolo_core::service_account::TokenRefused;
    use tower::service_fn;

    use super::*;

    /// A reviewer whose API server answers as often as it is allowed to, and says when it is asked.
    fn reviewer(time_max: Duration) -> (Reviewer, mpsc::UnboundedReceiver<()>, Arc<Semaphore>) {
        let (sender, asked) = mpsc::unbounded_channel();
        let allowed = Arc::new(Semaphore::new(0));
        let gate = allowed.clone();
        let server = service_fn(move |_: Request<Body>| {
            let (sender, gate) = (sender.clone(), gate.clone());
            async move {
                sender.send(()).unwrap();
                gate.acquire().await.unwrap().forget();
                let review = json!({ "spec": {}, "status": { "authenticated": false, "error": "expired" } });
                let body = Body::from(review.to_string().into_bytes());
                Ok::<_, std::convert::Infallible>(Response::builder().status(201).body(body).unwrap())
            }
        });
        let accounts = Accounts {
            trust_domain: "west.tombolo".parse().unwrap(),
            namespace: "mesh".parse().unwrap(),
            gateways: ["gateway".to_owned()].into(),
        };
        let reviewer = Reviewer { time_max, ..Reviewer::new(Client::new(server, "default"), accounts) };
        (reviewer, asked, allowed)
    }

    #[tokio::test]
    async fn the_api_server_is_asked_little_at_once_and_waited_for_a_while() {
        let (reviewer, mut asked, allowed) = reviewer(Duration::from_secs(20));
        let reviewer = Arc::new(reviewer);
        let mut bearers = tokio::task::JoinSet::new();
        for _ in 0..AT_ONCE * 2 {
            let reviewer = reviewer.clone();
            bearers.spawn(async move { reviewer.identity("a.b.c".into(), "").await });
        }
        for _ in 0..AT_ONCE {
            asked.recv().await.unwrap();
        }
        tokio::task::yield_now().await;
        assert!(asked.try_recv().is_err(), "more than {AT_ONCE} at once");
        allowed.add_permits(AT_ONCE * 2);
        while let Some(ended) = bearers.join_next().await {
            let refused = ended.unwrap().unwrap_err();
            assert!(matches!(refused, NotProven::Refused(TokenRefused::NotAuthenticated { .. })), "{refused:?}");
        }

        let (silent, _asked, _never) = self::reviewer(Duration::from_millis(50));
        let refused = silent.identity("a.b.c".into(), "").await.unwrap_err();
        assert!(matches!(refused, NotProven::Timeout(_)), "{refused:?}");
    }

    #[tokio::test]
    async fn what_can_not_be_right_is_not_asked_about() {
        let (reviewer, mut asked, _) = reviewer(Duration::from_secs(20));
        for token in [String::new(), "a".repeat(TOKEN_LEN_MAX + 1)] {
            assert!(matches!(reviewer.identity(token, "").await, Err(NotProven::Length)));
        }
        for role in ["federation", "king"] {
            assert!(matches!(reviewer.identity("a.b.c".into(), role).await, Err(NotProven::UnknownRole(_))));
        }
        assert!(asked.try_recv().is_err());
    }

    #[test]
    fn a_status_is_read_with_nothing_added() {
        let read = |status: serde_json::Value| review_of(serde_json::from_value(status).unwrap());
        assert_eq!(read(json!({})), Review::default());
        let extra = |names: &[&str]| json!({ POD_NAME: names, POD_UID: ["6a1f"], "other": ["x"] });
        let status = |extra: serde_json::Value| {
            let user = json!({ "username": "system:serviceaccount:shop:web", "extra": extra });
            read(json!({ "authenticated": true, "audiences": ["a"], "user": user }))
        };
        let review = status(extra(&["web-1"]));
        assert_eq!(review.pod, Some(("web-1".into(), "6a1f".into())));
        assert_eq!((review.authenticated, review.username.as_str()), (true, "system:serviceaccount:shop:web"));
        for names in [&[][..], &["web-1", "web-2"]] {
            assert_eq!(status(extra(names)).pod, None);
        }
        assert_eq!(status(json!({ POD_NAME: ["web-1"] })).pod, None);
    }
}
