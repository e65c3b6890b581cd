//! What one device has had, held against its app's log.

use std::collections::{BTreeSet, VecDeque};

use super::super::device::Arrival;
use super::app::{AppAudit, Entry};
use super::{Counts, Rules};

/// How far apart two clocks may look, milliseconds: the time of a frame on its way.
const MARGIN_MS: u64 = 1000;
/// How many of the ids that a session had are remembered, for its recalls.
const REMEMBERED: usize = 500;

#[derive(Debug)]
enum Step {
    /// It has a broadcast.
    Arrived(Arrival),
    /// It was told that it has everything up to this id.
    Passed { cursor: u64, at_ms: u64 },
    /// It was told that this one is deleted.
    Recalled(u64),
}

#[derive(Debug)]
struct Session {
    since: u64,
    head: u64,
    asked_ms: u64,
    welcome_ms: u64,
    steps: VecDeque<Step>,
    /// Everything up to here is judged.
    judged: u64,
    had: BTreeSet<u64>,
    recalled: BTreeSet<u64>,
}

#[derive(Debug)]
pub struct DeviceAudit {
    app: String,
    platform: String,
    prompt: bool,
    /// The newest id that it has had.
    last: u64,
    sessions: VecDeque<Session>,
    pub is_gone: bool,
}

impl DeviceAudit {
    pub fn new(app: &str, platform: &str, prompt: bool) -> Self {
        let (app, platform) = (app.to_owned(), platform.to_owned());
        Self { app, platform, prompt, last: 0, sessions: VecDeque::new(), is_gone: false }
    }

    pub fn app(&self) -> &str {
        &self.app
    }

    pub fn label(&self, number: u64) -> String {
        format!("device {number} ({} on {})", self.app, self.platform)
    }

    pub fn describe(&self) -> String {
        format!("{:?}", self.sessions.iter().flat_map(|session| session.steps.iter().take(3)).collect::<Vec<_>>())
    }

    pub fn size(&self) -> usize {
        self.sessions.iter().map(|session| 1 + session.steps.len() + session.had.len()).sum()
    }

    pub fn is_settled(&self) -> bool {
        self.sessions.iter().all(|session| session.steps.is_empty())
    }

    pub fn login(&mut self, since: u64, head: u64, cursor: u64, asked_ms: u64, welcome_ms: u64) {
        let mut steps = VecDeque::new();
        if cursor > since {
            steps.push_back(Step::Passed { cursor, at_ms: welcome_ms });
        }
        let (had, recalled) = (BTreeSet::new(), BTreeSet::new());
        self.last = self.last.max(since);
        self.sessions.push_back(Session { since, head, asked_ms, welcome_ms, steps, judged: since, had, recalled });
    }

    pub fn arrival(&mut self, arrival: &Arrival, cursor: u64) -> Result<(), String> {
        let session = self.sessions.back_mut().ok_or("it is not logged in")?;
        let last = self.last;
        self.last = last.max(arrival.id);
        if arrival.id <= last {
            let again = if arrival.id == last { "twice" } else { "out of order or twice" };
            return Err(format!("{} arrived {again}: it had {last}", arrival.id));
        }
        let (id, at_ms) = (arrival.id, arrival.arrived_ms);
        session.steps.push_back(Step::Arrived(arrival.clone()));
        if cursor > id {
            session.steps.push_back(Step::Passed { cursor, at_ms });
        }
        Ok(())
    }

    pub fn recall(&mut self, id: u64) {
        if let Some(session) = self.sessions.back_mut() {
            session.steps.push_back(Step::Recalled(id));
        }
    }

    /// I3 and I4, as far as the log is known.
    pub fn judge(&mut self, app: &AppAudit, rules: &Rules, counts: &mut Counts) -> Vec<String> {
        let mut wrong = Vec::new();
        for session in &mut self.sessions {
            session.judge(app, rules, &self.platform, self.prompt, counts, &mut wrong);
            if !session.steps.is_empty() {
                break;
            }
        }
        while self.sessions.len() > 1 && self.sessions[0].steps.is_empty() {
            self.sessions.pop_front();
        }
        wrong
    }
}

