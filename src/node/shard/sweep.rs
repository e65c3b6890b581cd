//! Delivery: a live broadcast is one sweep over the sessions of its app.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use mio::Token;

use super::members::{Lap, Members};
use super::session::{Session, State};
use super::{Shard, key};
use crate::broadcast::BroadcastId;
use crate::broadcast::platform::Platform;
use crate::failpoint;
use crate::node::entry::Entry;
use crate::node::login::AppIndex;
use crate::node::pages::WriteSpan;
use crate::node::timeline::{Reader, Timeline};

/// How many sessions are swept before logins and pongs have their turn.
const SLICE: usize = if cfg!(test) { 3 } else { 1024 };

/// Up to so many bytes, what several broadcasts say is put together once and sent to each session in one piece.
const MAX_BATCH: usize = 64 * 1024;

/// An app, as a shard sees it.
#[derive(Default)]
pub struct View {
    /// The shard's own copy, once the app is open.
    pub timeline: Option<Timeline>,
    /// Whether the presence task was asked for it.
    pub is_wanted: bool,
    /// Its sessions on this shard.
    pub members: Members,
    /// Whether a sweep is under way.
    is_sweeping: bool,
    /// What it delivers, by when it came. At most half of the window, and one portion.
    told: VecDeque<Told>,
}

/// Entries that not everyone has been visited for.
struct Told {
    entries: Arc<[Arc<Entry>]>,
    bytes: usize,
    lap: Lap,
    began: Instant,
}

/// What all sessions of one platform that are at one cursor are to be sent.
pub struct Batch {
    cursor: BroadcastId,
    platform: Platform,
    entries: Vec<Arc<Entry>>,
    /// Their frames in one piece; empty if it is one frame, or too much.
    joined: Vec<u8>,
    /// When the first of them expires, and all must be put together anew; [`u64::MAX`] if none does.
    expires_ms: u64,
    sessions: u32,
}

impl Batch {
    fn new(timeline: &Timeline, cursor: BroadcastId, platform: Platform, now_ms: u64) -> Self {
        // The login lies behind: everything after the cursor is live.
        let reader = Reader { cursor, login_head: 0, resume_from: 0, platform };
        let entries: Vec<Arc<Entry>> = timeline.after(reader, now_ms).cloned().collect();
        let size: usize = entries.iter().map(|entry| entry.frame.len()).sum();
        let joined = if entries.len() > 1 && size <= MAX_BATCH {
            entries.iter().flat_map(|entry| entry.frame.iter().copied()).collect()
        } else {
            Vec::new()
        };
        let expires_ms = entries.iter().map(|entry| entry.expires_ms).filter(|at| *at != 0).min().unwrap_or(u64::MAX);
        Self { cursor, platform, entries, joined, expires_ms, sessions: 0 }
    }

    /// What is sent in one piece, if anything is.
    fn bytes(&self) -> Option<&[u8]> {
        match self.entries.as_slice() {
            [] => Some(&[]),
            [one] => Some(&one.frame),
            _ if self.joined.is_empty() => None,
            _ => Some(&self.joined),
        }
    }
}

#[cfg(test)]
impl View {
    pub(super) fn told_len(&self) -> usize {
        self.told.len()
    }
}

/// What a visit leaves to be done with the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It has had everything, or its turn comes when it is writable.
    Nothing,
    /// What it has not had is to be written in portions.
    Flush,
    /// It is too far behind.
    Evict,
    /// The connection is gone.
    Lost,
}

