//! One app floods, and requests far too large: what the others and the worker's memory feel of it (rows 33 and 34).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use serde_json::json;

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::rabbitmq::{ADMINISTRATOR, RabbitMq, as_user};
use crate::support::redis::Redis;
use crate::support::sender::{Amqp, Api, request};
use crate::support::stack::Stack;
use crate::support::{unique, until};

const FLOOD: usize = 100_000;
/// How many wait in the common queue before another app's request.
const BEHIND: usize = 20_000;
/// Draining 100,000 requests in a debug build on a busy machine.
const LONG: Duration = Duration::from_secs(600);
const MIB: usize = 1 << 20;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// How many requests one phase measures.
const PHASE: usize = 50;

/// Latencies of so many requests, one after the other.
async fn latencies(count: usize, ask: impl AsyncFn()) -> Vec<Duration> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let started = Instant::now();
        ask().await;
        times.push(started.elapsed());
    }
    times
}

/// What another app's requests took while there was no flood and while there was one. The phases take turns, so that whatever
/// else the machine does falls upon both.
#[derive(Default)]
struct Turns {
    idle: Vec<Duration>,
    flooded: Vec<Duration>,
}

impl Turns {
    fn check(self) {
        let count = self.flooded.len();
        let (idle, flooded) = (median(self.idle), median(self.flooded));
        println!("idle median {idle:?}, under the flood {flooded:?}, over {count} requests each");
        assert!(flooded <= idle * 2, "{flooded:?} is more than twice {idle:?}");
    }
}

/// Puts so many requests of an app into the queue behind a routing key, whose verdicts go to a queue that nobody reads.
async fn enqueue_flood(url: &str, app: &App, routing_key: &str, count: usize) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let mut one = FieldTable::default();
    one.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    channel.queue_declare("unread".into(), QueueDeclareOptions::durable(), one).await.unwrap();
    let run = unique("flood");
    for thousand in 0..count / 1000 {
        let mut confirms = Vec::with_capacity(1000);
        for number in 0..1000 {
            let payload =
                json!({ "requestId": format!("{run}-{thousand}-{number}"), "appKey": app.key, "body": "flood" });
            let properties = BasicProperties::default().with_reply_to("unread".into()).with_correlation_id("x".into());
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let payload = payload.to_string();
            let sent =
                channel.basic_publish("broadcast".into(), routing_key.into(), options, payload.as_bytes(), properties);
            confirms.push(sent.await.unwrap());
        }
        for confirmation in join_all(confirms).await {
            assert!(confirmation.unwrap().is_ack());
        }
    }
    let _ = connection.close(200, "sent".into()).await;
}

async fn refused(worker: &Process) -> f64 {
    worker.metric("broadcastd_refused_total").await
}

