//! The exchanges and queues, declared in one place. Declaring what exists is a no-op; with other arguments it is an error.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{Channel, ExchangeKind};

use super::SessionError;
use crate::amqp::{AmqpSettings, describe};

/// The bytes that may wait in the request queue: a million of ordinary size.
const MAX_REQUEST_BYTES: i64 = 4 << 30;
/// The bytes of dead letters that are kept.
const MAX_DEAD_BYTES: i64 = 1 << 30;

/// Declares everything, dead letters first: there is never a queue whose dead letters have nowhere to go.
pub(super) async fn declare(channel: &Channel, settings: &AmqpSettings) -> Result<(), SessionError> {
    declare_dead_letters(channel, settings).await?;
    if !settings.declare {
        return Ok(());
    }
    let (exchange, queue) = durable();
    channel
        .exchange_declare(settings.exchange.as_str().into(), ExchangeKind::Direct, exchange, FieldTable::default())
        .await
        .map_err(failed("the exchange"))?;
    let mut requests = FieldTable::default();
    // quorum: replicated, and counts deliveries, so that a request that kills workers is set aside.
    requests.insert("x-queue-type".into(), text("quorum"));
    requests.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(settings.delivery_limit.into()));
    requests.insert("x-dead-letter-exchange".into(), text(&settings.dead_letter));
    requests.insert("x-dead-letter-routing-key".into(), text(&settings.dead_letter));
    // at-least-once (it needs reject-publish): a dead letter stays here until the dead-letter queue has it.
    requests.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    requests.insert("x-overflow".into(), text("reject-publish"));
    requests.insert("x-max-length".into(), AMQPValue::LongLongInt(settings.queue_max_length.into()));
    requests.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(MAX_REQUEST_BYTES));
    channel
        .queue_declare(settings.queue.as_str().into(), queue, requests)
        .await
        .map_err(failed("the request queue"))?;
    channel
        .queue_bind(
            settings.queue.as_str().into(),
            settings.exchange.as_str().into(),
            settings.routing_key.as_str().into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .map_err(failed("the request binding"))?;
    Ok(())
}

/// Declares where dead letters go; where that is somebody else's task, checks that it was done.
pub(super) async fn declare_dead_letters(channel: &Channel, settings: &AmqpSettings) -> Result<(), SessionError> {
    let (exchange, queue) = durable();
    if !settings.declare {
        let passive = ExchangeDeclareOptions { passive: true, ..exchange };
        return channel
            .exchange_declare(
                settings.dead_letter.as_str().into(),
                ExchangeKind::Direct,
                passive,
                FieldTable::default(),
            )
            .await
            .map_err(failed("the dead-letter exchange (amqp.declare is off: it must exist)"));
    }
    channel
        .exchange_declare(settings.dead_letter.as_str().into(), ExchangeKind::Direct, exchange, FieldTable::default())
        .await
        .map_err(failed("the dead-letter exchange"))?;
    let mut dead = FieldTable::default();
    dead.insert("x-queue-type".into(), text("quorum"));
    dead.insert("x-max-length".into(), AMQPValue::LongLongInt(settings.dead_letter_max_length.into()));
    dead.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(MAX_DEAD_BYTES));
    // drop-head: a full dead-letter queue must not stop the workers; the oldest dead letters go.
    dead.insert("x-overflow".into(), text("drop-head"));
    channel
        .queue_declare(settings.dead_letter.as_str().into(), queue, dead)
        .await
        .map_err(failed("the dead-letter queue"))?;
    channel
        .queue_bind(
            settings.dead_letter.as_str().into(),
            settings.dead_letter.as_str().into(),
            settings.dead_letter.as_str().into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .map_err(failed("the dead-letter binding"))?;
    Ok(())
}

/// durable: survives a restart of the broker.
fn durable() -> (ExchangeDeclareOptions, QueueDeclareOptions) {
    (
        ExchangeDeclareOptions { durable: true, ..Default::default() },
        QueueDeclareOptions { durable: true, ..Default::default() },
    )
}

fn failed(what: &'static str) -> impl FnOnce(lapin::Error) -> SessionError {
    move |error| SessionError::Topology { what, reason: describe(&error) }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(value))
}
