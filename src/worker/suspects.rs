//! Requests that were delivered again and again. One of them may be what kills the workers, and each crash raises the count of
//! everything that the worker held, so that its neighbours would be dead-lettered together with it.
//!
//! So they wait until what is fresh is done, and are then decided one at a time, each acknowledged before the next. In random
//! order: in the queue's the culprit could always come first, and nobody behind it would ever get anywhere. Every crash then
//! halves, on average, the neighbours that are left.

use lapin::protocol::basic::AMQPProperties;
use lapin::types::AMQPValue;

/// The header of quorum queues: how often a message came back unsettled.
const RETURNS: &str = "x-delivery-count";
/// Newer brokers write this one, too, and leave the other out while it is 0.
const HANDED_OUT: &str = "x-acquired-count";

/// Whether a delivery is one of these: it came back unsettled at least a fifth of `delivery_limit` times, five at the most.
/// (The rest of the limit is for the halving.) Where the broker does not count (classic queues), any that came back is.
pub(super) fn is_suspect(properties: &AMQPProperties, redelivered: bool, delivery_limit: u32) -> bool {
    if !redelivered {
        return false;
    }
    let headers = properties.headers().as_ref().map(lapin::types::FieldTable::inner);
    let header = |name: &str| headers.and_then(|headers| headers.get(name));
    match header(RETURNS).map(count) {
        Some(returns) => returns >= threshold(delivery_limit),
        None => header(HANDED_OUT).is_none(),
    }
}

fn threshold(delivery_limit: u32) -> u32 {
    (delivery_limit / 5).clamp(1, 5)
}

/// What is no number counts as never.
fn count(value: &AMQPValue) -> u32 {
    let number = match *value {
        AMQPValue::ShortShortInt(number) => number.into(),
        AMQPValue::ShortShortUInt(number) => number.into(),
        AMQPValue::ShortInt(number) => number.into(),
        AMQPValue::ShortUInt(number) => number.into(),
        AMQPValue::LongInt(number) => number.into(),
        AMQPValue::LongUInt(number) => number.into(),
        AMQPValue::LongLongInt(number) => number,
        _ => 0,
    };
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}

/// Those that wait for their turn, bounded by the prefetch.
#[derive(Debug)]
pub(super) struct Suspects<T> {
    waiting: Vec<T>,
}

impl<T> Default for Suspects<T> {
    fn default() -> Self {
        Self { waiting: Vec::new() }
    }
}

impl<T> Suspects<T> {
    /// Sets one aside.
    pub(super) fn set_aside(&mut self, suspect: T) {
        self.waiting.push(suspect);
    }

    /// One of them, each as likely as the other.
    pub(super) fn take(&mut self, random: &mut fastrand::Rng) -> Option<T> {
        if self.waiting.is_empty() {
            return None;
        }
        let chosen = random.usize(..self.waiting.len());
        Some(self.waiting.swap_remove(chosen))
    }

    /// Forgets them all.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::BasicProperties;
    use lapin::types::FieldTable;

    fn with(name: &str, value: AMQPValue) -> AMQPProperties {
        let mut headers = FieldTable::default();
        headers.insert(name.into(), value);
        BasicProperties::default().with_headers(headers)
    }

    #[test]
    fn who_came_back_more_than_a_few_times_is_one() {
        let returned = |count| with(RETURNS, AMQPValue::LongLongInt(count));
        for (limit, first) in [(1, 1), (4, 1), (10, 2), (25, 5), (50, 5), (1000, 5)] {
            assert!(!is_suspect(&returned(first - 1), true, limit), "{limit}");
            assert!(is_suspect(&returned(first), true, limit), "{limit}");
        }
        assert!(!is_suspect(&BasicProperties::default(), false, 50));
        assert!(!is_suspect(&returned(1000), false, 50), "a sender may write any header");
        assert!(!is_suspect(&with(RETURNS, AMQPValue::Boolean(true)), true, 50));
        assert!(is_suspect(&BasicProperties::default(), true, 50), "a classic queue does not count");
        assert!(!is_suspect(&with(HANDED_OUT, AMQPValue::LongLongInt(3)), true, 50));
    }

    /// Lives of a worker, each ended by the poison: the highest count that any of its neighbours came to.
    fn crash_loop(seed: u64, neighbours: u32, limit: u32, take: fn(&mut Vec<u32>, &mut fastrand::Rng) -> u32) -> u32 {
        const POISON: u32 = 0;
        let mut random = fastrand::Rng::with_seed(seed);
        // All of them came this far together, prefetched by workers that crashed.
        let mut returns = threshold(limit);
        // The poison has been first in the queue from the beginning.
        let mut left: Vec<u32> = (POISON..=neighbours).collect();
        let mut highest = returns;
        while returns <= limit {
            let mut suspects = left.clone();
            loop {
                let taken = take(&mut suspects, &mut random);
                if taken == POISON {
                    break;
                }
                left.retain(|suspect| *suspect != taken);
            }
            returns += 1;
            if left.len() > 1 {
                highest = returns;
            }
        }
        highest
    }

    #[test]
    fn the_neighbours_of_a_poison_are_done_long_before_the_limit() {
        for seed in 0..200 {
            let random = |waiting: &mut Vec<u32>, random: &mut fastrand::Rng| {
                let mut suspects = Suspects { waiting: std::mem::take(waiting) };
                let taken = suspects.take(random).unwrap();
                *waiting = suspects.waiting;
                taken
            };
            let highest = crash_loop(seed, 511, 50, random);
            assert!(highest <= 35, "seed {seed}: a neighbour came back {highest} times, of 50");
        }
        let in_order = |waiting: &mut Vec<u32>, _: &mut fastrand::Rng| waiting.remove(0);
        assert!(crash_loop(0, 511, 50, in_order) > 50, "in order they are all dead-lettered with it");
    }

    #[test]
    fn each_is_taken_once() {
        let mut suspects = Suspects::default();
        (0..100).for_each(|suspect| suspects.set_aside(suspect));
        let mut random = fastrand::Rng::with_seed(7);
        let mut taken: Vec<u32> = std::iter::from_fn(|| suspects.take(&mut random)).collect();
        assert!(!taken.is_sorted());
        taken.sort_unstable();
        assert_eq!(taken, (0..100).collect::<Vec<_>>());
    }
}
