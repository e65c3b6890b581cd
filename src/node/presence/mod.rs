//! The presence task: one for all apps of the node. It holds the leases, merges what is published into the apps' timelines,
//! and hands what is new to the shards.
//!
//! The subscription is only the fast path; the ledger's log is the truth. Whatever may have been missed is found by comparing
//! positions: a `prev` that is not known, or the head that a lease renewal returns.

pub(crate) mod app;
mod leases;
mod operations;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::app::{App, Change, Update};
use self::operations::{Caller, Operation, Outcome};
use super::entry::Entry;
use super::login::AppIndex;
use super::shard::{Message, Sender};
use super::shared::Shared;
use super::timeline::Bounds;
use crate::broadcast::app::AppKey;
use crate::broadcast::envelope::{Content, Envelope};
use crate::ledger::{Feed, Ledger, LedgerError, NodeName, Snapshot, Stored};

/// The first and the longest wait before a failed call is repeated; the waits double, with jitter.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The longest wait after something unreadable: asking again seldom helps.
const CORRUPT_BACKOFF: Duration = Duration::from_secs(60);

/// How long giving the leases up may take at the end; they run out by themselves.
const LEAVING: Duration = Duration::from_secs(2);

/// The task.
pub struct Presence {
    shared: Arc<Shared>,
    caller: Caller,
    shards: Vec<Sender>,
    apps: BTreeMap<AppIndex, App>,
    /// How many apps were opened.
    opened: u64,
    /// How many messages were taken from the feed.
    taken: u64,
    /// At most a renewal, and a few calls an app.
    operations: FuturesUnordered<Operation>,
    is_renewing: bool,
    /// Whether to renew again as soon as that is done.
    renew_again: bool,
    /// What is wrong with the ledger, if anything.
    trouble: Option<String>,
    is_draining: watch::Receiver<bool>,
    ready: watch::Sender<Result<(), String>>,
}

impl Presence {
    pub fn new(
        shared: Arc<Shared>,
        ledger: Arc<dyn Ledger>,
        node: NodeName,
        shards: Vec<Sender>,
        ready: watch::Sender<Result<(), String>>,
        is_draining: watch::Receiver<bool>,
    ) -> Self {
        let caller = Caller { ledger, node, lease: shared.settings.lease() };
        Self {
            shared,
            caller,
            shards,
            apps: BTreeMap::new(),
            opened: 0,
            taken: 0,
            operations: FuturesUnordered::new(),
            is_renewing: false,
            renew_again: false,
            trouble: None,
            is_draining,
            ready,
        }
    }

    /// Runs until `leave` is cancelled, and then gives the leases up.
    pub async fn run(mut self, leave: CancellationToken) {
        let mut feed = self.caller.ledger.open_feed(&self.caller.node);
        let mut renewals = tokio::time::interval(self.shared.settings.renew());
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shared = self.shared.clone();
        let mut feed_has_ended = false;
        loop {
            tokio::select! {
                () = leave.cancelled() => break,
                message = feed.recv(), if !feed_has_ended => match message {
                    Some(message) => self.take_feed(message).await,
                    None => {
                        feed_has_ended = true;
                        tracing::error!("the ledger's feed has ended: only renewals find what is published");
                    }
                },
                apps = shared.desk.wanted() => apps.into_iter().for_each(|app| self.want(app)),
                Some(outcome) = self.operations.next(), if !self.operations.is_empty() => {
                    self.settle(outcome, !feed.is_empty()).await;
                }
                _ = renewals.tick() => {
                    self.close_idle().await;
                    self.renew();
                }
                Ok(()) = self.is_draining.changed() => self.tell_readiness(),
            }
        }
        self.leave_all().await;
    }

    async fn take_feed(&mut self, message: Feed) {
        self.taken += 1;
        match message {
            Feed::Published(key, raw) => self.receive(&key, raw).await,
            Feed::Interrupted => {
                tracing::warn!("the subscription was interrupted: comparing positions");
                self.renew();
            }
        }
    }

