//! Broadcasts that race with a node's first look at an app: subscribe, lease and snapshot, then live.

use std::cell::Cell;

use futures_util::future::join_all;
use serde_json::Value;

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::load::all_numbered;
use crate::support::redis::Redis;
use crate::support::sender::request;
use crate::support::stack::Stack;
use crate::support::{SOON, until};

/// Whatever is missed on the way would not be found by a renewal, but only by chance or never.
fn without_renewals(node: Process) -> Process {
    node.with("node.lease_seconds", "1000").with("node.renew_seconds", "400")
}

/// How many of these a device is to have that logged in when `head` was the newest.
fn due(requests: &[Value], replies: &[Value], head: u64) -> usize {
    let is_due = |(request, reply): &(&Value, &Value)| {
        request["isOffline"] == true || reply["msg"]["broadcastId"].as_u64().unwrap() > head
    };
    requests.iter().zip(replies).filter(is_due).count()
}

/// What the device is to have that logged in with the first look at the app, and nothing else, before anything else is sent:
/// the next one would reveal what is missing.
async fn check(device: &mut Device, requests: &[Value], replies: &[Value]) {
    let mut checker = Checker::default();
    checker.all_accepted(requests, replies);
    let head = device.head();
    device.collect(due(requests, replies, head), SOON).await;
    checker.device(device.history(), Must::RetainedUpTo(head), 0).unwrap();
}

/// Row 25: the node stands still when it is subscribed and has neither lease nor snapshot.
#[tokio::test]
async fn published_between_subscribing_and_the_snapshot() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node =
        async { without_renewals(stack.role("node")).failpoints("node::after-subscribe=1*return(stop)").start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let requests = all_numbered(&app, 0..130);
    let mut replies = amqp.burst(&requests[..30]).await;
    let mut device = Device::new(&app, "web");
    let url = node.device_url();
    let publishing = async {
        node.wait_stopped().await;
        replies.extend(amqp.burst(&requests[30..]).await);
        node.resume();
    };
    tokio::join!(device.login(&url), publishing);
    check(&mut device, &requests, &replies).await;
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["end"]);
    after_row(&stack).await;
}

/// Row 25: the node has the lease, and its snapshot is on the way for seconds while what is published arrives.
#[tokio::test]
async fn published_between_the_snapshot_and_going_live() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async {
        without_renewals(stack.role("node")).failpoints("node::after-snapshot=1500*return(skip)").start().await
    };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let requests = all_numbered(&app, 0..130);
    let mut replies = amqp.burst(&requests[..30]).await;
    let head_before = replies.iter().filter_map(|reply| reply["msg"]["broadcastId"].as_u64()).max().unwrap();
    let mut device = Device::new(&app, "web");
    let url = node.device_url();
    let nodes = format!("{}{{{}}}:nodes", stack.prefix, app.key);
    let is_welcome = Cell::new(false);
    let publishing = async {
        let leased = async || match Redis::shared().command(&["ZCARD", &nodes]).as_str() {
            "1" => Ok(()),
            count => Err(count.to_owned()),
        };
        until("leased", SOON, leased).await;
        replies.extend(amqp.burst(&requests[30..]).await);
        let arrived = async || match node.metric("broadcastd_envelopes_total").await {
            100.0 => Ok(()),
            count => Err(count),
        };
        until("on the node", SOON, arrived).await;
        assert!(!is_welcome.get(), "the snapshot has not arrived yet");
    };
    let login = async {
        device.login(&url).await;
        is_welcome.set(true);
    };
    tokio::join!(login, publishing);
    assert!(device.head() > head_before);
    check(&mut device, &requests, &replies).await;
    assert_eq!(node.metric("broadcastd_lost_envelopes_total").await, 0.0);
    assert_eq!(node.metric("broadcastd_backfills_total").await, 0.0, "what was held back needs no look at the log");
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["end"]);
    after_row(&stack).await;
}

/// Row 25, without a stop: first devices of many apps log in while a burst is being sent.
#[tokio::test]
async fn first_devices_that_log_in_during_a_burst_miss_nothing() {
    let apps: Vec<App> = (0..24).map(|_| App::unlimited()).collect();
    let stack = Stack::new(&apps);
    let node = async { without_renewals(stack.role("node")).start().await };
    // One at a time, so that a burst lasts while devices log in, on a fast machine too.
    let worker = stack.role("worker").with("worker.batch", "1").with("worker.batches_in_flight", "1");
    let (_worker, node) = tokio::join!(worker.start(), node);
    let amqp = stack.amqp().await;
    let url = node.device_url();
    let mut amid = 0;
    for app in &apps {
        let requests = all_numbered(app, 0..150);
        let replies_before = amqp.replies();
        let login = async {
            // At another moment of the burst each time.
            let wanted = replies_before + amid % 30;
            until("replies", SOON, async || if amqp.replies() >= wanted { Ok(()) } else { Err(wanted) }).await;
            join_all(["web", "ios"].map(|platform| Device::online(app, platform, &url))).await
        };
        let (replies, mut devices) = tokio::join!(amqp.burst(&requests), login);
        let mut checker = Checker::default();
        checker.all_accepted(&requests, &replies);
        let ids: Vec<u64> = replies.iter().map(|reply| reply["msg"]["broadcastId"].as_u64().unwrap()).collect();
        for device in &mut devices {
            let head = device.head();
            device.collect(due(&requests, &replies, head), SOON).await;
            checker.device(device.history(), Must::RetainedUpTo(head), 0).unwrap();
            amid += usize::from(ids.iter().any(|id| *id <= head) && ids.iter().any(|id| *id > head));
        }
        amqp.accepted(&request(app, "end")).await;
        for device in &mut devices {
            assert_eq!(device.contents_up_to("end").await, ["end"]);
        }
    }
    assert!(amid >= 4, "only {amid} of 48 logins were in the middle of their burst");
    println!("{amid} of 48 logins were in the middle of their burst");
    after_row(&stack).await;
}

/// Row 25, the other way round: the app is given up and opened again while broadcasts come.
#[tokio::test]
async fn an_app_that_is_given_up_and_opened_again_misses_nothing() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node =
        async { stack.role("node").with("node.linger_seconds", "0").with("node.renew_seconds", "1").start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let url = node.device_url();
    let nodes = format!("{}{{{}}}:nodes", stack.prefix, app.key);
    let mut checker = Checker::default();
    for round in 0..8 {
        let requests = all_numbered(&app, round * 40..round * 40 + 40);
        let (replies, mut device) = tokio::join!(amqp.burst(&requests), Device::online(&app, "web", &url));
        checker.all_accepted(&requests, &replies);
        amqp.accepted(&request(&app, &format!("end {round}"))).await;
        // Ends of earlier rounds are not retained: nothing of them comes again.
        let had = device.contents_up_to(&format!("end {round}")).await.len() - 1;
        checker.device(&device.history()[..had], Must::RetainedUpTo(device.head()), 0).unwrap();
        device.drop_connection();
        if round % 2 == 0 {
            // Else the next one may come before it is given up, or while it is.
            let left = async || match Redis::shared().command(&["ZCARD", &nodes]).as_str() {
                "0" => Ok(()),
                count => Err(count.to_owned()),
            };
            until("without a lease", SOON, left).await;
        }
    }
    after_row(&stack).await;
}
