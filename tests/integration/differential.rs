//! Two ledgers, one generated sequence of operations, one virtual clock: every answer and every published envelope must be
//! the same, ids included.
//!
//! The clock starts in the year 2100, so that a key which Redis expires by its own clock outlives the test. It moves mostly
//! in steps of half a second, as do leases and validities, so that "exactly at its time" happens often.

#![allow(clippy::unwrap_used)] // a test

mod model;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::envelope::{self, Envelope};
use broadcastd::broadcast::platform::Platforms;
use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{MAX_DEDUPE_MS, Request, Submission};
use broadcastd::broadcast::verdict::Decision;
use broadcastd::ledger::embedded::EmbeddedLedger;
use broadcastd::ledger::redis::{Mode, RedisLedger, RedisSettings};
use broadcastd::ledger::{Feed, Kind, Ledger, LedgerSettings, NodeName, Snapshot, Stored};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use tokio::sync::mpsc;

use self::model::Model;
use crate::support::redis::Redis;

/// A ledger whose time and generation the test sets.
pub trait Subject {
    fn ledger(&self) -> &dyn Ledger;
    /// Microseconds since the Unix epoch.
    async fn set_clock_us(&self, now_us: u64);
    async fn set_generation(&self, generation: &str);
}

struct Embedded {
    ledger: EmbeddedLedger,
    now_us: Arc<AtomicU64>,
}

impl Embedded {
    fn new() -> Self {
        let now_us = Arc::new(AtomicU64::new(0));
        let clock = now_us.clone();
        let ledger = EmbeddedLedger::in_memory(SETTINGS, Arc::new(move || clock.load(Ordering::SeqCst))).unwrap();
        Self { ledger, now_us }
    }
}

impl Subject for Embedded {
    fn ledger(&self) -> &dyn Ledger {
        &self.ledger
    }

    async fn set_clock_us(&self, now_us: u64) {
        self.now_us.store(now_us, Ordering::SeqCst);
    }

    async fn set_generation(&self, generation: &str) {
        self.ledger.set_generation(generation);
    }
}

/// The log is never trimmed: Redis trims approximately, so the ledgers may differ there.
const SETTINGS: LedgerSettings = LedgerSettings { log_length: 100_000, log_hours: 1_000_000 };

#[test]
fn the_embedded_ledger_keeps_the_rules() {
    run(96, async || Embedded::new(), async || Model::default());
}

#[test]
fn both_ledgers_answer_alike() {
    run(64, async || Embedded::new(), OnRedis::new);
}

/// The Redis ledger, on the shared server under a prefix of its own.
struct OnRedis {
    ledger: RedisLedger,
    clock: redis::aio::MultiplexedConnection,
    clock_key: String,
}

impl OnRedis {
    async fn new() -> Self {
        let prefix = Redis::prefix();
        let clock_key = format!("{prefix}clock");
        let settings = RedisSettings {
            url: Redis::shared().url().into(),
            url_file: String::new(),
            mode: Mode::Single,
            sentinel_service: String::new(),
            sentinel_username: String::new(),
            sentinel_password: String::new().into(),
            sentinel_password_file: String::new(),
            key_prefix: prefix,
            ca_file: String::new(),
            connect_timeout_ms: 5000,
            response_timeout_ms: 30_000,
            test_clock_key: Some(clock_key.clone()),
        };
        let ledger = RedisLedger::start(settings, SETTINGS);
        ledger.health().wait_for(Result::is_ok).await.unwrap();
        let client = redis::Client::open(Redis::shared().url()).unwrap();
        let clock = client.get_multiplexed_async_connection().await.unwrap();
        Self { ledger, clock, clock_key }
    }
}

impl Subject for OnRedis {
    fn ledger(&self) -> &dyn Ledger {
        &self.ledger
    }

    async fn set_clock_us(&self, now_us: u64) {
        let mut set = redis::cmd("SET");
        set.arg(&self.clock_key).arg(now_us);
        set.query_async(&mut self.clock.clone()).await.unwrap()
    }

    async fn set_generation(&self, generation: &str) {
        self.ledger.set_generation(generation);
    }
}

