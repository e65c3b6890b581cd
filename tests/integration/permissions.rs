//! The permissions that are written down for operators (`deploy/redis/users.acl`, `deploy/rabbitmq/README.md`): enough, for every
//! test runs under them; and no more than that, for each is taken away here once, and missed.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use broadcastd::broadcast::app::AppKey;
use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{Request, Submission};
use broadcastd::broadcast::verdict::Decision;
use broadcastd::ledger::redis::{Mode, RedisLedger};
use broadcastd::ledger::{Kind, Ledger, NodeName};
use futures_util::future::join_all;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection, ConnectionProperties};
use serde_json::json;

use crate::support::broadcastd::{App, Process};
use crate::support::device::Device;
use crate::support::guard::{Guarded, folder};
use crate::support::rabbitmq::{RabbitMq, USERS, Vhost, as_user, permissions};
use crate::support::redis::{LOGIN, Redis, RedisCluster, ledger, users};
use crate::support::sender::{Api, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, ports, unique, until};

/// Granted for what [`everything`] does not try.
const WHILE_A_SLOT_MOVES: &str = "+asking";
const LEASE: Duration = Duration::from_secs(30);
/// What is missing shows in an error, or in nothing happening for this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// The file as it is, but for the prefix: whoever is not listed stays out, and every role works.
#[tokio::test]
async fn the_committed_users_of_redis_are_enough_and_keep_others_out() {
    let prefix = Redis::prefix();
    let redis = Redis::dedicated(&[]);
    std::fs::write(redis.folder().join("users.acl"), users(&format!("{prefix}*"))).unwrap();
    assert_eq!(redis.command(&["ACL", "LOAD"]), "OK");
    let anonymous = redis.url().replace(&format!("{LOGIN}@"), "");
    assert!(redis.try_command(&["PING"]).unwrap_err().contains("NOAUTH"));

    let app = App::new();
    let mut stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    stack.prefix = prefix;
    let (_worker, node, api) = tokio::join!(stack.worker(), stack.node(), stack.api());
    let mut device = Device::online(&app, "ios", &node.device_url()).await;
    let sender = Api::new(&api.api_url(), &app);
    sender.broadcast("hello", true).await;
    assert_eq!(device.expect_broadcast(SOON).await.content, "hello");

    // Another prefix, or nobody's name: refused, with the reason.
    for (process, reason) in [
        (stack.role("node").with("redis.url", anonymous), "NOAUTH"),
        (stack.role("node").with("redis.url", redis.url().replace("change-me", "wrong")), "WRONGPASS"),
    ] {
        let mut process = process;
        process.spawn();
        until("refused", SOON, async || match process.readiness().await? {
            (503, body) if body.contains(reason) || body.contains("uthentication") => Ok(()),
            (_, body) => Err(body),
        })
        .await;
    }
    for command in [&["GET", "other:{a}:meta"][..], &["KEYS", "*"], &["CONFIG", "GET", "*"], &["SCRIPT", "FLUSH"]] {
        let login = ["--user", "broadcastd", "--pass", "change-me", "--no-auth-warning"];
        let refused = redis.try_command(&[&login[..], command].concat()).unwrap_err();
        assert!(refused.contains("NOPERM"), "{command:?}: {refused}");
    }
}

/// A Sentinel that watches a master under the name `mymaster`; its port.
pub fn sentinel(master: &Redis, tls: &[&str]) -> (Guarded, u16) {
    let (folder, port) = (folder("sentinel"), ports::free());
    let file = folder.join("sentinel.conf");
    let listen =
        if tls.is_empty() { format!("port {port}") } else { format!("port 0\ntls-port {port}\ntls-replication yes") };
    let settings = format!(
        "{listen}\nbind 127.0.0.1\n{}\nsentinel monitor mymaster 127.0.0.1 {} 1\n",
        tls.join("\n"),
        master.port()
    );
    std::fs::write(&file, settings).unwrap();
    let program = ["redis-server", file.to_str().unwrap(), "--sentinel"];
    (Guarded::spawn("sentinel", &program, &BTreeMap::new(), &folder.join("output")), port)
}

