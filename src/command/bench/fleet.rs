//! Many devices in one process, at the least cost: one thread, one poll, a hundred bytes a device. It speaks to whoever
//! started it in lines of JSON, so that a benchmark can have several of them.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token, Waker};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

/// What the devices do. Sent to the fleet as its first line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Where they connect.
    pub address: SocketAddr,
    /// The `Host` of their request.
    pub host: String,
    /// The path of their request.
    pub path: String,
    /// How many there are.
    pub devices: usize,
    /// The number of the first.
    pub first: usize,
    /// Text messages that each sends at once; `{n}` becomes its number.
    pub hello: Vec<String>,
    /// Messages that a device gets before it counts as online.
    pub greetings: u32,
    /// The most logins under way at once.
    pub at_once: usize,
    /// Addresses of this machine to connect from, in turn. Empty: the system's choice; for loopback several of 127.0.0.0/8.
    pub sources: Vec<IpAddr>,
}

/// What the fleet is told after that, a line each.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Say when every device that reads has had so many more messages.
    Expect(u32),
    /// So many devices, the first ones, stop reading.
    Stall(usize),
    /// Those who stopped read again.
    Read,
}

/// What the fleet says, a line each. Times are nanoseconds of the machine's monotonic clock.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// So many are online.
    Progress(usize),
    /// All are online; how long each login took, from connecting.
    Online(Vec<u64>),
    /// The order was understood.
    Ready,
    /// Everyone has had what was expected: the first arrival of all, and each device's last.
    Arrived {
        /// When the first message came.
        first: u64,
        /// When each device had its last.
        last: Vec<u64>,
    },
    /// It cannot go on.
    Failed(String),
}

/// Shorter messages are the protocol's own (Socket.IO's ping), not broadcasts.
const SHORTEST: usize = 16;
/// So many connections are made from one loopback address: fewer than a port range has.
const PORTS_AN_ADDRESS: usize = 20_000;
/// The longest time for all logins, and for everything expected to arrive.
const PATIENCE: Duration = Duration::from_secs(120);
const WAKE: Token = Token(usize::MAX);

/// Nanoseconds of the machine's monotonic clock, the same in every process.
#[must_use]
pub fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Upgrading,
    Greeted(u32),
    Online,
}

struct Device {
    socket: TcpStream,
    state: State,
    began: u64,
    left: u32,
    stalled: bool,
    frames: Frames,
}

/// Walks over a server's frames without keeping them.
#[derive(Default)]
struct Frames {
    header: [u8; 10],
    have: usize,
    /// Of the frame under way: bytes to come, of how many, and its opcode.
    body: Option<(usize, usize, u8)>,
    short: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Message,
    Ping,
    /// Socket.IO's own.
    TextPing,
    Close,
}

impl Frames {
    fn feed(&mut self, mut bytes: &[u8], mut see: impl FnMut(Seen)) {
        loop {
            if let Some((left, size, opcode)) = self.body {
                let take = left.min(bytes.len());
                if size == 1 && take == 1 {
                    self.short = bytes[0];
                }
                bytes = &bytes[take..];
                if take < left {
                    self.body = Some((left - take, size, opcode));
                    return;
                }
                self.body = None;
                match opcode {
                    1 | 2 if size >= SHORTEST => see(Seen::Message),
                    1 if size == 1 && self.short == b'2' => see(Seen::TextPing),
                    8 => see(Seen::Close),
                    9 => see(Seen::Ping),
                    _ => {}
                }
            }
            let needed = match self.header[1] & 0x7f {
                _ if self.have < 2 => 2,
                126 => 4,
                127 => 10,
                _ => 2,
            };
            let take = (needed - self.have.min(needed)).min(bytes.len());
            self.header[self.have..self.have + take].copy_from_slice(&bytes[..take]);
            self.have += take;
            bytes = &bytes[take..];
            if self.have < needed {
                return;
            }
            let size = match (needed, self.header[1] & 0x7f) {
                (2, 126 | 127) => continue,
                (2, size) => usize::from(size),
                (4, _) => usize::from(u16::from_be_bytes([self.header[2], self.header[3]])),
                _ => {
                    let mut eight = [0; 8];
                    eight.copy_from_slice(&self.header[2..10]);
                    usize::try_from(u64::from_be_bytes(eight)).unwrap_or(usize::MAX)
                }
            };
            self.have = 0;
            self.body = Some((size, size, self.header[0] & 0x0f));
        }
    }
}

struct Fleet {
    plan: Plan,
    poll: Poll,
    devices: Vec<Device>,
    /// Logins under way.
    under_way: usize,
    online: usize,
    logins: Vec<u64>,
    expecting: usize,
    first: u64,
    last: Vec<u64>,
    buffer: Vec<u8>,
}

