//! Rows 19 and 20 of the fault table: Redis comes back without what it wrote last, be it the tail of its file, or a replica that
//! was promoted while behind, by Sentinels or by hand.

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::support::after_row::{after_lost_data, after_row};
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must, in_order};
use crate::support::device::Device;
use crate::support::proxy::{Proxy, Weather};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::{Amqp, request, retained};
use crate::support::sentinel::{Sentinels, replica};
use crate::support::stack::Stack;
use crate::support::{SOON, now_ms, until};

/// The Sentinels are asked every second; and what a busy machine takes.
const LEFT_WITHIN: Duration = Duration::from_secs(6);

/// A lease renewal (3 s) after a node has reached Redis again, for which it may wait 2 s; and what a busy machine takes.
const WRITTEN_BACK_WITHIN: Duration = Duration::from_secs(10);

/// Every third is retained.
fn requests(app: &App, what: &str, count: usize) -> Vec<Value> {
    let one = |number: usize| {
        let body = format!("{what} {number}");
        if number.is_multiple_of(3) { retained(app, &body) } else { request(app, &body) }
    };
    (0..count).map(one).collect()
}

/// Sends requests, which must all be accepted.
async fn send(amqp: &Amqp, checker: &mut Checker, requests: &[Value]) {
    let replies = amqp.burst(requests).await;
    checker.all_accepted(requests, &replies);
}

/// Asks for them one after the other, as long as it takes.
async fn send_in_turn(amqp: &Amqp, checker: &mut Checker, requests: &[Value]) {
    for request in requests {
        send(amqp, checker, std::slice::from_ref(request)).await;
    }
}

/// A server of which every answer is in the file, so that a length of the file is a moment of its data.
struct Filed {
    redis: Redis,
}

impl Filed {
    fn start() -> Self {
        Self { redis: Redis::durable() }
    }

    fn file(&self) -> PathBuf {
        self.redis.append_only_file()
    }

    fn length(&self) -> u64 {
        std::fs::metadata(self.file()).unwrap().len()
    }

    /// SIGKILL; everything after `length` is gone.
    async fn kill_and_cut(&mut self, length: u64, roles: &[&Process]) {
        self.redis.kill();
        for role in roles {
            role.wait_unready().await;
        }
        std::fs::File::options().write(true).open(self.file()).unwrap().set_len(length).unwrap();
    }
}

/// Row 19.
#[tokio::test]
async fn redis_restarted_without_the_tail_of_its_file() {
    let app = App::unlimited();
    let mut filed = Filed::start();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &filed.redis.url(), std::slice::from_ref(&app));
    let (mut worker, mut node, mut other_node) = tokio::join!(stack.worker(), stack.node(), stack.node());
    let (url, other_url) = (node.device_url(), other_node.device_url());
    let mut device = Device::online(&app, "web", &url).await;
    let mut other_device = Device::online(&app, "ios", &other_url).await;
    let mut traveller = Device::online(&app, "aos", &url).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();

    send(&amqp, &mut checker, &requests(&app, "kept", 30)).await;
    let length = filed.length();
    send(&amqp, &mut checker, &requests(&app, "lost", 30)).await;
    for device in [&mut device, &mut other_device, &mut traveller] {
        device.collect(60, SOON).await;
    }
    traveller.drop_connection();
    filed.kill_and_cut(length, &[&worker, &node, &other_node]).await;
    filed.redis.start();
    let back = Instant::now();
    until("what was lost, written back", SOON, async || {
        match node.metric("broadcastd_restored_total").await + other_node.metric("broadcastd_restored_total").await {
            restored if restored >= 10.0 => Ok(()),
            restored => Err(restored),
        }
    })
    .await;
    in_time("written back", back, WRITTEN_BACK_WITHIN);
    for role in [&mut worker, &mut node, &mut other_node] {
        role.wait_ready().await;
    }

    send(&amqp, &mut checker, &requests(&app, "after", 30)).await;
    traveller.follow(std::slice::from_ref(&other_url), 90, SOON).await;
    device.collect(90, SOON).await;
    other_device.collect(90, SOON).await;
    for device in [&device, &other_device, &traveller] {
        checker.device(device.history(), Must::Everything, 0).unwrap();
    }
    // On a node that knows only what Redis has, and on one that wrote back.
    let third_node = stack.node().await;
    for url in [third_node.device_url(), url] {
        let joined_ms = now_ms();
        let mut late = Device::online(&app, "pc", &url).await;
        late.collect(30, SOON).await;
        checker.device(late.history(), Must::RetainedUpTo(late.head()), joined_ms).unwrap();
    }
    after_lost_data(&stack).await;
}

