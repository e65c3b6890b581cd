//! The pure core: what a broadcast is and the rules it obeys.
//!
//! Nothing here does I/O, reads a clock or knows of AMQP, Redis or WebSockets: `now` is always an argument. The rules are
//! written twice, here (the embedded ledger and the node's timeline run them) and in the ledger's Lua scripts; a
//! differential test holds the two together.

pub mod app;
pub mod envelope;
pub mod platform;
pub mod quota;
pub mod request;
pub mod retention;
pub mod verdict;

/// A broadcast's id within its app: an increasing integer, derived from the time in microseconds, never reused and below
/// 2^53, so that it is exact as a JavaScript number. `0` stands for "none yet".
pub type BroadcastId = u64;

/// The largest id that a double represents exactly (2^53 − 1).
pub const MAX_ID: BroadcastId = (1 << 53) - 1;

/// How far ids jump ahead when the ledger's generation changes (a failover, or lost data): one minute, in microseconds.
/// Ids that the lost history may have used lie below it.
pub const GENERATION_JUMP: u64 = 60_000_000;

/// The next id of an app: above `head`, and not below the time, or a minute ahead of it when the `generation_changed`.
///
/// `now_us`: the ledger's clock, microseconds since the Unix epoch.
#[must_use]
pub fn next_id(head: BroadcastId, now_us: u64, generation_changed: bool) -> BroadcastId {
    // The jump counts from now, not from the head: two losses in a row must not lead to the same id twice.
    let now_us = if generation_changed { now_us + GENERATION_JUMP } else { now_us };
    now_us.max(head + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_lost_twice_in_a_row_is_not_used_again() {
        let now = 1_764_000_000_000_000;
        let kept = next_id(0, now, true);
        // Two generations later the head is the same, because what came in between was lost.
        let lost = next_id(kept, now + 1_000_000, true);
        let last_lost = lost + 1000;
        assert!(next_id(kept, now + 4_000_000, true) > last_lost);
    }

    proptest! {
        #[test]
        fn ids_increase_whatever_the_clock_does(head in 0u64..(1 << 52), now in 0u64..(1 << 52), jump: bool) {
            let id = next_id(head, now, jump);
            prop_assert!(id > head);
            prop_assert!(id >= now);
        }
    }
}
