//! What must hold after every fault: the invariants I1 to I4 and I6 of the fault table, decided from what senders and devices
//! saw, and from what Redis holds. (I5: [`super::resources`]. For runs that go on for long: [`super::audit`].)

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::Value;

use super::device::Arrival;
use super::journal::{Attempt, Journal};
use super::sender::{ANONYMOUS, DeadLetter};
use super::stored::Stored;

/// What the sender was told of one accepted request.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Accepted {
    id: u64,
    time_ms: u64,
    expires_ms: Option<u64>,
    body: String,
    /// Empty: every platform.
    targets: Vec<String>,
}

/// Collects what was seen; every method that finds an invariant broken says so as a sentence.
#[derive(Debug, Default)]
pub struct Checker {
    /// Every request that was sent: how often, and how many of those times its sender was told no (or that nothing was sent).
    attempts: BTreeMap<String, Attempts>,
    /// Those that certainly arrived where they are decided.
    sent: BTreeSet<String>,
    /// Those whose sender was told 416.
    refused: BTreeSet<String>,
    accepted: BTreeMap<String, Accepted>,
    /// What was asked with an accepted request id.
    asked: BTreeMap<String, Value>,
    ended: BTreeSet<String>,
    /// By app and id: which request.
    by_id: BTreeMap<(String, u64), String>,
    recalled: BTreeSet<u64>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Attempts {
    made: usize,
    told_no: usize,
}

/// What a device ought to have had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Must {
    /// Everything accepted: it was online, or resumed in time, all along.
    Everything,
    /// Everything after this id.
    After(u64),
    /// Only what is retained and valid, of what was accepted up to this id; everything after it.
    RetainedUpTo(u64),
    /// The same for a device with a cursor that came back too late to count as online: nothing up to its cursor.
    RetainedBetween {
        /// The cursor that it presented.
        since: u64,
        /// The head that its welcome named.
        head: u64,
    },
}

/// How many retained broadcasts a device can be given.
const MAX_RETAINED: usize = 100;
/// A frame that was sent in time may arrive a moment later; the clocks are one machine's. Milliseconds.
const MARGIN_MS: u64 = 1000;
const DAY_MS: u64 = 86_400_000;

/// What the ledger compares of two requests with the same id, as far as the tests use it.
fn content(request: &Value) -> Vec<Value> {
    let mut fields =
        ["appKey", "from", "body", "ttl", "ttlSeconds", "targetOs"].map(|name| request[name].clone()).to_vec();
    fields.push((request["isOffline"] == true).into());
    fields
}

fn app_of(request: &Value) -> String {
    request["appKey"].as_str().unwrap_or_default().to_owned()
}

impl Checker {
    /// Notes that a request was sent, and taken by the broker; once for each time.
    pub fn sent(&mut self, request: &Value) {
        let request_id = request["requestId"].as_str().unwrap();
        self.attempts.entry(request_id.to_owned()).or_default().made += 1;
        self.sent.insert(request_id.to_owned());
    }

    /// Notes everything that the journal of an app says, in the order in which it was sent.
    pub fn journal(&mut self, journal: &Journal) -> Result<(), String> {
        journal.recalls().into_iter().for_each(|id| self.recalled(id));
        journal.attempts().iter().try_for_each(|attempt| self.attempt(attempt))?;
        journal.dead_letters().iter().for_each(|id| self.dead_lettered(id));
        Ok(())
    }

    /// Notes one attempt and all that was told of it, which must be one verdict (I6).
    fn attempt(&mut self, attempt: &Attempt) -> Result<(), String> {
        let request_id = attempt.request["requestId"].as_str().unwrap();
        let said = |reply: &Value| (reply["code"].clone(), reply["msg"].clone());
        if let Some(other) = attempt.told.iter().find(|reply| said(reply) != said(&attempt.told[0])) {
            return Err(format!("{request_id} was sent once and told {} and {other}", attempt.told[0]));
        }
        let attempts = self.attempts.entry(request_id.to_owned()).or_default();
        attempts.made += 1;
        let told_no = attempt.told.iter().any(|reply| ![Some(200), Some(500)].contains(&reply["code"].as_u64()));
        attempts.told_no += usize::from(told_no);
        if attempt.taken {
            self.sent.insert(request_id.to_owned());
        }
        attempt.told.iter().try_for_each(|reply| self.verdict(&attempt.request, reply))
    }

