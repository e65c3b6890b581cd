//! Which acknowledgement to send when: one frame for a run of settled deliveries, single ones for those out of order.

use std::collections::{BTreeMap, BTreeSet};

use lapin::types::DeliveryTag;

/// Tracks one channel's deliveries, whose tags count up from 1. Pure.
#[derive(Debug, Default)]
pub(super) struct AckWindow {
    /// Every tag up to here is settled.
    settled_to: DeliveryTag,
    /// Runs of settled ones above it, first to last: no more of them than deliveries that are held, however long these wait.
    settled_above: BTreeMap<DeliveryTag, DeliveryTag>,
}

/// What to send now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Acks {
    /// Acknowledge every outstanding delivery up to this tag.
    pub(super) up_to: Option<DeliveryTag>,
    /// Acknowledge just these.
    pub(super) single: Vec<DeliveryTag>,
}

impl AckWindow {
    /// `tag` was settled by a reject: it is not acknowledged, but the run may pass it.
    pub(super) fn rejected(&mut self, tag: DeliveryTag) {
        self.settle_above(tag);
    }

    /// How many are settled past one that is not.
    pub(super) fn out_of_order(&self) -> u64 {
        self.settled_above.iter().map(|(first, last)| last - first + 1).sum()
    }

    /// These are done, in any order; says how to acknowledge them.
    pub(super) fn done(&mut self, tags: impl IntoIterator<Item = DeliveryTag>) -> Acks {
        let mut ready: BTreeSet<DeliveryTag> = tags.into_iter().collect();
        let mut acks = Acks::default();
        loop {
            let next = self.settled_to + 1;
            if ready.remove(&next) {
                // Never a tag that was settled singly: acknowledging one twice closes the channel.
                acks.up_to = Some(next);
                self.settled_to = next;
            } else if let Some(last) = self.settled_above.remove(&next) {
                self.settled_to = last;
            } else {
                break;
            }
        }
        for tag in &ready {
            self.settle_above(*tag);
        }
        acks.single = ready.into_iter().collect();
        acks
    }

    fn settle_above(&mut self, tag: DeliveryTag) {
        let last = self.settled_above.remove(&(tag + 1)).unwrap_or(tag);
        match self.settled_above.range_mut(..tag).next_back() {
            Some((_, before)) if *before + 1 == tag => *before = last,
            _ => {
                self.settled_above.insert(tag, last);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_run_takes_one_frame() {
        let mut window = AckWindow::default();
        assert_eq!(window.done([1, 2, 3]), Acks { up_to: Some(3), single: vec![] });
        assert_eq!(window.done([6, 5]), Acks { up_to: None, single: vec![5, 6] });
        assert_eq!(window.done([4]), Acks { up_to: Some(4), single: vec![] });
        assert_eq!(window.done([7]), Acks { up_to: Some(7), single: vec![] });
    }

    #[test]
    fn one_that_waits_for_ever_costs_no_memory() {
        let mut window = AckWindow::default();
        for tag in 2..=10_000 {
            assert_eq!(window.done([tag]), Acks { up_to: None, single: vec![tag] });
        }
        assert_eq!((window.settled_above.len(), window.out_of_order()), (1, 9_999));
        assert_eq!(window.done([1]), Acks { up_to: Some(1), single: vec![] });
        assert_eq!(window.out_of_order(), 0);
    }

    proptest! {
        #[test]
        fn every_delivery_is_settled_exactly_once(
            order in Just((1u64..=60).collect::<Vec<_>>()).prop_shuffle(),
            sizes in proptest::collection::vec(1usize..8, 60),
            rejected in proptest::collection::btree_set(1u64..=60, 0..10),
        ) {
            // The broker's side: a tag may be settled once, an unknown or settled one closes the channel.
            let mut outstanding: BTreeSet<u64> = (1..=60).collect();
            let mut window = AckWindow::default();
            let mut done = BTreeSet::new();
            let mut order = order.into_iter();
            for size in sizes {
                let batch: Vec<u64> = order.by_ref().take(size).collect();
                let (rejects, acks): (Vec<u64>, Vec<u64>) = batch.into_iter().partition(|tag| rejected.contains(tag));
                for tag in rejects {
                    window.rejected(tag);
                    prop_assert!(outstanding.remove(&tag));
                    done.insert(tag);
                }
                done.extend(&acks);
                let acks = window.done(acks);
                if let Some(up_to) = acks.up_to {
                    prop_assert!(outstanding.contains(&up_to));
                    let covered: Vec<u64> = outstanding.range(..=up_to).copied().collect();
                    for tag in covered {
                        prop_assert!(done.contains(&tag), "{} was not done", tag);
                        outstanding.remove(&tag);
                    }
                }
                for tag in acks.single {
                    prop_assert!(outstanding.remove(&tag));
                }
                let expected: BTreeSet<u64> = (1..=60).filter(|tag| !done.contains(tag)).collect();
                prop_assert_eq!(&outstanding, &expected);
            }
        }
    }
}
