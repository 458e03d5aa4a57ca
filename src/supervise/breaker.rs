//! When to stop trying: an engine that keeps dying is not started again for a while, and no job is claimed for it.
//!
//! Invariant: pure; the time comes from the caller.

use std::time::{Duration, Instant};

/// Failures in a row after which the breaker opens. More than one document that kills its engine takes, with what is between.
const FAILURES: u32 = 5;
/// Shortest and longest time that it stays open.
const OPEN_FOR: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));

/// Counts failures in a row.
#[derive(Debug, Default)]
pub struct Breaker {
    failures: u32,
    closed_at: Option<Instant>,
}

impl Breaker {
    /// An inference came to its end.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// An engine died, or did not start. `true` if this opened the breaker.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.failures += 1;
        let Some(beyond) = self.failures.checked_sub(FAILURES) else { return false };
        let open_for = OPEN_FOR.0.saturating_mul(1 << beyond.min(16)).min(OPEN_FOR.1);
        self.closed_at = Some(now + open_for);
        true
    }

    /// Whether it was opened, and nothing has come to its end since: then one request at a time tries.
    pub fn is_probing(&self) -> bool {
        self.failures >= FAILURES
    }

    /// How long it is still open.
    pub fn open_for(&self, now: Instant) -> Option<Duration> {
        self.closed_at.and_then(|at| at.checked_duration_since(now)).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_with_time() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 1..FAILURES {
            assert!(!breaker.failed(now));
        }
        assert_eq!(breaker.open_for(now), None);
        assert!(breaker.failed(now));
        assert_eq!(breaker.open_for(now), Some(OPEN_FOR.0));
        let later = now + OPEN_FOR.0;
        assert_eq!(breaker.open_for(later), None, "one try is allowed");
        assert!(breaker.is_probing());
        assert!(breaker.failed(later));
        assert_eq!(breaker.open_for(later), Some(OPEN_FOR.0 * 2));
        breaker.succeeded();
        assert!(!breaker.is_probing());
        assert!(!breaker.failed(later));
    }
}
