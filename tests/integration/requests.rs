//! Requests by plain AMQP: verdicts, limits, repetition, and everything malformed.

use lapin::BasicProperties;
use serde_json::{Value, json};

use crate::support::SOON;
use crate::support::after_row::after_row;
use crate::support::broadcastd::App;
use crate::support::device::Device;
use crate::support::sender::{request, retained};
use crate::support::stack::Stack;

#[tokio::test]
async fn the_same_request_twice_is_one_broadcast_and_one_verdict() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let request = json!({
        "requestId": "order-1", "appKey": app.key, "from": "ops", "body": "sale", "isOffline": true, "ttl": 24,
        "targetOs": ["web", "ios"],
    });
    let first = amqp.request(&request).await;
    assert_eq!(first["code"], 200, "{first}");
    let msg = &first["msg"];
    assert_eq!(msg["body"], "sale");
    assert_eq!(msg["from"], "ops");
    assert_eq!(msg["isOffline"], true);
    assert_eq!(msg["targetOs"], json!(["ios", "web"]));
    assert_eq!(msg["expireTime"].as_u64().unwrap() - msg["createTime"].as_u64().unwrap(), 24 * 3_600_000);
    let again = amqp.request(&request).await;
    assert_eq!(again, first);

    let mut changed = request.clone();
    changed["body"] = "another sale".into();
    let conflict = amqp.request(&changed).await;
    assert_eq!(conflict["code"], 414, "{conflict}");

    amqp.accepted(&self::request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["sale", "end"]);
}

#[tokio::test]
async fn the_message_id_stands_in_for_the_request_id() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let payload = json!({ "appKey": app.key, "body": "once" }).to_string();
    for _ in 0..2 {
        amqp.publish(payload.as_bytes(), BasicProperties::default().with_message_id("m-1".into())).await;
    }
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["once", "end"]);
}

#[tokio::test]
async fn the_eleventh_in_a_minute_is_refused_and_changes_nothing() {
    let (app, other) = (App::new(), App::new());
    let stack = Stack::new(&[app.clone(), other.clone()]);
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut sent = Vec::new();
    for number in 1..=10 {
        sent.push(format!("number {number}"));
        amqp.accepted(&request(&app, &sent[number - 1])).await;
    }
    let eleventh = retained(&app, "number 11");
    let refused = amqp.request(&eleventh).await;
    assert_eq!(refused["code"], 416, "{refused}");
    assert!((1..=61).contains(&refused["retryAfter"].as_u64().unwrap()), "{refused}");
    assert!(refused["desc"].as_str().is_some_and(|desc| !desc.is_empty()), "{refused}");
    // A refusal is not stored: the same request asks anew. A repetition of an accepted one still has its verdict, and
    // another app has its own limit.
    assert_eq!(amqp.request(&eleventh).await["code"], 416);
    amqp.accepted(&request(&other, "mine")).await;
    // A refused one without a wish for a reply is kept as a dead letter that says why.
    amqp.send(request(&app, "number 12").to_string().as_bytes()).await;
    let dead = amqp.dead_letter().await;
    assert_eq!(dead.headers["x-reason"], "limit_minute");

    device.collect(10, SOON).await;
    let contents: Vec<&str> = device.history().iter().map(|arrival| arrival.content.as_str()).collect();
    assert_eq!(contents, sent);
    let late = Device::online(&app, "web", &node.device_url()).await;
    assert_eq!(late.head(), device.history()[9].id, "a refused request has no id");
}

