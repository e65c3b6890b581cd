//! Who may do what, and what nobody may see.

use lapin::BasicProperties;
use serde_json::json;

use crate::support::broadcastd::{App, Process};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::{Api, Signature, request};
use crate::support::stack::Stack;
use crate::support::{SOON, until};

const SEND: &str = "msg/broadcastMsg.action";

// ---- A signature is good once.

#[tokio::test]
async fn a_call_is_good_once_for_all_replicas_and_over_their_restart() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let _worker = stack.worker().await;
    let (mut first, second) = tokio::join!(stack.api(), stack.api());
    let signature = Signature::new(&app);
    let form = [("body", "hello"), ("requestId", "r-1")];
    let answer = Api::new(&first.api_url(), &app).signed(SEND, &form, &signature).await;
    assert_eq!(answer["code"], 200, "{answer}");
    // The same again, elsewhere, and with other content: refused, whatever the request id.
    for (url, form) in
        [(second.api_url(), &form[..]), (second.api_url(), &[("body", "forged")]), (first.api_url(), &form[..])]
    {
        let replayed = Api::new(&url, &app).signed(SEND, form, &signature).await;
        assert_eq!(
            (&replayed["code"], replayed["desc"].as_str().unwrap().contains("used before")),
            (&json!(414), true)
        );
    }
    first.kill();
    first.restart().await;
    let replayed = Api::new(&first.api_url(), &app).signed(SEND, &form, &signature).await;
    assert_eq!(replayed["code"], 414, "{replayed}");
    // As the SDKs retry: signed anew, under the same request id.
    let again = Api::new(&second.api_url(), &app).call(SEND, &form).await;
    assert_eq!(again, answer);

    // It is forgotten when it could not be used anyway; and the key shows nothing that could be sent.
    let redis = Redis::shared();
    let used = redis.command(&["--scan", "--pattern", &format!("{}*:used:*", stack.prefix)]);
    let keys: Vec<&str> = used.lines().collect();
    assert_eq!(keys.len(), 2, "{used}");
    for key in keys {
        assert!(!key.contains(&signature.check_sum) && !key.contains(&signature.nonce), "{key}");
        let ttl: u64 = redis.command(&["PTTL", key]).parse().unwrap();
        assert!((600_000..=660_000).contains(&ttl), "{ttl}");
    }
}

#[tokio::test]
async fn of_a_hundred_equal_calls_at_once_one_is_taken() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let _worker = stack.worker().await;
    let (first, second) = tokio::join!(stack.api(), stack.api());
    let signature = Signature::new(&app);
    let calls = (0..100).map(|number| {
        let api = Api::new(&if number % 2 == 0 { first.api_url() } else { second.api_url() }, &app);
        let signature = &signature;
        async move { api.signed(SEND, &[("body", &format!("number {number}"))], signature).await["code"].clone() }
    });
    let codes = futures_util::future::join_all(calls).await;
    assert_eq!(codes.iter().filter(|code| **code == 200).count(), 1, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| **code == 414).count(), 99, "{codes:?}");
}

#[tokio::test]
async fn a_standalone_remembers_calls_over_a_kill() {
    let app = App::new();
    let mut server =
        Process::new("standalone", std::slice::from_ref(&app)).with("embedded.path", "store.redb").start().await;
    let signature = Signature::new(&app);
    let call = async |url: String| Api::new(&url, &app).signed(SEND, &[("body", "hello")], &signature).await;
    assert_eq!(call(server.api_url()).await["code"], 200);
    assert_eq!(call(server.api_url()).await["code"], 414);
    server.kill();
    server.restart().await;
    assert_eq!(call(server.api_url()).await["code"], 414);
}

#[tokio::test]
async fn without_redis_no_call_is_let_in_and_none_is_sent() {
    let app = App::new();
    let mut redis = Redis::durable();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let (_worker, api) = tokio::join!(stack.worker(), stack.api());
    let sender = Api::new(&api.api_url(), &app);
    let signature = Signature::new(&app);
    redis.kill();
    let answer = sender.signed(SEND, &[("body", "lost")], &signature).await;
    assert_eq!(answer["code"], 503, "{answer}");
    redis.start();
    until("let in", SOON, async || match sender.call(SEND, &[("body", "found")]).await {
        answer if answer["code"] == 200 => Ok(()),
        answer => Err(answer.to_string()),
    })
    .await;
    let listed = sender.call("history/queryBroadcastMsg.action", &[("limit", "10")]).await.to_string();
    assert!(listed.contains("found") && !listed.contains("lost"), "{listed}");
}

// ---- Replies go where they may.

#[tokio::test]
async fn a_reply_goes_only_where_it_may() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let worker = stack.role("worker").with("worker.allowed_reply_queues", "replies.*,amq.gen-*").start().await;
    let amqp = stack.amqp().await;
    let mut held = Vec::new();
    for queue in ["replies.shop", "other.queue"] {
        amqp.declare_queue(queue).await;
    }
    let ask = async |reply_to: &str, request: serde_json::Value| {
        let properties = BasicProperties::default().with_reply_to(reply_to.into()).with_correlation_id("c".into());
        amqp.publish(request.to_string().as_bytes(), properties).await;
        request
    };
    for forbidden in ["other.queue", "broadcast.requests", "broadcast.dead", "amq.rabbitmq.reply-to.forged"] {
        held.push(ask(forbidden, request(&app, forbidden)).await);
    }
    ask("replies.shop", request(&app, "allowed")).await;
    until("a reply", SOON, async || match amqp.ready("replies.shop").await {
        1 => Ok(()),
        count => Err(count),
    })
    .await;
    // Decided all the same, before the one that was answered.
    for request in &held {
        assert_eq!(amqp.request(request).await["code"], 200);
    }
    assert_eq!(worker.metric("broadcastd_repeated_total").await, 4.0);
    let metrics = worker.metrics().await;
    assert!(metrics.contains("broadcastd_replies_lost_total{reason=\"bad_reply_to\"} 4"), "{metrics}");
    assert_eq!((amqp.ready("other.queue").await, amqp.ready("broadcast.dead").await), (0, 0));
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
    // A refused one of whom nobody may be told is kept with its reason, as if it had asked for no reply.
    let mut unknown = request(&app, "x");
    unknown["appKey"] = "nobody".into();
    ask("other.queue", unknown).await;
    assert_eq!(amqp.dead_letter().await.headers["x-reason"], "unknown_app");
}

#[tokio::test]
async fn by_default_every_queue_but_the_workers_own_may_be_replied_to() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let worker = stack.worker().await;
    let amqp = stack.amqp().await;
    amqp.declare_queue("any.queue").await;
    for reply_to in ["broadcast.requests", "broadcast.dead", "any.queue"] {
        let properties = BasicProperties::default().with_reply_to(reply_to.into()).with_correlation_id("c".into());
        amqp.publish(request(&app, reply_to).to_string().as_bytes(), properties).await;
    }
    until("a reply", SOON, async || match amqp.ready("any.queue").await {
        1 => Ok(()),
        count => Err(count),
    })
    .await;
    assert_eq!(
        (worker.metric("broadcastd_accepted_total").await, worker.metric("broadcastd_consumed_total").await),
        (3.0, 3.0)
    );
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
}
