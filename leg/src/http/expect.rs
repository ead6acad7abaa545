//! `Expect: 100-continue` (RFC 9110 section 10.1.1), carried end to end: the request's body is not read
//! from its client before the far application asks for it.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, header};
use tokio::sync::Notify;

/// How long a body waits for the far application to ask for it, or to answer without. A server that knows
/// nothing of the expectation may never ask (RFC 9110 asks clients not to wait for ever).
pub(super) const WAIT_MAX: Duration = Duration::from_secs(1);

/// In a request's extensions at the server's end when its client waits: call [`ContinueSignal::send`] when the
/// application answers 100.
#[derive(Debug, Clone)]
pub struct ContinueSignal(pub(super) Arc<Notify>);

impl ContinueSignal {
    /// Sends `100 Continue` to the client, once.
    pub fn send(&self) {
        self.0.notify_one();
    }
}

pub(super) fn is_expected(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}
