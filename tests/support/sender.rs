//! The sender's side: a plain AMQP client, and a signed client of the NIM API.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use tokio::sync::Notify;

use super::broadcastd::App;
use super::journal::Journal;
use super::rabbitmq::{ADMINISTRATOR, as_user};
use super::{SOON, now_ms, unique, until};

/// A request as a backend writes it; add fields with `request["…"] = …`.
pub fn request(app: &App, body: &str) -> Value {
    json!({ "requestId": unique("request"), "appKey": app.key, "body": body })
}

/// The same, retained.
pub fn retained(app: &App, body: &str) -> Value {
    let mut request = request(app, body);
    request["isOffline"] = true.into();
    request
}

#[derive(Debug, Default)]
struct Replies {
    by_correlation: Mutex<HashMap<String, Vec<Value>>>,
    /// Where to note what is told with a correlation id: the journal, and the attempt.
    noted: Mutex<HashMap<String, (Journal, usize)>>,
    arrived: Notify,
}

/// A backend that speaks AMQP.
#[derive(Debug)]
pub struct Amqp {
    connection: Connection,
    channel: Channel,
    reply_queue: String,
    replies: Arc<Replies>,
    journals: HashMap<String, Journal>,
}

/// A message of the dead-letter queue.
#[derive(Debug)]
pub struct DeadLetter {
    /// Its headers, as text.
    pub headers: HashMap<String, String>,
    /// What was sent.
    pub payload: Vec<u8>,
    /// Whether the broker drops it after a time.
    pub has_expiration: bool,
}

impl Amqp {
    /// Connects as the administrator, with a reply queue of its own.
    pub async fn connect(url: &str) -> Self {
        Self::connect_as_given(&as_user(url, ADMINISTRATOR)).await
    }

