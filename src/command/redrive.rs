//! `broadcastd redrive`: dead letters go back to the queue of requests.

use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use lapin::message::BasicGetMessage;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation};

use super::print_line;
use crate::amqp::{AmqpSettings, connect, describe};
use crate::failpoint;

/// Headers about the delivery that ended as a dead letter; they say nothing of the next one.
const ABOUT_THE_END: &[&str] = &["x-reason", "x-code", "x-desc", "x-death", "x-delivery-count", "x-acquired-count"];
/// The same, with the rest of the name varying.
const ABOUT_THE_END_PREFIXES: &[&str] = &["x-first-death-", "x-last-death-", "x-enqueued-at-"];

/// Put dead letters back on the queue of requests
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each is taken off the dead letters only after the broker has confirmed it as a request: none is lost. Their request ids keep
them from being sent twice, for as long as ids are remembered (7 days). Nobody waits for a reply any more: what is refused
again becomes a dead letter again. It stops after as many as there were at the start.

Examples:
  # What was refused over the limit yesterday
  broadcastd --config broadcastd.toml redrive --reason limit_day

  # One that was set aside because workers died of it, after an update
  broadcastd --config broadcastd.toml redrive --reason delivery_limit --limit 1")]
pub struct RedriveArgs {
    /// Only those with this reason: x-reason, or the reason of the broker's x-death (delivery_limit); may be repeated
    #[arg(long = "reason", value_name = "REASON")]
    pub reasons: Vec<String>,
    /// At most so many
    #[arg(long, value_name = "COUNT")]
    pub limit: Option<u32>,
}

/// Moves them, and prints how many.
///
/// # Errors
/// If the broker cannot be reached, or takes one for no queue; those moved until then stay moved.
pub async fn run(args: RedriveArgs, settings: AmqpSettings) -> anyhow::Result<ExitCode> {
    let connection = connect(&settings, "broadcastd redrive").await.map_err(|reason| anyhow!("RabbitMQ: {reason}"))?;
    let channel = connection.create_channel().await.map_err(readable)?;
    channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(readable)?;
    let passive = QueueDeclareOptions { passive: true, durable: true, ..QueueDeclareOptions::default() };
    let queue = channel
        .queue_declare(settings.dead_letter.as_str().into(), passive, FieldTable::default())
        .await
        .map_err(readable)
        .context("the dead-letter queue cannot be read")?;
    let (mut moved, mut left) = (0, 0);
    // What becomes a dead letter again meanwhile comes behind these.
    while moved + left < queue.message_count() && args.limit.is_none_or(|limit| moved < limit) {
        let next = channel.basic_get(settings.dead_letter.as_str().into(), BasicGetOptions::default()).await;
        let Some(dead) = next.map_err(readable)? else { break };
        if args.reasons.is_empty() || reason(&dead.properties).is_some_and(|reason| args.reasons.contains(&reason)) {
            put_back(&channel, &settings, dead).await.with_context(|| format!("after {moved} that were moved"))?;
            moved += 1;
        } else {
            // Not settled: it is back in its place when the connection is closed.
            left += 1;
        }
    }
    let _ = connection.close(200, "done".into()).await;
    print_line(&format!("{moved} moved, {left} left for another reason"))?;
    Ok(ExitCode::SUCCESS)
}

/// First there, then gone from here: a crash in between leaves it in both, with one request id.
async fn put_back(channel: &Channel, settings: &AmqpSettings, dead: BasicGetMessage) -> anyhow::Result<()> {
    let delivery = dead.delivery;
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let (exchange, key) = (settings.exchange.as_str().into(), settings.routing_key.as_str().into());
    let properties = request_properties(&delivery.properties);
    let confirm = channel.basic_publish(exchange, key, mandatory, &delivery.data, properties).await;
    match confirm.map_err(readable)?.await.map_err(readable)? {
        Confirmation::Ack(None) => {}
        Confirmation::Ack(Some(_)) => bail!("no queue takes requests"),
        _ => bail!("the broker took no more requests (is the queue full?)"),
    }
    failpoint::reached("redrive::before-ack", "");
    delivery.acker.ack(BasicAckOptions::default()).await.map_err(readable)?;
    Ok(())
}

/// Why it is a dead letter: the worker's reason, or the broker's latest.
fn reason(properties: &AMQPProperties) -> Option<String> {
    let headers = properties.headers().as_ref()?.inner();
    let text = |value: &AMQPValue| match value {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        AMQPValue::ShortString(text) => Some(text.as_str().to_owned()),
        _ => None,
    };
    if let Some(reason) = headers.get("x-reason") {
        return text(reason);
    }
    let Some(AMQPValue::FieldArray(deaths)) = headers.get("x-death") else { return None };
    let Some(AMQPValue::FieldTable(latest)) = deaths.as_slice().first() else { return None };
    text(latest.inner().get("reason")?)
}

/// What the request had, without what was about its end, and without a wish for a reply: refused once more, it is to be kept.
fn request_properties(dead: &AMQPProperties) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in dead.headers().iter().flat_map(|headers| headers.inner()) {
        let is_about_the_end = ABOUT_THE_END.contains(&name.as_str())
            || ABOUT_THE_END_PREFIXES.iter().any(|prefix| name.as_str().starts_with(prefix));
        if !is_about_the_end {
            headers.insert(name.clone(), value.clone());
        }
    }
    let mut properties = BasicProperties::default().with_headers(headers).with_delivery_mode(2);
    if let Some(message_id) = dead.message_id() {
        properties = properties.with_message_id(message_id.clone());
    }
    if let Some(content_type) = dead.content_type() {
        properties = properties.with_content_type(content_type.clone());
    }
    properties
}

fn readable(error: lapin::Error) -> anyhow::Error {
    anyhow!("RabbitMQ: {}", describe(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::types::{FieldArray, LongString, ShortString};

    fn text(text: &str) -> AMQPValue {
        AMQPValue::LongString(LongString::from(text))
    }

    #[test]
    fn a_request_goes_back_without_what_was_about_its_end() {
        let mut death = FieldTable::default();
        death.insert("reason".into(), text("delivery_limit"));
        let mut headers = FieldTable::default();
        headers.insert("x-death".into(), AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(death)])));
        headers.insert("x-first-death-reason".into(), text("delivery_limit"));
        headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(51));
        headers.insert("trace".into(), text("t-1"));
        let dead = BasicProperties::default()
            .with_headers(headers)
            .with_message_id("m-1".into())
            .with_reply_to("gone".into())
            .with_expiration("1".into())
            .with_user_id("guest".into());
        assert_eq!(reason(&dead).as_deref(), Some("delivery_limit"));
        let again = request_properties(&dead);
        let names: Vec<&str> = again.headers().as_ref().unwrap().inner().keys().map(ShortString::as_str).collect();
        assert_eq!(names, ["trace"]);
        assert_eq!(again.message_id().as_ref().map(ShortString::as_str), Some("m-1"));
        assert_eq!((again.reply_to(), again.expiration(), again.user_id()), (&None, &None, &None));
        assert_eq!(again.delivery_mode(), &Some(2));
    }

    #[test]
    fn the_workers_reason_counts_before_the_brokers() {
        let mut headers = FieldTable::default();
        headers.insert("x-reason".into(), text("limit_day"));
        headers.insert("x-death".into(), AMQPValue::Boolean(true));
        assert_eq!(reason(&BasicProperties::default().with_headers(headers)).as_deref(), Some("limit_day"));
        assert_eq!(reason(&BasicProperties::default()), None);
    }
}
