//! The ids alone: heads that are lost, generations that change, clocks of other machines.

use broadcastd::broadcast::{GENERATION_JUMP, next_id};
use fastrand::Rng;

use super::{Counts, play};

fn one(seed: u64, trace: bool) -> Counts {
    let mut random = Rng::with_seed(seed);
    let mut counts = Counts::new();
    let mut now_us = 1_764_000_000_000_000;
    let (mut head, mut newest, mut is_another, mut last_change) = (0, 0, true, now_us);
    // What a crash may bring back.
    let mut heads = vec![0];
    for _ in 0..random.usize(1..200) {
        match random.u8(..10) {
            0 => {
                // Another machine, whose clock is behind by less than the jump, and whose data too. Two of them in a row are
                // told apart by the time that the first one lived.
                now_us += random.u64(1_000_000..3_000_000);
                if now_us > last_change + 2 * GENERATION_JUMP {
                    now_us -= random.u64(..GENERATION_JUMP / 2);
                    *counts.entry("behind").or_default() += 1;
                }
                head = heads[heads.len().saturating_sub(random.usize(1..5))];
                is_another = true;
                last_change = now_us;
                *counts.entry("lost").or_default() += 1;
            }
            1 => now_us += random.u64(..100_000_000),
            _ => now_us += random.u64(1..1000),
        }
        let id = next_id(head, now_us, is_another);
        if trace {
            eprintln!("{now_us} {head} {is_another}: {id}");
        }
        assert!(id > head && id > newest, "{id} was used, or may have been: {newest}");
        (head, newest, is_another) = (id, id, false);
        heads.push(head);
        *counts.entry("given").or_default() += 1;
    }
    counts
}

#[test]
fn no_id_is_given_twice_whatever_is_lost() {
    let Some(counts) = play(one) else { return };
    assert_eq!(counts.len(), 3, "{counts:?}");
}
