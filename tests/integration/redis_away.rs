//! Redis killed, frozen, forgetful of scripts, and full: what is held, and that nothing happens twice. `tests/faults` has the
//! long ones.

use std::time::Duration;

use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{Request, Submission};
use broadcastd::broadcast::verdict::Decision;
use broadcastd::ledger::redis::Mode;
use broadcastd::ledger::{Ledger, LedgerError, NodeName};

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::load::{all_numbered, ask_all, numbered, replies};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::{Redis, ledger};
use crate::support::sender::{Amqp, Api, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

async fn stack_on(redis: &Redis, apps: &[App]) -> Stack {
    Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), apps)
}

async fn wait_for_replies(amqp: &Amqp, least: usize) {
    let count = async || if amqp.replies() >= least { Ok(()) } else { Err(amqp.replies()) };
    until("replies", SOON, count).await;
}

async fn wait_above_zero(process: &Process, metric: &str) -> f64 {
    let value = async || match process.metric(metric).await {
        0.0 => Err(0.0),
        value => Ok(value),
    };
    until(metric, SOON, value).await
}

/// Row 16: what was accepted before the kill is in the append-only file; what was under way is held and decided once.
#[tokio::test]
async fn redis_killed_and_restarted_on_its_file_loses_nothing() {
    let app = App::unlimited();
    let mut redis = Redis::durable();
    let stack = stack_on(&redis, std::slice::from_ref(&app)).await;
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = all_numbered(&app, 0..300);

    let before = ask_all(&amqp, &requests[..200]);
    let kill = async {
        wait_for_replies(&amqp, 31).await;
        redis.kill();
    };
    let (mut asked, ()) = tokio::join!(before, kill);
    worker.wait_unready().await;
    node.wait_unready().await;
    asked.extend(ask_all(&amqp, &requests[200..]).await);
    wait_above_zero(&worker, "broadcastd_requests_held").await;
    assert!(amqp.replies() < 300);
    redis.start();
    worker.wait_ready().await;
    node.wait_ready().await;

    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies(&amqp, &asked).await);
    device.collect(300, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(worker.metric("broadcastd_requests_held").await, 0.0);
    // The verdicts from before the kill are there still (I6), and so is what is retained.
    checker.all_accepted(&requests, &amqp.burst(&requests).await);
    let mut late = Device::online(&app, "ios", &node.device_url()).await;
    late.collect(100, SOON).await;
    checker.device(late.history(), Must::RetainedUpTo(late.head()), 0).unwrap();
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["end"]);
    after_row(&stack).await;
}

/// Row 18, until the first timeout: `tests/faults` freezes for ten seconds under load.
#[tokio::test]
async fn a_frozen_redis_has_no_double_effect() {
    // Exactly as many as are sent: a second charge for any of them would refuse the last ones.
    let app = App { per_minute: 100, ..App::unlimited() };
    let redis = Redis::dedicated(&[]);
    let stack = stack_on(&redis, std::slice::from_ref(&app)).await;
    let (worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = all_numbered(&app, 0..100);
    // Redis knows the script from here on: what reaches it while it is frozen is carried out when it wakes up.
    amqp.accepted(&requests[0]).await;
    redis.pause();
    let asked = ask_all(&amqp, &requests).await;
    wait_above_zero(&worker, "broadcastd_ledger_retries_total").await;
    redis.resume();
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies(&amqp, &asked).await);
    assert!(worker.metric("broadcastd_repeated_total").await > 1.0, "calls that timed out were carried out");
    device.collect(100, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.request(&request(&app, "one more")).await["code"], 416, "the quota was charged for 100");
    after_row(&stack).await;
}