    /// Connects as the user of the address, with a reply queue of its own.
    pub async fn connect_as_given(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let replies = Arc::new(Replies::default());
        let queue =
            channel.queue_declare("".into(), QueueDeclareOptions::exclusive(), FieldTable::default()).await.unwrap();
        let reply_queue = queue.name().as_str().to_owned();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let mut consumer = channel
            .basic_consume(reply_queue.as_str().into(), "".into(), options, FieldTable::default())
            .await
            .unwrap();
        let arriving = replies.clone();
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let correlation = delivery.properties.correlation_id().as_ref().expect("a correlation id");
                let reply: Value = serde_json::from_slice(&delivery.data).expect("a reply is JSON");
                if let Some((journal, attempt)) = arriving.noted.lock().unwrap().get(correlation.as_str()) {
                    journal.told(*attempt, &reply);
                }
                let mut replies = arriving.by_correlation.lock().unwrap();
                replies.entry(correlation.as_str().to_owned()).or_default().push(reply);
                arriving.arrived.notify_waiters();
            }
        });
        Self { connection, channel, reply_queue, replies, journals: HashMap::new() }
    }

    /// The same; what it sends for these apps, and what it is told of it, is noted in their journals.
    pub fn noting(mut self, apps: &[App]) -> Self {
        self.journals = apps.iter().map(|app| (app.key.clone(), app.journal.clone())).collect();
        self
    }

    /// Notes what is about to be sent, if it says which request of which of the apps it is.
    fn note(&self, payload: &[u8], properties: &BasicProperties) -> Option<(Journal, usize)> {
        // Nothing that is larger than this is a request.
        let mut request: Value = serde_json::from_slice(payload.get(..payload.len().min(1 << 17))?).ok()?;
        let journal = self.journals.get(request["appKey"].as_str()?)?;
        if request["requestId"].is_null() {
            request["requestId"] = properties.message_id().as_ref()?.as_str().into();
        }
        request["requestId"].as_str()?;
        let noted = (journal.clone(), journal.sending(request));
        let is_own = properties.reply_to().as_ref().is_some_and(|queue| queue.as_str() == self.reply_queue);
        if let (true, Some(correlation)) = (is_own, properties.correlation_id()) {
            self.replies.noted.lock().unwrap().insert(correlation.as_str().to_owned(), noted.clone());
        }
        Some(noted)
    }

    /// Puts a message on the queue of requests and waits for the broker to have it.
    pub async fn publish(&self, payload: &[u8], properties: BasicProperties) {
        self.try_publish(payload, properties).await.unwrap();
    }

    /// The same; a sentence if the broker did not take it, or had no queue for it.
    pub async fn try_publish(&self, payload: &[u8], properties: BasicProperties) -> Result<(), String> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let noted = self.note(payload, &properties);
        let sent = self.channel.basic_publish("broadcast".into(), "request".into(), options, payload, properties).await;
        let confirmation = sent.map_err(|error| error.to_string())?.await.map_err(|error| error.to_string())?;
        if !confirmation.is_ack() {
            return Err("the broker did not take it".to_owned());
        }
        if confirmation.take_message().is_some() {
            return Err("no queue takes requests".to_owned());
        }
        if let Some((journal, attempt)) = noted {
            journal.taken(attempt);
        }
        Ok(())
    }

    /// Sends it without a wish for a reply.
    pub async fn send(&self, payload: &[u8]) {
        self.publish(payload, BasicProperties::default()).await;
    }

    /// Sends it with a wish for a reply; returns the correlation id.
    pub async fn ask(&self, payload: &[u8]) -> String {
        let correlation = unique("correlation");
        let properties = BasicProperties::default()
            .with_reply_to(self.reply_queue.as_str().into())
            .with_correlation_id(correlation.as_str().into());
        self.publish(payload, properties).await;
        correlation
    }

    /// The first reply with this correlation id.
    pub async fn reply(&self, correlation: &str) -> Value {
        let wait = async {
            loop {
                let arrived = self.replies.arrived.notified();
                if let Some(reply) = self.replies.by_correlation.lock().unwrap().get(correlation) {
                    return reply[0].clone();
                }
                arrived.await;
            }
        };
        tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("no reply to {correlation} in {SOON:?}"))
    }

    /// Every reply with this correlation id that has come so far.
    pub fn all_replies(&self, correlation: &str) -> Vec<Value> {
        self.replies.by_correlation.lock().unwrap().get(correlation).cloned().unwrap_or_default()
    }

    /// Sends requests all at once and waits for all verdicts, in order.
    pub async fn burst(&self, requests: &[Value]) -> Vec<Value> {
        let payloads: Vec<String> = requests.iter().map(Value::to_string).collect();
        let asked = join_all(payloads.iter().map(|payload| self.ask(payload.as_bytes()))).await;
        join_all(asked.iter().map(|correlation| self.reply(correlation))).await
    }

    /// How many replies have come, whatever they say.
    pub fn replies(&self) -> usize {
        self.replies.by_correlation.lock().unwrap().len()
    }

    /// Sends a request and waits for its verdict.
    pub async fn request(&self, request: &Value) -> Value {
        let correlation = self.ask(request.to_string().as_bytes()).await;
        self.reply(&correlation).await
    }

    /// Sends a request and expects it to be accepted; returns the broadcast's id.
    pub async fn accepted(&self, request: &Value) -> u64 {
        let reply = self.request(request).await;
        assert_eq!(reply["code"], 200, "{reply}");
        reply["msg"]["broadcastId"].as_u64().unwrap()
    }

    /// Takes one message from the dead-letter queue.
    pub async fn dead_letter(&self) -> DeadLetter {
        until("a dead letter", SOON, async || {
            let message = self.channel.basic_get("broadcast.dead".into(), BasicGetOptions::default()).await;
            let message = message.map_err(|error| error.to_string())?.ok_or("the queue is empty")?;
            message.acker.ack(BasicAckOptions::default()).await.map_err(|error| error.to_string())?;
            if let Ok(request) = serde_json::from_slice::<Value>(&message.delivery.data)
                && let (Some(app), Some(id)) = (request["appKey"].as_str(), request["requestId"].as_str())
                && let Some(journal) = self.journals.get(app)
            {
                journal.dead(id);
            }
            let headers = message.delivery.properties.headers().clone().unwrap_or_default();
            let headers = headers.inner().iter().map(|(name, value)| (name.as_str().to_owned(), text(value)));
            let has_expiration = message.delivery.properties.expiration().is_some();
            Ok::<_, String>(DeadLetter {
                headers: headers.collect(),
                payload: message.delivery.data.clone(),
                has_expiration,
            })
        })
        .await
    }

    /// Takes everything from the dead-letter queue, which may be nothing.
    pub async fn dead_letters(&self) -> Vec<DeadLetter> {
        let mut letters = Vec::new();
        while self.ready("broadcast.dead").await > 0 {
            letters.push(self.dead_letter().await);
        }
        letters
    }

    /// How many messages are ready in a queue.
    pub async fn ready(&self, queue: &str) -> u32 {
        let options = QueueDeclareOptions::durable().passive();
        self.channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap().message_count()
    }

    /// Declares a queue of this connection, gone with it.
    pub async fn declare_queue(&self, queue: &str) {
        self.channel
            .queue_declare(queue.into(), QueueDeclareOptions::exclusive(), FieldTable::default())
            .await
            .unwrap();
    }

    /// Deletes a queue.
    pub async fn delete_queue(&self, queue: &str) {
        self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }

    /// Whether the connection still stands.
    pub fn is_connected(&self) -> bool {
        self.connection.status().connected() && self.channel.status().connected()
    }
}

