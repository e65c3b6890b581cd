//! The ledger: the product's rules for ids, quota and retention, and a log that is trimmed, loses its tail and comes back as
//! another generation. Beside each rule a plain one of our own, which must agree.

use std::collections::BTreeMap;
use std::sync::Arc;

use broadcastd::broadcast::envelope::{self, Content, Envelope};
use broadcastd::broadcast::quota::{Limits, Quota};
use broadcastd::broadcast::request::{RawRequest, Request};
use broadcastd::broadcast::retention::Retained;
use broadcastd::broadcast::{BroadcastId, next_id};
use broadcastd::ledger::{Generation, Snapshot, Stored};

/// What truly happened under one id, whatever became of it later.
#[derive(Debug, Clone)]
pub struct Fact {
    pub prev: BroadcastId,
    pub time_ms: u64,
    pub expires_ms: u64,
    pub body: String,
    pub platforms: Vec<&'static str>,
    pub recalls: Option<BroadcastId>,
    /// Whether it was deleted.
    pub is_recalled: bool,
    /// Whether the ledger lost it at any time.
    pub is_lost: bool,
    /// Bytes of the frame, about: at least as many as there are.
    pub bytes: usize,
}

/// What the ledger has stored; a copy of it is what a crash may bring back.
#[derive(Clone)]
struct State {
    head: BroadcastId,
    known_generation: u64,
    log: Vec<Stored>,
    retained: Retained<Stored>,
    /// The same by a plainer rule: id, until when.
    plain: Vec<(BroadcastId, u64)>,
    quota: Quota,
    /// The times of what was accepted, microseconds.
    accepted: Vec<u64>,
}

pub struct Ledger {
    state: State,
    generation: u64,
    /// Copies from before the last changes, oldest first.
    before: Vec<State>,
    pub log_length: usize,
    pub limits: Limits,
    pub facts: BTreeMap<BroadcastId, Fact>,
    /// Whether it has ever lost anything.
    pub has_lost: bool,
    /// Whether its log has ever been trimmed.
    pub has_trimmed: bool,
}

impl Ledger {
    pub fn new(log_length: usize, limits: Limits) -> Self {
        let state = State {
            head: 0,
            known_generation: 0,
            log: Vec::new(),
            retained: Retained::default(),
            plain: Vec::new(),
            quota: Quota::default(),
            accepted: Vec::new(),
        };
        let facts = BTreeMap::new();
        Self {
            state,
            generation: 1,
            before: Vec::new(),
            log_length,
            limits,
            facts,
            has_lost: false,
            has_trimmed: false,
        }
    }

    pub fn head(&self) -> BroadcastId {
        self.state.head
    }

    pub fn generation(&self) -> Generation {
        Generation(self.generation.to_string().into())
    }

    /// The ids of what is retained and valid.
    pub fn retained(&self, now_us: u64) -> Vec<BroadcastId> {
        let ids: Vec<_> = self.state.retained.after(0, now_us / 1000).map(|(id, _)| id).collect();
        let plain: Vec<_> =
            self.state.plain.iter().filter(|(_, until)| *until > now_us / 1000).map(|(id, _)| *id).collect();
        assert_eq!(ids, plain, "retention: the newest hundred that are valid");
        ids
    }

    fn allocate(&mut self, now_us: u64) -> (BroadcastId, BroadcastId) {
        let prev = self.state.head;
        let id = next_id(prev, now_us, self.state.known_generation != self.generation);
        self.state.known_generation = self.generation;
        assert!(id > prev && !self.facts.contains_key(&id), "id {id} is used twice");
        assert!(self.facts.keys().next_back().is_none_or(|last| *last < id), "id {id} goes back");
        self.state.head = id;
        (id, prev)
    }

    /// Keeps what a crash may bring back: the state from before a change.
    fn remember(&mut self, before: State) {
        self.before.push(before);
        if self.before.len() > 4 {
            self.before.remove(0);
        }
    }