/// Row 21: one request brings the script, and the batch goes on in its order. One by one would be a round trip each, with the whole
/// text.
#[tokio::test]
async fn a_batch_brings_a_forgotten_script_once() {
    const COUNT: u64 = 64;
    let redis = Redis::dedicated(&[]);
    let stack = stack_on(&redis, &[]).await;
    let ledger = ledger(&redis.url(), Mode::Single, &stack.prefix);
    ledger.health().wait_for(Result::is_ok).await.unwrap();
    let batch: Vec<Submission> = (0..COUNT)
        .map(|number| {
            let json =
                serde_json::json!({ "requestId": format!("r{number}"), "appKey": "demo", "body": "b" }).to_string();
            let request = Request::from_json(json.as_bytes(), None).unwrap();
            Submission { request, limits: Limits { per_minute: 1000, per_day: 1000 } }
        })
        .collect();
    let mut newest = 0;
    for _ in 0..2 {
        redis.command(&["SCRIPT", "FLUSH"]);
        redis.command(&["CONFIG", "RESETSTAT"]);
        let mut ids = Vec::new();
        for decision in ledger.accept(&batch).await {
            match decision.unwrap() {
                Decision::Accepted(accepted) => ids.push(accepted.id),
                other => panic!("{other:?}"),
            }
        }
        assert!(ids.len() as u64 == COUNT && ids.is_sorted(), "{ids:?}");
        // The second time all of them are found again.
        assert!(newest == 0 || ids.last() == Some(&newest));
        newest = ids.last().copied().unwrap();
        let stats = redis.command(&["INFO", "commandstats"]);
        let calls = |name: &str| {
            let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{name}:calls=")));
            line.and_then(|line| line.split(',').next()).map_or(0, |calls| calls.parse::<u64>().unwrap())
        };
        assert_eq!((calls("eval"), calls("evalsha")), (1, COUNT + COUNT - 1), "{stats}");
    }
}

/// Row 21: under load, and for every script. Each was known to Redis before it is made to forget it.
#[tokio::test]
async fn a_script_flush_is_not_noticed() {
    let (app, other) = (App::unlimited(), App::unlimited());
    let redis = Redis::dedicated(&[]);
    let stack = stack_on(&redis, &[app.clone(), other.clone()]).await;
    let node = async { stack.role("node").with("node.renew_seconds", "1").start().await };
    let (worker, node, api) = tokio::join!(stack.worker(), node, stack.api());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = all_numbered(&app, 0..300);
    let flush = || redis.command(&["SCRIPT", "FLUSH"]);
    let flushing = async {
        for least in (0..300).step_by(20) {
            wait_for_replies(&amqp, least).await;
            flush();
        }
    };
    let (asked, ()) = tokio::join!(ask_all(&amqp, &requests), flushing);
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies(&amqp, &asked).await);
    device.collect(300, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();

    // The first device of another app has the node join it: what is retained is in that script's answer only.
    let kept = all_numbered(&other, 0..9);
    let mut of_other = Checker::default();
    of_other.all_accepted(&kept, &amqp.burst(&kept).await);
    assert_eq!(stack.lease_end(&redis, &other), 0, "the node has not joined yet");
    flush();
    let mut late = Device::online(&other, "ios", &node.device_url()).await;
    late.collect(3, SOON).await;
    of_other.device(late.history(), Must::RetainedUpTo(late.head()), 0).unwrap();
    assert!(stack.lease_end(&redis, &other) > 0);

    let sender = Api::new(&api.api_url(), &app);
    for deleted in [device.history()[0].id, device.history()[1].id] {
        let id = deleted.to_string();
        for (call, code) in
            [("queryBroadcastMsgById", 200), ("delBroadcastMsgById", 200), ("queryBroadcastMsgById", 404)]
        {
            flush();
            let answer = sender.call(&format!("history/{call}.action"), &[("broadcastId", &id)]).await;
            assert_eq!(answer["code"], code, "{call}: {answer}");
        }
        assert_eq!(device.expect_recall(SOON).await, deleted);
    }

    for app in [&app, &other] {
        flush();
        let before = stack.lease_end(&redis, app);
        until("a renewal after the flush", SOON, async || match stack.lease_end(&redis, app) {
            end if end > before => Ok(()),
            end => Err(end),
        })
        .await;
    }

    let direct = ledger(&redis.url(), Mode::Single, &stack.prefix);
    direct.health().wait_for(Result::is_ok).await.unwrap();
    let (key, witness) = (AppKey::parse(&other.key).unwrap(), NodeName("witness".into()));
    let held = direct.join(&key, &witness, Duration::from_secs(60), 0).await.unwrap();
    for _ in 0..2 {
        flush();
        assert_eq!(direct.restore(&key, held.head, &held.retained, &[]).await.unwrap(), 0, "nothing was missing");
    }

    assert_eq!(worker.metric("broadcastd_ledger_retries_total").await, 0.0);
    assert_eq!(node.readiness().await.unwrap().0, 200);
    assert!(!node.output().contains("serving from memory"), "no call of the node has failed");
    after_row(&stack).await;
}

