//! What must hold after every fault: the invariants I1 to I4 of the fault table, decided from what senders and devices saw.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::Value;

use super::device::Arrival;

/// What the sender was told of one accepted request.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Accepted {
    id: u64,
    expires_ms: Option<u64>,
    body: String,
}

/// Collects what was seen; every method that finds an invariant broken says so as a sentence.
#[derive(Debug, Default)]
pub struct Checker {
    sent: BTreeSet<String>,
    accepted: BTreeMap<String, Accepted>,
    ended: BTreeSet<String>,
    by_id: BTreeMap<u64, String>,
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
}

/// How many retained broadcasts a device can be given.
const MAX_RETAINED: usize = 100;

impl Checker {
    /// Notes that a request was taken by the broker.
    pub fn sent(&mut self, request: &Value) {
        self.sent.insert(request["requestId"].as_str().unwrap().to_owned());
    }

    /// Notes a verdict. The same request may have several; once accepted they must be the same (I1, I6).
    pub fn verdict(&mut self, request: &Value, reply: &Value) -> Result<(), String> {
        let request_id = request["requestId"].as_str().unwrap().to_owned();
        self.sent.insert(request_id.clone());
        self.ended.insert(request_id.clone());
        if reply["code"] != 200 {
            return match self.accepted.get(&request_id) {
                Some(_) if reply["code"] != 414 => Err(format!("{request_id} was accepted and then {reply}")),
                _ => Ok(()),
            };
        }
        let accepted = Accepted {
            id: reply["msg"]["broadcastId"].as_u64().ok_or_else(|| format!("no broadcastId in {reply}"))?,
            expires_ms: reply["msg"]["expireTime"].as_u64(),
            body: reply["msg"]["body"].as_str().unwrap_or_default().to_owned(),
        };
        if let Some(other) = self.by_id.insert(accepted.id, request_id.clone())
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

    /// How many requests were accepted.
    pub fn accepted(&self) -> usize {
        self.accepted.len()
    }

    /// The ids of all that were accepted, ascending, and until when each is valid (milliseconds since the Unix epoch).
    pub fn ids(&self) -> Vec<(u64, Option<u64>)> {
        self.by_id.iter().map(|(id, request_id)| (*id, self.accepted[request_id].expires_ms)).collect()
    }

    /// I2: every request ended.
    pub fn every_request_ended(&self) -> Result<(), String> {
        let open: Vec<&String> = self.sent.difference(&self.ended).take(10).collect();
        if open.is_empty() { Ok(()) } else { Err(format!("requests without an end: {open:?}, perhaps more")) }
    }

    /// I3 and I4 for one device that joined at `joined_ms` (milliseconds since the Unix epoch).
    pub fn device(&self, history: &[Arrival], must: Must, joined_ms: u64) -> Result<(), String> {
        in_order(history)?;
        let mut had: HashMap<u64, &Arrival> = history.iter().map(|arrival| (arrival.id, arrival)).collect();
        let mut from_retained = 0;
        for (id, request_id) in &self.by_id {
            let accepted = &self.accepted[request_id];
            let due = match must {
                Must::Everything => true,
                Must::After(since) => *id > since,
                Must::RetainedUpTo(head) => *id > head || accepted.expires_ms.is_some_and(|until| until > joined_ms),
            };
            match had.remove(id) {
                None if due => return Err(format!("{request_id} (id {id}) never arrived")),
                Some(_) if !due => return Err(format!("{request_id} (id {id}) arrived and should not have")),
                None => {}
                Some(arrival) => {
                    if arrival.content != accepted.body {
                        return Err(format!("{request_id} (id {id}) arrived with another content"));
                    }
                    // When the test read it, which says little of when it was sent: row 32 has tests that know that.
                    if accepted.expires_ms.is_some_and(|until| arrival.arrived_ms > until + 1000) {
                        return Err(format!("{request_id} (id {id}) arrived after it had expired"));
                    }
                    from_retained += usize::from(matches!(must, Must::RetainedUpTo(head) if *id <= head));
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
}
