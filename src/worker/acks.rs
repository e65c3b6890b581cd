//! Which acknowledgement to send when: one frame for a run of settled deliveries, single ones for those out of order.

use std::collections::BTreeSet;

use lapin::types::DeliveryTag;

/// Tracks one channel's deliveries, whose tags count up from 1. Pure.
#[derive(Debug, Default)]
pub(super) struct AckWindow {
    /// Every tag up to here is settled.
    settled_to: DeliveryTag,
    /// Settled one by one, above it.
    settled_above: BTreeSet<DeliveryTag>,
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
        self.settled_above.insert(tag);
    }

    /// How many are settled past one that is not.
    pub(super) fn out_of_order(&self) -> usize {
        self.settled_above.len()
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
            } else if !self.settled_above.remove(&next) {
                break;
            }
            self.settled_to = next;
        }
        acks.single = ready.iter().copied().collect();
        self.settled_above.append(&mut ready);
        acks
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
