//! Replies and dead letters, on a connection of their own: while the broker blocks publishers (memory alarm), this connection
//! stands still, and the acknowledgements on the other one go on.

use std::sync::PoisonError;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};

use futures_util::future::{join_all, try_join_all};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::intake::Item;
use super::{SessionError, topology};
use crate::amqp::{AmqpSettings, connect, describe};
use crate::backoff::Backoff;
use crate::broadcast::verdict::Verdict;
use crate::metrics::Metrics;

/// mandatory: what cannot be routed comes back with its confirmation, instead of vanishing.
const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

/// How much of the sender's own headers a dead letter keeps.
const MAX_KEPT_HEADER_BYTES: usize = 8192;

/// A broker that takes longer to store dead letters is not well; the session is rebuilt and the requests come again.
const DEAD_LETTER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Outbox {
    connection: Connection,
    replies: Channel,
    dead_letters: Mutex<Channel>,
    /// Why dead letters cannot be stored just now. A std Mutex, not tokio's: never held across an await.
    trouble: std::sync::Mutex<Option<String>>,
    settings: AmqpSettings,
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
        let replies = confirming(&connection).await?;
        let dead_letters = Mutex::new(confirming(&connection).await?);
        Ok(Self {
            connection,
            replies,
            dead_letters,
            trouble: std::sync::Mutex::default(),
            settings: settings.clone(),
            reply_timeout,
            metrics,
        })
    }

    pub(super) fn connected(&self) -> bool {
        self.connection.status().connected() && self.replies.status().connected()
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
        match self.replies.basic_publish("".into(), reply_to, MANDATORY, body.as_bytes(), properties).await {
            Ok(confirm) => Sent(Some(confirm)),
            Err(_) => {
                self.metrics.replies_lost.with_label_values(&["connection"]).inc();
                Sent(None)
            }
        }
    }

    /// Waits until the broker has the replies, or the reply timeout; together, so that it is one timeout for all.
    pub(super) async fn replied(&self, sent: Vec<Sent>) {
        join_all(sent.into_iter().map(|sent| self.confirmed(sent))).await;
    }

    async fn confirmed(&self, sent: Sent) {
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

    /// Why dead letters cannot be stored just now, if so.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts requests on the dead-letter queue, with the reason in their headers: unchanged, but for those too large ever to be
    /// accepted, of which the beginning is kept, and `x-size` says how much there was. Returns when the broker has all,
    /// however long that takes: a session that ended for want of a dead-letter exchange would raise the delivery count of
    /// everything that it holds, again and again, until good requests were dead letters, too.
    ///
    /// `false`: the worker is to stop and they are not stored.
    ///
    /// One call at a time: lapin hands a returned message to whichever confirmation resolves next, so that a failure can only
    /// be told of all that is under way together.
    pub(super) async fn dead_letter(
        &self,
        dead: &[(Item, Verdict)],
        shutdown: &CancellationToken,
    ) -> Result<bool, SessionError> {
        let mut channel = self.dead_letters.lock().await;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let reason = match self.try_dead_letter(&channel, dead).await {
                Ok(()) => break,
                Err(SessionError::DeadLetter(reason)) if !self.blocked() && self.connection.status().connected() => {
                    reason
                }
                Err(error) => return Err(error),
            };
            self.metrics.dead_letter_failures.inc();
            let before = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).replace(reason.clone());
            if before.is_none() {
                tracing::error!(
                    reason,
                    requests = dead.len(),
                    "dead letters cannot be stored; their requests are held"
                );
            }
            tokio::select! {
                () = backoff.wait() => {}
                () = shutdown.cancelled() => return Ok(false),
            }
            // A channel of its own: an error closes it. What goes wrong here shows with the next attempt.
            if let Ok(declaring) = self.connection.create_channel().await
                && topology::declare_dead_letters(&declaring, &self.settings).await.is_ok()
            {
                let _ = declaring.close(200, "done".into()).await;
            }
            if !channel.status().connected() {
                *channel = confirming(&self.connection).await?;
            }
        }
        if self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            tracing::info!("dead letters are stored again");
        }
        for (_, verdict) in dead {
            self.metrics.dead_lettered.with_label_values(&[verdict.reason()]).inc();
        }
        Ok(true)
    }

    /// `DeadLetter`: the broker answered that it cannot take them.
    async fn try_dead_letter(&self, channel: &Channel, dead: &[(Item, Verdict)]) -> Result<(), SessionError> {
        let failed = |error: lapin::Error| SessionError::DeadLetter(describe(&error));
        let name: ShortString = self.settings.dead_letter.as_str().into();
        let mut confirms = Vec::with_capacity(dead.len());
        for (item, verdict) in dead {
            let mut properties = dead_properties(&item.properties, verdict);
            if item.payload.len() < item.size {
                let mut headers = properties.headers().clone().unwrap_or_default();
                headers.insert("x-size".into(), AMQPValue::LongLongInt(i64::try_from(item.size).unwrap_or(i64::MAX)));
                properties = properties.with_headers(headers);
            }
            let sent = channel.basic_publish(name.clone(), name.clone(), MANDATORY, &item.payload, properties);
            confirms.push(sent.await.map_err(failed)?);
        }
        let all = try_join_all(confirms);
        let confirmations = tokio::time::timeout(DEAD_LETTER_TIMEOUT, all)
            .await
            .map_err(|_| SessionError::Connection("no confirmation of dead letters in time".into()))?
            .map_err(failed)?;
        if confirmations.iter().all(|confirmation| *confirmation == Confirmation::Ack(None)) {
            Ok(())
        } else {
            Err(SessionError::DeadLetter("no queue takes them".into()))
        }
    }
}