/// Sends an open session what it has not had, if that goes out in one piece.
pub fn offer<S: WriteSpan>(
    session: &mut Session<S>,
    timeline: &Timeline,
    batches: &mut Vec<Batch>,
    now_ms: impl Fn() -> u64,
    delivered: &mut u64,
) -> Next {
    if session.is_behind {
        // Its turn comes when it is writable; here it is only noticed if that is too late.
        return if timeline.has_left_behind(session.reader()) { Next::Evict } else { Next::Nothing };
    }
    if session.cursor >= timeline.last() {
        return Next::Nothing;
    }
    // A flush either brings it up to date or leaves it behind.
    debug_assert!(session.outgoing.is_none() && session.cursor >= session.login_head);
    let (cursor, platform) = (session.cursor, session.platform);
    // The clock is looked at for each session where anything expires at all: a slice may take long, or the whole process be
    // held up in it.
    let is_valid = |batch: &Batch| batch.expires_ms == u64::MAX || now_ms() < batch.expires_ms;
    let fits = |batch: &Batch| batch.cursor == cursor && batch.platform == platform && is_valid(batch);
    let index = batches.iter().position(fits);
    let index = index.unwrap_or_else(|| {
        batches.push(Batch::new(timeline, cursor, platform, now_ms()));
        batches.len() - 1
    });
    let batch = &mut batches[index];
    let Some(bytes) = batch.bytes().filter(|_| !timeline.has_left_behind(session.reader())) else {
        return Next::Flush;
    };
    let sent = if bytes.is_empty() { Ok(0) } else { session.socket.write(bytes) };
    match sent {
        Ok(sent) if sent == bytes.len() => {
            session.cursor = timeline.last();
            batch.sessions += 1;
            failpoint::reached("node::mid-sweep", "");
            Next::Nothing
        }
        Ok(mut sent) => {
            for entry in &batch.entries {
                if sent == 0 {
                    break;
                }
                sent -= session.sent_of(entry, sent, delivered);
            }
            Next::Flush
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Next::Flush,
        Err(_) => Next::Lost,
    }
}

impl Shard {
    /// Takes a timeline, in place of an older copy if there is one, and sweeps: those who wait are welcomed.
    pub(super) fn open(&mut self, app: AppIndex, timeline: Timeline) {
        if let Some(view) = self.views.get_mut(app as usize) {
            view.timeline = Some(timeline);
            view.is_wanted = false;
            self.start_sweep(app);
        }
    }

    /// Appends what is new, and sweeps.
    pub(super) fn append(&mut self, app: AppIndex, entries: Arc<[Arc<Entry>]>) {
        let now_ms = self.shared.clock.now_ms();
        let Some(timeline) = self.views.get_mut(app as usize).and_then(|view| view.timeline.as_mut()) else {
            // Nobody is here, but other shards may be waited for.
            return self.report(app, &entries);
        };
        for entry in entries.iter() {
            timeline.append(entry.clone(), now_ms);
        }
        let Some(lap) = self.start_sweep(app) else { return };
        let bytes = entries.iter().map(|entry| entry.frame.len()).sum();
        if let Some(view) = self.views.get_mut(app as usize) {
            view.told.push_back(Told { entries, bytes, lap, began: Instant::now() });
        }
    }

    /// Whether less than half of the window is still to be swept: then whoever keeps up is not left behind by a portion more.
    pub(super) fn has_room(&self, app: AppIndex) -> bool {
        let settings = &self.shared.settings;
        self.views.get(app as usize).is_none_or(|view| {
            let (frames, bytes) =
                view.told.iter().fold((0, 0), |sum, told| (sum.0 + told.entries.len(), sum.1 + told.bytes));
            // All of it at once, be it ever so large, if there is nothing else.
            view.told.is_empty() || (frames * 2 < settings.recent_frames && bytes * 2 < settings.recent_bytes)
        })
    }

    /// Whether everyone has been visited for what came.
    pub(super) fn is_swept(&self, app: AppIndex) -> bool {
        self.views.get(app as usize).is_none_or(|view| view.told.is_empty())
    }

    /// Lets the timeline go; if somebody has logged in meanwhile it is asked for again, and the old copy serves until then.
    pub(super) fn close_app(&mut self, app: AppIndex) {
        let Some(view) = self.views.get_mut(app as usize) else { return };
        if view.members.is_empty() {
            view.timeline = None;
        } else if !std::mem::replace(&mut view.is_wanted, true) {
            self.shared.desk.want(app);
        }
    }

    fn start_sweep(&mut self, app: AppIndex) -> Option<Lap> {
        let view = self.views.get_mut(app as usize)?;
        if !std::mem::replace(&mut view.is_sweeping, true) {
            self.sweeping.push_back(app);
        }
        // Those who were visited before this came are visited again.
        Some(view.members.begin())
    }

    /// One slice of each sweep that is under way.
    pub(super) fn sweep(&mut self) {
        for _ in 0..self.sweeping.len() {
            let Some(app) = self.sweeping.pop_front() else { break };
            if !self.sweep_slice(app) {
                self.sweeping.push_back(app);
            } else if let Some(view) = self.views.get_mut(app as usize) {
                view.is_sweeping = false;
            }
            self.end_laps(app);
        }
    }

    /// Visits up to [`SLICE`] sessions; returns whether all have been visited.
    fn sweep_slice(&mut self, app: AppIndex) -> bool {
        let mut batches: Vec<Batch> = Vec::new();
        for _ in 0..SLICE {
            let Some(token) = self.views.get_mut(app as usize).and_then(|view| view.members.visit()) else { break };
            self.visit(app, token, &mut batches);
        }
        for batch in batches {
            for entry in &batch.entries {
                entry.count(batch.sessions);
            }
            self.delivered += u64::from(batch.sessions) * batch.entries.len() as u64;
        }
        self.views.get(app as usize).is_none_or(|view| !view.members.is_under_way())
    }

    /// Sends one session what it has not had.
    fn visit(&mut self, app: AppIndex, token: Token, batches: &mut Vec<Batch>) {
        let Some(timeline) = self.views.get(app as usize).and_then(|view| view.timeline.as_ref()) else { return };
        let Some(session) =
            self.sessions.get_mut(key(token)).filter(|session| super::token(key(token), session.generation) == token)
        else {
            return;
        };
        match session.state {
            State::Waiting => return self.welcome(token),
            State::Open => {}
            _ => return,
        }
        match offer(session, timeline, batches, || self.shared.clock.now_ms(), &mut self.delivered) {
            Next::Nothing => {}
            Next::Flush => self.flush(token),
            Next::Evict => self.evict(token),
            Next::Lost => self.remove(token, "connection_lost"),
        }
    }

    /// Lets go what everyone has been visited for.
    fn end_laps(&mut self, app: AppIndex) {
        while let Some(view) = self.views.get_mut(app as usize)
            && view.told.front().is_some_and(|told| view.members.is_over(told.lap))
            && let Some(told) = view.told.pop_front()
        {
            self.shared.metrics.sweep_seconds.observe(told.began.elapsed().as_secs_f64());
            self.report(app, &told.entries);
        }
    }

    /// This shard has done with `entries`; the last one to do so says how it went.
    fn report(&self, app: AppIndex, entries: &[Arc<Entry>]) {
        let now_ms = self.shared.clock.now_ms();
        for entry in entries {
            let Some(sessions) = entry.finish() else { continue };
            let after_ms = now_ms.saturating_sub(entry.time_ms);
            #[allow(clippy::cast_precision_loss)] // milliseconds
            self.shared.metrics.delivery_seconds.observe(after_ms as f64 / 1000.0);
            let app = self.shared.apps.key(app).map(tracing::field::display);
            match entry.recalls {
                None => tracing::info!(
                    app,
                    id = entry.id,
                    request_id = &*entry.request_id,
                    sessions,
                    after_ms,
                    "broadcast delivered"
                ),
                Some(recalled) => tracing::info!(app, id = entry.id, recalled, sessions, after_ms, "recall delivered"),
            }
        }
    }
}
