//! Thousands of devices in one process: real WebSocket clients, a small task each, that remember ids and not contents.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::broadcastd::App;
use super::checker::{Checker, Must};
use super::device::token;
use super::{SOON, now_ms, until};

/// A broadcast as it arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its id.
    pub id: u64,
    /// When it arrived here, milliseconds since the Unix epoch.
    pub arrived_ms: u64,
}

/// How a connection ended after a welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// The code of the close frame; `None` if there was none.
    pub code: Option<u16>,
    /// The wait that its reason asks for, milliseconds.
    pub reconnect_after_ms: Option<u64>,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// How many broadcasts the device had had by then.
    pub had: usize,
}

/// What one device has seen.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Every broadcast, in the order of arrival.
    pub history: Vec<Seen>,
    /// When the first login was sent, milliseconds since the Unix epoch.
    pub asked_ms: u64,
    /// When the first welcome came; 0: it did not.
    pub welcomed_ms: u64,
    /// The app's newest id as of the first welcome.
    pub head: u64,
    /// How many logins were welcomed.
    pub logins: usize,
    /// Every connection that ended after its welcome.
    pub ends: Vec<End>,
    /// Every time that it was not let in, and why.
    pub troubles: Vec<String>,
    cursor: u64,
    latest_head: u64,
    pending: u64,
}

/// What a device does when its connection ends, or does not come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Afterwards {
    /// It stays away.
    Stay,
    /// It logs in at the next address with its cursor, after the wait that the close frame asks for.
    Return,
}

/// Devices of one app.
#[derive(Debug)]
pub struct Fleet {
    app: App,
    token: String,
    source: Ipv4Addr,
    receive_buffer: u32,
    records: Vec<Arc<Mutex<Record>>>,
    tasks: Vec<JoinHandle<()>>,
    reading: watch::Sender<bool>,
}

/// How many devices connect from one address: less than it has ports for.
const PER_ADDRESS: usize = 5000;

impl Fleet {
    /// So many devices that have never logged in.
    pub fn new(app: &App, count: usize) -> Self {
        Self {
            app: app.clone(),
            // One account's: to make a token for each would take longer than all the rest.
            token: token(&app.key, "fleet", &app.secret, 3600),
            source: Ipv4Addr::LOCALHOST,
            receive_buffer: 0,
            records: (0..count).map(|_| Arc::default()).collect(),
            tasks: Vec::new(),
            reading: watch::channel(true).0,
        }
    }

    /// With so small a receive buffer, in bytes, that who stops reading soon stops the sender.
    pub fn receive_buffer(mut self, bytes: u32) -> Self {
        self.receive_buffer = bytes;
        self
    }

    /// Sends them all to log in at the first of `urls`.
    pub fn launch(&mut self, urls: &[String], afterwards: Afterwards) {
        for number in 0..self.records.len() {
            self.launch_one(number, urls, afterwards);
        }
    }

    /// The same for one of them.
    pub fn launch_one(&mut self, number: usize, urls: &[String], afterwards: Afterwards) {
        let network = u8::try_from(number / PER_ADDRESS).unwrap();
        let [a, b, c, d] = self.source.octets();
        let client = Client {
            record: self.records[number].clone(),
            login: json!({
                "type": "login", "app": self.app.key, "account": "fleet", "device": format!("d{number}"),
                "platform": "web", "token": self.token,
            }),
            addresses: urls.iter().map(|url| address(url)).collect(),
            source: Ipv4Addr::new(a, b, c, d + network),
            receive_buffer: self.receive_buffer,
            afterwards,
            reading: self.reading.subscribe(),
        };
        self.tasks.push(tokio::spawn(client.run()));
    }

    /// Nobody takes anything from its socket any more.
    pub fn stop_reading(&self) {
        self.reading.send_replace(false);
    }

    /// All go on.
    pub fn read_on(&self) {
        self.reading.send_replace(true);
    }

    /// A copy of what each has seen.
    pub fn records(&self) -> Vec<Record> {
        self.records.iter().map(|record| record.lock().unwrap().clone()).collect()
    }

    /// How many of them are as `is` says.
    pub fn count(&self, is: impl Fn(&Record) -> bool) -> usize {
        self.records.iter().filter(|record| is(&record.lock().unwrap())).count()
    }

