//! Row 32: a retained broadcast that expires while devices log in is never delivered late.
//!
//! When something arrives says little of when it was sent. So the node is stopped (SIGSTOP) over the moment of expiry, by the
//! clock of Redis, or its socket is full: whatever it hands to the kernel afterwards is late, without any tolerance.

use std::time::Duration;

use serde_json::Value;

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::fleet::{Afterwards, Fleet, STORM};
use crate::support::redis::Redis;
use crate::support::sender::{request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, now_ms, until};

/// A retained request that is valid for so many seconds.
fn brief(app: &App, body: &str, seconds: u64) -> Value {
    let mut request = retained(app, body);
    request["ttlSeconds"] = seconds.into();
    request
}

/// Waits until the clock of Redis, which decides, has passed this time (milliseconds since the Unix epoch).
async fn until_redis_passes(at_ms: u64) {
    until("past the expiry", SOON, async || {
        let time = Redis::shared().command(&["TIME"]);
        let mut parts = time.lines().map(|part| part.parse::<u64>().unwrap());
        match parts.next().unwrap() * 1000 + parts.next().unwrap() / 1000 {
            now if now > at_ms => Ok(()),
            now => Err(format!("{now}, {} ms before", at_ms - now)),
        }
    })
    .await;
}

/// When the last of these expires, milliseconds since the Unix epoch.
fn expiry(replies: &[Value]) -> u64 {
    replies.iter().map(|reply| reply["msg"]["expireTime"].as_u64().unwrap()).max().unwrap()
}

/// Waits until the process is stopped (T in /proc).
async fn until_stopped(node: &Process) {
    let path = format!("/proc/{}/stat", node.pid());
    until("stopped", SOON, async || {
        let stat = std::fs::read_to_string(&path).unwrap();
        if stat.rsplit(") ").next().unwrap().starts_with('T') { Ok(()) } else { Err(stat) }
    })
    .await;
}

/// Logins that reached the node's socket in time and are read too late.
#[tokio::test]
async fn logins_that_wait_over_the_expiry_get_what_is_still_valid() {
    const DEVICES: usize = 100;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let amqp = stack.amqp().await;
    // The node has the app's timeline, so that it is its own clock that counts.
    let mut witness = Device::online(&app, "web", &node.device_url()).await;
    let requests: Vec<Value> =
        (0..40).map(|number| if number % 2 == 0 { brief(&app, "brief", 2) } else { retained(&app, "valid") }).collect();
    let replies = amqp.burst(&requests).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    witness.collect(40, SOON).await;

    let mut fleet = Fleet::new(&app, DEVICES);
    node.pause();
    until_stopped(&node).await;
    // The kernel takes the connections and what is sent on them; they ask for the upgrade in time, by far.
    fleet.launch(&[node.device_url()], Afterwards::Stay);
    let brief: Vec<Value> = replies.iter().step_by(2).cloned().collect();
    until_redis_passes(expiry(&brief)).await;
    node.resume();
    fleet.until_each_had(20, SOON).await;
    amqp.accepted(&request(&app, "end")).await;
    fleet.until_each_had(21, SOON).await;
    let valid: Vec<u64> =
        replies.iter().skip(1).step_by(2).map(|reply| reply["msg"]["broadcastId"].as_u64().unwrap()).collect();
    for record in fleet.records() {
        let had: Vec<u64> = record.history.iter().take(20).map(|seen| seen.id).collect();
        assert_eq!((had, record.history.len()), (valid.clone(), 21));
    }
    after_row(&stack).await;
}

