//! The sender's limits: so many a minute, so many a day, per app.
//!
//! The minute limit holds over **any** 60 seconds, not per calendar minute: accepted broadcasts are counted in 61
//! one-second buckets (the current, partial second and the 60 before it), 256 bytes an app whatever the limit. It may refuse
//! up to one second longer than an exact log of times would, never shorter. The day is the UTC day.

use super::verdict::{Limit, Refusal};

/// How many one-second buckets cover "the last 60 seconds" when the first and the last of them are partial.
pub const BUCKETS: usize = 61;

/// An app's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Accepted broadcasts in any 60 seconds.
    pub per_minute: u32,
    /// Accepted broadcasts in a UTC day.
    pub per_day: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { per_minute: 10, per_day: 1000 }
    }
}

/// Both counters of one app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quota {
    second: u64,
    sum: u32,
    buckets: [u32; BUCKETS],
    day: u64,
    day_count: u32,
}

impl Default for Quota {
    fn default() -> Self {
        Self { second: 0, sum: 0, buckets: [0; BUCKETS], day: 0, day_count: 0 }
    }
}

const SECONDS_A_DAY: u64 = 86_400;

impl Quota {
    /// Charges one broadcast, or says why not and when to come back. A refusal charges nothing.
    ///
    /// `now_us`: the ledger's clock, microseconds since the Unix epoch. A clock that steps back counts as standing still.
    ///
    /// # Errors
    /// The limit that is used up; if both are, the one that frees later.
    pub fn charge(&mut self, now_us: u64, limits: Limits) -> Result<(), Refusal> {
        let now_second = now_us / 1_000_000;
        self.advance(now_second);
        let day = (now_second / SECONDS_A_DAY).max(self.day);
        let day_count = if day == self.day { self.day_count } else { 0 };
        if day_count >= limits.per_day {
            let retry_after = ((day + 1) * SECONDS_A_DAY).saturating_sub(now_second).max(1);
            return Err(Refusal { limit: Limit::Day, retry_after });
        }
        if self.sum >= limits.per_minute {
            return Err(Refusal {
                limit: Limit::Minute,
                retry_after: self.minute_frees_in(now_second, limits.per_minute),
            });
        }
        self.buckets[slot(self.second)] += 1;
        self.sum += 1;
        self.day = day;
        self.day_count = day_count + 1;
        Ok(())
    }

    /// Drops the buckets that left the window.
    fn advance(&mut self, now_second: u64) {
        if now_second <= self.second {
            return;
        }
        let passed = now_second - self.second;
        if passed >= BUCKETS as u64 {
            self.buckets = [0; BUCKETS];
            self.sum = 0;
        } else {
            for second in self.second + 1..=now_second {
                self.sum -= std::mem::take(&mut self.buckets[slot(second)]);
            }
        }
        self.second = now_second;
    }

    /// Seconds until enough buckets have left for one more broadcast; at least 1.
    fn minute_frees_in(&self, now_second: u64, per_minute: u32) -> u64 {
        let mut sum = self.sum;
        let oldest = (self.second + 1).saturating_sub(BUCKETS as u64);
        for second in oldest..=self.second {
            sum -= self.buckets[slot(second)];
            if sum < per_minute {
                return (second + BUCKETS as u64).saturating_sub(now_second).max(1);
            }
        }
        BUCKETS as u64
    }

    /// The state as 276 bytes: second, sum, buckets, day, day's count; big-endian.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + 4 + 4 * BUCKETS + 8 + 4);
        bytes.extend(self.second.to_be_bytes());
        bytes.extend(self.sum.to_be_bytes());
        self.buckets.iter().for_each(|count| bytes.extend(count.to_be_bytes()));
        bytes.extend(self.day.to_be_bytes());
        bytes.extend(self.day_count.to_be_bytes());
        bytes
    }

    /// Reads [`Quota::to_bytes`] back; `None` if the length is another.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (second, rest) = bytes.split_first_chunk::<8>()?;
        let (sum, mut rest) = rest.split_first_chunk::<4>()?;
        let mut buckets = [0; BUCKETS];
        for bucket in &mut buckets {
            let (count, after) = rest.split_first_chunk::<4>()?;
            *bucket = u32::from_be_bytes(*count);
            rest = after;
        }
        let (day, rest) = rest.split_first_chunk::<8>()?;
        let (day_count, rest) = rest.split_first_chunk::<4>()?;
        rest.is_empty().then_some(Self {
            second: u64::from_be_bytes(*second),
            sum: u32::from_be_bytes(*sum),
            buckets,
            day: u64::from_be_bytes(*day),
            day_count: u32::from_be_bytes(*day_count),
        })
    }
}

#[allow(clippy::cast_possible_truncation)] // a remainder below 61
const fn slot(second: u64) -> usize {
    (second % BUCKETS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000;
    const START: u64 = 1_764_000_000 * SECOND;

    #[test]
    fn the_eleventh_in_a_minute_is_refused_and_told_when_to_return() {
        let mut quota = Quota::default();
        let limits = Limits::default();
        for i in 0..10 {
            assert_eq!(quota.charge(START + i * SECOND, limits), Ok(()));
        }
        let refusal = quota.charge(START + 10 * SECOND, limits).unwrap_err();
        assert_eq!(refusal, Refusal { limit: Limit::Minute, retry_after: 51 });
        assert!(quota.charge(START + 60 * SECOND, limits).is_err());
        assert_eq!(quota.charge(START + 61 * SECOND, limits), Ok(()));
    }

    #[test]
    fn the_day_ends_at_midnight_utc() {
        let midnight = (START / SECOND / SECONDS_A_DAY + 1) * SECONDS_A_DAY * SECOND;
        let mut quota = Quota::default();
        let limits = Limits { per_minute: 1000, per_day: 3 };
        for _ in 0..3 {
            assert_eq!(quota.charge(midnight - 10 * SECOND, limits), Ok(()));
        }
        assert_eq!(quota.charge(midnight - 10 * SECOND, limits), Err(Refusal { limit: Limit::Day, retry_after: 10 }));
        assert_eq!(quota.charge(midnight, limits), Ok(()));
    }

    proptest! {
        #[test]
        fn no_sixty_seconds_ever_hold_more_than_the_limit(
            steps in proptest::collection::vec(0u64..20 * SECOND, 1..300),
            per_minute in 1u32..20,
        ) {
            let mut quota = Quota::default();
            let mut now = START;
            let mut accepted: Vec<u64> = Vec::new();
            for step in steps {
                now += step;
                let before = quota.clone();
                match quota.charge(now, Limits { per_minute, per_day: u32::MAX }) {
                    Ok(()) => accepted.push(now),
                    Err(refusal) => {
                        // Refused only with the window (one partial second included) full, and the hint is right.
                        let window = accepted.iter().filter(|at| **at + 61 * SECOND > now).count();
                        prop_assert!(window >= per_minute as usize);
                        let mut later = before;
                        prop_assert_eq!(later.charge(now + refusal.retry_after * SECOND, Limits { per_minute, per_day: u32::MAX }), Ok(()));
                    }
                }
                let last_minute = accepted.iter().filter(|at| **at + 60 * SECOND > now).count();
                prop_assert!(last_minute <= per_minute as usize);
                prop_assert_eq!(Quota::from_bytes(&quota.to_bytes()), Some(quota.clone()));
            }
        }
    }
}
