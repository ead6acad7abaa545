//! Whether an application answers, asked of the sidecar that stands beside it.
//!
//! The question is a reserved request on an ordinary leg: `OPTIONS` with the field `tombolo-probe`. The far sidecar
//! answers it itself, once it has asked its application on a fresh connection. Applications can't ask: what they
//! write under names of tombolo's own is dropped on the way out, nor can they answer for others, for it is
//! dropped from their responses as well.

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response};
use http_body_util::Empty;

const PROBE: HeaderName = HeaderName::from_static("tombolo-probe");

/// What the far sidecar has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It answered, whatever it said.
    Alive,
    /// It accepts no connections.
    Refused,
    /// Connections stand, and nothing comes: its process is stopped or hangs.
    Silent,
}

const FOUND: [(Found, &str); 3] = [(Found::Alive, "alive"), (Found::Refused, "refused"), (Found::Silent, "silent")];

/// The question. A sidecar that does not know it passes an OPTIONS request on, which is safe.
pub fn question(authority: &str) -> Request<Empty<Bytes>> {
    let mut request = Request::new(Empty::new());
    *request.method_mut() = Method::OPTIONS;
    *request.uri_mut() = format!("http://{authority}/").parse().expect("a service's name and port");
    request.headers_mut().insert(PROBE, HeaderValue::from_static("app"));
    request
}

pub fn is_question<B>(request: &Request<B>) -> bool {
    request.method() == Method::OPTIONS && request.headers().contains_key(PROBE)
}

pub fn answer<B: Default>(found: Found) -> Response<B> {
    let mut response = Response::new(B::default());
    let (_, name) = FOUND.iter().find(|(known, _)| *known == found).expect("all are listed");
    response.headers_mut().insert(PROBE, HeaderValue::from_static(name));
    response
}

/// What an answer says; `None` if it was not made by a sidecar that knows the question.
pub fn found(headers: &HeaderMap) -> Option<Found> {
    let said = headers.get(PROBE)?;
    FOUND.iter().find(|(_, name)| said == name).map(|(found, _)| *found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_back_and_questions_are_known() {
        for (known, _) in FOUND {
            let response: Response<()> = answer(known);
            assert_eq!(found(response.headers()), Some(known));
        }
        assert_eq!(found(&HeaderMap::new()), None);
        assert!(is_question(&question("web.shop.svc.clusterset.local:80")));
        assert!(!is_question(&Request::new(())));
    }
}
