//! Old and new versions side by side (row 41). `tests/corpus/v1` holds what version 1 wrote, byte for byte: whatever is changed
//! here, that must still be read, and what is written must still be what version 1 can read.

use std::path::Path;
use std::process::Command;

use broadcastd::broadcast::envelope::{Content, Envelope, broadcast, history, recall, tail};
use broadcastd::broadcast::request::Request;
use serde_json::{Value, json};

use crate::support::after_row::after_lost_data;
use crate::support::broadcastd::{App, Process};
use crate::support::device::Device;
use crate::support::redis::Redis;
use crate::support::sender::{Api, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

fn corpus(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/v1").join(file)).unwrap()
}

/// Every envelope that version 1 could write is read as it was meant.
#[test]
fn envelopes_of_version_1_are_read_and_are_still_what_is_written() {
    let mut lines = 0;
    for line in corpus("envelopes.jsonl").lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let raw = case["raw"].as_str().unwrap();
        let envelope = Envelope::read(raw.as_bytes()).unwrap_or_else(|error| panic!("{error}: {raw}"));
        let number = |name: &str| case[name].as_u64().unwrap();
        let header = (envelope.id, envelope.prev, envelope.time_ms, envelope.expires_ms);
        assert_eq!(header, (number("id"), number("prev"), number("time"), number("expires")), "{raw}");
        let written = match &envelope.content {
            Content::Recall(target) => {
                assert_eq!(json!(target), case["recall"], "{raw}");
                recall(envelope.id, envelope.prev, envelope.time_ms, *target)
            }
            _ => {
                assert_eq!(history(&envelope).unwrap(), case["history"], "{raw}");
                let request = Request::from_json(case["request"].to_string().as_bytes(), None).unwrap();
                broadcast(envelope.id, envelope.prev, envelope.time_ms, envelope.expires_ms, &tail(&request))
            }
        };
        assert_eq!(written, raw, "what is written is no longer what version 1 reads");
        lines += 1;
    }
    assert_eq!(lines, 5);
}

/// Carries out the commands of a corpus file; `@` stands for the prefix and the app's hash tag.
fn load(redis: &Redis, stack: &Stack, app: &App, file: &str) {
    for line in corpus(file).lines() {
        let words: Vec<String> = serde_json::from_str(line).unwrap();
        let words: Vec<String> = words
            .into_iter()
            .map(|word| match word.strip_prefix('@') {
                Some(key) => format!("{}{{{}}}:{key}", stack.prefix, app.key),
                None => word,
            })
            .collect();
        redis.command(&words.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// What version 1 left behind in its store: ids, verdicts, the log, what is retained.
const NEWEST: u64 = 1_764_000_000_000_104;

async fn assert_served(device_url: &str, api: &Process, app: &App, before: u64) {
    let mut device = Device::online(app, "web", device_url).await;
    for content in ["kept for all", "kept for web, \"quoted\"\n\u{1f600}"] {
        assert_eq!(device.expect_broadcast(SOON).await.content, content);
    }
    let sender = Api::new(&api.api_url(), app);
    let listed = sender.call("history/queryBroadcastMsg.action", &[("type", "1")]).await;
    let bodies: Vec<&str> =
        listed["msgs"].as_array().unwrap().iter().map(|item| item["body"].as_str().unwrap()).collect();
    assert_eq!(
        bodies,
        ["kept for web, \"quoted\"\n\u{1f600}", "only online", "kept for all"],
        "the recalled one is gone"
    );
    // The same request once more: its verdict of then. The same id with another content: 414.
    let form = [("body", "kept for all"), ("isOffline", "true"), ("requestId", "old-1")];
    let again = sender.call("msg/broadcastMsg.action", &form).await;
    assert_eq!((&again["code"], &again["msg"]["broadcastId"]), (&json!(200), &json!(before)), "{again}");
    let conflict = sender.call("msg/broadcastMsg.action", &[("body", "other"), ("requestId", "old-1")]).await;
    assert_eq!(conflict["code"], 414, "{conflict}");
    let id = sender.broadcast("from today", true).await;
    assert!(id > before + 3);
    assert_eq!(device.expect_broadcast(SOON).await.content, "from today");
}

/// Keys, log entries, retained envelopes and stored verdicts of version 1 in Redis.
#[tokio::test]
async fn what_version_1_stored_in_redis_is_served_on() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    load(Redis::shared(), &stack, &app, "redis.jsonl");
    let (_worker, node, api) = tokio::join!(stack.worker(), stack.node(), stack.api());
    assert_served(&node.device_url(), &api, &app, NEWEST - 3).await;
    // What stands in the log, and was never charged, nobody of ours has sent.
    after_lost_data(&stack).await;
}

/// The same for the file of the embedded store.
#[tokio::test]
async fn what_version_1_stored_in_its_file_is_served_on() {
    let app = App { key: "corpus".to_owned(), ..App::unlimited() };
    let process = Process::new("standalone", std::slice::from_ref(&app)).with("embedded.path", "store.redb");
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/v1/store.redb.gz");
    let unpacked = Command::new("gzip").arg("-dc").arg(packed).output().unwrap();
    assert!(unpacked.status.success());
    std::fs::write(process.folder().join("store.redb"), unpacked.stdout).unwrap();
    let process = process.start().await;
    assert_served(&process.device_url(), &process, &app, 4_102_444_800_000_000 + 60_000_000).await;
}

/// A newer worker beside today's: it writes into the log, the retained set and a node's channel, as accept.lua of its version
/// would.
struct NewerWorker<'a> {
    redis: &'a Redis,
    stack: &'a Stack,
    app: &'a App,
    node: &'a str,
}

impl NewerWorker<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}{{{}}}:{name}", self.stack.prefix, self.app.key)
    }

    /// Appends an envelope of this version with these fields behind its header, and publishes it; returns its id.
    fn accept(&self, version: u32, expires: u64, rest: &str) -> u64 {
        let meta = self.redis.command(&["GET", &self.key("meta")]);
        let (head, generations) = meta.split_once(' ').unwrap();
        let prev: u64 = head.parse().unwrap();
        let id = prev + 1;
        let envelope =
            format!(r#"{{"v":{version},"id":{id},"prev":{prev},"time":{},"expires":{expires},{rest}}}"#, id / 1000);
        // All at once, as every version does it: a node that renews its lease in between would go and look.
        const SCRIPT: &str = "redis.call('XADD', KEYS[1], ARGV[1] .. '-0', 'e', ARGV[2]) \
            if ARGV[3] ~= '0' then redis.call('ZADD', KEYS[2], ARGV[1], ARGV[2]) end \
            redis.call('SET', KEYS[3], ARGV[4]) return redis.call('PUBLISH', ARGV[5], ARGV[2])";
        let keys = [self.key("log"), self.key("retained"), self.key("meta")];
        let channel = self.key(&format!("node:{}", self.node));
        let arguments = [id.to_string(), envelope, expires.to_string(), format!("{id} {generations}"), channel];
        let mut command = vec!["EVAL", SCRIPT, "3"];
        command.extend(keys.iter().chain(&arguments).map(String::as_str));
        assert_eq!(self.redis.command(&command), "1", "the node is subscribed");
        id
    }
}