    /// Waits until all are as `is` says.
    pub async fn until_all(&self, what: &str, deadline: Duration, is: impl Fn(&Record) -> bool) {
        until(what, deadline, async || match self.count(&is) {
            all if all == self.records.len() => Ok(()),
            some => {
                let other = self.records.iter().find(|record| !is(&record.lock().unwrap()));
                let other = other.map(|record| {
                    let Record { history, logins, ends, troubles, pending, .. } = &*record.lock().unwrap();
                    format!("{} had, {pending} pending, {logins} logins, {ends:?}, {troubles:?}", history.len())
                });
                Err(format!("{some} of {}; one that is not: {other:?}", self.records.len()))
            }
        })
        .await;
    }

    /// Waits until each is logged in and has had what was pending then.
    pub async fn until_online(&self, deadline: Duration) {
        self.until_all("online", deadline, |record| record.logins > record.ends.len() && record.pending == 0).await;
    }

    /// Waits until each has had so many broadcasts.
    pub async fn until_each_had(&self, count: usize, deadline: Duration) {
        self.until_all("at the last broadcast", deadline, |record| record.history.len() >= count).await;
    }

    /// When the last of them had this broadcast, milliseconds since the Unix epoch.
    pub fn last_had_ms(&self, id: u64) -> u64 {
        let had = self.records.iter().map(|record| {
            let record = record.lock().unwrap();
            record.history.iter().rev().find(|seen| seen.id == id).expect("it was had").arrived_ms
        });
        had.max().expect("a fleet is not empty")
    }

