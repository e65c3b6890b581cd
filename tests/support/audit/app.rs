//! What is true of one app: its log as it grew, what of it is retained, and its quota.

use std::collections::{BTreeMap, VecDeque};

use serde_json::Value;

use super::super::broadcastd::App;
use super::super::stored::Stored;

/// How many retained broadcasts an app has at the most.
const MAX_RETAINED: usize = 100;
/// The quota counts any 60 seconds; in whole seconds, so that a refusal may come up to a second more after.
const MINUTE_MS: u64 = 60_000;
const DAY_MS: u64 = 86_400_000;

/// A broadcast.
#[derive(Debug)]
pub struct Entry {
    pub time_ms: u64,
    /// 0: not retained.
    pub expires_ms: u64,
    pub body: u64,
    targets: Option<Vec<String>>,
    /// Whose arrival pushed it out of the retained ones: id and time.
    pub trimmed: Option<(u64, u64)>,
    /// The id of its recall.
    pub recalled: Option<u64>,
    /// What this deletes, if it is a recall.
    pub recalls: Option<u64>,
}

impl Entry {
    pub fn is_for(&self, platform: &str) -> bool {
        self.targets.as_ref().is_none_or(|targets| targets.iter().any(|target| target == platform))
    }
}

#[derive(Debug)]
struct Refusal {
    request_id: String,
    sent_ms: u64,
    told_ms: u64,
}

pub enum Appended {
    Recall,
    Broadcast { id: u64, time_ms: u64, body: u64 },
}

#[derive(Debug)]
pub struct AppAudit {
    key: String,
    per_minute: usize,
    entries: BTreeMap<u64, Entry>,
    head: u64,
    head_ms: u64,
    /// The log is known as of this time.
    pub read_at_ms: u64,
    retained: BTreeMap<u64, u64>,
    /// When the latest were accepted; ascending.
    accepted_ms: VecDeque<u64>,
    by_day: BTreeMap<u64, u64>,
    refusals: VecDeque<Refusal>,
}

impl AppAudit {
    pub fn new(app: &App) -> Self {
        Self {
            key: app.key.clone(),
            per_minute: app.per_minute as usize,
            entries: BTreeMap::new(),
            head: 0,
            head_ms: 0,
            read_at_ms: 0,
            retained: BTreeMap::new(),
            accepted_ms: VecDeque::new(),
            by_day: BTreeMap::new(),
            refusals: VecDeque::new(),
        }
    }

    pub fn head(&self) -> u64 {
        self.head
    }

    pub fn size(&self) -> usize {
        self.entries.len() + self.accepted_ms.len() + self.refusals.len()
    }

    pub fn get(&self, id: u64) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// The entries after `after`, up to and with `last`.
    pub fn between(&self, after: u64, last: u64) -> impl Iterator<Item = (u64, &Entry)> {
        let range = (after < last).then(|| self.entries.range(after + 1..=last));
        range.into_iter().flatten().map(|(id, entry)| (*id, entry))
    }

    pub fn recallable(&self) -> Vec<u64> {
        let alive = |entry: &Entry| entry.recalls.is_none() && entry.recalled.is_none();
        let newest = self.entries.iter().rev().take(30).filter(|(_, entry)| alive(entry));
        let mut ids: Vec<u64> = newest.map(|(id, _)| *id).collect();
        ids.reverse();
        ids
    }

    pub fn accepted_since(&self, since_ms: u64) -> usize {
        self.accepted_ms.len() - self.accepted_ms.partition_point(|at| *at < since_ms)
    }

    pub fn read_at(&mut self, asked_ms: u64) {
        self.read_at_ms = asked_ms;
    }

