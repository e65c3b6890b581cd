//! The checker of runs that go on for long: the invariants of the fault table, decided while it happens, in bounded memory.
//!
//! What is true is what stands in the apps' logs, read as they grow (every entry names its predecessor, so nothing is missed).
//! What senders were told and what devices had is held against that. [`super::checker`] is for tests that know everything at
//! their end.

mod app;
mod device;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::Value;

use super::broadcastd::App;
use super::device::Arrival;
use app::AppAudit;
use device::DeviceAudit;

/// How long what has ended is remembered, milliseconds.
const REMEMBERED_MS: u64 = 10 * 60_000;
/// The most violations that are kept as sentences.
const MAX_SENTENCES: usize = 200;

/// What is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// For how long a request id is remembered, milliseconds.
    pub dedupe_ms: u64,
    /// A device that is back within this counts as having been online, milliseconds.
    pub resume_ms: u64,
    /// How long a request may be without an end while nothing is wrong, milliseconds.
    pub patience_ms: u64,
    /// How late a retained broadcast may arrive at a device that reads all the time, milliseconds: the machine is busy.
    pub late_ms: u64,
}

/// What was seen, counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Requests that were sent.
    pub sent: u64,
    /// Broadcasts in the logs.
    pub accepted: u64,
    /// Recalls in the logs.
    pub recalls: u64,
    /// Senders that were told 416.
    pub refused: u64,
    /// Dead letters.
    pub dead: u64,
    /// Logins.
    pub logins: u64,
    /// Broadcasts that devices had.
    pub arrivals: u64,
    /// Accepted twice, with more time in between than their ids are remembered.
    pub forgotten: u64,
    /// Of those due, not had because they expired on the way.
    pub expired: u64,
    /// Not had because they were deleted on the way.
    pub recalled: u64,
    /// Not had because the device was away for longer than the resume window, and they were not retained.
    pub away: u64,
}

#[derive(Debug)]
struct Request {
    app: String,
    body: u64,
    malformed: bool,
    first_ms: u64,
    attempts: u32,
    /// What its sender was told.
    told: Option<u64>,
    /// What stands in the log, and when that was accepted.
    accepted: Option<(u64, u64)>,
    is_refused: bool,
    is_dead: bool,
    is_open: bool,
}

/// Collects what is seen and judges it as soon as it can be.
#[derive(Debug)]
pub struct Audit {
    rules: Rules,
    apps: BTreeMap<String, AppAudit>,
    requests: HashMap<String, Request>,
    devices: BTreeMap<u64, DeviceAudit>,
    next_device: u64,
    /// Nothing is wrong since then; `None`: something is.
    calm_since_ms: Option<u64>,
    counts: Counts,
    violations: Vec<String>,
    violation_count: u64,
}

pub(super) fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

impl Audit {
    /// Of these apps.
    pub fn new(apps: &[App], rules: Rules) -> Self {
        Self {
            rules,
            apps: apps.iter().map(|app| (app.key.clone(), AppAudit::new(app))).collect(),
            requests: HashMap::new(),
            devices: BTreeMap::new(),
            next_device: 1,
            calm_since_ms: Some(0),
            counts: Counts::default(),
            violations: Vec::new(),
            violation_count: 0,
        }
    }

    fn violation(&mut self, sentence: String) {
        self.violation_count += 1;
        if self.violations.len() < MAX_SENTENCES {
            self.violations.push(sentence);
        }
    }

    /// Something else was found broken.
    pub fn broken(&mut self, sentence: impl Into<String>) {
        self.violation(sentence.into());
    }

    /// Something goes wrong from now on, or no longer: requests need not end meanwhile.
    pub fn hold(&mut self, on: bool, now_ms: u64) {
        self.calm_since_ms = (!on).then_some(now_ms);
    }

    /// The sentences found since the last call.
    pub fn take_violations(&mut self) -> Vec<String> {
        std::mem::take(&mut self.violations)
    }

    /// How many violations there were in all.
    pub fn violation_count(&self) -> u64 {
        self.violation_count
    }

    /// What was seen so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Requests that have no end yet.
    pub fn open_requests(&self) -> usize {
        self.requests.values().filter(|request| request.is_open).count()
    }

    /// How many entries, requests and steps are kept: bounded, whatever the length of the run.
    pub fn size(&self) -> usize {
        self.apps.values().map(AppAudit::size).sum::<usize>()
            + self.requests.len()
            + self.devices.values().map(DeviceAudit::size).sum::<usize>()
    }

    /// The newest id of an app's log that was read.
    pub fn head(&self, app: &str) -> u64 {
        self.apps[app].head()
    }

    /// The ids of a few broadcasts of the app that are in its log and not deleted, the newest last.
    pub fn recallable(&self, app: &str) -> Vec<u64> {
        self.apps[app].recallable()
    }

