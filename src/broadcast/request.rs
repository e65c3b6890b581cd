//! A broadcast request: what a backend enqueues, checked.

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::app::{AppKey, Directory};
use super::platform::Platforms;
use super::quota::Limits;
use super::verdict::Rejection;

/// The longest body, in characters (Unicode scalar values).
pub const MAX_BODY: usize = 4096;
/// The longest `from`, in characters.
pub const MAX_FROM: usize = 32;
/// The longest request id, in bytes. Ids are printable ASCII.
pub const MAX_REQUEST_ID: usize = 128;
/// The largest request that is parsed at all, in bytes: 4096 characters, each escaped as a surrogate pair, and the rest.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// The default and the longest time that a request id is remembered, in milliseconds: 7 days.
pub const MAX_DEDUPE_MS: u64 = 7 * 24 * HOUR_MS;
/// The shortest time that a request id is remembered, in milliseconds, however little is asked for: 5 minutes. A verdict that was
/// forgotten while its answer was on the way, because Redis stood still, say, would be a second broadcast.
pub const MIN_DEDUPE_MS: u64 = 300_000;
/// How long a retained broadcast is valid if the request does not say, in milliseconds: 7 days.
pub const DEFAULT_TTL_MS: u64 = 7 * 24 * HOUR_MS;
/// The longest validity, in milliseconds: 30 days.
pub const MAX_TTL_MS: u64 = 30 * 24 * HOUR_MS;

const HOUR_MS: u64 = 3_600_000;

/// The content of a request, names as in the NIM API. This is the wire form.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RawRequest {
    /// Identifies the request; may come as the AMQP `message_id` instead.
    pub request_id: Option<String>,
    /// The app whose devices are to get it.
    pub app_key: Option<String>,
    /// Sender's account, at most 32 characters.
    pub from: Option<String>,
    /// 1 to 4096 characters.
    pub body: Option<String>,
    /// Whether it is retained for devices that log in later.
    pub is_offline: Option<bool>,
    /// Validity in hours.
    pub ttl: Option<i64>,
    /// Validity in seconds, instead of `ttl`.
    pub ttl_seconds: Option<i64>,
    /// Platforms, of ios, aos, pc, web, mac; every one if left out.
    pub target_os: Option<Vec<String>>,
    /// For how long the request id is remembered at least, in seconds.
    pub dedupe_seconds: Option<i64>,
}

/// A well-formed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Unique per app; the same id again gets the same verdict.
    pub id: String,
    /// The app.
    pub app: AppKey,
    /// Sender's account; empty if not given.
    pub from: String,
    /// What is said.
    pub body: String,
    /// Validity in milliseconds if it is retained, `None` if it is for online devices only.
    pub ttl_ms: Option<u64>,
    /// The platforms it is for.
    pub targets: Platforms,
    /// For how long the request id is remembered, in milliseconds; [`MIN_DEDUPE_MS`] at least if it was read from outside.
    pub dedupe_ms: u64,
}

impl Request {
    /// Reads the JSON of an AMQP message. `message_id`: the AMQP property, used if the JSON has no `requestId`.
    ///
    /// # Errors
    /// A 414 with the sentence for the sender.
    pub fn from_json(bytes: &[u8], message_id: Option<&str>) -> Result<Self, Rejection> {
        if bytes.len() > MAX_REQUEST_BYTES {
            return Err(Rejection::bad("too_large", format!("a request has at most {MAX_REQUEST_BYTES} bytes")));
        }
        let text =
            simdutf8::basic::from_utf8(bytes).map_err(|_| Rejection::bad("not_utf8", "the request is not UTF-8"))?;
        let raw: RawRequest = serde_json::from_str(text).map_err(|error| {
            let reason = if error.is_data() { "bad_field" } else { "not_json" };
            Rejection::bad(reason, format!("the request cannot be read: {}", printable(&error.to_string())))
        })?;
        Self::from_raw(raw, message_id)
    }

