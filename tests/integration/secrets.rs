//! What nobody may see: passwords, secrets, tokens, check sums and bodies; not even at log level trace, and least when something
//! goes wrong.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lapin::BasicProperties;
use serde_json::json;

use crate::support::broadcastd::{App, Process};
use crate::support::device::Device;
use crate::support::guard::folder;
use crate::support::rabbitmq::{RabbitMq, USERS};
use crate::support::redis::Redis;
use crate::support::sender::{Api, Signature, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, ports, unique, until};

/// What was said by whom, and what may not be in it.
#[derive(Default)]
struct Ear {
    secrets: Vec<String>,
    heard: Vec<(String, String)>,
}

impl Ear {
    /// In each form that a debug print or an encoding might give it.
    fn secret(&mut self, secret: &str) {
        let bytes = format!("{:?}", secret.as_bytes());
        let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.secrets.extend([
            secret.to_owned(),
            bytes.trim_matches(['[', ']']).to_owned(),
            hex,
            BASE64_STANDARD.encode(secret).trim_end_matches('=').to_owned(),
        ]);
    }

    /// All that a process lets out: its logs, and what it serves to the operator.
    async fn listen(&mut self, name: &str, process: &Process) {
        self.heard.push((format!("{name}: output"), process.output()));
        if let Ok((_, body)) = process.readiness().await {
            self.heard.push((format!("{name}: readiness"), body));
            self.heard.push((format!("{name}: metrics"), process.metrics().await));
        }
    }

    fn judge(&self) {
        for (name, text) in &self.heard {
            for secret in &self.secrets {
                let at = text.find(secret.as_str());
                let line =
                    at.map(|at| text[..at].lines().count().saturating_sub(1)).and_then(|line| text.lines().nth(line));
                assert!(at.is_none(), "{name} shows {secret:?}: {line:?}");
            }
        }
    }
}

fn file(text: &str) -> String {
    let file = folder("secret").join("secret");
    // As an editor leaves it: with a line end.
    std::fs::write(&file, format!("{text}\n")).unwrap();
    file.to_str().unwrap().to_owned()
}

fn traced(process: Process) -> Process {
    process.with("log.level", "trace").with("log.format", "json")
}

