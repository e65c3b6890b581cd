//! Rows of the fault table, against real processes. After each, the same invariants hold (`support::checker`).

use futures_util::future::join_all;
use lapin::BasicProperties;
use serde_json::Value;

use crate::support::broadcastd::App;
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::{Amqp, Api, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

fn requests(app: &App, count: usize) -> Vec<Value> {
    (0..count)
        .map(|number| {
            let body = format!("number {number}");
            if number % 3 == 0 { retained(app, &body) } else { request(app, &body) }
        })
        .collect()
}

async fn ask_all(amqp: &Amqp, requests: &[Value]) -> Vec<String> {
    let payloads: Vec<String> = requests.iter().map(Value::to_string).collect();
    join_all(payloads.iter().map(|payload| amqp.ask(payload.as_bytes()))).await
}

/// Rows 16 and 17: held, not dead-lettered; readiness false, then true; nothing lost.
#[tokio::test]
async fn redis_killed_and_restarted_under_load_loses_nothing() {
    let app = App::unlimited();
    let mut redis = Redis::durable();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 300);

    let before = ask_all(&amqp, &requests[..200]);
    let kill = async {
        until("some replies", SOON, async || match amqp.replies() {
            replies if replies > 30 => Ok(()),
            replies => Err(replies),
        })
        .await;
        redis.kill();
    };
    let (mut asked, ()) = tokio::join!(before, kill);
    worker.wait_unready().await;
    node.wait_unready().await;
    asked.extend(ask_all(&amqp, &requests[200..]).await);
    until("held requests", SOON, async || match worker.metric("broadcastd_requests_held").await {
        0.0 => Err(0.0),
        _ => Ok(()),
    })
    .await;
    assert!(amqp.replies() < 300);
    redis.start();
    worker.wait_ready().await;
    node.wait_ready().await;

    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    device.collect(300, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(worker.metric("broadcastd_requests_held").await, 0.0);
}

/// Row 18: a frozen Redis answers nothing on connections that look alive; timeouts have no second effect.
#[tokio::test]
async fn a_frozen_redis_has_no_double_effect() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&[]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 100);
    // Redis knows the script from here on: what reaches it while it is frozen is carried out when it wakes up.
    amqp.accepted(&requests[0]).await;
    redis.pause();
    let asked = ask_all(&amqp, &requests).await;
    until("a timeout", SOON, async || match worker.metric("broadcastd_ledger_retries_total").await {
        0.0 => Err(0.0),
        _ => Ok(()),
    })
    .await;
    redis.resume();
    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    device.collect(100, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
}

/// Row 21.
#[tokio::test]
async fn a_script_flush_is_not_noticed() {
    let app = App::new();
    let redis = Redis::dedicated(&[]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let amqp = stack.amqp().await;
    amqp.accepted(&retained(&app, "before")).await;
    redis.command(&["SCRIPT", "FLUSH"]);
    amqp.accepted(&request(&app, "after")).await;
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    redis.command(&["SCRIPT", "FLUSH"]);
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["before", "end"]);
}

/// Row 22: refused as a whole while memory is full, held, and decided when it is freed.
#[tokio::test]
async fn redis_out_of_memory_holds_requests_until_there_is_room() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&["--maxmemory-policy", "noeviction"]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let keys = redis.command(&["DBSIZE"]);
    let requests = requests(&app, 20);
    let asked = ask_all(&amqp, &requests).await;
    until("held requests", SOON, async || match worker.metric("broadcastd_requests_held").await {
        0.0 => Err(0.0),
        _ => Ok(()),
    })
    .await;
    assert_eq!(redis.command(&["DBSIZE"]), keys, "nothing is written in part");
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]);
    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    device.collect(20, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
}

/// Row 23: what was published while the subscription was gone comes from the log.
#[tokio::test]
async fn a_node_whose_subscription_was_killed_misses_nothing() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&[]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 200);
    let asking = ask_all(&amqp, &requests);
    let killing = async {
        for replies in [20, 60, 100] {
            until("more replies", SOON, async || if amqp.replies() > replies { Ok(()) } else { Err(replies) }).await;
            redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        }
    };
    let (asked, ()) = tokio::join!(asking, killing);
    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    device.collect(200, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
}