    /// Broadcasts accepted within the last so many milliseconds, of all apps.
    pub fn accepted_since(&self, since_ms: u64) -> usize {
        self.apps.values().map(|app| app.accepted_since(since_ms)).sum()
    }

    /// A request is about to be sent, perhaps again. `malformed`: it must end as a dead letter.
    pub fn sending(&mut self, request: &Value, malformed: bool, now_ms: u64) {
        let id = request["requestId"].as_str().unwrap().to_owned();
        let known = self.requests.entry(id).or_insert_with(|| {
            self.counts.sent += 1;
            Request {
                app: request["appKey"].as_str().unwrap().to_owned(),
                body: hash(request["body"].as_str().unwrap_or_default()),
                malformed,
                first_ms: now_ms,
                attempts: 0,
                told: None,
                accepted: None,
                is_refused: false,
                is_dead: false,
                is_open: true,
            }
        });
        known.attempts += 1;
    }

    /// Its sender was told something. Returns whether that is an end (500 and 503 are none: it has to ask again).
    pub fn told(&mut self, request_id: &str, reply: &Value, now_ms: u64) -> bool {
        let Some(request) = self.requests.get_mut(request_id) else { return true };
        match reply["code"].as_u64() {
            Some(200) => {
                request.is_open = false;
                let id = reply["msg"]["broadcastId"].as_u64().unwrap_or(0);
                let before = request.told.replace(id);
                let in_log = request.accepted;
                if let Some(before) = before.filter(|before| *before != id) {
                    self.violation(format!("I6: {request_id} was told {before} and {id}"));
                }
                if let Some((logged, _)) = in_log.filter(|(logged, _)| *logged != id) {
                    self.violation(format!("I1: {request_id} was told {id}, but the log has {logged}"));
                }
            }
            Some(416) => {
                request.is_open = false;
                request.is_refused = true;
                self.counts.refused += 1;
                let (app, first_ms) = (request.app.clone(), request.first_ms);
                if let Some((id, _)) = request.accepted {
                    self.violation(format!("I6: {request_id} was accepted as {id} and then told {reply}"));
                }
                self.apps.get_mut(&app).unwrap().refused(request_id, first_ms, now_ms);
            }
            Some(500 | 503) => return false,
            _ => {
                request.is_open = false;
                if !request.malformed {
                    self.violation(format!("I2: {request_id} is a good request and was told {reply}"));
                }
            }
        }
        true
    }

    /// A dead letter was read.
    pub fn dead_letter(&mut self, request_id: &str, reason: &str, now_ms: u64) {
        let Some(request) = self.requests.get_mut(request_id) else {
            // Read before, and delivered again because its acknowledgement was lost.
            return;
        };
        request.is_open = false;
        if std::mem::replace(&mut request.is_dead, true) {
            return;
        }
        self.counts.dead += 1;
        let (app, first_ms, malformed) = (request.app.clone(), request.first_ms, request.malformed);
        match (reason.starts_with("limit_"), malformed) {
            (true, false) => self.apps.get_mut(&app).unwrap().refused(request_id, first_ms, now_ms),
            (false, true) => {}
            _ => self.violation(format!("I2: {request_id} was dead-lettered: {reason}")),
        }
    }

    /// What an app's log has after what was read before; `asked_ms`: when the question was put.
    pub fn log(&mut self, app: &str, envelopes: &[Value], asked_ms: u64) {
        for envelope in envelopes {
            let (appended, wrong) = match self.apps.get_mut(app).unwrap().append(envelope) {
                Ok(result) => result,
                Err(sentence) => {
                    self.violation(sentence);
                    continue;
                }
            };
            wrong.into_iter().for_each(|sentence| self.violation(sentence));
            match appended {
                app::Appended::Recall => self.counts.recalls += 1,
                app::Appended::Broadcast { id, time_ms, body } => {
                    self.counts.accepted += 1;
                    let request_id = envelope["requestId"].as_str().unwrap_or_default();
                    self.accepted(app, request_id, id, time_ms, body);
                }
            }
        }
        let app = self.apps.get_mut(app).unwrap();
        app.read_at(asked_ms);
        for sentence in app.judge_refusals() {
            self.violation(sentence);
        }
    }

