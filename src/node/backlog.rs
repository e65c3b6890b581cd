//! What an app retains, in one piece: a device that logs in is given all of it after its cursor, so that the same pages serve
//! every login. Pure, but for those.

use std::sync::Arc;

use super::entry::Entry;
use super::pages::{Pages, Span};
use crate::broadcast::BroadcastId;
use crate::broadcast::platform::{Platform, Platforms};

/// The most bytes that are put in one piece, for each app and shard; a larger backlog goes out frame by frame.
const MAX_BYTES: usize = 256 * 1024;

/// The frames of the retained entries, ids ascending.
#[derive(Debug, Clone)]
pub struct Backlog {
    entries: Vec<Arc<Entry>>,
    /// Their ids, side by side: a search need not go to each entry.
    ids: Vec<BroadcastId>,
    /// Where each entry's frame ends in `frames`; shorter than `entries` if that would be more than [`MAX_BYTES`].
    ends: Vec<usize>,
    frames: Arc<Pages>,
    /// The platforms that all of them are for.
    targets: Platforms,
    /// When the first of them expires.
    expires_ms: u64,
}

/// Some of them, adjacent.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    entries: &'a [Arc<Entry>],
    ends: &'a [usize],
    start: usize,
    span: Span<'a>,
}

impl Backlog {
    /// Of these entries, ids ascending.
    #[must_use]
    pub fn new<'a>(entries: impl Iterator<Item = &'a Arc<Entry>>) -> Self {
        let entries: Vec<Arc<Entry>> = entries.cloned().collect();
        let size: usize = entries.iter().map(|entry| entry.frame.len()).sum();
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        if size <= MAX_BYTES {
            bytes.reserve_exact(size);
            for entry in &entries {
                bytes.extend_from_slice(&entry.frame);
                ends.push(bytes.len());
            }
        }
        let targets = entries.iter().fold(Platforms::ALL, |all, entry| all.and(entry.targets));
        let expires_ms = entries.iter().map(|entry| entry.expires_ms).min().unwrap_or(u64::MAX);
        let ids = entries.iter().map(|entry| entry.id).collect();
        Self { entries, ids, ends, frames: Arc::new(Pages::new(bytes)), targets, expires_ms }
    }

    /// Whether something in it must no longer be delivered.
    #[must_use]
    pub const fn has_expired(&self, now_ms: u64) -> bool {
        self.expires_ms <= now_ms
    }

    /// Those after `cursor` up to `login_head`, if all of them are for the device, and it saves anything.
    #[must_use]
    pub fn run(
        &self,
        cursor: BroadcastId,
        login_head: BroadcastId,
        platform: Platform,
        now_ms: u64,
    ) -> Option<Run<'_>> {
        if self.ends.len() != self.entries.len() || self.has_expired(now_ms) || !self.targets.contains(platform) {
            return None;
        }
        let from = self.ids.partition_point(|id| *id <= cursor);
        let to = self.ids.partition_point(|id| *id <= login_head).max(from);
        let end = |count: usize| count.checked_sub(1).and_then(|last| self.ends.get(last)).copied().unwrap_or(0);
        let start = end(from);
        if self.frames.is_dear(end(to) - start) {
            return None;
        }
        Some(Run {
            entries: self.entries.get(from..to)?,
            ends: self.ends.get(from..to)?,
            start,
            span: self.frames.span(start, end(to))?,
        })
    }
}

impl<'a> Run<'a> {
    /// How many they are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Their frames, one after the other.
    #[must_use]
    pub const fn span(&self) -> Span<'a> {
        self.span
    }

    /// Those that are whole in the first `sent` bytes, the others, and how many bytes of the first of these went out.
    #[must_use]
    pub fn split(&self, sent: usize) -> (&'a [Arc<Entry>], &'a [Arc<Entry>], usize) {
        let whole = self.ends.partition_point(|end| end - self.start <= sent);
        let done = whole.checked_sub(1).and_then(|last| self.ends.get(last)).map_or(0, |end| end - self.start);
        let (whole, rest) = self.entries.split_at(whole);
        (whole, rest, sent - done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broadcast::envelope;
    use crate::node::entry::tests::broadcast;

    fn backlog(ids: &[u64]) -> Backlog {
        let entries: Vec<_> = ids.iter().map(|id| broadcast(*id, 0, 1, 100 + *id)).collect();
        Backlog::new(entries.iter())
    }

    #[test]
    fn a_run_is_the_frames_between_cursor_and_login() {
        let backlog = backlog(&[10, 20, 30, 40]);
        for (cursor, head, expected) in [
            (0, 40, &[10, 20, 30, 40][..]),
            (10, 40, &[20, 30, 40]),
            (15, 35, &[20, 30]),
            (40, 40, &[]),
            (50, 50, &[]),
            (0, 5, &[]),
        ] {
            let run = backlog.run(cursor, head, Platform::Web, 50).unwrap();
            let frames: Vec<u8> = run.entries.iter().flat_map(|entry| entry.frame.iter().copied()).collect();
            assert_eq!(run.entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), expected);
            assert_eq!(
                (&*run.span().bytes().unwrap(), run.len(), run.is_empty()),
                (&*frames, expected.len(), expected.is_empty())
            );
        }
    }

    #[test]
    fn what_was_sent_is_known_wherever_it_is_cut() {
        let backlog = backlog(&[10, 20, 30, 40]);
        let run = backlog.run(10, 40, Platform::Web, 50).unwrap();
        for sent in 0..=run.span().len() {
            let (whole, rest, part) = run.split(sent);
            let size: usize = whole.iter().map(|entry| entry.frame.len()).sum();
            assert_eq!(size + part, sent);
            assert!(rest.first().map_or(part == 0, |begun| part < begun.frame.len()));
            let order: Vec<u64> = whole.iter().chain(rest).map(|entry| entry.id).collect();
            assert_eq!(order, [20, 30, 40]);
        }
    }

    #[test]
    fn there_is_none_where_it_would_hold_what_is_not_for_the_device() {
        let some = backlog(&[10, 20]);
        assert!(some.run(0, 40, Platform::Web, 109).is_some());
        assert!(some.has_expired(110) && some.run(0, 40, Platform::Web, 110).is_none(), "expired");
        let for_web = r#""requestId":"r","body":"b","targetOs":["web"]}"#;
        let raw: Arc<[u8]> = envelope::broadcast(30, 20, 1, 100, for_web).into_bytes().into();
        let for_web = Arc::new(Entry::new(envelope::Envelope::read(&raw).unwrap(), &raw, 1));
        let mixed = Backlog::new([&broadcast(10, 0, 1, 100), &for_web].into_iter());
        assert_eq!(mixed.run(0, 40, Platform::Web, 50).map(|run| run.len()), Some(2));
        assert!(mixed.run(0, 40, Platform::Ios, 50).is_none(), "one of them is for others");
        let entry = broadcast(1, 0, 1, 100);
        let many = MAX_BYTES / entry.frame.len();
        assert!(Backlog::new(std::iter::repeat_n(&entry, many)).run(0, 40, Platform::Web, 50).is_some());
        assert!(
            Backlog::new(std::iter::repeat_n(&entry, many + 1)).run(0, 40, Platform::Web, 50).is_none(),
            "too much"
        );
        assert!(Backlog::new(std::iter::empty()).run(0, 40, Platform::Web, 50).unwrap().is_empty());
    }
}
