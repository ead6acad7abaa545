//! `/explain` of the admin port: what would become of a request, for `tombolo explain`.
//!
//! Asked with `url`, and if it matters `method`, `header` (`name:value`, several) and `from` (`namespace/account` or a
//! SPIFFE ID). A sidecar speaks for its own application; where it delivers the service, it also says who may call.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use serde_json::Value;
use tombolo_core::authz::Client;
use tombolo_core::id::SpiffeId;
use tombolo_core::policy::access::HttpAsked;
use tombolo_core::refusal::Refusal;
use tombolo_runtime::admin::Question;
use tombolo_trust::store::TrustStore;
use tombolo_trust::svid::SvidSource;

use crate::inbound::Inbound;
use crate::outbound::Outbound;
use crate::outbound::question::{self, Access, Explanation, Imagined};
use crate::outbound::refuse::Refused;

/// Where it is asked.
pub const PATH: &str = "/explain";
/// Header fields that a question may name.
const HEADERS_MAX: usize = 64;

/// How long the first identity is waited for.
const IDENTITY_WAIT: Duration = Duration::from_secs(2);

/// What answers.
pub struct Explainer {
    pub outbound: Arc<Outbound>,
    pub inbound: Arc<Inbound>,
    pub svid: SvidSource,
    pub trust: TrustStore,
}

/// What was asked for.
struct Asked {
    imagined: Imagined,
    from: Option<String>,
}

impl Explainer {
    pub fn question(self) -> Question {
        let explainer = Arc::new(self);
        Arc::new(move |query| {
            let (explainer, asked) = (explainer.clone(), parse(query));
            Box::pin(async move {
                match explainer.explain(asked).await {
                    Ok(explanation) => (StatusCode::OK, serde_json::to_value(&explanation).unwrap_or(Value::Null)),
                    Err(refused) => (refused.status(), question::refused(&refused)),
                }
            })
        })
    }

    async fn explain(&self, asked: Result<Asked, Refused>) -> Result<Explanation, Refused> {
        let Asked { imagined, from } = asked?;
        let (service, port) = question::target(&imagined)?;
        let own = tokio::time::timeout(IDENTITY_WAIT, self.svid.wait()).await.map(|svid| svid.id.clone());
        let none = |_| Refused::new(Refusal::Timeout, "this sidecar has no identity yet; see its /readyz");
        let own = own.map_err(none)?;
        let from = from.map_or_else(|| Ok(own.clone()), |from| caller(&from, &own))?;
        let cluster = self.trust.snapshot().cluster_of(from.trust_domain()).cloned().ok_or_else(|| {
            Refused::new(Refusal::UnknownTrustDomain, format!("{} is not trusted here", from.trust_domain()))
        })?;
        let path = imagined.url.path();
        let http =
            (imagined.url.scheme_str() == Some("http")).then_some(HttpAsked { method: imagined.method.as_str(), path });
        let client = Client { id: &from, cluster: &cluster };
        let access = self.inbound.explain(client, &service, port, http);
        if from == own {
            let access = access.unwrap_or_else(|| Access {
                allowed: None,
                reason: format!("the sidecars that deliver {service} decide: ask one of theirs, with --from {from}"),
            });
            let mut explanation = question::blank(&imagined, service, port, from, access);
            self.outbound.explain(&imagined, &mut explanation).await?;
            return Ok(explanation);
        }
        let access = access.ok_or_else(|| {
            let detail = format!(
                "this sidecar speaks for {own} and does not deliver {service} port {port}; ask the sidecar beside {from} \
                 which way its requests take (--admin), or one that delivers {service} whether they may come in"
            );
            Refused::new(Refusal::WrongRole, detail)
        })?;
        Ok(question::blank(&imagined, service, port, from, access))
    }
}

fn parse(query: &str) -> Result<Asked, Refused> {
    let bad = |detail: String| Refused::new(Refusal::BadRequest, detail);
    let (mut url, mut method, mut headers, mut from) = (None, Method::GET, HeaderMap::new(), None);
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "url" => url = Some(value.parse::<Uri>().map_err(|error| bad(format!("url: {error}")))?),
            "method" => {
                method = Method::from_bytes(value.as_bytes()).map_err(|error| bad(format!("method: {error}")))?
            }
            "from" => from = Some(value.into_owned()),
            "header" => {
                let (name, value) = value.split_once(':').ok_or_else(|| bad("header: write name:value".into()))?;
                let name =
                    HeaderName::from_bytes(name.trim().as_bytes()).map_err(|error| bad(format!("header: {error}")))?;
                let value = HeaderValue::from_str(value.trim()).map_err(|error| bad(format!("header: {error}")))?;
                if headers.len() >= HEADERS_MAX {
                    return Err(bad(format!("header: more than {HEADERS_MAX}")));
                }
                headers.append(name, value);
            }
            other => {
                let shown: String = other.chars().take(40).collect();
                return Err(bad(format!("{shown:?} is not asked for here: url, method, header, from")));
            }
        }
    }
    let url =
        url.ok_or_else(|| bad("say which request: url=http://NAME.NAMESPACE.svc.clusterset.local/PATH".into()))?;
    Ok(Asked { imagined: Imagined { method, url, headers }, from })
}

/// A caller of the own trust domain as `namespace/account`, or any by its whole identity.
fn caller(text: &str, own: &SpiffeId) -> Result<SpiffeId, Refused> {
    let whole = match text.split_once('/') {
        Some((namespace, account)) if !text.contains("://") => {
            format!("spiffe://{}/ns/{namespace}/sa/{account}", own.trust_domain())
        }
        _ => text.to_owned(),
    };
    let id = whole.parse::<SpiffeId>();
    id.map_err(|error| {
        Refused::new(Refusal::BadRequest, format!("from: {error}; write NAMESPACE/ACCOUNT or spiffe://..."))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn questions_are_read() {
        let asked = parse(
            "url=http%3A%2F%2Fweb.shop.svc.clusterset.local%2Fa%3Fb%3D1&method=POST&header=x-a:+b&header=x-a:c&from=shop/x",
        );
        let Asked { imagined, from } = asked.unwrap();
        assert_eq!(imagined.url.to_string(), "http://web.shop.svc.clusterset.local/a?b=1");
        assert_eq!((imagined.method, imagined.headers.get_all("x-a").iter().count()), (Method::POST, 2));
        assert_eq!(from.as_deref(), Some("shop/x"));
        for (query, want) in [
            ("", "say which request"),
            ("url=%20", "url: "),
            ("url=/&method=%20", "method: "),
            ("url=/&header=a", "header: write name:value"),
            ("url=/&header=%0A:b", "header: "),
            ("url=/&colour=red", "\"colour\" is not asked for here"),
        ] {
            let refused = parse(query).err().unwrap();
            assert!(refused.refusal == Refusal::BadRequest && refused.detail.starts_with(want), "{refused}");
        }
    }

    #[test]
    fn callers_are_named_in_two_ways() {
        let own: SpiffeId = "spiffe://east.tombolo/ns/shop/sa/frontend".parse().unwrap();
        assert_eq!(caller("shop/frontend", &own).unwrap(), own);
        let other = "spiffe://west.tombolo/ns/pay/sa/api";
        assert_eq!(caller(other, &own).unwrap().to_string(), other);
        assert_eq!(caller("frontend", &own).unwrap_err().refusal, Refusal::BadRequest);
    }
}
