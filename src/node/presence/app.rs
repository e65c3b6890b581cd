//! One app's presence on this node: its timeline, and what is under way for it.

use std::sync::Arc;
use std::time::Instant;

use super::operations::Wanted;

use crate::broadcast::BroadcastId;
use crate::broadcast::app::AppKey;
use crate::broadcast::envelope::Envelope;
use crate::ledger::{Generation, Snapshot, Stored};
use crate::node::entry::Entry;
use crate::node::login::AppIndex;
use crate::node::timeline::{Backfill, Bounds, Fit, Timeline};

/// How many envelopes are held back while the ledger is read. When more arrive they are let go: the ledger is read once more.
const MAX_HELD: usize = 1024;

/// An app that the node has a lease for, or is about to.
pub struct App {
    /// Its key.
    pub key: AppKey,
    /// Tells it from an earlier opening of the same app, whose calls may still be under way.
    pub incarnation: u64,
    /// Known once it was read for the first time.
    pub timeline: Option<Timeline>,
    /// The life of the ledger that is known to have what the node has.
    pub generation: Option<Generation>,
    /// Whether the ledger is being read.
    pub is_reading: bool,
    /// Whether it must be read again after that.
    pub read_again: bool,
    /// Whether the subscription is to be made anew with the next reading.
    pub subscribe_again: bool,
    /// Whether the lost is being written back.
    pub is_restoring: bool,
    /// Whether the lease is being given up; `Some(true)`: a device came meanwhile.
    pub closing: Option<bool>,
    /// Whether it was said that the ledger holds something unreadable of it.
    pub is_corrupt: bool,
    /// Failures in a row.
    pub failures: u32,
    /// Since when it has no sessions.
    pub idle_since: Option<Instant>,
    /// How many entries the log had had when it came to [`App::last`], if the ledger counts them.
    logged: Option<u64>,
    held: Vec<(Envelope, Arc<[u8]>)>,
    /// How many of those were held when the reading began: they were stored before they were published, so the ledger has
    /// them, or has lost them.
    held_before: usize,
}

/// What an envelope changes.
pub enum Change {
    /// Nothing: it is known, or held back.
    None,
    /// There is an entry more.
    Appended(Arc<Entry>),
    /// Something before it is missing: the ledger must be read.
    Gap,
}

/// What a snapshot changes.
pub enum Update {
    /// The app is open now.
    Open,
    /// So many entries more, and the timeline must then be replaced.
    Replace(Vec<Arc<Entry>>),
    /// So many entries more.
    Append(Vec<Arc<Entry>>),
}

impl App {
    /// One of which nothing is known yet.
    pub const fn new(key: AppKey, incarnation: u64) -> Self {
        Self {
            key,
            incarnation,
            timeline: None,
            generation: None,
            is_reading: false,
            read_again: false,
            subscribe_again: false,
            is_restoring: false,
            closing: None,
            is_corrupt: false,
            failures: 0,
            idle_since: None,
            logged: None,
            held: Vec::new(),
            held_before: 0,
        }
    }

    /// For the calls to the ledger.
    pub fn wanted(&self, index: AppIndex) -> Wanted {
        Wanted { index, incarnation: self.incarnation, key: self.key.clone() }
    }

    /// The newest id that is known, 0 before it was read.
    pub fn last(&self) -> BroadcastId {
        self.timeline.as_ref().map_or(0, Timeline::last)
    }

    /// Notes that the ledger is read from now on.
    pub fn start_reading(&mut self) {
        self.is_reading = true;
        self.read_again = false;
        self.held_before = self.held.len();
    }

    /// Takes a live envelope.
    pub fn receive(&mut self, envelope: Envelope, raw: Arc<[u8]>, shards: u32, now_ms: u64) -> Change {
        let fit = self.timeline.as_ref().map(|timeline| timeline.fit(envelope.id, envelope.prev));
        match (fit, &mut self.timeline) {
            // Written back by another node: the ledger has it, and perhaps more.
            (Some(Fit::Known), Some(timeline)) if timeline.lacks(envelope.id, envelope.expires_ms, now_ms) => {
                Change::Gap
            }
            (Some(Fit::Known), _) => Change::None,
            (Some(Fit::Next), Some(timeline)) => {
                let entry = Arc::new(Entry::new(envelope, &raw, shards));
                timeline.append(entry.clone(), now_ms);
                self.logged = self.logged.map(|logged| logged + 1);
                Change::Appended(entry)
            }
            _ => {
                if self.held.len() < MAX_HELD {
                    self.held.push((envelope, raw));
                } else {
                    self.held.clear();
                    self.held_before = 0;
                    self.read_again = true;
                }
                if self.timeline.is_some() && !self.is_reading { Change::Gap } else { Change::None }
            }
        }
    }