/// What cannot become a broadcast: the payload, the code of the reply, the reason of the dead letter.
fn bad_requests(app: &App, off: &App) -> Vec<(String, Vec<u8>, u16, &'static str)> {
    let with = |changes: Value| {
        let mut request = retained(app, "x");
        for (key, value) in changes.as_object().unwrap() {
            request[key] = value.clone();
        }
        request.to_string().into_bytes()
    };
    let valid = request(app, "x").to_string();
    let mut huge = valid.clone().into_bytes();
    huge.resize(16 * 1024 * 1024, b' ');
    let mut not_utf8 = valid.clone().into_bytes();
    let at = not_utf8.len() - 2;
    not_utf8.insert(at, 0xff);
    let duplicate = format!(r#"{{"requestId":"d","appKey":"{}","body":"a","body":"b"}}"#, app.key);
    let text = |text: &str| text.as_bytes().to_vec();
    let nested = format!(r#"{{"requestId":"n","appKey":"{}","body":{}"#, app.key, "[".repeat(50_000));
    [
        ("4097 characters", with(json!({"body": "x".repeat(4097)})), 414, "body_too_long"),
        ("an empty body", with(json!({"body": ""})), 414, "no_body"),
        ("no body", text(&format!(r#"{{"requestId":"b","appKey":"{}"}}"#, app.key)), 414, "no_body"),
        ("a number as body", with(json!({"body": 7})), 414, "bad_field"),
        ("a text as isOffline", with(json!({"isOffline": "yes"})), 414, "bad_field"),
        ("a text as ttl", with(json!({"ttl": "24"})), 414, "bad_field"),
        ("a text as targetOs", with(json!({"targetOs": "ios"})), 414, "bad_field"),
        ("an unknown platform", with(json!({"targetOs": ["symbian"]})), 414, "bad_target_os"),
        ("no platform", with(json!({"targetOs": []})), 414, "bad_target_os"),
        ("ttl 0", with(json!({"ttl": 0})), 414, "bad_ttl"),
        ("ttl -1", with(json!({"ttl": -1})), 414, "bad_ttl"),
        ("ttl beyond everything", with(json!({"ttl": i64::MAX})), 414, "bad_ttl"),
        ("ttl past 64 bits", text(&valid.replace('}', r#","ttl":99999999999999999999}"#)), 414, "bad_field"),
        ("a from of 33 characters", with(json!({"from": "x".repeat(33)})), 414, "from_too_long"),
        ("an unknown field", with(json!({"isoffline": true})), 414, "bad_field"),
        ("a requestId with a space", with(json!({"requestId": "a b"})), 414, "bad_request_id"),
        ("no requestId", text(&format!(r#"{{"appKey":"{}","body":"x"}}"#, app.key)), 414, "no_request_id"),
        ("an appKey with a brace", with(json!({"appKey": "a}b"})), 414, "bad_app"),
        ("an unknown app", with(json!({"appKey": "nobody"})), 403, "unknown_app"),
        ("an app that may not", with(json!({"appKey": off.key})), 403, "not_activated"),
        ("nothing", Vec::new(), 414, "not_json"),
        ("no JSON", text("hello"), 414, "not_json"),
        ("JSON and more", text(&format!("{valid} {valid}")), 414, "not_json"),
        ("not UTF-8", not_utf8, 414, "not_utf8"),
        ("duplicate keys", text(&duplicate), 414, "bad_field"),
        ("deep nesting", text(&nested), 414, "bad_field"),
        ("deep nesting at the top", "[".repeat(60_000).into_bytes(), 414, "bad_field"),
        ("16 MiB", huge, 414, "too_large"),
    ]
    .map(|(name, payload, code, reason)| (name.to_owned(), payload, code, reason))
    .into()
}

#[tokio::test]
async fn every_bad_request_is_answered_with_its_code_and_the_next_one_is_handled() {
    let (app, off) = (App::unlimited(), App::off());
    let stack = Stack::new(&[app.clone(), off.clone()]);
    let worker = stack.worker().await;
    let amqp = stack.amqp().await;
    for (name, payload, code, _) in bad_requests(&app, &off) {
        let correlation = amqp.ask(&payload).await;
        let reply = amqp.reply(&correlation).await;
        assert_eq!(reply["code"], code, "{name}: {reply}");
        assert!(reply["desc"].as_str().is_some_and(|desc| !desc.is_empty()), "{name}: {reply}");
        amqp.accepted(&request(&app, "good")).await;
    }
    assert!(!worker.output().contains("panicked"), "{}", worker.output());
    after_row(&stack).await;
}

#[tokio::test]
async fn every_bad_request_that_nobody_waits_for_is_a_dead_letter_with_its_reason() {
    let (app, off) = (App::unlimited(), App::off());
    let stack = Stack::new(&[app.clone(), off.clone()]);
    let worker = stack.worker().await;
    let amqp = stack.amqp().await;
    let bad = bad_requests(&app, &off);
    for (name, payload, code, reason) in &bad {
        amqp.send(payload).await;
        let dead = amqp.dead_letter().await;
        assert_eq!(dead.headers.get("x-reason").map(String::as_str), Some(*reason), "{name}: {:?}", dead.headers);
        assert!(dead.headers["x-code"].contains(&code.to_string()), "{name}: {:?}", dead.headers);
        let kept = payload.len().min(64 * 1024);
        assert!(dead.payload == payload[..kept], "{name}: the dead letter is not what was sent");
        let is_whole = kept == payload.len();
        assert!(is_whole || dead.headers["x-size"].contains(&payload.len().to_string()), "{name}: {:?}", dead.headers);
    }
    amqp.accepted(&request(&app, "good")).await;
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    assert_eq!(amqp.ready("broadcast.requests").await, 0);
    let figure = worker.metric("broadcastd_dead_lettered_total").await;
    assert!((figure - bad.len() as f64).abs() < 0.1, "{figure}");
    // Foreign input is never logged raw.
    let output = worker.output();
    assert!(!output.contains("symbian") && !output.contains("[[[["), "{output}");
    after_row(&stack).await;
}