/// Row 19: no id is used twice although nobody has told Redis yet which were; and what is written back reaches a node that read
/// before, when Redis had lost it.
#[tokio::test]
async fn what_is_written_back_reaches_nodes_that_read_before_it_was() {
    let app = App::unlimited();
    let mut filed = Filed::start();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &filed.redis.url(), std::slice::from_ref(&app));
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    send(&amqp, &mut checker, &requests(&app, "kept", 9)).await;
    let length = filed.length();
    send(&amqp, &mut checker, &requests(&app, "lost", 9)).await;
    device.collect(18, SOON).await;
    filed.kill_and_cut(length, &[&worker, &node]).await;
    node.pause();
    filed.redis.start();
    worker.wait_ready().await;

    let fresh_node = stack.node().await;
    let url = fresh_node.device_url();
    let mut early = Device::online(&app, "pc", &url).await;
    early.collect(3, SOON).await;
    send(&amqp, &mut checker, &requests(&app, "after", 9)).await;
    early.collect(12, SOON).await;
    node.resume();
    node.wait_ready().await;
    device.collect(27, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    let (mut late, joined_ms) = until("all retained at the other node", SOON, async || {
        let joined_ms = now_ms();
        let mut late = Device::online(&app, "ios", &url).await;
        while late.next(Instant::now() + Duration::from_millis(300)).await.is_some() {}
        match late.history().len() {
            9 => Ok((late, joined_ms)),
            count => Err(count),
        }
    })
    .await;
    checker.device(late.history(), Must::RetainedUpTo(late.head()), joined_ms).unwrap();
    send(&amqp, &mut checker, &[request(&app, "end")]).await;
    assert_eq!(late.contents_up_to("end").await.len(), 1, "nothing comes late to one who is online");
    in_order(early.history()).unwrap();
    after_lost_data(&stack).await;
}

/// What README says of it: a request whose verdict was lost counts as new; one whose verdict was kept, as decided.
#[tokio::test]
async fn a_request_whose_verdict_was_lost_counts_as_new() {
    let app = App::unlimited();
    let mut filed = Filed::start();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &filed.redis.url(), std::slice::from_ref(&app));
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let (kept, lost) = (retained(&app, "kept"), retained(&app, "lost"));
    let kept_id = amqp.accepted(&kept).await;
    let length = filed.length();
    let lost_id = amqp.accepted(&lost).await;
    device.collect(2, SOON).await;
    filed.kill_and_cut(length, &[&worker, &node]).await;
    filed.redis.start();
    tokio::join!(worker.wait_ready(), node.wait_ready());

    assert_eq!(amqp.accepted(&kept).await, kept_id);
    let new_id = amqp.accepted(&lost).await;
    assert!(new_id > lost_id, "{new_id} after {lost_id}");
    assert_eq!(amqp.accepted(&lost).await, new_id, "from then on it is remembered");
    amqp.accepted(&request(&app, "end")).await;
    device.collect(4, SOON).await;
    let history: Vec<(u64, &str)> = device.history().iter().map(|had| (had.id, had.content.as_str())).collect();
    assert_eq!(history[..3], [(kept_id, "kept"), (lost_id, "lost"), (new_id, "lost")]);
    assert_eq!(history[3].1, "end");
}

/// A master, its replica, and Sentinels; a worker and two nodes that were told only of the Sentinels.
struct Watched {
    master: Redis,
    replica: Redis,
    sentinels: Sentinels,
    stack: Stack,
    app: App,
}

