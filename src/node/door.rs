//! The door: takes connections from the one listener and deals them to the shards.

use std::io::{self, Write};
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::SockRef;

use super::shard::{Message, Sender};
use super::shared::Shared;

const LISTENER: Token = Token(0);
const WAKE: Token = Token(1);

/// How long to wait when the system has no descriptor or no memory for another connection.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// The allowance for accepting is that of so much time at once.
const BURST: Duration = Duration::from_millis(20);

/// Accepts until it is closed.
pub struct Door {
    listener: mio::net::TcpListener,
    poll: Poll,
    shards: Vec<Sender>,
    next: usize,
    shared: Arc<Shared>,
    closed: Arc<AtomicBool>,
}

/// Closes the door from elsewhere.
#[derive(Clone)]
pub struct DoorHandle {
    closed: Arc<AtomicBool>,
    waker: Arc<Waker>,
}

impl DoorHandle {
    /// No further connection is accepted; the listener closes.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "the door cannot be woken");
        }
    }
}

/// How many connections may be accepted now; refills with time.
struct Allowance {
    per_second: f64,
    most: f64,
    left: f64,
    at: Instant,
}

impl Allowance {
    fn new(per_second: u32, now: Instant) -> Self {
        let per_second = f64::from(per_second);
        let most = (per_second * BURST.as_secs_f64()).max(1.0);
        Self { per_second, most, left: most, at: now }
    }

    /// Takes one, or says how long it takes until there is one.
    fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + passed * self.per_second).min(self.most);
        if self.left >= 1.0 {
            self.left -= 1.0;
            Ok(())
        } else {
            Err(Duration::from_secs_f64((1.0 - self.left) / self.per_second))
        }
    }
}

impl Door {
    /// Takes the listener over.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn new(listener: TcpListener, shards: Vec<Sender>, shared: Arc<Shared>) -> io::Result<(Self, DoorHandle)> {
        listener.set_nonblocking(true)?;
        let mut listener = mio::net::TcpListener::from_std(listener);
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let closed = Arc::new(AtomicBool::new(false));
        let handle = DoorHandle { closed: closed.clone(), waker: Arc::new(Waker::new(poll.registry(), WAKE)?) };
        Ok((Self { listener, poll, shards, next: 0, shared, closed }, handle))
    }

    /// Accepts until the door is closed or the node stops.
    pub fn run(mut self) {
        let mut events = Events::with_capacity(8);
        let mut allowance = Allowance::new(self.shared.settings.accept_per_second, Instant::now());
        // When there may be more to accept, after how long to go on.
        let mut again: Option<Duration> = None;
        loop {
            if let Err(error) = self.poll.poll(&mut events, again)
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(%error, "the door's poll fails");
                std::thread::sleep(EXHAUSTED);
            }
            if self.closed.load(Ordering::Acquire) || self.shared.stopping() {
                return;
            }
            again = self.accept_some(&mut allowance);
        }
    }

    /// Accepts what the allowance permits; returns how long to wait if there may be more.
    fn accept_some(&mut self, allowance: &mut Allowance) -> Option<Duration> {
        loop {
            if self.closed.load(Ordering::Acquire) {
                return Some(Duration::ZERO);
            }
            if let Err(wait) = allowance.take(Instant::now()) {
                // The rest waits in the listen queue: late is better than a node that collapses.
                return Some(wait.max(Duration::from_millis(1)));
            }
            match self.listener.accept() {
                Ok((socket, peer)) => self.deal(socket, peer.ip()),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return None,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        self.shared.metrics.connections_refused.with_label_values(&["system"]).inc();
                        tracing::error!(%error, "no connection can be accepted");
                        return Some(EXHAUSTED);
                    }
                },
            }
        }
    }

    fn deal(&mut self, mut socket: TcpStream, peer: IpAddr) {
        self.shared.metrics.connections.inc();
        let permit = match self.shared.caps.admit(peer) {
            Ok(permit) => permit,
            Err(refusal) => {
                self.shared.metrics.connections_refused.with_label_values(&[refusal.reason()]).inc();
                // A new socket's buffer has room for it; whoever is gone already does not miss it.
                let _ = socket.write(refusal.answer().as_bytes());
                return;
            }
        };
        // A frame is one write: waiting for more to send would only delay it.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "a connection without TCP_NODELAY");
        }
        let size = self.shared.settings.send_buffer_bytes;
        if size > 0
            && let Err(error) = SockRef::from(&socket).set_send_buffer_size(size)
        {
            tracing::debug!(%error, "a connection with another send buffer");
        }
        let shard = self.next % self.shards.len().max(1);
        self.next = shard + 1;
        if let Some(shard) = self.shards.get(shard) {
            shard.send_blocking(Message::Connection(socket, permit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allowance_is_a_rate() {
        let start = Instant::now();
        let mut allowance = Allowance::new(100, start);
        let (mut accepted, mut now) = (0u32, start);
        while now < start + Duration::from_secs(10) {
            match allowance.take(now) {
                Ok(()) => accepted += 1,
                Err(wait) => now += wait.max(Duration::from_millis(1)),
            }
        }
        assert!((990..=1010).contains(&accepted), "{accepted}");
        assert_eq!(allowance.most, 2.0);
    }
}