/// Everything that broadcastd does with Redis, once.
async fn everything(ledger: &RedisLedger) -> Result<(), String> {
    let failed = |what: &'static str| move |error| format!("{what}: {error}");
    let mut health = ledger.health();
    tokio::time::timeout(PATIENCE, health.wait_for(Result::is_ok)).await.map_err(|_| "no connection")?.unwrap();
    let app = AppKey::parse(&unique("mutant")).unwrap();
    let node = NodeName("n1".into());
    let mut feed = ledger.open_feed(&node);
    ledger.subscribe(&app).await.map_err(failed("subscribe"))?;
    ledger.join(&app, &node, LEASE, 0).await.map_err(failed("join"))?;
    let accept = async |body: &str, ttl_ms| {
        let json = json!({ "requestId": unique("r"), "appKey": app.as_str(), "body": body }).to_string();
        let mut request = Request::from_json(json.as_bytes(), None).unwrap();
        request.ttl_ms = ttl_ms;
        let batch = [Submission { request, limits: Limits { per_minute: 1000, per_day: 1000 } }];
        match ledger.accept(&batch).await.remove(0).map_err(failed("accept"))? {
            Decision::Accepted(accepted) if accepted.reached == 1 => Ok(accepted),
            other => Err(format!("not reached: {other:?}")),
        }
    };
    let first = accept("online", None).await?;
    tokio::time::timeout(PATIENCE, feed.recv()).await.map_err(|_| "nothing was published")?;
    // One that expires at once, so that the next one has something to remove; and more than are kept.
    accept("short", Some(1)).await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    for number in 0..101 {
        accept(&format!("kept {number}"), Some(60_000)).await?;
    }
    let kept = accept("kept", Some(60_000)).await?;
    ledger.join(&app, &node, LEASE, first.id).await.map_err(failed("backfill"))?;
    ledger.renew(std::slice::from_ref(&app), &node, LEASE).await.remove(0).map_err(failed("renew"))?;
    ledger.find(&app, first.id).await.map_err(failed("find"))?.ok_or("not found")?;
    ledger.list(&app, 0, 10, Kind::All).await.map_err(failed("list"))?;
    let snapshot = ledger.join(&app, &node, LEASE, 0).await.map_err(failed("join"))?;
    ledger.recall(&app, kept.id).await.map_err(failed("recall"))?.ok_or("not recalled")?;
    ledger.restore(&app, 1, &snapshot.retained, &[]).await.map_err(failed("restore"))?;
    if !ledger.first_use(&app, "mark", LEASE).await.map_err(failed("first use"))? {
        return Err("a mark was known".to_owned());
    }
    ledger.leave(&app, &node).await.map_err(failed("leave"))?;
    ledger.unsubscribe(&app).await.map_err(failed("unsubscribe"))?;
    // Its failure shows nowhere else: the channel would stay subscribed.
    tokio::task::yield_now().await;
    Ok(())
}

/// The commands of `users.acl`, in it `+command`.
fn commands() -> Vec<&'static str> {
    include_str!("../../deploy/redis/users.acl").split_whitespace().filter(|word| word.starts_with('+')).collect()
}

