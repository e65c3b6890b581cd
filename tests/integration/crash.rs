//! Rows 1 to 8 of the fault table: a worker that is killed, or stands still, exactly at the point that the row names.

use futures_util::future::join_all;
use lapin::BasicProperties;
use serde_json::Value;

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::proxy::{Proxy, Weather};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::{Amqp, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, unique, until};

/// What the app may send in a day.
const LIMIT: usize = 5;
/// The request at which something happens; those before it are done, those behind it wait.
const VICTIMS: usize = 2;

/// The state of a process as Linux tells it: `T` stopped, `Z` ended.
pub(crate) fn state_of(process: &Process) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
    // The name before it is in parentheses and may hold anything.
    stat[stat.rfind(')').unwrap()..].chars().nth(2).unwrap()
}

/// Waits until a failpoint has stopped it.
pub(crate) async fn stopped(process: &Process) {
    until("stopped at its failpoint", SOON, async || match state_of(process) {
        'T' => Ok(()),
        'Z' => panic!("it ended instead:\n{}", process.output()),
        state => Err(state),
    })
    .await;
}

/// An app that may send [`LIMIT`] a day, a worker that takes one request after the other, and a device.
struct Scene {
    app: App,
    stack: Stack,
    victim: Process,
    _node: Process,
    device: Device,
    amqp: Amqp,
}

impl Scene {
    /// `arrange` says where the worker is to stop, and whatever else is to be different about it.
    async fn new(arrange: impl FnOnce(Process) -> Process) -> Self {
        let app = App { per_day: LIMIT.try_into().unwrap(), ..App::unlimited() };
        let stack = Stack::new(std::slice::from_ref(&app));
        let victim = stack.role("worker").with("worker.batch", "1").with("worker.batches_in_flight", "1");
        let (victim, node) = tokio::join!(arrange(victim).start(), stack.node());
        let device = Device::online(&app, "web", &node.device_url()).await;
        let amqp = stack.amqp().await;
        Self { app, stack, victim, _node: node, device, amqp }
    }

    fn requests(&self, count: usize) -> Vec<Value> {
        (0..count)
            .map(|number| {
                let body = format!("number {number}");
                if number % 2 == 0 { retained(&self.app, &body) } else { request(&self.app, &body) }
            })
            .collect()
    }

    /// One after the other, so that the queue has them in this order.
    async fn ask(&self, requests: &[Value]) -> Vec<String> {
        let mut asked = Vec::new();
        for request in requests {
            asked.push(self.amqp.ask(request.to_string().as_bytes()).await);
        }
        asked
    }

    fn key(&self, name: &str) -> String {
        format!("{}{{{}}}:{name}", self.stack.prefix, self.app.key)
    }

    /// How many broadcasts Redis has of this app.
    fn logged(&self) -> usize {
        Redis::shared().command(&["XLEN", &self.key("log")]).parse().unwrap()
    }

