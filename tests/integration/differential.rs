//! Two ledgers, one generated sequence of operations, one virtual clock: every answer and every published envelope must be
//! the same, ids included.
//!
//! The clock starts in the year 2100, so that a key which Redis expires by its own clock outlives the test. It moves mostly
//! in steps of half a second, as do leases and validities, so that "exactly at its time" happens often.

#![allow(clippy::unwrap_used)] // a test

mod calls;
mod model;
mod operation;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use broadcastd::broadcast::app::AppKey;
use broadcastd::ledger::embedded::EmbeddedLedger;
use broadcastd::ledger::redis::{Mode, RedisLedger, RedisSettings};
use broadcastd::ledger::{Feed, Ledger, LedgerSettings, NodeName};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use tokio::sync::mpsc;

use self::calls::{Call, EVENTS, Known, app, perform, position};
use self::model::Model;
use self::operation::{NODES, Operation, operation};
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
            client_certificate_file: String::new(),
            client_key_file: String::new(),
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

/// Runs generated sequences on fresh pairs. `DIFFERENTIAL_SEED` repeats a run, `PROPTEST_CASES` makes it shorter or longer.
fn run<A: Subject, B: Subject>(cases: u32, first: impl AsyncFn() -> A, second: impl AsyncFn() -> B) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seed = number("DIFFERENTIAL_SEED").unwrap_or_else(|| fastrand::u64(..));
    let wanted = number("PROPTEST_CASES").map_or(cases, |cases| u32::try_from(cases).unwrap());
    let again = format!("DIFFERENTIAL_SEED={seed} PROPTEST_CASES={wanted} cargo test --test integration differential");
    let config =
        Config { cases: wanted, failure_persistence: None, rng_seed: RngSeed::Fixed(seed), ..Config::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let seen = Mutex::new(BTreeMap::new());
    TestRunner::new(config)
        .run(&proptest::collection::vec(operation(), 1..100), |operations| {
            runtime.block_on(async { agree(&first().await, &second().await, &operations, &seen).await })
        })
        .unwrap_or_else(|failure| panic!("{failure}\nagain: {again}"));
    let seen = seen.into_inner().unwrap();
    println!("{wanted} sequences, seed {seed}: {seen:?}");
    // A shorter run need not have met everything.
    for (event, least) in if wanted < cases { &[] } else { EVENTS } {
        let times = seen.get(event).copied().unwrap_or(0);
        assert!(times >= *least, "{event}: {times} times only, so the comparison says little of it\nagain: {again}");
    }
}

/// How often what has happened, in all sequences.
type Seen = Mutex<BTreeMap<&'static str, u32>>;

async fn agree(
    first: &impl Subject,
    second: &impl Subject,
    operations: &[Operation],
    seen: &Seen,
) -> Result<(), TestCaseError> {
    let mut known = Known::new();
    // What was written back: Redis tells the nodes of it; the embedded ledger, with one node, has nobody to tell.
    let mut restored: HashSet<Arc<[u8]>> = HashSet::new();
    let mut feeds = (start(first, &known).await, start(second, &known).await);
    for (step, operation) in operations.iter().enumerate() {
        let call = known.call(operation);
        if let Call::Restore(_, _, stored, _) = &call {
            restored.extend(stored.iter().map(|stored| stored.raw.clone()));
        }
        let answers = (perform(first, &call).await, perform(second, &call).await);
        known
            .note(&call, &answers.0)
            .into_iter()
            .for_each(|event| *seen.lock().unwrap().entry(event).or_default() += 1);
        prop_assert_eq!(&answers.0.shown, &answers.1.shown, "step {}: {:?}", step, operation);
        for _ in 0..answers.0.published {
            let envelopes = (published(&mut feeds.0, &restored).await, published(&mut feeds.1, &restored).await);
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
            let is_restored = matches!(&message, Feed::Published(_, raw) if restored.contains(raw));
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
