//! What only reads: find, list, an app's head and snapshot. Each runs on one read transaction, a consistent view.

use std::collections::BTreeMap;

use redb::{ReadTransaction, ReadableTable};
use tracing::warn;

use super::store::{Failure, LOG, META, RETAINED};
use crate::broadcast::BroadcastId;
use crate::broadcast::envelope::{Content, Envelope};
use crate::ledger::{Kind, Stored};

/// The most log entries that a node which knows nothing is given.
const NEWEST: usize = 1000;

/// The log's entry of this id; a recall is one too.
pub(super) fn log_entry(
    log: &impl ReadableTable<(&'static str, u64), &'static [u8]>,
    app: &str,
    id: BroadcastId,
) -> Result<Option<Envelope>, Failure> {
    log.get((app, id))?.map(|row| read(app, id, row.value())).transpose()
}

/// The retained broadcast of this id, if it is valid.
pub(super) fn retained_entry(
    retained: &impl ReadableTable<(&'static str, u64), (u64, &'static [u8])>,
    app: &str,
    id: BroadcastId,
    now_ms: u64,
) -> Result<Option<Envelope>, Failure> {
    let Some(row) = retained.get((app, id))? else { return Ok(None) };
    let (expires_ms, raw) = row.value();
    if expires_ms > now_ms { read(app, id, raw).map(Some) } else { Ok(None) }
}

pub(super) fn find(
    transaction: &ReadTransaction,
    app: &str,
    id: BroadcastId,
    now_ms: u64,
) -> Result<Option<Envelope>, Failure> {
    let found = match log_entry(&transaction.open_table(LOG)?, app, id)? {
        Some(envelope) => Some(envelope),
        None => retained_entry(&transaction.open_table(RETAINED)?, app, id, now_ms)?,
    };
    Ok(found.filter(is_broadcast))
}

pub(super) fn list(
    transaction: &ReadTransaction,
    app: &str,
    before: BroadcastId,
    limit: usize,
    kind: Kind,
    now_ms: u64,
) -> Result<Vec<Envelope>, Failure> {
    let before = if before == 0 { u64::MAX } else { before };
    let mut kept = BTreeMap::new();
    if kind != Kind::OnlineOnly {
        for row in transaction.open_table(RETAINED)?.range((app, 0)..(app, before))? {
            let (key, value) = row?;
            let (expires_ms, raw) = value.value();
            if expires_ms > now_ms {
                kept.insert(key.value().1, raw.to_vec());
            }
        }
    }
    let mut envelopes = Vec::new();
    let mut add = |id, raw: &[u8]| {
        let entry = readable(app, id, raw).filter(is_broadcast);
        envelopes.extend(entry.filter(|entry| kind != Kind::OnlineOnly || entry.expires_ms == 0));
        envelopes.len() >= limit
    };
    if kind != Kind::Retained {
        for row in transaction.open_table(LOG)?.range((app, 0)..(app, before))?.rev() {
            let (key, raw) = row?;
            let id = key.value().1;
            // Retained ones that the log has dropped come in between.
            for (id, raw) in kept.split_off(&id).iter().rev().filter(|(kept, _)| **kept != id) {
                add(*id, raw);
            }
            if add(id, raw.value()) {
                break;
            }
        }
    }
    for (id, raw) in kept.iter().rev() {
        if add(*id, raw) {
            break;
        }
    }
    envelopes.truncate(limit);
    Ok(envelopes)
}

/// The app's newest id; 0 if it has none.
pub(super) fn head(transaction: &ReadTransaction, app: &str) -> Result<BroadcastId, Failure> {
    Ok(transaction.open_table(META)?.get(app)?.map_or(0, |row| row.value().0))
}

/// The log after `after` (of 0: the newest [`NEWEST`]) and what is retained and valid, both oldest first.
pub(super) fn snapshot(
    transaction: &ReadTransaction,
    app: &str,
    after: BroadcastId,
    now_ms: u64,
) -> Result<(Vec<Stored>, Vec<Stored>), Failure> {
    let most = if after == 0 { NEWEST } else { usize::MAX };
    let mut log = Vec::new();
    for row in transaction.open_table(LOG)?.range((app, after.saturating_add(1))..=(app, u64::MAX))?.rev().take(most) {
        let (key, raw) = row?;
        log.extend(stored(app, key.value().1, raw.value()));
    }
    log.reverse();
    let mut retained = Vec::new();
    for row in transaction.open_table(RETAINED)?.range((app, 0)..=(app, u64::MAX))? {
        let (key, value) = row?;
        let (expires_ms, raw) = value.value();
        if expires_ms > now_ms {
            retained.extend(stored(app, key.value().1, raw));
        }
    }
    Ok((log, retained))
}

const fn is_broadcast(envelope: &Envelope) -> bool {
    matches!(envelope.content, Content::Broadcast { .. })
}

fn read(app: &str, id: BroadcastId, raw: &[u8]) -> Result<Envelope, Failure> {
    Envelope::read(raw).map_err(|error| Failure::Row(format!("broadcast {id} of app {app}: {error}")))
}

/// As [`read`], for one among many: an unreadable one must not hide the others.
fn readable(app: &str, id: BroadcastId, raw: &[u8]) -> Option<Envelope> {
    Envelope::read(raw)
        .inspect_err(|error| warn!(app, id, %error, "skipped a stored broadcast that cannot be read"))
        .ok()
}

fn stored(app: &str, id: BroadcastId, raw: &[u8]) -> Option<Stored> {
    readable(app, id, raw).map(|envelope| Stored { raw: raw.into(), envelope })
}
