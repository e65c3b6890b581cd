//! A shard's timers: pings spread over their interval, deadlines in the order in which they were set, the drain.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use mio::Token;

use super::session::State;
use super::{Shard, key, token};
use crate::node::codec::PING;

/// Pings go out in so many parts of their interval, so that a node does not ping everyone at once.
const PARTS: u32 = 64;

/// How often the drain sends some away.
const DRAIN_STEP: Duration = Duration::from_millis(20);

/// Unanswered pings after which a device counts as gone.
const MAX_PINGS: u8 = 2;

/// The HTTP-like code for a login that did not come.
const TIMED_OUT: u16 = 408;

/// All timers of a shard. Deadlines of one kind have one length, so a queue keeps them sorted.
pub struct Timers {
    logins: VecDeque<(Instant, Token)>,
    closes: VecDeque<(Instant, Token)>,
    ping_step: Duration,
    next_ping: Instant,
    /// The part of this round that is pinged next.
    part: usize,
    drain: Option<Drain>,
}

struct Drain {
    from: Instant,
    until: Instant,
    next: Instant,
    /// The place in the slab up to which sessions were sent away.
    place: usize,
}

impl Timers {
    pub fn new(ping: Duration, now: Instant) -> Self {
        let ping_step = ping / PARTS;
        Self {
            logins: VecDeque::new(),
            closes: VecDeque::new(),
            ping_step,
            next_ping: now + ping_step,
            part: 0,
            drain: None,
        }
    }

    pub fn expect_login(&mut self, token: Token, deadline: Instant) {
        self.logins.push_back((deadline, token));
    }

    pub fn expect_close(&mut self, token: Token, deadline: Instant) {
        self.closes.push_back((deadline, token));
    }

    pub fn drain(&mut self, now: Instant, until: Instant) {
        self.drain.get_or_insert(Drain { from: now, until, next: now, place: 0 });
    }

    /// Whether the drain is over: no session left, or its time is up.
    pub fn is_drained(&self, now: Instant, is_empty: bool) -> bool {
        self.drain.as_ref().is_some_and(|drain| is_empty || now >= drain.until)
    }

    /// How long nothing is due.
    pub fn wait(&self, now: Instant) -> Duration {
        let deadlines = [&self.logins, &self.closes].into_iter().filter_map(|queue| queue.front().map(|(at, _)| *at));
        let drain = self.drain.as_ref().map(|drain| drain.next.min(drain.until));
        let next = deadlines.chain(drain).fold(self.next_ping, Instant::min);
        // A poll rounds down to milliseconds; one more and it does not wake for nothing.
        next.saturating_duration_since(now) + Duration::from_millis(1)
    }
}

fn due(queue: &mut VecDeque<(Instant, Token)>, now: Instant) -> Option<Token> {
    if queue.front()?.0 <= now { queue.pop_front().map(|(_, token)| token) } else { None }
}

impl Shard {
    pub(super) fn run_timers(&mut self, now: Instant) {
        while let Some(token) = due(&mut self.timers.logins, now) {
            // In a storm a login may be here and not read yet: that is not the device's fault.
            if self.session(token).is_some_and(|session| matches!(session.state, State::Head | State::Login)) {
                self.read(token, false);
            }
            match self.session(token).map(|session| session.state) {
                Some(State::Head) => self.remove(token, "no_request"),
                Some(State::Login) => self.fail(token, TIMED_OUT, "no login came in time", "no_login"),
                _ => {}
            }
        }
        while let Some(token) = due(&mut self.timers.closes, now) {
            self.remove(token, "closed");
        }
        if self.timers.next_ping <= now {
            self.timers.next_ping = now + self.timers.ping_step;
            self.ping_some();
        }
        self.drain_some(now);
    }

    /// Pings the next part of the sessions: every so many-th place, so that a round takes as long for few as for many.
    fn ping_some(&mut self) {
        let part = self.timers.part;
        self.timers.part = (part + 1) % PARTS as usize;
        for place in (part..self.sessions.capacity()).step_by(PARTS as usize) {
            if let Some(session) = self.sessions.get(place) {
                self.ping(token(place, session.generation));
            }
        }
    }

    fn ping(&mut self, token: Token) {
        let Some(session) = self.sessions.get_mut(key(token)) else { return };
        if !matches!(session.state, State::Waiting | State::Open) {
            return;
        }
        if session.pings >= MAX_PINGS {
            return self.remove(token, "not_heard_from");
        }
        session.pings += 1;
        if session.outgoing.is_some() || session.is_behind {
            // Its socket is full: a ping would not go out, and what is queued asks the same question.
            return;
        }
        match session.socket.write(&PING) {
            Ok(sent) if sent < PING.len() => {
                session.push(&PING[sent..]);
                self.flush(token);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.remove(token, "connection_lost"),
        }
    }

    /// Sends away as many as the passed part of the window asks for. The last fifth of it is for their answers.
    fn drain_some(&mut self, now: Instant) {
        let Some(drain) = &mut self.timers.drain else { return };
        if now < drain.next {
            return;
        }
        drain.next = now + DRAIN_STEP;
        let window = drain.until.saturating_duration_since(drain.from);
        let spread = window * 4 / 5;
        let passed = now.saturating_duration_since(drain.from).as_secs_f64() / spread.as_secs_f64().max(0.001);
        let places = self.sessions.capacity();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let to = ((places as f64 * passed).ceil() as usize).min(places);
        let from = std::mem::replace(&mut drain.place, to);
        for place in from..to {
            if let Some(session) = self.sessions.get(place) {
                self.send_away(token(place, session.generation), window);
            }
        }
    }
}
