//! A history without a flaw passes; each flaw is found.
#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};

use super::super::broadcastd::App;
use super::super::device::Arrival;
use super::{Audit, Rules};

const START: u64 = 1_764_000_000_000;
const SINCE: u64 = 1000;

/// One app, its requests, its log and a device; every step a second after the one before.
struct Story {
    audit: Audit,
    app: String,
    now_ms: u64,
    log: Vec<Value>,
    device: u64,
}

impl Story {
    fn new(app: App) -> Self {
        let rules = Rules { dedupe_ms: 300_000, resume_ms: 60_000, patience_ms: 100_000, late_ms: 5_000 };
        let mut audit = Audit::new(std::slice::from_ref(&app), rules);
        let device = audit.device(&app.key, "web", true);
        Self { audit, app: app.key, now_ms: START, log: Vec::new(), device }
    }

    /// A story in which the device is online from the start.
    fn online() -> Self {
        let mut story = Self::new(App::unlimited());
        story.login(SINCE, SINCE);
        story
    }

    fn request(&self, id: &str) -> Value {
        json!({ "requestId": id, "appKey": self.app, "body": format!("body of {id}") })
    }

    fn send(&mut self, id: &str) {
        let request = self.request(id);
        self.audit.sending(&request, false, self.now_ms);
    }

    fn tell(&mut self, id: &str, reply: &Value) -> bool {
        self.audit.told(id, reply, self.now_ms)
    }

    fn append(&mut self, id: u64, request: &str, change: &Value) {
        self.now_ms += 1000;
        let prev = self.log.last().map_or(0, |entry| entry["id"].as_u64().unwrap());
        let mut entry = json!({ "id": id, "prev": prev, "time": self.now_ms, "expires": 0, "requestId": request,
            "body": format!("body of {request}") });
        for (name, value) in change.as_object().unwrap() {
            entry[name] = value.clone();
        }
        self.log.push(entry.clone());
        self.audit.log(&self.app.clone(), &[entry], self.now_ms + 1);
    }

    /// Sent, accepted, told.
    fn accept(&mut self, id: u64, change: &Value) {
        let request = format!("r{id}");
        self.send(&request);
        self.append(id, &request, change);
        self.tell(&request, &json!({ "code": 200, "msg": { "broadcastId": id } }));
    }

    fn login(&mut self, since: u64, head: u64) {
        self.audit.login(self.device, since, head, since.max(head), self.now_ms, self.now_ms);
    }

    fn arrive(&mut self, id: u64) {
        let entry = self.log.iter().find(|entry| entry["id"] == id).unwrap_or(&Value::Null);
        let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        let arrival = Arrival {
            id,
            time_ms: entry["time"].as_u64().unwrap_or(0),
            from: text("from"),
            content: text("body"),
            arrived_ms: self.now_ms,
        };
        self.audit.arrival(self.device, &arrival, id);
    }

    /// Everything found, in one string.
    fn end(mut self) -> String {
        self.audit.log(&self.app.clone(), &[], self.now_ms + 1);
        self.audit.finish(self.now_ms);
        self.audit.take_violations().join("\n")
    }
}

fn expect(story: Story, flaw: &str) {
    let found = story.end();
    if flaw.is_empty() {
        assert_eq!(found, "");
    } else {
        assert!(found.contains(flaw), "expected {flaw:?}, found {found:?}");
    }
}

#[test]
fn a_whole_story_passes() {
    let mut story = Story::online();
    for id in 2001..2010 {
        story.accept(id, &json!({}));
        story.arrive(id);
    }
    // Not for this platform; then the session ends and the device comes back in time.
    story.accept(2010, &json!({ "targetOs": ["ios"] }));
    story.accept(2011, &json!({}));
    story.login(2009, 2009);
    story.arrive(2011);
    expect(story, "");
}

#[test]
fn flaws_of_what_a_device_had_are_found() {
    let ids = [2001, 2002, 2003, 2004];
    for (arrivals, flaw) in [
        (&[2001, 2002, 2003, 2004][..], ""),
        (&[2001, 2003, 2004], "2002 never arrived"),
        (&[2001, 2001, 2002, 2003, 2004], "twice"),
        (&[2001, 2003, 2002, 2004], "out of order"),
        (&[2001, 2002, 2003, 2004, 2005], "no log has"),
    ] {
        let mut story = Story::online();
        ids.iter().for_each(|id| story.accept(*id, &json!({})));
        if arrivals.contains(&2005) {
            // An id between two that are there.
            story.accept(2006, &json!({ "targetOs": ["ios"] }));
        }
        arrivals.iter().for_each(|id| story.arrive(*id));
        expect(story, flaw);
    }
    // What nobody ever accepted stays open until the end.
    let mut story = Story::online();
    story.arrive(2001);
    expect(story, "no log has");
    let mut story = Story::online();
    story.accept(2001, &json!({ "targetOs": ["ios"] }));
    story.arrive(2001);
    expect(story, "a platform that it is not for");
    let mut story = Story::online();
    story.accept(2001, &json!({}));
    story.log[0]["body"] = "another".into();
    story.arrive(2001);
    expect(story, "another content");
}

