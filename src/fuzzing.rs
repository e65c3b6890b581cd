//! What the fuzz targets (`fuzz/`) and the simulation (`tests/simulation`) reach, and nobody else: the readers of what
//! strangers send, and the node's state machines, without sockets, brokers or clocks.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable};

use crate::api;
use crate::api::form::Form;
use crate::broadcast::BroadcastId;
use crate::broadcast::app::{App as BroadcastApp, Directory};
use crate::broadcast::request::{Request, Submission};
use crate::broadcast::verdict::{Decision, Rejection, Verdict};
use crate::ledger::LedgerError;
use crate::ledger::redis::answers;
use crate::worker::intake;

pub use crate::node::entry::Entry;
pub use crate::node::http::{Head, MAX_HEAD, read_head};
pub use crate::node::login::{Apps, Login};
pub use crate::node::pages::WriteSpan;
pub use crate::node::presence::app::{App, Change, Update};
pub use crate::node::shard::session::{Session, State, Written};
pub use crate::node::shard::sweep::{Batch, Next, offer};
pub use crate::node::timeline::{Bounds, Fit, Reader, Timeline};

/// The AMQP properties that the worker looks at.
#[derive(Debug, Default, Clone, Copy)]
pub struct Properties<'a> {
    /// At most 255 bytes, like the others.
    pub message_id: Option<&'a str>,
    /// Where the verdict goes.
    pub reply_to: Option<&'a str>,
    /// What comes back with it.
    pub correlation_id: Option<&'a str>,
    /// The header `x-enqueued-at-ms`.
    pub enqueued_at_ms: Option<i64>,
    /// Seconds since the Unix epoch.
    pub timestamp: Option<u64>,
}

/// What intake makes of a delivery.
#[derive(Debug)]
pub struct Taken {
    /// For the ledger, or a verdict already.
    pub outcome: Result<Submission, Verdict>,
    /// What was asked, where it could be read and is refused all the same.
    pub request: Option<Request>,
    /// The message as it would be dead-lettered.
    pub payload: Vec<u8>,
    /// Milliseconds since the Unix epoch, as the sender says.
    pub enqueued_at_ms: Option<u64>,
    /// Where the verdict goes.
    pub reply_to: Option<String>,
}

/// Takes a message in as the worker does.
#[must_use]
pub fn take_in(properties: Properties<'_>, payload: Vec<u8>, directory: &Directory) -> Taken {
    let mut amqp = BasicProperties::default();
    if let Some(id) = properties.message_id {
        amqp = amqp.with_message_id(id.into());
    }
    if let Some(queue) = properties.reply_to {
        amqp = amqp.with_reply_to(queue.into());
    }
    if let Some(id) = properties.correlation_id {
        amqp = amqp.with_correlation_id(id.into());
    }
    if let Some(ms) = properties.enqueued_at_ms {
        let mut headers = FieldTable::default();
        headers.insert(api::message::ENQUEUED_AT.into(), AMQPValue::LongLongInt(ms));
        amqp = amqp.with_headers(headers);
    }
    if let Some(seconds) = properties.timestamp {
        amqp = amqp.with_timestamp(seconds);
    }
    let mut delivery = Delivery::mock(1, "".into(), "".into(), false, payload);
    delivery.properties = amqp;
    let (item, outcome) = intake::read(delivery, directory, |queue| !queue.is_empty());
    Taken {
        outcome,
        request: item.request,
        payload: item.payload,
        enqueued_at_ms: item.enqueued_at_ms,
        reply_to: item.reply_to.map(|reply_to| reply_to.as_str().to_owned()),
    }
}

/// The request as the API enqueues it.
///
/// # Errors
/// It cannot be written as JSON.
pub fn encode(request: &Request) -> Result<Vec<u8>, serde_json::Error> {
    api::message::encode(request)
}

/// Headers from lines `Name: value`; lines that no HTTP parser would let through are left out.
#[must_use]
pub fn headers(lines: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in lines.split(|byte| *byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    headers
}

/// The form of a call, with the headers that say how to read it.
///
/// # Errors
/// A 414.
pub fn form(headers: &HeaderMap, body: &[u8], call: api::nim::Call) -> Result<Form, Rejection> {
    Form::parse(api::signature::single(headers, "Content-Type")?, body, call.parameters())
}

/// The request that a form describes.
///
/// # Errors
/// A 414.
pub fn request(app: &BroadcastApp, headers: &HeaderMap, form: Form) -> Result<Request, Rejection> {
    api::nim::request(app, form, api::signature::single(headers, "RequestId")?)
}

/// What the answers of the scripts are read as.
#[derive(Debug)]
pub struct Answers {
    /// As accept.lua's.
    pub decision: Result<Decision, LedgerError>,
    /// As join.lua's.
    pub snapshot: Result<Rows, LedgerError>,
    /// As renew.lua's: now in milliseconds, head.
    pub renewal: Result<(u64, BroadcastId), LedgerError>,
}

/// An app's state as the rows that a script gave.
#[derive(Debug)]
pub struct Rows {
    /// Milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// The newest id.
    pub head: BroadcastId,
    /// Envelopes.
    pub log: Vec<Arc<[u8]>>,
    /// Envelopes too.
    pub retained: Vec<Arc<[u8]>>,
}

/// Reads one answer of a Redis server (RESP) as each of the scripts'; `None` if it is none.
#[must_use]
pub fn answers(resp: &[u8]) -> Option<Answers> {
    let value = redis::parse_redis_value(resp).ok()?;
    let raw = |rows: Vec<Vec<u8>>| rows.into_iter().map(Into::into).collect();
    let snapshot = answers::read(value.clone());
    Some(Answers {
        decision: answers::read_decision(&value),
        snapshot: snapshot.map(|(now_ms, head, log, retained)| Rows {
            now_ms,
            head,
            log: raw(log),
            retained: raw(retained),
        }),
        renewal: answers::read(value),
    })
}

/// A device's token with any claims (HS256).
///
/// # Errors
/// They cannot be written.
pub fn sign_claims(claims: &serde_json::Value, secret: &str) -> Result<String, jsonwebtoken::errors::Error> {
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key)
}
