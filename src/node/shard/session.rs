//! One connection: a cursor, not a queue.

use std::io::{self, IoSlice};
use std::sync::Arc;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use crate::broadcast::BroadcastId;
use crate::broadcast::platform::Platform;
use crate::node::backlog::Run;
use crate::node::caps::Permit;
use crate::node::codec::Decoder;
use crate::node::entry::Entry;
use crate::node::login::AppIndex;
use crate::node::pages::WriteSpan;
use crate::node::timeline::{Reader, Timeline};

/// How many slices one vectored write takes.
const SLICES: usize = 64;

/// How many bytes of control frames may wait for a device that does not read; further pongs are left out.
const MAX_WAITING: usize = 1024;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its HTTP request is not complete.
    Head,
    /// It is a WebSocket; its login has not come.
    Login,
    /// Logged in; the app's timeline is being read.
    Waiting,
    /// Gets what is broadcast.
    Open,
    /// Has been sent its last bytes; waits for the other side to close.
    Closing,
}

/// A connection. Small: there may be a million of them, nearly all idle. `S` is another stream in the simulation only.
pub struct Session<S = TcpStream> {
    /// Its stream.
    pub socket: S,
    /// Its place among all connections, for as long as it is one; none in the simulation.
    _permit: Option<Permit>,
    /// Tells it from an earlier connection in the same place.
    pub generation: u32,
    /// Its app, once logged in.
    pub app: AppIndex,
    /// Its place in the app's list of sessions.
    pub place: u32,
    /// See [`Reader`], as for the next three.
    pub cursor: BroadcastId,
    /// What came after it is live.
    pub login_head: BroadcastId,
    /// From where on it resumes.
    pub resume_from: BroadcastId,
    /// The device's.
    pub platform: Platform,
    /// Where it is in its life.
    pub state: State,
    /// Pings since it was last heard from.
    pub pings: u8,
    /// Whether it waits to be writable.
    pub is_behind: bool,
    /// Whether the poll tells when it is writable: from the first time on that it had to wait. Events are told once (edges), so
    /// that this costs nothing while it does not wait.
    is_watched: bool,
    /// What is to be sent before anything else.
    pub outgoing: Option<Box<Outgoing>>,
    /// What has been received and is not complete.
    pub incoming: Option<Box<Incoming>>,
}

/// What is to be sent before anything else.
#[derive(Default)]
pub struct Outgoing {
    /// A frame of which a part was sent, and how many bytes that were. The cursor has passed it already.
    pub begun: Option<(Arc<Entry>, usize)>,
    /// Then these bytes.
    pub then: Vec<u8>,
}

impl Outgoing {
    /// The bytes of both.
    fn bytes(&self) -> [&[u8]; 2] {
        [self.begun.as_ref().map_or(&[], |(entry, sent)| &entry.frame[*sent..]), &self.then]
    }
}

/// What has been received and is not complete.
pub enum Incoming {
    /// Of the HTTP request.
    Head(Vec<u8>),
    /// Of the WebSocket's frames.
    Frames(Decoder),
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Everything is with the kernel.
    All,
    /// The socket takes no more at present.
    Some,
}

impl<S> Session<S> {
    /// A connection of which nothing has been read.
    pub const fn new(socket: S, permit: Option<Permit>, generation: u32) -> Self {
        Self {
            socket,
            _permit: permit,
            generation,
            app: AppIndex::MAX,
            place: 0,
            cursor: 0,
            login_head: 0,
            resume_from: BroadcastId::MAX,
            state: State::Head,
            platform: Platform::Web,
            pings: 0,
            is_behind: false,
            is_watched: false,
            outgoing: None,
            incoming: None,
        }
    }

    /// Its position in the timeline.
    pub const fn reader(&self) -> Reader {
        Reader {
            cursor: self.cursor,
            login_head: self.login_head,
            resume_from: self.resume_from,
            platform: self.platform,
        }
    }

    /// Begins to be served from `timeline`; returns how many broadcasts come from before now.
    pub fn admit(&mut self, timeline: &mut Timeline, now_ms: u64, resume_ms: u64) -> usize {
        let (reader, pending) = timeline.admit(self.cursor, self.platform, now_ms, resume_ms);
        if pending > 0 {
            timeline.join_backlog(reader, now_ms);
        }
        self.login_head = reader.login_head;
        self.resume_from = reader.resume_from;
        self.state = State::Open;
        pending
    }

    /// Adds bytes that go out before any further broadcast.
    pub fn push(&mut self, bytes: &[u8]) {
        self.outgoing.get_or_insert_default().then.extend_from_slice(bytes);
    }

    /// Whether a pong may be added.
    pub fn has_room(&self) -> bool {
        self.outgoing.as_ref().is_none_or(|outgoing| outgoing.then.len() < MAX_WAITING)
    }
}