impl Watched {
    /// `arguments`: of both servers. `password`: of the Sentinels.
    fn start(arguments: &[&str], password: Option<&str>) -> Self {
        let app = App::unlimited();
        let master = Redis::dedicated(arguments);
        // By these users a test cuts the master off from its Sentinels and its replica, and from nobody else.
        for user in ["sentinel", "replica"] {
            master.command(&["ACL", "SETUSER", user, "on", ">secret", "~*", "&*", "+@all"]);
        }
        let of_replica = ["--masteruser", "replica", "--masterauth", "secret"];
        let replica = replica(master.port(), &[arguments, &of_replica].concat());
        replica.command(&["ACL", "SETUSER", "sentinel", "on", ">secret", "~*", "&*", "+@all"]);
        let login = "sentinel auth-user mymaster sentinel\nsentinel auth-pass mymaster secret";
        let sentinels = Sentinels::watch(master.port(), password, login);
        let mut stack = Stack::on(&RabbitMq::shared().vhost().url, &sentinels.url(), std::slice::from_ref(&app));
        stack.redis_mode = "sentinel".to_owned();
        Self { master, replica, sentinels, stack, app }
    }

    /// The replica has everything that the master has of the app's log.
    async fn replicated(&self) {
        let log = format!("{}{{{}}}:log", self.stack.prefix, self.app.key);
        let length = self.master.command(&["XLEN", &log]);
        until("replicated", SOON, async || match self.replica.command(&["XLEN", &log]) {
            replicated if replicated == length => Ok(()),
            replicated => Err(replicated),
        })
        .await;
    }

    /// To its Sentinels and its replica the master is gone; to everyone else it is as before.
    fn cut_off(&self) {
        for user in ["sentinel", "replica"] {
            // Not "off": who cannot log in is the default user, who may do everything.
            self.master.command(&["ACL", "SETUSER", user, "-@all"]);
            self.master.command(&["CLIENT", "KILL", "USER", user]);
        }
    }

    fn head(server: &Redis, stack: &Stack, app: &App) -> String {
        server.command(&["GET", &format!("{}{{{}}}:meta", stack.prefix, app.key)])
    }
}

/// `named`: when the last Sentinel named the new master.
fn left_in_time(who: &str, named: Instant) {
    in_time(&format!("{who} left"), named, LEFT_WITHIN);
}

fn in_time(what: &str, since: Instant, bound: Duration) {
    let took = since.elapsed();
    println!("{what} after {took:?}");
    assert!(took < bound, "{what} only after {took:?}");
}

/// Row 20: the replica lags behind, the master dies, the Sentinels promote the replica.
#[tokio::test]
async fn a_replica_promoted_while_behind() {
    let mut watched = Watched::start(&[], None);
    let (app, stack) = (watched.app.clone(), watched.stack.clone());
    let (_worker, node, other_node) = tokio::join!(stack.worker(), stack.node(), stack.node());
    let (url, other_url) = (node.device_url(), other_node.device_url());
    let mut device = Device::online(&app, "web", &url).await;
    let mut traveller = Device::online(&app, "aos", &url).await;
    let mut other_device = Device::online(&app, "ios", &other_url).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();

    send(&amqp, &mut checker, &requests(&app, "kept", 15)).await;
    watched.replicated().await;
    // Without its connection, and while it stands still, the replica does not learn what follows.
    watched.replica.pause();
    watched.master.command(&["CLIENT", "KILL", "TYPE", "replica"]);
    send(&amqp, &mut checker, &requests(&app, "lost", 15)).await;
    for device in [&mut device, &mut other_device, &mut traveller] {
        device.collect(30, SOON).await;
    }
    traveller.drop_connection();
    watched.master.kill();
    watched.replica.resume();
    let after = requests(&app, "after", 15);
    let (replies, ()) = tokio::join!(amqp.burst(&after), watched.sentinels.wait_for(watched.replica.port()));
    checker.all_accepted(&after, &replies);
    traveller.follow(std::slice::from_ref(&other_url), 45, SOON).await;
    device.collect(45, SOON).await;
    other_device.collect(45, SOON).await;
    for device in [&device, &other_device, &traveller] {
        checker.device(device.history(), Must::Everything, 0).unwrap();
    }
    until("what was lost, written back", SOON, async || {
        match node.metric("broadcastd_restored_total").await + other_node.metric("broadcastd_restored_total").await {
            restored if restored >= 5.0 => Ok(()),
            restored => Err(restored),
        }
    })
    .await;
    let third_node = stack.node().await;
    let joined_ms = now_ms();
    let mut late = Device::online(&app, "pc", &third_node.device_url()).await;
    late.collect(15, SOON).await;
    checker.device(late.history(), Must::RetainedUpTo(late.head()), joined_ms).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    after_lost_data(&stack).await;
}

