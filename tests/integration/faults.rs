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

/// Rows 1 to 4: whatever the worker was doing when it was killed.
#[tokio::test]
async fn a_worker_killed_in_mid_stream_loses_and_doubles_nothing() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    // Small batches and a small prefetch: both workers are in the middle of something all the time.
    let worker = || async { stack.role("worker").with("worker.batch", "4").with("amqp.prefetch", "40").start().await };
    let (mut victim, _survivor, node) = tokio::join!(worker(), worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 300);

    let asked = ask_all(&amqp, &requests[..150]);
    let kill = async {
        until("some replies", SOON, async || match amqp.replies() {
            replies if replies > 30 => Ok(()),
            replies => Err(replies),
        })
        .await;
        victim.kill();
        ask_all(&amqp, &requests[150..]).await
    };
    let (mut asked, rest) = tokio::join!(asked, kill);
    asked.extend(rest);
    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;

    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    checker.every_request_ended().unwrap();
    device.collect(300, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    // Asking again finds the same verdicts (I6), and sends nothing.
    let again = amqp.burst(&requests).await;
    checker.all_accepted(&requests, &again);
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["end"]);
}

/// Row 5: a worker that stands still past the heartbeat loses its deliveries to the other; its late acks harm nothing.
#[tokio::test]
async fn a_worker_that_stands_still_and_goes_on_harms_nothing() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let slow =
        async { stack.role("worker").with("worker.batch", "1").with("amqp.heartbeat_seconds", "1").start().await };
    let (sleeper, node) = tokio::join!(slow, stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 100);
    let asking = ask_all(&amqp, &requests);
    let pause = async {
        until("a reply", SOON, async || if amqp.replies() > 5 { Ok(()) } else { Err("none") }).await;
        sleeper.pause();
        let worker = stack.worker().await;
        let all = async || match amqp.replies() {
            100 => Ok(()),
            replies => Err(replies),
        };
        until("all replies", SOON, all).await;
        sleeper.resume();
        worker
    };
    let (asked, _worker) = tokio::join!(asking, pause);
    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    until("a new session", SOON, async || match sleeper.metric("broadcastd_worker_sessions_total").await {
        sessions if sessions > 1.0 => Ok(()),
        sessions => Err(sessions),
    })
    .await;
    amqp.accepted(&request(&app, "end")).await;
    device.collect(101, SOON).await;
    checker.device(&device.history()[..100], Must::Everything, 0).unwrap();
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
