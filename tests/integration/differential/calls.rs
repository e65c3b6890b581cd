//! Operations with their ids and contents filled in, carried out on one ledger.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::envelope::{self, Envelope};
use broadcastd::broadcast::platform::Platforms;
use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{MAX_DEDUPE_MS, Request, Submission};
use broadcastd::broadcast::retention::MAX_RETAINED;
use broadcastd::broadcast::verdict::{Decision, Limit};
use broadcastd::ledger::{Kind, NodeName, Snapshot, Stored};

use super::Subject;
use super::operation::{APPS, Lost, NODES, Operation, Pick, Sending};

/// What the run has learnt so far; the same for both.
pub struct Known {
    pub now_us: u64,
    bursts: usize,
    generation: String,
    /// Apps and request ids that were accepted.
    accepted: BTreeSet<(AppKey, String)>,
    /// By app: the ids given away, and the envelopes seen.
    pub ids: [Vec<u64>; APPS.len()],
    envelopes: [Vec<Arc<[u8]>>; APPS.len()],
}

/// An operation with its ids and contents filled in.
pub enum Call {
    Accept(Vec<Submission>),
    Recall(AppKey, u64),
    Find(AppKey, u64),
    List(AppKey, u64, usize, Kind),
    Join(AppKey, NodeName, Duration, u64),
    Renew(Vec<AppKey>, NodeName, Duration),
    Leave(AppKey, NodeName),
    Subscribe(AppKey),
    Unsubscribe(AppKey),
    Restore(AppKey, u64, Vec<Stored>, Vec<u64>),
    Clock(u64, &'static str),
    /// Time, app, id, and whether this is the id's very last moment.
    Expiry(u64, AppKey, u64, bool),
    Generation(String),
}

const CLOCK_ON: &str = "clock forward";
const CLOCK_BACK: &str = "clock back";
const EXPIRED: &str = "expired to the millisecond";
const ANOTHER_LIFE: &str = "generation changed";
const AHEAD: &str = "accepted with ids ahead of time";
const RECALLED: &str = "recalled";
const NOT_RECALLED: &str = "nothing to recall";
const ACCEPTED: &str = "accepted";
const FORGOTTEN: &str = "accepted anew, the request id being forgotten";
const REPEATED: &str = "repeated";
const CONFLICT: &str = "conflict";
const OVER_THE_MINUTE: &str = "refused for the minute";
const OVER_THE_DAY: &str = "refused for the day";
const FULL: &str = "a hundred retained";
const WRITTEN_BACK: &str = "written back";

/// What must have happened in a whole run that is to say anything, and how often: about a third of what is usual, but
/// once where that is little.
pub const EVENTS: &[(&str, u32)] = &[
    (CLOCK_ON, 130),
    (CLOCK_BACK, 20),
    (EXPIRED, 1),
    (ANOTHER_LIFE, 12),
    (AHEAD, 300),
    (RECALLED, 12),
    (NOT_RECALLED, 30),
    (ACCEPTED, 300),
    (FORGOTTEN, 20),
    (REPEATED, 30),
    (CONFLICT, 60),
    (OVER_THE_MINUTE, 40),
    (OVER_THE_DAY, 20),
    (FULL, 1),
    (WRITTEN_BACK, 12),
];

impl Known {
    /// Nothing yet. The year is 2100.
    pub fn new() -> Self {
        Self {
            now_us: 4_102_444_800_000_000,
            bursts: 0,
            generation: "generation-0".to_owned(),
            accepted: BTreeSet::new(),
            ids: Default::default(),
            envelopes: Default::default(),
        }
    }

    /// What has happened with this call.
    pub fn note(&mut self, call: &Call, answered: &Answered) -> Vec<&'static str> {
        let mut events = answered.events.clone();
        match call {
            Call::Generation(generation) if *generation != self.generation => {
                self.generation.clone_from(generation);
                events.push(ANOTHER_LIFE);
            }
            Call::Accept(batch) => {
                for (submission, event) in batch.iter().zip(&answered.events) {
                    let key = (submission.request.app.clone(), submission.request.id.clone());
                    if [ACCEPTED, AHEAD].contains(event) && !self.accepted.insert(key) {
                        events.push(FORGOTTEN);
                    }
                }
            }
            _ => {}
        }
        events
    }

    pub fn learn(&mut self, app: &AppKey, raw: &Arc<[u8]>) {
        self.envelopes[position(app)].push(raw.clone());
    }

    fn id(&self, app: usize, pick: &Pick) -> u64 {
        match pick {
            Pick::None => 0,
            Pick::Known(nth, beside) => {
                self.ids[app].iter().rev().nth(*nth).map_or(0, |id| id.saturating_add_signed(*beside))
            }
            Pick::Ago(ago_us) => self.now_us - ago_us,
        }
    }

