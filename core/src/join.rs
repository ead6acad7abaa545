//! Join entries: how a workload or one of tombolo's roles gets its first SVID where no platform vouches for it.
//!
//! An entry binds one SPIFFE ID to a hashed secret, with a number of uses and an expiry. Uses are counted by
//! public key: whoever redeems again with the same key, because it was killed before it could persist the
//! answer, uses nothing up and is not turned away for having come late.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroize;

use crate::id::{InvalidName, SpiffeId};

/// Most entries that one cluster keeps.
pub const ENTRIES_MAX: usize = 1_000;
/// Most uses of one entry; each costs 32 octets.
pub const USES_MAX: u32 = 1_000;
/// An expired entry is kept this long for keys that have redeemed it, then forgotten when room is needed.
const RETENTION: SignedDuration = SignedDuration::from_hours(7 * 24);

/// The public name of a join entry: 8 random octets, written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JoinEntryId([u8; 8]);

impl JoinEntryId {
    /// `octets` come from a cryptographic random source.
    pub fn from_random(octets: [u8; 8]) -> Self {
        Self(octets)
    }
}

impl fmt::Display for JoinEntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for JoinEntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for JoinEntryId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let octets = HEXLOWER.decode(text.as_bytes()).ok().and_then(|octets| octets.try_into().ok());
        octets.map(Self).ok_or_else(|| InvalidName {
            kind: "join entry id",
            value: text.chars().take(80).collect(),
            rule: "use 16 lower-case hexadecimal digits",
        })
    }
}

impl Serialize for JoinEntryId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for JoinEntryId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What an operator hands to whoever is to join, written `<entry id>.<base64url of the secret>`.
/// Its debug output hides the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub entry_id: JoinEntryId,
    secret: [u8; 32],
}

impl JoinToken {
    /// `secret` comes from a cryptographic random source.
    pub fn new(entry_id: JoinEntryId, secret: [u8; 32]) -> Self {
        Self { entry_id, secret }
    }

    /// The secret itself, for hashing it and for sending it over TLS.
    pub fn expose_secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// The text form, secret included.
    pub fn expose(&self) -> String {
        format!("{}.{}", self.entry_id, BASE64URL_NOPAD.encode(&self.secret))
    }
}

impl Drop for JoinToken {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({})", self.entry_id)
    }
}

/// The text is not a join token. It is not repeated, for it may hold a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a join token; make one with `tombolo join add`, and copy it whole")]
pub struct NotAJoinToken;

impl FromStr for JoinToken {
    type Err = NotAJoinToken;

    /// White space around the token, such as the line end of a file, is ignored.
    fn from_str(text: &str) -> Result<Self, NotAJoinToken> {
        let (entry_id, secret) = text.trim().split_once('.').ok_or(NotAJoinToken)?;
        let entry_id = entry_id.parse().map_err(|_| NotAJoinToken)?;
        let mut octets = BASE64URL_NOPAD.decode(secret.as_bytes()).map_err(|_| NotAJoinToken)?;
        let secret = octets.as_slice().try_into().map_err(|_| NotAJoinToken);
        octets.zeroize();
        Ok(Self { entry_id, secret: secret? })
    }
}

/// A SHA-256 that is written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Digest([u8; 32]);

impl Digest {
    /// Takes the same time wherever the two differ.
    fn equals(&self, other: &[u8; 32]) -> bool {
        let difference = self.0.iter().zip(other).fold(0, |difference, (one, two)| difference | (one ^ two));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0[..4]))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HEXLOWER.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let octets =
            HEXLOWER.decode(String::deserialize(deserializer)?.as_bytes()).map_err(serde::de::Error::custom)?;
        octets.try_into().map(Self).map_err(|_| serde::de::Error::custom("a SHA-256 has 64 hexadecimal digits"))
    }
}

/// What an entry may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinKind {
    /// Anything but what is reserved for tombolo itself.
    Workload,
    /// One of tombolo's own roles.
    Role,
}

/// One entry. The secret itself is not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinEntry {
    pub spiffe_id: SpiffeId,
    pub expires: Timestamp,
    uses: u32,
    secret_sha256: Digest,
    /// The public keys that have redeemed it.
    redeemed_by: BTreeSet<Digest>,
}

