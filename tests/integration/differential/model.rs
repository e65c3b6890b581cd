//! The rules once more, as plainly as they can be said: lists and maps, nothing bounded, nothing durable. What the real
//! ledgers are compared with where a second one is not at hand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use broadcastd::broadcast::BroadcastId;
use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::envelope::{self, Content, Envelope};
use broadcastd::broadcast::request::Submission;
use broadcastd::broadcast::verdict::{Accepted, Decision, Limit, Refusal};
use broadcastd::ledger::{
    Answer, Feed, Generation, Kind, Ledger, LedgerError, NodeName, Recalled, Renewal, Snapshot, Stored,
};
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use super::Subject;

#[derive(Default)]
pub struct Model(Mutex<State>);

#[derive(Default)]
struct State {
    now_us: u64,
    generation: String,
    apps: BTreeMap<String, App>,
    feed: Option<(NodeName, mpsc::Sender<Feed>)>,
    subscribed: BTreeSet<String>,
}

#[derive(Default)]
struct App {
    /// Marks that were used, each until a time in ms.
    used: BTreeMap<String, u64>,
    /// Head, generation, the one before.
    meta: Option<(u64, String, String)>,
    /// The second of every broadcast, and the day of the last with how many it had.
    seconds: Vec<u64>,
    day: (u64, u32),
    log: BTreeMap<u64, Arc<[u8]>>,
    retained: BTreeMap<u64, (u64, Arc<[u8]>)>,
    /// Remembered until, content hash, verdict.
    requests: BTreeMap<String, (u64, String, Accepted)>,
    leases: BTreeMap<String, u64>,
}

impl Subject for Model {
    fn ledger(&self) -> &dyn Ledger {
        self
    }

    async fn set_clock_us(&self, now_us: u64) {
        self.lock().now_us = now_us;
    }

    async fn set_generation(&self, generation: &str) {
        generation.clone_into(&mut self.lock().generation);
    }
}

impl Model {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl App {
    fn charge(&mut self, now_us: u64, submission: &Submission) -> Result<(), Refusal> {
        let (second, limits) = (now_us / 1_000_000, submission.limits);
        let latest = second.max(self.seconds.last().copied().unwrap_or(0));
        let recent: Vec<u64> = self.seconds.iter().copied().filter(|at| at + 61 > latest).collect();
        let day = self.day.0.max(second / 86_400);
        let today = if day == self.day.0 { self.day.1 } else { 0 };
        if today >= limits.per_day {
            return Err(Refusal { limit: Limit::Day, retry_after: (day + 1) * 86_400 - second });
        }
        let most = limits.per_minute as usize;
        if recent.len() >= most {
            // Room comes when so many of the oldest have left that fewer than the limit remain.
            let retry_after = recent[recent.len() - most] + 61 - second;
            return Err(Refusal { limit: Limit::Minute, retry_after });
        }
        self.seconds.push(latest);
        self.day = (day, today + 1);
        Ok(())
    }

    fn next(&mut self, now_us: u64, generation: &str) -> (u64, u64) {
        let (head, current, before) = self.meta.take().unwrap_or_default();
        let same = [&current, &before].into_iter().any(|known| known == generation);
        let id = (head + 1).max(now_us + if same { 0 } else { 60_000_000 });
        self.meta = Some(if same { (id, current, before) } else { (id, generation.to_owned(), current) });
        (id, head)
    }

    fn trim(&mut self, now_ms: u64) {
        self.retained.retain(|_, (expires_ms, _)| *expires_ms > now_ms);
        while self.retained.len() > 100 {
            self.retained.pop_first();
        }
    }

    fn valid(&self, id: u64, now_ms: u64) -> Option<&Arc<[u8]>> {
        self.retained.get(&id).filter(|(expires_ms, _)| *expires_ms > now_ms).map(|(_, raw)| raw)
    }

    fn find(&self, id: u64, now_ms: u64) -> Option<Envelope> {
        let raw = self.log.get(&id).or_else(|| self.valid(id, now_ms))?;
        Some(Envelope::read(raw).unwrap()).filter(|envelope| !matches!(envelope.content, Content::Recall(_)))
    }
}

impl State {
    fn app(&mut self, app: &AppKey) -> &mut App {
        self.apps.entry(app.as_str().to_owned()).or_default()
    }