    fn accepted(&mut self, app: &str, request_id: &str, id: u64, time_ms: u64, body: u64) {
        let Some(request) = self.requests.get_mut(request_id) else {
            return self.violation(format!("I1: {app}: {id} was accepted from {request_id}, which nobody sent"));
        };
        request.is_open = false;
        let again = request.accepted.replace((id, time_ms));
        let mut wrong = Vec::new();
        if let Some((before, at)) = again {
            let after = time_ms.saturating_sub(at);
            if after > self.rules.dedupe_ms {
                self.counts.forgotten += 1;
            } else {
                wrong.push(format!("I1: {request_id} was accepted as {before} and {after} ms later as {id}"));
            }
        }
        if let Some(told) = request.told.filter(|told| *told != id) {
            wrong.push(format!("I1: {request_id} was told {told}, but the log has {id}"));
        }
        if request.body != body || request.app != app {
            wrong.push(format!("I1: {request_id} was accepted as {id} of {app} with another content"));
        }
        // Sent twice it may be refused the first time and accepted the second.
        if request.is_refused && request.attempts == 1 {
            wrong.push(format!("I2: {request_id} was told that it is refused, and sent as {id}"));
        }
        if request.malformed {
            wrong.push(format!("I2: {request_id} is malformed and was accepted as {id}"));
        }
        wrong.into_iter().for_each(|sentence| self.violation(sentence));
    }

    /// A device that has never logged in; its number. `prompt`: it reads all the time and nothing delays what is sent to it.
    pub fn device(&mut self, app: &str, platform: &str, prompt: bool) -> u64 {
        let number = self.next_device;
        self.next_device += 1;
        self.devices.insert(number, DeviceAudit::new(app, platform, prompt));
        number
    }

    /// It was let in with this cursor; the welcome named `head`; `cursor` is what it has after the welcome.
    pub fn login(&mut self, device: u64, since: u64, head: u64, cursor: u64, asked_ms: u64, now_ms: u64) {
        self.counts.logins += 1;
        self.devices.get_mut(&device).unwrap().login(since, head, cursor, asked_ms, now_ms);
    }

    /// It had a broadcast; `cursor` is what it has after that.
    pub fn arrival(&mut self, device: u64, arrival: &Arrival, cursor: u64) {
        self.counts.arrivals += 1;
        let known = self.devices.get_mut(&device).unwrap();
        if let Err(sentence) = known.arrival(arrival, cursor) {
            let label = known.label(device);
            self.violation(format!("I3: {label}: {sentence}"));
        }
    }

    /// It was told that a broadcast was deleted.
    pub fn recall(&mut self, device: u64, id: u64) {
        self.devices.get_mut(&device).unwrap().recall(id);
    }

    /// It will not come back.
    pub fn gone(&mut self, device: u64) {
        self.devices.get_mut(&device).unwrap().is_gone = true;
    }

    /// Judges what can be judged by now, and forgets what is settled.
    pub fn tick(&mut self, now_ms: u64) {
        let mut sentences = Vec::new();
        for (number, device) in &mut self.devices {
            let app = &self.apps[device.app()];
            let found = device.judge(app, &self.rules, &mut self.counts);
            sentences.extend(found.into_iter().map(|sentence| format!("{}: {sentence}", device.label(*number))));
        }
        self.devices.retain(|_, device| !(device.is_gone && device.is_settled()));
        for app in self.apps.values_mut() {
            app.forget(now_ms.saturating_sub(REMEMBERED_MS));
        }
        for (id, request) in &mut self.requests {
            let waited_ms = self.calm_since_ms.map_or(0, |since| now_ms.saturating_sub(since.max(request.first_ms)));
            if request.is_open && waited_ms > self.rules.patience_ms {
                request.is_open = false;
                let (app, attempts) = (&request.app, request.attempts);
                let patience = self.rules.patience_ms;
                sentences.push(format!("I2: {id} of {app} has no end after {patience} ms and {attempts} attempts"));
            }
            if let (Some(told), None) = (request.told, request.accepted)
                && self.apps[&request.app].head() >= told
            {
                request.told = None;
                sentences.push(format!("I2: {id} was told that it is {told}, which is not in the log"));
            }
        }
        self.requests.retain(|_, request| request.is_open || now_ms.saturating_sub(request.first_ms) < REMEMBERED_MS);
        sentences.into_iter().for_each(|sentence| self.violation(sentence));
    }

    /// The end: nothing may be open, and no device may have more than what was judged.
    pub fn finish(&mut self, now_ms: u64) {
        self.tick(now_ms);
        let mut sentences: Vec<String> = Vec::new();
        let open: Vec<&String> = self.requests.iter().filter(|(_, r)| r.is_open).map(|(id, _)| id).take(10).collect();
        if !open.is_empty() {
            sentences.push(format!("I2: requests without an end: {open:?}, perhaps more"));
        }
        for (number, device) in &self.devices {
            if !device.is_settled() {
                let label = device.label(*number);
                sentences.push(format!("I3: {label} has had something that no log has: {}", device.describe()));
            }
        }
        sentences.into_iter().for_each(|sentence| self.violation(sentence));
    }

    /// I4 and "charged once", against what Redis holds of an app at `now_ms`, when nothing is under way.
    pub fn stored(&mut self, app: &str, stored: &super::stored::Stored, now_ms: u64) {
        for sentence in self.apps[app].stored(stored, now_ms) {
            self.violation(sentence);
        }
    }
}