    /// Takes one envelope; what is new goes to the shards.
    async fn receive(&mut self, key: &AppKey, raw: Arc<[u8]>) {
        self.shared.metrics.envelopes.inc();
        let Some(index) = self.shared.apps.find(key.as_str()) else { return };
        let Some(app) = self.apps.get_mut(&index) else { return };
        let envelope = match Envelope::read(&raw) {
            Ok(envelope) => envelope,
            Err(error) => {
                self.shared.metrics.envelopes_unreadable.inc();
                tracing::error!(app = %key, %error, "a published envelope is skipped");
                return;
            }
        };
        if let Content::Newer(version) = envelope.content {
            self.shared.metrics.envelopes_unreadable.inc();
            tracing::error!(app = %key, id = envelope.id, version, "an envelope of a newer version is not delivered");
        }
        match app.receive(envelope, raw, self.shards.len() as u32, self.shared.clock.now_ms()) {
            Change::None => {}
            Change::Appended(entry) => self.append(index, vec![entry]).await,
            Change::Gap => self.read(index),
        }
    }

    /// A shard has a session of this app and no timeline.
    fn want(&mut self, index: AppIndex) {
        let Some(key) = self.shared.apps.key(index).cloned() else { return };
        match self.apps.entry(index) {
            Slot::Occupied(mut app) => {
                // Otherwise what it asks for goes to all shards, or is on its way to this one.
                if let Some(came) = &mut app.get_mut().closing {
                    *came = true;
                }
            }
            Slot::Vacant(slot) => {
                self.opened += 1;
                let app = slot.insert(App::new(key, self.opened));
                app.start_reading();
                self.shared.metrics.apps.inc();
                self.operations.push(self.caller.open(app.wanted(index), 0, false, Duration::ZERO));
            }
        }
    }

    /// Reads what is missing of an app; not of one that is being given up, which would take its lease again.
    fn read(&mut self, index: AppIndex) {
        let Some(app) = self.apps.get_mut(&index).filter(|app| app.closing.is_none()) else { return };
        if app.is_reading {
            app.read_again = true;
            return;
        }
        app.start_reading();
        self.shared.metrics.backfills.inc();
        self.operations.push(self.caller.read(app.wanted(index), app.last(), Duration::ZERO));
    }

    /// `waiting`: whether anything is in the feed.
    async fn settle(&mut self, outcome: Outcome, waiting: bool) {
        match outcome {
            Outcome::Read { app, incarnation, asked, result } => {
                if self.apps.get(&app).is_none_or(|app| app.incarnation != incarnation) {
                    return;
                }
                match result {
                    Ok(snapshot) => {
                        self.shared.clock.set(snapshot.now_ms, asked.elapsed());
                        self.take_snapshot(app, snapshot).await;
                    }
                    Err(error) => self.retry(app, &error),
                }
            }
            Outcome::Renewed { apps, asked, results } => {
                self.is_renewing = false;
                if !results.iter().any(|result| matches!(result, Err(LedgerError::Unavailable(_)))) {
                    self.trouble_over();
                }
                for ((app, last), result) in apps.into_iter().zip(results) {
                    match result {
                        Ok(renewal) => {
                            self.shared.clock.set(renewal.now_ms, asked.elapsed());
                            self.take_renewal(app, last, &renewal);
                        }
                        Err(error) => self.note_trouble(app, &error),
                    }
                }
                if std::mem::take(&mut self.renew_again) {
                    self.renew();
                }
            }
            Outcome::Overdue { app, head, since } => self.take_overdue(app, head, since, waiting),
            Outcome::Restored { app, generation, result } => self.take_restored(app, generation, result),
            Outcome::Left { app, result } => self.take_left(app, result),
        }
    }

    async fn take_snapshot(&mut self, index: AppIndex, snapshot: Snapshot) {
        self.trouble_over();
        let settings = &self.shared.settings;
        let bounds = Bounds { frames: settings.recent_frames, bytes: settings.recent_bytes };
        let shards = self.shards.len() as u32;
        let Some(app) = self.apps.get_mut(&index) else { return };
        if app.closing.is_some() {
            return;
        }
        app.subscribe_again = false;
        app.failures = 0;
        app.is_corrupt = false;
        let generation = snapshot.generation.clone();
        let known = app.last();
        let is_newer =
            |stored: &&Stored| stored.envelope.id > known && matches!(stored.envelope.content, Content::Newer(_));
        let newer = snapshot.log.iter().filter(is_newer).count();
        if newer > 0 {
            self.shared.metrics.envelopes_unreadable.inc_by(newer as u64);
            tracing::error!(app = %app.key, newer, "envelopes of a newer version are not delivered");
        }
        let (update, result) = app.take(snapshot, bounds, shards);
        if result.lost > 0 {
            self.shared.metrics.lost_envelopes.inc_by(result.lost);
            tracing::error!(app = %app.key, at_least = result.lost, head = app.last(), "broadcasts are gone from the log");
        }
        match update {
            Update::Open => self.open(index).await,
            Update::Append(entries) => self.append(index, entries).await,
            Update::Replace(entries) => {
                // First the entries, so that nobody who keeps up finds itself behind the new timeline.
                self.append(index, entries).await;
                self.open(index).await;
            }
        }
        self.restore_if_lost(index, &generation);
        if self.apps.get(&index).is_some_and(|app| app.read_again) {
            self.read(index);
        }
    }

