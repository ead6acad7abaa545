//! Messages that strangers can cause, so that none of them can fill a disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a few messages through in each interval and counts the rest. One for each place that logs, as a `static`.
#[derive(Debug)]
pub struct Sparsely {
    each: Duration,
    most: u32,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    began: Option<Instant>,
    said: u32,
    left_out: u64,
}

impl Default for Sparsely {
    fn default() -> Self {
        Self::new()
    }
}

impl Sparsely {
    /// Ten messages in ten seconds.
    pub const fn new() -> Self {
        let window = Window { began: None, said: 0, left_out: 0 };
        Self { each: Duration::from_secs(10), most: 10, window: Mutex::new(window) }
    }

    /// Whether a message may be logged now, and how many were left out before it.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.is_none_or(|began| now.saturating_duration_since(began) >= self.each) {
            (window.began, window.said) = (Some(now), 0);
        }
        if window.said == self.most {
            window.left_out += 1;
            return None;
        }
        window.said += 1;
        Some(std::mem::take(&mut window.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_ten_lines_and_a_count() {
        let sparsely = Sparsely::new();
        let start = Instant::now();
        let heard: Vec<_> = (0..1_000).filter_map(|_| sparsely.admit(start)).collect();
        assert_eq!(heard, [0; 10]);
        assert_eq!(sparsely.admit(start + Duration::from_millis(9_999)), None);
        assert_eq!(sparsely.admit(start + Duration::from_secs(10)), Some(991));
        assert_eq!(sparsely.admit(start + Duration::from_secs(10)), Some(0));
    }
}
