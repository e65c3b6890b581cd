//! Devices that do not read.

use super::super::testing::{Device, Said, online, retained};
use super::{eventually, start};

/// Nearly as much as one broadcast can say.
fn long() -> &'static str {
    Box::leak("x".repeat(4000).into_boxed_str())
}

#[tokio::test]
async fn a_device_that_does_not_read_delays_nobody_and_misses_nothing() {
    let node = start(|settings| settings.send_buffer_bytes = 8192);
    let mut slow = Device::online_with_small_buffer(node.port).await;
    let (mut fast, _) = Device::online(node.port, "web", 0).await;
    let body = long();
    // Twice: the second time the poll watches it already.
    for _ in 0..2 {
        for _ in 0..500 {
            node.ledger.say("demo", online(body));
            fast.contents(1).await;
        }
        eventually("one is behind", || node.metrics.sessions_behind.get() == 1).await;
        node.ledger.say("demo", online("the last"));
        let contents = slow.contents(501).await;
        assert!(contents[..500].iter().all(|content| content == body));
        assert_eq!(contents[500], "the last");
        node.ledger.say("demo", online("live again"));
        assert_eq!(slow.contents(1).await, ["live again"]);
        fast.contents(2).await;
        eventually("none is behind", || node.metrics.sessions_behind.get() == 0).await;
    }
    eventually("all are counted", || node.metrics.deliveries.get() == 2 * 2 * 502).await;
}

/// What is retained goes out in one piece (50 of 4 KB) or, of more than a piece holds, frame by frame (100): in as many parts as
/// the socket takes.
#[tokio::test]
async fn a_device_that_reads_its_backlog_late_has_all_of_it_in_order() {
    for count in [50, 100] {
        let node = start(|settings| settings.send_buffer_bytes = 8192);
        for number in 0..count {
            let body = format!("{number} {}", long());
            node.ledger.say("demo", retained(Box::leak(body.into_boxed_str())));
        }
        let (mut slow, welcome) = Device::online(node.port, "web", 0).await;
        assert_eq!(welcome["pending"], count);
        eventually("it is behind", || node.metrics.sessions_behind.get() == 1).await;
        // Nothing that is said meanwhile comes before what is retained.
        node.ledger.say("demo", online("live"));
        let contents = slow.contents(count + 1).await;
        let numbers: Vec<_> = contents[..count].iter().map(|content| content.split(' ').next().unwrap()).collect();
        assert_eq!(numbers, (0..count).map(|number| number.to_string()).collect::<Vec<_>>());
        assert_eq!(contents[count], "live");
        eventually("all are counted", || node.metrics.deliveries.get() == count as u64 + 1).await;
    }
}

#[tokio::test]
async fn one_further_behind_than_the_window_is_closed_and_comes_back_with_its_cursor() {
    let node = start(|settings| (settings.send_buffer_bytes, settings.recent_frames) = (8192, 16));
    let (mut slow, _) = Device::online(node.port, "web", 0).await;
    let (mut fast, _) = Device::online(node.port, "web", 0).await;
    let body = long();
    while node.metrics.evicted.get() == 0 {
        node.ledger.say("demo", retained(body));
        fast.contents(1).await;
    }
    // It reads what had been sent, each once, in order; then the connection ends, by a close frame if that had room.
    let mut cursor = 0;
    let mut received = 0u64;
    let mut closed = None;
    while let Some(message) = slow.message().await {
        if let tokio_tungstenite::tungstenite::Message::Close(Some(frame)) = &message {
            closed = Some(frame.reason.to_string());
        }
        if let tokio_tungstenite::tungstenite::Message::Text(text) = message {
            let told: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!(told["id"].as_u64().unwrap() > cursor);
            cursor = told["id"].as_u64().unwrap();
            received += 1;
        }
    }
    assert!(received > 0);
    if let Some(reason) = closed {
        assert!(reason.starts_with(r#"{"reconnectAfterMs":"#), "{reason}");
    }
    let (mut back, welcome) = Device::online(node.port, "web", cursor).await;
    let pending = welcome["pending"].as_u64().unwrap();
    assert!(pending > 0);
    for _ in 0..pending {
        let told = back.next().await;
        assert!(told["id"].as_u64().unwrap() > cursor);
        cursor = told["id"].as_u64().unwrap();
    }
    assert_eq!(welcome["head"], cursor);
}

#[tokio::test]
async fn what_is_deleted_or_expires_while_a_device_is_behind_is_not_sent() {
    let node = start(|settings| settings.send_buffer_bytes = 8192);
    let (mut slow, _) = Device::online(node.port, "web", 0).await;
    let (mut fast, _) = Device::online(node.port, "web", 0).await;
    let body = long();
    let mut more = 100;
    while more > 0 {
        node.ledger.say("demo", online(body));
        fast.contents(1).await;
        // Well behind: the kernel still moves some bytes from one buffer to the other.
        more -= i32::from(node.metrics.sessions_behind.get() > 0);
    }
    let target = node.ledger.say("demo", retained("deleted"));
    node.ledger.say("demo", Said { ttl_ms: Some(5_000), ..online("expired") });
    fast.contents(2).await;
    node.ledger.recall_now("demo", target);
    assert_eq!(fast.next().await["type"], "recall");
    node.advance_clock(5_000, &mut fast).await;
    let mut last = slow.next().await;
    while last["content"] == body {
        last = slow.next().await;
    }
    assert_eq!(last, serde_json::json!({ "type": "recall", "id": target }));
    assert_eq!(slow.contents(1).await, ["then"]);
}
