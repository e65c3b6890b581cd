//! A node: the real merging, timelines, sessions and cursors, between a feed, a ledger and streams of ours. What the presence
//! task and the shards do around them (`presence/mod.rs`, `leases.rs`, `shard/mod.rs`) is repeated here in few lines.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::rc::Rc;
use std::sync::Arc;

use broadcastd::broadcast::BroadcastId;
use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::envelope::Envelope;
use broadcastd::broadcast::platform::Platform;
use broadcastd::fuzzing::{App, Batch, Bounds, Change, Entry, Next, Session, State, Timeline, Update, Written, offer};
use broadcastd::ledger::Snapshot;
use broadcastd::node::codec;

use super::device::Stream;
use super::ledger::Ledger;

pub const RESUME_MS: u64 = 60_000;
const SHARDS: u32 = 2;

enum Message {
    Open(Box<Timeline>),
    Append(Vec<Arc<Entry>>),
}

/// Where a session began.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    pub since: BroadcastId,
    pub login_head: BroadcastId,
    pub login_ms: u64,
}

/// Set when it is welcomed.
pub type Begun = Rc<Cell<Option<Begin>>>;

/// One connection on the node's side.
pub struct Seat {
    pub session: Session<Stream>,
    pub begun: Begun,
}

#[derive(Default)]
pub struct Shard {
    timeline: Option<Timeline>,
    inbox: VecDeque<Message>,
    pub seats: BTreeMap<u64, Seat>,
    must_sweep: bool,
    /// What it was told, ids ascending, since the app was opened.
    pub told: Vec<BroadcastId>,
    is_opened: bool,
    /// What it knows to be deleted, and from which moment on.
    pub recalled: BTreeMap<BroadcastId, u64>,
}

/// A reading of the ledger that is under way.
enum Reading {
    Asked(BroadcastId),
    Answered(Box<Snapshot>),
}

pub struct Node {
    pub app: App,
    pub bounds: Bounds,
    /// What was published and has not been taken.
    pub feed: VecDeque<Arc<[u8]>>,
    reading: Option<Reading>,
    pub shards: Vec<Shard>,
    next_key: u64,
    /// What it could not get any more.
    pub lost: BTreeSet<BroadcastId>,
    /// All that it has ever been given, as the oracle counts it.
    seen: BTreeSet<BroadcastId>,
    /// What was held back since the ledger was last read.
    held: Vec<BroadcastId>,
    /// Sessions that were closed because they were too far behind.
    pub evicted: Vec<u64>,
    pub restored: u32,
}

impl Node {
    /// A node that has just started, and subscribes and joins.
    pub fn new(bounds: Bounds) -> Self {
        let mut node = Self {
            app: App::new(AppKey::parse("demo").expect("a key"), 1),
            bounds,
            feed: VecDeque::new(),
            reading: None,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            next_key: 0,
            lost: BTreeSet::new(),
            seen: BTreeSet::new(),
            held: Vec::new(),
            evicted: Vec::new(),
            restored: 0,
        };
        node.read();
        node
    }

    fn read(&mut self) {
        if self.app.is_reading {
            self.app.read_again = true;
            return;
        }
        self.app.start_reading();
        self.reading = Some(Reading::Asked(self.app.last()));
    }

    pub fn is_idle(&self) -> bool {
        self.reading.is_none()
            && self.feed.is_empty()
            && self.shards.iter().all(|shard| shard.inbox.is_empty() && !shard.must_sweep)
    }