impl Session {
    fn judge(
        &mut self,
        app: &AppAudit,
        rules: &Rules,
        platform: &str,
        prompt: bool,
        counts: &mut Counts,
        wrong: &mut Vec<String>,
    ) {
        while let Some(step) = self.steps.front() {
            let (up_to, at_ms) = match step {
                Step::Recalled(_) => (0, 0),
                Step::Arrived(arrival) => (arrival.id, arrival.arrived_ms),
                Step::Passed { cursor, at_ms } => (*cursor, *at_ms),
            };
            // What was deleted or pushed out until then must be known, too.
            if up_to > app.head() || at_ms >= app.read_at_ms {
                return;
            }
            let step = self.steps.pop_front().unwrap();
            let arrived = if let Step::Arrived(arrival) = &step { arrival.id } else { 0 };
            for (id, entry) in app.between(self.judged, up_to).filter(|(id, _)| *id != arrived) {
                wrong.extend(self.missed(id, entry, at_ms, platform, rules, counts));
            }
            self.judged = self.judged.max(up_to);
            match step {
                Step::Recalled(id) => {
                    self.recalled.insert(id);
                }
                Step::Arrived(arrival) => {
                    match app.get(arrival.id) {
                        Some(entry) => wrong.extend(self.had(&arrival, entry, platform, prompt, rules)),
                        None => wrong.push(format!("I3: {} arrived, which no log has", arrival.id)),
                    }
                    self.had.insert(arrival.id);
                }
                Step::Passed { .. } => {}
            }
            while self.had.len() > REMEMBERED {
                self.had.pop_first();
            }
            while self.recalled.len() > REMEMBERED {
                self.recalled.pop_first();
            }
        }
    }

    /// An entry that it went past at `at_ms` without having it.
    fn missed(
        &self,
        id: u64,
        entry: &Entry,
        at_ms: u64,
        platform: &str,
        rules: &Rules,
        counts: &mut Counts,
    ) -> Option<String> {
        if let Some(recalled) = entry.recalls {
            // It cannot know that it went past one; but in this session it was to be told.
            let told = !self.had.contains(&recalled) || self.recalled.contains(&recalled);
            return (!told).then(|| format!("I3: it had {recalled} and was not told that {id} deleted it"));
        }
        if !entry.is_for(platform) {
            return None;
        }
        let is_live = id > self.head;
        if entry.recalled.is_some() {
            counts.recalled += u64::from(is_live);
            return None;
        }
        // Pushed out between its welcome and its turn, it is not among the newest 100 any more.
        let is_kept = entry.trimmed.is_none_or(|(_, trimmed_ms)| trimmed_ms > at_ms);
        let is_retained = entry.expires_ms > 0 && is_kept;
        let is_recent = self.since > 0 && entry.time_ms > self.welcome_ms.saturating_sub(rules.resume_ms);
        if !is_live && !is_retained && !is_recent {
            counts.away += u64::from(self.since > 0);
            return None;
        }
        if entry.expires_ms > 0 && entry.expires_ms <= at_ms + MARGIN_MS / 2 {
            counts.expired += u64::from(is_live);
            return None;
        }
        let (since, head, late) = (self.since, self.head, at_ms.saturating_sub(entry.time_ms));
        let how = if id <= head { "at its login" } else { "while it was online" };
        Some(format!("I3: {id} never arrived {how} (since {since}, head {head}); it was {late} ms old then"))
    }

    fn had(&self, arrival: &Arrival, entry: &Entry, platform: &str, prompt: bool, rules: &Rules) -> Vec<String> {
        let mut wrong = Vec::new();
        let id = arrival.id;
        let mut found = |sentence: &str| wrong.push(format!("{sentence}: {id}"));
        if entry.recalls.is_some() {
            found("I3: a recall arrived as a broadcast");
        }
        if super::hash(&arrival.content) != entry.body || arrival.time_ms != entry.time_ms {
            found("I3: it arrived with another content");
        }
        if !entry.is_for(platform) {
            found("I3: it arrived on a platform that it is not for");
        }
        if entry.recalled.is_some_and(|recall| recall <= self.head) {
            found("I4: deleted before the login, and delivered");
        }
        if id <= self.head {
            let too_old = entry.time_ms + rules.resume_ms + MARGIN_MS < self.asked_ms;
            let trimmed = entry.trimmed.is_some_and(|(by, at_ms)| by <= self.head && at_ms + MARGIN_MS < self.asked_ms);
            if entry.expires_ms == 0 && (self.since == 0 || too_old) {
                found("I3: not retained, and delivered to a device that was not there");
            }
            if trimmed && (self.since == 0 || too_old) {
                found("I4: no longer retained, and delivered");
            }
            if entry.expires_ms > 0 && entry.expires_ms + MARGIN_MS < self.asked_ms {
                found("I4: expired before the login, and delivered");
            }
        }
        if prompt && entry.expires_ms > 0 && arrival.arrived_ms > entry.expires_ms + rules.late_ms {
            found("I4: delivered after it had expired");
        }
        wrong
    }
}
