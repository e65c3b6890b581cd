//! The way from Redis to a node: publishes that are lost, a subscription that is closed, a log that was trimmed meanwhile.

use std::time::{Duration, Instant};

use crate::support::after_row::{after_row, after_row_with_log};
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::load::{all_numbered, ask_all, replies};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::{request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

async fn stack_on(redis: &Redis, app: &App) -> Stack {
    Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(app))
}

/// A node whose lease outlasts the test and is renewed too seldom to be what finds something.
fn without_renewals(node: Process) -> Process {
    node.with("node.lease_seconds", "1000").with("node.renew_seconds", "400")
}

/// Row 24: nothing comes after it that could reveal the gap, so the renewal must.
#[tokio::test]
async fn the_last_broadcast_arrives_within_one_renewal_though_its_publish_was_lost() {
    const RENEW: u64 = 2;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async {
        let node = stack.role("node").with("node.renew_seconds", RENEW.to_string());
        // The first arrives; the second, third and fourth each are the last for a while.
        node.failpoints("feed::message=1*off->3*return(skip)").start().await
    };
    let (worker, node) = tokio::join!(stack.worker(), node);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "arrives by itself")).await;
    assert_eq!(device.contents_up_to("arrives by itself").await.len(), 1);
    let mut checker = Checker::default();
    let mut waits = Vec::new();
    for number in 0..3 {
        let lost = request(&app, &format!("lost {number}"));
        let reply = amqp.request(&lost).await;
        checker.verdict(&lost, &reply).unwrap();
        let accepted = Instant::now();
        device.collect(2 + number, SOON).await;
        waits.push(accepted.elapsed());
    }
    checker.device(&device.history()[1..], Must::Everything, 0).unwrap();
    assert_eq!(worker.metric("broadcastd_nodes_reached_total").await, 4.0, "Redis did publish them");
    assert_eq!(node.metric("broadcastd_envelopes_total").await, 1.0, "and the node did not get them");
    // A renewal, the moment that it gives the subscription, and a read; the rest is for a busy machine.
    let longest = Duration::from_secs(RENEW) + Duration::from_secs(1);
    assert!(waits.iter().all(|wait| *wait < longest), "{waits:?}");
    println!("renewed every {RENEW} s, found after {waits:?}");
    // The subscription that it no longer trusted was replaced by one that works.
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await.len(), 1);
    assert_eq!(node.metric("broadcastd_envelopes_total").await, 2.0);
    after_row(&stack).await;
}

const SOME_LOST: &str = "feed::message=5*off->3*return(skip)->7*off->20*return(skip)->30*off->1*return(skip)->off";

/// Row 24, in the middle of a stream: the next one's `prev` reveals it at once.
#[tokio::test]
async fn lost_publishes_in_a_stream_are_read_from_the_log() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async { without_renewals(stack.role("node")).failpoints(SOME_LOST).start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = all_numbered(&app, 0..300);
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &amqp.burst(&requests).await);
    device.collect(300, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(node.metric("broadcastd_envelopes_total").await, 276.0, "24 were lost");
    assert!(node.metric("broadcastd_backfills_total").await > 0.0);
    after_row(&stack).await;
}

async fn wait_for_subscribers(redis: &Redis, wanted: usize) {
    let count = async || match redis.command(&["CLIENT", "LIST", "TYPE", "pubsub"]).lines().count() {
        count if count == wanted => Ok(()),
        count => Err(count),
    };
    until("subscribers", SOON * 2, count).await;
}

/// Row 23: what was published while the subscription was gone comes from the log.
#[tokio::test]
async fn a_node_whose_subscription_was_killed_misses_nothing() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&[]);
    let stack = stack_on(&redis, &app).await;
    let node = async { without_renewals(stack.role("node")).start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = all_numbered(&app, 0..200);
    let asking = ask_all(&amqp, &requests);
    let killing = async {
        for replies in [20, 60, 100] {
            until("more replies", SOON, async || if amqp.replies() > replies { Ok(()) } else { Err(replies) }).await;
            redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        }
    };
    let (asked, ()) = tokio::join!(asking, killing);
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies(&amqp, &asked).await);
    // And once more where nothing comes after it that could reveal the gap.
    node.pause();
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    let last = all_numbered(&app, 200..201);
    checker.all_accepted(&last, &amqp.burst(&last).await);
    node.resume();
    device.collect(201, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    after_row(&stack).await;
}

