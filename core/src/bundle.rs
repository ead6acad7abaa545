//! When an offered trust bundle may replace the one that is held.
//!
//! A bundle's sequence only grows (SPIFFE Trust Domain and Bundle, section 4.1.1): a lower one is an old
//! bundle played back, and the same one with other content is two publishers that disagree. Both would let
//! roots come back that were retired, so both are refused and the last good bundle stays.

/// What tells two bundles of one trust domain apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub sequence: u64,
    /// SHA-256 over the roots, in an order that does not depend on how they were sent.
    pub digest: [u8; 32],
}

/// What to do with a bundle that was offered and is acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptance {
    /// It is the first one, or a later one.
    Replace,
    /// It is the one that is held already.
    Same,
}

/// Why an offered bundle was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BundleRefused {
    #[error("the offered bundle has sequence {offered}, but {held} is held: an old bundle never replaces a newer one")]
    LowerSequence { held: u64, offered: u64 },
    #[error("the offered bundle has the same sequence {sequence} as the one held, but other roots")]
    SameSequenceOtherContent { sequence: u64 },
}

/// Decides on one offered bundle. `held` is the bundle of the same trust domain that is in force.
pub fn accept(held: Option<Version>, offered: Version) -> Result<Acceptance, BundleRefused> {
    let Some(held) = held else { return Ok(Acceptance::Replace) };
    if offered.sequence < held.sequence {
        return Err(BundleRefused::LowerSequence { held: held.sequence, offered: offered.sequence });
    }
    if offered.sequence > held.sequence {
        return Ok(Acceptance::Replace);
    }
    if offered.digest == held.digest {
        Ok(Acceptance::Same)
    } else {
        Err(BundleRefused::SameSequenceOtherContent { sequence: held.sequence })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_later_or_equal_bundle_is_taken() {
        let version = |sequence, fill| Version { sequence, digest: [fill; 32] };
        for (held, offered, want) in [
            (None, version(0, 1), Ok(Acceptance::Replace)),
            (Some(version(3, 1)), version(4, 2), Ok(Acceptance::Replace)),
            (Some(version(3, 1)), version(4, 1), Ok(Acceptance::Replace)),
            (Some(version(3, 1)), version(3, 1), Ok(Acceptance::Same)),
            (Some(version(3, 1)), version(3, 2), Err(BundleRefused::SameSequenceOtherContent { sequence: 3 })),
            (Some(version(3, 1)), version(2, 2), Err(BundleRefused::LowerSequence { held: 3, offered: 2 })),
            (Some(version(3, 1)), version(2, 1), Err(BundleRefused::LowerSequence { held: 3, offered: 2 })),
        ] {
            assert_eq!(accept(held, offered), want, "{held:?} {offered:?}");
        }
    }
}
