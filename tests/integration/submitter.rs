//! The API's way to the workers, against a real broker: what a caller is told, whatever happens to its request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use broadcastd::amqp::AmqpSettings;
use broadcastd::api::amqp::AmqpSubmitter;
use broadcastd::api::message::ENQUEUED_AT;
use broadcastd::api::submit::{Outcome, Submitter};
use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{Request, Submission};
use futures_util::StreamExt;
use futures_util::future::join_all;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::rabbitmq::RabbitMq;
use crate::support::{SOON, now_ms, unique, until};

const REPLY: Duration = Duration::from_secs(5);

/// The API's side.
struct Sender {
    submitter: Arc<Submitter>,
    health: tokio::sync::watch::Receiver<Result<(), String>>,
    _stop: DropGuard,
}

impl Sender {
    fn start(url: &str, reply_timeout: Duration) -> Self {
        let settings: AmqpSettings = serde_json::from_value(json!({
            "url": url, "url_file": "", "ca_file": "", "exchange": "broadcast", "routing_key": "request",
            "queue": "broadcast.requests", "queue_max_length": 1000, "dead_letter": "broadcast.dead",
            "dead_letter_max_length": 1000, "delivery_limit": 20, "declare": true, "prefetch": 100,
            "heartbeat_seconds": 10, "connect_timeout_ms": 5000,
        }))
        .unwrap();
        let stop = CancellationToken::new();
        let submitter = AmqpSubmitter::start(settings, reply_timeout, stop.clone());
        let health = submitter.health();
        Self { submitter: Arc::new(Submitter::Amqp(submitter)), health, _stop: stop.drop_guard() }
    }

    async fn ready(&self) {
        until("connected", SOON, async || self.health.borrow().clone()).await;
    }

    async fn send(&self, id: &str) -> Outcome {
        let json = json!({"requestId": id, "appKey": "demo", "body": "hi"}).to_string();
        let request = Request::from_json(json.as_bytes(), None).unwrap();
        self.submitter.submit(&Submission { request, limits: Limits::default() }).await
    }
}

/// The workers' side, by hand.
struct Worker {
    channel: Channel,
    requests: Option<Consumer>,
    _connection: Connection,
}

impl Worker {
    async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        Self { channel, requests: None, _connection: connection }
    }

    async fn declare_exchange(&self) {
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let none = FieldTable::default();
        self.channel.exchange_declare("broadcast".into(), ExchangeKind::Direct, durable, none).await.unwrap();
    }

    async fn consume(&mut self) {
        let (queue, none) = ("broadcast.requests", FieldTable::default);
        self.channel.queue_declare(queue.into(), QueueDeclareOptions::default(), none()).await.unwrap();
        let bind = QueueBindOptions::default();
        self.channel.queue_bind(queue.into(), "broadcast".into(), "request".into(), bind, none()).await.unwrap();
        let options = BasicConsumeOptions::default();
        self.requests = Some(self.channel.basic_consume(queue.into(), "w".into(), options, none()).await.unwrap());
    }

    async fn started(url: &str) -> Self {
        let mut worker = Self::connect(url).await;
        worker.declare_exchange().await;
        worker.consume().await;
        worker
    }

    async fn next(&mut self) -> Delivery {
        let next = tokio::time::timeout(SOON, self.requests.as_mut().unwrap().next());
        next.await.expect("a request").unwrap().unwrap()
    }

    async fn reply(&self, request: &Delivery, reply: &Value) {
        request.acker.ack(BasicAckOptions::default()).await.unwrap();
        let properties = &request.properties;
        let to = properties.reply_to().clone().unwrap();
        let answer = BasicProperties::default().with_correlation_id(properties.correlation_id().clone().unwrap());
        let options = BasicPublishOptions::default();
        self.channel.basic_publish("".into(), to, options, reply.to_string().as_bytes(), answer).await.unwrap();
    }
}

/// A verdict that names its request, so that a mix-up would show.
fn verdict(request: &Delivery) -> Value {
    json!({"code": 200, "msg": {"broadcastId": 7}, "for": request.properties.message_id().as_ref().unwrap().as_str()})
}

#[tokio::test]
async fn each_call_gets_its_own_verdict_and_the_request_says_all_it_should() {
    let vhost = RabbitMq::shared().vhost();
    let mut worker = Worker::started(&vhost.url).await;
    let sender = Sender::start(&vhost.url, REPLY);
    sender.ready().await;
    let ids: Vec<String> = (0..50).map(|_| unique("r")).collect();
    let serve = async {
        let mut held = Vec::new();
        for _ in &ids {
            held.push(worker.next().await);
        }
        let first = &held[0].properties;
        assert_eq!(*first.delivery_mode(), Some(2));
        assert_eq!(first.content_type().as_ref().unwrap().as_str(), "application/json");
        let age = first.headers().as_ref().unwrap().inner().get(ENQUEUED_AT).unwrap().as_long_long_int().unwrap();
        assert!(now_ms().abs_diff(u64::try_from(age).unwrap()) < 60_000);
        // In another order than they came.
        for request in held.iter().rev() {
            worker.reply(request, &verdict(request)).await;
        }
    };
    let (outcomes, ()) = tokio::join!(join_all(ids.iter().map(|id| sender.send(id))), serve);
    for (id, outcome) in ids.iter().zip(outcomes) {
        let Outcome::Decided { code: 200, id: Some(7), reply } = outcome else { panic!("{outcome:?}") };
        assert_eq!(reply["for"], **id);
    }
}

