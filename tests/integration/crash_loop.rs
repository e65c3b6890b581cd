//! Rows 12 to 14 of the fault table: a request that kills every worker, a dead-letter exchange and a reply queue that are gone.

use futures_util::future::join_all;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection, ConnectionProperties, ExchangeKind};
use serde_json::Value;

use crate::crash::state_of;
use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::rabbitmq::RabbitMq;
use crate::support::sender::{Amqp, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

/// How often a request may come back; the smallest for which the odds of a neighbour are far below one in a thousand.
const DELIVERY_LIMIT: u32 = 25;

/// Waits until so many messages are ready in a queue.
async fn holds(amqp: &Amqp, queue: &str, count: u32) {
    until(queue, SOON, async || match amqp.ready(queue).await {
        ready if ready == count => Ok(()),
        ready => Err(format!("{ready} of {count} are ready")),
    })
    .await;
}

/// Row 12: the poison is first in the queue, and everything behind it is prefetched together with it, again and again.
#[tokio::test]
async fn a_request_that_kills_workers_is_dead_lettered_without_its_neighbours() {
    let apps = [App::unlimited(), App::unlimited()];
    let stack = Stack::new(&apps);
    let killing = "worker::before-ledger=return(kill poison-1)";
    let role = stack.role("worker").with("amqp.delivery_limit", DELIVERY_LIMIT.to_string());
    let (mut worker, node) = tokio::join!(role.failpoints(killing).start(), stack.node());
    let url = node.device_url();
    let mut devices = join_all(apps.iter().map(|app| Device::online(app, "web", &url))).await;
    let amqp = stack.amqp().await;

    // Held from the first moment on: it takes all of them before it decides the first.
    worker.pause();
    let mut poison = retained(&apps[0], "poison");
    poison["requestId"] = "poison-1".into();
    amqp.ask(poison.to_string().as_bytes()).await;
    let neighbours: Vec<Value> = (0..300).map(|n| request(&apps[n % 2], &format!("number {n}"))).collect();
    let asked: Vec<String> =
        join_all(neighbours.iter().map(async |request| amqp.ask(request.to_string().as_bytes()).await)).await;
    worker.resume();

    let mut lives = 0;
    while amqp.ready("broadcast.dead").await == 0 {
        let crashed = until("dead, or without its poison", SOON, async || match state_of(&worker) {
            'Z' => Ok(true),
            _ if amqp.ready("broadcast.dead").await > 0 => Ok(false),
            state => Err(state),
        })
        .await;
        if crashed {
            worker.wait(SOON).await;
            lives += 1;
            assert!(lives <= DELIVERY_LIMIT + 1, "the delivery limit does not hold");
            worker.spawn();
        }
    }
    assert_eq!(lives, DELIVERY_LIMIT + 1);
    worker.wait_ready().await;

    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    let mut checkers = [Checker::default(), Checker::default()];
    for (n, (request, reply)) in neighbours.iter().zip(&replies).enumerate() {
        assert_eq!(reply["code"], 200, "{reply}");
        checkers[n % 2].verdict(request, reply).unwrap();
    }
    // The poison alone, beside what belongs there: requests that nobody can read.
    for _ in 0..3 {
        amqp.send(b"no request").await;
    }
    holds(&amqp, "broadcast.dead", 4).await;

    // A redrive that is killed between the two queues loses nothing, and doubles nothing.
    worker.kill();
    let mut redrive = stack
        .role("redrive")
        .arguments(&["--reason", "delivery_limit"])
        .failpoints("redrive::before-ack=1*return(kill)");
    redrive.spawn();
    assert!(!redrive.wait(SOON).await.success());
    holds(&amqp, "broadcast.requests", 1).await;
    holds(&amqp, "broadcast.dead", 4).await;
    redrive.without_failpoints();
    redrive.spawn();
    assert!(redrive.wait(SOON).await.success(), "{}", redrive.output());
    assert!(redrive.output().contains("1 moved, 3 left"), "{}", redrive.output());
    holds(&amqp, "broadcast.requests", 2).await;

    // After an update that does not die of it.
    worker.without_failpoints();
    worker.restart().await;
    holds(&amqp, "broadcast.requests", 0).await;
    checkers[0].all_accepted(std::slice::from_ref(&poison), &[amqp.request(&poison).await]);
    for ((app, device), checker) in apps.iter().zip(&mut devices).zip(&mut checkers) {
        let end = request(app, "end");
        checker.all_accepted(std::slice::from_ref(&end), &[amqp.request(&end).await]);
        device.collect(checker.accepted(), SOON).await;
        checker.device(device.history(), Must::Everything, 0).unwrap();
    }
    assert_eq!(amqp.ready("broadcast.dead").await, 3, "what is unreadable stayed");
    after_row(&stack).await;
}

/// The dead-letter exchange, from the operator's side.
struct Operator {
    channel: lapin::Channel,
    // Its end would be the end of the channel.
    _connection: Connection,
}

impl Operator {
    async fn of(stack: &Stack) -> Self {
        let connection = Connection::connect(&stack.amqp_url, ConnectionProperties::default()).await.unwrap();
        Self { channel: connection.create_channel().await.unwrap(), _connection: connection }
    }

    async fn delete_dead_letter_exchange(&self) {
        self.channel.exchange_delete("broadcast.dead".into(), ExchangeDeleteOptions::default()).await.unwrap();
    }

    async fn restore_dead_letter_exchange(&self) {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let name = "broadcast.dead";
        self.channel.exchange_declare(name.into(), ExchangeKind::Direct, durable, FieldTable::default()).await.unwrap();
        let options = QueueBindOptions::default();
        self.channel.queue_bind(name.into(), name.into(), name.into(), options, FieldTable::default()).await.unwrap();
    }
}

async fn trouble_with_dead_letters(worker: &Process) {
    until("unready for want of the exchange", SOON, async || match worker.readiness().await? {
        (503, body) if body.contains("dead letters cannot be stored") => Ok(()),
        (status, body) => Err(format!("{status} {body}")),
    })
    .await;
    assert!(worker.metric("broadcastd_dead_letter_failures_total").await >= 1.0);
    assert!(worker.output().contains("dead letters cannot be stored"));
}

/// Row 13: deleted under a running worker that may not declare it. What has nowhere to go is held, everything else goes on, and
/// no delivery is counted in vain.
#[tokio::test]
async fn without_a_dead_letter_exchange_requests_are_held_and_others_go_on() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    // The first worker declares everything; then it is somebody else's task.
    stack.worker().await.kill();
    let undeclared = || stack.role("worker").with("amqp.declare", "false");
    let (mut worker, node) = tokio::join!(undeclared().start(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let operator = Operator::of(&stack).await;
    operator.delete_dead_letter_exchange().await;

    amqp.send(b"no request").await;
    let requests: Vec<Value> = (0..100).map(|number| request(&app, &format!("number {number}"))).collect();
    let replies = amqp.burst(&requests).await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &replies);
    trouble_with_dead_letters(&worker).await;
    until("tried again", SOON, async || match worker.metric("broadcastd_dead_letter_failures_total").await {
        failures if failures >= 3.0 => Ok(()),
        failures => Err(failures),
    })
    .await;
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0, "nothing was delivered in vain");

    // Killed meanwhile, nothing is lost; and a new worker says at once what is missing.
    worker.kill();
    worker.spawn();
    until("what is missing", SOON, async || match worker.readiness().await? {
        (503, body) if body.contains("the dead-letter exchange") => Ok(()),
        (status, body) => Err(format!("{status} {body}")),
    })
    .await;
    operator.restore_dead_letter_exchange().await;
    worker.wait_ready().await;
    let dead = amqp.dead_letter().await;
    assert_eq!((dead.payload.as_slice(), dead.headers["x-reason"].as_str()), (&b"no request"[..], "not_json"));

    // It also comes back under a worker that waits for it.
    operator.delete_dead_letter_exchange().await;
    amqp.send(b"no request either").await;
    trouble_with_dead_letters(&worker).await;
    operator.restore_dead_letter_exchange().await;
    assert_eq!(amqp.dead_letter().await.payload, b"no request either");
    worker.wait_ready().await;

    let end = request(&app, "end");
    checker.all_accepted(std::slice::from_ref(&end), &[amqp.request(&end).await]);
    device.collect(101, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!((amqp.ready("broadcast.requests").await, amqp.ready("broadcast.dead").await), (0, 0));
    after_row(&stack).await;
}

/// Row 13: what has nowhere to go takes none of the places of what has: more than there are places, each beside a good one.
#[tokio::test]
async fn without_a_dead_letter_exchange_more_of_them_than_batches_hold_up_nobody() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    stack.worker().await.drain(SOON).await;
    let mut worker = stack.role("worker").with("amqp.declare", "false").with("worker.batch", "4").start().await;
    let amqp = stack.amqp().await;
    let operator = Operator::of(&stack).await;
    operator.delete_dead_letter_exchange().await;

    let mut checker = Checker::default();
    let mut limited = request(&app, "nobody waits for it");
    limited["appKey"] = "nobody".into();
    for round in 0..20 {
        amqp.send(b"no request").await;
        amqp.send(limited.to_string().as_bytes()).await;
        let requests: Vec<Value> = (0..5).map(|number| request(&app, &format!("round {round}, {number}"))).collect();
        let replies = amqp.burst(&requests).await;
        checker.all_accepted(&requests, &replies);
    }
    trouble_with_dead_letters(&worker).await;
    // Acknowledged, all but what has nowhere to go.
    let queue = format!("queues/{}/broadcast.requests", stack.amqp_url.rsplit('/').next().unwrap());
    until("acknowledged", SOON, async || {
        let queue = RabbitMq::shared().management("GET", &queue)?;
        match (queue["messages_ready"].as_u64(), queue["messages_unacknowledged"].as_u64()) {
            (Some(0), Some(40)) => Ok(()),
            left => Err(format!("{left:?}")),
        }
    })
    .await;
    operator.restore_dead_letter_exchange().await;
    worker.wait_ready().await;
    holds(&amqp, "broadcast.dead", 40).await;
    assert_eq!(worker.metric("broadcastd_dead_lettered_total").await, 40.0);
    assert_eq!(worker.metric("broadcastd_consumed_total").await, 140.0);
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
    // The next worker is given none of them again.
    worker.drain(SOON).await;
    assert_eq!(amqp.ready("broadcast.requests").await, 0);
}

