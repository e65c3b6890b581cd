//! An app's timeline: what the node knows of its broadcasts. Pure: `now` is an argument.
//!
//! The presence task merges what it receives into one; each shard has a copy of its own (of pointers), so that delivering
//! takes no lock.

use std::collections::VecDeque;
use std::sync::Arc;

use super::backlog::{Backlog, Run};
use super::entry::Entry;
use crate::broadcast::BroadcastId;
use crate::broadcast::platform::Platform;
use crate::broadcast::retention::{MAX_RETAINED, Retained};

/// How much of the latest is kept for devices that fall behind or come back. Both limits hold; the newest entry always stays.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Entries.
    pub frames: usize,
    /// Bytes of frames.
    pub bytes: usize,
}

impl Bounds {
    /// Splits `entries` into portions within these bounds, of at least one entry each.
    pub fn split<'a>(&self, mut entries: &'a [Arc<Entry>]) -> impl Iterator<Item = &'a [Arc<Entry>]> + use<'a> {
        let Self { frames, bytes } = *self;
        std::iter::from_fn(move || {
            let mut size = 0;
            let fits = |entry: &&Arc<Entry>| {
                size += entry.frame.len();
                size <= bytes
            };
            let count = entries.iter().take(frames).take_while(fits).count().max(1).min(entries.len());
            let (portion, rest) = entries.split_at(count);
            entries = rest;
            (!portion.is_empty()).then_some(portion)
        })
    }
}

/// The timeline of one app.
#[derive(Debug, Clone)]
pub struct Timeline {
    bounds: Bounds,
    /// The newest id that is known.
    last: BroadcastId,
    /// The newest id that has left `recent`: who is behind it has missed something.
    trimmed: BroadcastId,
    /// The latest entries, ids ascending; recalled ones are taken out.
    recent: VecDeque<Arc<Entry>>,
    recent_bytes: usize,
    retained: Retained<Arc<Entry>>,
    /// The retained ones in one piece, once a login has asked for that; of this very state.
    backlog: Option<Backlog>,
}

/// How an envelope lies to what is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It had been seen.
    Known,
    /// Something before it is missing.
    Gap,
    /// It is the next.
    Next,
}

/// What reading the log has brought.
#[derive(Debug, Default)]
pub struct Backfill {
    /// The entries that were missing, ids ascending. They are in the timeline now.
    pub added: Vec<Arc<Entry>>,
    /// At least so many are gone for good.
    pub lost: u64,
    /// Whether the timeline also changed otherwise, so that its copies must be replaced.
    pub replaced: bool,
}

/// Where a device is in the timeline, and what of it is for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader {
    /// It has had, or is not to have, everything up to this id.
    pub cursor: BroadcastId,
    /// What came after this id is live for it. Of what came before it gets what is retained, and …
    pub login_head: BroadcastId,
    /// … if it came back soon enough, everything from this id on; else [`BroadcastId::MAX`].
    pub resume_from: BroadcastId,
    /// Its platform.
    pub platform: Platform,
}

impl Timeline {
    /// A timeline that starts at `last`, empty.
    #[must_use]
    pub fn new(bounds: Bounds, last: BroadcastId) -> Self {
        let (recent, retained) = (VecDeque::new(), Retained::default());
        Self { bounds, last, trimmed: last, recent, recent_bytes: 0, retained, backlog: None }
    }

    /// The timeline as a ledger's snapshot has it. `log` and `retained`: ids ascending.
    #[must_use]
    pub fn open(
        bounds: Bounds,
        head: BroadcastId,
        log: Vec<Arc<Entry>>,
        retained: Vec<Arc<Entry>>,
        now_ms: u64,
    ) -> Self {
        let start = log.first().map_or(head, |first| first.prev);
        let mut timeline = Self::new(bounds, start);
        for entry in log {
            timeline.append(entry, now_ms);
        }
        // The snapshot's own list is the truth: what the log still shows may have been deleted or pushed out since.
        timeline.retained = Retained::default();
        timeline.backlog = None;
        for entry in retained {
            timeline.retained.insert(entry.id, entry.expires_ms, entry, now_ms);
        }
        timeline.last = timeline.last.max(head);
        timeline
    }

    /// The newest id that is known.
    #[must_use]
    pub const fn last(&self) -> BroadcastId {
        self.last
    }