/// Runs generated sequences on fresh pairs; `PROPTEST_CASES` overrides how many.
fn run<A: Subject, B: Subject>(cases: u32, first: impl AsyncFn() -> A, second: impl AsyncFn() -> B) {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(cases);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    TestRunner::new(config)
        .run(&proptest::collection::vec(operation(), 1..100), |operations| {
            runtime.block_on(async { agree(&first().await, &second().await, &operations).await })
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[derive(Debug, Clone)]
enum Operation {
    Accept(Vec<Sending>),
    /// So many retained ones at once, each under an id of its own.
    Burst(usize, u64),
    Recall(usize, Pick),
    Find(usize, Pick),
    List(usize, Pick, usize, Kind),
    Join(usize, usize, u64, Pick),
    Renew(Vec<usize>, usize, u64),
    Leave(usize, usize),
    Subscribe(usize),
    Unsubscribe(usize),
    /// Head, retained, recalled; and whether the first of the retained is among the recalled.
    Restore(usize, Pick, Vec<Lost>, Vec<Pick>, bool),
    Clock(i64),
    /// To the moment when the app's nth last envelope expires, or a millisecond beside it; and a look for it.
    Expiry(usize, usize, i64),
    Generation(usize),
}

#[derive(Debug, Clone)]
struct Sending {
    app: usize,
    request_id: usize,
    body: usize,
    ttl_ms: Option<u64>,
    dedupe_ms: u64,
    limits: Limits,
}

/// An id: none, the nth last that was given away for the app (or one beside it), or one from this long ago.
#[derive(Debug, Clone)]
enum Pick {
    None,
    Known(usize, i64),
    Ago(u64),
}

/// A broadcast that a node writes back: one that it was given, or one that nobody else knows.
#[derive(Debug, Clone)]
enum Lost {
    Known(usize),
    Made(u64, u64),
}

const APPS: [&str; 3] = ["a", "b.c", "D_1"];
const NODES: [&str; 3] = ["node-0", "node-1", "node-2"];
const HALF_SECOND: u64 = 500;
const DAY_MS: u64 = 86_400_000;

fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let (app, node) = (0..APPS.len(), 0..NODES.len());
    let kind = select(vec![Kind::All, Kind::Retained, Kind::OnlineOnly]);
    let limit = prop_oneof![0usize..5, Just(100), Just(1000)];
    let lost = prop_oneof![
        3 => proptest::collection::vec(lost(), 0..5),
        1 => proptest::collection::vec(lost(), 90..130),
    ];
    prop_oneof![
        30 => proptest::collection::vec(sending(), 1..4).prop_map(O::Accept),
        3 => (40usize..110, time()).prop_map(|(count, ttl)| O::Burst(count, ttl)),
        6 => (app.clone(), pick()).prop_map(|(app, id)| O::Recall(app, id)),
        6 => (app.clone(), pick()).prop_map(|(app, id)| O::Find(app, id)),
        8 => (app.clone(), pick(), limit, kind).prop_map(|(app, id, limit, kind)| O::List(app, id, limit, kind)),
        8 => (app.clone(), node.clone(), time(), pick()).prop_map(|(app, node, lease, id)| O::Join(app, node, lease, id)),
        4 => (proptest::collection::vec(app.clone(), 0..4), node.clone(), time())
            .prop_map(|(apps, node, lease)| O::Renew(apps, node, lease)),
        2 => (app.clone(), node).prop_map(|(app, node)| O::Leave(app, node)),
        3 => app.clone().prop_map(O::Subscribe),
        1 => app.clone().prop_map(O::Unsubscribe),
        4 => (app, pick(), lost, proptest::collection::vec(pick(), 0..3), any::<bool>())
            .prop_map(|(app, head, lost, recalled, first)| O::Restore(app, head, lost, recalled, first)),
        6 => (0..APPS.len(), 0usize..12, select(vec![0, 0, 0, 0, -1, 1]))
            .prop_map(|(app, nth, beside_ms)| O::Expiry(app, nth, beside_ms)),
        16 => step().prop_map(O::Clock),
        2 => (0usize..4).prop_map(O::Generation),
    ]
}

fn sending() -> impl Strategy<Value = Sending> {
    let limits = select(vec![(3, 5), (3, 1000), (10, 12), (u32::MAX, u32::MAX)])
        .prop_map(|(per_minute, per_day)| Limits { per_minute, per_day });
    let dedupe_ms = prop_oneof![Just(MAX_DEDUPE_MS), time()];
    (0..APPS.len(), 0usize..12, 0usize..8, proptest::option::of(time()), dedupe_ms, limits).prop_map(
        |(app, request_id, body, ttl_ms, dedupe_ms, limits)| {
            // One content in four is another, so that both repetitions and conflicts come up.
            Sending {
                app,
                request_id,
                body: body / 6,
                ttl_ms: ttl_ms.filter(|_| request_id % 3 != 0),
                dedupe_ms,
                limits,
            }
        },
    )
}

/// A validity in ms: few different ones, so that a request comes again unchanged.
fn time() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => select(vec![2 * HALF_SECOND, 4 * HALF_SECOND, 60 * HALF_SECOND]),
        3 => select(vec![3_600_000, DAY_MS, 30 * DAY_MS]),
    ]
}

