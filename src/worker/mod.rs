//! The worker: takes requests from the queue, has the ledger decide them, tells the sender and settles the delivery.
//!
//! One supervised session after the other: connect, declare, limit (prefetch), consume. Whatever breaks ends the session, and
//! the next one starts from the beginning; every request that was not settled is delivered again and finds its stored verdict.

mod acks;
mod held;
pub(crate) mod intake;
mod outbox;
mod process;
mod replies;
mod reply_to;
mod session;
mod suspects;
mod topology;

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::reply_to::ReplyQueues;

use crate::amqp::AmqpSettings;
use crate::backoff::Backoff;
use crate::broadcast::app::Directory;
use crate::ledger::Ledger;
use crate::metrics::Metrics;

/// Section `[worker]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerSettings {
    /// The most requests that go to the ledger in one round trip.
    pub batch: usize,
    /// The most such round trips under way at once.
    pub batches_in_flight: usize,
    /// How long the broker may take to confirm a reply before the request is settled without it, milliseconds.
    pub reply_timeout_ms: u64,
    /// The queues that replies may go to, as patterns with `*`. Direct reply-to always may, the worker's own queues never.
    pub allowed_reply_queues: ReplyQueues,
}

impl WorkerSettings {
    /// Checks the ranges.
    ///
    /// # Errors
    /// A sentence.
    pub fn validate(&self) -> Result<(), String> {
        if !(1..=2000).contains(&self.batch) || !(1..=256).contains(&self.batches_in_flight) {
            return Err("worker.batch is from 1 to 2000, worker.batches_in_flight from 1 to 256".into());
        }
        if !(1..=600_000).contains(&self.reply_timeout_ms) {
            return Err("worker.reply_timeout_ms is from 1 to 600000".into());
        }
        self.allowed_reply_queues.validate()
    }
}

/// What a worker works with.
#[derive(Clone)]
pub struct Worker {
    /// Section `[worker]`.
    pub settings: WorkerSettings,
    /// Section `[amqp]`.
    pub amqp: AmqpSettings,
    /// The apps it serves.
    pub directory: Directory,
    /// Where requests are decided.
    pub ledger: Arc<dyn Ledger>,
    /// Its figures.
    pub metrics: Metrics,
}

impl Worker {
    /// Runs until `shutdown`, then stops consuming, settles what it holds and returns. The caller bounds the time.
    ///
    /// `health` says whether it is consuming.
    pub async fn run(self, health: watch::Sender<Result<(), String>>, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let replies = replies::Replies::new(&self.amqp, &self.metrics);
        while !shutdown.is_cancelled() {
            self.metrics.worker_sessions.inc();
            let started = tokio::time::Instant::now();
            match session::run(&self, &replies, &health, &shutdown).await {
                Ok(()) => break,
                Err(error) => {
                    let reason = error.to_string();
                    tracing::warn!(reason, "the session with RabbitMQ ended; starting a new one");
                    let _ = health.send_replace(Err(reason));
                }
            }
            // A session that lasted was a working one: its end is a new incident.
            if started.elapsed() > Duration::from_secs(30) {
                backoff.reset();
            }
            tokio::select! {
                () = backoff.wait() => {}
                () = shutdown.cancelled() => {}
            }
        }
        let _ = health.send_replace(Err("stopped".into()));
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("cannot declare {what}: {reason}")]
    Topology { what: &'static str, reason: String },
    #[error("the server ended the consumer (queue deleted, or a failover)")]
    Cancelled,
    #[error("the connection failed: {0}")]
    Connection(String),
    #[error("an acknowledgement was not taken: the channel is gone")]
    AckRefused,
    #[error("a dead letter was not stored: {0}")]
    DeadLetter(String),
}

impl From<lapin::Error> for SessionError {
    fn from(error: lapin::Error) -> Self {
        Self::Connection(crate::amqp::describe(&error))
    }
}