    fn publish(&mut self, app: &AppKey, raw: &Arc<[u8]>) -> (u32, u32) {
        let now_ms = self.now_us / 1000;
        let live: Vec<_> =
            self.app(app).leases.iter().filter(|(_, until)| **until > now_ms).map(|(node, _)| node.clone()).collect();
        let mut reached = 0;
        if let Some((node, feed)) = self.feed.as_ref().filter(|_| self.subscribed.contains(app.as_str()))
            && live.iter().any(|name| **name == *node.0)
        {
            feed.try_send(Feed::Published(app.clone(), raw.clone())).unwrap();
            reached = 1;
        }
        (live.len() as u32, reached)
    }

    fn accept(&mut self, submission: &Submission) -> Decision {
        let (now_us, now_ms, request) = (self.now_us, self.now_us / 1000, &submission.request);
        let generation = self.generation.clone();
        let app = self.app(&request.app);
        if let Some((until, hash, accepted)) = app.requests.get(&request.id)
            && *until > now_ms
        {
            let same = *hash == request.content_hash();
            return if same {
                Decision::Accepted(Accepted { repeated: true, ..*accepted })
            } else {
                Decision::Conflict
            };
        }
        if let Err(refusal) = app.charge(now_us, submission) {
            return Decision::Refused(refusal);
        }
        let (id, prev) = app.next(now_us, &generation);
        let expires_ms = request.ttl_ms.map_or(0, |ttl_ms| now_ms + ttl_ms);
        let raw: Arc<[u8]> =
            envelope::broadcast(id, prev, now_ms, expires_ms, &envelope::tail(request)).into_bytes().into();
        app.log.insert(id, raw.clone());
        if expires_ms > 0 {
            app.retained.insert(id, (expires_ms, raw.clone()));
            app.trim(now_ms);
        }
        let (targeted, reached) = self.publish(&request.app, &raw);
        let accepted = Accepted { id, time_ms: now_ms, expires_ms, targeted, reached, repeated: false };
        let remembered = (now_ms + request.dedupe_ms, request.content_hash(), accepted);
        self.app(&request.app).requests.insert(request.id.clone(), remembered);
        Decision::Accepted(accepted)
    }

    fn recall(&mut self, key: &AppKey, id: u64) -> Option<Recalled> {
        let (now_us, now_ms, generation) = (self.now_us, self.now_us / 1000, self.generation.clone());
        let app = self.app(key);
        app.find(id, now_ms)?;
        app.log.remove(&id);
        app.retained.remove(&id);
        let (recall_id, prev) = app.next(now_us, &generation);
        let raw: Arc<[u8]> = envelope::recall(recall_id, prev, now_ms, id).into_bytes().into();
        app.log.insert(recall_id, raw.clone());
        let (targeted, reached) = self.publish(key, &raw);
        Some(Recalled { recall_id, targeted, reached })
    }

    fn list(&mut self, app: &AppKey, before: u64, limit: usize, kind: Kind) -> Vec<Envelope> {
        let now_ms = self.now_us / 1000;
        let app = self.app(app);
        let ids: BTreeSet<u64> = app.log.keys().chain(app.retained.keys()).copied().collect();
        let shown = |id: &u64| match kind {
            Kind::All => true,
            Kind::Retained => app.valid(*id, now_ms).is_some(),
            Kind::OnlineOnly => app.log.get(id).is_some_and(|raw| Envelope::read(raw).unwrap().expires_ms == 0),
        };
        let ids = ids.into_iter().rev().filter(|id| (before == 0 || *id < before) && shown(id));
        ids.filter_map(|id| app.find(id, now_ms)).take(limit).collect()
    }

    fn restore(&mut self, key: &AppKey, head: u64, retained: &[Stored], recalled: &[u64]) -> u32 {
        let now_ms = self.now_us / 1000;
        let app = self.app(key);
        let meta = app.meta.get_or_insert((0, String::new(), String::new()));
        meta.0 = meta.0.max(head);
        // Deleted after what the node knows: not to come back with it.
        let later =
            app.log.range(head.saturating_add(1)..).filter_map(|(_, raw)| match Envelope::read(raw).unwrap().content {
                Content::Recall(target) => Some(target),
                Content::Broadcast { .. } | Content::Newer(_) => None,
            });
        let recalled: Vec<u64> = recalled.iter().copied().chain(later).collect();
        app.retained.retain(|id, _| !recalled.contains(id));
        let mut missing = BTreeSet::new();
        for Stored { raw, envelope } in retained {
            let (id, expires_ms) = (envelope.id, envelope.expires_ms);
            if expires_ms > now_ms && !recalled.contains(&id) && !app.retained.contains_key(&id) {
                app.retained.insert(id, (expires_ms, raw.clone()));
                missing.insert(id);
            }
        }
        app.trim(now_ms);
        missing.iter().filter(|id| app.retained.contains_key(id)).count() as u32
    }