/// A step of the clock, in µs.
fn step() -> impl Strategy<Value = i64> {
    let half = HALF_SECOND as i64 * 1000;
    prop_oneof![
        8 => (1i64..8).prop_map(move |steps| steps * half),
        3 => (1i64..200).prop_map(move |steps| steps * half),
        2 => 1i64..2_000_000,
        2 => (1i64..50).prop_map(|hours| hours * 3_600_000_000),
        1 => (1i64..9).prop_map(|days| days * 86_400_000_000),
        2 => (1i64..4).prop_map(move |steps| -steps * half),
        1 => -300_000i64..0,
    ]
}

fn pick() -> impl Strategy<Value = Pick> {
    prop_oneof![
        2 => Just(Pick::None),
        8 => (0usize..12, prop_oneof![6 => Just(0i64), 1 => -1i64..2]).prop_map(|(nth, beside)| Pick::Known(nth, beside)),
        1 => (0u64..200).prop_map(|steps| Pick::Ago(steps * HALF_SECOND * 1000)),
    ]
}

fn lost() -> impl Strategy<Value = Lost> {
    prop_oneof![
        (0usize..120).prop_map(Lost::Known),
        (0u64..200_000_000, time()).prop_map(|(ago_us, ttl_ms)| Lost::Made(ago_us, ttl_ms)),
    ]
}

/// What the run has learnt so far; the same for both.
struct Known {
    now_us: u64,
    bursts: usize,
    /// By app: the ids given away, and the envelopes seen.
    ids: [Vec<u64>; APPS.len()],
    envelopes: [Vec<Arc<[u8]>>; APPS.len()],
    /// What was written back: Redis tells the nodes of it; the embedded ledger, with one node, has nobody to tell.
    restored: HashSet<Arc<[u8]>>,
}

async fn agree(first: &impl Subject, second: &impl Subject, operations: &[Operation]) -> Result<(), TestCaseError> {
    let mut known = Known {
        now_us: 4_102_444_800_000_000,
        bursts: 0,
        ids: Default::default(),
        envelopes: Default::default(),
        restored: HashSet::new(),
    };
    let mut feeds = (start(first, &known).await, start(second, &known).await);
    for (step, operation) in operations.iter().enumerate() {
        let call = known.call(operation);
        if let Call::Restore(_, _, stored, _) = &call {
            known.restored.extend(stored.iter().map(|stored| stored.raw.clone()));
        }
        let answers = (perform(first, &call).await, perform(second, &call).await);
        prop_assert_eq!(&answers.0.shown, &answers.1.shown, "step {}: {:?}", step, operation);
        for _ in 0..answers.0.published {
            let envelopes =
                (published(&mut feeds.0, &known.restored).await, published(&mut feeds.1, &known.restored).await);
            prop_assert_eq!(&envelopes.0, &envelopes.1, "published in step {}: {:?}", step, operation);
            known.learn(&envelopes.0.0, &envelopes.0.1);
        }
        for (app, raw) in &answers.0.seen {
            known.learn(app, raw);
        }
        for (app, id) in &answers.0.ids {
            known.ids[position(app)].push(*id);
        }
    }
    for feed in [&mut feeds.0, &mut feeds.1] {
        while let Ok(message) = feed.try_recv() {
            let is_restored = matches!(&message, Feed::Published(_, raw) if known.restored.contains(raw));
            prop_assert!(is_restored, "published without having been reached: {:?}", message);
        }
    }
    Ok(())
}

async fn start(subject: &impl Subject, known: &Known) -> mpsc::Receiver<Feed> {
    subject.set_clock_us(known.now_us).await;
    subject.set_generation("generation-0").await;
    let feed = subject.ledger().open_feed(&NodeName(NODES[0].into()));
    subject.ledger().subscribe(&app(0)).await.unwrap();
    feed
}

async fn published(feed: &mut mpsc::Receiver<Feed>, restored: &HashSet<Arc<[u8]>>) -> (AppKey, Arc<[u8]>) {
    loop {
        match tokio::time::timeout(Duration::from_secs(10), feed.recv()).await {
            Ok(Some(Feed::Published(_, raw))) if restored.contains(&raw) => {}
            Ok(Some(Feed::Published(app, raw))) => return (app, raw),
            // It may be said at any time: look whether something is missing.
            Ok(Some(Feed::Interrupted)) => {}
            other => panic!("reached one node, which got {other:?}"),
        }
    }
}