    /// Checks a request whose fields have been read.
    ///
    /// # Errors
    /// A 414 with the sentence for the sender.
    pub fn from_raw(raw: RawRequest, message_id: Option<&str>) -> Result<Self, Rejection> {
        let id = match (raw.request_id, message_id) {
            (Some(id), _) => id,
            (None, Some(id)) => id.to_owned(),
            (None, None) => {
                return Err(Rejection::bad(
                    "no_request_id",
                    "requestId is missing: give each broadcast an id of its own, in the request or as the AMQP message_id",
                ));
            }
        };
        if id.is_empty() || id.len() > MAX_REQUEST_ID || !id.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Rejection::bad(
                "bad_request_id",
                format!("requestId has 1 to {MAX_REQUEST_ID} printable ASCII characters, no spaces"),
            ));
        }
        let app = raw.app_key.ok_or_else(|| Rejection::bad("no_app", "appKey is missing"))?;
        let app = AppKey::parse(&app).map_err(|desc| Rejection::bad("bad_app", format!("appKey: {desc}")))?;
        let body = raw.body.unwrap_or_default();
        if body.is_empty() {
            return Err(Rejection::bad("no_body", "body is missing or empty"));
        }
        if longer_than(&body, MAX_BODY) {
            return Err(Rejection::bad("body_too_long", format!("body has more than {MAX_BODY} characters")));
        }
        let from = raw.from.unwrap_or_default();
        if longer_than(&from, MAX_FROM) {
            return Err(Rejection::bad("from_too_long", format!("from has more than {MAX_FROM} characters")));
        }
        let ttl = match (raw.ttl, raw.ttl_seconds) {
            (Some(_), Some(_)) => return Err(Rejection::bad("bad_ttl", "give ttl (hours) or ttlSeconds, not both")),
            (Some(hours), None) => Some((hours, HOUR_MS, "ttl", "hours")),
            (None, Some(seconds)) => Some((seconds, 1000, "ttlSeconds", "seconds")),
            (None, None) => None,
        };
        let ttl_ms = match ttl {
            None => DEFAULT_TTL_MS,
            Some((value, unit, name, unit_name)) => u64::try_from(value)
                .ok()
                .and_then(|value| value.checked_mul(unit))
                .filter(|ms| (1..=MAX_TTL_MS).contains(ms))
                .ok_or_else(|| {
                    Rejection::bad("bad_ttl", format!("{name} is from 1 to {} {unit_name}", MAX_TTL_MS / unit))
                })?,
        };
        let targets = match &raw.target_os {
            None => Platforms::ALL,
            Some(names) => Platforms::parse(names).map_err(|desc| Rejection::bad("bad_target_os", desc))?,
        };
        let dedupe_ms = match raw.dedupe_seconds {
            None => MAX_DEDUPE_MS,
            Some(seconds) => u64::try_from(seconds)
                .ok()
                .and_then(|seconds| seconds.checked_mul(1000))
                .filter(|ms| (1..=MAX_DEDUPE_MS).contains(ms))
                .map(|ms| ms.max(MIN_DEDUPE_MS))
                .ok_or_else(|| {
                    let most = MAX_DEDUPE_MS / 1000;
                    Rejection::bad("bad_dedupe", format!("dedupeSeconds is from 1 to {most}"))
                })?,
        };
        Ok(Self { id, app, from, body, ttl_ms: raw.is_offline.unwrap_or(false).then_some(ttl_ms), targets, dedupe_ms })
    }

    /// Tells two contents under one request id apart: the first 16 bytes of a SHA-256 over all that is delivered, in hex.
    #[must_use]
    pub fn content_hash(&self) -> String {
        let mut hash = Sha256::new();
        for part in [&self.from, &self.body] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
        hash.update(self.ttl_ms.unwrap_or(0).to_be_bytes());
        hash.update([self.targets.bits()]);
        hex(&hash.finalize()[..16])
    }
}

/// A well-formed request of an app that may broadcast: what the ledger takes.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The request.
    pub request: Request,
    /// Its app's limits.
    pub limits: Limits,
}

impl Submission {
    /// Looks the app up.
    ///
    /// # Errors
    /// The request and a 403, if the app is unknown or broadcasts are not activated for it.
    pub fn new(request: Request, directory: &Directory) -> Result<Self, (Box<Request>, Rejection)> {
        let rejection = match directory.get(request.app.as_str()) {
            Some(app) if app.broadcast => return Ok(Self { limits: app.limits, request }),
            Some(_) => Rejection::forbidden("not_activated", "broadcasts are not activated for this app"),
            None => Rejection::forbidden("unknown_app", "appKey: no such app"),
        };
        Err((Box::new(request), rejection))
    }
}

/// Lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)]).collect()
}

fn longer_than(text: &str, most: usize) -> bool {
    // Bytes bound characters from above, so the count is skipped for nearly all.
    text.len() > most && text.chars().count() > most
}

