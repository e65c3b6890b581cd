//! The quota alone, with a clock that also steps back and a state that is stored and read again.

use broadcastd::broadcast::quota::{Limits, Quota};
use broadcastd::broadcast::verdict::Limit;
use fastrand::Rng;

use super::{Counts, play};

const SECOND: u64 = 1_000_000;
const DAY: u64 = 86_400;

fn one(seed: u64, trace: bool) -> Counts {
    let mut random = Rng::with_seed(seed);
    let mut counts = Counts::new();
    let limits = Limits { per_minute: random.u32(1..12), per_day: random.u32(1..200) };
    let mut quota = Quota::default();
    // The newest second that was seen: a clock that steps back counts as standing still.
    let (mut now_us, mut newest) = (1_764_000_000 * SECOND + random.u64(..DAY * SECOND), 0);
    let mut accepted: Vec<u64> = Vec::new();
    for _ in 0..random.usize(1..400) {
        match random.u8(..40) {
            0 => now_us -= random.u64(..90 * SECOND),
            1 => now_us += random.u64(..DAY * SECOND),
            2..8 => now_us += random.u64(..61 * SECOND),
            _ => now_us += random.u64(..6 * SECOND),
        }
        if random.u8(..10) == 0 {
            quota = Quota::from_bytes(&quota.to_bytes()).unwrap();
        }
        newest = newest.max(now_us / SECOND);
        let within = |seconds: u64| accepted.iter().filter(|at| **at + seconds > newest).count() as u32;
        let day = (now_us / SECOND / DAY).max(accepted.last().copied().unwrap_or(0) / DAY);
        let today = accepted.iter().filter(|at| **at / DAY == day).count() as u32;
        let (least, most) = (within(60), within(61));
        let result = quota.charge(now_us, limits);
        if trace {
            eprintln!("{now_us} {least} {most} {today} {limits:?} {result:?}");
        }
        match result {
            Ok(()) => {
                assert!(least < limits.per_minute && today < limits.per_day, "over the limit");
                accepted.push(newest);
                *counts.entry("accepted").or_default() += 1;
            }
            Err(refusal) => {
                let reached =
                    if refusal.limit == Limit::Day { today >= limits.per_day } else { most >= limits.per_minute };
                assert!(reached, "refused too early: {refusal:?}");
                let later = |seconds: u64| quota.clone().charge(now_us + seconds * SECOND, limits);
                // With both used up, the day's may be the one that frees first.
                let both = today >= limits.per_day && most >= limits.per_minute;
                assert!(both || later(refusal.retry_after).is_ok(), "told to come back too early");
                assert!(later(refusal.retry_after.saturating_sub(1)).is_err(), "told to come back too late");
                let kind = if refusal.limit == Limit::Day { "refused for the day" } else { "refused for the minute" };
                *counts.entry(kind).or_default() += 1;
            }
        }
    }
    counts
}

#[test]
fn no_window_holds_more_than_the_limit_and_every_hint_is_right() {
    let Some(counts) = play(one) else { return };
    assert_eq!(counts.len(), 3, "{counts:?}");
}