    /// Takes what the ledger was read for, and then what was held back meanwhile.
    pub fn take(&mut self, snapshot: Snapshot, bounds: Bounds, shards: u32) -> (Update, Backfill) {
        self.is_reading = false;
        let now_ms = snapshot.now_ms;
        let entries = |stored: Vec<Stored>| -> Vec<Arc<Entry>> {
            stored.into_iter().map(|stored| Arc::new(Entry::new(stored.envelope, &stored.raw, shards))).collect()
        };
        let (mut log, retained) = (entries(snapshot.log), entries(snapshot.retained));
        if self.timeline.is_some() {
            // What the log has let go is not lost if it was held back.
            let is_missing = |(envelope, _): &&(Envelope, _)| {
                envelope.id <= snapshot.head && log.binary_search_by_key(&envelope.id, |entry| entry.id).is_err()
            };
            let missing: Vec<_> = self.held.iter().filter(is_missing).collect();
            log.extend(missing.into_iter().map(|(envelope, raw)| Arc::new(Entry::new(envelope.clone(), raw, shards))));
        }
        let is_complete = self.generation.as_ref() == Some(&snapshot.generation);
        let (mut update, mut result) = match &mut self.timeline {
            Some(timeline) => {
                let last = timeline.last();
                let mut result = timeline.backfill(log, retained, snapshot.head, is_complete, now_ms);
                if last < snapshot.head {
                    if let (Some(before), Some(now)) = (self.logged, snapshot.logged) {
                        let known = before + explained(&result.added, last);
                        result.lost = result.lost.max(now.saturating_sub(known));
                    }
                    self.logged = snapshot.logged;
                }
                let added = std::mem::take(&mut result.added);
                (if result.replaced { Update::Replace(added) } else { Update::Append(added) }, result)
            }
            none => {
                *none = Some(Timeline::open(bounds, snapshot.head, log, retained, now_ms));
                self.generation = Some(snapshot.generation);
                self.logged = snapshot.logged;
                (Update::Open, Backfill::default())
            }
        };
        let certain = std::mem::take(&mut self.held_before);
        let mut held: Vec<_> = std::mem::take(&mut self.held).into_iter().enumerate().collect();
        held.sort_by_key(|(_, (envelope, _))| envelope.id);
        for (place, (envelope, raw)) in held {
            let is_gap =
                self.timeline.as_ref().map(|timeline| timeline.fit(envelope.id, envelope.prev)) == Some(Fit::Gap);
            if is_gap && place < certain {
                // The ledger was read and has not what comes before it: reading once more would not help.
                result.lost += 1;
                self.logged = None;
                let entry = Arc::new(Entry::new(envelope, &raw, shards));
                if let Some(timeline) = &mut self.timeline {
                    timeline.append(entry.clone(), now_ms);
                }
                if let Update::Append(entries) | Update::Replace(entries) = &mut update {
                    entries.push(entry);
                }
                continue;
            }
            match (self.receive(envelope, raw, shards, now_ms), &mut update) {
                (Change::Appended(entry), Update::Append(entries) | Update::Replace(entries)) => entries.push(entry),
                (Change::Gap, _) => self.read_again = true,
                _ => {}
            }
        }
        (update, result)
    }

    /// What is to be written back if the ledger has lost it: retained envelopes, and what was deleted.
    pub fn holdings(&self, now_ms: u64) -> (Vec<Stored>, Vec<BroadcastId>) {
        let Some(timeline) = &self.timeline else { return (Vec::new(), Vec::new()) };
        let retained = timeline.retained(now_ms).filter_map(|entry| {
            let raw = entry.raw.clone()?;
            Some(Stored { envelope: Envelope::read(&raw).ok()?, raw })
        });
        (retained.collect(), timeline.recalled())
    }
}

