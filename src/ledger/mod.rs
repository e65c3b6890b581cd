//! The ledger: the one place where a request becomes a broadcast, and where the nodes read what they missed.
//!
//! Two implementations obey one interface and one generated operation sequence: [`redis`] (scripts on
//! one hash slot an app) and [`embedded`] (one file, one process).

pub mod embedded;
pub mod redis;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use crate::broadcast::BroadcastId;
use crate::broadcast::app::AppKey;
use crate::broadcast::envelope::Envelope;
use crate::broadcast::request::Submission;
use crate::broadcast::verdict::Decision;

/// Section `[ledger]`: how much history an app keeps.
#[derive(Debug, Clone, Copy, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerSettings {
    /// The newest entries of the log that are kept, at least this many (Redis trims in steps of up to 100); 100,000 at most.
    pub log_length: u64,
    /// How long an app's log is kept after its last entry, in hours.
    pub log_hours: u64,
}

/// Why the ledger gave no answer. None of these says that nothing happened: an operation is repeated as it was, and finds
/// its own result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LedgerError {
    /// Not connected, timed out, read-only, out of memory, starting up: hold and try again.
    #[error("the ledger is unavailable: {0}")]
    Unavailable(String),
    /// What is stored is not what this version writes; trying again does not help.
    #[error("the ledger holds something unreadable: {0}")]
    Corrupt(String),
}

impl LedgerError {
    /// Whether the same operation may succeed later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// A node's name: one process's, never two at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeName(pub Arc<str>);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Identifies one uninterrupted life of the stored data. It changes with a failover or a restart, after which the newest
/// entries may be gone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Generation(pub Arc<str>);

/// An envelope as it is stored, with what every reader needs of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// As it was written; kept so that it can be written back unchanged.
    pub raw: Arc<[u8]>,
    /// The same, read.
    pub envelope: Envelope,
}

/// What a node is given of an app at once: when it joins, and when it has missed something.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The ledger's clock at that moment, milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// The app's newest id, 0 if it has none.
    pub head: BroadcastId,
    /// See [`Generation`].
    pub generation: Generation,
    /// The log after the position that was asked for, oldest first. Where the first entry's `prev` lies after that
    /// position, the log had been trimmed past it.
    pub log: Vec<Stored>,
    /// All retained broadcasts that were valid, oldest first.
    pub retained: Vec<Stored>,
    /// How many entries the log has ever had, those that it has let go included, if the ledger counts them.
    pub logged: Option<u64>,
}

/// The answer to a lease renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    /// The ledger's clock, milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// The app's newest id.
    pub head: BroadcastId,
    /// See [`Generation`].
    pub generation: Generation,
}

/// A broadcast that was deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recalled {
    /// The id of the recall itself, in the app's chain.
    pub recall_id: BroadcastId,
    /// Nodes that held a lease.
    pub targeted: u32,
    /// Nodes that were subscribed.
    pub reached: u32,
}

/// Which broadcasts a listing shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Every one still in the log or retained.
    All,
    /// Retained and valid.
    Retained,
    /// For online devices only.
    OnlineOnly,
}

/// What a node's subscription brings.
#[derive(Debug, Clone)]
pub enum Feed {
    /// An envelope was published for this app. It may be a repetition, or out of order after an interruption.
    Published(AppKey, Arc<[u8]>),
    /// Something may have been missed for every app (the connection was lost and is back, or the buffer overflowed):
    /// compare positions.
    Interrupted,
}

/// How many published envelopes may wait for the node before the subscription says [`Feed::Interrupted`] instead.
pub const FEED_CAPACITY: usize = 4096;

/// The result of a ledger call.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, LedgerError>>;

/// The interface. All calls may be repeated: an acceptance finds its own verdict, the others change nothing twice.
pub trait Ledger: Send + Sync {
    /// Decides each request, in order: the commit point. One result a request.
    ///
    /// A batch exists for speed only: each request is decided by itself, and one failure leaves the others alone.
    fn accept<'a>(&'a self, batch: &'a [Submission]) -> BoxFuture<'a, Vec<Result<Decision, LedgerError>>>;

    /// Deletes a broadcast everywhere and tells the nodes; `None` if there is none of this id (any more: a second call gets
    /// that too).
    fn recall<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Recalled>>;

    /// One broadcast, if it is still in the log, or retained and valid.
    fn find<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Envelope>>;

    /// Broadcasts with ids below `before` (0: from the newest), newest first, at most `limit`.
    fn list<'a>(&'a self, app: &'a AppKey, before: BroadcastId, limit: usize, kind: Kind) -> Answer<'a, Vec<Envelope>>;

    /// Whether this is the first use of `mark` by the app; it is remembered for `time` from now. One call of all that use the
    /// same mark is told `true`, whichever process they are in. The one exception to repeating: a call whose answer was
    /// lost may have been the first use.
    fn first_use<'a>(&'a self, app: &'a AppKey, mark: &'a str, time: Duration) -> Answer<'a, bool>;

    /// Takes or renews the node's lease, and reads the app's state after `after` in the same instant: whatever is accepted
    /// from then on is published to the node.
    fn join<'a>(
        &'a self,
        app: &'a AppKey,
        node: &'a NodeName,
        lease: Duration,
        after: BroadcastId,
    ) -> Answer<'a, Snapshot>;

    /// Renews the leases of many apps; one result an app, in order.
    fn renew<'a>(
        &'a self,
        apps: &'a [AppKey],
        node: &'a NodeName,
        lease: Duration,
    ) -> BoxFuture<'a, Vec<Result<Renewal, LedgerError>>>;

    /// Gives the lease up.
    fn leave<'a>(&'a self, app: &'a AppKey, node: &'a NodeName) -> Answer<'a, ()>;

    /// Writes back what the ledger may have lost: raises the head to `head`, retains `retained` (expired or known ones are
    /// skipped, the newest 100 stay), and forgets the retained broadcasts that are named in `recalled`. What was deleted
    /// after `head`, which the node cannot know yet, does not come back. Returns how many were missing.
    fn restore<'a>(
        &'a self,
        app: &'a AppKey,
        head: BroadcastId,
        retained: &'a [Stored],
        recalled: &'a [BroadcastId],
    ) -> Answer<'a, u32>;

    /// Opens the node's subscription; called once a node, before the first [`Ledger::subscribe`].
    fn open_feed(&self, node: &NodeName) -> mpsc::Receiver<Feed>;

    /// Has the app's envelopes sent to the feed; when it returns, it is in force. It stays so across reconnections.
    fn subscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()>;

    /// Ends that.
    fn unsubscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()>;

    /// Whether the ledger answers, as a sentence if not. Watched for `/readyz`.
    fn health(&self) -> watch::Receiver<Result<(), String>>;
}
