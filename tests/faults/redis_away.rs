//! Redis down for half a minute and frozen for ten seconds, under load all the while.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::support::after_row::after_row;
use crate::support::broadcastd::App;
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::load::{Load, replies};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::{Amqp, request};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

const PACE: Duration = Duration::from_millis(20);

async fn wait_for_replies(amqp: &Amqp, least: usize) {
    let count = async || if amqp.replies() >= least { Ok(()) } else { Err(amqp.replies()) };
    until("replies", SOON, count).await;
}

/// Row 17.
#[tokio::test]
async fn redis_down_for_half_a_minute_under_load() {
    let app = App::unlimited();
    let mut redis = Redis::durable();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = Arc::new(stack.amqp().await);
    let load = Load::start(amqp.clone(), &app, PACE);
    wait_for_replies(&amqp, 100).await;

    redis.kill();
    let back = Instant::now() + Duration::from_secs(30);
    worker.wait_unready().await;
    node.wait_unready().await;
    let decided = amqp.replies();
    let mut most_held = 0.0_f64;
    while Instant::now() < back {
        for role in [&worker, &node] {
            let (status, body) = role.readiness().await.unwrap();
            assert_ne!(status, 200, "{body}");
        }
        most_held = most_held.max(worker.metric("broadcastd_requests_held").await);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert!((1.0..=512.0).contains(&most_held), "held, and never more than the prefetch: {most_held}");
    assert_eq!(amqp.replies(), decided, "nothing is decided without the ledger");
    redis.start();
    worker.wait_ready().await;
    node.wait_ready().await;
    wait_for_replies(&amqp, decided + 500).await;
    let (requests, asked) = load.stop().await;

    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies(&amqp, &asked).await);
    device.collect(requests.len(), SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    let mut late = Device::online(&app, "ios", &node.device_url()).await;
    late.collect(100, SOON).await;
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(worker.metric("broadcastd_requests_held").await, 0.0);

    // The subscription is back: what is sent now arrives by it, not by a look at the log.
    assert_eq!(redis.command(&["PUBSUB", "CHANNELS"]).lines().count(), 1);
    let (by_subscription, by_log) =
        (node.metric("broadcastd_envelopes_total").await, node.metric("broadcastd_backfills_total").await);
    for _ in 0..10 {
        amqp.accepted(&request(&app, "after")).await;
    }
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await.len(), 11);
    assert_eq!(node.metric("broadcastd_envelopes_total").await - by_subscription, 11.0);
    assert_eq!(node.metric("broadcastd_backfills_total").await, by_log);
    println!("{} requests, at most {most_held} held", requests.len());
    after_row(&stack).await;
}

/// Row 18: what timed out is carried out when Redis wakes up, and asked again.
#[tokio::test]
async fn redis_frozen_for_ten_seconds_under_load() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&[]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (mut worker, other_worker, mut node) = tokio::join!(stack.worker(), stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = Arc::new(stack.amqp().await);
    let load = Load::start(amqp.clone(), &app, PACE);
    wait_for_replies(&amqp, 100).await;

    redis.pause();
    let back = Instant::now() + Duration::from_secs(10);
    worker.wait_unready().await;
    node.wait_unready().await;
    tokio::time::sleep_until(back).await;
    let decided = amqp.replies();
    redis.resume();
    worker.wait_ready().await;
    node.wait_ready().await;
    wait_for_replies(&amqp, decided + 500).await;
    let (requests, asked) = load.stop().await;

    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies(&amqp, &asked).await);
    device.collect(requests.len(), SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    let repeated =
        worker.metric("broadcastd_repeated_total").await + other_worker.metric("broadcastd_repeated_total").await;
    assert!(repeated > 0.0, "calls that timed out were carried out");
    // The day's counter says how often the quota was charged.
    let day = redis.command(&["GET", &format!("{}{{{}}}:rate:day", stack.prefix, app.key)]);
    assert_eq!(day.split(' ').nth(1).unwrap(), requests.len().to_string());
    println!("{} requests, {repeated} of them carried out by a call that had timed out", requests.len());
    after_row(&stack).await;
}
