#![allow(clippy::unwrap_used)]

use super::*;
use crate::ca::CertificateAuthority;
use crate::key::IdentityKey;

#[test]
fn renewal_comes_near_half_of_the_life() {
    let folder = tempfile::tempdir().unwrap();
    let domain = "east.tombolo".parse().unwrap();
    let ca = CertificateAuthority::create_or_load(folder.path(), &domain).unwrap();
    let (key, id) = (IdentityKey::generate().unwrap(), "spiffe://east.tombolo/ns/a/sa/b".parse().unwrap());
    let now = Timestamp::now();
    for life_s in [4, 10, 3600, 86_400] {
        let svid = ca.issue_svid(&key, &id, Duration::from_secs(life_s), now).unwrap();
        for random in [0.0, 0.5, 1.0] {
            let after_s = renewal_time(&svid, random).duration_since(now).as_secs_f64();
            let life_s = Duration::from_secs(life_s).as_secs_f64();
            // Certificates hold whole seconds only.
            assert!(after_s > life_s * 0.35 - 1.0 && after_s < life_s * 0.55 + 1.0, "{life_s} {random}: {after_s}");
        }
    }
}
