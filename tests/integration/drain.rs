//! SIGTERM to every role, under load: nothing is lost, the exit is orderly and in time (rows 28 and 38).

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;

use crate::support::after_row::after_row;
use crate::support::broadcastd::App;
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::sender::{Api, request};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

/// The deadline that the processes are given is 10 s, plus what a busy machine takes to notice.
const EXIT: Duration = Duration::from_secs(15);

#[tokio::test]
async fn a_worker_settles_what_it_holds_and_the_next_one_takes_over() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (mut worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests: Vec<Value> = (0..300).map(|number| request(&app, &format!("number {number}"))).collect();
    let sending = amqp.burst(&requests);
    let rolling = async {
        until("some replies", SOON, async || if amqp.replies() > 20 { Ok(()) } else { Err("none yet") }).await;
        let status = worker.drain(EXIT).await;
        assert_eq!(status.code(), Some(0), "{}", worker.output());
        stack.worker().await
    };
    let (replies, _next) = tokio::join!(sending, rolling);
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    device.collect(300, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    after_row(&stack).await;
}

#[tokio::test]
async fn a_node_sends_its_devices_elsewhere() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, mut node, other_node) = tokio::join!(stack.worker(), stack.node(), stack.node());
    let url = node.device_url();
    let mut devices = join_all((0..20).map(|_| Device::online(&app, "web", &url))).await;
    let mut witness = Device::online(&app, "web", &url).await;
    let amqp = stack.amqp().await;
    let requests: Vec<Value> = (0..200).map(|number| request(&app, &format!("number {number}"))).collect();
    let urls = [other_node.device_url()];
    let sending = async {
        let mut replies = Vec::new();
        for group in requests.chunks(10) {
            replies.extend(amqp.burst(group).await);
            if replies.len() == 60 {
                node.term();
            }
        }
        replies
    };
    let following = join_all(devices.iter_mut().map(|device| device.follow(&urls, 200, SOON * 2)));
    let (replies, _, code) = tokio::join!(sending, following, witness.closed(SOON));
    assert_eq!(code, Some(1012), "a service restart");
    assert_eq!(node.wait(EXIT).await.code(), Some(0), "{}", node.output());
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    for device in &devices {
        checker.device(device.history(), Must::Everything, 0).unwrap();
    }
    after_row(&stack).await;
}

#[tokio::test]
async fn an_api_finishes_its_calls() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (mut worker, mut api) = tokio::join!(stack.worker(), stack.api());
    let sender = Api::new(&api.api_url(), &app);
    let before = sender.broadcast("before", false).await;
    // Without a worker the call is certain to be under way: its request is in the queue, its verdict is not there.
    worker.drain(EXIT).await;
    let amqp = stack.amqp().await;
    let call = tokio::spawn(async move { sender.broadcast("under way", false).await });
    until("a request in the queue", SOON, async || match amqp.ready("broadcast.requests").await {
        0 => Err("none"),
        _ => Ok(()),
    })
    .await;
    api.term();
    let _worker = stack.worker().await;
    assert!(call.await.unwrap() > before);
    assert_eq!(api.wait(EXIT).await.code(), Some(0), "{}", api.output());
    after_row(&stack).await;
}

#[tokio::test]
async fn readiness_says_that_a_role_drains() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    for role in ["worker", "node", "api"] {
        let mut process = stack.role(role).with("drain.notice_seconds", "2").start().await;
        process.term();
        process.wait_unready().await;
        assert_eq!(process.wait(EXIT).await.code(), Some(0), "{role}: {}", process.output());
    }
}
