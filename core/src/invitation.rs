//! Invitations to peer: the token that an operator carries from one cluster to the other, and the
//! life of an invitation at the side that made it.
//!
//! The inviting side keeps a public key only; the secret is in the token alone. An invitation binds
//! once: a repeat by the very same root gets the same answer, so that a crash between the two sides
//! costs nothing, and anybody else is refused.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use crate::id::{ClusterId, InvalidName, TrustDomain};
use crate::model::Authority;

/// Failed attempts after which an invitation is closed.
pub const TRIES_MAX: u8 = 5;
/// Invitations kept at a time, closed ones included.
pub const INVITATIONS_MAX: usize = 1_000;
pub const LIFE_MIN: Duration = Duration::from_secs(1);
pub const LIFE_DEFAULT: Duration = Duration::from_secs(60 * 60);
pub const LIFE_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Gateway addresses in one token or offer.
pub const ADDRESSES_MAX: usize = 8;
/// Peers that one cluster may have.
pub const PEERS_MAX: usize = 500;
/// How long a closed invitation is remembered, so that a late comer hears why it is refused.
const REMEMBERED: Duration = Duration::from_secs(24 * 60 * 60);
/// Characters of a token that are looked at; a token is about 300.
const TOKEN_LENGTH_MAX: usize = 8 * 1024;

/// The public name of an invitation: 16 random octets, written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvitationId([u8; 16]);

impl InvitationId {
    /// From 16 random octets.
    pub fn from_random(octets: [u8; 16]) -> Self {
        Self(octets)
    }
}

impl fmt::Display for InvitationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for InvitationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for InvitationId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let octets = HEXLOWER.decode(text.as_bytes()).ok().and_then(|octets| octets.try_into().ok());
        octets.map(Self).ok_or_else(|| InvalidName {
            kind: "invitation id",
            value: text.chars().take(80).collect(),
            rule: "use 32 lower-case hexadecimal digits",
        })
    }
}

impl Serialize for InvitationId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for InvitationId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The secret of an invitation, an Ed25519 seed: never printed but inside the token, wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Seed([u8; 32]);

impl Seed {
    pub fn new(octets: [u8; 32]) -> Self {
        Self(octets)
    }

    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// What an operator carries to the other cluster. `Display` writes the whole token, secret included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub id: InvitationId,
    /// To the second.
    pub expires: Timestamp,
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    /// SHA-256 of the inviting cluster's root certificate.
    pub root_sha256: [u8; 32],
    pub seed: Seed,
    /// `host:port` of the inviting cluster's gateways; at most [`ADDRESSES_MAX`].
    pub addresses: Vec<String>,
}

/// Why a pasted token can't be read. Whether it is still good, only the inviting side knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(
        "this is not an invitation token: it begins with `tombolo1.`; copy it from the output of `tombolo peer invite`"
    )]
    NotAToken,
    #[error("the token was made by a release that this one can't read; use the same release on both sides")]
    OtherVersion,
    #[error(
        "the token is damaged: part of it is missing or was changed; copy it again, whole, from the output of `tombolo peer invite`"
    )]
    Damaged,
    #[error("the token is whole, but its {0} is not valid; ask for a new one")]
    Invalid(&'static str),
}

const PREFIX: &str = "tombolo1.";
const PREFIX_ANY: &str = "tombolo";

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut octets = Vec::with_capacity(256);
        octets.extend_from_slice(&self.id.0);
        octets.extend_from_slice(&self.expires.as_second().to_be_bytes());
        octets.extend_from_slice(&self.root_sha256);
        octets.extend_from_slice(self.seed.expose());
        push_text(&mut octets, self.cluster.as_str());
        push_text(&mut octets, self.trust_domain.as_str());
        let addresses = &self.addresses[..self.addresses.len().min(ADDRESSES_MAX)];
        octets.push(addresses.len() as u8);
        for address in addresses {
            push_text(&mut octets, address);
        }
        octets.extend_from_slice(&crc32(&octets).to_be_bytes());
        write!(f, "{PREFIX}{}", BASE64URL_NOPAD.encode(&octets))
    }
}