/// How many entries of the log after `last` these are, or tell that they were deleted.
fn explained(added: &[Arc<Entry>], last: BroadcastId) -> u64 {
    let is_gone = |id: BroadcastId| id > last && added.binary_search_by_key(&id, |entry| entry.id).is_err();
    let deleted = added.iter().filter_map(|entry| entry.recalls).filter(|id| is_gone(*id)).count();
    (added.len() + deleted) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broadcast::envelope;

    const NOW: u64 = 1_000;
    const BOUNDS: Bounds = Bounds { frames: 100, bytes: 1 << 20 };

    fn published(id: u64, prev: u64) -> (Envelope, Arc<[u8]>) {
        let raw = envelope::broadcast(id, prev, NOW, 0, r#""requestId":"r","body":"b"}"#);
        (Envelope::read(raw.as_bytes()).unwrap(), raw.into_bytes().into())
    }

    fn snapshot(head: u64, log: &[(u64, u64)]) -> Snapshot {
        let log = log.iter().map(|(id, prev)| published(*id, *prev));
        let log = log.map(|(envelope, raw)| Stored { raw, envelope }).collect();
        Snapshot { now_ms: NOW, head, generation: Generation("1".into()), log, retained: Vec::new(), logged: None }
    }

    fn receive(app: &mut App, id: u64, prev: u64) -> Change {
        let (envelope, raw) = published(id, prev);
        app.receive(envelope, raw, 1, NOW)
    }

    fn open() -> App {
        let mut app = App::new(AppKey::parse("demo").unwrap(), 0);
        app.start_reading();
        app.take(snapshot(10, &[]), BOUNDS, 1);
        app
    }

    fn added(update: &Update) -> Vec<u64> {
        match update {
            Update::Append(entries) | Update::Replace(entries) => entries.iter().map(|entry| entry.id).collect(),
            Update::Open => panic!("replaced"),
        }
    }

    #[test]
    fn what_is_held_back_follows_what_was_missing() {
        let mut app = open();
        assert!(matches!(receive(&mut app, 13, 12), Change::Gap));
        app.start_reading();
        // Published while the ledger is read, out of order.
        assert!(matches!(receive(&mut app, 15, 14), Change::None));
        assert!(matches!(receive(&mut app, 14, 13), Change::None));
        let (update, result) = app.take(snapshot(13, &[(11, 10), (12, 11), (13, 12)]), BOUNDS, 1);
        assert_eq!((added(&update), result.lost, app.read_again), (vec![11, 12, 13, 14, 15], 0, false));
    }

    #[test]
    fn one_that_came_too_late_for_the_snapshot_is_read_for_again() {
        let mut app = open();
        app.start_reading();
        assert!(matches!(receive(&mut app, 13, 12), Change::None));
        let (update, result) = app.take(snapshot(11, &[(11, 10)]), BOUNDS, 1);
        assert_eq!((added(&update), result.lost, app.read_again), (vec![11], 0, true));
    }

    #[test]
    fn what_the_ledger_cannot_explain_is_delivered_and_counted_not_read_for_ever() {
        let mut app = open();
        assert!(matches!(receive(&mut app, 13, 12), Change::Gap));
        app.start_reading();
        let (update, result) = app.take(snapshot(10, &[]), BOUNDS, 1);
        assert_eq!((added(&update), result.lost, app.read_again), (vec![13], 1, false));
    }

    #[test]
    fn what_was_held_back_is_not_lost_because_the_log_has_let_it_go() {
        let mut app = open();
        assert!(matches!(receive(&mut app, 13, 12), Change::Gap));
        app.start_reading();
        let (update, result) = app.take(snapshot(21, &[(20, 19), (21, 20)]), BOUNDS, 1);
        assert_eq!((added(&update), result.lost), (vec![13, 20, 21], 2), "before 13, and before 20");
    }

    #[test]
    fn what_the_log_has_let_go_is_counted_where_the_ledger_counts() {
        let mut app = App::new(AppKey::parse("demo").unwrap(), 0);
        app.start_reading();
        app.take(Snapshot { logged: Some(7), ..snapshot(10, &[]) }, BOUNDS, 1);
        assert!(matches!(receive(&mut app, 11, 10), Change::Appended(_)));
        app.start_reading();
        // The 9th to the 28th entry were made meanwhile; the log still has the last two of them.
        let (update, result) =
            app.take(Snapshot { logged: Some(28), ..snapshot(51, &[(50, 49), (51, 50)]) }, BOUNDS, 1);
        assert_eq!((added(&update), result.lost), (vec![50, 51], 18));
        app.start_reading();
        let (_, result) = app.take(Snapshot { logged: Some(29), ..snapshot(52, &[(52, 51)]) }, BOUNDS, 1);
        assert_eq!(result.lost, 0, "counted once");
    }

    #[test]
    fn what_another_node_wrote_back_is_read_for_once() {
        let mut app = open();
        let raw = envelope::broadcast(7, 3, NOW, NOW + 60_000, r#""requestId":"r","body":"b"}"#);
        let raw: Arc<[u8]> = raw.into_bytes().into();
        let retained = Stored { envelope: Envelope::read(&raw).unwrap(), raw };
        let publish = |app: &mut App| app.receive(retained.envelope.clone(), retained.raw.clone(), 1, NOW);
        assert!(matches!(publish(&mut app), Change::Gap));
        assert!(matches!(receive(&mut app, 8, 7), Change::None), "one for online devices only is not there to be read");
        app.start_reading();
        let (update, result) = app.take(Snapshot { retained: vec![retained.clone()], ..snapshot(10, &[]) }, BOUNDS, 1);
        assert!(matches!(update, Update::Replace(_)) && result.lost == 0);
        assert!(matches!(publish(&mut app), Change::None));
    }

    #[test]
    fn too_many_are_not_held_but_read_for() {
        let mut app = App::new(AppKey::parse("demo").unwrap(), 0);
        app.start_reading();
        for id in 0..=MAX_HELD as u64 {
            receive(&mut app, id + 11, id + 10);
        }
        assert!(app.held.is_empty() && app.read_again);
    }
}