#[test]
fn a_device_that_was_away_gets_what_is_promised_and_no_more() {
    let away = |seconds: u64, since: u64, change: Value| {
        let mut story = Story::new(App::unlimited());
        story.accept(2001, &change);
        story.now_ms += seconds * 1000;
        story.login(since, 2001);
        story
    };
    expect(away(10, SINCE, json!({})), "never arrived at its login");
    expect(away(70, SINCE, json!({})), "");
    expect(away(10, 0, json!({})), "");
    expect(away(70, 0, json!({ "expires": START + 100_000 })), "never arrived at its login");
    expect(away(70, 0, json!({ "expires": START + 50_000 })), "");
    // The same, but what was pending arrives.
    let pending = |change: Value, seconds: u64| {
        let mut story = Story::new(App::unlimited());
        story.accept(2001, &change);
        story.now_ms += seconds * 1000;
        story.audit.login(story.device, 0, 2001, 0, story.now_ms, story.now_ms);
        story.arrive(2001);
        story
    };
    expect(pending(json!({ "expires": START + 100_000 }), 10), "");
    expect(pending(json!({}), 10), "a device that was not there");
    expect(pending(json!({ "expires": START + 50_000 }), 70), "I4: expired before the login");
}

#[test]
fn what_expires_or_is_deleted_is_never_late() {
    let mut story = Story::online();
    story.accept(2001, &json!({ "expires": START + 5_000 }));
    story.now_ms += 20_000;
    story.arrive(2001);
    expect(story, "delivered after it had expired");

    // Not had, and gone by the time that the next one came.
    let mut story = Story::online();
    story.accept(2001, &json!({ "expires": START + 5_000 }));
    story.now_ms += 20_000;
    story.accept(2002, &json!({}));
    story.arrive(2002);
    expect(story, "");

    let deleted = |told: bool| {
        let mut story = Story::online();
        story.accept(2001, &json!({}));
        story.arrive(2001);
        story.append(2002, "", &json!({ "recall": 2001 }));
        if told {
            story.audit.recall(story.device, 2001);
        }
        story.accept(2003, &json!({}));
        story.arrive(2003);
        story
    };
    expect(deleted(true), "");
    expect(deleted(false), "was not told that 2002 deleted it");

    let mut story = Story::new(App::unlimited());
    story.accept(2001, &json!({ "expires": START + 100_000 }));
    story.append(2002, "", &json!({ "recall": 2001 }));
    story.audit.login(story.device, 0, 2002, 0, story.now_ms, story.now_ms);
    story.arrive(2001);
    expect(story, "deleted before the login");
}

#[test]
fn what_newer_ones_push_out_before_its_turn_is_not_missed() {
    let expires = json!({ "expires": START + 1_000_000 });
    let login = |pushed_out: bool| {
        let mut story = Story::new(App::unlimited());
        (2001..2101).for_each(|id| story.accept(id, &expires));
        story.audit.login(story.device, 0, 2100, 0, story.now_ms, story.now_ms);
        if pushed_out {
            story.accept(2101, &expires);
        }
        // The second comes first: the oldest was gone, or was lost.
        (2002..2101).for_each(|id| story.arrive(id));
        story
    };
    expect(login(true), "");
    expect(login(false), "2001 never arrived at its login");
}

#[test]
fn flaws_of_the_log_are_found() {
    let mut story = Story::online();
    story.accept(2001, &json!({}));
    story.accept(2003, &json!({ "prev": 2002 }));
    expect(story, "names 2002 as its predecessor");
    let mut story = Story::online();
    story.accept(2001, &json!({}));
    story.append(2001, "r2001", &json!({}));
    expect(story, "2001 comes after 2001");
    let mut story = Story::online();
    story.accept(2001, &json!({}));
    story.accept(2002, &json!({ "time": START }));
    expect(story, "ms before");
    let mut story = Story::online();
    story.append(2001, "nobody's", &json!({}));
    expect(story, "which nobody sent");
}

