//! Replies and dead letters, on a connection of their own: while the broker blocks publishers (memory alarm), this connection
//! stands still, and the acknowledgements on the other one go on.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};

use super::SessionError;
use super::intake::Item;
use crate::amqp::{AmqpSettings, connect, describe};
use crate::broadcast::verdict::Verdict;
use crate::metrics::Metrics;

/// mandatory: what cannot be routed comes back with its confirmation, instead of vanishing.
const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

pub(super) struct Outbox {
    connection: Connection,
    channel: Channel,
    dead_letter: ShortString,
    reply_timeout: Duration,
    metrics: Metrics,
}

/// A message on its way to the broker.
pub(super) struct Sent(Option<PublisherConfirm>);

impl Outbox {
    pub(super) async fn open(
        settings: &AmqpSettings,
        reply_timeout: Duration,
        metrics: Metrics,
    ) -> Result<Self, SessionError> {
        let connection = connect(settings, "broadcastd worker: replies").await.map_err(SessionError::Connect)?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { connection, channel, dead_letter: settings.dead_letter.as_str().into(), reply_timeout, metrics })
    }

    pub(super) fn connected(&self) -> bool {
        self.connection.status().connected() && self.channel.status().connected()
    }

    pub(super) fn blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Sends the verdict to whoever asked for it. A reply that cannot be sent is counted, never waited for without bound: its
    /// sender asks again with the same request id and gets the stored verdict.
    pub(super) async fn reply(&self, item: &Item, verdict: &Verdict) -> Sent {
        let Some(reply_to) = item.reply_to.clone() else { return Sent(None) };
        if self.blocked() {
            self.metrics.replies_lost.with_label_values(&["blocked"]).inc();
            return Sent(None);
        }
        let mut properties = BasicProperties::default().with_content_type("application/json".into());
        if let Some(correlation_id) = item.correlation_id.clone() {
            properties = properties.with_correlation_id(correlation_id);
        }
        let body = verdict.reply(item.request.as_ref()).to_string();
        match self.channel.basic_publish("".into(), reply_to, MANDATORY, body.as_bytes(), properties).await {
            Ok(confirm) => Sent(Some(confirm)),
            Err(_) => {
                self.metrics.replies_lost.with_label_values(&["connection"]).inc();
                Sent(None)
            }
        }
    }

    /// Waits until the broker has a reply, or the reply timeout.
    pub(super) async fn replied(&self, sent: Sent) {
        let Sent(Some(confirm)) = sent else { return };
        let lost = match tokio::time::timeout(self.reply_timeout, confirm).await {
            Ok(Ok(Confirmation::Ack(None) | Confirmation::NotRequested)) => {
                self.metrics.replies.inc();
                return;
            }
            Ok(Ok(_)) => "unroutable",
            Ok(Err(_)) => "connection",
            Err(_) => "timeout",
        };
        self.metrics.replies_lost.with_label_values(&[lost]).inc();
    }

    /// Puts the request on the dead-letter queue, unchanged, with the reason in its headers. Returns when the broker has it.
    pub(super) async fn dead_letter(&self, item: &Item, verdict: &Verdict) -> Result<(), SessionError> {
        let mut headers = item.properties.headers().clone().unwrap_or_default();
        add_reason(&mut headers, verdict);
        let properties: AMQPProperties = item.properties.clone().with_headers(headers).with_delivery_mode(2);
        let failed = |error: lapin::Error| SessionError::DeadLetter(describe(&error));
        let confirm = self
            .channel
            .basic_publish(self.dead_letter.clone(), self.dead_letter.clone(), MANDATORY, &item.payload, properties)
            .await
            .map_err(failed)?;
        match tokio::time::timeout(self.reply_timeout.max(Duration::from_secs(10)), confirm).await {
            Ok(Ok(Confirmation::Ack(None) | Confirmation::NotRequested)) => {
                self.metrics.dead_lettered.with_label_values(&[verdict.reason()]).inc();
                Ok(())
            }
            Ok(Ok(_)) => Err(SessionError::DeadLetter("no queue takes them".into())),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(SessionError::DeadLetter("no confirmation in time".into())),
        }
    }
}

/// `x-reason` (a fixed label), `x-code` and `x-desc` (the sentence that a reply would have carried).
fn add_reason(headers: &mut FieldTable, verdict: &Verdict) {
    headers.insert("x-reason".into(), AMQPValue::LongString(LongString::from(verdict.reason())));
    headers.insert("x-code".into(), AMQPValue::LongInt(i32::from(verdict.code())));
    headers.insert("x-desc".into(), AMQPValue::LongString(LongString::from(verdict.desc())));
}