/// Row 13: a worker that may declare it does so, without a new session.
#[tokio::test]
async fn a_deleted_dead_letter_exchange_is_declared_anew() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let worker = stack.worker().await;
    let amqp = stack.amqp().await;
    Operator::of(&stack).await.delete_dead_letter_exchange().await;
    amqp.send(b"no request").await;
    assert_eq!(amqp.dead_letter().await.payload, b"no request");
    assert!(worker.metric("broadcastd_dead_letter_failures_total").await >= 1.0);
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
    assert!(worker.output().contains("dead letters are stored again"));
    after_row(&stack).await;
}

/// Row 14.
#[tokio::test]
async fn a_reply_that_nobody_takes_is_counted_and_its_request_is_done() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (mut worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let requests: Vec<Value> = (0..20).map(|number| request(&app, &format!("number {number}"))).collect();
    let mut checker = Checker::default();
    for request in &requests[..10] {
        let gone = BasicProperties::default().with_reply_to("gone".into()).with_correlation_id("c".into());
        amqp.publish(request.to_string().as_bytes(), gone).await;
    }
    let replies = amqp.burst(&requests[10..]).await;
    checker.all_accepted(&requests[10..], &replies);
    until("counted", SOON, async || match worker.metric("broadcastd_replies_lost_total").await {
        10.0 => Ok(()),
        lost => Err(lost),
    })
    .await;
    assert!(worker.metrics().await.contains("broadcastd_replies_lost_total{reason=\"unroutable\"} 10"));
    assert_eq!(worker.metric("broadcastd_replies_total").await, 10.0);
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);

    // Acknowledged: the next worker is given none of them.
    worker.drain(SOON).await;
    worker.restart().await;
    let end = request(&app, "end");
    checker.all_accepted(std::slice::from_ref(&end), &[amqp.request(&end).await]);
    assert_eq!(worker.metric("broadcastd_consumed_total").await, 1.0);
    let again = amqp.burst(&requests[..10]).await;
    checker.all_accepted(&requests[..10], &again);
    device.collect(21, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    after_row(&stack).await;
}