#[test]
fn flaws_of_requests_are_found() {
    let mut story = Story::online();
    story.send("r1");
    expect(story, "I2: requests without an end");

    let mut story = Story::online();
    story.accept(2001, &json!({ "targetOs": ["ios"] }));
    story.append(2002, "r2001", &json!({ "targetOs": ["ios"] }));
    expect(story, "I1: r2001 was accepted as 2001 and 1000 ms later as 2002");

    let mut story = Story::online();
    story.accept(2001, &json!({ "targetOs": ["ios"] }));
    story.tell("r2001", &json!({ "code": 200, "msg": { "broadcastId": 2002 } }));
    expect(story, "I6");

    // Told 200, and the log goes on without it.
    let mut story = Story::online();
    story.send("r1");
    story.tell("r1", &json!({ "code": 200, "msg": { "broadcastId": 1999 } }));
    story.accept(2001, &json!({ "targetOs": ["ios"] }));
    expect(story, "not in the log");

    let mut story = Story::online();
    story.accept(2001, &json!({ "targetOs": ["ios"], "body": "another" }));
    expect(story, "another content");

    let mut story = Story::online();
    story.send("r1");
    assert!(!story.tell("r1", &json!({ "code": 500 })), "unknown is no end");
    story.tell("r1", &json!({ "code": 414 }));
    expect(story, "a good request");

    let mut story = Story::online();
    story.send("r1");
    story.audit.dead_letter("r1", "bad_field", story.now_ms);
    expect(story, "was dead-lettered: bad_field");
}

#[test]
fn a_limit_that_does_not_hold_is_found_either_way() {
    let all_for_ios = json!({ "targetOs": ["ios"] });
    let accept = |count: u64, pause_ms: u64| {
        let mut story = Story::new(App::new());
        for id in 0..count {
            story.accept(2001 + id, &all_for_ios);
            story.now_ms += pause_ms;
        }
        story
    };
    expect(accept(10, 0), "");
    expect(accept(20, 6_000), "");
    expect(accept(11, 0), "number 11 within 60 s, of 10");

    let refuse = |mut story: Story| {
        story.send("r1");
        story.tell("r1", &json!({ "code": 416 }));
        story.now_ms += 70_000;
        story.accept(3001, &all_for_ios);
        story
    };
    expect(refuse(accept(10, 0)), "");
    expect(refuse(accept(9, 0)), "was refused with only 9 of 10");

    let mut story = refuse(accept(10, 0));
    story.append(3002, "r1", &all_for_ios);
    expect(story, "told that it is refused, and sent");
}

#[test]
fn what_redis_holds_is_held_against_what_was_accepted() {
    use super::super::stored::Stored;

    const UNTIL: u64 = START + 1_000_000;
    let story = || {
        let mut story = Story::new(App::unlimited());
        for id in 0..120 {
            story.accept(2001 + id, &json!({ "targetOs": ["ios"], "expires": START + 1_000_000 }));
        }
        let retained = (2021..2121).map(|id| (id, START + 1_000_000)).collect();
        let second = story.now_ms / 1000;
        let stored =
            Stored { retained, day: Some((second / 86_400, 120)), minute: Some((second, 61)), ..Stored::default() };
        (story, stored)
    };
    let check = |change: fn(&mut Stored), flaw: &str| {
        let (mut story, mut stored) = story();
        change(&mut stored);
        story.audit.stored(&story.app.clone(), &stored, story.now_ms);
        expect(story, flaw);
    };
    check(|_| {}, "");
    check(|stored| stored.day = stored.day.map(|(day, _)| (day, 121)), "121 were charged on day");
    check(|stored| stored.minute = stored.minute.map(|(second, _)| (second, 60)), "60 were charged in the minute");
    check(|stored| stored.retained.retain(|id, _| *id != 2050), "2050 is valid and no longer retained");
    check(|stored| stored.retained.extend([(2020, UNTIL)]), "101 are retained");
    check(|stored| stored.retained.extend([(2020, UNTIL)]), "2020 is retained and should not be");
}

#[test]
fn what_is_settled_is_forgotten() {
    let mut story = Story::online();
    let mut most = 0;
    for id in 0..5_000 {
        story.accept(2001 + id, &json!({}));
        story.arrive(2001 + id);
        story.audit.log(&story.app.clone(), &[], story.now_ms + 1);
        story.audit.tick(story.now_ms);
        most = most.max(story.audit.size());
    }
    assert!(most < 3_000, "{most}");
    expect(story, "");
}