/// Row 20: the master is well, and demoted: whoever goes on writing to it is told READONLY, for ever.
#[tokio::test]
async fn a_demoted_master_is_left_at_once() {
    let watched = Watched::start(&["--min-replicas-to-write", "1"], None);
    let (app, stack) = (watched.app.clone(), watched.stack.clone());
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    send_in_turn(&amqp, &mut checker, &requests(&app, "before", 10)).await;
    let (new, old) = (&watched.replica, &watched.master);
    // The Sentinels, the replica and whoever lists them have other users, or other commands.
    let connections = |server: &Redis| {
        let list = server.command(&["CLIENT", "LIST"]);
        list.lines().filter(|line| line.contains(" user=default ") && !line.contains(" cmd=client|list ")).count()
    };
    assert_eq!(connections(old), 3, "the worker's, the node's, and its subscription");
    watched.sentinels.failover();
    let named = Cell::new(None);
    let leaving = async {
        watched.sentinels.wait_for(new.port()).await;
        named.set(Some(Instant::now()));
        // Worker and node, with all their connections. Sentinel closes them too, when it demotes the old one: ten seconds later.
        until("left", SOON, async || match connections(old) {
            0 => Ok(()),
            some => Err(some),
        })
        .await;
        left_in_time("everyone", named.get().unwrap());
    };
    // A request at a time, until one is accepted after all Sentinels have named the new master: by nobody else than that one.
    let mut sent = 10;
    let sending = async {
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        loop {
            pace.tick().await;
            send(&amqp, &mut checker, &[request(&app, &format!("meanwhile {sent}"))]).await;
            sent += 1;
            if let Some(named) = named.get() {
                // Its one replica is the demoted one: it refuses until that is one.
                println!("accepted {:?} after the last Sentinel named the new master", named.elapsed());
                return;
            }
        }
    };
    tokio::join!(leaving, sending);
    until("the demoted one a replica", SOON, async || match old.command(&["INFO", "replication"]) {
        info if info.contains("role:slave") => Ok(()),
        info => Err(info),
    })
    .await;
    assert!(new.command(&["INFO", "replication"]).contains("role:master"));
    send_in_turn(&amqp, &mut checker, &requests(&app, "after", 10)).await;
    device.collect(sent + 10, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    after_lost_data(&stack).await;
}

/// Row 20: the master is cut off from its replica and the Sentinels, but not from us: it goes on accepting, and says of itself
/// that it is the master. Without `min-replicas-to-write` what it accepts until we leave it is lost as in row 19.
#[tokio::test]
async fn a_master_that_is_cut_off_is_left_within_seconds() {
    let watched = Watched::start(&[], None);
    let (app, stack) = (watched.app.clone(), watched.stack.clone());
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    send(&amqp, &mut checker, &requests(&app, "before", 10)).await;
    watched.replicated().await;
    watched.cut_off();
    send(&amqp, &mut checker, &requests(&app, "isolated", 10)).await;
    device.collect(20, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();

    watched.sentinels.wait_for(watched.replica.port()).await;
    let named = Instant::now();
    let log = format!("{}{{{}}}:log", stack.prefix, app.key);
    let promoted_with = watched.replica.command(&["XLEN", &log]);
    let mut sent = 20;
    // Once the new master has accepted something, nothing is written to the old one any more.
    until("left", SOON, async || {
        send(&amqp, &mut checker, &[retained(&app, "on one of them")]).await;
        sent += 1;
        match watched.replica.command(&["XLEN", &log]) {
            length if length != promoted_with => Ok(()),
            length => Err(length),
        }
    })
    .await;
    left_in_time("the worker", named);
    let old_head = Watched::head(&watched.master, &stack, &app);
    until("the node has left", SOON, async || match node.metric("broadcastd_restored_total").await {
        0.0 => Err(0.0),
        _ => Ok(()),
    })
    .await;
    in_time("written back", named, WRITTEN_BACK_WITHIN);
    let after = requests(&app, "after", 10);
    // In turn: the last one is the last to arrive.
    send_in_turn(&amqp, &mut checker, &after).await;
    assert_eq!(Watched::head(&watched.master, &stack, &app), old_head, "nothing more is written to the old one");
    let last = after.last().unwrap()["body"].as_str().unwrap();
    device.contents_up_to(last).await;
    in_order(device.history()).unwrap();
    // Of the two, the node may have been the first to leave: what the worker had the old one accept after that is lost. What any
    // device has had, and was to be kept, was written back.
    let third_node = stack.node().await;
    let mut late = Device::online(&app, "pc", &third_node.device_url()).await;
    let is_retained = |content: &str| content == "on one of them" || content.ends_with(['0', '3', '6', '9']);
    let had: Vec<_> = device.history().iter().filter(|had| is_retained(&had.content)).map(|had| had.id).collect();
    late.collect(had.len(), SOON).await;
    assert_eq!(late.history().iter().map(|had| had.id).collect::<Vec<_>>(), had);
    assert!(sent + 10 - device.history().len() <= sent - 20, "what was accepted before anyone left has arrived");
    after_lost_data(&stack).await;
}

/// Row 20, with the setting that deploy/redis recommends: a master that has lost its replica refuses, so nothing is accepted that
/// the promoted one does not have.
#[tokio::test]
async fn a_master_that_is_cut_off_accepts_nothing_with_min_replicas() {
    let watched = Watched::start(&["--min-replicas-to-write", "1", "--min-replicas-max-lag", "3"], None);
    let (app, stack) = (watched.app.clone(), watched.stack.clone());
    let (mut worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    send(&amqp, &mut checker, &requests(&app, "before", 10)).await;
    watched.replicated().await;
    watched.cut_off();
    let old_head = Watched::head(&watched.master, &stack, &app);
    let held = requests(&app, "held", 30);
    let asked = amqp.burst(&held);
    let promoted = async {
        watched.sentinels.wait_for(watched.replica.port()).await;
        assert_eq!(Watched::head(&watched.master, &stack, &app), old_head);
        // The promoted one refuses just as well, so the worker holds what it has until further notice.
        until("held at a master that is well", Duration::from_secs(10), async || match worker.readiness().await? {
            (503, body) if body.contains("they are held") && body.contains(r#""redis":{"ready":true}"#) => Ok(()),
            (_, body) => Err(body),
        })
        .await;
        // It has no replica either, and never will have: this is where an operator has to help.
        watched.replica.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    };
    let (replies, ()) = tokio::join!(asked, promoted);
    checker.all_accepted(&held, &replies);
    device.collect(40, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    worker.wait_ready().await;
    assert_eq!(Watched::head(&watched.master, &stack, &app), old_head, "the old one accepted nothing");
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    after_lost_data(&stack).await;
}

/// Row 20, by hand, and without Sentinels: the master is made a replica of one that is behind, loses what that one has not, and
/// is made the master again. It is the same process, on the same connections.
#[tokio::test]
async fn a_master_demoted_and_promoted_by_hand() {
    let app = App::unlimited();
    let master = Redis::dedicated(&[]);
    let copy = replica(master.port(), &[]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &master.url(), std::slice::from_ref(&app));
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    send(&amqp, &mut checker, &requests(&app, "kept", 9)).await;
    let log = format!("{}{{{}}}:log", stack.prefix, app.key);
    until("replicated", SOON, async || match copy.command(&["XLEN", &log]) {
        length if length == "9" => Ok(()),
        length => Err(length),
    })
    .await;
    copy.command(&["REPLICAOF", "NO", "ONE"]);
    send(&amqp, &mut checker, &requests(&app, "lost", 9)).await;
    device.collect(18, SOON).await;

    master.command(&["REPLICAOF", "127.0.0.1", &copy.port().to_string()]);
    for role in [&worker, &node] {
        let body = role.wait_unready().await.to_string();
        assert!(body.contains("replica") || body.contains("loading"), "{body}");
    }
    let after = requests(&app, "after", 9);
    let promotion = async {
        until("copied", SOON, async || match master.command(&["INFO", "replication"]) {
            info if info.contains("master_link_status:up") => Ok(()),
            info => Err(info),
        })
        .await;
        assert_eq!(master.command(&["XLEN", &log]), "9");
        master.command(&["REPLICAOF", "NO", "ONE"]);
    };
    let (replies, ()) = tokio::join!(amqp.burst(&after), promotion);
    checker.all_accepted(&after, &replies);
    tokio::join!(worker.wait_ready(), node.wait_ready());
    device.collect(27, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    after_lost_data(&stack).await;
}

/// Sentinels that ask for a password of their own, which is not the master's.
#[tokio::test]
async fn sentinels_with_a_password() {
    let watched = Watched::start(&[], Some("sesame"));
    let (app, stack) = (&watched.app, &watched.stack);
    let mut stranger = stack.role("worker");
    stranger.spawn();
    let why = until("refused", SOON, async || match stranger.readiness().await? {
        (503, body) if body.contains("NOAUTH") => Ok(body),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert!(!why.contains("sesame"));
    stranger.kill();
    let file = stranger.folder().join("sentinel-password");
    std::fs::write(&file, "sesame\n").unwrap();
    let worker = async { stack.role("worker").with("redis.sentinel_password", "sesame").start().await };
    let node = async { stack.role("node").with("redis.sentinel_password_file", file.to_str().unwrap()).start().await };
    let (worker, node) = tokio::join!(worker, node);
    let mut device = Device::online(app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    amqp.accepted(&request(app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["end"]);
    assert!(!worker.output().contains("sesame") && !node.output().contains("sesame"));
    after_lost_data(stack).await;
}

/// Rows 17, 18 and 23, by what lies between: connections that end, that swallow everything, that swallow the answers only, and
/// that are slow and cut everything to pieces.
#[tokio::test]
async fn a_network_that_misbehaves_before_redis_loses_and_doubles_nothing() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&[]);
    let proxy = Proxy::to(redis.port()).await;
    let proxied = proxy.instead_of(&redis.url(), redis.port());
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &proxied, std::slice::from_ref(&app));
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    send(&amqp, &mut checker, &requests(&app, "fair", 10)).await;
    for (number, weather) in [Weather::BlackHole, Weather::AnswersLost, Weather::Cut].into_iter().enumerate() {
        let began = std::time::Instant::now();
        proxy.weather(weather);
        let held = requests(&app, &format!("{number}th"), 30);
        let clears_up = async {
            let why = tokio::join!(worker.wait_unready(), node.wait_unready());
            assert!(began.elapsed() < Duration::from_secs(20), "{weather:?} was noticed after {:?}", began.elapsed());
            eprintln!("{weather:?} was noticed after {:?}: {why:?}", began.elapsed());
            until("held requests", SOON, async || match worker.metric("broadcastd_requests_held").await {
                0.0 => Err(0.0),
                _ => Ok(()),
            })
            .await;
            proxy.weather(Weather::Fair);
        };
        let (replies, ()) = tokio::join!(amqp.burst(&held), clears_up);
        checker.all_accepted(&held, &replies);
        tokio::join!(worker.wait_ready(), node.wait_ready());
        device.collect(10 + 30 * (number + 1), SOON).await;
    }
    for (what, weather) in [("slow", Weather::Delay(Duration::from_millis(100))), ("sliced", Weather::Slice(7))] {
        proxy.weather(weather);
        send(&amqp, &mut checker, &requests(&app, what, 20)).await;
    }
    device.collect(140, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(worker.metric("broadcastd_requests_held").await, 0.0);
    after_row(&Stack { redis_url: redis.url(), ..stack }).await;
}