/// Text of at most 255 octets behind its length; every caller's type is bounded by that.
fn push_text(octets: &mut Vec<u8>, text: &str) {
    let text = &text.as_bytes()[..text.len().min(255)];
    octets.push(text.len() as u8);
    octets.extend_from_slice(text);
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        // Terminals and mail wrap long lines; white space carries nothing here.
        let text: String = text.chars().take(TOKEN_LENGTH_MAX).filter(|c| !c.is_ascii_whitespace()).collect();
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            let other = text.strip_prefix(PREFIX_ANY).and_then(|rest| rest.split_once('.'));
            let numbered = other.is_some_and(|(version, _)| version.parse::<u32>().is_ok());
            return Err(if numbered { TokenError::OtherVersion } else { TokenError::NotAToken });
        };
        let octets = BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| TokenError::Damaged)?;
        let (body, sum) = octets.split_last_chunk::<4>().ok_or(TokenError::Damaged)?;
        if crc32(body) != u32::from_be_bytes(*sum) {
            return Err(TokenError::Damaged);
        }
        let mut reader = Reader(body);
        let id = InvitationId(reader.array()?);
        let expires = i64::from_be_bytes(reader.array()?);
        let root_sha256 = reader.array()?;
        let seed = Seed(reader.array()?);
        let cluster = reader.text()?.parse().map_err(|_| TokenError::Invalid("cluster id"))?;
        let trust_domain = reader.text()?.parse().map_err(|_| TokenError::Invalid("trust domain"))?;
        let addresses = reader.addresses()?;
        let expires = Timestamp::from_second(expires).map_err(|_| TokenError::Invalid("expiry"))?;
        Ok(Self { id, expires, cluster, trust_domain, root_sha256, seed, addresses })
    }
}

/// Reads the fields of a token whose checksum is right.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(TokenError::Damaged)?;
        self.0 = rest;
        Ok(*head)
    }

    fn text(&mut self) -> Result<String, TokenError> {
        let [length] = self.array::<1>()?;
        let (head, rest) = self.0.split_at_checked(length.into()).ok_or(TokenError::Damaged)?;
        self.0 = rest;
        String::from_utf8(head.to_vec()).map_err(|_| TokenError::Invalid("text"))
    }

    fn addresses(&mut self) -> Result<Vec<String>, TokenError> {
        let [count] = self.array::<1>()?;
        if usize::from(count) > ADDRESSES_MAX {
            return Err(TokenError::Invalid("number of gateway addresses"));
        }
        let mut addresses = Vec::with_capacity(count.into());
        for _ in 0..count {
            let address = self.text()?;
            if !is_address(&address) {
                return Err(TokenError::Invalid("gateway address"));
            }
            addresses.push(address);
        }
        if self.0.is_empty() { Ok(addresses) } else { Err(TokenError::Damaged) }
    }
}

/// Whether `text` is `host:port` as a gateway can dial it: a name, an IPv4 or a bracketed IPv6
/// address, and a port above 0; at most 255 octets.
pub fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_ok = match bracketed {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')),
    };
    let port_ok = port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0);
    text.len() <= 255 && host_ok && port_ok
}

/// CRC-32 (ISO-HDLC). It finds a damaged paste; against an attacker stand the pin and the signature.
fn crc32(octets: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for octet in octets {
        sum ^= u32::from(*octet);
        for _ in 0..8 {
            sum = if sum & 1 == 1 { (sum >> 1) ^ 0xedb8_8320 } else { sum >> 1 };
        }
    }
    !sum
}

/// What has become of an invitation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum Outcome {
    Open,
    /// Redeemed by this root; only it gets the same answer again.
    Redeemed {
        cluster: ClusterId,
        #[serde(rename = "rootSha256")]
        root_sha256: [u8; 32],
    },
    /// Redeemed, and the peer was removed since: nobody gets in with it any more.
    Spent,
}

/// One invitation at the side that made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Invitation {
    /// Ed25519.
    pub public_key: [u8; 32],
    pub expires: Timestamp,
    /// What the peer that redeems it will be granted.
    pub authority: Authority,
    pub tries: u8,
    pub outcome: Outcome,
}

