//! Who gets what at login: retained broadcasts, cursors, validity, platforms.

use crate::support::broadcastd::App;
use crate::support::checker::in_order;
use crate::support::device::Device;
use crate::support::sender::{request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, now_ms, until};

#[tokio::test]
async fn a_new_device_gets_all_that_is_retained_and_a_known_one_what_is_newer() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let amqp = stack.amqp().await;
    // Nobody is online: the node does not know the app yet.
    let first = amqp.accepted(&retained(&app, "first")).await;
    amqp.accepted(&request(&app, "for those online")).await;
    let second = amqp.accepted(&retained(&app, "second")).await;
    amqp.accepted(&retained(&app, "third")).await;

    let url = node.device_url();
    let mut new = Device::online(&app, "ios", &url).await;
    new.collect(3, SOON).await;
    let mut known = Device::new(&app, "web").with_cursor(second);
    known.login(&url).await;
    // Away for less than the resume window: it counts as having been online since its cursor.
    let mut resuming = Device::new(&app, "web").with_cursor(first);
    resuming.login(&url).await;
    let mut current = Device::new(&app, "web").with_cursor(new.cursor());
    current.login(&url).await;

    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(new.contents_up_to("end").await, ["end"]);
    let contents: Vec<&str> = new.history().iter().map(|arrival| arrival.content.as_str()).collect();
    assert_eq!(contents, ["first", "second", "third", "end"]);
    assert_eq!(known.contents_up_to("end").await, ["third", "end"]);
    assert_eq!(resuming.contents_up_to("end").await, ["for those online", "second", "third", "end"]);
    assert_eq!(current.contents_up_to("end").await, ["end"]);
}

#[tokio::test]
async fn beyond_the_resume_window_a_device_gets_only_what_is_retained() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async { stack.role("node").with("node.resume_seconds", "0").start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let first = amqp.accepted(&retained(&app, "first")).await;
    amqp.accepted(&request(&app, "for those online")).await;
    amqp.accepted(&retained(&app, "second")).await;
    let mut device = Device::new(&app, "web").with_cursor(first);
    device.login(&node.device_url()).await;
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(device.contents_up_to("end").await, ["second", "end"]);
}

#[tokio::test]
async fn what_has_expired_is_not_delivered() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let amqp = stack.amqp().await;
    let mut short = retained(&app, "short");
    short["ttlSeconds"] = 1.into();
    let reply = amqp.request(&short).await;
    let expires = reply["msg"]["expireTime"].as_u64().unwrap();
    amqp.accepted(&retained(&app, "long")).await;
    // Online in time: this one gets it, and its login makes the node hold it in memory.
    let mut early = Device::online(&app, "web", &node.device_url()).await;
    assert_eq!(early.contents_up_to("long").await, ["short", "long"]);
    until("expired", SOON, async || if now_ms() > expires { Ok(()) } else { Err("not yet") }).await;
    let mut late = Device::online(&app, "web", &node.device_url()).await;
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(late.contents_up_to("end").await, ["long", "end"]);
    // A node that learns of the app only now reads no expired one either.
    let other_node = stack.node().await;
    let mut later = Device::online(&app, "web", &other_node.device_url()).await;
    amqp.accepted(&request(&app, "the very end")).await;
    assert_eq!(later.contents_up_to("the very end").await, ["long", "the very end"]);
}

#[tokio::test]
async fn the_newest_hundred_are_retained_and_platforms_are_kept_apart() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let amqp = stack.amqp().await;
    for number in 0..120 {
        let mut request = retained(&app, &format!("number {number}"));
        if number % 2 == 0 {
            request["targetOs"] = serde_json::json!(["ios"]);
        }
        amqp.accepted(&request).await;
    }
    let mut phone = Device::online(&app, "ios", &node.device_url()).await;
    let mut browser = Device::online(&app, "web", &node.device_url()).await;
    amqp.accepted(&request(&app, "end")).await;
    let on_phone = phone.contents_up_to("end").await;
    assert_eq!(on_phone.len(), 101);
    assert_eq!(on_phone[0], "number 20");
    let in_browser = browser.contents_up_to("end").await;
    assert_eq!(in_browser.len(), 51);
    assert_eq!(in_browser[0], "number 21");
    in_order(phone.history()).unwrap();
    in_order(browser.history()).unwrap();
}

/// Row 41, the worst of it: an entry that this version cannot read at all costs itself, not the app.
#[tokio::test]
async fn an_envelope_that_cannot_be_read_stops_nothing() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let (_worker, node) = tokio::join!(stack.worker(), stack.node());
    let amqp = stack.amqp().await;
    let before = amqp.accepted(&retained(&app, "before")).await;
    let (id, bad) = (before + 1, r#"{"v":9,"id":"?"}"#);
    let key = |name: &str| format!("{}{{{}}}:{name}", stack.prefix, app.key);
    let redis = crate::support::redis::Redis::shared();
    redis.command(&["XADD", &key("log"), &format!("{id}-0"), "e", bad]);
    redis.command(&["ZADD", &key("retained"), &id.to_string(), bad]);
    let meta = redis.command(&["GET", &key("meta")]);
    redis.command(&["SET", &key("meta"), &meta.trim().replace(&before.to_string(), &id.to_string())]);

    let mut device = Device::online(&app, "web", &node.device_url()).await;
    amqp.accepted(&request(&app, "after")).await;
    assert_eq!(device.contents_up_to("after").await, ["before", "after"]);
}
