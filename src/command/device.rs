//! A device: logs in over WebSocket, stays connected, keeps its cursor. Shared by `listen` and the demo.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::backoff::Backoff;
use crate::broadcast::BroadcastId;
use crate::broadcast::verdict::code;

/// Pauses between two connections: the first, and the most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// A server's wish for a pause is kept up to this.
const LONGEST_WISH: Duration = Duration::from_secs(60);
/// How long connecting and logging in may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Servers ping well within this; one that says nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(120);

/// Who logs in, and where.
#[derive(Debug, Clone)]
pub struct Login {
    /// The server, such as `ws://127.0.0.1:8080/ws`.
    pub url: String,
    /// The app's key.
    pub app: String,
    /// The account.
    pub account: String,
    /// Names this installation.
    pub device: String,
    /// One of ios, aos, pc, web, mac.
    pub platform: String,
    /// A JWT; a development server takes a login without.
    pub token: Option<String>,
    /// The cursor: the last id that the device has had, 0 for none.
    pub since: BroadcastId,
}

/// A broadcast as devices get it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Broadcast {
    /// Its id.
    pub id: BroadcastId,
    /// Sender's account, or empty.
    #[serde(default)]
    pub from_account: String,
    /// When it was accepted, milliseconds since the Unix epoch.
    pub time: u64,
    /// What it says.
    pub content: String,
}

/// What happens to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// It is logged in; the app's newest id.
    Welcome(BroadcastId),
    /// A broadcast.
    Broadcast(Broadcast),
    /// The broadcast of this id was deleted.
    Recall(BroadcastId),
    /// The connection is gone, or did not come about: why, and after which pause it is tried again.
    Away(String, Duration),
}

/// The server does not want this device; trying again would not help.
#[derive(Debug, thiserror::Error)]
#[error("the server refuses this device ({code}): {desc}")]
pub struct Refused {
    /// 403 or 414.
    pub code: u16,
    /// Why.
    pub desc: String,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Frame {
    Welcome {
        #[serde(default)]
        head: BroadcastId,
        /// `None`: an older server's, which does not say when the head may be taken.
        pending: Option<u64>,
    },
    Broadcast(Broadcast),
    Recall {
        id: BroadcastId,
    },
    Error {
        code: u16,
        #[serde(default)]
        desc: String,
    },
    /// A newer server's.
    #[serde(other)]
    Other,
}

#[derive(Serialize)]
struct LoginFrame<'a> {
    r#type: &'static str,
    app: &'a str,
    account: &'a str,
    device: &'a str,
    platform: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<&'a str>,
    since: BroadcastId,
}

/// One device.
pub struct Device {
    login: Login,
    socket: Option<WebSocketStream<MaybeTlsStream<TcpStream>>>,
    /// The welcome's head, and how many broadcasts must arrive before it is the cursor: without it, a device that was sent
    /// nothing would come back as a new one and miss what came meanwhile for online devices.
    announced: Option<(BroadcastId, u64)>,
    pause: Duration,
    backoff: Backoff,
}

impl Device {
    /// Connects at the first [`Device::next`].
    #[must_use]
    pub const fn new(login: Login) -> Self {
        Self {
            login,
            socket: None,
            announced: None,
            pause: Duration::ZERO,
            backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
        }
    }

    /// Waits for what happens next; reconnects from its cursor after the announced pause.
    ///
    /// # Errors
    /// [`Refused`], after which there is nothing more to wait for.
    pub async fn next(&mut self) -> Result<Happening, Refused> {
        loop {
            let Some(socket) = &mut self.socket else {
                sleep(self.pause).await;
                match connect(&self.login).await {
                    Ok(socket) => self.socket = Some(socket),
                    Err(why) => return Ok(self.away(why, None)),
                }
                continue;
            };
            let message = match timeout(SILENCE, socket.next()).await {
                Ok(Some(Ok(message))) => message,
                Ok(Some(Err(error))) => return Ok(self.away(describe(&error), None)),
                Ok(None) => return Ok(self.away("the server closed the connection".to_owned(), None)),
                Err(_) => return Ok(self.away("the server has been silent for two minutes".to_owned(), None)),
            };
            match message {
                Message::Text(text) => {
                    if let Some(happening) = self.read(text.as_str())? {
                        return Ok(happening);
                    }
                }
                Message::Close(frame) => {
                    let (why, wish) = frame.map_or_else(
                        || ("the server closed the connection".to_owned(), None),
                        |frame| (format!("the server closed the connection ({})", frame.code), wish(&frame.reason)),
                    );
                    return Ok(self.away(why, wish));
                }
                // Pings are answered by the library with the next read.
                _ => {}
            }
        }
    }

