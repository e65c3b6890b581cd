//! Replies and dead letters, on connections of their own: while the broker blocks publishers (memory alarm), these stand still,
//! and the acknowledgements on the other one go on.

use std::sync::PoisonError;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all, try_join_all};
use lapin::options::BasicPublishOptions;
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Confirmation, Connection};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::intake::Item;
use super::replies::{Lost, Replies, Reply};
use super::{SessionError, topology};
use crate::amqp::{AmqpSettings, Publisher, connect, describe};
use crate::backoff::Backoff;
use crate::broadcast::verdict::Verdict;
use crate::metrics::Metrics;

/// mandatory: what cannot be routed comes back with its confirmation, instead of vanishing.
const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

/// How much of the sender's own headers a dead letter keeps.
const MAX_KEPT_HEADER_BYTES: usize = 8192;

/// A broker that takes longer to store dead letters is not well; the session is rebuilt and the requests come again.
const DEAD_LETTER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Outbox<'a> {
    connection: Connection,
    replies: &'a Replies,
    dead_letters: Mutex<DeadLetters>,
    /// Why dead letters cannot be stored just now. A std Mutex, not tokio's: never held across an await.
    trouble: std::sync::Mutex<Option<String>>,
    settings: AmqpSettings,
    reply_timeout: Duration,
    metrics: Metrics,
}

struct DeadLetters {
    publisher: Publisher,
    backoff: Backoff,
}

/// What became of an attempt to store dead letters.
pub(super) enum Stored {
    /// The broker has them all.
    All,
    /// It may have some of them. Or the worker is to stop.
    NotAll,
    /// Nothing was tried: the broker takes no publishes just now.
    Blocked,
}

/// A reply on its way to the broker; `None`: nobody waits for one.
pub(super) struct Sent<'a>(Option<BoxFuture<'a, Result<(), Lost>>>);

impl<'a> Outbox<'a> {
    pub(super) async fn open(
        settings: &AmqpSettings,
        reply_timeout: Duration,
        metrics: Metrics,
        replies: &'a Replies,
    ) -> Result<Self, SessionError> {
        let connection = connect(settings, "broadcastd worker: dead letters").await.map_err(SessionError::Connect)?;
        replies.renew().await;
        let dead_letters = Mutex::new(DeadLetters {
            publisher: Publisher::open(&connection).await?,
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
        });
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
        self.connection.status().connected()
    }

    /// Whether the broker takes no publishes just now: it tells each connection for itself, and means all.
    pub(super) fn blocked(&self) -> bool {
        self.connection.status().blocked() || self.replies.blocked()
    }

    /// The verdict for whoever asked for it. A reply that cannot be sent is counted, never waited for without bound: its
    /// sender asks again with the same request id and gets the stored verdict.
    ///
    /// It is sent with [`Outbox::replied`].
    pub(super) fn reply(&self, item: &Item, verdict: &Verdict) -> Sent<'_> {
        let Some(to) = item.reply_to.clone() else { return Sent(None) };
        if self.blocked() {
            return Sent(Some(std::future::ready(Err(Lost::Blocked)).boxed()));
        }
        let mut properties = BasicProperties::default().with_content_type("application/json".into());
        if let Some(correlation_id) = item.correlation_id.clone() {
            properties = properties.with_correlation_id(correlation_id);
        }
        let body = verdict.reply(item.request.as_ref()).to_string();
        Sent(Some(self.replies.send(Reply { to, body, properties }).boxed()))
    }

    /// Sends the replies and waits until the broker has them, or the reply timeout; together, so that it is one timeout for all.
    pub(super) async fn replied(&self, sent: Vec<Sent<'_>>) {
        join_all(sent.into_iter().map(|sent| self.confirmed(sent))).await;
    }

    async fn confirmed(&self, sent: Sent<'_>) {
        let Sent(Some(outcome)) = sent else { return };
        match tokio::time::timeout(self.reply_timeout, outcome).await.unwrap_or(Err(Lost::Timeout)) {
            Ok(()) => self.metrics.replies.inc(),
            Err(lost) => self.metrics.replies_lost.with_label_values(&[lost.label()]).inc(),
        }
    }

    /// Why dead letters cannot be stored just now, if so.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tries to put requests on the dead-letter queue, with the reason in their headers: unchanged, but for those too large ever to
    /// be accepted, of which the beginning is kept, and `x-size` says how much there was. If the attempt before failed, it first
    /// waits a while and mends what it can. An error is the end of the session; a missing exchange is none: new sessions would
    /// raise the delivery count of everything that is held, again and again, until good requests were dead letters, too.
    ///
    /// One call at a time: lapin hands a returned message to whichever confirmation resolves next, so that a failure can only
    /// be told of all that is under way together.
    pub(super) async fn dead_letter(
        &self,
        dead: &[(Item, Verdict)],
        shutdown: &CancellationToken,
    ) -> Result<Stored, SessionError> {
        let mut dead_letters = self.dead_letters.lock().await;
        let DeadLetters { publisher, backoff } = &mut *dead_letters;
        if self.trouble().is_some() {
            tokio::select! {
                () = backoff.wait() => {}
                () = shutdown.cancelled() => return Ok(Stored::NotAll),
            }
            // A channel of its own: an error closes it. What goes wrong here shows with the attempt.
            if let Ok(declaring) = self.connection.create_channel().await
                && topology::declare_dead_letters(&declaring, &self.settings).await.is_ok()
            {
                let _ = declaring.close(200, "done".into()).await;
            }
        }
        if self.blocked() {
            return Ok(Stored::Blocked);
        }
        if !publisher.is_usable() {
            *publisher = Publisher::open(&self.connection).await?;
        }
        match self.try_dead_letter(publisher, dead).await {
            Ok(()) => {}
            // The alarm came up just now, with this publish.
            Err(_) if self.blocked() => return Ok(Stored::Blocked),
            Err(SessionError::DeadLetter(reason)) if self.connection.status().connected() => {
                self.metrics.dead_letter_failures.inc();
                if self.set_trouble(Some(reason.clone())).is_none() {
                    tracing::error!(
                        reason,
                        requests = dead.len(),
                        "dead letters cannot be stored; their requests are held"
                    );
                }
                return Ok(Stored::NotAll);
            }
            Err(error) => return Err(error),
        }
        if self.set_trouble(None).is_some() {
            backoff.reset();
            tracing::info!("dead letters are stored again");
        }
        for (_, verdict) in dead {
            self.metrics.dead_lettered.with_label_values(&[verdict.reason()]).inc();
        }
        Ok(Stored::All)
    }

    fn set_trouble(&self, reason: Option<String>) -> Option<String> {
        std::mem::replace(&mut *self.trouble.lock().unwrap_or_else(PoisonError::into_inner), reason)
    }

    /// `DeadLetter`: the broker answered that it cannot take them.
    ///
    /// The first one alone: an error closes the channel, and what lapin still sends on it would end the whole connection.
    async fn try_dead_letter(&self, publisher: &Publisher, dead: &[(Item, Verdict)]) -> Result<(), SessionError> {
        let (first, rest) = dead.split_at(dead.len().min(1));
        self.publish_dead_letters(publisher, first).await?;
        self.publish_dead_letters(publisher, rest).await
    }

    async fn publish_dead_letters(&self, publisher: &Publisher, dead: &[(Item, Verdict)]) -> Result<(), SessionError> {
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
            let sent = publisher.publish(name.clone(), name.clone(), MANDATORY, &item.payload, properties);
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