#[tokio::test]
async fn no_secret_is_ever_shown_whatever_happens() {
    let mut ear = Ear::default();
    let redis = Redis::dedicated(&[]);
    let redis_password = "redis-password-7f3a";
    redis.command(&["ACL", "SETUSER", "broadcastd", "resetpass", &format!(">{redis_password}")]);
    let (mut app, mut filed) = (App { per_minute: 6, ..App::new() }, App::new());
    app.secret = format!("app-secret-91c2-{}", app.key);
    filed.secret = format!("filed-secret-44d0-{}", filed.key);
    let url = redis.url().replace("change-me", redis_password);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &url, std::slice::from_ref(&app));
    for secret in [USERS[0].1, redis_password, &app.secret, &filed.secret, "eyJ0eXAi", "eyJhbGci"] {
        ear.secret(secret);
    }

    // Secrets from files for the worker, from the environment for the others; an app's from a file for all.
    let (amqp_file, redis_file, secret_file) = (file(&stack.amqp_url), file(&stack.redis_url), file(&filed.secret));
    let more = format!("[[apps]]\nkey = {:?}\nsecret_file = {secret_file:?}\n", filed.key);
    let role = |role: &str| traced(stack.role(role).settings(&more));
    let worker = role("worker").with("amqp.url", "amqp://nobody@127.0.0.1:1/").with("amqp.url_file", &amqp_file);
    let worker = worker.with("redis.url", "redis://127.0.0.1:1").with("redis.url_file", &redis_file);
    let (worker, node, api) = tokio::join!(worker.start(), role("node").start(), role("api").start());

    // What succeeds.
    let body = |what: &str| format!("body-{what}-5e5e");
    let mut device = Device::online(&filed, "ios", &node.device_url()).await;
    Api::new(&api.api_url(), &filed).broadcast(&body("filed"), true).await;
    assert_eq!(device.expect_broadcast(SOON).await.content, body("filed"));
    let mut device = Device::online(&app, "ios", &node.device_url()).await;
    let sender = Api::new(&api.api_url(), &app);
    let signature = Signature::new(&app);
    let signed = sender.signed("msg/broadcastMsg.action", &[("body", &body("signed"))], &signature).await;
    assert_eq!(signed["code"], 200, "{signed}");
    let id = sender.broadcast(&body("online"), false).await.to_string();
    assert_eq!(sender.call("history/queryBroadcastMsgById.action", &[("broadcastId", &id)]).await["code"], 200);
    assert_eq!(sender.call("history/delBroadcastMsgById.action", &[("broadcastId", &id)]).await["code"], 200);
    let amqp = stack.amqp().await;
    amqp.accepted(&retained(&app, &body("retained"))).await;
    device.collect(3, SOON).await;

    // What is refused: replayed, forged, malformed, over the limit, with nobody to tell, by a device with a bad token.
    let replayed = sender.signed("msg/broadcastMsg.action", &[("body", &body("replayed"))], &signature).await;
    assert_eq!(replayed["code"], 414);
    let forged =
        Signature { check_sum: signature.check_sum.replace('a', "b").replace('1', "2"), ..Signature::new(&app) };
    assert_eq!(sender.signed("msg/broadcastMsg.action", &[("body", &body("forged"))], &forged).await["code"], 414);
    let long = body("long").repeat(1000);
    assert_eq!(sender.call("msg/broadcastMsg.action", &[("body", &long)]).await["code"], 414);
    let mut unknown = request(&app, &body("unknown"));
    unknown["appKey"] = "nobody".into();
    amqp.send(unknown.to_string().as_bytes()).await;
    amqp.send(format!("{{\"body\": \"{}", body("torn")).as_bytes()).await;
    amqp.send(json!({ "appKey": app.key, "body": { "deep": body("deep") } }).to_string().as_bytes()).await;
    let nowhere = BasicProperties::default().with_reply_to("no.such.queue".into()).with_correlation_id("c".into());
    amqp.publish(request(&app, &body("nowhere")).to_string().as_bytes(), nowhere).await;
    for number in 0..6 {
        amqp.request(&request(&app, &body(&format!("flood-{number}")))).await;
    }
    let stranger = App { secret: "stranger-secret-0b0b".to_owned(), ..app.clone() };
    assert!(Device::new(&stranger, "ios").try_login(&node.device_url()).await.is_err());
    for what in [
        "filed", "signed", "online", "retained", "replayed", "forged", "long", "unknown", "torn", "deep", "nowhere",
        "flood-0", "flood-5",
    ] {
        ear.secret(&body(what));
    }
    for secret in [&stranger.secret, &signature.check_sum, &forged.check_sum, &forged.nonce] {
        ear.secret(secret);
    }

    // What cannot connect: a wrong password, a login without one, nobody there; and settings that cannot be read.
    let wrong = "wrong-password-3c3c";
    ear.secret(wrong);
    let amqp_wrong = stack.amqp_url.replace(USERS[0].1, wrong);
    let redis_wrong = stack.redis_url.replace(redis_password, wrong);
    let elsewhere = |url: &str| {
        let (before, after) = url.rsplit_once("127.0.0.1:").unwrap();
        let path = after.split_once('/').map_or("", |(_, path)| path);
        format!("{before}127.0.0.1:{}/{path}", ports::free())
    };
    let mut failing = [
        ("refused by RabbitMQ", role("worker").with("amqp.url", &amqp_wrong), "amqp"),
        ("API refused by RabbitMQ", role("api").with("amqp.url", &amqp_wrong), "amqp"),
        ("refused by Redis", role("node").with("redis.url", &redis_wrong), "redis"),
        ("worker refused by Redis", role("worker").with("redis.url", &redis_wrong), "redis"),
        ("no RabbitMQ", role("worker").with("amqp.url", elsewhere(&stack.amqp_url)), "amqp"),
        ("no vhost", role("worker").with("amqp.url", format!("{}-none", stack.amqp_url)), "amqp"),
        ("no Redis", role("node").with("redis.url", elsewhere(&stack.redis_url)), "redis"),
    ];
    for (name, process, dependency) in &mut failing {
        process.spawn();
        until(&format!("a reason: {name}"), SOON, async || match process.readiness().await? {
            (503, body)
                if body.contains(&format!("\"{dependency}\":{{\"ready\":false"))
                    && !body.contains("not connected yet") =>
            {
                Ok(())
            }
            (_, body) => Err(body),
        })
        .await;
        ear.listen(name, process).await;
    }
    for (name, process) in [
        ("config check", role("config check")),
        (
            "config check with files",
            role("config check").with("amqp.url_file", &amqp_file).with("redis.url_file", &redis_file),
        ),
        (
            "config check with a query",
            role("config check").with("redis.url", format!("unix:///run/redis.sock?user=u&pass={redis_password}")),
        ),
        ("no URL", role("worker").with("amqp.url", format!("http://broadcastd:{wrong}@x"))),
        ("no Redis URL", role("worker").with("redis.url", format!("redis://broadcastd:{wrong}@:x:y"))),
        ("no number", role("worker").with("amqp.prefetch", wrong)),
        ("no section", role("worker").with("embedded", wrong)),
        ("no mode", role("node").with("redis.mode", wrong)),
        ("no limit", role("api").settings(&format!("[[apps]]\nkey = 'x'\nsecret = 'x'\nper_day = {wrong:?}\n"))),
        ("a level that prints secrets", role("worker").with("log.level", "lapin=trace")),
    ] {
        let mut process = process;
        process.spawn();
        let code = process.wait(SOON).await.code();
        assert_eq!(code == Some(0), name.starts_with("config check"), "{name}: {}", process.output());
        ear.listen(name, &process).await;
    }

    // A Redis that goes away under load, and a token that is used twice.
    drop(redis);
    worker.wait_unready().await;
    amqp.send(request(&app, &body("held")).to_string().as_bytes()).await;
    ear.secret(&body("held"));
    let _ = sender.try_call("msg/broadcastMsg.action", &[("body", &body("away"))]).await;
    ear.secret(&body("away"));
    until("held", SOON, async || match worker.metric("broadcastd_requests_held").await {
        0.0 => Err("nothing is held"),
        _ => Ok(()),
    })
    .await;
    for (name, process) in [("worker", &worker), ("node", &node), ("api", &api)] {
        ear.listen(name, process).await;
        assert!(process.output().contains("\"level\":\"TRACE\""), "{name} was to log at level trace");
    }
    ear.judge();
}

#[tokio::test]
async fn a_standalone_shows_no_secret_either() {
    let mut ear = Ear::default();
    let app = App { secret: format!("app-secret-77aa-{}", unique("s")), ..App::new() };
    let process = traced(Process::new("standalone", std::slice::from_ref(&app)).with("embedded.path", "store.redb"));
    let process = process.start().await;
    let mut device = Device::online(&app, "web", &process.device_url()).await;
    let signature = Signature::new(&app);
    let sender = Api::new(&process.api_url(), &app);
    for _ in 0..2 {
        sender.signed("msg/broadcastMsg.action", &[("body", "body-alone-1d1d")], &signature).await;
    }
    device.collect(1, SOON).await;
    for secret in [&app.secret, &signature.check_sum, "body-alone-1d1d", "eyJ0eXAi", "eyJhbGci"] {
        ear.secret(secret);
    }
    ear.listen("standalone", &process).await;
    ear.judge();
}