/// Row 9: workers resume unaided, and what was in the queue is still there.
#[tokio::test]
async fn rabbitmq_restarted_under_load_loses_nothing() {
    let app = App::unlimited();
    let mut rabbitmq = RabbitMq::dedicated();
    let stack = Stack::on(&rabbitmq.vhost().url, &Redis::shared().url(), std::slice::from_ref(&app));
    let (mut worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 200);
    rabbitmq.settle_new_queues();
    worker.pause();
    ask_all(&amqp, &requests).await;
    worker.resume();
    until("some replies", SOON, async || if amqp.replies() > 10 { Ok(()) } else { Err("none yet") }).await;
    rabbitmq.kill();
    worker.wait_unready().await;
    rabbitmq.start();
    worker.wait_ready().await;

    // The reply queue went with the sender's connection; the verdicts are there for the asking.
    let amqp = stack.amqp().await;
    device.collect(200, SOON).await;
    let replies = amqp.burst(&requests).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(amqp.ready("broadcast.requests").await, 0);
}

/// Row 10: the server ends the consumer while the connection looks healthy.
#[tokio::test]
async fn a_deleted_queue_is_declared_anew() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    amqp.delete_queue("broadcast.requests").await;
    let after = request(&app, "after").to_string();
    until("a queue again", SOON, async || amqp.try_publish(after.as_bytes(), BasicProperties::default()).await).await;
    assert_eq!(device.contents_up_to("after").await, ["before", "after"]);
    assert!(worker.metric("broadcastd_worker_sessions_total").await > 1.0);
}

/// Row 27: devices of a killed node go on at their cursor on another one.
#[tokio::test]
async fn devices_of_a_killed_node_go_on_elsewhere_at_their_cursor() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, mut node, other_node) = tokio::join!(stack.worker(), stack.node(), stack.node());
    let url = node.device_url();
    let mut devices = join_all((0..20).map(|_| Device::online(&app, "web", &url))).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 200);
    let urls = [other_node.device_url()];
    let sending = async {
        // In small groups: the stream is to last until after the kill.
        let mut replies = Vec::new();
        for group in requests.chunks(10) {
            replies.extend(amqp.burst(group).await);
            if replies.len() == 60 {
                node.kill();
            }
        }
        replies
    };
    let following = join_all(devices.iter_mut().map(|device| device.follow(&urls, 200, SOON * 2)));
    let (replies, _) = tokio::join!(sending, following);
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    for device in &devices {
        checker.device(device.history(), Must::Everything, 0).unwrap();
    }
}

/// Row 29, small: a device that does not read holds nobody up, and has everything when it reads.
#[tokio::test]
async fn a_device_that_stops_reading_holds_nobody_up() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    // A small send buffer: the node's socket is full soon.
    let node = async { stack.role("node").with("node.send_buffer_bytes", "4096").start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let url = node.device_url();
    let mut reader = Device::online(&app, "web", &url).await;
    let mut sleeper = Device::online(&app, "web", &url).await;
    let amqp = stack.amqp().await;
    let padding = "x".repeat(4000);
    let requests: Vec<Value> = (0..500).map(|number| request(&app, &format!("{number} {padding}"))).collect();
    let (replies, ()) = tokio::join!(amqp.burst(&requests), reader.collect(500, SOON * 2));
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    checker.device(reader.history(), Must::Everything, 0).unwrap();
    sleeper.follow(std::slice::from_ref(&url), 500, SOON * 2).await;
    checker.device(sleeper.history(), Must::Everything, 0).unwrap();
}

/// Rows 11 and 15: a broker that takes no publishes, and one that answers nothing on connections that look alive.
#[tokio::test]
async fn rabbitmq_blocked_and_then_frozen_is_survived() {
    let app = App::unlimited();
    let rabbitmq = RabbitMq::dedicated();
    let stack = Stack::on(&rabbitmq.vhost().url, &Redis::shared().url(), std::slice::from_ref(&app));
    let worker = async { stack.role("worker").with("amqp.heartbeat_seconds", "1").start().await };
    let api = async { stack.role("api").with("amqp.heartbeat_seconds", "1").start().await };
    let (mut worker, node, mut api) = tokio::join!(worker, stack.node(), api);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let sender = Api::new(&api.api_url(), &app);
    sender.broadcast("before", false).await;

    rabbitmq.memory_alarm(true);
    let requests = [("body", "while blocked"), ("requestId", "blocked-1")];
    // The first publish is what makes the broker tell a connection that it is blocked.
    until("a 503", SOON, async || match sender.call("msg/broadcastMsg.action", &requests).await {
        answer if answer["code"] == 503 => Ok(()),
        answer => Err(answer),
    })
    .await;
    rabbitmq.memory_alarm(false);
    until("an acceptance", SOON, async || match sender.call("msg/broadcastMsg.action", &requests).await {
        answer if answer["code"] == 200 => Ok(()),
        answer => Err(answer),
    })
    .await;

    rabbitmq.pause();
    worker.wait_unready().await;
    api.wait_unready().await;
    rabbitmq.resume();
    worker.wait_ready().await;
    api.wait_ready().await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["before", "while blocked", "end"]);
}
