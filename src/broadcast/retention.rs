//! What is kept for devices that log in later: the newest 100 of an app, each until its own time.

use std::collections::BTreeMap;

use super::BroadcastId;

/// How many retained broadcasts an app has at the most.
pub const MAX_RETAINED: usize = 100;

/// Retained entries by id; `T` is what is kept of each.
#[derive(Debug, Clone)]
pub struct Retained<T> {
    entries: BTreeMap<BroadcastId, (u64, T)>,
}

impl<T> Default for Retained<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new() }
    }
}

impl<T> Retained<T> {
    /// Keeps an entry until `expires_ms` and lets go of what that pushes beyond the newest [`MAX_RETAINED`], expired ones
    /// first.
    pub fn insert(&mut self, id: BroadcastId, expires_ms: u64, value: T, now_ms: u64) {
        self.prune(now_ms);
        if expires_ms > now_ms {
            self.entries.insert(id, (expires_ms, value));
        }
        while self.entries.len() > MAX_RETAINED {
            self.entries.pop_first();
        }
    }

    /// Lets go of what has expired at `now_ms`.
    pub fn prune(&mut self, now_ms: u64) {
        self.entries.retain(|_, (expires_ms, _)| *expires_ms > now_ms);
    }

    /// Takes one out; `None` if it is not there.
    pub fn remove(&mut self, id: BroadcastId) -> Option<T> {
        self.entries.remove(&id).map(|(_, value)| value)
    }

    /// The valid entries after `since`, oldest first.
    pub fn after(&self, since: BroadcastId, now_ms: u64) -> impl Iterator<Item = (BroadcastId, &T)> {
        self.entries
            .range(since.saturating_add(1)..)
            .filter(move |(_, (expires_ms, _))| *expires_ms > now_ms)
            .map(|(id, (_, value))| (*id, value))
    }

    /// How many are kept, expired ones not yet pruned included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_newest_hundred_valid_ones_are_kept(ttls in proptest::collection::vec(1u64..1000, 1..300)) {
            let mut retained = Retained::default();
            let mut model: Vec<(u64, u64)> = Vec::new();
            for (step, ttl) in ttls.iter().enumerate() {
                let now = step as u64 * 3;
                let id = step as u64 + 1;
                retained.insert(id, now + ttl, (), now);
                model.push((id, now + ttl));
                model.retain(|(_, expires)| *expires > now);
                if model.len() > MAX_RETAINED { model.remove(0); }
                let ids: Vec<u64> = retained.after(0, now).map(|(id, ())| id).collect();
                let expected: Vec<u64> = model.iter().map(|(id, _)| *id).collect();
                prop_assert_eq!(ids, expected);
            }
        }
    }
}