    /// How many of them were charged to the app's day.
    fn charged(&self) -> usize {
        let day = Redis::shared().command(&["GET", &self.key("rate:day")]);
        day.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Whether Redis has a verdict on this request.
    fn is_stored(&self, request: &Value) -> bool {
        let key = self.key(&format!("request:{}", request["requestId"].as_str().unwrap()));
        Redis::shared().command(&["EXISTS", &key]) == "1"
    }

    /// Another worker finishes what the killed one left: everything is accepted, once; `replies` to the victim's request.
    async fn finished_by_another(mut self, requests: &[Value], asked: &[String], replies: usize) {
        let _survivor = self.stack.worker().await;
        let answers = join_all(asked.iter().map(|correlation| self.amqp.reply(correlation))).await;
        let mut checker = Checker::default();
        checker.all_accepted(requests, &answers);
        let victims = || self.amqp.all_replies(&asked[VICTIMS]);
        until("every reply", SOON, async || match victims().len() {
            count if count >= replies => Ok(()),
            count => Err(count),
        })
        .await;
        self.device.collect(LIMIT, SOON).await;
        // I6: asking again finds the same verdicts. It also makes it certain that the queue has been worked off.
        let again = self.amqp.burst(requests).await;
        checker.all_accepted(requests, &again);
        assert_eq!(victims().len(), replies);
        victims().iter().for_each(|reply| checker.verdict(&requests[VICTIMS], reply).unwrap());
        checker.device(self.device.history(), Must::Everything, 0).unwrap();
        // I1: one broadcast and one charge each, and so not one too many.
        assert_eq!((self.logged(), self.charged()), (LIMIT, LIMIT));
        let refused = self.amqp.request(&request(&self.app, "one more")).await;
        assert_eq!(refused["code"], 416, "{refused}");
        assert_eq!(self.amqp.ready("broadcast.dead").await, 0);
        assert_eq!(self.amqp.ready("broadcast.requests").await, 0);
        after_row(&self.stack).await;
    }
}

/// Row 1.
#[tokio::test]
async fn killed_before_the_script_it_is_redelivered_and_accepted_once() {
    let mut scene = Scene::new(|worker| worker.failpoints("worker::before-ledger=2*off->1*return(stop)")).await;
    let requests = scene.requests(LIMIT);
    let asked = scene.ask(&requests).await;
    stopped(&scene.victim).await;
    assert_eq!(scene.logged(), VICTIMS);
    assert!(!scene.is_stored(&requests[VICTIMS]));
    scene.victim.kill();
    scene.finished_by_another(&requests, &asked, 1).await;
}

/// Row 2: the answer has come to the process, but nobody has read it.
#[tokio::test]
async fn killed_before_the_answer_was_read_the_redelivery_finds_the_stored_verdict() {
    let mut scene = Scene::new(|worker| worker.failpoints("ledger::before-answer=2*off->1*return(stop)")).await;
    let requests = scene.requests(LIMIT);
    let asked = scene.ask(&requests).await;
    stopped(&scene.victim).await;
    scene.device.collect(VICTIMS + 1, SOON).await;
    assert_eq!(scene.logged(), VICTIMS + 1);
    assert!(scene.is_stored(&requests[VICTIMS]));
    assert!(scene.amqp.all_replies(&asked[VICTIMS]).is_empty());
    scene.victim.kill();
    scene.finished_by_another(&requests, &asked, 1).await;
}

/// Row 2: the answer never comes to the process; it asks again and again until it is killed.
#[tokio::test]
async fn killed_while_the_answer_is_lost_the_redelivery_finds_the_stored_verdict() {
    let proxy = Proxy::to(Redis::shared().port()).await;
    let redis = proxy.instead_of(&Redis::shared().url(), Redis::shared().port());
    let mut scene = Scene::new(|worker| worker.with("redis.url", redis).with("redis.response_timeout_ms", "200")).await;
    let requests = scene.requests(LIMIT);
    let mut asked = scene.ask(&requests[..VICTIMS]).await;
    join_all(asked.iter().map(|correlation| scene.amqp.reply(correlation))).await;
    proxy.weather(Weather::AnswersLost);
    asked.extend(scene.ask(&requests[VICTIMS..]).await);
    scene.device.collect(VICTIMS + 1, SOON).await;
    until("asked again", SOON, async || match scene.victim.metric("broadcastd_ledger_retries_total").await {
        0.0 => Err("not yet"),
        _ => Ok(()),
    })
    .await;
    assert!(scene.is_stored(&requests[VICTIMS]));
    assert_eq!(scene.amqp.replies(), VICTIMS);
    scene.victim.kill();
    scene.finished_by_another(&requests, &asked, 1).await;
}

/// Row 3.
#[tokio::test]
async fn killed_before_the_reply_the_next_worker_replies() {
    let mut scene = Scene::new(|worker| worker.failpoints("worker::before-reply=2*off->1*return(stop)")).await;
    let requests = scene.requests(LIMIT);
    let asked = scene.ask(&requests).await;
    stopped(&scene.victim).await;
    scene.device.collect(VICTIMS + 1, SOON).await;
    assert!(scene.is_stored(&requests[VICTIMS]));
    assert!(scene.amqp.all_replies(&asked[VICTIMS]).is_empty());
    scene.victim.kill();
    scene.finished_by_another(&requests, &asked, 1).await;
}

/// Row 4.
#[tokio::test]
async fn killed_before_the_acknowledgement_it_is_told_twice_and_sent_once() {
    let mut scene = Scene::new(|worker| worker.failpoints("worker::before-ack=2*off->1*return(stop)")).await;
    let requests = scene.requests(LIMIT);
    let asked = scene.ask(&requests).await;
    stopped(&scene.victim).await;
    scene.amqp.reply(&asked[VICTIMS]).await;
    assert_eq!(scene.amqp.all_replies(&asked[VICTIMS]).len(), 1);
    scene.victim.kill();
    scene.finished_by_another(&requests, &asked, 2).await;
}

/// Row 5: it stands still with a decided request in hand until the broker has given that, and all the others that it held, to
/// another worker; then it goes on, and acknowledges what is no longer its own.
#[tokio::test]
async fn a_worker_that_stands_still_past_the_heartbeat_harms_nothing_when_it_goes_on() {
    let arrange = |worker: Process| {
        worker.with("amqp.heartbeat_seconds", "1").failpoints("worker::before-ack=2*off->1*return(stop)")
    };
    let mut scene = Scene::new(arrange).await;
    let requests = scene.requests(LIMIT);
    let asked = scene.ask(&requests).await;
    stopped(&scene.victim).await;
    let _survivor = scene.stack.worker().await;
    until("told twice", SOON, async || match scene.amqp.all_replies(&asked[VICTIMS]).len() {
        2 => Ok(()),
        replies => Err(replies),
    })
    .await;
    let answers = join_all(asked.iter().map(|correlation| scene.amqp.reply(correlation))).await;
    scene.victim.resume();
    until("a new session", SOON, async || match scene.victim.metric("broadcastd_worker_sessions_total").await {
        sessions if sessions > 1.0 => Ok(()),
        sessions => Err(sessions),
    })
    .await;
    scene.victim.wait_ready().await;
    let mut checker = Checker::default();
    checker.all_accepted(&requests, &answers);
    // Between them the two workers take all of these.
    let again = scene.amqp.burst(&requests).await;
    checker.all_accepted(&requests, &again);
    scene.device.collect(LIMIT, SOON).await;
    checker.device(scene.device.history(), Must::Everything, 0).unwrap();
    assert_eq!((scene.logged(), scene.charged()), (LIMIT, LIMIT));
    assert_eq!(scene.amqp.request(&request(&scene.app, "one more")).await["code"], 416);
    assert_eq!(scene.amqp.ready("broadcast.dead").await, 0);
    after_row(&scene.stack).await;
}

/// Row 6.
#[tokio::test]
async fn two_workers_with_the_same_request_at_once_make_one_broadcast_of_it() {
    let stop = "worker::before-ledger=1*return(stop)";
    let mut scene = Scene::new(|worker| worker.with("amqp.prefetch", "1").failpoints(stop)).await;
    let twin = scene.stack.role("worker").with("amqp.prefetch", "1").failpoints(stop).start().await;
    let request = retained(&scene.app, "once");
    let asked = scene.ask(&[request.clone(), request.clone()]).await;
    tokio::join!(stopped(&scene.victim), stopped(&twin));
    assert_eq!(scene.logged(), 0);
    scene.victim.resume();
    twin.resume();
    let mut checker = Checker::default();
    for correlation in &asked {
        checker.all_accepted(std::slice::from_ref(&request), &[scene.amqp.reply(correlation).await]);
    }
    assert_eq!((scene.logged(), scene.charged(), checker.accepted()), (1, 1, 1));
    let figures = join_all([&scene.victim, &twin].map(|worker| worker.metric("broadcastd_consumed_total"))).await;
    assert_eq!(figures, [1.0, 1.0], "each had it");
    let end = self::request(&scene.app, "end");
    checker.all_accepted(std::slice::from_ref(&end), &[scene.amqp.request(&end).await]);
    scene.device.contents_up_to("end").await;
    checker.device(scene.device.history(), Must::Everything, 0).unwrap();
    after_row(&scene.stack).await;
}

/// Row 7: with and without a wish for a reply.
#[tokio::test]
async fn the_same_id_with_another_content_is_refused_and_writes_nothing() {
    // Without a node: its leases would be written in between.
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let _worker = stack.worker().await;
    let amqp = stack.amqp().await;
    let first = retained(&app, "first");
    let accepted = amqp.request(&first).await;
    let mut checker = Checker::default();
    checker.all_accepted(std::slice::from_ref(&first), std::slice::from_ref(&accepted));
    let before = everything_under(&stack.prefix);
    let names = || before.iter().map(|key| key.name.as_str());
    assert!(names().any(|name| name.ends_with(":log")) && names().any(|name| name.contains(":request:")), "{before:?}");
    let changes =
        [("body", "second".into()), ("isOffline", false.into()), ("ttl", 1.into()), ("from", "someone else".into())];
    for (field, value) in changes {
        let mut other = first.clone();
        other[field] = value;
        let reply = amqp.request(&other).await;
        assert_eq!(reply["code"], 414, "{field}: {reply}");
        checker.verdict(&other, &reply).unwrap();
        amqp.send(other.to_string().as_bytes()).await;
    }
    // Both kinds are kept; the second, because nobody is told.
    for _ in 0..8 {
        let dead = amqp.dead_letter().await;
        assert_eq!(dead.headers["x-code"], "LongInt(414)");
    }
    assert_unchanged(&before, &everything_under(&stack.prefix));
    assert_eq!(amqp.request(&first).await, accepted);
    after_row(&stack).await;
}

/// A key as Redis has it.
#[derive(Debug)]
struct Key {
    name: String,
    /// Of its value, which is not all: the dump says nothing of when the key expires.
    hash: String,
    /// Milliseconds until then; -1: never.
    left_ms: i64,
}

/// Every key of this prefix, by name.
fn everything_under(prefix: &str) -> Vec<Key> {
    const DUMP: &str = "local keys = redis.call('KEYS', ARGV[1] .. '*') table.sort(keys) local all = {} \
                        for i, key in ipairs(keys) do all[i] = key .. ' ' .. redis.sha1hex(redis.call('DUMP', key)) \
                        .. ' ' .. redis.call('PTTL', key) end return table.concat(all, '\\n')";
    let text = Redis::shared().command(&["EVAL", DUMP, "0", prefix]);
    let key = |line: &str| {
        let mut words = line.rsplitn(3, ' ');
        let left_ms = words.next().unwrap().parse().unwrap();
        Key { hash: words.next().unwrap().to_owned(), name: words.next().unwrap().to_owned(), left_ms }
    };
    text.lines().map(key).collect()
}

/// The same keys with the same values, none of which is to live longer than before, or has got or lost an end.
fn assert_unchanged(before: &[Key], after: &[Key]) {
    let values = |keys: &[Key]| -> Vec<(String, String)> {
        keys.iter().map(|key| (key.name.clone(), key.hash.clone())).collect()
    };
    assert_eq!(values(after), values(before));
    for (before, after) in before.iter().zip(after) {
        let same_class = (before.left_ms < 0) == (after.left_ms < 0);
        assert!(same_class && after.left_ms <= before.left_ms, "{before:?} became {after:?}");
    }
}

impl Scene {
    /// The first [`LIMIT`] are accepted; the one after them is over the limit.
    async fn over_the_limit(&mut self, checker: &mut Checker) -> Value {
        let requests = self.requests(LIMIT);
        let replies = self.amqp.burst(&requests).await;
        checker.all_accepted(&requests, &replies);
        retained(&self.app, "over the limit")
    }