fn text(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        AMQPValue::ShortString(text) => text.as_str().to_owned(),
        other => format!("{other:?}"),
    }
}

/// The headers of a signed call.
#[derive(Debug, Clone)]
pub struct Signature {
    /// `Nonce`.
    pub nonce: String,
    /// `CurTime`.
    pub time: String,
    /// `CheckSum`.
    pub check_sum: String,
}

impl Signature {
    /// A new one, of now.
    pub fn new(app: &App) -> Self {
        Self::with_secret(&app.secret)
    }

    /// A new one, of now.
    pub fn with_secret(secret: &str) -> Self {
        let (nonce, time) = (unique("nonce"), (now_ms() / 1000).to_string());
        let digest = Sha1::digest(format!("{secret}{nonce}{time}"));
        Self { check_sum: digest.iter().map(|byte| format!("{byte:02x}")).collect(), nonce, time }
    }
}

/// A backend that speaks the NIM API.
#[derive(Debug, Clone)]
pub struct Api {
    url: String,
    key: String,
    secret: String,
    journal: Journal,
}

/// A call as the request that the API makes of it; an id is made up for one that gives none.
fn as_request(key: &str, form: &[(String, String)]) -> Value {
    let mut request = json!({ "requestId": unique(ANONYMOUS), "appKey": key });
    for (name, value) in form {
        request[name] = match name.as_str() {
            "isOffline" | "ttl" | "ttlSeconds" | "targetOs" => {
                serde_json::from_str(value).unwrap_or_else(|_| value.as_str().into())
            }
            _ => value.as_str().into(),
        };
    }
    request
}

/// How the made-up ids of calls begin that gave none.
pub const ANONYMOUS: &str = "anonymous";

impl Api {
    /// `url` ends in `/nimserver`.
    pub fn new(url: &str, app: &App) -> Self {
        Self { url: url.to_owned(), key: app.key.clone(), secret: app.secret.clone(), journal: app.journal.clone() }
    }

    /// Calls `path` (`msg/broadcastMsg.action`) with a form; the answer's JSON.
    pub async fn call(&self, path: &str, form: &[(&str, &str)]) -> Value {
        let (status, answer) = self.try_call(path, form).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The same, with a signature of one's own.
    pub async fn signed(&self, path: &str, form: &[(&str, &str)], signature: &Signature) -> Value {
        let (status, answer) = self.try_signed(path, form, signature).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// A call, with the HTTP status; a sentence if it did not come through.
    pub async fn try_call(&self, path: &str, form: &[(&str, &str)]) -> Result<(u16, Value), String> {
        self.try_signed(path, form, &Signature::with_secret(&self.secret)).await
    }

    async fn try_signed(
        &self,
        path: &str,
        form: &[(&str, &str)],
        signature: &Signature,
    ) -> Result<(u16, Value), String> {
        let url = format!("{}/{path}", self.url);
        let Signature { nonce, time, check_sum } = signature.clone();
        let form: Vec<(String, String)> = form.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let sending = (path == "msg/broadcastMsg.action").then(|| self.journal.sending(as_request(&self.key, &form)));
        let deleting =
            form.iter().find(|(name, _)| name == "broadcastId" && path.ends_with("/delBroadcastMsgById.action"));
        let deleting = deleting.and_then(|(_, id)| id.parse().ok());
        let key = self.key.clone();
        let call = move || {
            let agent: ureq::Agent = ureq::Agent::config_builder()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_secs(30)))
                .build()
                .into();
            let request = agent
                .post(&url)
                .header("AppKey", key)
                .header("Nonce", nonce)
                .header("CurTime", time)
                .header("CheckSum", check_sum);
            let mut response = request.send_form(form).map_err(|error| error.to_string())?;
            let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
            let answer = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
            Ok((response.status().as_u16(), answer))
        };
        let result: Result<(u16, Value), String> = tokio::task::spawn_blocking(call).await.unwrap();
        if let Ok((_, answer)) = &result {
            if let Some(attempt) = sending {
                self.journal.told(attempt, answer);
            }
            if let Some(id) = deleting.filter(|_| answer["code"] == 200 || answer["code"] == 500) {
                self.journal.recalled(id);
            }
        }
        result
    }

    /// Sends a broadcast that must be accepted; returns its id.
    pub async fn broadcast(&self, body: &str, retained: bool) -> u64 {
        let is_offline = if retained { "true" } else { "false" };
        let answer = self.call("msg/broadcastMsg.action", &[("body", body), ("isOffline", is_offline)]).await;
        assert_eq!(answer["code"], 200, "{answer}");
        answer["msg"]["broadcastId"].as_u64().unwrap()
    }
}