/// Row 23, the real thing: a node that stands still while more is published to it than Redis is willing to keep for it.
#[tokio::test]
async fn a_node_that_redis_cut_off_for_its_output_buffer_misses_nothing() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&["--client-output-buffer-limit", "pubsub 64kb 0 0"]);
    let stack = stack_on(&redis, &app).await;
    // Room for the whole flood: this is about the node, not about devices that fall behind.
    let node = async { without_renewals(stack.role("node")).with("node.recent_bytes", "100000000").start().await };
    let worker = async { stack.role("worker").with("ledger.log_length", "5000").start().await };
    let (_worker, node) = tokio::join!(worker, node);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    assert_eq!(device.contents_up_to("before").await.len(), 1);
    let mut checker = Checker::default();
    node.pause();
    // 16 KiB each: the kernel's buffers between the two take some megabytes.
    let padding = "\u{1F600}".repeat(4000);
    let mut sent = 0;
    while !redis.output().contains("output buffer limits") {
        assert!(sent < 3000, "Redis still has not cut it off");
        let requests: Vec<_> = (sent..sent + 100).map(|number| request(&app, &format!("{number} {padding}"))).collect();
        checker.all_accepted(&requests, &amqp.burst(&requests).await);
        sent += 100;
    }
    wait_for_subscribers(&redis, 0).await;
    let after = all_numbered(&app, sent..sent + 100);
    checker.all_accepted(&after, &amqp.burst(&after).await);
    node.resume();
    device.collect(sent + 101, SOON * 2).await;
    checker.device(&device.history()[1..], Must::Everything, 0).unwrap();
    assert_eq!(node.metric("broadcastd_lost_envelopes_total").await, 0.0);
    println!("cut off after at most {sent} envelopes of 16 KiB");
    after_row(&stack).await;
}

/// Row 26: cut off while more is accepted than the log keeps.
#[tokio::test]
async fn what_the_log_has_let_go_is_recovered_if_retained_and_else_counted() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&[]);
    let stack = stack_on(&redis, &app).await;
    let node = async { without_renewals(stack.role("node")).start().await };
    let worker = async { stack.role("worker").with("ledger.log_length", "50").start().await };
    let (_worker, node) = tokio::join!(worker, node);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    assert_eq!(device.contents_up_to("before").await.len(), 1);

    node.pause();
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    wait_for_subscribers(&redis, 0).await;
    let requests: Vec<_> = (0..500)
        .map(|number| {
            let body = format!("number {number}");
            if number % 10 == 0 { retained(&app, &body) } else { request(&app, &body) }
        })
        .collect();
    let replies = amqp.burst(&requests).await;
    let mut accepted: Vec<_> = requests
        .iter()
        .zip(&replies)
        .map(|(request, reply)| {
            assert_eq!(reply["code"], 200, "{reply}");
            (reply["msg"]["broadcastId"].as_u64().unwrap(), request["isOffline"] == true, request["body"].clone())
        })
        .collect();
    accepted.sort_by_key(|(id, ..)| *id);
    let log = redis.command(&["XRANGE", &format!("{}{{{}}}:log", stack.prefix, app.key), "-", "+", "COUNT", "1"]);
    let oldest: u64 = log.split('-').next().unwrap().parse().unwrap();
    let there = |(id, is_retained, _): &&(u64, bool, serde_json::Value)| *id >= oldest || *is_retained;
    let expected: Vec<_> = accepted.iter().filter(there).map(|(id, ..)| *id).collect();
    let gone = accepted.len() - expected.len();
    assert!(gone > 200, "the log keeps about 50 of 500, and 50 are retained: {gone} are gone");

    node.resume();
    device.collect(1 + expected.len(), SOON).await;
    // Nothing late follows: the next one is the next one.
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["end"]);
    let had: Vec<u64> = device.history()[1..=expected.len()].iter().map(|arrival| arrival.id).collect();
    assert_eq!(had, expected, "what is retained or logged, once and in order");
    let lost = node.metric("broadcastd_lost_envelopes_total").await;
    println!("{gone} of 500 were gone, {lost} were counted");
    assert_eq!(lost, gone as f64);
    assert!(node.output().contains("broadcasts are gone from the log"), "loudly");
    after_row_with_log(&stack, 50).await;
}
