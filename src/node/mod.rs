//! The node: holds the devices' WebSockets, delivers live broadcasts, and serves retained ones at login from memory.
//!
//! One broadcast's way: the ledger's feed → `presence` (one task; merges it into the app's `timeline`) → each `shard`'s inbox →
//! one sweep over the app's sessions there. A connection's way: a shard's `door` → `http` → `login` → the timeline.
//!
//! # The protocol
//! Text messages of JSON on `GET /ws`. The device's first one is
//! `{"type":"login","app":"…","account":"…","device":"…","platform":"web","token":"<JWT>","since":0}`, the only one it sends.
//! The answer is `{"type":"welcome","session":"…","head":<id>,"pending":<n>}`, after which `n` broadcasts follow at once.
//! A broadcast is `{"type":"broadcast","id":…,"fromAccount":"…","time":…,"content":"…"}`, a deletion
//! `{"type":"recall","id":…}`. The device's **cursor**, which it presents as `since` when it connects again, is the largest id
//! that it has received in a broadcast, or `head` once the pending ones have arrived, whichever is larger. `since` 0 is a new
//! device: it gets all that is retained. `head` is never 0: 1 says that there is no broadcast yet, and is the cursor of a
//! device that has been here all the same. One that comes back within the resume window also gets the broadcasts for online
//! devices, and the deletions, that came after its cursor.
//!
//! Errors are `{"type":"error","code":…,"desc":"…"}`, then a close with 1008: code 403 (app or token), 408 (no login in time),
//! 414 (not a login); or code 414 and a close with 1002, 1003, 1007 or 1009, for frames that break the protocol. Other close
//! codes: 1012 when the node goes away, 1013 for a device too far behind, or (after an error of code 503) one of an app that has
//! as many sessions here as it may; the reason of both is `{"reconnectAfterMs":…}`,
//! after which it connects with its cursor.

pub(crate) mod backlog;
mod caps;
mod clock;
pub mod codec;
mod door;
pub(crate) mod entry;
pub(crate) mod http;
pub(crate) mod login;
pub(crate) mod pages;
pub(crate) mod presence;
mod settings;
pub(crate) mod shard;
mod shared;
#[cfg(test)]
mod testing;
pub(crate) mod timeline;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use self::door::listen;
pub use self::settings::NodeSettings;

use self::caps::Caps;
use self::clock::LedgerClock;
use self::login::Apps;
use self::presence::Presence;
use self::shard::{Bell, Message, Sender, Shard};
use self::shared::{Desk, Shared};
use crate::broadcast::app::Directory;
use crate::ledger::{Ledger, NodeName};
use crate::metrics::Metrics;

/// Takes the connections that bring another HTTP request than the upgrade: the socket (non-blocking, no longer watched) and
/// the bytes read from it so far. When the queue is full the client is answered 503.
pub type HttpHandOff = mpsc::Sender<(std::net::TcpStream, Vec<u8>)>;

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A setting that cannot work.
    #[error("{0}")]
    Settings(String),
    /// The system has no descriptor or thread for it.
    #[error("the node cannot start: {0}")]
    System(#[from] io::Error),
}

/// A running node. Dropping it does not stop it: cancel its token, or drain it.
pub struct Node {
    name: NodeName,
    address: SocketAddr,
    ready: watch::Receiver<Result<(), String>>,
    draining: watch::Sender<bool>,
    shards: Vec<Sender>,
    threads: Vec<JoinHandle<()>>,
    presence: tokio::task::JoinHandle<()>,
    /// Cancelled when the threads are to end.
    stop: CancellationToken,
    /// Cancelled when a part has failed.
    failed: CancellationToken,
    /// Cancelled when the presence task is to give its leases up and end.
    leave: CancellationToken,
}

