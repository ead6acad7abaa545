//! What the two sides of a peering prove to each other, bound to one TLS connection by its exporter value, so
//! that it can't be replayed on another. The accepting side proves with an Ed25519 signature that it holds the
//! invitation's secret; the inviting side signs its answer with the key of the root that the token pins. The
//! gateways between them can change neither.

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;

use crate::certificate;

/// Length of an invitation's secret, in octets.
pub const SEED_LEN: usize = 32;
/// Length of an invitation's public key, in octets.
pub const PUBLIC_KEY_LEN: usize = 32;
/// Length of a proof, in octets.
pub const PROOF_LEN: usize = 64;
/// Length of the TLS exporter value that a proof is bound to, in octets.
pub const EXPORTER_LEN: usize = 32;
/// Label of the exporter (RFC 8446 section 7.5); its context is empty.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-tombolo-peering-v1";

const PREFIX: &[u8] = b"tombolo peering v1";
/// Begins no DER, so that what a root's key signs here is never taken for a certificate.
const ANSWER_PREFIX: &[u8] = b"tombolo peering answer v1";

/// The proof does not fit the public key, the connection or the offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the proof was not made with the invitation's secret for this connection and this offer")]
pub struct BadProof;

/// The answer was not signed by the root, or for another connection or offer, or was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer was not signed by the root for this connection and this offer")]
pub struct BadAnswer;

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 octets")
}

/// A fresh invitation secret from the system's random source.
pub fn new_seed() -> [u8; SEED_LEN] {
    let mut seed = [0; SEED_LEN];
    aws_lc_rs::rand::fill(&mut seed).expect("the system's random source works");
    seed
}

/// What the inviting side keeps: it can check a proof and can't make one.
pub fn public_key(seed: &[u8; SEED_LEN]) -> [u8; PUBLIC_KEY_LEN] {
    key_pair(seed).public_key().as_ref().try_into().expect("an Ed25519 public key has 32 octets")
}

/// The proof over `body` on the connection whose exporter value is `exporter`.
pub fn sign(seed: &[u8; SEED_LEN], exporter: &[u8; EXPORTER_LEN], body: &[u8]) -> [u8; PROOF_LEN] {
    let signature = key_pair(seed).sign(&message(exporter, body));
    signature.as_ref().try_into().expect("an Ed25519 signature has 64 octets")
}

/// Checks a proof. `public_key`, `exporter` and `proof` may come from outside and have any length.
pub fn verify(public_key: &[u8], exporter: &[u8], body: &[u8], proof: &[u8]) -> Result<(), BadProof> {
    let exporter: &[u8; EXPORTER_LEN] = exporter.try_into().map_err(|_| BadProof)?;
    UnparsedPublicKey::new(&ED25519, public_key).verify(&message(exporter, body), proof).map_err(|_| BadProof)
}

/// What [`crate::ca::CertificateAuthority::sign_answer`] signs.
pub(crate) fn answer_message(exporter: &[u8; EXPORTER_LEN], offer: &[u8], body: &[u8]) -> Vec<u8> {
    [ANSWER_PREFIX, exporter, &sha256(offer), &sha256(body)].concat()
}

/// Checks that `root`'s key signed `body` as the answer to `offer` on the connection of `exporter`.
pub fn verify_answer(
    root: &CertificateDer<'_>,
    exporter: &[u8; EXPORTER_LEN],
    offer: &[u8],
    body: &[u8],
    signature: &[u8],
) -> Result<(), BadAnswer> {
    let message = answer_message(exporter, offer, body);
    if certificate::signed(root, &message, signature) { Ok(()) } else { Err(BadAnswer) }
}

fn key_pair(seed: &[u8; SEED_LEN]) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(seed).expect("any 32 octets are an Ed25519 seed")
}

fn message(exporter: &[u8; EXPORTER_LEN], body: &[u8]) -> Vec<u8> {
    [PREFIX, exporter, &sha256(body)].concat()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::bundle::root_sha256;
    use crate::ca::{CaError, CertificateAuthority};

    #[test]
    fn a_proof_holds_for_its_connection_and_offer_only() {
        let (seed, exporter, body) = ([7; SEED_LEN], [9; EXPORTER_LEN], b"offer".as_slice());
        let key = public_key(&seed);
        let proof = sign(&seed, &exporter, body);
        assert_eq!(verify(&key, &exporter, body, &proof), Ok(()));

        let mut tampered = proof;
        tampered[0] ^= 1;
        for (what, key, exporter, body, proof) in [
            ("another secret", &public_key(&[8; SEED_LEN])[..], &exporter[..], body, &proof[..]),
            ("another connection", &key, &[10; EXPORTER_LEN], body, &proof),
            ("another offer", &key, &exporter, b"Offer", &proof),
            ("a tampered proof", &key, &exporter, body, &tampered),
            ("a short proof", &key, &exporter, body, &proof[..63]),
            ("a short exporter", &key, &exporter[..31], body, &proof),
            ("a short key", &key[..5], &exporter, body, &proof),
            ("nothing", &[], &[], &[], &[]),
        ] {
            assert_eq!(verify(key, exporter, body, proof), Err(BadProof), "{what}");
        }
    }

    #[test]
    fn an_answer_holds_for_its_root_connection_and_offer_only() {
        let folder = tempfile::tempdir().unwrap();
        let ca = CertificateAuthority::create_or_load(folder.path(), &"east.tombolo".parse().unwrap()).unwrap();
        let first = ca.active_root_sha256();
        let second = ca.add_root().unwrap();
        let bundle = ca.bundle();
        let root = |sha256: [u8; 32]| bundle.roots().iter().find(|root| root_sha256(root) == sha256).unwrap();
        let (exporter, offer, body) = ([9; EXPORTER_LEN], b"offer".as_slice(), b"body".as_slice());
        // Not the one that issues: a token may be older than a rotation.
        ca.activate(second).unwrap();
        let signature = ca.sign_answer(first, &exporter, offer, body).unwrap();
        assert_eq!(verify_answer(root(first), &exporter, offer, body, &signature), Ok(()));

        for (what, sha256, exporter, offer, body, signature) in [
            ("another root", second, exporter, offer, body, &signature[..]),
            ("another connection", first, [1; EXPORTER_LEN], offer, body, &signature),
            ("another offer", first, exporter, b"Offer", body, &signature),
            ("another body", first, exporter, offer, b"Body", &signature),
            ("a cut signature", first, exporter, offer, body, &signature[1..]),
            ("no signature", first, exporter, offer, body, &[]),
        ] {
            assert_eq!(verify_answer(root(sha256), &exporter, offer, body, signature), Err(BadAnswer), "{what}");
        }
        assert!(matches!(ca.sign_answer([0; 32], &exporter, offer, body), Err(CaError::UnknownRoot)));
    }

    #[test]
    fn secrets_differ() {
        assert_ne!(new_seed(), new_seed());
    }
}
