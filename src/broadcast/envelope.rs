//! The envelope: what travels from the ledger to the nodes, and what the ledger keeps.
//!
//! It is one JSON object whose first fields are written by the ledger at the moment of acceptance, in this order, and whose
//! rest (the *tail*) the worker has encoded beforehand, so that the commit point only joins two strings:
//!
//! ```json
//! {"v":1,"id":1764000000000001,"prev":1763990000000000,"time":1764000000000,"expires":1764604800000,
//!  "requestId":"r-1","from":"ops","body":"hi","targetOs":["ios"]}
//! {"v":1,"id":1764000000000009,"prev":1764000000000001,"time":1764000000100,"expires":0,"recall":1764000000000001}
//! ```
//!
//! `time` and `expires` are milliseconds since the Unix epoch, `expires` is 0 if it is not retained. A recall has an id of its
//! own in the same chain, so that a node that missed one notices the gap.
//!
//! Old and new versions run side by side by three rules. The first five fields are the header: their names, their order and
//! their meaning stay for ever (the scripts read them by position). Behind it fields may be added; a reader skips those that
//! it does not know. `v` is the version that a reader must know to deliver the envelope: it rises only for what an older
//! reader would deliver wrongly, and that one then keeps its place in the chain and delivers nothing of it
//! ([`Content::Newer`]). So nodes are updated before whatever writes a larger `v`.

use serde::{Deserialize, Serialize};

use super::platform::Platforms;
use super::request::Request;
use super::{BroadcastId, MAX_ID};

/// The version that is written, and the largest that is delivered.
pub const VERSION: u32 = 1;

/// One entry of an app's log, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Its id.
    pub id: BroadcastId,
    /// The app's previous id, 0 for the first: a gap is provable.
    pub prev: BroadcastId,
    /// When it was accepted, by the ledger's clock, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Until when it is valid, likewise; 0 if it is not retained.
    pub expires_ms: u64,
    /// What it says.
    pub content: Content,
}

/// A broadcast or the recall of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Said to the devices.
    Broadcast {
        /// The request that it came from, for tracing; not sent to devices.
        request_id: String,
        /// Sender's account, or empty.
        from: String,
        /// What is said.
        body: String,
        /// The platforms it is for.
        targets: Platforms,
    },
    /// The broadcast of this id was deleted.
    Recall(BroadcastId),
    /// Something of this version, larger than [`VERSION`]: not to be delivered by a reader that does not know it.
    Newer(u32),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Tail<'a> {
    request_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    from: &'a str,
    body: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_os: Option<Vec<&'static str>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    #[serde(default = "first_version")]
    v: u32,
    id: BroadcastId,
    prev: BroadcastId,
    time: u64,
    #[serde(default)]
    expires: u64,
    #[serde(default)]
    request_id: String,
    #[serde(default)]
    from: String,
    #[serde(default)]
    body: String,
    target_os: Option<Vec<String>>,
    recall: Option<BroadcastId>,
}

const fn first_version() -> u32 {
    VERSION
}

/// The part that stays for ever: all that is read of an envelope of a larger version, whose other fields may have become
/// anything.
#[derive(Deserialize)]
struct Header {
    v: u32,
    id: BroadcastId,
    prev: BroadcastId,
    time: u64,
    expires: u64,
}

/// An envelope that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("envelope unreadable at byte {offset}")]
pub struct Unreadable {
    offset: usize,
}

/// The part of the envelope that is known before acceptance, starting after the comma that joins it on.
#[must_use]
pub fn tail(request: &Request) -> String {
    let tail = Tail {
        request_id: &request.id,
        from: &request.from,
        body: &request.body,
        target_os: (request.targets != Platforms::ALL).then(|| request.targets.names()),
    };
    // Strings and string lists always serialise; the empty tail would only make an unreadable envelope, not a panic.
    let mut json = serde_json::to_string(&tail).unwrap_or_default();
    json.drain(..json.len().min(1));
    json
}