impl JoinEntry {
    pub fn uses_left(&self) -> u32 {
        self.uses.saturating_sub(u32::try_from(self.redeemed_by.len()).unwrap_or(u32::MAX))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    #[error("an entry of that id exists already")]
    Exists,
    #[error("there are {ENTRIES_MAX} join entries already; remove some with `tombolo join remove`")]
    TooMany,
    #[error("an entry may have 1 to {USES_MAX} uses")]
    Uses,
    #[error("the expiry is not in the future")]
    Expiry,
    #[error("a workload's identity can't lie below /tombolo/, which is reserved for tombolo's own roles")]
    Reserved,
    #[error("the identity is not that of one of tombolo's roles")]
    NotARole,
}

/// Why a join was refused. An unknown entry and a wrong secret look alike to whoever asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    #[error("the join token is not known here; make a new one with `tombolo join add`")]
    NotKnown,
    #[error("the join token has expired; make a new one with `tombolo join add`")]
    Expired,
    #[error("the join token has no uses left; make a new one with `tombolo join add`")]
    UsedUp,
}

/// What a successful redemption yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redeemed {
    pub spiffe_id: SpiffeId,
    /// Whether the entries have changed, and must be durable before the SVID is handed out.
    pub changed: bool,
}

/// All join entries of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JoinEntries(BTreeMap<JoinEntryId, JoinEntry>);

impl JoinEntries {
    pub fn list(&self) -> impl Iterator<Item = (&JoinEntryId, &JoinEntry)> {
        self.0.iter()
    }

    pub fn get(&self, entry_id: &JoinEntryId) -> Option<&JoinEntry> {
        self.0.get(entry_id)
    }

    #[expect(clippy::too_many_arguments, reason = "each is a property of the entry that is made here")]
    pub fn add(
        &mut self,
        entry_id: JoinEntryId,
        kind: JoinKind,
        spiffe_id: SpiffeId,
        secret_sha256: [u8; 32],
        uses: u32,
        expires: Timestamp,
        now: Timestamp,
    ) -> Result<(), AddError> {
        match kind {
            JoinKind::Workload if spiffe_id.is_reserved() => return Err(AddError::Reserved),
            JoinKind::Role if spiffe_id.as_role().is_none() => return Err(AddError::NotARole),
            JoinKind::Workload | JoinKind::Role => {}
        }
        if uses == 0 || uses > USES_MAX {
            return Err(AddError::Uses);
        }
        if expires <= now {
            return Err(AddError::Expiry);
        }
        if self.0.contains_key(&entry_id) {
            return Err(AddError::Exists);
        }
        if self.0.len() >= ENTRIES_MAX {
            self.forget_old(now);
        }
        if self.0.len() >= ENTRIES_MAX {
            return Err(AddError::TooMany);
        }
        let secret_sha256 = Digest(secret_sha256);
        let redeemed_by = BTreeSet::new();
        self.0.insert(entry_id, JoinEntry { spiffe_id, expires, uses, secret_sha256, redeemed_by });
        Ok(())
    }

    /// Decides on one redemption. Nothing changes when it is refused.
    pub fn redeem(
        &mut self,
        entry_id: &JoinEntryId,
        secret_sha256: &[u8; 32],
        public_key_sha256: [u8; 32],
        now: Timestamp,
    ) -> Result<Redeemed, JoinRefusal> {
        let entry = self.0.get_mut(entry_id).ok_or(JoinRefusal::NotKnown)?;
        // First, so that only the holder of the secret learns anything about the entry.
        if !entry.secret_sha256.equals(secret_sha256) {
            return Err(JoinRefusal::NotKnown);
        }
        let public_key = Digest(public_key_sha256);
        let changed = !entry.redeemed_by.contains(&public_key);
        if changed {
            if entry.expires <= now {
                return Err(JoinRefusal::Expired);
            }
            if entry.uses_left() == 0 {
                return Err(JoinRefusal::UsedUp);
            }
            entry.redeemed_by.insert(public_key);
        }
        Ok(Redeemed { spiffe_id: entry.spiffe_id.clone(), changed })
    }

    /// Whether there was such an entry. SVIDs that were issued by it stay valid.
    pub fn remove(&mut self, entry_id: &JoinEntryId) -> bool {
        self.0.remove(entry_id).is_some()
    }

    /// Removes every entry that yields `spiffe_id`, and says how many there were.
    pub fn remove_identity(&mut self, spiffe_id: &SpiffeId) -> usize {
        let before = self.0.len();
        self.0.retain(|_, entry| entry.spiffe_id != *spiffe_id);
        before - self.0.len()
    }

    /// Forgets entries that nobody can use any more.
    fn forget_old(&mut self, now: Timestamp) {
        self.0.retain(|_, entry| {
            let kept_until = match entry.redeemed_by.is_empty() {
                true => entry.expires,
                false => entry.expires.saturating_add(RETENTION).unwrap_or(Timestamp::MAX),
            };
            kept_until > now
        });
    }
}

#[cfg(test)]
mod tests;
