//! The ledger's clock, as the node knows it: expiry follows it, not the node's own.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch by the ledger's clock, carried on by a monotonic one between its answers. Rounded up
/// throughout: what has expired by the ledger's clock has by this one, but for the time that an answer took to arrive.
#[derive(Debug)]
pub struct LedgerClock {
    start: Instant,
    offset_ms: AtomicI64,
}

impl LedgerClock {
    /// Starts with the node's own clock, until the ledger's first answer.
    #[must_use]
    pub fn new() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_millis());
        Self { start: Instant::now(), offset_ms: AtomicI64::new(i64::try_from(wall + 1).unwrap_or(0)) }
    }

    fn elapsed_ms(&self) -> i64 {
        i64::try_from(self.start.elapsed().as_millis() + 1).unwrap_or(i64::MAX)
    }

    /// Takes the time of an answer that just arrived, `round_trip` after it was asked for. The ledger's time is now between
    /// that and `round_trip` later; what is known already stays where it lies within, so that no slow answer sets it back.
    pub fn set(&self, now_ms: u64, round_trip: Duration) {
        let elapsed_ms = self.elapsed_ms();
        let least = i64::try_from(now_ms).unwrap_or(i64::MAX).saturating_add(1);
        let most = least.saturating_add(i64::try_from(round_trip.as_millis()).unwrap_or(i64::MAX));
        let known = elapsed_ms.saturating_add(self.offset_ms.load(Ordering::Relaxed));
        self.offset_ms.store(known.clamp(least, most).saturating_sub(elapsed_ms), Ordering::Relaxed);
    }

    /// The time now.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.elapsed_ms().saturating_add(self.offset_ms.load(Ordering::Relaxed))).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_ledger_whatever_the_node_thinks() {
        let clock = LedgerClock::new();
        let own = clock.now_ms();
        clock.set(5_000, Duration::ZERO);
        assert!((5_000..60_000).contains(&clock.now_ms()));
        clock.set(own + 3_600_000, Duration::ZERO);
        assert!(clock.now_ms() >= own + 3_600_000);
    }

    #[test]
    fn a_slow_answer_does_not_set_it_back() {
        let clock = LedgerClock::new();
        clock.set(1_000_000, Duration::ZERO);
        clock.set(995_000, Duration::from_secs(6));
        assert!(clock.now_ms() >= 1_000_000);
        // The same answer after a shorter way does: it was wrong before.
        clock.set(995_000, Duration::from_secs(1));
        assert!((995_000..1_000_000).contains(&clock.now_ms()));
    }
}