    /// Whether an envelope of this `id` and `prev` can be appended.
    #[must_use]
    pub const fn fit(&self, id: BroadcastId, prev: BroadcastId) -> Fit {
        if id <= self.last {
            Fit::Known
        } else if prev > self.last {
            Fit::Gap
        } else {
            Fit::Next
        }
    }

    /// Whether a known envelope is a retained one that is not held here: another node has written it back.
    #[must_use]
    pub fn lacks(&self, id: BroadcastId, expires_ms: u64, now_ms: u64) -> bool {
        let mut from = self.retained.after(id.saturating_sub(1), now_ms).map(|(held, _)| held);
        id <= self.last
            && expires_ms > now_ms
            && from.next() != Some(id)
            && from.count() + 1 < MAX_RETAINED
            && !self.recalled().contains(&id)
    }

    /// Appends an entry whose id is above [`Timeline::last`]; one that is not changes nothing.
    pub fn append(&mut self, entry: Arc<Entry>, now_ms: u64) {
        if entry.id <= self.last {
            return;
        }
        self.last = entry.id;
        if let Some(target) = entry.recalls {
            self.backlog = None;
            self.retained.remove(target);
            if let Ok(at) = self.recent.binary_search_by_key(&target, |entry| entry.id)
                && let Some(recalled) = self.recent.remove(at)
            {
                self.recent_bytes -= recalled.frame.len();
            }
        } else if entry.expires_ms != 0 {
            self.backlog = None;
            self.retained.insert(entry.id, entry.expires_ms, entry.clone(), now_ms);
        }
        self.recent_bytes += entry.frame.len();
        self.recent.push_back(entry);
        while self.recent.len() > self.bounds.frames.max(1)
            || (self.recent_bytes > self.bounds.bytes && self.recent.len() > 1)
        {
            if let Some(oldest) = self.recent.pop_front() {
                self.recent_bytes -= oldest.frame.len();
                self.trimmed = oldest.id;
            }
        }
    }

    /// Takes in what the ledger has after [`Timeline::last`], as far as it still has it.
    ///
    /// `log`, `retained`: ids ascending, possibly known in part. `complete`: the ledger has lost nothing since the last time,
    /// so that what it does not retain any more was deleted.
    pub fn backfill(
        &mut self,
        log: Vec<Arc<Entry>>,
        retained: Vec<Arc<Entry>>,
        head: BroadcastId,
        complete: bool,
        now_ms: u64,
    ) -> Backfill {
        let mut result = Backfill::default();
        self.backlog = None;
        let last = self.last;
        let valid: Vec<BroadcastId> = retained.iter().map(|entry| entry.id).collect();
        let (older, newer): (Vec<_>, Vec<_>) = retained.into_iter().partition(|entry| entry.id <= last);
        let mut missing: Vec<Arc<Entry>> = log.into_iter().chain(newer).filter(|entry| entry.id > last).collect();
        missing.sort_by_key(|entry| entry.id);
        missing.dedup_by_key(|entry| entry.id);
        // A deleted broadcast is gone from the log, but not lost.
        let deleted: Vec<BroadcastId> = missing.iter().filter_map(|entry| entry.recalls).collect();
        for entry in missing {
            if self.fit(entry.id, entry.prev) == Fit::Gap && !deleted.contains(&entry.prev) {
                result.lost += 1;
            }
            self.append(entry.clone(), now_ms);
            result.added.push(entry);
        }
        if head > self.last {
            result.lost += 1;
            self.last = head;
            result.replaced = true;
        }
        let recalled = self.recalled();
        let held: Vec<BroadcastId> = self.retained.after(0, now_ms).map(|(id, _)| id).collect();
        // What the ledger retains no more was deleted, by a recall that is gone from the log.
        if complete {
            for id in held.iter().filter(|id| **id <= head && valid.binary_search(id).is_err()) {
                if self.retained.remove(*id).is_some() {
                    result.replaced = true;
                    result.lost = result.lost.max(1);
                }
            }
        }
        // Another node may have written back what this one never had.
        for entry in older {
            if held.binary_search(&entry.id).is_err() && !recalled.contains(&entry.id) && !entry.expired(now_ms) {
                self.retained.insert(entry.id, entry.expires_ms, entry, now_ms);
                result.replaced = true;
            }
        }
        result
    }