/// Every key of the app with a hash of what it holds.
fn holdings(redis: &Redis, app: &App) -> String {
    let script = "local keys = redis.call('KEYS', ARGV[1]) table.sort(keys) local all = {} \
                  for i, key in ipairs(keys) do all[i] = key .. ' ' .. redis.sha1hex(redis.call('DUMP', key)) end \
                  return all";
    redis.command(&["EVAL", script, "0", &format!("*{{{}}}:*", app.key)])
}

/// What needs room is refused, to be tried again, by each script that a node or an API runs.
async fn refused_for_memory(redis: &Redis, stack: &Stack, app: &App, kept: u64) {
    let direct = ledger(&redis.url(), Mode::Single, &stack.prefix);
    direct.health().wait_for(Result::is_ok).await.unwrap();
    let (key, node, lease) = (AppKey::parse(&app.key).unwrap(), NodeName("n".into()), Duration::from_secs(60));
    let recalled = direct.recall(&key, kept).await.map(drop);
    let renewed = direct.renew(std::slice::from_ref(&key), &node, lease).await.remove(0).map(drop);
    let joined = direct.join(&key, &node, lease, 0).await.map(drop);
    let restored = direct.restore(&key, kept, &[], &[]).await.map(drop);
    for (what, refused) in [("recall", recalled), ("renew", renewed), ("join", joined), ("restore", restored)] {
        match refused {
            Err(LedgerError::Unavailable(reason)) if reason.contains("OOM") => {}
            other => panic!("{what}: {other:?}"),
        }
    }
}

/// Row 22: refused as a whole while memory is full, held, and decided when it is freed; recalls, joins and renewals too.
#[tokio::test]
async fn redis_out_of_memory_holds_requests_until_there_is_room() {
    let (app, other) = (App::unlimited(), App::unlimited());
    let redis = Redis::dedicated(&["--maxmemory-policy", "noeviction"]);
    let stack = stack_on(&redis, &[app.clone(), other.clone()]).await;
    let node = async { stack.role("node").with("node.renew_seconds", "1").start().await };
    let (mut worker, mut node, api) = tokio::join!(stack.worker(), node, stack.api());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let kept = amqp.accepted(&retained(&app, "to be deleted")).await;
    assert_eq!(device.contents_up_to("to be deleted").await.len(), 1);
    let requests = all_numbered(&app, 0..300);

    let fill = async {
        wait_for_replies(&amqp, 31).await;
        redis.command(&["CONFIG", "SET", "maxmemory", "1"]);
        holdings(&redis, &app)
    };
    let (mut asked, before) = tokio::join!(ask_all(&amqp, &requests[..200]), fill);
    asked.extend(ask_all(&amqp, &requests[200..]).await);
    assert!(before.contains(":log ") && before.contains(":nodes ") && before.contains(":retained "), "{before}");
    wait_above_zero(&worker, "broadcastd_requests_held").await;
    worker.wait_unready().await;
    node.wait_unready().await;
    let sender = Api::new(&api.api_url(), &app);
    refused_for_memory(&redis, &stack, &app, kept).await;
    assert_eq!(holdings(&redis, &app), before, "neither recall nor renewal has left anything");
    let kept = kept.to_string();
    let delete = async || sender.call("history/delBroadcastMsgById.action", &[("broadcastId", &kept)]).await;
    // Its signature cannot be remembered, so it is not let in.
    assert_eq!(delete().await["code"], 503);
    // The first device of another app: the node cannot join, and the device waits for its welcome.
    let (late_app, url) = (other.clone(), node.device_url());
    let late = tokio::spawn(async move { Device::online(&late_app, "web", &url).await });
    let opening = async || match node.metric("broadcastd_apps").await {
        2.0 => Ok(()),
        apps => Err(apps),
    };
    until("opening another app", SOON, opening).await;
    assert_eq!(holdings(&redis, &app), before, "nothing is written in part");
    assert_eq!(holdings(&redis, &other), "", "no lease without a snapshot");

    redis.command(&["CONFIG", "SET", "maxmemory", "0"]);
    worker.wait_ready().await;
    node.wait_ready().await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies(&amqp, &asked).await);
    device.collect(301, SOON).await;
    checker.device(&device.history()[1..], Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(delete().await["code"], 200);
    assert_eq!(device.expect_recall(SOON).await.to_string(), kept);
    let mut late = late.await.unwrap();
    amqp.accepted(&request(&other, "there is room")).await;
    assert_eq!(late.contents_up_to("there is room").await.len(), 1);
    amqp.accepted(&numbered(&app, 300)).await;
    assert_eq!(device.contents_up_to("number 300").await.len(), 1);
    after_row(&stack).await;
}
