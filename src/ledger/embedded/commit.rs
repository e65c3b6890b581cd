//! What changes the store: accept, recall, restore. Each reads and checks all that it needs before its first write, so that
//! an unreadable row spoils one call and not the transaction that it shares with others.

use std::sync::Arc;

use redb::{ReadableTable, Table, WriteTransaction};

use super::read::{log_entry, retained_entry};
use super::store::{EXPIRIES, Failure, LOG, META, QUOTA, REQUESTS, RETAINED, RequestRow, USED, USED_EXPIRIES};
use crate::broadcast::app::AppKey;
use crate::broadcast::envelope::{self, Content, Envelope};
use crate::broadcast::quota::{Limits, Quota};
use crate::broadcast::request::Submission;
use crate::broadcast::retention::MAX_RETAINED;
use crate::broadcast::verdict::{Accepted, Decision};
use crate::broadcast::{BroadcastId, MAX_ID, next_id};
use crate::ledger::{LedgerSettings, Recalled, Stored};

/// Log entries dropped by one append at the most, so that a shortened `log_length` is no long pause.
const TRIM_AT_ONCE: usize = 64;
/// Request ids stay this long beyond their time: a clock that steps back a little must not forget one.
const FORGET_LATE_MS: u64 = 60_000;

/// When and under which rules something is decided.
pub(super) struct Moment<'a> {
    pub now_us: u64,
    pub generation: &'a str,
    pub settings: LedgerSettings,
    /// Nodes that hold a lease, and those of them that are subscribed, at a time in ms.
    pub audience: &'a dyn Fn(&AppKey, u64) -> (u32, u32),
}

impl Moment<'_> {
    const fn now_ms(&self) -> u64 {
        self.now_us / 1000
    }
}

/// A submission with all that can be computed before its turn.
pub(super) struct Prepared {
    app: AppKey,
    request_id: String,
    content_hash: String,
    tail: String,
    ttl_ms: Option<u64>,
    dedupe_ms: u64,
    limits: Limits,
}

impl From<&Submission> for Prepared {
    fn from(Submission { request, limits }: &Submission) -> Self {
        Self {
            app: request.app.clone(),
            request_id: request.id.clone(),
            content_hash: request.content_hash(),
            tail: envelope::tail(request),
            ttl_ms: request.ttl_ms,
            dedupe_ms: request.dedupe_ms,
            limits: *limits,
        }
    }
}

/// What is published once the transaction is durable.
#[derive(Debug)]
pub(super) struct Publication {
    pub app: AppKey,
    pub raw: Arc<[u8]>,
}

/// An app's position.
struct Meta {
    head: BroadcastId,
    /// Entries in the log.
    log_length: u64,
    generation: String,
    previous_generation: String,
}

impl Meta {
    /// Moves the head on; returns the id before.
    fn advance(meta: Option<Self>, moment: &Moment<'_>) -> (Self, BroadcastId) {
        let known = meta
            .as_ref()
            .is_some_and(|meta| meta.generation == moment.generation || meta.previous_generation == moment.generation);
        let mut meta = meta.unwrap_or_else(|| Self::new(""));
        let before = meta.head;
        meta.head = next_id(before, moment.now_us, !known);
        if !known {
            meta.previous_generation = std::mem::replace(&mut meta.generation, moment.generation.to_owned());
        }
        (meta, before)
    }

    fn new(generation: &str) -> Self {
        Self { head: 0, log_length: 0, generation: generation.to_owned(), previous_generation: String::new() }
    }
}

/// The tables, open for one transaction.
pub(super) struct Tables<'txn> {
    meta: Table<'txn, &'static str, (u64, u64, &'static str, &'static str)>,
    quota: Table<'txn, &'static str, &'static [u8]>,
    log: Table<'txn, (&'static str, u64), &'static [u8]>,
    retained: Table<'txn, (&'static str, u64), (u64, &'static [u8])>,
    requests: Table<'txn, (&'static str, &'static str), RequestRow<'static>>,
    expiries: Table<'txn, (u64, &'static str, &'static str), ()>,
    used: Table<'txn, (&'static str, &'static str), u64>,
    used_expiries: Table<'txn, (u64, &'static str, &'static str), ()>,
    /// Changes made: with none, there is nothing to commit.
    writes: usize,
}

impl<'txn> Tables<'txn> {
    pub fn open(transaction: &'txn WriteTransaction) -> Result<Self, Failure> {
        Ok(Self {
            meta: transaction.open_table(META)?,
            quota: transaction.open_table(QUOTA)?,
            log: transaction.open_table(LOG)?,
            retained: transaction.open_table(RETAINED)?,
            requests: transaction.open_table(REQUESTS)?,
            expiries: transaction.open_table(EXPIRIES)?,
            // Made by the first write: files of earlier versions have none, and nobody else reads them.
            used: transaction.open_table(USED)?,
            used_expiries: transaction.open_table(USED_EXPIRIES)?,
            writes: 0,
        })
    }

    pub const fn writes(&self) -> usize {
        self.writes
    }

