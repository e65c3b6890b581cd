//! The embedded ledger: one file, one process, durable.
//!
//! Calls that write queue for one thread, which commits whatever waits in one transaction and answers after it is on the
//! disk (`writer`). The rules are in `commit`, reads in `read`, the tables in `store`. Leases and the node's feed are
//! in memory (`presence`). What is published was committed before, in the order of the ids.

mod commit;
mod presence;
mod read;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc as std_mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use redb::ReadTransaction;
use serde::Deserialize;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use self::commit::Prepared;
use self::presence::Presence;
pub use self::store::OpenError;
use self::store::{Failure, Opener, file_opener, memory_opener, prepare};
use self::writer::{Command, Job, Shared, Writer};
use super::{
    Answer, Feed, Generation, Kind, Ledger, LedgerError, LedgerSettings, NodeName, Recalled, Renewal, Snapshot, Stored,
};
use crate::broadcast::BroadcastId;
use crate::broadcast::app::AppKey;
use crate::broadcast::envelope::Envelope;
use crate::broadcast::request::Submission;
use crate::broadcast::verdict::Decision;

/// Calls that may wait for the writer; a further one waits for a place, without a time limit.
const QUEUE: usize = 1024;

/// Where it is: section `[embedded]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddedSettings {
    /// The file; made if it is not there. Its folder must exist.
    pub path: PathBuf,
}

/// Tells the time: microseconds since the Unix epoch.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The machine's clock.
#[must_use]
pub fn system_clock() -> Clock {
    Arc::new(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    })
}

/// The ledger in one file of this process.
pub struct EmbeddedLedger {
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
    /// `None` only while it is dropped.
    jobs: Option<std_mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for EmbeddedLedger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedLedger").finish_non_exhaustive()
    }
}

/// Finishes what is queued, and closes the file.
impl Drop for EmbeddedLedger {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            // A panic there has been reported by its hook, and by `health`.
            let _ = writer.join();
        }
    }
}

impl EmbeddedLedger {
    /// Opens the file, makes it if it is not there, repairs it after a crash.
    ///
    /// # Errors
    /// If another process has it, if it cannot be used, or if it is no ledger of this version.
    pub fn open(settings: &EmbeddedSettings, ledger: LedgerSettings, clock: Clock) -> Result<Self, OpenError> {
        Self::start(&settings.path, file_opener(settings.path.clone()), ledger, clock)
    }

    /// A ledger in memory, gone with the process.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn in_memory(ledger: LedgerSettings, clock: Clock) -> Result<Self, OpenError> {
        Self::start(Path::new("(memory)"), memory_opener(), ledger, clock)
    }

    fn start(path: &Path, mut opener: Opener, settings: LedgerSettings, clock: Clock) -> Result<Self, OpenError> {
        let database = opener().map_err(|error| OpenError::new(path, &error))?;
        let generation = prepare(&database)
            .map_err(|failure| OpenError::unusable(path, &failure))?
            .map_err(|found| OpenError::Format { path: path.into(), found })?;
        let shared = Arc::new(Shared {
            database: RwLock::new(Some(database)),
            presence: Mutex::new(Presence::default()),
            generation: Mutex::new(generation.into()),
            clock,
            settings,
            health: watch::Sender::new(Ok(())),
            suspect: AtomicBool::new(false),
        });
        let (jobs, receiver) = std_mpsc::channel();
        let writer = Writer { shared: shared.clone(), jobs: receiver, opener, failed: None };
        let writer = std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| OpenError::unusable(path, &error))?;
        Ok(Self { shared, places: Arc::new(Semaphore::new(QUEUE)), jobs: Some(jobs), writer: Some(writer) })
    }

    /// For tests only: pretends that the data has had another life. It is not stored.
    #[doc(hidden)]
    pub fn set_generation(&self, generation: &str) {
        *self.shared.generation.lock().unwrap_or_else(PoisonError::into_inner) = generation.into();
    }

    /// Queues a command for the writer and waits for its answer.
    async fn write<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, LedgerError> {
        let stopped = || LedgerError::Unavailable("the ledger's writer has stopped".to_owned());
        let place = self.places.clone().acquire_owned().await.map_err(|_| stopped())?;
        let (answer, answered) = oneshot::channel();
        let job = Job { command: command(answer), _place: Some(place) };
        self.jobs.as_ref().ok_or_else(stopped)?.send(job).map_err(|_| stopped())?;
        answered.await.map_err(|_| stopped())
    }

    /// Reads on a thread that may wait for the disk. `first` runs before the view is taken.
    async fn read<T: Send + 'static>(
        &self,
        first: impl FnOnce(&Shared) + Send + 'static,
        read: impl FnOnce(&ReadTransaction, u64) -> Result<T, Failure> + Send + 'static,
    ) -> Result<(T, u64), LedgerError> {
        let shared = self.shared.clone();
        let result = tokio::task::spawn_blocking(move || {
            first(&shared);
            let now_ms = shared.now_ms();
            shared.view(|transaction| read(transaction, now_ms)).map(|value| (value, now_ms))
        })
        .await
        .map_err(|_| LedgerError::Unavailable("the process is stopping".to_owned()))?;
        result.map_err(|failure| {
            if !matches!(failure, Failure::Row(_))
                && !self.shared.suspect.swap(true, Ordering::AcqRel)
                && let Some(jobs) = &self.jobs
            {
                // It takes no place: there is one at the most.
                let _ = jobs.send(Job { command: Command::Check, _place: None });
            }
            LedgerError::from(&failure)
        })
    }

    fn generation(&self) -> Generation {
        Generation(self.shared.generation())
    }
}

