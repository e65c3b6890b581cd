//! The Redis ledger: one script a decision, on one hash slot an app, on a single server, behind Sentinel, or in a cluster.

pub(crate) mod answers;
mod connect;
mod feed;
mod keys;
mod link;
mod scripts;
mod sentinels;

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use redis::{Cmd, ErrorKind, Pipeline, RedisError, ServerErrorKind, Value};
use tokio::sync::{mpsc, oneshot, watch};

pub use connect::{Mode, RedisSettings};

use self::answers::{arguments, read, read_decision, small, stored};
use self::connect::{Connection, describe, probe};
use self::feed::{Change, Subscription};
use self::keys::Keys;
use self::link::{Link, Live};
use self::scripts::{Scripts, Source};
use super::{Answer, Feed, Kind, Ledger, LedgerError, LedgerSettings, NodeName, Recalled, Renewal, Snapshot, Stored};
use crate::broadcast::app::AppKey;
use crate::broadcast::envelope::{Content, Envelope, tail};
use crate::broadcast::request::Submission;
use crate::broadcast::verdict::Decision;
use crate::broadcast::{BroadcastId, MAX_ID};
use crate::failpoint;

/// How many entries of the log a node is given when it joins without a position: enough for its recent window.
const JOIN_LOG: u32 = 1000;
/// How many entries of the log one answer has when a node reads what it missed: 6 MB at most, well within the time to answer.
const BACKFILL_PORTION: u32 = 500;
/// How many entries of the log one answer of the history has at the most, and at the least if there are so many.
const HISTORY_PORTION: (usize, usize) = (200, 20);
/// How many subscription changes may wait; more wait in their callers.
const CHANGES: usize = 1024;

/// See the module.
pub struct RedisLedger {
    settings: RedisSettings,
    ledger: LedgerSettings,
    keys: Keys,
    link: Link,
    health: watch::Receiver<Result<(), String>>,
    changes: Mutex<Option<mpsc::Sender<Change>>>,
}

impl RedisLedger {
    /// Starts connecting in the background; calls answer `Unavailable` until it is done.
    #[must_use]
    pub fn start(settings: RedisSettings, ledger: LedgerSettings) -> Self {
        let (health_sender, health) = watch::channel(Err("not connected yet".to_owned()));
        Self {
            keys: Keys::new(&settings.key_prefix),
            link: Link::start(settings.clone(), health_sender),
            settings,
            ledger,
            health,
            changes: Mutex::new(None),
        }
    }

    /// For tests only: pretends that the data has had another life. It is not stored.
    #[doc(hidden)]
    pub fn set_generation(&self, generation: &str) {
        self.link.set_generation(super::Generation(generation.into()));
    }

