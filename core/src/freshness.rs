//! How current what is known of a peer is, from its silence and from whether a tunnel answers.

use std::time::{Duration, Instant};

use crate::model::Freshness;

/// Silence on peer sync after which a peer's state is stale. Heartbeats come every two seconds.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);

/// `heard` is when the peer last said anything over sync, or when this process began to listen.
pub fn judge(now: Instant, heard: Instant, tunnel_answers: bool) -> Freshness {
    if now.saturating_duration_since(heard) < SILENCE_MAX {
        Freshness::Fresh
    } else if tunnel_answers {
        Freshness::Stale
    } else {
        Freshness::Draining
    }
}

/// When the judgement changes by the mere passing of time; `None` when only an event can change it.
pub fn next_change(now: Instant, heard: Instant) -> Option<Instant> {
    let stale = heard + SILENCE_MAX;
    (stale > now).then_some(stale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_makes_stale_and_only_without_a_tunnel_draining() {
        let heard = Instant::now();
        for (silence_ms, tunnel, want) in [
            (0, false, Freshness::Fresh),
            (14_999, false, Freshness::Fresh),
            (15_000, true, Freshness::Stale),
            (15_000, false, Freshness::Draining),
            (3_600_000, true, Freshness::Stale),
        ] {
            let now = heard + Duration::from_millis(silence_ms);
            assert_eq!(judge(now, heard, tunnel), want, "{silence_ms} ms, tunnel {tunnel}");
        }
    }

    #[test]
    fn the_next_change_is_when_it_becomes_stale() {
        let heard = Instant::now();
        assert_eq!(next_change(heard, heard), Some(heard + SILENCE_MAX));
        assert_eq!(next_change(heard + SILENCE_MAX, heard), None);
    }
}