/// A node that is held up in the middle of a sweep sends nothing that has expired meanwhile to those whose turn comes then.
#[tokio::test]
async fn a_sweep_that_is_held_up_over_the_expiry_leaves_the_rest_out() {
    const DEVICES: usize = 50;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    // One shard, so that all are in one sweep; it stops when ten have had the broadcast.
    let points = "node::mid-sweep=9*off->1*return(stop)";
    let node = async { stack.role("node").with("node.shards", "1").failpoints(points).start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let mut fleet = Fleet::new(&app, DEVICES);
    fleet.launch(&[node.device_url()], Afterwards::Stay);
    fleet.until_online(SOON).await;
    let replies = amqp.burst(&[brief(&app, "brief", 1)]).await;
    until_stopped(&node).await;
    until_redis_passes(expiry(&replies)).await;
    node.resume();
    let end = amqp.accepted(&request(&app, "end")).await;
    fleet.until_all("at the end", SOON, |record| record.history.last().is_some_and(|seen| seen.id == end)).await;
    let had = fleet.count(|record| record.history.len() == 2);
    assert_eq!(had, 10, "had it; in time were 10 of {DEVICES}");
    assert_eq!(fleet.count(|record| record.history.len() == 1), DEVICES - 10);
    after_row(&stack).await;
}

/// A device that stops reading in the middle of its login: what the kernel has by the expiry was sent in time (a frame that
/// was begun is finished), of the rest only what is valid follows.
#[tokio::test]
async fn a_device_that_stalls_in_its_login_gets_nothing_late() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async { stack.role("node").with("node.send_buffer_bytes", "4096").start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let body = "x".repeat(4000);
    let requests: Vec<Value> =
        (0..90).map(|number| if number % 3 < 2 { brief(&app, &body, 4) } else { retained(&app, &body) }).collect();
    let replies = amqp.burst(&requests).await;
    let expires = expiry(
        &replies
            .iter()
            .filter(|reply| reply["msg"]["expireTime"].as_u64().unwrap() < now_ms() + 60_000)
            .cloned()
            .collect::<Vec<_>>(),
    );
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);

    let mut fleet = Fleet::new(&app, 1).receive_buffer(4096);
    fleet.stop_reading();
    fleet.launch(&[node.device_url()], Afterwards::Stay);
    until("a full socket", SOON, async || match node.metric("broadcastd_sessions_behind").await {
        1.0 => Ok(()),
        behind => Err(behind),
    })
    .await;
    until_redis_passes(expires).await;
    // Nobody else is here: so many frames are with the kernel, sent in time. One more may have been begun.
    let in_time = node.metric("broadcastd_deliveries_total").await as usize;
    assert!((1..60).contains(&in_time), "{in_time} frames fit into the buffers");
    fleet.read_on();
    let end = amqp.accepted(&request(&app, "end")).await;
    fleet.until_all("at the end", SOON, |record| record.history.last().is_some_and(|seen| seen.id == end)).await;
    let record = fleet.records().remove(0);
    let valid_until: std::collections::BTreeMap<u64, Option<u64>> = checker.ids().into_iter().collect();
    let late = |id: u64| valid_until.get(&id).copied().flatten().is_some_and(|at| at <= expires);
    let brief = record.history.iter().filter(|seen| late(seen.id)).count();
    let after = record.history.iter().skip(in_time + 1).filter(|seen| late(seen.id)).count();
    println!(
        "row 32: {in_time} frames were with the kernel at the expiry; {brief} brief ones arrived, {after} behind those"
    );
    assert_eq!(after, 0, "sent late");
    let valid = record.history.len() - brief - 1;
    assert_eq!(valid, 30, "all that are valid, once");
    assert!(record.history.windows(2).all(|pair| pair[0].id < pair[1].id));
    after_row(&stack).await;
}

/// Logins all around the expiry: who asks before it may have it, who asks after it never.
#[tokio::test]
async fn whoever_asks_after_the_expiry_does_not_get_it() {
    const DEVICES: usize = 400;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    // Read by the node before the broadcasts come.
    let _witness = Device::online(&app, "web", &node.device_url()).await;
    let requests: Vec<Value> = (0..10).map(|number| brief(&app, "brief", 1 + number % 2)).collect();
    let replies = amqp.burst(&requests).await;
    checker.all_accepted(&requests, &replies);
    let mut fleet = Fleet::new(&app, DEVICES);
    let begin = now_ms();
    for number in 0..DEVICES {
        fleet.launch_one(number, &[node.device_url()], Afterwards::Stay);
        // Over two and a half seconds, in which both kinds expire.
        let due = begin + number as u64 * 2500 / DEVICES as u64;
        tokio::time::sleep(Duration::from_millis(due.saturating_sub(now_ms()))).await;
    }
    until_redis_passes(expiry(&replies)).await;
    fleet.until_all("welcomed", STORM, |record| record.logins == 1).await;
    let requests = [request(&app, "end")];
    checker.all_accepted(&requests, &amqp.burst(&requests).await);
    fleet
        .until_all("at the end", SOON, |record| {
            record.history.last().is_some_and(|seen| checker.ids().last().unwrap().0 == seen.id)
        })
        .await;
    fleet.check(&checker, |record| Must::RetainedUpTo(record.head));
    let (all, none) =
        (fleet.count(|record| record.history.len() == 11), fleet.count(|record| record.history.len() == 1));
    println!("row 32: of {DEVICES} devices {all} had all that were brief, {none} none");
    assert!(all > 0 && none > 0, "not around the expiry: {all}, {none}");
    after_row(&stack).await;
}
