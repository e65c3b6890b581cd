//! For the node's tests: a ledger in memory that can be made to lose things, and devices.

mod device;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use jsonwebtoken::{EncodingKey, Header};
use tokio::sync::{Notify, mpsc, watch};

pub use self::device::Device;

use crate::broadcast::app::{App, AppKey, Directory};
use crate::broadcast::envelope::{self, Content, Envelope};
use crate::broadcast::quota::Limits;
use crate::broadcast::request::Submission;
use crate::broadcast::retention::MAX_RETAINED;
use crate::broadcast::verdict::Decision;
use crate::broadcast::{BroadcastId, next_id};
use crate::ledger::{
    Answer, FEED_CAPACITY, Feed, Generation, Kind, Ledger, LedgerError, NodeName, Recalled, Renewal, Snapshot, Stored,
};

/// The apps `demo` and `other`.
pub fn directory() -> Directory {
    let app = |key: &str| App {
        key: AppKey::parse(key).unwrap(),
        secret: format!("{key}-secret").into(),
        broadcast: key == "demo",
        limits: Limits::default(),
    };
    Directory::new([app("demo"), app("other")]).unwrap()
}

/// A token of `account` for `app` that holds for so many seconds from now.
pub fn token(app: &str, account: &str, seconds: i64) -> String {
    let now = i64::try_from(jsonwebtoken::get_current_timestamp()).unwrap();
    let claims = serde_json::json!({ "aud": app, "sub": account, "exp": now + seconds });
    let key = EncodingKey::from_secret(format!("{app}-secret").as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
}

/// What a test broadcasts.
#[derive(Clone, Copy)]
pub struct Said {
    pub body: &'static str,
    /// `None`: for online devices only.
    pub ttl_ms: Option<u64>,
    pub targets: Option<&'static str>,
    /// Whether it is published, or lost on the way.
    pub arrives: bool,
}

pub const fn online(body: &'static str) -> Said {
    Said { body, ttl_ms: None, targets: None, arrives: true }
}

pub const fn retained(body: &'static str) -> Said {
    Said { ttl_ms: Some(3_600_000), ..online(body) }
}

#[derive(Default)]
struct State {
    now_ms: u64,
    generation: u32,
    apps: HashMap<AppKey, Chain>,
    subscribed: HashSet<AppKey>,
    /// Subscriptions that look alive and bring nothing.
    dead: HashSet<AppKey>,
    feed: Option<mpsc::Sender<Feed>>,
    is_down: bool,
    is_broken: bool,
    joins: usize,
    left: Vec<AppKey>,
    restored: Vec<(BroadcastId, usize, Vec<BroadcastId>)>,
    /// Said between the next subscription and the snapshot that follows it.
    at_join: Option<(AppKey, Said)>,
}

#[derive(Default, Clone)]
struct Chain {
    head: BroadcastId,
    log: Vec<Stored>,
    retained: Vec<Stored>,
}

/// The ledger. Its clock is an hour ahead of the system's, as an honest test of whose clock counts.
pub struct FakeLedger {
    state: Mutex<State>,
    health: watch::Sender<Result<(), String>>,
    changed: Notify,
}

impl FakeLedger {
    pub fn new() -> Arc<Self> {
        let now_ms = jsonwebtoken::get_current_timestamp() * 1000 + 3_600_000;
        let state = State { now_ms, ..State::default() };
        Arc::new(Self { state: Mutex::new(state), health: watch::channel(Ok(())).0, changed: Notify::new() })
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let result = act(&mut self.state.lock().unwrap());
        self.changed.notify_waiters();
        result
    }

    /// Waits until the ledger's state is as wanted.
    async fn until(&self, what: &str, check: impl Fn(&State) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if check(&self.state.lock().unwrap()) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap_or_else(|_| panic!("never happened: {what}"));
    }

    /// Accepts a broadcast of `app`.
    pub fn say(&self, app: &str, said: Said) -> BroadcastId {
        let app = AppKey::parse(app).unwrap();
        self.with(|state| state.say(&app, said))
    }

    /// Deletes one.
    pub fn recall_now(&self, app: &str, target: BroadcastId) {
        let app = AppKey::parse(app).unwrap();
        self.with(|state| {
            let chain = state.apps.entry(app.clone()).or_default();
            let id = next_id(chain.head, state.now_ms * 1000, false);
            let raw: Arc<[u8]> = envelope::recall(id, chain.head, state.now_ms, target).into_bytes().into();
            chain.retained.retain(|stored| stored.envelope.id != target);
            state.store(&app, raw, true);
        });
    }

    /// Says this between the node's next subscription and its snapshot.
    pub fn say_at_join(&self, app: &str, said: Said) {
        self.with(|state| state.at_join = Some((AppKey::parse(app).unwrap(), said)));
    }

    /// Lets the log forget all but the newest entry.
    pub fn trim(&self, app: &str) {
        self.with(|state| {
            let log = &mut state.apps.get_mut(app).unwrap().log;
            log.drain(..log.len() - 1);
        });
    }

    /// From now on the subscription brings nothing, until it is made anew.
    pub fn kill_subscription(&self, app: &str) {
        self.with(|state| state.dead.insert(AppKey::parse(app).unwrap()));
    }

    /// Loses everything and begins another life.
    pub fn lose_everything(&self) {
        self.with(|state| {
            state.apps.clear();
            state.generation += 1;
        });
    }

    pub fn set_down(&self, is_down: bool) {
        self.with(|state| state.is_down = is_down);
    }

    /// From now on every call panics.
    pub fn break_down(&self) {
        self.with(|state| state.is_broken = true);
    }

    pub fn advance_clock(&self, ms: u64) {
        self.with(|state| state.now_ms += ms);
    }

    pub fn interrupt(&self) {
        self.with(|state| state.feed.as_ref().unwrap().try_send(Feed::Interrupted).unwrap());
    }

    pub fn joins(&self) -> usize {
        self.with(|state| state.joins)
    }

    pub fn head(&self, app: &str) -> BroadcastId {
        self.with(|state| state.apps[app].head)
    }

    pub async fn until_left(&self, app: &str) {
        self.until("the lease is given up", |state| state.left.iter().any(|left| left.as_str() == app)).await;
    }

    /// Waits for something to be written back: head, how many retained, what was deleted.
    pub async fn until_restored(&self) -> (BroadcastId, usize, Vec<BroadcastId>) {
        self.until("something is written back", |state| !state.restored.is_empty()).await;
        self.with(|state| state.restored[0].clone())
    }
}

impl State {
    fn say(&mut self, app: &AppKey, said: Said) -> BroadcastId {
        let head = self.apps.entry(app.clone()).or_default().head;
        let id = next_id(head, self.now_ms * 1000, false);
        let expires_ms = said.ttl_ms.map_or(0, |ttl_ms| self.now_ms + ttl_ms);
        let targets = said.targets.map_or(String::new(), |os| format!(r#","targetOs":["{os}"]"#));
        let tail = format!(r#""requestId":"r-{id}","from":"ops","body":"{}"{targets}}}"#, said.body);
        let raw = envelope::broadcast(id, head, self.now_ms, expires_ms, &tail);
        self.store(app, raw.into_bytes().into(), said.arrives);
        id
    }

    fn store(&mut self, app: &AppKey, raw: Arc<[u8]>, arrives: bool) {
        let stored = Stored { envelope: Envelope::read(&raw).unwrap(), raw };
        let chain = self.apps.entry(app.clone()).or_default();
        chain.head = stored.envelope.id;
        chain.log.push(stored.clone());
        if stored.envelope.expires_ms != 0 && matches!(stored.envelope.content, Content::Broadcast { .. }) {
            chain.retained.push(stored.clone());
            let extra = chain.retained.len().saturating_sub(MAX_RETAINED);
            chain.retained.drain(..extra);
        }
        if arrives
            && self.subscribed.contains(app)
            && !self.dead.contains(app)
            && let Some(feed) = &self.feed
        {
            feed.try_send(Feed::Published(app.clone(), stored.raw)).unwrap();
        }
    }

    fn check(&self) -> Result<(), LedgerError> {
        assert!(!self.is_broken, "broken for the test");
        if self.is_down { Err(LedgerError::Unavailable("down for the test".into())) } else { Ok(()) }
    }

    fn generation(&self) -> Generation {
        Generation(self.generation.to_string().into())
    }
}

impl Ledger for FakeLedger {
    fn accept<'a>(&'a self, _: &'a [Submission]) -> BoxFuture<'a, Vec<Result<Decision, LedgerError>>> {
        unimplemented!("the node does not accept")
    }

    fn recall<'a>(&'a self, _: &'a AppKey, _: BroadcastId) -> Answer<'a, Option<Recalled>> {
        unimplemented!("the node does not recall")
    }

    fn find<'a>(&'a self, _: &'a AppKey, _: BroadcastId) -> Answer<'a, Option<Envelope>> {
        unimplemented!("the node does not search")
    }

    fn list<'a>(&'a self, _: &'a AppKey, _: BroadcastId, _: usize, _: Kind) -> Answer<'a, Vec<Envelope>> {
        unimplemented!("the node does not list")
    }

    fn join<'a>(&'a self, app: &'a AppKey, _: &'a NodeName, _: Duration, after: BroadcastId) -> Answer<'a, Snapshot> {
        Box::pin(async move {
            self.with(|state| {
                state.check()?;
                state.joins += 1;
                if let Some((at, said)) = state.at_join.take() {
                    state.say(&at, said);
                }
                let chain = state.apps.get(app).cloned().unwrap_or_default();
                Ok(Snapshot {
                    now_ms: state.now_ms,
                    head: chain.head,
                    generation: state.generation(),
                    log: chain.log.into_iter().filter(|stored| stored.envelope.id > after).collect(),
                    retained: chain.retained.into_iter().filter(|s| !s.envelope.expired(state.now_ms)).collect(),
                    logged: None,
                })
            })
        })
    }

    fn renew<'a>(
        &'a self,
        apps: &'a [AppKey],
        _: &'a NodeName,
        _: Duration,
    ) -> BoxFuture<'a, Vec<Result<Renewal, LedgerError>>> {
        Box::pin(async move {
            self.with(|state| {
                apps.iter()
                    .map(|app| {
                        state.check()?;
                        let head = state.apps.get(app).map_or(0, |chain| chain.head);
                        Ok(Renewal { now_ms: state.now_ms, head, generation: state.generation() })
                    })
                    .collect()
            })
        })
    }

    fn leave<'a>(&'a self, app: &'a AppKey, _: &'a NodeName) -> Answer<'a, ()> {
        Box::pin(async move {
            self.with(|state| {
                state.left.push(app.clone());
                state.check()
            })
        })
    }

    fn restore<'a>(
        &'a self,
        app: &'a AppKey,
        head: BroadcastId,
        retained: &'a [Stored],
        recalled: &'a [BroadcastId],
    ) -> Answer<'a, u32> {
        Box::pin(async move {
            self.with(|state| {
                state.check()?;
                state.restored.push((head, retained.len(), recalled.to_vec()));
                let chain = state.apps.entry(app.clone()).or_default();
                chain.head = chain.head.max(head);
                chain.retained.retain(|stored| !recalled.contains(&stored.envelope.id));
                let missing: Vec<_> =
                    retained.iter().filter(|stored| !chain.retained.contains(stored)).cloned().collect();
                let count = missing.len();
                chain.retained.extend(missing);
                chain.retained.sort_by_key(|stored| stored.envelope.id);
                Ok(u32::try_from(count).unwrap())
            })
        })
    }

    fn open_feed(&self, _: &NodeName) -> mpsc::Receiver<Feed> {
        let (sender, receiver) = mpsc::channel(FEED_CAPACITY);
        self.with(|state| state.feed = Some(sender));
        receiver
    }

    fn subscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        Box::pin(async move {
            self.with(|state| {
                state.check()?;
                state.subscribed.insert(app.clone());
                Ok(())
            })
        })
    }

    fn unsubscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        Box::pin(async move {
            self.with(|state| {
                state.check()?;
                state.subscribed.remove(app);
                state.dead.remove(app);
                Ok(())
            })
        })
    }

    fn first_use<'a>(&'a self, _: &'a AppKey, _: &'a str, _: Duration) -> Answer<'a, bool> {
        unimplemented!("the API's")
    }

    fn health(&self) -> watch::Receiver<Result<(), String>> {
        self.health.subscribe()
    }
}
