//! A shard: one thread that owns its sockets, so that nothing on the way to a device takes a lock.
//!
//! Each turn: what the sockets say, who is at the door, what the inbox brings (as much as the timelines' windows hold, so that broadcasts that
//! arrived during a sweep go out together), a slice of each sweep that is under way, the timers.

mod inbox;
mod input;
mod leave;
mod members;
pub(crate) mod session;
pub(crate) mod sweep;
mod timers;

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

pub use self::inbox::{Bell, Message, Sender};

use self::inbox::Inbox;
use self::session::{Session, State, Written};
use self::sweep::View;
use self::timers::Timers;
use super::caps::Permit;
use super::door::Door;
use super::login::AppIndex;
use super::shared::Shared;

/// The token of the inbox's bell. No session has it: a generation is below 2^31.
const BELL: Token = Token(usize::MAX);

/// The token of the door, likewise.
const DOOR: Token = Token(usize::MAX - 1);

/// How many connections are accepted before those who are here have their turn.
const ACCEPTS_A_TURN: usize = 64;

/// Bytes that one read may bring; one buffer serves all sessions of the shard.
const READ_BUFFER: usize = 64 * 1024;

/// How many buffers full are read from one socket before the others have their turn.
const READS_A_TURN: usize = 2;

/// Why a connection ended: a metric's label.
type Reason = &'static str;

/// A shard.
pub struct Shard {
    number: usize,
    shared: Arc<Shared>,
    poll: Poll,
    /// Until the node drains.
    door: Option<Door>,
    inbox: Inbox,
    sessions: Slab<Session>,
    generation: u32,
    /// The apps, by index.
    views: Vec<View>,
    /// The apps whose sessions are being swept.
    sweeping: VecDeque<AppIndex>,
    /// A message that has to wait until a sweep is further: see [`Shard::take_messages`].
    put_off: Option<Message>,
    /// Sessions that were not read to the end.
    unread: Vec<Token>,
    timers: Timers,
    buffer: Box<[u8]>,
    /// Broadcasts delivered in this turn.
    delivered: u64,
}

/// A session's token: its place and its generation, so that an event for an earlier session in the place finds none.
const fn token(key: usize, generation: u32) -> Token {
    Token(key | (generation as usize) << 32)
}

const fn key(token: Token) -> usize {
    token.0 & 0xffff_ffff
}

impl Shard {
    /// Makes a shard that accepts from `listener`, at most `per_second` connections, and the sender of its inbox.
    ///
    /// # Errors
    /// If the system has no descriptors for it.
    pub fn new(
        number: usize,
        listener: TcpListener,
        per_second: u32,
        shared: Arc<Shared>,
    ) -> io::Result<(Self, Sender)> {
        let poll = Poll::new()?;
        let door = Door::new(listener, per_second, shared.settings.send_buffer_bytes, poll.registry(), DOOR)?;
        let (sender, inbox) = inbox::inbox(poll.registry(), BELL)?;
        let shard = Self {
            number,
            poll,
            door: Some(door),
            inbox,
            sessions: Slab::new(),
            generation: 0,
            views: (0..shared.apps.len()).map(|_| View::default()).collect(),
            sweeping: VecDeque::new(),
            put_off: None,
            unread: Vec::new(),
            timers: Timers::new(shared.settings.ping(), Instant::now()),
            buffer: vec![0; READ_BUFFER].into_boxed_slice(),
            delivered: 0,
            shared,
        };
        Ok((shard, sender))
    }

