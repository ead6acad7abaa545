//! Who may come in at the tunnel port, from the ALPN and what the certificate proved. The transport
//! only demands that the chain is well-formed; this decides before any stream is accepted.

use crate::id::{ClusterId, Role};
use crate::refusal::Refusal;

/// ALPN of a tunnel between gateways.
pub const ALPN_TUNNEL: &[u8] = b"tombolo-tunnel/1";

/// ALPN of a peering attempt, the only thing that an unknown cluster may try.
pub const ALPN_PEERING: &[u8] = b"tombolo-peering/1";

/// What the caller's chain proved against the bundles that are trusted now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It verifies against the bundle of a peer.
    Peer { cluster: ClusterId, role: Option<Role> },
    /// It verifies against this cluster's own bundle.
    Own { role: Option<Role> },
    /// It is well-formed, but its trust domain is bound to no cluster here.
    Unbound { role: Option<Role> },
    /// It proves nothing: absent, malformed, expired, revoked, or not signed by the root it names.
    Invalid(Refusal),
}

/// What to do with a connection whose handshake has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A tunnel with this peer.
    Tunnel(ClusterId),
    /// One offer may be made; the federation's leader judges it.
    Peering,
    Refuse(Refusal),
}

/// Maps (ALPN, verdict) to what the connection may become.
pub fn decide(alpn: Option<&[u8]>, verdict: &Verdict) -> Entry {
    match alpn {
        Some(ALPN_TUNNEL) => tunnel(verdict),
        Some(ALPN_PEERING) => peering(verdict),
        _ => Entry::Refuse(Refusal::BadAlpn),
    }
}

fn tunnel(verdict: &Verdict) -> Entry {
    match verdict {
        Verdict::Peer { cluster, role: Some(Role::Gateway) } => Entry::Tunnel(cluster.clone()),
        Verdict::Peer { .. } => Entry::Refuse(Refusal::WrongRole),
        // Gateways of one cluster have no tunnels among themselves.
        Verdict::Own { role: Some(Role::Gateway) } => Entry::Refuse(Refusal::IdentityDenied),
        Verdict::Own { .. } => Entry::Refuse(Refusal::WrongRole),
        Verdict::Unbound { .. } => Entry::Refuse(Refusal::UnknownTrustDomain),
        Verdict::Invalid(refusal) => Entry::Refuse(*refusal),
    }
}

fn peering(verdict: &Verdict) -> Entry {
    match verdict {
        // A peer that is bound already asks again when the answer was lost; a claim of our own identity
        // is the leader's to refuse, since only it can say why.
        Verdict::Unbound { role } | Verdict::Peer { role, .. } | Verdict::Own { role } => match role {
            Some(Role::Gateway) => Entry::Peering,
            Some(Role::Federation | Role::Unmeshed) | None => Entry::Refuse(Refusal::WrongRole),
        },
        Verdict::Invalid(refusal) => Entry::Refuse(*refusal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(alpn: Option<&[u8]>, verdict: &Verdict, want: &Entry) {
        assert_eq!(&decide(alpn, verdict), want, "{:?} x {verdict:?}", alpn.map(String::from_utf8_lossy));
    }

    #[test]
    fn alpn_and_certificate_decide_who_comes_in() {
        let west: ClusterId = "west".parse().unwrap();
        let peer = |role| Verdict::Peer { cluster: west.clone(), role };
        let (gateway, federation) = (Some(Role::Gateway), Some(Role::Federation));
        let (tunnel, peering) = (Some(ALPN_TUNNEL), Some(ALPN_PEERING));
        for (alpn, verdict, want) in [
            (tunnel, peer(gateway), Entry::Tunnel(west.clone())),
            (tunnel, peer(federation), Entry::Refuse(Refusal::WrongRole)),
            (tunnel, peer(None), Entry::Refuse(Refusal::WrongRole)),
            (tunnel, Verdict::Own { role: gateway }, Entry::Refuse(Refusal::IdentityDenied)),
            (tunnel, Verdict::Own { role: federation }, Entry::Refuse(Refusal::WrongRole)),
            (tunnel, Verdict::Own { role: None }, Entry::Refuse(Refusal::WrongRole)),
            (tunnel, Verdict::Unbound { role: gateway }, Entry::Refuse(Refusal::UnknownTrustDomain)),
            (tunnel, Verdict::Unbound { role: None }, Entry::Refuse(Refusal::UnknownTrustDomain)),
            (peering, Verdict::Unbound { role: gateway }, Entry::Peering),
            (peering, Verdict::Unbound { role: federation }, Entry::Refuse(Refusal::WrongRole)),
            (peering, Verdict::Unbound { role: None }, Entry::Refuse(Refusal::WrongRole)),
            (peering, peer(gateway), Entry::Peering),
            (peering, peer(federation), Entry::Refuse(Refusal::WrongRole)),
            (peering, peer(None), Entry::Refuse(Refusal::WrongRole)),
            (peering, Verdict::Own { role: gateway }, Entry::Peering),
            (peering, Verdict::Own { role: None }, Entry::Refuse(Refusal::WrongRole)),
        ] {
            check(alpn, &verdict, &want);
        }
    }

    #[test]
    fn an_invalid_chain_is_refused_with_its_own_reason() {
        for refusal in [Refusal::NoCertificate, Refusal::BadCertificate, Refusal::Expired, Refusal::Revoked] {
            for alpn in [ALPN_TUNNEL, ALPN_PEERING] {
                check(Some(alpn), &Verdict::Invalid(refusal), &Entry::Refuse(refusal));
            }
        }
    }

    #[test]
    fn any_other_alpn_is_refused_whoever_asks() {
        let west: ClusterId = "west".parse().unwrap();
        for alpn in [None, Some(&b""[..]), Some(b"h2"), Some(b"h3"), Some(b"tombolo-tunnel/2"), Some(b"tombolo/tcp")] {
            for verdict in [
                Verdict::Peer { cluster: west.clone(), role: Some(Role::Gateway) },
                Verdict::Unbound { role: Some(Role::Gateway) },
                Verdict::Invalid(Refusal::Expired),
            ] {
                check(alpn, &verdict, &Entry::Refuse(Refusal::BadAlpn));
            }
        }
    }
}