impl Node {
    /// Starts the node's threads and its task on the current runtime; devices can connect when it returns.
    ///
    /// `listeners`: of one address, see [`listen`]; each is a shard's. `http`: who serves requests other than the upgrade, if
    /// anybody. `shutdown`: ends everything at once; [`Node::drain`] is the gentle way.
    ///
    /// # Errors
    /// [`NodeError`], if a setting cannot work or the system refuses.
    pub fn start(
        settings: NodeSettings,
        directory: &Directory,
        ledger: Arc<dyn Ledger>,
        metrics: Metrics,
        listeners: Vec<TcpListener>,
        http: Option<HttpHandOff>,
        shutdown: &CancellationToken,
    ) -> Result<Self, NodeError> {
        settings.validate().map_err(NodeError::Settings)?;
        let name = NodeName(settings.node_name().into());
        let first = listeners.first().ok_or_else(|| NodeError::Settings("a node needs a listener".into()))?;
        let address = first.local_addr()?;
        let apps = Apps::new(directory, settings.tokenless_login);
        let count = listeners.len();
        let shared = Arc::new(Shared {
            desk: Desk::new(apps.len(), settings.max_sessions_per_app),
            caps: Caps::new(settings.max_sessions, settings.max_sessions_per_address),
            settings,
            apps,
            clock: LedgerClock::new(),
            metrics,
            http,
            stop: AtomicBool::new(false),
        });
        let (mut shards, mut senders) = (Vec::new(), Vec::new());
        let per_second = shared.settings.accept_per_second.div_ceil(u32::try_from(count).unwrap_or(u32::MAX).max(1));
        for (number, listener) in listeners.into_iter().enumerate() {
            let (shard, sender) = Shard::new(number, listener, per_second, shared.clone())?;
            shards.push(shard);
            senders.push(sender);
        }

        let stop = shutdown.child_token();
        let failed = CancellationToken::new();
        let end = || EndOnPanic { stop: stop.clone(), failed: failed.clone() };
        let leave = shutdown.child_token();
        stop_threads(stop.clone(), shared.clone(), senders.iter().map(Sender::bell).collect());
        let mut threads = Vec::new();
        for (number, shard) in shards.into_iter().enumerate() {
            threads.push(spawn(format!("shard-{number}"), end(), move || shard.run())?);
        }

        let (ready_sender, ready) = watch::channel(Ok(()));
        let (draining, is_draining) = watch::channel(false);
        let presence = Presence::new(shared, ledger, name.clone(), senders.clone(), ready_sender, is_draining);
        let guard = end();
        let until = leave.clone();
        let presence = tokio::spawn(async move {
            let _guard = guard;
            presence.run(until).await;
        });
        tracing::info!(node = %name, %address, shards = count, "node started");
        Ok(Self { name, address, ready, draining, shards: senders, threads, presence, stop, failed, leave })
    }

    /// The node's name.
    #[must_use]
    pub const fn name(&self) -> &NodeName {
        &self.name
    }

    /// Where devices connect.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Whether the node does its work, as a sentence if not: draining, or the ledger does not answer.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<Result<(), String>> {
        self.ready.clone()
    }

    /// Waits until a part of the node has failed (a thread or its task has panicked, which is logged). The node serves nobody
    /// any more then, and the process should end. Never resolves otherwise: not when the node is drained or stopped.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        self.failed.clone().cancelled_owned()
    }

    /// Stops accepting and sends the devices away with 1012, spread over the time until `deadline`, when the last are cut off.
    /// Then gives the leases up. Until then broadcasts are delivered.
    pub async fn drain(mut self, deadline: Instant) {
        self.draining.send_replace(true);
        for shard in &self.shards {
            shard.send(Message::Drain { until: deadline }).await;
        }
        // Joining blocks; a shard ends when its last session has, at the deadline at the latest.
        let threads = std::mem::take(&mut self.threads);
        let joined =
            tokio::task::spawn_blocking(move || threads.into_iter().map(JoinHandle::join).all(|end| end.is_ok()));
        let grace = deadline.saturating_duration_since(Instant::now()) + Duration::from_secs(2);
        if !matches!(tokio::time::timeout(grace, joined).await, Ok(Ok(true))) {
            tracing::error!(node = %self.name, "a thread of the node did not end well");
        }
        self.stop.cancel();
        self.leave.cancel();
        // An error is a panic there, which has been reported.
        let _ = self.presence.await;
        tracing::info!(node = %self.name, "node drained");
    }
}

/// Should the part of the node that holds it panic, the whole node ends rather than serve some of its devices.
struct EndOnPanic {
    stop: CancellationToken,
    failed: CancellationToken,
}

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a part of the node panicked: the node ends");
            self.stop.cancel();
            self.failed.cancel();
        }
    }
}

/// Starts a thread of the node.
fn spawn(name: String, guard: EndOnPanic, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).spawn(move || {
        let _guard = guard;
        work();
    })
}

/// Tells the threads when to end.
fn stop_threads(stop: CancellationToken, shared: Arc<Shared>, bells: Vec<Bell>) {
    tokio::spawn(async move {
        stop.cancelled().await;
        shared.stop.store(true, Ordering::Release);
        bells.iter().for_each(Bell::ring);
    });
}

#[cfg(test)]
mod tests;