    pub fn call(&mut self, operation: &Operation) -> Call {
        use Operation as O;
        let node = |node: usize| NodeName(NODES[node].into());
        match operation {
            O::Accept(sendings) => Call::Accept(sendings.iter().map(submission).collect()),
            O::Burst(count, ttl_ms) => {
                let unlimited = Limits { per_minute: u32::MAX, per_day: u32::MAX };
                let (dedupe_ms, ttl_ms) = (MAX_DEDUPE_MS, Some(*ttl_ms));
                let first = self.bursts * 1000 + 1000;
                self.bursts += 1;
                let sending =
                    |request_id| Sending { app: 0, request_id, body: 0, ttl_ms, dedupe_ms, limits: unlimited };
                Call::Accept((first..first + count).map(|request_id| submission(&sending(request_id))).collect())
            }
            O::Recall(key, pick) => Call::Recall(app(*key), self.id(*key, pick)),
            O::Find(key, pick) => Call::Find(app(*key), self.id(*key, pick)),
            O::List(key, pick, limit, kind) => Call::List(app(*key), self.id(*key, pick), *limit, *kind),
            O::Join(key, name, lease, pick) => {
                Call::Join(app(*key), node(*name), Duration::from_millis(*lease), self.id(*key, pick))
            }
            O::Renew(keys, name, lease) => {
                Call::Renew(keys.iter().map(|key| app(*key)).collect(), node(*name), Duration::from_millis(*lease))
            }
            O::Leave(key, name) => Call::Leave(app(*key), node(*name)),
            O::Subscribe(key) => Call::Subscribe(app(*key)),
            O::Unsubscribe(key) => Call::Unsubscribe(app(*key)),
            O::Restore(key, head, lost, recalled, first) => {
                let stored: Vec<_> = lost.iter().filter_map(|lost| self.stored(*key, lost)).collect();
                let mut recalled: Vec<_> = recalled.iter().map(|pick| self.id(*key, pick)).collect();
                recalled.extend(stored.first().filter(|_| *first).map(|stored| stored.envelope.id));
                Call::Restore(app(*key), self.id(*key, head), stored, recalled)
            }
            O::Clock(step) => {
                self.now_us = self.now_us.saturating_add_signed(*step);
                Call::Clock(self.now_us, if *step < 0 { CLOCK_BACK } else { CLOCK_ON })
            }
            O::Expiry(key, nth, beside_ms) => {
                let (mut id, mut is_exact) = (0, false);
                if let Some(raw) = self.envelopes[*key].iter().rev().nth(*nth) {
                    let envelope = Envelope::read(raw).unwrap();
                    id = envelope.id;
                    let moment = envelope.expires_ms.saturating_add_signed(*beside_ms) * 1000;
                    // Further back than a clock is ever set.
                    if moment + 2_000_000 > self.now_us {
                        self.now_us = moment;
                        is_exact = envelope.expires_ms != 0 && *beside_ms == 0;
                    }
                }
                Call::Expiry(self.now_us, app(*key), id, is_exact)
            }
            O::Generation(number) => Call::Generation(format!("generation-{number}")),
        }
    }

    fn stored(&self, app: usize, lost: &Lost) -> Option<Stored> {
        let raw: Arc<[u8]> = match lost {
            Lost::Known(nth) => self.envelopes[app].iter().rev().nth(*nth)?.clone(),
            Lost::Made(ago_us, ttl_ms) => {
                let id = self.now_us - ago_us;
                let tail = r#""requestId":"lost","body":"lost"}"#;
                envelope::broadcast(id, id - 1, id / 1000, id / 1000 + ttl_ms, tail).into_bytes().into()
            }
        };
        Some(Stored { envelope: Envelope::read(&raw).unwrap(), raw })
    }
}

pub fn app(number: usize) -> AppKey {
    AppKey::parse(APPS[number]).unwrap()
}

pub fn position(app: &AppKey) -> usize {
    APPS.iter().position(|key| *key == app.as_str()).unwrap()
}

fn submission(sending: &Sending) -> Submission {
    let bodies = ["Köln \"grüßt\"\n\u{1F600}", "something else"];
    Submission {
        request: Request {
            id: format!("request-{}", sending.request_id),
            app: app(sending.app),
            from: if sending.request_id.is_multiple_of(2) { String::new() } else { "ops".to_owned() },
            body: bodies[sending.body].to_owned(),
            ttl_ms: sending.ttl_ms,
            targets: if sending.request_id.is_multiple_of(5) {
                Platforms::parse(&["web", "ios"]).unwrap()
            } else {
                Platforms::ALL
            },
            dedupe_ms: sending.dedupe_ms,
        },
        limits: sending.limits,
    }
}

/// An answer, and what the harness needs of it.
#[derive(Default)]
pub struct Answered {
    pub shown: String,
    pub published: u32,
    pub ids: Vec<(AppKey, u64)>,
    pub seen: Vec<(AppKey, Arc<[u8]>)>,
    events: Vec<&'static str>,
}