impl Invitation {
    /// For a list: `open`, `redeemed by <cluster>`, `spent`, `closed after failed tries`, `expired`.
    pub fn state(&self, now: Timestamp) -> String {
        match &self.outcome {
            Outcome::Redeemed { cluster, .. } => format!("redeemed by {cluster}"),
            Outcome::Spent => "spent".into(),
            Outcome::Open if self.tries >= TRIES_MAX => "closed after failed tries".into(),
            Outcome::Open if self.expires <= now => "expired".into(),
            Outcome::Open => "open".into(),
        }
    }
}

/// Why no invitation was made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    #[error("an invitation lives from {LIFE_MIN:?} to 7 days")]
    Life,
    #[error("{INVITATIONS_MAX} invitations are kept already; wait until old ones have expired")]
    TooMany,
    #[error("an invitation with this id exists already")]
    Exists,
}

/// Somebody's attempt to redeem an invitation. The signature has been checked by the caller, with
/// the public key that [`Invitations::get`] gave for the id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    pub id: InvitationId,
    pub proof_ok: bool,
    /// The root that the offer's bundle begins with.
    pub root_sha256: [u8; 32],
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
}

/// Which names are taken here: this cluster's own and those of its peers, one to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bindings<'a> {
    pub own_cluster: &'a ClusterId,
    pub own_trust_domain: &'a TrustDomain,
    pub peers: &'a BTreeMap<ClusterId, TrustDomain>,
}

impl Bindings<'_> {
    /// Whether `cluster` and `trust_domain` may be bound to each other here.
    pub fn check(&self, cluster: &ClusterId, trust_domain: &TrustDomain) -> Result<(), Refused> {
        if cluster == self.own_cluster || trust_domain == self.own_trust_domain {
            return Err(Refused::OwnName);
        }
        let bound = self.peers.contains_key(cluster) || self.peers.values().any(|domain| domain == trust_domain);
        if bound {
            return Err(Refused::AlreadyBound);
        }
        if self.peers.len() >= PEERS_MAX { Err(Refused::TooManyPeers) } else { Ok(()) }
    }
}

/// Why an attempt was refused; `code` travels to the other side with the sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Refused {
    #[error("no such invitation is known here; ask for a new one with `tombolo peer invite`")]
    Unknown,
    #[error("the invitation has expired; ask for a new one with `tombolo peer invite`")]
    Expired,
    #[error("the invitation was used already; ask for a new one with `tombolo peer invite`")]
    Used,
    #[error("too many failed tries have closed the invitation; ask for a new one with `tombolo peer invite`")]
    TooManyTries,
    #[error(
        "the proof does not match the invitation on this connection: the token was changed, or something sits between the two gateways; ask for a new token and check the addresses in it"
    )]
    BadProof,
    #[error(
        "the offer claims the inviting cluster's own cluster id or trust domain; give each cluster names of its own"
    )]
    OwnName,
    #[error(
        "the cluster id or the trust domain is bound to a peer already; remove that peer with `tombolo peer remove` first"
    )]
    AlreadyBound,
    #[error("the cluster has {PEERS_MAX} peers already; remove one with `tombolo peer remove` first")]
    TooManyPeers,
}

impl Refused {
    pub const ALL: [Refused; 8] = [
        Refused::Unknown,
        Refused::Expired,
        Refused::Used,
        Refused::TooManyTries,
        Refused::BadProof,
        Refused::OwnName,
        Refused::AlreadyBound,
        Refused::TooManyPeers,
    ];

    /// The stable name on the wire and in metrics.
    pub fn code(self) -> &'static str {
        match self {
            Refused::Unknown => "unknown",
            Refused::Expired => "expired",
            Refused::Used => "used",
            Refused::TooManyTries => "too-many-tries",
            Refused::BadProof => "bad-proof",
            Refused::OwnName => "own-name",
            Refused::AlreadyBound => "already-bound",
            Refused::TooManyPeers => "too-many-peers",
        }
    }
}