    fn append(&mut self, raw: String) -> Arc<[u8]> {
        let envelope = Envelope::read(raw.as_bytes()).expect("what is joined can be read");
        let raw: Arc<[u8]> = raw.into_bytes().into();
        self.state.log.push(Stored { raw: raw.clone(), envelope });
        let surplus = self.state.log.len().saturating_sub(self.log_length);
        self.state.log.drain(..surplus);
        self.has_trimmed |= surplus > 0;
        raw
    }

    /// Accepts a broadcast, or refuses it; the quota's oracle says which.
    pub fn accept(
        &mut self,
        now_us: u64,
        ttl_ms: Option<u64>,
        body: String,
        platforms: Vec<&'static str>,
    ) -> Option<Arc<[u8]>> {
        let (now_ms, second) = (now_us / 1000, now_us / 1_000_000);
        let day = second / 86_400;
        let within =
            |seconds: u64| self.state.accepted.iter().filter(|at| (**at / 1_000_000) + seconds > second).count() as u32;
        let today = self.state.accepted.iter().filter(|at| **at / 86_400_000_000 == day).count() as u32;
        let (at_most, at_least) = (within(61), within(60));
        let before = self.state.clone();
        match self.state.quota.charge(now_us, self.limits) {
            Err(refusal) => {
                assert!(
                    at_most >= self.limits.per_minute || today >= self.limits.per_day,
                    "refused with {at_most} in the minute and {today} today"
                );
                let later = |seconds: u64| self.state.quota.clone().charge(now_us + seconds * 1_000_000, self.limits);
                assert!(later(refusal.retry_after).is_ok(), "told to come back too early");
                assert!(
                    refusal.retry_after == 1 || later(refusal.retry_after - 1).is_err(),
                    "told to come back too late"
                );
                return None;
            }
            Ok(()) => assert!(at_least < self.limits.per_minute && today < self.limits.per_day, "over the limit"),
        }
        self.state.quota = Quota::from_bytes(&self.state.quota.to_bytes()).expect("its own bytes");
        let raw = RawRequest {
            request_id: Some(format!("r{now_us}")),
            app_key: Some("demo".into()),
            body: Some(body.clone()),
            target_os: Some(platforms.iter().map(|name| (*name).to_owned()).collect()),
            ..RawRequest::default()
        };
        let request = Request::from_raw(raw, None).expect("well-formed");
        self.remember(before);
        let (id, prev) = self.allocate(now_us);
        self.state.accepted.push(now_us);
        let expires_ms = ttl_ms.map_or(0, |ttl_ms| now_ms + ttl_ms);
        let raw = self.append(envelope::broadcast(id, prev, now_ms, expires_ms, &envelope::tail(&request)));
        if expires_ms != 0 {
            let envelope = Envelope::read(&raw).expect("it was read");
            self.retain(id, expires_ms, Stored { raw: raw.clone(), envelope }, now_ms);
        }
        let bytes = body.len() + 130;
        let fact = Fact {
            prev,
            time_ms: now_ms,
            expires_ms,
            body,
            platforms,
            recalls: None,
            is_recalled: false,
            is_lost: false,
            bytes,
        };
        self.facts.insert(id, fact);
        Some(raw)
    }

    fn retain(&mut self, id: BroadcastId, expires_ms: u64, stored: Stored, now_ms: u64) {
        self.state.retained.insert(id, expires_ms, stored, now_ms);
        self.state.plain.retain(|(_, until)| *until > now_ms);
        self.state.plain.push((id, expires_ms));
        self.state.plain.sort_unstable();
        if self.state.plain.len() > 100 {
            self.state.plain.remove(0);
        }
    }

