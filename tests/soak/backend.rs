//! A backend that speaks AMQP and puts up with a broker that comes and goes: it asks again with the same request id.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::support::unique;

/// What the broker may take for one step.
const STEP: Duration = Duration::from_secs(5);
/// What a reply may take until it is asked for again.
const REPLY: Duration = Duration::from_secs(10);

struct Live {
    connection: Connection,
    channel: Channel,
    reply_queue: String,
    waiting: Mutex<HashMap<String, oneshot::Sender<Value>>>,
}

impl Live {
    async fn connect(url: &str) -> Result<Arc<Self>, lapin::Error> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let queue = channel.queue_declare("".into(), QueueDeclareOptions::exclusive(), FieldTable::default()).await?;
        let reply_queue = queue.name().as_str().to_owned();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let mut consumer =
            channel.basic_consume(reply_queue.as_str().into(), "".into(), options, FieldTable::default()).await?;
        let live = Arc::new(Self { connection, channel, reply_queue, waiting: Mutex::default() });
        // Weak: the connection is to end when nobody uses it any more.
        let weak = Arc::downgrade(&live);
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let (Some(live), Some(correlation)) = (weak.upgrade(), delivery.properties.correlation_id()) else {
                    continue;
                };
                let waiter = live.waiting.lock().unwrap().remove(correlation.as_str());
                if let (Some(waiter), Ok(reply)) = (waiter, serde_json::from_slice(&delivery.data)) {
                    let _ = waiter.send(reply);
                }
            }
        });
        Ok(live)
    }
}

/// The client. One publish at a time: it is certain then which one the broker confirms.
pub struct Backend {
    url: String,
    live: tokio::sync::Mutex<Option<Arc<Live>>>,
    /// When it could last not be connected: hundreds of requests may be waiting, and each attempt costs a thread.
    failed: Mutex<Option<Instant>>,
}

impl Backend {
    pub fn new(url: &str) -> Self {
        Self { url: url.to_owned(), live: tokio::sync::Mutex::new(None), failed: Mutex::new(None) }
    }

    /// Sends it once; an error if the broker did not confirm it, in which case it may have it all the same. `wish`: whom the
    /// reply with this correlation id is for.
    async fn publish(
        &self,
        request: &Value,
        wish: Option<(&str, oneshot::Sender<Value>)>,
    ) -> Result<Arc<Live>, String> {
        let mut place = self.live.lock().await;
        let live = match &*place {
            Some(live) if live.connection.status().connected() && live.channel.status().connected() => live.clone(),
            _ if self.failed.lock().unwrap().is_some_and(|failed| failed.elapsed() < Duration::from_secs(1)) => {
                return Err("it could not be connected just now".to_owned());
            }
            _ => {
                let connected = timeout(STEP * 2, Live::connect(&self.url)).await;
                *self.failed.lock().unwrap() = (!matches!(connected, Ok(Ok(_)))).then(Instant::now);
                let live = connected.map_err(|_| "no connection in time")?.map_err(|error| error.to_string())?;
                place.insert(live).clone()
            }
        };
        let mut properties = BasicProperties::default().with_delivery_mode(2);
        if let Some((correlation, waiter)) = wish {
            let reply_to = live.reply_queue.as_str().into();
            properties = properties.with_reply_to(reply_to).with_correlation_id(correlation.into());
            // The reply may be here before the confirmation.
            live.waiting.lock().unwrap().insert(correlation.to_owned(), waiter);
        }
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let payload = request.to_string();
        let sending = async {
            let sent = live.channel.basic_publish(
                "broadcast".into(),
                "request".into(),
                options,
                payload.as_bytes(),
                properties,
            );
            sent.await.map_err(|error| error.to_string())?.await.map_err(|error| error.to_string())
        };
        match timeout(STEP, sending).await.unwrap_or_else(|_| Err("no confirmation in time".to_owned())) {
            Ok(Confirmation::Ack(None)) => Ok(live),
            Ok(_) => Err("the broker did not take it".to_owned()),
            Err(problem) => {
                // What it may still confirm must not be taken for the confirmation of another.
                *place = None;
                tokio::spawn(async move { timeout(STEP, live.connection.close(200, "given up".into())).await.is_ok() });
                Err(problem)
            }
        }
    }

    /// Sends it without a wish for a reply.
    pub async fn send(&self, request: &Value) -> Result<(), String> {
        self.publish(request, None).await.map(|_| ())
    }

    /// Sends it and waits for the reply.
    pub async fn ask(&self, request: &Value) -> Result<Value, String> {
        let correlation = unique("correlation");
        let (waiter, arriving) = oneshot::channel();
        let live = self.publish(request, Some((&correlation, waiter))).await?;
        let reply = timeout(REPLY, arriving).await;
        live.waiting.lock().unwrap().remove(&correlation);
        reply.map_err(|_| "no reply in time".to_owned())?.map_err(|_| "the connection was lost".to_owned())
    }
}

/// Empties the dead-letter queue for ever; tells of each one's payload and reason.
pub async fn drain_dead_letters(url: String, tell: impl Fn(&[u8], &str)) {
    loop {
        let _ = drain(&url, &tell).await;
        sleep(Duration::from_secs(1)).await;
    }
}

async fn drain(url: &str, tell: &impl Fn(&[u8], &str)) -> Result<(), String> {
    let step = |error: lapin::Error| error.to_string();
    let late = |_| "no answer in time".to_owned();
    let connection = Connection::connect(url, ConnectionProperties::default());
    let connection = timeout(STEP * 2, connection).await.map_err(late)?.map_err(step)?;
    let channel = timeout(STEP, connection.create_channel()).await.map_err(late)?.map_err(step)?;
    loop {
        let get = channel.basic_get("broadcast.dead".into(), BasicGetOptions::default());
        let Some(message) = timeout(STEP, get).await.map_err(late)?.map_err(step)? else {
            sleep(Duration::from_millis(500)).await;
            continue;
        };
        let headers = message.delivery.properties.headers().clone().unwrap_or_default();
        let reason = match headers.inner().get("x-reason") {
            Some(AMQPValue::LongString(reason)) => String::from_utf8_lossy(reason.as_bytes()).into_owned(),
            _ => format!("by the broker, {headers:?}"),
        };
        tell(&message.delivery.data, &reason);
        let ack = message.acker.ack(BasicAckOptions::default());
        timeout(STEP, ack).await.map_err(late)?.map_err(step)?;
    }
}