    /// The commit point: see DESIGN.md.
    pub fn accept(
        &mut self,
        request: &Prepared,
        moment: &Moment<'_>,
    ) -> Result<(Decision, Option<Publication>), Failure> {
        let (app, request_id, now_ms) = (request.app.as_str(), request.request_id.as_str(), moment.now_ms());
        let mut forgotten = None;
        if let Some(row) = self.requests.get((app, request_id))? {
            let (until_ms, content_hash, id, time_ms, expires_ms, targeted, reached) = row.value();
            if until_ms > now_ms {
                let accepted = Accepted { id, time_ms, expires_ms, targeted, reached, repeated: true };
                let same = content_hash == request.content_hash;
                return Ok((if same { Decision::Accepted(accepted) } else { Decision::Conflict }, None));
            }
            forgotten = Some(until_ms);
        }
        let mut quota = match self.quota.get(app)? {
            None => Quota::default(),
            Some(row) => Quota::from_bytes(row.value())
                .ok_or_else(|| Failure::Row(format!("the quota of app {app} is unreadable")))?,
        };
        if let Err(refusal) = quota.charge(moment.now_us, request.limits) {
            return Ok((Decision::Refused(refusal), None));
        }
        let (mut meta, prev) = Meta::advance(self.meta(app)?, moment);
        let id = meta.head;
        let expires_ms = request.ttl_ms.map_or(0, |ttl_ms| now_ms + ttl_ms);
        let (targeted, reached) = (moment.audience)(&request.app, now_ms);
        let raw: Arc<[u8]> = envelope::broadcast(id, prev, now_ms, expires_ms, &request.tail).into_bytes().into();

        // From here on only writes.
        self.quota.insert(app, quota.to_bytes().as_slice())?;
        self.append(app, &mut meta, &raw, moment)?;
        if expires_ms != 0 {
            self.retained.insert((app, id), (expires_ms, &*raw))?;
            self.trim_retained(app, now_ms)?;
        }
        if let Some(until_ms) = forgotten {
            self.expiries.remove((until_ms, app, request_id))?;
        }
        let until_ms = now_ms + request.dedupe_ms;
        let content_hash = request.content_hash.as_str();
        self.requests.insert((app, request_id), (until_ms, content_hash, id, now_ms, expires_ms, targeted, reached))?;
        self.expiries.insert((until_ms, app, request_id), ())?;
        let accepted = Accepted { id, time_ms: now_ms, expires_ms, targeted, reached, repeated: false };
        Ok((Decision::Accepted(accepted), Some(Publication { app: request.app.clone(), raw })))
    }

    /// Deletes a broadcast and appends its recall; `None` if there is none of this id.
    pub fn recall(
        &mut self,
        key: &AppKey,
        id: BroadcastId,
        moment: &Moment<'_>,
    ) -> Result<Option<(Recalled, Publication)>, Failure> {
        let (app, now_ms) = (key.as_str(), moment.now_ms());
        let logged = log_entry(&self.log, app, id)?;
        let found = match &logged {
            Some(entry) => !matches!(entry.content, Content::Recall(_)),
            None => retained_entry(&self.retained, app, id, now_ms)?.is_some(),
        };
        if !found {
            return Ok(None);
        }
        let (mut meta, prev) = Meta::advance(self.meta(app)?, moment);
        let (targeted, reached) = (moment.audience)(key, now_ms);
        let raw: Arc<[u8]> = envelope::recall(meta.head, prev, now_ms, id).into_bytes().into();

        // From here on only writes.
        self.retained.remove((app, id))?;
        if self.log.remove((app, id))?.is_some() {
            meta.log_length = meta.log_length.saturating_sub(1);
        }
        self.append(app, &mut meta, &raw, moment)?;
        let recalled = Recalled { recall_id: meta.head, targeted, reached };
        Ok(Some((recalled, Publication { app: key.clone(), raw })))
    }

    /// Takes back what a node still holds; returns how many broadcasts were missing and are kept now.
    pub fn restore(
        &mut self,
        app: &str,
        head: BroadcastId,
        retained: &[Stored],
        recalled: &[BroadcastId],
        moment: &Moment<'_>,
    ) -> Result<u32, Failure> {
        let now_ms = moment.now_ms();
        let known = self.meta(app)?;
        // An id beyond what a double holds is no id of ours.
        let head = head.min(MAX_ID);
        if known.as_ref().is_none_or(|meta| meta.head < head) {
            // Without a meta the generation stays unknown: ids jump at the next acceptance.
            let mut meta = known.unwrap_or_else(|| Meta::new(""));
            meta.head = meta.head.max(head);
            self.put_meta(app, &meta)?;
        }
        // What was deleted after what the node knows must not come back with it.
        let mut recalled = recalled.to_vec();
        for row in self.log.range((app, head.saturating_add(1))..=(app, u64::MAX))? {
            let entry = Envelope::read(row?.1.value()).map(|envelope| envelope.content);
            recalled.extend(entry.ok().and_then(|content| match content {
                Content::Recall(id) => Some(id),
                Content::Broadcast { .. } | Content::Newer(_) => None,
            }));
        }
        for id in &recalled {
            if self.retained.remove((app, *id))?.is_some() {
                self.writes += 1;
            }
        }
        let mut missing = Vec::new();
        for Stored { raw, envelope } in retained {
            let (id, expires_ms) = (envelope.id, envelope.expires_ms);
            if expires_ms <= now_ms || recalled.contains(&id) || self.retained.get((app, id))?.is_some() {
                continue;
            }
            self.retained.insert((app, id), (expires_ms, &**raw))?;
            missing.push(id);
        }
        self.writes += missing.len();
        self.trim_retained(app, now_ms)?;
        let mut kept = 0;
        for id in missing {
            kept += u32::from(self.retained.get((app, id))?.is_some());
        }
        Ok(kept)
    }

