//! Everything in one process on the embedded store.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use serde_json::Value;

use crate::support::after_row::after_row_without_redis;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::sender::Api;
use crate::support::{SOON, unique, until};

fn standalone(apps: &[App]) -> Process {
    Process::new("standalone", apps).with("embedded.path", "store.redb")
}

#[tokio::test]
async fn it_sends_retains_and_limits() {
    let app = App::new();
    let process = standalone(std::slice::from_ref(&app)).start().await;
    let sender = Api::new(&process.api_url(), &app);
    let mut device = Device::online(&app, "web", &process.device_url()).await;
    for number in 0..10 {
        sender.broadcast(&format!("number {number}"), number == 0).await;
    }
    device.collect(10, SOON).await;
    let refused = sender.call("msg/broadcastMsg.action", &[("body", "number 11")]).await;
    assert_eq!(refused["code"], 416, "{refused}");
    let mut late = Device::online(&app, "ios", &process.device_url()).await;
    assert_eq!(late.expect_broadcast(SOON).await.content, "number 0");
}

/// Row 40: accepted means still there.
#[tokio::test]
async fn killed_under_load_it_keeps_what_it_accepted() {
    let app = App::unlimited();
    let mut process = standalone(std::slice::from_ref(&app)).start().await;
    let url = process.api_url();
    let send = async |number: usize| {
        let request_id = unique("kill");
        let body = format!("number {number}");
        let form = [("body", body.as_str()), ("isOffline", "true"), ("requestId", &request_id)];
        let answer = Api::new(&url, &app).try_call("msg/broadcastMsg.action", &form).await;
        (serde_json::json!({ "requestId": request_id, "body": body }), answer)
    };
    let mut accepted: Vec<(Value, Value)> = Vec::new();
    let mut open: Vec<Value> = Vec::new();
    // Ten callers, each with its next call once the one before is answered: whenever it is killed, calls are under way.
    let answered = AtomicUsize::new(0);
    let calling = join_all((0..10).map(async |_| {
        let mut answers = Vec::new();
        loop {
            let (request, answer) = send(answered.load(Ordering::Relaxed)).await;
            match answer {
                Ok((200, answer)) if answer["code"] == 200 => answers.push((request, answer)),
                Ok(other) => panic!("{other:?}"),
                Err(_) => return (answers, request),
            }
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }));
    let killing = async {
        until("75 answers", SOON, async || match answered.load(Ordering::Relaxed) {
            count if count >= 75 => Ok(()),
            count => Err(count),
        })
        .await;
        process.kill();
    };
    for (answers, request) in tokio::join!(calling, killing).0 {
        accepted.extend(answers);
        open.push(request);
    }
    assert!(accepted.len() >= 75 && open.len() == 10, "{} accepted, {} open", accepted.len(), open.len());
    process.restart().await;

    let sender = Api::new(&process.api_url(), &app);
    let mut checker = Checker::default();
    for (request, answer) in &accepted {
        checker.verdict(request, answer).unwrap();
        let id = answer["msg"]["broadcastId"].to_string();
        let found = sender.call("history/queryBroadcastMsgById.action", &[("broadcastId", &id)]).await;
        assert_eq!(found["msg"]["body"], request["body"], "{found}");
    }
    // Everything is asked again, with its id: what was accepted has the same verdict, what was open is decided now.
    for request in accepted.iter().map(|(request, _)| request).chain(&open) {
        let (id, body) = (request["requestId"].as_str().unwrap(), request["body"].as_str().unwrap());
        let form = [("body", body), ("isOffline", "true"), ("requestId", id)];
        let answer = sender.call("msg/broadcastMsg.action", &form).await;
        assert_eq!(answer["code"], 200, "{answer}");
        checker.verdict(request, &answer).unwrap();
    }
    let mut device = Device::online(&app, "web", &process.device_url()).await;
    device.collect(checker.accepted().min(100), SOON).await;
    checker.device(device.history(), Must::RetainedUpTo(device.head()), 0).unwrap();
    after_row_without_redis(std::slice::from_ref(&app));
}

#[tokio::test]
async fn it_drains() {
    let app = App::new();
    let mut process = standalone(std::slice::from_ref(&app)).start().await;
    let mut device = Device::online(&app, "web", &process.device_url()).await;
    process.term();
    assert_eq!(device.closed(SOON).await, Some(1012));
    assert_eq!(process.wait(SOON).await.code(), Some(0), "{}", process.output());
}