    /// Takes one envelope from the feed.
    pub fn take_published(&mut self, at: usize, now_ms: u64) -> Option<&'static str> {
        let raw = self.feed.remove(at)?;
        let envelope = Envelope::read(&raw).expect("it was written");
        let id = envelope.id;
        let known = self.app.timeline.is_some() && id <= self.app.last();
        match self.app.receive(envelope, raw, SHARDS, now_ms) {
            Change::None if known => Some("known, dropped"),
            Change::None => {
                self.seen.insert(id);
                self.held.push(id);
                Some("held back")
            }
            Change::Appended(entry) => {
                self.append(vec![entry]);
                Some("live")
            }
            Change::Gap => {
                self.seen.insert(id);
                self.held.push(id);
                self.read();
                Some("gap")
            }
        }
    }

    /// The reading goes on: the ledger answers, or the answer arrives, or it fails and is asked again.
    pub fn progress(&mut self, ledger: &mut Ledger, now_us: u64, fails: bool) -> Option<&'static str> {
        match self.reading.take()? {
            _ if fails => {
                self.reading = Some(Reading::Asked(self.app.last()));
                Some("reading failed")
            }
            Reading::Asked(after) => {
                self.reading = Some(Reading::Answered(Box::new(ledger.snapshot(now_us, after))));
                None
            }
            Reading::Answered(snapshot) => {
                self.take_snapshot(*snapshot, ledger, now_us);
                Some("backfill")
            }
        }
    }

    fn take_snapshot(&mut self, snapshot: Snapshot, ledger: &mut Ledger, now_us: u64) {
        let (generation, before) = (snapshot.generation.clone(), self.app.timeline.as_ref().map(Timeline::last));
        // What it opens with is the log and what came after; what was held back before that is known.
        self.seen.retain(|id| before.is_some() || *id > snapshot.head);
        self.seen.extend(snapshot.log.iter().map(|stored| stored.envelope.id));
        self.app.subscribe_again = false;
        let kept: BTreeSet<_> = snapshot.retained.iter().map(|stored| stored.envelope.id).collect();
        let (now_ms, head, held) = (snapshot.now_ms, snapshot.head, self.held.len());
        let own: BTreeSet<_> =
            self.app.timeline.iter().flat_map(|timeline| timeline.retained(now_ms)).map(|entry| entry.id).collect();
        let is_certain = before.is_none() || self.app.generation.as_ref() == Some(&generation);
        let missed = snapshot.log.len() + held;
        let (update, result) = self.app.take(snapshot, self.bounds, SHARDS);
        let timeline = self.app.timeline.as_ref().expect("it was read");
        let has: BTreeSet<_> = timeline.retained(now_ms).map(|entry| entry.id).collect();
        let is_recalled = |id: &BroadcastId| ledger.facts[id].is_recalled;
        if kept.len() + own.len() + missed < 100 {
            assert!(kept.iter().all(|id| has.contains(id) || is_recalled(id)), "what is retained is taken over");
            // The ledger may have lost it, and is given it again.
            let is_kept = is_certain || own.iter().all(|id| has.contains(id) || is_recalled(id));
            assert!(is_kept, "what the ledger may have lost is kept");
        }
        if is_certain {
            assert!(has.iter().all(|id| kept.contains(id) || *id > head), "what is not retained any more is let go");
        }
        // What still waits is asked for; only that.
        self.held.retain(|id| *id > timeline.last());
        let last = timeline.last();
        assert!(self.held.iter().all(|id| ledger.facts[id].prev > last), "{:?} could be delivered", self.held);
        assert!(self.held.is_empty() || self.app.read_again, "{:?} are forgotten", self.held);
        match update {
            Update::Open => self.open(),
            Update::Append(entries) => self.append(entries),
            Update::Replace(entries) => {
                self.append(entries);
                self.open();
            }
        }
        if let Some(before) = before {
            // What it has passed without having it: allowed only where the ledger has it no more, and then it is said.
            let (mut missing, mut is_unsure) = (0, false);
            for (id, fact) in ledger.facts.range((Bound::Excluded(before), Bound::Included(self.app.last()))) {
                // Where the log begins right after a deleted one, what lies before that cannot be told from nothing.
                is_unsure |= fact.is_recalled;
                let has = self.shards[0].has(*id) || self.inbox_has(*id);
                if !has && !fact.is_recalled && self.lost.insert(*id) {
                    missing += usize::from(!fact.is_lost);
                    assert!(fact.is_lost || !self.seen.contains(id), "{id} was held back, and is passed over");
                }
            }
            assert!(missing == 0 || result.lost > 0 || is_unsure, "{missing} broadcasts were passed over in silence");
            assert!(
                result.lost == 0 || ledger.has_trimmed || ledger.has_lost,
                "{} are said to be lost, and none is",
                result.lost
            );
        }
        self.restore_if_lost(ledger, &generation, now_us);
        if self.app.read_again {
            self.read();
        }
    }

    fn restore_if_lost(&mut self, ledger: &mut Ledger, generation: &broadcastd::ledger::Generation, now_us: u64) {
        if self.app.generation.as_ref() == Some(generation) {
            return;
        }
        let (retained, recalled) = self.app.holdings(now_us / 1000);
        self.restored += ledger.restore(now_us, self.app.last(), &retained, &recalled);
        self.app.generation = Some(generation.clone());
    }

    /// A lease renewal, whose answer comes at once.
    pub fn renew(&mut self, ledger: &Ledger) {
        if self.app.timeline.is_none() || self.app.is_reading {
            return;
        }
        if self.app.generation.as_ref() != Some(&ledger.generation()) || ledger.head() < self.app.last() {
            self.app.generation = None;
            self.read();
        } else if ledger.head() > self.app.last() && self.feed.is_empty() {
            self.read();
        }
    }

    fn inbox_has(&self, id: BroadcastId) -> bool {
        self.shards[0].inbox.iter().any(|message| match message {
            Message::Append(entries) => entries.iter().any(|entry| entry.id == id),
            Message::Open(_) => false,
        })
    }

    fn open(&mut self) {
        let timeline = self.app.timeline.as_ref().expect("it was opened");
        for shard in &mut self.shards {
            if !std::mem::replace(&mut shard.is_opened, true) {
                // What it opens with, in so far as the ledger or the feed had it.
                let last = timeline.last();
                shard.told = self.seen.iter().filter(|id| **id <= last).copied().collect();
            }
            shard.inbox.push_back(Message::Open(Box::new(timeline.clone())));
        }
    }

    fn append(&mut self, entries: Vec<Arc<Entry>>) {
        let portion = Bounds { frames: self.bounds.frames / 4, bytes: self.bounds.bytes / 4 };
        for some in portion.split(&entries) {
            for shard in &mut self.shards {
                shard.inbox.push_back(Message::Append(some.to_vec()));
            }
        }
    }

    /// A connection that has logged in.
    pub fn log_in(
        &mut self,
        shard: usize,
        stream: Stream,
        since: BroadcastId,
        platform: Platform,
        now_ms: u64,
        moment: u64,
    ) -> (u64, Begun) {
        self.next_key += 1;
        let begun = Begun::default();
        let mut session = Session::new(stream, None, 0);
        session.cursor = since;
        session.platform = platform;
        session.state = State::Waiting;
        self.shards[shard].seats.insert(self.next_key, Seat { session, begun: begun.clone() });
        if self.shards[shard].timeline.is_some() {
            self.shards[shard].welcome(self.next_key, now_ms, moment);
        }
        self.flush(shard, self.next_key, now_ms, moment);
        (self.next_key, begun)
    }

    /// The shard takes a message.
    pub fn take_message(&mut self, shard: usize, now_ms: u64, moment: u64) {
        let shard = &mut self.shards[shard];
        match shard.inbox.pop_front() {
            None => return,
            Some(Message::Open(timeline)) => {
                for id in timeline.recalled() {
                    shard.recalled.entry(id).or_insert(moment);
                }
                shard.timeline = Some(*timeline);
            }
            Some(Message::Append(entries)) => {
                let Some(timeline) = &mut shard.timeline else { return };
                for entry in entries {
                    if let Some(last) = shard.told.last() {
                        assert!(entry.id > *last, "{} is told after {last}", entry.id);
                    }
                    shard.told.push(entry.id);
                    if let Some(target) = entry.recalls {
                        shard.recalled.entry(target).or_insert(moment);
                    }
                    timeline.append(entry, now_ms);
                }
            }
        }
        shard.must_sweep = true;
    }

    /// Visits everybody, in the order of `keys`.
    pub fn sweep(&mut self, shard: usize, keys: &[u64], now_ms: u64, moment: u64) {
        let mut batches: Vec<Batch> = Vec::new();
        self.shards[shard].must_sweep = false;
        for key in keys {
            let Shard { timeline, seats, .. } = &mut self.shards[shard];
            let (Some(timeline), Some(seat)) = (timeline.as_ref(), seats.get_mut(key)) else { continue };
            if seat.session.state == State::Waiting {
                self.shards[shard].welcome(*key, now_ms, moment);
                self.flush(shard, *key, now_ms, moment);
                continue;
            }
            seat.session.socket.0.borrow_mut().now = moment;
            match offer(&mut seat.session, timeline, &mut batches, || now_ms, &mut 0) {
                Next::Nothing => {}
                Next::Flush => self.flush(shard, *key, now_ms, moment),
                Next::Evict => self.evict(shard, *key),
                Next::Lost => panic!("the stream holds"),
            }
        }
    }

    /// The socket is writable, or something is to be sent first.
    pub fn flush(&mut self, shard: usize, key: u64, now_ms: u64, moment: u64) {
        let Shard { timeline, seats, .. } = &mut self.shards[shard];
        let Some(seat) = seats.get_mut(&key) else { return };
        seat.session.socket.0.borrow_mut().now = moment;
        let timeline = timeline.as_ref().filter(|_| seat.session.state == State::Open);
        if timeline.is_some_and(|timeline| timeline.has_left_behind(seat.session.reader())) {
            return self.evict(shard, key);
        }
        let written = seat.session.write(timeline, || now_ms, &mut 0).expect("the stream holds");
        seat.session.is_behind = written == Written::Some;
    }

    /// A ping, which goes out between frames.
    pub fn ping(&mut self, shard: usize, key: u64, now_ms: u64, moment: u64) {
        if let Some(seat) = self.shards[shard].seats.get_mut(&key) {
            seat.session.push(&codec::PING);
            self.flush(shard, key, now_ms, moment);
        }
    }

    fn evict(&mut self, shard: usize, key: u64) {
        self.shards[shard].seats.remove(&key);
        self.evicted.push(key);
    }
}

impl Shard {
    fn has(&self, id: BroadcastId) -> bool {
        self.told.binary_search(&id).is_ok()
    }

    fn welcome(&mut self, key: u64, now_ms: u64, moment: u64) {
        let (Some(timeline), Some(seat)) = (&mut self.timeline, self.seats.get_mut(&key)) else { return };
        let since = seat.session.cursor;
        seat.session.socket.0.borrow_mut().now = moment;
        let pending = seat.session.admit(timeline, now_ms, RESUME_MS);
        let login_head = seat.session.login_head;
        assert_eq!(login_head, timeline.last().max(since));
        seat.begun.set(Some(Begin { since, login_head, login_ms: now_ms }));
        let head = login_head.max(1);
        seat.session
            .push(&codec::text(&format!(r#"{{"type":"welcome","session":"s","head":{head},"pending":{pending}}}"#)));
    }

    /// The newest id that it was told of.
    pub fn last(&self) -> Option<BroadcastId> {
        self.timeline.as_ref().map(Timeline::last)
    }

    /// The ids of what it retains.
    pub fn retained(&self, now_ms: u64) -> Vec<BroadcastId> {
        self.timeline.iter().flat_map(|timeline| timeline.retained(now_ms)).map(|entry| entry.id).collect()
    }
}