/// A broadcast's envelope, as the accept script joins it.
#[must_use]
pub fn broadcast(id: BroadcastId, prev: BroadcastId, time_ms: u64, expires_ms: u64, tail: &str) -> String {
    format!(r#"{{"v":{VERSION},"id":{id},"prev":{prev},"time":{time_ms},"expires":{expires_ms},{tail}"#)
}

/// A recall's envelope, as the recall script joins it.
#[must_use]
pub fn recall(id: BroadcastId, prev: BroadcastId, time_ms: u64, recalled: BroadcastId) -> String {
    format!(r#"{{"v":{VERSION},"id":{id},"prev":{prev},"time":{time_ms},"expires":0,"recall":{recalled}}}"#)
}

/// Whether a ledger can have given these.
const fn in_range(id: BroadcastId, prev: BroadcastId) -> bool {
    id <= MAX_ID && prev < id
}

impl Envelope {
    /// Reads one.
    ///
    /// # Errors
    /// [`Unreadable`], without the text: it is never logged.
    pub fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        let wire = match serde_json::from_slice::<Wire>(bytes) {
            Ok(wire) if wire.v <= VERSION => wire,
            unknown => {
                let header = serde_json::from_slice::<Header>(bytes).ok().filter(|header| header.v > VERSION);
                let Header { v, id, prev, time, expires } =
                    header.ok_or_else(|| Unreadable { offset: unknown.err().map_or(0, |error| error.column()) })?;
                if !in_range(id, prev) {
                    return Err(Unreadable { offset: bytes.len() });
                }
                return Ok(Self { id, prev, time_ms: time, expires_ms: expires, content: Content::Newer(v) });
            }
        };
        // An id that is none of ours would make a node deaf to all that come after it.
        if !in_range(wire.id, wire.prev) || wire.recall.is_some_and(|recalled| recalled > MAX_ID) {
            return Err(Unreadable { offset: bytes.len() });
        }
        let content = match wire.recall {
            Some(id) => Content::Recall(id),
            None => Content::Broadcast {
                request_id: wire.request_id,
                from: wire.from,
                body: wire.body,
                // A platform that only a newer version knows must not hide the broadcast from the others.
                targets: wire.target_os.map_or(Platforms::ALL, |names| Platforms::known(&names)),
            },
        };
        // A recall is for whoever had the broadcast, however late.
        let expires_ms = if wire.recall.is_some() { 0 } else { wire.expires };
        Ok(Self { id: wire.id, prev: wire.prev, time_ms: wire.time, expires_ms, content })
    }

    /// Whether it must no longer be delivered at `now_ms`. What is not retained never expires.
    #[must_use]
    pub const fn expired(&self, now_ms: u64) -> bool {
        self.expires_ms != 0 && self.expires_ms <= now_ms
    }
}

/// A broadcast as the history calls of the NIM API show it.
///
/// `None` for a recall, which is not a broadcast, and for what only a newer version can read.
#[must_use]
pub fn history(envelope: &Envelope) -> Option<serde_json::Value> {
    let Content::Broadcast { from, body, targets, .. } = &envelope.content else { return None };
    let mut item = serde_json::json!({
        "broadcastId": envelope.id,
        "createTime": envelope.time_ms,
        "isOffline": envelope.expires_ms != 0,
        "body": body,
        "targetOs": targets.names(),
    });
    if envelope.expires_ms != 0 {
        item["expireTime"] = envelope.expires_ms.into();
    }
    if !from.is_empty() {
        item["from"] = from.as_str().into();
    }
    Some(item)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::from_json(
            r#"{"requestId":"r","appKey":"demo","from":"ops","body":"say \"hi\"\n","targetOs":["web"]}"#.as_bytes(),
            None,
        )
        .unwrap()
    }

    #[test]
    fn what_is_written_can_be_read() {
        let text = broadcast(12, 11, 3, 4, &tail(&request()));
        let envelope = Envelope::read(text.as_bytes()).unwrap();
        assert_eq!((envelope.id, envelope.prev, envelope.time_ms, envelope.expires_ms), (12, 11, 3, 4));
        let Content::Broadcast { request_id, from, body, targets } = envelope.content else { panic!("a broadcast") };
        assert_eq!((request_id.as_str(), from.as_str(), body.as_str()), ("r", "ops", "say \"hi\"\n"));
        assert_eq!(targets.names(), ["web"]);
        let recalled = Envelope::read(recall(13, 12, 5, 12).as_bytes()).unwrap();
        assert_eq!(recalled.content, Content::Recall(12));
    }

    #[test]
    fn fields_and_platforms_that_only_a_newer_version_knows_are_skipped() {
        let text =
            r#"{"v":1,"id":2,"prev":1,"time":3,"expires":0,"colour":{"a":[1]},"body":"x","targetOs":["web","tv"]}"#;
        let Content::Broadcast { body, targets, .. } = Envelope::read(text.as_bytes()).unwrap().content else {
            panic!("a broadcast")
        };
        assert_eq!((body.as_str(), targets.names()), ("x", vec!["web"]));
        let only_new = text.replace(r#""web","tv""#, r#""tv""#);
        let Content::Broadcast { targets, .. } = Envelope::read(only_new.as_bytes()).unwrap().content else {
            panic!("a broadcast")
        };
        assert!(crate::broadcast::platform::Platform::ALL.iter().all(|platform| !targets.contains(*platform)));
    }

    #[test]
    fn of_a_larger_version_only_the_header_is_read() {
        for rest in [r#""body":"x""#, r#""body":{"html":"x"},"recall":"all""#, r#""sealed":[1]"#] {
            let text = format!(r#"{{"v":2,"id":2,"prev":1,"time":3,"expires":4,{rest}}}"#);
            let envelope = Envelope::read(text.as_bytes()).unwrap();
            assert_eq!((envelope.id, envelope.prev, envelope.time_ms, envelope.expires_ms), (2, 1, 3, 4), "{rest}");
            assert_eq!(envelope.content, Content::Newer(2), "{rest}");
            assert_eq!(history(&envelope), None, "{rest}");
        }
        for bad in
            [r#"{"v":2,"id":2}"#, r#"{"v":"2","id":2,"prev":1,"time":3,"expires":4}"#, "{", r#"{"v":1,"id":"2"}"#]
        {
            assert!(Envelope::read(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_beyond_those_of_a_ledger_are_unreadable() {
        let read = |id, prev| Envelope::read(broadcast(id, prev, 3, 0, &tail(&request())).as_bytes());
        assert!(read(MAX_ID, MAX_ID - 1).is_ok());
        for (id, prev) in [(0, 0), (5, 5), (5, 6), (MAX_ID + 1, 5)] {
            assert!(read(id, prev).is_err(), "{id} after {prev}");
        }
        assert!(Envelope::read(recall(5, 4, 3, MAX_ID + 1).as_bytes()).is_err());
    }

    #[test]
    fn it_expires_at_its_time_and_not_before() {
        let envelope = Envelope::read(broadcast(2, 1, 3, 100, &tail(&request())).as_bytes()).unwrap();
        assert!(!envelope.expired(99));
        assert!(envelope.expired(100));
    }
}
