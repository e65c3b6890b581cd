//! A shard's door: takes connections from its own listener, no more of them than the allowance.
//!
//! Each shard has a listener on the node's one address, among which the kernel deals the connections: nothing is handed from
//! thread to thread on the way to a login.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::caps::Permit;
use super::http::MAX_HEAD;
use super::shared::Shared;

/// How long to wait when the system has no descriptor or no memory for another connection.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// The allowance for accepting is that of so much time at once.
const BURST: Duration = Duration::from_millis(20);

/// Listens on `address` with so many listeners, each with a queue of `backlog` connections that wait to be accepted.
///
/// # Errors
/// If the system refuses; a port that anybody else listens on is in use.
pub fn listen(address: SocketAddr, count: usize, backlog: i32) -> io::Result<Vec<TcpListener>> {
    let mut listeners: Vec<Socket> = Vec::new();
    let mut address = address;
    for number in 0..count.max(1) {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        // The first one binds alone, so that a second process on the same port is refused instead of sharing it.
        socket.set_reuse_port(number > 0)?;
        socket.bind(&address.into())?;
        socket.set_reuse_port(count > 1)?;
        socket.set_nonblocking(true)?;
        // Port 0 is one of the system's choice, for all of them the same.
        address = socket.local_addr()?.as_socket().unwrap_or(address);
        listeners.push(socket);
    }
    for socket in &listeners {
        if let Err(error) = defer(socket) {
            tracing::warn!(%error, "connections cannot be deferred until their request is here; a login costs more");
        }
        socket.listen(backlog)?;
    }
    Ok(listeners.into_iter().map(TcpListener::from).collect())
}

/// Has the kernel tell of a connection when its first bytes are here, or after a second without any: one wake-up fewer a login,
/// and who only connects takes no place.
#[cfg(target_os = "linux")]
fn defer(listener: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd;

    let seconds: libc::c_int = 1;
    let size = libc::socklen_t::try_from(size_of_val(&seconds)).unwrap_or(0);
    // SAFETY: the descriptor is open, `listener` owns it; the pointer is to `size` bytes that outlive the call, which only
    // reads them. No crate has this option; without it a login is 1.5 times the CPU (ARCHITECTURE.md).
    #[allow(unsafe_code)]
    let status = unsafe {
        let value = std::ptr::from_ref(&seconds).cast();
        libc::setsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, value, size)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
const fn defer(_: &Socket) -> io::Result<()> {
    Ok(())
}

/// A door. It remembers that there may be more to accept, since its listener says so once.
pub struct Door {
    listener: mio::net::TcpListener,
    allowance: Allowance,
    /// From when on there may be a connection to accept.
    ready: Option<Instant>,
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
    /// Watches the listener as `token`. `per_second`: the most connections that are accepted; `send_buffer_bytes`: of each,
    /// 0 for the system's own choice.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn new(
        listener: TcpListener,
        per_second: u32,
        send_buffer_bytes: usize,
        registry: &Registry,
        token: Token,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        // Whatever is accepted inherits both. A frame is one write: waiting for more to send would only delay it.
        let socket = SockRef::from(&listener);
        socket.set_tcp_nodelay(true)?;
        if send_buffer_bytes > 0 {
            socket.set_send_buffer_size(send_buffer_bytes)?;
        }
        let mut listener = mio::net::TcpListener::from_std(listener);
        registry.register(&mut listener, token, Interest::READABLE)?;
        Ok(Self { listener, allowance: Allowance::new(per_second, Instant::now()), ready: None })
    }

    /// The listener has said that somebody is there.
    pub fn knock(&mut self) {
        self.ready.get_or_insert_with(Instant::now);
    }

    /// How long there is nothing to accept, `None` if nobody is known to be there.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        self.ready.map(|at| at.saturating_duration_since(now))
    }

    /// The next connection that may be accepted now, with its place among all.
    pub fn accept(&mut self, shared: &Shared) -> Option<(TcpStream, Permit)> {
        let mut now = Instant::now();
        if self.ready? > now {
            return None;
        }
        loop {
            if let Err(wait) = self.allowance.take(now) {
                // The rest waits in the listen queue: late is better than a node that collapses.
                self.ready = Some(now + wait.max(Duration::from_millis(1)));
                return None;
            }
            match self.listener.accept() {
                Ok((socket, peer)) => {
                    if let Some(accepted) = admit(shared, socket, peer) {
                        return Some(accepted);
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.ready = None;
                        return None;
                    }
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        shared.metrics.connections_refused.with_label_values(&["system"]).inc();
                        tracing::error!(%error, "no connection can be accepted");
                        self.ready = Some(now + EXHAUSTED);
                        return None;
                    }
                },
            }
            now = Instant::now();
        }
    }
}