    /// Forgets request ids whose time has passed: at least as many as this transaction can have added.
    pub fn forget_requests(&mut self, now_ms: u64) -> Result<(), Failure> {
        let last = (now_ms.saturating_sub(FORGET_LATE_MS), "", "");
        let mut due = Vec::new();
        for row in self.expiries.range(..last)?.take(2 * self.writes + 16) {
            let key = row?.0;
            let (until_ms, app, request_id) = key.value();
            due.push((until_ms, app.to_owned(), request_id.to_owned()));
        }
        for (until_ms, app, request_id) in &due {
            self.expiries.remove((*until_ms, app.as_str(), request_id.as_str()))?;
            self.requests.remove((app.as_str(), request_id.as_str()))?;
        }
        Ok(())
    }

    /// Whether nobody has used the mark within its time; see [`crate::ledger::Ledger::first_use`].
    pub fn first_use(&mut self, app: &str, mark: &str, time_ms: u64, now_ms: u64) -> Result<bool, Failure> {
        let known = self.used.get((app, mark))?.map(|until| until.value());
        if known.is_some_and(|until_ms| until_ms > now_ms) {
            return Ok(false);
        }
        if let Some(until_ms) = known {
            self.used_expiries.remove((until_ms, app, mark))?;
        }
        let until_ms = now_ms.saturating_add(time_ms);
        self.used.insert((app, mark), until_ms)?;
        self.used_expiries.insert((until_ms, app, mark), ())?;
        self.writes += 1;
        Ok(true)
    }

    /// Forgets marks that are past their time, a few at a time, as many as are added at least.
    pub fn forget_used(&mut self, now_ms: u64) -> Result<(), Failure> {
        let last = (now_ms.saturating_sub(FORGET_LATE_MS), "", "");
        let mut due = Vec::new();
        for row in self.used_expiries.range(..last)?.take(2 * self.writes + 16) {
            let key = row?.0;
            let (until_ms, app, mark) = key.value();
            due.push((until_ms, app.to_owned(), mark.to_owned()));
        }
        for (until_ms, app, mark) in &due {
            self.used_expiries.remove((*until_ms, app.as_str(), mark.as_str()))?;
            self.used.remove((app.as_str(), mark.as_str()))?;
        }
        Ok(())
    }

    fn meta(&self, app: &str) -> Result<Option<Meta>, Failure> {
        Ok(self.meta.get(app)?.map(|row| {
            let (head, log_length, generation, previous_generation) = row.value();
            Meta {
                head,
                log_length,
                generation: generation.to_owned(),
                previous_generation: previous_generation.to_owned(),
            }
        }))
    }

    fn put_meta(&mut self, app: &str, meta: &Meta) -> Result<(), Failure> {
        self.meta.insert(app, (meta.head, meta.log_length, &*meta.generation, &*meta.previous_generation))?;
        self.writes += 1;
        Ok(())
    }

    /// Appends the envelope of the head, and drops from the other end what is too much or too old.
    fn append(&mut self, app: &str, meta: &mut Meta, raw: &[u8], moment: &Moment<'_>) -> Result<(), Failure> {
        self.log.insert((app, meta.head), raw)?;
        meta.log_length += 1;
        let oldest = moment.now_us.saturating_sub(moment.settings.log_hours.saturating_mul(3_600_000_000));
        let mut surplus = Vec::new();
        for row in self.log.range((app, 0)..(app, meta.head))?.take(TRIM_AT_ONCE) {
            let id = row?.0.value().1;
            let left = meta.log_length - surplus.len() as u64;
            if left <= moment.settings.log_length && id >= oldest {
                break;
            }
            surplus.push(id);
        }
        for id in &surplus {
            self.log.remove((app, *id))?;
        }
        meta.log_length = meta.log_length.saturating_sub(surplus.len() as u64);
        self.put_meta(app, meta)
    }

    /// Lets go of what has expired, and of the oldest beyond [`MAX_RETAINED`].
    fn trim_retained(&mut self, app: &str, now_ms: u64) -> Result<(), Failure> {
        let (mut valid, mut surplus) = (0, Vec::new());
        for row in self.retained.range((app, 0)..=(app, u64::MAX))?.rev() {
            let (key, value) = row?;
            if value.value().0 > now_ms && valid < MAX_RETAINED {
                valid += 1;
            } else {
                surplus.push(key.value().1);
            }
        }
        for id in &surplus {
            self.retained.remove((app, *id))?;
        }
        self.writes += surplus.len();
        Ok(())
    }
}
