//! What devices send: the HTTP request, the login, and little else.

use std::io::{self, Read};
use std::ops::ControlFlow;

use mio::Token;

use super::session::{Incoming, State};
use super::{READS_A_TURN, Shard, key};
use crate::broadcast::verdict::code;
use crate::node::codec::{self, Decoder, Event, Flow, close};
use crate::node::http::{self, Head, Refusal};

impl Shard {
    /// Reads what a socket has, a few buffers at a time. A short read has emptied it, unless it is to be read `to_end`.
    pub(super) fn read(&mut self, token: Token, to_end: bool) {
        // Taken out so that what is in it and the shard can both be used.
        let mut buffer = std::mem::take(&mut self.buffer);
        for turn in 0.. {
            let Some(session) = self.session(token) else { break };
            if turn == READS_A_TURN {
                self.unread.push(token);
                break;
            }
            match session.socket.read(&mut buffer) {
                Ok(0) => {
                    self.remove(token, "left");
                    break;
                }
                Ok(size) => {
                    session.pings = 0;
                    self.receive(token, &mut buffer[..size]);
                    if size < buffer.len() && !to_end {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.remove(token, "connection_lost");
                    break;
                }
            }
        }
        self.buffer = buffer;
    }

    fn receive(&mut self, token: Token, bytes: &mut [u8]) {
        let Some(session) = self.session(token) else { return };
        match (session.state, session.incoming.take().map(|incoming| *incoming)) {
            (State::Closing, _) => self.drain_closing(token, bytes),
            (State::Head, None) => self.receive_head(token, bytes),
            (State::Head, Some(Incoming::Head(mut before))) => {
                before.extend_from_slice(bytes);
                self.receive_head(token, &mut before);
            }
            (_, Some(Incoming::Frames(decoder))) => self.receive_frames(token, decoder, bytes),
            (_, _) => self.receive_frames(token, Decoder::default(), bytes),
        }
    }

    fn receive_head(&mut self, token: Token, bytes: &mut [u8]) {
        let head = http::read_head(bytes, &self.shared.settings.allowed_origins);
        let Some(session) = self.session(token) else { return };
        match head {
            Head::Partial => session.incoming = Some(Box::new(Incoming::Head(bytes.to_vec()))),
            Head::Upgrade { answer, size } => {
                session.state = State::Login;
                session.push(answer.as_bytes());
                self.flush(token);
                if let Some(frames) = bytes.get_mut(size..).filter(|frames| !frames.is_empty()) {
                    self.receive(token, frames);
                }
            }
            Head::Other => self.hand_off(token, bytes),
            Head::Refused(refusal) => self.refuse_http(token, refusal),
        }
    }

    /// Gives the connection to whoever serves other requests here.
    fn hand_off(&mut self, token: Token, bytes: &[u8]) {
        let Some(http) = self.shared.http.clone() else { return self.refuse_http(token, Refusal::NotFound) };
        // When its queue is full the client is told to come back.
        let Ok(permit) = http.try_reserve() else { return self.refuse_http(token, Refusal::Busy) };
        let Some(mut session) = self.sessions.try_remove(key(token)) else { return };
        match self.poll.registry().deregister(&mut session.socket) {
            Ok(()) => permit.send((session.socket.into(), bytes.to_vec())),
            Err(error) => tracing::warn!(%error, "a connection cannot be handed over"),
        }
    }

    fn receive_frames(&mut self, token: Token, mut decoder: Decoder, bytes: &mut [u8]) {
        let result = decoder.feed(bytes, |event| self.receive_event(token, event));
        match (result, self.session(token)) {
            (Err(violation), _) => {
                self.close_with(token, violation.0, code::BAD_PARAMETER, violation.desc(), "violation")
            }
            (Ok(()), Some(session)) if session.state != State::Closing && !decoder.is_idle() => {
                session.incoming = Some(Box::new(Incoming::Frames(decoder)));
            }
            _ => {}
        }
    }

    fn receive_event(&mut self, token: Token, event: Event<'_>) -> Flow {
        let Some(session) = self.session(token) else { return ControlFlow::Break(()) };
        match event {
            Event::Text(text) if session.state == State::Login => self.log_in(token, text),
            Event::Text(_) => {
                self.fail(token, code::BAD_PARAMETER, "after its login a device sends nothing", "chatter")
            }
            Event::Ping(payload) => {
                // Of many pings that a device sends without reading, only some are answered.
                if session.has_room() {
                    session.push(&codec::pong(payload));
                    self.flush(token);
                }
            }
            Event::Pong => {}
            Event::Close(code) => self.finish(token, &codec::close(code.unwrap_or(close::NORMAL), ""), "left"),
        }
        if self.session(token).is_some_and(|session| session.state != State::Closing) {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    }

    pub(super) fn log_in(&mut self, token: Token, text: &str) {
        let login = match self.shared.apps.check(text) {
            Ok(login) => login,
            Err(refused) => {
                let reason = if refused.code == code::FORBIDDEN { "forbidden" } else { "malformed_login" };
                return self.fail(token, refused.code, refused.desc, reason);
            }
        };
        if !self.shared.desk.arrive(login.app) {
            return self.turn_away(token);
        }
        let (Some(session), Some(view)) = (self.sessions.get_mut(key(token)), self.views.get_mut(login.app as usize))
        else {
            return self.shared.desk.left(login.app);
        };
        self.shared.metrics.sessions.inc();
        self.shared.metrics.logins.inc();
        session.state = State::Waiting;
        session.app = login.app;
        session.cursor = login.since;
        session.platform = login.platform;
        session.place = view.members.join(token);
        if view.timeline.is_some() {
            self.welcome(token);
        } else if !std::mem::replace(&mut view.is_wanted, true) {
            self.shared.desk.want(login.app);
        }
    }

    /// Lets a session whose app's timeline is there begin: the welcome, and at once what it has not had.
    pub(super) fn welcome(&mut self, token: Token) {
        let number = self.number;
        let Some(session) = self.sessions.get_mut(key(token)) else { return };
        let Some(timeline) = self.views.get_mut(session.app as usize).and_then(|view| view.timeline.as_mut()) else {
            return;
        };
        let resume_ms = self.shared.settings.resume_seconds.saturating_mul(1000);
        let now_ms = self.shared.clock.now_ms();
        if timeline.resumes_short(session.cursor, now_ms, resume_ms) {
            self.shared.metrics.resumes_short.inc();
            tracing::debug!(since = session.cursor, "came back, but too much was broadcast meanwhile");
        }
        let pending = session.admit(timeline, now_ms, resume_ms);
        // Never 0, which would make it a new device again when it comes back.
        let head = session.login_head.max(1);
        // The name says where the session is: shard, generation and place.
        let name = format!("{number:x}-{:x}", token.0);
        tracing::debug!(session = %name, since = session.cursor, head, pending, "logged in");
        session.push(&codec::text(&format!(
            r#"{{"type":"welcome","session":"{name}","head":{head},"pending":{pending}}}"#
        )));
        self.flush(token);
    }

    /// What comes while it waits for the other side to close: only that is of interest.
    fn drain_closing(&mut self, token: Token, bytes: &mut [u8]) {
        let mut closed = false;
        let result = Decoder::default().feed(bytes, |event| {
            closed |= matches!(event, Event::Close(_));
            ControlFlow::Continue(())
        });
        if closed && result.is_ok() {
            self.remove(token, "left");
        } else if let Some(session) = self.session(token) {
            // It ends at its deadline, whatever is sent.
            session.pings = 0;
        }
    }

    /// Answers a request that is neither ours nor anybody's, and closes.
    pub(super) fn refuse_http(&mut self, token: Token, refusal: Refusal) {
        self.finish(token, refusal.answer().as_bytes(), refusal.reason());
    }

    /// Tells the device what is wrong, and closes with 1008.
    pub(super) fn fail(&mut self, token: Token, code: u16, desc: &str, reason: super::Reason) {
        self.close_with(token, close::POLICY, code, desc, reason);
    }

    /// The same with another close code.
    fn close_with(&mut self, token: Token, close: u16, code: u16, desc: &str, reason: super::Reason) {
        let error = serde_json::json!({ "type": "error", "code": code, "desc": desc });
        let bytes = [codec::text(&error.to_string()), codec::close(close, "")].concat();
        self.finish(token, &bytes, reason);
    }
}