/// By AMQP with a queue of its own for the app that may flood: not one of its requests stands before another app's. In the one
/// common queue the others stand behind all of them, for as long as their refusal takes: that is measured here too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_by_amqp_is_refused_and_is_felt_in_its_own_queue_only() {
    // The limit of a day: however long this takes, no more than ten are accepted.
    let (loud, quiet) = (App { per_day: 10, ..App::new() }, App::unlimited());
    let rabbitmq = RabbitMq::dedicated();
    let redis = Redis::dedicated(&[]);
    let stack = Stack::on(&rabbitmq.vhost().url, &redis.url(), &[loud.clone(), quiet.clone()]);
    // Slow on purpose: how fast a flood is refused is bounded, so that it takes no more than its share of broker and ledger.
    // The minimal permissions are for the common queue only.
    let administrator = as_user(&stack.amqp_url, ADMINISTRATOR);
    let lane = stack
        .role("worker")
        // It shares this machine's cores with the others; what it takes of them is not to be measured, but what it takes of
        // queue, broker and ledger.
        .by(&["nice", "-n", "19"])
        .with("amqp.url", &administrator)
        .with("amqp.queue", "broadcast.requests.loud")
        .with("amqp.routing_key", "request.loud")
        .with("amqp.prefetch", "32")
        .with("worker.batch", "32")
        .with("worker.batches_in_flight", "1")
        .with("log.level", "warn");
    let common = stack.role("worker").with("log.level", "warn");
    let (mut lane, mut common) = tokio::join!(lane.start(), common.start());
    lane.drain(LONG).await;
    let amqp: Amqp = stack.amqp().await;
    let asked = AtomicU64::new(0);
    let ask = async || {
        amqp.accepted(&request(&quiet, "quiet")).await;
        asked.fetch_add(1, Ordering::Relaxed);
    };
    let enqueuing = Instant::now();
    enqueue_flood(&administrator, &loud, "request.loud", FLOOD).await;
    println!("{FLOOD} requests enqueued in {:?}", enqueuing.elapsed());
    latencies(PHASE, ask).await;
    lane.restart().await;

    let flooding = Instant::now();
    let mut turns = Turns::default();
    for _ in 0..20 {
        let before = refused(&lane).await;
        turns.flooded.extend(latencies(PHASE, ask).await);
        let after = refused(&lane).await;
        assert!(before < after && after < (FLOOD - 10) as f64, "that was no flood: {before}, {after}");
        lane.pause();
        turns.idle.extend(latencies(PHASE, ask).await);
        lane.resume();
    }
    until("all refused", LONG, async || match refused(&lane).await {
        count if count >= (FLOOD - 10) as f64 => Ok(()),
        count => Err(count),
    })
    .await;
    println!("{FLOOD} were refused in {:?}", flooding.elapsed());
    // The promise itself, exactly: the other app's queue has held nothing but its own requests.
    assert_eq!(common.metric("broadcastd_consumed_total").await, asked.load(Ordering::Relaxed) as f64);
    assert_eq!(refused(&common).await, 0.0);
    assert_eq!(lane.metric("broadcastd_accepted_total").await, 10.0, "the limit of the app, and no more");
    assert_eq!(refused(&lane).await, (FLOOD - 10) as f64);
    turns.check();
    lane.drain(LONG).await;

    // First come, first served: in the common queue the next request of another app waits for all of these.
    common.drain(LONG).await;
    enqueue_flood(&administrator, &loud, "request", BEHIND).await;
    let behind = amqp.ask(request(&quiet, "behind the flood").to_string().as_bytes()).await;
    let flooding = Instant::now();
    common.restart().await;
    let mut reply = None;
    until("its turn", LONG, async || {
        match tokio::time::timeout(Duration::from_millis(100), amqp.reply(&behind)).await {
            Ok(found) => {
                reply = Some(found);
                Ok(())
            }
            Err(error) => Err(error),
        }
    })
    .await;
    println!("in the common queue, behind {BEHIND} of another app: {:?}", flooding.elapsed());
    assert_eq!(reply.unwrap()["code"], 200);
    assert!(common.metric("broadcastd_refused_total").await >= BEHIND as f64);
    // The flood itself is counted, not noted.
    after_row(&Stack { apps: vec![quiet], ..stack }).await;
}

/// By the server API: an app has at most its share of calls under way, so at most that many requests stand before another's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_by_the_api_is_refused_and_only_its_share_stands_before_another_app() {
    const SHARE: u32 = 4;
    let (loud, quiet) = (App::new(), App::unlimited());
    let stack = Stack::new(&[loud.clone(), quiet.clone()]);
    let worker = stack.role("worker").with("log.level", "warn");
    let api = stack.role("api").with("log.level", "warn").with("api.max_in_flight_per_app", SHARE.to_string());
    let (mut worker, api) = tokio::join!(worker.start(), api.start());
    let sender = Api::new(&api.api_url(), &quiet);
    let ask = async || {
        sender.broadcast("quiet", false).await;
    };
    latencies(PHASE, ask).await;

    // Twice as many callers as the share, each asking again soon: some are always turned away. Paced, twenty a second each: it
    // is the service that is measured, not what callers in a debug build leave of the machine.
    let (on, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let (over_limit, busy) = (AtomicU64::new(0), AtomicU64::new(0));
    let flood = join_all((0..2 * SHARE).map(async |_| {
        let sender = Api::new(&api.api_url(), &loud);
        while !done.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if !on.load(Ordering::Relaxed) {
                continue;
            }
            match sender.call("msg/broadcastMsg.action", &[("body", "flood")]).await["code"].as_u64() {
                Some(416) => over_limit.fetch_add(1, Ordering::Relaxed),
                Some(503) => busy.fetch_add(1, Ordering::Relaxed),
                Some(200) => 0,
                other => panic!("{other:?}"),
            };
        }
    }));
    let measuring = async {
        let mut turns = Turns::default();
        for _ in 0..6 {
            for flooded in [false, true] {
                on.store(flooded, Ordering::Relaxed);
                // What is under way from the turn before is not measured.
                latencies(5, ask).await;
                let times = latencies(PHASE, ask).await;
                if flooded { &mut turns.flooded } else { &mut turns.idle }.extend(times);
            }
        }
        done.store(true, Ordering::Relaxed);
        turns
    };
    let (turns, _) = tokio::join!(measuring, flood);
    let (over_limit, busy) = (over_limit.into_inner(), busy.into_inner());
    println!("a flood of {over_limit} times 416 and {busy} times 503");
    assert!(over_limit > 50 && busy > 50, "that was no flood");

    // The bound itself, exactly: with nobody to decide, as many as the share are in the queue and the others are told.
    worker.drain(LONG).await;
    let amqp = stack.amqp().await;
    let calls = join_all((0..5 * SHARE).map(async |_| {
        Api::new(&api.api_url(), &loud).call("msg/broadcastMsg.action", &[("body", "flood")]).await["code"].clone()
    }));
    let other = async {
        until("the whole share in the queue", LONG, async || match amqp.ready("broadcast.requests").await {
            SHARE => Ok(()),
            count => Err(count),
        })
        .await;
        let calling = sender.call("msg/broadcastMsg.action", &[("body", "not turned away")]);
        let deciding = async {
            until("the other app's request", LONG, async || match amqp.ready("broadcast.requests").await {
                count if count > SHARE => Ok(()),
                count => Err(count),
            })
            .await;
            assert_eq!(amqp.ready("broadcast.requests").await, SHARE + 1, "no more than the share stands before it");
            worker.restart().await;
        };
        tokio::join!(calling, deciding).0
    };
    let (codes, other) = tokio::join!(calls, other);
    assert_eq!(other["code"], 200, "{other}");
    let turned_away = codes.iter().filter(|code| **code == json!(503)).count();
    assert_eq!(turned_away, 4 * SHARE as usize, "{codes:?}");
    turns.check();
    after_row(&stack).await;
}

