//! Why a leg, a request or a connection was refused: one closed list, so that every refusal has a
//! counter, a wire code and a sentence that tells the operator what to do.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// A reason to refuse. `code` is the label of its counter and its name on the wire.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Refusal {
            $($(#[$doc])* $name,)*
        }

        impl Refusal {
            pub const ALL: &'static [Refusal] = &[$(Refusal::$name,)*];

            /// The stable name of this reason, in metrics and on the wire.
            pub fn code(self) -> &'static str {
                match self { $(Refusal::$name => $code,)* }
            }

            /// What happened and what to do about it, for an operator.
            pub fn explanation(self) -> &'static str {
                match self { $(Refusal::$name => $text,)* }
            }

            pub fn from_code(code: &str) -> Option<Refusal> {
                match code { $($code => Some(Refusal::$name),)* _ => None }
            }
        }
    };
}

refusals! {
    /// The SNI is absent or is not a leg target.
    BadTarget = "bad-target", "the TLS ClientHello names no tombolo target; connect through a sidecar, or set the SNI as documented";
    /// Not a TLS ClientHello, or one above the size limit.
    BadClientHello = "bad-client-hello", "the first bytes are not a TLS ClientHello of at most 16 KiB";
    /// The first bytes did not arrive in time.
    HandshakeTimeout = "handshake-timeout", "the connection was opened but its handshake did not finish in time";
    /// A stream or PROXY header that is malformed or oversized.
    BadHeader = "bad-header", "the header is malformed or larger than allowed";
    /// The header's target and the SNI differ.
    TargetMismatch = "target-mismatch", "the stream header and the TLS ClientHello name different targets";
    /// No such cluster is peered.
    UnknownCluster = "unknown-cluster", "this cluster has no peer of that name; see `tombolo peer list`";
    /// No tunnel to that cluster answers.
    NoTunnel = "no-tunnel", "no tunnel to that cluster answers; see `tombolo status` and check that one side's UDP port is reachable";
    /// The service is not exported, or not to this peer. Both look alike from outside.
    NotExported = "not-exported", "the service is not exported to this cluster; export it with `tombolo export`, and check the peer's `exports`";
    /// The service is exported, but not with this port.
    UnknownPort = "unknown-port", "the service is exported, but without this port";
    /// The endpoint named by the SNI is not known or not ready.
    EndpointGone = "endpoint-gone", "the chosen endpoint has gone or is not ready";
    /// No endpoint is ready.
    NoEndpoint = "no-endpoint", "the service has no ready endpoint in that cluster";
    /// The gateway could not reach the sidecar of the endpoint.
    EndpointUnreachable = "endpoint-unreachable", "the sidecar of the endpoint does not accept connections";
    /// The application did not accept the connection.
    AppUnreachable = "app-unreachable", "the application behind the sidecar does not accept connections";
    /// The process is draining.
    Draining = "draining", "the process is shutting down and takes no new work";
    /// A limit on connections, streams or memory is reached.
    Overloaded = "overloaded", "a configured limit is reached; see the limits in the documentation";
    /// The bound that the service's owner has set for one caller.
    CircuitOpen = "circuit-open", "as much of this service is under way from here as its circuit breaker allows at once";
    /// The rate limit of the service's policy.
    RateLimited = "rate-limited", "the rate limit of the service is reached; see its TrafficPolicy";
    /// No rule of the routes is for the request.
    NoRoute = "no-route", "the service has routes, and none of their rules is for this request; see its HTTPRoute or GRPCRoute";
    /// The rule that is for the request sends it nowhere.
    NoBackend = "no-backend", "the route for this request names no backend that exists and has a weight";
    /// A stalled leg was reset to give memory back.
    Stalled = "stalled", "the receiver had stopped reading, and the memory budget for waiting bytes was used up";
    /// The certificate is absent.
    NoCertificate = "no-certificate", "the peer sent no certificate; it needs an SVID";
    /// The certificate does not verify against the bundle of its own trust domain.
    BadCertificate = "bad-certificate", "the certificate does not verify against the bundle of its trust domain; check clocks and `tombolo status` for the bundle's sequence";
    /// The certificate has expired or is not valid yet.
    Expired = "expired-certificate", "the certificate has expired or is not valid yet; check the clocks of both machines";
    /// The certificate's trust domain is not one that is trusted here.
    UnknownTrustDomain = "unknown-trust-domain", "the certificate belongs to a trust domain that this cluster has no peering with";
    /// The identity verified, but is not allowed here.
    IdentityDenied = "identity-denied", "the identity is authentic but not allowed to call this service";
    /// A workload's identity where a role's is needed, or the reverse.
    WrongRole = "wrong-role", "the identity is authentic but is not that of the role which may use this port";
    /// The identity was revoked.
    Revoked = "revoked", "the identity was revoked";
    /// No common ALPN.
    BadAlpn = "bad-alpn", "the connection asks for a protocol that this port does not speak";
    /// The service is not known to this cluster at all.
    UnknownService = "unknown-service", "no cluster of the clusterset exports this service to here; see `tombolo status`";
    /// The name is not one of the clusterset.
    ForeignName = "foreign-name", "only names under svc.clusterset.local are carried; send other requests directly (for a proxy setting: list them in no_proxy)";
    /// The request itself is malformed.
    BadRequest = "bad-request", "the request is malformed or larger than the limits allow";
    /// Too many hops, or the cluster is already in the path.
    RelayLoop = "relay-loop", "the leg has crossed too many clusters, or came back to one that it had crossed";
    /// The deadline for an answer passed.
    Timeout = "timeout", "no answer came within the deadline";
    /// A captured connection that nothing redirected.
    NotRedirected = "not-redirected", "the connection came straight to a port that only takes redirected ones; see `tombolo sidecar capture`";
    /// A captured connection that this sidecar made itself.
    CaptureLoop = "capture-loop", "the sidecar's own connections are captured; exclude whom it runs as (`tombolo sidecar capture --exclude-uid`)";
    /// Plaintext where only inner legs may enter.
    Plaintext = "plaintext", "the connection is no inner leg, and capture.plaintext is strict or a policy guards the service; the caller needs a sidecar";
    /// The connection ended before an answer.
    ConnectionLost = "connection-lost", "the connection ended before the answer";
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.explanation())
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_read_back() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::from_code(refusal.code()), Some(*refusal));
        }
        assert_eq!(Refusal::from_code("no-such"), None);
    }
}