    /// A worker for which the app may send more: the quota is free again.
    async fn generous_worker(&self) -> Process {
        let mut stack = self.stack.clone();
        stack.apps[0].per_day = 1000;
        stack.worker().await
    }

    /// Nothing but what was accepted has come, up to now.
    async fn device_agrees(&mut self, checker: &mut Checker) {
        let last = unique("end");
        let end = request(&self.app, &last);
        checker.all_accepted(std::slice::from_ref(&end), &[self.amqp.request(&end).await]);
        while self.device.history().last().is_none_or(|arrival| arrival.content != last) {
            self.device.expect_broadcast(SOON).await;
        }
        checker.device(self.device.history(), Must::Everything, 0).unwrap();
        assert_eq!((self.logged(), self.charged()), (checker.accepted(), checker.accepted()));
    }
}

/// Row 8: before the acknowledgement nobody has been told, so it may still be accepted.
#[tokio::test]
async fn killed_before_a_refusal_is_acknowledged_nobody_was_told() {
    let mut scene = Scene::new(|worker| worker.failpoints("worker::refusal-before-ack=1*return(stop)")).await;
    let mut checker = Checker::default();
    let refused = scene.over_the_limit(&mut checker).await;
    let asked = scene.ask(std::slice::from_ref(&refused)).await;
    stopped(&scene.victim).await;
    scene.victim.kill();
    assert!(scene.amqp.all_replies(&asked[0]).is_empty());
    let _worker = scene.generous_worker().await;
    scene.amqp.reply(&asked[0]).await;
    scene.device_agrees(&mut checker_of(checker, &refused, &scene.amqp.all_replies(&asked[0]))).await;
    let replies = scene.amqp.all_replies(&asked[0]);
    assert!(replies.len() == 1 && replies[0]["code"] == 200, "{replies:?}");
    after_row(&scene.stack).await;
}

fn checker_of(mut checker: Checker, request: &Value, replies: &[Value]) -> Checker {
    checker.sent(request);
    replies.iter().for_each(|reply| checker.verdict(request, reply).unwrap());
    checker
}

/// Row 8: after the acknowledgement it is not delivered again; the crash costs its sender the reply.
#[tokio::test]
async fn killed_before_a_refusal_is_told_it_is_never_sent() {
    let mut scene = Scene::new(|worker| worker.failpoints("worker::refusal-after-ack=1*return(stop)")).await;
    let mut checker = Checker::default();
    let refused = scene.over_the_limit(&mut checker).await;
    let asked = scene.ask(std::slice::from_ref(&refused)).await;
    stopped(&scene.victim).await;
    scene.victim.kill();
    let worker = scene.generous_worker().await;
    scene.device_agrees(&mut checker).await;
    assert!(scene.amqp.all_replies(&asked[0]).is_empty());
    assert_eq!(worker.metric("broadcastd_consumed_total").await, 1.0, "only the end: it was not delivered again");
    // Its sender knows nothing, asks again, and is told what holds now.
    let again = scene.amqp.request(&refused).await;
    checker.all_accepted(std::slice::from_ref(&refused), &[again]);
    scene.device_agrees(&mut checker).await;
    after_row(&scene.stack).await;
}

/// Row 8: replies take another connection than acknowledgements. Nobody is told before the broker has the acknowledgement.
#[tokio::test]
async fn a_refusal_is_told_only_when_the_broker_has_its_acknowledgement() {
    let rabbitmq = RabbitMq::shared();
    let proxy = Proxy::to(rabbitmq.port()).await;
    let points = "worker::refusal-before-ack=1*return(stop);worker::refusal-after-ack=1*return(stop)";
    let arrange = |worker: Process| worker.with("amqp.heartbeat_seconds", "1").failpoints(points);
    let app = App { per_day: 1, ..App::unlimited() };
    let stack = Stack::new(std::slice::from_ref(&app));
    let amqp = stack.amqp().await;
    let url = proxy.instead_of(&stack.amqp_url, rabbitmq.port());
    let worker = arrange(stack.role("worker")).with("amqp.url", url).start().await;
    amqp.accepted(&request(&app, "the only one")).await;
    let refused = request(&app, "over the limit");
    let asked = amqp.ask(refused.to_string().as_bytes()).await;
    stopped(&worker).await;
    // The acknowledgement gets lost on its way.
    proxy.weather(Weather::BlackHole);
    worker.resume();
    until("the end of its session", SOON, async || {
        assert_ne!(state_of(&worker), 'T', "it went on to tell the sender");
        // Its log, as a stopped process answers no questions.
        if worker.output().contains("the session with RabbitMQ ended") { Ok(()) } else { Err("the old one goes on") }
    })
    .await;
    assert!(amqp.all_replies(&asked).is_empty());
    // It never arrives: the broker, too, sees the end of that connection, and has the request again.
    proxy.weather(Weather::Cut);
    until("given back", SOON, async || match amqp.ready("broadcast.requests").await {
        1 => Ok(()),
        ready => Err(ready),
    })
    .await;
    proxy.weather(Weather::Fair);
    // Delivered again, refused again, acknowledged; now it may be told.
    stopped(&worker).await;
    assert!(amqp.all_replies(&asked).is_empty());
    worker.resume();
    assert_eq!(amqp.reply(&asked).await["code"], 416);
    assert_eq!(amqp.request(&request(&app, "another")).await["code"], 416);
    assert_eq!(amqp.all_replies(&asked).len(), 1);
    after_row(&stack).await;
}

/// Row 8, the exception that README names: nobody waits for a reply, so the refusal is kept as a dead letter; killed before
/// the acknowledgement, it may be accepted after all. Both at once do no harm: the dead letter is not sent a second time.
#[tokio::test]
async fn killed_after_the_dead_letter_of_a_refusal_it_may_be_accepted_once() {
    let mut scene = Scene::new(|worker| worker.failpoints("worker::after-dead-letter=1*return(stop)")).await;
    let mut checker = Checker::default();
    let refused = scene.over_the_limit(&mut checker).await;
    scene.amqp.publish(refused.to_string().as_bytes(), BasicProperties::default()).await;
    stopped(&scene.victim).await;
    assert_eq!(scene.amqp.ready("broadcast.dead").await, 1);
    assert_eq!(scene.logged(), LIMIT);
    scene.victim.kill();
    let _worker = scene.generous_worker().await;
    scene.device.collect(LIMIT + 1, SOON).await;
    let verdict = scene.amqp.request(&refused).await;
    checker.all_accepted(std::slice::from_ref(&refused), &[verdict]);
    assert_eq!(scene.amqp.ready("broadcast.dead").await, 1);
    let mut redrive = scene.stack.role("redrive").arguments(&["--reason", "limit_day"]);
    redrive.spawn();
    assert!(redrive.wait(SOON).await.success(), "{}", redrive.output());
    assert_eq!(scene.amqp.ready("broadcast.dead").await, 0);
    scene.device_agrees(&mut checker).await;
    after_row(&scene.stack).await;
}