    /// What a device gets that logs in with the cursor `since`, and how many broadcasts of it come from before now.
    ///
    /// `resume_ms`: how long a device may have been away and still count as online.
    #[must_use]
    pub fn admit(&self, since: BroadcastId, platform: Platform, now_ms: u64, resume_ms: u64) -> (Reader, usize) {
        let oldest_ms = now_ms.saturating_sub(resume_ms);
        // What it has had needs no looking at, and a new device resumes nothing.
        let start = if since > 0 { self.recent_after(since) } else { self.recent.len() };
        let resumed = self.recent.range(start..).find(|entry| entry.time_ms > oldest_ms);
        let resume_from = resumed.map_or(BroadcastId::MAX, |entry| entry.id);
        // A cursor beyond the head is kept: it comes from a history that the ledger has lost, whose ids are not used again.
        let reader = Reader { cursor: since, login_head: self.last.max(since), resume_from, platform };
        let pending = match self.run(reader, now_ms) {
            Some(run) => run.len(),
            None => self.after(reader, now_ms).filter(|entry| entry.recalls.is_none()).count(),
        };
        (reader, pending)
    }

    /// Puts what is retained in one piece, unless it is, or whoever logs in there is not to be served from it.
    pub fn join_backlog(&mut self, reader: Reader, now_ms: u64) {
        let is_of_use =
            reader.resume_from > reader.login_head && self.retained.after(reader.cursor, now_ms).next().is_some();
        if is_of_use && self.backlog.as_ref().is_none_or(|backlog| backlog.has_expired(now_ms)) {
            self.backlog = Some(Backlog::new(self.retained(now_ms)));
        }
    }

    /// What of the retained ones is next for the device, in one piece; `None` if it is not to be had so: nothing was put
    /// together, something in it is not for the device, or it resumes, so that others come in between.
    #[must_use]
    pub fn run(&self, reader: Reader, now_ms: u64) -> Option<Run<'_>> {
        let backlog = self.backlog.as_ref().filter(|_| reader.resume_from > reader.login_head)?;
        backlog.run(reader.cursor, reader.login_head, reader.platform, now_ms)
    }

    /// The place in `recent` of the first one after `cursor`.
    fn recent_after(&self, cursor: BroadcastId) -> usize {
        self.recent.partition_point(|entry| entry.id <= cursor)
    }

    /// Whether a device that comes back soon enough was away for more than is kept, so that it does not get everything that was
    /// for online devices. By the ids, which are microseconds: too often rather than too seldom.
    #[must_use]
    pub const fn resumes_short(&self, since: BroadcastId, now_ms: u64, resume_ms: u64) -> bool {
        since > 0 && since < self.trimmed && self.trimmed / 1000 > now_ms.saturating_sub(resume_ms)
    }

    /// What the device is still to be sent, ids ascending: never an expired or recalled one.
    pub fn after(&self, reader: Reader, now_ms: u64) -> impl Iterator<Item = &Arc<Entry>> {
        let Reader { cursor, login_head, resume_from, platform } = reader;
        let mut kept = self
            .retained
            .after(cursor, now_ms)
            .map(|(_, entry)| entry)
            .take_while(move |entry| entry.id <= login_head)
            .peekable();
        let mut recent = self
            .recent
            .range(self.recent_after(cursor)..)
            .filter(move |entry| entry.id > login_head || entry.id >= resume_from)
            .peekable();
        std::iter::from_fn(move || match (kept.peek(), recent.peek()) {
            (Some(a), Some(b)) if a.id == b.id => {
                kept.next();
                recent.next()
            }
            (Some(a), Some(b)) if a.id < b.id => kept.next(),
            (Some(_), None) => kept.next(),
            _ => recent.next(),
        })
        .filter(move |entry| entry.targets.contains(platform) && !entry.expired(now_ms))
    }

    /// Whether the device is further behind than what is kept.
    #[must_use]
    pub fn has_left_behind(&self, reader: Reader) -> bool {
        // One that resumes is to get the latest from `resume_from` on; others only what came after their login.
        let live_after = reader.login_head.min(reader.resume_from.saturating_sub(1));
        reader.cursor.max(live_after) < self.trimmed
    }

    /// The valid retained entries, oldest first.
    pub fn retained(&self, now_ms: u64) -> impl Iterator<Item = &Arc<Entry>> {
        self.retained.after(0, now_ms).map(|(_, entry)| entry)
    }

    /// What was deleted lately.
    #[must_use]
    pub fn recalled(&self) -> Vec<BroadcastId> {
        self.recent.iter().filter_map(|entry| entry.recalls).collect()
    }
}

#[cfg(test)]
mod tests;
