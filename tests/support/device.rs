//! A device: a real WebSocket client that remembers what it has had.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::{Error, Message, protocol::frame::coding::CloseCode};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::broadcastd::App;
use super::{SOON, now_ms, unique};

/// A broadcast as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Its id.
    pub id: u64,
    /// When it was accepted, milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Sender's account, or empty.
    pub from: String,
    /// What it says.
    pub content: String,
    /// When it arrived here, milliseconds since the Unix epoch.
    pub arrived_ms: u64,
}

/// What a device can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A broadcast.
    Broadcast(Arrival),
    /// The broadcast of this id was deleted.
    Recall(u64),
    /// An error frame.
    Error(u64, String),
    /// The connection ended: with a close frame and its code, or without.
    Closed(Option<u16>),
}

/// One installation of the app, logged in or not.
#[derive(Debug)]
pub struct Device {
    app: App,
    account: String,
    name: String,
    platform: String,
    socket: Option<WebSocketStream<MaybeTlsStream<TcpStream>>>,
    cursor: u64,
    head: u64,
    pending: u64,
    history: Vec<Arrival>,
    recalls: Vec<u64>,
}

impl Device {
    /// A device that has never logged in.
    pub fn new(app: &App, platform: &str) -> Self {
        Self {
            app: app.clone(),
            account: unique("account"),
            name: unique("device"),
            platform: platform.to_owned(),
            socket: None,
            cursor: 0,
            head: 0,
            pending: 0,
            history: Vec::new(),
            recalls: Vec::new(),
        }
    }

    /// A new device, logged in.
    pub async fn online(app: &App, platform: &str, url: &str) -> Self {
        let mut device = Self::new(app, platform);
        device.login(url).await;
        device
    }

    /// Logs in with the cursor that it has, and waits for the welcome.
    pub async fn login(&mut self, url: &str) {
        self.try_login(url).await.unwrap();
    }

    /// The same; a sentence if it was not let in.
    pub async fn try_login(&mut self, url: &str) -> Result<(), String> {
        let (mut socket, _) = connect_async(url).await.map_err(|error| error.to_string())?;
        let login = json!({
            "type": "login", "app": self.app.key, "account": self.account, "device": self.name,
            "platform": self.platform, "token": self.token(3600), "since": self.cursor,
        });
        socket.send(Message::text(login.to_string())).await.map_err(|error| error.to_string())?;
        let deadline = Instant::now() + SOON;
        loop {
            let message = timeout_at(deadline, socket.next()).await.map_err(|_| "no welcome in time")?;
            match message {
                Some(Ok(Message::Text(text))) => {
                    let frame: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
                    if frame["type"] != "welcome" {
                        return Err(format!("no welcome but {frame}"));
                    }
                    self.head = frame["head"].as_u64().expect("a welcome names the head");
                    self.pending = frame["pending"].as_u64().expect("a welcome says how many follow at once");
                    break;
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(other)) => return Err(format!("no welcome but {other:?}")),
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("closed before the welcome".to_owned()),
            }
        }
        self.socket = Some(socket);
        self.advance();
        Ok(())
    }

    /// A token for this device that is valid for so many more seconds.
    pub fn token(&self, seconds: i64) -> String {
        token(&self.app.key, &self.account, &self.app.secret, seconds)
    }

    /// Once what was pending at login has arrived, everything up to the head has been had.
    fn advance(&mut self) {
        if self.pending == 0 {
            self.cursor = self.cursor.max(self.head);
        }
    }

    /// Drops the connection without a word.
    pub fn drop_connection(&mut self) {
        self.socket = None;
    }

    /// Whether it is connected, as far as it knows.
    pub fn is_online(&self) -> bool {
        self.socket.is_some()
    }

    /// The id that it would present now.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// A new installation, or one that was last online when the broadcast of this id came.
    pub fn with_cursor(mut self, cursor: u64) -> Self {
        self.cursor = cursor;
        self
    }

    /// The app's newest id as of the last welcome.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Every broadcast that it has had, in the order of arrival.
    pub fn history(&self) -> &[Arrival] {
        &self.history
    }

    /// Lets go of what it remembers but its cursor: whoever runs for hours judges what arrives at once.
    pub fn forget(&mut self) {
        self.history.clear();
        self.recalls.clear();
    }

    /// Every recall that it has had.
    pub fn recalls(&self) -> &[u64] {
        &self.recalls
    }

