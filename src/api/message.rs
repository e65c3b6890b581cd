//! A request as an AMQP message: what the worker reads.

use std::time::{SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde::Serialize;

use crate::broadcast::platform::Platforms;
use crate::broadcast::request::{MAX_DEDUPE_MS, Request};

/// The pseudo-queue of direct reply-to.
pub(super) const REPLY_TO: &str = "amq.rabbitmq.reply-to";
/// The header with the time of enqueuing, in milliseconds since the Unix epoch: the `timestamp` property has whole seconds.
pub const ENQUEUED_AT: &str = "x-enqueued-at-ms";

/// The properties of its message. `correlation`: names this attempt in the reply.
pub(super) fn properties(request: &Request, correlation: &str) -> BasicProperties {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut headers = FieldTable::default();
    headers.insert(ENQUEUED_AT.into(), AMQPValue::LongLongInt(i64::try_from(now.as_millis()).unwrap_or_default()));
    BasicProperties::default()
        // Persistent.
        .with_delivery_mode(2)
        .with_content_type("application/json".into())
        .with_message_id(request.id.as_str().into())
        .with_app_id("broadcastd-api".into())
        .with_timestamp(now.as_secs())
        .with_reply_to(REPLY_TO.into())
        .with_correlation_id(correlation.into())
        .with_headers(headers)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Wire<'a> {
    request_id: &'a str,
    app_key: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    from: &'a str,
    body: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_offline: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_os: Option<Vec<&'static str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dedupe_seconds: Option<u64>,
}

/// The request as the worker reads it: the message's body.
pub(crate) fn encode(request: &Request) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&Wire {
        request_id: &request.id,
        app_key: request.app.as_str(),
        from: &request.from,
        body: &request.body,
        is_offline: request.ttl_ms.map(|_| true),
        // Whole seconds: both units of the API are.
        ttl_seconds: request.ttl_ms.map(|ms| ms / 1000),
        target_os: (request.targets != Platforms::ALL).then(|| request.targets.names()),
        dedupe_seconds: (request.dedupe_ms != MAX_DEDUPE_MS).then_some(request.dedupe_ms / 1000),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_worker_reads_what_was_meant(
            body in ".{1,100}", from in ".{0,32}", offline: bool, seconds in 1i64..100_000, dedupe in 1i64..=604_800, web: bool,
        ) {
            let raw = crate::broadcast::request::RawRequest {
                request_id: Some("r-1".to_owned()),
                app_key: Some("demo".to_owned()),
                from: Some(from),
                body: Some(body),
                is_offline: Some(offline),
                ttl_seconds: Some(seconds),
                target_os: web.then(|| vec!["web".to_owned()]),
                dedupe_seconds: Some(dedupe),
                ttl: None,
            };
            let request = Request::from_raw(raw, None).unwrap();
            prop_assert_eq!(Request::from_json(&encode(&request).unwrap(), None).unwrap(), request);
        }
    }
}