    /// Notes a verdict. The same request may have several; once accepted they must be the same (I1, I6). Refused first and then
    /// accepted is for those only that were sent again. The answers 500 and 503 of the API are no verdicts: the one leaves the
    /// request open, with the other nothing was sent.
    pub fn verdict(&mut self, request: &Value, reply: &Value) -> Result<(), String> {
        let request_id = request["requestId"].as_str().unwrap().to_owned();
        match reply["code"].as_u64() {
            Some(503) | None => return Ok(()),
            Some(500) => {
                self.sent.insert(request_id);
                return Ok(());
            }
            _ => {}
        }
        self.ended.insert(request_id.clone());
        let asked_before = self.asked.get(&request_id);
        if reply["code"] != 200 {
            // Another content under the same id is malformed, and only that.
            if reply["code"] == 416 {
                self.refused.insert(request_id.clone());
            }
            return match asked_before {
                Some(before) if reply["code"] != 414 || content(before) == content(request) => {
                    Err(format!("{request_id} was accepted and then {reply}"))
                }
                _ => Ok(()),
            };
        }
        if asked_before.is_some_and(|before| content(before) != content(request)) {
            return Err(format!("{request_id} was accepted with another content before: {reply}"));
        }
        let made = self.attempts.get(&request_id).map_or(0, |attempts| attempts.made);
        if self.refused.contains(&request_id) && !self.accepted.contains_key(&request_id) && made < 2 {
            return Err(format!("{request_id} was refused and then accepted, and sent {made} times: {reply}"));
        }
        self.asked.insert(request_id.clone(), request.clone());
        let targets = request["targetOs"].as_array().map(Vec::as_slice).unwrap_or_default();
        let accepted = Accepted {
            id: reply["msg"]["broadcastId"].as_u64().ok_or_else(|| format!("no broadcastId in {reply}"))?,
            time_ms: reply["msg"]["createTime"].as_u64().unwrap_or_default(),
            expires_ms: reply["msg"]["expireTime"].as_u64(),
            body: reply["msg"]["body"].as_str().unwrap_or_default().to_owned(),
            targets: targets.iter().map(|target| target.as_str().unwrap_or_default().to_owned()).collect(),
        };
        let place = (app_of(request), accepted.id);
        if let Some(other) = self.by_id.insert(place, request_id.clone())
            && other != request_id
        {
            return Err(format!("id {} was given to {other} and to {request_id}", accepted.id));
        }
        match self.accepted.insert(request_id.clone(), accepted.clone()) {
            Some(before) if before != accepted => {
                Err(format!("{request_id} had two verdicts: {before:?} and {accepted:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Notes the verdicts of many requests, which must all be accepted.
    pub fn all_accepted(&mut self, requests: &[Value], replies: &[Value]) {
        assert_eq!(requests.len(), replies.len());
        for (request, reply) in requests.iter().zip(replies) {
            assert_eq!(reply["code"], 200, "{reply}");
            self.verdict(request, reply).unwrap();
        }
    }

    /// Notes that a request ended as a dead letter.
    pub fn dead_lettered(&mut self, request_id: &str) {
        self.ended.insert(request_id.to_owned());
    }

    /// Notes what [`super::sender::Amqp::dead_letters`] took from the queue; those that name no request are counted only.
    /// Returns the ids of the others.
    pub fn dead_letters(&mut self, letters: &[DeadLetter]) -> Vec<String> {
        let ids = letters.iter().filter_map(|letter| {
            let request: Value = serde_json::from_slice(&letter.payload).ok()?;
            Some(request["requestId"].as_str()?.to_owned())
        });
        let ids: Vec<String> = ids.collect();
        ids.iter().for_each(|id| self.dead_lettered(id));
        ids
    }

    /// Notes that the broadcast of this id was deleted: no device must have had it, but every one may.
    pub fn recalled(&mut self, id: u64) {
        self.recalled.insert(id);
    }

    /// How many requests were accepted.
    pub fn accepted(&self) -> usize {
        self.accepted.len()
    }

    /// The ids of all that were accepted (of one app: use it where there is but one), ascending, and until when each is valid (milliseconds since the Unix epoch).
    pub fn ids(&self) -> Vec<(u64, Option<u64>)> {
        self.by_id.iter().map(|((_, id), request_id)| (*id, self.accepted[request_id].expires_ms)).collect()
    }

    /// I2: every request ended.
    pub fn every_request_ended(&self) -> Result<(), String> {
        let open: Vec<&String> = self.sent.difference(&self.ended).take(10).collect();
        if open.is_empty() { Ok(()) } else { Err(format!("requests without an end: {open:?}, perhaps more")) }
    }

    fn of_app(&self, app: &str) -> impl Iterator<Item = (u64, &str, &Accepted)> {
        let range = self.by_id.range((app.to_owned(), 0)..=(app.to_owned(), u64::MAX));
        range.map(|((_, id), request_id)| (*id, request_id.as_str(), &self.accepted[request_id]))
    }

    /// I1: ids increase in the order of acceptance, per app.
    pub fn in_order_of_acceptance(&self) -> Result<(), String> {
        let mut last: Option<(&str, u64, u64)> = None;
        for ((app, id), request_id) in &self.by_id {
            let time_ms = self.accepted[request_id].time_ms;
            if let Some((_, before, _)) = last.filter(|(of, _, at)| of == app && *at > time_ms) {
                return Err(format!("{app}: id {id} was accepted before {before}"));
            }
            last = Some((app, *id, time_ms));
        }
        Ok(())
    }

    /// I1: no more than the limit in any 60 seconds.
    pub fn within_limit(&self, app: &str, per_minute: usize) -> Result<(), String> {
        let mut times: Vec<u64> = self.of_app(app).map(|(_, _, accepted)| accepted.time_ms).collect();
        times.sort_unstable();
        for window in times.windows(per_minute + 1) {
            let (first, last) = (window[0], window[per_minute]);
            if last - first < 60_000 {
                return Err(format!("{app}: {} were accepted within {} ms", per_minute + 1, last - first));
            }
        }
        Ok(())
    }

    /// I1: in the log each request stands once, as what its sender was told; one that was refused each time that it was sent does
    /// not. What nobody was told of is noted as accepted, which is an end.
    fn logged(&mut self, app: &str, envelope: &Value) -> Result<(), String> {
        let id = envelope["id"].as_u64().ok_or_else(|| format!("{app}: no id in {envelope}"))?;
        let request_id = envelope["requestId"].as_str().unwrap_or_default();
        let attempts = self.attempts.get(request_id).copied().unwrap_or_default();
        match (self.by_id.get(&(app.to_owned(), id)), self.accepted.get(request_id)) {
            (Some(known), _) if known == request_id || known.starts_with(ANONYMOUS) => return Ok(()),
            (Some(known), _) => {
                return Err(format!("{app}: {id} is {request_id} in the log, and {known} to its sender"));
            }
            (None, Some(told)) => {
                return Err(format!("{app}: {request_id} was accepted as {id}, and its sender told {}", told.id));
            }
            (None, None) if attempts.made == 0 => return Err(format!("{app}: {request_id} ({id}) was sent by nobody")),
            (None, None) if attempts.told_no == attempts.made => {
                return Err(format!("{app}: {request_id} was told each time that it is refused, and sent as {id}"));
            }
            (None, None) => {}
        }
        let strings = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).unwrap_or_default() };
        let accepted = Accepted {
            id,
            time_ms: envelope["time"].as_u64().unwrap_or_default(),
            expires_ms: envelope["expires"].as_u64().filter(|at| *at > 0),
            body: envelope["body"].as_str().unwrap_or_default().to_owned(),
            targets: strings(&envelope["targetOs"]),
        };
        self.ended.insert(request_id.to_owned());
        self.by_id.insert((app.to_owned(), id), request_id.to_owned());
        self.accepted.insert(request_id.to_owned(), accepted);
        Ok(())
    }

    /// I1, accepted once and the quota charged once; I2, what was accepted stands in the log; I4, what is retained: against what
    /// Redis holds of an app at `now_ms`. Everything that was sent for the app must be known here. `log_keeps`: how many entries
    /// the log has at the least, if so many were accepted.
    pub fn stored(&mut self, app: &str, stored: &Stored, log_keeps: usize, now_ms: u64) -> Result<(), String> {
        stored.broadcasts.iter().try_for_each(|envelope| self.logged(app, envelope))?;
        self.held(app, stored, log_keeps, now_ms)
    }

    fn held(&self, app: &str, stored: &Stored, log_keeps: usize, now_ms: u64) -> Result<(), String> {
        let of_day = |day: u64| self.of_app(app).filter(|(_, _, accepted)| accepted.time_ms / DAY_MS == day).count();
        if let Some((day, charged)) = stored.day
            && of_day(day) as u64 != charged
        {
            return Err(format!("{app}: {charged} were charged on day {day}, {} accepted", of_day(day)));
        }
        if let Some((second, charged)) = stored.minute {
            let from_ms = second.saturating_sub(60) * 1000;
            let accepted = self.of_app(app).filter(|(_, _, accepted)| accepted.time_ms >= from_ms).count() as u64;
            if accepted != charged {
                return Err(format!("{app}: {charged} were charged in the last minute, {accepted} accepted"));
            }
        }
        let logged: BTreeSet<u64> = stored.log.iter().copied().collect();
        if logged.len() != stored.log.len() {
            return Err(format!("{app}: an id stands twice in the log"));
        }
        let is_lost = |id: &u64| !logged.contains(id) && !self.recalled.contains(id);
        let newest = self.of_app(app).skip(self.of_app(app).count().saturating_sub(log_keeps));
        if let Some((id, request_id, _)) = newest.into_iter().find(|(id, ..)| is_lost(id)) {
            return Err(format!("{app}: {request_id} was accepted as {id}, which is not in the log"));
        }
        if stored.retained.len() > MAX_RETAINED {
            return Err(format!("{app}: {} are retained", stored.retained.len()));
        }
        let certain = |expires_ms: u64| expires_ms > now_ms + MARGIN_MS;
        let ought = self.retained(app, u64::MAX);
        if let Some(id) = ought.iter().find(|(id, at)| certain(**at) && !stored.retained.contains_key(id)) {
            return Err(format!("{app}: {} is valid and not retained", id.0));
        }
        match stored.retained.iter().find(|(id, at)| certain(**at) && !ought.contains_key(id)) {
            Some((id, _)) => Err(format!("{app}: {id} is retained and should not be")),
            None => Ok(()),
        }
    }

    /// What was retained when `head` was the newest id: id, and until when it is valid. The newest 100 of those that were valid
    /// whenever one was added.
    fn retained(&self, app: &str, head: u64) -> BTreeMap<u64, u64> {
        let mut retained: BTreeMap<u64, u64> = BTreeMap::new();
        for (id, _, accepted) in self.of_app(app).filter(|(id, ..)| *id <= head && !self.recalled.contains(id)) {
            let Some(expires_ms) = accepted.expires_ms else { continue };
            retained.retain(|_, expires_ms| *expires_ms > accepted.time_ms);
            retained.insert(id, expires_ms);
            if retained.len() > MAX_RETAINED {
                retained.pop_first();
            }
        }
        retained
    }

    /// I3 and I4 for one device that joined at `joined_ms` (milliseconds since the Unix epoch), on a platform that everything
    /// was for, where all requests are of one app.
    pub fn device(&self, history: &[Arrival], must: Must, joined_ms: u64) -> Result<(), String> {
        let apps: BTreeSet<&String> = self.by_id.keys().map(|(app, _)| app).collect();
        assert!(apps.len() <= 1, "requests of {apps:?}: say of which app the device is");
        let app = apps.first().map_or("", |app| app.as_str());
        self.device_of(app, None, history, must, joined_ms)
    }

    /// The same where there are several apps, or requests for some platforms only (`None`: everything was for it).
    pub fn device_of(
        &self,
        app: &str,
        platform: Option<&str>,
        history: &[Arrival],
        must: Must,
        joined_ms: u64,
    ) -> Result<(), String> {
        in_order(history)?;
        let mut had: HashMap<u64, &Arrival> = history.iter().map(|arrival| (arrival.id, arrival)).collect();
        let (from, head) = match must {
            Must::Everything => (0, 0),
            Must::After(since) => (since, since),
            Must::RetainedUpTo(head) => (0, head),
            Must::RetainedBetween { since, head } => (since, head),
        };
        let retained = self.retained(app, head);
        let mut from_retained = 0;
        for (id, request_id, accepted) in self.of_app(app) {
            let is_for =
                platform.is_none_or(|name| accepted.targets.is_empty() || accepted.targets.iter().any(|t| t == name));
            let expires_ms = retained.get(&id).copied();
            let is_due = is_for && id > from && (id > head || expires_ms.is_some_and(|at| at > joined_ms));
            // At the very moment of its login it may or may not be valid.
            let on_the_edge = id <= head && expires_ms.is_some_and(|at| at.abs_diff(joined_ms) < MARGIN_MS);
            match had.remove(&id) {
                None if is_due && !on_the_edge && !self.recalled.contains(&id) => {
                    return Err(format!("{request_id} (id {id}) never arrived"));
                }
                Some(_) if !is_due && !on_the_edge && !self.recalled.contains(&id) => {
                    return Err(format!("{request_id} (id {id}) arrived and should not have"));
                }
                None => {}
                Some(arrival) => {
                    if arrival.content != accepted.body {
                        return Err(format!("{request_id} (id {id}) arrived with another content"));
                    }
                    // When the test read it, which says little of when it was sent: row 32 has tests that know that.
                    if accepted.expires_ms.is_some_and(|until| arrival.arrived_ms > until + MARGIN_MS) {
                        return Err(format!("{request_id} (id {id}) arrived after it had expired"));
                    }
                    from_retained += usize::from(id <= head);
                }
            }
        }
        if from_retained > MAX_RETAINED {
            return Err(format!("{from_retained} retained broadcasts were delivered"));
        }
        match had.keys().min() {
            None => Ok(()),
            Some(id) => Err(format!("id {id} arrived, but no sender was told of it")),
        }
    }
}

/// Ids strictly increase: in order, and none twice.
pub fn in_order(history: &[Arrival]) -> Result<(), String> {
    for pair in history.windows(2) {
        if pair[1].id == pair[0].id {
            return Err(format!("id {} arrived twice", pair[0].id));
        }
        if pair[1].id < pair[0].id {
            return Err(format!("id {} arrived after {}", pair[1].id, pair[0].id));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn arrival(id: u64) -> Arrival {
        Arrival { id, time_ms: 0, from: String::new(), content: format!("body {id}"), arrived_ms: 0 }
    }

    fn checker(ids: &[u64]) -> Checker {
        let mut checker = Checker::default();
        for id in ids {
            checker.verdict(&json!({"requestId": format!("r{id}")}), &reply(*id)).unwrap();
        }
        checker
    }

    fn reply(id: u64) -> Value {
        json!({"code": 200, "msg": {"broadcastId": id, "body": format!("body {id}")}})
    }

    fn device(ids: &[u64], must: Must) -> Result<(), String> {
        let history: Vec<Arrival> = ids.iter().copied().map(arrival).collect();
        checker(&[1, 2, 3]).device(&history, must, 0)
    }

    #[test]
    fn a_whole_history_passes_and_every_flaw_is_found() {
        device(&[1, 2, 3], Must::Everything).unwrap();
        device(&[2, 3], Must::After(1)).unwrap();
        device(&[3], Must::RetainedUpTo(2)).unwrap();
        for (ids, flaw) in [
            (&[1, 2][..], "never arrived"),
            (&[1, 2, 2, 3], "twice"),
            (&[1, 3, 2], "after"),
            (&[1, 2, 3, 4], "no sender"),
        ] {
            assert!(device(ids, Must::Everything).unwrap_err().contains(flaw), "{ids:?}");
        }
        assert!(device(&[1, 2, 3], Must::After(1)).unwrap_err().contains("should not"));
    }

    #[test]
    fn two_verdicts_one_id_for_two_and_an_open_request_are_found() {
        let mut checker = checker(&[1]);
        checker.verdict(&json!({"requestId": "r1"}), &reply(1)).unwrap();
        assert!(checker.verdict(&json!({"requestId": "r2"}), &reply(1)).is_err());
        assert!(checker.verdict(&json!({"requestId": "r1"}), &reply(9)).is_err());
        checker.every_request_ended().unwrap();
        checker.sent(&json!({"requestId": "r3"}));
        assert!(checker.every_request_ended().is_err());
    }

    #[test]
    fn a_late_arrival_is_found() {
        let mut checker = Checker::default();
        let mut reply = reply(1);
        reply["msg"]["expireTime"] = 5_000.into();
        checker.verdict(&json!({"requestId": "r1"}), &reply).unwrap();
        let late = Arrival { arrived_ms: 6_001, ..arrival(1) };
        checker.device(&[arrival(1)], Must::Everything, 0).unwrap();
        assert!(checker.device(&[late], Must::Everything, 0).is_err());
    }

    fn expect(result: Result<(), String>, flaw: &str) {
        match result {
            Ok(()) => assert_eq!(flaw, ""),
            Err(found) => assert!(!flaw.is_empty() && found.contains(flaw), "expected {flaw:?}, found {found:?}"),
        }
    }

    #[test]
    fn a_verdict_that_changes_is_found() {
        let asked = json!({"requestId": "r1", "body": "a"});
        let other = json!({"requestId": "r1", "body": "b"});
        let accepted = || {
            let mut checker = Checker::default();
            checker.verdict(&asked, &reply(1)).unwrap();
            checker
        };
        let code = |code: u64| json!({ "code": code });
        expect(accepted().verdict(&asked, &code(416)), "was accepted and then");
        expect(accepted().verdict(&asked, &code(414)), "was accepted and then");
        expect(accepted().verdict(&other, &code(414)), "");
        expect(accepted().verdict(&other, &reply(1)), "another content before");
        // "Unknown" and "nothing was sent" are no verdicts.
        expect(accepted().verdict(&asked, &code(500)), "");
        // Refused, and accepted when it was sent again; not by itself.
        for (sent, flaw) in [(1, "refused and then accepted, and sent 1 times"), (2, "")] {
            let mut checker = Checker::default();
            (0..sent).for_each(|_| checker.sent(&asked));
            checker.verdict(&asked, &code(416)).unwrap();
            expect(checker.verdict(&asked, &reply(1)), flaw);
        }
        let mut checker = Checker::default();
        checker.verdict(&asked, &code(503)).unwrap();
        checker.every_request_ended().unwrap();
        checker.verdict(&asked, &code(500)).unwrap();
        expect(checker.every_request_ended(), "without an end");
        let payload = asked.to_string().into_bytes();
        let letter = DeadLetter { headers: HashMap::new(), payload, has_expiration: false };
        assert_eq!(checker.dead_letters(&[letter]), ["r1"]);
        checker.every_request_ended().unwrap();
    }

    /// Accepted a second after each other, of one app, retained for an hour.
    fn hour(count: u64) -> Checker {
        let mut checker = Checker::default();
        for id in 1..=count {
            let mut reply = reply(id);
            reply["msg"]["createTime"] = (id * 1000).into();
            reply["msg"]["expireTime"] = (id * 1000 + 3_600_000).into();
            checker.verdict(&json!({"requestId": format!("r{id}"), "appKey": "a"}), &reply).unwrap();
        }
        checker
    }

    #[test]
    fn ids_out_of_the_order_of_acceptance_and_too_many_of_them_are_found() {
        let mut checker = hour(11);
        expect(checker.in_order_of_acceptance(), "");
        expect(checker.within_limit("a", 11), "");
        expect(checker.within_limit("a", 10), "11 were accepted within 10000 ms");
        let mut early = reply(12);
        early["msg"]["createTime"] = 5_000.into();
        // Of another app it would be in order.
        checker.verdict(&json!({"requestId": "r12", "appKey": "b"}), &early).unwrap();
        expect(checker.in_order_of_acceptance(), "");
        checker.verdict(&json!({"requestId": "r13", "appKey": "a"}), &early).unwrap();
        expect(checker.in_order_of_acceptance(), "id 12 was accepted before 11");
    }

    #[test]
    fn what_redis_holds_is_held_against_the_verdicts() {
        let whole = Stored {
            retained: (21..=120).map(|id| (id, id * 1000 + 3_600_000)).collect(),
            day: Some((0, 120)),
            minute: Some((120, 61)),
            log: (1..=120).collect(),
            broadcasts: Vec::new(),
        };
        let check = |change: fn(&mut Stored)| {
            let mut stored = whole.clone();
            change(&mut stored);
            hour(120).stored("a", &stored, 120, 121_000)
        };
        expect(check(|_| {}), "");
        expect(check(|stored| stored.day = Some((0, 121))), "121 were charged on day 0");
        expect(check(|stored| stored.minute = Some((120, 62))), "62 were charged in the last minute");
        expect(check(|stored| stored.log.retain(|id| *id != 4)), "which is not in the log");
        let mut trimmed = whole.clone();
        trimmed.log.retain(|id| *id > 20);
        expect(hour(120).stored("a", &trimmed, 100, 121_000), "");
        expect(hour(120).stored("a", &trimmed, 101, 121_000), "r20 was accepted as 20, which is not in the log");
        expect(check(|stored| stored.log.push(120)), "twice");
        expect(check(|stored| stored.retained.retain(|id, _| *id != 30)), "30 is valid and not retained");
        expect(check(|stored| stored.retained.extend([(20, 3_620_000)])), "101 are retained");
        let mut changed = whole.clone();
        changed.retained.remove(&21);
        changed.retained.insert(20, 3_620_000);
        expect(hour(120).stored("a", &changed, 120, 121_000), "21 is valid");
        let mut checker = hour(120);
        checker.recalled(120);
        expect(checker.stored("a", &whole, 120, 121_000), "20 is valid");
    }

    #[test]
    fn the_log_is_held_against_what_was_sent_and_told() {
        let request = |id: &str| json!({"requestId": id, "appKey": "a", "body": "body"});
        let told = |id: &str, told: &[Value]| Attempt { request: request(id), taken: true, told: told.to_vec() };
        let code = |code: u64| json!({ "code": code });
        let check = |attempts: &[Attempt], log: &[(u64, &str)]| {
            let mut checker = Checker::default();
            attempts.iter().try_for_each(|attempt| checker.attempt(attempt))?;
            let envelope =
                |(id, request): &(u64, &str)| json!({"id": id, "requestId": request, "expires": 0, "time": 1});
            let stored = Stored {
                log: log.iter().map(|(id, _)| *id).collect(),
                broadcasts: log.iter().map(envelope).collect(),
                ..Stored::default()
            };
            checker.stored("a", &stored, 100, 1)?;
            checker.every_request_ended()
        };
        expect(check(&[told("r", &[reply(1)])], &[(1, "r")]), "");
        // Accepted, and nobody was told.
        expect(check(&[told("r", &[])], &[(1, "r")]), "");
        expect(check(&[told("r", &[])], &[]), "without an end: [\"r\"]");
        expect(check(&[told("r", &[reply(1)])], &[(1, "r"), (2, "r")]), "r was accepted as 2, and its sender told 1");
        expect(check(&[told("r", &[])], &[(1, "r"), (2, "r")]), "r was accepted as 2, and its sender told 1");
        expect(check(&[told("r", &[reply(1)])], &[(1, "s")]), "is s in the log, and r to its sender");
        expect(check(&[told("anonymous-1", &[reply(1)])], &[(1, "s")]), "");
        expect(check(&[], &[(1, "r")]), "sent by nobody");
        for no in [414, 416, 503] {
            expect(check(&[told("r", &[code(no)])], &[(1, "r")]), "refused, and sent as 1");
        }
        expect(check(&[told("r", &[code(416)]), told("r", &[])], &[(1, "r")]), "");
        expect(check(&[told("r", &[code(416)]), told("r", &[reply(1)])], &[(1, "r")]), "");
        expect(check(&[told("r", &[code(416), reply(1)])], &[(1, "r")]), "sent once and told");
        expect(check(&[told("r", &[reply(1), reply(2)])], &[(1, "r")]), "sent once and told");
        expect(check(&[told("r", &[reply(1), reply(1)])], &[(1, "r")]), "");
        // Of a call that says "unknown" an end is wanted; where nothing was sent, none.
        expect(check(&[told("r", &[code(500)])], &[]), "without an end");
        let nothing = Attempt { taken: false, ..told("r", &[code(503)]) };
        expect(check(&[nothing], &[]), "");
    }

    #[test]
    fn a_device_that_comes_late_gets_the_newest_hundred_of_its_app_and_platform() {
        let mut checker = hour(120);
        checker.verdict(&json!({"requestId": "other", "appKey": "b"}), &reply(500)).unwrap();
        let mut web = reply(121);
        web["msg"]["createTime"] = 121_000.into();
        checker.verdict(&json!({"requestId": "w", "appKey": "a", "targetOs": ["web"]}), &web).unwrap();
        let device = |ids: std::ops::RangeInclusive<u64>, platform, must| {
            let history: Vec<Arrival> = ids.map(arrival).collect();
            checker.device_of("a", Some(platform), &history, must, 121_500)
        };
        let late = Must::RetainedUpTo(120);
        expect(device(21..=121, "web", late), "");
        expect(device(21..=120, "web", late), "id 121) never arrived");
        expect(device(21..=120, "ios", late), "");
        expect(device(21..=121, "ios", late), "should not have");
        expect(device(20..=121, "web", late), "should not have");
        expect(device(22..=121, "web", late), "id 21) never arrived");
        let resumed = Must::RetainedBetween { since: 50, head: 120 };
        expect(device(51..=121, "web", resumed), "");
        expect(device(50..=121, "web", resumed), "should not have");
        expect(device(52..=121, "web", resumed), "id 51) never arrived");
    }
}