    /// I3 and I4 for each of them.
    pub fn check(&self, checker: &Checker, must: impl Fn(&Record) -> Must) {
        let ids = checker.ids();
        for (number, record) in self.records.iter().enumerate() {
            let record = record.lock().unwrap();
            decide(&ids, &record, must(&record)).unwrap_or_else(|why| panic!("device {number}: {why}"));
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// How long after the welcome what was pending may still be on its way out, milliseconds.
const PENDING: u64 = 1000;

/// I3 and I4 for one device. `ids`: all that were accepted, ascending, and until when each is valid. What expires between its
/// login and a while after the welcome, it may have had or not; what had expired when it asked, never.
fn decide(ids: &[(u64, Option<u64>)], record: &Record, must: Must) -> Result<(), String> {
    if let Some(pair) = record.history.windows(2).find(|pair| pair[0].id >= pair[1].id) {
        return Err(format!("id {} arrived after {}", pair[1].id, pair[0].id));
    }
    let mut history = record.history.iter().peekable();
    for (id, valid_until) in ids {
        if let Some(seen) = history.next_if(|seen| seen.id < *id) {
            return Err(format!("id {} arrived, but no sender was told of it", seen.id));
        }
        let (least, most) = match (must, valid_until) {
            (Must::Everything, _) => (true, true),
            (Must::After(since), _) => (*id > since, *id > since),
            (Must::RetainedUpTo(head), _) if *id > head => (true, true),
            (Must::RetainedBetween { head, .. }, _) if *id > head => (true, true),
            (Must::RetainedBetween { since, .. }, _) if *id <= since => (false, false),
            (Must::RetainedUpTo(_) | Must::RetainedBetween { .. }, None) => (false, false),
            (Must::RetainedUpTo(_) | Must::RetainedBetween { .. }, Some(at)) => {
                (*at > record.welcomed_ms + PENDING, *at > record.asked_ms)
            }
        };
        match history.next_if(|seen| seen.id == *id) {
            None if least => return Err(format!("id {id} never arrived")),
            Some(seen) if !most => return Err(format!("id {id} arrived at {} and should not have", seen.arrived_ms)),
            _ => {}
        }
    }
    history.next().map_or(Ok(()), |seen| Err(format!("id {} arrived, but no sender was told of it", seen.id)))
}

struct Client {
    record: Arc<Mutex<Record>>,
    login: Value,
    addresses: Vec<SocketAddr>,
    source: Ipv4Addr,
    receive_buffer: u32,
    afterwards: Afterwards,
    reading: watch::Receiver<bool>,
}

/// Why a session is over.
enum Over {
    /// The connection ended.
    Gone,
    /// A close frame, with its code and reason.
    Closed(Option<u16>, String),
    /// Anything else.
    Trouble(String),
}

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl Client {
    async fn run(mut self) {
        for turn in 0.. {
            let address = self.addresses[turn % self.addresses.len()];
            let logins = self.record.lock().unwrap().logins;
            let Err(over) = self.session(address).await;
            let wait = self.end(logins, over);
            if self.afterwards == Afterwards::Stay {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Writes down how a session ended; how long to wait for the next one.
    fn end(&self, logins_before: usize, over: Over) -> Duration {
        let mut record = self.record.lock().unwrap();
        let mut after = None;
        let code = match over {
            Over::Gone => None,
            Over::Closed(code, reason) => {
                after = serde_json::from_str(&reason).ok().and_then(|hint: Value| hint["reconnectAfterMs"].as_u64());
                code
            }
            Over::Trouble(why) => {
                record.troubles.push(why);
                None
            }
        };
        if record.logins > logins_before {
            let had = record.history.len();
            record.ends.push(End { code, reconnect_after_ms: after, at_ms: now_ms(), had });
        } else {
            record.troubles.push(format!("not let in: {code:?}"));
        }
        Duration::from_millis(after.unwrap_or(100))
    }

    /// From the connection to its end.
    async fn session(&mut self, address: SocketAddr) -> Result<std::convert::Infallible, Over> {
        let socket = TcpSocket::new_v4()?;
        if self.receive_buffer > 0 {
            socket.set_recv_buffer_size(self.receive_buffer)?;
        }
        socket.bind((IpAddr::V4(self.source), 0).into())?;
        let mut stream = socket.connect(address).await?;
        stream.set_nodelay(true)?;
        stream.write_all(HANDSHAKE).await?;
        let mut rest = Vec::new();
        let head = loop {
            stream.readable().await?;
            read_some(&stream, &mut rest)?;
            if let Some(end) = rest.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break rest.drain(..end + 4).collect::<Vec<u8>>();
            }
        };
        if !head.starts_with(b"HTTP/1.1 101 ") {
            return Err(Over::Trouble(String::from_utf8_lossy(&head).into_owned()));
        }
        {
            let mut record = self.record.lock().unwrap();
            self.login["since"] = record.cursor.into();
            if record.logins == 0 {
                record.asked_ms = now_ms();
            }
        }
        stream.write_all(&masked(1, self.login.to_string().as_bytes())).await?;
        loop {
            if !*self.reading.borrow_and_update() {
                let _ = self.reading.changed().await;
                continue;
            }
            tokio::select! {
                _ = self.reading.changed() => continue,
                readable = stream.readable() => readable?,
            }
            read_some(&stream, &mut rest)?;
            let mut answers = Vec::new();
            let used = {
                let mut record = self.record.lock().unwrap();
                frames(&rest, |opcode, payload| take(&mut record, opcode, payload, &mut answers))
            };
            if !answers.is_empty() {
                stream.write_all(&answers).await?;
            }
            rest.drain(..used?);
        }
    }
}

/// A request for the upgrade.
pub const HANDSHAKE: &[u8] = b"GET /ws HTTP/1.1\r\nHost: broadcastd\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Reads what is there. Not async, so that the buffer is on the thread's stack and not in every device's task.
fn read_some(stream: &TcpStream, rest: &mut Vec<u8>) -> Result<(), Over> {
    let mut buffer = [0; 16 * 1024];
    match stream.try_read(&mut buffer) {
        Ok(0) => return Err(Over::Gone),
        Ok(size) => rest.extend_from_slice(&buffer[..size]),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Gives each whole frame of the server to `handle`; returns how many bytes they were.
fn frames(bytes: &[u8], mut handle: impl FnMut(u8, &[u8]) -> Result<(), Over>) -> Result<usize, Over> {
    let mut used = 0;
    while let [first, second, after @ ..] = &bytes[used..] {
        if first & 0xf0 != 0x80 || second & 0x80 != 0 {
            return Err(Over::Trouble(format!("a frame that begins with {first:02x} {second:02x}")));
        }
        let (size, length) = match (second, after) {
            (126, [high, low, ..]) => (4, usize::from(u16::from_be_bytes([*high, *low]))),
            (126, _) => break,
            (127, _) => return Err(Over::Trouble("a frame over 64 KiB".to_owned())),
            (short, _) => (2, usize::from(*short)),
        };
        let Some(payload) = bytes.get(used + size..used + size + length) else { break };
        handle(first & 0x0f, payload)?;
        used += size + length;
    }
    Ok(used)
}

/// What a device does with one frame.
fn take(record: &mut Record, opcode: u8, payload: &[u8], answers: &mut Vec<u8>) -> Result<(), Over> {
    const BROADCAST: &[u8] = br#"{"type":"broadcast","id":"#;
    match opcode {
        1 if payload.starts_with(BROADCAST) => {
            let digits = payload[BROADCAST.len()..].iter().take_while(|byte| byte.is_ascii_digit());
            let id = digits.fold(0, |id, digit| id * 10 + u64::from(digit - b'0'));
            record.history.push(Seen { id, arrived_ms: now_ms() });
            record.cursor = record.cursor.max(id);
            record.pending = record.pending.saturating_sub(1);
        }
        1 => {
            let told: Value = serde_json::from_slice(payload).map_err(|error| Over::Trouble(error.to_string()))?;
            if told["type"] != "welcome" {
                record.troubles.push(told.to_string());
                return Ok(());
            }
            record.logins += 1;
            record.latest_head = told["head"].as_u64().expect("a head");
            record.pending = told["pending"].as_u64().expect("a number of pending ones");
            if record.logins == 1 {
                record.welcomed_ms = now_ms();
                record.head = record.latest_head;
            }
        }
        8 => {
            answers.extend(masked(8, payload));
            let code = payload.first_chunk().map(|code| u16::from_be_bytes(*code));
            let reason = String::from_utf8_lossy(payload.get(2..).unwrap_or_default()).into_owned();
            return Err(Over::Closed(code, reason));
        }
        9 => answers.extend(masked(10, payload)),
        _ => return Err(Over::Trouble(format!("a frame of the kind {opcode}"))),
    }
    if record.pending == 0 {
        record.cursor = record.cursor.max(record.latest_head);
    }
    Ok(())
}

/// A device's frame, with the mask 0. `payload`: up to 64 KiB.
pub fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    let mut frame = vec![0x80 | opcode];
    match u8::try_from(length) {
        Ok(short @ ..=125) => frame.push(0x80 | short),
        _ => {
            frame.push(0x80 | 126);
            frame.extend(length.to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend_from_slice(payload);
    frame
}

/// The address of `ws://HOST:PORT/ws`.
fn address(url: &str) -> SocketAddr {
    url.strip_prefix("ws://").and_then(|rest| rest.strip_suffix("/ws")).expect("ws://…/ws").parse().expect("an address")
}

/// How long thousands of devices may take to log in on a busy machine, with what they are sent then.
pub const STORM: Duration = Duration::from_secs(SOON.as_secs() * 4);

#[cfg(test)]
mod tests {
    use super::*;

    fn record(ids: &[u64]) -> Record {
        let history = ids.iter().map(|&id| Seen { id, arrived_ms: 5000 }).collect();
        Record { history, asked_ms: 3000, welcomed_ms: 4000, ..Record::default() }
    }

    #[test]
    fn a_whole_history_passes_and_every_flaw_is_found() {
        let ids = [(1, None), (2, Some(3000)), (3, Some(4500)), (4, Some(9000)), (5, None)];
        for (seen, must, flaw) in [
            (&[1, 2, 3, 4, 5][..], Must::Everything, None),
            (&[3, 4, 5], Must::After(2), None),
            (&[4, 5], Must::RetainedUpTo(4), None),
            (&[3, 4, 5], Must::RetainedUpTo(4), None),
            (&[1, 2, 4, 5], Must::Everything, Some("3 never")),
            (&[1, 2, 2], Must::Everything, Some("2 arrived after 2")),
            (&[2, 1], Must::Everything, Some("1 arrived after 2")),
            (&[1, 2, 3, 4, 5, 6], Must::Everything, Some("6 arrived, but no")),
            (&[3, 5], Must::RetainedUpTo(4), Some("4 never")),
            (&[2, 4, 5], Must::RetainedUpTo(4), Some("2 arrived at 5000 and should not")),
            (&[1, 4, 5], Must::RetainedUpTo(4), Some("1 arrived at 5000 and should not")),
        ] {
            match (decide(&ids, &record(seen), must), flaw) {
                (Ok(()), None) => {}
                (Err(why), Some(flaw)) if why.contains(flaw) => {}
                (result, flaw) => panic!("{seen:?} {must:?}: {result:?}, not {flaw:?}"),
            }
        }
    }
}
