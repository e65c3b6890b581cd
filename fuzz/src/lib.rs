//! What each fuzz target does with its bytes. `tests/corpora.rs` does the same with the files in `corpus/`.
//!
//! Not "it does not panic" alone: what is read in pieces is what is read in one piece, what is accepted is within its bounds,
//! and what is accepted can be written and read again.

#![allow(missing_docs, reason = "one function a target")]

pub mod answers;
pub mod envelope;
pub mod form;
pub mod frames;
pub mod head;
pub mod login;
pub mod request;

use std::sync::LazyLock;

use broadcastd::broadcast::app::{App, AppKey, Directory};
use broadcastd::broadcast::envelope::{self as wire, Content, Envelope};
use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{
    MAX_BODY, MAX_DEDUPE_MS, MAX_FROM, MAX_REQUEST_BYTES, MAX_REQUEST_ID, MAX_TTL_MS, Request,
};
use broadcastd::broadcast::verdict::{Rejection, code};
use broadcastd::fuzzing;

/// A target by the name of its folder in `corpus/`.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 7] = [
    ("answers", answers::run),
    ("envelope", envelope::run),
    ("form", form::run),
    ("frames", frames::run),
    ("head", head::run),
    ("login", login::run),
    ("request", request::run),
];

pub const SECRET: &str = "demo-secret";

/// Two apps: `demo`, and `mute`, for which broadcasts are not activated.
pub static DIRECTORY: LazyLock<Directory> = LazyLock::new(|| {
    let app = |key, broadcast| App {
        key: AppKey::parse(key).expect("a key"),
        secret: SECRET.into(),
        broadcast,
        limits: Limits::default(),
    };
    Directory::new([app("demo", true), app("mute", false)]).expect("two apps")
});

/// The part before the first `separator`, and the part after it.
pub fn split_once(data: &[u8], separator: u8) -> (&[u8], &[u8]) {
    match data.iter().position(|byte| *byte == separator) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[]),
    }
}

/// What every request that is let in must be.
pub fn check_request(request: &Request) {
    assert!((1..=MAX_REQUEST_ID).contains(&request.id.len()) && request.id.bytes().all(|byte| byte.is_ascii_graphic()));
    assert!(AppKey::parse(request.app.as_str()).is_ok());
    assert!((1..=MAX_BODY).contains(&request.body.chars().count()));
    assert!(request.from.chars().count() <= MAX_FROM);
    assert!(request.ttl_ms.is_none_or(|ms| (1000..=MAX_TTL_MS).contains(&ms) && ms % 1000 == 0));
    assert!((1000..=MAX_DEDUPE_MS).contains(&request.dedupe_ms));
    assert_ne!(request.targets.bits(), 0);

    let written = fuzzing::encode(request).expect("strings and numbers");
    assert!(written.len() <= MAX_REQUEST_BYTES);
    let again = Request::from_json(&written, None).expect("what we write we read");
    assert_eq!(&again, request);
    assert_eq!(again.content_hash(), request.content_hash());

    let raw = wire::broadcast(7, 3, 1000, 2000, &wire::tail(request));
    let envelope = Envelope::read(raw.as_bytes()).expect("what the ledger joins can be read");
    assert_eq!((envelope.id, envelope.prev, envelope.time_ms, envelope.expires_ms), (7, 3, 1000, 2000));
    let Request { id, from, body, targets, .. } = request.clone();
    assert_eq!(envelope.content, Content::Broadcast { request_id: id, from, body, targets });
}

/// What every refusal must be: one of a few codes, and a sentence that is safe in a header.
pub fn check_rejection(rejection: &Rejection) {
    assert!(matches!(rejection.code, code::BAD_PARAMETER | code::FORBIDDEN));
    assert!(rejection.reason.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_'));
    assert!(rejection.desc.chars().count() <= 300 && !rejection.desc.chars().any(char::is_control));
}
