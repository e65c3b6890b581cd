//! How connections end.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use mio::Token;

use super::session::{Session, State};
use super::{Reason, Shard, key, token};
use crate::node::codec::{self, close};

/// How long the other side may take to close after our last bytes. Closing at once could destroy these on their way.
const CLOSING: Duration = Duration::from_secs(2);

/// The longest wait that a device too far behind is asked for, in milliseconds.
const MOST_AFTER_EVICTION: u64 = 2000;

/// The same for one whose app has as many sessions as it may: others have to leave first.
const MOST_WHEN_FULL: u64 = 30_000;

/// The reason of a close after which the device connects again, at most `most` milliseconds later. Devices that come back at
/// one moment would be a storm; each is given its own.
fn reconnect_hint(most: u64) -> String {
    format!(r#"{{"reconnectAfterMs":{}}}"#, fastrand::u64(100..=most))
}

impl Shard {
    /// Sends the last bytes, then closes; the connection counts as ended from here on.
    pub(super) fn finish(&mut self, token: Token, last: &[u8], reason: Reason) {
        let Some(session) = self.session(token) else { return };
        if session.state == State::Closing {
            return;
        }
        session.push(last);
        session.incoming = None;
        self.leave(token, reason);
        if let Some(session) = self.session(token) {
            session.state = State::Closing;
        }
        self.timers.expect_close(token, Instant::now() + CLOSING);
        self.flush(token);
    }

    /// Takes a session out of its app and counts why it ends. Does nothing for one that is closing already.
    fn leave(&mut self, token: Token, reason: Reason) {
        let Some(session) = self.sessions.get_mut(key(token)) else { return };
        let metrics = &self.shared.metrics;
        match session.state {
            State::Closing => {}
            State::Head | State::Login => metrics.connections_refused.with_label_values(&[reason]).inc(),
            State::Waiting | State::Open => {
                metrics.sessions.dec();
                metrics.sessions_closed.with_label_values(&[reason]).inc();
                let (app, place) = (session.app, session.place);
                self.shared.desk.left(app);
                if let Some(view) = self.views.get_mut(app as usize)
                    && let Some(moved) = view.members.part(place)
                    && let Some(moved) = self.sessions.get_mut(key(moved))
                {
                    moved.place = place;
                }
                tracing::debug!(session = format_args!("{:x}-{:x}", self.number, token.0), reason, "session ended");
            }
        }
    }

    /// Ends a connection at once.
    pub(super) fn remove(&mut self, token: Token, reason: Reason) {
        if self.session(token).is_none() {
            return;
        }
        self.leave(token, reason);
        let Some(mut session) = self.sessions.try_remove(key(token)) else { return };
        if session.is_behind {
            self.shared.metrics.sessions_behind.dec();
        }
        // Closing the descriptor takes it out of the poll as well; a failure here has no consequence.
        let _ = self.poll.registry().deregister(&mut session.socket);
    }

    /// Our last bytes are with the kernel: says so to the other side, which then closes.
    pub(super) fn shut(&mut self, token: Token) {
        if self.session(token).is_some_and(|session| session.socket.shutdown(Shutdown::Write).is_err()) {
            self.remove(token, "connection_lost");
        }
    }

    /// A device further behind than what is kept: it comes back with its cursor and gets what there still is.
    pub(super) fn evict(&mut self, token: Token) {
        self.shared.metrics.evicted.inc();
        self.finish(token, &codec::close(close::TRY_AGAIN, &reconnect_hint(MOST_AFTER_EVICTION)), "too_far_behind");
    }

    /// A device of an app that has no place left here.
    pub(super) fn turn_away(&mut self, token: Token) {
        let error = r#"{"type":"error","code":503,"desc":"the app has as many sessions here as it may"}"#;
        let close = codec::close(close::TRY_AGAIN, &reconnect_hint(MOST_WHEN_FULL));
        self.finish(token, &[codec::text(error), close].concat(), "app_full");
    }

    /// Tells a device to connect again, to another node.
    pub(super) fn send_away(&mut self, token: Token, window: Duration) {
        let Some(session) = self.session(token) else { return };
        if session.state == State::Head {
            return self.remove(token, "drained");
        }
        let most = u64::try_from(window.as_millis()).unwrap_or(u64::MAX).clamp(1000, 60_000);
        self.finish(token, &codec::close(close::RESTART, &reconnect_hint(most)), "drained");
    }

    /// The end of the shard.
    pub(super) fn drop_all(&mut self) {
        let tokens: Vec<Token> =
            self.sessions.iter().map(|(key, session): (usize, &Session)| token(key, session.generation)).collect();
        for token in tokens {
            self.remove(token, "stopped");
        }
    }
}