/// A channel on which every publish is confirmed.
async fn confirming(connection: &Connection) -> Result<Channel, lapin::Error> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// The properties of a dead letter. Only what cannot harm is carried over: a `user_id` would have the broker refuse it, an
/// `expiration` would have it vanish, huge headers would not fit a frame.
///
/// `x-reason` (a fixed label), `x-code` and `x-desc` (the sentence that a reply would have carried) are added.
fn dead_properties(original: &AMQPProperties, verdict: &Verdict) -> AMQPProperties {
    let mut headers = FieldTable::default();
    let mut bytes = 0;
    for (name, value) in original.headers().iter().flat_map(|headers| headers.inner()) {
        bytes += name.as_str().len() + size(value);
        if bytes > MAX_KEPT_HEADER_BYTES {
            break;
        }
        headers.insert(name.clone(), value.clone());
    }
    headers.insert("x-reason".into(), AMQPValue::LongString(LongString::from(verdict.reason())));
    headers.insert("x-code".into(), AMQPValue::LongInt(i32::from(verdict.code())));
    headers.insert("x-desc".into(), AMQPValue::LongString(LongString::from(verdict.desc())));
    let mut properties = BasicProperties::default().with_headers(headers).with_delivery_mode(2);
    if let Some(message_id) = original.message_id() {
        properties = properties.with_message_id(message_id.clone());
    }
    if let Some(correlation_id) = original.correlation_id() {
        properties = properties.with_correlation_id(correlation_id.clone());
    }
    if let Some(content_type) = original.content_type() {
        properties = properties.with_content_type(content_type.clone());
    }
    if let Some(timestamp) = original.timestamp() {
        properties = properties.with_timestamp(*timestamp);
    }
    properties
}

/// About how many bytes a header's value takes; containers count as too many.
fn size(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::LongString(text) => text.as_bytes().len(),
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) | AMQPValue::ByteArray(_) => MAX_KEPT_HEADER_BYTES,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broadcast::verdict::Rejection;

    #[test]
    fn a_dead_letter_carries_over_only_what_cannot_harm() {
        let mut headers = FieldTable::default();
        headers.insert("trace".into(), AMQPValue::LongString(LongString::from("t-1")));
        headers.insert("zzz-huge".into(), AMQPValue::LongString(LongString::from("x".repeat(100_000))));
        let original = BasicProperties::default()
            .with_headers(headers)
            .with_expiration("500".into())
            .with_user_id("guest".into())
            .with_message_id("m-1".into());
        let dead = dead_properties(&original, &Verdict::Rejected(Rejection::bad("no_body", "body is missing")));
        assert_eq!((dead.expiration(), dead.user_id(), dead.delivery_mode()), (&None, &None, &Some(2)));
        assert_eq!(dead.message_id().as_ref().map(ShortString::as_str), Some("m-1"));
        let headers = dead.headers().as_ref().unwrap().inner();
        assert!(headers.contains_key("trace") && headers.contains_key("x-reason") && !headers.contains_key("zzz-huge"));
    }
}