impl Ledger for EmbeddedLedger {
    fn accept<'a>(&'a self, batch: &'a [Submission]) -> BoxFuture<'a, Vec<Result<Decision, LedgerError>>> {
        Box::pin(async move {
            let prepared: Vec<_> = batch.iter().map(Prepared::from).collect();
            match self.write(|answer| Command::Accept(prepared, answer)).await {
                Ok(decisions) => decisions,
                Err(error) => batch.iter().map(|_| Err(error.clone())).collect(),
            }
        })
    }

    fn recall<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Recalled>> {
        Box::pin(async move { self.write(|answer| Command::Recall(app.clone(), id, answer)).await? })
    }

    fn find<'a>(&'a self, app: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Envelope>> {
        let app = app.clone();
        Box::pin(async move {
            let found = self.read(|_| (), move |view, now_ms| read::find(view, app.as_str(), id, now_ms)).await?;
            Ok(found.0)
        })
    }

    fn list<'a>(&'a self, app: &'a AppKey, before: BroadcastId, limit: usize, kind: Kind) -> Answer<'a, Vec<Envelope>> {
        let app = app.clone();
        Box::pin(async move {
            let list = move |view: &_, now_ms| read::list(view, app.as_str(), before, limit, kind, now_ms);
            Ok(self.read(|_| (), list).await?.0)
        })
    }

    fn first_use<'a>(&'a self, app: &'a AppKey, mark: &'a str, time: Duration) -> Answer<'a, bool> {
        let time_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Box::pin(
            async move { self.write(|answer| Command::FirstUse(app.clone(), mark.to_owned(), time_ms, answer)).await? },
        )
    }

    fn join<'a>(
        &'a self,
        app: &'a AppKey,
        node: &'a NodeName,
        lease: Duration,
        after: BroadcastId,
    ) -> Answer<'a, Snapshot> {
        let (app, key, node) = (app.clone(), app.clone(), node.clone());
        Box::pin(async move {
            // The lease first: what is committed after the view was taken finds it, and is published.
            let take_lease = move |shared: &Shared| {
                let (now_ms, mut presence) = (shared.now_ms(), shared.presence());
                presence.prune(&key, now_ms);
                presence.lease(&key, &node, until(now_ms, lease));
            };
            let snapshot = move |view: &_, now_ms| {
                Ok((read::head(view, app.as_str())?, read::snapshot(view, app.as_str(), after, now_ms)?))
            };
            let ((head, (log, retained)), now_ms) = self.read(take_lease, snapshot).await?;
            Ok(Snapshot { now_ms, head, generation: self.generation(), log, retained, logged: None })
        })
    }

    fn renew<'a>(
        &'a self,
        apps: &'a [AppKey],
        node: &'a NodeName,
        lease: Duration,
    ) -> BoxFuture<'a, Vec<Result<Renewal, LedgerError>>> {
        let (keys, renewed, node) = (apps.to_vec(), apps.to_vec(), node.clone());
        Box::pin(async move {
            let renew = move |shared: &Shared| {
                let (now_ms, mut presence) = (shared.now_ms(), shared.presence());
                renewed.iter().for_each(|app| presence.lease(app, &node, until(now_ms, lease)));
            };
            let heads =
                move |view: &_, _| keys.iter().map(|app| read::head(view, app.as_str())).collect::<Result<Vec<_>, _>>();
            match self.read(renew, heads).await {
                Ok((heads, now_ms)) => {
                    heads.into_iter().map(|head| Ok(Renewal { now_ms, head, generation: self.generation() })).collect()
                }
                Err(error) => apps.iter().map(|_| Err(error.clone())).collect(),
            }
        })
    }

    fn leave<'a>(&'a self, app: &'a AppKey, node: &'a NodeName) -> Answer<'a, ()> {
        Box::pin(async move {
            self.shared.presence().leave(app, node);
            Ok(())
        })
    }

    fn restore<'a>(
        &'a self,
        app: &'a AppKey,
        head: BroadcastId,
        retained: &'a [Stored],
        recalled: &'a [BroadcastId],
    ) -> Answer<'a, u32> {
        let (app, retained, recalled) = (app.clone(), retained.to_vec(), recalled.to_vec());
        Box::pin(async move { self.write(|answer| Command::Restore { app, head, retained, recalled, answer }).await? })
    }

    fn open_feed(&self, node: &NodeName) -> mpsc::Receiver<Feed> {
        self.shared.presence().open_feed(node)
    }

    fn subscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        Box::pin(async move {
            self.shared.presence().subscribe(app);
            Ok(())
        })
    }

    fn unsubscribe<'a>(&'a self, app: &'a AppKey) -> Answer<'a, ()> {
        Box::pin(async move {
            self.shared.presence().unsubscribe(app);
            Ok(())
        })
    }

    fn health(&self) -> watch::Receiver<Result<(), String>> {
        self.shared.health.subscribe()
    }
}

fn until(now_ms: u64, lease: Duration) -> u64 {
    now_ms.saturating_add(u64::try_from(lease.as_millis()).unwrap_or(u64::MAX))
}