/// An operation with its ids and contents filled in.
enum Call {
    Accept(Vec<Submission>),
    Recall(AppKey, u64),
    Find(AppKey, u64),
    List(AppKey, u64, usize, Kind),
    Join(AppKey, NodeName, Duration, u64),
    Renew(Vec<AppKey>, NodeName, Duration),
    Leave(AppKey, NodeName),
    Subscribe(AppKey),
    Unsubscribe(AppKey),
    Restore(AppKey, u64, Vec<Stored>, Vec<u64>),
    Clock(u64),
    Expiry(u64, AppKey, u64),
    Generation(String),
}

impl Known {
    fn learn(&mut self, app: &AppKey, raw: &Arc<[u8]>) {
        self.envelopes[position(app)].push(raw.clone());
    }

    fn id(&self, app: usize, pick: &Pick) -> u64 {
        match pick {
            Pick::None => 0,
            Pick::Known(nth, beside) => {
                self.ids[app].iter().rev().nth(*nth).map_or(0, |id| id.saturating_add_signed(*beside))
            }
            Pick::Ago(ago_us) => self.now_us - ago_us,
        }
    }

    fn call(&mut self, operation: &Operation) -> Call {
        use Operation as O;
        let node = |node: usize| NodeName(NODES[node].into());
        match operation {
            O::Accept(sendings) => Call::Accept(sendings.iter().map(submission).collect()),
            O::Burst(count, ttl_ms) => {
                let unlimited = Limits { per_minute: u32::MAX, per_day: u32::MAX };
                let (dedupe_ms, ttl_ms) = (MAX_DEDUPE_MS, Some(*ttl_ms));
                let first = self.bursts * 1000 + 1000;
                self.bursts += 1;
                let sending =
                    |request_id| Sending { app: 0, request_id, body: 0, ttl_ms, dedupe_ms, limits: unlimited };
                Call::Accept((first..first + count).map(|request_id| submission(&sending(request_id))).collect())
            }
            O::Recall(key, pick) => Call::Recall(app(*key), self.id(*key, pick)),
            O::Find(key, pick) => Call::Find(app(*key), self.id(*key, pick)),
            O::List(key, pick, limit, kind) => Call::List(app(*key), self.id(*key, pick), *limit, *kind),
            O::Join(key, name, lease, pick) => {
                Call::Join(app(*key), node(*name), Duration::from_millis(*lease), self.id(*key, pick))
            }
            O::Renew(keys, name, lease) => {
                Call::Renew(keys.iter().map(|key| app(*key)).collect(), node(*name), Duration::from_millis(*lease))
            }
            O::Leave(key, name) => Call::Leave(app(*key), node(*name)),
            O::Subscribe(key) => Call::Subscribe(app(*key)),
            O::Unsubscribe(key) => Call::Unsubscribe(app(*key)),
            O::Restore(key, head, lost, recalled, first) => {
                let stored: Vec<_> = lost.iter().filter_map(|lost| self.stored(*key, lost)).collect();
                let mut recalled: Vec<_> = recalled.iter().map(|pick| self.id(*key, pick)).collect();
                recalled.extend(stored.first().filter(|_| *first).map(|stored| stored.envelope.id));
                Call::Restore(app(*key), self.id(*key, head), stored, recalled)
            }
            O::Clock(step) => {
                self.now_us = self.now_us.saturating_add_signed(*step);
                Call::Clock(self.now_us)
            }
            O::Expiry(key, nth, beside_ms) => {
                let mut id = 0;
                if let Some(raw) = self.envelopes[*key].iter().rev().nth(*nth) {
                    let envelope = Envelope::read(raw).unwrap();
                    id = envelope.id;
                    let moment = envelope.expires_ms.saturating_add_signed(*beside_ms) * 1000;
                    // Further back than a clock is ever set.
                    if moment + 2_000_000 > self.now_us {
                        self.now_us = moment;
                    }
                }
                Call::Expiry(self.now_us, app(*key), id)
            }
            O::Generation(number) => Call::Generation(format!("generation-{number}")),
        }
    }

    fn stored(&self, app: usize, lost: &Lost) -> Option<Stored> {
        let raw: Arc<[u8]> = match lost {
            Lost::Known(nth) => self.envelopes[app].iter().rev().nth(*nth)?.clone(),
            Lost::Made(ago_us, ttl_ms) => {
                let id = self.now_us - ago_us;
                let tail = r#""requestId":"lost","body":"lost"}"#;
                envelope::broadcast(id, id - 1, id / 1000, id / 1000 + ttl_ms, tail).into_bytes().into()
            }
        };
        Some(Stored { envelope: Envelope::read(&raw).unwrap(), raw })
    }
}

