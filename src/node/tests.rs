//! The whole node, against a ledger in memory and real WebSockets.

use super::testing::{Device, FakeLedger, online, retained};
use super::*;

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
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let shutdown = CancellationToken::new();
    let node = Node::start(settings, &testing::directory(), ledger.clone(), metrics.clone(), listener, http, &shutdown)
        .unwrap();
    let port = node.local_addr().port();
    Fixture { node, ledger, metrics, port, _stop: shutdown.drop_guard() }
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
