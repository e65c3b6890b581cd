//! Replies, on connections of their own that last as long as the worker runs: whatever one sender's `reply_to` does to such a
//! connection costs the replies on it. The requests that are held, and the acknowledgements, know nothing of it.
//!
//! Those by direct reply-to do not share one with the others. Brokers of 3.10 end the connection that publishes to a name whose
//! node they do not know, and the name is the sender's to write. A node is known once a reply to a name of it was confirmed; until
//! then its replies go one at a time over a third connection, so that made-up names cost those to nodes not known yet, at most.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Confirmation, Connection};
use tokio::time::Instant;

use super::reply_to::Node;
use crate::amqp::{AmqpSettings, Publisher, connect, describe};
use crate::backoff::Backoff;
use crate::metrics::Metrics;

/// A connection that lasted so long was a working one: its end is a new incident.
const LASTED: Duration = Duration::from_secs(30);

/// How long a connection may take to answer at the start of a session.
const ANSWER: Duration = Duration::from_secs(3);

/// No cluster has so many nodes.
const MOST_KNOWN: usize = 1000;

/// A reply on its way.
pub(super) struct Reply {
    pub(super) to: ShortString,
    pub(super) body: String,
    pub(super) properties: BasicProperties,
}

/// Why a reply did not get to its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    Unroutable,
    Blocked,
    Timeout,
    Connection,
}

impl Lost {
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Unroutable => "unroutable",
            Self::Blocked => "blocked",
            Self::Timeout => "timeout",
            Self::Connection => "connection",
        }
    }
}

/// Sends replies.
pub(super) struct Replies {
    /// Nodes of the broker, at most [`MOST_KNOWN`]. A std Mutex, not tokio's: never held across an await.
    known: Mutex<BTreeSet<Node>>,
    to_queues: Arc<Lane>,
    to_known: Arc<Lane>,
    to_others: Arc<Lane>,
}

impl Replies {
    /// Opens nothing.
    pub(super) fn new(settings: &AmqpSettings, metrics: &Metrics) -> Self {
        let lane = |name, mandatory| {
            Arc::new(Lane {
                name,
                mandatory,
                settings: settings.clone(),
                metrics: metrics.clone(),
                line: Mutex::default(),
                opening: tokio::sync::Mutex::new(Opening {
                    backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
                    not_before: Instant::now(),
                }),
            })
        };
        // A direct reply is never mandatory: its name is no queue, so that each would come back as unroutable.
        Self {
            known: Mutex::default(),
            to_queues: lane("broadcastd worker: replies", true),
            to_known: lane("broadcastd worker: direct replies", false),
            to_others: lane("broadcastd worker: direct replies to new nodes", false),
        }
    }

    /// At the start of a session: what ended the one before may have swallowed these connections, too, and each would find that out
    /// by itself only at its next heartbeat, seconds of lost replies later. One that does not answer is replaced; the one that most
    /// workers need is opened, so that no reply waits for it.
    pub(super) async fn renew(&self) {
        tokio::join!(self.to_queues.renew(), self.to_known.renew(), self.to_others.renew());
        // The broker is there: who waits for another attempt need not. Not so `to_others`, whose names may end one after the other.
        for lane in [&self.to_queues, &self.to_known] {
            lane.opening.lock().await.succeeded();
        }
        // What went wrong is logged, and the next reply tries again.
        let _ = self.to_queues.line().await;
    }

    /// Whether the broker is known to take none just now.
    pub(super) fn blocked(&self) -> bool {
        [&self.to_queues, &self.to_known, &self.to_others].iter().any(|lane| lane.blocked())
    }

    /// Sends one and waits until the broker has it. The caller bounds the time.
    pub(super) async fn send(&self, reply: Reply) -> Result<(), Lost> {
        let Some(node) = Node::of(reply.to.as_str()) else { return self.to_queues.line().await?.send(reply).await };
        if !self.known().contains(&node) {
            // One at a time, so that an end tells of one name; and each name is an atom that the broker never forgets.
            let mut opening = self.to_others.opening.lock().await;
            if !self.known().contains(&node) {
                let sent = self.to_others.open(&mut opening).await?.send(reply).await;
                if sent.is_ok() {
                    opening.succeeded();
                    let mut known = self.known();
                    // Newer brokers confirm made-up ones, too.
                    if known.len() >= MOST_KNOWN {
                        known.clear();
                    }
                    known.insert(node);
                }
                return sent;
            }
        }
        let sent = self.to_known.line().await?.send(reply).await;
        if sent == Err(Lost::Connection) {
            // It may have been for this node, gone from the cluster.
            self.known().remove(&node);
        }
        sent
    }

