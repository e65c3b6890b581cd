//! The node's subscription: a connection of its own, so that a flood of envelopes never delays an accept, and the other way
//! round. It is rebuilt behind the node's back; the node only learns that something may have been missed.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::{PushInfo, PushKind, RedisResult, Value};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::connect::{Connection, RedisSettings, describe, probe};
use super::keys::Keys;
use super::link::{Live, State};
use crate::backoff::Backoff;
use crate::broadcast::app::AppKey;
use crate::failpoint;
use crate::ledger::{FEED_CAPACITY, Feed, LedgerError, NodeName};

/// How often the subscription's connection is probed: a dead peer, or a demoted one, is noticed within this and the response
/// timeout.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// How many channels are subscribed with one command after a reconnection.
const CHANNELS_A_COMMAND: usize = 256;

pub(super) enum Change {
    Subscribe(AppKey, oneshot::Sender<Result<(), LedgerError>>),
    Unsubscribe(AppKey, oneshot::Sender<Result<(), LedgerError>>),
}

/// Where the connection's pushes go: into the bounded feed. What does not fit is dropped, and the node is told to compare
/// positions, which finds it in the log.
#[derive(Clone)]
struct Inlet {
    keys: Keys,
    feed: mpsc::Sender<Feed>,
    missed: Arc<AtomicBool>,
    lost: Arc<Notify>,
    /// Apps whose sharded subscription the server has ended: their slot has moved. At most all that were subscribed. A std
    /// Mutex, not tokio's: never held across an await.
    moved: Arc<Mutex<HashSet<AppKey>>>,
}

impl Inlet {
    fn take(&self, push: PushInfo) {
        match push.kind {
            PushKind::Message | PushKind::SMessage => {
                let mut data = push.data.into_iter();
                let (Some(Value::BulkString(channel)), Some(Value::BulkString(envelope))) = (data.next(), data.next())
                else {
                    return;
                };
                if failpoint::reached("feed::message", "") {
                    return;
                }
                let app = std::str::from_utf8(&channel).ok().and_then(|channel| self.keys.app_of_channel(channel));
                if let Some(app) = app
                    && self.feed.try_send(Feed::Published(app, envelope.into())).is_err()
                {
                    self.missed.store(true, Ordering::Release);
                    self.lost.notify_one();
                }
            }
            PushKind::Disconnection => {
                self.missed.store(true, Ordering::Release);
                self.lost.notify_one();
            }
            // Also the answer to an unsubscription of ours: whoever looks knows what is to be subscribed.
            PushKind::SUnsubscribe => {
                let Some(Value::BulkString(channel)) = push.data.first() else { return };
                let app = std::str::from_utf8(channel).ok().and_then(|channel| self.keys.app_of_channel(channel));
                self.moved.lock().unwrap_or_else(PoisonError::into_inner).extend(app);
                self.lost.notify_one();
            }
            _ => {}
        }
    }
}

/// What ends a session with the server, and what outlives it.
pub(super) struct Subscription {
    settings: RedisSettings,
    node: NodeName,
    inlet: Inlet,
    changes: mpsc::Receiver<Change>,
    link: watch::Receiver<State>,
    subscribed: HashSet<AppKey>,
}

impl Subscription {
    /// A subscription without apps. Returns the receiving end for the node too.
    pub(super) fn new(
        settings: RedisSettings,
        keys: Keys,
        node: NodeName,
        changes: mpsc::Receiver<Change>,
        link: watch::Receiver<State>,
    ) -> (Self, mpsc::Receiver<Feed>) {
        let (feed, receiver) = mpsc::channel(FEED_CAPACITY);
        let inlet = Inlet { keys, feed, missed: Arc::default(), lost: Arc::default(), moved: Arc::default() };
        (Self { settings, node, inlet, changes, link, subscribed: HashSet::new() }, receiver)
    }