/// Reads the plan and the orders from standard input, and reports on standard output, until the input ends.
///
/// # Errors
/// If the system refuses sockets, or a device is sent away.
pub fn run() -> anyhow::Result<()> {
    let mut plan = String::new();
    if io::stdin().read_line(&mut plan)? == 0 {
        return Ok(());
    }
    let plan: Plan = serde_json::from_str(&plan)?;
    let poll = Poll::new()?;
    let waker = Waker::new(poll.registry(), WAKE)?;
    let (sender, orders) = mpsc::channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if let Ok(order) = serde_json::from_str::<Order>(&line)
                && (sender.send(order).is_err() || waker.wake().is_err())
            {
                return;
            }
        }
        drop(sender);
        let _ = waker.wake();
    });
    let mut fleet = Fleet {
        plan,
        poll,
        devices: Vec::new(),
        under_way: 0,
        online: 0,
        logins: Vec::new(),
        expecting: 0,
        first: 0,
        last: Vec::new(),
        buffer: vec![0; 256 * 1024],
    };
    let result = fleet.log_in().and_then(|()| fleet.follow(&orders));
    if let Err(error) = &result {
        say(&Report::Failed(error.to_string()))?;
    }
    result
}

fn say(report: &Report) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    serde_json::to_writer(&mut output, report)?;
    output.write_all(b"\n")?;
    Ok(output.flush()?)
}

impl Fleet {
    fn log_in(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        let mut events = Events::with_capacity(1024);
        let mut told = Instant::now();
        while self.online < self.plan.devices {
            while self.devices.len() < self.plan.devices && self.under_way < self.plan.at_once {
                self.connect()?;
            }
            self.turn(&mut events, Duration::from_millis(100))?;
            if told.elapsed() > Duration::from_millis(200) {
                told = Instant::now();
                say(&Report::Progress(self.online))?;
            }
            anyhow::ensure!(
                start.elapsed() < PATIENCE,
                "only {} of {} devices are online after {} s",
                self.online,
                self.plan.devices,
                PATIENCE.as_secs()
            );
        }
        say(&Report::Online(std::mem::take(&mut self.logins)))
    }

