//! Replies and dead letters, on a connection of their own: while the broker blocks publishers (memory alarm), this connection
//! stands still, and the acknowledgements on the other one go on.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::basic::AMQPProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};

use futures_util::future::try_join_all;
use tokio::sync::Mutex;

use super::SessionError;
use super::intake::Item;
use crate::amqp::{AmqpSettings, connect, describe};
use crate::broadcast::verdict::Verdict;
use crate::metrics::Metrics;

/// mandatory: what cannot be routed comes back with its confirmation, instead of vanishing.
const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

/// A broker that takes longer to store dead letters is not well; the session is rebuilt and the requests come again.
const DEAD_LETTER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Outbox {
    connection: Connection,
    replies: Channel,
    dead_letters: Mutex<Channel>,
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
        let replies = connection.create_channel().await?;
        replies.confirm_select(ConfirmSelectOptions::default()).await?;
        let dead_letters = connection.create_channel().await?;
        dead_letters.confirm_select(ConfirmSelectOptions::default()).await?;
        let dead_letters = Mutex::new(dead_letters);
        Ok(Self {
            connection,
            replies,
            dead_letters,
            dead_letter: settings.dead_letter.as_str().into(),
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

    /// Puts requests on the dead-letter queue, unchanged, with the reason in their headers. Returns when the broker has all.
    ///
    /// One call at a time: lapin hands a returned message to whichever confirmation resolves next, so that a failure can only
    /// be told of all that is under way together.
    pub(super) async fn dead_letter(&self, dead: &[(Item, Verdict)]) -> Result<(), SessionError> {
        let failed = |error: lapin::Error| SessionError::DeadLetter(describe(&error));
        let channel = self.dead_letters.lock().await;
        let mut confirms = Vec::with_capacity(dead.len());
        for (item, verdict) in dead {
            let mut headers = item.properties.headers().clone().unwrap_or_default();
            add_reason(&mut headers, verdict);
            let properties: AMQPProperties = item.properties.clone().with_headers(headers).with_delivery_mode(2);
            let name = &self.dead_letter;
            let sent = channel.basic_publish(name.clone(), name.clone(), MANDATORY, &item.payload, properties);
            confirms.push(sent.await.map_err(failed)?);
        }
        let all = try_join_all(confirms);
        let confirmations = tokio::time::timeout(DEAD_LETTER_TIMEOUT, all)
            .await
            .map_err(|_| SessionError::DeadLetter("no confirmation in time".into()))?
            .map_err(failed)?;
        if !confirmations.iter().all(|confirmation| *confirmation == Confirmation::Ack(None)) {
            return Err(SessionError::DeadLetter("no queue takes them".into()));
        }
        for (_, verdict) in dead {
            self.metrics.dead_lettered.with_label_values(&[verdict.reason()]).inc();
        }
        Ok(())
    }
}

/// `x-reason` (a fixed label), `x-code` and `x-desc` (the sentence that a reply would have carried).
fn add_reason(headers: &mut FieldTable, verdict: &Verdict) {
    headers.insert("x-reason".into(), AMQPValue::LongString(LongString::from(verdict.reason())));
    headers.insert("x-code".into(), AMQPValue::LongInt(i32::from(verdict.code())));
    headers.insert("x-desc".into(), AMQPValue::LongString(LongString::from(verdict.desc())));
}