    /// What comes next; `None` at the deadline.
    pub async fn next(&mut self, deadline: Instant) -> Option<Event> {
        loop {
            let socket = self.socket.as_mut().expect("it is online");
            let event = match timeout_at(deadline, socket.next()).await.ok()? {
                Some(Ok(Message::Text(text))) => self.read(&text),
                Some(Ok(Message::Close(frame))) => Event::Closed(frame.map(|frame| close_code(frame.code))),
                Some(Ok(_)) => continue,
                None
                | Some(Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Io(_) | Error::Protocol(_))) => {
                    Event::Closed(None)
                }
                Some(Err(error)) => panic!("{}: {error}", self.name),
            };
            if let Event::Closed(_) = event {
                self.socket = None;
            }
            return Some(event);
        }
    }

    fn read(&mut self, text: &str) -> Event {
        let frame: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let number = |name: &str| frame[name].as_u64().unwrap_or_else(|| panic!("no {name} in {frame}"));
        let string = |name: &str| frame[name].as_str().unwrap_or_default().to_owned();
        match frame["type"].as_str() {
            Some("broadcast") => {
                let arrival = Arrival {
                    id: number("id"),
                    time_ms: number("time"),
                    from: string("fromAccount"),
                    content: string("content"),
                    arrived_ms: now_ms(),
                };
                self.cursor = self.cursor.max(arrival.id);
                self.pending = self.pending.saturating_sub(1);
                self.advance();
                self.history.push(arrival.clone());
                Event::Broadcast(arrival)
            }
            Some("recall") => {
                self.recalls.push(number("id"));
                Event::Recall(number("id"))
            }
            Some("error") => Event::Error(number("code"), string("desc")),
            _ => panic!("an unknown frame: {frame}"),
        }
    }

    /// Reads until the server closes; the code of the close frame, if there was one.
    pub async fn closed(&mut self, deadline: Duration) -> Option<u16> {
        let deadline = Instant::now() + deadline;
        loop {
            match self.next(deadline).await {
                Some(Event::Closed(code)) => return code,
                Some(_) => {}
                None => panic!("{} was not closed in time", self.name),
            }
        }
    }

    /// The next thing to come is a broadcast.
    pub async fn expect_broadcast(&mut self, deadline: Duration) -> Arrival {
        match self.next(Instant::now() + deadline).await {
            Some(Event::Broadcast(arrival)) => arrival,
            other => panic!("{} expected a broadcast in {deadline:?}, not {other:?}", self.name),
        }
    }

    /// The contents of the next broadcasts, up to and with this one, which makes the test's last step certain to have
    /// happened. Nothing else may come.
    pub async fn contents_up_to(&mut self, last: &str) -> Vec<String> {
        let mut contents = Vec::new();
        while contents.last().is_none_or(|content| content != last) {
            contents.push(self.expect_broadcast(SOON).await.content);
        }
        contents
    }

    /// The next thing to come is a recall.
    pub async fn expect_recall(&mut self, deadline: Duration) -> u64 {
        match self.next(Instant::now() + deadline).await {
            Some(Event::Recall(id)) => id,
            other => panic!("{} expected a recall in {deadline:?}, not {other:?}", self.name),
        }
    }

    /// Reads until it has had `count` broadcasts in all; it must stay connected.
    pub async fn collect(&mut self, count: usize, deadline: Duration) {
        self.follow(&[], count, deadline).await;
    }

    /// The same, but logs in at the next of `urls` whenever it loses the connection.
    pub async fn follow(&mut self, urls: &[String], count: usize, deadline: Duration) {
        let deadline = Instant::now() + deadline;
        let mut urls = urls.iter().cycle();
        while self.history.len() < count {
            if self.socket.is_none() {
                let url = urls.next().unwrap_or_else(|| panic!("{} was disconnected", self.name));
                if let Err(error) = self.try_login(url).await {
                    assert!(Instant::now() < deadline, "{}: {error}", self.name);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                continue;
            }
            if self.next(deadline).await.is_none() {
                panic!("{} has had {} of {count} broadcasts in time", self.name, self.history.len());
            }
        }
    }
}

/// A device token: HS256 with the app's secret.
pub fn token(app: &str, account: &str, secret: &str, seconds: i64) -> String {
    let expires = i64::try_from(now_ms() / 1000).unwrap() + seconds;
    let claims = json!({ "aud": app, "sub": account, "exp": expires });
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
    jsonwebtoken::encode(&header, &claims, &jsonwebtoken::EncodingKey::from_secret(secret.as_bytes())).unwrap()
}

fn close_code(code: CloseCode) -> u16 {
    code.into()
}