    /// Runs until the node drops its end or the ledger its.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        while !self.inlet.feed.is_closed() && !self.changes.is_closed() {
            match self.session(&mut backoff).await {
                Ok(()) => return,
                Err(reason) => tracing::warn!(reason, "the subscription to Redis was lost; reconnecting"),
            }
            let delay = tokio::time::sleep(backoff.next_delay());
            tokio::pin!(delay);
            loop {
                tokio::select! {
                    () = &mut delay => break,
                    change = self.changes.recv() => match change {
                        None => return,
                        Some(change) => self.put_off(change),
                    }
                }
            }
        }
    }

    /// Takes a change while there is no connection. What waits for a subscription is told at once: the node tries again by
    /// itself.
    fn put_off(&mut self, change: Change) {
        match change {
            Change::Subscribe(_, answer) => {
                let _ = answer.send(Err(LedgerError::Unavailable("not connected".into())));
            }
            Change::Unsubscribe(app, answer) => {
                self.subscribed.remove(&app);
                let _ = answer.send(Ok(()));
            }
        }
    }

    /// The ledger's connection, once there is one; `None` when nobody needs it any more.
    async fn live(&mut self) -> Option<Live> {
        loop {
            if let Ok(live) = &*self.link.borrow_and_update() {
                return Some(live.clone());
            }
            tokio::select! {
                changed = self.link.changed() => changed.ok()?,
                change = self.changes.recv() => self.put_off(change?),
                () = self.inlet.feed.closed() => return None,
            }
        }
    }

    /// One connection, from its opening to its loss. `Ok` when nobody needs it any more.
    async fn session(&mut self, backoff: &mut Backoff) -> Result<(), String> {
        let to = self.inlet.clone();
        let push = move |push: PushInfo| {
            to.take(push);
            Ok::<(), redis::aio::SendError>(())
        };
        let Some(Live { master, generation, .. }) = self.live().await else { return Ok(()) };
        let mut connection =
            self.settings.open(Some(push), master.as_ref()).await.map_err(|error| self.settings.refused(&error))?;
        self.check(&mut connection, &generation).await?;
        let channels: Vec<String> =
            self.subscribed.iter().map(|app| self.inlet.keys.channel(app, &self.node)).collect();
        for some in channels.chunks(CHANNELS_A_COMMAND) {
            subscribe(&mut connection, some).await.map_err(|error| describe(&error))?;
        }
        // Anything may have been published while there was no subscription.
        if !self.subscribed.is_empty() {
            self.inlet.missed.store(true, Ordering::Release);
        }
        backoff.reset();
        let mut probe_at = tokio::time::interval(PROBE_EVERY);
        probe_at.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if self.inlet.missed.load(Ordering::Acquire) {
                let Ok(permit) = self.inlet.feed.reserve().await else { return Ok(()) };
                // Cleared before it is said: what is missed from here on is said again.
                self.inlet.missed.store(false, Ordering::Release);
                permit.send(Feed::Interrupted);
            }
            tokio::select! {
                () = self.inlet.feed.closed() => return Ok(()),
                () = self.inlet.lost.notified() => {
                    self.follow_moved(&mut connection).await?;
                    // Told apart from an overflow by asking the server.
                    self.check(&mut connection, &generation).await?;
                }
                // The ledger's connection found another master: envelopes are published there.
                changed = self.link.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    if matches!(&*self.link.borrow_and_update(), Ok(live) if live.generation != generation) {
                        return Err("Redis failed over".into());
                    }
                }
                _ = probe_at.tick() => self.check(&mut connection, &generation).await?,
                change = self.changes.recv() => match change {
                    None => return Ok(()),
                    Some(Change::Subscribe(app, answer)) => {
                        let channel = self.inlet.keys.channel(&app, &self.node);
                        let result = subscribe(&mut connection, &[channel]).await;
                        if result.is_ok() {
                            self.subscribed.insert(app);
                        }
                        let _ = answer.send(result.map_err(|error| LedgerError::Unavailable(describe(&error))));
                    }
                    Some(Change::Unsubscribe(app, answer)) => {
                        let channel = self.inlet.keys.channel(&app, &self.node);
                        self.subscribed.remove(&app);
                        // If this fails the connection is dying, and the next one does not subscribe it again.
                        let _ = unsubscribe(&mut connection, &channel).await;
                        let _ = answer.send(Ok(()));
                    }
                }
            }
        }
    }

    /// Subscribes anew to what the server has ended: the slot's new master publishes it from now on.
    async fn follow_moved(&self, connection: &mut Connection) -> Result<(), String> {
        let moved = std::mem::take(&mut *self.inlet.moved.lock().unwrap_or_else(PoisonError::into_inner));
        for app in moved.intersection(&self.subscribed) {
            tracing::info!(%app, "the app's slot has moved: subscribing at its new master");
            let channel = self.inlet.keys.channel(app, &self.node);
            subscribe(connection, &[channel]).await.map_err(|error| describe(&error))?;
            self.inlet.missed.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Whether the connection still leads to the same master. A killed subscriber connection is reopened by nobody else.
    async fn check(&self, connection: &mut Connection, generation: &crate::ledger::Generation) -> Result<(), String> {
        if probe(connection).await? == *generation { Ok(()) } else { Err("Redis failed over".into()) }
    }
}

async fn subscribe(connection: &mut Connection, channels: &[String]) -> RedisResult<()> {
    match connection {
        Connection::Single(connection) => connection.subscribe(channels).await,
        Connection::Cluster(connection) => {
            // Sharded channels of different slots cannot share a command.
            for channel in channels {
                connection.ssubscribe(channel).await?;
            }
            Ok(())
        }
    }
}

async fn unsubscribe(connection: &mut Connection, channel: &str) -> RedisResult<()> {
    match connection {
        Connection::Single(connection) => connection.unsubscribe(channel).await,
        Connection::Cluster(connection) => connection.sunsubscribe(channel).await,
    }
}