    /// Deletes a broadcast that the ledger still has.
    pub fn recall(&mut self, now_us: u64, target: BroadcastId) -> Option<Arc<[u8]>> {
        let logged = self.state.log.iter().position(|stored| stored.envelope.id == target);
        let is_retained = self.retained(now_us).contains(&target);
        if logged.is_none() && !is_retained || self.facts[&target].recalls.is_some() {
            return None;
        }
        self.remember(self.state.clone());
        let (id, prev) = self.allocate(now_us);
        self.state.retained.remove(target);
        self.state.plain.retain(|(id, _)| *id != target);
        if let Some(at) = logged {
            self.state.log.remove(at);
        }
        self.facts.get_mut(&target).expect("it was accepted").is_recalled = true;
        let fact = Fact {
            prev,
            time_ms: now_us / 1000,
            expires_ms: 0,
            body: String::new(),
            platforms: Vec::new(),
            recalls: Some(target),
            is_recalled: false,
            is_lost: false,
            bytes: 60,
        };
        self.facts.insert(id, fact);
        Some(self.append(envelope::recall(id, prev, now_us / 1000, target)))
    }

    /// What a node that joins, or has missed something, is given. 0: everything.
    pub fn snapshot(&self, now_us: u64, after: BroadcastId) -> Snapshot {
        let now_ms = now_us / 1000;
        Snapshot {
            now_ms,
            head: self.state.head,
            generation: self.generation(),
            log: self.state.log.iter().filter(|stored| stored.envelope.id > after).cloned().collect(),
            retained: self.state.retained.after(0, now_ms).map(|(_, stored)| stored.clone()).collect(),
            // As a Redis says it that does not count: the node tells the loss by the gaps.
            logged: None,
        }
    }

    /// Whether a node may have missed for good that something was deleted: the log had let the recall go, and there was
    /// another life of the data, so that what is not retained may as well have been lost.
    pub fn may_forget_recalls(&self) -> bool {
        self.has_trimmed && self.generation > 1
    }

    /// Another life of the data; `lose`: how many of the last changes are gone. Not of the quota's oracle: what is lost of it
    /// may be charged again.
    pub fn restart(&mut self, lose: usize) -> usize {
        self.generation += 1;
        let mut lost = 0;
        for _ in 0..lose {
            let Some(state) = self.before.pop() else { break };
            self.state = state;
            lost += 1;
        }
        if lost > 0 {
            self.has_lost = true;
            let head = self.state.head;
            for (_, fact) in self.facts.iter_mut().filter(|(id, _)| **id > head) {
                fact.is_lost = true;
            }
            // A lost recall brings back what it deleted: neither having it nor having it not is wrong.
            let gone: Vec<_> =
                self.facts.iter().filter(|(id, _)| **id > head).filter_map(|(_, fact)| fact.recalls).collect();
            for id in gone {
                self.facts.get_mut(&id).expect("it was accepted").is_lost = true;
            }
        }
        lost
    }

    /// Takes back what a node holds.
    pub fn restore(&mut self, now_us: u64, head: BroadcastId, retained: &[Stored], recalled: &[BroadcastId]) -> u32 {
        let now_ms = now_us / 1000;
        let after = self.state.log.iter().filter(|stored| stored.envelope.id > head);
        let since = after.filter_map(|stored| match stored.envelope.content {
            Content::Recall(target) => Some(target),
            Content::Broadcast { .. } | Content::Newer(_) => None,
        });
        let recalled: Vec<_> = recalled.iter().copied().chain(since).collect();
        self.state.head = self.state.head.max(head);
        for id in &recalled {
            self.state.retained.remove(*id);
            self.state.plain.retain(|(known, _)| known != id);
        }
        let mut missing = 0;
        for stored in retained {
            let (id, expires_ms) = (stored.envelope.id, stored.envelope.expires_ms);
            if expires_ms > now_ms && !recalled.contains(&id) && !self.state.plain.iter().any(|(known, _)| *known == id)
            {
                self.retain(id, expires_ms, stored.clone(), now_ms);
                missing += 1;
            }
        }
        missing
    }
}