    /// Runs until the node stops, or until it is drained.
    pub fn run(mut self) {
        let mut events = Events::with_capacity(1024);
        loop {
            let timeout = if self.sweeping.is_empty() && self.unread.is_empty() && self.put_off.is_none() {
                let now = Instant::now();
                let timers = self.timers.wait(now);
                self.door.as_ref().and_then(|door| door.wait(now)).map_or(timers, |wait| wait.min(timers))
            } else {
                Duration::ZERO
            };
            if let Err(error) = self.poll.poll(&mut events, Some(timeout))
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(shard = self.number, %error, "the shard's poll fails");
                std::thread::sleep(Duration::from_millis(10));
            }
            for event in &events {
                match event.token() {
                    BELL => {}
                    DOOR => self.door.iter_mut().for_each(Door::knock),
                    _ => self.handle(event),
                }
            }
            self.accept();
            for token in std::mem::take(&mut self.unread) {
                self.read(token, true);
            }
            self.inbox.heard();
            if self.shared.stopping() {
                break;
            }
            self.take_messages();
            self.sweep();
            self.run_timers(Instant::now());
            if self.delivered > 0 {
                self.shared.metrics.deliveries.inc_by(std::mem::take(&mut self.delivered));
            }
            if self.timers.is_drained(Instant::now(), self.sessions.is_empty()) {
                break;
            }
        }
        self.drop_all();
    }

    fn handle(&mut self, event: &Event) {
        let token = event.token();
        if event.is_writable() {
            self.write(token);
        }
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            // When the other side has closed, no further event says so: it is read to the end.
            self.read(token, event.is_read_closed() || event.is_error());
        }
    }

    /// Takes what the inbox brings, up to a message that would push entries out of a window before those who keep up have
    /// had them. That waits for a sweep, and all behind it with it.
    fn take_messages(&mut self) {
        while let Some(message) = self.put_off.take().or_else(|| self.inbox.next()) {
            let has_room = match &message {
                Message::Append { app, .. } => self.has_room(*app),
                Message::Open { app, .. } => self.is_swept(*app),
                _ => true,
            };
            if !has_room {
                self.put_off = Some(message);
                return;
            }
            self.obey(message);
        }
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::Open { app, timeline } => self.open(app, *timeline),
            Message::Append { app, entries } => self.append(app, entries),
            Message::Close { app } => self.close_app(app),
            Message::Drain { until } => {
                // Closes the listener.
                self.door = None;
                self.timers.drain(Instant::now(), until);
            }
        }
    }

    /// Accepts those who are at the door.
    fn accept(&mut self) {
        for _ in 0..ACCEPTS_A_TURN {
            let Some((socket, permit)) = self.door.as_mut().and_then(|door| door.accept(&self.shared)) else { return };
            self.connect(socket, permit);
        }
    }

    /// Takes over a connection that was accepted.
    fn connect(&mut self, socket: mio::net::TcpStream, permit: Permit) {
        self.generation = self.generation.wrapping_add(1) & 0x7fff_ffff;
        let entry = self.sessions.vacant_entry();
        let token = token(entry.key(), self.generation);
        let session = entry.insert(Session::new(socket, Some(permit), self.generation));
        if let Err(error) = self.poll.registry().register(&mut session.socket, token, Interest::READABLE) {
            tracing::warn!(shard = self.number, %error, "a connection cannot be watched");
            self.remove(token, "system");
            return;
        }
        self.timers.expect_login(token, Instant::now() + self.shared.settings.login());
        // Its request is usually here: see `door::listen`.
        self.read(token, false);
    }

    /// The session of this token, unless it has ended.
    fn session(&mut self, token: Token) -> Option<&mut Session> {
        self.sessions.get_mut(key(token)).filter(|session| self::token(key(token), session.generation) == token)
    }

    /// The socket is writable: sends what it has not had. Who does not wait for that is told of it all the same once it has waited
    /// (see [`Session::watch`]), and whenever its side is shut: shutting it again would make an event of it again, and so on.
    fn write(&mut self, token: Token) {
        if let Some(session) = self.session(token).filter(|session| session.is_behind) {
            // A device that takes bytes is alive, though its pong may be queued behind them.
            session.pings = 0;
            self.flush(token);
        }
    }

    /// Sends a session whatever is waiting for it, and then what its cursor has not passed. A socket that takes no more is
    /// watched until it does.
    fn flush(&mut self, token: Token) {
        let Some(session) =
            self.sessions.get_mut(key(token)).filter(|session| self::token(key(token), session.generation) == token)
        else {
            return;
        };
        let timeline = self.views.get(session.app as usize).and_then(|view| view.timeline.as_ref());
        if session.state == State::Open && timeline.is_some_and(|timeline| timeline.has_left_behind(session.reader())) {
            self.evict(token);
            return;
        }
        let was_behind = session.is_behind;
        let result = session
            .write(timeline, || self.shared.clock.now_ms(), &mut self.delivered)
            .and_then(|written| session.watch(self.poll.registry(), token, written == Written::Some).map(|_| written));
        let behind = &self.shared.metrics.sessions_behind;
        match result {
            Ok(Written::Some) if !was_behind => behind.inc(),
            Ok(Written::All) => {
                if was_behind {
                    behind.dec();
                }
                if session.state == State::Closing {
                    self.shut(token);
                }
            }
            Ok(Written::Some) => {}
            Err(_) => self.remove(token, "connection_lost"),
        }
    }
}

#[cfg(test)]
mod tests;