#[tokio::test]
async fn without_a_queue_every_call_is_told_that_nothing_was_sent() {
    let vhost = RabbitMq::shared().vhost();
    Worker::connect(&vhost.url).await.declare_exchange().await;
    let sender = Sender::start(&vhost.url, REPLY);
    sender.ready().await;
    let started = Instant::now();
    let ids: Vec<String> = (0..50).map(|_| unique("r")).collect();
    for outcome in join_all(ids.iter().map(|id| sender.send(id))).await {
        assert!(matches!(outcome, Outcome::Busy(why) if why.contains("no worker queue")), "{outcome:?}");
    }
    assert!(started.elapsed() < REPLY, "it does not wait for a reply that cannot come");
}

#[tokio::test]
async fn without_the_exchange_it_is_not_ready_and_recovers_when_it_is_declared() {
    let vhost = RabbitMq::shared().vhost();
    let sender = Sender::start(&vhost.url, REPLY);
    until("refused for want of the exchange", SOON, async || match &*sender.health.borrow() {
        Err(why) if why.contains("NOT") || why.contains("404") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert!(matches!(sender.send("r").await, Outcome::Busy(_)));
    let mut worker = Worker::started(&vhost.url).await;
    sender.ready().await;

    // Deleted under its feet: the next call closes the channel, and which call it was of those under way cannot be told.
    worker.channel.exchange_delete("broadcast".into(), ExchangeDeleteOptions::default()).await.unwrap();
    let outcome = sender.send("r").await;
    assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    worker.declare_exchange().await;
    worker.consume_again().await;
    sender.ready().await;
    let serve = async {
        let request = worker.next().await;
        worker.reply(&request, &verdict(&request)).await;
    };
    let (outcome, ()) = tokio::join!(sender.send("r"), serve);
    assert!(matches!(outcome, Outcome::Decided { .. }), "{outcome:?}");
}

impl Worker {
    /// Binds the queue again to an exchange that was deleted and declared anew.
    async fn consume_again(&self) {
        let (queue, bind) = ("broadcast.requests", QueueBindOptions::default());
        let none = FieldTable::default();
        self.channel.queue_bind(queue.into(), "broadcast".into(), "request".into(), bind, none).await.unwrap();
    }
}

#[tokio::test]
async fn a_reply_that_does_not_come_is_unknown_and_a_late_one_is_nobodys() {
    let vhost = RabbitMq::shared().vhost();
    let mut worker = Worker::started(&vhost.url).await;
    let sender = Sender::start(&vhost.url, Duration::from_millis(500));
    sender.ready().await;
    let outcome = sender.send("late").await;
    assert!(matches!(outcome, Outcome::Unknown(why) if why.contains("no worker has replied")), "{outcome:?}");
    let late = worker.next().await;
    let serve = async {
        let request = worker.next().await;
        worker.reply(&late, &verdict(&late)).await;
        worker.reply(&request, &verdict(&request)).await;
    };
    let (outcome, ()) = tokio::join!(sender.send("next"), serve);
    let Outcome::Decided { reply, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(reply["for"], "next");
}

#[tokio::test]
async fn a_connection_lost_after_the_publish_is_unknown_at_once_and_is_rebuilt() {
    let broker = RabbitMq::dedicated();
    let vhost = broker.vhost();
    let sender = Sender::start(&vhost.url, SOON);
    let mut worker = Worker::started(&vhost.url).await;
    sender.ready().await;
    let started = Instant::now();
    let cut = async {
        let request = worker.next().await;
        request.acker.ack(BasicAckOptions::default()).await.unwrap();
        until("the broker lists the connections", SOON, async || match broker.close_connections(&vhost) {
            0 => Err("none"),
            _ => Ok(()),
        })
        .await;
    };
    let (outcome, ()) = tokio::join!(sender.send("r"), cut);
    assert!(matches!(outcome, Outcome::Unknown(why) if why.contains("lost")), "{outcome:?}");
    assert!(started.elapsed() < SOON, "it does not wait out the reply timeout");
    let mut worker = Worker::started(&vhost.url).await;
    sender.ready().await;
    let serve = async {
        let request = worker.next().await;
        worker.reply(&request, &verdict(&request)).await;
    };
    let (outcome, ()) = tokio::join!(sender.send("r"), serve);
    assert!(matches!(outcome, Outcome::Decided { .. }), "{outcome:?}");
}

#[tokio::test]
async fn a_broker_that_is_short_of_memory_is_busy_at_once_and_comes_back() {
    let broker = RabbitMq::dedicated();
    let vhost = broker.vhost();
    let mut worker = Worker::started(&vhost.url).await;
    let sender = Sender::start(&vhost.url, Duration::from_secs(2));
    sender.ready().await;
    broker.memory_alarm(true);
    // The broker tells a connection that it is blocked once it publishes; that first request may have been sent.
    let first = sender.send("first").await;
    assert!(!matches!(first, Outcome::Decided { .. }), "{first:?}");
    until("not ready", SOON, async || match &*sender.health.borrow() {
        Err(_) => Ok(()),
        Ok(()) => Err("ready"),
    })
    .await;
    let started = Instant::now();
    let outcome = sender.send("second").await;
    assert!(matches!(outcome, Outcome::Busy(_)), "{outcome:?}");
    assert!(started.elapsed() < Duration::from_secs(1));
    broker.memory_alarm(false);
    sender.ready().await;
    let serve = async {
        loop {
            let request = worker.next().await;
            worker.reply(&request, &verdict(&request)).await;
            if request.properties.message_id().as_ref().unwrap().as_str() == "third" {
                return;
            }
        }
    };
    let (outcome, ()) = tokio::join!(sender.send("third"), serve);
    assert!(matches!(outcome, Outcome::Decided { .. }), "{outcome:?}");
}