/// 64 requests of 16 MiB wait when a worker starts. It must not hold 1 GiB, let alone twice that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_16_mib_are_dead_lettered_without_being_held() {
    let app = App::new();
    let rabbitmq = RabbitMq::dedicated();
    let stack = Stack::on(&rabbitmq.vhost().url, &Redis::shared().url(), std::slice::from_ref(&app));
    let mut worker = stack.worker().await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    let (idle_kib, _) = worker.memory_kib();
    worker.drain(LONG).await;
    let mut huge = request(&app, "huge").to_string().into_bytes();
    huge.resize(16 * MIB, b' ');
    for _ in 0..64 {
        amqp.send(&huge).await;
    }
    let started = Instant::now();
    worker.spawn();
    until("all dead letters", LONG, async || match amqp.ready("broadcast.dead").await {
        64 => Ok(()),
        count => Err(count),
    })
    .await;
    let took = started.elapsed();
    worker.wait_ready().await;
    let (_, most_kib) = worker.memory_kib();
    let grown = (most_kib.saturating_sub(idle_kib)) as usize * 1024;
    println!("64 requests of 16 MiB: {} MiB more than idle at the most, {took:?}", grown / MIB);
    assert!(grown < 512 * MIB, "{} MiB more than idle", grown / MIB);
    let dead = amqp.dead_letter().await;
    assert_eq!(dead.headers["x-reason"], "too_large");
    assert_eq!(dead.payload, huge[..64 * 1024]);
    amqp.accepted(&request(&app, "after")).await;
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
    after_row(&stack).await;
}

/// With the broker's limit that the documentation demands they never get to a worker, and what does is bounded: a whole
/// prefetch of the largest that the broker takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_brokers_limit_a_whole_prefetch_of_the_largest_is_bounded() {
    let app = App::new();
    let rabbitmq = RabbitMq::with_settings("max_message_size = 131072");
    let stack = Stack::on(&rabbitmq.vhost().url, &Redis::shared().url(), std::slice::from_ref(&app));
    let mut worker = stack.worker().await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    let (idle_kib, _) = worker.memory_kib();
    worker.drain(LONG).await;
    let largest = vec![b' '; 131_072];
    for _ in 0..600 {
        amqp.send(&largest).await;
    }
    worker.spawn();
    until("all dead letters", LONG, async || match amqp.ready("broadcast.dead").await {
        600 => Ok(()),
        count => Err(count),
    })
    .await;
    worker.wait_ready().await;
    let (_, most_kib) = worker.memory_kib();
    let grown = (most_kib.saturating_sub(idle_kib)) as usize * 1024;
    println!("600 requests of 128 KiB: {} MiB more than idle at the most", grown / MIB);
    assert!(grown < 128 * MIB, "{} MiB more than idle", grown / MIB);
    let over = vec![b' '; 131_073];
    assert!(
        amqp.try_publish(&over, BasicProperties::default()).await.is_err(),
        "the broker takes no more than its limit"
    );
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "after")).await;
    after_row(&stack).await;
}
