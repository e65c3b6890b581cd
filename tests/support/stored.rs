//! What Redis holds of an app, read as it is.

use std::collections::BTreeMap;

use redis::aio::MultiplexedConnection;
use serde_json::Value;

/// The answers of one reading: retained envelopes, day, minute, log.
type Answers = (Vec<Vec<u8>>, Option<String>, Option<Vec<u8>>, redis::Value);

/// The state of one app.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// Retained broadcasts: id, and when it expires (milliseconds since the Unix epoch).
    pub retained: BTreeMap<u64, u64>,
    /// The day (since the Unix epoch) and what was charged on it.
    pub day: Option<(u64, u64)>,
    /// The second (since the Unix epoch) of the last charge, and what was charged in the 61 seconds up to it.
    pub minute: Option<(u64, u64)>,
    /// The ids of the log, oldest first: broadcasts and recalls.
    pub log: Vec<u64>,
    /// The envelopes of its broadcasts, oldest first.
    pub broadcasts: Vec<Value>,
}

impl Stored {
    /// Reads it. `prefix` and `app` as the roles know them.
    pub async fn read(connection: &mut MultiplexedConnection, prefix: &str, app: &str) -> Result<Self, String> {
        let key = |name: &str| format!("{prefix}{{{app}}}:{name}");
        let mut pipeline = redis::pipe();
        pipeline.atomic().cmd("ZRANGE").arg(key("retained")).arg(0).arg(-1).cmd("GET").arg(key("rate:day"));
        pipeline.cmd("GET").arg(key("rate:minute")).cmd("XRANGE").arg(key("log")).arg("-").arg("+");
        let answers: Answers = pipeline.query_async(connection).await.map_err(|error| error.to_string())?;
        let (retained, day, minute, log) = answers;
        let mut stored = Self::default();
        for envelope in retained {
            let envelope: Value = serde_json::from_slice(&envelope).map_err(|error| error.to_string())?;
            stored.retained.insert(number(&envelope, "id"), number(&envelope, "expires"));
        }
        stored.day = day.and_then(|day| {
            let (day, count) = day.split_once(' ')?;
            Some((day.parse().ok()?, count.parse().ok()?))
        });
        stored.minute = minute.and_then(|bytes| {
            let (second, rest) = bytes.split_first_chunk::<8>()?;
            let sum = rest.first_chunk::<4>()?;
            Some((u64::from_be_bytes(*second), u64::from(u32::from_be_bytes(*sum))))
        });
        stored.broadcasts = envelopes(&log)?;
        stored.log = stored.broadcasts.iter().map(|envelope| number(envelope, "id")).collect();
        stored.broadcasts.retain(|envelope| envelope["recall"].is_null());
        Ok(stored)
    }

    /// The envelopes of an app's log after this id, oldest first.
    pub async fn log_after(
        connection: &mut MultiplexedConnection,
        prefix: &str,
        app: &str,
        after: u64,
    ) -> Result<Vec<Value>, String> {
        let mut command = redis::cmd("XRANGE");
        command.arg(format!("{prefix}{{{app}}}:log")).arg(format!("({after}-0")).arg("+");
        envelopes(&command.query_async(connection).await.map_err(|error| error.to_string())?)
    }
}

fn number(envelope: &Value, name: &str) -> u64 {
    envelope[name].as_u64().unwrap_or(0)
}

fn envelopes(entries: &redis::Value) -> Result<Vec<Value>, String> {
    let entries: Vec<(String, Vec<Vec<u8>>)> =
        redis::from_redis_value(entries.clone()).map_err(|error| error.to_string())?;
    let texts = entries.iter().map(|(_, fields)| fields.get(1).map_or(&[][..], Vec::as_slice));
    texts.map(|text| serde_json::from_slice(text).map_err(|error| error.to_string())).collect()
}

/// A connection of one's own to a Redis, with a second to connect and two to answer.
pub async fn connect(url: &str) -> Result<MultiplexedConnection, String> {
    let seconds = |seconds| Some(std::time::Duration::from_secs(seconds));
    let config =
        redis::AsyncConnectionConfig::new().set_connection_timeout(seconds(1)).set_response_timeout(seconds(2));
    let client = redis::Client::open(url).map_err(|error| error.to_string())?;
    client.get_multiplexed_async_connection_with_config(&config).await.map_err(|error| error.to_string())
}