/// Which of the commands are not missed when they are taken away. `servers`: all of the set-up.
async fn not_missed(servers: &[&Redis], url: &str, mode: Mode) -> Vec<&'static str> {
    let committed = users("t-*");
    let rules = committed.lines().find_map(|line| line.strip_prefix("user broadcastd ")).unwrap().to_owned();
    let set = |user: &str, without: Option<&str>| {
        let rules = rules.split_whitespace().filter(|rule| Some(*rule) != without);
        let command: Vec<&str> = ["ACL", "SETUSER", user, "reset"].into_iter().chain(rules).collect();
        servers.iter().for_each(|server| assert_eq!(server.command(&command), "OK"));
        url.replace("broadcastd:", &format!("{user}:"))
    };
    // With nothing taken away it works; the test would prove nothing otherwise.
    let whole = unique("whole");
    everything(&ledger(&set(&whole, None), mode, &Redis::prefix())).await.unwrap();
    let denied = |user: &str| {
        let user = format!("{user}\n");
        let logs = servers.iter().map(|server| server.command(&["ACL", "LOG", "1000"]));
        logs.flat_map(|log| {
            log.split("\ncount\n").filter(|entry| entry.contains(&user)).map(str::to_owned).collect::<Vec<_>>()
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(denied(&whole), Vec::<String>::new(), "denied, though all that is written down is granted");
    let mut kept = Vec::new();
    for command in commands() {
        let user = unique("without");
        let ledger = ledger(&set(&user, Some(command)), mode, &Redis::prefix());
        // A script that is known is never sent whole.
        servers.iter().for_each(|server| assert_eq!(server.command(&["SCRIPT", "FLUSH"]), "OK"));
        // Some failures show nowhere but in the server's own log of what it denied.
        if everything(&ledger).await.is_ok() && denied(&user).is_empty() {
            kept.push(command);
        }
    }
    kept
}

#[tokio::test]
async fn every_command_that_redis_users_are_granted_is_needed() {
    let redis = Redis::dedicated(&["--acllog-max-len", "100000"]);
    let cluster: Vec<&Redis> = RedisCluster::shared().masters().iter().collect();
    let (_sentinel, port) = sentinel(&redis, &[]);
    let sentinel_url = redis.url().replace(&redis.port().to_string(), &port.to_string());
    let one = not_missed(&[&redis], &redis.url(), Mode::Single).await;
    let watched = not_missed(&[&redis], &sentinel_url, Mode::Sentinel).await;
    let many = not_missed(&cluster, &RedisCluster::shared().url(), Mode::Cluster).await;
    let everywhere = |command: &&&str| watched.contains(command) && many.contains(command);
    let nobody: Vec<&&str> = one.iter().filter(everywhere).filter(|command| **command != WHILE_A_SLOT_MOVES).collect();
    assert!(nobody.is_empty(), "users.acl grants what nothing needs: {nobody:?}");
    // The figures, for those who read the log.
    println!(
        "not needed on one server: {one:?}; not needed behind Sentinel: {watched:?}; not needed in a cluster: {many:?}"
    );
}

// ---- RabbitMQ

/// A worker and an API under these permissions do everything: declare, take, reply, dead-letter, submit.
async fn worker_and_api(vhost: &Vhost) -> Result<(), String> {
    let app = App::new();
    let mut stack = Stack::on(&vhost.url, &Redis::shared().url(), std::slice::from_ref(&app));
    stack.amqp_url.clone_from(&vhost.url);
    let (mut worker, mut api) = (stack.role("worker"), stack.role("api"));
    worker.spawn();
    within(async { ready(&worker).await }).await?;
    api.spawn();
    within(async { ready(&api).await }).await?;
    let answer = Api::new(&api.api_url(), &app).call("msg/broadcastMsg.action", &[("body", "hello")]).await;
    if answer["code"] != 200 {
        return Err(answer.to_string());
    }
    let amqp = stack.amqp().await;
    amqp.send(b"nonsense").await;
    within(async {
        while amqp.ready("broadcast.dead").await == 0 {
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    })
    .await
    .map_err(|_| "no dead letter".to_owned())
}

async fn within(done: impl Future<Output = ()>) -> Result<(), String> {
    tokio::time::timeout(PATIENCE, done).await.map_err(|_| "not within its time".to_owned())
}

async fn ready(process: &Process) {
    while !matches!(process.readiness().await, Ok((200, _))) {
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// The alternatives of `^(a|b|c)$`, or the one of `^a$`.
fn alternatives(pattern: &str) -> Vec<String> {
    let inner = pattern.strip_prefix('^').unwrap().strip_suffix('$').unwrap();
    inner.trim_start_matches('(').trim_end_matches(')').split('|').map(str::to_owned).collect()
}

#[tokio::test]
async fn every_permission_that_rabbitmqs_user_is_granted_is_needed() {
    let rabbitmq = RabbitMq::shared();
    let (user, _) = USERS[0];
    let granted = permissions(user);
    let mut mutants = Vec::new();
    for (kind, pattern) in granted.iter().enumerate() {
        let all = alternatives(pattern);
        for taken in &all {
            let rest: Vec<&str> = all.iter().filter(|one| *one != taken).map(String::as_str).collect();
            let mut mutant = granted.clone();
            mutant[kind] = format!("^({})$", rest.join("|"));
            mutants.push((format!("{} {taken}", ["configure", "write", "read"][kind]), mutant));
        }
    }
    assert_eq!(mutants.len(), 10, "{mutants:?}");
    worker_and_api(&rabbitmq.vhost()).await.unwrap();
    let mut not_missed = Vec::new();
    // A few at a time: each is two processes.
    for group in mutants.chunks(3) {
        let results = join_all(group.iter().map(|(what, mutant)| async move {
            let vhost = rabbitmq.vhost();
            rabbitmq.permit(&vhost.name, user, mutant);
            (what, worker_and_api(&vhost).await)
        }));
        for (what, result) in results.await {
            match result {
                Ok(()) => not_missed.push(what),
                Err(why) => println!("without {what}: {why}"),
            }
        }
    }
    assert!(not_missed.is_empty(), "granted, but nothing needs it: {not_missed:?}");
}

#[tokio::test]
async fn an_api_and_a_backend_need_no_more_than_is_written_down() {
    let app = App::new();
    let vhost = RabbitMq::shared().vhost();
    let stack = Stack::on(&vhost.url, &Redis::shared().url(), std::slice::from_ref(&app));
    let login = |(user, password): (&str, &str)| as_user(&vhost.url, &format!("{user}:{password}"));
    let _worker = stack.worker().await;
    let api = stack.role("api").with("amqp.url", login(USERS[1])).start().await;
    Api::new(&api.api_url(), &app).broadcast("by the API", false).await;

    let connection = Connection::connect(&login(USERS[2]), ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let direct = "amq.rabbitmq.reply-to";
    let no_ack = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies = channel.basic_consume(direct.into(), "".into(), no_ack, FieldTable::default()).await.unwrap();
    let properties = BasicProperties::default().with_reply_to(direct.into()).with_correlation_id("c".into());
    let body = retained(&app, "by a backend").to_string();
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    channel
        .basic_publish("broadcast".into(), "request".into(), mandatory, body.as_bytes(), properties)
        .await
        .unwrap()
        .await
        .unwrap();
    let reply =
        tokio::time::timeout(SOON, futures_util::StreamExt::next(&mut replies)).await.unwrap().unwrap().unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&reply.data).unwrap()["code"], 200);

    // What it may not: put something past the exchange, read the requests of others, or declare anything.
    let body = request(&app, "x").to_string();
    let straight = channel
        .basic_publish("".into(), "broadcast.dead".into(), mandatory, body.as_bytes(), BasicProperties::default())
        .await
        .unwrap()
        .await;
    assert!(straight.unwrap_err().to_string().contains("ACCESS_REFUSED"));
    for queue in ["broadcast.requests", "broadcast.dead"] {
        let channel = connection.create_channel().await.unwrap();
        let consumed = channel.basic_consume(queue.into(), "".into(), no_ack, FieldTable::default()).await;
        assert!(consumed.unwrap_err().to_string().contains("ACCESS_REFUSED"), "{queue}");
    }
    let channel = connection.create_channel().await.unwrap();
    let declared = channel.queue_declare("mine".into(), QueueDeclareOptions::default(), FieldTable::default()).await;
    assert!(declared.unwrap_err().to_string().contains("ACCESS_REFUSED"));
}