    /// I1: ids increase in the order of acceptance, none is used twice, none is missing, and the limit holds.
    pub fn append(&mut self, envelope: &Value) -> Result<(Appended, Vec<String>), String> {
        let number = |name: &str| envelope[name].as_u64().unwrap_or(0);
        let (id, prev, time_ms, expires_ms) = (number("id"), number("prev"), number("time"), number("expires"));
        let key = self.key.clone();
        let (head, head_ms) = (self.head, self.head_ms);
        if id <= head {
            return Err(format!("I1: {key}: id {id} comes after {head}"));
        }
        (self.head, self.head_ms) = (id, time_ms);
        let recalls = envelope["recall"].as_u64();
        let body = super::hash(envelope["body"].as_str().unwrap_or_default());
        let targets = envelope["targetOs"]
            .as_array()
            .map(|names| names.iter().map(|name| name.as_str().unwrap_or_default().to_owned()).collect());
        let entry = Entry { time_ms, expires_ms, body, targets, trimmed: None, recalled: None, recalls };
        self.entries.insert(id, entry);
        let mut wrong = Vec::new();
        if prev != head {
            wrong.push(format!("I1: {key}: {id} names {prev} as its predecessor, which was {head}"));
        }
        if time_ms < head_ms {
            wrong.push(format!("I1: {key}: {id} was accepted {} ms before {head}", head_ms - time_ms));
        }
        if let Some(recalled) = recalls {
            self.retained.remove(&recalled);
            if let Some(entry) = self.entries.get_mut(&recalled) {
                entry.recalled = Some(id);
            }
        } else {
            self.accepted_ms.push_back(time_ms);
            *self.by_day.entry(time_ms / DAY_MS).or_default() += 1;
            let in_window = self.accepted_since((time_ms + 1).saturating_sub(MINUTE_MS));
            if in_window > self.per_minute {
                wrong.push(format!("I1: {key}: {id} is number {in_window} within 60 s, of {}", self.per_minute));
            }
        }
        if expires_ms > 0 {
            self.retained.retain(|_, expires_ms| *expires_ms > time_ms);
            self.retained.insert(id, expires_ms);
            while self.retained.len() > MAX_RETAINED {
                if let Some((trimmed, _)) = self.retained.pop_first()
                    && let Some(entry) = self.entries.get_mut(&trimmed)
                {
                    entry.trimmed = Some((id, time_ms));
                }
            }
        }
        let appended = if recalls.is_some() { Appended::Recall } else { Appended::Broadcast { id, time_ms, body } };
        Ok((appended, wrong))
    }

    pub fn refused(&mut self, request_id: &str, sent_ms: u64, told_ms: u64) {
        self.refusals.push_back(Refusal { request_id: request_id.to_owned(), sent_ms, told_ms });
    }

    /// I1: refused only with the window full.
    pub fn judge_refusals(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        while let Some(refusal) = self.refusals.pop_front() {
            if refusal.told_ms >= self.read_at_ms {
                self.refusals.push_front(refusal);
                break;
            }
            // Whole seconds: up to 61 s are looked at.
            let from = refusal.sent_ms.saturating_sub(MINUTE_MS + 1000);
            let until = self.accepted_ms.partition_point(|at| *at <= refusal.told_ms);
            let in_window = until.saturating_sub(self.accepted_ms.partition_point(|at| *at < from));
            if in_window < self.per_minute {
                let (key, id, limit) = (&self.key, refusal.request_id, self.per_minute);
                wrong.push(format!("I1: {key}: {id} was refused with only {in_window} of {limit} within a minute"));
            }
        }
        wrong
    }

    /// Lets go of what no device can be given any more.
    pub fn forget(&mut self, before_ms: u64) {
        self.entries.retain(|_, entry| entry.time_ms.max(entry.expires_ms) >= before_ms);
        let old = self.accepted_ms.partition_point(|at| *at < before_ms);
        self.accepted_ms.drain(..old);
    }

    /// I4: retained are the newest 100 valid ones. I1: the counters are what was accepted, no more and no less.
    pub fn stored(&self, stored: &Stored, now_ms: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        let key = &self.key;
        if stored.retained.len() > MAX_RETAINED {
            wrong.push(format!("I4: {key}: {} are retained", stored.retained.len()));
        }
        let certain = |expires_ms: u64| expires_ms > now_ms + 1000;
        for (id, expires_ms) in &self.retained {
            if certain(*expires_ms) && !stored.retained.contains_key(id) {
                wrong.push(format!("I4: {key}: {id} is valid and no longer retained"));
            }
        }
        for (id, expires_ms) in &stored.retained {
            if certain(*expires_ms) && self.retained.get(id) != Some(expires_ms) {
                wrong.push(format!("I4: {key}: {id} is retained and should not be"));
            }
        }
        if let Some((day, count)) = stored.day {
            let accepted = self.by_day.get(&day).copied().unwrap_or(0);
            if accepted != count {
                wrong.push(format!("I1: {key}: {count} were charged on day {day}, {accepted} accepted"));
            }
        }
        if let Some((second, count)) = stored.minute {
            let accepted = self.accepted_since((second - 60) * 1000) as u64;
            if accepted != count {
                wrong
                    .push(format!("I1: {key}: {count} were charged in the minute up to {second}, {accepted} accepted"));
            }
        }
        wrong
    }
}
