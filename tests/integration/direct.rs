//! Direct reply-to: names that the broker made are answered, forged ones cost no one else anything.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde_json::Value;

use crate::support::broadcastd::{App, Process};
use crate::support::rabbitmq::{ADMINISTRATOR, RabbitMq, as_user};
use crate::support::redis::Redis;
use crate::support::sender::{Amqp, request};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

const PREFIX: &str = "amq.rabbitmq.reply-to";

/// A backend that reads its replies through direct reply-to, one at a time.
pub struct Asker {
    channel: Channel,
    replies: Consumer,
    // Its end would be the end of the channel.
    _connection: Connection,
}

impl Asker {
    pub async fn connect(url: &str) -> Self {
        let url = as_user(url, ADMINISTRATOR);
        let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let no_ack = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let replies = channel.basic_consume(PREFIX.into(), "".into(), no_ack, FieldTable::default()).await.unwrap();
        Self { channel, replies, _connection: connection }
    }

    pub async fn ask(&mut self, request: &Value) -> Value {
        let properties = BasicProperties::default().with_reply_to(PREFIX.into()).with_correlation_id("c".into());
        let (options, body) = (BasicPublishOptions::default(), request.to_string());
        let sent =
            self.channel.basic_publish("broadcast".into(), "request".into(), options, body.as_bytes(), properties);
        sent.await.unwrap().await.unwrap();
        let reply = tokio::time::timeout(SOON, self.replies.next()).await.expect("a reply in time");
        serde_json::from_slice(&reply.unwrap().unwrap().data).unwrap()
    }
}

/// A name as the broker makes them, of a node that there is not.
fn of_unknown_node(number: u32) -> String {
    let node = format!("reply@{number}");
    let mut pid = vec![131, 88, 118, 0, u8::try_from(node.len()).unwrap()];
    pid.extend(node.bytes());
    pid.extend([0, 0, 4, 7, 0, 0, 0, 0, 99, 127, 4, 2]);
    format!("{PREFIX}.{}.{}", STANDARD.encode(pid), STANDARD.encode([7; 16]))
}

async fn send_forged(amqp: &Amqp, app: &App, name: &str) {
    let properties = BasicProperties::default().with_reply_to(name.into()).with_correlation_id("c".into());
    amqp.publish(request(app, "forged").to_string().as_bytes(), properties).await;
}

async fn lost(worker: &Process, reason: &str) -> u32 {
    let name = format!("broadcastd_replies_lost_total{{reason=\"{reason}\"}} ");
    let metrics = worker.metrics().await;
    metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
}

/// The broker ends the connection that publishes to a name it cannot read, or whose node it does not know.
#[tokio::test]
async fn a_forged_name_costs_its_own_reply_and_nothing_else() {
    let (app, other) = (App::unlimited(), App::unlimited());
    let stack = Stack::new(&[app.clone(), other.clone()]);
    let worker = stack.worker().await;
    let amqp = stack.amqp().await;
    let mut asker = Asker::connect(&stack.amqp_url).await;
    assert_eq!(asker.ask(&request(&other, "before")).await["code"], 200);
    let garbage = format!("{PREFIX}.{0}.{0}", "A".repeat(16));
    for number in 0..20 {
        let name = if number % 2 == 0 { garbage.clone() } else { of_unknown_node(number) };
        send_forged(&amqp, &app, &name).await;
        // Another sender, by both ways.
        assert_eq!(asker.ask(&request(&other, "directly")).await["code"], 200);
        amqp.accepted(&request(&other, "by queue")).await;
    }
    until("all decided", SOON, async || match worker.metric("broadcastd_accepted_total").await {
        61.0 => Ok(()),
        accepted => Err(accepted),
    })
    .await;
    until("lost replies, counted", SOON, async || {
        match (lost(&worker, "bad_reply_to").await, lost(&worker, "connection").await) {
            (10, 10) => Ok(()),
            counts => Err(format!("{counts:?}")),
        }
    })
    .await;
    assert_eq!(worker.metric("broadcastd_replies_total").await, 41.0);
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
    // What came back with a higher delivery count would have been taken a second time.
    assert_eq!(worker.metric("broadcastd_consumed_total").await, 61.0);
    assert_eq!((amqp.ready("broadcast.requests").await, amqp.ready("broadcast.dead").await), (0, 0));
    assert!(!worker.output().contains("the session with RabbitMQ ended"));
}

/// A queue that takes messages and never confirms them jams the connection for replies: another one takes its place.
#[tokio::test]
async fn a_queue_that_confirms_nothing_costs_the_others_no_replies_for_long() {
    let app = App::unlimited();
    let rabbitmq = RabbitMq::dedicated();
    let vhost = rabbitmq.vhost();
    let stack = Stack::on(&vhost.url, &Redis::shared().url(), std::slice::from_ref(&app));
    let worker = stack.role("worker").with("worker.reply_timeout_ms", "200").start().await;
    let amqp = stack.amqp().await;
    amqp.declare_queue("stuck").await;
    let find = format!("rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{}\">>, queue, <<\"stuck\">>))", vhost.name);
    rabbitmq.control(&["eval", &format!("{{ok, Q}} = {find}, sys:suspend(amqqueue:get_pid(Q)).")]);
    for _ in 0..1500 {
        let properties = BasicProperties::default().with_reply_to("stuck".into()).with_correlation_id("c".into());
        amqp.publish(request(&app, "x").to_string().as_bytes(), properties).await;
    }
    until("given up", SOON, async || match lost(&worker, "timeout").await {
        lost if lost > 1000 => Ok(()),
        lost => Err(lost),
    })
    .await;
    until("a reply", SOON, async || {
        let asked = amqp.ask(request(&app, "next").to_string().as_bytes()).await;
        tokio::time::timeout(Duration::from_secs(2), amqp.reply(&asked)).await.map_err(|_| "none in 2 s")
    })
    .await;
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
}