    fn publish_command(&self) -> &'static str {
        if self.settings.mode == Mode::Cluster { "SPUBLISH" } else { "PUBLISH" }
    }

    fn log_ms(&self) -> u64 {
        self.ledger.log_hours * 3_600_000
    }

    fn accept_command(&self, submission: &Submission, generation: &str, name: (&str, &str)) -> Cmd {
        let request = &submission.request;
        let app = &request.app;
        let mut command = Cmd::with_capacity(21, 1024);
        command
            .arg(name.0)
            .arg(name.1)
            .arg(7)
            .arg(self.keys.meta(app))
            .arg(self.keys.rate_minute(app))
            .arg(self.keys.rate_day(app))
            .arg(self.keys.request(app, &request.id))
            .arg(self.keys.retained(app))
            .arg(self.keys.log(app))
            .arg(self.keys.nodes(app))
            .arg(generation)
            .arg(request.content_hash())
            .arg(request.dedupe_ms)
            .arg(submission.limits.per_minute)
            .arg(submission.limits.per_day)
            .arg(request.ttl_ms.unwrap_or(0))
            .arg(tail(request))
            .arg(self.publish_command())
            .arg(self.keys.channel_prefix(app))
            .arg(self.ledger.log_length)
            .arg(self.log_ms());
        command
    }

    async fn accept_batch(&self, batch: &[Submission]) -> Vec<Result<Decision, LedgerError>> {
        let mut live = match self.link.get() {
            Ok(live) => live,
            Err(error) => return batch.iter().map(|_| Err(error.clone())).collect(),
        };
        let scripts = live.scripts.clone();
        let all: Vec<&Submission> = batch.iter().collect();
        let mut answers = self.accept_by_hash(&mut live, &all).await;
        failpoint::reached("ledger::before-answer", "");
        // Pipelines do not reload a script that the server has forgotten: one call brings it whole, and the others follow.
        let mut unknown = unknown_script(0..batch.len(), &answers);
        let mut hindrance = None;
        while let Some((first, rest)) = unknown.split_first() {
            // Each time: in a cluster the next one may be another master, and have been replaced just now.
            if let Err(error) = self.is_same_life(&mut live).await {
                hindrance = Some(error);
                break;
            }
            let whole = self.accept_command(&batch[*first], &live.generation.0, ("EVAL", &scripts.accept.text));
            let answer: Result<Value, RedisError> = whole.query_async(&mut live.connection).await;
            // What lies in that app's own keys is no hindrance to others.
            hindrance = answer.as_ref().err().map(|error| self.failed(error)).filter(LedgerError::is_retryable);
            answers[*first] = answer;
            if hindrance.is_some() {
                break;
            }
            let others: Vec<&Submission> = rest.iter().map(|index| &batch[*index]).collect();
            for (index, answer) in rest.iter().zip(self.accept_by_hash(&mut live, &others).await) {
                answers[*index] = answer;
            }
            unknown = unknown_script(rest.iter().copied(), &answers);
        }
        let read = |answer: Result<Value, RedisError>| match (answer, &hindrance) {
            (Err(error), Some(hindrance)) if is_unknown_script(&error) => Err(hindrance.clone()),
            (answer, _) => answer.map_err(|error| self.failed(&error)).and_then(|value| read_decision(&value)),
        };
        answers.into_iter().map(read).collect()
    }

    /// All in one round trip, the script by its hash.
    async fn accept_by_hash(&self, live: &mut Live, batch: &[&Submission]) -> Vec<Result<Value, RedisError>> {
        if batch.is_empty() {
            return Vec::new();
        }
        let Live { connection, generation, scripts, .. } = live;
        let by_hash = ("EVALSHA", scripts.accept.sha.as_str());
        match connection {
            Connection::Single(single) => {
                let mut pipeline = Pipeline::with_capacity(batch.len());
                pipeline.ignore_errors();
                for submission in batch {
                    pipeline.add_command(self.accept_command(submission, &generation.0, by_hash));
                }
                match single.send_packed_commands(&pipeline, 0, batch.len()).await {
                    Ok(values) => values.into_iter().map(Value::extract_error).collect(),
                    Err(error) => batch.iter().map(|_| Err(error.clone())).collect(),
                }
            }
            Connection::Cluster(cluster) => {
                let calls = batch.iter().map(|submission| {
                    let command = self.accept_command(submission, &generation.0, by_hash);
                    let mut cluster = cluster.clone();
                    async move { command.query_async(&mut cluster).await }
                });
                join_all(calls).await
            }
        }
    }

    /// Whether a server that does not know a script has only forgotten it. A cluster's connection reconnects by itself, so it
    /// may be one that was restarted, or promoted, and then what is known of the data is no longer true.
    async fn is_same_life(&self, live: &mut Live) -> Result<(), LedgerError> {
        match probe(&mut live.connection).await {
            Ok(generation) if generation == live.scripts.generation => Ok(()),
            Ok(_) => {
                self.link.suspect();
                Err(LedgerError::Unavailable("Redis was restarted, or failed over".into()))
            }
            Err(reason) => {
                self.link.suspect();
                Err(LedgerError::Unavailable(reason))
            }
        }
    }

    /// Runs a script, sending it whole if the server does not know it.
    async fn run(
        &self,
        live: &mut Live,
        which: impl Fn(&Scripts) -> &Source,
        arguments: &Cmd,
    ) -> Result<Value, LedgerError> {
        let scripts = live.scripts.clone();
        let source = which(&scripts);
        let call = |name: &str, script: &str| {
            let mut command = redis::cmd(name);
            command.arg(script);
            arguments.args_iter().skip(1).for_each(|argument| {
                if let redis::Arg::Simple(bytes) = argument {
                    command.arg(bytes);
                }
            });
            command
        };
        let first: Result<Value, RedisError> = call("EVALSHA", &source.sha).query_async(&mut live.connection).await;
        let answer = match first {
            Err(error) if is_unknown_script(&error) => {
                self.is_same_life(live).await?;
                call("EVAL", &source.text).query_async(&mut live.connection).await
            }
            answer => answer,
        };
        answer.map_err(|error| self.failed(&error))
    }

    /// What an error means for the caller. All but a script that met something unexpected is worth another try.
    fn failed(&self, error: &RedisError) -> LedgerError {
        self.link.suspect();
        let text = describe(error);
        // Only what lies in the app's own keys. A missing permission, say, is the operator's, and holds.
        match error.code() {
            Some("CORRUPT" | "WRONGTYPE") => LedgerError::Corrupt(text),
            _ => LedgerError::Unavailable(text),
        }
    }

    /// One portion of the broadcasts from `highest` down to `lowest`: `most` entries of the log, and what is retained among them.
    async fn history(
        &self,
        app: &AppKey,
        (lowest, highest): (BroadcastId, BroadcastId),
        kind: Kind,
        most: usize,
    ) -> Result<History, LedgerError> {
        let mut live = self.link.get()?;
        let kind = match kind {
            Kind::All => "all",
            Kind::Retained => "retained",
            Kind::OnlineOnly => "online",
        };
        let keys = [self.keys.log(app), self.keys.retained(app)];
        let arguments = arguments(keys, [&lowest.to_string(), &highest.to_string(), kind, most.to_string().as_str()]);
        let value = self.run(&mut live, |scripts| &scripts.history, &arguments).await?;
        let (now_ms, log, retained, following): (u64, Vec<Vec<u8>>, Vec<Vec<u8>>, u64) = read(value)?;
        let is_broadcast = |envelope: &Envelope| matches!(envelope.content, Content::Broadcast { .. });
        let mut envelopes: Vec<_> = stored(app, log).into_iter().map(|stored| stored.envelope).collect();
        envelopes.retain(is_broadcast);
        let logged: HashSet<_> = envelopes.iter().map(|envelope| envelope.id).collect();
        let retained = stored(app, retained).into_iter().map(|stored| stored.envelope);
        envelopes.extend(
            retained.filter(|envelope| {
                is_broadcast(envelope) && !envelope.expired(now_ms) && !logged.contains(&envelope.id)
            }),
        );
        envelopes.sort_unstable_by_key(|envelope| std::cmp::Reverse(envelope.id));
        Ok(History { envelopes, following })
    }

    async fn change(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<(), LedgerError>>) -> Change,
    ) -> Result<(), LedgerError> {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let gone = || LedgerError::Unavailable("no feed is open".into());
        let changes = changes.ok_or_else(gone)?;
        let (answer, result) = oneshot::channel();
        changes.send(make(answer)).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

/// A portion of the broadcasts.
struct History {
    /// Newest first.
    envelopes: Vec<Envelope>,
    /// Where the next portion begins; 0: this was the last.
    following: BroadcastId,
}

fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

/// Those whose answer is that the server does not know the script.
fn unknown_script(indices: impl Iterator<Item = usize>, answers: &[Result<Value, RedisError>]) -> Vec<usize> {
    indices.filter(|index| matches!(answers.get(*index), Some(Err(error)) if is_unknown_script(error))).collect()
}

impl Ledger for RedisLedger {
    fn accept<'a>(&'a self, batch: &'a [Submission]) -> BoxFuture<'a, Vec<Result<Decision, LedgerError>>> {
        self.accept_batch(batch).boxed()
    }

    fn recall<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Recalled>> {
        async move {
            let mut live = self.link.get()?;
            let keys = [self.keys.meta(app), self.keys.log(app), self.keys.retained(app), self.keys.nodes(app)];
            let arguments = arguments(
                keys,
                [
                    live.generation.0.as_ref(),
                    &id.to_string(),
                    self.publish_command(),
                    &self.keys.channel_prefix(app).to_string(),
                    &self.ledger.log_length.to_string(),
                    &self.log_ms().to_string(),
                ],
            );
            let answer: Vec<u64> = read(self.run(&mut live, |scripts| &scripts.recall, &arguments).await?)?;
            match answer[..] {
                [0] => Ok(None),
                [1, recall_id, targeted, reached] => {
                    Ok(Some(Recalled { recall_id, targeted: small(targeted), reached: small(reached) }))
                }
                _ => Err(LedgerError::Corrupt("the recall script gave an unexpected answer".into())),
            }
        }
        .boxed()
    }

    fn find<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Envelope>> {
        async move { Ok(self.history(app, (id, id), Kind::All, 1).await?.envelopes.pop()) }.boxed()
    }

    fn list<'a>(&'a self, app: &'a AppKey, before: BroadcastId, limit: usize, kind: Kind) -> Answer<'a, Vec<Envelope>> {
        async move {
            let mut highest = if before == 0 { MAX_ID } else { before - 1 };
            let most = limit.clamp(HISTORY_PORTION.1, HISTORY_PORTION.0);
            let mut all = Vec::new();
            while all.len() < limit && highest > 0 {
                let portion = self.history(app, (0, highest), kind, most).await?;
                all.extend(portion.envelopes);
                highest = portion.following;
            }
            all.truncate(limit);
            Ok(all)
        }
        .boxed()
    }

    fn first_use<'a>(&'a self, app: &'a AppKey, mark: &'a str, time: Duration) -> Answer<'a, bool> {
        async move {
            let mut live = self.link.get()?;
            let mut command = redis::cmd("SET");
            command.arg(self.keys.used(app, mark)).arg("").arg("NX").arg("PX").arg(time.as_millis().max(1).to_string());
            let set: Option<String> =
                command.query_async(&mut live.connection).await.map_err(|error| self.failed(&error))?;
            Ok(set.is_some())
        }
        .boxed()
    }

    fn join<'a>(
        &'a self,
        app: &'a AppKey,
        node: &'a NodeName,
        lease: Duration,
        after: BroadcastId,
    ) -> Answer<'a, Snapshot> {
        async move {
            let mut live = self.link.get()?;
            let keys = [self.keys.meta(app), self.keys.log(app), self.keys.retained(app), self.keys.nodes(app)];
            let lease = lease.as_millis().to_string();
            let most = if after == 0 { JOIN_LOG } else { BACKFILL_PORTION }.to_string();
            let mut earlier = Vec::new();
            let mut position = after;
            // Each portion is an answer of its own, so that a long one is never asked for again and again in vain.
            loop {
                let arguments = arguments(keys, [&*node.0, &lease, &position.to_string(), &most]);
                let value = self.run(&mut live, |scripts| &scripts.join, &arguments).await?;
                let (now_ms, head, log, retained, logged, reached): (u64, u64, Vec<_>, Vec<_>, i64, u64) = read(value)?;
                earlier.extend(stored(app, log));
                if reached > position {
                    position = reached;
                    continue;
                }
                return Ok(Snapshot {
                    now_ms,
                    head,
                    generation: live.generation,
                    log: earlier,
                    retained: stored(app, retained),
                    logged: u64::try_from(logged).ok(),
                });
            }
        }
        .boxed()
    }

    fn renew<'a>(
        &'a self,
        apps: &'a [AppKey],
        node: &'a NodeName,
        lease: Duration,
    ) -> BoxFuture<'a, Vec<Result<Renewal, LedgerError>>> {
        async move {
            let live = match self.link.get() {
                Ok(live) => live,
                Err(error) => return apps.iter().map(|_| Err(error.clone())).collect(),
            };
            let lease = lease.as_millis().to_string();
            // All at once: the multiplexed connection writes them together.
            join_all(apps.iter().map(|app| {
                let mut live = live.clone();
                let lease = &lease;
                async move {
                    let keys = [self.keys.meta(app), self.keys.log(app), self.keys.nodes(app)];
                    let arguments = arguments(keys, [node.0.as_ref(), lease]);
                    let (now_ms, head) = read(self.run(&mut live, |scripts| &scripts.renew, &arguments).await?)?;
                    Ok(Renewal { now_ms, head, generation: live.generation })
                }
            }))
            .await
        }
        .boxed()
    }

    fn leave<'a>(&'a self, app: &'a AppKey, node: &'a NodeName) -> Answer<'a, ()> {
        async move {
            let mut live = self.link.get()?;
            let mut command = redis::cmd("ZREM");
            command.arg(self.keys.nodes(app)).arg(&*node.0);
            command.query_async(&mut live.connection).await.map_err(|error| self.failed(&error))
        }
        .boxed()
    }

    fn restore<'a>(
        &'a self,
        app: &'a AppKey,
        head: BroadcastId,
        retained: &'a [Stored],
        recalled: &'a [BroadcastId],
    ) -> Answer<'a, u32> {
        async move {
            let mut live = self.link.get()?;
            let keys = [self.keys.meta(app), self.keys.log(app), self.keys.retained(app), self.keys.nodes(app)];
            let mut arguments = arguments(
                keys,
                [
                    &head.to_string(),
                    self.publish_command(),
                    &self.keys.channel_prefix(app).to_string(),
                    &recalled.len().to_string(),
                ],
            );
            recalled.iter().for_each(|id| {
                arguments.arg(id);
            });
            retained.iter().for_each(|stored| {
                arguments.arg(&*stored.raw);
            });
            read(self.run(&mut live, |scripts| &scripts.restore, &arguments).await?)
        }
        .boxed()
    }

    fn open_feed(&self, node: &NodeName) -> mpsc::Receiver<Feed> {
        let (changes, receiver) = mpsc::channel(CHANGES);
        let (subscription, feed) =
            Subscription::new(self.settings.clone(), self.keys.clone(), node.clone(), receiver, self.link.watch());
        tokio::spawn(subscription.run());
        *self.changes.lock().unwrap_or_else(PoisonError::into_inner) = Some(changes);
        feed
    }

    fn subscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        self.change(|answer| Change::Subscribe(app.clone(), answer)).boxed()
    }

    fn unsubscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        self.change(|answer| Change::Unsubscribe(app.clone(), answer)).boxed()
    }

    fn health(&self) -> watch::Receiver<Result<(), String>> {
        self.health.clone()
    }
}

/// The accept script's text, for the benchmark's floor: a consumer that calls it and does nothing else.
#[doc(hidden)]
#[must_use]
pub fn accept_script() -> String {
    Scripts::new(None, &super::Generation("".into())).accept.text
}
