//! A device, as the tests have it.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::token;
use crate::broadcast::BroadcastId;

/// A device's WebSocket.
pub struct Device {
    pub socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Device {
    /// Connects, without logging in.
    pub async fn connect(port: u16) -> Self {
        let (socket, _) = tokio_tungstenite::connect_async(format!("ws://127.0.0.1:{port}/ws")).await.unwrap();
        Self { socket }
    }

    /// Connects with a receive buffer that does not grow, and logs in to `demo`.
    pub async fn online_with_small_buffer(port: u16) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        let stream = MaybeTlsStream::Plain(socket.connect(([127, 0, 0, 1], port).into()).await.unwrap());
        let (socket, _) = tokio_tungstenite::client_async(format!("ws://127.0.0.1:{port}/ws"), stream).await.unwrap();
        let mut device = Self { socket };
        device.log_in("demo", "web", 0).await;
        assert_eq!(device.next().await["type"], "welcome");
        device
    }

    /// Connects and logs in to `demo`; returns the welcome too.
    pub async fn online(port: u16, platform: &str, since: BroadcastId) -> (Self, serde_json::Value) {
        let mut device = Self::connect(port).await;
        device.log_in("demo", platform, since).await;
        let welcome = device.next().await;
        assert_eq!(welcome["type"], "welcome", "{welcome}");
        (device, welcome)
    }

    pub async fn log_in(&mut self, app: &str, platform: &str, since: BroadcastId) {
        let login = serde_json::json!({
            "type": "login", "app": app, "account": "ann", "device": "d", "platform": platform,
            "token": token(app, "ann", 60), "since": since,
        });
        self.socket.send(Message::text(login.to_string())).await.unwrap();
    }

    /// The next message of any kind but pings.
    pub async fn message(&mut self) -> Option<Message> {
        loop {
            let wait = tokio::time::timeout(Duration::from_secs(10), self.socket.next());
            match wait.await.expect("a message within 10 s") {
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(message)) => return Some(message),
                _ => return None,
            }
        }
    }

    /// The next text message.
    pub async fn next(&mut self) -> serde_json::Value {
        match self.message().await {
            Some(Message::Text(text)) => serde_json::from_str(&text).unwrap(),
            other => panic!("no text: {other:?}"),
        }
    }

    /// The contents of the next broadcasts.
    pub async fn contents(&mut self, count: usize) -> Vec<String> {
        let mut contents = Vec::new();
        for _ in 0..count {
            let told = self.next().await;
            assert_eq!(told["type"], "broadcast", "{told}");
            contents.push(told["content"].as_str().unwrap().to_owned());
        }
        contents
    }

    /// The code and the reason of the close that comes next.
    pub async fn closed(&mut self) -> (u16, String) {
        match self.message().await {
            Some(Message::Close(Some(frame))) => (frame.code.into(), frame.reason.to_string()),
            other => panic!("no close: {other:?}"),
        }
    }
}
