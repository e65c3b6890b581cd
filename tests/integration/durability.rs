//! Row 16, with a disk whose syncs do not end: what Redis has answered, by each way of syncing its append-only file.

use std::time::Duration;

use serde_json::Value;

use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must, in_order};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::load::{all_numbered, ask_all, replies};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::{ALWAYS, Redis};
use crate::support::sender::retained;
use crate::support::stack::Stack;
use crate::support::{SOON, until};

/// A worker and a node that wait for the disk's Redis as long as it takes.
async fn roles(stack: &Stack) -> (Process, Process) {
    let patient = |role: &str| stack.role(role).with("redis.response_timeout_ms", "60000");
    tokio::join!(patient("worker").start(), patient("node").start())
}

/// `appendfsync always`: no answer before the sync, so that nobody is told of what a kill could take back.
#[tokio::test]
async fn with_a_sync_before_each_answer_nobody_is_told_of_what_may_be_lost() {
    let (app, disk) = (App::unlimited(), Disk::new());
    let mut redis = Redis::on_disk(&disk, &ALWAYS);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (mut worker, mut node) = roles(&stack).await;
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    let before = all_numbered(&app, 0..30);
    checker.all_accepted(&before, &amqp.burst(&before).await);
    device.collect(30, SOON).await;

    disk.hold();
    let during = all_numbered(&app, 30..60);
    let asked = ask_all(&amqp, &during).await;
    disk.wait_held().await;
    // It answers nobody, whatever it was asked: not even that it has a request.
    let silent = tokio::time::timeout(Duration::from_secs(3), device.expect_broadcast(SOON)).await;
    assert!(silent.is_err(), "the device has {silent:?}");
    assert_eq!(amqp.replies(), 30, "nobody was told");
    redis.kill();
    disk.release();
    redis.start();
    tokio::join!(worker.wait_ready(), node.wait_ready());

    checker.all_accepted(&during, &replies(&amqp, &asked).await);
    device.collect(60, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    checker.all_accepted(&before, &amqp.burst(&before).await);
}

/// `appendfsync everysec`, while a sync takes its time: Redis answers, and writes up to two seconds later. Killed in between it
/// has lost what it answered, and then holds what is promised of a lost tail (row 19).
#[tokio::test]
async fn with_a_sync_every_second_a_kill_may_lose_what_was_accepted_and_no_more() {
    let (app, disk) = (App::unlimited(), Disk::new());
    let mut redis = Redis::on_disk(&disk, &["--appendonly", "yes", "--appendfsync", "everysec"]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (mut worker, mut node) = roles(&stack).await;
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let (mut kept, mut number): (Vec<(Value, Value)>, usize) = (Vec::new(), 0);
    let lost = loop {
        assert!(number < 80, "Redis never put off its writing");
        disk.hold();
        let first = retained(&app, &format!("number {number}"));
        kept.push((first.clone(), amqp.request(&first).await));
        disk.wait_held().await;
        let length = || std::fs::metadata(redis.append_only_file()).unwrap().len();
        let written = length();
        let some: Vec<Value> = (1..=9).map(|at| retained(&app, &format!("lost {}", number + at))).collect();
        let answers = amqp.burst(&some).await;
        number += 10;
        device.collect(number, SOON).await;
        redis.pause();
        let some = some.into_iter().zip(answers);
        if length() == written {
            redis.kill();
            break some.collect::<Vec<_>>();
        }
        // Two seconds had passed, or there was a sync's end in between.
        redis.resume();
        disk.release();
        kept.extend(some);
    };
    println!("killed with {} accepted and not written, {} in the file", lost.len(), kept.len());
    disk.release();
    redis.start();
    tokio::join!(worker.wait_ready(), node.wait_ready());

    for (request, verdict) in &kept {
        assert_eq!(amqp.request(request).await, *verdict, "what was in the file is as it was");
    }
    until("what was lost, written back", SOON, async || match node.metric("broadcastd_restored_total").await {
        9.0 => Ok(()),
        count => Err(count),
    })
    .await;
    let other_node = stack.node().await;
    let mut late = Device::online(&app, "ios", &other_node.device_url()).await;
    let newest = device.history().last().unwrap().id;
    for (request, verdict) in &lost {
        assert_eq!(verdict["code"], 200, "{request}");
        let again = amqp.request(request).await;
        let id = again["msg"]["broadcastId"].as_u64().unwrap();
        assert!(id > newest, "{again}: a request whose verdict was lost counts as new, under another id");
    }
    number += lost.len();
    device.collect(number, SOON).await;
    in_order(device.history()).unwrap();
    let all: Vec<u64> = device.history().iter().map(|had| had.id).collect();
    late.collect(all.len(), SOON).await;
    assert_eq!(late.history().iter().map(|had| had.id).collect::<Vec<_>>(), all, "on a node that had none of it");
}
