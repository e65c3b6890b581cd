//! Rows of the fault table, against real processes. After each, the same invariants hold (`support::checker`).

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lapin::BasicProperties;
use serde_json::Value;

use crate::direct::Asker;
use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::proxy::{Proxy, Weather};
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
    after_row(&stack).await;
}

/// Row 10: the server ends the consumer while the connection looks healthy. The worker rebuilds within seconds.
#[tokio::test]
async fn a_deleted_queue_is_declared_anew() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    amqp.delete_queue("broadcast.requests").await;
    let deleted = Instant::now();
    let after = request(&app, "after").to_string();
    until("a queue again", SOON, async || amqp.try_publish(after.as_bytes(), BasicProperties::default()).await).await;
    let rebuilt = deleted.elapsed();
    println!("the queue was there again after {rebuilt:?}");
    assert!(rebuilt < Duration::from_secs(10), "{rebuilt:?} are not seconds");
    assert_eq!(device.contents_up_to("after").await, ["before", "after"]);
    assert!(worker.metric("broadcastd_worker_sessions_total").await > 1.0);
    after_row(&stack).await.device(device.history(), Must::Everything, 0).unwrap();
}

/// Row 10: a worker that may not declare can only wait for its queue; readiness says so until it is back.
#[tokio::test]
async fn a_worker_without_its_queue_is_not_ready_until_it_is_back() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    stack.worker().await.drain(SOON).await;
    let worker = async { stack.role("worker").with("amqp.declare", "false").start().await };
    let (mut worker, node) = tokio::join!(worker, stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    amqp.delete_queue("broadcast.requests").await;
    let said = worker.wait_unready().await.to_string();
    assert!(said.contains("amqp"), "{said}");
    let pid = worker.pid();
    stack.worker().await.drain(SOON).await;
    worker.wait_ready().await;
    amqp.accepted(&request(&app, "after")).await;
    assert_eq!(device.contents_up_to("after").await, ["before", "after"]);
    assert_eq!(worker.pid(), pid, "it did so unaided");
    after_row(&stack).await.device(device.history(), Must::Everything, 0).unwrap();
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
    after_row(&stack).await;
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
    after_row(&stack).await;
}

/// Row 11: the API says 503 and that nothing was sent, and takes calls again when the alarm is over.
#[tokio::test]
async fn while_the_broker_takes_no_publishes_the_api_says_503() {
    let app = App::unlimited();
    let rabbitmq = RabbitMq::dedicated();
    let stack = Stack::on(&rabbitmq.vhost().url, &Redis::shared().url(), std::slice::from_ref(&app));
    let (_worker, node, mut api) = tokio::join!(stack.worker(), stack.node(), stack.api());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let sender = Api::new(&api.api_url(), &app);
    sender.broadcast("before", false).await;

    rabbitmq.memory_alarm(true);
    let form = [("body", "while blocked"), ("requestId", "blocked-1")];
    // The first publish is what makes the broker tell a connection that it is blocked: that call's outcome is unknown.
    until("a 503", SOON, async || match sender.call("msg/broadcastMsg.action", &form).await {
        answer if answer["code"] == 503 => Ok(()),
        answer => Err(answer),
    })
    .await;
    let asked = Instant::now();
    let answer = sender.call("msg/broadcastMsg.action", &form).await;
    let took = asked.elapsed();
    assert_eq!((&answer["code"], &answer["requestId"]), (&503.into(), &"blocked-1".into()), "{answer}");
    assert!(took < Duration::from_secs(3), "503 took {took:?}: it waited for something");
    let said = api.wait_unready().await.to_string();
    assert!(said.contains("memory"), "{said}");
    rabbitmq.memory_alarm(false);
    until("an acceptance", SOON, async || match sender.call("msg/broadcastMsg.action", &form).await {
        answer if answer["code"] == 200 => Ok(()),
        answer => Err(answer),
    })
    .await;
    api.wait_ready().await;
    sender.broadcast("end", false).await;
    assert_eq!(device.contents_up_to("end").await, ["before", "while blocked", "end"]);
    after_row(&stack).await.device(device.history(), Must::Everything, 0).unwrap();
}

