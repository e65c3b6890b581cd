//! The whole node, against a ledger in memory and real WebSockets.

use super::testing::{Device, FakeLedger, Said, online, retained};
use super::*;

mod churn;
mod hostile;
mod slow;

struct Fixture {
    node: Node,
    ledger: Arc<FakeLedger>,
    metrics: Metrics,
    port: u16,
    _stop: tokio_util::sync::DropGuard,
}

fn start(change: impl FnOnce(&mut NodeSettings)) -> Fixture {
    start_with(change, None)
}

fn start_with(change: impl FnOnce(&mut NodeSettings), http: Option<HttpHandOff>) -> Fixture {
    let mut settings = NodeSettings::for_tests();
    change(&mut settings);
    let ledger = FakeLedger::new();
    let metrics = Metrics::new().unwrap();
    let listeners = listen("127.0.0.1:0".parse().unwrap(), settings.shard_count(), 1024).unwrap();
    let shutdown = CancellationToken::new();
    let node =
        Node::start(settings, &testing::directory(), ledger.clone(), metrics.clone(), listeners, http, &shutdown)
            .unwrap();
    let port = node.local_addr().port();
    Fixture { node, ledger, metrics, port, _stop: shutdown.drop_guard() }
}

/// Waits until something that the node does in its own time is so.
async fn eventually(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl Fixture {
    /// Lets the ledger's time pass, and the node learn of it: by filling a gap. `device`: one that is online.
    async fn advance_clock(&self, ms: u64, device: &mut Device) {
        self.ledger.advance_clock(ms);
        self.ledger.say("demo", Said { arrives: false, ttl_ms: Some(1), ..online("expires before it is read") });
        self.ledger.advance_clock(1);
        self.ledger.say("demo", online("then"));
        assert_eq!(device.contents(1).await, ["then"]);
    }
}

#[tokio::test]
async fn a_login_gets_what_is_retained_and_then_what_is_live() {
    let node = start(|_| {});
    node.ledger.say("demo", retained("kept"));
    let gone = node.ledger.say("demo", online("gone"));
    let (mut device, welcome) = Device::online(node.port, "web", 0).await;
    assert_eq!((&welcome["head"], &welcome["pending"]), (&gone.into(), &1.into()));
    assert_eq!(device.contents(1).await, ["kept"]);
    node.ledger.say("demo", online("live"));
    let told = device.next().await;
    assert_eq!((told["content"].as_str(), told["fromAccount"].as_str()), (Some("live"), Some("ops")));
    assert!(told["time"].as_u64().unwrap() > 1_700_000_000_000);
}

#[tokio::test]
async fn only_a_devices_platform_and_app_reach_it() {
    let node = start(|settings| settings.shards = 1);
    let (mut web, _) = Device::online(node.port, "web", 0).await;
    let (mut ios, _) = Device::online(node.port, "ios", 0).await;
    let mut other = Device::connect(node.port).await;
    other.log_in("other", "web", 0).await;
    assert_eq!(other.next().await["type"], "welcome");
    node.ledger.say("demo", Said { targets: Some("ios"), ..online("for ios") });
    node.ledger.say("demo", online("for all"));
    node.ledger.say("other", online("elsewhere"));
    assert_eq!(web.contents(1).await, ["for all"]);
    assert_eq!(ios.contents(2).await, ["for ios", "for all"]);
    assert_eq!(other.contents(1).await, ["elsewhere"]);
}

#[tokio::test]
async fn what_is_said_between_subscription_and_snapshot_comes_once() {
    let node = start(|_| {});
    node.ledger.say_at_join("demo", retained("in between"));
    let (mut device, welcome) = Device::online(node.port, "web", 0).await;
    assert_eq!(welcome["pending"], 1);
    node.ledger.say("demo", online("after"));
    assert_eq!(device.contents(2).await, ["in between", "after"]);
}

#[tokio::test]
async fn a_gap_is_filled_from_the_log_in_order() {
    let node = start(|_| {});
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    node.ledger.say("demo", Said { arrives: false, ..online("lost 1") });
    node.ledger.say("demo", Said { arrives: false, ..retained("lost 2") });
    node.ledger.say("demo", online("arrives"));
    assert_eq!(device.contents(3).await, ["lost 1", "lost 2", "arrives"]);
    assert_eq!(node.metrics.backfills.get(), 1);
    assert_eq!(node.metrics.lost_envelopes.get(), 0);
}

#[tokio::test]
async fn the_last_one_lost_is_found_by_the_renewal_and_a_dead_subscription_made_anew() {
    let node = start(|settings| settings.renew_seconds = 1);
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    node.ledger.kill_subscription("demo");
    node.ledger.say("demo", online("lost"));
    assert_eq!(device.contents(1).await, ["lost"]);
    node.ledger.say("demo", online("live again"));
    assert_eq!(device.contents(1).await, ["live again"]);
    assert_eq!(node.metrics.backfills.get(), 1, "the second came by the subscription");
}

#[tokio::test]
async fn an_interruption_is_made_up_for_at_once() {
    let node = start(|settings| (settings.renew_seconds, settings.lease_seconds) = (600, 6000));
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    node.ledger.say("demo", Said { arrives: false, ..online("lost") });
    node.ledger.interrupt();
    assert_eq!(device.contents(1).await, ["lost"]);
}

#[tokio::test]
async fn a_trimmed_log_is_counted_and_what_is_retained_comes() {
    let node = start(|settings| settings.renew_seconds = 1);
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    for said in [online("gone"), retained("kept"), online("newest")] {
        node.ledger.say("demo", Said { arrives: false, ..said });
    }
    node.ledger.trim("demo");
    assert_eq!(device.contents(2).await, ["kept", "newest"]);
    assert_eq!(node.metrics.lost_envelopes.get(), 1);
}

#[tokio::test]
async fn a_deleted_one_is_told_to_those_online_and_not_sent_to_others() {
    let node = start(|_| {});
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    let target = node.ledger.say("demo", retained("regretted"));
    device.contents(1).await;
    node.ledger.recall_now("demo", target);
    assert_eq!(device.next().await, serde_json::json!({ "type": "recall", "id": target }));
    let (_, welcome) = Device::online(node.port, "web", 0).await;
    assert_eq!(welcome["pending"], 0);
}

#[tokio::test]
async fn a_device_that_comes_back_continues_at_its_cursor() {
    let node = start(|_| {});
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    let had = node.ledger.say("demo", online("had"));
    device.contents(1).await;
    drop(device);
    node.ledger.say("demo", online("missed"));
    node.ledger.say("demo", retained("missed too"));
    let (mut device, welcome) = Device::online(node.port, "web", had).await;
    assert_eq!(welcome["pending"], 2);
    assert_eq!(device.contents(2).await, ["missed", "missed too"]);
    // After the resume window only what is retained.
    node.advance_clock(61_000, &mut device).await;
    let (mut device, _) = Device::online(node.port, "web", had).await;
    assert_eq!(device.contents(2).await, ["missed too", "then"]);
}

#[tokio::test]
async fn expiry_follows_the_ledgers_clock() {
    let node = start(|_| {});
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    node.ledger.say("demo", Said { ttl_ms: Some(100_000), ..online("for 100 s") });
    device.contents(1).await;
    let (_, welcome) = Device::online(node.port, "web", 0).await;
    assert_eq!(welcome["pending"], 1);
    node.advance_clock(100_000, &mut device).await;
    let (_, welcome) = Device::online(node.port, "web", 0).await;
    assert_eq!(welcome["pending"], 0);
}

#[tokio::test]
async fn what_the_ledger_loses_is_written_back_and_nobody_gets_it_twice() {
    let node = start(|settings| settings.renew_seconds = 1);
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    node.ledger.say("demo", retained("kept"));
    let deleted = node.ledger.say("demo", retained("deleted"));
    device.contents(2).await;
    node.ledger.recall_now("demo", deleted);
    device.next().await;
    let head = node.ledger.head("demo");
    node.ledger.lose_everything();
    assert_eq!(node.ledger.until_restored().await, (head, 1, vec![deleted]));
    node.ledger.say("demo", online("after"));
    assert_eq!(device.contents(1).await, ["after"]);
    let (mut late, _) = Device::online(node.port, "web", 0).await;
    assert_eq!(late.contents(1).await, ["kept"]);
    assert_eq!(node.metrics.restored.get(), 1);
}

#[tokio::test]
async fn a_ledger_that_is_down_is_served_around_and_said() {
    let node = start(|settings| settings.renew_seconds = 1);
    node.ledger.say("demo", retained("kept"));
    let _online = Device::online(node.port, "web", 0).await;
    let mut ready = node.node.ready();
    node.ledger.set_down(true);
    ready.wait_for(Result::is_err).await.unwrap();
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    assert_eq!(device.contents(1).await, ["kept"], "from memory");
    // Another app cannot be opened now: its device waits, and is let in afterwards.
    let mut waiting = Device::connect(node.port).await;
    waiting.log_in("other", "web", 0).await;
    node.ledger.set_down(false);
    assert_eq!(waiting.next().await["type"], "welcome");
    ready.wait_for(Result::is_ok).await.unwrap();
}

#[tokio::test]
async fn an_app_without_sessions_is_let_go_and_opened_again() {
    let node = start(|settings| (settings.renew_seconds, settings.linger_seconds) = (1, 0));
    let (device, _) = Device::online(node.port, "web", 0).await;
    drop(device);
    node.ledger.until_left("demo").await;
    node.ledger.say("demo", retained("meanwhile"));
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    assert_eq!(device.contents(1).await, ["meanwhile"]);
    assert_eq!(node.ledger.joins(), 2);
}

#[tokio::test]
async fn many_logins_read_the_ledger_once() {
    let node = start(|_| {});
    for _ in 0..100 {
        node.ledger.say("demo", retained("kept"));
    }
    let devices = (0..40).map(|_| async {
        let (mut device, welcome) = Device::online(node.port, "web", 0).await;
        assert_eq!(welcome["pending"], 100);
        device.contents(100).await;
    });
    futures_util::future::join_all(devices).await;
    assert_eq!(node.ledger.joins(), 1);
    assert_eq!(node.metrics.logins.get(), 40);
}

#[tokio::test]
async fn draining_sends_everyone_away_with_1012_and_gives_the_lease_up_last() {
    let node = start(|_| {});
    let mut devices = Vec::new();
    for _ in 0..10 {
        devices.push(Device::online(node.port, "web", 0).await.0);
    }
    let ready = node.node.ready();
    let drain = tokio::spawn(node.node.drain(Instant::now() + Duration::from_secs(2)));
    for mut device in devices {
        let (code, reason) = device.closed().await;
        let hint: serde_json::Value = serde_json::from_str(&reason).unwrap();
        assert!(code == 1012 && hint["reconnectAfterMs"].as_u64().unwrap() >= 100, "{code} {reason}");
        // The other side closes; then the socket ends.
        assert!(device.message().await.is_none());
    }
    drain.await.unwrap();
    assert_eq!(*ready.borrow(), Err("draining".to_owned()));
    node.ledger.until_left("demo").await;
    assert_eq!(node.metrics.sessions.get(), 0);
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", node.port)).await.is_err());
}

#[tokio::test]
async fn a_part_that_fails_ends_the_node_and_is_said() {
    let node = start(|settings| settings.renew_seconds = 1);
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    node.ledger.break_down();
    tokio::time::timeout(Duration::from_secs(10), node.node.ended()).await.unwrap();
    assert!(device.message().await.is_none(), "its sockets are closed");
    // A thread likewise.
    let (stop, failed) = (CancellationToken::new(), CancellationToken::new());
    let guard = EndOnPanic { stop: stop.clone(), failed: failed.clone() };
    spawn("failing".into(), guard, || panic!("for the test")).unwrap().join().unwrap_err();
    assert!(stop.is_cancelled() && failed.is_cancelled());
}

#[tokio::test]
async fn one_that_was_there_before_the_first_broadcast_has_a_cursor() {
    let node = start(|_| {});
    let (device, welcome) = Device::online(node.port, "web", 0).await;
    assert_eq!(welcome["head"], 1);
    drop(device);
    node.ledger.say("demo", online("missed"));
    let (mut device, _) = Device::online(node.port, "web", 1).await;
    assert_eq!(device.contents(1).await, ["missed"]);
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline_whatever_the_devices_do() {
    let node = start(|_| {});
    let (_deaf, _) = Device::online(node.port, "web", 0).await;
    let deadline = Instant::now() + Duration::from_secs(1);
    node.node.drain(deadline).await;
    assert!(Instant::now() < deadline + Duration::from_secs(2));
}
