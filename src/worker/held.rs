//! Requests that the ledger was asked about and has not decided: it is away, or the slot of their app moves. They are held,
//! unacknowledged and bounded by the prefetch, and tried again together, apart from what is fresh, so that no app waits for
//! another's slot. Handing them back would only burn their delivery limit.

use std::collections::VecDeque;
use std::time::Duration;

use super::intake::Item;
use crate::backoff::Backoff;
use crate::broadcast::request::Submission;

/// All that a session holds for this reason. The gauge stays right, also when the session ends in the middle.
pub(super) struct Held<'a, T = (Item, Submission)> {
    gauge: &'a prometheus::IntGauge,
    waiting: VecDeque<(T, bool)>,
    /// So many of them are still to be tried before the next pause.
    left: usize,
    /// Those that are being tried.
    under_way: usize,
    backoff: Backoff,
    counted: i64,
}

/// What to ask the ledger about next.
pub(super) struct Again<T = (Item, Submission)> {
    pub(super) requests: Vec<T>,
    /// It is a single suspect.
    pub(super) alone: bool,
    /// After this long.
    pub(super) delay: Duration,
}

impl<'a, T> Held<'a, T> {
    pub(super) const fn new(gauge: &'a prometheus::IntGauge) -> Self {
        let backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        Self { gauge, waiting: VecDeque::new(), left: 0, under_way: 0, backoff, counted: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.under_way == 0
    }

    /// Holds what could not be decided. `alone`: a suspect, which is tried by itself.
    pub(super) fn hold(&mut self, requests: Vec<T>, alone: bool) {
        self.waiting.extend(requests.into_iter().map(|request| (request, alone)));
        self.count();
    }

    /// The next to try, at most `batch`, if none is under way: round after round, with a pause before each.
    pub(super) fn again(&mut self, batch: usize) -> Option<Again<T>> {
        if self.under_way > 0 || self.waiting.is_empty() {
            return None;
        }
        let mut delay = Duration::ZERO;
        if self.left == 0 {
            self.left = self.waiting.len();
            delay = self.backoff.next_delay();
        }
        let alone = self.waiting.front().is_some_and(|(_, alone)| *alone);
        let together = self.waiting.iter().take(self.left).take_while(|(_, is_alone)| !*is_alone).count();
        let size = if alone { 1 } else { together.min(batch) };
        self.left -= size;
        self.under_way = size;
        let requests = self.waiting.drain(..size).map(|(request, _)| request).collect();
        Some(Again { requests, alone, delay })
    }

    /// Those under way were tried, and these could not be decided.
    pub(super) fn tried(&mut self, open: Vec<T>, alone: bool) {
        if open.len() < self.under_way {
            self.backoff.reset();
        }
        self.under_way = 0;
        self.hold(open, alone);
    }

    /// Lets go of all that waits; returns how many.
    pub(super) fn give_back(&mut self) -> usize {
        let count = self.waiting.len();
        self.waiting.clear();
        self.left = 0;
        self.count();
        count
    }

    fn count(&mut self) {
        let count = i64::try_from(self.waiting.len() + self.under_way).unwrap_or(i64::MAX);
        self.gauge.add(count - self.counted);
        self.counted = count;
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.gauge.sub(self.counted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_tried_once_between_two_pauses_and_a_suspect_by_itself() {
        let gauge = prometheus::IntGauge::new("held", "held").unwrap();
        let mut held = Held::new(&gauge);
        held.hold((0..5).collect(), false);
        held.hold(vec![100], true);
        held.hold((5..8).collect(), false);
        for round in 0..3 {
            let mut tried: Vec<i32> = Vec::new();
            for calls in 0.. {
                let again = held.again(4).unwrap();
                assert!(held.again(4).is_none(), "one at a time");
                assert_eq!(gauge.get(), 9);
                assert_eq!(again.delay > Duration::ZERO, calls == 0, "a pause before a round");
                assert_eq!(again.alone, again.requests == [100]);
                assert!(again.requests.len() <= 4);
                tried.extend(&again.requests);
                held.tried(again.requests, again.alone);
                if tried.len() == 9 {
                    break;
                }
            }
            tried.sort_unstable();
            assert_eq!(tried, [0, 1, 2, 3, 4, 5, 6, 7, 100], "round {round}");
        }
        let again = held.again(4).unwrap();
        assert!(again.delay >= Duration::from_millis(200), "longer each time: {:?}", again.delay);
        held.tried(Vec::new(), false);
        assert_eq!(held.give_back() + again.requests.len(), 9);
        assert!(held.is_empty() && gauge.get() == 0);
        held.hold(vec![1], false);
        assert!(held.again(4).unwrap().delay <= Duration::from_millis(50), "something was decided in between");
        drop(held);
        assert_eq!(gauge.get(), 0);
    }
}