/// With the envelopes as text, for whoever has to read a difference.
fn show(snapshot: &Snapshot) -> String {
    let text = |stored: &Vec<Stored>| -> String {
        stored.iter().flat_map(|stored| [String::from_utf8_lossy(&stored.raw).into_owned(), "\n".to_owned()]).collect()
    };
    // Only Redis counts what its log has had.
    let Snapshot { now_ms, head, generation, log, retained, logged: _ } = snapshot;
    format!("{now_ms} {head} {generation:?}\nlog\n{}retained\n{}", text(log), text(retained))
}

pub async fn perform(subject: &impl Subject, call: &Call) -> Answered {
    let ledger = subject.ledger();
    let mut answered = Answered::default();
    answered.shown = match call {
        Call::Accept(batch) => {
            let decisions = ledger.accept(batch).await;
            for (submission, decision) in batch.iter().zip(&decisions) {
                let Ok(decision) = decision else { continue };
                answered.events.push(match decision {
                    Decision::Accepted(accepted) if accepted.repeated => REPEATED,
                    Decision::Accepted(accepted) => {
                        answered.published += accepted.reached;
                        answered.ids.push((submission.request.app.clone(), accepted.id));
                        if accepted.id > accepted.time_ms * 1000 + 30_000_000 { AHEAD } else { ACCEPTED }
                    }
                    Decision::Conflict => CONFLICT,
                    Decision::Refused(refusal) if refusal.limit == Limit::Minute => OVER_THE_MINUTE,
                    Decision::Refused(_) => OVER_THE_DAY,
                });
            }
            format!("{decisions:?}")
        }
        Call::Recall(app, id) => {
            let recalled = ledger.recall(app, *id).await;
            answered.events.push(if matches!(recalled, Ok(Some(_))) { RECALLED } else { NOT_RECALLED });
            if let Ok(Some(recalled)) = &recalled {
                answered.published += recalled.reached;
                answered.ids.push((app.clone(), recalled.recall_id));
            }
            format!("{recalled:?}")
        }
        Call::Find(app, id) => format!("{:?}", ledger.find(app, *id).await),
        Call::List(app, before, limit, kind) => {
            let list = ledger.list(app, *before, *limit, *kind).await;
            let is_full = *kind == Kind::Retained && list.as_ref().is_ok_and(|list| list.len() == MAX_RETAINED);
            answered.events.extend(is_full.then_some(FULL));
            format!("{list:?}")
        }
        Call::Join(app, node, lease, after) => {
            let snapshot = ledger.join(app, node, *lease, *after).await;
            if let Ok(snapshot) = &snapshot {
                answered.events.extend((snapshot.retained.len() == MAX_RETAINED).then_some(FULL));
                answered.seen.extend(snapshot.retained.iter().map(|stored| (app.clone(), stored.raw.clone())));
            }
            snapshot.map_or_else(|error| format!("{error:?}"), |snapshot| show(&snapshot))
        }
        Call::Renew(apps, node, lease) => format!("{:?}", ledger.renew(apps, node, *lease).await),
        Call::Leave(app, node) => format!("{:?}", ledger.leave(app, node).await),
        Call::Subscribe(app) => format!("{:?}", ledger.subscribe(app).await),
        Call::Unsubscribe(app) => format!("{:?}", ledger.unsubscribe(app).await),
        Call::Restore(app, head, retained, recalled) => {
            answered.ids.extend(retained.iter().map(|stored| (app.clone(), stored.envelope.id)));
            answered.seen.extend(retained.iter().map(|stored| (app.clone(), stored.raw.clone())));
            let kept = ledger.restore(app, *head, retained, recalled).await;
            answered.events.extend(matches!(kept, Ok(1..)).then_some(WRITTEN_BACK));
            format!("{kept:?}")
        }
        Call::Clock(now_us, event) => {
            answered.events.push(event);
            subject.set_clock_us(*now_us).await;
            String::new()
        }
        Call::Expiry(now_us, app, id, is_exact) => {
            let valid = async || ledger.list(app, 0, 1000, Kind::Retained).await.unwrap();
            // As late as it can be seen, where time goes on from here.
            subject.set_clock_us(now_us.saturating_sub(1)).await;
            let before = valid().await;
            subject.set_clock_us(*now_us).await;
            let after = valid().await;
            answered.events.extend((before.len() == MAX_RETAINED).then_some(FULL));
            let holds = |list: &[Envelope]| list.iter().any(|envelope| envelope.id == *id);
            answered.events.extend((*is_exact && holds(&before) && !holds(&after)).then_some(EXPIRED));
            format!("{before:?} {after:?} {:?}", ledger.find(app, *id).await)
        }
        Call::Generation(generation) => {
            subject.set_generation(generation).await;
            String::new()
        }
    };
    answered
}
