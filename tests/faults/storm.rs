//! A login storm (row 31).

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::Value;

use crate::support::after_row::after_row;
use crate::support::broadcastd::App;
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::fleet::{Afterwards, Fleet, STORM};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::retained;
use crate::support::stack::Stack;
use crate::support::until;

const DEVICES: usize = 10_000;
const RETAINED: usize = 100;
/// Logins that the node lets in, a second.
const ACCEPTED: u32 = 1000;

/// How often each command was carried out.
fn commands(redis: &Redis) -> BTreeMap<String, u64> {
    let stats = redis.command(&["INFO", "commandstats"]);
    let lines = stats.lines().filter_map(|line| line.trim().strip_prefix("cmdstat_"));
    lines
        .filter_map(|line| line.split_once(":calls="))
        .map(|(name, rest)| (name.to_owned(), rest.split(',').next().unwrap().parse().unwrap()))
        .collect()
}

/// Row 31: each is served 100 retained broadcasts from the node's memory; the node lets them in at its own pace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_logins_at_once_are_served_from_memory() {
    let app = App::unlimited();
    // Its own: nobody else's commands are counted.
    let redis = Redis::dedicated(&[]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let node = async {
        let node = stack.role("node").with("node.accept_per_second", ACCEPTED.to_string());
        // All of them run on this machine: they may be slow to ask.
        node.with("node.login_seconds", "60").with("log.level", "info").start().await
    };
    let (worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    let body = "x".repeat(200);
    let requests: Vec<Value> = (0..RETAINED).map(|number| retained(&app, &format!("{number} {body}"))).collect();
    checker.all_accepted(&requests, &amqp.burst(&requests).await);
    // Nobody but the node talks to Redis from here on.
    drop((worker, amqp));
    // The first device has the node read the app, once.
    let mut first = Device::online(&app, "web", &node.device_url()).await;
    first.collect(RETAINED, STORM).await;

    let before = commands(&redis);
    let start = Instant::now();
    let mut fleet = Fleet::new(&app, DEVICES);
    fleet.launch(&[node.device_url()], Afterwards::Return);
    until("at the last retained broadcast", STORM, async || {
        let accepted = node.metric("broadcastd_connections_total").await - 1.0;
        // What may be accepted at once is that of 20 ms (src/node/door.rs).
        let most = f64::from(ACCEPTED) * (start.elapsed().as_secs_f64() + 0.02);
        assert!(accepted <= most, "{accepted} connections were accepted after {:?}", start.elapsed());
        match fleet.count(|record| record.history.len() == RETAINED) {
            DEVICES => Ok(()),
            some => Err(some),
        }
    })
    .await;
    let took = start.elapsed().as_secs_f64();
    let after = commands(&redis);

    fleet.check(&checker, |record| Must::RetainedUpTo(record.head));
    let records = fleet.records();
    let refused: usize = records.iter().map(|record| record.troubles.len()).sum();
    let grown: BTreeMap<&str, u64> = after
        .iter()
        .map(|(name, calls)| (name.as_str(), calls - before.get(name).copied().unwrap_or_default()))
        .filter(|(_, calls)| *calls > 0)
        .collect();
    let total: u64 = grown.values().sum();
    println!(
        "row 31: {DEVICES} devices had {RETAINED} retained broadcasts each after {took:.1} s; \
         {refused} failed attempts; Redis carried out {total} commands meanwhile: {grown:?}"
    );
    // Leases are renewed and the connection is probed by the clock, whoever logs in.
    let by_the_clock = 20.0 * (took + 5.0);
    assert!((total as f64) < by_the_clock && total < DEVICES as u64 / 10, "{total} commands in {took:.1} s: {grown:?}");
    assert!(!grown.keys().any(|name| name.contains("range")), "the log or the retained were read: {grown:?}");
    assert_eq!((node.metric("broadcastd_sessions").await, refused), (DEVICES as f64 + 1.0, 0));
    assert_eq!(node.metric("broadcastd_logins_total").await, DEVICES as f64 + 1.0);
    after_row(&stack).await;
}