/// Row 11: what was queued before the alarm is decided, delivered and acknowledged during it. Only the replies are lost, and
/// the verdicts are there for the asking.
#[tokio::test]
async fn while_the_broker_takes_no_publishes_the_queue_is_worked_off() {
    let app = App::unlimited();
    let rabbitmq = RabbitMq::dedicated();
    let stack = Stack::on(&rabbitmq.vhost().url, &Redis::shared().url(), std::slice::from_ref(&app));
    let (mut worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests = requests(&app, 200);
    worker.drain(SOON).await;
    ask_all(&amqp, &requests).await;
    amqp.send(b"malformed").await;
    rabbitmq.memory_alarm(true);
    worker.spawn();
    device.collect(200, SOON).await;
    // Acknowledged, not only taken: neither ready nor held.
    let queue = format!("queues/{}/broadcast.requests", stack.amqp_url.rsplit('/').next().unwrap());
    until("acknowledged", SOON, async || {
        let queue = rabbitmq.management("GET", &queue)?;
        match (queue["messages_ready"].as_u64(), queue["messages_unacknowledged"].as_u64()) {
            (Some(0), Some(0)) => Ok(()),
            left => Err(format!("{left:?}")),
        }
    })
    .await;
    let said = worker.wait_unready().await.to_string();
    assert!(said.contains("takes no replies"), "{said}");
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
    assert_eq!(worker.metric("broadcastd_accepted_total").await, 200.0);
    rabbitmq.memory_alarm(false);
    worker.wait_ready().await;
    let replies = amqp.burst(&requests).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    checker.device(device.history(), Must::Everything, 0).unwrap();
    // The malformed one was set aside by the broker itself, which can do so while it takes no publishes.
    assert_eq!(amqp.dead_letter().await.payload, b"malformed");
    after_row(&stack).await;
}

/// Row 15: nothing comes back on connections that look alive. Worker and API notice by the heartbeat, and go on by themselves.
#[tokio::test]
async fn a_broker_behind_a_black_hole_is_noticed_by_the_heartbeat() {
    const HEARTBEAT: Duration = Duration::from_secs(2);
    const BATCHES: usize = 8;
    let app = App::unlimited();
    let rabbitmq = RabbitMq::shared();
    let direct = Stack::new(std::slice::from_ref(&app));
    let proxy = Proxy::to(rabbitmq.port()).await;
    let stack = Stack { amqp_url: proxy.instead_of(&direct.amqp_url, rabbitmq.port()), ..direct.clone() };
    let role = async |role: &str| {
        let process = stack.role(role).with("amqp.heartbeat_seconds", HEARTBEAT.as_secs().to_string());
        let process = process.with("worker.batches_in_flight", BATCHES.to_string()).with("worker.batch", "1");
        process.with("amqp.connect_timeout_ms", "1000").start().await
    };
    let (mut worker, node, mut api) = tokio::join!(role("worker"), direct.node(), role("api"));
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = direct.amqp().await;
    let sender = Api::new(&api.api_url(), &app);
    sender.broadcast("before", false).await;

    let requests = requests(&app, 100);
    let asking = ask_all(&amqp, &requests);
    let hole = async {
        until("some replies", SOON, async || if amqp.replies() > 10 { Ok(()) } else { Err("none yet") }).await;
        proxy.weather(Weather::BlackHole);
        Instant::now()
    };
    let (asked, since) = tokio::join!(asking, hole);
    let noticed = async |process: &Process| {
        process.wait_unready().await;
        since.elapsed()
    };
    let (by_worker, by_api) = tokio::join!(noticed(&worker), noticed(&api));
    println!("heartbeat {HEARTBEAT:?}: noticed by the worker after {by_worker:?}, by the API after {by_api:?}");
    // Two silent intervals, and what a busy machine takes.
    let latest = HEARTBEAT * 2 + Duration::from_secs(3);
    assert!(by_worker < latest && by_api < latest, "{by_worker:?}, {by_api:?}");
    let answer = sender.call("msg/broadcastMsg.action", &[("body", "in the hole")]).await;
    assert_eq!(answer["code"], 503, "{answer}");

    proxy.weather(Weather::Fair);
    let hole = since.elapsed();
    worker.wait_ready().await;
    api.wait_ready().await;
    // Where the broker gave up the connection of the replies alone, it had acknowledgements of requests whose replies went with
    // it: of each batch of one that the hole held until its reply's time was over. Each is counted, and who asks again is told.
    let held = BATCHES * (2 + hole.as_secs_f64().div_euclid(2.0) as usize);
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &amqp.burst(&requests).await);
    // What comes again late is told late.
    until("every reply there, or counted", SOON, async || {
        let missing = asked.iter().filter(|correlation| amqp.all_replies(correlation).is_empty()).count();
        let lost = worker.metric("broadcastd_replies_lost_total").await;
        if missing <= held && missing as f64 <= lost {
            println!("{missing} of {} replies missing, {lost} counted as lost", requests.len());
            return Ok(());
        }
        Err(format!("{missing} missing, {lost} counted, {held} at the most"))
    })
    .await;
    for (request, correlation) in requests.iter().zip(&asked) {
        checker
            .all_accepted(&vec![request.clone(); amqp.all_replies(correlation).len()], &amqp.all_replies(correlation));
    }
    device.collect(101, SOON).await;
    checker.device(&device.history()[1..], Must::Everything, 0).unwrap();
    sender.broadcast("end", false).await;
    device.collect(102, SOON).await;
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    after_row(&stack).await.device(device.history(), Must::Everything, 0).unwrap();
}