    fn lease(&mut self, app: &AppKey, node: &NodeName, lease: Duration) -> Renewal {
        let now_ms = self.now_us / 1000;
        let generation = Generation(self.generation.as_str().into());
        let app = self.app(app);
        app.leases.insert(node.0.to_string(), now_ms + lease.as_millis() as u64);
        Renewal { now_ms, head: app.meta.as_ref().map_or(0, |meta| meta.0), generation }
    }

    fn join(&mut self, key: &AppKey, node: &NodeName, lease: Duration, after: u64) -> Snapshot {
        let now_ms = self.now_us / 1000;
        self.app(key).leases.retain(|_, until| *until > now_ms);
        let Renewal { now_ms, head, generation } = self.lease(key, node, lease);
        let app = self.app(key);
        let stored = |raw: &Arc<[u8]>| Stored { raw: raw.clone(), envelope: Envelope::read(raw).unwrap() };
        let mut log: Vec<_> = app.log.range(after + 1..).map(|(_, raw)| stored(raw)).collect();
        if after == 0 {
            log.drain(..log.len().saturating_sub(1000));
        }
        let retained = app.retained.values().filter(|(until, _)| *until > now_ms).map(|(_, raw)| stored(raw)).collect();
        Snapshot { now_ms, head, generation, log, retained, logged: None }
    }
}

fn ready<'a, T: Send + 'a>(value: T) -> BoxFuture<'a, T> {
    Box::pin(std::future::ready(value))
}

impl Ledger for Model {
    fn accept<'a>(&'a self, batch: &'a [Submission]) -> BoxFuture<'a, Vec<Result<Decision, LedgerError>>> {
        let mut state = self.lock();
        ready(batch.iter().map(|submission| Ok(state.accept(submission))).collect())
    }

    fn first_use<'a>(&'a self, app: &'a AppKey, mark: &'a str, time: Duration) -> Answer<'a, bool> {
        let mut state = self.lock();
        let now_ms = state.now_us / 1000;
        let used = &mut state.app(app).used;
        let first = used.get(mark).is_none_or(|until| *until <= now_ms);
        if first {
            used.insert(mark.to_owned(), now_ms + time.as_millis() as u64);
        }
        ready(Ok(first))
    }

    fn recall<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Recalled>> {
        ready(Ok(self.lock().recall(app, id)))
    }

    fn find<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Envelope>> {
        let mut state = self.lock();
        let now_ms = state.now_us / 1000;
        ready(Ok(state.app(app).find(id, now_ms)))
    }

    fn list<'a>(&'a self, app: &'a AppKey, before: BroadcastId, limit: usize, kind: Kind) -> Answer<'a, Vec<Envelope>> {
        ready(Ok(self.lock().list(app, before, limit, kind)))
    }

    fn join<'a>(
        &'a self,
        app: &'a AppKey,
        node: &'a NodeName,
        lease: Duration,
        after: BroadcastId,
    ) -> Answer<'a, Snapshot> {
        ready(Ok(self.lock().join(app, node, lease, after)))
    }

    fn renew<'a>(
        &'a self,
        apps: &'a [AppKey],
        node: &'a NodeName,
        lease: Duration,
    ) -> BoxFuture<'a, Vec<Result<Renewal, LedgerError>>> {
        let mut state = self.lock();
        ready(apps.iter().map(|app| Ok(state.lease(app, node, lease))).collect())
    }

    fn leave<'a>(&'a self, app: &'a AppKey, node: &'a NodeName) -> Answer<'a, ()> {
        self.lock().app(app).leases.remove(&*node.0);
        ready(Ok(()))
    }

    fn restore<'a>(
        &'a self,
        app: &'a AppKey,
        head: BroadcastId,
        retained: &'a [Stored],
        recalled: &'a [BroadcastId],
    ) -> Answer<'a, u32> {
        ready(Ok(self.lock().restore(app, head, retained, recalled)))
    }

    fn open_feed(&self, node: &NodeName) -> mpsc::Receiver<Feed> {
        let (sender, receiver) = mpsc::channel(100_000);
        self.lock().feed = Some((node.clone(), sender));
        receiver
    }

    fn subscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        self.lock().subscribed.insert(app.as_str().to_owned());
        ready(Ok(()))
    }

    fn unsubscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        self.lock().subscribed.remove(app.as_str());
        ready(Ok(()))
    }

    fn health(&self) -> watch::Receiver<Result<(), String>> {
        watch::Sender::new(Ok(())).subscribe()
    }
}
