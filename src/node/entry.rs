//! One entry of a timeline: what is delivered of an envelope, encoded once for all devices of the node.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::Serialize;

use super::codec;
use crate::broadcast::BroadcastId;
use crate::broadcast::envelope::{Content, Envelope};
use crate::broadcast::platform::Platforms;

/// An entry. Shared by all shards; never changed but for its tally.
#[derive(Debug)]
pub struct Entry {
    /// Its id.
    pub id: BroadcastId,
    /// The id before it, as the ledger had it.
    pub prev: BroadcastId,
    /// When it was accepted, by the ledger's clock, milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Until when it is valid, likewise; 0 if it is for online devices only.
    pub expires_ms: u64,
    /// The platforms it is for.
    pub targets: Platforms,
    /// The broadcast that it deletes, if it is a recall.
    pub recalls: Option<BroadcastId>,
    /// The request that it came from, for the log; empty for a recall.
    pub request_id: Box<str>,
    /// The finished WebSocket frame, header included.
    pub frame: Box<[u8]>,
    /// The envelope as the ledger wrote it, if it is retained: to be written back if the ledger loses it.
    pub raw: Option<Arc<[u8]>>,
    tally: Tally,
}

/// How far the shards are with an entry; the last one to finish reports it.
#[derive(Debug)]
struct Tally {
    shards_left: AtomicU32,
    sessions: AtomicU32,
}

/// What a device is sent.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Told<'a> {
    #[serde(rename_all = "camelCase")]
    Broadcast {
        id: BroadcastId,
        from_account: &'a str,
        time: u64,
        content: &'a str,
    },
    Recall {
        id: BroadcastId,
    },
}

impl Entry {
    /// Encodes what is delivered of `envelope`. `raw`: as the ledger wrote it; `shards`: how many will deliver it.
    #[must_use]
    pub fn new(envelope: Envelope, raw: &Arc<[u8]>, shards: u32) -> Self {
        let (told, targets, recalls) = match &envelope.content {
            Content::Broadcast { from, body, targets, .. } => {
                let told =
                    Told::Broadcast { id: envelope.id, from_account: from, time: envelope.time_ms, content: body };
                (Some(told), *targets, None)
            }
            Content::Recall(target) => (Some(Told::Recall { id: *target }), Platforms::ALL, Some(*target)),
            // For no device here; it only keeps its place, so that what comes after it is no gap.
            Content::Newer(_) => (None, Platforms::NONE, None),
        };
        // Numbers and strings always serialise; an empty frame would be a text without content, not a panic.
        let frame = told.map(|told| codec::text(&serde_json::to_string(&told).unwrap_or_default())).unwrap_or_default();
        let frame = frame.into_boxed_slice();
        let request_id = match envelope.content {
            Content::Broadcast { request_id, .. } => request_id.into_boxed_str(),
            Content::Recall(_) | Content::Newer(_) => Box::default(),
        };
        Self {
            id: envelope.id,
            prev: envelope.prev,
            time_ms: envelope.time_ms,
            expires_ms: envelope.expires_ms,
            targets,
            recalls,
            request_id,
            frame,
            raw: (envelope.expires_ms != 0).then(|| raw.clone()),
            tally: Tally { shards_left: AtomicU32::new(shards), sessions: AtomicU32::new(0) },
        }
    }

    /// Whether it must no longer be delivered at `now_ms`.
    #[must_use]
    pub const fn expired(&self, now_ms: u64) -> bool {
        self.expires_ms != 0 && self.expires_ms <= now_ms
    }

    /// Counts sessions that were sent it live; those after [`Entry::finish`] are not reported.
    pub fn count(&self, sessions: u32) {
        self.tally.sessions.fetch_add(sessions, Ordering::Relaxed);
    }

    /// One shard's sweep is over. The last one is told how many sessions were reached in all.
    #[must_use]
    pub fn finish(&self) -> Option<u32> {
        // Release and acquire: the last shard sees the others' counts.
        (self.tally.shards_left.fetch_sub(1, Ordering::AcqRel) == 1)
            .then(|| self.tally.sessions.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::broadcast::envelope;

    /// A broadcast of which the tests know nothing but this.
    pub fn broadcast(id: u64, prev: u64, time_ms: u64, expires_ms: u64) -> Arc<Entry> {
        let raw =
            envelope::broadcast(id, prev, time_ms, expires_ms, &format!(r#""requestId":"r{id}","body":"b{id}"}}"#));
        let raw: Arc<[u8]> = raw.into_bytes().into();
        Arc::new(Entry::new(Envelope::read(&raw).unwrap(), &raw, 1))
    }

    /// The recall of `target`.
    pub fn recall(id: u64, prev: u64, time_ms: u64, target: u64) -> Arc<Entry> {
        let raw: Arc<[u8]> = envelope::recall(id, prev, time_ms, target).into_bytes().into();
        Arc::new(Entry::new(Envelope::read(&raw).unwrap(), &raw, 1))
    }

    #[test]
    fn a_device_is_sent_the_documented_json() {
        let payload = |entry: &Entry| String::from_utf8(entry.frame[2..].to_vec()).unwrap();
        assert_eq!(
            payload(&broadcast(7, 3, 5, 0)),
            r#"{"type":"broadcast","id":7,"fromAccount":"","time":5,"content":"b7"}"#
        );
        assert_eq!(payload(&recall(9, 7, 5, 7)), r#"{"type":"recall","id":7}"#);
    }

    #[test]
    fn only_retained_ones_keep_what_is_written_back() {
        assert!(broadcast(1, 0, 1, 0).raw.is_none());
        assert!(broadcast(1, 0, 1, 9).raw.is_some());
    }

    #[test]
    fn the_last_shard_reports_for_all() {
        let raw: Arc<[u8]> = envelope::recall(2, 1, 1, 1).into_bytes().into();
        let entry = Entry::new(Envelope::read(&raw).unwrap(), &raw, 2);
        entry.count(3);
        assert_eq!(entry.finish(), None);
        entry.count(4);
        assert_eq!(entry.finish(), Some(7));
    }
}
