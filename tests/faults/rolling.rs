//! Every role stopped in good order under load, and a rolling restart of all of them (row 38).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::sender::{Amqp, Api, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, unique, until};

/// `drain.deadline_seconds` of the processes is 10 s; the rest is for a busy machine to notice.
const DEADLINE: Duration = Duration::from_secs(12);
const ROUNDS: usize = 2;

/// Sends by AMQP, five at a time, until it is told to stop; what was sent and the verdicts.
async fn send_by_amqp(amqp: &Amqp, app: &App, stop: &AtomicBool, sent: &AtomicUsize) -> (Vec<Value>, Vec<Value>) {
    let (mut requests, mut replies) = (Vec::new(), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let some: Vec<Value> = (0..5)
            .map(|number| if number == 0 { retained(app, &unique("kept")) } else { request(app, &unique("live")) })
            .collect();
        // A verdict that does not come within SOON fails the test: a rolling restart stops nobody for that long.
        replies.extend(amqp.burst(&some).await);
        requests.extend(some);
        sent.fetch_add(5, Ordering::Relaxed);
    }
    (requests, replies)
}

/// Sends through the server API as a good client does: no answer, 500 (unknown) or 503 (nothing was sent) means the same request
/// once more, elsewhere. Nothing else may be told: nothing is malformed here, and there is no limit.
async fn send_by_api(urls: &[String], app: &App, stop: &AtomicBool, sent: &AtomicUsize) -> (Vec<Value>, Vec<Value>) {
    let (mut requests, mut replies) = (Vec::new(), Vec::new());
    let mut urls = urls.iter().cycle();
    while !stop.load(Ordering::Relaxed) {
        let (request_id, body) = (unique("call"), unique("called"));
        let form = [("body", body.as_str()), ("requestId", request_id.as_str())];
        let answer = until("a verdict", SOON, async || {
            match Api::new(urls.next().unwrap(), app).try_call("msg/broadcastMsg.action", &form).await {
                Ok((200, answer)) if answer["code"] == 200 => Ok(answer),
                Ok((200, answer)) if answer["code"] == 500 || answer["code"] == 503 => Err(answer.to_string()),
                Ok((status, answer)) => panic!("{request_id} was told {status} {answer}"),
                Err(error) => Err(error),
            }
        })
        .await;
        requests.push(json!({ "requestId": request_id, "appKey": app.key, "body": body }));
        replies.push(answer);
        sent.fetch_add(1, Ordering::Relaxed);
    }
    (requests, replies)
}

async fn stop(process: &mut Process) -> Duration {
    let started = Instant::now();
    let status = process.drain(DEADLINE).await;
    assert_eq!(status.code(), Some(0), "{}", process.output());
    started.elapsed()
}

async fn more(sent: &AtomicUsize) {
    let before = sent.load(Ordering::Relaxed);
    until("more verdicts", SOON, async || match sent.load(Ordering::Relaxed) {
        now if now >= before + 20 => Ok(()),
        now => Err(now - before),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_every_role_under_load_loses_nothing() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let role = async |role: &str| stack.role(role).start().await;
    let (mut workers, mut nodes, mut apis) = tokio::join!(
        join_all((0..2).map(|_| role("worker"))),
        join_all((0..2).map(|_| role("node"))),
        join_all((0..2).map(|_| role("api"))),
    );
    let devices_at: Vec<String> = nodes.iter().map(Process::device_url).collect();
    let calls_at: Vec<String> = apis.iter().map(Process::api_url).collect();
    let mut devices = Vec::new();
    for number in 0..20 {
        devices.push(Device::online(&app, "web", &devices_at[number % 2]).await);
    }
    let amqp = stack.amqp().await;
    let (ending, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    let total = tokio::sync::watch::Sender::new(usize::MAX);

    let sending = async {
        let both = (send_by_amqp(&amqp, &app, &ending, &sent), send_by_api(&calls_at, &app, &ending, &sent));
        let (by_amqp, by_api) = tokio::join!(both.0, both.1);
        total.send_replace(by_amqp.0.len() + by_api.0.len());
        (by_amqp, by_api)
    };
    let rolling = async {
        let mut longest = Duration::ZERO;
        for _ in 0..ROUNDS {
            for process in workers.iter_mut().chain(&mut nodes).chain(&mut apis) {
                more(&sent).await;
                longest = longest.max(stop(process).await);
                process.restart().await;
            }
        }
        // And all of them at the same moment.
        more(&sent).await;
        let all = workers.iter_mut().chain(&mut nodes).chain(&mut apis).map(async |process| {
            let took = stop(process).await;
            process.restart().await;
            took
        });
        longest = longest.max(join_all(all).await.into_iter().max().unwrap());
        more(&sent).await;
        ending.store(true, Ordering::Relaxed);
        longest
    };
    let following = join_all(devices.iter_mut().enumerate().map(async |(number, device)| {
        let mut urls = devices_at.clone();
        urls.rotate_left(number % 2);
        let mut total = total.subscribe();
        loop {
            // A little at a time: how many there are is known at the end.
            let had = device.history().len();
            let goal = (*total.borrow_and_update()).min(had + 10);
            if had >= goal {
                return;
            }
            tokio::select! {
                () = device.follow(&urls, goal, SOON * 4) => {}
                _ = total.changed() => {}
            }
        }
    }));
    let ((by_amqp, by_api), longest, _) = tokio::join!(sending, rolling, following);

    let mut checker = Checker::default();
    checker.all_accepted(&by_amqp.0, &by_amqp.1);
    checker.all_accepted(&by_api.0, &by_api.1);
    for device in &devices {
        checker.device(device.history(), Must::Everything, 0).unwrap();
    }
    println!(
        "{} orderly stops under load, the longest {longest:?}; {} broadcasts by AMQP and {} by the API, each at {} devices once",
        ROUNDS * 6 + 6,
        by_amqp.0.len(),
        by_api.0.len(),
        devices.len()
    );
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(amqp.ready("broadcast.requests").await, 0);
    after_row(&stack).await;
}