/// What to do with an attempt that was not refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Redemption {
    /// Bind the peer with this authority, make it durable, then answer.
    Accept(Authority),
    /// The same root again: give the same answer, bind nothing.
    Repeat,
}

/// All invitations of this cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Invitations(BTreeMap<InvitationId, Invitation>);

impl Invitations {
    pub fn iter(&self) -> impl Iterator<Item = (&InvitationId, &Invitation)> {
        self.0.iter()
    }

    pub fn get(&self, id: &InvitationId) -> Option<&Invitation> {
        self.0.get(id)
    }

    /// Opens an invitation and returns when it expires, to the second as tokens carry it.
    pub fn create(
        &mut self,
        id: InvitationId,
        public_key: [u8; 32],
        authority: Authority,
        life: Duration,
        now: Timestamp,
    ) -> Result<Timestamp, CreateError> {
        if !(LIFE_MIN..=LIFE_MAX).contains(&life) {
            return Err(CreateError::Life);
        }
        self.forget_old(now);
        if self.0.len() >= INVITATIONS_MAX {
            return Err(CreateError::TooMany);
        }
        if self.0.contains_key(&id) {
            return Err(CreateError::Exists);
        }
        // Rounded up: a token must not live shorter than the operator asked for.
        let until = now.checked_add(life).map_err(|_| CreateError::Life)?;
        let rounded = until.as_second() + i64::from(until.subsec_nanosecond() > 0);
        let expires = Timestamp::from_second(rounded).map_err(|_| CreateError::Life)?;
        self.0.insert(id, Invitation { public_key, expires, authority, tries: 0, outcome: Outcome::Open });
        Ok(expires)
    }

    /// Decides about one attempt and counts it. An accepted one is recorded here; the caller makes
    /// this state durable, with the new peer, before it answers.
    pub fn redeem(
        &mut self,
        attempt: &Attempt,
        bindings: &Bindings<'_>,
        now: Timestamp,
    ) -> Result<Redemption, Refused> {
        let invitation = self.0.get_mut(&attempt.id).ok_or(Refused::Unknown)?;
        if invitation.expires <= now {
            return Err(Refused::Expired);
        }
        if invitation.tries >= TRIES_MAX {
            return Err(Refused::TooManyTries);
        }
        let verdict = judge(invitation, attempt, bindings);
        match &verdict {
            Ok(Redemption::Accept(_)) => {
                let (cluster, root_sha256) = (attempt.cluster.clone(), attempt.root_sha256);
                invitation.outcome = Outcome::Redeemed { cluster, root_sha256 };
            }
            Ok(Redemption::Repeat) => {}
            Err(_) => invitation.tries += 1,
        }
        verdict
    }

    /// The peer was removed: what it redeemed brings it back no more.
    pub fn peer_removed(&mut self, removed: &ClusterId) {
        for invitation in self.0.values_mut() {
            if matches!(&invitation.outcome, Outcome::Redeemed { cluster, .. } if cluster == removed) {
                invitation.outcome = Outcome::Spent;
            }
        }
    }

    /// Drops what has been closed by its expiry for a day.
    pub fn forget_old(&mut self, now: Timestamp) {
        self.0
            .retain(|_, invitation| invitation.expires.checked_add(REMEMBERED).is_ok_and(|forgotten| forgotten > now));
    }
}

fn judge(invitation: &Invitation, attempt: &Attempt, bindings: &Bindings<'_>) -> Result<Redemption, Refused> {
    if !attempt.proof_ok {
        return Err(Refused::BadProof);
    }
    match &invitation.outcome {
        Outcome::Open => {}
        Outcome::Spent => return Err(Refused::Used),
        Outcome::Redeemed { cluster, root_sha256 } => {
            let same = *cluster == attempt.cluster && *root_sha256 == attempt.root_sha256;
            return if same { Ok(Redemption::Repeat) } else { Err(Refused::Used) };
        }
    }
    bindings.check(&attempt.cluster, &attempt.trust_domain)?;
    Ok(Redemption::Accept(invitation.authority.clone()))
}

#[cfg(test)]
mod tests;
