//! Which endpoint a session stays with: weighted rendezvous hashing (highest random weight).
//!
//! Each endpoint has a score for each session, and the highest wins. When an endpoint goes, only its own sessions
//! move; when one comes, it takes its share and no other session moves. Every sidecar comes to the same result,
//! since nothing enters but the names.

use super::EndpointKey;

/// What a session is known by (a header, a cookie, an address), as one number that is the same in every process.
pub fn session(key: &[u8]) -> u64 {
    mix(fnv(FNV_OFFSET, key))
}

/// The number of an endpoint, for [`score`].
pub(super) fn endpoint(key: &EndpointKey) -> u64 {
    let cluster = fnv(FNV_OFFSET, key.cluster.as_str().as_bytes());
    mix(fnv(fnv(cluster, b"/"), key.endpoint.as_str().as_bytes()))
}

/// The endpoint with the highest score has the session.
pub(super) fn score(session: u64, endpoint: u64, weight: u32) -> f64 {
    // From just above 0 up to 1, in steps of the precision of a double.
    let uniform = ((mix(session ^ endpoint) >> 11) + 1) as f64 / (1_u64 << 53) as f64;
    f64::from(weight) / -uniform.ln().min(-f64::MIN_POSITIVE)
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The finisher of SplitMix64: every bit of the result depends on every bit of the input.
pub(super) fn mix(value: u64) -> u64 {
    let mut mixed = value;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