    /// Hands an app's timeline to all shards.
    async fn open(&mut self, index: AppIndex) {
        let Some(timeline) = self.apps.get(&index).and_then(|app| app.timeline.as_ref()) else { return };
        for shard in &self.shards {
            shard.send(Message::Open { app: index, timeline: Box::new(timeline.clone()) }).await;
        }
    }

    /// Hands what is new to all shards, in portions that leave them room to keep up with.
    async fn append(&mut self, index: AppIndex, entries: Vec<Arc<Entry>>) {
        let settings = &self.shared.settings;
        let portion = Bounds { frames: settings.recent_frames / 4, bytes: settings.recent_bytes / 4 };
        for entries in portion.split(&entries) {
            let entries: Arc<[Arc<Entry>]> = entries.into();
            for shard in &self.shards {
                shard.send(Message::Append { app: index, entries: entries.clone() }).await;
            }
        }
    }

    /// Reads again after a failure, later each time.
    fn retry(&mut self, index: AppIndex, error: &LedgerError) {
        self.note_trouble(index, error);
        let Some(app) = self.apps.get_mut(&index) else { return };
        app.failures = app.failures.saturating_add(1);
        let longest = if error.is_retryable() { BACKOFF.1 } else { CORRUPT_BACKOFF };
        let wait =
            BACKOFF.0.saturating_mul(1 << app.failures.min(11)).min(longest).mul_f64(0.5 + fastrand::f64() / 2.0);
        let operation = if app.timeline.is_none() || app.subscribe_again {
            self.caller.open(app.wanted(index), app.last(), app.subscribe_again, wait)
        } else {
            self.caller.read(app.wanted(index), app.last(), wait)
        };
        self.operations.push(operation);
    }

    /// Notes why a call for an app failed. What is unreadable of one app is no reason to send everyone's devices away.
    fn note_trouble(&mut self, index: AppIndex, error: &LedgerError) {
        if !error.is_retryable() {
            if let Some(app) = self.apps.get_mut(&index)
                && !std::mem::replace(&mut app.is_corrupt, true)
            {
                tracing::error!(app = %app.key, %error, "this app is not served, or not kept up to date");
            }
            return;
        }
        if self.trouble.is_none() {
            tracing::warn!(%error, "serving from memory until the ledger answers");
        }
        self.trouble = Some(error.to_string());
        self.tell_readiness();
    }

    fn trouble_over(&mut self) {
        if self.trouble.take().is_some() {
            tracing::info!("the ledger answers again");
            self.tell_readiness();
        }
    }

    fn tell_readiness(&self) {
        let state = if *self.is_draining.borrow() {
            Err("draining".to_owned())
        } else if self.shared.stopping() {
            Err("stopped".to_owned())
        } else {
            self.trouble.clone().map_or(Ok(()), Err)
        };
        self.ready.send_if_modified(|old| {
            let changed = *old != state;
            *old = state;
            changed
        });
    }

    /// The end: all leases are given up.
    async fn leave_all(&mut self) {
        self.operations.clear();
        for (index, app) in std::mem::take(&mut self.apps) {
            self.operations.push(self.caller.leave(index, app.key));
        }
        let all = async { while self.operations.next().await.is_some() {} };
        if tokio::time::timeout(LEAVING, all).await.is_err() {
            tracing::warn!("some leases are left to run out");
        }
        self.shared.metrics.apps.set(0);
    }
}

#[cfg(test)]
mod tests;