/// Gives the connection its place, or tells it that there is none.
fn admit(shared: &Shared, mut socket: TcpStream, peer: SocketAddr) -> Option<(TcpStream, Permit)> {
    shared.metrics.connections.inc();
    let permit = match shared.caps.admit(peer.ip()) {
        Ok(permit) => permit,
        Err(refusal) => {
            shared.metrics.connections_refused.with_label_values(&[refusal.reason()]).inc();
            // What is not read would turn the close into a reset, which can overtake the answer.
            let _ = socket.read(&mut [0; MAX_HEAD]);
            // A new socket's buffer has room for it; whoever is gone already does not miss it.
            let _ = socket.write(refusal.answer().as_bytes());
            return None;
        }
    };
    Some((socket, permit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::node::settings::NodeSettings;
    use crate::node::testing::directory;

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

    /// One that has asked for something.
    fn device(address: SocketAddr) -> std::net::TcpStream {
        let mut device = std::net::TcpStream::connect(address).unwrap();
        device.write_all(b"GET").unwrap();
        device
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn who_says_nothing_is_not_accepted_at_once() {
        let listener = listen("127.0.0.1:0".parse().unwrap(), 1, 16).unwrap().remove(0);
        let address = listener.local_addr().unwrap();
        let mut silent = std::net::TcpStream::connect(address).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        silent.write_all(b"GET").unwrap();
        let (mut socket, _) = listener.accept().unwrap();
        let mut request = [0; 8];
        assert_eq!(socket.read(&mut request).unwrap(), 3, "its first bytes are here");
        // Nor is it forgotten.
        let _silent = std::net::TcpStream::connect(address).unwrap();
        listener.set_nonblocking(false).unwrap();
        assert!(listener.accept().is_ok());
    }

    #[test]
    fn all_listeners_have_one_address_and_nobody_else_has_it() {
        let listeners = listen("127.0.0.1:0".parse().unwrap(), 3, 16).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert_eq!(listeners.len(), 3);
        assert!(listeners.iter().all(|listener| listener.local_addr().unwrap() == address));
        for count in [1, 2] {
            let error = listen(address, count, 16).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
        // Whoever connects comes in at one of them.
        let devices: Vec<_> = (0..30).map(|_| device(address)).collect();
        let accepted = listeners.iter().flat_map(|listener| std::iter::from_fn(|| listener.accept().ok()));
        assert_eq!(accepted.count(), devices.len());
    }

    #[test]
    fn who_is_accepted_has_what_the_listener_was_given() {
        let settings = NodeSettings { max_sessions: 1, ..NodeSettings::for_tests() };
        let shared = Shared::for_tests(settings, &directory(), Metrics::new().unwrap());
        let listener = listen("127.0.0.1:0".parse().unwrap(), 1, 16).unwrap().remove(0);
        let address = listener.local_addr().unwrap();
        let poll = mio::Poll::new().unwrap();
        let mut door = Door::new(listener, 1000, 50_000, poll.registry(), Token(0)).unwrap();
        let (first, mut second) = (device(address), device(address));
        assert!(door.accept(&shared).is_none(), "nobody has knocked");
        door.knock();
        let (socket, permit) = door.accept(&shared).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), first.local_addr().unwrap());
        assert!(socket.nodelay().unwrap());
        // The kernel doubles what is asked for.
        assert_eq!(SockRef::from(&socket).send_buffer_size().unwrap(), 100_000);
        // The second is told that there is no place, and then there is nobody.
        assert!(door.accept(&shared).is_none() && door.wait(Instant::now()).is_none());
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut second, &mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        drop(permit);
    }
}
