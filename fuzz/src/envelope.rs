//! An envelope, as a node reads it from Redis.

use std::sync::Arc;

use broadcastd::broadcast::MAX_ID;
use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::envelope::{Content, Envelope, history};
use broadcastd::broadcast::platform::Platform;
use broadcastd::fuzzing::{App, Bounds, Change, Entry};
use broadcastd::ledger::{Generation, Snapshot};

pub const BOUNDS: Bounds = Bounds { frames: 8, bytes: 4096 };

pub fn run(data: &[u8]) {
    let Ok(envelope) = Envelope::read(data) else { return };
    let raw: Arc<[u8]> = data.into();
    check(&envelope, &raw);
    deliver(&envelope, &raw);
}

/// An id is one of ours, the chain leads backwards, and what devices are sent says what the envelope says.
pub fn check(envelope: &Envelope, raw: &Arc<[u8]>) {
    assert!((1..=MAX_ID).contains(&envelope.id) && envelope.prev < envelope.id);
    let entry = Entry::new(envelope.clone(), raw, 1);
    if let Content::Newer(version) = &envelope.content {
        // It keeps its place in the chain, for nobody.
        assert!(*version > 1 && history(envelope).is_none());
        return;
    }
    let json = server_text(&entry.frame);
    let json: serde_json::Value = serde_json::from_str(json).expect("JSON");
    match &envelope.content {
        Content::Broadcast { from, body, .. } => {
            assert_eq!(json["type"], "broadcast");
            assert_eq!(json["id"], envelope.id);
            assert_eq!(json["time"], envelope.time_ms);
            assert_eq!(json["fromAccount"].as_str(), Some(from.as_str()));
            assert_eq!(json["content"].as_str(), Some(body.as_str()));
            assert_eq!(history(envelope).expect("a broadcast")["isOffline"], envelope.expires_ms != 0);
        }
        Content::Newer(_) => unreachable!("returned above"),
        Content::Recall(id) => {
            assert_eq!(json, serde_json::json!({ "type": "recall", "id": id }));
            assert!(history(envelope).is_none() && *id <= MAX_ID);
        }
    }
}

/// The payload of one whole text frame of a server.
fn server_text(frame: &[u8]) -> &str {
    assert_eq!(frame[0], 0x81);
    let (length, header) = match frame[1] {
        126 => (usize::from(u16::from_be_bytes([frame[2], frame[3]])), 4),
        127 => (u64::from_be_bytes(frame[2..10].try_into().expect("8 bytes")) as usize, 10),
        short => (usize::from(short), 2),
    };
    assert_eq!(frame.len(), header + length);
    std::str::from_utf8(&frame[header..]).expect("UTF-8")
}

/// A node that knows the broadcast's predecessor delivers it, to its platforms and while it is valid; one that knows it
/// already does not.
fn deliver(envelope: &Envelope, raw: &Arc<[u8]>) {
    let now_ms = 1_764_000_000_000;
    let mut app = App::new(AppKey::parse("demo").expect("a key"), 1);
    let generation = Generation("g".into());
    let snapshot =
        Snapshot { now_ms, head: envelope.prev, generation, log: Vec::new(), retained: Vec::new(), logged: None };
    app.start_reading();
    app.take(snapshot, BOUNDS, 1);
    let readers = Platform::ALL.map(|platform| app.timeline.as_ref().expect("open").admit(0, platform, now_ms, 0).0);
    assert!(matches!(app.receive(envelope.clone(), raw.clone(), 1, now_ms), Change::Appended(_)));
    assert!(matches!(app.receive(envelope.clone(), raw.clone(), 1, now_ms), Change::None));
    let timeline = app.timeline.as_ref().expect("open");
    for reader in readers {
        let expected = match &envelope.content {
            Content::Recall(_) => true,
            Content::Newer(_) => false,
            Content::Broadcast { targets, .. } => targets.contains(reader.platform) && !envelope.expired(now_ms),
        };
        assert_eq!(timeline.after(reader, now_ms).count(), usize::from(expected));
        assert_eq!(timeline.after(timeline.admit(envelope.id, reader.platform, now_ms, 60_000).0, now_ms).count(), 0);
    }
}
