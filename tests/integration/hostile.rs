//! Messages that are well-formed AMQP and meant, or apt, to do harm.

use lapin::BasicProperties;
use serde_json::Value;

use crate::support::broadcastd::App;
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::request;
use crate::support::stack::Stack;
use crate::support::{SOON, until};

/// What a broker would refuse, or let vanish, in a dead letter is not carried over from the original.
#[tokio::test]
async fn properties_of_a_bad_message_harm_neither_its_dead_letter_nor_the_worker() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let worker = stack.worker().await;
    let amqp = stack.amqp().await;
    for properties in [
        BasicProperties::default().with_user_id("guest".into()),
        BasicProperties::default().with_expiration("60000".into()),
    ] {
        amqp.publish(b"{", properties).await;
        let dead = amqp.dead_letter().await;
        assert_eq!((dead.headers["x-reason"].as_str(), dead.payload.as_slice()), ("not_json", b"{".as_slice()));
        assert!(!dead.has_expiration, "a dead letter must not vanish by itself");
    }
    let made_up = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to.!!.x".into());
    amqp.publish(request(&app, "no reply to that").to_string().as_bytes(), made_up).await;
    amqp.accepted(&request(&app, "the next")).await;
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
}

/// A worker that holds all it may still notices that the broker has taken its deliveries away: it must not go on deciding them.
#[tokio::test]
async fn a_worker_that_holds_everything_notices_the_end_of_its_consumer() {
    let app = App::new();
    let mut redis = Redis::durable();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let worker = stack.role("worker").with("worker.batches_in_flight", "1").start().await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "before")).await;
    redis.kill();
    let held: Value = request(&app, "held");
    amqp.send(held.to_string().as_bytes()).await;
    until("held", SOON, async || match worker.metric("broadcastd_requests_held").await {
        held if held > 0.0 => Ok(()),
        held => Err(held),
    })
    .await;
    amqp.delete_queue("broadcast.requests").await;
    until("a new session", SOON, async || match worker.metric("broadcastd_worker_sessions_total").await {
        sessions if sessions > 1.0 => Ok(()),
        sessions => Err(sessions),
    })
    .await;
    until("nothing held any more", SOON, async || match worker.metric("broadcastd_requests_held").await {
        0.0 => Ok(()),
        held => Err(held),
    })
    .await;
}

/// A worker told to stop while the ledger is away gives its requests back and leaves in time, with success.
#[tokio::test]
async fn a_stop_during_an_outage_gives_the_held_requests_back() {
    let app = App::new();
    let mut redis = Redis::durable();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let mut worker = stack.worker().await;
    let amqp = stack.amqp().await;
    redis.kill();
    let asked = amqp.ask(request(&app, "held").to_string().as_bytes()).await;
    until("held", SOON, async || match worker.metric("broadcastd_requests_held").await {
        held if held > 0.0 => Ok(()),
        held => Err(held),
    })
    .await;
    assert!(worker.drain(SOON).await.success());
    redis.start();
    let _worker = stack.worker().await;
    assert_eq!(amqp.reply(&asked).await["code"], 200);
}