/// A library's sentence about foreign input, made safe for a header: no control characters, at most 200 characters.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Request, Rejection> {
        Request::from_json(json.as_bytes(), None)
    }

    fn reason(json: &str) -> &'static str {
        parse(json).unwrap_err().reason
    }

    #[test]
    fn the_documented_example_is_read() {
        let request = parse(
            r#"{"requestId":"r-1","appKey":"demo","from":"ops","body":"hi","isOffline":true,"ttl":168,"targetOs":["ios","web"]}"#,
        )
        .unwrap();
        assert_eq!(request.ttl_ms, Some(168 * HOUR_MS));
        assert_eq!(request.targets.names(), ["ios", "web"]);
        assert_eq!(request.dedupe_ms, MAX_DEDUPE_MS);
    }

    #[test]
    fn the_message_id_stands_in_for_the_request_id() {
        let json = br#"{"appKey":"demo","body":"hi"}"#;
        assert_eq!(Request::from_json(json, Some("m-1")).unwrap().id, "m-1");
        assert_eq!(Request::from_json(json, None).unwrap_err().reason, "no_request_id");
    }

    #[test]
    fn an_id_is_remembered_for_as_long_as_asked_and_five_minutes_at_least() {
        for (seconds, expected) in [(1, MIN_DEDUPE_MS), (299, MIN_DEDUPE_MS), (301, 301_000), (604_800, MAX_DEDUPE_MS)]
        {
            let json = format!(r#"{{"requestId":"r","appKey":"demo","body":"hi","dedupeSeconds":{seconds}}}"#);
            assert_eq!(parse(&json).unwrap().dedupe_ms, expected, "{seconds} s");
        }
    }

    #[test]
    fn every_kind_of_bad_input_has_its_reason() {
        let long = "x".repeat(MAX_BODY + 1);
        let wide = "é".repeat(MAX_BODY);
        assert!(parse(&format!(r#"{{"requestId":"r","appKey":"demo","body":"{wide}"}}"#)).is_ok());
        let with = |rest: &str| format!(r#"{{"requestId":"r","appKey":"demo","body":"hi",{rest}}}"#);
        for (json, expected) in [
            ("".to_owned(), "not_json"),
            ("[".repeat(20_000), "bad_field"),
            (format!(r#"{{"requestId":{}"#, "[".repeat(20_000)), "bad_field"),
            (r#"{"requestId":"r","appKey":"demo","body":"hi"} x"#.to_owned(), "not_json"),
            (with(r#""body":"again""#), "bad_field"),
            (with(r#""isofline":true"#), "bad_field"),
            (with(r#""isOffline":"yes""#), "bad_field"),
            (with(r#""ttl":0"#), "bad_ttl"),
            (with(r#""ttl":-1"#), "bad_ttl"),
            (with(r#""ttl":9223372036854775807"#), "bad_ttl"),
            (with(r#""ttl":721"#), "bad_ttl"),
            (with(r#""ttl":1,"ttlSeconds":60"#), "bad_ttl"),
            (with(r#""ttl":1.5"#), "bad_field"),
            (with(r#""targetOs":[]"#), "bad_target_os"),
            (with(r#""targetOs":["symbian"]"#), "bad_target_os"),
            (with(r#""dedupeSeconds":0"#), "bad_dedupe"),
            (with(&format!(r#""from":"{}""#, "x".repeat(33))), "from_too_long"),
            (r#"{"requestId":"r","appKey":"demo"}"#.to_owned(), "no_body"),
            (r#"{"requestId":"r","appKey":"demo","body":""}"#.to_owned(), "no_body"),
            (format!(r#"{{"requestId":"r","appKey":"demo","body":"{long}"}}"#), "body_too_long"),
            (r#"{"requestId":"r","body":"hi"}"#.to_owned(), "no_app"),
            (r#"{"requestId":"r","appKey":"a}b","body":"hi"}"#.to_owned(), "bad_app"),
            (r#"{"requestId":"","appKey":"demo","body":"hi"}"#.to_owned(), "bad_request_id"),
            (r#"{"requestId":"a b","appKey":"demo","body":"hi"}"#.to_owned(), "bad_request_id"),
        ] {
            assert_eq!(reason(&json), expected, "{}", &json[..json.len().min(80)]);
        }
        assert_eq!(Request::from_json(b"\"\xff\"", None).unwrap_err().reason, "not_utf8");
        assert_eq!(Request::from_json(&vec![b' '; MAX_REQUEST_BYTES + 1], None).unwrap_err().reason, "too_large");
    }

    #[test]
    fn the_hash_tells_contents_apart_and_nothing_else() {
        let base = parse(r#"{"requestId":"r","appKey":"demo","from":"a","body":"bc"}"#).unwrap();
        let moved = parse(r#"{"requestId":"r","appKey":"demo","from":"ab","body":"c"}"#).unwrap();
        let other_id = parse(r#"{"requestId":"s","appKey":"demo","from":"a","body":"bc","dedupeSeconds":9}"#).unwrap();
        assert_ne!(base.content_hash(), moved.content_hash());
        assert_eq!(base.content_hash(), other_id.content_hash());
    }
}
