//! A device, and the stream between it and a node: bytes in order, as many as fit, and none after a cut.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::io::{self, IoSlice, Write};
use std::rc::Rc;

use broadcastd::broadcast::BroadcastId;
use broadcastd::broadcast::platform::Platform;
use broadcastd::fuzzing::WriteSpan;
use fastrand::Rng;

use super::node::Begun;

/// One direction of a connection: each byte with the moment at which it was written.
pub struct Pipe {
    bytes: VecDeque<(u8, u64)>,
    capacity: usize,
    /// The moment.
    pub now: u64,
    random: Rng,
}

/// The node's end.
#[derive(Clone)]
pub struct Stream(pub Rc<RefCell<Pipe>>);

impl Stream {
    pub fn new(capacity: usize, seed: u64) -> Self {
        let random = Rng::with_seed(seed);
        Self(Rc::new(RefCell::new(Pipe { bytes: VecDeque::new(), capacity, now: 0, random })))
    }
}

/// It takes copies, whatever the pages are.
impl WriteSpan for Stream {}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let pipe = &mut *self.0.borrow_mut();
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let room = pipe.capacity.saturating_sub(pipe.bytes.len());
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if pipe.random.u8(..20) == 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        // Mostly all that fits, sometimes less.
        let fits = total.min(room);
        let count = if pipe.random.bool() || fits <= 1 { fits } else { pipe.random.usize(1..=fits) };
        let now = pipe.now;
        pipe.bytes.extend(slices.iter().flat_map(|slice| slice.iter()).take(count).map(|byte| (*byte, now)));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a device reads.
#[derive(Debug)]
pub enum Told {
    Welcome { head: BroadcastId, pending: usize },
    Broadcast { id: BroadcastId, time_ms: u64, content: String },
    Recall { id: BroadcastId },
}

/// A connection, as the device has it.
pub struct Link {
    pub node: usize,
    pub shard: usize,
    /// The session's key there.
    pub key: u64,
    pub stream: Stream,
    read: Vec<(u8, u64)>,
    pub begun: Begun,
    /// What it must get of what came before its login, once that is known.
    pub due: Option<Vec<BroadcastId>>,
    /// The welcome's, once it has come, and how many are still to come.
    pub head: Option<(BroadcastId, usize)>,
}

impl Link {
    pub fn new(node: usize, shard: usize, key: u64, stream: Stream, begun: Begun) -> Self {
        Self { node, shard, key, stream, read: Vec::new(), begun, due: None, head: None }
    }

    /// Whether nothing is under way.
    pub fn is_read(&self) -> bool {
        self.read.is_empty() && self.stream.0.borrow().bytes.is_empty()
    }

    /// Reads up to `most` bytes; returns what is complete, each with the moment at which its first byte was written.
    pub fn read(&mut self, most: usize) -> Vec<(Told, u64)> {
        let pipe = &mut self.stream.0.borrow_mut().bytes;
        let count = most.min(pipe.len());
        self.read.extend(pipe.drain(..count));
        let mut told = Vec::new();
        loop {
            let byte = |at: usize| self.read.get(at).map(|(byte, _)| usize::from(*byte));
            let (Some(first), Some(second)) = (byte(0), byte(1)) else { break };
            let (length, header) = match (second, byte(2), byte(3)) {
                (126, Some(high), Some(low)) => (high * 256 + low, 4),
                (126, ..) => break,
                (short, ..) => (short, 2),
            };
            if self.read.len() < header + length {
                break;
            }
            let frame: Vec<(u8, u64)> = self.read.drain(..header + length).collect();
            let payload: Vec<u8> = frame[header..].iter().map(|(byte, _)| *byte).collect();
            if first == 0x89 {
                continue;
            }
            assert_eq!(first, 0x81, "a text in one frame, or the frames are mixed up");
            let json: serde_json::Value = serde_json::from_slice(&payload).expect("JSON, or the frames are mixed up");
            let number = |name: &str| json[name].as_u64().expect("a number");
            let message = match json["type"].as_str() {
                Some("welcome") => Told::Welcome { head: number("head"), pending: number("pending") as usize },
                Some("broadcast") => Told::Broadcast {
                    id: number("id"),
                    time_ms: number("time"),
                    content: json["content"].as_str().expect("a string").to_owned(),
                },
                Some("recall") => Told::Recall { id: number("id") },
                other => panic!("{other:?}"),
            };
            told.push((message, frame[0].1));
        }
        told
    }
}

/// A device: one installation after the other, each with its cursor and its history.
pub struct Device {
    pub platform: Platform,
    pub cursor: BroadcastId,
    pub history: Vec<BroadcastId>,
    /// What it has seen deleted.
    pub hidden: BTreeSet<BroadcastId>,
    pub link: Option<Link>,
}

impl Device {
    pub fn new(platform: Platform) -> Self {
        Self { platform, cursor: 0, history: Vec::new(), hidden: BTreeSet::new(), link: None }
    }

    /// What a client does with its cursor, by the README.
    pub fn advance(&mut self, told: &Told) {
        let link = self.link.as_mut().expect("it reads");
        match told {
            Told::Welcome { head, pending } => link.head = Some((*head, *pending)),
            Told::Broadcast { id, .. } => {
                self.history.push(*id);
                self.cursor = self.cursor.max(*id);
                if let Some((_, pending)) = &mut link.head {
                    *pending = pending.saturating_sub(1);
                }
            }
            Told::Recall { id } => {
                self.hidden.insert(*id);
            }
        }
        if let Some((head, 0)) = link.head {
            self.cursor = self.cursor.max(head);
        }
    }
}