impl<S: WriteSpan> Session<S> {
    /// Sends what is waiting and then, if it is open, all of `timeline` after its cursor, until the socket takes no more.
    /// Counts into `delivered` the broadcasts that went out whole. What has expired by `now_ms` is left out, whenever that
    /// happens; only a frame that was begun is finished.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn write(
        &mut self,
        timeline: Option<&Timeline>,
        now_ms: impl Fn() -> u64,
        delivered: &mut u64,
    ) -> io::Result<Written> {
        let timeline = timeline.filter(|_| self.state == State::Open);
        loop {
            let now_ms = now_ms();
            let before = self.outgoing.as_deref().map_or([&[][..]; 2], Outgoing::bytes);
            let run = timeline.and_then(|timeline| timeline.run(self.reader(), now_ms)).filter(|run| !run.is_empty());
            let mut entries: [Option<&Arc<Entry>>; SLICES] = [None; SLICES];
            let mut count = 0;
            let mut offered: usize = before.iter().map(|bytes| bytes.len()).sum();
            let result = if let Some(run) = &run {
                offered += run.span().len();
                self.socket.write_span(before, run.span())
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES];
                for bytes in before.into_iter().filter(|bytes| !bytes.is_empty()) {
                    slices[count] = IoSlice::new(bytes);
                    count += 1;
                }
                if let Some(timeline) = timeline {
                    for entry in timeline.after(self.reader(), now_ms).take(SLICES - count) {
                        slices[count] = IoSlice::new(&entry.frame);
                        entries[count] = Some(entry);
                        offered += entry.frame.len();
                        count += 1;
                    }
                }
                match &slices[..count] {
                    [] => {
                        if let Some(timeline) = timeline {
                            self.cursor = self.cursor.max(timeline.last());
                        }
                        self.outgoing = None;
                        return Ok(Written::All);
                    }
                    [one] => self.socket.write(one),
                    several => self.socket.write_vectored(several),
                }
            };
            let mut sent = match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Written::Some),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let is_full = sent < offered && run.is_none_or(|run| !run.span().is_file());
            sent -= self.sent_waiting(sent, delivered);
            if let Some(run) = run {
                self.sent_of_run(&run, sent, delivered);
            } else {
                for entry in entries.iter().take(count).flatten() {
                    if sent == 0 {
                        break;
                    }
                    sent -= self.sent_of(entry, sent, delivered);
                }
            }
            if is_full {
                // It would take no more: a system call less. The poll tells when it does.
                return Ok(Written::Some);
            }
        }
    }

    /// Notes that `sent` bytes went out, of what was waiting first; returns how many of them that was.
    fn sent_waiting(&mut self, sent: usize, delivered: &mut u64) -> usize {
        let Some(outgoing) = &mut self.outgoing else { return 0 };
        let mut left = sent;
        if let Some((entry, done)) = &mut outgoing.begun {
            let part = left.min(entry.frame.len() - *done);
            left -= part;
            *done += part;
            if *done == entry.frame.len() {
                if entry.id > self.login_head {
                    entry.count(1);
                }
                outgoing.begun = None;
                *delivered += 1;
            }
        }
        if outgoing.begun.is_none() {
            let part = left.min(outgoing.then.len());
            outgoing.then.drain(..part);
            left -= part;
            if outgoing.then.is_empty() {
                self.outgoing = None;
            }
        }
        sent - left
    }

    /// Notes that the first `sent` bytes of `run` went out.
    fn sent_of_run(&mut self, run: &Run<'_>, sent: usize, delivered: &mut u64) {
        let (whole, rest, part) = run.split(sent);
        if let Some(last) = whole.last() {
            self.cursor = last.id;
            *delivered += whole.len() as u64;
        }
        if let Some(begun) = rest.first().filter(|_| part > 0) {
            self.sent_of(begun, part, delivered);
        }
    }

    /// Notes that at most `sent` bytes of `entry` went out; returns how many of them were its.
    pub fn sent_of(&mut self, entry: &Arc<Entry>, sent: usize, delivered: &mut u64) -> usize {
        let part = sent.min(entry.frame.len());
        self.cursor = entry.id;
        if part == entry.frame.len() {
            *delivered += 1;
            // What came before the login is not a part of the broadcast's own sweep.
            if entry.id > self.login_head {
                entry.count(1);
            }
        } else {
            self.outgoing.get_or_insert_default().begun = Some((entry.clone(), part));
        }
        part
    }
}

impl Session {
    /// Notes whether it waits for the socket to become writable; returns whether that changed.
    ///
    /// # Errors
    /// The system refuses.
    pub fn watch(&mut self, registry: &Registry, token: Token, is_behind: bool) -> io::Result<bool> {
        if self.is_behind == is_behind {
            return Ok(false);
        }
        if is_behind && !self.is_watched {
            registry.reregister(&mut self.socket, token, Interest::READABLE | Interest::WRITABLE)?;
            self.is_watched = true;
        }
        self.is_behind = is_behind;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_small() {
        assert!(size_of::<Session>() <= 96, "{} bytes", size_of::<Session>());
    }
}
