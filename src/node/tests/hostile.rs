//! Strangers, and devices that do not keep to the protocol.

use futures_util::SinkExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{self, Message};

use super::super::testing::{Device, online, token};
use super::{start, start_with};

/// Sends a request; returns all of the answer.
async fn http(port: u16, request: &str) -> String {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn bad_frames_are_closed_with_their_code_and_nobody_else_notices() {
    let node = start(|_| {});
    let (mut honest, _) = Device::online(node.port, "web", 0).await;
    let huge = [&[0x81, 0xfe, 0x10, 0x01, 0, 0, 0, 0][..], &[b'x'; 4097]].concat();
    for (bytes, code) in [
        (&b"\x81\x01x"[..], 1002),
        (b"\xf1\x81\0\0\0\0x", 1002),
        (b"\x8b\x80\0\0\0\0", 1002),
        (b"\x82\x81\0\0\0\0x", 1003),
        (b"\x81\x81\0\0\0\0\xff", 1007),
        (&huge, 1009),
        (b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff", 1009),
    ] {
        for logged_in in [false, true] {
            let mut device = Device::connect(node.port).await;
            if logged_in {
                device.log_in("demo", "web", 0).await;
                device.next().await;
            }
            device.socket.get_mut().write_all(bytes).await.unwrap();
            assert_eq!(device.next().await["code"], 414);
            assert_eq!(device.closed().await.0, code);
        }
    }
    node.ledger.say("demo", online("still here"));
    assert_eq!(honest.contents(1).await, ["still here"]);
    assert_eq!(node.metrics.sessions.get(), 1);
}

#[tokio::test]
async fn a_login_in_pieces_is_a_login() {
    let node = start(|_| {});
    let mut device = Device::connect(node.port).await;
    let login = format!(
        r#"{{"type":"login","app":"demo","account":"ann","device":"d","platform":"web","token":"{}"}}"#,
        token("demo", "ann", 60)
    );
    let pieces: Vec<&[u8]> = login.as_bytes().chunks(25).collect();
    for (number, piece) in pieces.iter().enumerate() {
        let first = if number == 0 { 1 } else { 0 } | if number + 1 == pieces.len() { 0x80 } else { 0 };
        let frame = [&[first, 0x80 | u8::try_from(piece.len()).unwrap(), 0, 0, 0, 0][..], piece].concat();
        for byte in [frame, b"\x89\x80\0\0\0\0".to_vec()].concat().chunks(3) {
            device.socket.get_mut().write_all(byte).await.unwrap();
        }
    }
    assert_eq!(device.next().await["type"], "welcome");
}

#[tokio::test]
async fn a_bad_login_is_told_why_and_closed_with_1008() {
    let node = start(|_| {});
    let login = |token: &str| {
        format!(r#"{{"type":"login","app":"demo","account":"ann","device":"d","platform":"web","token":"{token}"}}"#)
    };
    for (text, code) in [
        ("hello".to_owned(), 414),
        ("{\"type\":\"login\"}".to_owned(), 414),
        ("[".repeat(4096), 414),
        (login("x"), 403),
        (login(&token("demo", "ann", -1)), 403),
        (login(&token("other", "ann", 60)), 403),
        (login(&token("demo", "bob", 60)), 403),
    ] {
        let mut device = Device::connect(node.port).await;
        device.socket.send(Message::text(text)).await.unwrap();
        let error = device.next().await;
        assert_eq!((error["type"].as_str(), error["code"].as_u64()), (Some("error"), Some(code)));
        assert_eq!(device.closed().await.0, 1008);
        assert!(device.message().await.is_none());
    }
    assert_eq!(node.ledger.joins(), 0);
    assert_eq!(node.metrics.connections_refused.with_label_values(&["forbidden"]).get(), 4);
}

#[tokio::test]
async fn after_its_login_a_device_says_nothing() {
    let node = start(|_| {});
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    device.socket.send(Message::text("{}")).await.unwrap();
    assert_eq!(device.next().await["code"], 414);
    assert_eq!(device.closed().await.0, 1008);
}

#[tokio::test]
async fn who_does_not_log_in_is_closed_in_time() {
    let node = start(|settings| settings.login_seconds = 1);
    let mut silent = TcpStream::connect(("127.0.0.1", node.port)).await.unwrap();
    let mut slow = TcpStream::connect(("127.0.0.1", node.port)).await.unwrap();
    slow.write_all(b"GET /ws HTTP/1.1\r\nHost").await.unwrap();
    let mut device = Device::connect(node.port).await;
    assert_eq!(device.next().await["code"], 408);
    assert_eq!(device.closed().await.0, 1008);
    let mut nothing = Vec::new();
    silent.read_to_end(&mut nothing).await.unwrap();
    slow.read_to_end(&mut nothing).await.unwrap();
    assert!(nothing.is_empty());
    assert_eq!(node.metrics.connections_refused.with_label_values(&["no_request"]).get(), 2);
}

#[tokio::test]
async fn who_sends_and_leaves_at_once_is_gone_at_once() {
    let node = start(|_| {});
    let request = "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    for _ in 0..20 {
        let mut socket = TcpStream::connect(("127.0.0.1", node.port)).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let end = socket.read_to_end(&mut answer);
        tokio::time::timeout(std::time::Duration::from_secs(5), end).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn pings_are_answered_and_asked() {
    let node = start(|settings| settings.ping_seconds = 1);
    let (mut device, _) = Device::online(node.port, "web", 0).await;
    device.socket.send(Message::Ping("are you there".into())).await.unwrap();
    let mut seen = (false, false);
    while seen != (true, true) {
        match futures_util::StreamExt::next(&mut device.socket).await.unwrap().unwrap() {
            Message::Pong(payload) => seen.0 |= payload.as_ref() == b"are you there",
            Message::Ping(_) => seen.1 = true,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn who_is_not_heard_from_after_two_pings_is_closed() {
    let node = start(|settings| settings.ping_seconds = 1);
    let (mut listening, _) = Device::online(node.port, "web", 0).await;
    // It is not polled, so it answers no ping.
    let (deaf, _) = Device::online(node.port, "web", 0).await;
    let both = node.metrics.sessions_closed.with_label_values(&["not_heard_from"]);
    while both.get() == 0 {
        let wait = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(wait, listening.message()).await.is_err(), "the other one stays");
    }
    drop(deaf);
    assert_eq!(node.metrics.sessions.get(), 1);
}

#[tokio::test]
async fn another_request_has_an_http_answer() {
    let node = start(|_| {});
    assert!(http(node.port, "GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404 "));
    assert!(http(node.port, "GET /ws HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 426 "));
    assert!(http(node.port, "\0\0\0\0\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
    let long = format!("GET /ws HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(9000));
    assert!(http(node.port, &long).await.starts_with("HTTP/1.1 431 "));
}

#[tokio::test]
async fn another_request_is_handed_over_with_what_was_read() {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    let node = start_with(|_| {}, Some(sender));
    let request = "POST /nimserver/msg/broadcastMsg.action HTTP/1.1\r\nContent-Length: 3\r\n\r\na=b";
    let port = node.port;
    let client = tokio::spawn(async move { http(port, request).await });
    let (socket, read) = receiver.recv().await.unwrap();
    assert_eq!(read, request.as_bytes());
    let mut socket = TcpStream::from_std(socket).unwrap();
    // Another, while nobody takes the next: the queue of one is full for the third.
    let _queued = TcpStream::connect(("127.0.0.1", port)).await.unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").await;
    socket.write_all(b"served elsewhere").await.unwrap();
    drop(socket);
    assert_eq!(client.await.unwrap(), "served elsewhere");
}

#[tokio::test]
async fn a_full_hand_over_queue_is_busy() {
    let (sender, _receiver) = tokio::sync::mpsc::channel(1);
    sender.try_reserve().unwrap().send(held_socket().await);
    let node = start_with(|_| {}, Some(sender));
    assert!(http(node.port, "GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 503 "));
}

async fn held_socket() -> (std::net::TcpStream, Vec<u8>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    (TcpStream::connect(listener.local_addr().unwrap()).await.unwrap().into_std().unwrap(), Vec::new())
}

#[tokio::test]
async fn beyond_the_most_sessions_there_is_a_503() {
    let node = start(|settings| settings.max_sessions = 1);
    let first = Device::online(node.port, "web", 0).await;
    let mut second = TcpStream::connect(("127.0.0.1", node.port)).await.unwrap();
    let mut answer = String::new();
    second.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "));
    drop(first);
    // Room again, as soon as the first is seen to be gone.
    loop {
        match tokio_tungstenite::connect_async(format!("ws://127.0.0.1:{}/ws", node.port)).await {
            Ok(_) => break,
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

#[tokio::test]
async fn a_browser_comes_in_from_an_allowed_origin_only() {
    let node = start(|settings| settings.allowed_origins = vec!["https://good.example".into()]);
    let connect = |origin: &'static str| {
        let mut request = format!("ws://127.0.0.1:{}/ws", node.port).into_client_request().unwrap();
        request.headers_mut().insert("Origin", origin.parse().unwrap());
        tokio_tungstenite::connect_async(request)
    };
    assert!(connect("https://good.example").await.is_ok());
    let Err(tungstenite::Error::Http(answer)) = connect("https://evil.example").await else { panic!("let in") };
    assert_eq!(answer.status(), 403);
}