/// Unknown fields are skipped. A larger version is not delivered, loudly, and its neighbours are: live, from the log and from
/// what is retained.
#[tokio::test]
async fn what_a_newer_worker_writes_is_read_or_skipped_without_harm_to_its_neighbours() {
    const FAR: u64 = 4_102_444_800_000;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async { stack.role("node").with("node.name", "old-node").start().await };
    let (worker, node, api) = tokio::join!(stack.worker(), node, stack.api());
    let amqp = stack.amqp().await;
    let newer = NewerWorker { redis: Redis::shared(), stack: &stack, app: &app, node: "old-node" };
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    amqp.accepted(&retained(&app, "before")).await;
    newer.accept(
        1,
        FAR,
        r#""requestId":"n1","body":"new fields","colour":{"deep":[1,{"x":null}]},"targetOs":["web","tv"]"#,
    );
    newer.accept(1, 0, r#""requestId":"n2","body":"for tv only","targetOs":["tv"]"#);
    let skipped = newer.accept(2, FAR, r#""requestId":"n3","body":{"html":"<b>not text</b>"}"#);
    let alike = newer.accept(3, 0, r#""requestId":"n4","body":"looks readable, and means something else""#);
    amqp.accepted(&request(&app, "after")).await;
    amqp.accepted(&retained(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["before", "new fields", "after", "end"]);
    assert_eq!(node.metric("broadcastd_envelopes_unreadable_total").await, 2.0);
    assert_eq!(node.metric("broadcastd_lost_envelopes_total").await, 0.0);
    assert_eq!(node.metric("broadcastd_backfills_total").await, 0.0, "it is no gap");
    let said = "of a newer version";
    assert!(node.output().contains(said) && !node.output().contains("not text"), "{}", node.output());

    // A second node of today reads log and retained ones from the start.
    let second = stack.node().await;
    let mut late = Device::online(&app, "web", &second.device_url()).await;
    assert_eq!(late.contents_up_to("end").await, ["before", "new fields", "end"]);
    until("told", SOON, async || match second.metric("broadcastd_envelopes_unreadable_total").await {
        2.0 => Ok(()),
        count => Err(count),
    })
    .await;
    assert_eq!(second.metric("broadcastd_lost_envelopes_total").await, 0.0);
    let mut resumed = Device::new(&app, "ios").with_cursor(alike);
    resumed.login(&second.device_url()).await;
    assert_eq!(resumed.contents_up_to("end").await, ["after", "end"]);

    let sender = Api::new(&api.api_url(), &app);
    let listed = sender.call("history/queryBroadcastMsg.action", &[]).await;
    let ids: Vec<&Value> = listed["msgs"].as_array().unwrap().iter().map(|item| &item["broadcastId"]).collect();
    assert!(!ids.contains(&&json!(skipped)) && !ids.contains(&&json!(alike)), "{listed}");
    assert!(listed.to_string().contains("new fields"), "{listed}");
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
    after_lost_data(&stack).await;
}