/// Waits until a worker is ready in its session of this number.
async fn in_session(worker: &mut Process, number: f64) {
    until("a new session", SOON, async || match worker.metric("broadcastd_worker_sessions_total").await {
        sessions if sessions >= number => Ok(()),
        sessions => Err(sessions),
    })
    .await;
    worker.wait_ready().await;
}

/// Row 15: what ended a session has most likely ended the worker's other connections too, and none of them has to find out by
/// itself before the new session can tell verdicts.
#[tokio::test]
async fn a_new_session_does_not_reply_over_what_the_hole_has_swallowed() {
    // What the asker sends is in no journal.
    let (app, asked) = (App::new(), App::new());
    let rabbitmq = RabbitMq::shared();
    let direct = Stack::new(&[app.clone(), asked.clone()]);
    let proxy = Proxy::to(rabbitmq.port()).await;
    let stack = Stack { amqp_url: proxy.instead_of(&direct.amqp_url, rabbitmq.port()), ..direct.clone() };
    let amqp = direct.amqp().await;
    // The heartbeat finds nothing out before the test is over.
    let mut worker = stack.role("worker").with("amqp.heartbeat_seconds", "60").start().await;
    let mut asker = Asker::connect(&direct.amqp_url).await;
    amqp.accepted(&request(&app, "before")).await;
    // The first directly is over a connection of its own: its node is not known yet.
    for body in ["to a new node", "to a known one"] {
        assert_eq!(asker.ask(&request(&asked, body)).await["code"], 200);
    }
    // In this order: requests, dead letters, replies, direct ones to new nodes, direct ones.
    proxy.weather(Weather::BlackHoleOf(2, 4));
    amqp.delete_queue("broadcast.requests").await;
    in_session(&mut worker, 2.0).await;
    amqp.accepted(&request(&app, "after")).await;
    assert_eq!(asker.ask(&request(&asked, "after, directly")).await["code"], 200);
    assert_eq!(worker.metric("broadcastd_replies_lost_total").await, 0.0);
    assert_eq!(worker.metric("broadcastd_reply_connections_total").await, 5.0);
    // A session that ends while they are well leaves them alone.
    amqp.delete_queue("broadcast.requests").await;
    in_session(&mut worker, 3.0).await;
    amqp.accepted(&request(&app, "with the same")).await;
    assert_eq!(worker.metric("broadcastd_reply_connections_total").await, 5.0);
    after_row(&Stack { apps: vec![app], ..stack }).await;
}

/// Row 15: the same for a broker that is frozen as a whole.
#[tokio::test]
async fn a_frozen_rabbitmq_is_noticed_and_survived() {
    let app = App::unlimited();
    let rabbitmq = RabbitMq::dedicated();
    let stack = Stack::on(&rabbitmq.vhost().url, &Redis::shared().url(), std::slice::from_ref(&app));
    let role = async |role: &str| stack.role(role).with("amqp.heartbeat_seconds", "1").start().await;
    let (mut worker, node, mut api) = tokio::join!(role("worker"), stack.node(), role("api"));
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    Api::new(&api.api_url(), &app).broadcast("before", false).await;
    rabbitmq.pause();
    worker.wait_unready().await;
    api.wait_unready().await;
    rabbitmq.resume();
    worker.wait_ready().await;
    api.wait_ready().await;
    Api::new(&api.api_url(), &app).broadcast("end", false).await;
    assert_eq!(device.contents_up_to("end").await, ["before", "end"]);
    after_row(&stack).await.device(device.history(), Must::Everything, 0).unwrap();
}