    fn follow(&mut self, orders: &mpsc::Receiver<Order>) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut begun: VecDeque<Instant> = VecDeque::new();
        loop {
            match orders.try_recv() {
                Ok(order) => {
                    if matches!(order, Order::Expect(_)) {
                        begun = VecDeque::from([Instant::now()]);
                    }
                    self.obey(order)?;
                    continue;
                }
                Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
                Err(mpsc::TryRecvError::Empty) => {}
            }
            self.turn(&mut events, Duration::from_secs(1))?;
            if self.expecting == 0 && !begun.is_empty() {
                begun.clear();
                say(&Report::Arrived { first: self.first, last: std::mem::take(&mut self.last) })?;
            }
            let late = begun.front().is_some_and(|since| since.elapsed() > PATIENCE);
            anyhow::ensure!(!late, "{} devices still wait for what they were to be sent", self.expecting);
        }
    }

    fn obey(&mut self, order: Order) -> anyhow::Result<()> {
        match order {
            Order::Expect(count) => {
                self.first = 0;
                self.last.clear();
                let readers = self.devices.iter_mut().filter(|device| !device.stalled);
                self.expecting = readers.map(|device| device.left = count).count();
            }
            Order::Stall(count) => {
                for device in self.devices.iter_mut().take(count) {
                    device.stalled = true;
                    self.poll.registry().deregister(&mut device.socket)?;
                }
            }
            Order::Read => {
                for (number, device) in self.devices.iter_mut().enumerate().filter(|(_, device)| device.stalled) {
                    device.stalled = false;
                    self.poll.registry().register(&mut device.socket, Token(number), Interest::READABLE)?;
                }
            }
        }
        say(&Report::Ready)
    }

    fn turn(&mut self, events: &mut Events, timeout: Duration) -> anyhow::Result<()> {
        match self.poll.poll(events, Some(timeout)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        for event in events.iter().filter(|event| event.token() != WAKE) {
            let number = event.token().0;
            if event.is_writable() && self.devices[number].state == State::Connecting {
                self.upgrade(number)?;
            }
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                self.read(number)?;
            }
        }
        Ok(())
    }

    fn connect(&mut self) -> anyhow::Result<()> {
        let number = self.devices.len();
        let domain = Domain::for_address(self.plan.address);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        let source = match self.plan.sources.as_slice() {
            [] if self.plan.address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) => {
                // The first ones need not be bound: the system looks for a port long where many were left a moment ago.
                let block = (self.plan.first + number) / PORTS_AN_ADDRESS;
                let address = || IpAddr::V4(Ipv4Addr::new(127, 0, 0, u8::try_from(1 + block).unwrap_or(u8::MAX)));
                (block > 0).then(address)
            }
            [] => None,
            sources => Some(sources[number % sources.len()]),
        };
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        let began = monotonic();
        match socket.connect(&self.plan.address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
            Err(error) => anyhow::bail!("device {number} cannot connect to {}: {error}", self.plan.address),
        }
        let mut socket = TcpStream::from_std(socket.into());
        self.poll.registry().register(&mut socket, Token(number), Interest::READABLE | Interest::WRITABLE)?;
        let state = State::Connecting;
        self.devices.push(Device { socket, state, began, left: 0, stalled: false, frames: Frames::default() });
        self.under_way += 1;
        Ok(())
    }

    /// The connection stands: asks for a WebSocket.
    fn upgrade(&mut self, number: usize) -> anyhow::Result<()> {
        let Plan { path, host, .. } = &self.plan;
        let bytes = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        let device = &mut self.devices[number];
        if let Some(error) = device.socket.take_error()? {
            anyhow::bail!("device {number} cannot connect to {}: {error}", self.plan.address);
        }
        device.state = State::Upgrading;
        write_all(&mut device.socket, bytes.as_bytes())?;
        self.poll.registry().reregister(&mut device.socket, Token(number), Interest::READABLE)?;
        Ok(())
    }

    fn read(&mut self, number: usize) -> anyhow::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        loop {
            let device = &mut self.devices[number];
            if device.stalled {
                break;
            }
            match device.socket.read(&mut buffer) {
                Ok(0) => anyhow::bail!("device {number} was sent away"),
                Ok(size) => {
                    let now = monotonic();
                    self.take(number, &buffer[..size], now)?;
                    if size < buffer.len() {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => anyhow::bail!("device {number} lost its connection: {error}"),
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn take(&mut self, number: usize, mut bytes: &[u8], now: u64) -> anyhow::Result<()> {
        let device = &mut self.devices[number];
        if device.state == State::Upgrading {
            // Servers send the short answer in one piece.
            let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
                anyhow::bail!("device {number} had half an answer");
            };
            let answer = String::from_utf8_lossy(&bytes[..end]);
            anyhow::ensure!(
                answer.starts_with("HTTP/1.1 101"),
                "device {number}: {}",
                answer.lines().next().unwrap_or_default()
            );
            bytes = &bytes[end + 4..];
            for text in &self.plan.hello {
                let text = text.replace("{n}", &(self.plan.first + number).to_string());
                write_all(&mut device.socket, &masked(1, text.as_bytes()))?;
            }
            device.state = State::Greeted(0);
        }
        let mut messages = 0;
        let (mut pings, mut text_pings, mut closed) = (0, 0, false);
        device.frames.feed(bytes, |seen| match seen {
            Seen::Message => messages += 1,
            Seen::Ping => pings += 1,
            Seen::TextPing => text_pings += 1,
            Seen::Close => closed = true,
        });
        anyhow::ensure!(!closed, "device {number} was sent away with a close");
        for _ in 0..pings {
            write_all(&mut device.socket, &masked(10, b""))?;
        }
        for _ in 0..text_pings {
            write_all(&mut device.socket, &masked(1, b"3"))?;
        }
        if let State::Greeted(had) = device.state {
            let had = had + messages;
            messages = had.saturating_sub(self.plan.greetings);
            device.state = if had >= self.plan.greetings { State::Online } else { State::Greeted(had) };
            if device.state == State::Online {
                self.online += 1;
                self.under_way -= 1;
                self.logins.push(now - device.began);
            }
        }
        if messages > 0 && device.left > 0 {
            if self.first == 0 {
                self.first = now;
            }
            device.left = device.left.saturating_sub(messages);
            if device.left == 0 {
                self.last.push(now);
                self.expecting -= 1;
            }
        }
        Ok(())
    }
}

/// A client's frame: masked, as it must be, with a mask of zeros, which costs nothing.
fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match u8::try_from(payload.len()) {
        Ok(size) if size < 126 => frame.push(0x80 | size),
        _ => {
            frame.push(0x80 | 126);
            // A login is a few hundred bytes.
            frame.extend(u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

/// A new socket's buffer has room for what a device says.
fn write_all(socket: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    match socket.write(bytes)? {
        sent if sent == bytes.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(opcode: u8, size: usize) -> Vec<u8> {
        let mut frame = vec![0x80 | opcode];
        match size {
            0..126 => frame.push(size as u8),
            126..65536 => {
                frame.push(126);
                frame.extend((size as u16).to_be_bytes());
            }
            _ => {
                frame.push(127);
                frame.extend((size as u64).to_be_bytes());
            }
        }
        frame.extend(vec![b'2'; size]);
        frame
    }

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        let bytes: Vec<u8> =
            [frame(1, 20), frame(9, 0), frame(1, 300), frame(1, 1), frame(2, 70_000), frame(8, 2)].concat();
        let expected = [Seen::Message, Seen::Ping, Seen::Message, Seen::TextPing, Seen::Message, Seen::Close];
        for piece in [1, 2, 3, 7, 1000, bytes.len()] {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            bytes.chunks(piece).for_each(|bytes| frames.feed(bytes, |what| seen.push(what)));
            assert_eq!(seen, expected, "in pieces of {piece}");
        }
    }
}