    /// `None`: nothing that matters.
    fn read(&mut self, text: &str) -> Result<Option<Happening>, Refused> {
        match serde_json::from_str(text) {
            Ok(Frame::Welcome { head, pending }) => {
                self.backoff.reset();
                self.announced = pending.map(|pending| (head, pending));
                self.take_head();
                Ok(Some(Happening::Welcome(head)))
            }
            Ok(Frame::Broadcast(broadcast)) => {
                self.login.since = self.login.since.max(broadcast.id);
                self.announced = self.announced.map(|(head, pending)| (head, pending.saturating_sub(1)));
                self.take_head();
                Ok(Some(Happening::Broadcast(broadcast)))
            }
            Ok(Frame::Recall { id }) => Ok(Some(Happening::Recall(id))),
            Ok(Frame::Error { code: code @ (code::FORBIDDEN | code::BAD_PARAMETER), desc }) => {
                Err(Refused { code, desc })
            }
            Ok(Frame::Error { code, desc }) => Ok(Some(self.away(format!("the server says {code}: {desc}"), None))),
            Ok(Frame::Other) => Ok(None),
            Err(_) => Ok(Some(self.away("the server sent something unreadable".to_owned(), None))),
        }
    }

    /// Once the pending broadcasts are in, the head is the cursor, unless that is further.
    fn take_head(&mut self) {
        if let Some((head, 0)) = self.announced {
            self.login.since = self.login.since.max(head);
            self.announced = None;
        }
    }

    fn away(&mut self, why: String, wish: Option<Duration>) -> Happening {
        self.socket = None;
        self.announced = None;
        self.pause = wish.unwrap_or_else(|| self.backoff.next_delay());
        Happening::Away(why, self.pause)
    }
}

/// The pause that a server which goes away asks for: `{"reconnectAfterMs":N}` as the close reason.
fn wish(reason: &str) -> Option<Duration> {
    let reason: serde_json::Value = serde_json::from_str(reason).ok()?;
    reason.get("reconnectAfterMs")?.as_u64().map(|ms| Duration::from_millis(ms).min(LONGEST_WISH))
}

async fn connect(login: &Login) -> Result<WebSocketStream<MaybeTlsStream<TcpStream>>, String> {
    let frame = LoginFrame {
        r#type: "login",
        app: &login.app,
        account: &login.account,
        device: &login.device,
        platform: &login.platform,
        token: login.token.as_deref(),
        since: login.since,
    };
    let frame = serde_json::to_string(&frame).map_err(|error| error.to_string())?;
    // Two providers are linked in, so rustls would not choose by itself. An error means that one is chosen already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let connect = async {
        let (mut socket, _) = connect_async(login.url.as_str()).await?;
        socket.send(Message::text(frame)).await?;
        Ok(socket)
    };
    match timeout(CONNECT, connect).await {
        Ok(result) => result.map_err(|error: tungstenite::Error| describe(&error)),
        Err(_) => Err("the server does not answer".to_owned()),
    }
}

fn describe(error: &tungstenite::Error) -> String {
    match error {
        tungstenite::Error::Io(error) => format!("the connection failed: {error}"),
        tungstenite::Error::Http(response) => format!("the server answered HTTP {}", response.status()),
        other => format!("the connection failed: {other}"),
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