    fn known(&self) -> MutexGuard<'_, BTreeSet<Node>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that is opened when it is needed, and again when it was lost, after a while.
struct Lane {
    name: &'static str,
    mandatory: bool,
    settings: AmqpSettings,
    metrics: Metrics,
    /// A std Mutex, not tokio's: never held across an await.
    line: Mutex<Option<Arc<Line>>>,
    opening: tokio::sync::Mutex<Opening>,
}

struct Opening {
    backoff: Backoff,
    not_before: Instant,
}

impl Opening {
    fn succeeded(&mut self) {
        self.backoff.reset();
        self.not_before = Instant::now();
    }
}

/// An open connection; dropped, it is closed.
struct Line {
    connection: Connection,
    publisher: Publisher,
    options: BasicPublishOptions,
    opened: Instant,
}

impl Lane {
    fn current(&self) -> MutexGuard<'_, Option<Arc<Line>>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn usable(&self) -> Option<Arc<Line>> {
        self.current().clone().filter(|line| line.publisher.is_usable())
    }

    fn blocked(&self) -> bool {
        self.usable().is_some_and(|line| line.connection.status().blocked())
    }

    /// Lets a line go that does not answer.
    async fn renew(&self) {
        // One that has ended is replaced, and told of, by the next reply.
        let Some(line) = self.usable() else { return };
        if line.answers().await {
            return;
        }
        tracing::warn!(connection = self.name, "it does not answer: replies get another one");
        let mut current = self.current();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &line)) {
            *current = None;
        }
        tokio::spawn(line.ended(Duration::from_secs(u64::from(self.settings.heartbeat_seconds)) * 3));
    }

    async fn line(self: &Arc<Self>) -> Result<Arc<Line>, Lost> {
        match self.usable() {
            Some(line) => Ok(line),
            None => self.open(&mut *self.opening.lock().await).await,
        }
    }

    /// The open line, or a new one.
    async fn open(self: &Arc<Self>, opening: &mut Opening) -> Result<Arc<Line>, Lost> {
        if let Some(line) = self.usable() {
            return Ok(line);
        }
        let ended = self.current().take();
        if let Some(line) = ended {
            tracing::warn!(
                connection = self.name,
                "replies under way were lost: the connection ended, or confirms nothing"
            );
            if line.opened.elapsed() > LASTED {
                opening.succeeded();
            }
        }
        if Instant::now() < opening.not_before {
            return Err(Lost::Connection);
        }
        // Before the attempt, which may be given up at any point.
        opening.not_before = Instant::now() + opening.backoff.next_delay();
        // A task of its own: whoever waits may give up before it is there, and the next one finds it.
        let lane = Arc::clone(self);
        tokio::spawn(async move { lane.connect().await }).await.unwrap_or(Err(Lost::Connection))
    }

    async fn connect(&self) -> Result<Arc<Line>, Lost> {
        let open = async {
            let connection = connect(&self.settings, self.name).await?;
            let publisher = tokio::time::timeout(
                Duration::from_millis(self.settings.connect_timeout_ms),
                Publisher::open(&connection),
            );
            let publisher = publisher.await.map_err(|_| "no answer in time".to_owned())?;
            Ok::<_, String>((connection, publisher.map_err(|error| describe(&error))?))
        };
        let (connection, publisher) = open.await.map_err(|reason| {
            tracing::warn!(reason, connection = self.name, "replies are lost: the broker cannot be reached");
            Lost::Connection
        })?;
        self.metrics.reply_connections.inc();
        let options = BasicPublishOptions { mandatory: self.mandatory, immediate: false };
        let line = Arc::new(Line { connection, publisher, options, opened: Instant::now() });
        *self.current() = Some(Arc::clone(&line));
        Ok(line)
    }
}

impl Line {
    /// Whether the broker answers on it. While it takes no publishes it may not, and is well all the same.
    async fn answers(&self) -> bool {
        let asked = async { self.connection.create_channel().await?.close(200, "it answers".into()).await };
        self.connection.status().blocked() || matches!(tokio::time::timeout(ANSWER, asked).await, Ok(Ok(())))
    }

    /// Waits, but no longer than so, until its heartbeat has ended it: closed before that, lapin would wait for the broker's answer
    /// for as long as the system's TCP does.
    async fn ended(self: Arc<Self>, patience: Duration) {
        let mut look = tokio::time::interval(Duration::from_secs(1));
        let ended = async {
            while self.connection.status().connected() {
                look.tick().await;
            }
        };
        let _ = tokio::time::timeout(patience, ended).await;
    }

    async fn send(&self, reply: Reply) -> Result<(), Lost> {
        if self.connection.status().blocked() {
            return Err(Lost::Blocked);
        }
        let Reply { to, body, properties } = reply;
        let sent = self.publisher.publish("".into(), to, self.options, body.as_bytes(), properties).await;
        match sent.map_err(|_| Lost::Connection)?.await {
            Ok(Confirmation::Ack(None) | Confirmation::NotRequested) => Ok(()),
            Ok(_) => Err(Lost::Unroutable),
            Err(_) => Err(Lost::Connection),
        }
    }
}