fn app(number: usize) -> AppKey {
    AppKey::parse(APPS[number]).unwrap()
}

fn position(app: &AppKey) -> usize {
    APPS.iter().position(|key| *key == app.as_str()).unwrap()
}

fn submission(sending: &Sending) -> Submission {
    let bodies = ["Köln \"grüßt\"\n\u{1F600}", "something else"];
    Submission {
        request: Request {
            id: format!("request-{}", sending.request_id),
            app: app(sending.app),
            from: if sending.request_id.is_multiple_of(2) { String::new() } else { "ops".to_owned() },
            body: bodies[sending.body].to_owned(),
            ttl_ms: sending.ttl_ms,
            targets: if sending.request_id.is_multiple_of(5) {
                Platforms::parse(&["web", "ios"]).unwrap()
            } else {
                Platforms::ALL
            },
            dedupe_ms: sending.dedupe_ms,
        },
        limits: sending.limits,
    }
}

/// An answer, and what the harness needs of it.
#[derive(Default)]
struct Answered {
    shown: String,
    published: u32,
    ids: Vec<(AppKey, u64)>,
    seen: Vec<(AppKey, Arc<[u8]>)>,
}

/// With the envelopes as text, for whoever has to read a difference.
fn show(snapshot: &Snapshot) -> String {
    let text = |stored: &Vec<Stored>| -> String {
        stored.iter().flat_map(|stored| [String::from_utf8_lossy(&stored.raw).into_owned(), "\n".to_owned()]).collect()
    };
    let Snapshot { now_ms, head, generation, log, retained } = snapshot;
    format!("{now_ms} {head} {generation:?}\nlog\n{}retained\n{}", text(log), text(retained))
}

async fn perform(subject: &impl Subject, call: &Call) -> Answered {
    let ledger = subject.ledger();
    let mut answered = Answered::default();
    answered.shown = match call {
        Call::Accept(batch) => {
            let decisions = ledger.accept(batch).await;
            for (submission, decision) in batch.iter().zip(&decisions) {
                if let Ok(Decision::Accepted(accepted)) = decision
                    && !accepted.repeated
                {
                    answered.published += accepted.reached;
                    answered.ids.push((submission.request.app.clone(), accepted.id));
                }
            }
            format!("{decisions:?}")
        }
        Call::Recall(app, id) => {
            let recalled = ledger.recall(app, *id).await;
            if let Ok(Some(recalled)) = &recalled {
                answered.published += recalled.reached;
                answered.ids.push((app.clone(), recalled.recall_id));
            }
            format!("{recalled:?}")
        }
        Call::Find(app, id) => format!("{:?}", ledger.find(app, *id).await),
        Call::List(app, before, limit, kind) => format!("{:?}", ledger.list(app, *before, *limit, *kind).await),
        Call::Join(app, node, lease, after) => {
            let snapshot = ledger.join(app, node, *lease, *after).await;
            if let Ok(snapshot) = &snapshot {
                answered.seen.extend(snapshot.retained.iter().map(|stored| (app.clone(), stored.raw.clone())));
            }
            snapshot.map_or_else(|error| format!("{error:?}"), |snapshot| show(&snapshot))
        }
        Call::Renew(apps, node, lease) => format!("{:?}", ledger.renew(apps, node, *lease).await),
        Call::Leave(app, node) => format!("{:?}", ledger.leave(app, node).await),
        Call::Subscribe(app) => format!("{:?}", ledger.subscribe(app).await),
        Call::Unsubscribe(app) => format!("{:?}", ledger.unsubscribe(app).await),
        Call::Restore(app, head, retained, recalled) => {
            answered.ids.extend(retained.iter().map(|stored| (app.clone(), stored.envelope.id)));
            answered.seen.extend(retained.iter().map(|stored| (app.clone(), stored.raw.clone())));
            format!("{:?}", ledger.restore(app, *head, retained, recalled).await)
        }
        Call::Clock(now_us) => {
            subject.set_clock_us(*now_us).await;
            String::new()
        }
        Call::Expiry(now_us, app, id) => {
            subject.set_clock_us(*now_us).await;
            format!("{:?}", ledger.find(app, *id).await)
        }
        Call::Generation(generation) => {
            subject.set_generation(generation).await;
            String::new()
        }
    };
    answered
}
